"""Rows for the host's trainers: ids in Arrow, texts and pages when a row is read."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from mmtune import host
from mmtune.data.arrow import IntLists, lists, table_dataset
from mmtune.data.documents import DocumentKind, DocumentReader, KeyedTable
from mmtune.data.negatives import ChosenNegatives
from mmtune.data.relevance import Direction, Relevance
from mmtune.data.tables import Tables

ID_COLUMNS = ("query_id", "document_id", "negative_document_ids", "relevant_document_ids")
"""The columns of training rows under ``rows.with_format(None)``."""


@host.hashed_by(lambda view: view.fingerprint)
class TrainingView:
    """Turns rows of ids into ``query, image, negative_0, ...``; the transform of the training rows."""

    direction: Direction = "text_to_image"

    def __init__(
        self,
        tables: Tables,
        documents: DocumentKind,
        *,
        chosen: ChosenNegatives,
        max_pixels: int | None = None,
    ) -> None:
        self.tables: Tables | None = tables
        self.documents = documents
        self.num_negatives = chosen.items.shape[1]
        self.chosen = {name: getattr(chosen, name) for name in ("listed", "filled", "refused", "dropped")}
        self.columns = ["query", "image", *(f"negative_{k}" for k in range(self.num_negatives))]
        self._queries = KeyedTable(tables.queries, "query_id", ["text"])
        self._documents = DocumentReader(tables.corpus, documents, max_pixels=max_pixels)
        self.fingerprint = f"{self._queries.fingerprint}, {self._documents.fingerprint}, {self.num_negatives}"

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read rows; the tables are for the process that starts the training.
        return {**self.__dict__, "tables": None}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host's losses read it, positives and negatives of one batch decoded once.

        With only some of the id columns, as ``filter(..., input_columns=["query_id"])`` asks for, they stay ids.
        """
        if not {"query_id", "document_id", "negative_document_ids"} <= set(batch):
            return batch
        ids = [batch["document_id"], *zip(*batch["negative_document_ids"], strict=True)]
        documents = self._documents.read([document_id for column in ids for document_id in column])
        size = len(batch["document_id"])
        names = self.columns[1:]
        columns = {name: documents[k * size : (k + 1) * size] for k, name in enumerate(names)}
        return {"query": [row["text"] for row in self._queries.get(batch["query_id"])], **columns}


@host.hashed_by(lambda view: view.fingerprint)
class AskingPages(TrainingView):
    """Training rows read the other way round: ``query`` is the page and ``document`` its text, without negatives."""

    direction: Direction = "image_to_text"

    def __init__(self, view: TrainingView) -> None:
        self.__dict__.update(view.__dict__)
        self.columns = ["query", "document"]
        self.fingerprint = f"{view.fingerprint}, asked by the page"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as contrastive losses of rerankers read it."""
        row = super().__call__(batch)
        return {"query": row["image"], "document": row["query"]} if "image" in row else row


def view_of(rows: Dataset) -> Any:
    """What turns the ids of some rows into texts and pages when they are read; ``None`` where nothing does.

    It is what the rows were made with, also where the host's trainer has wrapped it since.
    """
    return host.own_transform(rows)


def training_rows(
    tables: Tables, relevance: Relevance, chosen: ChosenNegatives, documents: DocumentKind, max_pixels: int | None
) -> Dataset:
    """One row per (query, relevant document); see ``RetrievalDataset.training_rows``."""
    row_of_query = np.full(len(relevance.query_ids), -1)
    row_of_query[chosen.rows] = np.arange(len(chosen.rows))
    order = np.argsort(relevance.judged_query, kind="stable")
    order = order[row_of_query[relevance.judged_query[order]] >= 0]
    queries, positives = relevance.judged_query[order], relevance.judged_document[order]
    relevant = relevance.documents_of_text.take(relevance.text[queries])
    ids = {
        "query_id": relevance.query_ids.take(pa.array(queries)),
        "document_id": relevance.document_ids.take(pa.array(positives)),
        "negative_document_ids": _id_lists(_rectangle(chosen.items[row_of_query[queries]]), relevance),
        "relevant_document_ids": _id_lists(relevant, relevance),
    }
    view = TrainingView(tables, documents, chosen=chosen, max_pixels=max_pixels)
    return table_dataset(ids).with_transform(view)


def _rectangle(values: np.ndarray) -> IntLists:
    return IntLists(np.arange(len(values) + 1) * values.shape[1], values.reshape(-1))


def _id_lists(documents: IntLists, relevance: Relevance) -> pa.Array:
    return lists(documents.offsets, relevance.document_ids.take(pa.array(documents.values)))
