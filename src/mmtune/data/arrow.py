"""Columns of a ``datasets.Dataset`` as Arrow and NumPy arrays, without touching the images beside them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, concatenate_datasets

from mmtune.errors import DatasetError

ENCODED_IMAGE = Image(decode=False)


def column(dataset: Dataset, name: str) -> pa.Array:
    """One column in the order of the rows, as a single Arrow array; for columns of ids and text, not of images."""
    values = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], type=values.type)


def id_column(dataset: Dataset, name: str) -> pa.Array:
    """One column of ids as Arrow strings. Integers become their decimal digits.

    Raises:
        DatasetError: The column holds something that is no id (floats, lists), or a null.
    """
    values = as_id_strings(column(dataset, name), name)
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DatasetError(f"Row {row} has no id: column {name!r} is null there. Every row needs an id of its own.")
    return values


def as_id_strings(values: pa.Array, name: str) -> pa.Array:
    """``values`` as Arrow strings.

    Raises:
        DatasetError: The values are neither strings nor integers.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type):
        return values
    if not any(check(values.type) for check in (pa.types.is_integer, pa.types.is_large_string, pa.types.is_null)):
        raise DatasetError(
            f"Column {name!r} holds {values.type}, which can't be ids. Ids are strings or integers; "
            "convert the column first."
        )
    return values.cast(pa.string())


def positions(values: pa.Array, keys: pa.Array) -> np.ndarray:
    """Where each value stands in ``keys``: int64 of the length of ``values``, -1 where it does not."""
    return pc.fill_null(pc.index_in(values, value_set=keys), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def first_repeated(values: pa.Array) -> tuple[str, list[int]] | None:
    """The first value that stands in more than one row, with its rows; ``None`` where all differ."""
    codes = values.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(codes) if len(codes) else np.array([], dtype=int)
    repeated = np.flatnonzero(counts > 1)
    if not len(repeated):
        return None
    rows = np.flatnonzero(codes == repeated[0])
    return values[int(rows[0])].as_py(), rows.tolist()


def table_dataset(columns: Mapping[str, pa.Array]) -> Dataset:
    """A small in-memory ``datasets.Dataset`` over Arrow arrays."""
    return Dataset(pa.table(dict(columns)))


def lists(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    """Arrow lists: list i holds ``values[offsets[i]:offsets[i + 1]]``."""
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def flat_lists(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Lists taken apart: the row of each item (int64) and the items. A null list is an empty one."""
    if pa.types.is_null(values.type):
        return np.array([], dtype=np.int64), pa.array([], type=pa.string())
    rows = pc.list_parent_indices(values).to_numpy(zero_copy_only=False).astype(np.int64)
    return rows, pc.list_flatten(values)


def with_columns(rows: Dataset, new: Mapping[str, pa.Array]) -> Dataset:
    """``rows`` with new columns in front, without copying the old ones.

    ``Dataset.add_column`` and ``concatenate_datasets(axis=1)`` write every row anew where the rows were shuffled or
    selected, images and all (datasets 5.2). Here the new values are laid beside the rows as they are stored, and the
    order is selected afterwards.

    Args:
        rows: Any dataset, with or without an indices mapping.
        new: Arrays of ``len(rows)``, in the order of the rows.
    """
    stored_rows = _stored_positions(rows)
    if stored_rows is None:
        return concatenate_datasets([table_dataset(new), rows], axis=1)
    stored = Dataset(rows.data, info=rows.info)
    # A stored row that was selected k times needs k different new values: it is laid out k times, by reference.
    copy_of_row = _occurrence(stored_rows)
    copies = int(copy_of_row.max(initial=0)) + 1
    target = copy_of_row * len(stored) + stored_rows
    source = np.full(copies * len(stored), -1, dtype=np.int64)
    source[target] = np.arange(len(rows))
    take = pa.array(source, mask=source < 0)
    laid_out = {name: values.take(take) for name, values in new.items()}
    repeated = concatenate_datasets([stored] * copies) if copies > 1 else stored
    return concatenate_datasets([table_dataset(laid_out), repeated], axis=1).select(target)


def _stored_positions(rows: Dataset) -> np.ndarray | None:
    """The stored row behind each row; ``None`` where the rows stand as they are stored."""
    mapping = rows._indices  # no public accessor in datasets 5.2
    return None if mapping is None else mapping.column(0).to_numpy().astype(np.int64)


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each item the number of equal items before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.array([], dtype=np.int64)
    counts = np.diff(np.r_[starts, len(values)])
    occurrence = np.empty(len(values), dtype=np.int64)
    occurrence[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return occurrence


def stored_image_column(rows: Dataset, name: str) -> tuple[pa.ChunkedArray, np.ndarray | None]:
    """An image column as it is stored, and the stored row of each row (``None``: the same order)."""
    return rows.data.table.column(name), _stored_positions(rows)


def with_encoded_images(rows: Dataset, name: str) -> Dataset:
    """``rows`` with column ``name`` typed ``Image(decode=False)``; bytes and paths stay where they are.

    Accepts ``Image`` columns, structs of ``bytes`` and ``path``, plain binary (encoded images) and plain strings
    (paths).

    Raises:
        DatasetError: The column is of another type.
    """
    feature = rows.features[name]
    if isinstance(feature, Image):
        return rows if not feature.decode else rows.cast_column(name, ENCODED_IMAGE)
    stored = rows.data.table.column(name)
    if pa.types.is_struct(stored.type) and {"bytes", "path"} <= {field.name for field in stored.type}:
        return rows.cast_column(name, ENCODED_IMAGE)
    if not any(check(stored.type) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string)):
        raise DatasetError(
            f"Column {name!r} holds {stored.type}, which can't be images. Expected datasets.Image, a struct of "
            "bytes and path, encoded bytes, or paths. Name the right column, or cast this one to datasets.Image()."
        )
    return _wrap_in_structs(rows, name, stored)


def _wrap_in_structs(rows: Dataset, name: str, stored: pa.ChunkedArray) -> Dataset:
    is_path = pa.types.is_string(stored.type)
    chunks = [_image_struct(chunk, is_path) for chunk in stored.chunks]
    wrapped = Dataset(pa.table({name: pa.chunked_array(chunks, type=ENCODED_IMAGE.pa_type)})).cast_column(
        name, ENCODED_IMAGE
    )
    others = Dataset(rows.data, info=rows.info).remove_columns([name])
    joined = concatenate_datasets([others, wrapped], axis=1) if others.column_names else wrapped
    order = _stored_positions(rows)
    return joined if order is None else joined.select(order)


def _image_struct(chunk: pa.Array, is_path: bool) -> pa.Array:
    nothing = pa.nulls(len(chunk), pa.string() if not is_path else pa.binary())
    fields: Sequence[pa.Array] = [nothing, chunk] if is_path else [chunk.cast(pa.binary()), nothing]
    return pa.StructArray.from_arrays(fields, names=["bytes", "path"], mask=chunk.is_null())
