"""Datasets on disk and on the Hub."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset, load_from_disk

from mmtune.data.tables import BuildNotes, Tables
from mmtune.errors import DatasetError

_MANIFEST = "mmtune_dataset.json"
_FORMAT_VERSION = 1
_BEIR = ("corpus", "queries", "qrels")


def save_tables(tables: Tables, folder: str | os.PathLike[str]) -> None:
    """The tables as Arrow files below ``folder``, images encoded as they are.

    Raises:
        DatasetError: ``folder`` holds something already.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DatasetError(f"{str(path)!r} is not empty. Save to a new folder, or remove what is there.")
    named = {"corpus": tables.corpus, "queries": tables.queries, "qrels": tables.qrels, "negatives": tables.negatives}
    for name, table in named.items():
        if table is not None:
            _save_table(table, path / name)
    # Last, so that a folder with a manifest is whole.
    manifest = {"format_version": _FORMAT_VERSION, "notes": asdict(tables.notes)}
    (path / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _save_table(table: Dataset, folder: Path) -> None:
    try:
        table.save_to_disk(folder)
    except FileNotFoundError as error:
        raise DatasetError(
            f"The file of a page is missing: {error}. Pages are stored with the dataset. Restore the file, or leave "
            "the document out."
        ) from error


def is_saved(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether ``save_tables`` wrote this folder."""
    return (Path(name_or_path) / _MANIFEST).is_file()


def load_tables(folder: str | os.PathLike[str]) -> Tables:
    """The tables of a folder that ``save_tables`` wrote, memory-mapped.

    Raises:
        DatasetError: The folder was written by a newer version.
    """
    path = Path(folder)
    manifest = json.loads((path / _MANIFEST).read_text())
    if manifest["format_version"] > _FORMAT_VERSION:
        raise DatasetError(
            f"{str(path)!r} has format version {manifest['format_version']}; this mmtune reads up to "
            f"{_FORMAT_VERSION}. Update mmtune."
        )
    notes = dict(manifest["notes"])
    notes["unknown_examples"] = tuple((query, negative) for query, negative in notes["unknown_examples"])
    named = {
        name: load_from_disk(str(path / name)) if (path / name).is_dir() else None
        for name in ("corpus", "queries", "qrels", "negatives")
    }
    missing = [name for name in ("corpus", "queries", "qrels") if named[name] is None]
    if missing:
        raise DatasetError(
            f"{str(path)!r} has a manifest and no table {missing[0]!r}: it is not whole. Save the dataset again."
        )
    return Tables(**named, notes=BuildNotes(**notes))


def load(
    name_or_path: str | os.PathLike[str], config: str | None, *, split: str | None, revision: str | None
) -> Dataset | dict[str, Dataset]:
    """The rows of a parquet file, a folder of parquet files, a saved ``datasets`` folder or a Hub dataset.

    Returns:
        One table, or ``corpus``, ``queries`` and ``qrels`` where the folder or the Hub dataset has these.

    Raises:
        DatasetError: There is nothing, it can't be read, or it has several splits and none was named.
    """
    path = Path(name_or_path)
    try:
        if path.is_file():
            return _one_split(load_dataset("parquet", data_files=str(path)), str(path), split)
        if path.is_dir():
            return _load_folder(path, config, split)
        return _load_from_hub(str(name_or_path), config, split, revision)
    except DatasetError:
        raise
    except Exception as error:  # the Hub client and the readers raise many kinds; the name is what the user can mend
        raise DatasetError(
            f"{str(name_or_path)!r} could not be loaded: {type(error).__name__}: {error}. Expected a folder written by "
            "save(), a parquet file or a folder of them, or the name of a dataset on the Hub."
        ) from error


def _load_folder(path: Path, config: str | None, split: str | None) -> Dataset | dict[str, Dataset]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = load_from_disk(str(path))
        return loaded if isinstance(loaded, Dataset) else _one_split(loaded, str(path), split)
    files_by_table = {name: _parquet_files(path, name) for name in _BEIR}
    if config is None and all(files_by_table.values()):
        return {
            name: _one_split(load_dataset("parquet", data_files=files), f"{path}/{name}", split)
            for name, files in files_by_table.items()
        }
    if not any(path.rglob("*.parquet")):
        found = sorted(entry.name for entry in path.iterdir())[:10]
        raise DatasetError(f"The folder {str(path)!r} holds no parquet file and no saved dataset; it has {found}.")
    return _one_split(load_dataset(str(path), config), str(path), split)


def _parquet_files(folder: Path, table: str) -> list[str]:
    """The files of one of the three tables: ``corpus.parquet``, ``corpus/*.parquet`` or ``corpus-*.parquet``."""
    patterns = (f"{table}.parquet", f"{table}/*.parquet", f"{table}-*.parquet")
    return sorted(str(path) for pattern in patterns for path in folder.glob(pattern))


def _load_from_hub(
    name: str, config: str | None, split: str | None, revision: str | None
) -> Dataset | dict[str, Dataset]:
    if config is None and set(_BEIR) <= set(get_dataset_config_names(name, revision=revision)):
        return {
            table: _one_split(load_dataset(name, table, revision=revision), f"{name}, {table}", split)
            for table in _BEIR
        }
    return _one_split(load_dataset(name, config, revision=revision), name, split)


def _one_split(loaded: DatasetDict, name: str, split: str | None) -> Dataset:
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DatasetError(
            f"{name!r} has the splits {list(loaded)}, and split={split!r} was asked for. Name one of them."
        )
    return loaded[split]
