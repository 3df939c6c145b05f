"""How documents are kept: fewer numbers a vector, fewer bits a number, fewer vectors; and what is read back of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xxhash
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from sentence_transformers.util import SimilarityFunction, dot_score

from mmtune.inference.encoder import Retriever
from mmtune.inference.store import Embeddings
from mmtune.inference.vectors import Vectors, dequantize, quantize

DType: TypeAlias = Literal["float32", "int8", "binary"]
"""What a number of a kept vector is; the host's words."""

DTYPES: tuple[DType, ...] = get_args(DType)


@dataclass(frozen=True)
class Encoded:
    """A dataset as a model sees it, at full size.

    Attributes:
        model: The model.
        queries: Of the evaluated dataset.
        documents: Likewise.
        ranged: The documents that give the ranges of int8; may be ``documents`` itself.
    """

    model: Retriever
    queries: Vectors
    documents: Embeddings
    ranged: Embeddings

    @property
    def compares_angles(self) -> bool:
        """Whether the model compares by cosine, so that vectors are kept at length 1."""
        return self.model.similarity_fn_name == SimilarityFunction.COSINE.value

    @property
    def similarity(self) -> Callable[[Any, Any], torch.Tensor]:
        """The model's; of length 1, cosines are products, and what int8 makes a little longer stays so.

        The host compares like that where it compares again with what it kept, and so does an index.
        """
        return dot_score if self.compares_angles else self.model.similarity


@dataclass(frozen=True)
class KeptDocuments:
    """Documents as an index keeps them.

    Attributes:
        read: What a query is compared with: the kept numbers as floats, of documents of different content.
        which: For each document its place in ``read``: where two are kept as the same, their scores are equal to the
            bit, which a matrix product by itself does not promise.
        bytes_per_document: Their mean size.
    """

    read: Embeddings
    which: np.ndarray
    bytes_per_document: float

    def compare(self, similarity: Callable[[Embeddings, Embeddings], torch.Tensor], queries: Embeddings) -> np.ndarray:
        """The scores of queries by documents, float32, shape ``(queries, documents)``."""
        return similarity(queries, self.read).float().cpu().numpy()[:, self.which]


def keep_documents(documents: Vectors, dtype: DType, ranges: np.ndarray) -> KeptDocuments:
    """Documents quantised by the host, and read back as what a float query is compared with.

    Args:
        documents: At the size that is kept.
        dtype: What is kept of a number.
        ranges: The smallest and the largest number of each dimension, for ``int8``; what lies beyond is clipped.
    """
    values = documents.values.cpu().numpy()
    codes = quantize(values, dtype, ranges)
    read = dequantize(codes, dtype, dim=values.shape[1], ranges=ranges)
    counts = documents.counts or (1,) * len(values)
    ends = list(accumulate(counts))
    place_by_content: dict[bytes, int] = {}
    which = np.array(
        [
            place_by_content.setdefault(
                xxhash.xxh3_128_digest(codes[end - count : end].tobytes()), len(place_by_content)
            )
            for end, count in zip(ends, counts, strict=True)
        ]
    )
    first = np.unique(which, return_index=True)[1]
    table = torch.from_numpy(read).to(documents.values.device)
    if documents.counts is None:
        distinct: Embeddings = table[torch.from_numpy(first)]
    else:
        parts = torch.split(table, list(documents.counts))
        distinct = [parts[at] for at in first.tolist()]
    return KeptDocuments(distinct, which, codes.nbytes / len(counts))


def keep_each(
    encoded: Encoded, dims: Sequence[int], dtypes: Sequence[DType], factors: Sequence[int | None]
) -> Iterator[tuple[tuple[int, DType, int | None], Embeddings, KeptDocuments]]:
    """Each combination as ``(dim, dtype, factor)``, with the queries that go with it and the documents as kept."""
    is_late = isinstance(encoded.model, MultiVectorEncoder)
    for factor in factors:
        documents = ranged = Vectors.of(_pool(encoded.documents, factor))
        if encoded.ranged is not encoded.documents:
            ranged = Vectors.of(_pool(encoded.ranged, factor))
        for dim in dims:
            # MaxSim takes vectors as they are, of length 1 where the model made them so: a cut must not change that
            is_cut = dim < encoded.queries.values.shape[1]
            normalizes = is_cut if is_late else encoded.compares_angles
            asking, kept, seen = (each.cut(dim, normalizes=normalizes) for each in (encoded.queries, documents, ranged))
            for dtype in dtypes:
                yield (dim, dtype, factor), asking.embeddings, keep_documents(kept, dtype, seen.ranges)


def _pool(documents: Embeddings, factor: int | None) -> Embeddings:
    """Fewer vectors a document, by the host's own pooling; with 1 the vectors stay as the model gives them."""
    if factor is None or factor == 1 or isinstance(documents, torch.Tensor):
        return documents
    return HierarchicalTokenPooling(factor).pool(documents)
