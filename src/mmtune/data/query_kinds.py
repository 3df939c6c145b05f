"""What a query is made of, and how queries are read: as documents are, under their own ids."""

from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset

from mmtune.arguments import QueryId, require_one_of
from mmtune.data.arrow import column
from mmtune.data.documents import DocumentKind, DocumentReader, document_columns
from mmtune.data.tables import has_content, query_parts
from mmtune.errors import ConfigError, DatasetError

QueryKind: TypeAlias = DocumentKind
"""What a query is made of where it is read, in the words of ``documents``."""

QUERY_KINDS = ("text", "image", "text+image", "audio", "text+audio")
"""All kinds of queries: clips don't ask."""


def query_columns(queries: Dataset, kind: QueryKind) -> list[str]:
    """The columns that a query is made of, the text first.

    Raises:
        ConfigError: ``kind`` is unknown, or the table lacks a column of it.
    """
    require_one_of("queries", kind, QUERY_KINDS)
    return document_columns(queries, kind, name="queries", table="table of queries")


def as_documents(queries: Dataset) -> Dataset:
    """The parts of queries as those of documents, for all that reads and compares these; nothing is copied."""
    parts = queries.with_format(None).select_columns(["query_id", *query_parts(queries)])
    return parts.rename_column("query_id", "document_id")


def lacking(queries: Dataset, kind: QueryKind) -> np.ndarray:
    """Which queries lack something of what they are to be made of.

    Raises:
        ConfigError: ``kind`` is unknown, or the table lacks a column of it.
    """
    return ~np.all([has_content(queries, name) for name in query_columns(queries, kind)], axis=0)


def check_queries(queries: Dataset, kind: QueryKind) -> None:
    """Make sure that every query has what it is to be made of.

    Raises:
        ConfigError: ``kind`` is unknown, or the table lacks a column of it.
        DatasetError: Some lack a part; the message names the first.
    """
    missing = np.flatnonzero(lacking(queries, kind))
    if len(missing):
        first = column(queries, "query_id")[int(missing[0])].as_py()
        has = {name: has_content(queries, name) for name in query_parts(queries)}
        lost = next(name for name in query_columns(queries, kind) if not has[name][missing[0]])
        whole = [name for name in has if has[name].all()]
        remedy = f", or pass queries={'+'.join(whole)!r} where that is taken" if whole else ""
        raise DatasetError(
            f"{len(missing)} queries lack what queries={kind!r} reads, e.g. {first!r} has no {lost}. Give them one, "
            f"take them out with dataset.without(dataset.audit(queries={kind!r}, num_examples=None)"
            f"['incomplete_queries']){remedy}."
        )


class QueryReader(DocumentReader):
    """What the host is given for each query: a text, an RGB image, a sound, or a text with one of these.

    Args:
        queries: A table with ``query_id`` and ``text``, and ``image`` or ``audio`` (encoded) where that asks.
        kind: What a query is made of.
        **options: As for ``DocumentReader``.

    Attributes:
        kind: As given.

    Raises:
        ConfigError: The table lacks a column that ``kind`` asks for.
    """

    def __init__(self, queries: Dataset, kind: QueryKind = "text", **options: Any) -> None:
        query_columns(queries, kind)
        super().__init__(as_documents(queries), kind, **options)
        self.kind: QueryKind = kind

    def _document(self, row: dict[str, Any]) -> Any:
        return super()._document({**row, "document_id": QueryId(row["document_id"])})


def require_text(kind: QueryKind, why: str) -> None:
    """Make sure that queries are texts, for what takes no others; ``why`` stands in the message.

    Raises:
        ConfigError: They are something else.
    """
    if kind != "text":
        raise ConfigError(f"queries={kind!r}: {why}, so that queries have to be text. Pass queries='text'.")
