"""Whether a running server computes what the model does, and the likeliest cause where it does not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import nn
from tqdm.auto import tqdm

from mmtune.arguments import require_one_of, require_whole
from mmtune.data.arrow import stored_image_column
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, DocumentReader, as_host_input
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.errors import ConfigError, DatasetError
from mmtune.evaluation.metrics import ndcg
from mmtune.models.kinds import HostModel, require_model
from mmtune.models.precision import HALF_TYPES
from mmtune.models.routes import find_router
from mmtune.serving import causes as faults
from mmtune.serving.causes import Vectors
from mmtune.serving.requests import Api, Endpoint, ask_embeddings, ask_scores, kind_of_api, speaks_in_messages

APIS = ("auto", "openai", "pooling", "rerank", "tei")

NUM_TRIED = 8
"""Queries, and documents, that each fault is tried on."""

CANDIDATES = 4
"""Documents a query that a reranker scores."""

LEAST_TOLERANCE, LEAST_IN_HALF = 1e-4, 2e-3
BEYOND_BFLOAT16 = 4.0
"""What is allowed, in gaps that this model itself shows when it computes in bfloat16."""

AT_K = 10


@dataclass(frozen=True)
class ServingReport:
    """How a server compares with the model.

    Attributes:
        ok: Whether it computes the same.
        causes: Why it does not, likeliest first; empty where ``ok``.
        notes: What is different and right all the same.
        query_gap: The largest of one minus the cosine between a query's vector and the model's; for a reranker the
            largest difference of scores, in standard deviations.
        document_gap: The same of documents; 0 for a reranker.
        tolerance: The gap that is allowed, by what bfloat16 does to this model.
        rank_overlap: The mean share of the 10 best documents of a query that both find; ``None`` without queries.
        ndcg: nDCG@10 of the model over these documents; ``None`` without relevant ones.
        served_ndcg: The same of the server.
        num_queries: How many were asked.
        num_documents: How many were asked.
    """

    ok: bool
    causes: tuple[str, ...]
    notes: tuple[str, ...]
    query_gap: float
    document_gap: float
    tolerance: float
    rank_overlap: float | None
    ndcg: float | None
    served_ndcg: float | None
    num_queries: int
    num_documents: int

    def __str__(self) -> str:
        lines = [
            "The server computes what the model does." if self.ok else "The server computes something else.",
            *(f"  {at}. {cause}" for at, cause in enumerate(self.causes, start=1)),
            f"off: queries {self.query_gap:.2g}, documents {self.document_gap:.2g}; allowed: {self.tolerance:.2g}",
        ]
        if self.rank_overlap is not None:
            lines.append(f"of the best {AT_K}, both find {self.rank_overlap:.0%}")
        if self.ndcg is not None and self.served_ndcg is not None:
            lines.append(f"ndcg@{AT_K}: {self.ndcg:.4f} by the model, {self.served_ndcg:.4f} by the server")
        lines.append(f"{self.num_queries} queries and {self.num_documents} documents were asked")
        return "\n".join([*lines, *self.notes])


def check_serving(
    url: str, model: HostModel, dataset: DatasetLike, *, api: str = "auto", num_documents: int = 32
) -> ServingReport:
    """Ask a running server for some documents and queries, and compare with the model.

    Where they differ, each known fault is tried on the model itself and compared with what came: the one that explains
    it is named first. What is allowed is measured, too: a few times what bfloat16 does to this model. The model stays
    as it is.

    Args:
        url: Of the server, such as ``"http://localhost:8000"``.
        model: The trained model, as it was saved, with its prompts and pixel limits.
        dataset: Where documents and queries are taken from: relevant ones first. Pages where the model reads them, else
            texts.
        api: What the server speaks. ``"openai"`` is ``POST /v1/embeddings`` of vLLM and others, ``"pooling"`` a vector
            a token, ``"rerank"`` scores, ``"tei"`` the own one of text-embeddings-inference. ``"auto"`` goes by the
            kind of model, and is ``"openai"`` for an embedding model.
        num_documents: How many documents, and queries, at most; 1 or more.

    Returns:
        The comparison; vectors of the model's length or of length 1 are right.

    Raises:
        ConfigError: An argument is none that can be, or does not fit the model.
        DatasetError: The dataset has no documents that the model reads.
        MmtuneError: The server gives no answer, or one that is none.

    Example:
        >>> print(check_serving("http://localhost:8000", model, evaluation))  # doctest: +SKIP
    """
    endpoint = Endpoint(url)
    require_one_of("api", api, APIS)
    num_documents = require_whole("num_documents", num_documents)
    require_model(model)
    chosen = _choose_api(api, model)
    sample = Sample.of(as_retrieval_dataset(dataset), model, num_documents)
    if chosen == "tei" and (sample.kind != "text" or speaks_in_messages(model)):
        raise ConfigError(
            "api='tei': text-embeddings-inference takes texts only, without a chat template (TEI 1.9). Leave api out "
            "for a vLLM server, or pass a model and documents of texts."
        )
    if isinstance(model, CrossEncoder) and not sample.queries:
        raise DatasetError("The dataset has no queries, and a reranker scores pairs. Pass one with queries.")
    served = sample.ask(endpoint, chosen, model)
    return compare(model, sample, served)


def _choose_api(api: str, model: HostModel) -> Api:
    router = find_router(model)
    if router is not None:
        raise ConfigError(
            "The model is a Router, and no server runs one. Check each route alone: extract_route(model, "
            f"{next(iter(router.sub_modules))!r})."
        )
    fitting = kind_of_api(model)
    if api in ("auto", fitting) or (api == "tei" and fitting != "pooling"):
        return fitting if api == "auto" else api  # type: ignore[return-value]
    raise ConfigError(f"api={api!r} does not fit a {type(model).__name__}. Pass api={fitting!r}, or leave it out.")


@dataclass(frozen=True)
class Sample:
    """What is asked: queries and documents with their judgements.

    Attributes:
        queries: Texts as the host takes them.
        documents: Pages or texts.
        kind: Which of the two.
        gains: How relevant each document is to each query, shape ``(queries, documents)``.
    """

    queries: list[Any]
    documents: list[Any]
    kind: DocumentKind
    gains: np.ndarray

    @classmethod
    def of(cls, data: RetrievalDataset, model: HostModel, count: int) -> "Sample":
        """The first queries with their documents, then others, ``count`` of each at most."""
        ids, kind = _readable_documents(data, model)
        texts = dict(zip(data.queries["query_id"][:], data.queries["text"][:], strict=True))
        texts = {query_id: text for query_id, text in texts.items() if text and text.strip()}
        judged = list(zip(data.qrels["query_id"][:], data.qrels["document_id"][:], data.qrels["score"][:], strict=True))
        readable = set(ids)
        relevant = [row for row in judged if row[2] > 0 and row[0] in texts and row[1] in readable]
        document_ids = list(dict.fromkeys([*(row[1] for row in relevant), *ids]))[:count]
        row_by_document = {document_id: row for row, document_id in enumerate(document_ids)}
        asked = [row[0] for row in relevant if row[1] in row_by_document]
        query_ids = list(dict.fromkeys([*asked, *texts]))[:count]
        row_by_query = {query_id: row for row, query_id in enumerate(query_ids)}
        gains = np.zeros((len(query_ids), len(document_ids)))
        for query_id, document_id, score in relevant:
            if query_id in row_by_query and document_id in row_by_document:
                gains[row_by_query[query_id], row_by_document[document_id]] = score
        documents = DocumentReader(data.corpus, kind).read(document_ids)
        typed = not isinstance(model, CrossEncoder) or model.supports("message")
        ready = as_host_input if typed else lambda item: item
        return cls([ready(texts[each]) for each in query_ids], [ready(each) for each in documents], kind, gains)

    def first(self, count: int) -> "Sample":
        """The first queries and documents alone."""
        return Sample(self.queries[:count], self.documents[:count], self.kind, self.gains[:count, :count])

    def candidates(self, row: int) -> list[int]:
        """The documents that a reranker scores for a query: its own and the next ones."""
        own = np.flatnonzero(self.gains[row])[:CANDIDATES].tolist()
        others = [(row + step) % len(self.documents) for step in range(len(self.documents))]
        return list(dict.fromkeys([*own, *others]))[:CANDIDATES]

    def ask(self, endpoint: Endpoint, api: Api, model: HostModel) -> tuple[Vectors, Vectors]:
        """What a server gives for the queries and for the documents; a reranker gives scores to queries alone."""
        if isinstance(model, CrossEncoder):
            bar = tqdm(range(len(self.queries)), desc="Asking the server", leave=False)
            chosen = [(row, [self.documents[at] for at in self.candidates(row)]) for row in bar]
            return [ask_scores(endpoint, api, self.queries[row], documents) for row, documents in chosen], []
        queries = ask_embeddings(endpoint, api, model, "query", self.queries)
        return queries, ask_embeddings(endpoint, api, model, "document", self.documents)

    def compute(self, model: HostModel) -> tuple[Vectors, Vectors]:
        """What the model itself gives, one item a forward pass, so that no padding comes in."""
        options: dict[str, Any] = {"batch_size": 1, "show_progress_bar": False}
        if isinstance(model, CrossEncoder):
            found = []
            for row, query in enumerate(self.queries):
                pairs: list[Any] = [[query, self.documents[at]] for at in self.candidates(row)]
                scores = model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True, **options)
                found.append(torch.as_tensor(scores).float().cpu().reshape(-1))
            return found, []
        queries: Any = model.encode_query(self.queries, **options) if self.queries else []
        documents: Any = model.encode_document(self.documents, **options)
        return _as_vectors(queries), _as_vectors(documents)


def _readable_documents(data: RetrievalDataset, model: HostModel) -> tuple[list[str], DocumentKind]:
    """The documents that a model reads, pages before texts, without decoding any."""
    corpus = data.corpus
    for kind in ("image", "text"):
        if kind in corpus.column_names and model.supports(kind):
            values, order = stored_image_column(corpus, kind)
            is_there = values.is_valid().to_numpy()
            is_there = is_there if order is None else is_there[order]
            if is_there.any():
                ids = corpus["document_id"][:]
                return [ids[row] for row in np.flatnonzero(is_there)], kind
    raise DatasetError(
        f"The dataset has no documents that the model reads: its corpus has {corpus.column_names}. Expected images or "
        "texts that fit it."
    )


def _as_vectors(embeddings: Any) -> Vectors:
    return [torch.as_tensor(each).float().cpu() for each in embeddings]


def compare(model: HostModel, sample: Sample, served: tuple[Vectors, Vectors]) -> ServingReport:
    """The report on what a server gave for the queries and the documents of a sample."""
    measure = faults.score_gaps if isinstance(model, CrossEncoder) else faults.gaps
    expected = sample.compute(model)
    with faults.in_bfloat16(model):
        rounded = sample.compute(model)
    is_half = any(weight.dtype in HALF_TYPES for weight in model.parameters())
    allowed = BEYOND_BFLOAT16 * max(_gaps_of(measure, rounded, expected))
    tolerance = max(LEAST_IN_HALF if is_half else LEAST_TOLERANCE, allowed)
    notes: tuple[str, ...] = ()
    if isinstance(model, CrossEncoder):
        squashed = [scores.sigmoid() for scores in expected[0]], expected[1]
        if max(_gaps_of(measure, served, squashed)) <= tolerance < max(_gaps_of(measure, served, expected)):
            notes, expected = ("The server gives the sigmoid of the model's scores, which ranks the same.",), squashed
    worst = _gaps_of(measure, served, expected)
    found = _find_causes(model, sample, served, expected, tolerance) if not np.max(worst) <= tolerance else []
    if not isinstance(model, CrossEncoder) and not any(cause.startswith("truncation") for cause in found):
        lengths = faults.find_normalisation([*served[0], *served[1]], [*expected[0], *expected[1]])
        found += [lengths] if lengths else []
    overlap, ndcg_of_model = _measure_rankings(model, sample, expected, expected)
    overlap, ndcg_of_server = _measure_rankings(model, sample, served, expected)
    return ServingReport(
        ok=not found,
        causes=tuple(found),
        notes=notes,
        query_gap=worst[0],
        document_gap=worst[1],
        tolerance=tolerance,
        rank_overlap=overlap,
        ndcg=ndcg_of_model,
        served_ndcg=ndcg_of_server,
        num_queries=len(sample.queries),
        num_documents=len(sample.documents),
    )


def _gaps_of(
    measure: Callable[[Vectors, Vectors], torch.Tensor],
    served: tuple[Vectors, Vectors],
    expected: tuple[Vectors, Vectors],
) -> list[float]:
    """The largest gap of the queries and of the documents; 0 where there are none."""
    return [float(measure(own, wanted).max()) if own else 0.0 for own, wanted in zip(served, expected, strict=True)]


def _find_causes(
    model: HostModel,
    sample: Sample,
    served: tuple[Vectors, Vectors],
    expected: tuple[Vectors, Vectors],
    tolerance: float,
) -> list[str]:
    """Why a server computes something else, likeliest first: what explains all of it, then what explains most."""
    everything = [*served[0], *served[1]], [*expected[0], *expected[1]]
    reads_pages = sample.kind == "image"
    if isinstance(model, CrossEncoder):
        measure, simple = faults.score_gaps, [faults.find_lost_head(model, *everything)]
    else:
        measure = faults.gaps
        moved = any(faults.find_order(own, wanted, tolerance) for own, wanted in zip(served, expected, strict=True))
        order = "order: the vectors are right and stand at other places; sort them by index, or ask one by one"
        simple = [order if moved else None, faults.find_truncation(*everything, tolerance)]
    if any(simple):
        return [cause for cause in simple if cause]
    few, asked = sample.first(NUM_TRIED), (served[0][:NUM_TRIED], served[1][:NUM_TRIED])
    without = max(_gaps_of(measure, asked, few.compute(model)))
    tried: list[tuple[float, str]] = []
    for fault in tqdm(faults.known_faults(model, reads_pages=reads_pages), desc="Trying faults", leave=False):
        with fault.planted():
            computed = few.compute(model)
        gap = max(_gaps_of(measure, asked, computed))
        if isinstance(model, CrossEncoder):
            squashed = [scores.sigmoid() for scores in computed[0]], computed[1]
            gap = min(gap, max(_gaps_of(measure, asked, squashed)))
        tried.append((gap, fault.cause))
    tried.sort(key=lambda each: each[0])
    explained = [cause for gap, cause in tried if gap <= tolerance]
    if explained:
        return explained
    better = [cause for gap, cause in tried if gap < without / 2]
    worst = _gaps_of(measure, served, expected)
    return [*better, *faults.suspect(model, worst[0], worst[1], tolerance, reads_pages=reads_pages)]


def _measure_rankings(
    model: HostModel, sample: Sample, found: tuple[Vectors, Vectors], expected: tuple[Vectors, Vectors]
) -> tuple[float | None, float | None]:
    """The overlap of two rankings, and the nDCG of the first; ``None`` where there is nothing to rank or to judge."""
    if not sample.queries:
        return None, None
    scores, wanted = (_score(model, side) for side in (found, expected))
    overlaps, values = [], []
    for row, (own, other) in enumerate(zip(scores, wanted, strict=True)):
        gains = sample.gains[row][sample.candidates(row)] if isinstance(model, CrossEncoder) else sample.gains[row]
        best, others = (np.argsort(-each, kind="stable")[:AT_K] for each in (own, other))
        overlaps.append(len(set(best) & set(others)) / len(others))
        if gains.any():
            values.append(ndcg(gains[best].tolist(), gains[gains > 0].tolist(), AT_K))
    return float(np.mean(overlaps)), float(np.mean(values)) if values else None


def _score(model: HostModel, vectors: tuple[Vectors, Vectors]) -> list[np.ndarray]:
    """How each document scores for each query; for a reranker, each candidate."""
    if isinstance(model, CrossEncoder):
        return [scores.numpy() for scores in vectors[0]]
    queries, documents = vectors
    is_dense = queries[0].ndim == 1
    sides: Any = (torch.stack(queries), torch.stack(documents)) if is_dense else (queries, documents)
    return list(model.similarity(*sides).float().cpu().numpy())
