"""Which negatives each row gets, from lists and at random."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from mmtune.data.arrow import IntLists
from mmtune.errors import DatasetError

OnShort = Literal["random", "drop", "error"]


@dataclass(frozen=True)
class Candidates:
    """What may be a negative of what: documents of queries, or query texts of pages.

    Attributes:
        row_ids: For each row the id that errors name.
        lists: For each row the items listed as its negatives, best first.
        same: For each item a number that items of equal content share.
        is_relevant: Whether each item is relevant to the row beside it; takes two int64 arrays of one shape.
        what: What the rows and items are, for errors.
        num_drawn: So many of the items, from the first, may be drawn at random; the others stand in lists alone.
            ``None`` is all.
    """

    row_ids: pa.Array
    lists: IntLists
    same: np.ndarray
    is_relevant: Callable[[np.ndarray, np.ndarray], np.ndarray]
    what: tuple[str, str]
    num_drawn: int | None = None

    @property
    def drawn(self) -> int:
        """How many of the items may be drawn at random."""
        return len(self.same) if self.num_drawn is None else self.num_drawn

    @property
    def distinct(self) -> np.ndarray:
        """The first item of each content."""
        return np.unique(self.same, return_index=True)[1]

    def take(self, rows: np.ndarray) -> "Candidates":
        """Those of some rows."""
        return replace(
            self,
            row_ids=self.row_ids.take(rows),
            lists=self.lists.take(rows),
            is_relevant=lambda at, items: self.is_relevant(rows[at], items),
        )


@dataclass(frozen=True)
class ChosenNegatives:
    """The negatives of every row.

    Attributes:
        rows: Positions of the rows that are trained on, int64, shape ``(rows,)``.
        items: Positions of their negatives, best first, int64, shape ``(rows, num_negatives)``.
        listed: Negatives taken from the lists.
        filled: Negatives drawn at random because a list was too short.
        refused: Listed negatives that are relevant, and so not used.
        dropped: Rows left out with ``on_short="drop"``.
    """

    rows: np.ndarray
    items: np.ndarray
    listed: int = 0
    filled: int = 0
    refused: int = 0
    dropped: int = 0


def choose_negatives(candidates: Candidates, num_negatives: int, on_short: OnShort, seed: int) -> ChosenNegatives:
    """The first ``num_negatives`` usable negatives of each row's list, and what ``on_short`` says where it is short.

    Usable is what is not relevant to the row, under any id or as a copy of equal content, and has not been taken for
    the same row yet.

    Raises:
        DatasetError: A list is short and ``on_short="error"``, or there are too few items to fill it.
    """
    # Relevant items and copies within a list go first.
    listed = candidates.lists
    relevant = candidates.is_relevant(listed.rows, listed.values)
    rows, values = listed.rows[~relevant], listed.values[~relevant]
    _, first = np.unique(rows * len(candidates.same) + candidates.same[values], return_index=True)
    first.sort()
    usable = IntLists.grouped(rows[first], values[first], len(candidates.row_ids))

    short = usable.lengths < num_negatives
    if short.any() and on_short == "error":
        at = np.flatnonzero(short)
        examples = ", ".join(f"{candidates.row_ids[int(row)].as_py()!r} ({usable.lengths[row]})" for row in at[:3])
        raise DatasetError(
            f"{len(at)} queries have fewer than {num_negatives} usable negatives, e.g. {examples}. Lower "
            'num_negatives, add negatives, or pass on_short="random" to fill at random or on_short="drop" to leave '
            "these queries out."
        )
    rows = np.flatnonzero(~short) if on_short == "drop" else np.arange(len(short))
    available = len(candidates.distinct)
    if len(rows) and num_negatives > available:
        kind, what = candidates.what
        raise DatasetError(
            f"{kind} {candidates.row_ids[int(rows[0])].as_py()!r} can't get {num_negatives} negatives: there are only "
            f"{available} different {what}. Lower num_negatives, or add {what}."
        )
    usable = usable.take(rows)
    taken = np.minimum(usable.lengths, num_negatives) if len(rows) else rows
    items = np.full((len(rows), num_negatives if len(rows) else 0), -1, dtype=np.int64)
    mask = np.arange(items.shape[1]) < taken[:, None]
    items[mask] = usable.values[(usable.offsets[:-1, None] + np.arange(items.shape[1]))[mask]]
    if on_short == "random" and short.any():
        _fill(candidates, items, np.random.default_rng(seed))
    return ChosenNegatives(
        rows=rows,
        items=items,
        listed=int(taken.sum()),
        filled=int((num_negatives - taken)[short].sum()) if on_short == "random" else 0,
        refused=int(relevant.sum()),
        dropped=int(short.sum()) if on_short == "drop" else 0,
    )


def _fill(candidates: Candidates, items: np.ndarray, rng: np.random.Generator) -> None:
    """Put a random item that is not relevant, and not in the row yet, wherever ``items`` is -1; in place."""
    for _ in range(20):
        short = np.flatnonzero((items < 0).any(axis=1))
        if not len(short):
            return
        rows = items[short]
        holes = rows < 0
        rows[holes] = rng.integers(candidates.drawn, size=int(holes.sum()))
        relevant = candidates.is_relevant(np.broadcast_to(short[:, None], rows.shape), rows)
        rows[holes & (relevant | _stands_twice(candidates.same[rows]))] = -1
        items[short] = rows
    _fill_exactly(candidates, items, rng)


def _stands_twice(values: np.ndarray) -> np.ndarray:
    """Whether each entry of a matrix has an equal one in its row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    equals_next = ordered[:, 1:] == ordered[:, :-1]
    no = np.zeros((len(values), 1), dtype=bool)
    twice = np.empty(values.shape, dtype=bool)
    np.put_along_axis(twice, order, np.hstack([equals_next, no]) | np.hstack([no, equals_next]), axis=1)
    return twice


def _fill_exactly(candidates: Candidates, items: np.ndarray, rng: np.random.Generator) -> None:
    """As ``_fill``, by listing what is left for a row: for rows to which nearly everything is relevant."""
    distinct = candidates.distinct
    distinct = distinct[distinct < candidates.drawn]
    for row in np.flatnonzero((items < 0).any(axis=1)):
        holes = np.flatnonzero(items[row] < 0)
        taken = candidates.same[items[row][items[row] >= 0]]
        free = distinct[~candidates.is_relevant(np.full(len(distinct), row), distinct)]
        free = free[~np.isin(candidates.same[free], taken)]
        if len(free) < len(holes):
            kind, what = candidates.what
            raise DatasetError(
                f"{kind} {candidates.row_ids[int(row)].as_py()!r} can't get {items.shape[1]} negatives: only "
                f"{len(free) + len(taken)} of the {len(candidates.same)} {what} are neither relevant to it nor copies "
                f"of each other. Lower num_negatives, or add {what}."
            )
        items[row, holes] = rng.choice(free, size=len(holes), replace=False)
