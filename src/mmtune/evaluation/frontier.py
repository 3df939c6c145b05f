"""How small may an embedding be: every size, kind of number and token pooling, measured from one encoding."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder
from tqdm.auto import tqdm

from mmtune.arguments import (
    advise_number,
    listed,
    require_flag,
    require_number,
    require_one_of,
    require_path,
    require_whole,
    require_wholes,
    shown,
)
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, check_texts
from mmtune.data.identity import document_digests
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError, DatasetError
from mmtune.evaluation.base import CorpusEvaluator
from mmtune.evaluation.metrics import expected_gains, ndcg
from mmtune.evaluation.quantization import DTYPES, DType, Encoded, KeptDocuments, keep_each
from mmtune.evaluation.retrieval import build_evaluator, require_dimensions
from mmtune.evaluation.significance import (
    FEW_CLUSTERS,
    FEWEST_CLUSTERS,
    LEVEL,
    correct_for_several,
    flip_signs,
    mean_interval,
)
from mmtune.inference.encoder import DatasetReader, Retriever, as_float32, encode_shards, join, require_retriever
from mmtune.inference.search import not_finite
from mmtune.inference.store import Embeddings
from mmtune.inference.vectors import Vectors
from mmtune.report.plots import draw_frontier

DIMS = (2048, 1536, 1024, 512, 256, 128, 64, 32)
"""What is measured below the size of a model where nothing else is asked for."""

POOL_FACTORS = (1, 2, 4)
"""Of the tokens of a document, for late interaction: all, about a half, about a quarter."""

logger = logging.getLogger(__name__)

_DEPTH = 10
_MEASURE = f"nDCG@{_DEPTH}"
_QUERIES_AT_ONCE = 128
_FEW_DOCUMENTS = 100  # the host warns below it, too


@dataclass(frozen=True)
class FrontierRow:
    """What one way to keep documents costs and gives.

    Attributes:
        dim: Numbers a vector.
        dtype: What a number is kept as. Queries are float32 throughout.
        pooling: The factor by which token pooling divides the vectors of a document; ``None`` where it has one vector.
        ndcg: nDCG@10, the mean over the queries; of equal scores the mean over all their orders.
        interval: Of ``ndcg``, at 95%, cluster-robust; ``None`` where all queries hang together.
        bytes_per_document: Mean over the documents, of the vectors alone.
        p_value: Of losing the tolerance or more against the best row, corrected for the number of rows; ``None`` for
            the best row itself.
    """

    dim: int
    dtype: DType
    pooling: int | None
    ndcg: float
    interval: tuple[float, float] | None
    bytes_per_document: float
    p_value: float | None = None

    @property
    def name(self) -> str:
        """What is measured, e.g. ``"256d int8"`` or ``"128d float32, pooled by 2"``."""
        return f"{self.dim}d {self.dtype}" + (f", pooled by {self.pooling}" if (self.pooling or 1) > 1 else "")

    @property
    def cells(self) -> list[str]:
        """The row as text."""
        span = f"{self.interval[0]:.3f} to {self.interval[1]:.3f}" if self.interval else ""
        shown_p = "best" if self.p_value is None else "< 0.001" if self.p_value < 0.001 else f"{self.p_value:.3f}"
        size = f"{self.bytes_per_document:,.0f}"
        return [str(self.dim), self.dtype, str(self.pooling or ""), size, f"{self.ndcg:.4f}", span, shown_p]


@dataclass(frozen=True)
class Frontier:
    """What ``size_frontier`` measured. ``print`` it for a table; ``plot`` draws it.

    Attributes:
        rows: Every combination: by token pooling, then from many to few dimensions, then by kind of number.
        recommended: The smallest row in bytes that is shown to lose less than ``tolerance`` against the best; the best
            itself where none is. With fewer than 10 clusters nothing can be shown, and it is the largest.
        reason: Why that one, in a sentence.
        tolerance: How much nDCG a smaller size may lose.
        calibration: What the ranges of int8 are from; ``""`` where int8 was not measured.
        per_query: ``{row.name: {query id: nDCG@10}}``, for ``compare_per_query``.
        num_documents: Documents of different content.
        num_clusters: Groups of queries that hang together, by the documents and texts that they share.
    """

    rows: tuple[FrontierRow, ...]
    recommended: FrontierRow
    reason: str
    tolerance: float
    calibration: str
    per_query: Mapping[str, Mapping[str, float]]
    num_documents: int
    num_clusters: int

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw nDCG over bytes a document, with intervals and a line for each kind of number; the best row is marked.

        Args:
            path: Where the picture goes, e.g. ``"sizes.png"`` or ``"sizes.svg"``; one that is there is replaced.

        Raises:
            ConfigError: The ending is of no picture, or the file can't be written.
            MissingExtraError: matplotlib is not installed.
        """
        require_path("path", path, what="a picture", advice="Pass e.g. path='sizes.png'.")
        lines: dict[str, list[Any]] = {}
        for row in self.rows:
            name = row.dtype + (f", pooled by {row.pooling}" if (row.pooling or 1) > 1 else "")
            lines.setdefault(name, []).append((row.bytes_per_document, row.ndcg, row.interval))
        chosen = (self.recommended.bytes_per_document, self.recommended.ndcg, self.recommended.interval)
        draw_frontier(lines, chosen, Path(path), measure=_MEASURE)
        return Path(path)

    def __str__(self) -> str:
        num_queries = len(next(iter(self.per_query.values())))
        title = (
            f"{_MEASURE} of {num_queries} queries in {self.num_clusters} independent groups, "
            f"{self.num_documents} documents; * is recommended"
        )
        lost = f"p, loses {self.tolerance:g} or more"
        header = ["", "dim", "dtype", "pooling", "bytes", _MEASURE, "95% interval", lost]
        marked = [["*" * (row is self.recommended), *row.cells] for row in self.rows]
        table = [header, ["---"] * 2 + ["---"] + ["---:"] * 5, *marked]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        note = f" int8 by the ranges of {self.calibration}." if self.calibration else ""
        return "\n".join([title, "", *(f"| {line} |" for line in lines), "", f"{self.reason}{note}"])


def size_frontier(
    model: Retriever,
    dataset: DatasetLike,
    *,
    dims: Sequence[int] | None = None,
    dtypes: Sequence[DType] = DTYPES,
    calibration: DatasetLike | None = None,
    tolerance: float = 0.01,
    pool_factors: Sequence[int] | None = None,
    documents: DocumentKind = "image",
    queries: QueryKind = "text",
    batch_size: int = 16,
    show_progress_bar: bool = True,
) -> Frontier:
    """What documents lose when they are kept in fewer numbers, fewer bits or fewer vectors, and what is small enough.

    Queries and corpus are encoded once, as ``build_evaluator`` does it. Each combination is then cut, brought to length
    1 where the model compares by cosine, quantised by the host, and compared exactly, with float32 queries: by the
    product with the numbers that int8 stands for, or with signs as -1 and +1. All embeddings are held in memory, also
    those of late interaction.

    A row is small enough where a test shows that it loses less than ``tolerance``: the differences from the best row,
    plus the tolerance, must be above 0 by flips of the signs of their sums in each cluster (as ``compare_per_query``),
    with p below 0.05 after Holm's correction for all rows. That few queries show no loss is not enough; they recommend
    a larger size.

    Args:
        model: A ``SentenceTransformer`` or a ``MultiVectorEncoder``.
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes.
        dims: Sizes to measure. ``None`` is the model's and those of 2048, 1536, 1024, 512, 256, 128, 64 and 32 below
            it; for late interaction, whose vectors are rarely trained to be cut, the model's alone.
        dtypes: Any of ``"float32"``, ``"int8"`` and ``"binary"``.
        calibration: A dataset for the ranges of int8, best one that was trained on: its documents are encoded, too, and
            its queries are not used. ``None`` takes the evaluated documents, which no index knows beforehand, and the
            table says so.
        tolerance: How much nDCG@10 may be lost, from 0 to below 1.
        pool_factors: For late interaction, by what to divide the vectors of a document, with the host's
            ``HierarchicalTokenPooling``; 1 pools nothing. ``None`` is 1, 2 and 4.
        documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
        queries: What a query is made of, likewise.
        batch_size: Documents or queries a forward pass.
        show_progress_bar: Whether to show bars.

    Raises:
        ConfigError: An argument does not fit, a dimension is larger than the model's, or the corpus lacks what
            ``documents`` asks for.
        DatasetError: The data can't be read, its layout is unknown, or the model gives no finite numbers for an item.
        ImageDecodeError: A page is no readable image; the message names the document.

    Example:
        >>> from mmtune import load_model, size_frontier
        >>> from mmtune.testing import generated_pages, tiny_clip
        >>> model = load_model(tiny_clip("tiny-clip"))
        >>> frontier = size_frontier(model, generated_pages(8), dims=[64, 32], dtypes=["int8", "binary"])
        >>> [(row.name, row.bytes_per_document) for row in frontier.rows]
        [('64d int8', 64.0), ('64d binary', 8.0), ('32d int8', 32.0), ('32d binary', 4.0)]
    """
    require_retriever(model, "model", "size_frontier(model, dataset)")
    dims_asked = _require_dims(dims, model)
    kinds = _require_dtypes(dtypes)
    allowed = require_number("tolerance", tolerance)
    if not 0 <= allowed < 1:
        advice = advise_number("tolerance", tolerance, lambda value: 0 <= value < 1, 0.01)
        raise ConfigError(f"tolerance={tolerance!r}: expected a number from 0 to below 1, of nDCG. {advice}")
    factors = _require_factors(pool_factors, model)
    require_flag("show_progress_bar", show_progress_bar)
    data = as_retrieval_dataset(dataset)
    calibrating = None if calibration is None else as_retrieval_dataset(calibration, "calibration")
    if calibrating is not None:
        _check_calibration(calibrating, documents)
        if "int8" not in kinds:
            logger.warning("calibration is not used: it is for int8, and dtypes are %s.", listed(kinds))
    options: dict[str, Any] = {"batch_size": require_whole("batch_size", batch_size)}
    options["show_progress_bar"] = show_progress_bar
    evaluator: Any = build_evaluator(
        data, model=model, documents=documents, queries=queries, ndcg_at_k=(_DEPTH,), **options
    )

    encoded_queries = Vectors.of(as_float32(evaluator.encode_queries(model), model.device))
    full = encoded_queries.values.shape[1]
    require_dimensions(dims_asked, model, full)
    kept = as_float32(join(evaluator.encode_documents(model)), model.device)
    ranged, source = kept, "the evaluated documents themselves, which flatters it: pass calibration="
    if calibrating is not None and "int8" in kinds:
        reader = DatasetReader(calibrating.corpus, calibrating.queries, documents)
        ids = calibrating.corpus["document_id"][:]
        ranged = join(encode_shards(model, "document", ids, reader, **options))
        source = _describe_calibration(calibrating.corpus, evaluator.data.corpus, documents)

    encoded = Encoded(model, encoded_queries, kept, ranged)
    chosen_dims = dims_asked or _default_dims(model, full)
    groups = evaluator.groups
    clusters = np.unique([groups[query_id] for query_id in evaluator.queries_ids], return_inverse=True)[1]
    rows: list[FrontierRow] = []
    values: list[np.ndarray] = []
    with tqdm(
        total=len(factors) * len(chosen_dims) * len(kinds),
        desc="Measuring sizes",
        disable=not show_progress_bar,
        leave=False,
    ) as bar:
        for way, asking, documents_kept in keep_each(encoded, chosen_dims, kinds, factors):
            values.append(_measure_queries(evaluator, encoded.similarity, asking, documents_kept))
            mean, interval = float(values[-1].mean()), mean_interval(values[-1], clusters)
            rows.append(FrontierRow(*way, mean, interval, documents_kept.bytes_per_document))
            bar.update()
    p_values = loss_p_values(rows, np.stack(values), clusters, allowed)
    rows = [replace(row, p_value=p_value) for row, p_value in zip(rows, p_values, strict=True)]
    recommended, reason = recommend(rows, allowed, num_clusters := int(clusters.max()) + 1)
    return Frontier(
        rows=tuple(rows),
        recommended=recommended,
        reason=reason,
        tolerance=allowed,
        calibration=source if "int8" in kinds else "",
        per_query={
            row.name: dict(zip(evaluator.queries_ids, own.tolist(), strict=True))
            for row, own in zip(rows, values, strict=True)
        },
        num_documents=len(evaluator.corpus_ids),
        num_clusters=num_clusters,
    )


def _require_dims(dims: Sequence[int] | None, model: Retriever) -> tuple[int, ...]:
    """The sizes that were asked for, largest first; none where nothing was."""
    if dims is None:
        return ()
    given = require_wholes("dims", dims, or_else="None", example="[64, 32]")
    if not given:
        raise ConfigError("dims is empty. Name a size, e.g. dims=[64, 32], or leave it out.")
    require_dimensions(given, model)
    return tuple(sorted(set(given), reverse=True))


def _default_dims(model: Retriever, full: int) -> tuple[int, ...]:
    return (full,) if isinstance(model, MultiVectorEncoder) else (full, *(dim for dim in DIMS if dim < full))


def _require_dtypes(dtypes: object) -> tuple[DType, ...]:
    if isinstance(dtypes, str) or not isinstance(dtypes, Iterable):
        raise ConfigError(f"dtypes={shown(dtypes)}: expected a list of some of {listed(DTYPES)}.")
    given = list(dtypes)
    if not given:
        raise ConfigError(f"dtypes is empty. Pass some of {listed(DTYPES)}, or leave it out.")
    for each in given:
        require_one_of("dtypes holds", each, DTYPES)
    return tuple(dict.fromkeys(given))


def _require_factors(factors: Sequence[int] | None, model: Retriever) -> tuple[int | None, ...]:
    """The pooling factors, smallest first; ``None`` alone for a model with one vector a document."""
    if not isinstance(model, MultiVectorEncoder):
        if factors is not None:
            raise ConfigError(
                f"pool_factors={shown(factors)}: the model gives one vector a document, and there is nothing to pool. "
                "Leave pool_factors out; it is for late interaction."
            )
        return (None,)
    given = require_wholes(
        "pool_factors", POOL_FACTORS if factors is None else factors, or_else="None", example="[1, 2]"
    )
    if not given:
        raise ConfigError("pool_factors is empty. Name a factor, e.g. pool_factors=[1, 2], or leave it out.")
    return tuple(sorted(set(given)))


def _check_calibration(data: RetrievalDataset, documents: DocumentKind) -> None:
    check_texts(data.corpus, documents)
    if len(data.corpus) < 2:
        raise DatasetError(
            f"calibration has {len(data.corpus)} documents, and ranges of int8 need some hundreds. Pass the pages of "
            "training, or leave it out."
        )


def _describe_calibration(calibrating: Dataset, evaluated: Dataset, documents: DocumentKind) -> str:
    """How many documents ranges are from, and whether they know what is evaluated."""
    few = ", which are few" * (len(calibrating) < _FEW_DOCUMENTS)
    known = set(document_digests(evaluated, documents, range(len(evaluated))))
    shared = sum(each in known for each in document_digests(calibrating, documents, range(len(calibrating))))
    if not shared:
        return f"{len(calibrating)} other documents{few}"
    return f"{len(calibrating)} documents{few}; {shared} of them are evaluated, too, which flatters it"


def _measure_queries(
    evaluator: CorpusEvaluator,
    similarity: Callable[[Any, Any], torch.Tensor],
    queries: Embeddings,
    documents: KeptDocuments,
) -> np.ndarray:
    """nDCG@10 of each query, float64, in the order of the evaluator.

    Raises:
        DatasetError: A score is not a finite number; the message names query and document.
    """
    place_by_id = {str(document_id): at for at, document_id in enumerate(evaluator.corpus_ids)}
    ids, values = evaluator.queries_ids, []
    for start in range(0, len(ids), _QUERIES_AT_ONCE):
        block = documents.compare(similarity, queries[start : start + _QUERIES_AT_ONCE])
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0].tolist()
            raise not_finite(ids[start + row], str(evaluator.corpus_ids[column]), float(block[row, column]))
        for query_id, scores in zip(ids[start:], block, strict=False):
            score_by_id = evaluator.score_by_document_id[query_id]
            gains = np.zeros(len(scores))
            gains[[place_by_id[each] for each in score_by_id]] = list(score_by_id.values())
            # what is tied with the tenth counts with it; the rest can't be among the ten
            depth = min(_DEPTH, len(scores))
            top = scores >= np.partition(scores, -depth)[-depth]
            mean_gains = expected_gains(scores[top], gains[top])
            values.append(ndcg(mean_gains[:depth].tolist(), list(score_by_id.values()), _DEPTH))
    return np.array(values)


def loss_p_values(
    rows: Sequence[FrontierRow], values: np.ndarray, clusters: np.ndarray, tolerance: float
) -> list[float | None]:
    """For each row the p-value of losing the tolerance or more against the best, corrected; ``None`` for the best.

    Of non-inferiority: what is to be shown is that little is lost, so that few queries show nothing.
    """
    # of equal means the largest is the best, so that the smaller ones have to be shown
    best = max(range(len(rows)), key=lambda at: (rows[at].ndcg, rows[at].bytes_per_document))
    others = [at for at in range(len(rows)) if at != best]
    raw = []
    for at in others:
        sums = np.bincount(clusters, weights=values[at] - values[best] + tolerance)
        both_sides = flip_signs(sums[None], seed=0)
        raw.append(both_sides / 2 if sums.sum() > 0 else 1 - both_sides / 2)
    found: list[float | None] = [None] * len(rows)
    for at, p_value in zip(others, correct_for_several(raw), strict=True):
        found[at] = p_value
    return found


def recommend(rows: Sequence[FrontierRow], tolerance: float, num_clusters: int) -> tuple[FrontierRow, str]:
    """The smallest row that is shown to lose less than the tolerance, and why it is that one."""
    largest = max(rows, key=lambda row: row.bytes_per_document)
    if num_clusters < FEWEST_CLUSTERS:
        few = f"{num_clusters} independent groups of queries, and {FEWEST_CLUSTERS} are needed to tell"
        return largest, f"Too few queries to recommend a smaller size: {few}. Keep {largest.name}."
    best = next(row for row in rows if row.p_value is None)
    shown_fit = [row for row in rows if row.p_value is None or row.p_value < LEVEL]
    found = min(shown_fit, key=lambda row: (row.bytes_per_document, -row.ndcg))
    few = f" Few: {num_clusters} independent groups of queries." if num_clusters < FEW_CLUSTERS else ""
    if found is best:
        return best, (
            f"Keep {best.name}, the best: nothing smaller is shown to lose less than {tolerance:g} of {_MEASURE}. More "
            f"queries, or a larger tolerance, could show it.{few}"
        )
    share = found.bytes_per_document / largest.bytes_per_document
    return found, (
        f"{found.name} is enough: {found.bytes_per_document:,.0f} bytes a document, {share:.1%} of {largest.name}, and "
        f"{_MEASURE} {found.ndcg:.4f} against {best.ndcg:.4f} of the best ({best.name}).{few}"
    )
