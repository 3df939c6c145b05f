"""Negatives that a model takes for answers: what it scores above every document that is judged relevant."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sentence_transformers import CrossEncoder

from mmtune.arguments import require_flag, require_path, require_whole
from mmtune.data.arrow import IntLists
from mmtune.data.documents import DocumentKind
from mmtune.data.findings import Example, FalseNegative
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.query_kinds import QueryKind, check_queries
from mmtune.inference.encoder import (
    DatasetReader,
    Retriever,
    encode_shards,
    join,
    require_retriever,
    warn_of_cut_inputs,
)
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.search import find_nearest
from mmtune.inference.store import EmbeddingStore, Pair, ScoreStore, model_fingerprint


def find_false_negatives(
    dataset: DatasetLike,
    model: Retriever | CrossEncoder,
    *,
    batch_size: int = 16,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
    documents: DocumentKind = "image",
    queries: QueryKind = "text",
) -> list[FalseNegative]:
    """The listed negatives that a model scores above every relevant document of their query.

    Such a negative is an answer that nobody has judged, or the model is wrong: look at them, the surest first. What is
    relevant to the query's text under any id, and byte-identical copies of it, are no negatives; ``audit`` lists them.
    Ties with the relevant document are not listed.

    Args:
        dataset: A ``RetrievalDataset`` with negatives, rows in a known layout, or what ``RetrievalDataset.load`` takes.
        model: An embedding model, a late-interaction one, or a reranker, which reads query and page together and is
            the better judge.
        batch_size: Documents, queries or pairs a forward pass.
        cache_folder: Where embeddings, or scores, are kept as they are made, as for ``mine_hard_negatives``.
        show_progress_bar: Whether to show bars.
        documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
        queries: What a query is made of, likewise.

    Returns:
        A finding each, with its scores, those first that are furthest above; pass them, or some, to
        ``RetrievalDataset.without``. Empty for a dataset without negatives.

    Raises:
        ConfigError: An argument has a value it can't have, or the corpus lacks what ``documents`` asks for.
        DatasetError: The data can't be used, or the model gives no finite number for a document.
        ImageDecodeError: A page can't be decoded; the message names the document.

    Example:
        >>> from mmtune import RetrievalDataset, find_false_negatives, load_model
        >>> pages = RetrievalDataset.load("pages.parquet")
        >>> found = find_false_negatives(pages, load_model("my-model"), show_progress_bar=False)
        >>> cleaned = pages.without(found[:3])
        >>> cleaned.audit().counts["taken_out"]
        3
    """
    is_reranker = isinstance(model, CrossEncoder)
    if is_reranker:
        require_reranker(model)
    else:
        require_retriever(model, "model", "find_false_negatives(dataset, model): the dataset comes first")
    size = require_whole("batch_size", batch_size)
    require_flag("show_progress_bar", show_progress_bar)
    if cache_folder is not None:
        require_path("cache_folder", cache_folder)
    data = as_retrieval_dataset(dataset)
    reader = DatasetReader(data.corpus, data.queries, documents, queries)
    relevance = data.relevance_of(documents, queries)
    check_queries(data.queries, queries)

    # Each pair of a text and a page once: what is relevant, and what is listed and is not.
    listed = relevance.listed_negatives
    is_negative = ~relevance.is_relevant(listed.rows, listed.values)
    asking, negatives = np.unique(np.stack([listed.rows, listed.values])[:, is_negative], axis=1)
    if not len(asking):
        return []
    asked = np.unique(relevance.text[asking])
    answers = relevance.documents_of_text.take(asked)
    is_first = relevance.page[answers.values] == answers.values
    texts = np.r_[asked[answers.rows[is_first]], relevance.text[asking]]
    pages = np.r_[answers.values[is_first], relevance.page[negatives]]
    options: dict[str, Any] = {"batch_size": size, "show_progress_bar": show_progress_bar}
    first_query = np.unique(relevance.text, return_index=True)[1]
    query_ids = relevance.query_ids.take(pa.array(first_query[texts])).to_pylist()
    document_ids = relevance.document_ids.take(pa.array(pages)).to_pylist()
    pairs = list(map(Pair, query_ids, document_ids))
    if isinstance(model, CrossEncoder):
        scores = _score_pairs(model, reader, pairs, cache_folder, options)
    else:
        scores = _compare_embeddings(model, reader, pairs, cache_folder, options)

    # The best answer of each text, then the negatives above it.
    num_answers = int(is_first.sum())
    answer_texts, answer_scores = texts[:num_answers], scores[:num_answers]
    best_first = np.lexsort((-answer_scores, answer_texts))
    best = best_first[np.unique(answer_texts[best_first], return_index=True)[1]]
    best_answer = best[np.searchsorted(asked, texts[num_answers:])]
    above = scores[num_answers:] - scores[best_answer]
    found = [at for at in np.argsort(-above, kind="stable") if above[at] > 0]
    return [
        _describe(
            relevance.query_ids[int(asking[at])].as_py(),
            relevance.document_ids[int(negatives[at])].as_py(),
            document_ids[best_answer[at]],
            float(scores[num_answers + at]),
            float(scores[best_answer[at]]),
        )
        for at in found
    ]


def _score_pairs(
    model: CrossEncoder,
    reader: DatasetReader,
    pairs: list[Pair],
    cache_folder: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> np.ndarray:
    """The score of a reranker for each pair, before its activation, which would tie the best."""
    scorer = PairScorer(model, reader, **options)
    contents = reader.pair_digests(pairs)
    if cache_folder is None:
        return scorer.score_pairs(pairs, contents)
    asked = "" if reader.query_kind == "text" else f"{reader.query_kind}-"
    teacher = f"{model_fingerprint(model)}-{asked}{reader.kind}"
    return scorer.score_pairs(pairs, contents, ScoreStore(Path(cache_folder) / f"scores-{teacher}", teacher))


def _compare_embeddings(
    model: Retriever,
    reader: DatasetReader,
    pairs: list[Pair],
    cache_folder: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> np.ndarray:
    """The similarity of a model for each pair; each text and each page is encoded once."""
    warn_of_cut_inputs(model, reader)
    store = None if cache_folder is None else EmbeddingStore(cache_folder, model)
    query_ids = list(dict.fromkeys(pair.query_id for pair in pairs))
    document_ids = list(dict.fromkeys(pair.document_id for pair in pairs))
    asking = join(encode_shards(model, "query", query_ids, reader, store=store, **options))
    shards = encode_shards(model, "document", document_ids, reader, store=store, **options)
    place_of_query = {query_id: at for at, query_id in enumerate(query_ids)}
    place_of_document = {document_id: at for at, document_id in enumerate(document_ids)}
    rows = np.array([place_of_query[pair.query_id] for pair in pairs])
    items = np.array([place_of_document[pair.document_id] for pair in pairs])
    wanted = IntLists.grouped(rows, items, len(query_ids))
    nearest = find_nearest(model.similarity, asking, shards, depth=1, ids=(query_ids, document_ids), relevant=wanted)
    scores = np.empty(len(pairs))
    scores[np.argsort(rows, kind="stable")] = nearest.relevant_scores
    return scores


def _describe(query_id: str, document_id: str, positive_id: str, score: float, positive_score: float) -> FalseNegative:
    return FalseNegative(
        "false_negatives",
        1,
        True,
        "negatives that the model scores above every relevant document of their query",
        "An answer that nobody has judged, or the model is wrong. without() takes it from the query's list.",
        (Example((query_id,), (document_id, positive_id)),),
        query_id,
        document_id,
        positive_id,
        score,
        positive_score,
    )
