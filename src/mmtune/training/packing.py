"""Which rows go into which batch, from integers alone.

Rows that must be free of conflicts together are a *group*: one batch, or the batches that several processes take in
one step. Rows go into random groups that have room and no conflict, hard rows first. Where that leaves groups short, it
is done again with care: next are the rows with the fewest groups left (as in DSATUR, Brélaz 1979, but sorted now and
then only), and a row prefers groups that hold the same documents already.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmtune.data.arrow import IntLists

# Groups are filled in windows: a bit for every group of a long epoch, for every document, would be gigabytes.
WINDOW_GROUPS = 512
# With care, the remaining rows are sorted anew when this part of them was placed. A smaller one fills more, for longer.
PORTION = 1 / 12
# Batches that would be shorter than this share of their size are left out; where all would be, there are fewer.
LEAST_FULL = 0.25


@dataclass(frozen=True)
class BatchShape:
    """How rows divide into batches.

    Attributes:
        batch_size: Rows of each.
        num_processes: Processes that take one each in a step.
        drop_last: Whether the short one at the end is left out.
        smallest: Rows that a short one needs at least, unless it is the only one.
    """

    batch_size: int
    num_processes: int = 1
    drop_last: bool = False
    smallest: int = 1

    @property
    def group_size(self) -> int:
        """Rows that must be free of conflicts together."""
        return self.batch_size * self.num_processes

    @property
    def keeps_short(self) -> bool:
        """Whether a last, short batch is allowed: on several processes one of them would miss it and hang."""
        return self.num_processes == 1 and not self.drop_last


@dataclass(frozen=True)
class RowDocuments:
    """What each row brings into a batch, with documents as integers.

    Rows i and j conflict if a document of one is relevant to the other.

    Attributes:
        documents: For each row, its positive and its negatives, as far as they are relevant to any row.
        relevant: For each row, everything that is relevant to its query.
        positives: For each row, its positive; -1 where it is not relevant to any row.
    """

    documents: IntLists
    relevant: IntLists
    positives: np.ndarray

    def __len__(self) -> int:
        return len(self.positives)

    @cached_property
    def pressure(self) -> np.ndarray:
        """For each row, about how many rows it conflicts with."""
        as_relevant = np.bincount(self.relevant.values)
        as_document = np.bincount(self.documents.values, minlength=len(as_relevant))
        by_document = np.bincount(self.documents.rows, as_relevant[self.documents.values], minlength=len(self))
        return by_document + np.bincount(self.relevant.rows, as_document[self.relevant.values], minlength=len(self))


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch.

    Attributes:
        batches: Row numbers of each batch.
        left_over: Row numbers that are in no batch.
        num_groups: Groups that the batches make, without a last, short batch.
        batch_size: Rows that a batch takes: on several processes, those that each batch has.
    """

    batches: list[np.ndarray]
    left_over: np.ndarray
    num_groups: int
    batch_size: int


def plan_epoch(
    rows: RowDocuments,
    shape: BatchShape,
    opening: np.ndarray,
    *,
    seed: Sequence[int],
    first: EpochPlan | None = None,
) -> EpochPlan:
    """Batches for one epoch, free of conflicts.

    Args:
        rows: What each row brings into a batch.
        shape: How rows divide into batches.
        opening: Rows that the epoch before left over, to be placed first.
        seed: Numbers that decide the order, e.g. the seed of the run and the epoch.
        first: The plan of the first epoch, whose number of batches this one must have; `None` for the first itself.

    Returns:
        The plan. On several processes all batches have the size of those in the first epoch; where that can't be kept,
        it is the first plan in another order.
    """
    rng = np.random.default_rng(list(seed))
    opens = np.isin(np.arange(len(rows)), opening)
    if first is None:
        return _arrange(_fill_first(rows, shape, opens, rng), rows, shape, opens, rng)
    group_size = first.batch_size * shape.num_processes
    # Rows that were left over can be the hard ones, and too many of them at once spoil the epoch.
    for share in (1.0, 0.5, 0.25, 0.0):
        opens &= rng.random(len(rows)) < share
        groups = _fill(rows, opens, first.num_groups, group_size, rng)
        if shape.num_processes == 1 or all(len(group) == group_size for group in groups):
            return _arrange(groups, rows, shape, opens, rng)
    steps = range(0, len(first.batches), shape.num_processes)
    groups = [np.concatenate(first.batches[step : step + shape.num_processes]) for step in steps]
    return _arrange(groups, rows, shape, opens, rng)


def _fill_first(rows: RowDocuments, shape: BatchShape, opens: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """As many groups as the rows fill, or fewer where they conflict too much."""
    # A batch of one row has no in-batch negatives.
    least = max(min(2, shape.batch_size), int(LEAST_FULL * shape.batch_size)) * shape.num_processes
    num_groups = len(rows) // shape.group_size
    groups: list[np.ndarray] = []
    while num_groups and not groups:
        filled = _fill(rows, opens, num_groups, shape.group_size, rng)
        groups = [group for group in filled if len(group) >= least]
        num_groups = min(num_groups * 3 // 4, sum(map(len, filled)) // least)
    if shape.num_processes == 1 or all(len(group) == shape.group_size for group in groups):
        return groups
    # Cut to one size, of which each process gets as much: the one with which most rows are used.
    sizes = sorted((len(group) // shape.num_processes * shape.num_processes for group in groups), reverse=True)
    best = max(enumerate(sizes, 1), key=lambda ranked: ranked[0] * ranked[1])[1]
    cut = [group[:best] for group in groups if len(group) >= best]
    # Filled to a lower ceiling, all may keep more than the best cut. It starts below what just fits, so that later
    # epochs reach it, too.
    mean = int(0.98 * sum(map(len, groups)) / len(groups)) // shape.num_processes
    for room in range(mean * shape.num_processes, 0, -shape.num_processes):
        lower = _fill(rows, opens, len(groups), room, rng)
        if all(len(group) == room for group in lower):
            return max(cut, lower, key=lambda each: len(each) * len(each[0]))
    return cut


def _arrange(
    groups: list[np.ndarray], rows: RowDocuments, shape: BatchShape, opens: np.ndarray, rng: np.random.Generator
) -> EpochPlan:
    """The plan: groups with rows that open the epoch, then the others at random, then a short batch."""
    is_used = np.zeros(len(rows), dtype=bool)
    for group in groups:
        is_used[group] = True
    left_over = np.flatnonzero(~is_used)
    order = sorted(rng.permutation(len(groups)), key=lambda index: not opens[groups[index]].any())
    ordered = [groups[index] for index in order]
    if shape.keeps_short and len(groups) * shape.group_size < len(rows):
        short, waiting = _fill_window(rows, left_over, opens, 1, shape.group_size, rng)
        if not ordered or len(short[0]) >= shape.smallest:
            ordered, left_over = ordered + short, waiting
    batches = [batch for group in ordered for batch in np.split(rng.permutation(group), shape.num_processes)]
    batch_size = len(batches[0]) if shape.num_processes > 1 and batches else shape.batch_size
    return EpochPlan(batches, left_over, len(groups), batch_size)


def _fill(
    rows: RowDocuments, opens: np.ndarray, num_groups: int, room: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The rows of each group, window by window; those that find no place in one are tried again in the next."""
    # Rows of one positive stand at even distances, so that no window gets more rows of a busy page than it has groups.
    shuffled = rng.permutation(len(rows))
    by_positive = shuffled[np.argsort(rows.positives[shuffled], kind="stable")]
    _, starts, counts = np.unique(rows.positives[by_positive], return_index=True, return_counts=True)
    rank = np.arange(len(rows)) - np.repeat(starts, counts)
    place = (rank + np.repeat(rng.random(len(counts)), counts)) / np.repeat(counts, counts)
    queue = by_positive[np.lexsort((place, ~opens[by_positive]))]

    groups: list[np.ndarray] = []
    num_windows = max(1, -(-num_groups // WINDOW_GROUPS))
    for window in range(num_windows):
        size = (num_groups + window) // num_windows
        # Some more rows than fit, so that only the last window has to make do with the rows that are left.
        taken = (size + 1 + size // 50) * room if window < num_windows - 1 else len(queue)
        filled, waiting = _fill_window(rows, queue[:taken], opens, size, room, rng)
        queue = np.concatenate([waiting, queue[taken:]])
        groups += filled
    return groups


def _fill_window(
    rows: RowDocuments, pool: np.ndarray, opens: np.ndarray, num_groups: int, room: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows of each group, out of a pool of rows, and those without a place."""
    # In coarse steps of how many rows of a full group a row conflicts with: those of one step stay in random order.
    hardness = np.floor(np.log2(np.maximum(rows.pressure[pool] * room / len(rows), 0.25)))
    order = rng.permutation(len(pool))
    order = order[np.lexsort((-hardness[order], ~opens[pool[order]]))]
    lists = rows.documents.take(pool).to_lists(), rows.relevant.take(pool).to_lists()
    for careful in (False, True):
        groups = _Groups(*lists, opens[pool].tolist(), num_groups, room, seed=int(rng.integers(2**62)), careful=careful)
        waiting = groups.place(order.tolist())
        if not waiting or not groups.with_room:
            break
    return [pool[members] for members in groups.members], pool[waiting]


class _Groups:
    """Groups that are being filled with rows.

    Sets of groups are bit masks: of several hundred groups, those without a conflict cost one `or` a document.
    """

    def __init__(
        self,
        documents: list[list[int]],
        relevant: list[list[int]],
        opens: list[bool],
        num_groups: int,
        room: int,
        *,
        seed: int,
        careful: bool,
    ) -> None:
        self.members: list[list[int]] = [[] for _ in range(num_groups)]
        self.with_room = self._in_turn = (1 << num_groups) - 1
        self._documents, self._relevant, self._opens = documents, relevant, opens
        self._room = room
        self._careful = careful
        # Single draws from a numpy generator cost twenty times as much.
        self._draw = random.Random(seed).random
        self._holding: dict[int, int] = {}
        self._asking: dict[int, int] = {}

    def place(self, queue: list[int]) -> list[int]:
        """Put rows into groups, in order; returns those without a place."""
        waiting: list[int] = []
        while queue:
            portion = math.ceil(PORTION * len(queue)) if self._careful else len(queue)
            for row in queue[:portion]:
                free = self._open_to(row)
                if free:
                    self._enter(row, free)
                else:
                    waiting.append(row)
            choices = {row: self._open_to(row).bit_count() for row in queue[portion:]}
            waiting += [row for row in choices if not choices[row]]
            queue = sorted(filter(choices.get, choices), key=lambda row: (not self._opens[row], choices[row]))
        return waiting

    def _open_to(self, row: int) -> int:
        """The groups that have room for a row and no conflict with it."""
        blocked = 0
        for document in self._documents[row]:
            blocked |= self._asking.get(document, 0)
        for document in self._relevant[row]:
            blocked |= self._holding.get(document, 0)
        return self.with_room & ~blocked

    def _enter(self, row: int, free: int) -> None:
        """Put a row into one of the groups that are free: at random, or the first if it opens the epoch."""
        if not self._opens[row]:
            # In turns, so the groups stay equally full, and the last rows have all of them to choose from.
            free = free & self._in_turn or free
            if self._careful:
                # What a group holds or asks for already closes it to no other row.
                for document in self._relevant[row]:
                    free = free & self._asking.get(document, 0) or free
                for document in self._documents[row]:
                    free = free & self._holding.get(document, 0) or free
            start = int(self._draw() * len(self.members))
            free = free >> start << start or free
        bit = free & -free
        for document in self._documents[row]:
            self._holding[document] = self._holding.get(document, 0) | bit
        for document in self._relevant[row]:
            self._asking[document] = self._asking.get(document, 0) | bit
        members = self.members[bit.bit_length() - 1]
        members.append(row)
        if len(members) == self._room:
            self.with_room &= ~bit
        self._in_turn = self._in_turn & ~bit & self.with_room or self.with_room
