"""Rows for rerankers, in both directions: pairs with a label, or a query with a list."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from mmtune import host
from mmtune.data.arrow import IntLists, lists, table_dataset
from mmtune.data.documents import DocumentKind, DocumentReader, KeyedTable
from mmtune.data.negatives import Candidates, ChosenNegatives, choose_negatives
from mmtune.data.relevance import Direction, Relevance
from mmtune.data.tables import Tables


class _RerankingView:
    """What the transforms of both kinds of rows share: texts and documents by id, and which of them asks."""

    def __init__(self, tables: Tables, documents: DocumentKind, direction: Direction, chosen: ChosenNegatives) -> None:
        self._queries = KeyedTable(tables.queries, "query_id", ["text"])
        self._documents = DocumentReader(tables.corpus, documents)
        self.documents = documents
        self.direction = direction
        self.num_negatives = chosen.items.shape[1]
        self.chosen = {name: getattr(chosen, name) for name in ("listed", "filled", "refused", "dropped")}
        self.fingerprint = (
            f"{type(self).__name__}, {self._queries.fingerprint}, {self._documents.fingerprint}, {direction}"
        )

    def _read(self, query_ids: list[str], document_ids: list[str]) -> tuple[list[Any], list[Any]]:
        """What asks and what is asked for, each document decoded once."""
        texts = [row["text"] for row in self._queries.get(query_ids)]
        documents = self._documents.read(document_ids)
        return (texts, documents) if self.direction == "text_to_image" else (documents, texts)


@host.hashed_by(lambda view: view.fingerprint)
class PairView(_RerankingView):
    """Turns rows of ids into ``query, document, label``; the transform of labeled pairs."""

    columns = ("query", "document", "label")

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host's rerankers read it; ids where only some of the columns are asked for."""
        if not {"query_id", "document_id", "label"} <= set(batch):
            return batch
        asking, asked = self._read(batch["query_id"], batch["document_id"])
        return {"query": asking, "document": asked, "label": batch["label"]}


@host.hashed_by(lambda view: view.fingerprint)
class ListView(_RerankingView):
    """Turns rows of ids into ``query, documents, labels``; the transform of labeled lists."""

    columns = ("query", "documents", "labels")

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host's listwise losses read it; ids where only some of the columns are asked for."""
        if not {"query_ids", "document_ids", "labels"} <= set(batch):
            return batch
        lengths = [len(labels) for labels in batch["labels"]]
        asking, asked = self._read(_joined(batch["query_ids"]), _joined(batch["document_ids"]))
        ends = np.cumsum(lengths)
        starts = ends - lengths
        parts = [asked[start:end] for start, end in zip(starts, ends, strict=True)]
        return {"query": [asking[start] for start in starts], "documents": parts, "labels": batch["labels"]}


@dataclass(frozen=True)
class _Sides:
    """What asks (the rows) and what is asked for (the items), by position.

    Attributes:
        row: The row of each judgement, int64.
        item: The item of each judgement, int64.
        positions: What each row is: a position among the queries, or among the documents.
        candidates: The negatives that rows may get.
    """

    row: np.ndarray
    item: np.ndarray
    positions: np.ndarray
    candidates: Candidates

    @classmethod
    def of(cls, relevance: Relevance, direction: Direction) -> "_Sides":
        queries, documents = relevance.judged_query, relevance.judged_document
        if direction == "text_to_image":
            candidates = Candidates.documents_of_queries(relevance)
            return cls(queries, documents, np.arange(len(relevance.query_ids)), candidates)
        pages, row = np.unique(documents, return_inverse=True)
        return cls(row, queries, pages, Candidates.texts_of_pages(relevance, pages))


def labeled_pairs(
    tables: Tables,
    relevance: Relevance,
    num_negatives: int,
    *,
    documents: DocumentKind,
    direction: Direction,
    seed: int,
) -> Dataset:
    """Each relevant pair with its negatives after it; see ``RetrievalDataset.labeled_pairs``."""
    sides = _Sides.of(relevance, direction)
    chosen = choose_negatives(sides.candidates, num_negatives, "random", seed)
    items = np.concatenate([sides.item[:, None], chosen.items[sides.row]], axis=1)
    asking = np.repeat(sides.positions[sides.row], items.shape[1])
    labels = np.zeros(items.shape, dtype=np.int64)
    labels[:, 0] = 1
    query_ids, document_ids = _ids(relevance, direction, asking, items.reshape(-1))
    ids = {"query_id": query_ids, "document_id": document_ids, "label": pa.array(labels.reshape(-1))}
    return table_dataset(ids).with_transform(PairView(tables, documents, direction, chosen))


def labeled_lists(
    tables: Tables,
    relevance: Relevance,
    num_negatives: int,
    *,
    documents: DocumentKind,
    direction: Direction,
    seed: int,
) -> Dataset:
    """Everything that is relevant to a query, then its negatives; see ``RetrievalDataset.labeled_lists``."""
    sides = _Sides.of(relevance, direction)
    chosen = choose_negatives(sides.candidates, num_negatives, "random", seed)
    count = len(sides.positions)
    row = np.r_[sides.row, np.repeat(np.arange(count), num_negatives)]
    grade = np.r_[relevance.judged_score, np.zeros(count * num_negatives, dtype=np.int64)]
    items = IntLists.grouped(row, np.r_[sides.item, chosen.items.reshape(-1)], count)
    labels = IntLists.grouped(row, grade, count)
    query_ids, document_ids = _ids(relevance, direction, sides.positions[items.rows], items.values)
    ids = {
        "query_ids": lists(items.offsets, query_ids),
        "document_ids": lists(items.offsets, document_ids),
        "labels": lists(labels.offsets, pa.array(labels.values)),
    }
    return table_dataset(ids).with_transform(ListView(tables, documents, direction, chosen))


def _ids(
    relevance: Relevance, direction: Direction, asking: np.ndarray, asked: np.ndarray
) -> tuple[pa.Array, pa.Array]:
    """The ids of queries and of documents, whichever of them asks."""
    queries, documents = (asking, asked) if direction == "text_to_image" else (asked, asking)
    return relevance.query_ids.take(pa.array(queries)), relevance.document_ids.take(pa.array(documents))


def _joined(parts: list[list[str]]) -> list[str]:
    return [value for part in parts for value in part]
