"""What is relevant to what, from the side of what asks: a text that asks for pages, or a page that asks for texts."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import numpy as np
import pyarrow as pa

from mmtune.arguments import require_one_of
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
    """The judgements of a dataset for one direction: rows that ask, and items that are asked for.

    Attributes:
        relevance: The judgements by position.
        direction: What asks.
        asking: What each row is, ascending: a position among the queries, or among the documents.
        judged_rows: The row of each judgement, int64.
        candidates: The negatives that each row may get.
    """

    relevance: Relevance
    direction: Direction
    asking: np.ndarray
    judged_rows: np.ndarray
    candidates: Candidates

    @classmethod
    def of(cls, relevance: Relevance, direction: Direction, *, each_copy: bool = False) -> "Judgements":
        """The judgements of a dataset as they look to what asks: all queries, or the pages that are relevant to one.

        Args:
            relevance: The judgements by position.
            direction: What asks.
            each_copy: Whether copies of a page ask each for itself, by the id that was judged, rather than as one.

        Raises:
            ConfigError: The direction is unknown.
        """
        require_one_of("direction", direction, get_args(Direction))
        listed = relevance.listed_negatives
        if direction == "text_to_image":
            asking = np.arange(len(relevance.query_ids))
            names = ("Query", "documents")
            negatives = Candidates(relevance.query_ids, listed, relevance.page, relevance.is_relevant, names)
            return cls(relevance, direction, asking, relevance.judged_query, negatives)
        # The negatives of a page are the queries that list it, or a copy of it, as theirs.
        judged = relevance.judged_document
        asking, rows = np.unique(judged if each_copy else relevance.page[judged], return_inverse=True)
        queries_of_page = IntLists.grouped(relevance.page[listed.values], listed.rows, len(relevance.page))
        negatives = Candidates(
            relevance.document_ids.take(asking),
            queries_of_page.take(relevance.page[asking]),
            relevance.text,
            lambda at, queries: relevance.is_relevant(queries, asking[at]),
            ("Page", "query texts"),
        )
        return cls(relevance, direction, asking, rows, negatives)

    @property
    def asking_ids(self) -> pa.Array:
        """The ids of what asks."""
        return self.candidates.row_ids

    @property
    def item_ids(self) -> pa.Array:
        """The ids of everything that could be asked for: all documents, or all queries."""
        return self.relevance.document_ids if self.direction == "text_to_image" else self.relevance.query_ids

    @property
    def judged_items(self) -> np.ndarray:
        """The item of each judgement, int64."""
        return self.relevance.judged_document if self.direction == "text_to_image" else self.relevance.judged_query

    @cached_property
    def _graded(self) -> tuple[IntLists, IntLists]:
        """For each row the relevant items and their scores, by content."""
        relevance = self.relevance
        texts, pages = relevance.relevant_pairs
        if self.direction == "text_to_image":
            keys, items, key_of_row = texts, pages, relevance.text[self.asking]
        else:
            first_query = np.unique(relevance.text, return_index=True)[1]
            keys, items, key_of_row = pages, first_query[texts], relevance.page[self.asking]
        count = int(keys.max()) + 1
        relevant = IntLists.grouped(keys, items, count).take(key_of_row)
        return relevant, IntLists.grouped(keys, relevance.highest_scores, count).take(key_of_row)

    @property
    def relevant(self) -> IntLists:
        """For each row the relevant items, by position; of equal ones the first."""
        return self._graded[0]

    @property
    def scores(self) -> IntLists:
        """Their scores, laid out as ``relevant``; of equal items the highest."""
        return self._graded[1]

    @property
    def distinct_items(self) -> np.ndarray:
        """The positions of items without copies of equal content, ascending."""
        return np.sort(self.candidates.distinct)

    def ids(self, rows: np.ndarray, items: np.ndarray) -> tuple[pa.Array, pa.Array]:
        """The ids of queries and of documents, whichever of them asks.

        Args:
            rows: What asks, int64.
            items: What is asked for, of the same length.
        """
        asking, asked = self.asking_ids.take(rows), self.item_ids.take(items)
        return (asking, asked) if self.direction == "text_to_image" else (asked, asking)

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
        """For each row everything relevant, then the best of what is not.

        Args:
            num_candidates: The length of a list, what is relevant included.
            seed: Of the filling where ``ranked``, or the listed negatives, are too short.
            ranked: Items for each row, best first, int64, shape ``(rows, depth)``. ``None`` takes the negatives that
                the dataset lists.

        Raises:
            ConfigError: See ``require_candidates``.
        """
        self.require_candidates(num_candidates)
        lengths = self.relevant.lengths
        source = self.candidates if ranked is None else replace(self.candidates, lists=IntLists.of_rows(ranked))
        items_by_row: dict[int, np.ndarray] = {}
        # All rows of a chosen set get equally many negatives, so rows with equally many relevant items go together.
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            chosen = choose_negatives(source.take(rows), num_candidates - int(length), "random", seed)
            items_by_row |= dict(zip(rows.tolist(), chosen.items, strict=True))
        return [self._make_list(row, np.r_[self.relevant[row], items_by_row[row]]) for row in range(len(lengths))]

    def lists_as_ranked(self, ranked: np.ndarray) -> list[CandidateList]:
        """For each row what a retriever found, and nothing else.

        Args:
            ranked: Items for each row, best first, int64, shape ``(rows, depth)``.
        """
        return [self._make_list(row, items) for row, items in enumerate(ranked)]

    def _make_list(self, row: int, items: np.ndarray) -> CandidateList:
        scores = self.scores[row].tolist()
        same = self.candidates.same
        score_by_content = dict(zip(same[self.relevant[row]].tolist(), scores, strict=True))
        return CandidateList(
            self.asking_ids[row].as_py(),
            tuple(self.item_ids.take(items).to_pylist()),
            tuple(score_by_content.get(content, 0) for content in same[items].tolist()),
            tuple(scores),
        )
