"""Datasets on disk and on the Hub."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset, load_from_disk

from mmtune.data.layouts import build_from_beir, build_from_known_layout
from mmtune.data.tables import BuildNotes, Tables
from mmtune.errors import ConfigError, DatasetError

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
    try:
        for name, table in named.items():
            if table is not None:
                table.save_to_disk(path / name)
    except FileNotFoundError as error:
        raise DatasetError(
            f"The file of a page is missing: {error}. Pages are stored with the dataset. Restore the file, or leave "
            "the document out."
        ) from error
    # Last, so that a folder with a manifest is whole.
    manifest = {"format_version": _FORMAT_VERSION, "notes": asdict(tables.notes)}
    (path / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_tables(
    name_or_path: str | os.PathLike[str], config: str | None, *, split: str | None, revision: str | None
) -> Tables:
    """The tables of what ``save_tables`` wrote, or of rows in a known layout; see ``RetrievalDataset.load``.

    Raises:
        ConfigError: A configuration, split or revision is named of what has none.
        DatasetError: There is nothing, it can't be read, it has several splits and none was named, or its columns are
            no known layout.
    """
    path = Path(name_or_path)
    if (path / _MANIFEST).is_file():
        if config or split or revision:
            raise ConfigError(
                f"{str(name_or_path)!r} was written by save() and has no configurations, splits or revisions. "
                "Leave config, split and revision out."
            )
        return _load_saved(path)
    try:
        if path.is_file():
            loaded = _pick_split(load_dataset("parquet", data_files=str(path)), str(path), split)
        elif path.is_dir():
            loaded = _load_folder(path, config, split)
        else:
            loaded = _load_from_hub(str(name_or_path), config, split, revision)
    except DatasetError:
        raise
    except Exception as error:  # the Hub client and the readers raise many kinds; the name is what the user can mend
        raise DatasetError(
            f"{str(name_or_path)!r} could not be loaded: {type(error).__name__}: {error}. Expected a folder written by "
            "save(), a parquet file or a folder of them, or the name of a dataset on the Hub."
        ) from error
    return build_from_known_layout(loaded) if isinstance(loaded, Dataset) else build_from_beir(**loaded)


def _load_saved(path: Path) -> Tables:
    """The tables of a folder that ``save_tables`` wrote, memory-mapped."""
    manifest = json.loads((path / _MANIFEST).read_text())
    if manifest["format_version"] > _FORMAT_VERSION:
        raise DatasetError(
            f"{str(path)!r} has format version {manifest['format_version']}; this mmtune reads up to "
            f"{_FORMAT_VERSION}. Update mmtune."
        )
    notes = dict(manifest["notes"])
    notes["unknown_examples"] = tuple((query, negative) for query, negative in notes["unknown_examples"])
    named = {
        name: load_from_disk(str(path / name)) if (path / name).is_dir() else None for name in (*_BEIR, "negatives")
    }
    missing = [name for name in _BEIR if named[name] is None]
    if missing:
        raise DatasetError(
            f"{str(path)!r} has a manifest and no table {missing[0]!r}: it is not whole. Save the dataset again."
        )
    return Tables(**named, notes=BuildNotes(**notes))


def _load_folder(path: Path, config: str | None, split: str | None) -> Dataset | dict[str, Dataset]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = load_from_disk(str(path))
        return loaded if isinstance(loaded, Dataset) else _pick_split(loaded, str(path), split)
    patterns = ("{}.parquet", "{}/*.parquet", "{}-*.parquet")
    files_by_table = {
        name: sorted(str(file) for pattern in patterns for file in path.glob(pattern.format(name))) for name in _BEIR
    }
    if config is None and all(files_by_table.values()):
        return {
            name: _pick_split(load_dataset("parquet", data_files=files), f"{path}/{name}", split)
            for name, files in files_by_table.items()
        }
    if not any(path.rglob("*.parquet")):
        found = sorted(entry.name for entry in path.iterdir())[:10]
        raise DatasetError(f"The folder {str(path)!r} holds no parquet file and no saved dataset; it has {found}.")
    return _pick_split(load_dataset(str(path), config), str(path), split)


def _load_from_hub(
    name: str, config: str | None, split: str | None, revision: str | None
) -> Dataset | dict[str, Dataset]:
    if config is None and set(_BEIR) <= set(get_dataset_config_names(name, revision=revision)):
        return {
            table: _pick_split(load_dataset(name, table, revision=revision), f"{name}, {table}", split)
            for table in _BEIR
        }
    return _pick_split(load_dataset(name, config, revision=revision), name, split)


def _pick_split(loaded: DatasetDict, name: str, split: str | None) -> Dataset:
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DatasetError(
            f"{name!r} has the splits {list(loaded)}, and split={split!r} was asked for. Name one of them."
        )
    return loaded[split]
