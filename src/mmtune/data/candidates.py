"""What a reranker ranks: for each query, or for each page, its candidates and how relevant each of them is."""

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pyarrow as pa

from mmtune.data.arrow import IntLists
from mmtune.data.negatives import Candidates, choose_negatives
from mmtune.data.relevance import Direction, Relevance
from mmtune.errors import ConfigError


@dataclass(frozen=True)
class CandidateList:
    """What is ranked for one query, or for one page that asks for texts.

    Attributes:
        asking_id: The id of what asks.
        candidate_ids: The ids of what is asked for, in no meaningful order unless a retriever gave one.
        gains: The score of each candidate; 0 for one that is not relevant.
        all_gains: The scores of everything relevant, also of what is not among the candidates.
    """

    asking_id: str
    candidate_ids: tuple[str, ...]
    gains: tuple[int, ...]
    all_gains: tuple[int, ...]


@dataclass(frozen=True)
class Judgements:
    """What is relevant to what, with equal texts and byte-identical pages as one, for either direction.

    Attributes:
        direction: What asks.
        asking_ids: The ids of what asks: all queries, or the pages that are relevant to one.
        item_ids: The ids of everything that could be asked for: all documents, or all queries.
        relevant: For each that asks the relevant items, by position; of equal ones the first.
        scores: Their scores, laid out as ``relevant``.
        candidates: The negatives that each may get.
    """

    direction: Direction
    asking_ids: pa.Array
    item_ids: pa.Array
    relevant: IntLists
    scores: IntLists
    candidates: Candidates

    @classmethod
    def of(cls, relevance: Relevance, direction: Direction) -> "Judgements":
        """The judgements of a dataset as they look to what asks.

        Raises:
            ConfigError: The direction is unknown.
        """
        if direction not in get_args(Direction):
            known = ", ".join(map(repr, get_args(Direction)))
            raise ConfigError(f"direction={direction!r} is unknown. Expected one of {known}.")
        texts, pages, scores = _highest_scores(relevance)
        if direction == "text_to_image":
            count = int(relevance.text.max()) + 1
            relevant, graded = (IntLists.grouped(texts, part, count).take(relevance.text) for part in (pages, scores))
            negatives = Candidates.documents_of_queries(relevance)
            return cls(direction, relevance.query_ids, relevance.document_ids, relevant, graded, negatives)
        asking, row = np.unique(pages, return_inverse=True)
        first_query = np.unique(relevance.text, return_index=True)[1][texts]
        relevant, graded = (IntLists.grouped(row, part, len(asking)) for part in (first_query, scores))
        asking_ids = relevance.document_ids.take(pa.array(asking))
        negatives = Candidates.texts_of_pages(relevance, asking)
        return cls(direction, asking_ids, relevance.query_ids, relevant, graded, negatives)

    @property
    def distinct_items(self) -> np.ndarray:
        """The positions of items without copies of equal content, ascending."""
        return np.sort(np.unique(self.candidates.same, return_index=True)[1])

    def require_candidates(self, count: int, *, all_relevant: bool = True) -> None:
        """Make sure that there are ``count`` different items, and that what is relevant is among so many.

        Args:
            count: The length of a list.
            all_relevant: Whether a list holds everything relevant.

        Raises:
            ConfigError: There are fewer, or something has more relevant ones.
        """
        asking, items = self.candidates.what
        available = len(self.distinct_items)
        if count > available:
            raise ConfigError(
                f"num_candidates={count} is more than the {available} different {items} that there are. Lower it, or "
                f"add {items}."
            )
        row = int(self.relevant.lengths.argmax())
        most = int(self.relevant.lengths[row])
        if all_relevant and most > count:
            raise ConfigError(
                f"{asking} {self.asking_ids[row].as_py()!r} has {most} relevant {items}, and num_candidates={count} "
                f"counts them. Raise it above {most}, or leave such queries out with select_queries()."
            )

    def lists(self, num_candidates: int, *, seed: int, ranked: np.ndarray | None = None) -> list[CandidateList]:
        """For each that asks everything relevant, then the best of what is not.

        Args:
            num_candidates: The length of a list, what is relevant included.
            seed: Of the filling where ``ranked``, or the listed negatives, are too short.
            ranked: Items for each that asks, best first, int64, shape ``(asking, depth)``. ``None`` takes the negatives
                that the dataset lists.

        Raises:
            ConfigError: See ``require_candidates``.
        """
        self.require_candidates(num_candidates)
        lengths = self.relevant.lengths
        source = self.candidates if ranked is None else replace(self.candidates, lists=_rectangle(ranked))
        found: list[CandidateList | None] = [None] * len(lengths)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            chosen = choose_negatives(_rows_of(source, rows), num_candidates - int(length), "random", seed)
            for row, negatives in zip(rows.tolist(), chosen.items, strict=True):
                items = np.r_[self._relevant(row), negatives]
                found[row] = self._list(row, items)
        return [each for each in found if each is not None]

    def lists_as_ranked(self, ranked: np.ndarray) -> list[CandidateList]:
        """For each that asks what a retriever found, and nothing else.

        Args:
            ranked: Items for each that asks, best first, int64, shape ``(asking, depth)``.
        """
        return [self._list(row, items) for row, items in enumerate(ranked)]

    def _relevant(self, row: int) -> np.ndarray:
        return self.relevant.values[self.relevant.offsets[row] : self.relevant.offsets[row + 1]]

    def _list(self, row: int, items: np.ndarray) -> CandidateList:
        scores = self.scores.values[self.scores.offsets[row] : self.scores.offsets[row + 1]].tolist()
        same = self.candidates.same
        score_by_content = dict(zip(same[self._relevant(row)].tolist(), scores, strict=True))
        return CandidateList(
            self.asking_ids[int(row)].as_py(),
            tuple(self.item_ids.take(pa.array(items)).to_pylist()),
            tuple(score_by_content.get(content, 0) for content in same[items].tolist()),
            tuple(scores),
        )


def _highest_scores(relevance: Relevance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each relevant pair of a text and a page once: texts, pages and their highest scores, int64."""
    count = len(relevance.document_ids)
    codes = relevance.text[relevance.judged_query] * count + relevance.page[relevance.judged_document]
    pairs, at = np.unique(codes, return_inverse=True)
    scores = np.zeros(len(pairs), dtype=np.int64)
    np.maximum.at(scores, at, relevance.judged_score)
    texts, pages = np.divmod(pairs, count)
    return texts, pages, scores


def _rows_of(candidates: Candidates, rows: np.ndarray) -> Candidates:
    return replace(
        candidates,
        row_ids=candidates.row_ids.take(pa.array(rows)),
        lists=candidates.lists.take(rows),
        is_relevant=lambda at, items: candidates.is_relevant(rows[at], items),
    )


def _rectangle(items: np.ndarray) -> IntLists:
    return IntLists(np.arange(len(items) + 1) * items.shape[1], items.reshape(-1))
