"""What every retrieval evaluator shares: documents read as they are encoded, graded nDCG, ties without names."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base import BaseModel
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tqdm.auto import tqdm

from mmtune.data.documents import DocumentReader, as_host_input
from mmtune.errors import ConfigError
from mmtune.host import let_read_typed_texts
from mmtune.inference.encoder import portions_of, read_ahead

Retriever: TypeAlias = SentenceTransformer | MultiVectorEncoder
"""What finds documents: one vector for each, or one a token."""

_TIE_ORDER_SEED = 0


class OrderedId(str):
    """A document id whose place among tied scores is a number, not its spelling.

    The host breaks ties by comparing ids, so that a page named "10" would win over one named "9".
    """

    order: int

    def __new__(cls, value: str, order: int) -> "OrderedId":
        """``value`` with its place among tied scores."""
        document_id = super().__new__(cls, value)
        document_id.order = order
        return document_id

    def __lt__(self, other: str) -> bool:
        return self.order < other.order if isinstance(other, OrderedId) else str.__lt__(self, other)

    def __reduce__(self) -> tuple[type["OrderedId"], tuple[str, int]]:
        return OrderedId, (str(self), self.order)


class CorpusEvaluator(InformationRetrievalEvaluator):
    """The host's ``InformationRetrievalEvaluator`` over documents that are read as they are encoded.

    What differs from the host: documents are decoded a batch at a time, so that memory does not grow with the corpus;
    nDCG is graded; ties are broken by a fixed random order of the documents, whatever their ids; and ``per_query``
    keeps the values behind each mean. MAP@100 is the host's: it is divided by at most 100 relevant documents, where
    trec_eval divides by all.

    Args:
        reader: Gives the documents by id.
        document_ids: The corpus.
        text_by_query_id: The queries.
        score_by_document_id: For each query id its relevant documents with scores of 1 and above.
        ndcg_at_k: Depths of nDCG.
        batch_size: Documents or queries a forward pass.
        show_progress_bar: Whether to show a bar over the documents.
        **host_kwargs: Further arguments of the host's evaluator.

    Attributes:
        model_class: The kind of model that it scores.
        per_query: After a call, ``{metric key: {query id: value}}`` of nDCG at each depth and dimension.
    """

    model_class: ClassVar[type[BaseModel]]

    def __init__(
        self,
        reader: DocumentReader,
        document_ids: Sequence[str],
        text_by_query_id: Mapping[str, str],
        score_by_document_id: Mapping[str, Mapping[str, int]],
        *,
        ndcg_at_k: Sequence[int] = (10,),
        batch_size: int = 16,
        show_progress_bar: bool = True,
        **host_kwargs: Any,
    ) -> None:
        order = np.random.default_rng(_TIE_ORDER_SEED).permutation(len(document_ids)).tolist()
        ids = [OrderedId(value, at) for value, at in zip(document_ids, order, strict=True)]
        super().__init__(
            queries=dict(text_by_query_id),
            corpus=dict(zip(ids, document_ids, strict=True)),
            relevant_docs={query_id: set(scores) for query_id, scores in score_by_document_id.items()},
            ndcg_at_k=list(ndcg_at_k),
            # Scoring takes a moment; the bar that matters is over the documents.
            show_progress_bar=False,
            batch_size=batch_size,
            **host_kwargs,
        )
        self.per_query: dict[str, dict[str, float]] = {}
        self._reader = reader
        self._document_ids = list(document_ids)
        self._score_by_document_id = {query_id: score_by_document_id[query_id] for query_id in self.queries_ids}
        self._shows_progress = show_progress_bar

    def metric_name(self, model: Retriever) -> str:
        """The key of the metric that says how good ``model`` is: nDCG at the deepest k, at this evaluator's size."""
        return f"{self.name}_{model.similarity_fn_name}_ndcg@{max(self.ndcg_at_k)}"

    def checked_model(self, model: Retriever) -> Any:
        """The model, after making sure that it is of the kind that this evaluator scores.

        Raises:
            ConfigError: It is another of the host's kinds.
        """
        if isinstance(model, BaseModel) and not isinstance(model, self.model_class):
            raise ConfigError(
                f"This evaluator scores a {self.model_class.__name__}, and the model is a {type(model).__name__}. "
                "Build one for it with build_evaluator(dataset, model=model)."
            )
        if isinstance(model, BaseModel):
            let_read_typed_texts(model)
        return model

    def _query_inputs(self) -> list[Any]:
        return [as_host_input(text) for text in self.queries]

    def _documents(self) -> Generator[list[Any], None, None]:
        """The corpus in portions; the next one is decoded while the model works on the last."""
        portions = portions_of(self._document_ids, self.batch_size)
        with tqdm(
            total=len(self.corpus), desc="Encoding documents", disable=not self._shows_progress, leave=False
        ) as bar:
            for portion, documents in zip(portions, read_ahead(self._read, portions), strict=True):
                yield documents
                bar.update(len(portion))

    def _read(self, document_ids: Sequence[str]) -> list[Any]:
        return [as_host_input(document) for document in self._reader.read(document_ids)]

    def compute_metrics(self, queries_result_list: list[Any]) -> dict[str, Any]:
        """The host's metrics, with nDCG graded, and ``per_query`` filled.

        Args:
            queries_result_list: For each query its hits, ``{"corpus_id": ..., "score": ...}``, in any order.
        """
        metrics: dict[str, Any] = super().compute_metrics(queries_result_list)
        similarity = next(iter(self.score_functions or ()))
        gains = [self._gains(*query) for query in zip(self.queries_ids, queries_result_list, strict=True)]
        for k in self.ndcg_at_k:
            values = {
                query_id: ndcg(found, list(self._score_by_document_id[query_id].values()), k)
                for query_id, found in zip(self.queries_ids, gains, strict=True)
            }
            self.per_query[f"{self.name}_{similarity}_ndcg@{k}"] = values
            metrics["ndcg@k"][k] = float(np.mean(list(values.values())))
        return metrics

    def _gains(self, query_id: str, hits: list[dict[str, Any]]) -> list[int]:
        """The scores of the documents found, best hit first; 0 for one that is not relevant."""
        score_by_document_id = self._score_by_document_id[query_id]
        ranked = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))
        return [score_by_document_id.get(hit["corpus_id"], 0) for hit in ranked]


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
