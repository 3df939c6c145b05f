"""What a model gave, kept in a folder by what it was given, and what tells one model from another."""

import json
import logging
import os
import platform
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import sentence_transformers
import torch
import transformers
import xxhash
from sentence_transformers.base.modules import Module
from transformers import PreTrainedModel

from mmtune.arguments import require_path
from mmtune.errors import ConfigError

logger = logging.getLogger(__name__)

Embeddings: TypeAlias = torch.Tensor | list[torch.Tensor]
"""``(items, dimension)``, or for each item ``(tokens, dimension)`` of a ``MultiVectorEncoder``."""


class Pair(NamedTuple):
    """A query and a document, by id."""

    query_id: str
    document_id: str


class EmbeddingStore:
    """Embeddings of one model in a folder, by the content of what was embedded.

    A shard is a file that is written whole; until then its portions are added to another one as they are made, so that
    an interrupted run goes on where it was. A changed model has a folder of its own; a changed item changes the key of
    its shard, and the shards beside it stay.

    Args:
        folder: The folder; it may serve several models.
        model: The model; see ``model_fingerprint``.
    """

    def __init__(self, folder: str | os.PathLike[str], model: torch.nn.Module) -> None:
        self._folder = Path(folder) / f"embeddings-{model_fingerprint(model)}"

    def load(self, key: str) -> Embeddings | None:
        """The embeddings under a key, on the CPU; ``None`` where there are none."""
        path = self._folder / f"{key}.npz"
        if not path.is_file():
            return None
        try:
            # Opened here: np.load leaves a file that it can't read open (numpy 2.4).
            with path.open("rb") as file, np.load(file) as stored:
                embeddings, count = _as_embeddings(stored["values"], stored["lengths"]), int(stored["count"])
            if len(embeddings) != count:
                raise ValueError(f"{len(embeddings)} items, expected {count}")
            return embeddings
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("The embeddings in %s can't be read (%s) and are made again.", path, error)
            return None

    def save(self, key: str, embeddings: Embeddings) -> None:
        """Store the whole of a shard under a key.

        Raises:
            ConfigError: The folder can't be written to.
        """
        values, lengths = _as_arrays(embeddings)

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, values=values, lengths=lengths, count=len(embeddings))

        with writing_to(self._folder):
            write_whole(self._folder / f"{key}.npz", write)
            for begun in self._folder.glob(f"{key}.*.begun"):
                begun.unlink(missing_ok=True)

    def resume(self, key: str) -> list[Embeddings]:
        """The portions of a shard that an interrupted run added, on the CPU; further ones are added behind them.

        Raises:
            ConfigError: The folder can't be written to.
        """
        found = max(map(_read_portions, self._folder.glob(f"{key}.*.begun")), key=len, default=[])
        with writing_to(self._folder):
            # In a file of this process: the other one may still be at it.
            self._begun(key).write_bytes(b"")
        for portion in found:
            self.add(key, portion)
        return found

    def add(self, key: str, portion: Embeddings) -> None:
        """Add a portion to a shard that ``resume`` began.

        Raises:
            ConfigError: The folder can't be written to.
        """
        with writing_to(self._folder), self._begun(key).open("ab") as file:
            for array in _as_arrays(portion):
                np.save(file, array)

    def _begun(self, key: str) -> Path:
        return self._folder / f"{key}.{os.getpid()}.begun"


def _as_arrays(embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """All vectors, and the vectors of each item; no lengths where each has one."""
    is_list = isinstance(embeddings, list)
    values = (torch.cat(embeddings) if is_list else embeddings).cpu().numpy()
    return values, np.array([len(item) for item in embeddings] if is_list else [], dtype=np.int64)


def _as_embeddings(values: np.ndarray, lengths: np.ndarray) -> Embeddings:
    found = torch.from_numpy(values)
    return list(found.split(lengths.tolist())) if len(lengths) else found


def _read_portions(path: Path) -> list[Embeddings]:
    """The portions in a file, up to where its writer was stopped."""
    portions: list[Embeddings] = []
    with suppress(OSError, ValueError, EOFError), path.open("rb") as file:
        while True:
            values, lengths = np.load(file), np.load(file)
            portions.append(_as_embeddings(values, lengths))
    return portions


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Makes the folder, and names it where it can't be written to.

    Raises:
        ConfigError: It can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} can't be written to: {error}. What was stored before is kept. Make room or give "
            "permission there, and call again, or pass another folder."
        ) from error


_MANIFEST = "mmtune_scores.json"
_FORMAT_VERSION = 1
_SCORES = pa.schema(
    {"query_id": pa.string(), "document_id": pa.string(), "content": pa.string(), "score": pa.float64()}
)


class ScoreStore:
    """Scores of one reranker in a folder, as parquet files.

    =========  ============  ================================  =======
    query_id   document_id   content                           score
    =========  ============  ================================  =======
    "q1"       "p7"          a digest of the text and of "p7"  3.25
    =========  ============  ================================  =======

    A score is used again where the content is equal, so an id whose page has changed is scored anew.

    Args:
        folder: A new folder, or one of the same reranker.
        teacher: What tells this reranker, and what it reads, from others.

    Attributes:
        score_by_content: All scores that the folder holds.

    Raises:
        ConfigError: The folder holds something else, or can't be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], teacher: str) -> None:
        self._folder = Path(folder)
        manifest = self._folder / _MANIFEST
        found = _read_manifest(manifest) if manifest.is_file() else None
        if found is None:
            # What a killed process had begun to write is nobody's.
            there = [path for path in self._folder.glob("*") if path != manifest and path.suffix != ".partial"]
            if there or (self._folder.exists() and not self._folder.is_dir()):
                raise ConfigError(
                    f"{str(self._folder)!r} is not empty and holds no scores, or none that tell their teacher. Pass a "
                    "new folder."
                )
            content = json.dumps({"format_version": _FORMAT_VERSION, "teacher": teacher}, indent=2) + "\n"
            with writing_to(self._folder):
                write_whole(manifest, lambda partial: partial.write_text(content))
        elif found != (teacher, _FORMAT_VERSION):
            raise ConfigError(
                f"{str(self._folder)!r} holds scores of another teacher, or over another kind of documents "
                f"({found[0]}, this one is {teacher}). Scores of two teachers do not mix: pass another folder."
            )
        query_ids, document_ids, contents, scores = (part.to_pylist() for part in read_scores(folder).columns)
        self.score_by_content: dict[str, float] = dict(zip(contents, scores, strict=True))
        self._written = set(zip(map(Pair, query_ids, document_ids), contents, strict=True))
        self._num_files = len(list(self._folder.glob("scores-*.parquet")))

    def add(self, pairs: Sequence[Pair], contents: Sequence[str], scores: Sequence[float]) -> None:
        """Write a file of the rows that the folder does not have."""
        rows = zip(pairs, contents, scores, strict=True)
        new = {(pair, content): score for pair, content, score in rows if (pair, content) not in self._written}
        if not new:
            return
        table = score_table([pair for pair, _ in new], [content for _, content in new], list(new.values()))
        # With the process in the name, two that write at once do not replace each other's files.
        path = self._folder / f"scores-{self._num_files:06d}-{os.getpid()}.parquet"
        write_whole(path, lambda partial: pq.write_table(table, partial))
        self._written.update(new)
        self.score_by_content |= {content: score for (_, content), score in new.items()}
        self._num_files += 1


def _read_manifest(path: Path) -> tuple[str, int] | None:
    """The teacher and the version; ``None`` where the file is damaged."""
    try:
        found = json.loads(path.read_text())
        return found["teacher"], found["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be read: %r.", path, error)
        return None


def read_scores(folder: str | os.PathLike[str]) -> pa.Table:
    """All rows that a ``ScoreStore`` wrote to a folder, in the order they were written; without damaged files.

    Raises:
        ConfigError: The folder holds no scores.
    """
    require_path("folder", folder)
    if not (Path(folder) / _MANIFEST).is_file():
        raise ConfigError(f"{str(folder)!r} holds no scores. Pass the folder that was given to score_rows.")
    files = sorted(Path(folder).glob("scores-*.parquet"))
    tables = [_SCORES.empty_table()]
    for path in files:
        try:
            tables.append(pq.read_table(path, schema=_SCORES))
        except (OSError, pa.ArrowException) as error:
            logger.warning("The scores in %s can't be read (%s): scoring makes them again.", path, error)
    return pa.concat_tables(tables)


def score_table(pairs: Sequence[Pair], contents: Sequence[str], scores: Sequence[float]) -> pa.Table:
    """Scores as a table, as a ``ScoreStore`` keeps them."""
    query_ids, document_ids = [pair.query_id for pair in pairs], [pair.document_id for pair in pairs]
    return pa.table([query_ids, document_ids, contents, scores], schema=_SCORES)


class ReplyStore:
    """Replies of generators and judges in a folder, a file each, by what was asked.

    A file is written when its reply comes, and whole: what was answered is never asked again, however often a run is
    killed. Two processes may share the folder.

    Args:
        folder: A new folder, or one of replies.

    Raises:
        ConfigError: The folder can't be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require_path("store", folder)
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / "mmtune_replies", Path.touch)
        except OSError as error:
            raise ConfigError(
                f"store={str(folder)!r} can't be written to: {error}. Pass a folder that can, or None to keep nothing."
            ) from error

    def load(self, key: str) -> str | None:
        """The reply under a key; ``None`` where there is none."""
        path = self._path(key)
        try:
            reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The reply in %s can't be read (%s) and is asked for again.", path, error)
            return None
        return reply if isinstance(reply, str) else None

    def save(self, key: str, reply: str, **asked: str) -> None:
        """Store a reply under a key, with what was asked, for people who look into the folder.

        Raises:
            ConfigError: The folder can't be written to.
        """
        path, content = self._path(key), json.dumps({"reply": reply, **asked}, indent=2)

        def write(partial: Path) -> None:
            partial.write_text(content, encoding="utf-8")

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, write)
        except OSError as error:
            raise ConfigError(
                f"A reply can't be written to {str(path)!r}: {error}. What was stored before stays: make room, or "
                "mend the folder, and call again."
            ) from error

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file that is there whole or not at all, whoever is killed and whoever writes it too."""
    # Under its name only when it is whole; with the process in its name until then, since two may write the same.
    # And with the thread and the machine, for the same reason.
    # It begins with "_": engines that read folders of parquet pass over such files.
    partial = path.with_name(f"_{path.name}.{_machine()}-{os.getpid()}-{threading.get_ident()}.partial")
    write(partial)
    partial.replace(path)


def delete_partials(folder: Path) -> None:
    """Delete what killed processes of this machine left half written; those of other machines may still be at it."""
    for partial in folder.glob(f"_*.{_machine()}-*-*.partial"):
        process = partial.name.split("-")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            partial.unlink(missing_ok=True)


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_NOT_CONTENT = ("_name_or_path", "transformers_version")
_SETTINGS = ("prompts", "default_prompt_name", "truncate_dim", "max_seq_length")
_OF_ADAPTERS = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")


def model_fingerprint(model: torch.nn.Module) -> str:
    """A digest of all that decides what a host model computes, wherever it was loaded from.

    That is weights with their types, modules and their settings (pixel limits among them), configurations, tokenizers
    and image processors, prompts, truncation, and the versions of the host and of transformers.

    Args:
        model: A ``SentenceTransformer``, ``MultiVectorEncoder`` or ``CrossEncoder``.

    Returns:
        32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for part in _settings(model):
        digest.update(_stable(part).encode())
    for name, values in sorted(model.state_dict().items()):
        if isinstance(values, torch.Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stable(value: Any) -> str:
    """A text of plain values, the same in every process: without addresses and the order of sets and keys."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_stable(key)}: {_stable(part)}' for key, part in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_stable, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_stable, value))}]"
    return _ADDRESS.sub("", repr(value))


def _settings(model: torch.nn.Module) -> Iterator[Any]:
    yield [sentence_transformers.__version__, transformers.__version__]
    yield [type(model).__module__, type(model).__qualname__, repr(model)]
    yield {name: getattr(model, name, None) for name in _SETTINGS}
    for module in model.modules():
        if isinstance(module, Module):
            yield module.get_config_dict()
        if isinstance(module, PreTrainedModel):
            yield {key: value for key, value in module.config.to_dict().items() if key not in _NOT_CONTENT}
        if getattr(module, "processor", None) is not None:
            yield from _processing(module.processor)
        if isinstance(getattr(module, "disable_adapters", None), bool):  # a layer of peft
            yield {name: getattr(module, name, None) for name in _OF_ADAPTERS}


def _processing(processor: Any) -> Iterator[Any]:
    if hasattr(processor, "to_json_string"):
        yield {key: part for key, part in json.loads(processor.to_json_string()).items() if key not in _NOT_CONTENT}
    yield getattr(processor, "chat_template", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield repr(tokenizer)
        return
    # Truncation and padding are set by each call, so they would differ before and after the first.
    yield {key: part for key, part in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    yield [tokenizer.model_max_length, tokenizer.padding_side, getattr(tokenizer, "chat_template", None)]
