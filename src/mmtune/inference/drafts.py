"""Queries as they were written, which of them are kept, and how they come into a dataset."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmtune.data.arrow import column, positions, table_dataset
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


def share_words(drafts: list[Draft], tables: Tables, page: np.ndarray, sieve: Sieve) -> list[Draft]:
    """The drafts with one text for the same words, as a query of the tables has it or else the first of them.

    Dropped is what a query that is relevant to the page, or an earlier draft about it, asks in the same words.

    Args:
        drafts: As they were written.
        tables: The data.
        page: For each row of the corpus the first with its content.
        sieve: Where it is noted what was dropped.
    """
    texts = [text or "" for text in column(tables.queries, "text").to_pylist()]
    words_by_id = dict(zip(column(tables.queries, "query_id").to_pylist(), map(normalized, texts), strict=True))
    text_by_words: dict[str, str] = {}
    for words, text in zip(words_by_id.values(), texts, strict=True):
        text_by_words.setdefault(words, text)
    judged = positions(column(tables.qrels, "document_id"), column(tables.corpus, "document_id"))
    query_ids = column(tables.qrels, "query_id").to_pylist()
    asked = {(words_by_id[query_id], row) for query_id, row in zip(query_ids, page[judged].tolist(), strict=True)}
    is_new = []
    for draft in drafts:
        about = normalized(draft.text), draft.row
        is_new.append(about not in asked)
        asked.add(about)
    kept = sieve.keep(drafts, is_new, "it repeats the words of another")
    return [replace(each, text=text_by_words.setdefault(normalized(each.text), each.text)) for each in kept]


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
    """The drafts that ask for something else than another query of their page, and find their page.

    A text that several pages got is kept for all of them where it is for one, and so is that of a query of the tables:
    a page that is left out alone would become a negative of what was written about it.
    """
    data = RetrievalDataset.from_tables(with_drafts(tables, drafts, None))
    relevance, reader = data.relevance, DatasetReader(data.corpus, data.queries, usual_kind(data.corpus))
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    query_ids = relevance.query_ids.to_pylist()
    texts = join(encode_shards(retriever, "query", query_ids, reader, **options))

    # Queries and judgements of the drafts stand behind those that there were.
    judged_page, num_before = relevance.page[relevance.judged_document], len(tables.qrels)
    is_new: list[bool] = []
    asked: defaultdict[int, list[int]] = defaultdict(list)
    for at, (query, page) in enumerate(zip(relevance.judged_query.tolist(), judged_page.tolist(), strict=True)):
        is_draft = at >= num_before
        if is_draft:
            is_new.append(not any(_means_the_same(retriever, texts, query, other) for other in asked[page]))
        if not is_draft or is_new[-1]:
            asked[page].append(query)

    pages, first_new = np.flatnonzero(relevance.page == np.arange(len(relevance.page))), len(tables.queries)
    document_ids = relevance.document_ids.take(pa.array(pages)).to_pylist()
    shards = encode_shards(retriever, "document", document_ids, reader, **options)
    # A new id may stand for an old text, so some query is new wherever there are drafts.
    ids = query_ids[first_new:], document_ids
    nearest = find_nearest(retriever.similarity, texts[first_new:], shards, depth=min(max_rank, len(pages)), ids=ids)
    found = pages[nearest.items][relevance.judged_query[num_before:] - first_new]
    is_found = (found == judged_page[num_before:, None]).any(axis=1).tolist()
    before = {*column(tables.queries, "text").to_pylist()}
    new = before | {draft.text for draft, holds in zip(drafts, is_new, strict=True) if holds}
    findable = before | {draft.text for draft, holds in zip(drafts, is_found, strict=True) if holds}
    kept = sieve.keep(drafts, [draft.text in new for draft in drafts], "it asks for what another asks for")
    return sieve.keep(kept, [draft.text in findable for draft in kept], "it is too general to find its page")


def _means_the_same(retriever: Retriever, texts: torch.Tensor | list[torch.Tensor], one: int, other: int) -> bool:
    # A share of what a text has with itself, since not all similarities are cosines.
    pair = [texts[one], texts[other]]
    both = torch.stack(pair) if isinstance(texts, torch.Tensor) else pair
    scores = retriever.similarity(both, both)
    return bool(torch.max(scores[0, 1], scores[1, 0]) >= _SAME_MEANING * torch.min(scores[0, 0], scores[1, 1]))


def keep_answered(drafts: list[Draft], tables: Tables, checker: Asker, sieve: Sieve) -> list[Draft]:
    """The drafts that a judge says their page answers.

    Of a new text that several pages got none is kept where the judge leaves one of them in doubt: that page would
    become a negative of it.
    """
    calls = [Call(draft.row, ask_whether_answered(draft.text)) for draft in drafts]
    replies = checker.ask(calls, "Judging queries")
    said = [None if isinstance(reply, Failure) else read_verdict(reply) for reply in replies]
    doubtful = {each.text for each, verdict in zip(drafts, said, strict=True) if verdict is None or 0 < verdict <= 0.5}
    doubtful -= {*column(tables.queries, "text").to_pylist()}
    kept = []
    for draft, reply, verdict in zip(drafts, replies, said, strict=True):
        reason = None
        if isinstance(reply, Failure):
            sieve.fail(reply, draft.text)
        elif verdict is None:
            reason = f"the judge said neither: {reply[:80]!r}"
        elif verdict <= 0.5:
            reason = "its page does not answer it"
        elif draft.text in doubtful:
            reason = "it is in doubt whether another page that it was written for answers it"
        else:
            kept.append(draft)
        if reason is not None:
            sieve.dropped.append(DroppedQuery(draft.document_id, draft.text, reason))
    return kept


def with_drafts(tables: Tables, drafts: Sequence[Draft], name: str | None) -> Tables:
    """The tables with the drafts as queries, behind those that there are; of one text they are one query."""
    if not drafts:
        return tables
    taken = set(column(tables.queries, "query_id").to_pylist())
    id_by_text: dict[str, str] = {}
    first: list[Draft] = []
    for draft in drafts:
        if draft.text in id_by_text:
            continue
        number = draft.number
        while f"{draft.document_id}-q{number}" in taken:
            number += 1
        id_by_text[draft.text] = f"{draft.document_id}-q{number}"
        taken.add(id_by_text[draft.text])
        first.append(draft)
    texts: dict[str, list[str | None]] = {"query_id": [*id_by_text.values()], "text": [*id_by_text]}
    for field in ("kind", "language", "answer", "prompt"):
        texts[field] = [getattr(draft, field) for draft in first]
    texts["generator"] = [name] * len(first)
    queries = table_dataset({key: pa.array(values, type=pa.string()) for key, values in texts.items()})
    ids = {"query_id": [id_by_text[each.text] for each in drafts], "document_id": [each.document_id for each in drafts]}
    judged = {key: pa.array(values) for key, values in ids.items()}
    qrels = table_dataset({**judged, "score": pa.array([1] * len(drafts), type=pa.int64())})
    if len(tables.queries):
        queries, qrels = stack([tables.queries, queries], "queries"), stack([tables.qrels, qrels], "qrels")
    return check_tables(tables.corpus, queries, qrels, tables.negatives, notes=tables.notes)
