"""A retriever and a reranker together: what each depth of reranking gains, loses and costs."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from mmtune.arguments import require_whole, require_wholes
from mmtune.data.documents import DocumentKind, require_pairs_of
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.judgements import CandidateList, Judgements
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError
from mmtune.evaluation.metrics import expected_gains, ndcg
from mmtune.inference.encoder import DatasetReader, Retriever, require_retriever
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.search import search
from mmtune.models.late_interaction import is_late_interaction
from mmtune.models.loading import load_host_model
from mmtune.models.opening import LoadOptions, open_checkpoint
from mmtune.models.rerankers import build_reranker, is_reranker

_DEPTHS = (5, 10, 20, 50)
_CALL = "evaluate_pipeline(retriever, reranker, dataset)"
_LOST_SHOWN = 10


@dataclass(frozen=True)
class StageTimes:
    """Seconds that each stage took, decoding of pages included.

    Attributes:
        corpus_encoding_s: For the whole corpus; an index pays this once.
        query_encoding_s: A query.
        search_s: A query, compared with the corpus.
        pair_scoring_s: A query with one document.
    """

    corpus_encoding_s: float
    query_encoding_s: float
    search_s: float
    pair_scoring_s: float


@dataclass(frozen=True)
class DepthResult:
    """What reranking the first ``depth`` documents does.

    Attributes:
        depth: Documents that are reranked a query.
        recall: The share of the relevant documents that the first stage has among these, averaged over queries.
        ndcg: After reranking; documents below ``depth`` keep the order of the first stage.
        lost_query_ids: Queries without any relevant document among these: no reranker can help them.
        reranking_s: Seconds to rerank a query.
    """

    depth: int
    recall: float
    ndcg: float
    lost_query_ids: tuple[str, ...]
    reranking_s: float


@dataclass(frozen=True)
class PipelineReport:
    """What ``evaluate_pipeline`` measured. ``print`` it for a table by depth.

    Attributes:
        depths: How many documents are reranked a query, ascending.
        ndcg_at_k: Depth of nDCG.
        num_documents: Documents of different content.
        times: Seconds of each stage.
        per_query: ``{metric key: {query id: value}}`` with ``ndcg@10_before``, and for each depth ``recall@20`` and
            ``ndcg@10_after@20``.
    """

    depths: tuple[int, ...]
    ndcg_at_k: int
    num_documents: int
    times: StageTimes
    per_query: Mapping[str, Mapping[str, float]]

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each of ``per_query`` over the queries."""
        return {key: float(np.mean(list(values.values()))) for key, values in self.per_query.items()}

    @property
    def rows(self) -> tuple[DepthResult, ...]:
        """The result at each depth."""
        metrics = self.metrics
        return tuple(
            DepthResult(
                depth=depth,
                recall=metrics[f"recall@{depth}"],
                ndcg=metrics[f"ndcg@{self.ndcg_at_k}_after@{depth}"],
                lost_query_ids=tuple(at for at, value in self.per_query[f"recall@{depth}"].items() if not value),
                reranking_s=depth * self.times.pair_scoring_s,
            )
            for depth in self.depths
        )

    @property
    def ndcg_before(self) -> float:
        """What the first stage has alone, as nDCG."""
        return self.metrics[f"ndcg@{self.ndcg_at_k}_before"]

    @property
    def num_queries(self) -> int:
        """Queries that were asked."""
        return len(self.per_query[f"ndcg@{self.ndcg_at_k}_before"])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``pipeline.md`` for people and ``pipeline.json`` for programs, over those that are there.

        Args:
            folder: Made where it is not there.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        lost = ["## Queries that the first stage lost", ""]
        for row in self.rows:
            ids, more = row.lost_query_ids[:_LOST_SHOWN], len(row.lost_query_ids) - _LOST_SHOWN
            shown = ", ".join(f"`{query_id}`" for query_id in ids) or "none"
            lost.append(f"- depth {row.depth}: {shown}" + (f" and {more} more in `pipeline.json`" * (more > 0)))
        text = "\n".join(["# Retriever and reranker", "", str(self), "", *lost, ""])
        (path / "pipeline.md").write_text(text, encoding="utf-8")
        values = {"num_queries": self.num_queries, "metrics": self.metrics, "rows": [asdict(row) for row in self.rows]}
        text = json.dumps({**values, **asdict(self)}, indent=2, ensure_ascii=False)
        (path / "pipeline.json").write_text(f"{text}\n", encoding="utf-8")

    def __str__(self) -> str:
        name, before = f"nDCG@{self.ndcg_at_k}", self.ndcg_before
        header = ["depth", "recall", "lost queries", f"{name} before", "after", "change", "seconds a query"]
        table = [header, ["---:"] * len(header)]
        for row in self.rows:
            cells = [str(row.depth), f"{row.recall:.4f}", str(len(row.lost_query_ids)), f"{before:.4f}"]
            table.append([*cells, f"{row.ndcg:.4f}", f"{row.ndcg - before:+.4f}", f"{row.reranking_s:.4f}"])
        # Columns line up in a terminal, too.
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        title = f"{self.num_queries} queries, {self.num_documents} documents; the first `depth` are reranked"
        times = (
            f"Encoding the corpus took {self.times.corpus_encoding_s:.1f} s. Before reranking, a query is encoded in "
            f"{1000 * self.times.query_encoding_s:.2f} ms and searched for in {1000 * self.times.search_s:.2f} ms."
        )
        return "\n".join([title, "", *(f"| {line} |" for line in lines), "", times])


def evaluate_pipeline(
    retriever: Retriever | str | os.PathLike[str],
    reranker: CrossEncoder | str | os.PathLike[str],
    dataset: DatasetLike,
    *,
    depths: Sequence[int] | None = None,
    documents: DocumentKind = "image",
    ndcg_at_k: int = 10,
    batch_size: int = 16,
    show_progress_bar: bool = True,
    queries: QueryKind = "text",
) -> PipelineReport:
    """What a reranker adds to a retriever over a corpus, for each depth of reranking.

    Queries and corpus are encoded once, and each query is scored once with its deepest list; shallower lists are its
    beginning. What the reranker ties is averaged, as in ``build_reranking_evaluator``. Byte-identical pages are one
    document, and everything relevant to the text of a query is relevant to it.

    Args:
        retriever: A ``SentenceTransformer`` or a ``MultiVectorEncoder``, or a checkpoint of one, a folder or a name on
            the Hub.
        reranker: A ``CrossEncoder`` with one score a pair, or a checkpoint for ``build_reranker``.
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes.
        depths: How many documents are reranked a query. ``None`` is 5, 10, 20 and 50 as far as the corpus has them,
            and all of a smaller corpus.
        documents: What a document is made of: ``"image"``, ``"text"``, ``"text+image"``, ``"video"`` or ``"mixed"``.
        ndcg_at_k: Depth of nDCG.
        batch_size: Texts, documents or pairs a forward pass.
        show_progress_bar: Whether to show bars.
        queries: What a query is made of, likewise.

    Returns:
        The report; its ``save`` writes it to a folder.

    Raises:
        ConfigError: A depth is not positive or larger than the corpus, a model is of the wrong kind or can't be
            loaded, or the data lack what ``documents`` or ``queries`` asks for.
        DatasetError: The data can't be read, its layout is unknown, or a model gives no finite numbers for an item.

    Example:
        >>> from mmtune.evaluation.pipeline import PipelineReport, StageTimes
        >>> per_query = {
        ...     "ndcg@10_before": {"q1": 0.63, "q2": 0.0},
        ...     "recall@5": {"q1": 1.0, "q2": 0.0},
        ...     "ndcg@10_after@5": {"q1": 1.0, "q2": 0.0},
        ... }
        >>> print(PipelineReport((5,), 10, 8, StageTimes(1.0, 0.01, 0.001, 0.04), per_query))
        2 queries, 8 documents; the first `depth` are reranked
        <BLANKLINE>
        | depth | recall | lost queries | nDCG@10 before |  after |  change | seconds a query |
        |  ---: |   ---: |         ---: |           ---: |   ---: |    ---: |            ---: |
        |     5 | 0.5000 |            1 |         0.3150 | 0.5000 | +0.1850 |          0.2000 |
        <BLANKLINE>
        Encoding the corpus took 1.0 s. Before reranking, a query is encoded in 10.00 ms and searched for in 1.00 ms.
    """
    # Weights are loaded after everything else has been checked.
    require_pairs_of(documents, queries)
    if not isinstance(retriever, (str, os.PathLike)):
        require_retriever(retriever, "retriever", _CALL)
    if not isinstance(reranker, (str, os.PathLike)):
        require_reranker(reranker, "reranker", f"The call is {_CALL}.")
    k = require_whole("ndcg_at_k", ndcg_at_k)
    size = require_whole("batch_size", batch_size)
    data = as_retrieval_dataset(dataset)
    judgements = Judgements.of(data.relevance_of(documents, queries), "text_to_image")
    num_documents = len(judgements.distinct_items)
    chosen = _choose_depths(depths, num_documents)
    reader = DatasetReader(data.corpus, data.queries, documents, queries)
    require_pairs_of(documents, queries, reader.kinds)

    retriever, reranker = open_retriever(retriever, documents), _open_reranker(reranker)

    # nDCG may look below the reranked documents.
    deepest = min(max(chosen[-1], k), num_documents)
    first_stage = search(
        retriever, judgements, reader, depth=deepest, batch_size=size, show_progress_bar=show_progress_bar
    )
    started = time.perf_counter()
    to_rerank = judgements.lists_as_ranked(first_stage.found[:, : chosen[-1]])
    scores = PairScorer(reranker, reader, size, show_progress_bar).score_lists(to_rerank)
    scored_s = time.perf_counter() - started

    ranked = judgements.lists_as_ranked(first_stage.found)
    times = StageTimes(
        corpus_encoding_s=first_stage.documents_s,
        query_encoding_s=first_stage.queries_s / len(ranked),
        search_s=first_stage.search_s / len(ranked),
        pair_scoring_s=scored_s / (len(ranked) * chosen[-1]),
    )
    return PipelineReport(tuple(chosen), k, num_documents, times, measure_queries(ranked, scores, chosen, k))


def open_retriever(
    model: Retriever | str | os.PathLike[str], documents: DocumentKind, options: LoadOptions | None = None
) -> Retriever:
    """A retriever as it is, or what a checkpoint holds: a ``SentenceTransformer`` or a ``MultiVectorEncoder``.

    Args:
        model: The model, or the folder or Hub name of a checkpoint.
        documents: What it must read.
        options: How a checkpoint is loaded.

    Raises:
        ConfigError: The checkpoint can't be loaded, or is a reranker's.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model
    path, options = os.fspath(model), options or LoadOptions()
    if is_reranker(open_checkpoint(path, options)):  # the host would take its head off and pool what is left
        raise ConfigError(f"{path!r} is a reranker, which scores pairs. Pass the checkpoint of one that embeds.")
    kind = MultiVectorEncoder if is_late_interaction(path, options) else SentenceTransformer
    return load_host_model(kind, path, options, modality="image" if "image" in documents else "text")


def _open_reranker(model: CrossEncoder | str | os.PathLike[str]) -> CrossEncoder:
    if not isinstance(model, (str, os.PathLike)):
        return model
    try:
        reranker = build_reranker(os.fspath(model))
    except ConfigError as error:
        raise ConfigError(f"{error} It was given as reranker= of {_CALL}.") from error
    require_reranker(reranker)
    return reranker


def measure_queries(
    ranked: Sequence[CandidateList], scores: Sequence[np.ndarray], depths: Sequence[int], k: int
) -> dict[str, dict[str, float]]:
    """The metrics of each query by key.

    Args:
        ranked: What the first stage found, best first.
        scores: What the reranker gives to the first of these, as many as the deepest list holds.
        depths: How many are reranked.
        k: Depth of nDCG.
    """
    found: dict[str, dict[str, float]] = {f"ndcg@{k}_before": {}}
    found |= {key: {} for depth in depths for key in (f"recall@{depth}", f"ndcg@{k}_after@{depth}")}
    for each, own in zip(ranked, scores, strict=True):
        gains = np.array(each.gains)
        found[f"ndcg@{k}_before"][each.asking_id] = ndcg(gains.tolist(), each.all_gains, k)
        for depth in depths:
            after = np.r_[expected_gains(own[:depth], gains[:depth]), gains[depth:]]
            recall = np.count_nonzero(gains[:depth]) / len(each.all_gains)
            found[f"recall@{depth}"][each.asking_id] = recall
            found[f"ndcg@{k}_after@{depth}"][each.asking_id] = ndcg(after.tolist(), each.all_gains, k)
    return found


def _choose_depths(depths: Sequence[int] | None, num_documents: int) -> list[int]:
    if depths is None:
        return [depth for depth in _DEPTHS if depth <= num_documents] or [num_documents]
    chosen = sorted(set(require_wholes("depths", depths)))
    if not chosen:
        raise ConfigError("depths is empty. Give at least one depth, e.g. (10,).")
    if chosen[-1] > num_documents:
        raise ConfigError(
            f"depths holds {chosen[-1]}, and the corpus has {num_documents} different documents. Leave that depth out."
        )
    return chosen
