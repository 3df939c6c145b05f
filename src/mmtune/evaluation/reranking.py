"""The evaluator for rerankers: candidates of a dataset or of a retriever, graded, ties averaged."""

import csv
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from sentence_transformers import CrossEncoder
from sentence_transformers.base.evaluation import BaseEvaluator

from mmtune.arguments import require_name, require_whole
from mmtune.data.clusters import connected_documents, connected_queries
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, require_pairs_of
from mmtune.data.intake import DatasetsLike
from mmtune.data.judgements import CandidateList, Judgements
from mmtune.data.query_kinds import QueryKind
from mmtune.data.relevance import Direction, DirectionName, resolve_direction
from mmtune.errors import ConfigError
from mmtune.evaluation.mean import MeanEvaluator, build_for_each
from mmtune.evaluation.metrics import average_precision, expected_gains, ndcg, reciprocal_rank
from mmtune.inference.encoder import DatasetReader, Retriever, require_retriever
from mmtune.inference.reranker import PairScorer
from mmtune.inference.search import search

_SAMPLE_LISTS = 2


class RerankingEvaluator(BaseEvaluator):
    """nDCG, MRR and MAP of a reranker over lists of candidates that are read as they are scored.

    What differs from the host's ``CrossEncoderRerankingEvaluator``: pages are decoded a batch at a time; nDCG is
    graded; ties are averaged in every metric, not in nDCG alone; what is relevant and not among the candidates counts
    as not found; and ``per_query`` keeps the values behind each mean. Without ties, with binary judgements and
    everything relevant among the candidates the numbers are equal.

    Args:
        lists: The candidates.
        reader: Gives texts and documents by id.
        data: What is evaluated on.
        direction: What asks.
        at_k: Depth of nDCG and of MRR; MAP is over all candidates, as the host's.
        name: Prefix of the metric keys.
        batch_size: Pairs a forward pass.
        show_progress_bar: Whether to show a bar over the pairs.

    Attributes:
        model_class: The kind of model that it scores.
        lists: The candidates, each with ``asking_id`` and ``candidate_ids``.
        data: What is evaluated on.
        batch_size: Pairs a forward pass; what is set here holds from the next call on.
        write_csv: Whether a call with an output folder adds a line to a CSV file there, as the host's evaluators do.
        per_query: After a call, ``{metric key: {id of what asks: value}}``.
        top_ids: After a call, ``{id of what asks: [candidate id, ...]}``, best first; ties stand as in ``lists``.
    """

    model_class = CrossEncoder

    def __init__(
        self,
        lists: Sequence[CandidateList],
        reader: DatasetReader,
        data: RetrievalDataset,
        *,
        direction: Direction = "text_to_image",
        at_k: int = 10,
        name: str = "vdr-rerank",
        batch_size: int = 16,
        show_progress_bar: bool = True,
    ) -> None:
        super().__init__()
        self.lists = list(lists)
        self.data = data
        self.direction: Direction = direction
        self.at_k = at_k
        self.name = name
        self.batch_size = batch_size
        self.primary_metric = f"{name}_ndcg@{at_k}"
        self.write_csv = True
        self.per_query: dict[str, dict[str, float]] = {}
        self.top_ids: dict[str, list[str]] = {}
        self._reader = reader
        self._shows_progress = show_progress_bar

    def __call__(
        self, model: CrossEncoder, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of ``model``: ``vdr-rerank_ndcg@10``, ``vdr-rerank_mrr@10`` and ``vdr-rerank_map``.

        Raises:
            ConfigError: The model is no reranker, or gives a score that is not a number.
            ImageDecodeError: A page is no readable image; the message names the document.
        """
        scorer = PairScorer(model, self._reader, self.batch_size, self._shows_progress, direction=self.direction)
        names = f"{self.name}_ndcg@{self.at_k}", f"{self.name}_mrr@{self.at_k}", f"{self.name}_map"
        self.per_query, self.top_ids = {name: {} for name in names}, {}
        for each, scores in zip(self.lists, scorer.score_lists(self.lists), strict=True):
            gains = np.array(each.gains)
            values = (
                ndcg(expected_gains(scores, gains).tolist(), each.all_gains, self.at_k),
                reciprocal_rank(scores, gains > 0, self.at_k),
                average_precision(scores, gains > 0, len(each.all_gains)),
            )
            for name, value in zip(names, values, strict=True):
                self.per_query[name][each.asking_id] = value
            ranking = np.argsort(-scores, kind="stable").tolist()
            self.top_ids[each.asking_id] = [each.candidate_ids[at] for at in ranking]
        metrics = {key: float(np.mean(list(part.values()))) for key, part in self.per_query.items()}
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        if output_path is not None and self.write_csv:
            self._write_csv(Path(output_path), metrics, epoch, steps)
        return metrics

    @cached_property
    def groups(self) -> dict[str, str]:
        """``{id of what asks: cluster}``: what shares pages or texts, directly or by others, is of one cluster."""
        connected = connected_queries if self.direction == "text_to_image" else connected_documents
        return connected(self.data.relevance_of(self._reader.kind, self._reader.query_kind))

    def measure_effect_of_batch_size(self, model: CrossEncoder) -> float:
        """How far scores move with what else is in their batch: the largest change, over one or two lists."""
        sample = self.lists[:_SAMPLE_LISTS]
        alone, together = (
            PairScorer(model, self._reader, size, show_progress_bar=False, direction=self.direction).score_lists(sample)
            for size in (1, max(2, self.batch_size))  # not larger than the evaluation's, which may not fit
        )
        return max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))

    def metric_name(self, model: CrossEncoder) -> str:
        """The key of the metric that says how good a reranker is: nDCG."""
        return f"{self.name}_ndcg@{self.at_k}"

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says about the evaluation."""
        return {"at_k": self.at_k, "direction": self.direction}

    def _write_csv(self, folder: Path, metrics: Mapping[str, float], epoch: int, steps: int) -> None:
        """One line a call, as the host's evaluators write."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"RerankingEvaluator_{self.name}_results.csv"
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["epoch", "steps", *metrics])
            writer.writerow([epoch, steps, *metrics.values()])


AnyRerankingEvaluator: TypeAlias = RerankingEvaluator | MeanEvaluator
"""What ``build_reranking_evaluator`` returns: for one dataset, or for several by name."""


def build_reranking_evaluator(
    dataset: DatasetsLike,
    *,
    direction: DirectionName = "text_to_image",
    num_candidates: int = 10,
    name: str = "vdr-rerank",
    batch_size: int = 16,
    documents: DocumentKind = "image",
    retriever: Retriever | None = None,
    always_rerank_positives: bool = True,
    at_k: int = 10,
    seed: int = 42,
    show_progress_bar: bool = True,
    queries: QueryKind = "text",
) -> AnyRerankingEvaluator:
    """An evaluator of rerankers, for ``evaluator=`` of ``CrossEncoderTrainer`` or for ``evaluator(model)``.

    Each list holds what is relevant and ``num_candidates - 1`` wrong candidates: first the negatives that the dataset
    lists, then random ones; or what ``retriever`` finds. Nothing that is relevant to the same text, under any id or as
    a byte-identical page, counts as wrong. With one relevant of ten candidates, chance is nDCG@10 0.454; lists in which
    more is relevant are longer, so that chance stays near it (0.45 to 0.56). Where more is relevant than both
    ``num_candidates`` and ``at_k``, the best of that are in the list, and the rest counts as not found in MAP.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes. Several by
            name are evaluated one after the other, as ``vdr-rerank-<name>_ndcg@10``, and averaged, as
            ``vdr-rerank-mean_ndcg@10``.
        direction: ``"text_to_image"`` asks with a query for documents, whatever both are made of; ``"image_to_text"``
            asks with a document for queries. What they are made of may stand in their place: ``"video_to_text"``.
        num_candidates: The length of a list with one relevant candidate, which is included; 2 or more.
        name: Prefix of the metric keys.
        batch_size: Pairs a forward pass.
        documents: What a document is made of: ``"image"``, ``"text"``, ``"text+image"``, ``"video"`` or ``"mixed"``.
        retriever: Takes its best candidates instead of the dataset's. It encodes once, now, and is not kept.
        always_rerank_positives: Whether what is relevant is added where the retriever has not found it. ``False``
            ranks the retriever's first ``num_candidates`` as they are, and what it has lost stays lost.
        at_k: Depth of nDCG and of MRR; MAP is over all candidates.
        seed: Of the random candidates.
        show_progress_bar: Whether to show a bar.
        queries: What a query is made of, likewise.

    Raises:
        ConfigError: An argument has a value it can't have, there are fewer documents (or texts) than
            ``num_candidates``, everything is relevant to a query, or the data lack what ``documents`` or ``queries``
            asks for.
        DatasetError: The data can't be read, or its layout is unknown.

    Example:
        >>> from mmtune.evaluation.reranking import build_reranking_evaluator
        >>> from mmtune.testing import generated_pages
        >>> evaluator = build_reranking_evaluator(generated_pages(8), num_candidates=4, show_progress_bar=False)
        >>> len(evaluator.lists), len(evaluator.lists[0].candidate_ids), evaluator.primary_metric
        (8, 4, 'vdr-rerank_ndcg@10')
    """
    require_pairs_of(documents, queries)
    asking = resolve_direction(direction, queries, documents)
    count = require_whole("num_candidates", num_candidates, at_least=2)
    depth = require_whole("at_k", at_k)
    require_name("name", name)
    drawing_seed = require_whole("seed", seed, at_least=0)
    size = require_whole("batch_size", batch_size)
    options: dict[str, Any] = {"batch_size": size, "show_progress_bar": show_progress_bar}
    if retriever is not None:
        require_retriever(retriever, "retriever", "build_reranking_evaluator(dataset, retriever=model)")
    elif not always_rerank_positives:
        raise ConfigError(
            "always_rerank_positives=False without a retriever: the candidates of a dataset always hold what is "
            "relevant. Pass retriever=, or leave it out."
        )

    def build(data: RetrievalDataset, own_name: str) -> RerankingEvaluator:
        reader = DatasetReader(data.corpus, data.queries, documents, queries)
        judgements = Judgements.of(data.relevance_of(documents, queries), asking)
        judgements.require_candidates(count)
        # As many relevant ones as nDCG looks at.
        filling: dict[str, Any] = {"seed": drawing_seed, "most_relevant": max(count, depth)}
        if retriever is None:
            lists = judgements.lists(count, **filling)
        else:
            # Deep enough to stay full when what is relevant is taken out.
            more = int(judgements.relevant.lengths.max()) if always_rerank_positives else 0
            wanted = min(count + more, len(judgements.distinct_items))
            found = search(retriever, judgements, reader, depth=wanted, **options).found
            if always_rerank_positives:
                lists = judgements.lists(count, ranked=found, **filling)
            else:
                lists = judgements.lists_as_ranked(found)
        return RerankingEvaluator(lists, reader, data, direction=asking, at_k=depth, name=own_name, **options)

    return build_for_each(dataset, name, build)
