"""What is relevant to what, as integers: the one place that knows equal queries and equal documents."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmtune.arguments import listed
from mmtune.data.arrow import IntLists, as_texts, column, flat_lists, positions, table_dataset
from mmtune.data.documents import DocumentKind
from mmtune.data.identity import identical_documents, identical_queries, usual_kind
from mmtune.data.label_changes import label_changes, mapped, with_label_changes
from mmtune.data.query_kinds import QueryKind, check_queries
from mmtune.data.tables import Tables
from mmtune.errors import ConfigError, DatasetError

Direction = Literal["text_to_image", "image_to_text"]
"""What asks: a query for documents, or a document for queries, whatever these are made of."""

DirectionName: TypeAlias = str
"""A ``Direction``, or one that names what asks and what is asked for, such as ``"video_to_text"``."""


def directions_between(queries: QueryKind, documents: DocumentKind) -> dict[DirectionName, Direction]:
    """The directions between queries and documents of these kinds, by all names that they have.

    The two general names mean the same for any kinds. Where both kinds are one, queries ask.

    Example:
        >>> list(directions_between("text", "video"))
        ['text_to_image', 'image_to_text', 'text_to_video', 'video_to_text']
    """
    named: dict[DirectionName, Direction] = {"text_to_image": "text_to_image", "image_to_text": "image_to_text"}
    named.setdefault(f"{queries}_to_{documents}", "text_to_image")
    named.setdefault(f"{documents}_to_{queries}", "image_to_text")
    return named


def resolve_direction(
    direction: DirectionName, queries: QueryKind | None, documents: DocumentKind, *, what: str = "direction="
) -> Direction:
    """What asks, from any name of a direction; ``what`` begins the message.

    Raises:
        ConfigError: The name is of no direction, or names other kinds than queries and documents are of.
    """
    known = directions_between(queries or "text", documents)
    if isinstance(direction, str) and direction in known:
        return known[direction]
    raise ConfigError(
        f"{what}{direction!r} is unknown where queries={queries or 'text'!r} and documents={documents!r}. Expected one "
        f"of {listed(list(known))}. Pass one of these, or the queries= and documents= that it names."
    )


class Relevance:
    """The judgements of a dataset by position, with equal queries and equal documents counted as one.

    A *page* here is the position of the first document with its content; a *text* a number per distinct query, whatever
    it is made of.

    Args:
        tables: The data.
        documents: What a document is made of, which decides what equals what. ``None`` is the image where the corpus
            has images, else the text.
        queries: What a query is made of, likewise. ``None`` is everything that the queries have.

    Raises:
        ConfigError: The corpus lacks what ``documents`` asks for, or the queries what ``queries`` does.
    """

    def __init__(self, tables: Tables, documents: DocumentKind | None = None, queries: QueryKind | None = None) -> None:
        self.tables = tables
        self.queries: QueryKind | None = queries
        self.documents: DocumentKind = documents or usual_kind(tables.corpus)
        self.document_ids: pa.Array = column(tables.corpus, "document_id")
        self.query_ids: pa.Array = column(tables.queries, "query_id")
        self.judged_query = positions(column(tables.qrels, "query_id"), self.query_ids)
        self.judged_document = positions(column(tables.qrels, "document_id"), self.document_ids)
        self.judged_score = column(tables.qrels, "score").to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def page(self) -> np.ndarray:
        """The page of each document, int64 of the length of the corpus."""
        return identical_documents(self.tables.corpus, self.documents)

    @property
    def query_texts(self) -> pa.Array:
        """The text of each query, as large strings; null where it has none."""
        return column(self.tables.queries, "text").cast(pa.large_string())

    @cached_property
    def text(self) -> np.ndarray:
        """The text of each query, or what else it is made of, int64 of the length of the queries."""
        return np.unique(identical_queries(self.tables.queries, self.queries), return_inverse=True)[1].reshape(-1)

    def _encode(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """A number for each pair of a query's text and a document's page."""
        return self.text[queries] * len(self.document_ids) + self.page[documents]

    @cached_property
    def _relevant_codes(self) -> np.ndarray:
        return np.unique(self._encode(self.judged_query, self.judged_document))

    @property
    def relevant_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The texts and the pages of all pairs that are relevant, each once; rising by text and then by page."""
        texts, pages = np.divmod(self._relevant_codes, len(self.document_ids))
        return texts, pages

    @property
    def highest_scores(self) -> np.ndarray:
        """The highest score of each of ``relevant_pairs``, int64."""
        scores = np.zeros(len(self._relevant_codes), dtype=np.int64)
        at = np.searchsorted(self._relevant_codes, self._encode(self.judged_query, self.judged_document))
        np.maximum.at(scores, at, self.judged_score)
        return scores

    def is_relevant(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Whether each document is relevant to the text of the query beside it, under any id.

        Args:
            queries: Positions of queries, int64.
            documents: Positions of documents, of the same shape.
        """
        return self._is_among(self._relevant_codes, queries, documents)

    @cached_property
    def _codes_that_may_be_relevant(self) -> np.ndarray:
        changes = label_changes(self.tables.negatives)
        unknown = changes.filter(pc.equal(changes["label"], "unknown"))
        ids = (unknown[name].combine_chunks() for name in ("query_id", "document_id"))
        at = [positions(each, keys) for each, keys in zip(ids, (self.query_ids, self.document_ids), strict=True)]
        known = (at[0] >= 0) & (at[1] >= 0)
        return np.union1d(self._relevant_codes, self._encode(at[0][known], at[1][known]))

    def may_be_relevant(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """As ``is_relevant``, or nobody knows whether: what ``judge_negatives`` found to be unknown is used by nothing.

        Args:
            queries: Positions of queries, int64.
            documents: Positions of documents, of the same shape.
        """
        return self._is_among(self._codes_that_may_be_relevant, queries, documents)

    def _is_among(self, known: np.ndarray, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        codes = self._encode(queries, documents)
        return known[np.minimum(np.searchsorted(known, codes), len(known) - 1)] == codes

    @cached_property
    def documents_of_text(self) -> IntLists:
        """For each text all documents that are relevant to it, copies of a page included."""
        return self._documents_of(self._relevant_codes)

    @cached_property
    def documents_apart_from_text(self) -> IntLists:
        """For each text all documents that may be relevant to it, copies of a page included: no negatives of it."""
        return self._documents_of(self._codes_that_may_be_relevant)

    def _documents_of(self, codes: np.ndarray) -> IntLists:
        texts, pages = np.divmod(codes, len(self.document_ids))
        documents_of_page = IntLists.grouped(self.page, np.arange(len(self.page)), len(self.page)).take(pages)
        return IntLists.grouped(
            texts[documents_of_page.rows], documents_of_page.values, int(self.text.max(initial=-1)) + 1
        )

    @cached_property
    def listed_negatives(self) -> IntLists:
        """For each query the documents listed as its negatives, best first."""
        negatives = self.tables.negatives
        if negatives is None:
            return IntLists(np.zeros(len(self.query_ids) + 1, dtype=np.int64), np.array([], dtype=np.int64))
        rows, items = flat_lists(column(negatives, "document_ids"))
        query = positions(column(negatives, "query_id"), self.query_ids)[rows]
        return IntLists.grouped(query, positions(items, self.document_ids), len(self.query_ids))

    def require_queries(self) -> None:
        """Make sure that there is a query: to train, to measure and to mine, something must be asked.

        Raises:
            DatasetError: There is none, or one lacks a part of what ``queries`` says that it is made of.
        """
        if len(self.query_ids):
            if self.queries is not None:
                check_queries(self.tables.queries, self.queries)
            return
        blank = self.tables.notes.blank_queries
        found = f"{blank} rows have a null or blank query; " if blank else ""
        raise DatasetError(
            f"The dataset has no queries: {found}{len(self.document_ids)} documents, e.g. "
            f"{self.document_ids[0].as_py()!r}. Write some with generate_queries(dataset, generator), or pass your "
            "own: a queries.csv with text, source, page_number in the folder of the PDFs, or a query column."
        )

    def find_queries(self, ids: Iterable[object]) -> np.ndarray:
        """The positions of the queries with these ids, each once, ascending.

        Raises:
            DatasetError: An id is of no query.
            ConfigError: There is no id.
        """
        self.require_queries()
        wanted = as_texts("query id", ids)
        rows = positions(wanted, self.query_ids)
        if not len(rows):
            raise ConfigError("n_or_ids holds no id. Name at least one query.")
        if (rows < 0).any():
            raise DatasetError(
                f"{int((rows < 0).sum())} of the ids are of no query, e.g. {wanted[int(np.argmin(rows))].as_py()!r}. "
                f"There are {len(self.query_ids)} queries, e.g. {self.query_ids[0].as_py()!r}."
            )
        return np.unique(rows)

    @property
    def num_copies(self) -> int:
        """Documents that equal another one in everything that they are made of."""
        return int((self.page != np.arange(len(self.page))).sum())

    def subset(self, queries: np.ndarray, documents: np.ndarray) -> Tables:
        """The tables reduced to some queries and documents.

        Negatives that are not among the documents are taken out of their lists, and counted in the notes.

        Args:
            queries: Positions, ascending.
            documents: Positions, ascending; everything judged relevant to one of the queries must be among them.
        """
        tables = replace(
            self.tables,
            corpus=self.tables.corpus.select(documents),
            queries=self.tables.queries.select(queries),
            qrels=self.tables.qrels.select(np.flatnonzero(np.isin(self.judged_query, queries))),
        )
        if tables.negatives is None:
            return tables
        listed = self.listed_negatives.take(queries)
        kept = np.isin(listed.values, documents)
        within = IntLists.grouped(listed.rows[kept], listed.values[kept], len(queries))
        ids = {"query_id": self.query_ids.take(queries), "document_ids": within.ids(self.document_ids)}
        held_out = tables.notes.held_out_negatives + int((~kept).sum())
        notes = replace(tables.notes, held_out_negatives=held_out)
        changes = self.label_changes_within(queries, documents)
        return replace(tables, negatives=with_label_changes(table_dataset(ids), changes), notes=notes)

    def label_changes_within(
        self, queries: np.ndarray, documents: np.ndarray, changes: pa.Table | None = None
    ) -> pa.Table:
        """The changes of labels for some queries and documents.

        What is unknown holds for all queries of one text and all copies of a page: where the one that a change names is
        not among these, the first of its equals stands in.

        Args:
            queries: Positions, ascending.
            documents: Positions, ascending.
            changes: Where there are others than those of the negatives.
        """
        changes = label_changes(self.tables.negatives) if changes is None else changes
        is_unknown = pc.equal(changes["label"], "unknown").to_numpy()
        sides = {
            "query_id": (self.query_ids, self.text, queries),
            "document_id": (self.document_ids, self.page, documents),
        }
        ids = {}
        for name, (all_ids, equals, kept) in sides.items():
            rows = positions(changes[name].combine_chunks(), all_ids)
            standing = np.where(np.isin(rows, kept), rows, -1)
            values, first = np.unique(equals[kept], return_index=True)
            looks = (standing < 0) & is_unknown & (rows >= 0) & np.isin(equals[rows], values)
            standing[looks] = kept[first[np.searchsorted(values, equals[rows[looks]])]]
            ids[name] = all_ids.take(pa.array(standing, mask=standing < 0))
        return mapped(changes, **ids)

    @cached_property
    def is_judged_by_machine(self) -> np.ndarray:
        """Which judgements ``judge_negatives`` made, bool."""
        changes = label_changes(self.tables.negatives)
        found = changes.filter(pc.equal(changes["label"], "relevant"))
        query = positions(found["query_id"].combine_chunks(), self.query_ids)
        document = positions(found["document_id"].combine_chunks(), self.document_ids)
        size = len(self.document_ids)
        return np.isin(self.judged_query * size + self.judged_document, query * size + document)

    @property
    def pairs_apart(self) -> tuple[np.ndarray, np.ndarray]:
        """The texts and the pages of all pairs that may be relevant, each once, as ``relevant_pairs``."""
        texts, pages = np.divmod(self._codes_that_may_be_relevant, len(self.document_ids))
        return texts, pages
