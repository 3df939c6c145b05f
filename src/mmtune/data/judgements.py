"""What is relevant to what, from the side of what asks: a text that asks for pages, or a page that asks for texts."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from mmtune.data.arrow import IntLists
from mmtune.data.near_misses import NearMisses
from mmtune.data.negatives import Candidates, choose_negatives
from mmtune.data.relevance import Direction, DirectionName, Relevance, resolve_direction
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
        near_misses: Texts that are no queries, and negatives of the pages of theirs; see ``with_near_misses``.
    """

    relevance: Relevance
    direction: Direction
    asking: np.ndarray
    judged_rows: np.ndarray
    candidates: Candidates
    near_misses: NearMisses | None = None

    @classmethod
    def of(cls, relevance: Relevance, direction: DirectionName, *, each_copy: bool = False) -> "Judgements":
        """The judgements of a dataset as they look to what asks: all queries, or the pages that are relevant to one.

        Args:
            relevance: The judgements by position.
            direction: What asks.
            each_copy: Whether copies of a page ask each for itself, by the id that was judged, rather than as one.

        Raises:
            ConfigError: The direction is unknown, or of other kinds of queries and documents.
            DatasetError: There are no queries.
        """
        relevance.require_queries()
        direction = resolve_direction(direction, relevance.queries, relevance.documents)
        listed = relevance.listed_negatives
        if direction == "text_to_image":
            asking = np.arange(len(relevance.query_ids))
            names = ("Query", "documents")
            negatives = Candidates(relevance.query_ids, listed, relevance.page, relevance.may_be_relevant, names)
            return cls(relevance, direction, asking, relevance.judged_query, negatives)
        # The negatives of a page are the queries that list it, or a copy of it, as theirs.
        judged = relevance.judged_document
        asking, rows = np.unique(judged if each_copy else relevance.page[judged], return_inverse=True)
        queries_of_page = IntLists.grouped(relevance.page[listed.values], listed.rows, len(relevance.page))
        negatives = Candidates(
            relevance.document_ids.take(asking),
            queries_of_page.take(relevance.page[asking]),
            relevance.text,
            lambda at, queries: relevance.may_be_relevant(queries, asking[at]),
            ("Page", "query texts"),
        )
        return cls(relevance, direction, asking, rows, negatives)

    @property
    def asking_ids(self) -> pa.Array:
        """The ids of what asks."""
        return self.candidates.row_ids

    @property
    def item_ids(self) -> pa.Array:
        """The ids of everything that could be asked for: all documents, or all queries and then all near misses."""
        if self.direction == "text_to_image":
            return self.relevance.document_ids
        further = pa.array([], type=pa.string()) if self.near_misses is None else self.near_misses.ids
        return pa.concat_arrays([self.relevance.query_ids, further])

    def with_near_misses(self) -> "Judgements":
        """These with the near misses of the queries; where pages ask, their first negatives, and drawn for no other.

        Near misses are texts: where queries are something else, there are none.
        """
        relevance = self.relevance
        if relevance.queries not in (None, "text"):
            return self
        found = NearMisses.of(relevance.tables.queries)
        if not len(found) or self.direction == "text_to_image":
            return replace(self, near_misses=found if len(found) else None)
        count = len(relevance.query_ids)
        of_judgement = found.by_judgement(relevance)
        rows, items = self.judged_rows[of_judgement.rows], count + of_judgement.values
        listed = self.candidates.lists
        lists = IntLists.grouped(np.r_[rows, listed.rows], np.r_[items, listed.values], len(self.asking))
        # A near miss with the words of a query is that query.
        texts = pa.concat_arrays([relevance.query_texts, found.texts.cast(pa.large_string())]).dictionary_encode()
        text = texts.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        query = np.unique(text, return_index=True)[1][text]

        def is_relevant(at: np.ndarray, items: np.ndarray) -> np.ndarray:
            asked = query[items]
            is_query = asked < count
            return is_query & relevance.may_be_relevant(np.where(is_query, asked, 0), self.asking[at])

        candidates = replace(self.candidates, lists=lists, same=text, is_relevant=is_relevant, num_drawn=count)
        return replace(self, candidates=candidates, near_misses=found)

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

    def require_candidates(self, count: int) -> None:
        """Make sure that there are ``count`` different items.

        Raises:
            ConfigError: There are fewer.
        """
        items = self.candidates.what[1]
        available = len(self.distinct_items)
        if count > available:
            raise ConfigError(
                f"num_candidates={count} is more than the {available} different {items} that there are. Lower it, or "
                f"add {items}."
            )

    @cached_property
    def _num_apart(self) -> np.ndarray:
        """For each row the different items that may be relevant to it, int64."""
        relevance = self.relevance
        texts, pages = relevance.pairs_apart
        if self.direction == "text_to_image":
            return np.bincount(texts, minlength=len(relevance.query_ids))[relevance.text[self.asking]]
        return np.bincount(pages, minlength=len(relevance.document_ids))[relevance.page[self.asking]]

    def require_something_wrong(self) -> None:
        """Make sure that each row has an item that is not relevant to it.

        Raises:
            ConfigError: Everything is relevant to a row, so that no ranking could be wrong.
        """
        asking, items = self.candidates.what
        row, available = int(self._num_apart.argmax()), len(self.distinct_items)
        if self._num_apart[row] >= available:
            raise ConfigError(
                f"All {available} different {items} are relevant to {asking.lower()} "
                f"{self.asking_ids[row].as_py()!r}, so that every order of them is right. Leave it out with "
                f"select_queries(), or add {items}."
            )

    def lists(
        self, num_candidates: int, *, seed: int, most_relevant: int | None = None, ranked: np.ndarray | None = None
    ) -> list[CandidateList]:
        """For each row what is relevant, then ``num_candidates - 1`` of what is not: the best, as far as there are any.

        So a list is longer where more than one item is relevant, and chance stays what it is. Of more than
        ``most_relevant`` relevant items those with the highest scores are taken, and random ones of equal score; the
        rest counts as not found.

        Args:
            num_candidates: The length of a list with one relevant item.
            seed: Of what is drawn: relevant items beyond ``most_relevant``, and the filling where ``ranked``, or the
                listed negatives, are too short.
            most_relevant: Relevant items of a list at most; ``None`` is ``num_candidates``.
            ranked: Items for each row, best first, int64, shape ``(rows, depth)``. ``None`` takes the negatives that
                the dataset lists.

        Raises:
            ConfigError: There are fewer than ``num_candidates`` items, or everything is relevant to a row.
        """
        self.require_candidates(num_candidates)
        self.require_something_wrong()
        num_wrong = np.minimum(len(self.distinct_items) - self._num_apart, num_candidates - 1)
        source = self.candidates if ranked is None else replace(self.candidates, lists=IntLists.of_rows(ranked))
        wrong_by_row: dict[int, np.ndarray] = {}
        # All rows of a chosen set get equally many negatives.
        for count in np.unique(num_wrong):
            rows = np.flatnonzero(num_wrong == count)
            chosen = choose_negatives(source.take(rows), int(count), "random", seed)
            wrong_by_row |= dict(zip(rows.tolist(), chosen.items, strict=True))
        most = num_candidates if most_relevant is None else most_relevant
        return [
            self._make_list(row, np.r_[self._best_relevant(row, most, seed), wrong_by_row[row]])
            for row in range(len(num_wrong))
        ]

    def _best_relevant(self, row: int, count: int, seed: int) -> np.ndarray:
        """At most ``count`` of what is relevant to a row."""
        relevant = self.relevant[row]
        if len(relevant) <= count:
            return relevant
        drawn = np.random.default_rng((seed, row)).permutation(len(relevant))
        best = drawn[np.argsort(-self.scores[row][drawn], kind="stable")]
        return relevant[np.sort(best[:count])]

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
