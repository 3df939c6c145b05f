"""Hard negatives from what a retriever confuses: encode once, rank by id, keep what is safely not relevant."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import CrossEncoder

from mmtune.arguments import require_number, require_path, require_whole
from mmtune.data.arrow import IntLists, lists, table_dataset
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, check_texts, require_pairs_of
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.label_changes import label_changes, with_label_changes
from mmtune.data.neighbors import find_neighbors
from mmtune.data.query_kinds import QueryKind
from mmtune.data.relevance import Relevance
from mmtune.errors import ConfigError
from mmtune.inference.encoder import (
    SHARD_SIZE,
    DatasetReader,
    Retriever,
    Task,
    as_float32,
    encode_shards,
    join,
    require_retriever,
    warn_of_cut_inputs,
)
from mmtune.inference.processes import Processes
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.search import Nearest, find_nearest, merge_nearest
from mmtune.inference.shards import StoredDocuments
from mmtune.inference.store import Embeddings, EmbeddingStore, Pair, ScoreStore, model_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MiningRule:
    """Which of the documents that a model ranks high for a query become its negatives.

    As in the host's ``mine_hard_negatives``: of the ranking, the first ``range_max`` documents (and as many more as the
    query with most relevant documents has) are candidates. Those that are relevant and those that score too high are
    taken out, then the first ``range_min``, and the next ``num_negatives`` are the negatives.

    Attributes:
        num_negatives: Negatives a query, at most.
        relative_margin: A share of the score of the query's lowest relevant document; see ``keeps``.
        absolute_margin: A difference to that score; see ``keeps``.
        range_min: Candidates to pass over.
        range_max: How deep to look. ``None`` is ``range_min`` and 10 for each negative where scores are limited, else
            one, and the most relevant documents that a query has.
        max_score: The highest score of a negative.

    Raises:
        ConfigError: A value is out of its range, or ``range_max`` leaves no room for the negatives.
    """

    num_negatives: int = 4
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None

    def __post_init__(self) -> None:
        require_whole("num_negatives", self.num_negatives)
        require_whole("range_min", self.range_min, at_least=0)
        for name in ("relative_margin", "absolute_margin", "max_score"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if self.relative_margin is not None and not 0 <= self.relative_margin < 1:
            raise ConfigError(
                f"relative_margin={self.relative_margin!r} is no share of a score: expected 0 or more and below 1. "
                "0.05 keeps what scores at least 5% below the relevant document."
            )
        if self.range_max is None:
            return
        require_whole("range_max", self.range_max)
        if self.range_max - self.range_min < self.num_negatives:
            raise ConfigError(
                f"range_min={self.range_min} and range_max={self.range_max} leave room for "
                f"{max(self.range_max - self.range_min, 0)} documents, and num_negatives={self.num_negatives}. "
                f"Pass range_max={self.range_min + self.num_negatives} or more, or lower the others."
            )

    @property
    def limits_scores(self) -> bool:
        """Whether a candidate can be refused for its score."""
        return any(limit is not None for limit in (self.relative_margin, self.absolute_margin, self.max_score))

    def last_rank(self, most_relevant: int) -> int:
        """``range_max``, or what stands for ``None``.

        Args:
            most_relevant: The relevant documents of the query that has most.
        """
        if self.range_max is not None:
            return self.range_max
        return self.range_min + self.num_negatives * (10 if self.limits_scores else 1) + most_relevant

    def keeps(self, scores: np.ndarray, lowest: np.ndarray) -> np.ndarray:
        """Whether each candidate scores low enough to be a negative.

        ``score <= lowest - |lowest| * relative_margin`` (TopK-PercPos of NV-Retriever, Moreira et al. 2024), with the
        magnitude as in the host (its issue 3819): ``lowest * (1 - relative_margin)`` would be above the score of a
        relevant document that is below zero. And ``score <= lowest - absolute_margin``, and ``score <= max_score``.

        Args:
            scores: Shape ``(queries, candidates)``.
            lowest: The score of each query's lowest relevant document, shape ``(queries,)``.
        """
        bounds = [np.full(len(lowest), np.inf if self.max_score is None else self.max_score)]
        if self.relative_margin is not None:
            bounds.append(lowest - np.abs(lowest) * self.relative_margin)
        if self.absolute_margin is not None:
            bounds.append(lowest - self.absolute_margin)
        return scores <= np.min(bounds, axis=0)[:, None]


@dataclass(frozen=True)
class Ranking:
    """What is mined from: the pages that rank highest for each distinct text, both as numbers.

    Attributes:
        query_ids: Of each text the first query that has it.
        document_ids: Of each page the first document that is it.
        relevant: For each text the pages that are relevant to it.
        relevant_scores: The score of each of ``relevant.values``.
        candidates: For each text the pages that rank highest, best first, int64, shape ``(texts, depth)``.
        scores: Their scores, of the same shape.
        is_left_out: Which of them can be no negatives: relevant to the text, or beside what is; of the same shape.
    """

    query_ids: list[str]
    document_ids: list[str]
    relevant: IntLists
    relevant_scores: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray
    is_left_out: np.ndarray

    def choose_negatives(self, rule: MiningRule) -> IntLists:
        """For each text its negatives as pages, hardest first."""
        lowest = np.minimum.reduceat(self.relevant_scores, self.relevant.offsets[:-1])
        usable = ~self.is_left_out & rule.keeps(self.scores, lowest)
        order = np.argsort(np.where(usable, -self.scores, np.inf), axis=1, kind="stable")
        order = order[:, rule.range_min : rule.last_rank(int(self.relevant.lengths.max()))][:, : rule.num_negatives]
        rows, columns = np.nonzero(np.take_along_axis(usable, order, axis=1))
        pages = np.take_along_axis(self.candidates, order, axis=1)[rows, columns]
        return IntLists.grouped(rows, pages, len(self.query_ids))

    def rescore(self, scorer: PairScorer, store: ScoreStore | None, processes: Processes) -> "Ranking":
        """The same candidates with the scores of a reranker; what is relevant is scored apart from them."""
        candidates = np.nonzero(~self.is_left_out)
        texts = np.r_[candidates[0], self.relevant.rows].tolist()
        pages = np.r_[self.candidates[candidates], self.relevant.values].tolist()
        # Page after page, as the scorer reads them, so that a page is decoded by one process.
        order = np.array(sorted(range(len(texts)), key=lambda at: (self.document_ids[pages[at]], texts[at])))
        own = order[processes.share(len(order), scorer.batch_size)].tolist()
        pairs = [Pair(self.query_ids[texts[at]], self.document_ids[pages[at]]) for at in own]

        def score() -> np.ndarray:
            contents = scorer.reader.pair_digests(pairs) if store is not None else None
            return scorer.score_pairs(pairs, contents, store)

        found = np.empty(len(order))
        found[order] = np.concatenate(processes.gather(score))
        scores = np.full(self.scores.shape, -np.inf)
        scores[candidates], relevant_scores = np.split(found, [len(candidates[0])])
        return replace(self, scores=scores, relevant_scores=relevant_scores)


def mine_hard_negatives(
    dataset: DatasetLike,
    model: Retriever,
    *,
    num_negatives: int = 4,
    relative_margin: float | None = 0.05,
    absolute_margin: float | None = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    reranker: CrossEncoder | None = None,
    batch_size: int = 16,
    cache_folder: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
    documents: DocumentKind = "image",
    neighbors: int = 1,
    queries: QueryKind = "text",
    embeddings: str | os.PathLike[str] | None = None,
) -> RetrievalDataset:
    """The dataset with new negatives: for each query the documents that the model takes for relevant, and are not.

    Never a negative is what is relevant to the same query under any id, and no byte-identical copy of that; copies
    of one page count once. A candidate that scores nearly as high as a relevant document is probably an answer that
    nobody has judged, so the margins leave it out (Moreira et al., 2024). With several relevant documents, the one that
    scores lowest sets the bound, as in the host. Where the corpus says of which file and which page of it a document
    is, in the columns ``source`` and ``page_number``, pages beside a relevant one are no negatives either.

    Each distinct query and page is encoded once, pages are decoded ``batch_size`` at a time, and no embeddings of
    the whole corpus are held. Scores are the model's own similarity. Ties go to the document that stands first. Under
    torchrun each process encodes and searches its part of the corpus, and all of them return the same dataset.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes. Negatives
            that it has are not used.
        model: An embedding model, or a late-interaction one.
        num_negatives: Negatives a query. A query for which fewer are left keeps those; a warning counts such queries.
        relative_margin: A negative scores at least this share of the relevant document's score below it; 0.05 is 5%.
            ``None`` sets no such bound. Of a score below zero the share of its magnitude counts.
        absolute_margin: A negative scores at least this much below the relevant document.
        range_min: Candidates to pass over, of those that are left by the margins.
        range_max: How many documents of the ranking are looked at. ``None`` is ``range_min``, 10 a negative (1 where
            neither margin nor ``max_score`` is given), and the most relevant documents that a query has.
        max_score: A negative scores at most this.
        reranker: A host ``CrossEncoder`` that scores the candidates and the relevant documents again. Margins and
            ``max_score`` are then of its scores as probabilities (the sigmoid of its output), and so is the order.
        batch_size: Documents, queries or pairs a forward pass.
        cache_folder: Where embeddings, and scores of the reranker, are kept as they are made. A second call with other
            margins encodes nothing, one that was killed goes on, and a changed model, page or text is encoded anew.
            Each file is written by the process that made it.
        show_progress_bar: Whether to show bars.
        documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
        neighbors: How many pages on either side of a relevant one, in the same ``source`` by ``page_number``, are never
            its negatives, nor other documents on that page itself; 0 lets them be. It says nothing where the corpus has
            no such columns.
        queries: What a query is made of, likewise; it decides which queries are the same, too.
        embeddings: A folder that ``encode_corpus`` wrote with this model, in float32 and at full size: documents are
            read from there, and none is encoded. It may hold more documents, in another order.

    Returns:
        A new dataset with the same corpus, queries and judgements, and one list of negatives a query, hardest first.
        ``notes.neighbors_left_out`` counts the neighbours that ranked high enough to be looked at.

    Raises:
        ConfigError: An argument has a value it can't have, the data lack what ``documents`` or ``queries`` asks for, or
            ``embeddings`` are of another model.
        DatasetError: The data can't be used, the model gives no finite embedding for a document, or ``embeddings`` lack
            one.
        ImageDecodeError: A page can't be decoded; the message names the document.

    Example:
        >>> from mmtune import RetrievalDataset, load_model
        >>> from mmtune.inference.mining import mine_hard_negatives
        >>> pages = RetrievalDataset.load("pages.parquet")
        >>> mined = mine_hard_negatives(pages, load_model("my-model"), num_negatives=2, show_progress_bar=False)
        >>> mined.negatives.column_names
        ['query_id', 'document_ids']
    """
    rule = MiningRule(num_negatives, relative_margin, absolute_margin, range_min, range_max, max_score)
    require_retriever(model, "model", "mine_hard_negatives(dataset, model): the dataset comes first")
    if reranker is not None:
        require_reranker(reranker, "reranker")
        require_pairs_of(documents, queries)
    size = require_whole("batch_size", batch_size)
    distance = require_whole("neighbors", neighbors, at_least=0)
    if cache_folder is not None:
        require_path("cache_folder", cache_folder)
    data = as_retrieval_dataset(dataset)
    relevance = data.relevance_of(documents, queries)
    relevance.require_queries()
    check_texts(data.corpus, documents)
    reader = DatasetReader(data.corpus, data.queries, documents, queries)
    if reranker is not None:
        require_pairs_of(documents, queries, reader.kinds)
    processes = Processes.running(model.device)

    # Each distinct query and each distinct page once, by the first query and the first document that have it.
    asking = np.unique(relevance.text, return_index=True)[1]
    pages = np.flatnonzero(relevance.page == np.arange(len(relevance.page)))
    query_ids = relevance.query_ids.take(pa.array(asking)).to_pylist()
    document_ids = relevance.document_ids.take(pa.array(pages)).to_pylist()
    relevant = _relevant_pages(relevance, pages)
    beside = find_neighbors(relevance, distance)

    if processes.rank == 0:
        warn_of_cut_inputs(model, reader)
    store = None if cache_folder is None else EmbeddingStore(cache_folder, model)
    made = None if embeddings is None else StoredDocuments(embeddings, model_fingerprint(model), documents)
    most_relevant, most_beside = int(relevant.lengths.max()), int(beside.lengths.max())
    # As deep as the rule looks, and so much more as relevant documents and those beside them may stand in the way.
    depth = rule.last_rank(most_relevant) + most_relevant + most_beside
    work = _Search(model, reader, processes, size, show_progress_bar and processes.rank == 0, store, made)
    nearest = work.find(query_ids, document_ids, depth, relevant)
    found = pages[nearest.items]
    is_relevant = relevance.may_be_relevant(np.broadcast_to(asking[:, None], found.shape), found)
    num_documents = len(relevance.page)
    is_beside = np.isin(
        np.arange(len(found))[:, None] * num_documents + found, beside.rows * num_documents + beside.values
    )
    ranking = Ranking(
        query_ids,
        document_ids,
        relevant,
        nearest.relevant_scores,
        nearest.items,
        nearest.scores,
        is_relevant | is_beside,
    )

    if reranker is not None:
        scorer = PairScorer(reranker, reader, size, work.show_progress_bar, activation=_Probability())
        scores = None
        if cache_folder is not None:
            asked = "" if queries == "text" else f"{queries}-"
            teacher = f"{model_fingerprint(reranker)}-{asked}{documents}-probability"
            folder = Path(cache_folder) / f"scores-{teacher}"
            scores = processes.make_in_turn(lambda: ScoreStore(folder, teacher))
        ranking = ranking.rescore(scorer, scores, processes)

    mined = ranking.choose_negatives(rule).take(relevance.text)
    if processes.rank == 0:
        _say_what_was_left_out(is_beside, distance)
        _warn_of_short_lists(mined.lengths, relevance, rule, len(pages))
    return _with_negatives(data, IntLists(mined.offsets, pages[mined.values]), int(is_beside.sum()))


@dataclass(frozen=True)
class _Search:
    """The search for candidates, shared by the processes."""

    model: Retriever
    reader: DatasetReader
    processes: Processes
    batch_size: int
    show_progress_bar: bool
    store: EmbeddingStore | None
    made: StoredDocuments | None

    def find(self, query_ids: Sequence[str], document_ids: Sequence[str], depth: int, relevant: IntLists) -> Nearest:
        """The nearest documents of each query, the same in every process."""
        share, cpu = self.processes.share(len(query_ids), SHARD_SIZE), torch.device("cpu")
        parts = self.processes.gather(lambda: as_float32(join(self._encode("query", query_ids[share])), cpu))
        texts = as_float32(join(parts), self.model.device)
        own = self.processes.share(len(document_ids), SHARD_SIZE)

        def find_own() -> Nearest:
            return find_nearest(
                self.model.similarity,
                texts,
                self._encode("document", document_ids[own]),
                depth=depth,
                ids=(query_ids, document_ids),
                relevant=relevant,
                at_once=16_384 if isinstance(texts, torch.Tensor) else 4096,
                first=own.start,
            )

        found = self.processes.gather(find_own)
        return found[0] if len(found) == 1 else merge_nearest(found, depth)

    def _encode(self, task: Task, ids: Sequence[str]) -> Iterator[Embeddings]:
        if task == "document" and self.made is not None:
            return self.made.read_all(ids, self.reader, self.model.device)
        return encode_shards(
            self.model,
            task,
            ids,
            self.reader,
            batch_size=self.batch_size,
            show_progress_bar=self.show_progress_bar,
            store=self.store,
        )


class _Probability(torch.nn.Module):
    """The sigmoid in double precision, in which large scores stay apart."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        # On the CPU: some accelerators have no double precision.
        return torch.sigmoid(scores.cpu().double())


def _relevant_pages(relevance: Relevance, pages: np.ndarray) -> IntLists:
    """For each text what is relevant to it, each page once, as places in ``pages``."""
    documents = relevance.documents_of_text
    is_first = relevance.page[documents.values] == documents.values
    places = np.searchsorted(pages, documents.values[is_first])
    return IntLists.grouped(documents.rows[is_first], places, len(documents.lengths))


def _with_negatives(data: RetrievalDataset, mined: IntLists, neighbors_left_out: int) -> RetrievalDataset:
    """The dataset with other negatives, and without the notes on those that it had."""
    relevance, tables = data.relevance, data.tables
    document_ids = relevance.document_ids.take(pa.array(mined.values))
    negatives = table_dataset({"query_id": relevance.query_ids, "document_ids": lists(mined.offsets, document_ids)})
    negatives = with_label_changes(negatives, label_changes(tables.negatives))
    notes = replace(
        tables.notes,
        null_negatives=0,
        unknown_negatives=0,
        unknown_examples=(),
        held_out_negatives=0,
        neighbors_left_out=neighbors_left_out,
    )
    return RetrievalDataset.from_tables(replace(tables, negatives=negatives, notes=notes))


def _say_what_was_left_out(is_beside: np.ndarray, distance: int) -> None:
    if is_beside.any():
        logger.info(
            "Left out %d candidates of %d queries that lie beside a relevant page of the same file, up to %d pages "
            "away: they often answer too. Pass neighbors=0 to take them.",
            is_beside.sum(),
            is_beside.any(axis=1).sum(),
            distance,
        )


def _warn_of_short_lists(lengths: np.ndarray, relevance: Relevance, rule: MiningRule, num_pages: int) -> None:
    short = np.flatnonzero(lengths < rule.num_negatives)
    if not len(short):
        return
    names = ("relative_margin", "absolute_margin", "max_score", "range_max")
    limits = [f"{name}={getattr(rule, name)}" for name in names if getattr(rule, name) is not None]
    if rule.num_negatives >= num_pages:
        why = f"The corpus has {num_pages} different documents: pass num_negatives={min(4, max(num_pages - 1, 1))}"
    elif limits:
        loosest = limits[0].partition("=")[0]
        usual = " or relative_margin=0.05, the default," if (rule.relative_margin or 0) > 0.05 else ""
        why = f"There are no more under {' and '.join(limits)}: pass{usual} {loosest}=None for no such bound"
    else:
        why = "No more of the corpus is not relevant: pass a lower num_negatives"
    examples = ", ".join(f"{relevance.query_ids[int(row)].as_py()!r} ({lengths[row]})" for row in short[:3])
    logger.warning(
        "%d of %d queries have fewer than %d mined negatives, e.g. %s. %s. Training fills such rows at random.",
        len(short),
        len(lengths),
        rule.num_negatives,
        examples,
        why,
    )
