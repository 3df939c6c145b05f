"""Several models on one dataset, side by side: how good, how large, how quick, and which differences are real."""

import dataclasses
import logging
import math
import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from mmtune.arguments import (
    require_flag,
    require_mapping,
    require_name,
    require_path,
    require_whole,
    require_wholes,
    shown,
)
from mmtune.data.clusters import connected_queries
from mmtune.data.documents import DocumentKind, check_texts
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError, ImageDecodeError, MissingDocumentError, MmtuneError
from mmtune.evaluation.measuring import (
    AT_K,
    MOST_RERANKED,
    Bench,
    Kind,
    Measurement,
    MeasurementStore,
    ModelSource,
    check_source,
    free_memory,
)
from mmtune.evaluation.significance import (
    FEWEST_CLUSTERS,
    Verdict,
    compare_per_query,
    correct_verdicts,
    mean_interval,
)
from mmtune.inference.shards import ShardFolder
from mmtune.models.checkpoints import first_line
from mmtune.models.opening import check_host_kwargs
from mmtune.report.markdown import text_table
from mmtune.report.plots import PlottedModel, draw_models, show_count

logger = logging.getLogger(__name__)

ModelEntry: TypeAlias = ModelSource | tuple[ModelSource, ModelSource]
"""A retriever, or a retriever with a reranker."""

_NUMBER_BYTES = 4
_RERANKED = 20


@dataclass(frozen=True)
class SizeRow:
    """A model at one size of its embeddings.

    Attributes:
        dimension: Of a vector.
        ndcg: nDCG@10, the mean over the queries.
        interval: Of it at 95%, cluster-robust; ``None`` for a single cluster of queries.
        bytes_per_document: Of its vectors in float32.
    """

    dimension: int
    ndcg: float
    interval: tuple[float, float] | None
    bytes_per_document: float


@dataclass(frozen=True)
class ComparisonRow:
    """One model of a comparison.

    Attributes:
        name: As it was given.
        kind: ``"retriever"``, ``"late interaction"``, ``"Router"`` or ``"pipeline"``.
        parameters: How many weights it has, the reranker's of a pipeline among them.
        sizes: The full size, and each of ``truncate_dims`` that the model has.
        page_s: Seconds to read and encode a document; NaN where it was encoded before.
        query_s: Seconds to encode a query and, in a pipeline, to rerank what was found for it.
        per_query: ``{metric key: {query id: value}}``, with the keys of ``build_evaluator``.
        against_best: From the best model to this one at full size, with p corrected for all comparisons; ``None`` for
            the best.
    """

    name: str
    kind: Kind
    parameters: int
    sizes: tuple[SizeRow, ...]
    page_s: float
    query_s: float
    per_query: Mapping[str, Mapping[str, float]]
    against_best: Verdict | None = None

    @property
    def ndcg(self) -> float:
        """nDCG@10 at full size."""
        return self.sizes[0].ndcg

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of ``ndcg``."""
        return self.sizes[0].interval


@dataclass(frozen=True)
class Comparison:
    """What ``compare_models`` found. ``print`` it for a table.

    Attributes:
        name: Of the dataset.
        rows: A model each, the best first.
        failures: What could not be measured and why, by name.
        num_queries: That were asked.
        num_documents: Of different content.
        num_clusters: Groups of queries that hang together.
    """

    name: str
    rows: tuple[ComparisonRow, ...]
    failures: Mapping[str, str]
    num_queries: int
    num_documents: int
    num_clusters: int

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the number of parameters, on a logarithmic scale, against nDCG@10 with its interval.

        Args:
            path: The file; its ending is the format: ``.png``, ``.svg``, ``.pdf``.

        Raises:
            ConfigError: The path can't be written to, or has another ending.
            MissingExtraError: matplotlib is not installed.
        """
        require_path("path", path, what="a picture", advice="Pass e.g. 'models.png'.")
        points = [PlottedModel(row.name, row.kind, row.parameters, row.ndcg, row.interval) for row in self.rows]
        draw_models(points, Path(path), title=self._title, measure=f"nDCG@{AT_K}")

    @property
    def _title(self) -> str:
        return f"{self.name}: {self.num_queries} queries, {self.num_documents} documents"

    def __str__(self) -> str:
        dims = sorted({size.dimension for row in self.rows for size in row.sizes[1:]}, reverse=True)
        header = ["model", "kind", "parameters", f"nDCG@{AT_K}", "95% interval", "p against the best"]
        header += [*(f"{dim}d" for dim in dims), "bytes a document", "ms a document", "ms a query"]
        text = f"{self._title}\n\n{text_table(header, [_cells(row, dims) for row in self.rows])}"
        if self.num_clusters < FEWEST_CLUSTERS:
            text += (
                f"\n\nToo few queries to tell models apart: {self.num_clusters} independent groups of queries, and "
                f"{FEWEST_CLUSTERS} are needed."
            )
        if self.failures:
            reasons = "\n".join(f"- {name}: {message}" for name, message in self.failures.items())
            text += f"\n\nNot measured:\n{reasons}"
        return text


def _cells(row: ComparisonRow, dims: Sequence[int]) -> list[str]:
    at = {size.dimension: f"{size.ndcg:.4f}" for size in row.sizes}
    return [
        row.name,
        row.kind,
        show_count(row.parameters),
        f"{row.ndcg:.4f}",
        "" if row.interval is None else f"[{row.interval[0]:.4f}, {row.interval[1]:.4f}]",
        "best" if row.against_best is None else f"{row.against_best.p_value:.4f}",
        *(at.get(dim, "") for dim in dims),
        f"{row.sizes[0].bytes_per_document:,.0f}",
        "" if math.isnan(row.page_s) else f"{1000 * row.page_s:.2f}",
        f"{1000 * row.query_s:.2f}",
    ]


def compare_models(
    models: Mapping[str, ModelEntry] | Sequence[ModelEntry],
    dataset: DatasetLike,
    *,
    truncate_dims: Sequence[int] = (),
    name: str = "vdr",
    store: str | os.PathLike[str] | None = None,
    documents: DocumentKind = "image",
    queries: QueryKind = "text",
    depth: int = _RERANKED,
    batch_size: int = 16,
    show_progress_bar: bool = True,
    load_kwargs: Mapping[str, Any] | None = None,
    embeddings: Sequence[str | os.PathLike[str]] = (),
) -> Comparison:
    """Which of several models finds the documents of a dataset best, and whether the difference is one.

    Each model is measured once, one after the other: what was loaded here is let go before the next. With ``store`` it
    is never measured again on the same documents, so that one more model costs one. Every difference to the best model
    is tested by sign flips of the clusters of queries, as in ``compare_per_query``, and corrected for their number
    (Holm). Byte-identical pages are one document.

    Args:
        models: By name: a ``SentenceTransformer`` or ``MultiVectorEncoder``; the path or Hub name of a checkpoint; a
            function without arguments that loads a model; or a pair of a retriever and a reranker, each of these. Of a
            list, folders are named by as much of their path as tells them apart, and models by their class.
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes.
        truncate_dims: Sizes to measure besides the full one, of the models that have as many dimensions; those of late
            interaction have the full one only.
        name: Prefix of the metric keys, and what the dataset is called in the table.
        store: A folder where measurements are kept as they are made, by the content of the checkpoint's files, or of
            the weights of a model in memory, and by the data, the settings and the device. ``None`` keeps nothing.
            Times are those of the first measurement. Of a class of your own the name counts, and not its code.
        documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
        queries: What a query is made of, likewise.
        depth: How many documents a reranker sorts again for a query, 100 at most; all of a smaller corpus.
        batch_size: Texts, documents or pairs a forward pass.
        show_progress_bar: Whether to show bars.
        load_kwargs: How checkpoints are loaded, as ``load_model`` takes it, e.g. ``{"max_pixels": 600 * 600}``.
        embeddings: Folders that ``encode_corpus`` wrote, in float32 and at full size. A model
            that made one of them reads its documents there and encodes queries alone, without a time for documents.

    Returns:
        The comparison, of all models that could be measured. A model that can't be loaded, is of another kind, runs
        out of memory or gives no finite numbers stands in ``failures`` with its reason, and the others go on.

    Raises:
        ConfigError: An argument does not fit, two models have one name, or no model could be measured.
        DatasetError: The data can't be read, or its layout is unknown.
        ImageDecodeError: A page is no readable image; the message names the document.

    Example:
        >>> from mmtune import RetrievalDataset, compare_models
        >>> from mmtune.testing import generated_pages, tiny_clip, tiny_siglip
        >>> data = RetrievalDataset.from_id_rows(generated_pages(12))
        >>> found = compare_models([tiny_clip("clip"), tiny_siglip("siglip")], data, show_progress_bar=False)
        >>> sorted(row.name for row in found.rows), found.failures
        (['clip', 'siglip'], {})
    """
    entries = _entries_by_name(models)
    dims = sorted(set(require_wholes("truncate_dims", truncate_dims)), reverse=True)
    require_name("name", name)
    most = require_whole("depth", depth)
    if most > MOST_RERANKED:
        raise ConfigError(f"depth={most}: a ranking is kept to {MOST_RERANKED}. Pass e.g. depth={_RERANKED}.")
    size = require_whole("batch_size", batch_size)
    require_flag("show_progress_bar", show_progress_bar)
    how = {} if load_kwargs is None else load_kwargs
    require_mapping("load_kwargs", how, expected="arguments of load_model by name, e.g. {'max_pixels': 360000}")
    check_host_kwargs(SentenceTransformer, how)
    if isinstance(embeddings, (str, os.PathLike)):
        raise ConfigError(f"embeddings={os.fspath(embeddings)!r}: expected folders in a list. Pass [{embeddings!r}].")
    for folder in (folders := tuple(embeddings)):
        require_path("embeddings", folder, what="a folder of encode_corpus")
        ShardFolder(Path(folder)).listed()
    data = as_retrieval_dataset(dataset)
    check_texts(data.corpus, documents)
    data.relevance_of(documents, queries).require_queries()
    if data.relevance_of(documents).num_copies:
        data = data.deduplicate(documents=documents)

    most = min(most, len(data.corpus))
    kept = MeasurementStore(store)
    bench = Bench(data, documents, queries, tuple(dims), most, size, show_progress_bar, how, kept, folders)
    measured, failures = _measure_all(entries, bench)
    if not measured:
        reasons = "\n".join(f"- {key}: {message}" for key, message in failures.items())
        raise ConfigError(f"None of the {len(failures)} models could be measured:\n{reasons}")
    clusters = connected_queries(data.relevance_of(documents, queries))
    rows = _test_against_best([_row(key, found, name, clusters) for key, found in measured.items()], clusters)
    return Comparison(name, tuple(rows), failures, len(data), len(data.corpus), len(set(clusters.values())))


def _measure_all(entries: Mapping[str, ModelEntry], bench: Bench) -> tuple[dict[str, Measurement], dict[str, str]]:
    """What was measured by name, and what could not be."""
    measured: dict[str, Measurement] = {}
    failures: dict[str, str] = {}
    with tqdm(entries.items(), desc="Comparing models", disable=not bench.show_progress_bar, leave=False) as bar:
        for name, entry in bar:
            bar.set_postfix_str(name)
            try:
                measured[name] = bench.measure(*(entry if isinstance(entry, tuple) else (entry,)))
            except (ImageDecodeError, MissingDocumentError):
                raise  # of the data: every model would fail
            except Exception as error:  # what others wrote fails in every way
                failures[name] = _explain(error)
                # as a text: a record with the traceback would hold the model wherever records are kept
                trace = "" if isinstance(error, MmtuneError) else f"\n{traceback.format_exc()}"
                logger.warning("%s could not be measured: %s%s", name, failures[name], trace)
            if name in failures:
                free_memory()  # the error's frames held the model
    return measured, failures


def _explain(error: Exception) -> str:
    if isinstance(error, MmtuneError):
        return str(error)
    advice = ""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "out of memory" in str(error):
        advice = " Lower batch_size or max_pixels, or load it in another dtype."
    return f"{type(error).__name__}: {first_line(error)}{advice}"


def _row(name: str, found: Measurement, prefix: str, clusters: Mapping[str, str]) -> ComparisonRow:
    sizes, per_query = [], {}
    for at, (dimension, values) in enumerate(zip(found.dimensions, found.values, strict=True)):
        cluster = np.unique([clusters[query_id] for query_id in values], return_inverse=True)[1]
        numbers = np.array(list(values.values()))
        stored = _NUMBER_BYTES * dimension * found.vectors_per_document
        sizes.append(SizeRow(dimension, float(numbers.mean()), mean_interval(numbers, cluster), stored))
        key = prefix if at == 0 else f"{prefix}-{dimension}d"
        how = "-rerank" if found.kind == "pipeline" else f"_{found.similarity}"
        per_query[f"{key}{how}_ndcg@{AT_K}"] = values
    return ComparisonRow(name, found.kind, found.parameters, tuple(sizes), found.page_s, found.query_s, per_query)


def _test_against_best(rows: Sequence[ComparisonRow], clusters: Mapping[str, str]) -> list[ComparisonRow]:
    """The rows, the best first and of equals the smallest; each other with its verdict against the best."""
    best, *others = sorted(rows, key=lambda row: (-row.ndcg, row.parameters))
    values = [next(iter(row.per_query.values())) for row in (best, *others)]
    verdicts = [compare_per_query(values[0], own, groups=clusters, measure=f"nDCG@{AT_K}") for own in values[1:]]
    tested = zip(others, correct_verdicts(verdicts), strict=True)
    return [best, *(dataclasses.replace(row, against_best=verdict) for row, verdict in tested)]


# Names


def _entries_by_name(models: object) -> dict[str, ModelEntry]:
    """What was given by name; of a list, named by what tells one from another.

    Raises:
        ConfigError: There are none, something is no model, or a name is none or stands twice.
    """
    if isinstance(models, (str, os.PathLike, torch.nn.Module)) or not isinstance(models, (Mapping, Sequence)):
        raise ConfigError(
            f"models={shown(models)}: expected several, as a list or by name. Pass e.g. {{'small': model, 'large': "
            "'path/to/model'}."
        )
    if not models:
        raise ConfigError("models is empty. Pass one or more, e.g. {'small': model, 'large': 'path/to/model'}.")
    names = list(models) if isinstance(models, Mapping) else _name_each(models)
    entries = list(models.values() if isinstance(models, Mapping) else models)
    entries = [tuple(each) if isinstance(each, list) and len(each) == 2 else each for each in entries]  # as JSON has it
    for name, entry in zip(names, entries, strict=True):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ConfigError(f"models holds the name {name!r:.80}. Expected a text on one line, such as 'small'.")
        parts = entry if isinstance(entry, tuple) else (entry,)
        if len(parts) != 1 + isinstance(entry, tuple):
            raise ConfigError(
                f"The model {name!r} is a tuple of {len(parts)}. Expected a pair (retriever, reranker). Pass one, or "
                "the retriever alone."
            )
        for part in parts:
            check_source(name, part)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{len(twice)} names in models stand for several, e.g. {twice[0]!r}. Name each: pass {{'small': ..., "
            "'large': ...}."
        )
    return dict(zip(names, entries, strict=True))


def _name_each(entries: Sequence[ModelEntry]) -> list[str]:
    """A name for each: as much of the end of its path as tells all apart, or its class; of a pair both."""
    deepest = max((len(_parts(source)) for entry in entries for source in _sources(entry)), default=1)
    names: list[str] = []
    for count in range(1, deepest + 1):
        names = [" + ".join("/".join(_parts(source)[-count:]) for source in _sources(entry)) for entry in entries]
        if len(set(names)) == len(names):
            break
    return names


def _sources(entry: ModelEntry) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _parts(source: object) -> tuple[str, ...]:
    if isinstance(source, (str, os.PathLike)):
        return Path(os.fspath(source)).parts or ("",)
    return (getattr(source, "__name__", type(source).__name__),)
