"""Embeddings of texts and documents a portion at a time, read ahead, and kept in a folder where one is given."""

import logging
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
import xxhash
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from tqdm.auto import tqdm

from mmtune.errors import ConfigError, DatasetError
from mmtune.host import let_read_typed_texts
from mmtune.inference.store import model_fingerprint

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

Encoder: TypeAlias = SentenceTransformer | MultiVectorEncoder
"""The host's models that embed queries and documents apart."""

Embeddings: TypeAlias = torch.Tensor | list[torch.Tensor]
"""float32: ``(items, dimension)``, or for each item ``(tokens, dimension)`` of a ``MultiVectorEncoder``."""

ENOUGH_PIXELS = 8_000_000
"""What a huge JPEG may be scaled down to: an A4 page at 300 dpi, beyond any encoder's input."""

SHARD_SIZE = 512
"""Items whose embeddings are held, scored and stored together; a cache serves any batch size."""


def portions_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """``items`` in their order, ``size`` at a time; the last portion may be smaller.

    Raises:
        ConfigError: ``size``, which is a ``batch_size``, is no positive whole number.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"batch_size={size!r}: expected a whole number of 1 or more.")
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


class EmbeddingCache:
    """Embeddings of one model in a folder, by the content of what was embedded.

    Files are written as they are made and whole, so that an interrupted run goes on where it was. A changed model has
    a folder of its own; a changed item changes the key of its shard, and the shards beside it stay.

    Args:
        folder: The folder; it may serve several models.
        model: The model; see ``model_fingerprint``.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Encoder) -> None:
        self._folder = Path(folder) / f"embeddings-{model_fingerprint(model)}"

    def load(self, key: str) -> Embeddings | None:
        """The embeddings under a key, on the CPU; ``None`` where there are none."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            # Opened here: np.load leaves a file that it can't read open (numpy 2.4).
            with path.open("rb") as file, np.load(file) as stored:
                values, lengths = torch.from_numpy(stored["values"]), stored["lengths"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("The embeddings in %s can't be read (%s) and are made again.", path, error)
            return None
        return list(values.split(lengths.tolist())) if len(lengths) else values

    def save(self, key: str, embeddings: Embeddings) -> None:
        """Store embeddings under a key."""
        is_list = isinstance(embeddings, list)
        values = (torch.cat(embeddings) if is_list else embeddings).cpu().numpy()
        lengths = np.array([len(item) for item in embeddings] if is_list else [], dtype=np.int64)
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under its name only when it is whole; two processes may write the same.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, values=values, lengths=lengths)
        partial.replace(path)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.npz"


@dataclass(frozen=True)
class EncodingTask:
    """What is to be encoded, and how it is read.

    Attributes:
        task: Whether queries or documents; each has its own prompt.
        items: A name for each item, such as its id; errors give it.
        read: What the host is given for some of the names, e.g. decoded pages.
        digests: For some rows of ``items`` the digests of their content; asked for where there is a cache.
    """

    task: Literal["query", "document"]
    items: Sequence[str]
    read: Callable[[Sequence[str]], list[Any]]
    digests: Callable[[Sequence[int]], list[str]]


def encoded_shards(
    model: Encoder, task: EncodingTask, *, batch_size: int, cache: EmbeddingCache | None, show_progress_bar: bool
) -> Iterator[Embeddings]:
    """The embeddings of all items in their order, ``SHARD_SIZE`` at a time, on the model's device.

    Raises:
        ConfigError: ``batch_size`` is no positive whole number.
        DatasetError: The model gives no finite numbers for an item; the message names it.
    """
    portions_of((), batch_size)  # so that a wrong size is found where everything is cached, too
    let_read_typed_texts(model)
    name = "queries" if task.task == "query" else "documents"
    with tqdm(total=len(task.items), desc=f"Encoding {name}", disable=not show_progress_bar, leave=False) as bar:
        for rows in portions_of(range(len(task.items)), SHARD_SIZE):
            key = "" if cache is None else f"{task.task}-{_key(task.digests(rows))}"
            embeddings = cache.load(key) if cache is not None else None
            if embeddings is None:
                embeddings = _encoded(model, task, rows, batch_size, bar)
                if cache is not None:
                    cache.save(key, embeddings)
            else:
                bar.update(len(rows))
            yield _to(embeddings, model.device)


def _encoded(model: Encoder, task: EncodingTask, rows: Sequence[int], batch_size: int, bar: tqdm) -> Embeddings:
    parts: list[Embeddings] = []
    names = [task.items[row] for row in rows]
    portions = portions_of(names, batch_size)
    for portion, inputs in zip(portions, read_ahead(task.read, portions), strict=True):
        parts.append(_embed(model, task.task, inputs, batch_size))
        _require_finite(parts[-1], portion, task.task)
        bar.update(len(portion))
    return joined(parts)


def joined(parts: Sequence[Embeddings]) -> Embeddings:
    """The embeddings of several portions as those of one."""
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    return torch.cat(tensors) if tensors else [item for part in parts for item in part]


def _embed(model: Encoder, task: Literal["query", "document"], inputs: list[Any], batch_size: int) -> Embeddings:
    encode = model.encode_query if task == "query" else model.encode_document
    if isinstance(model, MultiVectorEncoder):
        return [item.float() for item in encode(inputs, batch_size=batch_size, show_progress_bar=False)]
    return encode(inputs, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True).float()


def _require_finite(embeddings: Embeddings, names: Sequence[str], task: str) -> None:
    wrong = [name for name, item in zip(names, embeddings, strict=True) if not torch.isfinite(item).all()]
    if wrong:
        raise DatasetError(
            f"The model gives numbers that are not finite for the {task} {wrong[0]!r}. Load it in another precision "
            '(dtype="float32"), or look at that item.'
        )


def _to(embeddings: Embeddings, device: torch.device) -> Embeddings:
    return embeddings.to(device) if isinstance(embeddings, torch.Tensor) else [item.to(device) for item in embeddings]


def _key(digests: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(digests).encode())
