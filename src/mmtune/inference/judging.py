"""Labels repaired: negatives that a judge takes for relevant become so, doubtful ones are used by nothing."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from sentence_transformers import CrossEncoder

from mmtune.arguments import require_flag, require_path, require_whole
from mmtune.data.arrow import table_dataset
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, document_columns
from mmtune.data.identity import usual_kind
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.label_changes import label_changes, lists_before, with_label_changes
from mmtune.data.query_kinds import QueryKind, check_queries, query_columns, require_text
from mmtune.errors import ConfigError, DatasetError, MissingDocumentError
from mmtune.inference.asking import Asker, Call, Failure, Pages, everything_of
from mmtune.inference.encoder import DatasetReader
from mmtune.inference.generators import Generator, read_verdict, require_generator
from mmtune.inference.prompts import ask_whether_answered
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.store import Pair, ScoreStore, model_fingerprint
from mmtune.inference.teacher import TeacherScores

logger = logging.getLogger(__name__)

Judge: TypeAlias = CrossEncoder | TeacherScores | Generator
"""What tells whether a document answers a query: by scores of any scale, or in words."""

_LOWEST_RELEVANT, _LOWEST_UNKNOWN = 0.05, 0.025
"""Shares of the known relevant documents that score below what is taken for relevant, and for unknown."""
_SUSPICIOUS = 0.3
"""More changes than this share of the negatives are worth a warning."""


@dataclass(frozen=True)
class Thresholds:
    """Scores from which a negative is taken for relevant, or for unknown.

    Attributes:
        relevant: The score that 95% of the known relevant documents reach.
        unknown: The score that 97.5% of them reach; ``middle`` where that is the median, as of a judge with few grades.
        middle: Half-way between the medians of known relevant documents and listed negatives. Nothing below is
            changed, and nothing at it is relevant: of a judge that says yes, partly or no, "partly" is unknown.
    """

    relevant: float
    unknown: float
    middle: float

    @classmethod
    def of(cls, relevant: np.ndarray, negatives: np.ndarray) -> "Thresholds":
        """The thresholds for the scores of known relevant documents and of listed negatives.

        Raises:
            ConfigError: The judge does not tell the two apart.
        """
        medians = float(np.median(relevant)), float(np.median(negatives))
        if not medians[0] > medians[1]:
            raise ConfigError(
                f"The judge scores half of the {len(relevant)} known relevant documents at {medians[0]:.4g} or less, "
                f"and half of the {len(negatives)} negatives at {medians[1]:.4g} or more: it does not tell them apart, "
                "and nothing was changed. Pass another judge, or train this one first."
            )
        bounds, middle = np.quantile(relevant, [_LOWEST_RELEVANT, _LOWEST_UNKNOWN]), sum(medians) / 2
        # Of a judge with a few grades nearly all have the highest, and the bound would be that.
        unknown = float(bounds[1]) if bounds[1] < medians[0] else middle
        return cls(float(bounds[0]), unknown, middle)

    def labels(self, scores: np.ndarray) -> np.ndarray:
        """``"relevant"``, ``"unknown"`` or ``"negative"`` for each score; one that is not a number changes nothing."""
        is_relevant = (scores >= self.relevant) & (scores > self.middle)
        is_unknown = (scores >= self.unknown) & (scores >= self.middle)
        return np.where(is_relevant, "relevant", np.where(is_unknown, "unknown", "negative"))


def judge_negatives(
    dataset: DatasetLike,
    judge: Judge,
    *,
    store: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
    documents: DocumentKind | None = None,
    batch_size: int = 16,
    max_workers: int = 8,
    queries: QueryKind = "text",
) -> RetrievalDataset:
    """The dataset with its negatives judged: each becomes relevant, becomes unknown, or stays a negative.

    A negative that is in truth an answer teaches the opposite. Relabelling such negatives serves training better than
    leaving them out (RLHN, Thakur et al., 2025). The judge scores known relevant documents and listed negatives alike,
    and the scores of the former set the bounds: a negative that scores as 95% of them do becomes relevant, with a
    score of 1 in the qrels; one that only scores as 97.5% do is unknown. What is unknown is neither relevant nor a
    negative: it is in no list, not drawn or mined, and in no batch with its query.

    ``label_changes`` of the result lists the changes, and ``undo_label_changes()`` takes them back.

    Args:
        dataset: A ``RetrievalDataset`` with negatives, rows in a known layout, or what ``RetrievalDataset.load`` takes.
        judge: A host ``CrossEncoder``; ``TeacherScores`` of these pairs; or a generator as ``generate_queries`` takes
            it, which is asked whether the page answers the query.
        store: A folder for what a reranker or a generator said; no pair is judged twice, also after a kill. It may
            serve several judges.
        show_progress_bar: Whether to show a bar.
        documents: What a reranker reads of a document: ``"image"``, ``"text"`` or ``"text+image"``. ``None`` is
            ``"image"`` where the corpus has images. A generator is shown all that there is.
        batch_size: Pairs a forward pass of a reranker.
        max_workers: Calls of a generator at a time.
        queries: What a query is made of, as in ``training_rows``; a generator is asked in words.

    Returns:
        A new dataset with the same corpus and queries.

    Raises:
        ConfigError: An argument has a value it can't have, or the judge does not tell the known relevant documents
            from the negatives, or answers no call.
        DatasetError: The dataset has no negatives.
        MissingDocumentError: ``TeacherScores`` lack a pair.
        ImageDecodeError: A reranker reads a page that can't be decoded.
    """
    require_flag("show_progress_bar", show_progress_bar)
    size, workers = require_whole("batch_size", batch_size), require_whole("max_workers", max_workers)
    if isinstance(judge, CrossEncoder):
        require_reranker(judge, "judge")
    elif not isinstance(judge, TeacherScores):
        require_generator("judge", judge)
    data = as_retrieval_dataset(dataset)
    kind = documents if documents is not None else usual_kind(data.corpus)
    document_columns(data.corpus, kind)
    query_columns(data.queries, queries)
    if not isinstance(judge, (CrossEncoder, TeacherScores)):
        require_text(queries, "a generator is asked in words")
    if store is not None:
        require_path("store", store)
    if data.negatives is None or not len(data.relevance.listed_negatives.values):
        raise DatasetError(
            "The dataset lists no negatives that could be judged. Find some with mine_hard_negatives(dataset, model)."
        )
    check_queries(data.queries, queries)
    relevance = data.relevance_of(kind, queries)
    listed = relevance.listed_negatives
    is_open = ~relevance.may_be_relevant(listed.rows, listed.values)
    if not is_open.any():
        return data
    asking = np.r_[relevance.judged_query, listed.rows[is_open]]
    rows = np.r_[relevance.judged_document, listed.values[is_open]]
    query_ids, document_ids = relevance.query_ids.take(pa.array(asking)), relevance.document_ids.take(pa.array(rows))
    pairs = [Pair(*each) for each in zip(query_ids.to_pylist(), document_ids.to_pylist(), strict=True)]

    reader = DatasetReader(data.corpus, data.queries, kind, queries)
    if isinstance(judge, CrossEncoder):
        scorer = PairScorer(judge, reader, size, show_progress_bar)
        asked = "" if queries == "text" else f"{queries}-"
        teacher = f"{model_fingerprint(judge)}-{asked}{kind}"
        scores = None if store is None else ScoreStore(Path(store) / f"scores-{teacher}", teacher)
        said = scorer.score_pairs(pairs, reader.pair_digests(pairs), scores)
    elif isinstance(judge, TeacherScores):
        said = _look_up(judge, reader, pairs)
    else:
        options = {"store": store, "max_workers": workers, "show_progress_bar": show_progress_bar}
        # Of equal pages the first is shown for all.
        first = data.relevance_of(everything_of(data.corpus)).page[rows].tolist()
        texts = [reader.text_by_query_id[pair.query_id] for pair in pairs]
        calls = [Call(row, ask_whether_answered(text)) for row, text in zip(first, texts, strict=True)]
        said = _ask(Asker(judge, Pages(data.corpus), **options), calls)
    known, judged = np.split(said, [len(relevance.judged_query)])
    if not np.isfinite(known).any() or not np.isfinite(judged).any():
        raise ConfigError("The judge said nothing of use about the known relevant documents, or about the negatives.")
    labels = Thresholds.of(known[np.isfinite(known)], judged[np.isfinite(judged)]).labels(judged)
    return _relabelled(data, pairs[len(known) :], labels, judged)


def _look_up(judge: TeacherScores, reader: DatasetReader, pairs: list[Pair]) -> np.ndarray:
    score_by_content = dict(zip(judge.table["content"][:], judge.table["score"][:], strict=True))
    found = [score_by_content.get(content) for content in reader.pair_digests(pairs)]
    missing = [pair for pair, score in zip(pairs, found, strict=True) if score is None]
    if missing:
        raise MissingDocumentError(
            f"The teacher has not scored {len(missing)} of {len(pairs)} pairs, e.g. query {missing[0].query_id!r} with "
            f"document {missing[0].document_id!r}. Score rows with all negatives of the dataset: "
            "score_rows(dataset.training_rows(num_negatives), teacher), or pass the teacher itself as judge."
        )
    return np.array(found, dtype=np.float64)


def _ask(asker: Asker, calls: list[Call]) -> np.ndarray:
    """What a generator says of each pair, from 0 to 1; not a number where it said neither yes nor no."""
    replies = asker.ask(calls, "Judging negatives")
    said = [None if isinstance(reply, Failure) else read_verdict(reply) for reply in replies]
    silent = [at for at, score in enumerate(said) if score is None]
    if silent:
        reply = replies[silent[0]]
        example = f"document {reply.document_id!r}: {reply.reason}" if isinstance(reply, Failure) else repr(reply[:80])
        logger.warning(
            "%d of %d pairs were not judged and keep their label, e.g. %s.", len(silent), len(calls), example
        )
    return np.array([np.nan if score is None else score for score in said])


def _relabelled(data: RetrievalDataset, pairs: list[Pair], labels: np.ndarray, scores: np.ndarray) -> RetrievalDataset:
    """The dataset with other labels for some of its negatives, and the change listed."""
    tables = data.tables
    assert tables.negatives is not None, "the caller has looked"
    label_by_pair = {
        pair: (str(label), float(score))
        for pair, label, score in zip(pairs, labels, scores, strict=True)
        if label != "negative"
    }
    lists = lists_before(tables.negatives)
    changes = label_changes(tables.negatives).to_pylist()
    changes += [
        {"query_id": pair.query_id, "document_id": pair.document_id, "label": label, "rank": rank, "score": score}
        for pair, (label, score) in label_by_pair.items()
        for rank, document_id in enumerate(lists[pair.query_id])
        if document_id == pair.document_id
    ]
    gone = {Pair(each["query_id"], each["document_id"]) for each in changes}
    left = {query: [each for each in ids if Pair(query, each) not in gone] for query, ids in lists.items()}
    negatives = table_dataset(
        {"query_id": pa.array(list(left)), "document_ids": pa.array(list(left.values()), pa.list_(pa.string()))}
    )
    found = [pair for pair, (label, _) in label_by_pair.items() if label == "relevant"]
    qrels = {name: tables.qrels[name][:] for name in ("query_id", "document_id", "score")}
    qrels["query_id"] += [pair.query_id for pair in found]
    qrels["document_id"] += [pair.document_id for pair in found]
    qrels["score"] += [1] * len(found)
    logger.info(
        "Of %d negatives, %d are relevant and %d unknown.", len(pairs), len(found), len(label_by_pair) - len(found)
    )
    if len(label_by_pair) > _SUSPICIOUS * len(pairs):
        logger.warning(
            "%d of %d negatives changed their label. Either the lists are poor, or the judge is: look at label_changes "
            "and at a few of these pages before you train.",
            len(label_by_pair),
            len(pairs),
        )
    schema = label_changes(None).schema
    return RetrievalDataset.from_tables(
        replace(
            tables,
            qrels=table_dataset({name: pa.array(values) for name, values in qrels.items()}),
            negatives=with_label_changes(negatives, pa.Table.from_pylist(changes, schema=schema)),
        )
    )
