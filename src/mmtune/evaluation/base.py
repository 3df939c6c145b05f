"""What every retrieval evaluator shares: documents read as they are encoded, graded nDCG, ties without names."""

import math
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base import BaseModel
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tqdm.auto import tqdm

from mmtune.arguments import MIXED, shown
from mmtune.data.clusters import connected_queries
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, kinds_of_documents
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError
from mmtune.evaluation.metrics import ndcg
from mmtune.inference.encoder import (
    DatasetReader,
    Retriever,
    Task,
    as_float32,
    encode,
    join,
    warn_of_cut_inputs,
)
from mmtune.inference.search import not_finite
from mmtune.inference.shards import StoredDocuments
from mmtune.inference.store import Embeddings

_TIE_ORDER_SEED = 0
_SAMPLE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EncodingCost:
    """What a model took to encode a dataset, and what it made of a document.

    Attributes:
        queries_s: Seconds for all queries.
        documents_s: Seconds for all documents, with their decoding and without their scoring.
        dimension: Of a vector, before an evaluator cuts it off.
        num_numbers: How many numbers all documents became: the dimension, times their vectors.
    """

    queries_s: float = 0.0
    documents_s: float = 0.0
    dimension: int = 0
    num_numbers: int = 0


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
        data: What is evaluated on.
        documents: What a document is made of.
        queries: What a query is made of.
        ndcg_at_k: Depths of nDCG.
        batch_size: Documents or queries a forward pass.
        show_progress_bar: Whether to show a bar over the documents.
        **host_kwargs: Further arguments of the host's evaluator.

    Attributes:
        model_class: The kind of model that it scores.
        data: What is evaluated on.
        batch_size: Documents or queries a forward pass; what is set here holds from the next call on.
        score_by_document_id: ``{query id: {document id: score}}`` of what is relevant.
        per_query: After a call, ``{metric key: {query id: value}}`` of nDCG at each depth and dimension.
        top_ids: After a call, ``{query id: [document id, ...]}`` of the best documents at full size, best first; a
            hundred, or as many as the deepest metric looks at.
        cost: After a call, what encoding took.
    """

    model_class: ClassVar[type[BaseModel]]

    def __init__(
        self,
        data: RetrievalDataset,
        documents: DocumentKind,
        *,
        queries: QueryKind = "text",
        ndcg_at_k: Sequence[int] = (10,),
        batch_size: int = 16,
        show_progress_bar: bool = True,
        **host_kwargs: Any,
    ) -> None:
        data.relevance_of(documents, queries).require_queries()
        self.data = data
        self._reader = DatasetReader(data.corpus, data.queries, documents, queries)
        self.score_by_document_id: dict[str, dict[str, int]] = {}
        judged = (data.qrels[name][:] for name in ("query_id", "document_id", "score"))
        for query_id, document_id, score in zip(*judged, strict=True):
            self.score_by_document_id.setdefault(query_id, {})[document_id] = score
        document_ids = data.corpus["document_id"][:]
        order = np.random.default_rng(_TIE_ORDER_SEED).permutation(len(document_ids)).tolist()
        super().__init__(
            queries=dict(self._reader.text_by_query_id),
            corpus={OrderedId(name, at): name for name, at in zip(document_ids, order, strict=True)},
            relevant_docs={query_id: set(scores) for query_id, scores in self.score_by_document_id.items()},
            ndcg_at_k=list(ndcg_at_k),
            # Scoring takes a moment; the bar that matters is over the documents.
            show_progress_bar=False,
            batch_size=batch_size,
            **host_kwargs,
        )
        # The host names this file only where predictions were asked for at construction.
        self.predictions_file = self.csv_file.replace("_results.csv", "_predictions.jsonl")
        self.per_query: dict[str, dict[str, float]] = {}
        self.top_ids: dict[str, list[str]] = {}
        self.cost = EncodingCost()
        self._shows_progress = show_progress_bar
        self._has_looked_for_cut_texts = False
        self.stored: StoredDocuments | None = None  # what the documents are read from rather than encoded
        self._id_by_order = [document_ids[at] for at in np.argsort(order).tolist()]
        self._kind_by_document_id = {}
        if documents == MIXED:
            kinds = kinds_of_documents(data.corpus, documents)
            self._kind_by_document_id = dict(zip(document_ids, kinds, strict=True))

    @cached_property
    def groups(self) -> dict[str, str]:
        """``{query id: cluster}``: queries that share pages or texts, directly or by others, are of one cluster."""
        return connected_queries(self.data.relevance_of(self._reader.kind, self._reader.query_kind))

    def measure_effect_of_batch_size(self, model: Retriever) -> float:
        """How far embeddings move with what else is in their batch: the largest change of a coordinate.

        Sixteen queries and documents are encoded one by one, and in batches as large as those of the evaluation: larger
        ones may not fit.
        """
        largest, size_of_batch = 0.0, min(_SAMPLE, max(2, self.batch_size))
        sides: dict[Task, list[str]] = {"query": self.queries_ids, "document": list(map(str, self.corpus_ids))}
        for task, ids in sides.items():
            alone, together = (
                as_float32(
                    join(encode(model, task, ids[:_SAMPLE], self._reader, batch_size=size, at_once=_SAMPLE)), CPU
                )
                for size in (1, size_of_batch)
            )
            largest = max(largest, *(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True)))
        return largest

    def metric_name(self, model: Retriever) -> str:
        """The key of the metric that says how good ``model`` is: nDCG at the deepest k, at this evaluator's size."""
        return f"{self.name}_{model.similarity_fn_name}_ndcg@{max(self.ndcg_at_k)}"

    def require_kind(self, model: object) -> Any:
        """The model, after making sure that it is of the kind that this evaluator scores.

        Raises:
            ConfigError: It is another of the host's kinds, or embeds nothing.
        """
        if not all(hasattr(model, name) for name in ("encode_query", "encode_document", "similarity")):
            raise ConfigError(f"model={shown(model)} is no {self.model_class.__name__}. {self._advise_on(model)}")
        if isinstance(model, BaseModel) and not isinstance(model, self.model_class):
            raise ConfigError(
                f"This evaluator scores a {self.model_class.__name__}, and the model is a {type(model).__name__}. "
                "Build one for it with build_evaluator(dataset, model=model)."
            )
        return model

    @staticmethod
    def _advise_on(model: object) -> str:
        if isinstance(model, (str, os.PathLike)):
            return f"Pass evaluator(load_model({os.fspath(model)!r:.80}))."
        if isinstance(model, CrossEncoder):
            return "For a reranker call build_reranking_evaluator(dataset)(model)."
        return "Load a checkpoint with load_model, and pass what it gives."

    def encode_queries(self, model: Retriever) -> Embeddings:
        """The embeddings of all queries, in the order of ``queries_ids``; the first call warns of texts too long."""
        if not self._has_looked_for_cut_texts:
            warn_of_cut_inputs(model, self._reader)
            self._has_looked_for_cut_texts = True
        ids, started = self.queries_ids, time.perf_counter()
        # texts go to the host at once, which sorts them by length; images are read a batch at a time
        at_once = len(ids) if self._reader.query_kind == "text" else None
        found = join(encode(model, "query", ids, self._reader, batch_size=self.batch_size, at_once=at_once))
        self.cost = replace(self.cost, queries_s=time.perf_counter() - started)
        return found

    def encode_documents(self, model: Retriever) -> Generator[Embeddings, None, None]:
        """The embeddings of the corpus, ``batch_size`` documents at a time, or as ``stored`` has them."""
        ids = list(map(str, self.corpus_ids))
        seconds, num_numbers, started = 0.0, 0, time.perf_counter()
        with tqdm(total=len(ids), desc="Encoding documents", disable=not self._shows_progress, leave=False) as bar:
            if self.stored is None:
                portions = encode(model, "document", ids, self._reader, batch_size=self.batch_size)
            else:
                portions = self.stored.read_all(ids, self._reader, model.device)
            for portion in portions:
                bar.update(len(portion))
                seconds, num_numbers = seconds + time.perf_counter() - started, num_numbers + _count_numbers(portion)
                size = portion[0].shape[-1]
                self.cost = replace(self.cost, documents_s=seconds, dimension=size, num_numbers=num_numbers)
                yield portion
                started = time.perf_counter()

    def measure_kinds(self, model: Retriever) -> dict[str, float]:
        """Of a mixed corpus nDCG by the kind of the answer, and how often the best documents are of one kind alone.

        A gap between modalities shows in both: what is of another kind than most stands behind, whatever it says.

        Args:
            model: That of the last call.

        Returns:
            ``vdr_cosine_ndcg@10_image`` and the like, over the queries with an answer of that kind, and
            ``vdr_cosine_one-kind@10``, the share of queries; empty where all documents are of one kind.
        """
        if not self._kind_by_document_id:
            return {}
        key, depth = self.metric_name(model), max(self.ndcg_at_k)
        values_by_kind: dict[str, list[float]] = {}
        for query_id, scores in self.score_by_document_id.items():
            for kind in sorted({self._kind_by_document_id[document_id] for document_id in scores}):
                values_by_kind.setdefault(kind, []).append(self.per_query[key][query_id])
        found = {f"{key}_{kind}": float(np.mean(values)) for kind, values in sorted(values_by_kind.items())}
        top_kinds = [{self._kind_by_document_id[each] for each in ids[:depth]} for ids in self.top_ids.values()]
        share = float(np.mean([len(kinds) == 1 for kinds in top_kinds]))
        return {**found, f"{self.name}_{model.similarity_fn_name}_one-kind@{depth}": share}

    def compute_metrics(self, queries_result_list: list[Any]) -> dict[str, Any]:
        """The host's metrics, with nDCG graded, and ``per_query`` and ``top_ids`` filled.

        Args:
            queries_result_list: For each query its hits, ``{"corpus_id": ..., "score": ...}``, in any order.

        Raises:
            DatasetError: A score is not a finite number; the message names query and document.
        """
        metrics: dict[str, Any] = super().compute_metrics(queries_result_list)
        similarity = next(iter(self.score_functions or ()))
        values_by_k: dict[int, dict[str, float]] = {k: {} for k in self.ndcg_at_k}
        for query_id, hits in zip(self.queries_ids, queries_result_list, strict=True):
            score_by_document_id = self.score_by_document_id[query_id]
            wrong = next((hit for hit in hits if not math.isfinite(hit["score"])), None)
            if wrong is not None:
                raise not_finite(query_id, str(wrong["corpus_id"]), wrong["score"])
            ranked = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))
            self.top_ids[query_id] = [self._id_by_order[hit["corpus_id"].order] for hit in ranked]
            gains = [score_by_document_id.get(hit["corpus_id"], 0) for hit in ranked]
            for k, values in values_by_k.items():
                values[query_id] = ndcg(gains, list(score_by_document_id.values()), k)
        for k, values in values_by_k.items():
            self.per_query[f"{self.name}_{similarity}_ndcg@{k}"] = values
            metrics["ndcg@k"][k] = float(np.mean(list(values.values())))
        return metrics


def _count_numbers(embeddings: Embeddings) -> int:
    return embeddings.numel() if isinstance(embeddings, torch.Tensor) else sum(item.numel() for item in embeddings)
