"""What may be wrong with a dataset: counted, with examples by id, before it is trained on. No image is decoded here."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from mmtune.data.arrow import column, media_columns
from mmtune.data.content import Content
from mmtune.data.findings import GOOD_TO_KNOW, PROBLEMS, AuditReport, Example, Finding, count_entries, most_common
from mmtune.data.images import EncodedImages
from mmtune.data.query_kinds import lacking
from mmtune.data.relevance import Relevance
from mmtune.data.tables import DroppedQuery, is_blank

_Positions: TypeAlias = Sequence[int] | np.ndarray

_COUNTED_BY_BUILDERS = (
    "null_negatives",
    "held_out_negatives",
    "blank_queries",
    "null_documents",
    "queries_without_document",
    "judged_not_relevant",
)
"""The kinds that are gone from the tables, and stand in their notes under the same name."""


class _Count(NamedTuple):
    number: int
    examples: tuple[Example, ...] = ()


def examine(relevance: Relevance, *, num_examples: int | None = 5, content: Content | None = None) -> AuditReport:
    """What is odd about a dataset; see ``RetrievalDataset.audit``.

    Args:
        relevance: The judgements by position.
        num_examples: Examples a finding at most; ``None`` gives all.
        content: What was found in pages, in queries, and in comparison with another dataset.
    """
    tables = relevance.tables
    examiner = _Examiner(relevance, sys.maxsize if num_examples is None else num_examples)
    content = content or Content()
    queries_by_length: dict[int, int] = {}
    if tables.negatives is not None:
        lengths, queries = np.unique(examiner.usable, return_counts=True)
        queries_by_length = dict(zip(lengths.tolist(), queries.tolist(), strict=True))
    taken_out = tuple(
        Example(*((() if part is None else (part,)) for part in entry)) for entry in tables.notes.taken_out
    )
    unknown = [Example((query_id,), (document_id,)) for query_id, document_id in tables.notes.unknown_examples]
    sources = [Example((), (name,)) for name, _ in tables.notes.unreadable_sources]
    count_by_key = {
        **{key: _Count(getattr(tables.notes, key)) for key in _COUNTED_BY_BUILDERS},
        "unreadable_sources": _Count(len(sources), tuple(sources[:num_examples])),
        "unknown_negatives": _Count(tables.notes.unknown_negatives, tuple(unknown[:num_examples])),
        "dropped_queries": _count_dropped(tables.notes.dropped_queries, num_examples),
        **examiner.count_relevant_negatives(),
        **examiner.count_lists(most_common(queries_by_length) if queries_by_length else None),
        **examiner.count_texts(),
        **examiner.count_pages(),
        **examiner.count_missing_content(),
        **examiner.count_incomplete_queries(),
        "taken_out": _Count(len(taken_out), taken_out[:num_examples]),
        **{key: _Count(count_entries(key, entries), entries) for key, entries in content.entries_by_key.items()},
    }
    sizes = {
        "documents": len(tables.corpus),
        "queries": len(tables.queries),
        "judgements": len(tables.qrels),
        "negatives": len(examiner.documents),
    }
    # What a corpus without images must have, another one may lack.
    has_images = bool(media_columns(tables.corpus.column_names))
    problems = {key: told for key, told in PROBLEMS.items() if not (has_images and key in GOOD_TO_KNOW)}
    findings = (
        Finding(key, count_by_key[key].number, key in problems, title, meaning, count_by_key[key].examples)
        for key, (title, meaning) in {**problems, **GOOD_TO_KNOW, **problems}.items()
        if key in count_by_key
    )
    return AuditReport(sizes, queries_by_length, tuple(findings), content.measures)


def _count_dropped(dropped: Sequence[DroppedQuery], num_examples: int | None) -> _Count:
    """The pages whose written queries were left out."""
    return _Count(len(dropped), tuple(Example((), (each.document_id,)) for each in dropped[:num_examples]))


class _Examiner:
    """Looks for each kind of finding; positions inside, ids in the examples.

    Attributes:
        queries: Of each entry of the lists of negatives, end to end, the query.
        documents: And the document.
        is_relevant: Whether the document is relevant to the query's text.
        is_first: Whether its page stands nowhere before in the same list.
        usable: For each query the entries that are neither relevant nor repeated.
    """

    def __init__(self, relevance: Relevance, limit: int) -> None:
        self._relevance = relevance
        self._limit = limit
        listed = relevance.listed_negatives
        self.queries, self.documents = listed.rows, listed.values
        self.is_relevant = relevance.is_relevant(self.queries, self.documents)
        pages = self.queries * len(relevance.page) + relevance.page[self.documents]
        self.is_first = np.zeros(len(pages), dtype=bool)
        # With the index numpy sorts, which takes a twentieth of the time of its hash table (numpy 2.3).
        self.is_first[np.unique(pages, return_index=True)[1]] = True
        is_usable = self.is_first & ~self.is_relevant
        self.usable = np.bincount(self.queries[is_usable], minlength=len(relevance.query_ids))

    def count_relevant_negatives(self) -> dict[str, _Count]:
        """Each relevant entry in one of three kinds: by id, else by text, else by bytes."""
        relevance, num_documents = self._relevance, len(self._relevance.document_ids)
        queries, documents = self.queries[self.is_relevant], self.documents[self.is_relevant]
        judged, text = relevance.judged_query, relevance.text
        by_id = np.isin(queries * num_documents + documents, judged * num_documents + relevance.judged_document)
        judged_texts = text[judged] * num_documents + relevance.judged_document
        by_text = np.isin(text[queries] * num_documents + documents, judged_texts)

        def contradict(entry: int) -> Example:
            """The entry, and the judgement that makes it relevant where its ids differ."""
            query, document = queries[entry], documents[entry]
            same_page = relevance.page[relevance.judged_document] == relevance.page[document]
            rows = np.flatnonzero((text[judged] == text[query]) & same_page)
            others, copies = judged[rows], relevance.judged_document[rows]
            closest = np.lexsort((others != query, copies != document))[0]
            return self._example([query, others[closest]], [document, copies[closest]])

        kinds = {"by_id": by_id, "by_text": by_text & ~by_id, "by_bytes": ~by_text}
        return {f"relevant_negatives_{how}": self._count(mask, contradict) for how, mask in kinds.items()}

    def count_lists(self, usual_length: int | None) -> dict[str, _Count]:
        """Lists that are short or empty, as they are used, and pages that stand in one twice."""
        has_lists = usual_length is not None
        return {
            "queries_without_negatives": self._count_queries((self.usable == 0) & has_lists),
            "short_negative_lists": self._count_queries(self.usable < (usual_length or 0)),
            "repeated_negatives": self._count(
                ~self.is_first, lambda entry: self._example([self.queries[entry]], [self.documents[entry]])
            ),
        }

    def count_texts(self) -> dict[str, _Count]:
        """Texts under several query ids, and those of them with different judgements."""
        relevance, text = self._relevance, self._relevance.text
        num_queries = np.bincount(text)
        # A judgement is a page with a score. A text is judged differently where not all of its queries share each.
        levels, level = np.unique(relevance.judged_score, return_inverse=True)
        num_judgements = len(relevance.page) * len(levels)
        judgement = relevance.page[relevance.judged_document] * len(levels) + level
        distinct = np.unique(relevance.judged_query * num_judgements + judgement, return_index=True)[0]
        query, judgement = np.divmod(distinct, num_judgements)
        keys, queries = np.unique(text[query] * num_judgements + judgement, return_counts=True)
        judged_text = keys // num_judgements
        differs = np.zeros(len(num_queries), dtype=bool)
        differs[judged_text[queries != num_queries[judged_text]]] = True
        masks = {"repeated_texts": num_queries > 1, "differing_judgements": differs}
        return {
            key: self._count(mask, lambda number: self._example(np.flatnonzero(text == number)))
            for key, mask in masks.items()
        }

    def count_pages(self) -> dict[str, _Count]:
        """Copies of a page, those that evaluation would count as wrong, and pages that nothing refers to."""
        relevance, page = self._relevance, self._relevance.page
        is_unreferenced = np.ones(len(page), dtype=bool)
        is_unreferenced[relevance.judged_document] = False
        is_unreferenced[self.documents] = False
        num_copies = np.bincount(page, minlength=len(page))
        groups = self._count(num_copies > 1, lambda number: self._example((), np.flatnonzero(page == number)))

        # For each query and page the copies of the page that are not judged, where one is.
        pairs = relevance.judged_query * len(page) + page[relevance.judged_document]
        keys, first, num_judged = np.unique(pairs, return_index=True, return_counts=True)
        num_unjudged = num_copies[keys % len(page)] - num_judged
        has_unjudged = np.zeros(len(pairs), dtype=bool)
        has_unjudged[first[num_unjudged > 0]] = True

        def show_unjudged(judgement: int) -> Example:
            query, document = relevance.judged_query[judgement], relevance.judged_document[judgement]
            judged = relevance.judged_document[relevance.judged_query == query]
            copies = np.setdiff1d(np.flatnonzero(page == page[document]), judged)
            return self._example([query], [copies[0], document])

        return {
            "identical_pages": _Count(relevance.num_copies, groups.examples),
            "unjudged_copies": _Count(int(num_unjudged.sum()), self._count(has_unjudged, show_unjudged).examples),
            "unreferenced_pages": self._count_documents(is_unreferenced),
        }

    def count_missing_content(self) -> dict[str, _Count]:
        """Documents without an image, a sound or a clip, or without a text, where the corpus has such a column."""
        corpus = self._relevance.tables.corpus
        no_image, unreadable, no_text = (np.zeros(len(corpus), dtype=bool) for _ in range(3))
        media = media_columns(corpus.column_names)
        lacking = np.zeros((len(media), len(corpus)), dtype=bool)
        for lacks, name in zip(lacking, media, strict=True):
            files = EncodedImages(corpus, name)
            for row in np.flatnonzero(files.lengths <= 0):
                is_null = files.lengths[row] < 0 and files.path(int(row)) is None
                (lacks if is_null else unreadable)[row] = True
        if "text" in corpus.column_names:
            no_text = is_blank(column(corpus, "text"))
        if media:
            no_image = np.logical_and.reduce(lacking)
        if len(media) > 1 and "text" in corpus.column_names:  # of several kinds of documents some may be texts
            no_image &= no_text
        return {
            "documents_without_image": self._count_documents(no_image),
            "unreadable_images": self._count_documents(unreadable),
            "documents_without_text": self._count_documents(no_text),
        }

    def count_incomplete_queries(self) -> dict[str, _Count]:
        """Queries without a part of what they are to be made of, where somebody says what that is."""
        asked = self._relevance.queries
        if asked is None:
            return {}
        return {"incomplete_queries": self._count_queries(lacking(self._relevance.tables.queries, asked))}

    def _count_queries(self, mask: np.ndarray) -> _Count:
        return self._count(mask, lambda row: self._example([row]))

    def _count_documents(self, mask: np.ndarray) -> _Count:
        return self._count(mask, lambda row: self._example((), [row]))

    def _count(self, mask: np.ndarray, example: Callable[[int], Example]) -> _Count:
        rows = np.flatnonzero(mask)
        return _Count(len(rows), tuple(example(row) for row in rows[: self._limit]))

    def _example(self, queries: _Positions, documents: _Positions = ()) -> Example:
        return Example(
            self._take_ids(self._relevance.query_ids, queries), self._take_ids(self._relevance.document_ids, documents)
        )

    def _take_ids(self, ids: pa.Array, rows: _Positions) -> tuple[str, ...]:
        # An entry and what it contradicts are two, however few examples are asked for.
        return tuple(ids[row].as_py() for row in dict.fromkeys(map(int, rows[: max(2, self._limit)])))
