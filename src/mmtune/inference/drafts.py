"""Queries as they were written, which of them are kept, and how they come into a dataset."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmtune.data.arrow import column, table_dataset
from mmtune.data.combining import stack
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.identity import usual_kind
from mmtune.data.tables import DroppedQuery, Tables, check_tables
from mmtune.inference.asking import Asker, Call, Failure
from mmtune.inference.encoder import DatasetReader, Retriever, encode_shards, join
from mmtune.inference.generators import read_verdict
from mmtune.inference.prompts import ask_whether_answered
from mmtune.inference.search import find_nearest
from mmtune.inference.wording import normalized

logger = logging.getLogger(__name__)

_SAME_MEANING = 0.95
"""Two queries of a page at this share of the similarity of a text to itself ask for the same."""


@dataclass(frozen=True)
class Draft:
    """A query as it was written, and about what.

    Attributes:
        row: The document, as a row of the corpus.
        document_id: Its id.
        text: The query.
        answer: The answer that came with it.
        kind: The kind of question that was asked for.
        language: The language that was asked for; ``None`` for that of the page.
        prompt: A digest of the instruction.
        number: Which question about its page it is, from 1.
    """

    row: int
    document_id: str
    text: str
    answer: str | None
    kind: str
    language: str | None
    prompt: str
    number: int


class Sieve:
    """What was left out on the way, and why.

    Attributes:
        dropped: The queries that were left out; without a text where a call failed.
    """

    def __init__(self) -> None:
        self.dropped: list[DroppedQuery] = []

    def keep(self, drafts: Sequence[Draft], are_kept: Sequence[bool], reason: str) -> list[Draft]:
        """The drafts that are kept; the others are dropped for a reason."""
        pairs = list(zip(drafts, are_kept, strict=True))
        self.dropped += [DroppedQuery(draft.document_id, draft.text, reason) for draft, is_kept in pairs if not is_kept]
        return [draft for draft, is_kept in pairs if is_kept]

    def fail(self, failure: Failure, text: str = "") -> None:
        """Note a call that was not answered."""
        self.dropped.append(DroppedQuery(failure.document_id, text, f"a call failed: {failure.reason}"))

    def report(self, num_queries: int, num_pages: int) -> None:
        """Log what came out, and warn where calls failed."""
        counts = Counter(each.reason.partition(":")[0] for each in self.dropped)
        why = "; ".join(f"{count} since {reason}" for reason, count in counts.most_common())
        logger.info("%d queries about %d pages. Left out: %s.", num_queries, num_pages, why or "none")
        failed = [each for each in self.dropped if each.reason.startswith("a call failed")]
        if failed:
            documents = list(dict.fromkeys(each.document_id for each in failed))
            logger.warning(
                "%d calls failed, about %d pages, e.g. %r: %s. notes.dropped_queries lists them; call again with the "
                "same store to ask for these alone.",
                len(failed),
                len(documents),
                documents[0],
                failed[0].reason,
            )


def is_text(text: str) -> bool:
    """Whether there is something that can be written down: half of a surrogate pair can't."""
    return bool(text.strip()) and text.encode(errors="replace").decode() == text


def keep_first_of_words(drafts: list[Draft], tables: Tables, sieve: Sieve) -> list[Draft]:
    """The drafts whose words neither a query of the tables nor an earlier draft has."""
    seen = {normalized(text) for text in column(tables.queries, "text").to_pylist()}
    is_new = []
    for draft in drafts:
        words = normalized(draft.text)
        is_new.append(words not in seen)
        seen.add(words)
    return sieve.keep(drafts, is_new, "it repeats the words of another")


def keep_findable(
    drafts: list[Draft],
    tables: Tables,
    retriever: Retriever,
    max_rank: int,
    sieve: Sieve,
    *,
    batch_size: int,
    show_progress_bar: bool,
) -> list[Draft]:
    """The drafts that ask for something else than another query of their page, and find their page."""
    data = RetrievalDataset.from_tables(with_drafts(tables, drafts, None))
    relevance, reader = data.relevance, DatasetReader(data.corpus, data.queries, usual_kind(data.corpus))
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    query_ids = relevance.query_ids.to_pylist()
    texts = join(encode_shards(retriever, "query", query_ids, reader, **options))
    page_of_query = np.empty(len(query_ids), dtype=np.int64)
    page_of_query[relevance.judged_query] = relevance.page[relevance.judged_document]

    # Drafts stand behind the queries that there were.
    first_draft = len(query_ids) - len(drafts)
    is_new: list[bool] = []
    asked: defaultdict[int, list[int]] = defaultdict(list)
    for at, page in enumerate(page_of_query.tolist()):
        is_draft = at >= first_draft
        if is_draft:
            is_new.append(not any(_means_the_same(retriever, texts, at, other) for other in asked[page]))
        if not is_draft or is_new[-1]:
            asked[page].append(at)

    pages = np.flatnonzero(relevance.page == np.arange(len(relevance.page)))
    document_ids = relevance.document_ids.take(pa.array(pages)).to_pylist()
    shards = encode_shards(retriever, "document", document_ids, reader, **options)
    ids = query_ids[first_draft:], document_ids
    nearest = find_nearest(retriever.similarity, texts[first_draft:], shards, depth=min(max_rank, len(pages)), ids=ids)
    is_found = (pages[nearest.items] == page_of_query[first_draft:, None]).any(axis=1)
    kept = sieve.keep(drafts, is_new, "it asks for what another asks for")
    return sieve.keep(kept, is_found[np.array(is_new)].tolist(), "it is too general to find its page")


def _means_the_same(retriever: Retriever, texts: torch.Tensor | list[torch.Tensor], one: int, other: int) -> bool:
    # A share of what a text has with itself, since not all similarities are cosines.
    pair = [texts[one], texts[other]]
    both = torch.stack(pair) if isinstance(texts, torch.Tensor) else pair
    scores = retriever.similarity(both, both)
    return bool(torch.max(scores[0, 1], scores[1, 0]) >= _SAME_MEANING * torch.min(scores[0, 0], scores[1, 1]))


def keep_answered(drafts: list[Draft], checker: Asker, sieve: Sieve) -> list[Draft]:
    """The drafts that a judge says their page answers."""
    calls = [Call(draft.row, ask_whether_answered(draft.text)) for draft in drafts]
    kept = []
    for draft, reply in zip(drafts, checker.ask(calls, "Judging queries"), strict=True):
        verdict = None if isinstance(reply, Failure) else read_verdict(reply)
        if verdict is not None and verdict > 0.5:
            kept.append(draft)
        elif isinstance(reply, Failure):
            sieve.fail(reply, draft.text)
        elif verdict is None:
            sieve.dropped.append(DroppedQuery(draft.document_id, draft.text, f"the judge said neither: {reply[:80]!r}"))
        else:
            sieve.dropped.append(DroppedQuery(draft.document_id, draft.text, "its page does not answer it"))
    return kept


def with_drafts(tables: Tables, drafts: Sequence[Draft], name: str | None) -> Tables:
    """The tables with the drafts as queries, behind those that there are."""
    if not drafts:
        return tables
    taken = set(column(tables.queries, "query_id").to_pylist())
    ids = []
    for draft in drafts:
        number = draft.number
        while f"{draft.document_id}-q{number}" in taken:
            number += 1
        ids.append(f"{draft.document_id}-q{number}")
        taken.add(ids[-1])
    texts: dict[str, list[str | None]] = {"query_id": [*ids], "text": [draft.text for draft in drafts]}
    for field in ("kind", "language", "answer", "prompt"):
        texts[field] = [getattr(draft, field) for draft in drafts]
    texts["generator"] = [name] * len(drafts)
    queries = table_dataset({key: pa.array(values, type=pa.string()) for key, values in texts.items()})
    judged = {"query_id": pa.array(ids), "document_id": pa.array([draft.document_id for draft in drafts])}
    qrels = table_dataset({**judged, "score": pa.array([1] * len(drafts), type=pa.int64())})
    if len(tables.queries):
        queries, qrels = stack([tables.queries, queries], "queries"), stack([tables.qrels, qrels], "qrels")
    return check_tables(tables.corpus, queries, qrels, tables.negatives, notes=tables.notes)
