"""Ctrl-C and SIGTERM: a run saves at the end of its step, and says how to go on."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Interrupted(BaseException):
    """A run was asked to end, and has saved a checkpoint.

    Attributes:
        end: What the process ends with.
    """

    def __init__(self, asked_by: signal.Signals) -> None:
        super().__init__(asked_by)
        self.end = _end_of(asked_by)


def _end_of(asked_by: signal.Signals) -> BaseException:
    """What a process that is asked to end ends with by custom: status 143, or KeyboardInterrupt, which gives 130."""
    return KeyboardInterrupt() if asked_by == signal.SIGINT else SystemExit(128 + asked_by)


def _leave_group(then: Callable[[int], None] | None, worker_id: int) -> None:
    os.setpgrp()
    if then is not None:
        then(worker_id)


class SavesWhenAsked(TrainerCallback):
    """Saves a checkpoint at the end of the step in which the process was asked to end, and ends the run."""

    def __init__(self) -> None:
        self.asked_by: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM and Ctrl-C; the second of them ends at once.

        Only in the main thread, where Python lets handlers be set, and only in place of the default: a handler that the
        caller has set is left alone.
        """
        mine: list[signal.Signals] = []
        if threading.current_thread() is threading.main_thread():
            mine = [number for number, default in _DEFAULTS.items() if signal.getsignal(number) == default]
        for number in mine:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, _DEFAULTS[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked_by is not None:
            raise _end_of(signal.Signals(number))
        self.asked_by = signal.Signals(number)
        sys.stderr.write(f"{self.asked_by.name}: the run ends after this step. Once more ends it at once.\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the workers of the data loader out of the group that a terminal and torchrun signal as a whole.

        SIGTERM ends a worker, and torch ends the run with it, in the middle of a step (2.13).
        """
        loader = kwargs["train_dataloader"]
        loader = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper would keep the function to itself
        if loader.num_workers and hasattr(os, "setpgrp"):
            loader.worker_init_fn = partial(_leave_group, loader.worker_init_fn)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint, in all processes after the same step."""
        if self._agree(args) is not None:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the run; what was due in this step has been done."""
        asked_by = self._agree(args)
        if asked_by is None:
            return
        if state.is_world_process_zero:
            sys.stderr.write(
                f"{asked_by.name}: saved {args.output_dir}/checkpoint-{state.global_step} of {state.max_steps} "
                "steps. The same call with resume=True goes on from there.\n"
            )
        raise Interrupted(asked_by)

    def _agree(self, args: TrainingArguments) -> signal.Signals | None:
        """What any process was asked by, alike in all of them; what comes in meanwhile waits for the next time."""
        if args.world_size == 1 or not distributed.is_initialized():
            return self.asked_by
        asked = torch.tensor([self.asked_by or 0], device=args.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return signal.Signals(int(asked)) if int(asked) else None
