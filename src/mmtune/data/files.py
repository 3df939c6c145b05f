"""Datasets on disk and on the Hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset, load_dataset_builder, load_from_disk

from mmtune.arguments import QueryId, item_of, nearest_name, require_path
from mmtune.data.arrow import media_columns
from mmtune.data.images import EncodedImages
from mmtune.data.layouts import build_from_beir, build_from_known_layout
from mmtune.data.pdf_corpus import build_from_pdfs, list_files, store_pages
from mmtune.data.query_kinds import as_documents
from mmtune.data.tables import BuildNotes, DroppedQuery, Tables, advise_on
from mmtune.errors import ConfigError, DatasetError
from mmtune.host import describe_offline

_MANIFEST = "mmtune_dataset.json"
_FORMAT_VERSION = 1
CARD = "README.md"
"""What describes a dataset to people and to the Hub."""
_BEIR = ("corpus", "queries", "qrels")
_TEVATRON = ("corpus", "queries")
_SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")

_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
_READERS = {".csv": "from_csv(path)", ".tsv": 'from_csv(path, sep="\\t")', ".json": "from_json(path)"}
_READERS |= {".jsonl": "from_json(path)", ".txt": "from_text(path)"}
_FILES = {".parquet", ".pdf", ".arrow", ".zip", *_READERS}
_SPLIT = re.compile(r"(train|dev|valid|val|validation|test|eval|evaluation)(?:[-_.]\d+)*(?:-of-\d+)?")


def save_tables(tables: Tables, folder: str | os.PathLike[str], card: str) -> None:
    """The tables as Arrow files below ``folder``, with a card; images encoded as they are, pages of PDFs rendered.

    Raises:
        DatasetError: ``folder`` holds something already, or can't be written to.
    """
    require_path("folder", folder)
    path = Path(folder)
    require_found(tables)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DatasetError(f"{str(path)!r} is not empty. Save to a new folder, or remove what is there.")
    named = {"qrels": tables.qrels, "negatives": tables.negatives}
    # Last, so that a folder with a manifest is whole.
    manifest = {"format_version": _FORMAT_VERSION, "notes": asdict(tables.notes)}
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{str(path)!r} can't be written to: {error}. Name another folder.") from error
    try:
        with TemporaryDirectory(dir=path, prefix=".pages-") as rendered:
            store_pages(tables.corpus, rendered).save_to_disk(path / "corpus")
            queries = store_pages(tables.queries, rendered, id_column="query_id")
            # a table without rows would have no file, and could not be loaded (datasets 5.2)
            queries.save_to_disk(path / "queries", num_shards=None if len(queries) else 1)
        for name, table in named.items():
            if table is not None:
                table.save_to_disk(path / name, num_shards=None if len(table) else 1)
        (path / CARD).write_text(card, encoding="utf-8")
        (path / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except FileNotFoundError as error:
        raise DatasetError(
            f"The file of a page is missing: {error}. Pages are stored with the dataset. Restore the file, or leave "
            "the document out."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"{str(path)!r} could not be written: {error}. It holds a part of the dataset at most, which load does not "
            "take for a whole one: remove it. Make room or get permission there, or name another folder."
        ) from error


def load_tables(
    name_or_path: str | os.PathLike[str],
    config: str | None,
    *,
    split: str | None,
    revision: str | None,
    allow_outside: bool,
) -> Tables:
    """The tables of what ``save_tables`` wrote, or of rows in a known layout; see ``RetrievalDataset.load``.

    Raises:
        ConfigError: A configuration, split or revision is named of what has none.
        DatasetError: There is nothing, it can't be read, it has several splits and none was named, its columns are
            no known layout, or it names files elsewhere.
    """
    rows = "" if isinstance(name_or_path, (str, Dataset)) else f" {advise_on(name_or_path)}"
    loaded = f"What is loaded already goes to RetrievalDataset.from_id_rows(rows) or from_columns(rows).{rows}"
    require_path("name_or_path", name_or_path, what="a dataset, or its name on the Hub", advice=loaded)
    path = Path(name_or_path)
    is_local = _exists(os.fspath(name_or_path))
    tables = _read_tables(path, is_local, config, split, revision)
    if not allow_outside:
        for table, id_class in _tables_with_images(tables):
            _require_inside(table, id_class, path if is_local else None)
    return tables


def _exists(name: str) -> bool:
    """Whether there is such a file or folder; otherwise the path must look like a name on the Hub.

    Raises:
        DatasetError: Nothing is there, and it can be no name of the Hub either.
    """
    path = Path(name)
    try:
        if path.exists():
            return True
    except (ValueError, OSError) as error:  # a null byte, a lone surrogate, or a name that is too long
        raise DatasetError(f"{name!r:.200} can't be the path of a dataset: {error}.") from None
    if not _HUB_NAME.fullmatch(name) or path.suffix.lower() in _FILES:
        near = path.parent if path.parent.is_dir() else Path()
        entries = sorted(entry.name for entry in near.iterdir())
        alike = nearest_name(path.name, entries, cutoff=0.6)
        hint = f" Did you mean {str(near / alike)!r}?" if alike else ""
        raise DatasetError(
            f"The path {name!r} does not exist. {str(near.resolve())!r} holds {entries[:10]}. Expected a folder "
            f"written by save(), a parquet file or a folder of them, or the name of a dataset on the Hub.{hint}"
        )
    return False


def _read_tables(path: Path, is_local: bool, config: str | None, split: str | None, revision: str | None) -> Tables:
    if (path / _MANIFEST).is_file():
        if config or split or revision:
            raise ConfigError(
                f"{str(path)!r} was written by save() and has no configurations, splits or revisions. "
                "Leave config, split and revision out."
            )
        return _load_saved(path)
    try:
        if is_local and not (config or split or revision) and _holds_pdfs(path):
            return build_from_pdfs(path)
        if path.is_file():
            _require_parquet(path)
            loaded = _pick_split(load_dataset("parquet", data_files=str(path)), str(path), split)
        elif is_local:
            loaded = _load_folder(path, config, split)
        else:
            loaded = _load_by_name(path.as_posix(), config, split, revision)
    except DatasetError:
        raise
    except Exception as error:  # the Hub client and the readers raise many kinds; the name is what the user can mend
        raise DatasetError(
            f"{str(path)!r} could not be loaded: {type(error).__name__}: {error}. Expected a folder written by "
            "save(), a parquet file or a folder of them, or the name of a dataset on the Hub. Check the spelling, the "
            f"connection, and for a private data set run `hf auth login`.{describe_offline()}"
        ) from error
    if isinstance(loaded, Dataset):
        return build_from_known_layout(loaded)
    return build_from_beir(loaded["corpus"], loaded["queries"], loaded.get("qrels"))


def _load_saved(path: Path) -> Tables:
    """The tables of a folder that ``save_tables`` wrote, memory-mapped."""
    manifest = json.loads((path / _MANIFEST).read_text())
    if manifest["format_version"] > _FORMAT_VERSION:
        raise DatasetError(
            f"{str(path)!r} has format version {manifest['format_version']}; this mmtune reads up to "
            f"{_FORMAT_VERSION}. Update mmtune."
        )
    notes = dict(manifest["notes"])
    for name in ("unknown_examples", "unreadable_sources", "taken_out"):
        notes[name] = tuple((one, other) for one, other in notes.get(name, ()))
    named = {
        name: load_from_disk(str(path / name)) if (path / name).is_dir() else None for name in (*_BEIR, "negatives")
    }
    missing = [name for name in _BEIR if named[name] is None]
    if missing:
        raise DatasetError(
            f"{str(path)!r} has a manifest and no table {missing[0]!r}: it is not whole. Save the dataset again."
        )
    notes["dropped_queries"] = tuple(DroppedQuery(**each) for each in notes.get("dropped_queries", ()))
    return Tables(**named, notes=BuildNotes(**notes))


def _load_folder(path: Path, config: str | None, split: str | None) -> Dataset | dict[str, Dataset]:
    if any((path / name).is_file() for name in _SAVED_BY_DATASETS):
        loaded = load_from_disk(str(path))
        return loaded if isinstance(loaded, Dataset) else _pick_split(loaded, str(path), split)
    files = {name: by_split for name in _BEIR if (by_split := _files_by_split(path, name))}
    if config is None and set(_TEVATRON) <= set(files):
        chosen = _pick_splits({name: list(by_split) for name, by_split in files.items()}, str(path), split)
        return {
            name: load_dataset("parquet", data_files=files[name][own], split="train") for name, own in chosen.items()
        }
    if not any(path.rglob("*.parquet")):
        found = sorted(entry.name for entry in path.iterdir())[:10]
        raise DatasetError(
            f"The folder {str(path)!r} holds no parquet file and no saved dataset; it has {found}.{_advise_on(path)}"
        )
    return _load_by_name(str(path), config, split, None)


def _load_by_name(
    name: str, config: str | None, split: str | None, revision: str | None
) -> Dataset | dict[str, Dataset]:
    """A dataset of the Hub, or a folder laid out as one."""
    config_by_table = _configs_of_tables(get_dataset_config_names(name, revision=revision), config)
    if config_by_table:
        tables = {table: _load_config(name, own, revision) for table, own in config_by_table.items()}
        chosen = _pick_splits({table: list(splits) for table, splits in tables.items()}, name, split)
        return {table: tables[table][own] for table, own in chosen.items()}
    return _pick_split(_load_config(name, config, revision), name, split)


def _load_config(name: str, config: str | None, revision: str | None) -> DatasetDict:
    if Path(name).is_dir():
        # datasets 5.2 takes two folders of one name for the same where their READMEs name the same files, and gives
        # what it has of the first. Files by their paths it tells apart.
        files = load_dataset_builder(name, config).config.data_files
        if all(path.endswith(".parquet") for paths in files.values() for path in paths):
            return load_dataset("parquet", data_files={str(split): list(paths) for split, paths in files.items()})
    return load_dataset(name, config, revision=revision)


def _configs_of_tables(names: Sequence[str], config: str | None) -> dict[str, str]:
    """The configuration of each of the tables; empty where these are none, or one of them alone is asked for.

    ViDoRe and JinaVDR name them as the tables; MTEB's sets of many languages put the language before or behind, as in
    ``en-corpus``, and others keep the qrels in ``default``.
    """
    spellings = ["{}"] if config is None else [f"{config}-{{}}", f"{{}}-{config}", f"{config}_{{}}", f"{{}}_{config}"]
    for spelling in spellings:
        found = {table: spelling.format(table) for table in _BEIR if spelling.format(table) in names}
        if set(_TEVATRON) <= set(found):
            is_default = "qrels" not in found and config is None and "default" in names
            return {**found, "qrels": "default"} if is_default else found
    return {}


def _pick_split(loaded: DatasetDict, name: str, split: str | None) -> Dataset:
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        nearest = (split and nearest_name(split, loaded)) or next(iter(loaded))
        part = f", and take a part of it with select_queries, for {split!r}" if "[" in (split or "") else ""
        raise DatasetError(
            f"{name!r} has the splits {list(loaded)}, and split={split!r} was asked for. Name one of them, e.g. "
            f"split={nearest!r}{part}."
        )
    return loaded[split]


def _files_by_split(path: Path, table: str) -> dict[str, list[str]]:
    """The files of one table of a BEIR folder by split; under ``""`` where their names tell no split."""
    found: dict[str, list[str]] = {}
    for pattern in ("{}.parquet", "{}/*.parquet", "{}-*.parquet"):
        for file in sorted(path.glob(pattern.format(table))):
            match = _SPLIT.fullmatch(file.stem.removeprefix(f"{table}-"))
            found.setdefault(match[1] if match else "", []).append(str(file))
    return found


def _pick_splits(available: Mapping[str, Sequence[str]], name: str, split: str | None) -> dict[str, str]:
    """For each table of a BEIR set the split to read: the one of the qrels, or the only one that a table has.

    Without qrels it is that of the queries, which then list what is relevant to them.

    Raises:
        DatasetError: The qrels have several splits and none was named, or a table lacks the one that was.
    """
    judging = "qrels" if "qrels" in available else "queries"
    judged = available[judging]
    named = sorted({own for splits in available.values() for own in splits} - {""})
    if (split is None and len(judged) > 1) or (split is not None and split not in (named or ["train"])):
        raise DatasetError(
            f"{name!r} has the splits {named}, and split={split!r} was asked for. Name one of them: what is judged in "
            "another one is no part of it."
        )
    wanted = judged[0] if split is None or judged == [""] else split
    chosen: dict[str, str] = {}
    for table, splits in available.items():
        preferred = [own for own in (wanted, split or "") if own in splits] or (
            list(splits) if len(splits) == 1 else []
        )
        if not preferred or (table == judging and preferred[0] != wanted):
            raise DatasetError(
                f"The {table} of {name!r} have the splits {list(splits)}, and the split {wanted!r} is read. Name one "
                "that all tables have, or bring the table into one split."
            )
        chosen[table] = preferred[0]
    return chosen


def _require_parquet(path: Path) -> None:
    """Say how a file of another kind is read.

    Raises:
        DatasetError: The file is a table of another kind.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader:
        raise DatasetError(
            f"{str(path)!r} is no parquet file. Read it with rows = datasets.Dataset.{reader}, and pass the rows, or "
            "write them with rows.to_parquet(...). Images in them are paths, or encoded bytes."
        )


def _holds_pdfs(path: Path) -> bool:
    """Whether this is a PDF, or a folder of PDFs whose only tables are those of datasets and runs below it.

    Raises:
        DatasetError: It is a folder of PDFs and a folder of tables alike.
    """
    if path.is_file():
        return path.suffix.lower() == ".pdf"
    files = list_files(path)
    pdf = next((file for file in files if file.suffix.lower() == ".pdf"), None)
    if pdf is None or any((path / name).is_file() for name in _SAVED_BY_DATASETS):
        return False
    own = [file for file in files if file.suffix.lower() == ".parquet" and not _is_of_another(file, path)]
    if not own or (path / CARD).is_file() or all(_files_by_split(path, name) for name in _TEVATRON):
        return not own
    raise DatasetError(
        f"{str(path)!r} holds PDFs, e.g. {str(pdf.relative_to(path))!r}, and tables, e.g. "
        f"{str(own[0].relative_to(path))!r}. For the PDFs call RetrievalDataset.from_pdfs({str(path)!r}), for the "
        f"table RetrievalDataset.load({str(own[0])!r}), or keep them in folders of their own."
    )


def _is_of_another(file: Path, folder: Path) -> bool:
    """Whether a file belongs to what was written into a folder below, such as an export, or to what is hidden."""
    below = [parent for parent in file.parents if folder in parent.parents]
    return any(parent.name.startswith(".") or (parent / CARD).is_file() for parent in below)


def _advise_on(path: Path) -> str:
    """What to do with what a folder holds instead of parquet."""
    for model in (path, path / "final"):
        if (model / "modules.json").is_file() or (model / "config.json").is_file():
            what = "This is a model" if model == path else "This is the folder of a run, with its model"
            return (
                f" {what}: pass {str(model)!r} to load_model, or to build_reranker, and load the data from elsewhere."
            )
    kinds = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if ".pdf" in kinds:
        return " A folder of PDFs without tables has no configurations, splits or revisions: leave them out."
    reader = next((_READERS[kind] for kind in sorted(kinds) if kind in _READERS), None)
    if reader:
        return f" Read the table with datasets.Dataset.{reader}, and pass the rows."
    if kinds & {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}:
        return (
            " These are images. Make rows with the columns 'id', 'query' and 'image' (paths will do), e.g. with "
            "datasets.Dataset.from_dict."
        )
    return ""


def _tables_with_images(tables: Tables) -> list[tuple[Dataset, type[str]]]:
    """The documents, and the queries as such, with what their ids are."""
    return [(tables.corpus, str), (as_documents(tables.queries), QueryId)]


def _outside_images(corpus: Dataset) -> list[tuple[int, str, int]]:
    """The rows of a corpus whose files lie outside of it, the paths, and the bytes; -1 of what is no file."""
    found = []
    for name in media_columns(corpus.column_names):
        images = EncodedImages(corpus, name)
        paths = ((int(row), images.path(int(row))) for row in images.rows_elsewhere)
        found += [(row, path, max(-1, int(images.lengths[row]))) for row, path in paths if path]
    return found


def require_found(tables: Tables) -> None:
    """Make sure that every image in a file of its own can be read, before anything is written.

    Raises:
        DatasetError: A file is missing, or no file.
    """
    for table, id_class in _tables_with_images(tables):
        lost = [(row, path) for row, path, length in _outside_images(table) if length < 0]
        if lost:
            row, path = lost[0]
            item_id = id_class(table[row]["document_id"])
            raise DatasetError(
                f"The files of {len(lost)} pages are missing, e.g. {path!r:.200} of {item_of(item_id)} {item_id!r}. "
                f"Pages are stored with the dataset. Restore the file, or leave the {item_of(item_id)} out."
            )


def _require_inside(corpus: Dataset, id_class: type[str], path: Path | None) -> None:
    """Make sure that a table that was loaded names no image elsewhere: it may come from anybody.

    Args:
        corpus: The documents.
        id_class: What their ids are, as for ``EncodedImages``.
        path: Where the table was loaded from; ``None`` is the Hub, whose files lie in the caches of the client.

    Raises:
        DatasetError: A path leads out of the folder; the message names it.
    """
    if path is None:
        roots = [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE]
    else:
        roots = [path if path.is_dir() else path.parent]
    allowed = tuple(f"{os.path.realpath(root)}{os.sep}" for root in roots)
    found = ((row, file) for row, file, length in _outside_images(corpus) if length >= 0)
    outside = [(row, file) for row, file in found if not os.path.realpath(file).startswith(allowed)]
    if outside:
        row, file = outside[0]
        item_id = id_class(corpus[row]["document_id"])
        raise DatasetError(
            f"{len(outside)} images lie outside the folder of the table, e.g. {file!r} of {item_of(item_id)} "
            f"{item_id!r}. A table from elsewhere could read any file of this machine. Move the images below "
            "the table's folder, or call RetrievalDataset.load(..., allow_outside=True) for a table that you trust."
        )
