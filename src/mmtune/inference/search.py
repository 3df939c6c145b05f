"""The documents nearest to each query, found without holding the embeddings of the corpus."""

from collections.abc import Iterable

import numpy as np
import torch

from mmtune.data.arrow import IntLists
from mmtune.inference.encoder import Embeddings, Encoder

_QUERIES_AT_ONCE = 4096


class NearestDocuments:
    """The best documents of each query so far, and the scores of those that are relevant to it.

    Args:
        relevant: For each query the positions of what is relevant to it.
        depth: Documents to keep a query.

    Attributes:
        scores: Of the best documents, float64, shape ``(queries, depth)``, highest first; equal ones by position.
        documents: Their positions, int64, of the same shape.
        relevant_scores: The score of each of ``relevant.values``, float64.
    """

    def __init__(self, relevant: IntLists, depth: int) -> None:
        self.scores = np.empty((len(relevant.lengths), 0))
        self.documents = np.empty((len(relevant.lengths), 0), dtype=np.int64)
        self.relevant_scores = np.full(len(relevant.values), np.nan)
        self._depth = depth
        self._queries = relevant.rows
        self._relevant = relevant.values
        self._by_document = np.argsort(relevant.values, kind="stable")
        self._seen = 0

    def find(self, model: Encoder, queries: Embeddings, shards: Iterable[Embeddings]) -> None:
        """Score all shards of the corpus, in their order, with the similarity of the model."""
        for shard in shards:
            parts = [
                self._best(start, model.similarity(queries[start : start + _QUERIES_AT_ONCE], shard))
                for start in range(0, len(queries), _QUERIES_AT_ONCE)
            ]
            self.scores, self.documents = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            self._seen += len(shard)

    def _best(self, start: int, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The best of some queries among those so far and those of a shard, as scores and documents."""
        self._keep_relevant(start, scores)
        rows = slice(start, start + len(scores))
        fresh = torch.arange(self._seen, self._seen + scores.shape[1], device=scores.device).expand_as(scores)
        old_scores = torch.from_numpy(self.scores[rows]).to(scores)
        old_documents = torch.from_numpy(self.documents[rows]).to(scores.device)
        everything = torch.cat([old_scores, scores], dim=1)
        columns = top_columns(everything, min(self._depth, everything.shape[1]))
        documents = torch.cat([old_documents, fresh], dim=1).gather(1, columns)
        return everything.gather(1, columns).cpu().double().numpy(), documents.cpu().numpy()

    def _keep_relevant(self, start: int, scores: torch.Tensor) -> None:
        within = (self._seen, self._seen + scores.shape[1])
        first, last = np.searchsorted(self._relevant, within, sorter=self._by_document)
        pairs = self._by_document[first:last]
        pairs = pairs[(self._queries[pairs] >= start) & (self._queries[pairs] < start + len(scores))]
        rows = torch.from_numpy(self._queries[pairs] - start).to(scores.device)
        columns = torch.from_numpy(self._relevant[pairs] - self._seen).to(scores.device)
        self.relevant_scores[pairs] = scores[rows, columns].cpu().double().numpy()


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
