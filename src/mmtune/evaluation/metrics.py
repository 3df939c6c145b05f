"""Metrics of a ranking; where scores may be equal, their mean over all orders of what is tied.

A model that gives everything the same score then gets what chance gets, not what the order of the candidates gives
it. The closed forms are those of McSherry and Najork, "Computing information retrieval performance measures
efficiently in the presence of tied scores" (ECIR 2008).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class TiedBlock(NamedTuple):
    """Candidates with the same score, at ranks ``start + 1 .. start + size``."""

    start: int
    size: int
    num_relevant: int


def ndcg(gains: Sequence[float], all_gains: Sequence[int], k: int) -> float:
    """Normalised discounted cumulative gain with linear gains, as ``ndcg_cut`` of trec_eval.

    ``sum(gain_i / log2(i + 1))`` over ranks i = 1 .. k, divided by the same sum of the best order.

    Args:
        gains: The scores of the documents in the order they were found; 0 for one that is not relevant.
        all_gains: The scores of all relevant documents, in any order.
        k: Depth.
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    best = sorted(all_gains, reverse=True)[:k]
    found = np.dot(gains[:k], discounts[: len(gains[:k])])
    return float(found / np.dot(best, discounts[: len(best)]))


def expected_gains(scores: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """The mean gain at each rank over all orders of what is tied: the mean of the tied block that holds the rank.

    Discounted gain is a sum over ranks, so ``ndcg`` of these gains is the mean of nDCG over all orders.

    Args:
        scores: float, shape ``(candidates,)``.
        gains: How relevant each candidate is; 0 for one that is not.

    Example:
        >>> expected_gains(np.array([0.1, 0.9, 0.1]), np.array([2, 0, 0])).tolist()
        [0.0, 1.0, 1.0]
    """
    values, block = np.unique(-scores, return_inverse=True)
    sizes = np.bincount(block, minlength=len(values))
    return np.repeat(np.bincount(block, weights=gains, minlength=len(values)) / sizes, sizes)


def reciprocal_rank(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """The mean of one over the rank of the first relevant candidate, and 0 where that rank is beyond ``k``.

    In a block of n candidates of which m are relevant, the first of these stands at place j with probability
    ``C(n - j, m - 1) / C(n, m)``.

    Args:
        scores: float, shape ``(candidates,)``.
        relevant: Whether each candidate is relevant.
        k: Depth.

    Example:
        >>> reciprocal_rank(np.array([0.5, 0.5]), np.array([True, False]), k=10)
        0.75
    """
    first = next((block for block in _blocks(scores, relevant) if block.num_relevant), None)
    if first is None:
        return 0.0
    probability, total = first.num_relevant / first.size, 0.0
    for place in range(1, first.size - first.num_relevant + 2):
        if first.start + place > k:
            break
        total += probability / (first.start + place)
        # the ratio of two neighbours, so that no binomial coefficient overflows
        probability *= (first.size - place - first.num_relevant + 1) / max(first.size - place, 1)
    return total


def average_precision(scores: np.ndarray, relevant: np.ndarray, num_relevant: int) -> float:
    """The mean precision at the ranks of relevant candidates; what was not found counts as 0.

    At place j of a block of n candidates of which m are relevant, a relevant one has
    ``(j - 1) * (m - 1) / (n - 1)`` relevant ones of the block above it on average.

    Args:
        scores: float, shape ``(candidates,)``.
        relevant: Whether each candidate is relevant.
        num_relevant: How much is relevant, also beyond the candidates; 1 or more.

    Example:
        >>> average_precision(np.array([0.9, 0.5, 0.1]), np.array([False, True, True]), num_relevant=2)
        0.5833...
    """
    total, above = 0.0, 0
    for start, size, found in _blocks(scores, relevant):
        places = np.arange(1, size + 1)
        beside = (places - 1) * (found - 1) / max(size - 1, 1)
        total += found / size * float(((above + 1 + beside) / (start + places)).sum())
        above += found
    return total / num_relevant


def _blocks(scores: np.ndarray, relevant: np.ndarray) -> Iterator[TiedBlock]:
    """The tied blocks, best first."""
    values, block = np.unique(-scores, return_inverse=True)
    sizes = np.bincount(block, minlength=len(values)).tolist()
    found = np.bincount(block, weights=relevant, minlength=len(values)).astype(int).tolist()
    start = 0
    for size, count in zip(sizes, found, strict=True):
        yield TiedBlock(start, size, count)
        start += size
