"""Queries that name the pages of files: a table ``text, source, page_number`` becomes queries and judgements."""

import csv
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset

from mmtune.arguments import is_whole, nearest_name
from mmtune.data.arrow import table_dataset
from mmtune.data.tables import BuildNotes, advise_on
from mmtune.errors import DatasetError, MissingDocumentError

_NAMES = ("queries.csv", "queries.jsonl")
_REQUIRED = ("text", "source", "page_number")
_OWN = (*_REQUIRED, "score", "query_id")
_COLUMNS = "Expected text, source, page_number, and optionally score, query_id and others"

_Rows: TypeAlias = tuple[list[tuple[int, Mapping[str, Any]]], list[str]]
"""Rows with their numbers, and the names of the columns."""

_Key: TypeAlias = tuple[str | None, str]
"""What rows of one query share: its id, or its text where it has none."""


def find_table(folder: Path) -> Path | None:
    """The table of queries in a folder of PDFs, if there is one.

    Raises:
        DatasetError: There are two.
    """
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DatasetError(f"{str(folder)!r} holds {_NAMES[0]} and {_NAMES[1]}. Remove one, or pass queries=.")
    return found[0] if found else None


@dataclass(frozen=True)
class PageQuery:
    """A row of a table of queries.

    Attributes:
        values: By column.
        where: It stands, for messages.
        folder: Where its source is looked for first; ``None`` for rows that lie in no folder.
    """

    values: Mapping[str, Any]
    where: str
    folder: Path | None


def read_page_queries(table: Any, folder: Path | None = None) -> list[PageQuery]:
    """The rows of a table of queries.

    Args:
        folder: Where sources are looked for first.
        table: The path of a CSV or JSONL file in UTF-8, a ``datasets.Dataset``, a frame of pandas or polars, or a list
            of dictionaries.

    Raises:
        DatasetError: The file can't be read, it is no table, or a column is missing.
    """
    if isinstance(table, (str, os.PathLike)):
        rows, columns = _read_file(Path(table))
        where = f"{os.fspath(table)!r}, line {{}}"
    else:
        rows, columns = _read_rows(table)
        where = "row {} of queries="
    missing = [name for name in _REQUIRED if columns and name not in columns]
    if missing:
        alike = nearest_name(missing[0], columns, cutoff=0.6)
        hint = f" Did you mean {alike!r}?" if alike else ""
        table_name = where.partition(",")[0] if isinstance(table, (str, os.PathLike)) else "queries="
        raise DatasetError(
            f"The table {table_name} has no column {missing[0]!r}; it has {list(columns)}. {_COLUMNS}, with commas "
            f"between the columns of a CSV file.{hint}"
        )
    return [PageQuery(row, where.format(number), folder) for number, row in rows]


def _read_file(path: Path) -> _Rows:
    readers: dict[str, Callable[[Path], _Rows]]
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise DatasetError(f"queries={str(path)!r} is no table: expected a .csv or a .jsonl file, or the rows of one.")
    try:
        return read(path)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{str(path)!r} is not in UTF-8: {error}. Save it as UTF-8, or read it with its own encoding, e.g. "
            f"queries=pandas.read_csv({str(path)!r}, encoding='cp1252')."
        ) from error
    except (OSError, csv.Error) as error:
        raise DatasetError(f"The queries can't be read from {str(path)!r}: {error}. Check the path.") from error


def _read_csv(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if not reader.fieldnames:
            raise DatasetError(f"{str(path)!r} is empty: it has no line of column names. {_COLUMNS}.")
        rows: list[tuple[int, Mapping[str, Any]]] = []
        for row in reader:
            if None in row:
                raise DatasetError(
                    f"{str(path)!r}, line {reader.line_num}: more values than columns. A text with a comma stands in "
                    'double quotes: "Sales, by region".'
                )
            rows.append((reader.line_num, {name: value or None for name, value in row.items()}))
        return rows, list(reader.fieldnames)


def _read_jsonl(path: Path) -> _Rows:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{str(path)!r}, line {number}: no JSON ({error}). Expected an object a line.") from None
        if not isinstance(row, dict):
            raise DatasetError(f"{str(path)!r}, line {number}: {line:.80} is no JSON object. {_COLUMNS}.")
        rows.append((number, row))
    return rows, list(dict.fromkeys(name for _, row in rows for name in row))


def _read_rows(table: Any) -> _Rows:
    if isinstance(table, Dataset):
        return list(enumerate(table.with_format(None))), table.column_names
    if hasattr(table, "to_dicts"):  # polars
        table = table.to_dicts()
    elif hasattr(table, "to_dict") and hasattr(table, "columns"):  # pandas
        table = table.to_dict(orient="records")
    if not isinstance(table, (list, tuple)) or not all(isinstance(row, Mapping) for row in table):
        raise DatasetError(
            f"queries={type(table).__name__}: expected the path of a CSV or JSONL file, a datasets.Dataset, a frame, "
            f"or a list of dictionaries. {advise_on(table) if not isinstance(table, (list, tuple)) else _COLUMNS + '.'}"
        )
    return list(enumerate(table)), list(dict.fromkeys(name for row in table for name in row))


@dataclass(frozen=True)
class Asked:
    """What a table of queries says about pages.

    Attributes:
        queries: ``query_id``, ``text``, and the other columns of the table.
        qrels: ``query_id``, ``document_id``, ``score``.
        notes: What was left out.
        num_unreadable: Judgements of pages that can't be read.
    """

    queries: Dataset
    qrels: Dataset
    notes: BuildNotes
    num_unreadable: int


def resolve_page_queries(
    asked: Sequence[PageQuery], names: Mapping[Path, str], num_pages: Mapping[str, int], unreadable: Container[str]
) -> Asked:
    """The queries, and the documents that answer them.

    Rows of one ``query_id`` are one query; without ids, rows of one text.

    Args:
        asked: The rows.
        names: What the dataset calls each file, by absolute path.
        num_pages: The last page of each file, by that name.
        unreadable: The names of files and pages that can't be read; judgements of these are left out.

    Raises:
        DatasetError: A value is of the wrong type, or a query id has two texts.
        MissingDocumentError: A source is no file of the dataset or one of several, or a page is not in its file.
    """
    find = _SourceFinder(names)
    query_by_key: dict[_Key, PageQuery] = {}
    judgements: list[tuple[_Key, str, int]] = []
    num_blank = num_irrelevant = num_unreadable = 0
    for row in asked:
        text = _text_of(row, "text", required=False)
        if not (text or "").strip():
            num_blank += 1
            continue
        query_id = _text_of(row, "query_id", required=False)
        key = (query_id, "" if query_id else text)
        first = query_by_key.setdefault(key, row)
        if first.values["text"] != text:
            raise DatasetError(
                f"{row.where}: query_id {query_id!r} has the text {text!r:.80} here and "
                f"{first.values['text']!r:.80} in {first.where}. One query has one text: give it another id."
            )
        source, page_number = find(row), _whole_of(row, "page_number")
        document_id = f"{source}#{page_number}"
        if source in unreadable or document_id in unreadable:
            num_unreadable += 1
        elif not 1 <= page_number <= num_pages[source]:
            raise MissingDocumentError(
                f"{row.where}: page_number={page_number} is not in {source!r}, which has the pages 1 to "
                f"{num_pages[source]}. Pages are counted from 1, whatever is printed on them."
            )
        elif (score := _whole_of(row, "score", otherwise=1)) <= 0:
            num_irrelevant += 1
        else:
            judgements.append((key, document_id, score))
    notes = BuildNotes(blank_queries=num_blank, judged_not_relevant=num_irrelevant)
    return Asked(*_make_tables(query_by_key, judgements), notes, num_unreadable)


def _make_tables(
    query_by_key: Mapping[_Key, PageQuery], judgements: Sequence[tuple[_Key, str, int]]
) -> tuple[Dataset, Dataset]:
    """The queries and the qrels."""
    rows = [row.values for row in query_by_key.values()]
    given = [row.get("query_id") for row in rows]
    taken = {str(value) for value in given if not _is_missing(value)}
    free = (name for name in (f"q{number}" for number in count()) if name not in taken)
    ids = [next(free) if _is_missing(value) else str(value) for value in given]
    id_by_key = dict(zip(query_by_key, ids, strict=True))
    columns = {"query_id": pa.array(ids, pa.string()), "text": pa.array([row["text"] for row in rows], pa.string())}
    for name in dict.fromkeys(name for row in rows for name in row if name not in (*columns, *_OWN)):
        values = [None if _is_missing(row.get(name)) else row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DatasetError(f"Column {name!r} of the queries holds values of several types: {error}.") from error
    by_column = list(zip(*judgements, strict=True)) or [(), (), ()]
    qrels = {
        "query_id": pa.array([id_by_key[key] for key in by_column[0]], pa.string()),
        "document_id": pa.array(by_column[1], pa.string()),
        "score": pa.array(by_column[2], pa.int64()),
    }
    return table_dataset(columns), table_dataset(qrels)


class _SourceFinder:
    """From what a table calls a file to what the dataset calls it."""

    def __init__(self, names: Mapping[Path, str]) -> None:
        self._names = {_composed(path): name for path, name in names.items()}
        self._names_by_end: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for path, name in self._names.items():
            for start in range(len(path.parts)):
                self._names_by_end[path.parts[start:]].append(name)

    def __call__(self, row: PageQuery) -> str:
        source = _text_of(row, "source")
        path = _composed(Path(source))
        if row.folder is not None and (name := self._names.get(_composed(row.folder) / path)):
            return name
        found = self._names_by_end.get(path.parts, [])
        if len(found) == 1:
            return found[0]
        known = sorted(self._names.values())
        if found:
            raise MissingDocumentError(
                f"{row.where}: source={source!r} may be any of {sorted(found)[:5]}. Write the folder before the name."
            )
        alike = nearest_name(source, known, cutoff=0.6)
        hint = f" Did you mean {alike!r}?" if alike else f" There are {len(known)}, e.g. {known[:3]}."
        raise MissingDocumentError(
            f"{row.where}: source={source!r} is no PDF of this dataset. Write the name of the file, with the folders "
            f"before it where names clash.{hint}"
        )


def _composed(path: Path) -> Path:
    """A path with each accented letter as one character: file systems and tables differ in that."""
    return Path(unicodedata.normalize("NFC", str(path)))


def _is_missing(value: Any) -> bool:
    # frames write missing values as NaN, which does not equal itself
    return value is None or value == "" or value != value


def _text_of(row: PageQuery, name: str, *, required: bool = True) -> Any:
    """A text; ``None`` where there is none and none is required. Numbers are taken for ids."""
    value = row.values.get(name)
    if _is_missing(value) and not required:
        return None
    if name == "query_id" and is_whole(value):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DatasetError(f"{row.where}: {name}={value!r:.80}, expected a text. {_COLUMNS}.")
    return value


def _whole_of(row: PageQuery, name: str, *, otherwise: int | None = None) -> int:
    value = row.values.get(name)
    if _is_missing(value) and otherwise is not None:
        return otherwise
    try:
        # a file of texts has "3", a frame with gaps 3.0
        number = float(str(value))
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise DatasetError(f"{row.where}: {name}={value!r:.80}, expected a whole number such as 1. {_COLUMNS}.")
