"""Negatives that a judge took for something else: listed beside the lists that they were taken from, and put back."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from mmtune.data.arrow import column, flat_lists, lists_of_rows, positions, with_columns
from mmtune.errors import DatasetError

LABEL_CHANGES = "label_changes"
"""The column of the negatives that holds them."""

_ENTRY = {"document_id": pa.string(), "label": pa.string(), "rank": pa.int64(), "score": pa.float64()}
CHANGES = pa.schema({"query_id": pa.string(), **_ENTRY})
"""The columns of the table that ``label_changes`` gives."""


def label_changes(negatives: Dataset | None) -> pa.Table:
    """A row for each change: ``query_id``, ``document_id``, ``label``, ``rank`` and ``score``, by rising rank a query.

    Raises:
        DatasetError: The column holds something else.
    """
    if negatives is None or LABEL_CHANGES not in negatives.column_names:
        return CHANGES.empty_table()
    rows, entries = flat_lists(column(negatives, LABEL_CHANGES))
    if not len(entries):
        return CHANGES.empty_table()
    names = {field.name for field in entries.type} if pa.types.is_struct(entries.type) else set()
    if not names >= set(_ENTRY):
        raise DatasetError(
            f"Column {LABEL_CHANGES!r} of the negatives holds {entries.type}, expected what judge_negatives() writes: "
            f"lists of {', '.join(_ENTRY)}. Rename the column where it is one of your own."
        )
    query_ids = column(negatives, "query_id").cast(pa.string()).take(pa.array(rows))
    fields = [pc.struct_field(entries, name).cast(kind) for name, kind in _ENTRY.items()]
    return pa.table([query_ids, *fields], schema=CHANGES)


def with_label_changes(negatives: Dataset, changes: pa.Table) -> Dataset:
    """The negatives with the changes of their queries; without the column where there are none."""
    others = negatives.remove_columns([name for name in [LABEL_CHANGES] if name in negatives.column_names])
    changes = changes.combine_chunks()
    rows = positions(changes["query_id"].combine_chunks(), column(others, "query_id"))
    ranks = changes["rank"].to_numpy()
    order = np.lexsort((ranks, rows))
    order = order[rows[order] >= 0]
    if not len(order):
        return others
    kept = changes.take(pa.array(order))
    entries = pa.StructArray.from_arrays([kept[name].combine_chunks() for name in _ENTRY], names=list(_ENTRY))
    return with_columns(others, {LABEL_CHANGES: lists_of_rows(rows[order], entries, len(others))})


def mapped(changes: pa.Table, **ids: pa.Array) -> pa.Table:
    """The changes with other ids, e.g. ``document_id=``; a null leaves the change out."""
    for name, values in ids.items():
        changes = changes.set_column(changes.column_names.index(name), name, values.cast(pa.string()))
    known = pc.and_(pc.is_valid(changes["query_id"]), pc.is_valid(changes["document_id"]))
    return changes.filter(known)


def lists_before(negatives: Dataset) -> dict[str, list[str]]:
    """The list of each query as it was before entries were taken out."""
    restored = {
        query_id: list(document_ids or [])
        for query_id, document_ids in zip(negatives["query_id"][:], negatives["document_ids"][:], strict=True)
    }
    changes = label_changes(negatives)
    for query_id, rank, document_id in zip(
        *(changes[name].to_pylist() for name in ("query_id", "rank", "document_id")), strict=True
    ):
        restored[query_id].insert(rank, document_id)
    return restored
