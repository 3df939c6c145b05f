"""Datasets on their way out: in layouts that other programs read, written whole, images as they are encoded."""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

from mmtune.arguments import QueryId, listed, require_flag, require_one_of, require_path
from mmtune.data.arrow import ENCODED, IntLists, column, media_columns, table_dataset, with_columns
from mmtune.data.card import make_card
from mmtune.data.files import CARD, require_found
from mmtune.data.images import EncodedImages
from mmtune.data.label_changes import label_changes
from mmtune.data.layouts import unused_negatives
from mmtune.data.pdf_corpus import store_pages
from mmtune.data.query_kinds import as_documents
from mmtune.data.relevance import Relevance
from mmtune.data.tables import has_content, query_parts
from mmtune.errors import ConfigError, DatasetError

ExportLayout = Literal["beir", "columns", "id_rows", "tevatron"]
"""How the tables of a dataset are laid out in files; see ``RetrievalDataset.export``."""

Split = Literal["train", "dev", "validation", "test"]

_ROWS_AT_ONCE, _BYTES_AT_ONCE, _BYTES_A_FILE = 1000, 32 << 20, 500 << 20
_OWN_FOLDERS = {"data", "corpus", "queries", "qrels"}
_OWN_FILE = re.compile(r"\w+-\d{5}-of-\d{5}\.parquet")
"""What an export makes in its folder: ``overwrite`` deletes nothing else."""


@dataclass(frozen=True)
class OutgoingTable:
    """A table as it will be written.

    Attributes:
        columns: Everything but files, in the order of the rows.
        pages: For each column of files the document behind each row, int64; -1 for none.
        asking: For each column that asks beside a text, the query behind each row, likewise.
    """

    columns: Dataset
    pages: Mapping[str, np.ndarray]
    asking: Mapping[str, np.ndarray] = field(default_factory=dict)

    def kind_of(self, name: str) -> str:
        """What a column of files holds: what it is named after, or what the first one holds, as negatives do."""
        named = name.removeprefix("query_") if name in self.asking else name
        return next((kind for kind in (named, *self.pages) if kind in ENCODED), "image")


@dataclass(frozen=True)
class Outgoing:
    """A dataset in a layout.

    Attributes:
        layout: The layout.
        tables: By the name of their folder; ``data`` where there is one alone.
        losses: What the layout has no place for, counted, as parts of a sentence.
    """

    layout: ExportLayout
    tables: Mapping[str, OutgoingTable]
    losses: tuple[str, ...] = ()


def lay_out(relevance: Relevance, layout: ExportLayout) -> Outgoing:
    """The tables of a dataset in a layout.

    Raises:
        DatasetError: The layout has no place for something that can't be left out.
    """
    if layout != "id_rows" and not len(relevance.query_ids):
        raise DatasetError(
            f"layout={layout!r} has a table of queries, and the dataset has none: datasets can't read a table without "
            "rows (5.2). Pass layout='id_rows', save(folder), or write queries first, with generate_queries."
        )
    if relevance.tables.negatives is None:
        tables = relevance.tables
        for table in (tables.queries, *((tables.corpus,) if layout in ("id_rows", "columns") else ())):
            if alike := unused_negatives(table, ()):
                raise DatasetError(
                    f"The dataset has no negatives, and a column {alike[0]!r} that load() would take for them. Rename "
                    "the column, or remove it; save(folder) keeps it as it is."
                )
    makers: Mapping[str, Callable[[Relevance], Outgoing]] = {
        "beir": _lay_out_beir,
        "tevatron": _lay_out_tevatron,
        "id_rows": _lay_out_id_rows,
        "columns": _lay_out_columns,
    }
    found = makers[layout](relevance)
    changes = label_changes(relevance.tables.negatives)
    if not len(changes):
        return found
    unknown = changes["label"].to_pylist().count("unknown")
    lost = f"{len(changes)} changes of labels, so that {unknown} documents that are unknown may be drawn as negatives"
    return replace(found, losses=(*found.losses, lost))


def export_dataset(
    relevance: Relevance,
    folder: str | os.PathLike[str],
    layout: ExportLayout,
    *,
    split: Split,
    overwrite: bool,
    show_progress_bar: bool,
) -> Path:
    """Write a dataset to a folder, which holds all of it or does not exist; see ``RetrievalDataset.export``."""
    require_path("folder", folder)
    require_one_of("layout", layout, get_args(ExportLayout))
    require_one_of("split", split, get_args(Split))
    require_flag("overwrite", overwrite)
    path = Path(folder).absolute()
    _require_free(path, overwrite)
    outgoing = lay_out(relevance, layout)
    require_found(relevance.tables)
    warn_of_losses(outgoing, stacklevel=4)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that renaming is enough to put it there.
        partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
        try:
            write_files(outgoing, relevance, partial, split, show_progress_bar=show_progress_bar)
            stamp = f"Written at {datetime.now(timezone.utc).isoformat()}"
            card = make_card(relevance, layout, list(outgoing.tables), split, name=path.name, stamp=stamp)
            (partial / CARD).write_text(card, encoding="utf-8")
            _put_in_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def warn_of_losses(outgoing: Outgoing, *, stacklevel: int) -> None:
    """Warn of what a layout has no place for."""
    if outgoing.losses:
        warnings.warn(
            f"layout={outgoing.layout!r} has no place for {'; '.join(outgoing.losses)}. save(folder) keeps everything.",
            stacklevel=stacklevel,
        )


def write_files(
    outgoing: Outgoing, relevance: Relevance, folder: Path, split: Split, *, show_progress_bar: bool
) -> None:
    """Write the tables as parquet below a folder, a few pages in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pages-") as rendered:
        # pages of PDFs are rendered, all else stays
        corpus = store_pages(relevance.tables.corpus, rendered)
        queries = store_pages(as_documents(relevance.tables.queries), rendered)
        sources = [
            {kind: EncodedImages(table, kind, id_class=id_class) for kind in media_columns(table.column_names)}
            for table, id_class in ((corpus, str), (queries, QueryId))
        ]
        _write_tables(outgoing, sources, folder, split, show_progress_bar=show_progress_bar)


def _write_tables(
    outgoing: Outgoing,
    sources: Sequence[Mapping[str, EncodedImages]],
    folder: Path,
    split: Split,
    *,
    show_progress_bar: bool,
) -> None:
    for name, table in outgoing.tables.items():
        (folder / name).mkdir(parents=True)
        num_rows = len(table.columns)
        sizes = np.zeros(num_rows, dtype=np.int64)
        columns = {
            column_name: (source.get(table.kind_of(column_name)), rows)
            for source, found in zip(sources, (table.pages, table.asking), strict=True)
            for column_name, rows in found.items()
        }
        for source, rows in columns.values():
            sizes += 0 if source is None else np.where(rows >= 0, source.lengths.clip(0)[rows], 0)
        end_bytes, numbers = np.cumsum(sizes), np.arange(num_rows)
        # A file, and a portion of one, ends where it has enough bytes or rows.
        files = np.unique(end_bytes // _BYTES_A_FILE, return_inverse=True)[1].reshape(-1)
        portions = end_bytes // _BYTES_AT_ONCE + numbers // _ROWS_AT_ONCE
        num_files = int(files[-1]) + 1 if num_rows else 1
        decoded = {column_name: type(ENCODED[table.kind_of(column_name)])() for column_name in columns}
        features = Features({**table.columns.features, **decoded})
        with tqdm(total=num_rows, desc=f"Writing {name}", disable=not show_progress_bar, leave=False) as bar:
            for number in range(num_files):
                path = folder / name / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
                own = np.flatnonzero(files == number)
                with pq.ParquetWriter(path, features.arrow_schema) as writer:
                    for rows in np.split(own, np.flatnonzero(np.diff(portions[own])) + 1):
                        writer.write_table(_read_portion(table.columns, columns, rows, features))
                        bar.update(len(rows))


def _read_portion(
    table: Dataset,
    columns: Mapping[str, tuple[EncodedImages | None, np.ndarray]],
    rows: np.ndarray,
    features: Features,
) -> pa.Table:
    """Consecutive rows of a table, with the bytes of their files."""
    span = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0)
    # Images and sounds in other columns may be files as well.
    portion = embed_table_storage(table.with_format("arrow")[span])
    for name, (images, documents) in columns.items():
        found = [
            bytes(images.read(document))
            if images is not None and document >= 0 and images.lengths[document] >= 0
            else None
            for document in documents[rows].tolist()
        ]
        is_null = pa.array([content is None for content in found])
        fields = [pa.array(found, type=pa.binary()), pa.nulls(len(found), pa.string())]
        structs = pa.StructArray.from_arrays(fields, names=["bytes", "path"], mask=is_null)
        portion = portion.append_column(name, structs)
    return portion.select(list(features)).cast(features.arrow_schema)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Names a folder where it can't be written to.

    Raises:
        DatasetError: It can't: there is no room, or no permission.
    """
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{str(folder)!r} could not be written: {error}. What had been written is removed, and what stood there is "
            "kept. Make room or get permission there, or name another folder."
        ) from error


def _require_free(path: Path, overwrite: bool) -> None:
    """Make sure that a folder is new or empty, or may be replaced.

    Raises:
        DatasetError: It is neither; the message names what it holds.
        ConfigError: It can be no path.
    """
    with writing_to(path):
        try:
            path.lstat()
        except FileNotFoundError:
            return
        except ValueError as error:  # a null byte, or half of a surrogate pair
            raise ConfigError(f"folder={str(path)!r:.80} can't be a path: {error}. Name another.") from None
        if not path.is_dir():
            raise DatasetError(f"{str(path)!r} is a file. Name a new folder.")
        entries = sorted(entry.name for entry in path.iterdir())
        found = [each for each in path.rglob("*") if not each.is_dir() or each.is_symlink()]
    foreign = [each for each in found if not _is_own(each.relative_to(path))]
    if entries and not overwrite:
        raise DatasetError(
            f"{str(path)!r} is not empty: it holds {entries[:5]}. Export to a new folder, or pass overwrite=True to "
            "replace an export."
        )
    if foreign:
        raise DatasetError(
            f"overwrite=True would delete {str(foreign[0])!r}, which no export wrote. Name another folder, or "
            "remove it yourself."
        )


def _is_own(file: Path) -> bool:
    """Whether an export writes a file of this name at this place in its folder."""
    if len(file.parts) == 1:
        return file.name == CARD
    return len(file.parts) == 2 and file.parts[0] in _OWN_FOLDERS and _OWN_FILE.fullmatch(file.name) is not None


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.{uuid4().hex[:8]}.old")
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ---- layouts


def _lay_out_beir(relevance: Relevance) -> Outgoing:
    (queries, asking), lists_of_ids = _asking(relevance), {}
    if relevance.tables.negatives is not None:
        lists_of_ids["negative_document_ids"] = relevance.listed_negatives.ids(relevance.document_ids)
    tables = {
        "corpus": _corpus(relevance, "corpus-id"),
        "queries": OutgoingTable(_rename(queries, {"query_id": "query-id", "text": "query"}, lists_of_ids), {}, asking),
        "qrels": OutgoingTable(
            _rename(relevance.tables.qrels, {"query_id": "query-id", "document_id": "corpus-id"}), {}
        ),
    }
    return Outgoing("beir", tables)


def _lay_out_tevatron(relevance: Relevance) -> Outgoing:
    (queries, asking), num_queries = _asking(relevance, "query_"), len(relevance.query_ids)
    positives = IntLists.grouped(relevance.judged_query, relevance.judged_document, num_queries)
    lists_of_ids = {"positive_document_ids": positives.ids(relevance.document_ids)}
    if relevance.tables.negatives is not None:
        lists_of_ids["negative_document_ids"] = relevance.listed_negatives.ids(relevance.document_ids)
    renamed = _rename(queries, {"query_id": "query_id", "text": "query_text"}, lists_of_ids)
    has_images = "query_image" in (*asking, *queries.column_names)
    nothing = {} if has_images else {"query_image": np.full(num_queries, -1)}
    tables = {"corpus": _corpus(relevance, "docid"), "queries": OutgoingTable(renamed, nothing, asking)}
    return Outgoing("tevatron", tables, tuple(_lost_grades(relevance)))


def _lay_out_id_rows(relevance: Relevance) -> Outgoing:
    layout = "id_rows"
    media = _require_images(relevance, np.arange(len(relevance.document_ids)), layout)
    for judged, ids, many in (
        (relevance.judged_query, relevance.query_ids, "queries with several relevant pages"),
        (relevance.judged_document, relevance.document_ids, "pages that answer several queries"),
    ):
        counts = np.bincount(judged, minlength=len(ids))
        if (counts > 1).any():
            raise DatasetError(
                f"layout={layout!r} has a row for each page, with one query at most, and there are "
                f"{(counts > 1).sum()} {many}, e.g. {ids[int(np.argmax(counts > 1))].as_py()!r}. Pass layout='beir'."
            )
    query = np.full(len(relevance.document_ids), -1)
    query[relevance.judged_document] = relevance.judged_query
    columns = {"id": relevance.document_ids, "query": _take(column(relevance.tables.queries, "text"), query)}
    if relevance.tables.negatives is not None:
        columns["negatives"] = _take(relevance.listed_negatives.ids(relevance.document_ids), query)
    table = _join(relevance, dict.fromkeys(media, np.arange(len(query))), query, columns, layout)
    renamed = int(
        (
            _as_objects(relevance.query_ids, relevance.judged_query)
            != _as_objects(relevance.document_ids, relevance.judged_document)
        ).sum()
    )
    losses = [f"the ids of {renamed} queries, which become those of their pages"] if renamed else []
    return Outgoing(layout, {"data": table}, (*losses, *_lost_grades(relevance)))


def _lay_out_columns(relevance: Relevance) -> Outgoing:
    layout = "columns"
    order = np.argsort(relevance.judged_query, kind="stable")
    queries, documents = relevance.judged_query[order], relevance.judged_document[order]
    kind = _require_images(relevance, documents, layout, most=1)[0]
    listed_negatives = relevance.listed_negatives.take(queries)
    longest = int(listed_negatives.lengths.max(initial=0))
    negatives = np.full((len(queries), longest), -1)
    negatives[np.arange(longest) < listed_negatives.lengths[:, None]] = listed_negatives.values
    pages = {kind: documents, **{f"negative_{k}": negatives[:, k] for k in range(longest)}}
    columns = {"query": _take(column(relevance.tables.queries, "text"), queries)}
    table = _join(relevance, pages, queries, columns, layout)

    losses = [f"the ids of {len(relevance.query_ids)} queries and {len(relevance.document_ids)} pages"]
    unlisted = len(relevance.document_ids) - len(np.union1d(documents, negatives[negatives >= 0]))
    if unlisted:
        losses.append(f"{unlisted} pages that are neither relevant nor a negative")
    others = [name for name in relevance.tables.corpus.column_names if name not in ("document_id", kind)]
    if others and longest:
        losses.append(f"the columns {listed(others)} of negatives")
    return Outgoing(layout, {"data": table}, (*losses, *_lost_grades(relevance)))


def _asking(relevance: Relevance, prefix: str = "") -> tuple[Dataset, dict[str, np.ndarray]]:
    """The queries without their images and sounds, and, by the name of their column, which queries these are of."""
    queries = relevance.tables.queries
    kinds = query_parts(queries)[1:]
    others = queries.remove_columns(kinds) if kinds else queries
    names = [f"{prefix}{kind}" for kind in kinds]
    _require_unused(others, names)
    return others, dict.fromkeys(names, np.arange(len(queries)))


def _corpus(relevance: Relevance, id_name: str) -> OutgoingTable:
    corpus = relevance.tables.corpus
    media = media_columns(corpus.column_names)
    others = corpus.remove_columns(media) if media else corpus
    return OutgoingTable(_rename(others, {"document_id": id_name}), dict.fromkeys(media, np.arange(len(corpus))))


def _rename(table: Dataset, new_by_old: Mapping[str, str], more: Mapping[str, pa.Array] | None = None) -> Dataset:
    """A table with columns under other names and some more behind these.

    Raises:
        DatasetError: It has a column of such a name that means something else.
    """
    more = more or {}
    _require_unused(table, [*(new for old, new in new_by_old.items() if new != old), *more])
    others = [name for name in table.column_names if name not in new_by_old]
    renamed = table.rename_columns({old: new for old, new in new_by_old.items() if new != old})
    renamed = with_columns(renamed, more) if more else renamed
    return renamed.select_columns([*new_by_old.values(), *more, *others])


def _require_unused(table: Dataset, names: Sequence[str]) -> None:
    clashing = [name for name in names if name in table.column_names]
    if clashing:
        raise DatasetError(
            f"The dataset has a column {clashing[0]!r} of its own, and the layout needs that name for something else. "
            "Rename the column, or remove it."
        )


def _join(
    relevance: Relevance,
    pages: Mapping[str, np.ndarray],
    queries: np.ndarray,
    columns: Mapping[str, pa.Array],
    layout: str,
) -> OutgoingTable:
    """Rows of a page each, with the other columns of its document and of its query; -1 is no query.

    Raises:
        DatasetError: A column of the queries means something else among the documents.
    """
    documents = next(iter(pages.values()))
    corpus = relevance.tables.corpus.remove_columns(["document_id", *media_columns(pages)])
    asked, asking = _asking(relevance, "query_")
    asked = asked.remove_columns(["query_id", "text"])
    for table in (corpus, asked):
        _require_unused(table, [*columns, *pages, *asking])
    beside = {}
    for name in asked.column_names:
        values = _take(column(asked, name), queries)
        if name not in corpus.column_names:
            beside[name] = values
            continue
        of_documents = column(corpus, name).take(pa.array(documents))
        if not values.filter(pa.array(queries >= 0)).equals(of_documents.filter(pa.array(queries >= 0))):
            raise DatasetError(
                f"Column {name!r} differs between queries and their pages, and layout={layout!r} has one of that name. "
                "Rename one of the two, or pass layout='beir'."
            )
    new = {**columns, **beside}
    rows = with_columns(corpus.select(documents), new) if corpus.column_names else table_dataset(new)
    return OutgoingTable(rows, pages, dict.fromkeys(asking, queries))


def _take(values: pa.Array, rows: np.ndarray) -> pa.Array:
    """The values in these rows; null for -1."""
    return values.take(pa.array(rows, mask=rows < 0))


def _as_objects(ids: pa.Array, rows: np.ndarray) -> np.ndarray:
    return ids.take(pa.array(rows)).to_numpy(zero_copy_only=False)


def _require_images(relevance: Relevance, documents: np.ndarray, layout: str, most: int = len(ENCODED)) -> list[str]:
    """The columns of files, of which each document must have one; ``most`` are the columns that a layout takes."""
    corpus = relevance.tables.corpus
    media = media_columns(corpus.column_names)
    if not 0 < len(media) <= most:
        raise DatasetError(
            f"layout={layout!r} holds pages as images, and the corpus has {'several kinds' if media else 'none'}; it "
            f"has {corpus.column_names}. Pass layout='beir'."
        )
    files = [EncodedImages(corpus, name) for name in media]
    lacking = [{int(row) for row in each.rows_elsewhere if not each.path(int(row))} for each in files]
    if most > 1 and media != ["image"] and "text" in corpus.column_names:  # as from_id_rows reads them
        lacking.append(set(np.flatnonzero(~has_content(corpus, "text")).tolist()))
    empty = sorted(set.intersection(*lacking) & set(documents.tolist()))
    if empty:
        raise DatasetError(
            f"layout={layout!r} holds pages as images, and {len(empty)} documents have none, e.g. "
            f"{relevance.document_ids[empty[0]].as_py()!r}. Pass layout='beir', or leave these out."
        )
    return media


def _lost_grades(relevance: Relevance) -> list[str]:
    graded = int((relevance.judged_score != 1).sum())
    return [f"the scores of {graded} judgements, which become 1"] if graded else []
