"""The evaluator for training time: a corpus of pages, one encoding, every dimension, graded."""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, TypeAlias

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from mmtune.arguments import require_name, require_whole, require_wholes
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, check_texts
from mmtune.data.intake import DatasetsLike
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError
from mmtune.evaluation.base import CorpusEvaluator
from mmtune.evaluation.late_interaction import LateInteractionEvaluator
from mmtune.evaluation.mean import MeanEvaluator, build_for_each
from mmtune.inference.encoder import Retriever, join, require_retriever


class EncodedDataset(NamedTuple):
    """Queries and corpus at full size, float, shapes ``(queries, dimension)`` and ``(documents, dimension)``."""

    queries: torch.Tensor
    corpus: torch.Tensor


class RetrievalEvaluator(CorpusEvaluator):
    """The evaluator for models that give one vector a document; all dimensions are scored from one encoding.

    Args:
        data: What is evaluated on.
        documents: What a document is made of.
        name: Prefix of the metric keys.
        truncate_dims: Dimensions to score besides the full one.
        **options: ``queries``, ``ndcg_at_k``, ``batch_size`` and ``show_progress_bar``, as for ``CorpusEvaluator``.

    Attributes:
        truncations: An evaluator for each of ``truncate_dims``.
    """

    model_class = SentenceTransformer

    def __init__(
        self,
        data: RetrievalDataset,
        documents: DocumentKind,
        *,
        name: str = "vdr",
        truncate_dims: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(data, documents, name=name, **options)
        self._encoded: EncodedDataset | None = None
        self.truncations: list[RetrievalEvaluator] = [self._truncated(dim) for dim in truncate_dims]

    def _truncated(self, dim: int) -> "RetrievalEvaluator":
        """An evaluator of one dimension over the same documents and judgements, which are not copied."""
        part = copy(self)
        part.name, part.truncate_dim = f"{self.name}-{dim}d", dim
        for file in ("csv_file", "predictions_file"):
            setattr(part, file, getattr(self, file).replace(f"_{self.name}_", f"_{part.name}_"))
        part.truncations = []
        return part

    def __call__(
        self,
        model: Retriever,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, float]:
        """The metrics of ``model``, with the host's keys: ``vdr_cosine_ndcg@10``, ``vdr-256d_cosine_ndcg@10``.

        Raises:
            ConfigError: A dimension is larger than the model's, or the model gives several vectors a document.
            DatasetError: The model gives no finite numbers for an item; the message names it.
            ImageDecodeError: A page is no readable image; the message names the document.
        """
        embedder = self.require_kind(model)
        dims = [evaluator.truncate_dim for evaluator in self.truncations]
        require_dimensions(dims, embedder)
        encoded = self.encode(embedder)
        require_dimensions(dims, embedder, encoded.queries.shape[1])  # not every model knows them before
        metrics: dict[str, float] = {}
        per_query: dict[str, dict[str, float]] = {}
        for evaluator in (self, *self.truncations):
            evaluator.write_csv, evaluator.write_predictions = self.write_csv, self.write_predictions
            metrics |= evaluator._score(embedder, encoded, output_path, epoch, steps)
            per_query |= evaluator.per_query
        self.per_query = per_query
        return metrics | self.measure_kinds(model)

    def encode(self, model: SentenceTransformer) -> EncodedDataset:
        """Queries and documents at full size, each preprocessed once."""
        tensors: Any = self.encode_queries(model), join(self.encode_documents(model))
        return EncodedDataset(*tensors)

    def _score(
        self, model: SentenceTransformer, encoded: EncodedDataset, output_path: str | None, epoch: int, steps: int
    ) -> dict[str, float]:
        """The host's call on embeddings that are there already, cut to this evaluator's dimension."""
        self._encoded = EncodedDataset(*(part[:, : self.truncate_dim] for part in encoded))
        self.per_query, self.top_ids = {}, {}
        try:
            return super().__call__(model, output_path, epoch, steps, corpus_embeddings=self._encoded.corpus)
        finally:
            self._encoded = None

    def embed_inputs(self, model: SentenceTransformer, sentences: Any, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of the queries, for the host's scoring; the documents' are handed to it directly."""
        if self._encoded is None:
            return super().embed_inputs(model, sentences, *args, **kwargs)
        return self._encoded.queries


SingleEvaluator: TypeAlias = RetrievalEvaluator | LateInteractionEvaluator
"""The evaluator for one dataset, by the kind of model."""

Evaluator: TypeAlias = SingleEvaluator | MeanEvaluator
"""What ``build_evaluator`` returns: for one dataset, or for several by name."""


def build_evaluator(
    dataset: DatasetsLike,
    *,
    model: Retriever | None = None,
    name: str = "vdr",
    truncate_dims: Sequence[int] = (),
    documents: DocumentKind = "image",
    ndcg_at_k: Sequence[int] = (10,),
    batch_size: int = 16,
    show_progress_bar: bool = True,
    queries: QueryKind = "text",
) -> Evaluator:
    """An evaluator over a dataset, for ``evaluator=`` of the host's trainers or for ``evaluator(model)``.

    Byte-identical pages are one document, as ``RetrievalDataset.deduplicate`` makes them: a copy of a relevant page
    under another id is no wrong answer. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as
    that leaves 2.5 times the sides of the model's input, or 1.5 times the area of its limit.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes. Several by
            name are evaluated one after the other, as ``vdr-<name>_cosine_ndcg@10``, and averaged, as
            ``vdr-mean_cosine_ndcg@10``.
        model: A ``MultiVectorEncoder`` needs an evaluator of its own, the host's
            ``MultiVectorInformationRetrievalEvaluator``, with keys such as ``vdr_maxsim_ndcg@10``. With an embedding
            model, ``truncate_dims`` are checked now rather than at the first call.
        name: Prefix of the metric keys.
        truncate_dims: Matryoshka dimensions to score besides the full one, from the same encoding.
        documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
        ndcg_at_k: Depths of nDCG.
        batch_size: Documents or queries a forward pass.
        show_progress_bar: Whether to show a bar over the documents.
        queries: What a query is made of, likewise; ``"image"`` finds the page like this photo.

    Raises:
        ConfigError: A dimension or depth is not positive or larger than the model's, the data lack what
            ``documents`` or ``queries`` asks for, or the model is a reranker or has token embeddings, which can't be
            truncated.
        DatasetError: The data can't be read, or its layout is unknown.

    Example:
        >>> from mmtune import build_evaluator
        >>> from mmtune.testing import generated_pages
        >>> evaluator = build_evaluator(generated_pages(8), truncate_dims=[32, 16], show_progress_bar=False)
        >>> len(evaluator.queries), [part.name for part in evaluator.truncations]
        (8, ['vdr-32d', 'vdr-16d'])
    """
    dims = sorted(set(require_wholes("truncate_dims", truncate_dims)), reverse=True)
    depths = sorted(set(require_wholes("ndcg_at_k", ndcg_at_k)))
    if not depths:
        raise ConfigError("ndcg_at_k is empty. Give at least one depth, e.g. (10,).")
    size = require_whole("batch_size", batch_size)
    require_name("name", name)
    options: dict[str, Any] = {"ndcg_at_k": depths, "batch_size": size, "show_progress_bar": show_progress_bar}
    options["queries"] = queries

    if model is not None:
        require_retriever(
            model,
            "model",
            "build_evaluator(dataset, model=retriever); build_reranking_evaluator(dataset) is for rerankers",
        )
    if isinstance(model, MultiVectorEncoder):
        if dims:
            raise ConfigError(
                f"truncate_dims={list(dims)} with a MultiVectorEncoder: its token embeddings are not trained to be "
                "truncated. Leave truncate_dims out, or build the model with fewer dimensions."
            )
        evaluator_class: type[SingleEvaluator] = LateInteractionEvaluator
    else:
        if model is not None:
            require_dimensions(dims, model)
        evaluator_class, options["truncate_dims"] = RetrievalEvaluator, dims

    def build(data: RetrievalDataset, own_name: str) -> SingleEvaluator:
        check_texts(data.corpus, documents)
        # A copy of a relevant page under another id would take its rank, and cost up to half the nDCG.
        if data.relevance_of(documents).num_copies:
            data = data.deduplicate(documents=documents)
        return evaluator_class(data, documents, name=own_name, **options)

    return build_for_each(dataset, name, build)


def require_dimensions(dims: Sequence[int | None], model: Retriever, full: int | None = None) -> None:
    """Make sure that the model can be cut to these dimensions; ``None`` is the full size.

    Args:
        dims: The sizes.
        model: The model.
        full: How many its vectors have; ``None`` asks the model, which need not know.

    Raises:
        ConfigError: A dimension is larger than the model's.
    """
    full = full or model.get_embedding_dimension()
    larger = [dim for dim in dims if dim is not None and full is not None and dim > full]
    if larger:
        raise ConfigError(
            f"The dimension {larger[0]} is larger than the {full} dimensions that the model gives. "
            f"Truncation only shortens: name dimensions of up to {full}."
        )
