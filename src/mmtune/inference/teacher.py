"""Scores of a reranker over the rows that a model is trained on, as a teacher to learn from."""

import os
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from sentence_transformers import CrossEncoder

from mmtune import host
from mmtune.arguments import require_number, require_path, require_whole
from mmtune.data.arrow import column, flat_lists, table_dataset
from mmtune.data.documents import KeyedTable
from mmtune.data.rows import TrainingView, view_of
from mmtune.errors import DatasetError, MissingDocumentError
from mmtune.inference.encoder import DatasetReader
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.store import Pair, ScoreStore, model_fingerprint, read_scores, score_table


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
        table = read_scores(folder)
        # Two processes may have written the same rows.
        ids = zip(*(table[name].to_pylist() for name in ("query_id", "document_id", "content")), strict=True)
        last = list({key: row for row, key in enumerate(ids)}.values())
        return cls(_as_dataset(table.take(pa.array(last, type=pa.int64()))))

    def __len__(self) -> int:
        return len(self.table)

    def scaled(self, factor: float) -> "TeacherScores":
        """The scores times a factor, e.g. to bring the margins of logits to those of cosines."""
        scores = pc.multiply(column(self.table, "score"), require_number("factor", factor))
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

        Scores are found by content: a page that has changed since it was scored has none, whatever its id.

        Args:
            rows: Rows of ``RetrievalDataset.training_rows``, with negatives.

        Raises:
            DatasetError: They are no such rows, or have no negatives.
            MissingDocumentError: A pair has no score; the message names it.
        """
        view = _require_view(rows)
        reader = _reader_of(view)
        pairs = _pairs_of(rows, reader)
        score_by_content = dict(zip(self.table["content"][:], self.table["score"][:], strict=True))
        scores = [score_by_content.get(content) for content in reader.pair_digests(pairs)]
        missing = [pair for pair, score in zip(pairs, scores, strict=True) if score is None]
        if missing:
            raise MissingDocumentError(
                f"{len(missing)} pairs of these rows have no score, e.g. query {missing[0].query_id!r} with document "
                f"{missing[0].document_id!r}: they were not scored, or their text or page has changed since. Score the "
                "rows that are trained on: score_rows(rows, teacher)."
            )
        keys = pa.array([pair_key(pair.query_id, pair.document_id) for pair in pairs])
        table = table_dataset({"pair": keys, "score": pa.array(scores, type=pa.float64())})
        return rows.with_transform(LabelledView(view, KeyedTable(table, "pair", ["score"])))


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
    view = _require_view(rows)
    require_reranker(teacher, "teacher")
    size = require_whole("batch_size", batch_size)
    if folder is not None:
        require_path("folder", folder)
    reader = _reader_of(view)
    store = None if folder is None else ScoreStore(folder, f"{model_fingerprint(teacher)}-{view.documents}")
    pairs = _pairs_of(rows, reader)
    contents = reader.pair_digests(pairs)
    scores = PairScorer(teacher, reader, size, show_progress_bar).score_pairs(pairs, contents, store)
    return TeacherScores(_as_dataset(score_table(pairs, contents, scores.tolist())))


def _require_view(rows: Dataset) -> TrainingView:
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


def _reader_of(view: TrainingView) -> DatasetReader:
    assert view.tables is not None, "views lose their tables only on the way to worker processes"
    return DatasetReader(view.tables.corpus, view.tables.queries, view.documents, view.queries)


def _pairs_of(rows: Dataset, reader: DatasetReader) -> list[Pair]:
    """Each query and document of the rows once, those of a query together, in the order of the queries."""
    query_ids = column(rows, "query_id")
    parents, negatives = flat_lists(column(rows, "negative_document_ids"))
    queries = [*query_ids.to_pylist(), *query_ids.take(pa.array(parents)).to_pylist()]
    documents = [*column(rows, "document_id").to_pylist(), *negatives.to_pylist()]
    row_by_query_id = {query_id: row for row, query_id in enumerate(reader.text_by_query_id)}
    pairs = dict.fromkeys(map(Pair, queries, documents))
    return sorted(pairs, key=lambda pair: row_by_query_id[pair.query_id])


def pair_key(query_id: str, document_id: str) -> str:
    """One id for a query and a document, that no other two ids give."""
    return f"{len(query_id)}:{query_id}:{document_id}"


def _as_dataset(table: pa.Table) -> Dataset:
    return table_dataset({name: table[name].combine_chunks() for name in table.column_names})
