"""What a finetuning leaves behind: in memory and on disk, with everything that was chosen."""

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sentence_transformers.base.trainer import BaseTrainer

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.relevance import resolve_direction
from mmtune.errors import MissingExtraError
from mmtune.evaluation.history import PER_QUERY_FILE
from mmtune.evaluation.significance import Verdict
from mmtune.models.kinds import HostModel
from mmtune.report.card import add_to_card
from mmtune.report.html import write_page
from mmtune.report.markdown import BeforeAfter, compare_metrics, text_table, write_report
from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.inputs import TrainingSets
from mmtune.training.mini_batches import plain_losses
from mmtune.training.trainers import Kind, PageTrainer

logger = logging.getLogger(__name__)

KEPT_START = "the start: nothing beat it"
_PACKAGES = (
    "mmtune",
    "sentence-transformers",
    "transformers",
    "torch",
    "torch-optimi",
    "datasets",
    "accelerate",
    "pillow",
    "numpy",
)


@dataclass(frozen=True)
class FinetuneResult:
    """A finetuned model and what is known about it. ``print(result)`` shows the gain at each dimension.

    Attributes:
        model: The trained model, the best checkpoint where there was an evaluation set. It is the model of ``final/``,
            its weights in the type in which they are saved there.
        trainer: The host's trainer, with its log in ``trainer.state.log_history``; ``None`` where ``resume="auto"``
            found the run at its end.
        before: Metrics of the model as it came; empty without an evaluation set.
        after: Metrics of the trained model; empty without an evaluation set.
        primary_metric: The metric that chose the checkpoint; ``None`` without an evaluation set.
        output_dir: The folder with ``final/``, ``metrics.json``, ``report.md`` and the checkpoints.
        settings: Everything that was chosen, by topic.
        verdict: Whether it got better, for whom, and whether by chance; ``None`` where values by query are not known,
            as without an evaluation set. They are in ``per_query.parquet``.
    """

    model: HostModel
    trainer: BaseTrainer | None
    before: dict[str, float]
    after: dict[str, float]
    primary_metric: str | None
    output_dir: Path
    settings: dict[str, dict[str, Any]]
    verdict: Verdict | None = None

    @classmethod
    def read(cls, folder: Path, kind: Kind) -> "FinetuneResult":
        """The result of a run that came to its end, its model from ``final/``."""
        saved = json.loads((folder / "metrics.json").read_text("utf-8"))
        parts = {name: saved[name] for name in ("before", "after", "primary_metric", "settings")}
        model = kind.model_class(str(folder / "final")).eval()
        verdict = Verdict.from_dict(saved["verdict"]) if saved.get("verdict") else None
        return cls(model, None, output_dir=folder, verdict=verdict, **parts)

    @property
    def report(self) -> str:
        """The report in Markdown, as in ``report.md``."""
        report = write_report("Finetuning report", self.rows, self.measure, self.settings, self.verdict_rows)
        return "\n\n".join([*self.first_lines, report])

    @property
    def first_lines(self) -> list[str]:
        """What a reader must know first: the verdict, and whether the model is the one that came."""
        lines = [] if self.verdict is None else [f"{self.verdict}."]
        if self.settings["training"].get("kept") == KEPT_START:
            return [*lines, "Nothing beat the start: final/ is the model as it came, untrained."]
        before, after = (metrics.get(self.primary_metric or "") for metrics in (self.before, self.after))
        if before is None or after is None or before <= after:
            return lines
        keeps = "keep='best', with evaluation during the training, keeps the better one."
        return [
            *lines,
            f"The model is worse than it was: {self.measure} {before:.4f} before, {after:.4f} after. {keeps}",
        ]

    @property
    def verdict_rows(self) -> list[list[str]]:
        """The verdict by size and by group, as cells: what, before, after, change, interval, p, queries."""
        return _list_verdicts(self.verdict)

    @property
    def rows(self) -> list[BeforeAfter]:
        """Before and after at each dimension; empty without an evaluation set."""
        return compare_metrics(self.before, self.after, self.primary_metric) if self.primary_metric else []

    @property
    def measure(self) -> str:
        """What the rows show, e.g. ``"ndcg@10"``."""
        return (self.primary_metric or "").rpartition("_")[2]

    def __str__(self) -> str:
        saved = f"saved in {self.output_dir / 'final'}"
        if not self.rows:
            return f"No evaluation set, so nothing is known about the gain; {saved}"
        table = text_table((self.measure, "before", "after", "change"), [row.cells for row in self.rows])
        return "\n".join([*self.first_lines, table, saved])

    def save(
        self, evaluation: Mapping[str, RetrievalDataset], documents: DocumentKind, *, thumbnails: bool = True
    ) -> None:
        """Write ``metrics.json``, the reports and the card of the model, which is in ``final/`` already.

        Args:
            evaluation: The evaluation sets, for ``report.html``, which is written where its packages are installed.
            documents: What a document is made of.
            thumbnails: Whether documents are shown there.
        """
        card = self.output_dir / "final" / "README.md"
        # a card is published, and groups are named by the data, e.g. by the path of a file
        of_all = self.verdict and replace(self.verdict, by_group={})
        if card.is_file():
            # the trainer's is there also where the arguments leave the name of the repository to the host
            of_hub = getattr(self.trainer, "hub_model_id", None) or getattr(
                self.trainer and self.trainer.args, "hub_model_id", None
            )
            text = add_to_card(
                card.read_text("utf-8"),
                self.rows,
                self.measure,
                self.settings,
                name=of_hub or str(card.parent),
                verdict=f"{of_all}." if of_all else "",
                verdicts=_list_verdicts(of_all),
            )
            card.write_text(text, "utf-8")
        self.save_metrics()
        if evaluation:
            self._write_page(evaluation, documents, thumbnails=thumbnails)

    def _write_page(
        self, evaluation: Mapping[str, RetrievalDataset], documents: DocumentKind, *, thumbnails: bool
    ) -> None:
        facts = self.settings["data"]
        asking = facts.get("directions", ())  # of several, the name of each metric says its own
        direction = resolve_direction(asking[0], facts["queries"], documents) if len(asking) == 1 else "text_to_image"
        try:
            write_page(
                self.output_dir / "report.html",
                title="Finetuning report",
                verdict=self.verdict.as_dict() if self.verdict else None,
                rows=self.rows,
                primary_metric=self.primary_metric,
                per_query=pq.read_table(self.output_dir / PER_QUERY_FILE) if self.verdict else None,
                log=self.trainer.state.log_history if self.trainer else (),
                settings=self.settings,
                versions=_versions(),
                datasets=evaluation,
                documents=documents,
                direction=direction,
                thumbnails=thumbnails,
            )
        except MissingExtraError as error:
            logger.info("%s", error)
        except Exception as error:  # a page to look at is no reason to lose a run at its end
            logger.warning("report.html was not written: %s: %s", type(error).__name__, error)

    def save_metrics(self) -> None:
        """Write ``metrics.json`` and ``report.md``."""
        metrics = {
            "before": self.before,
            "after": self.after,
            "primary_metric": self.primary_metric,
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "settings": self.settings,
            "versions": _versions(),
        }
        (self.output_dir / "report.md").write_text(self.report, "utf-8")
        # last and in one piece: a run with a metrics.json is at its end
        written = self.output_dir / "metrics.json.part"
        written.write_text(json.dumps(metrics, indent=2, default=str) + "\n", "utf-8")
        written.replace(self.output_dir / "metrics.json")


def _list_verdicts(verdict: Verdict | None) -> list[list[str]]:
    if verdict is None:
        return []
    named = {f"size {size}": each for size, each in verdict.by_size.items()}
    for column, verdicts in verdict.by_group.items():
        named |= {f"{column}: {group}": each for group, each in verdicts.items()}
    return [[name, *each.cells] for name, each in {"all": verdict, **named}.items()]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    """The version of a package; one that is installed under another name is no reason to lose a run at its end."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def describe_data(train: TrainingSets, evaluation: Mapping[str, RetrievalDataset]) -> dict[str, dict[str, Any]]:
    """The facts of each set as ``data``, what was found in it as ``audit``; under its name where there are several."""
    facts: dict[str, Any] = {}
    audit: dict[str, int] = {}
    for name, part in train.by_name.items():
        view, prefix = part.view, f"{name}: " if name else ""
        facts |= {
            f"{prefix}training_queries": len(part.data),
            f"{prefix}training_documents": len(part.data.corpus),
            f"{prefix}training_rows": len(part.rows),
            f"{prefix}documents": view.documents,
            f"{prefix}negatives_a_row": view.num_negatives,
            f"{prefix}negatives_listed": view.chosen["listed"],
            f"{prefix}negatives_filled_at_random": view.chosen["filled"],
            f"{prefix}negatives_refused_as_relevant": view.chosen["refused"],
            f"{prefix}byte_identical_copies": part.data.relevance_of(view.documents).num_copies,
        }
        if part.data.corpus.info.license:
            facts[f"{prefix}license"] = part.data.corpus.info.license
        audit |= {f"{prefix}{key}": count for key, count in part.data.audit().counts.items() if count}
    for name, data in evaluation.items():
        prefix = f"{name}: " if name else ""
        facts |= {f"{prefix}evaluation_queries": len(data), f"{prefix}evaluation_documents": len(data.corpus)}
    return {"data": facts, "audit": audit}


def describe_recipe(trainer: PageTrainer) -> dict[str, Any]:
    """What was chosen for the training, before it begins."""
    args = trainer.args
    inner = plain_losses(trainer.loss)
    return {
        "loss": ", ".join(type(loss).__name__ for loss in inner),
        "mini_batch_size": getattr(inner[0], "mini_batch_size", None),
        "batch_size": args.per_device_train_batch_size,
        "processes": args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "epochs": args.num_train_epochs,
        "learning_rate": args.learning_rate,
        "learning_rate_mapping": args.learning_rate_mapping or {},
        "max_grad_norm": args.max_grad_norm,
        "adam_betas": [args.adam_beta1, args.adam_beta2],
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "batch_sampler": getattr(args.batch_sampler, "__name__", str(args.batch_sampler)),
        "prompts": args.prompts or {},
        "router_mapping": args.router_mapping or {},
        "seed": args.seed,
    }


def describe_steps(trainer: PageTrainer) -> dict[str, Any]:
    """What only a training that is over tells: its steps, the best of them, and the rows that found no batch."""
    args, state = trainer.args, trainer.state
    facts = {
        "steps": state.max_steps,
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
    }
    samplers = getattr(trainer.train_sampler, "batch_samplers", [trainer.train_sampler])
    if all(isinstance(sampler, ConflictFreeBatchSampler) for sampler in samplers):
        facts["rows_left_over_in_last_epoch"] = sum(sampler.left_over for sampler in samplers)
    evaluated = sorted({entry["step"] for entry in state.log_history if "eval_runtime" in entry})
    return facts | ({"evaluated_at_steps": evaluated} if evaluated else {})
