"""What happens beside a training: short logs, the epoch of the sampler, which checkpoint is the best."""

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.host import innermost_sampler
from mmtune.report.markdown import show_seconds


class ShortLogs(TrainerCallback):
    """Writes one short line for each measurement, or log without one, where the host writes all metrics at all sizes.

    Attributes:
        before: The metrics of the model as it came, from which the change is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: Mapping[str, float] = {}
        self._loss: float | None = None
        self._began: tuple[float, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the time."""
        super().on_train_begin(args, state, control, **kwargs)
        self._began = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the loss, the metric that chooses the checkpoint with its change, and the time left."""
        logs = logs or {}
        self._loss = logs.get("loss", self._loss)
        metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
        measured = metric if metric == "loss" else f"eval_{metric}"
        if not state.is_world_process_zero or not state.max_steps or not ({"loss", measured} & logs.keys()):
            return
        if "loss" in logs and control.should_evaluate:  # the measurement of this step is next, and has the same line
            return
        values = [] if self._loss is None else [f"loss {float(self._loss):.4f}"]
        if measured in logs and metric != "loss":
            values.append(self._show(metric, float(logs[measured])))
            measure = metric.partition("_")[2]
            guards = [name for name in logs if name.startswith("eval_guard") and name.endswith(f"_{measure}")]
            guards.sort(key=lambda name: "-mean_" not in name)  # of several sets their mean
            values += [self._show(name.removeprefix("eval_"), float(logs[name])) for name in guards[:1]]
        values += self._time_left(state)
        tqdm.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(values)}", file=sys.stderr)
        self._loss = None

    def _show(self, name: str, value: float) -> str:
        before = self.before.get(name)
        return f"{name} {value:.4f}" + ("" if before is None else f" ({value - before:+.4f})")

    def _time_left(self, state: TrainerState) -> list[str]:
        if self._began is None or state.global_step <= self._began[1] or state.global_step >= state.max_steps:
            return []
        step_s = (time.monotonic() - self._began[0]) / (state.global_step - self._began[1])
        return [f"{show_seconds(step_s * (state.max_steps - state.global_step))} left"]


class ShortProgress(ShortLogs, ProgressCallback):
    """The host's progress bar with short logs."""

    def __init__(self) -> None:
        ProgressCallback.__init__(self)
        ShortLogs.__init__(self)


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


class StartCompetes(TrainerCallback):
    """Makes the untrained model the best so far, so that a checkpoint has to beat it."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self.before = before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that resumes has the best so far in its state."""
        if state.best_metric is None:
            state.best_metric = self.before[(args.metric_for_best_model or "loss").removeprefix("eval_")]


class AfterFirstSave(TrainerCallback):
    """Does something once, when the run has a checkpoint of its own; in the one process that writes."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is complete."""
        if self.act is not None and state.is_world_process_zero:
            self.act()
        self.act = None
