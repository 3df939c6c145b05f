"""Which rows go into which batch, from integers alone.

Rows that must be free of conflicts together are a *group*: one batch, or the batches that several processes take in
one step. The hard rows are placed first, the others in random order, and what is left over opens the next epoch.
`packing` does the placing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtune.errors import ConfigError
from mmtune.training.packing import Packing

# Groups are filled in windows: a bit for every group of a long epoch, for every document, would be gigabytes.
WINDOW_GROUPS = 512
WINDOW_ROWS = 65_536
# Below this many groups, a window of few rows would make neighbours of the same ones.
WINDOW_GROUPS_MIN = 64

_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class BatchShape:
    """How rows divide into batches.

    Attributes:
        batch_size: Rows per batch and process.
        num_processes: Batches that are taken in one step, and must be free of conflicts together.
        drop_last: Whether the short batch is left out.
        smallest: Rows that a short batch needs at least, unless it is the only one.
    """

    batch_size: int
    num_processes: int = 1
    drop_last: bool = False
    smallest: int = 1

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ConfigError(f"num_processes={self.num_processes}, expected None or at least 1.")

    @property
    def group_size(self) -> int:
        """Rows that must be free of conflicts together."""
        return self.batch_size * self.num_processes

    @property
    def keeps_short(self) -> bool:
        """Whether a last, short batch is allowed: on several processes one of them would miss it and hang."""
        return self.num_processes == 1 and not self.drop_last


@dataclass(frozen=True)
class IntLists:
    """A list of integers for each row, in two flat arrays.

    Attributes:
        offsets: Where each row starts in `values`, and its end as the last element; rows + 1 elements.
        values: The lists of all rows, one after the other.
    """

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def from_pairs(cls, rows: np.ndarray, values: np.ndarray, num_rows: int) -> IntLists:
        """The lists of `num_rows` rows from (row, value) pairs in any order."""
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=num_rows)
        return cls(np.concatenate([[0], np.cumsum(counts)]), values[order])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, rows: Iterable[int]) -> dict[int, list[int]]:
        """The lists of some rows, by row."""
        return {row: self.values[self.offsets[row] : self.offsets[row + 1]].tolist() for row in rows}

    def sums(self, weight_by_value: np.ndarray) -> np.ndarray:
        """For each row, the sum of the weights of its values."""
        totals = np.concatenate([[0], np.cumsum(weight_by_value[self.values], dtype=np.int64)])
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]


@dataclass(frozen=True)
class BusiestDocument:
    """The document that is the positive of most rows, and of how many."""

    document_id: str = ""
    num_rows: int = 0


@dataclass(frozen=True)
class RowDocuments:
    """What each row brings into a batch, with documents as integers.

    Rows i and j conflict if a document of one is relevant to the other.

    Attributes:
        documents: For each row, its positive and its negatives, as far as they are relevant to any row.
        relevant: For each row, everything that is relevant to its query.
        positives: For each row, its positive; -1 where it is not relevant to any row.
        busiest: The positive that most rows share, for messages.
    """

    documents: IntLists
    relevant: IntLists
    positives: np.ndarray
    busiest: BusiestDocument = BusiestDocument()

    def __len__(self) -> int:
        return len(self.positives)

    def pressure(self) -> np.ndarray:
        """For each row, about how many rows it conflicts with."""
        num_documents = 1 + max(
            (int(part.values.max()) for part in (self.documents, self.relevant) if part.values.size), default=-1
        )
        as_document = np.bincount(self.documents.values, minlength=num_documents)
        as_relevant = np.bincount(self.relevant.values, minlength=num_documents)
        return self.documents.sums(as_relevant) + self.relevant.sums(as_document)


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch.

    Attributes:
        batches: Row numbers of each batch.
        left_over: Row numbers that are in no batch.
        num_full_groups: How many full groups the batches make, where a group is the batches of one step.
        num_groups: The same with the short batch.
    """

    batches: list[np.ndarray]
    left_over: np.ndarray
    num_full_groups: int
    num_groups: int

    @classmethod
    def of(
        cls, groups: list[list[int]], left_over: list[int], shape: BatchShape, rng: np.random.Generator
    ) -> EpochPlan:
        """The plan with the given groups in order, each one shuffled and cut into batches."""
        num_full = sum(len(group) == shape.group_size for group in groups)
        batches = [
            batch
            for group in groups
            for batch in np.split(rng.permutation(group), range(shape.batch_size, len(group), shape.batch_size))
        ]
        return cls(batches, np.array(left_over, dtype=np.int64), num_full, len(groups))

    def reshuffled(self, shape: BatchShape, rng: np.random.Generator) -> EpochPlan:
        """The same groups in another order, and the rows of each in another order."""
        size = shape.num_processes
        groups = [np.concatenate(self.batches[at : at + size]).tolist() for at in range(0, len(self.batches), size)]
        return EpochPlan.of(_opening_first(groups, _NO_ROWS, rng), self.left_over.tolist(), shape, rng)


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
        The plan. In the first epoch it has fewer groups than the rows fill when they conflict too much. In a later one
        that can't keep the number of batches otherwise, it is the first plan in another order.
    """
    if first is None:
        return _plan_once(rows, shape, opening, len(rows) // shape.group_size, np.random.default_rng([*seed, 0]))
    # Where rows conflict too much, those left over are the hard ones, and too many of them at once spoil the epoch.
    rng = np.random.default_rng([*seed, 0])
    for share in (1.0, 0.25, 0.0):
        plan = _plan_once(rows, shape, opening[: int(share * len(opening))], first.num_full_groups, rng)
        if len(plan.batches) == len(first.batches):
            return plan
    return first.reshuffled(shape, rng)


def _plan_once(
    rows: RowDocuments, shape: BatchShape, opening: np.ndarray, num_groups: int, rng: np.random.Generator
) -> EpochPlan:
    queue = _spread_out(rows.positives, opening, rng)
    hardness = _hardness(rows, num_groups)
    groups: list[list[int]] = []
    pool: list[int] = []
    done = 0
    for size, wanted in _windows(num_groups, shape.group_size, len(rows)):
        take = max(wanted - len(pool), 0)
        pool = _hard_first(pool + queue[done : done + take].tolist(), hardness, opening, rng)
        done += take
        packing = Packing(
            rows.documents.of(pool),
            rows.relevant.of(pool),
            num_groups=size,
            group_size=shape.group_size,
            opening=set(opening.tolist()),
            seed=int(rng.integers(2**62)),
        )
        pool = packing.pack(pool, with_short=shape.keeps_short and done >= len(rows))
        groups += packing.groups()
    if len(groups) > 1 and len(groups[-1]) < shape.smallest:
        pool += groups.pop()
    return EpochPlan.of(_opening_first(groups, opening, rng), pool, shape, rng)


def _windows(num_groups: int, group_size: int, num_rows: int) -> list[tuple[int, int]]:
    """For each window, its groups, as equal as possible, and the rows to choose from.

    They are some more rows than fit, so that only the last window has to make do with the rows that are left.
    """
    num_windows = max(1, -(-num_groups // WINDOW_GROUPS), min(num_rows // WINDOW_ROWS, num_groups // WINDOW_GROUPS_MIN))
    sizes = [(num_groups + index) // num_windows for index in range(num_windows)]
    return [*((size, (size + 1 + size // 50) * group_size) for size in sizes[:-1]), (sizes[-1], num_rows)]


def _spread_out(positives: np.ndarray, opening: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All rows in random order, those of one positive at even distances, behind the rows that open the epoch.

    At even distances no window gets more rows of a busy page than it has groups, as long as the epoch has not.
    """
    shuffled = rng.permutation(len(positives))
    by_positive = shuffled[np.argsort(positives[shuffled], kind="stable")]
    _, starts, counts = np.unique(positives[by_positive], return_index=True, return_counts=True)
    rank = np.arange(len(positives)) - np.repeat(starts, counts)
    place = (rank + np.repeat(rng.random(len(counts)), counts)) / np.repeat(counts, counts)
    order = by_positive[np.argsort(place, kind="stable")]
    return np.concatenate([opening, order[~np.isin(order, opening)]]).astype(np.int64)


def _hardness(rows: RowDocuments, num_groups: int) -> np.ndarray:
    """How hard each row is to place, in coarse steps: rows of one step stay in random order."""
    pressure = rows.pressure() / max(num_groups, 1)
    return np.floor(np.log2(np.maximum(pressure, 0.25))).astype(np.int64)


def _hard_first(pool: list[int], hardness: np.ndarray, opening: np.ndarray, rng: np.random.Generator) -> list[int]:
    """The rows that open the epoch, then the others, hard ones first and equally hard ones in random order."""
    shuffled = rng.permutation(np.array(pool, dtype=np.int64))
    key = np.where(np.isin(shuffled, opening), np.iinfo(np.int64).min, -hardness[shuffled])
    return shuffled[np.argsort(key, kind="stable")].tolist()


def _opening_first(groups: list[list[int]], opening: np.ndarray, rng: np.random.Generator) -> list[list[int]]:
    """The groups with rows that open the epoch, then the others in random order; a short one stays last."""
    opening_rows = set(opening.tolist())
    short = groups[-1:] if groups and len(groups[-1]) < len(groups[0]) else []
    full = groups[: len(groups) - len(short)]
    first = [group for group in full if not opening_rows.isdisjoint(group)]
    rest = [group for group in full if opening_rows.isdisjoint(group)]
    return [*first, *(rest[index] for index in rng.permutation(len(rest))), *short]
