"""Documents and texts by id, read when they are used."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from datasets import Dataset

from mmtune import host
from mmtune.arguments import name_item, require_one_of
from mmtune.data.arrow import column
from mmtune.data.images import InputSize, decode_page, enough_for
from mmtune.data.pages import Page
from mmtune.errors import ConfigError, DatasetError, MissingDocumentError

DocumentKind = Literal["image", "text", "text+image"]
"""What a document is made of where it is read."""

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
    """What the host is given for each document: an RGB image, a text, or both.

    Args:
        corpus: A table with ``document_id`` and ``image`` (encoded) and/or ``text``.
        documents: What a document is made of.
        max_pixels: Upper bound of width times height of an image; ``None`` keeps every pixel.
        input_size: What the model reads a page at, where that is known: a large JPEG is decoded at a fraction of its
            size that leaves more than enough, and ``max_pixels`` leaves at least that width and height.
        is_lazy: Whether an image is decoded when its pixels are asked for, rather than when it is read.

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
    ) -> None:
        self._columns = document_columns(corpus, documents)
        self._table = KeyedTable(corpus, "document_id", self._columns)
        self._size: dict[str, Any] = {"max_pixels": max_pixels, "enough": enough_for(input_size)}
        if isinstance(input_size, tuple):
            self._size["at_least"] = input_size
        self._is_lazy = is_lazy
        self.fingerprint = f"{self._table.fingerprint}, {documents}, {max_pixels}, {input_size}"

    def read(self, document_ids: Sequence[str]) -> list[Any]:
        """The documents in the order of their ids. An id that occurs twice is decoded once.

        Raises:
            MissingDocumentError: An id is not in the corpus.
            ImageDecodeError: A page is no readable image; the message names the document.
            DatasetError: A document has no text, and texts are read.
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
        if "image" in parts:
            read = Page if self._is_lazy else decode_page
            parts["image"] = read(parts["image"], document_id, **self._size)
        if "text" in parts and not isinstance(parts["text"], str):
            raise DatasetError(
                f"{name_item(document_id)} has no text: it is {parts['text']!r}. Give it one, or leave it out."
            )
        return parts if len(parts) > 1 else parts[self._columns[0]]


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
    require_one_of(name, documents, get_args(DocumentKind))
    columns = [str(name) for name in documents.split("+")]
    missing = [each for each in columns if each not in corpus.column_names]
    if missing:
        known = next((kind for kind in ("image", "text") if kind in corpus.column_names), None)
        remedy = f", or pass {name}={known!r}" if known else ""
        raise ConfigError(
            f"{name}={documents!r} needs a column {missing[0]!r} in the {table}, which has {corpus.column_names}. "
            f"Add the column{remedy}."
        )
    return columns


def check_texts(corpus: Dataset, documents: DocumentKind) -> None:
    """Make sure that every document of a corpus has a text, where texts are read.

    Raises:
        ConfigError: ``documents`` is unknown, or the corpus lacks a column of it.
        DatasetError: Some have none; the message names the first.
    """
    if "text" not in document_columns(corpus, documents):
        return
    missing = np.flatnonzero(column(corpus, "text").is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        first = column(corpus, "document_id")[int(missing[0])].as_py()
        others = ', or pass documents="image"' if "image" in corpus.column_names else ""
        raise DatasetError(
            f"{len(missing)} documents have no text, e.g. {first!r}, and texts are read. Give them one, take them out "
            f"with dataset.without(dataset.audit(num_examples=None)['documents_without_text']){others}."
        )


def as_host_input(value: Any) -> Any:
    """A text so that the host can't take it for the path or URL of an image; anything else as it is.

    The host opens a bare string that ends like an image file and exists, and downloads one that looks like a URL of an
    image or video (sentence-transformers 6.2), even where a user typed it as a query.
    """
    return {"text": value} if isinstance(value, str) else value
