"""Embeddings as tables of vectors: cut to fewer numbers, of fewer bits, and read back."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from sentence_transformers.util import quantize_embeddings
from torch.nn.functional import normalize

from mmtune.inference.store import Embeddings

NumberType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
"""What a number of a kept vector is; the host's words, and halves."""


@dataclass(frozen=True)
class Vectors:
    """Embeddings as one table of vectors, whether an item has one or one a token.

    Attributes:
        values: float32, shape ``(vectors, dimension)``.
        counts: The number of vectors of each item; ``None`` where each has one.
    """

    values: torch.Tensor
    counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, embeddings: Embeddings) -> "Vectors":
        """Those of a retriever: a tensor, or a list of a tensor an item."""
        if isinstance(embeddings, torch.Tensor):
            return cls(embeddings)
        return cls(torch.cat(embeddings), tuple(map(len, embeddings)))

    @property
    def embeddings(self) -> Embeddings:
        """As the retriever gave them, and as its similarity takes them."""
        return self.values if self.counts is None else list(torch.split(self.values, list(self.counts)))

    def cut(self, dim: int, *, normalizes: bool) -> "Vectors":
        """The first ``dim`` numbers of each vector, brought to length 1 where they are compared by their angle."""
        short = self.values[:, :dim]
        return replace(self, values=normalize(short, dim=1) if normalizes else short)

    @cached_property
    def ranges(self) -> np.ndarray:
        """The smallest and the largest number of each dimension, float32, shape ``(2, dimension)``."""
        return torch.stack([self.values.amin(dim=0), self.values.amax(dim=0)]).cpu().numpy()


def quantize(values: np.ndarray, dtype: NumberType, ranges: np.ndarray | None = None) -> np.ndarray:
    """Vectors as they are kept, quantised by the host.

    Args:
        values: float32, shape ``(vectors, dimension)``.
        dtype: What is kept of a number. Of ``"binary"`` the bits stand eight a byte, without the offset of 128 that the
            host's word means; so most indexes read them.
        ranges: The smallest and the largest number of each dimension, for ``int8``; what lies beyond is clipped.

    Returns:
        Of the type of ``dtype``, uint8 for ``"binary"``; shape ``(vectors, dimension)`` or an eighth, rounded up. What
        float16 can't hold is infinite.
    """
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    precision = "ubinary" if dtype == "binary" else dtype
    return np.asarray(quantize_embeddings(values, precision, ranges=ranges))


def dequantize(codes: np.ndarray, dtype: NumberType, *, dim: int, ranges: np.ndarray | None = None) -> np.ndarray:
    """What ``quantize`` kept as the float32 numbers that a query is compared with, shape ``(vectors, dim)``.

    A raw product with int8 numbers would be none: step and offset differ by dimension. Of ``binary`` the signs are read
    back, as -1 and +1.
    """
    if dtype == "binary":
        return np.unpackbits(codes, axis=1, count=dim) * np.float32(2) - np.float32(1)
    if dtype == "int8" and ranges is not None:
        steps = (ranges[1] - ranges[0]) / 255
        # a dimension without a range counts in whole steps, as the host quantises it (sentence-transformers 6.2)
        codes = (codes.astype(np.float32) + 128) * np.where(steps == 0, 1, steps) + ranges[0]
    return codes.astype(np.float32, copy=False)
