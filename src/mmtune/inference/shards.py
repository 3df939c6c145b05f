"""Embeddings of a corpus in a folder of parquet files, and what says of which documents and how they were made."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from mmtune.arguments import require_path
from mmtune.data.arrow import ENCODED
from mmtune.data.documents import DocumentKind
from mmtune.data.identity import text_digest
from mmtune.errors import ConfigError, DatasetError
from mmtune.inference.encoder import SHARD_SIZE, DatasetReader, as_float32, portions_of
from mmtune.inference.store import Embeddings, delete_partials, model_fingerprint, write_whole, writing_to
from mmtune.inference.vectors import NumberType, dequantize

logger = logging.getLogger(__name__)

EMBEDDING, POOLED = "embedding", "pooled_embedding"
KEY = b"mmtune"
"""Where the schema of a shard says what it holds."""
_ENCODING, _RANGES, _LIST = "_encoding.json", "_ranges.json", "_shards.json"
_SHARD_NAME = re.compile(r"\d{6}-[0-9a-f]{16}\.parquet")
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Encoding:
    """How the documents of a folder are embedded and kept: what all calls that write into it must share.

    Attributes:
        model: The fingerprint of the model, its prompts and pixel limits among it.
        documents: What a document is made of.
        similarity: How the model compares, e.g. ``"cosine"``.
        dtype: What is kept of a number.
        dim: Numbers a vector; ``None`` for all that the model gives.
        shard_size: Documents a shard.
        calibration: A digest of the documents that give the ranges of int8; ``None`` for a sample of the corpus.
    """

    model: str
    documents: DocumentKind
    similarity: str
    dtype: NumberType
    dim: int | None
    shard_size: int
    calibration: str | None


@dataclass(frozen=True)
class Shard:
    """A run of documents, and the file that holds their embeddings.

    Attributes:
        file_name: With the start of ``fingerprint``, so that a changed document gives another file.
        fingerprint: A digest of the encoding and of the documents with their ids and metadata.
        start: The first row of the corpus.
        digests: Of the content of each document.
    """

    file_name: str
    fingerprint: str
    start: int
    digests: tuple[str, ...]

    @property
    def rows(self) -> slice:
        """The rows of the corpus."""
        return slice(self.start, self.start + len(self.digests))


def metadata_columns(reader: DatasetReader) -> list[str]:
    """What a shard repeats of the corpus beside the ids.

    Raises:
        DatasetError: A column has the name of one of the embeddings.
    """
    # ids stand in every shard anyway, encoded media in none
    names = [name for name in reader.corpus.column_names if name not in ("document_id", *ENCODED)]
    taken = [name for name in names if name in (EMBEDDING, POOLED)]
    if taken:
        raise DatasetError(
            f"The corpus has a column {taken[0]!r}, which is what a shard calls its vectors. Rename it: "
            f"corpus.rename_column({taken[0]!r}, 'old_{taken[0]}')."
        )
    return names


def digest_documents(reader: DatasetReader, show_progress_bar: bool) -> list[str]:
    """A digest of the content of each document of a corpus; every one is read, none is decoded."""
    found: list[str] = []
    ids = reader.corpus["document_id"][:]
    with tqdm(total=len(ids), desc="Reading documents", disable=not show_progress_bar, leave=False) as bar:
        # many at once, as each call looks at the whole table
        for portion in portions_of(ids, 1 << 14):
            found += reader.digests("document", portion)
            bar.update(len(portion))
    return found


def plan_shards(reader: DatasetReader, encoding: Encoding, show_progress_bar: bool) -> list[Shard]:
    """The shards of a corpus, in its order."""
    how, names, ids = repr(asdict(encoding)), metadata_columns(reader), reader.corpus["document_id"][:]
    all_digests = digest_documents(reader, show_progress_bar)
    table = reader.corpus.select_columns(names).with_format("arrow") if names else None
    shards = []
    for start in range(0, len(ids), encoding.shard_size):
        own = ids[start : start + encoding.shard_size]
        digests = all_digests[start : start + len(own)]
        rows = None if table is None else table[start : start + len(own)]
        # not the schema: the metadata of datasets in it differ for equal tables
        about = None if rows is None else rows.to_pydict()
        fingerprint = text_digest(repr((_FORMAT_VERSION, how, own, digests, about)))
        name = f"{len(shards):06d}-{fingerprint[:16]}.parquet"
        shards.append(Shard(name, fingerprint, start, tuple(digests)))
    return shards


class ShardFolder:
    """A folder of shards; its other files begin with ``_``, so that engines that read folders of parquet skip them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, encoding: Encoding) -> None:
        """Make the folder, and have it say how its documents are encoded.

        Raises:
            ConfigError: It holds documents that are encoded otherwise, or something else, or can't be written to.
        """
        self._require_own()
        found = self._read(_ENCODING)
        if self.file_names() and found != asdict(encoding):
            raise ConfigError(self._why_not(found, encoding))
        if found != asdict(encoding):
            with writing_to(self.path):
                (self.path / _RANGES).unlink(missing_ok=True)
            self._write(_ENCODING, asdict(encoding))
        with writing_to(self.path):
            delete_partials(self.path)

    def require_kin(self, shards: Sequence[Shard]) -> None:
        """Make sure that shards of another corpus are not written over.

        Raises:
            ConfigError: There are shards, and none is one of these.
        """
        there = self.file_names()
        if there and not there & {shard.file_name for shard in shards}:
            raise ConfigError(
                f"{str(self.path)!r} holds {len(there)} shards of other documents, or of these in another order: none "
                "of them is one of this dataset. Pass another folder, or delete this one."
            )

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those that are not there; damaged ones are logged."""
        return [shard for shard in shards if not self._has(shard)]

    def write(self, shard: Shard, table: pa.Table) -> None:
        """Add a shard, whole.

        Raises:
            ConfigError: The folder can't be written to.
        """
        with writing_to(self.path):
            write_whole(self.path / shard.file_name, lambda partial: pq.write_table(table, partial))

    def finish(self, shards: Sequence[Shard]) -> None:
        """List the shards, and take away those of documents that have changed or gone."""
        listed = {shard.file_name: len(shard.digests) for shard in shards}
        self._write(_LIST, {"num_documents_by_file": listed})
        old = sorted(self.file_names() - listed.keys())
        if old:
            logger.warning(
                "%d shards in %s, e.g. %s, held documents that have changed or are gone, and are deleted.",
                len(old),
                self.path,
                old[0],
            )
        for name in old:
            (self.path / name).unlink(missing_ok=True)

    def file_names(self) -> set[str]:
        """The shards that are there, listed or not."""
        return {path.name for path in self.path.glob("*.parquet") if _SHARD_NAME.fullmatch(path.name)}

    def listed(self) -> list[Path]:
        """The files of the corpus, in its order.

        Raises:
            ConfigError: The folder holds no shards, or not all of them yet.
        """
        found = self._read(_LIST)
        if found is None:
            raise ConfigError(
                f"{str(self.path)!r} holds no shards, or not all of them: encode_corpus writes {_LIST} when it is "
                "done. Pass the folder that it returned, or call it again to go on."
            )
        paths = [self.path / name for name in found["num_documents_by_file"]]
        gone = [path.name for path in paths if not path.is_file()]
        if gone:
            raise ConfigError(f"{str(self.path)!r} lacks the shard {gone[0]!r}. Call encode_corpus again to make it.")
        return paths

    def encoding(self) -> Encoding:
        """How its documents are encoded.

        Raises:
            ConfigError: The folder doesn't say it.
        """
        found = self._read(_ENCODING)
        if found is None:
            raise ConfigError(f"{str(self.path)!r} has no {_ENCODING}. Pass a folder that encode_corpus wrote.")
        return Encoding(**found)

    def save_ranges(self, ranges: Mapping[str, np.ndarray]) -> None:
        """Keep the ranges of int8, by column."""
        self._write(_RANGES, {name: values.tolist() for name, values in ranges.items()})

    def ranges(self) -> dict[str, np.ndarray]:
        """The ranges of int8 by column, float32, shape ``(2, dimension)``; empty where there are none."""
        found = self._read(_RANGES) or {}
        return {name: np.array(values, dtype=np.float32) for name, values in found.items()}

    def _require_own(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"folder={str(self.path)!r} is a file. Pass a new folder.")
        if (self.path / _ENCODING).is_file() or not self.path.is_dir():
            return
        foreign = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("_"))
        if foreign:
            raise ConfigError(
                f"folder={str(self.path)!r} holds {foreign[0]!r} and no {_ENCODING}: it is not one of encode_corpus. "
                "Pass a new folder."
            )

    def _why_not(self, found: dict[str, Any] | None, encoding: Encoding) -> str:
        asked = asdict(encoding)
        names = [name for name in asked if (found or {}).get(name) != asked[name]]
        said = ", ".join(f"{name}={(found or {}).get(name)!r} (this call: {asked[name]!r})" for name in names)
        return (
            f"folder={str(self.path)!r} holds documents that are encoded otherwise: {said}. The fingerprint of a model "
            "covers its weights, prompts and pixel limits. Pass another folder, or delete this one."
        )

    def _has(self, shard: Shard) -> bool:
        path = self.path / shard.file_name
        if not path.is_file():
            return False
        try:
            said = said_in(pq.read_metadata(path).metadata)
            if said["fingerprint"] == shard.fingerprint:
                return True
            reason = "it is of another fingerprint"
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = str(error)
        logger.warning("The shard %s can't be used (%s) and is made again.", path, reason)
        return False

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
            return found if found.pop("format_version") == _FORMAT_VERSION else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            logger.warning("%s can't be read: %r.", self.path / name, error)
            return None

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps({"format_version": _FORMAT_VERSION, **content}, indent=2) + "\n"
        with writing_to(self.path):
            write_whole(self.path / name, lambda partial: partial.write_text(text, encoding="utf-8"))


def said_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What a shard says of itself in its schema."""
    return json.loads((metadata or {})[KEY])


def read_shards(folder: str | os.PathLike[str]) -> Iterator[pa.Table]:
    """The shards that ``encode_corpus`` wrote, one at a time in the order of the corpus, with vectors as float32.

    Those of int8 are read back by the ranges of the folder, and of binary ones the signs, as -1 and +1; so a float
    query is compared with them. ``pyarrow.parquet.read_table(folder)`` gives the vectors as they are kept.

    Args:
        folder: What ``encode_corpus`` returned.

    Returns:
        Tables of ``document_id``, ``embedding``, and what else the shards hold.

    Raises:
        ConfigError: The folder holds no shards, or not all of them yet.

    Example:
        >>> from mmtune import encode_corpus, load_model, read_shards
        >>> folder = encode_corpus("pages.parquet", load_model("my-model"), "int8", dtype="int8", batch_size=8)
        >>> [table.column_names for table in read_shards(folder)]
        [['document_id', 'embedding', 'language']]
    """
    require_path("folder", folder, what="the folder of encode_corpus")
    found = ShardFolder(Path(folder))
    paths, ranges = found.listed(), found.ranges()
    return (_as_floats(pq.read_table(path), ranges) for path in paths)


def _as_floats(table: pa.Table, ranges: Mapping[str, np.ndarray]) -> pa.Table:
    """A shard with vectors of float32."""
    said = said_in(table.schema.metadata)
    for name in (EMBEDDING, POOLED):
        if name not in table.column_names:
            continue
        codes, offsets = _codes(table[name])
        values = dequantize(codes, said["dtype"], dim=said["dim"], ranges=ranges.get(name))
        flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), said["dim"])
        read = flat if offsets is None else pa.ListArray.from_arrays(pa.array(offsets), flat)
        table = table.set_column(table.column_names.index(name), name, read)
    return table


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray | None]:
    """A column of vectors as one table of numbers, and where each document begins if it has several."""
    values = column.combine_chunks()
    offsets = None
    if isinstance(values, pa.ListArray):
        offsets = values.offsets.to_numpy()
        values = values.flatten()
        offsets = offsets - offsets[0]
    return values.flatten().to_numpy().reshape(len(values), values.type.list_size), offsets


class StoredDocuments:
    """The embeddings of a folder, by the content of the documents.

    Args:
        folder: What ``encode_corpus`` returned.
        model: The fingerprint of the model that asks.
        documents: What a document is made of for the one who asks.

    Raises:
        ConfigError: The folder holds no shards, or those of another model or kind of documents, or cut ones.
    """

    def __init__(self, folder: str | os.PathLike[str], model: str, documents: DocumentKind) -> None:
        require_path("embeddings", folder, what="the folder of encode_corpus")
        found = ShardFolder(Path(folder))
        self._paths, encoding = found.listed(), found.encoding()
        asked = {"model": model, "documents": documents, "dtype": "float32", "dim": None}
        for name, value in asked.items():
            if getattr(encoding, name) != value:
                raise ConfigError(
                    f"embeddings={str(folder)!r} is of {name}={getattr(encoding, name)!r}, and {value!r} is "
                    "needed. Call encode_corpus with this model and these documents, in float32 and at full size, into "
                    "another folder."
                )
        self._folder = folder
        self._place_by_digest: dict[str, tuple[int, int]] = {}
        for at, path in enumerate(self._paths):
            for row, digest in enumerate(said_in(pq.read_metadata(path).metadata)["digests"]):
                self._place_by_digest.setdefault(digest, (at, row))
        self._is_late = POOLED in pq.read_schema(self._paths[0]).names
        self._held: tuple[int, Embeddings] | None = None

    def read_all(self, ids: Sequence[str], reader: DatasetReader, device: torch.device) -> Iterator[Embeddings]:
        """The embeddings of documents in their order, ``SHARD_SIZE`` at a time, as ``encode_shards`` gives them.

        Raises:
            DatasetError: A document is not there, or has changed since.
        """
        for portion in portions_of(ids, SHARD_SIZE):
            yield as_float32(self._read(portion, reader.digests("document", portion)), device)

    def _read(self, ids: Sequence[str], digests: Sequence[str]) -> Embeddings:
        unknown = [name for name, digest in zip(ids, digests, strict=True) if digest not in self._place_by_digest]
        if unknown:
            raise DatasetError(
                f"embeddings={str(self._folder)!r} lacks {len(unknown)} documents of the dataset, e.g. {unknown[0]!r}, "
                "or they have changed since. Call encode_corpus with this dataset again."
            )
        places = [self._place_by_digest[digest] for digest in digests]
        # file by file, so that each is read once a portion
        part_by_place = {place: self._shard(place[0])[place[1]] for place in sorted(set(places))}
        parts = [part_by_place[place] for place in places]
        return parts if self._is_late else torch.stack(parts)

    def _shard(self, at: int) -> Embeddings:
        if self._held is None or self._held[0] != at:
            values, offsets = _codes(pq.read_table(self._paths[at], columns=[EMBEDDING])[EMBEDDING])
            found = torch.from_numpy(values.copy())
            self._held = (at, found if offsets is None else list(torch.split(found, np.diff(offsets).tolist())))
        return self._held[1]


def find_stored(
    folders: Sequence[str | os.PathLike[str]], model: torch.nn.Module, documents: DocumentKind
) -> StoredDocuments | None:
    """The documents that a model has encoded into one of several folders; ``None`` where it is in none.

    Raises:
        ConfigError: A folder holds no shards, or those of this model are cut or quantised.
    """
    fingerprint = model_fingerprint(model) if folders else ""
    encodings = [(folder, ShardFolder(Path(folder)).encoding()) for folder in folders]
    own = [(folder, encoding) for folder, encoding in encodings if encoding.model == fingerprint]
    whole = [each for each in own if (each[1].documents, each[1].dtype, each[1].dim) == (documents, "float32", None)]
    return next((StoredDocuments(folder, fingerprint, documents) for folder, _ in whole or own), None)
