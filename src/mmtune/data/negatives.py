"""Which negatives each training row gets."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmtune.data.relevance import Ragged, Relevance
from mmtune.errors import DatasetError

OnShort = Literal["random", "drop", "error"]


@dataclass(frozen=True)
class ChosenNegatives:
    """The negatives of every query.

    Attributes:
        queries: Positions of the queries that are trained on, int64, shape ``(rows,)``.
        documents: Positions of their negatives, best first, int64, shape ``(rows, num_negatives)``.
        listed: Negatives taken from the lists.
        filled: Negatives drawn at random because a list was too short.
        refused: Listed negatives that are relevant to the same query text, and so not used.
        dropped_queries: Queries left out with ``on_short="drop"``.
    """

    queries: np.ndarray
    documents: np.ndarray
    listed: int = 0
    filled: int = 0
    refused: int = 0
    dropped_queries: int = 0


def choose_negatives(relevance: Relevance, num_negatives: int, on_short: OnShort, seed: int) -> ChosenNegatives:
    """The first ``num_negatives`` usable negatives of each query's list, and what ``on_short`` says where it is short.

    Usable is what is not relevant to the query's text, under any id or as a byte-identical page, and has not been
    taken for the same query yet.

    Raises:
        DatasetError: A list is short and ``on_short="error"``, or the corpus has too few documents to fill it.
    """
    usable, refused = _usable(relevance)
    kept = Ragged.grouped(usable.rows, usable.values, len(relevance.query_ids))
    taken = np.minimum(kept.lengths, num_negatives)
    documents = np.full((len(taken), num_negatives), -1, dtype=np.int64)
    mask = np.arange(num_negatives) < taken[:, None]
    documents[mask] = kept.values[(kept.offsets[:-1, None] + np.arange(num_negatives))[mask]]
    queries = np.arange(len(taken))
    short = taken < num_negatives
    if short.any() and on_short == "error":
        raise DatasetError(_short_message(relevance, taken, num_negatives))
    if on_short == "drop":
        queries, documents = queries[~short], documents[~short]
    elif short.any():
        _fill(relevance, queries, documents, np.random.default_rng(seed))
    return ChosenNegatives(
        queries=queries,
        documents=documents,
        listed=int(taken[queries].sum()),
        filled=int((num_negatives - taken)[short].sum()) if on_short == "random" else 0,
        refused=refused,
        dropped_queries=int(short.sum()) if on_short == "drop" else 0,
    )


def _usable(relevance: Relevance) -> tuple[Ragged, int]:
    """The listed negatives without relevant ones and without repeats of a page, and how many were relevant."""
    listed = relevance.listed_negatives
    rows = listed.rows
    relevant = relevance.is_relevant(rows, listed.values)
    rows, values = rows[~relevant], listed.values[~relevant]
    _, first = np.unique(rows * len(relevance.document_ids) + relevance.page[values], return_index=True)
    first.sort()
    return Ragged.grouped(rows[first], values[first], len(relevance.query_ids)), int(relevant.sum())


def _fill(relevance: Relevance, queries: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> None:
    """Put a random document that is not relevant, and not in the row yet, wherever ``documents`` is -1; in place."""
    for _ in range(20):
        short = np.flatnonzero((documents < 0).any(axis=1))
        if not len(short):
            return
        rows = documents[short]
        holes = rows < 0
        rows[holes] = rng.integers(len(relevance.document_ids), size=int(holes.sum()))
        relevant = relevance.is_relevant(np.broadcast_to(queries[short, None], rows.shape), rows)
        rows[holes & (relevant | _repeats(relevance, rows))] = -1
        documents[short] = rows
    _fill_exactly(relevance, queries, documents, rng)


def _repeats(relevance: Relevance, documents: np.ndarray) -> np.ndarray:
    """Which entries stand for a page that another entry of the row stands for too."""
    pages = relevance.page[documents]
    same = pages[:, :, None] == pages[:, None, :]
    return (same & ~np.eye(pages.shape[1], dtype=bool)).any(axis=2)


def _fill_exactly(relevance: Relevance, queries: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> None:
    """As ``_fill``, by listing what is left for a row: for rows to which nearly everything is relevant."""
    first_copies = np.flatnonzero(relevance.page == np.arange(len(relevance.page)))
    for row in np.flatnonzero((documents < 0).any(axis=1)):
        holes = np.flatnonzero(documents[row] < 0)
        taken = relevance.page[documents[row][documents[row] >= 0]]
        free = first_copies[~relevance.is_relevant(np.full(len(first_copies), queries[row]), first_copies)]
        free = np.setdiff1d(free, taken)
        if len(free) < len(holes):
            raise DatasetError(
                f"Query {relevance.query_ids[int(queries[row])].as_py()!r} can't get {documents.shape[1]} negatives: "
                f"only {len(free) + len(taken)} documents of the corpus of {len(relevance.document_ids)} are neither "
                "relevant to it nor copies of each other. Lower num_negatives, or add documents."
            )
        documents[row, holes] = rng.choice(free, size=len(holes), replace=False)


def _short_message(relevance: Relevance, taken: np.ndarray, num_negatives: int) -> str:
    short = np.flatnonzero(taken < num_negatives)
    examples = ", ".join(f"{relevance.query_ids[int(at)].as_py()!r} ({taken[at]})" for at in short[:3])
    return (
        f"{len(short)} queries have fewer than {num_negatives} usable negatives, e.g. {examples}. Lower num_negatives, "
        'add negatives, or pass on_short="random" to fill at random or on_short="drop" to leave these queries out.'
    )
