"""What a retriever finds: the best items for each that asks, of a corpus in one piece or in many."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmtune.data.arrow import IntLists
from mmtune.data.judgements import Judgements
from mmtune.errors import DatasetError
from mmtune.inference.encoder import DatasetReader, Retriever, encode_shards, join, warn_of_cut_inputs
from mmtune.inference.store import Embeddings

_TIE_ORDER_SEED = 0  # that of the retrieval evaluators: equal scores stand in the order they give them


@dataclass(frozen=True)
class Nearest:
    """The best items for each that asks.

    Attributes:
        items: Their positions, int64, shape ``(asking, depth)``, best first; of equal scores the first item.
        scores: Their scores, float64, of the same shape.
        relevant_scores: The score of each of ``relevant.values``, float64; not a number where its item was not among
            those compared.
    """

    items: np.ndarray
    scores: np.ndarray
    relevant_scores: np.ndarray


def find_nearest(
    similarity: Callable[[Embeddings, Embeddings], torch.Tensor],
    asking: Embeddings,
    shards: Iterable[Embeddings],
    *,
    depth: int,
    ids: tuple[Sequence[str], Sequence[str]],
    relevant: IntLists | None = None,
    at_once: int = 4096,
    first: int = 0,
) -> Nearest:
    """The ``depth`` best items for each that asks, without holding more than one shard of them.

    Args:
        similarity: Scores of what asks by items, shape ``(asking, items)``.
        asking: The embeddings of what asks.
        shards: The embeddings of the items, in their order.
        depth: Items to find for each.
        ids: Of what asks and of the items, for errors.
        relevant: For each that asks the items whose scores are wanted besides.
        at_once: How many that ask are compared with a shard at a time, which bounds the memory.
        first: The position of the first item, where the shards are a part of the corpus.

    Raises:
        DatasetError: A score is not a finite number; the message names what was compared.
    """
    wanted = relevant or IntLists(np.zeros(len(asking) + 1, dtype=np.int64), np.array([], dtype=np.int64))
    wanted_rows, relevant_scores = wanted.rows, np.full(len(wanted.values), np.nan)
    blocks = [slice(start, start + at_once) for start in range(0, len(asking), at_once)]
    best: list[_Best | None] = [None] * len(blocks)
    for shard in shards:
        is_here = (wanted.values >= first) & (wanted.values < first + len(shard))
        for at, rows in enumerate(blocks):
            new = similarity(asking[rows], shard)
            # One pass over all scores; numbers that are none come out of it too.
            if not torch.isfinite(torch.stack(torch.aminmax(new))).all():
                row, column = (~torch.isfinite(new)).nonzero()[0].tolist()
                raise not_finite(ids[0][rows.start + row], ids[1][first + column], new[row, column].item())
            here = np.flatnonzero(is_here & (wanted_rows >= rows.start) & (wanted_rows < rows.stop))
            places = torch.from_numpy(wanted_rows[here] - rows.start), torch.from_numpy(wanted.values[here] - first)
            relevant_scores[here] = new[tuple(part.to(new.device) for part in places)].cpu().double().numpy()
            best[at] = _Best.of(new, first, depth) if (kept := best[at]) is None else kept.merge(new, first, depth)
        first += len(shard)
    found = [each for each in best if each is not None]
    if not found:
        return Nearest(np.empty((len(asking), 0), dtype=np.int64), np.empty((len(asking), 0)), relevant_scores)
    items, scores = (torch.cat(part).cpu() for part in zip(*((each.items, each.scores) for each in found), strict=True))
    return Nearest(items.numpy(), scores.double().numpy(), relevant_scores)


@dataclass(frozen=True)
class _Best:
    """The best items so far for each of a block, best first; ``items`` int64 and ``scores``, of one shape."""

    items: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def of(cls, new: torch.Tensor, first: int, depth: int) -> "_Best":
        columns = top_columns(new, min(depth, new.shape[1]))
        return cls(columns + first, new.gather(1, columns))

    def merge(self, new: torch.Tensor, first: int, depth: int) -> "_Best":
        """With the items from ``first`` on, whose scores are ``new``."""
        if self.scores.shape[1] < depth:
            is_better = torch.ones_like(new, dtype=torch.bool)
        else:
            # Of a later shard few items are better than the worst that is kept, so that only those are sorted. One
            # that is as good as that loses, as it stands behind.
            is_better = new > self.scores[:, -1:]
        rows, columns = is_better.nonzero(as_tuple=True)
        if not len(rows):
            return self
        counts = torch.bincount(rows, minlength=len(new))
        places = torch.arange(len(rows), device=new.device) - (counts.cumsum(0) - counts)[rows]
        shape = (len(new), int(counts.max()))
        scores, items = new.new_full(shape, -torch.inf), columns.new_zeros(shape)
        scores[rows, places], items[rows, places] = new[rows, columns], columns + first
        # What was found before stands first, so that of equal scores the earlier item wins.
        scores, items = torch.cat([self.scores, scores], dim=1), torch.cat([self.items, items], dim=1)
        chosen = top_columns(scores, min(depth, scores.shape[1]))
        return _Best(items.gather(1, chosen), scores.gather(1, chosen))


def merge_nearest(parts: Sequence[Nearest], depth: int) -> Nearest:
    """What was found in each part of a corpus as what is found in the whole.

    Args:
        parts: In the order of the corpus.
        depth: As for each of them.
    """
    scores = np.concatenate([part.scores for part in parts], axis=1)
    items = np.concatenate([part.items for part in parts], axis=1)
    # Each part is in its order, so that of equal scores the first column is the first item.
    columns = top_columns(torch.from_numpy(scores), min(depth, scores.shape[1])).numpy()
    relevant_scores = np.fmax.reduce([part.relevant_scores for part in parts])
    return Nearest(np.take_along_axis(items, columns, 1), np.take_along_axis(scores, columns, 1), relevant_scores)


def not_finite(asking_id: str, item_id: str, score: float) -> DatasetError:
    """What is raised where the similarity of two embeddings is no number to rank by."""
    return DatasetError(
        f"The model compares {asking_id!r} with {item_id!r} as {score}, which is no number to rank by: their "
        'embeddings are too large for its precision. Load it in another (dtype="float32"), or look at whether the '
        "training diverged."
    )


def top_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the ``count`` highest scores of each row, highest first; of equal ones the first columns.

    ``torch.topk`` breaks ties in no defined way.

    Args:
        scores: Finite, shape ``(rows, columns)``.
        count: At most the number of columns.
    """
    bound = torch.topk(scores, count, dim=1).values[:, -1:]
    above, at_bound = scores > bound, scores == bound
    wanted = count - above.sum(dim=1, keepdim=True)
    chosen = above | (at_bound & (at_bound.cumsum(dim=1) <= wanted))
    columns = chosen.nonzero()[:, 1].view(len(scores), count)
    order = scores.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


@dataclass(frozen=True)
class Search:
    """What a retriever found, and how long it took.

    Attributes:
        found: For each that asks the best items by position, best first, int64, shape ``(asking, depth)``. Equal
            scores stand in a random order that is fixed by the corpus, as in ``build_evaluator``.
        documents_s: Seconds to encode the documents, their decoding included.
        queries_s: Seconds to encode the query texts.
        search_s: Seconds to compare and rank.
    """

    found: np.ndarray
    documents_s: float
    queries_s: float
    search_s: float


def search(
    retriever: Retriever,
    judgements: Judgements,
    reader: DatasetReader,
    *,
    depth: int,
    batch_size: int,
    show_progress_bar: bool,
) -> Search:
    """The ``depth`` best items for each that asks, among items of different content.

    Raises:
        DatasetError: It gives no finite numbers for an item; the message names it.
    """
    items = judgements.distinct_items
    # Equal scores keep this order.
    items = items[np.argsort(np.random.default_rng(_TIE_ORDER_SEED).permutation(len(items)))]
    asking_ids, asked_ids = judgements.asking_ids.to_pylist(), judgements.item_ids.take(pa.array(items)).to_pylist()
    texts_ask = judgements.direction == "text_to_image"
    text_ids, document_ids = (asking_ids, asked_ids) if texts_ask else (asked_ids, asking_ids)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}

    warn_of_cut_inputs(retriever, reader)
    started = time.perf_counter()
    texts = join(encode_shards(retriever, "query", text_ids, reader, **options))
    texts_done = time.perf_counter()
    documents = join(encode_shards(retriever, "document", document_ids, reader, **options))
    encoded = time.perf_counter()

    how: dict[str, Any] = {"depth": depth, "ids": (asking_ids, asked_ids), "at_once": 128}
    if texts_ask:
        nearest = find_nearest(retriever.similarity, texts, [documents], **how)
    else:
        # The text stays the query of the similarity: MaxSim is not symmetric.
        nearest = find_nearest(lambda asking, asked: retriever.similarity(asked, asking).T, documents, [texts], **how)
    return Search(items[nearest.items], encoded - texts_done, texts_done - started, time.perf_counter() - encoded)
