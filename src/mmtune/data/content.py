"""What an audit finds in the pixels of pages and in the words of texts, and in comparison with another dataset."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from mmtune.data.arrow import IntLists, column, media_columns
from mmtune.data.documents import RECORDINGS
from mmtune.data.findings import Example
from mmtune.data.identity import identical_documents, match_documents, match_queries, text_digest
from mmtune.data.images import EncodedImages, decode_page, stored_size
from mmtune.data.media import Look
from mmtune.data.near_copies import RASTER_PX, AlignedPage, Sketch, find_candidates, make_raster, sketch_page
from mmtune.data.relevance import Relevance
from mmtune.data.tables import has_content, has_file, query_parts
from mmtune.errors import ImageDecodeError, MediaDecodeError

Item = TypeVar("Item")
Result = TypeVar("Result")

_BLANK_INK = 0.001  # of a page: a page number alone is less
_MIN_WORDS = 20  # of a page, for its text to say something about copies whatever it looks like
_MIN_SHARED = 0.5  # of the words of two pages that may be copies
_SHORT_WORDS, _COPIED_WORDS = 3, 5
_RASTERS_KEPT, _TEXTS_KEPT = 256, 256  # a raster has 147 kB
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w+"
)  # a character of a script without spaces, or a word


@dataclass(frozen=True)
class Content:
    """What was looked for and found.

    Attributes:
        entries_by_key: Every entry of each finding by its key, none where nothing was found.
        measures: Sizes and lengths by name: the smallest, the median and the largest.
    """

    entries_by_key: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    measures: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


def look_into(
    relevance: Relevance,
    against: Relevance | None,
    *,
    content: bool,
    num_workers: int | None,
    show_progress_bar: bool,
) -> Content:
    """What ``RetrievalDataset.audit`` finds beyond the tables.

    Args:
        relevance: The judgements by position.
        against: Those of another dataset, to look for its answers and queries; ``None`` looks for none.
        content: Whether to decode the pages, and to read the texts.
        num_workers: Threads that decode and compare; ``None`` is one for each core.
        show_progress_bar: Whether to show bars.
    """
    run = _Run(num_workers or len(_cores()), show_progress_bar)
    entries: dict[str, list[Example]] = {}
    measures: dict[str, tuple[float, float, float]] = {}
    pages = _Pages(relevance, run)
    if content:
        entries |= {**_find_odd_queries(pages), **pages.find_odd()}
        entries["near_copies"], entries["look_alikes"] = _group_alike(pages)
        entries["same_recordings"] = pages.group_recordings()
        measures = {name: _spread(values) for name, values in pages.measure().items() if len(values)}
    if against is not None:
        others = _Pages(against, run, rows=_find_answers(against))
        entries |= _find_leaks(relevance, against, others.rows)
        entries["unread_answers"] = others.find_unread(decode=content)
        if content:
            known = {example.document_ids[0] for example in entries["leaked_documents"]}
            copies = [(one, other) for one, other, is_copy in _compare(pages, others) if is_copy]
            entries["leaked_near_copies"] = [
                Example((), (pages.ids[one], others.ids[other]))
                for one, other in [*copies, *pages.match_recordings(others)]
                if pages.ids[one] not in known
            ]
    return Content({key: tuple(found) for key, found in entries.items()}, measures)


class _Looked(NamedTuple):
    """A page after one look: what is kept of it, its width and height in pixels; nothing where it can't be decoded."""

    sketch: Sketch | None
    size: tuple[int, int]


class _Text(NamedTuple):
    """What is kept of the text of a page: its number of words, and a digest of them."""

    length: int
    digest: str

    @classmethod
    def of(cls, words: Sequence[str]) -> "_Text":
        return cls(len(words), text_digest(" ".join(words)))


@dataclass(frozen=True)
class _Run:
    """How work is spread and shown."""

    num_workers: int
    show_progress_bar: bool

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], what: str) -> Iterator[Result]:
        """What ``work`` gives for each item, in order; no more than a few are held."""
        with (
            ThreadPoolExecutor(self.num_workers) as pool,
            tqdm(total=len(items), desc=what, disable=not self.show_progress_bar, leave=False) as bar,
        ):
            for start in range(0, len(items), 8 * self.num_workers):
                for result in pool.map(work, items[start : start + 8 * self.num_workers]):
                    bar.update()
                    yield result


class _Pages:
    """The distinct pages of a corpus, each decoded when it is asked for.

    Attributes:
        ids: The ids of all documents.
        rows: Of each page the first document that has it, int64, ascending.
    """

    def __init__(self, relevance: Relevance, run: _Run, rows: np.ndarray | None = None) -> None:
        self.relevance, self.run = relevance, run
        self.corpus = relevance.tables.corpus
        self.ids: list[str] = relevance.document_ids.to_pylist()
        self.rows = np.unique(relevance.page if rows is None else relevance.page[rows])
        self._media = media_columns(self.corpus.column_names)
        self._images = self.corpus.select_columns(["image"]) if "image" in self._media else None
        self._texts = column(self.corpus, "text") if "text" in self.corpus.column_names else None
        page = relevance.page
        self._documents_of_page = IntLists.grouped(page, np.arange(len(page)), len(page))
        self.read_words = lru_cache(maxsize=_TEXTS_KEPT)(self._read_words)
        self.read_raster = lru_cache(maxsize=_RASTERS_KEPT)(self._read_raster)

    @cached_property
    def looked(self) -> dict[int, _Looked]:
        """Each page after one look, by its row."""
        rows = self.rows_with("image")
        return dict(zip(rows, self.run.map(self._look, rows, "Looking at pages"), strict=True))

    def rows_with(self, name: str) -> list[int]:
        """The pages that have a file in a column; of a corpus of images all, which should each have one."""
        if name not in self._media:
            return []
        has = has_content(self.corpus, name)[self.rows] if self._media != ["image"] else slice(None)
        return self.rows[has].tolist()

    @cached_property
    def are_texts(self) -> frozenset[int]:
        """The pages that are texts and nothing else; none in a corpus of images, which all should have one."""
        if self._media == ["image"]:
            return frozenset()
        return frozenset(self.rows[~has_file(self.corpus)[self.rows]].tolist())

    @cached_property
    def recordings(self) -> dict[tuple[int, str], Look | None]:
        """What a look at each sound and clip found, by its page and column; ``None`` where it can't be decoded."""
        files = {name: EncodedImages(self.corpus, name) for name in self._media if name in RECORDINGS}

        def decode(recording: tuple[int, str]) -> Look | None:
            row, name = recording
            try:
                return RECORDINGS[name](files[name].encoded(row), self.ids[row]).look()
            except MediaDecodeError:
                return None

        todo = [(row, name) for name in files for row in self.rows_with(name)]
        return dict(zip(todo, self.run.map(decode, todo, "Decoding sounds and clips"), strict=True))

    def _look(self, row: int) -> _Looked:
        try:
            return _Looked(sketch_page(self._read_raster(row)), self._read_size(row))
        except ImageDecodeError:
            return _Looked(None, (0, 0))

    def _read_raster(self, row: int) -> np.ndarray:
        return make_raster(decode_page(self._encoded(row), self.ids[row], enough=(RASTER_PX, RASTER_PX)))

    def _read_size(self, row: int) -> tuple[int, int]:
        return stored_size(self._encoded(row), self.ids[row])

    def _encoded(self, row: int) -> Mapping[str, object] | None:
        assert self._images is not None
        return self._images[row]["image"]

    def align(self, row: int) -> AlignedPage:
        """The page as others are compared with it."""
        return AlignedPage(self.read_raster(row), self.looked[row].size)

    @cached_property
    def compared_rows(self) -> list[int]:
        """The pages that can be compared: decoded, and not blank."""
        return [row for row, page in self.looked.items() if page.sketch is not None and page.sketch.ink > _BLANK_INK]

    @cached_property
    def comparable(self) -> frozenset[int]:
        """``compared_rows``, to look up in."""
        return frozenset(self.compared_rows)

    @property
    def sketches(self) -> list[Sketch]:
        """Those of ``compared_rows``."""
        return [sketch for row in self.compared_rows if (sketch := self.looked[row].sketch) is not None]

    @cached_property
    def texts(self) -> dict[int, "_Text"]:
        """What is kept of the text of each page; nothing where the corpus has no texts."""
        return {} if self._texts is None else {row: _Text.of(self.read_words(row)) for row in self.rows.tolist()}

    def _read_words(self, row: int) -> tuple[str, ...]:
        """The words of a page: of all texts of its documents, in their order."""
        if self._texts is None:
            return ()
        return tuple(word for k in self._documents_of_page[row] for word in split_words(self._texts[int(k)].as_py()))

    def find_odd(self) -> dict[str, list[Example]]:
        """Every document whose page can't be decoded, or is blank, and whose sound or clip is."""
        damaged = {row for row, page in self.looked.items() if page.sketch is None}
        blank = set(self.looked) - damaged - set(self.compared_rows)
        says_nothing = [key for key, look in self.recordings.items() if look is not None and look.says_nothing]
        kinds = {
            "damaged_pages": damaged,
            "blank_pages": blank,
            "damaged_recordings": {row for (row, _), look in self.recordings.items() if look is None},
            "silent_sounds": {row for row, name in says_nothing if name == "audio"},
            "still_clips": {row for row, name in says_nothing if name == "video"},
        }
        page = self.relevance.page.tolist()
        return {key: [Example((), (self.ids[k],)) for k in range(len(page)) if page[k] in kinds[key]] for key in kinds}

    def find_unread(self, *, decode: bool) -> list[Example]:
        """Every page that can't be compared: its file is missing or empty or, where all are decoded, damaged."""
        lengths = {name: EncodedImages(self.corpus, name).lengths for name in self._media}
        unread = [row for name in self._media for row in self.rows_with(name) if lengths[name][row] <= 0]
        if decode:
            unread += [row for row, page in self.looked.items() if page.sketch is None]
            unread += [row for (row, _), look in self.recordings.items() if look is None]
        return [Example((), (self.ids[row],)) for row in sorted(set(unread))]

    def group_recordings(self) -> list[Example]:
        """Groups of documents whose sounds and clips are the same, and all else that they have."""
        images = identical_documents(self.corpus, "image") if self._images is not None else np.array([])
        with_image, found = {*self.rows_with("image")}, defaultdict(list)
        for (row, name), look in self.recordings.items():
            found[row].append((name, None if look is None else look.digest))
        rows_by_content: dict[object, list[int]] = defaultdict(list)
        for row, parts in found.items():
            if all(digest for _, digest in parts):
                image = int(images[row]) if row in with_image else None
                rows_by_content[tuple(parts), image, self.read_words(row)].append(row)
        return [Example((), self.documents_of(rows)) for rows in rows_by_content.values() if len(rows) > 1]

    def match_recordings(self, others: "_Pages") -> list[tuple[int, int]]:
        """Pairs of pages here and there with the same sound or clip."""
        first = {look.digest: row for (row, _), look in reversed(others.recordings.items()) if look is not None}
        found = ((row, look.digest) for (row, _), look in self.recordings.items() if look is not None)
        return [(row, first[digest]) for row, digest in found if digest in first]

    def documents_of(self, rows: Iterable[int]) -> tuple[str, ...]:
        """The ids of all documents that have one of these pages."""
        return tuple(self.ids[k] for k in sorted(int(k) for row in rows for k in self._documents_of_page[row]))

    def measure(self) -> dict[str, list[int]]:
        """Sizes of pages and lengths of texts."""
        sizes = [page.size for page in self.looked.values() if page.sketch is not None]
        queries = self.relevance.query_texts.to_pylist()
        return {
            "page_width_px": [width for width, _ in sizes],
            "page_height_px": [height for _, height in sizes],
            "query_words": [len(split_words(text)) for text in queries if (text or "").strip()],
            "document_words": [text.length for text in self.texts.values()],
        }


def split_words(text: str | None) -> list[str]:
    """The words of a text without case and punctuation; in scripts without spaces its characters.

    Example:
        >>> split_words("Total: RM 12.50")
        ['total', 'rm', '12', '50']
    """
    return _WORD.findall((text or "").casefold())


def _compare(pages: _Pages, others: _Pages | None = None) -> list[tuple[int, int, bool]]:
    """Pairs of pages that are alike, by row, and whether they are copies: by words first, then by pixels."""
    rows, right = pages.compared_rows, others or pages
    columns = right.compared_rows
    near = find_candidates(pages.sketches, None if others is None else right.sketches)
    pairs = {(rows[one], columns[other]) for one, other in near}
    by_text: dict[_Text, list[int]] = defaultdict(list)
    for row, text in right.texts.items():
        if text.length >= _MIN_WORDS:
            by_text[text].append(row)
    for row, text in pages.texts.items():
        pairs.update((row, other) for other in by_text.get(text, ())[:1] if others or other != row)
    if others is None:
        pairs = {(min(pair), max(pair)) for pair in pairs}
    others_of: dict[int, list[int]] = defaultdict(list)
    for one, other in sorted(pairs):
        others_of[one].append(other)

    def verify(one: int) -> list[tuple[int, int, bool]]:
        """The pages that are alike to one; what is transformed for it is transformed once."""
        found, page = [], None
        for other in others_of[one]:
            words = pages.read_words(one), right.read_words(other)
            has_words = min(map(len, words)) >= _MIN_WORDS
            is_same_text = has_words and words[0] == words[1]
            if is_same_text and one in pages.are_texts and (others is not None or other in pages.are_texts):
                found.append((one, other, True))
                continue
            is_seen = one in pages.comparable and other in right.comparable
            if not is_seen or (has_words and _share_words(*words) < _MIN_SHARED):
                continue
            page = page or pages.align(one)
            match = page.compare(right.align(other))
            if match.is_alike or match.is_copy:
                found.append((one, other, is_same_text or (match.is_copy and not _tell_apart(*words))))
        return found

    verified = pages.run.map(verify, list(others_of), "Comparing pages")
    return [pair for found in verified for pair in found]


def _share_words(one: Sequence[str], other: Sequence[str]) -> float:
    """The share of words that two texts have in common (Jaccard)."""
    return len(set(one) & set(other)) / len(set(one) | set(other))


def _tell_apart(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two texts make two pages of what looks alike: by another number and, of few words, by any other word."""
    if not one or not other:
        return False
    if min(len(one), len(other)) < _MIN_WORDS:
        return one != other
    return _numbers(one) != _numbers(other)


def _numbers(words: Sequence[str]) -> list[str]:
    return sorted(word for word in words if any(map(str.isdigit, word)))


def _group_alike(pages: _Pages) -> tuple[list[Example], list[Example]]:
    """Groups of near-copies, and groups of look-alikes that are none: all documents of their pages, in order."""
    pairs = _compare(pages)
    copies = [(one, other) for one, other, is_copy in pairs if is_copy]
    # a scan without words may be alike to two pages whose words tell them apart: all of these are look-alikes then
    same = [group for group in _connect(copies) if not _has_several_texts(pages, group)]
    group_of = {row: at for at, group in enumerate(same) for row in group}
    alike = [(one, other) for one, other, _ in pairs if one not in group_of or group_of[one] != group_of.get(other)]
    found = [[Example((), pages.documents_of(group)) for group in groups] for groups in (same, _connect(alike))]
    return found[0], found[1]


def _has_several_texts(pages: _Pages, group: Sequence[int]) -> bool:
    texts = [words for row in group if (words := pages.read_words(row))]
    return any(_tell_apart(texts[0], other) for other in texts[1:])


def _connect(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """What pairs connect, directly or by others; each group and their list in rising order."""
    if not pairs:
        return []
    rows, ends = np.unique(np.array(pairs), return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(rows), len(rows)))
    label = connected_components(graph, directed=False)[1]
    return sorted(rows[label == each].tolist() for each in range(label.max() + 1))


def _find_odd_queries(pages: _Pages) -> dict[str, list[Example]]:
    """Queries of a word or two, and those that stand on a page that answers them."""
    relevance = pages.relevance
    words = [split_words(text) for text in relevance.query_texts.to_pylist()]
    ids = relevance.query_ids.to_pylist()
    # of a query without a text, which asks with something else, its words say nothing
    asks = has_content(relevance.tables.queries, "text")
    copied: dict[int, str] = {}
    judged = zip(relevance.judged_query.tolist(), relevance.judged_document.tolist(), strict=True)
    for query, document in judged:
        page = " ".join(pages.read_words(int(relevance.page[document])))
        if len(words[query]) >= _COPIED_WORDS and f" {' '.join(words[query])} " in f" {page} ":
            copied.setdefault(query, pages.ids[document])
    return {
        "short_queries": [Example((ids[k],)) for k in range(len(ids)) if asks[k] and len(words[k]) < _SHORT_WORDS],
        "copied_queries": [Example((ids[query],), (document,)) for query, document in sorted(copied.items())],
    }


def _find_answers(relevance: Relevance) -> np.ndarray:
    """The documents that answer a query; all of them where there are no queries."""
    judged = np.unique(relevance.judged_document)
    return judged if len(judged) else np.arange(len(relevance.document_ids))


def _find_leaks(relevance: Relevance, against: Relevance, answers: np.ndarray) -> dict[str, list[Example]]:
    """Documents that equal an answer of the other dataset, and queries that equal one of its, texts by words."""
    corpora = relevance.tables.corpus, against.tables.corpus
    same = match_documents(*corpora, np.arange(len(corpora[0])), answers)
    first_by_row: dict[int, int] = {}
    for row, answer in sorted(same):
        first_by_row.setdefault(row, answer)
    words, asked_words = (_words_alone(side) for side in (relevance, against))
    asked = {each: row for row, each in reversed(list(enumerate(asked_words))) if each is not None}
    leaked = {row: at for at, row in match_queries(against.tables.queries, relevance.tables.queries)}
    leaked |= {row: asked[each] for row, each in enumerate(words) if each in asked}
    leaked_texts = {int(relevance.text[row]): at for row, at in leaked.items()}
    documents, queries = (
        [getattr(side, name).to_pylist() for side in (relevance, against)] for name in ("document_ids", "query_ids")
    )
    return {
        "leaked_documents": [Example((), (documents[0][row], documents[1][at])) for row, at in first_by_row.items()],
        "leaked_queries": [
            Example((queries[0][row], queries[1][leaked_texts[text]]))
            for row, text in enumerate(relevance.text.tolist())
            if text in leaked_texts
        ],
    }


def _words_alone(relevance: Relevance) -> list[tuple[str, ...] | None]:
    """The words of each query that is a text and nothing else; ``None`` for the others."""
    queries = relevance.tables.queries
    others = [has_content(queries, name) for name in query_parts(queries)[1:]]
    has_others = np.any([np.zeros(len(queries), dtype=bool), *others], axis=0).tolist()
    texts = relevance.query_texts.to_pylist()
    return [None if more else tuple(split_words(text)) for text, more in zip(texts, has_others, strict=True)]


def _spread(values: Sequence[int]) -> tuple[float, float, float]:
    return float(min(values)), float(np.median(values)), float(max(values))


def _cores() -> Sequence[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
