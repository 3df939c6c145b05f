"""The evaluator for rerankers: candidates of a dataset or of a retriever, graded, ties averaged."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from sentence_transformers import CrossEncoder
from sentence_transformers.base.evaluation import BaseEvaluator

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.judgements import CandidateList, Judgements
from mmtune.data.relevance import Direction
from mmtune.data.sources import DatasetsLike
from mmtune.errors import ConfigError
from mmtune.evaluation.corpus import ndcg
from mmtune.evaluation.mean import MeanEvaluator, evaluator_of_each
from mmtune.evaluation.metrics import average_precision, expected_gains, reciprocal_rank
from mmtune.inference.encoder import Encoder, portions_of
from mmtune.inference.first_stage import require_retriever, search
from mmtune.inference.pairs import PairReader, score_candidates


class RerankingEvaluator(BaseEvaluator):
    """nDCG, MRR and MAP of a reranker over lists of candidates that are read as they are scored.

    What differs from the host's ``CrossEncoderRerankingEvaluator``: pages are decoded a batch at a time; nDCG is
    graded; ties are averaged in every metric, not in nDCG alone; what is relevant and not among the candidates counts
    as not found; and ``per_query`` keeps the values behind each mean. Without ties, with binary judgements and
    everything relevant among the candidates the numbers are equal.

    Args:
        lists: The candidates.
        reader: Gives texts and documents by id.
        at_k: Depth of nDCG and of MRR; MAP is over all candidates, as the host's.
        name: Prefix of the metric keys.
        batch_size: Pairs a forward pass.
        show_progress_bar: Whether to show a bar over the pairs.

    Attributes:
        lists: The candidates.
        per_query: After a call, ``{metric key: {id of what asks: value}}``.
    """

    def __init__(
        self,
        lists: Sequence[CandidateList],
        reader: PairReader,
        *,
        at_k: int = 10,
        name: str = "vdr-rerank",
        batch_size: int = 16,
        show_progress_bar: bool = True,
    ) -> None:
        super().__init__()
        self.lists = list(lists)
        self.at_k = at_k
        self.name = name
        self.batch_size = batch_size
        self.primary_metric = f"{name}_ndcg@{at_k}"
        self.per_query: dict[str, dict[str, float]] = {}
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
        options = {"batch_size": self.batch_size, "show_progress_bar": self._shows_progress}
        scores = score_candidates(model, self.lists, self._reader, **options)
        values = [self._values(each, part) for each, part in zip(self.lists, scores, strict=True)]
        ids = [each.asking_id for each in self.lists]
        self.per_query = {
            f"{self.name}_{metric}": dict(zip(ids, (each[metric] for each in values), strict=True))
            for metric in values[0]
        }
        metrics = {key: float(np.mean(list(part.values()))) for key, part in self.per_query.items()}
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        if output_path is not None:
            self._write_csv(Path(output_path), metrics, epoch, steps)
        return metrics

    def metric_name(self, model: CrossEncoder) -> str:
        """The key of the metric that says how good a reranker is: nDCG."""
        return f"{self.name}_ndcg@{self.at_k}"

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says about the evaluation."""
        return {"at_k": self.at_k, "direction": self._reader.direction}

    def _values(self, candidates: CandidateList, scores: np.ndarray) -> dict[str, float]:
        gains = np.array(candidates.gains)
        return {
            f"ndcg@{self.at_k}": ndcg(expected_gains(scores, gains).tolist(), candidates.all_gains, self.at_k),
            f"mrr@{self.at_k}": reciprocal_rank(scores, gains > 0, self.at_k),
            "map": average_precision(scores, gains > 0, len(candidates.all_gains)),
        }

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
    direction: Direction = "text_to_image",
    num_candidates: int = 10,
    name: str = "vdr-rerank",
    batch_size: int = 16,
    documents: DocumentKind = "image",
    retriever: Encoder | None = None,
    always_rerank_positives: bool = True,
    at_k: int = 10,
    seed: int = 42,
    show_progress_bar: bool = True,
) -> AnyRerankingEvaluator:
    """An evaluator of rerankers, for ``evaluator=`` of ``CrossEncoderTrainer`` or for ``evaluator(model)``.

    Each list holds everything that is relevant, and fills up with what is not: first the negatives that the dataset
    lists, then random ones; or what ``retriever`` finds. Nothing that is relevant to the same text, under any id or as
    a byte-identical page, counts as wrong. With one relevant of ten candidates, chance is nDCG@10 0.454.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes. Several by
            name are evaluated one after the other, as ``vdr-rerank-<name>_ndcg@10``, and averaged, as
            ``vdr-rerank-mean_ndcg@10``.
        direction: ``"text_to_image"`` asks with a text for pages; ``"image_to_text"`` asks with a page for query texts.
        num_candidates: The length of each list, what is relevant included; 2 or more.
        name: Prefix of the metric keys.
        batch_size: Pairs a forward pass.
        documents: What a document is made of: ``"image"``, ``"text"`` or ``"text+image"``.
        retriever: Takes its best candidates instead of the dataset's. It encodes once, now, and is not kept.
        always_rerank_positives: Whether what is relevant is added where the retriever has not found it. ``False``
            ranks the retriever's first ``num_candidates`` as they are, and what it has lost stays lost.
        at_k: Depth of nDCG and of MRR; MAP is over all candidates.
        seed: Of the random candidates.
        show_progress_bar: Whether to show a bar.

    Raises:
        ConfigError: An argument has a value it can't have, there are fewer documents (or texts) than
            ``num_candidates``, a query has more relevant ones, or the corpus lacks what ``documents`` asks for.
        DatasetError: The data can't be read, or its layout is unknown.

    Example:
        >>> from mmtune.evaluation.reranking import build_reranking_evaluator
        >>> from mmtune.testing import generated_pages
        >>> evaluator = build_reranking_evaluator(generated_pages(8), num_candidates=4, show_progress_bar=False)
        >>> len(evaluator.lists), len(evaluator.lists[0].candidate_ids), evaluator.primary_metric
        (8, 4, 'vdr-rerank_ndcg@10')
    """
    _require_whole("num_candidates", num_candidates, at_least=2)
    _require_whole("at_k", at_k, at_least=1)
    portions_of((), batch_size)
    source = _CandidateSource(direction, num_candidates, documents, retriever, always_rerank_positives, seed)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    build = partial(_evaluator, source=source, at_k=at_k, options=options)
    return evaluator_of_each(dataset, name, build)


@dataclass(frozen=True)
class _CandidateSource:
    """Where candidates come from; the fields are arguments of ``build_reranking_evaluator``."""

    direction: Direction
    num_candidates: int
    documents: DocumentKind
    retriever: Encoder | None
    always_rerank_positives: bool
    seed: int

    def __post_init__(self) -> None:
        if self.retriever is not None:
            require_retriever(self.retriever)
        elif not self.always_rerank_positives:
            raise ConfigError(
                "always_rerank_positives=False without a retriever: the candidates of a dataset always hold what is "
                "relevant. Pass retriever=, or leave it out."
            )

    def lists(self, data: RetrievalDataset, reader: PairReader, options: Mapping[str, Any]) -> list[CandidateList]:
        """The candidates of a dataset; one encoding where there is a retriever."""
        judgements = Judgements.of(data.relevance, self.direction)
        judgements.require_candidates(self.num_candidates, all_relevant=self.always_rerank_positives)
        if self.retriever is None:
            return judgements.lists(self.num_candidates, seed=self.seed)
        # deep enough to stay full when what is relevant is taken out
        most = int(judgements.relevant.lengths.max()) if self.always_rerank_positives else 0
        depth = min(self.num_candidates + most, len(judgements.distinct_items))
        found = search(self.retriever, judgements, reader, depth=depth, **options).found
        if not self.always_rerank_positives:
            return judgements.lists_as_ranked(found)
        return judgements.lists(self.num_candidates, seed=self.seed, ranked=found)


def _evaluator(
    data: RetrievalDataset, name: str, *, source: _CandidateSource, at_k: int, options: Mapping[str, Any]
) -> RerankingEvaluator:
    reader = PairReader.of(data, source.documents, source.direction)
    return RerankingEvaluator(source.lists(data, reader, options), reader, at_k=at_k, name=name, **options)


def _require_whole(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name}={value!r}: expected a whole number of {at_least} or more.")
