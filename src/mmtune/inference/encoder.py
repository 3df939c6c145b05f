"""Embeddings of the texts and documents of a dataset, a portion at a time, decoded while the model works."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from tqdm.auto import tqdm

from mmtune.arguments import MIXED, PLURALS, shown
from mmtune.data.documents import DocumentKind, DocumentReader, as_host_input, document_columns, kinds_of_documents
from mmtune.data.identity import document_digests, text_digest
from mmtune.data.query_kinds import QueryKind, QueryReader, as_documents, query_columns
from mmtune.data.relevance import Direction
from mmtune.errors import ConfigError, DatasetError
from mmtune.host import let_read_typed_texts
from mmtune.inference.preprocessing import count_reading_threads, prepare_pages, reading_pages
from mmtune.inference.recordings import count_cut
from mmtune.inference.store import Embeddings, EmbeddingStore, Pair
from mmtune.models.loading import check_documents, check_kinds, takes_mixed
from mmtune.models.routes import find_router, ignores_prompt

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

Retriever: TypeAlias = SentenceTransformer | MultiVectorEncoder
"""What finds documents: one vector for each, or one a token."""

Task: TypeAlias = Literal["query", "document"]
"""What an item is to a model, and so its prompt."""

SHARD_SIZE = 512
"""Items whose embeddings are held, compared and stored together; a store serves any batch size."""

_BATCHES_BESIDE_A_GPU = 4
"""Batches that are read together where several threads read, and that the host sorts by length or area."""


def require_retriever(model: object, name: str, call: str) -> None:
    """Make sure that ``model`` embeds queries and documents apart.

    Args:
        model: What was given.
        name: Of the argument, for the message.
        call: How the function is called, for the message.

    Raises:
        ConfigError: It is of another kind.
    """
    if not isinstance(model, get_args(Retriever)):
        remedy = (
            f"Pass {name}=load_model({model!r:.80})" if isinstance(model, (str, os.PathLike)) else f"The call is {call}"
        )
        raise ConfigError(
            f"{name}={shown(model)} is no retriever. Expected a SentenceTransformer or a MultiVectorEncoder. {remedy}."
        )


@dataclass(frozen=True)
class DatasetReader:
    """What models are given for the queries and documents of a dataset, by id, read when it is asked for.

    Attributes:
        corpus: A table with ``document_id`` and ``image`` (encoded) and/or ``text``.
        queries: A table with ``query_id`` and ``text``, and ``image`` or ``audio`` (encoded) where that asks.
        kind: What a document is made of.
        query_kind: What a query is made of.

    Raises:
        ConfigError: The corpus lacks what ``kind`` asks for, or the queries what ``query_kind`` does.
    """

    corpus: Dataset
    queries: Dataset
    kind: DocumentKind
    query_kind: QueryKind = "text"

    def __post_init__(self) -> None:
        document_columns(self.corpus, self.kind)
        query_columns(self.queries, self.query_kind)

    @cached_property
    def text_by_query_id(self) -> dict[str, str]:
        """The text of each query; its id where it asks without one."""
        given = zip(self.queries["query_id"][:], self.queries["text"][:], strict=True)
        return {query_id: text or query_id for query_id, text in given}

    def texts(self, task: Task) -> list[str]:
        """All texts of the queries, or of the documents, that are made of one."""
        kind, table = (self.query_kind, self.queries) if task == "query" else (self.kind, self.corpus)
        is_read = "text" in table.column_names and (kind == MIXED or "text" in kind.split("+"))
        return [text for text in table["text"][:] if text is not None] if is_read else []

    @cached_property
    def asking(self) -> QueryReader:
        """Gives the queries by id."""
        return QueryReader(self.queries, self.query_kind, is_lazy=True)

    @cached_property
    def documents(self) -> DocumentReader:
        """Gives the documents by id."""
        return DocumentReader(self.corpus, self.kind, is_lazy=True)

    @cached_property
    def kinds(self) -> list[str]:
        """What the documents are made of, each kind once; several where they are mixed."""
        return list(dict.fromkeys(kinds_of_documents(self.corpus, self.kind)))

    @cached_property
    def _row_by_document_id(self) -> dict[str, int]:
        return {document_id: row for row, document_id in enumerate(self.corpus["document_id"][:])}

    @cached_property
    def _row_by_query_id(self) -> dict[str, int]:
        return {query_id: row for row, query_id in enumerate(self.queries["query_id"][:])}

    def read(self, task: Task, ids: Sequence[str]) -> list[Any]:
        """What the host's encoders take for each id; images are decoded when they are looked at."""
        found = self.asking.read(ids) if task == "query" else self.documents.read(ids)
        return [as_host_input(each) for each in found]

    def read_pairs(self, pairs: Sequence[Pair], direction: Direction) -> list[list[Any]]:
        """``[query, document]``, or ``[document, query]`` where pages ask; each is decoded once."""
        queries = self.asking.read([pair.query_id for pair in pairs])
        documents = self.documents.read([pair.document_id for pair in pairs])
        sides = (queries, documents) if direction == "text_to_image" else (documents, queries)
        return [list(pair) for pair in zip(*sides, strict=True)]

    def digests(self, task: Task, ids: Sequence[str]) -> list[str]:
        """A digest of the content of each, 32 hexadecimal digits, without decoding."""
        if task == "query":
            if self.query_kind == "text":
                return [text_digest(self.text_by_query_id[query_id]) for query_id in ids]
            rows = [self._row_by_query_id[each] for each in ids]
            return document_digests(as_documents(self.queries), self.query_kind, rows)
        return document_digests(self.corpus, self.kind, [self._row_by_document_id[each] for each in ids])

    def pair_digests(self, pairs: Sequence[Pair]) -> list[str]:
        """A digest of the query and the document of each pair."""
        document_ids = list({pair.document_id: None for pair in pairs})
        digest_by_id = dict(zip(document_ids, self.digests("document", document_ids), strict=True))
        queries = self.digests("query", [pair.query_id for pair in pairs])
        return [
            text_digest(f"{query} {digest_by_id[pair.document_id]}") for query, pair in zip(queries, pairs, strict=True)
        ]


def encode(
    model: Retriever,
    task: Task,
    ids: Sequence[str],
    reader: DatasetReader,
    *,
    batch_size: int,
    at_once: int | None = None,
) -> Iterator[Embeddings]:
    """The embeddings of texts or documents in their order, a portion at a time, as the model gives them.

    The next portion is read while the model works on the last, and no more than two are held.

    Args:
        model: The model, with its own prompts for ``task``.
        task: What the ids name.
        ids: Query ids or document ids.
        reader: Gives what is encoded.
        batch_size: Items a forward pass.
        at_once: Items a portion; ``None`` is ``batch_size``, and four times as many where several threads read.

    Raises:
        ConfigError: The model embeds no documents of this kind, or no texts.
        DatasetError: The model can't read an item, or gives no finite numbers for it; the message names it.
        ImageDecodeError: A page is no readable image; the message names the document.
    """
    if isinstance(model, torch.nn.Module):  # an evaluator also takes what only has the methods of a model
        let_read_typed_texts(model)
    if task == "document" and reader.kind == MIXED and isinstance(model, get_args(Retriever)):
        check_kinds(model, reader.kinds)  # before the first of thousands, not at the first sound among them
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}
    if not isinstance(model, MultiVectorEncoder):
        options["convert_to_tensor"] = True
    embed = model.encode_query if task == "query" else model.encode_document
    with reading_pages(model):
        # several threads need more than a batch to be busy; and the host sorts what it is given at once by area
        batches = _BATCHES_BESIDE_A_GPU if count_reading_threads(model) > 1 else 1
        portions = portions_of(ids, at_once or batches * batch_size)
        ready = read_ahead(lambda each: prepare_pages(model, reader.read(task, each)), portions)
        for portion, inputs in zip(portions, ready, strict=True):
            try:
                embeddings: Any = _embed_by_kind(model, embed, inputs, options)
            except ValueError as error:
                if isinstance(model, get_args(Retriever)):
                    check_documents(model, reader.kind, reader.query_kind)
                at, reason = find_unreadable(lambda each: embed([each], **options), inputs, error)
                raise DatasetError(f"The model can't read the {task} {portion[at]!r}: {reason} {HOW_TO_FIT}") from error
            _require_finite(embeddings, task, portion)
            yield embeddings


def _embed_by_kind(
    model: object, embed: Callable[..., Any], inputs: Sequence[Any], options: Mapping[str, Any]
) -> Embeddings:
    """The embeddings of inputs in their order, those of each kind in batches of their own where a model needs that."""
    rows_by_kind: dict[Any, list[int]] = {}
    for row, item in enumerate(inputs):
        rows_by_kind.setdefault(tuple(item) if isinstance(item, dict) else None, []).append(row)
    if len(rows_by_kind) == 1 or not isinstance(model, get_args(Retriever)) or takes_mixed(model):
        return embed(inputs, **options)
    parts = [embed([inputs[row] for row in rows], **options) for rows in rows_by_kind.values()]
    found: dict[int, Any] = {}
    for rows, part in zip(rows_by_kind.values(), parts, strict=True):
        found.update(zip(rows, part, strict=True))
    ordered = [found[row] for row in range(len(inputs))]
    return torch.stack(ordered) if isinstance(parts[0], torch.Tensor) else ordered


HOW_TO_FIT = (
    "Text beside a page may be longer than the model reads, so that a part of the page is cut off: raise the model's "
    "max_seq_length, shorten the text, or load the model with a lower max_pixels."
)


def find_unreadable(read: Callable[[Any], object], inputs: Sequence[Any], error: Exception) -> tuple[int, str]:
    """Which item of a batch a model can't read, and why.

    Raises:
        Exception: ``error`` itself, where the model can read each of them.
    """
    for at, item in enumerate(inputs):
        try:
            read(item)
        except ValueError as own:
            return at, str(own)
    raise error


def _require_finite(embeddings: Embeddings, task: Task, ids: Sequence[str]) -> None:
    if isinstance(embeddings, torch.Tensor):
        finite = torch.isfinite(embeddings).flatten(1).all(dim=1)
    else:
        finite = torch.stack([torch.isfinite(item).all() for item in embeddings])
    if not finite.all():
        raise DatasetError(
            f"The model gives numbers that are not finite for the {task} {ids[finite.tolist().index(False)]!r}. Load "
            'it in another precision (dtype="float32"), look at that item, or at whether the training diverged.'
        )


def count_cut_texts(model: Retriever, task: Task, texts: Iterable[str]) -> int:
    """How many texts have more tokens than a model reads; the host cuts the rest off without a word.

    Prompts count, and what a chat template adds does not, so a text that just fits may be cut all the same.

    Args:
        model: The model; where nothing limits its texts, none is cut.
        task: What the texts are to the model.
        texts: What it will be given.
    """
    encoder = _text_encoder(model, task)
    limit = getattr(encoder, "max_seq_length", None)
    if limit is None:
        return 0
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    prompt = next((model.prompts[name] for name in names if name in model.prompts), None) or ""
    # A token takes a byte at least, so that few texts have to be tokenised; some stand beside any text.
    room = limit - len(prompt.encode()) - 4
    long = [f"{prompt}{text}" for text in texts if len(text) > room or len(text.encode(errors="replace")) > room]
    tokens = encoder.tokenizer(long, truncation=False, padding=False, verbose=False)["input_ids"] if long else []
    return sum(len(each) > limit for each in tokens)


def _text_encoder(model: Retriever, task: Task) -> Any:
    """What reads the texts of a model: the host's ``Transformer`` where it has a tokenizer, else ``None``."""
    if not isinstance(model, torch.nn.Module):
        return None
    router = find_router(model)
    routes = {} if router is None else dict(router.sub_modules.items())
    readers: Any = next((routes[name] for name in (task, "text") if name in routes), model)
    encoders = (module for module in readers.children() if isinstance(module, Transformer))
    return next((encoder for encoder in encoders if encoder.tokenizer is not None), None)


def warn_of_unread_prompt(model: Retriever, reader: DatasetReader) -> None:
    """Log a warning where queries are something else than texts, and the model's prompt for them is not read."""
    kind = reader.query_kind
    if kind != "text" and isinstance(model, get_args(Retriever)) and ignores_prompt(model, kind):
        logger.warning(
            "The model's prompt for queries has no effect with queries=%r: where no chat template is used, a prompt "
            "stands before texts alone. Leave it out, or pass a model that reads it.",
            kind,
        )


def warn_of_cut_inputs(model: Retriever, reader: DatasetReader) -> None:
    """Log a warning where queries or documents, texts or recordings, are longer than what a model reads of them."""
    warn_of_unread_prompt(model, reader)
    for task, what in (("query", "queries"), ("document", "documents")):
        texts = reader.texts(task)
        cut = count_cut_texts(model, task, texts)
        if cut:
            logger.warning(
                "%d of %d %s have more tokens than the %d that the model reads, and are cut off there. Raise "
                "model.max_seq_length where the model allows it, or split the texts.",
                cut,
                len(texts),
                what,
                _text_encoder(model, task).max_seq_length,
            )
    cut = {
        "": count_cut(model, reader.corpus, reader.kind),
        "that ask ": count_cut(model, as_documents(reader.queries), reader.query_kind, task="query"),
    }
    for who, numbers in cut.items():
        for kind, number in numbers.items():
            logger.warning(
                "%d %s %sare read in part: the model takes no more seconds or frames of one. load_model says what it "
                "takes, in max_seconds, fps and max_frames.",
                number,
                PLURALS[kind],
                who,
            )


def encode_shards(
    model: Retriever,
    task: Task,
    ids: Sequence[str],
    reader: DatasetReader,
    *,
    batch_size: int,
    show_progress_bar: bool,
    store: EmbeddingStore | None = None,
) -> Iterator[Embeddings]:
    """What ``encode`` gives, as float32 and ``SHARD_SIZE`` items at a time.

    They are kept in ``store`` batch by batch as they are made, and looked up there.
    """
    name = "queries" if task == "query" else "documents"
    with tqdm(total=len(ids), desc=f"Encoding {name}", disable=not show_progress_bar, leave=False) as bar:
        for shard in portions_of(ids, SHARD_SIZE):
            key = "" if store is None else f"{task}-{text_digest(''.join(reader.digests(task, shard)))}"
            stored = None if store is None else store.load(key)
            if stored is not None:
                bar.update(len(shard))
                yield as_float32(stored, model.device)
                continue
            parts = [] if store is None else [as_float32(part, model.device) for part in store.resume(key)]
            done = sum(map(len, parts))
            bar.update(done)
            for part in encode(model, task, shard[done:], reader, batch_size=batch_size):
                parts.append(as_float32(part, model.device))
                if store is not None:
                    store.add(key, parts[-1])
                bar.update(len(part))
            embeddings = join(parts)
            if store is not None:
                store.save(key, embeddings)
            yield embeddings


def as_float32(embeddings: Embeddings, device: torch.device) -> Embeddings:
    """The embeddings on a device, in single precision."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings.to(device, torch.float32)
    return [item.to(device, torch.float32) for item in embeddings]


def join(parts: Iterable[Embeddings]) -> Embeddings:
    """The embeddings of several portions as those of one."""
    held = list(parts)
    tensors = [part for part in held if isinstance(part, torch.Tensor)]
    return torch.cat(tensors) if tensors else [item for part in held for item in part]


def portions_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """``items`` in their order, ``size`` at a time; the last portion may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def read_ahead(read: Callable[[Item], Result], portions: Iterable[Item]) -> Iterator[Result]:
    """What ``read`` gives for each portion, in order; a thread reads the next while the caller works on the last.

    At most two portions are held: so memory does not grow with their number.

    Args:
        read: Reads one portion, e.g. decodes pages.
        portions: What to read.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[Result]] = deque()
        for portion in portions:
            pending.append(pool.submit(read, portion))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
