"""Rows for the host's trainers: ids in Arrow, texts and pages when a row is read."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from mmtune import host
from mmtune.data.arrow import IntLists, lists, table_dataset
from mmtune.data.documents import DocumentKind, DocumentReader
from mmtune.data.judgements import Judgements
from mmtune.data.negatives import ChosenNegatives, OnShort, choose_negatives
from mmtune.data.query_kinds import QueryKind, QueryReader
from mmtune.data.relevance import Direction, Relevance
from mmtune.data.tables import Tables
from mmtune.errors import DatasetError

ID_COLUMNS = ("query_id", "document_id", "negative_document_ids", "relevance_group")
"""The columns of training rows under ``rows.with_format(None)``."""


@dataclass(frozen=True)
class RowSource:
    """What rows of ids were made from, and what reads them; shared by all views of the rows.

    Attributes:
        relevance: The judgements; ``None`` in worker processes, which read rows and nothing else.
        documents: What a document is made of.
        num_negatives: Negatives a row.
        chosen: How many negatives were ``listed``, ``filled`` and ``refused``, and how many rows ``dropped``.
        queries: Gives the queries.
        reader: The documents.
    """

    relevance: Relevance | None
    documents: DocumentKind
    num_negatives: int
    chosen: Mapping[str, int]
    queries: QueryReader
    reader: DocumentReader

    @classmethod
    def of(cls, judgements: Judgements, documents: DocumentKind, chosen: ChosenNegatives, **sizes: Any) -> "RowSource":
        """What reads the queries and documents of a dataset; ``sizes`` as for ``DocumentReader``."""
        relevance, near_misses = judgements.relevance, judgements.near_misses
        tables = relevance.tables
        queries = tables.queries if near_misses is None else near_misses.below(tables.queries)
        return cls(
            relevance,
            documents,
            chosen.items.shape[1],
            {name: getattr(chosen, name) for name in ("listed", "filled", "refused", "dropped")},
            QueryReader(queries, relevance.queries or "text", **sizes),
            DocumentReader(tables.corpus, documents, **sizes),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "relevance": None}

    def read(self, query_ids: Sequence[str], document_ids: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """The queries and the documents with these ids; what occurs twice is decoded once."""
        return self.queries.read(query_ids), self.reader.read(document_ids)


class View(ABC):
    """The transform of some rows: turns a batch of ids into what the host's losses read.

    Args:
        source: What the rows were made from.
        direction: What asks.

    Attributes:
        columns: What the model is given.
        id_columns: What is read. A batch with only some of these, as ``filter(..., input_columns=["query_id"])`` asks
            for, stays as it is.
    """

    columns: Sequence[str]
    id_columns: Sequence[str] = ID_COLUMNS[:3]

    def __init__(self, source: RowSource, direction: Direction = "text_to_image") -> None:
        self.source = source
        self.direction: Direction = direction

    @property
    def tables(self) -> Tables | None:
        """The data; ``None`` in worker processes."""
        return None if self.source.relevance is None else self.source.relevance.tables

    @property
    def documents(self) -> DocumentKind:
        """What a document is made of."""
        return self.source.documents

    @property
    def queries(self) -> QueryKind:
        """What a query is made of."""
        return self.source.queries.kind

    @property
    def num_negatives(self) -> int:
        """Negatives a row."""
        return self.source.num_negatives

    @property
    def chosen(self) -> Mapping[str, int]:
        """How many negatives were ``listed``, ``filled`` and ``refused``, and how many rows ``dropped``."""
        return self.source.chosen

    @property
    def fingerprint(self) -> str:
        """What tells the rows that it reads from others."""
        parts = (self.source.queries.fingerprint, self.source.reader.fingerprint, self.num_negatives, self.direction)
        return ", ".join(map(str, (type(self).__name__, *parts)))

    def lazily(self) -> "View":
        """The same rows, with pages that are decoded when their pixels are asked for."""
        view = copy(self)
        source = self.source
        view.source = replace(source, reader=source.reader.lazily(), queries=source.queries.lazily())
        return view

    def relevant_to(self, groups: np.ndarray) -> tuple[np.ndarray, pa.Array]:
        """Everything that is, or may be, relevant to some groups of rows, which are the query texts.

        Args:
            groups: Numbers of the column ``relevance_group``.

        Returns:
            The place among ``groups`` of each relevant document, int64, rising; and the ids of the documents.

        Raises:
            DatasetError: This is the copy of a worker process, which reads rows and nothing else.
        """
        relevance = self.source.relevance
        if relevance is None:
            raise DatasetError(
                "A pickled copy of training rows knows no relevance. Plan batches where training_rows() was called."
            )
        relevant = relevance.documents_apart_from_text.take(groups)
        return relevant.rows, relevance.document_ids.take(relevant.values)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host reads it; ids where only some of the columns are asked for."""
        return self.read(batch) if set(self.id_columns) <= set(batch) else batch

    @abstractmethod
    def read(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch with queries and documents in place of ids."""

    def _read_sides(self, query_ids: Sequence[str], document_ids: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """What asks and what is asked for."""
        queries, documents = self.source.read(query_ids, document_ids)
        return (queries, documents) if self.direction == "text_to_image" else (documents, queries)


@host.hashed_by(lambda view: view.fingerprint)
class TrainingView(View):
    """Turns rows of ids into ``query, image, negative_0, ...``; the transform of the training rows."""

    def __init__(self, source: RowSource) -> None:
        super().__init__(source)
        self.columns = ["query", "image", *(f"negative_{k}" for k in range(source.num_negatives))]

    def read(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch with the positives and negatives of all its rows decoded once."""
        ids = [batch["document_id"], *zip(*batch["negative_document_ids"], strict=True)]
        queries, documents = self.source.read(batch["query_id"], [document_id for part in ids for document_id in part])
        size = len(queries)
        columns = {name: documents[k * size : (k + 1) * size] for k, name in enumerate(self.columns[1:])}
        return {"query": queries, **columns}


@host.hashed_by(lambda view: view.fingerprint)
class AskingPages(View):
    """Training rows read the other way round: ``query`` is the page and ``document`` its text, without negatives."""

    columns = ("query", "document")

    def __init__(self, view: TrainingView) -> None:
        super().__init__(view.source, "image_to_text")

    def read(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as contrastive losses of rerankers read it."""
        asking, asked = self._read_sides(batch["query_id"], batch["document_id"])
        return {"query": asking, "document": asked}


@host.hashed_by(lambda view: view.fingerprint)
class PairView(View):
    """Turns rows of ids into ``query, document, label``; the transform of labeled pairs."""

    columns = ("query", "document", "label")
    id_columns = ("query_id", "document_id", "label")

    def read(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host's rerankers read it."""
        asking, asked = self._read_sides(batch["query_id"], batch["document_id"])
        return {"query": asking, "document": asked, "label": batch["label"]}


@host.hashed_by(lambda view: view.fingerprint)
class ListView(View):
    """Turns rows of ids into ``query, documents, labels``; the transform of labeled lists."""

    columns = ("query", "documents", "labels")
    id_columns = ("query_ids", "document_ids", "labels")

    def read(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host's listwise losses read it."""
        ids = ([value for part in batch[name] for value in part] for name in ("query_ids", "document_ids"))
        asking, asked = self._read_sides(*ids)
        starts = np.cumsum([0, *map(len, batch["labels"])])
        return {
            "query": [asking[start] for start in starts[:-1]],
            "documents": [asked[start:end] for start, end in pairwise(starts)],
            "labels": batch["labels"],
        }


def view_of(rows: Dataset) -> Any:
    """What turns the ids of some rows into texts and pages when they are read; ``None`` where nothing does.

    It is what the rows were made with, also where the host's trainer has wrapped it since.
    """
    return host.own_transform(rows)


def training_rows(
    judgements: Judgements,
    num_negatives: int,
    documents: DocumentKind,
    seed: int,
    *,
    on_short: OnShort,
    **sizes: Any,
) -> Dataset:
    """One row per (query, relevant document); see ``RetrievalDataset.training_rows``."""
    chosen = choose_negatives(judgements.candidates, num_negatives, on_short, seed)
    if not len(chosen.rows):
        raise DatasetError(
            f'No query has {num_negatives} usable negatives, and on_short="drop" leaves all of them out. '
            'Lower num_negatives, or pass on_short="random".'
        )
    relevance = judgements.relevance
    row_of_query = np.full(len(relevance.query_ids), -1)
    row_of_query[chosen.rows] = np.arange(len(chosen.rows))
    order = np.argsort(relevance.judged_query, kind="stable")
    order = order[row_of_query[relevance.judged_query[order]] >= 0]
    queries = relevance.judged_query[order]
    negatives = IntLists.of_rows(chosen.items[row_of_query[queries]])
    ids = {
        "query_id": relevance.query_ids.take(queries),
        "document_id": relevance.document_ids.take(relevance.judged_document[order]),
        "negative_document_ids": negatives.ids(relevance.document_ids),
        "relevance_group": pa.array(relevance.text[queries]),
    }
    view = TrainingView(RowSource.of(judgements, documents, chosen, **sizes))
    return table_dataset(ids).with_transform(view)


def labeled_pairs(judgements: Judgements, num_negatives: int, documents: DocumentKind, seed: int) -> Dataset:
    """Each relevant pair with its negatives after it; see ``RetrievalDataset.labeled_pairs``."""
    chosen = choose_negatives(judgements.candidates, num_negatives, "random", seed)
    rows = judgements.judged_rows
    items = np.concatenate([judgements.judged_items[:, None], chosen.items[rows]], axis=1)
    query_ids, document_ids = judgements.ids(np.repeat(rows, items.shape[1]), items.reshape(-1))
    labels = np.zeros(items.shape, dtype=np.int64)
    labels[:, 0] = 1
    ids = {"query_id": query_ids, "document_id": document_ids, "label": pa.array(labels.reshape(-1))}
    if judgements.direction == "text_to_image" and judgements.near_misses is not None:
        ids = _with_near_misses(ids, judgements, items.shape[1])
    view = PairView(RowSource.of(judgements, documents, chosen), judgements.direction)
    return table_dataset(ids).with_transform(view)


def _with_near_misses(ids: Mapping[str, pa.Array], judgements: Judgements, length: int) -> dict[str, pa.Array]:
    """The pairs, and after the ``length`` pairs of each judgement its page with the near misses of its query."""
    relevance, near_misses = judgements.relevance, judgements.near_misses
    assert near_misses is not None, "the caller has looked"
    of_judgement = near_misses.by_judgement(relevance)
    pages = relevance.document_ids.take(relevance.judged_document[of_judgement.rows])
    further = [near_misses.ids.take(of_judgement.values), pages, pa.array(np.zeros(len(pages), dtype=np.int64))]
    at = np.r_[np.repeat(np.arange(len(relevance.judged_query)), length), of_judgement.rows]
    order = pa.array(np.argsort(at, kind="stable"))
    return {
        name: pa.concat_arrays([first, second]).take(order)
        for (name, first), second in zip(ids.items(), further, strict=True)
    }


def labeled_lists(judgements: Judgements, num_negatives: int, documents: DocumentKind, seed: int) -> Dataset:
    """Everything that is relevant to a query, then its negatives; see ``RetrievalDataset.labeled_lists``."""
    chosen = choose_negatives(judgements.candidates, num_negatives, "random", seed)
    count = len(judgements.asking)
    row = np.r_[judgements.judged_rows, np.repeat(np.arange(count), num_negatives)]
    grade = np.r_[judgements.relevance.judged_score, np.zeros(count * num_negatives, dtype=np.int64)]
    items = IntLists.grouped(row, np.r_[judgements.judged_items, chosen.items.reshape(-1)], count)
    query_ids, document_ids = judgements.ids(items.rows, items.values)
    ids = {
        "query_ids": lists(items.offsets, query_ids),
        "document_ids": lists(items.offsets, document_ids),
        "labels": lists(items.offsets, pa.array(IntLists.grouped(row, grade, count).values)),
    }
    view = ListView(RowSource.of(judgements, documents, chosen), judgements.direction)
    return table_dataset(ids).with_transform(view)
