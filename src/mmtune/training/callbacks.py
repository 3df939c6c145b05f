"""What happens beside the steps: the model card, the logs, and what the host forgets when a run resumes."""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

from sentence_transformers.base.model_card import BaseModelCardCallback
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.host import innermost_sampler


class CardWithoutRows(BaseModelCardCallback):
    """A host's model card without examples and statistics of the rows.

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
        model.model_card_data.generate_widget_examples = False
        if isinstance(model.model_card_data, SentenceTransformerModelCardData):
            model.model_card_data.ir_model = True


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


class EpochOfSampler(TrainerCallback):
    """Tells the batch sampler its epoch, however deep it is wrapped.

    When several processes resume within an epoch, transformers 5.23 tells the epoch to the wrapper that skips batches,
    which does not pass it on: every process then plans the batches of the first epoch.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Walks down to the sampler that plans."""
        sampler = innermost_sampler(kwargs["train_dataloader"])
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class BestCheckpointHere(TrainerCallback):
    """Finds the best checkpoint of a resumed run in the folder of the run, also when the folder was moved.

    The host looks for it under the path that it had, and on not finding it ends with the last weights, and keeps the
    best score so that no later checkpoint takes its place (transformers 5.23).
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Points the state to the checkpoint of that step in ``args.output_dir``."""
        if state.best_model_checkpoint is not None or not state.best_global_step:
            return
        here = Path(args.output_dir or ".", f"checkpoint-{state.best_global_step}")
        if here.is_dir():
            state.best_model_checkpoint = str(here)
            return
        warnings.warn(
            f"The best checkpoint so far, {here.name}, is not in {str(here.parent)!r} any more. The best of the "
            "evaluations still to come is taken instead.",
            stacklevel=2,
        )
        state.best_metric = state.best_global_step = None
