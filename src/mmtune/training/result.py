"""What a finetuning leaves behind: in memory and on disk."""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sentence_transformers.base.trainer import BaseTrainer

from mmtune.models.kinds import HostModel
from mmtune.report.markdown import run_report, with_finetuning_section
from mmtune.report.tables import BeforeAfter, before_after, before_after_cells, text_table

_PACKAGES = ("mmtune", "sentence-transformers", "transformers", "torch", "datasets", "accelerate", "pillow", "numpy")


@dataclass(frozen=True)
class FinetuneResult:
    """A finetuned model and what is known about it. ``print(result)`` shows the gain at each dimension.

    Attributes:
        model: The trained model, the best checkpoint where there was an evaluation set.
        trainer: The host's trainer, with its log in ``trainer.state.log_history``.
        before: Metrics of the model as it came; empty without an evaluation set.
        after: Metrics of the trained model; empty without an evaluation set.
        primary_metric: The metric that chose the checkpoint; ``None`` without an evaluation set.
        output_dir: The folder with ``final/``, ``metrics.json``, ``report.md`` and the checkpoints.
        settings: Everything that was chosen, by topic.
    """

    model: HostModel
    trainer: BaseTrainer
    before: dict[str, float]
    after: dict[str, float]
    primary_metric: str | None
    output_dir: Path
    settings: dict[str, dict[str, Any]]

    @property
    def report(self) -> str:
        """The report in Markdown, as in ``report.md``."""
        return run_report("Finetuning report", self.rows, self.measure, self.settings)

    @property
    def rows(self) -> list[BeforeAfter]:
        """Before and after at each dimension; empty without an evaluation set."""
        return before_after(self.before, self.after, self.primary_metric) if self.primary_metric else []

    @property
    def measure(self) -> str:
        """What the rows show, e.g. ``"ndcg@10"``."""
        return (self.primary_metric or "").rpartition("_")[2]

    def __str__(self) -> str:
        saved = f"saved in {self.output_dir / 'final'}"
        if not self.rows:
            return f"No evaluation set, so nothing is known about the gain; {saved}"
        table = text_table((self.measure, "before", "after", "change"), before_after_cells(self.rows))
        return f"{table}\n{saved}"

    def save(self) -> None:
        """Write ``metrics.json``, ``report.md`` and the card of the model, which is in ``final/`` already."""
        card = self.output_dir / "final" / "README.md"
        if card.is_file():
            text = with_finetuning_section(card.read_text("utf-8"), self.rows, self.measure, self.settings)
            card.write_text(text, "utf-8")
        metrics = {
            "before": self.before,
            "after": self.after,
            "primary_metric": self.primary_metric,
            "settings": self.settings,
            "versions": versions(),
        }
        (self.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2, default=str) + "\n", "utf-8")
        (self.output_dir / "report.md").write_text(self.report, "utf-8")


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
