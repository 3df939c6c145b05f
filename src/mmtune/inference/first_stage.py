"""The first stage: what a retriever finds, from one encoding of texts and documents."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch

from mmtune.data.documents import as_host_input
from mmtune.data.judgements import Judgements
from mmtune.errors import ConfigError
from mmtune.inference.encoder import Embeddings, Encoder, EncodingTask, encoded_shards, joined
from mmtune.inference.pairs import PairReader
from mmtune.inference.search import top_columns

_ASKING_AT_ONCE = 128
_TIE_ORDER_SEED = 0  # that of the retrieval evaluators: equal scores stand in the order they give them


@dataclass(frozen=True)
class Search:
    """What a retriever found, and how long it took.

    Attributes:
        found: For each that asks the best items by position, best first, int64, shape ``(asking, depth)``. Equal
            scores stand in a random order that is fixed by the corpus, as in ``build_evaluator``.
        documents_s: Seconds to encode the documents, their decoding included.
        queries_s: Seconds to encode the query texts.
        search_s: Seconds to compare and rank.
    """

    found: np.ndarray
    documents_s: float
    queries_s: float
    search_s: float


def search(
    retriever: Encoder,
    judgements: Judgements,
    reader: PairReader,
    *,
    depth: int,
    batch_size: int,
    show_progress_bar: bool,
) -> Search:
    """The ``depth`` best items for each that asks, among items of different content.

    Args:
        retriever: The model that encodes and compares.
        judgements: What asks and what is asked for.
        reader: Gives texts and documents.
        depth: At most the number of different items.
        batch_size: Texts or documents a forward pass.
        show_progress_bar: Whether to show bars.

    Raises:
        ConfigError: The retriever is of another kind.
        DatasetError: It gives no finite numbers for an item; the message names it.
    """
    require_retriever(retriever)
    items = judgements.distinct_items
    # Equal scores keep this order.
    items = items[np.argsort(np.random.default_rng(_TIE_ORDER_SEED).permutation(len(items)))]
    asking_ids, asked_ids = judgements.asking_ids.to_pylist(), judgements.item_ids.take(pa.array(items)).to_pylist()
    texts_ask = judgements.direction == "text_to_image"
    text_ids, document_ids = (asking_ids, asked_ids) if texts_ask else (asked_ids, asking_ids)
    options = {"batch_size": batch_size, "cache": None, "show_progress_bar": show_progress_bar}
    started = time.perf_counter()
    texts = joined(list(encoded_shards(retriever, _texts(text_ids, reader), **options)))
    texts_done = time.perf_counter()
    documents = joined(list(encoded_shards(retriever, _documents(document_ids, reader), **options)))
    encoded = time.perf_counter()
    best = _best(retriever, texts, documents, depth) if texts_ask else _best_texts(retriever, documents, texts, depth)
    return Search(items[best], encoded - texts_done, texts_done - started, time.perf_counter() - encoded)


def require_retriever(model: object) -> None:
    """Make sure that ``model`` embeds texts and documents apart.

    Raises:
        ConfigError: It is of another kind.
    """
    if not isinstance(model, get_args(Encoder)):
        raise ConfigError(
            f"Expected a retriever, a SentenceTransformer or a MultiVectorEncoder, got {type(model).__name__}."
        )


def _texts(query_ids: Sequence[str], reader: PairReader) -> EncodingTask:
    def read(ids: Sequence[str]) -> list[Any]:
        return [as_host_input(reader.text_by_query_id[query_id]) for query_id in ids]

    return EncodingTask("query", query_ids, read, _no_digests)


def _documents(document_ids: Sequence[str], reader: PairReader) -> EncodingTask:
    def read(ids: Sequence[str]) -> list[Any]:
        return [as_host_input(document) for document in reader.documents.read(ids)]

    return EncodingTask("document", document_ids, read, _no_digests)


def _no_digests(rows: Sequence[int]) -> list[str]:
    raise AssertionError(f"digests of {len(rows)} rows are asked for without a cache")


def _best(retriever: Encoder, texts: Embeddings, documents: Embeddings, depth: int) -> np.ndarray:
    return _ranked(len(texts), depth, lambda rows: retriever.similarity(texts[rows], documents))


def _best_texts(retriever: Encoder, documents: Embeddings, texts: Embeddings, depth: int) -> np.ndarray:
    # The text stays the query of the similarity: MaxSim is not symmetric.
    return _ranked(len(documents), depth, lambda rows: retriever.similarity(texts, documents[rows]).T)


def _ranked(count: int, depth: int, scores: Callable[[slice], torch.Tensor]) -> np.ndarray:
    starts = range(0, count, _ASKING_AT_ONCE)
    parts = [top_columns(scores(slice(start, start + _ASKING_AT_ONCE)), depth).cpu().numpy() for start in starts]
    return np.concatenate(parts)
