"""A builder per layout: from the rows that users have to the four tables. No builder decodes or copies an image."""

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, concatenate_datasets

from mmtune.data.arrow import (
    as_id_strings,
    column,
    first_repeated,
    flat_lists,
    id_column,
    is_lists,
    lists,
    positions,
    stored_image_column,
    table_dataset,
    with_columns,
    with_encoded_images,
)
from mmtune.data.tables import BuildNotes, Tables, checked_tables, is_blank, require_columns, text_column
from mmtune.errors import DatasetError, MissingDocumentError


def tables_from_id_rows(
    rows: Dataset,
    *,
    id_column_name: str,
    query_column: str,
    image_column: str,
    negatives_column: str | None,
    on_missing: str,
) -> Tables:
    """One row per page, its negatives as ids of other rows; see ``RetrievalDataset.from_id_rows``."""
    rows = _checked_rows(rows, (id_column_name, query_column, image_column), negatives_column)
    ids = id_column(rows, id_column_name)
    _require_unique_ids(ids, id_column_name)
    blank = is_blank(text_column(rows, query_column))
    asking = np.flatnonzero(~blank)
    notes = BuildNotes(blank_queries=int(blank.sum()))
    negatives = None
    if negatives_column is not None:
        negatives, notes = _negatives_by_id(
            rows.select(asking), negatives_column, ids, ids.take(asking), on_missing, notes
        )
    others = [name for name in rows.column_names if name not in (id_column_name, query_column, negatives_column)]
    pages = with_encoded_images(rows.select_columns(others), image_column)
    _require_images(pages, image_column, ids)
    return checked_tables(
        with_columns(_renamed(pages, image_column), {"document_id": ids}),
        _queries(rows.select(asking), ids.take(asking), query_column, {id_column_name, negatives_column, image_column}),
        _one_to_one(ids.take(asking), ids.take(asking)),
        negatives,
        notes=notes,
    )


def tables_from_columns(
    rows: Dataset, *, query_column: str, image_column: str, negative_columns: tuple[str, ...] | None
) -> Tables:
    """One row per query with the images in it; see ``RetrievalDataset.from_columns``."""
    rows = _checked_rows(rows, (query_column, image_column))
    negative_columns = _negative_columns(rows) if negative_columns is None else negative_columns
    require_columns(rows, negative_columns, "The table of rows")
    image_columns = [image_column, *negative_columns]
    for name in image_columns:
        rows = with_encoded_images(rows, name)
    present = [_has_image(rows, name) for name in image_columns]
    document_ids = [_numbered(len(rows) * k, len(rows)).filter(pa.array(mask)) for k, mask in enumerate(present)]
    blank = is_blank(text_column(rows, query_column))
    asking = ~blank & present[0]
    query_ids = _numbered(0, len(rows)).filter(pa.array(asking))
    notes = BuildNotes(
        blank_queries=int(blank.sum()),
        null_documents=int((~present[0]).sum()),
        null_negatives=int(sum((~mask).sum() for mask in present[1:])),
        queries_without_document=int((~blank & ~present[0]).sum()),
        ids_are_row_numbers=True,
    )
    others = [name for name in rows.column_names if name not in (*negative_columns, query_column, image_column)]
    pages = [
        _renamed(rows.select_columns([name, *(others if k == 0 else ())]).select(np.flatnonzero(present[k])), name)
        for k, name in enumerate(image_columns)
    ]
    corpus = with_columns(concatenate_datasets(pages), {"document_id": pa.concat_arrays(document_ids)})
    negatives = _negatives_in_columns(present[1:], asking, query_ids) if negative_columns else None
    queries = _queries(rows.select(np.flatnonzero(asking)), query_ids, query_column, set())
    return checked_tables(corpus, queries, _one_to_one(query_ids, query_ids), negatives, notes=notes)


def known_layout(rows: Dataset) -> str:
    """The builder whose columns these rows have: ``"from_id_rows"`` or ``"from_columns"``.

    Raises:
        DatasetError: Neither fits; the message lists what was found and what is known.
    """
    found = set(rows.column_names)
    if {"id", "query", "image"} <= found:
        return "from_id_rows"
    if {"query", "image"} <= found:
        return "from_columns"
    raise DatasetError(
        f"The columns {rows.column_names} are no layout that is known. Known are: "
        "'id', 'query', 'image' and optionally 'negatives' (from_id_rows); "
        "'query', 'image' and optionally 'negative_0', 'negative_1', ... (from_columns). "
        "Rename the columns, or call one of these builders with the names of yours."
    )


def _checked_rows(rows: Dataset, required: tuple[str, ...], optional: str | None = None) -> Dataset:
    rows = rows.with_format(None)
    if not len(rows):
        raise DatasetError(
            f"The table of rows has zero rows (columns: {rows.column_names}). Nothing can be built from it."
        )
    require_columns(rows, required, "The table of rows")
    if optional is not None and optional not in rows.column_names:
        raise DatasetError(
            f"The table of rows has no column {optional!r} for the negatives; it has {rows.column_names}. "
            "Name the column, or pass negatives_column=None where the rows list no negatives."
        )
    return rows


def _require_unique_ids(ids: pa.Array, name: str) -> None:
    repeated = first_repeated(ids)
    if repeated is not None:
        value, at = repeated
        raise DatasetError(
            f"The id {value!r} stands in {len(at)} rows ({', '.join(map(str, at[:5]))}) of column {name!r}. "
            "Each row needs an id of its own: drop the repeated rows, or name another id column."
        )


def _queries(rows: Dataset, ids: pa.Array, query_column: str, hidden: set[str | None]) -> Dataset:
    """The table of queries: id, text, and the other columns of the rows that are no images."""
    texts = text_column(rows, query_column)
    reserved = {"query_id", "text", query_column, *hidden}
    others = [
        name for name, feature in rows.features.items() if name not in reserved and not isinstance(feature, Image)
    ]
    new = {"query_id": ids, "text": texts}
    return with_columns(rows.select_columns(others), new) if others else table_dataset(new)


def _one_to_one(query_ids: pa.Array, document_ids: pa.Array) -> Dataset:
    scores = pa.array(np.ones(len(query_ids), dtype=np.int64))
    return table_dataset({"query_id": query_ids, "document_id": document_ids, "score": scores})


def _negatives_by_id(
    asking: Dataset, name: str, ids: pa.Array, query_ids: pa.Array, on_missing: str, notes: BuildNotes
) -> tuple[Dataset, BuildNotes]:
    rows, items = flat_lists(_list_column(asking, name))
    present = items.is_valid().to_numpy(zero_copy_only=False)
    rows, items = rows[present], as_id_strings(items.filter(pa.array(present)), name)
    _refuse_own_ids(rows, items, query_ids)
    known = positions(items, ids) >= 0
    examples = _unknown_examples(rows, items, query_ids, ~known)
    if examples and on_missing == "error":
        raise MissingDocumentError(_unknown_message(int((~known).sum()), examples))
    kept_rows, kept_items = rows[known], items.filter(pa.array(known))
    counts = np.bincount(kept_rows, minlength=len(query_ids))
    table = {"query_id": query_ids, "document_ids": lists(np.r_[0, np.cumsum(counts)], kept_items)}
    return table_dataset(table), replace(
        notes,
        null_negatives=int((~present).sum()),
        unknown_negatives=int((~known).sum()),
        unknown_examples=tuple(examples),
    )


def _list_column(rows: Dataset, name: str) -> pa.Array:
    values = column(rows, name)
    if is_lists(values.type):
        return values
    raise DatasetError(
        f"Column {name!r} holds {values.type}, expected lists of ids. It is among {rows.column_names}; "
        "name another column, or turn its values into lists."
    )


def _refuse_own_ids(rows: np.ndarray, items: pa.Array, query_ids: pa.Array) -> None:
    own = pc.equal(items, query_ids.take(pa.array(rows))).to_numpy(zero_copy_only=False)
    if own.any():
        value = items[int(np.flatnonzero(own)[0])].as_py()
        raise DatasetError(
            f"{int(own.sum())} rows list their own id among their negatives, e.g. {value!r}. A page can't be a hard "
            "negative of the query it answers: take it out of the list."
        )


def _unknown_examples(
    rows: np.ndarray, items: pa.Array, query_ids: pa.Array, unknown: np.ndarray
) -> list[tuple[str, str]]:
    return [(query_ids[int(rows[at])].as_py(), items[int(at)].as_py()) for at in np.flatnonzero(unknown)[:10]]


def _unknown_message(count: int, examples: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{negative!r} (query {query!r})" for query, negative in examples[:3])
    return (
        f"{count} negatives point to documents that are not in the corpus, e.g. {shown}. Every negative must be the "
        'id of a row. Fix the ids, or pass on_missing="drop".'
    )


def _negative_columns(rows: Dataset) -> tuple[str, ...]:
    """Every column named ``negative`` or ``negative_<k>``, by number."""
    numbered = {name: match for name in rows.column_names if (match := re.fullmatch(r"negative(?:_(\d+))?", name))}
    return tuple(sorted(numbered, key=lambda name: int(numbered[name].group(1) or -1)))


def _has_image(rows: Dataset, name: str) -> np.ndarray:
    stored, order = stored_image_column(rows, name)
    empty = pc.and_(pc.is_null(pc.struct_field(stored, "bytes")), pc.is_null(pc.struct_field(stored, "path")))
    present = ~empty.to_numpy()
    return present if order is None else present[order]


def _renamed(pages: Dataset, image_column: str) -> Dataset:
    clashing = {"document_id", "image"} & (set(pages.column_names) - {image_column})
    if clashing:
        raise DatasetError(
            f"The rows have a column {clashing.pop()!r} beside {image_column!r}, and the corpus has one of its own of "
            "that name. Rename the column, or remove it."
        )
    return pages if image_column == "image" else pages.rename_column(image_column, "image")


def _require_images(pages: Dataset, image_column: str, ids: pa.Array) -> None:
    empty = np.flatnonzero(~_has_image(pages, image_column))
    if len(empty):
        raise DatasetError(
            f"{len(empty)} rows have no image: column {image_column!r} is null there, e.g. in the row with id "
            f"{ids[int(empty[0])].as_py()!r}. Every row is a page; leave such rows out, and their ids too."
        )


def _numbered(start: int, count: int) -> pa.Array:
    return pa.array(np.arange(start, start + count)).cast(pa.string())


def _negatives_in_columns(present: list[np.ndarray], asking: np.ndarray, query_ids: pa.Array) -> Dataset:
    mask = np.stack(present, axis=1)[asking]
    numbers = np.flatnonzero(asking)[:, None] + len(asking) * np.arange(1, len(present) + 1)
    items = pa.array(numbers[mask]).cast(pa.string())
    return table_dataset({"query_id": query_ids, "document_ids": lists(np.r_[0, np.cumsum(mask.sum(axis=1))], items)})
