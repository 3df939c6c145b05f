"""The host's trainer for rows of pages: texts stay texts, and no training image ends in the model card."""

import copy
import sys
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardCallback
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mmtune.data.documents import as_host_input


class PageCollator(SentenceTransformerDataCollator):
    """The host's collator, told that every text is a text, also one that looks like the path of an image."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as the host collates it."""
        kept = {"dataset_name", *self.valid_label_columns}
        rows = [{name: row[name] if name in kept else as_host_input(row[name]) for name in row} for row in features]
        return super().__call__(rows)


class PageCardCallback(SentenceTransformerModelCardCallback):
    """The host's model card without examples and statistics of the rows.

    The host decodes 100 rows a column for them, twice, and copies pages into ``assets/`` of every checkpoint, from
    where a push to the Hub would publish them (sentence-transformers 6.2).
    """

    def on_init_end(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        trainer: Any,
        **kwargs: Any,
    ) -> None:
        """Fills the card with everything the host fills in, except from the rows."""
        without_rows = copy.copy(trainer)
        without_rows.train_dataset = without_rows.eval_dataset = None
        super().on_init_end(args, state, control, model=model, trainer=without_rows, **kwargs)
        model.model_card_data.ir_model = True
        model.model_card_data.generate_widget_examples = False


class ShortLogs(TrainerCallback):
    """Writes one short line for each log, where the host writes all metrics at all dimensions."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the loss and the metric that chooses the checkpoint."""
        metric = args.metric_for_best_model or "loss"
        shown = {"loss": "loss", metric: metric.removeprefix("eval_")}
        values = [f"{label} {float(logs[key]):.4f}" for key, label in shown.items() if logs and key in logs]
        if state.is_world_process_zero and state.max_steps and values:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(values)}", file=sys.stderr)


class ShortProgress(ProgressCallback):
    """The host's progress bar without its logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the logs to ``ShortLogs``."""


class PageTrainer(SentenceTransformerTrainer):
    """``SentenceTransformerTrainer`` for rows that decode pages when they are read."""

    data_collator_class = PageCollator
    model_card_callback_class = PageCardCallback

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In a notebook the host shows a table of its own, which stays.
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ShortProgress)
            self.add_callback(ShortLogs)
        elif self.pop_callback(PrinterCallback) is not None:
            self.add_callback(ShortLogs)
