"""Documents and texts by id, read when they are used."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeAlias, TypeVar

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from mmtune import host
from mmtune.arguments import ALL_OF_IT, MIXED, MODALITIES, MediaLimits, name_item, require_one_of
from mmtune.data.arrow import column, media_columns
from mmtune.data.clips import Clip
from mmtune.data.images import EncodedImages, InputSize, decode_page, enough_for
from mmtune.data.media import Recording
from mmtune.data.pages import Page
from mmtune.data.sounds import Sound
from mmtune.data.tables import has_content
from mmtune.errors import ConfigError, DatasetError, MissingDocumentError

DocumentKind: TypeAlias = str
"""What a document is made of where it is read: ``"text"``, ``"image"``, ``"audio"``, ``"video"``, or several joined by
``+`` in this order, such as ``"text+image"``; with ``"mixed"`` each document is what it has."""

DOCUMENT_KINDS = (
    *("+".join(parts) for count in range(1, 5) for parts in combinations(MODALITIES, count)),
    MIXED,
)
"""All kinds of documents."""

RECORDINGS: dict[str, type[Recording]] = {"audio": Sound, "video": Clip}
"""What stands for the sounds and clips of documents, by column."""

Reader = TypeVar("Reader", bound="DocumentReader")


@host.hashed_by(lambda table: table.fingerprint)
class KeyedTable:
    """Rows of a table by their id. The index is built at the first look-up, once per process."""

    def __init__(self, table: Dataset, key: str, columns: Sequence[str]) -> None:
        self._table = table.with_format(None).select_columns([key, *columns])
        self._key = key
        self._row_by_id: dict[str, int] | None = None
        self.fingerprint = f"{key} of {host.fingerprint(table)}"

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes that are spawned build the index themselves; it is quicker than to send it.
        return {**self.__dict__, "_row_by_id": None}

    def get(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The rows with these ids, in their order, as dictionaries.

        Raises:
            MissingDocumentError: An id is not in the table.
        """
        if self._row_by_id is None:
            self._row_by_id = {value: row for row, value in enumerate(self._table[self._key][:])}
        try:
            rows = [self._row_by_id[value] for value in ids]
        except KeyError as error:
            raise MissingDocumentError(
                f"{self._key} {error.args[0]!r} is not among the {len(self._row_by_id)} rows that these rows were made "
                "from. Make the rows with training_rows() of the dataset that holds it."
            ) from None
        batch = self._table[rows]
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


class DocumentReader:
    """What the host is given for each document.

    An image is an RGB image, a text a text. Sounds and clips stand in dictionaries, ``{"audio": {"array",
    "sampling_rate"}}`` and ``{"video": {"array", "video_metadata"}}``: the host's Router takes them so alone. A
    document of several parts is one dictionary of them.

    Args:
        corpus: A table with ``document_id`` and what ``documents`` asks for, encoded.
        documents: What a document is made of.
        max_pixels: Upper bound of width times height of an image; ``None`` keeps every pixel.
        input_size: What the model reads a page at, where that is known: a large JPEG is decoded at a fraction of its
            size that leaves more than enough, and ``max_pixels`` leaves at least that width and height.
        is_lazy: Whether an image is decoded when its pixels are asked for, rather than when it is read; in the place of
            a sound or a clip stands a ``Sound`` or a ``Clip`` then.
        limits: How much is read of sounds and clips.

    Raises:
        ConfigError: The corpus lacks a column that ``documents`` asks for.
    """

    def __init__(
        self,
        corpus: Dataset,
        documents: DocumentKind = "image",
        *,
        max_pixels: int | None = None,
        input_size: InputSize | None = None,
        is_lazy: bool = False,
        limits: MediaLimits = ALL_OF_IT,
    ) -> None:
        self._columns = document_columns(corpus, documents)
        self._is_mixed = documents == MIXED
        self.limits = replace(limits, max_pixels=max_pixels) if max_pixels else limits
        self._table = KeyedTable(corpus, "document_id", self._columns)
        self._size: dict[str, Any] = {"max_pixels": max_pixels, "enough": enough_for(input_size)}
        if isinstance(input_size, tuple):
            self._size["at_least"] = input_size
        self._is_lazy = is_lazy
        self.fingerprint = f"{self._table.fingerprint}, {documents}, {max_pixels}, {input_size}"
        if limits.given():
            self.fingerprint += f", {limits.given()}"

    def read(self, document_ids: Sequence[str]) -> list[Any]:
        """The documents in the order of their ids. An id that occurs twice is decoded once.

        Raises:
            MissingDocumentError: An id is not in the corpus.
            MediaDecodeError: A page, a sound or a clip can't be decoded; the message names the document.
            DatasetError: A document has no text, and texts are read; or it has nothing at all.
        """
        unique = list(dict.fromkeys(document_ids))
        document_by_id = {row["document_id"]: self._document(row) for row in self._table.get(unique)}
        return [document_by_id[document_id] for document_id in document_ids]

    def lazily(self: "Reader") -> "Reader":
        """The same documents, decoded when their pixels are asked for."""
        reader = copy(self)
        reader._is_lazy = True
        return reader

    def _document(self, row: dict[str, Any]) -> Any:
        parts = dict(row)
        document_id = parts.pop("document_id")
        if self._is_mixed:
            parts = {name: part for name, part in parts.items() if _is_there(part)}
            if not parts:
                raise _has_nothing(document_id, self._columns)
        if "image" in parts:
            read = Page if self._is_lazy else decode_page
            parts["image"] = read(parts["image"], document_id, **self._size)
        if "text" in parts and not isinstance(parts["text"], str):
            raise DatasetError(
                f"{name_item(document_id)} has no text: it is {parts['text']!r}. Give it one, or leave it out."
            )
        for name in RECORDINGS.keys() & parts.keys():
            recording = RECORDINGS[name](parts[name], document_id, self.limits)
            parts[name] = recording if self._is_lazy else recording.decode()
        if len(parts) > 1 or RECORDINGS.keys() & parts.keys():
            return parts
        return next(iter(parts.values()))


def _is_there(part: Any) -> bool:
    """What ``has_content`` says of a column, of one part: a text with a word, or bytes or a path."""
    return bool(part.strip()) if isinstance(part, str) else any(value is not None for value in (part or {}).values())


def _has_nothing(document_id: str, columns: Sequence[str]) -> DatasetError:
    return DatasetError(f"{name_item(document_id)} has nothing in any of the columns {columns}. Leave it out.")


def document_columns(
    corpus: Dataset, documents: DocumentKind, *, name: str = "documents", table: str = "corpus"
) -> list[str]:
    """The columns that a document is made of, text before image, as the host's examples order them.

    Args:
        corpus: The table.
        documents: What a document is made of.
        name: Of the argument, for the message.
        table: What the table is, likewise.

    Raises:
        ConfigError: ``documents`` is unknown, or the corpus lacks a column of it.
    """
    require_one_of(name, documents, DOCUMENT_KINDS)
    if documents == MIXED:
        return [each for each in MODALITIES if each in corpus.column_names]
    columns = documents.split("+")
    missing = [each for each in columns if each not in corpus.column_names]
    if missing:
        known = next(
            (kind for kind in (*media_columns(corpus.column_names), "text") if kind in corpus.column_names), None
        )
        remedy = f", or pass {name}={known!r}" if known else ""
        raise ConfigError(
            f"{name}={documents!r} needs a column {missing[0]!r} in the {table}, which has {corpus.column_names}. "
            f"Add the column{remedy}."
        )
    return columns


def kinds_of_documents(corpus: Dataset, documents: DocumentKind) -> list[str]:
    """What each document is made of, such as ``"text+image"``; of mixed documents that differs.

    Raises:
        DatasetError: A mixed document has nothing at all; the message names it.
    """
    if documents != MIXED:
        return [documents] * len(corpus)
    names = document_columns(corpus, documents)
    has = np.stack([has_content(corpus, name) for name in names], axis=1)
    empty = np.flatnonzero(~has.any(axis=1))
    if len(empty):
        raise _has_nothing(column(corpus, "document_id")[int(empty[0])].as_py(), names)
    return ["+".join(name for name, found in zip(names, row, strict=True) if found) for row in has.tolist()]


def require_pairs_of(
    documents: DocumentKind, queries: DocumentKind = "text", kinds: Sequence[DocumentKind] = ()
) -> None:
    """Make sure that documents and queries are of a kind that rerankers read.

    Args:
        documents: What a document is made of.
        queries: What a query is made of.
        kinds: Where documents are mixed, what they are made of.

    Raises:
        ConfigError: They are not: the host takes no sounds in pairs, and nothing beside a clip
            (sentence-transformers 6.2).
    """
    if isinstance(queries, str) and "audio" in queries.split("+"):
        raise ConfigError(
            f"queries={queries!r}: rerankers read no sounds. Find documents by an embedding model, or pass "
            'queries="text" where the queries have texts.'
        )
    require_one_of("documents", documents, DOCUMENT_KINDS)
    for kind in (documents, *kinds):
        if kind not in (MIXED, "video") and not RECORDINGS.keys().isdisjoint(kind.split("+")):
            where = "" if kind == documents else f", where some are made of {kind!r}"
            raise ConfigError(
                f"documents={documents!r}{where}: rerankers read texts, pages, both together, and clips alone. Rank "
                'others by an embedding model, or pass documents="text" to rerank what is written about them.'
            )


def check_texts(corpus: Dataset, documents: DocumentKind) -> None:
    """Make sure that every document of a corpus has a text, where texts are read.

    Raises:
        ConfigError: ``documents`` is unknown, or the corpus lacks a column of it.
        DatasetError: Some have none; the message names the first.
    """
    if "text" not in document_columns(corpus, documents) or documents == MIXED:
        return
    missing = np.flatnonzero(column(corpus, "text").is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        first = column(corpus, "document_id")[int(missing[0])].as_py()
        others = ', or pass documents="image"' if "image" in corpus.column_names else ""
        raise DatasetError(
            f"{len(missing)} documents have no text, e.g. {first!r}, and texts are read. Give them one, take them out "
            f"with dataset.without(dataset.audit(num_examples=None)['documents_without_text']){others}."
        )


def recordings_of(
    corpus: Dataset, documents: DocumentKind, limits: MediaLimits = ALL_OF_IT, *, id_class: type[str] = str
) -> Iterator[Recording]:
    """The sounds and clips that documents are made of, one at a time; of a mixed corpus those that there are.

    ``id_class`` is what the ids are, as for ``EncodedImages``.
    """
    for name in document_columns(corpus, documents):
        if name in RECORDINGS:
            files, ids = EncodedImages(corpus, name), column(corpus, "document_id")
            for row in range(len(corpus)):
                if documents != MIXED or files.lengths[row] >= 0 or files.path(row):
                    yield RECORDINGS[name](files.encoded(row), id_class(ids[row].as_py()), limits)


def check_recordings(recordings: Iterable[Recording], *, show_progress_bar: bool = True) -> None:
    """Make sure that sounds and clips can be decoded, by the beginning of each.

    Raises:
        MediaDecodeError: One can't; the message names the document, or the query.
        MissingExtraError: A package that decodes them is not installed.
    """
    for recording in tqdm(recordings, desc="Checking sounds and clips", disable=not show_progress_bar, leave=False):
        recording.check()


def as_host_input(value: Any) -> Any:
    """A text so that the host can't take it for the path or URL of an image; anything else as it is.

    The host opens a bare string that ends like an image file and exists, and downloads one that looks like a URL of an
    image or video (sentence-transformers 6.2), even where a user typed it as a query.
    """
    return {"text": value} if isinstance(value, str) else value
