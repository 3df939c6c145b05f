"""The evaluator for training time: a corpus of pages, one encoding, every dimension, graded."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tqdm.auto import tqdm

from mmtune.data.arrow import column
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, DocumentReader, as_host_input
from mmtune.data.inputs import DatasetLike, as_retrieval_dataset
from mmtune.errors import ConfigError

_TIE_ORDER_SEED = 0
_ENOUGH_PIXELS = 8_000_000  # an A4 page at 300 dpi; beyond any encoder's input


class Embeddings(NamedTuple):
    """Queries and corpus at full size, float, shapes ``(queries, dimension)`` and ``(documents, dimension)``."""

    queries: torch.Tensor
    corpus: torch.Tensor


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


class RetrievalEvaluator(InformationRetrievalEvaluator):
    """The host's ``InformationRetrievalEvaluator`` over documents that are read as they are encoded.

    What differs from the host: documents are decoded a batch at a time, so that memory does not grow with the corpus;
    all dimensions are scored from one encoding; nDCG is graded; ties are broken by a fixed random order of the
    documents, whatever their ids; and ``per_query`` keeps the values behind each mean. MAP@100 is the host's: it is
    divided by at most 100 relevant documents, where trec_eval divides by all.

    Args:
        reader: Gives the documents by id.
        document_ids: The corpus.
        text_by_query_id: The queries.
        score_by_document_id: For each query id its relevant documents with scores of 1 and above.
        name: Prefix of the metric keys.
        truncate_dims: Dimensions to score besides the full one.
        truncate_dim: The one dimension that this evaluator scores; ``None`` is the full size.
        ndcg_at_k: Depths of nDCG.
        batch_size: Documents or queries a forward pass.
        show_progress_bar: Whether to show a bar over the documents.

    Attributes:
        per_query: After a call, ``{metric key: {query id: value}}`` of nDCG at each depth and dimension.
        truncations: An evaluator for each of ``truncate_dims``.
    """

    def __init__(
        self,
        reader: DocumentReader,
        document_ids: Sequence[str],
        text_by_query_id: Mapping[str, str],
        score_by_document_id: Mapping[str, Mapping[str, int]],
        *,
        name: str = "vdr",
        truncate_dims: Sequence[int] = (),
        truncate_dim: int | None = None,
        ndcg_at_k: Sequence[int] = (10,),
        batch_size: int = 16,
        show_progress_bar: bool = True,
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
            name=name if truncate_dim is None else f"{name}-{truncate_dim}d",
            truncate_dim=truncate_dim,
        )
        self.per_query: dict[str, dict[str, float]] = {}
        self.truncations = [
            RetrievalEvaluator(
                reader,
                document_ids,
                text_by_query_id,
                score_by_document_id,
                name=name,
                truncate_dim=dim,
                ndcg_at_k=ndcg_at_k,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
            )
            for dim in truncate_dims
        ]
        self._reader = reader
        self._document_ids = list(document_ids)
        self._score_by_document_id = {query_id: score_by_document_id[query_id] for query_id in self.queries_ids}
        self._shows_progress = show_progress_bar
        self._embeddings: Embeddings | None = None

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, float]:
        """The metrics of ``model``, with the host's keys: ``vdr_cosine_ndcg@10``, ``vdr-256d_cosine_ndcg@10``.

        Raises:
            ConfigError: A dimension is larger than the model's.
            ImageDecodeError: A page is no readable image; the message names the document.
        """
        require_dimensions([evaluator.truncate_dim for evaluator in self.truncations], model)
        embeddings = self.encode(model)
        metrics: dict[str, float] = {}
        self.per_query = {}
        for evaluator in (self, *self.truncations):
            metrics |= evaluator._score(model, embeddings, output_path, epoch, steps)
            self.per_query |= evaluator.per_query
        return metrics

    def metric_name(self, model: SentenceTransformer) -> str:
        """The key of the metric that says how good ``model`` is: nDCG at the deepest k, at this evaluator's size."""
        return f"{self.name}_{model.similarity_fn_name}_ndcg@{max(self.ndcg_at_k)}"

    def encode(self, model: SentenceTransformer) -> Embeddings:
        """Queries and documents at full size, each preprocessed once."""
        queries = self._encode_queries(model)
        portions = [self._encode_documents(model, documents) for documents in self._documents()]
        return Embeddings(queries, torch.cat(portions))

    def _encode_queries(self, model: SentenceTransformer) -> torch.Tensor:
        texts = [as_host_input(text) for text in self.queries]
        return model.encode_query(texts, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True)

    def _encode_documents(self, model: SentenceTransformer, documents: list[Any]) -> torch.Tensor:
        return model.encode_document(
            documents, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
        )

    def _documents(self) -> Iterator[list[Any]]:
        """The corpus in portions; the next one is decoded while the model works on the last."""
        size = self.batch_size
        portions = [self._document_ids[start : start + size] for start in range(0, len(self._document_ids), size)]
        with (
            tqdm(
                total=len(self.corpus), desc="Encoding documents", disable=not self._shows_progress, leave=False
            ) as bar,
            ThreadPoolExecutor(max_workers=1) as pool,
        ):
            pending = pool.submit(self._read, portions[0])
            for portion, following in zip(portions, [*portions[1:], None], strict=True):
                documents = pending.result()
                if following is not None:
                    pending = pool.submit(self._read, following)
                yield documents
                bar.update(len(portion))

    def _read(self, document_ids: Sequence[str]) -> list[Any]:
        return [as_host_input(document) for document in self._reader.read(document_ids)]

    def _score(
        self, model: SentenceTransformer, embeddings: Embeddings, output_path: str | None, epoch: int, steps: int
    ) -> dict[str, float]:
        """The host's call on embeddings that are there already, cut to this evaluator's dimension."""
        self._embeddings = Embeddings(*(part[:, : self.truncate_dim] for part in embeddings))
        self.per_query = {}
        try:
            return super().__call__(model, output_path, epoch, steps, corpus_embeddings=self._embeddings.corpus)
        finally:
            self._embeddings = None

    def embed_inputs(self, model: SentenceTransformer, sentences: Any, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of the queries, for the host's scoring; the documents' are handed to it directly."""
        if self._embeddings is None:
            return super().embed_inputs(model, sentences, *args, **kwargs)
        return self._embeddings.queries

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


class MeanEvaluator(SequentialEvaluator):
    """Several evaluators and the mean of their metrics, under ``<name>-mean_...`` keys.

    Args:
        evaluators: Evaluators with the same dimensions and depths.
        name: Prefix of the keys of the means.
    """

    def __init__(self, evaluators: Sequence[RetrievalEvaluator], name: str) -> None:
        super().__init__(evaluators)
        self.retrieval = list(evaluators)
        self.name = name
        self.per_query: dict[str, dict[str, float]] = {}

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of each evaluator, and ``vdr-mean_cosine_ndcg@10`` and the like."""
        parts = [evaluator(model, output_path, epoch, steps) for evaluator in self.retrieval]
        self.per_query = {key: values for evaluator in self.retrieval for key, values in evaluator.per_query.items()}
        self.primary_metric = self.metric_name(model)
        first = self.retrieval[0]
        means = {
            key.replace(first.name, f"{self.name}-mean", 1): float(np.mean(values))
            for key, values in zip(parts[0], zip(*(part.values() for part in parts), strict=True), strict=True)
        }
        return {key: value for part in (*parts, means) for key, value in part.items()}

    def metric_name(self, model: SentenceTransformer) -> str:
        """The key of the mean that says how good ``model`` is."""
        return self.retrieval[0].metric_name(model).replace(self.retrieval[0].name, f"{self.name}-mean", 1)


Evaluator: TypeAlias = RetrievalEvaluator | MeanEvaluator
"""What ``build_evaluator`` returns: for one dataset, or for several by name."""


def ndcg(gains: Sequence[int], all_gains: Sequence[int], k: int) -> float:
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


def build_evaluator(
    dataset: DatasetLike | Mapping[str, DatasetLike],
    *,
    model: SentenceTransformer | None = None,
    name: str = "vdr",
    truncate_dims: Sequence[int] = (),
    documents: DocumentKind = "image",
    ndcg_at_k: Sequence[int] = (10,),
    batch_size: int = 16,
    show_progress_bar: bool = True,
) -> Evaluator:
    """An evaluator over a dataset, for ``evaluator=`` of the host's trainers or for ``evaluator(model)``.

    Byte-identical pages are one document, as ``RetrievalDataset.deduplicate`` makes them: a copy of a relevant page
    under another id is no wrong answer. A JPEG of 32 million pixels or more is decoded at half its size, or less, so
    that one huge scan does not take half a gigabyte.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes. Several by
            name are evaluated one after the other, as ``vdr-<name>_cosine_ndcg@10``, and averaged, as
            ``vdr-mean_cosine_ndcg@10``.
        model: If given, ``truncate_dims`` are checked against it now rather than at the first call.
        name: Prefix of the metric keys.
        truncate_dims: Matryoshka dimensions to score besides the full one, from the same encoding.
        documents: What a document is made of: ``"image"``, ``"text"`` or ``"text+image"``.
        ndcg_at_k: Depths of nDCG.
        batch_size: Documents or queries a forward pass.
        show_progress_bar: Whether to show a bar over the documents.

    Raises:
        ConfigError: A dimension or depth is not positive or larger than the model's, or the corpus lacks what
            ``documents`` asks for.
        DatasetError: The data can't be read, or its layout is unknown.

    Example:
        >>> from mmtune import build_evaluator
        >>> from mmtune.testing import generated_pages
        >>> evaluator = build_evaluator(generated_pages(8), truncate_dims=[32, 16], show_progress_bar=False)
        >>> len(evaluator.queries), [part.name for part in evaluator.truncations]
        (8, ['vdr-32d', 'vdr-16d'])
    """
    dims = sorted(set(_positive("truncate_dims", truncate_dims)), reverse=True)
    depths = sorted(set(_positive("ndcg_at_k", ndcg_at_k)))
    if not depths:
        raise ConfigError("ndcg_at_k is empty. Give at least one depth, e.g. (10,).")
    if model is not None:
        require_dimensions(dims, model)
    options = {"truncate_dims": dims, "ndcg_at_k": depths, "batch_size": batch_size}
    options["show_progress_bar"] = show_progress_bar
    if isinstance(dataset, Mapping) and not isinstance(dataset, DatasetDict):
        parts = {f"{name}-{part}": as_retrieval_dataset(data) for part, data in dataset.items()}
        return MeanEvaluator([_evaluator(data, documents, part, options) for part, data in parts.items()], name)
    return _evaluator(as_retrieval_dataset(dataset), documents, name, options)


def _evaluator(
    data: RetrievalDataset, documents: DocumentKind, name: str, options: Mapping[str, Any]
) -> RetrievalEvaluator:
    # A copy of a relevant page under another id would take its rank, and cost up to half the nDCG.
    if documents == "image" and data.relevance.num_copies:
        data = data.deduplicate()
    return RetrievalEvaluator(
        DocumentReader(data.corpus, documents, enough_pixels=_ENOUGH_PIXELS),
        column(data.corpus, "document_id").to_pylist(),
        dict(zip(data.queries["query_id"][:], data.queries["text"][:], strict=True)),
        _judgements(data.qrels[:]),
        name=name,
        **options,
    )


def require_dimensions(dims: Sequence[int | None], model: SentenceTransformer) -> None:
    """Make sure that the model can be cut to these dimensions; ``None`` is the full size.

    Raises:
        ConfigError: A dimension is larger than the model's.
    """
    full = model.get_embedding_dimension()
    larger = [dim for dim in dims if dim is not None and full is not None and dim > full]
    if larger:
        raise ConfigError(
            f"The dimension {larger[0]} is larger than the {full} dimensions that the model gives. "
            f"Truncation only shortens: name dimensions of up to {full}."
        )


def _judgements(qrels: Mapping[str, list[Any]]) -> dict[str, dict[str, int]]:
    scores: dict[str, dict[str, int]] = {}
    for query_id, document_id, score in zip(
        *(qrels[name] for name in ("query_id", "document_id", "score")), strict=True
    ):
        scores.setdefault(query_id, {})[document_id] = score
    return scores


def _positive(name: str, values: Sequence[int]) -> list[int]:
    wrong = [value for value in values if not isinstance(value, int) or value < 1]
    if wrong:
        raise ConfigError(f"{name} holds {wrong[0]!r}. Expected whole numbers of 1 and above.")
    return list(values)
