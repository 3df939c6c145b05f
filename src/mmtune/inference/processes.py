"""The processes that share the work on a dataset: one, or those that torchrun started."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from mmtune.errors import ConfigError, MmtuneError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: The number of this one, from 0.
        count: How many there are; 1 without torchrun.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def running(cls, device: torch.device) -> "Processes":
        """Those of the running job; under torchrun they are connected first, as the host's trainer does it.

        Args:
            device: Where the model of this process is, which decides how they speak with each other.

        Raises:
            ConfigError: They were started and can't be connected, so that each would do all of the work.
        """
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=device.type == "cpu")
            if not distributed.is_initialized():
                raise ConfigError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes were started, and accelerate does not connect "
                    f"them for a model on {device.type!r}: it can't, or something in this process has called it "
                    "otherwise, as training arguments do that are built without use_cpu=True. Start it without "
                    "torchrun, or in a process of its own."
                )
        return cls(distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else cls()

    def share(self, num_items: int, size: int) -> slice:
        """The items of this process: a run of whole portions, so that portions are the same for any number of these.

        Args:
            num_items: All items.
            size: Items a portion.
        """
        num_portions = -(-num_items // size)
        ends = (num_portions * rank // self.count * size for rank in (self.rank, self.rank + 1))
        return slice(*(min(end, num_items) for end in ends))

    def gather(self, make: Callable[[], Result]) -> list[Result]:
        """What ``make`` gives in each process, by rank, in all of them.

        Raises:
            MmtuneError: It fails in one of them; all raise the same, so that none waits for what will not come.
        """
        if self.count == 1:
            return [make()]
        made: Result | None = None
        error: MmtuneError | None = None
        try:
            made = make()
        except MmtuneError as failure:
            error = failure
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, (made, error))
        for _, error in found:
            if error is not None:
                raise error
        return [value for value, _ in found]

    def make_in_turn(self, make: Callable[[], Result]) -> Result:
        """What ``make`` gives in this process; the first process is done with it before the others begin."""
        made: list[Result] = []
        self.gather(lambda: made.append(make()) if self.rank == 0 else None)
        return made[0] if made else make()
