"""What is relevant to what, as integers: the one place that knows equal query texts and byte-identical pages."""

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mmtune.data.arrow import IntLists, column, flat_lists, lists, positions, table_dataset
from mmtune.data.identity import identical_documents
from mmtune.data.tables import Tables

Direction = Literal["text_to_image", "image_to_text"]
"""What asks: a text for pages, or a page for texts."""


class Relevance:
    """The judgements of a dataset by position, with equal texts and byte-identical pages counted as one.

    A *page* here is the position of the first document with its content; a *text* a number per distinct query text.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.document_ids: pa.Array = column(tables.corpus, "document_id")
        self.query_ids: pa.Array = column(tables.queries, "query_id")
        self.judged_query = positions(column(tables.qrels, "query_id"), self.query_ids)
        self.judged_document = positions(column(tables.qrels, "document_id"), self.document_ids)
        self.judged_score = column(tables.qrels, "score").to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def page(self) -> np.ndarray:
        """The page of each document, int64 of the length of the corpus."""
        return identical_documents(self._tables.corpus)

    @property
    def query_texts(self) -> pa.Array:
        """The text of each query, as large strings."""
        return column(self._tables.queries, "text").cast(pa.large_string())

    @cached_property
    def text(self) -> np.ndarray:
        """The text of each query, int64 of the length of the queries."""
        return self.query_texts.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def _relevant_pairs(self) -> np.ndarray:
        """Sorted codes of all (text, page) that are relevant."""
        return np.unique(self._pair(self.text[self.judged_query], self.page[self.judged_document]))

    def _pair(self, texts: np.ndarray, pages: np.ndarray) -> np.ndarray:
        return texts * len(self.document_ids) + pages

    def is_relevant(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Whether each document is relevant to the text of the query beside it, under any id.

        Args:
            queries: Positions of queries, int64.
            documents: Positions of documents, of the same shape.
        """
        pairs = self._pair(self.text[queries], self.page[documents])
        at = np.minimum(np.searchsorted(self._relevant_pairs, pairs), len(self._relevant_pairs) - 1)
        return self._relevant_pairs[at] == pairs

    @cached_property
    def documents_of_text(self) -> IntLists:
        """For each text all documents that are relevant to it, copies of a page included."""
        texts, pages = np.divmod(self._relevant_pairs, len(self.document_ids))
        documents_of_page = IntLists.grouped(self.page, np.arange(len(self.page)), len(self.page)).take(pages)
        return IntLists.grouped(texts[documents_of_page.rows], documents_of_page.values, int(self.text.max()) + 1)

    @cached_property
    def listed_negatives(self) -> IntLists:
        """For each query the documents listed as its negatives, best first."""
        negatives = self._tables.negatives
        if negatives is None:
            return IntLists(np.zeros(len(self.query_ids) + 1, dtype=np.int64), np.array([], dtype=np.int64))
        rows, items = flat_lists(column(negatives, "document_ids"))
        query = positions(column(negatives, "query_id"), self.query_ids)[rows]
        return IntLists.grouped(query, positions(items, self.document_ids), len(self.query_ids))

    @property
    def num_copies(self) -> int:
        """Documents that are a byte-identical copy of another one."""
        return int((self.page != np.arange(len(self.page))).sum())

    def subset(self, queries: np.ndarray, documents: np.ndarray) -> Tables:
        """The tables reduced to some queries and documents.

        Negatives that are not among the documents are taken out of their lists, and counted in the notes.

        Args:
            queries: Positions, ascending.
            documents: Positions, ascending; everything judged relevant to one of the queries must be among them.
        """
        tables = self._tables
        return replace(
            tables,
            corpus=tables.corpus.select(documents),
            queries=tables.queries.select(queries),
            qrels=tables.qrels.select(np.flatnonzero(np.isin(self.judged_query, queries))),
            **self._negatives_within(queries, documents),
        )

    def _negatives_within(self, queries: np.ndarray, documents: np.ndarray) -> dict[str, Any]:
        if self._tables.negatives is None:
            return {}
        listed = self.listed_negatives.take(queries)
        kept = np.isin(listed.values, documents)
        within = IntLists.grouped(listed.rows[kept], listed.values[kept], len(queries))
        ids = {
            "query_id": self.query_ids.take(pa.array(queries)),
            "document_ids": lists(within.offsets, self.document_ids.take(pa.array(within.values))),
        }
        notes = self._tables.notes
        held_out = notes.held_out_negatives + int((~kept).sum())
        return {"negatives": table_dataset(ids), "notes": replace(notes, held_out_negatives=held_out)}
