"""Columns of a ``datasets.Dataset`` as Arrow and NumPy arrays, without touching the images beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Dataset, DatasetInfo, Features, Image, Video, concatenate_datasets
from datasets.fingerprint import generate_random_fingerprint

from mmtune.arguments import PLURALS
from mmtune.errors import DatasetError
from mmtune.host import stored_positions

ENCODED = {"image": Image(decode=False), "audio": Audio(decode=False), "video": Video(decode=False)}
"""The columns of files that stay encoded until they are used, by what they hold: ``{"bytes", "path"}`` each."""
_HOW_TO_ENCODE = {
    "audio": "Samples stand beside their rate: {'array': samples, 'sampling_rate': 16_000}. ",
    # in a table they take a hundred times the space of a file, and may be of any times
    "video": "Frames that are decoded are not read: encode them, e.g. by av, and store bytes or paths. ",
}


def column(dataset: Dataset, name: str) -> pa.Array:
    """One column in the order of the rows, as a single Arrow array; for columns of ids and text, not of images."""
    values = dataset.data.table.column(name)
    if pa.types.is_string(values.type) and values.nbytes >= 2**31:
        values = values.cast(pa.large_string())  # one array of strings holds 2 GB at most
    # Not through the Arrow format of datasets, which gathers shuffled rows one by one.
    stored = values.combine_chunks()
    order = stored_positions(dataset)
    return stored if order is None else stored.take(pa.array(order))


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


def as_texts(what: str, values: Iterable[object]) -> pa.Array:
    """Ids that a user typed, as Arrow strings.

    Args:
        what: What they are, for the message.
        values: Texts or numbers.

    Raises:
        DatasetError: One is no text that can be written down, such as half of a surrogate pair.
    """
    texts = [str(value) for value in values]
    try:
        return pa.array(texts, type=pa.string())
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"The {what} {error.object!r:.80} holds half of a surrogate pair ({error.object[error.start]!r}), which is "
            "no character. Repair the text where it was read, e.g. with encoding='utf-8'."
        ) from None


def as_id_strings(values: pa.Array, name: str) -> pa.Array:
    """``values`` as Arrow strings.

    Raises:
        DatasetError: The values are neither strings nor integers.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type):
        return values
    if not (is_text(values.type) or pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        raise DatasetError(
            f"Column {name!r} holds {values.type}, which can't be ids. Ids are strings or integers; "
            "convert the column first."
        )
    return values.cast(pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, however Arrow stores them."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_lists(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists, or nothing but nulls."""
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_null)
    return any(check(kind) for check in checks)


def positions(values: pa.Array, keys: pa.Array) -> np.ndarray:
    """Where each value stands in ``keys``: int64 of the length of ``values``, -1 where it does not."""
    return pc.fill_null(pc.index_in(values, value_set=keys), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def number_values(values: pa.Array) -> np.ndarray:
    """A number for each distinct value, int64; -1 for a null."""
    return values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def table_dataset(columns: Mapping[str, pa.Array]) -> Dataset:
    """A small in-memory ``datasets.Dataset`` over Arrow arrays."""
    return new_dataset(pa.table(dict(columns)))


def new_dataset(table: Any, info: DatasetInfo | None = None) -> Dataset:
    """A dataset over an Arrow table. Without a fingerprint, ``datasets`` would pickle the table to make one."""
    return Dataset(table, info=info, fingerprint=generate_random_fingerprint())


@dataclass(frozen=True)
class IntLists:
    """Lists of integers laid end to end: list i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def grouped(cls, keys: np.ndarray, values: np.ndarray, count: int) -> "IntLists":
        """``values`` collected by ``keys`` in 0 .. count - 1, in their order."""
        order = np.argsort(keys, kind="stable")
        return cls(np.r_[0, np.cumsum(np.bincount(keys, minlength=count))], values[order])

    @classmethod
    def of_rows(cls, values: np.ndarray) -> "IntLists":
        """The rows of a matrix as lists of one length."""
        return cls(np.arange(len(values) + 1) * values.shape[1], values.reshape(-1))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The length of each list, int64."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """The list that each value belongs to, int64 of the length of ``values``."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def take(self, rows: np.ndarray) -> "IntLists":
        """The lists ``rows``, in that order, with repeats."""
        lengths = self.lengths[rows]
        offsets = np.r_[0, np.cumsum(lengths)]
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return IntLists(offsets, self.values[np.repeat(self.offsets[:-1][rows], lengths) + within])

    def ids(self, keys: pa.Array) -> pa.Array:
        """Arrow lists of the ids that stand in ``keys`` at these positions."""
        return lists(self.offsets, keys.take(self.values))

    def to_lists(self) -> list[list[int]]:
        """The lists as Python's, which loops read faster."""
        values = self.values.tolist()
        return [values[start:end] for start, end in pairwise(self.offsets.tolist())]


def lists(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    """Arrow lists: list i holds ``values[offsets[i]:offsets[i + 1]]``."""
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def flat_lists(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Lists taken apart: the row of each item (int64) and the items. A null list is an empty one."""
    if pa.types.is_null(values.type):
        return np.array([], dtype=np.int64), pa.array([], type=pa.string())
    # Not list_parent_indices: it also counts what a null list holds underneath, which list_flatten leaves out.
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(values)), lengths), pc.list_flatten(values)


def lists_of_rows(rows: np.ndarray, values: pa.Array, count: int) -> pa.Array:
    """What ``flat_lists`` took apart, as ``count`` Arrow lists; ``rows`` rises."""
    return lists(np.r_[0, np.cumsum(np.bincount(rows, minlength=count))], values)


def with_columns(rows: Dataset, new: Mapping[str, pa.Array]) -> Dataset:
    """``rows`` with new columns in front, without copying the old ones.

    ``Dataset.add_column`` and ``concatenate_datasets(axis=1)`` write every row anew where the rows were shuffled or
    selected, images and all (datasets 5.2). Here the new values are laid beside the rows as they are stored, and the
    order is selected afterwards.

    Args:
        rows: Any dataset, with or without an indices mapping.
        new: Arrays of ``len(rows)``, in the order of the rows.
    """
    if not len(rows):
        # concatenate_datasets leaves out what has no rows, with its columns (datasets 5.2)
        features = Features({**table_dataset(new).features, **rows.features})
        return Dataset.from_dict({name: [] for name in features}, features=features)
    stored_rows = stored_positions(rows)
    if stored_rows is None:
        return concatenate_datasets([table_dataset(new), rows], axis=1)
    # A stored row that was selected k times needs k different new values. So slices of the stored rows are laid under
    # each other, by reference: the first serves the first time that each row was selected, the second the second time.
    time = _count_equal_before(stored_rows)
    parts: list[Dataset] = []
    place = np.empty(len(stored_rows), dtype=np.int64)
    start = 0
    for at in np.split(np.argsort(time, kind="stable"), np.cumsum(np.bincount(time))[:-1]):
        first, last = stored_rows[at].min(), stored_rows[at].max()
        parts.append(new_dataset(rows.data.slice(first, last - first + 1), rows.info))
        place[at] = start + stored_rows[at] - first
        start += last - first + 1
    # The new values go where their rows lie now; rows of a slice that nobody selected get nulls.
    source = np.full(start, -1, dtype=np.int64)
    source[place] = np.arange(len(rows))
    take = pa.array(source, mask=source < 0)
    beside = table_dataset({name: values.take(take) for name, values in new.items()})
    return concatenate_datasets([beside, concatenate_datasets(parts)], axis=1).select(place)


def _count_equal_before(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values, kind="stable")
    ordered, place = values[order], np.arange(len(values))
    is_first = np.ones(len(values), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    counts = np.empty_like(place)
    counts[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return counts


def stored_image_column(rows: Dataset, name: str) -> tuple[pa.ChunkedArray, np.ndarray | None]:
    """An image column as it is stored, and the stored row of each row (``None``: the same order)."""
    return rows.data.table.column(name), stored_positions(rows)


def media_columns(names: Iterable[str]) -> list[str]:
    """Which of the columns ``image``, ``audio`` and ``video`` there are."""
    found = set(names)
    return [name for name in ENCODED if name in found]


def with_encoded_images(rows: Dataset, name: str, kind: str = "image") -> Dataset:
    """``rows`` with column ``name`` typed ``Image(decode=False)``; bytes and paths stay where they are.

    Accepts ``Image`` columns, structs of ``bytes`` and ``path``, plain binary (encoded images) and plain strings
    (paths). Samples with their ``sampling_rate`` are written as sounds, which keeps every number.

    Args:
        rows: Any dataset.
        name: The column.
        kind: ``"image"``, or ``"audio"`` or ``"video"`` for columns that hold these likewise.

    Raises:
        DatasetError: The column is of another type.
    """
    feature, encoded = rows.features[name], ENCODED[kind]
    if isinstance(feature, type(encoded)):
        return rows if not feature.decode else rows.cast_column(name, encoded)
    stored = rows.data.table.column(name).type
    if pa.types.is_struct(stored) and {"bytes", "path"} <= {field.name for field in stored}:
        return rows.cast_column(name, encoded)
    chunks = rows.data.table.column(name).chunks
    if (
        kind == "audio"
        and pa.types.is_struct(stored)
        and {"array", "sampling_rate"} <= {field.name for field in stored}
    ):
        from mmtune.data.sounds import write_samples  # it stands on this module

        chunks, stored = [write_samples(chunk, name) for chunk in chunks], pa.binary()
    if not (
        is_text(stored) or pa.types.is_binary(stored) or pa.types.is_large_binary(stored) or pa.types.is_null(stored)
    ):
        raise DatasetError(
            f"Column {name!r} holds {stored}, which can't be {PLURALS[kind]}. Expected datasets.{kind.title()}, a "
            f"struct of bytes and path, encoded bytes, or paths. {_HOW_TO_ENCODE.get(kind, '')}Name the right column, "
            f"or cast this one to datasets.{kind.title()}()."
        )
    structs = []
    for chunk in chunks:
        paths = chunk if is_text(stored) else pa.nulls(len(chunk))
        content = pa.nulls(len(chunk)) if is_text(stored) else chunk
        fields = [content.cast(pa.binary()), paths.cast(pa.string())]
        structs.append(pa.StructArray.from_arrays(fields, names=["bytes", "path"], mask=chunk.is_null()))
    column_of_structs = pa.table({name: pa.chunked_array(structs, type=encoded.pa_type)})
    wrapped = new_dataset(column_of_structs).cast_column(name, encoded)
    # Beside the other columns as they are stored, and then in the order of the rows: no image moves.
    others = new_dataset(rows.data, rows.info).remove_columns([name])
    joined = concatenate_datasets([others, wrapped], axis=1) if others.column_names else wrapped
    order = stored_positions(rows)
    return joined if order is None else joined.select(order)
