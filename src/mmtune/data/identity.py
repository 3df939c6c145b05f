"""Which documents are the same, and which queries: equal in everything that they are made of, images byte by byte.

A page of a PDF is the same at any size, by the content of its file and its number.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import xxhash
from datasets import Dataset, concatenate_datasets

from mmtune.arguments import MIXED
from mmtune.data.arrow import column, media_columns
from mmtune.data.documents import DocumentKind, document_columns
from mmtune.data.images import DECODING, EncodedImages
from mmtune.data.query_kinds import QueryKind, as_documents, query_columns
from mmtune.data.tables import has_content, has_file, query_parts, text_column, with_ids

_SAMPLE_BYTES = 1024


def usual_kind(corpus: Dataset) -> DocumentKind:
    """What a document is made of where nobody says: its image, its sound or its clip where the corpus has these.

    Where it has several of them, each document is what it has; without any, a document is its text.
    """
    media = media_columns(corpus.column_names)
    return MIXED if len(media) > 1 else media[0] if media else "text"


def identical_documents(corpus: Dataset, documents: DocumentKind) -> np.ndarray:
    """For each document the position of the first document with the same content.

    Two documents are the same where everything that they are made of is: with ``"text+image"`` both parts. A document
    without an image, or without a text where texts are asked for, equals no other.

    Args:
        corpus: A table with what ``documents`` asks for.
        documents: What a document is made of.

    Returns:
        int64, shape ``(len(corpus),)``; ``result[i] == i`` for the first of each kind.

    Raises:
        ConfigError: The corpus lacks what ``documents`` asks for.
    """
    names = document_columns(corpus, documents)
    parts = [_equal_texts(corpus) if name == "text" else _equal_files(corpus, name) for name in names]
    if documents == MIXED:
        # a part that two documents lack is no difference, and one that has no part equals no other
        lacks = np.stack([~has_content(corpus, name) for name in names])
        parts = [np.where(missing, -1, part) for missing, part in zip(lacks, parts, strict=True)]
        parts.append(np.where(lacks.all(axis=0), np.arange(len(corpus)), -1))
    _, at, inverse = np.unique(np.stack(parts), axis=1, return_index=True, return_inverse=True)
    return at[inverse.reshape(-1)] if len(parts) > 1 else parts[0]


def identical_queries(queries: Dataset, kind: QueryKind | None = None) -> np.ndarray:
    """For each query the position of the first query that is the same in all that it is made of.

    What two queries both lack, such as a text beside an image, neither tells them apart nor makes them the same: one
    that has nothing of what is asked for equals no other.

    Args:
        queries: A table of queries.
        kind: What a query is made of; ``None`` is everything that the table has.

    Returns:
        int64, shape ``(len(queries),)``; ``result[i] == i`` for the first of each kind.

    Raises:
        ConfigError: The table lacks what ``kind`` asks for.
    """
    names = query_parts(queries) if kind is None else query_columns(queries, kind)
    table = as_documents(queries)
    parts = np.stack(
        [np.where(has_content(queries, name), identical_documents(table, cast("Any", name)), -1) for name in names]
    )
    has_nothing = (parts < 0).all(axis=0)
    parts[:, has_nothing] = np.flatnonzero(has_nothing)
    if len(parts) == 1:
        return parts[0]
    _, at, inverse = np.unique(parts, axis=1, return_index=True, return_inverse=True)
    return at[inverse.reshape(-1)]


def match_queries(one: Dataset, other: Dataset, kind: QueryKind | None = None) -> list[tuple[int, int]]:
    """Pairs of rows, one of each table, whose queries are the same; of several in one table the first.

    Args:
        one: A table of queries.
        other: Another one.
        kind: As for ``identical_queries``; ``None`` is everything that either table has.
    """
    parts = [each.with_format(None).select_columns(["query_id", *query_parts(each)]) for each in (one, other)]
    # texts from a frame are large strings, which would join no others
    parts = [with_ids(each, "text", text_column(each, "text")) for each in parts]
    # a column that one of them lacks is null there
    first = identical_queries(concatenate_datasets(parts), kind) if len(one) and len(other) else np.array([], np.int64)
    of_one, of_other = first[: len(one)], first[len(one) :]
    shared, rows = np.unique(of_other, return_index=True)
    is_shared = np.isin(shared, of_one)
    return list(zip(shared[is_shared].tolist(), rows[is_shared].tolist(), strict=True))


def _equal_texts(corpus: Dataset) -> np.ndarray:
    """For each document the first with the same text."""
    first = np.arange(len(corpus))
    codes = column(corpus, "text").dictionary_encode().indices
    has_text = codes.is_valid().to_numpy(zero_copy_only=False)
    _, at, inverse = np.unique(codes.drop_null().to_numpy(), return_index=True, return_inverse=True)
    first[has_text] = np.flatnonzero(has_text)[at][inverse]
    return first


def _equal_files(corpus: Dataset, name: str) -> np.ndarray:
    """For each document the first with the same encoded bytes, without decoding.

    To read little of a large corpus, bytes are only compared among images of equal length, first by a sample and then
    in full.
    """
    first = np.arange(len(corpus))
    images = EncodedImages(corpus, name)
    for same_length in _group_repeated(images.lengths.tolist(), range(len(corpus))):
        for alike in _group_repeated((_hash_sample(images.read_identity(row)) for row in same_length), same_length):
            for group in _group_repeated(
                (xxhash.xxh3_128_intdigest(images.read_identity(row)) for row in alike), alike
            ):
                first[group] = group[0]
    return first


def match_documents(
    one: Dataset, other: Dataset, rows_of_one: np.ndarray, rows_of_other: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs of rows, one of each corpus, with the same content: bytes of files, or texts of what has no file."""
    sides = ((one, rows_of_one), (other, rows_of_other))
    media = [media_columns(corpus.column_names) for corpus in (one, other)]
    found = [_match_parts(name, *sides) for name in media[0] if name in media[1]]
    texts = [(corpus, rows[~has_file(corpus)[rows]]) for corpus, rows in sides]
    if all("text" in corpus.column_names and len(rows) for corpus, rows in texts):
        found.append(_match_parts("text", *texts))
    return list(dict.fromkeys(pair for pairs in found for pair in pairs))


def _match_parts(name: str, *sides: tuple[Dataset, np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of rows that have the same text, or the same file in a column."""
    keys: list[list[tuple[Hashable, int]]] = []
    if name != "text":
        # Only images of a length that both sides have are read. What stands for a page of a PDF names its content, so
        # that the file need not be there.
        images = [EncodedImages(corpus, name) for corpus, _ in sides]
        lengths = np.intersect1d(*(each.lengths[rows] for each, (_, rows) in zip(images, sides, strict=True)))
        for each, (_, rows) in zip(images, sides, strict=True):
            is_read = np.isin(each.lengths[rows], lengths[lengths >= 0]) | np.isin(rows, each.pdf_rows)
            alike = rows[is_read].tolist()
            keys.append([(xxhash.xxh3_128_intdigest(each.read_identity(row)), row) for row in alike])
    else:
        for corpus, rows in sides:
            texts = column(corpus, "text").take(rows).to_pylist()
            keys.append([(text, row) for text, row in zip(texts, rows.tolist(), strict=True) if text is not None])
    rows_by_key = defaultdict(list)
    for key, row in keys[0]:
        rows_by_key[key].append(row)
    return [(match, row) for key, row in keys[1] for match in rows_by_key.get(key, ())]


def pdf_pages(corpus: Dataset) -> dict[int, bytes]:
    """By row, of each page of a PDF in a corpus, what names the content of its file and its number."""
    if "image" not in corpus.column_names:
        return {}
    images = EncodedImages(corpus)
    return {row: bytes(images.read_identity(row)) for row in images.pdf_rows.tolist()}


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
        MediaDecodeError: The file of a document can't be read; the message names it.
    """
    names = document_columns(corpus, documents)
    files = {name: EncodedImages(corpus, name) for name in names if name != "text"}
    lacks = {name: ~has_content(corpus, name) for name in files} if documents == MIXED else {}
    texts = column(corpus, "text") if "text" in names else None
    digests = []
    for row in rows:
        digest = xxhash.xxh3_128(f"{documents} {DECODING}".encode())
        if texts is not None:
            # The digest of the text, not the text: its end can't be taken for the start of the image.
            digest.update(text_digest(texts[int(row)].as_py() or "").encode())
        for name, encoded in files.items():
            if name not in lacks:
                digest.update(encoded.read(int(row)))
            elif not lacks[name][row]:
                digest.update(name.encode())
                digest.update(encoded.read(int(row)))
        digests.append(digest.hexdigest())
    return digests


def _hash_sample(content: memoryview | bytes) -> int:
    middle = len(content) // 2
    return xxhash.xxh3_64_intdigest(bytes(content[middle : middle + _SAMPLE_BYTES]) + content[-_SAMPLE_BYTES:])


def _group_repeated(keys: Iterable[int], rows: Iterable[int]) -> list[list[int]]:
    """The rows that share a key with another row, grouped."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for key, row in zip(keys, rows, strict=True):
        groups[key].append(row)
    return [group for group in groups.values() if len(group) > 1]
