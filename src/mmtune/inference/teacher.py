"""Scores of a reranker over queries and documents: for mining, and as a teacher to learn from."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from sentence_transformers import CrossEncoder
from tqdm.auto import tqdm

from mmtune import host
from mmtune.data.arrow import column, flat_lists, positions, table_dataset
from mmtune.data.documents import DocumentReader, KeyedTable
from mmtune.data.identity import document_digests, text_digest
from mmtune.data.rows import TrainingView, view_of
from mmtune.errors import ConfigError, DatasetError, MissingDocumentError
from mmtune.inference.encoder import ENOUGH_PIXELS, portions_of
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.store import model_fingerprint

_MANIFEST = "mmtune_scores.json"
_FORMAT_VERSION = 1
_PAIRS_A_FILE = 1024


class Pair(NamedTuple):
    """A query and a document by id, with the text of the query and a digest of the content of both."""

    query_id: str
    document_id: str
    text: str
    content: str


class ScoreStore:
    """Scores of one teacher in a folder, as parquet files that are written whole.

    =========  ============  ================================  =======
    query_id   document_id   content                           score
    =========  ============  ================================  =======
    "q1"       "p7"          a digest of the text and of "p7"  3.25
    =========  ============  ================================  =======

    A score is used again where the content is equal, so an id whose page has changed is scored anew.

    Args:
        folder: A new folder, or one of the same teacher.
        teacher: The fingerprint of the teacher.

    Raises:
        ConfigError: The folder holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str], teacher: str) -> None:
        self._folder = Path(folder)
        self._require_same(teacher)
        self._number = len(_files(self._folder))

    def load(self) -> pa.Table:
        """All rows, in the order they were written."""
        return _read_files(self._folder)

    def add(self, pairs: Sequence[Pair], scores: Sequence[float]) -> None:
        """Write a file of rows."""
        # With the process in the name, two that write at once do not replace each other's files.
        path = self._folder / f"scores-{self._number:06d}-{os.getpid()}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(_table(pairs, scores), partial)
        partial.replace(path)
        self._number += 1

    def _require_same(self, teacher: str) -> None:
        manifest = self._folder / _MANIFEST
        if manifest.is_file():
            found = json.loads(manifest.read_text())
            if found["teacher"] != teacher or found["format_version"] != _FORMAT_VERSION:
                raise ConfigError(
                    f"{str(self._folder)!r} holds scores of another teacher, or over another kind of documents "
                    f"({found['teacher']}, this one is {teacher}). Scores of two teachers do not mix: pass another "
                    "folder."
                )
            return
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise ConfigError(f"{str(self._folder)!r} is not empty and holds no scores. Pass a new folder.")
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"format_version": _FORMAT_VERSION, "teacher": teacher}, indent=2) + "\n")


def scored(
    scorer: PairScorer, pairs: Sequence[Pair], store: ScoreStore | None, *, show_progress_bar: bool
) -> np.ndarray:
    """The score of each pair, float64 of the length of ``pairs``; equal content is scored once.

    Args:
        scorer: The reranker.
        pairs: What to score.
        store: Where scores are kept as they are made, and looked up before; ``None`` keeps none.
        show_progress_bar: Whether to show a bar over the pairs that are to be scored.
    """
    known = store.load() if store is not None else _table([], [])
    score_by_content = dict(zip(known["content"].to_pylist(), known["score"].to_pylist(), strict=True))
    missing = {pair.content: pair for pair in pairs if pair.content not in score_by_content}
    # Page after page, so that a page that stands in many pairs is decoded once or twice.
    todo = sorted(missing.values(), key=lambda pair: pair.document_id)
    with tqdm(total=len(todo), desc="Scoring pairs", disable=not show_progress_bar, leave=False) as bar:
        for portion in portions_of(todo, _PAIRS_A_FILE):
            scores: list[float] = []
            for part in scorer.scores([(pair.text, pair.document_id) for pair in portion]):
                scores += part.tolist()
                bar.update(len(part))
            score_by_content |= dict(zip((pair.content for pair in portion), scores, strict=True))
            if store is not None:
                store.add(portion, scores)
    return np.array([score_by_content[pair.content] for pair in pairs], dtype=np.float64)


def pair_contents(texts: Sequence[str], digests: Sequence[str]) -> list[str]:
    """For each text and digest of a document beside it the digest of both."""
    return [text_digest(f"{text_digest(text)} {digest}") for text, digest in zip(texts, digests, strict=True)]


@dataclass(frozen=True)
class TeacherScores:
    """The scores of a teacher by query and document, for losses that learn from them.

    Attributes:
        table: ``query_id``, ``document_id``, ``content`` (a digest of the text and the document) and ``score``.
    """

    table: Dataset

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TeacherScores":
        """The scores that ``score_rows`` wrote to a folder.

        Raises:
            ConfigError: The folder holds no scores.
        """
        if not (Path(folder) / _MANIFEST).is_file():
            raise ConfigError(f"{str(folder)!r} holds no scores. Pass the folder that was given to score_rows.")
        return cls(_distinct(_read_files(Path(folder))))

    def __len__(self) -> int:
        return len(self.table)

    def scaled(self, factor: float) -> "TeacherScores":
        """The scores times a factor, e.g. to bring the margins of logits to those of cosines."""
        scores = pc.multiply(column(self.table, "score"), float(factor))
        ids = {name: column(self.table, name) for name in ("query_id", "document_id", "content")}
        return replace(self, table=table_dataset({**ids, "score": scores}))

    def label_rows(self, rows: Dataset) -> Dataset:
        """The rows with one more column when they are read: ``label``, the scores of the row's documents.

        =======  =========  ============  ============  ==================
        query    image      negative_0    negative_1    label
        =======  =========  ============  ============  ==================
        str      an image   an image      an image      [8.1, 3.0, -2.5]
        =======  =========  ============  ============  ==================

        The score of the positive is first, those of the negatives follow in their order. ``DistillKLDivLoss`` and
        ``MarginMSELoss`` of the host take it so. No image is read or copied, and ``shuffle`` and ``select`` keep the
        labels.

        Args:
            rows: Rows of ``RetrievalDataset.training_rows``, with negatives.

        Scores are found by content: a page that has changed since it was scored has none, whatever its id.

        Raises:
            DatasetError: They are no such rows, or have no negatives.
            MissingDocumentError: A pair has no score; the message names it.
        """
        view = _view_of(rows)
        pairs = _pairs_of(rows, view)
        contents, scores = (column(self.table, name).to_pylist() for name in ("content", "score"))
        score_by_content = dict(zip(contents, scores, strict=True))
        missing = [pair for pair in pairs if pair.content not in score_by_content]
        if missing:
            raise MissingDocumentError(
                f"{len(missing)} pairs of these rows have no score, e.g. query {missing[0].query_id!r} with document "
                f"{missing[0].document_id!r}: they were not scored, or their text or page has changed since. Score the "
                "rows that are trained on: score_rows(rows, teacher)."
            )
        keys = pa.array([pair_key(pair.query_id, pair.document_id) for pair in pairs])
        values = pa.array([score_by_content[pair.content] for pair in pairs], type=pa.float64())
        return rows.with_transform(
            LabelledView(view, KeyedTable(table_dataset({"pair": keys, "score": values}), "pair", ["score"]))
        )


@host.hashed_by(lambda view: view.fingerprint)
class LabelledView(TrainingView):
    """A view of training rows that also reads ``label``: the teacher's scores of the positive and the negatives.

    ``columns`` stays what the model is given.

    Args:
        view: The view to add to; it stays as it is.
        scores: A score for each pair of the rows, by ``pair_key``.
    """

    def __init__(self, view: TrainingView, scores: KeyedTable) -> None:
        super().__init__(view.source)
        self._scores = scores

    @property
    def fingerprint(self) -> str:
        """That of the view, and of the scores."""
        return f"{super().fingerprint}, {self._scores.fingerprint}"

    def read(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch as the host's losses read it."""
        documents = zip(batch["document_id"], batch["negative_document_ids"], strict=True)
        ids_by_row = [[positive, *negatives] for positive, negatives in documents]
        queries = zip(batch["query_id"], ids_by_row, strict=True)
        keys = [pair_key(query_id, document_id) for query_id, ids in queries for document_id in ids]
        scores = iter([row["score"] for row in self._scores.get(keys)])
        return {**super().read(batch), "label": [[next(scores) for _ in ids] for ids in ids_by_row]}


def score_rows(
    rows: Dataset,
    teacher: CrossEncoder,
    *,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    show_progress_bar: bool = True,
) -> TeacherScores:
    """The scores of a reranker for all queries of the rows, each with its positive and negatives.

    Every pair is scored once, however many rows it stands in. The scores are the output of the model before its
    activation: a sigmoid would flatten the differences that a student learns from. The reranker sees the documents
    as the rows read them, but for ``max_pixels`` of the rows, which is for the student.

    Args:
        rows: Rows of ``RetrievalDataset.training_rows``.
        teacher: A reranker with one score a pair. Its ``text_to_image`` prompt is used where it has one.
        folder: Where scores are kept as they are made. A second call scores what is missing there: after an
            interruption, with more rows, or where pages have changed. ``None`` keeps them in memory.
        batch_size: Pairs a forward pass.
        show_progress_bar: Whether to show a bar over the pairs.

    Returns:
        The scores of these rows; its ``label_rows`` gives rows to train on.

    Raises:
        ConfigError: The folder holds scores of another teacher, or the teacher does not give one score a pair.
        DatasetError: They are no training rows.
        ImageDecodeError: A page can't be decoded; the message names the document.
    """
    view = _view_of(rows)
    require_reranker(teacher)
    portions_of((), batch_size)
    store = None if folder is None else ScoreStore(folder, f"{model_fingerprint(teacher)}-{view.documents}")
    pairs = _pairs_of(rows, view)
    reader = DocumentReader(_tables_of(view).corpus, view.documents, enough_pixels=ENOUGH_PIXELS)
    scorer = PairScorer(teacher, reader, batch_size)
    scores = scored(scorer, pairs, store, show_progress_bar=show_progress_bar)
    if store is not None:
        _add_known(store, pairs, scores)
    return TeacherScores(_distinct(_table(pairs, scores.tolist())))


def _add_known(store: ScoreStore, pairs: Sequence[Pair], scores: np.ndarray) -> None:
    """Write the rows of pairs whose score was known from others of equal content, so that the folder has all ids."""
    table = store.load()
    written = set(zip(*(table[name].to_pylist() for name in ("query_id", "document_id", "content")), strict=True))
    new = [at for at, pair in enumerate(pairs) if (pair.query_id, pair.document_id, pair.content) not in written]
    if new:
        store.add([pairs[at] for at in new], scores[new].tolist())


def _pairs_of(rows: Dataset, view: TrainingView) -> list[Pair]:
    """Each query and document of the rows once, those of a query together."""
    query_ids, document_ids = _ids_of(rows)
    distinct = pa.table({"query_id": query_ids, "document_id": document_ids}).group_by(
        ["query_id", "document_id"], use_threads=False
    )
    ids = distinct.aggregate([])
    tables = _tables_of(view)
    query_row = positions(ids["query_id"].combine_chunks(), column(tables.queries, "query_id"))
    document_row = positions(ids["document_id"].combine_chunks(), column(tables.corpus, "document_id"))
    order = np.argsort(query_row, kind="stable")
    texts = column(tables.queries, "text").take(pa.array(query_row)).to_pylist()
    needed, which = np.unique(document_row, return_inverse=True)
    digests = document_digests(tables.corpus, view.documents, needed.tolist())
    contents = pair_contents(texts, [digests[at] for at in which])
    columns = ids["query_id"].to_pylist(), ids["document_id"].to_pylist(), texts, contents
    pairs = [Pair(*values) for values in zip(*columns, strict=True)]
    return [pairs[at] for at in order]


def _view_of(rows: Dataset) -> TrainingView:
    view = view_of(rows) if isinstance(rows, Dataset) else None
    if not isinstance(view, TrainingView):
        found = f"columns {rows.column_names}" if isinstance(rows, Dataset) else type(rows).__name__
        raise DatasetError(
            f"Expected rows of RetrievalDataset.training_rows() with their view, got {found}. Make the rows with "
            "training_rows(num_negatives), and join datasets before with RetrievalDataset.concatenate."
        )
    if not view.num_negatives:
        raise DatasetError(
            "These rows have no negatives, and a single document leaves a teacher nothing to compare. Make them with "
            "training_rows(num_negatives=4), of a dataset that has negatives; mine_hard_negatives finds some."
        )
    return view


def _tables_of(view: TrainingView) -> Any:
    assert view.tables is not None, "views lose their tables only on the way to worker processes"
    return view.tables


def _ids_of(rows: Dataset) -> tuple[pa.Array, pa.Array]:
    """The query and the document of every pair in the rows, positives first."""
    query_ids = column(rows, "query_id")
    parents, negatives = flat_lists(column(rows, "negative_document_ids"))
    return (
        pa.concat_arrays([query_ids, query_ids.take(pa.array(parents))]),
        pa.concat_arrays([column(rows, "document_id"), negatives]),
    )


def pair_key(query_id: str, document_id: str) -> str:
    """One id for a query and a document, that no other two ids give."""
    return f"{len(query_id)}:{query_id}:{document_id}"


def _distinct(table: pa.Table) -> Dataset:
    """Each query, document and content once."""
    ids = zip(*(table[name].to_pylist() for name in ("query_id", "document_id", "content")), strict=True)
    rows = list({key: row for row, key in enumerate(ids)}.values())
    kept = table.take(pa.array(rows, type=pa.int64()))
    return table_dataset({name: kept[name].combine_chunks() for name in kept.column_names})


_SCHEMA = pa.schema(
    {"query_id": pa.string(), "document_id": pa.string(), "content": pa.string(), "score": pa.float64()}
)


def _table(pairs: Sequence[Pair], scores: Sequence[float]) -> pa.Table:
    columns = {name: [getattr(pair, name) for pair in pairs] for name in _SCHEMA.names[:-1]}
    return pa.table({**columns, "score": scores}, schema=_SCHEMA)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("scores-*.parquet"))


def _read_files(folder: Path) -> pa.Table:
    return pa.concat_tables([_table([], []), *(pq.read_table(path, schema=_SCHEMA) for path in _files(folder))])
