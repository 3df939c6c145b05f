"""Which documents are the same page: byte-identical images, or equal texts where there is no image."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from mmtune.data.arrow import column
from mmtune.data.documents import DocumentKind, document_columns
from mmtune.data.encoded import EncodedImages
from mmtune.errors import ImageDecodeError

_SAMPLE_BYTES = 1024


def identical_documents(corpus: Dataset) -> np.ndarray:
    """For each document the position of the first document with the same content.

    Images are compared by their encoded bytes, without decoding. To read little of a large corpus, bytes are only
    compared among images of equal length, first by a sample and then in full.

    Args:
        corpus: A table with ``image``, encoded, and/or ``text``.

    Returns:
        int64, shape ``(len(corpus),)``; ``result[i] == i`` for the first of each kind.
    """
    if "image" not in corpus.column_names:
        return _first_of_equal(column(corpus, "text"))
    content = EncodedImages(corpus)
    first = np.arange(len(corpus))
    alike = _repeated(content.lengths.tolist(), range(len(corpus)))
    alike = [group for rows in alike for group in _repeated((_sample(content.read(row)) for row in rows), rows)]
    for rows in alike:
        for group in _repeated((_digest(content.read(row)) for row in rows), rows):
            first[group] = group[0]
    return first


def same_documents(
    one: Dataset, other: Dataset, rows_of_one: np.ndarray, rows_of_other: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs of rows, one of each corpus, with the same content: image bytes, or texts where both have no images.

    Args:
        one: A corpus.
        other: Another corpus.
        rows_of_one: The rows of ``one`` to compare.
        rows_of_other: The rows of ``other`` to compare.
    """
    have_images = ["image" in corpus.column_names for corpus in (one, other)]
    if have_images == [True, True]:
        left, right = EncodedImages(one), EncodedImages(other)
        lengths = np.intersect1d(left.lengths[rows_of_one], right.lengths[rows_of_other])
        lengths = lengths[lengths >= 0]
        keys = [_digests(images, rows, lengths) for images, rows in ((left, rows_of_one), (right, rows_of_other))]
    elif have_images == [False, False]:
        keys = [_texts(corpus, rows) for corpus, rows in ((one, rows_of_one), (other, rows_of_other))]
    else:
        return []
    rows_by_key = defaultdict(list)
    for key, row in keys[0]:
        rows_by_key[key].append(row)
    return [(match, row) for key, row in keys[1] for match in rows_by_key.get(key, ())]


def _digests(images: EncodedImages, rows: np.ndarray, lengths: np.ndarray) -> list[tuple[Hashable, int]]:
    """The digest of each image that has one of the lengths, with its row."""
    return [(_digest(images.read(int(row))), int(row)) for row in rows[np.isin(images.lengths[rows], lengths)]]


def _texts(corpus: Dataset, rows: np.ndarray) -> list[tuple[Hashable, int]]:
    texts = column(corpus, "text")
    return [(texts[int(row)].as_py(), int(row)) for row in rows if texts[int(row)].is_valid]


def _sample(content: memoryview | bytes) -> int:
    middle = len(content) // 2
    return xxhash.xxh3_64_intdigest(bytes(content[middle : middle + _SAMPLE_BYTES]) + content[-_SAMPLE_BYTES:])


def _digest(content: memoryview | bytes) -> int:
    return xxhash.xxh3_128_intdigest(content)


def _repeated(keys: Iterable[int], rows: Iterable[int]) -> list[list[int]]:
    """The rows that share a key with another row, grouped."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for key, row in zip(keys, rows, strict=True):
        groups[key].append(row)
    return [group for group in groups.values() if len(group) > 1]


def _first_of_equal(values: pa.Array) -> np.ndarray:
    codes = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    result = first[inverse].astype(np.int64)
    result[codes < 0] = np.flatnonzero(codes < 0)
    return result


def text_digest(text: str) -> str:
    """A digest of a text, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def document_digests(corpus: Dataset, documents: DocumentKind, rows: Sequence[int]) -> list[str]:
    """A digest of what each document is made of, 32 hexadecimal digits; of encoded bytes, without decoding.

    Args:
        corpus: A table with ``document_id`` and what ``documents`` asks for.
        documents: What a document is made of; the same page as image and as text has two digests.
        rows: The rows of the corpus.

    Raises:
        ConfigError: The corpus lacks what ``documents`` asks for.
        ImageDecodeError: The file of a page can't be read; the message names the document.
    """
    names = document_columns(corpus, documents)
    images = EncodedImages(corpus) if "image" in names else None
    texts = column(corpus, "text") if "text" in names else None
    return [_document_digest(corpus, documents, int(row), images, texts) for row in rows]


def _document_digest(
    corpus: Dataset, documents: DocumentKind, row: int, images: EncodedImages | None, texts: Any
) -> str:
    digest = xxhash.xxh3_128(documents.encode())
    if texts is not None:
        # The digest of the text, not the text: its end can't be taken for the start of the image.
        digest.update(text_digest(texts[row].as_py() or "").encode())
    if images is not None:
        try:
            digest.update(images.read(row))
        except OSError as error:
            raise ImageDecodeError(
                f"The file of document {corpus[row]['document_id']!r} can't be read: {error}. "
                "Restore the file, or leave the document out."
            ) from error
    return digest.hexdigest()
