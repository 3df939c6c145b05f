"""The queries that changed most, with what they found before and after."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from mmtune.arguments import MIXED
from mmtune.data.arrow import positions
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, KeyedTable
from mmtune.data.images import decode_page
from mmtune.data.query_kinds import QueryKind
from mmtune.data.relevance import Direction, directions_between
from mmtune.errors import ImageDecodeError, MissingDocumentError, MissingExtraError
from mmtune.report.charts import TIE, Picture, as_data_uri

MOST_SHOWN, TOP, _MOST_ANSWERS = 50, 5, 2
_WIDTH_PX, _HEIGHT_PX, _QUALITY = 160, 240, 50
_SIZED = re.compile(r"-\d+d_")
_TOPS = ("top_ids_before", "top_ids_after")
_THREADS = 4
_LONGEST_TEXT = 220
_LONGEST_QUERY = 240


@dataclass(frozen=True)
class Shown:
    """A document, or a text that asks, as it is shown.

    Attributes:
        id: Its id.
        picture: A small image; ``None`` where there is none, or none may be shown.
        text: Its text, cut; or why there is no image.
        is_relevant: Whether it is an answer.
        rank: From 1; 0 for what was not found.
    """

    id: str
    picture: Picture | None = None
    text: str = ""
    is_relevant: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Change:
    """What asks, what it found before and after, and what this was worth.

    Attributes:
        asking: The query, or the page that asks for texts.
        set_name: Of several sets, the one that it is from; else empty.
        before: The measure.
        after: The measure.
        ranks: Of the first answer before and after; ``None`` where it is not among those that were kept.
        found: The best before and after, best first.
        answers: What would be right, where none of it was found.
    """

    asking: Shown
    set_name: str
    before: float
    after: float
    ranks: tuple[int | None, int | None]
    found: tuple[list[Shown], list[Shown]]
    answers: list[Shown]

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


def choose_changes(per_query: pa.Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that won most and those that lost most, fifty of each at most, the largest change first."""
    changes = changes_of(per_query)
    order = np.argsort(-changes, kind="stable")
    won = [row for row in order if changes[row] > TIE][:MOST_SHOWN]
    lost = [row for row in order[::-1] if changes[row] < -TIE][:MOST_SHOWN]
    return per_query.take(pa.array(won, pa.int64())).to_pylist(), per_query.take(pa.array(lost, pa.int64())).to_pylist()


def at_full_size(per_query: pa.Table, primary_metric: str) -> pa.Table:
    """The rows of the evaluation sets at full size, without those of truncated embeddings and of a guard set."""
    name, _, measure = primary_metric.partition("_")
    own = re.escape(name.removesuffix("-mean"))
    wanted = re.compile(rf"{own}(?:-[^_]+)?_{re.escape(measure)}")
    metrics = [
        each
        for each in pc.unique(per_query["metric"]).to_pylist()
        if wanted.fullmatch(each) and not _SIZED.search(each)
    ]
    return per_query.filter(pc.is_in(per_query["metric"], pa.array(metrics, pa.string())))


def changes_of(per_query: pa.Table) -> np.ndarray:
    """After minus before of each query, float64."""
    before, after = (per_query.column(name).to_numpy() for name in ("before", "after"))
    return after - before


class Gallery:
    """Shows what queries found.

    Args:
        datasets: The evaluation sets by name; ``""`` for a single one.
        documents: What a document is made of, e.g. ``"image"`` or ``"text"``; of other kinds the ids are shown.
        direction: What asks, where the metric's name does not say it.
        thumbnails: Whether anything of a document is shown beside its id.
    """

    def __init__(
        self,
        datasets: Mapping[str, RetrievalDataset],
        documents: DocumentKind,
        direction: Direction,
        *,
        thumbnails: bool,
        queries: QueryKind = "text",
    ) -> None:
        self._direction: Direction = direction
        self._directions = directions_between(queries, documents)
        self._sets = {name: _Shelf(data, documents, thumbnails=thumbnails) for name, data in datasets.items()}

    def show(self, rows: Sequence[Mapping[str, Any]]) -> list[Change]:
        """What each row of ``per_query.parquet`` says, with pictures."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluation has read these pages before, and warned of them
            for name, ids in self._documents_of(rows).items():
                self._sets[name].read_all(ids)
            return [self._show(row) for row in rows]

    def _documents_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
        """The documents that will be shown of each set."""
        found: dict[str, list[str]] = {name: [] for name in self._sets}
        for row in rows:
            name, direction = self._read_name(str(row["metric"]))
            ids = [row["query_id"]]
            if direction == "text_to_image":
                ids = [each for key in _TOPS for each in (row[key] or ())[:TOP]]
            found.get(name, []).extend(map(str, ids))
        return found

    def show_documents(self, document_ids: Sequence[str]) -> list[Shown]:
        """Documents that stand in any of the sets."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = []
            for document_id in document_ids:
                shelf = next((each for each in self._sets.values() if each.has_document(document_id)), None)
                found.append(shelf.document(document_id) if shelf else Shown(document_id))
            return found

    def _show(self, row: Mapping[str, Any]) -> Change:
        name, direction = self._read_name(str(row["metric"]))
        shelf = self._sets.get(name)
        tops = [[str(each) for each in row[key] or ()] for key in _TOPS]
        values = {"set_name": name, "before": float(row["before"]), "after": float(row["after"])}
        if shelf is None:
            found = [[Shown(each, rank=at) for at, each in enumerate(top[:TOP], 1)] for top in tops]
            return Change(
                Shown(str(row["query_id"])), **values, ranks=(None, None), found=(found[0], found[1]), answers=[]
            )
        asks_with_text = direction == "text_to_image"
        asking = shelf.query(row["query_id"]) if asks_with_text else shelf.document(row["query_id"])
        read = shelf.document if asks_with_text else shelf.query
        ranks, lists = [], []
        for top in tops:
            relevant = shelf.are_relevant(row["query_id"], top, direction)
            ranks.append(relevant.index(True) + 1 if True in relevant else None)
            best = list(zip(top, relevant, strict=True))[:TOP]
            lists.append([replace(read(each), rank=at, is_relevant=fits) for at, (each, fits) in enumerate(best, 1)])
        is_shown = any(each.is_relevant for found in lists for each in found)
        missed = [] if is_shown else shelf.answers(row["query_id"], direction)[:_MOST_ANSWERS]
        answers = [replace(read(each), is_relevant=True) for each in missed]
        return Change(asking, **values, ranks=(ranks[0], ranks[1]), found=(lists[0], lists[1]), answers=answers)

    def _read_name(self, metric: str) -> tuple[str, Direction]:
        """The set and the direction that a key such as ``vdr-rerank-en-image-to-text_ndcg@10`` names."""
        name, direction = metric.partition("_")[0], self._direction
        for each, asking in self._directions.items():
            if name.endswith(suffix := f"-{each.replace('_', '-')}"):
                name, direction = name.removesuffix(suffix), asking
        named = [each for each in self._sets if each and name.endswith(f"-{each}")]
        return max(named, key=len, default=""), direction


class _Shelf:
    """Queries and documents of one set, each read and made small once."""

    def __init__(self, data: RetrievalDataset, documents: DocumentKind, *, thumbnails: bool) -> None:
        self._relevance = data.relevance_of(documents)
        self._is_mixed = documents == MIXED
        kinds = {"image", "text"} if self._is_mixed else set(documents.split("+"))
        columns = [name for name in ("image", "text") if name in kinds and name in data.corpus.column_names]
        self._documents = KeyedTable(data.corpus, "document_id", columns if thumbnails else [])
        self._queries = KeyedTable(data.queries, "query_id", ["text"])
        self._shown: dict[str, Shown] = {}

    def query(self, query_id: str) -> Shown:
        """A text that asks."""
        try:
            text = self._queries.get([query_id])[0]["text"]
        except MissingDocumentError:
            text = None
        return Shown(query_id, text=_cut(text or "", _LONGEST_QUERY))

    def document(self, document_id: str) -> Shown:
        """A document: a small image, else its text, else its id alone."""
        if document_id not in self._shown:
            self._shown[document_id] = self._read(document_id)
        return self._shown[document_id]

    def read_all(self, document_ids: Sequence[str]) -> None:
        """Read documents side by side: decoders of images leave the interpreter to the others."""
        unread = [each for each in dict.fromkeys(document_ids) if each not in self._shown]
        with ThreadPoolExecutor(_THREADS) as threads:
            self._shown.update(zip(unread, threads.map(self._read, unread), strict=True))

    def has_document(self, document_id: str) -> bool:
        """Whether there is such a document."""
        return bool(self._position([document_id], "document_id")[0] >= 0)

    def _read(self, document_id: str) -> Shown:
        try:
            row = self._documents.get([document_id])[0]
            text = _cut(row.get("text") or "", _LONGEST_TEXT)
            lacks_image = row.get("image") is None
            if "image" not in row or (lacks_image and (text or self._is_mixed)):
                return Shown(document_id, text=text)
            return Shown(document_id, Picture(make_thumbnail(row["image"], document_id), f"Page {document_id}"))
        except (ImageDecodeError, MissingDocumentError, MissingExtraError) as error:
            return Shown(document_id, text=_cut(f"can't be shown: {error}", _LONGEST_TEXT))

    def are_relevant(self, asking_id: str, found_ids: Sequence[str], direction: Direction) -> list[bool]:
        """Whether each of what was found is an answer, under any id."""
        sides = ("query_id", "document_id") if direction == "text_to_image" else ("document_id", "query_id")
        at, found = self._position([asking_id], sides[0])[0], self._position(found_ids, sides[1])
        known = (found >= 0) & (at >= 0)
        pair = {sides[0]: np.full(int(known.sum()), at), sides[1]: found[known]}
        known[known] = self._relevance.is_relevant(pair["query_id"], pair["document_id"])
        return known.tolist()

    def answers(self, asking_id: str, direction: Direction) -> list[str]:
        """The ids of what is judged relevant, best first."""
        judged, ids = self._relevance.judged_query, self._relevance.document_ids
        answering = self._relevance.judged_document
        if direction == "image_to_text":
            judged, answering, ids = answering, judged, self._relevance.query_ids
        asked = self._position([asking_id], "query_id" if direction == "text_to_image" else "document_id")[0]
        rows = np.flatnonzero(judged == asked)
        best = rows[np.argsort(-self._relevance.judged_score[rows], kind="stable")]
        return [ids[int(row)].as_py() for row in answering[best]]

    def _position(self, ids: Sequence[str], column: str) -> np.ndarray:
        known = self._relevance.query_ids if column == "query_id" else self._relevance.document_ids
        return positions(pa.array(ids, known.type), known)


def make_thumbnail(encoded: Mapping[str, Any] | None, document_id: str) -> str:
    """A page as a small WebP in a ``data:`` URI, decoded with no more pixels than that takes.

    Raises:
        ImageDecodeError: It is no readable image.
        MissingExtraError: It is a page of a PDF, and pypdfium2 is not installed.
    """
    page = decode_page(encoded, document_id, enough=(2 * _WIDTH_PX, 1))
    page.thumbnail((_WIDTH_PX, _HEIGHT_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    page.save(file, "WEBP", quality=_QUALITY, method=3)
    return as_data_uri(file.getvalue(), "image/webp")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3].rstrip()}..."
