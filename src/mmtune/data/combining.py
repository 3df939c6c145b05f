"""Several datasets into one, and copies of a page into one document."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from mmtune.data.arrow import IntLists, column, flat_lists, lists, positions, table_dataset, with_columns
from mmtune.data.relevance import Relevance
from mmtune.data.tables import BuildNotes, Tables, checked_tables
from mmtune.errors import DatasetError


def concatenated(parts: Mapping[str, Tables]) -> Tables:
    """The tables of all parts under each other; ids that stand in several parts are prefixed with the part's name."""
    names, tables = list(parts), list(parts.values())
    document_ids = _distinct_ids([column(part.corpus, "document_id") for part in tables], names)
    query_ids = _distinct_ids([column(part.queries, "query_id") for part in tables], names)
    new_ids = list(zip(tables, document_ids, query_ids, strict=True))
    negatives = [_renamed_negatives(*each) for each in new_ids if each[0].negatives is not None]
    return checked_tables(
        _stacked([_renamed_rows(part.corpus, "document_id", ids) for part, ids, _ in new_ids], "corpora"),
        _stacked([_renamed_rows(part.queries, "query_id", ids) for part, _, ids in new_ids], "queries"),
        concatenate_datasets([_renamed_qrels(*each) for each in new_ids]),
        concatenate_datasets(negatives) if negatives else None,
        notes=_sum([part.notes for part in tables]),
    )


def deduplicated(tables: Tables, relevance: Relevance) -> Tables:
    """The tables with one document for each page: the first of its copies. Qrels and negatives follow.

    Of several scores that copies of one page have for a query, the highest is kept.
    """
    first = np.unique(relevance.page)
    scores = column(tables.qrels, "score").to_numpy(zero_copy_only=False)
    best_first = np.argsort(-scores, kind="stable")
    pairs = relevance.judged_query * len(relevance.page) + relevance.page[relevance.judged_document]
    _, kept = np.unique(pairs[best_first], return_index=True)
    kept = np.sort(best_first[kept])
    qrels = {
        "query_id": relevance.query_ids.take(pa.array(relevance.judged_query[kept])),
        "document_id": relevance.document_ids.take(pa.array(relevance.page[relevance.judged_document[kept]])),
        "score": pa.array(scores[kept]),
    }
    negatives = None if tables.negatives is None else _distinct_negatives(relevance)
    return checked_tables(
        tables.corpus.select(first), tables.queries, table_dataset(qrels), negatives, notes=tables.notes
    )


def _distinct_negatives(relevance: Relevance) -> Dataset:
    """The listed negatives with the first copy of each page, each once."""
    listed = relevance.listed_negatives
    rows, pages = listed.rows, relevance.page[listed.values]
    _, kept = np.unique(rows * len(relevance.page) + pages, return_index=True)
    kept.sort()
    distinct = IntLists.grouped(rows[kept], pages[kept], len(relevance.query_ids))
    items = relevance.document_ids.take(pa.array(distinct.values))
    return table_dataset({"query_id": relevance.query_ids, "document_ids": lists(distinct.offsets, items)})


def _distinct_ids(ids: list[pa.Array], names: list[str]) -> list[pa.Array]:
    """The ids of each part; those that another part has too with the part's name before them."""
    everything = pc.value_counts(pa.concat_arrays(ids))
    clashing = everything.field("values").filter(pc.greater(everything.field("counts"), 1))
    return [
        pc.if_else(pc.is_in(part, value_set=clashing), pc.binary_join_element_wise(name, part, "/"), part)
        for name, part in zip(names, ids, strict=True)
    ]


def _renamed_rows(table: Dataset, key: str, ids: pa.Array) -> Dataset:
    others = table.remove_columns([key])
    return with_columns(others, {key: ids}) if others.column_names else table_dataset({key: ids})


def _renamed_qrels(part: Tables, document_ids: pa.Array, query_ids: pa.Array) -> Dataset:
    query = positions(column(part.qrels, "query_id"), column(part.queries, "query_id"))
    document = positions(column(part.qrels, "document_id"), column(part.corpus, "document_id"))
    return table_dataset(
        {
            "query_id": query_ids.take(pa.array(query)),
            "document_id": document_ids.take(pa.array(document)),
            "score": column(part.qrels, "score"),
        }
    )


def _renamed_negatives(part: Tables, document_ids: pa.Array, query_ids: pa.Array) -> Dataset:
    assert part.negatives is not None
    query = positions(column(part.negatives, "query_id"), column(part.queries, "query_id"))
    rows, items = flat_lists(column(part.negatives, "document_ids"))
    document = positions(items, column(part.corpus, "document_id"))
    offsets = np.r_[0, np.cumsum(np.bincount(rows, minlength=len(query)))]
    values = lists(offsets, document_ids.take(pa.array(document)))
    return table_dataset({"query_id": query_ids.take(pa.array(query)), "document_ids": values})


def _stacked(parts: list[Dataset], what: str) -> Dataset:
    try:
        return concatenate_datasets(parts)
    except (ValueError, pa.ArrowInvalid) as error:
        columns = " and ".join(str({name: str(kind) for name, kind in part.features.items()}) for part in parts[:2])
        raise DatasetError(
            f"The {what} have columns of one name and different types: {columns}. Cast or remove those that differ."
        ) from error


def _sum(notes: list[BuildNotes]) -> BuildNotes:
    """Counts added up, examples joined up to ten, and row numbers as ids where any part has them."""
    values: dict[str, Any] = {}
    for field in fields(BuildNotes):
        parts = [getattr(note, field.name) for note in notes]
        if field.name == "unknown_examples":
            values[field.name] = sum(parts, ())[:10]
        else:
            values[field.name] = any(parts) if isinstance(parts[0], bool) else sum(parts)
    return BuildNotes(**values)
