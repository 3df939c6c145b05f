"""What encodes the documents of a shard, and writes it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from mmtune.errors import ConfigError, DatasetError
from mmtune.inference.encoder import DatasetReader, Retriever, as_float32, encode, join
from mmtune.inference.shards import EMBEDDING, KEY, POOLED, Encoding, Shard, ShardFolder, metadata_columns
from mmtune.inference.store import Embeddings
from mmtune.inference.vectors import Vectors, quantize

_CPU = torch.device("cpu")
_SAMPLE = 1024
"""Documents of the corpus that give the ranges of int8."""


@dataclass(frozen=True)
class ShardWriter:
    """A model at work on the shards of a corpus.

    Attributes:
        model: The model.
        reader: Gives the documents.
        encoding: How they are encoded.
        batch_size: Documents a forward pass; the batches of a shard are the same whoever writes it.
        folder: Where shards go.
    """

    model: Retriever
    reader: DatasetReader
    encoding: Encoding
    batch_size: int
    folder: ShardFolder

    def write(self, shard: Shard, advance: Callable[[int], object] = lambda _: None) -> int:
        """Encode the documents of a shard and write it; ``advance`` gets the number of each portion.

        Returns:
            How many documents it has.
        """
        ids, parts = self.reader.corpus["document_id"][shard.rows], []
        for part in encode(self.model, "document", ids, self.reader, batch_size=self.batch_size):
            parts.append(as_float32(part, _CPU))
            advance(len(part))
        vectors = vectors_of(join(parts), self.encoding)
        self.folder.write(shard, shard_table(self.reader, shard, vectors, self.encoding, self.folder.ranges()))
        return len(ids)

    def save_ranges(self, calibration: DatasetReader | None, show_progress_bar: bool) -> None:
        """Find the ranges of int8 in documents, and keep them; those by which there are shards stay.

        Args:
            calibration: The documents; ``None`` takes a sample from the whole of the corpus.
            show_progress_bar: Whether to show a bar.

        Raises:
            ConfigError: There are too few vectors for a range.
        """
        if self.folder.ranges() and self.folder.file_names():
            return
        reader, ids = calibration or self.reader, (calibration or self.reader).corpus["document_id"][:]
        if calibration is None:
            ids = [ids[row] for row in np.linspace(0, len(ids) - 1, min(len(ids), _SAMPLE)).astype(int).tolist()]
        ranges: dict[str, np.ndarray] = {}
        seen = 0
        with tqdm(total=len(ids), desc="Calibrating int8", disable=not show_progress_bar, leave=False) as bar:
            for part in encode(self.model, "document", ids, reader, batch_size=self.batch_size):
                for name, vectors in vectors_of(as_float32(part, _CPU), self.encoding).items():
                    both = vectors.ranges if name not in ranges else np.concatenate([ranges[name], vectors.ranges])
                    ranges[name] = np.stack([both.min(axis=0), both.max(axis=0)])
                seen += len(part)
                bar.update(len(part))
        if seen < 2:
            raise ConfigError(
                "dtype='int8' needs the ranges of several documents, and there is one. Pass calibration=, a dataset of "
                "documents like these, or dtype='float16'."
            )
        self.folder.save_ranges(ranges)


def vectors_of(embeddings: Embeddings, encoding: Encoding) -> dict[str, Vectors]:
    """The columns of vectors of a shard, as floats and cut as asked.

    Cut vectors have length 1 where they are compared by their angle, and so have those of late interaction. Its pooled
    vector is the mean of a document's, at length 1, after the cut.

    Raises:
        ConfigError: The model gives fewer numbers than asked for.
    """
    vectors = Vectors.of(embeddings)
    full, is_late = vectors.values.shape[1], vectors.counts is not None
    if encoding.dim is not None and encoding.dim > full:
        raise ConfigError(f"dim={encoding.dim} is larger than the {full} numbers that the model gives. Pass dim=None.")
    if encoding.dim is not None and encoding.dim < full:
        vectors = vectors.cut(encoding.dim, normalizes=is_late or encoding.similarity == "cosine")
    if vectors.counts is None:
        return {EMBEDDING: vectors}
    # the sum has the angle of the mean, and is a number also where a document has no vectors
    sums = torch.stack([part.sum(dim=0) for part in vectors.embeddings])
    return {EMBEDDING: vectors, POOLED: Vectors(normalize(sums, dim=1))}


def shard_table(
    reader: DatasetReader,
    shard: Shard,
    vectors: Mapping[str, Vectors],
    encoding: Encoding,
    ranges: Mapping[str, np.ndarray],
) -> pa.Table:
    """A shard as a table: ids, vectors as they are kept, metadata; what they are stands in the schema.

    Raises:
        DatasetError: A number is too large for float16.
    """
    rows = reader.corpus.select_columns(["document_id", *metadata_columns(reader)]).with_format("arrow")[shard.rows]
    columns: dict[str, Any] = {"document_id": rows["document_id"]}
    for name, column in vectors.items():
        codes = quantize(column.values.numpy(), encoding.dtype, ranges.get(name))
        if encoding.dtype == "float16" and not np.isfinite(codes).all():
            raise DatasetError(
                f"The model gives numbers of up to {column.values.abs().max():.0f}, and float16 ends at 65504. Pass "
                "dtype='float32'."
            )
        flat = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
        if column.counts is not None:
            offsets = np.concatenate([[0], np.cumsum(column.counts)]).astype(np.int32)
            flat = pa.ListArray.from_arrays(pa.array(offsets), flat)
        columns[name] = flat
    columns |= {name: rows[name] for name in rows.column_names[1:]}
    said = {
        "fingerprint": shard.fingerprint,
        "dtype": encoding.dtype,
        "dim": int(vectors[EMBEDDING].values.shape[1]),
        "model": encoding.model,
        "digests": shard.digests,
    }
    return pa.table(columns).replace_schema_metadata({KEY: json.dumps(said)})
