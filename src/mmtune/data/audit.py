"""What may be wrong with a dataset: counted, with examples by id, before it is trained on. No image is decoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from mmtune.data.arrow import column
from mmtune.data.encoded import EncodedImages
from mmtune.data.findings import GOOD_TO_KNOW, PROBLEMS, AuditReport, Example, Finding, most_common
from mmtune.data.relevance import Relevance
from mmtune.data.tables import BuildNotes, Tables, is_blank

_Positions: TypeAlias = Sequence[int] | np.ndarray

_COUNTED_BY_BUILDERS = (
    "unknown_negatives",
    "null_negatives",
    "held_out_negatives",
    "blank_queries",
    "null_documents",
    "queries_without_document",
    "judged_not_relevant",
)
"""The kinds that are gone from the tables, and stand in their notes under the same name."""


def audit(tables: Tables, relevance: Relevance, *, num_examples: int = 5) -> AuditReport:
    """What is odd about a dataset; see ``RetrievalDataset.audit``.

    Args:
        tables: The data.
        relevance: Its judgements.
        num_examples: Examples a finding, and ids an example, at most.
    """
    examiner = _Examiner(tables, relevance, num_examples)
    listed = _Listed(relevance)
    usable = np.bincount(listed.queries[listed.is_first & ~listed.is_relevant], minlength=len(relevance.query_ids))
    per_query = _histogram(usable) if tables.negatives is not None else {}
    found = {
        **_noted(tables.notes, num_examples),
        **examiner.relevant_negatives(listed),
        **examiner.lists(listed, usable, per_query),
        **examiner.texts(),
        **examiner.pages(listed),
        **examiner.contents(),
    }
    sizes = {
        "documents": len(tables.corpus),
        "queries": len(tables.queries),
        "judgements": len(tables.qrels),
        "negatives": len(listed.documents),
    }
    return AuditReport(
        sizes,
        per_query,
        tuple(
            Finding(key, found[key].count, key in PROBLEMS, title, meaning, found[key].examples)
            for key, (title, meaning) in (PROBLEMS | GOOD_TO_KNOW).items()
        ),
    )


@dataclass(frozen=True)
class _Found:
    count: int
    examples: tuple[Example, ...] = ()


class _Listed:
    """The entries of all lists of negatives, end to end.

    Attributes:
        queries: Positions of the queries, rising.
        documents: Positions of the documents.
        is_relevant: Whether the document is relevant to the query's text.
        is_first: Whether its page stands nowhere before in the same list.
    """

    def __init__(self, relevance: Relevance) -> None:
        listed = relevance.listed_negatives
        self.queries, self.documents = listed.rows, listed.values
        self.is_relevant = relevance.is_relevant(self.queries, self.documents)
        pages = self.queries * len(relevance.page) + relevance.page[self.documents]
        self.is_first = np.zeros(len(pages), dtype=bool)
        # With the index numpy sorts, which takes a twentieth of the time of its hash table (numpy 2.3).
        self.is_first[np.unique(pages, return_index=True)[1]] = True


class _Examiner:
    """Looks for each kind of finding; positions inside, ids in the examples."""

    def __init__(self, tables: Tables, relevance: Relevance, limit: int) -> None:
        self._tables = tables
        self._relevance = relevance
        self._limit = limit

    def relevant_negatives(self, listed: _Listed) -> dict[str, _Found]:
        """Each relevant entry in one of three kinds: by id, else by text, else by bytes."""
        relevance, num_documents = self._relevance, len(self._relevance.document_ids)
        queries, documents = listed.queries[listed.is_relevant], listed.documents[listed.is_relevant]
        judged, text = (relevance.judged_query, relevance.judged_document), relevance.text
        by_id = _isin_pairs((queries, documents), judged, num_documents)
        by_text = _isin_pairs((text[queries], documents), (text[judged[0]], judged[1]), num_documents)
        kinds = {"by_id": by_id, "by_text": by_text & ~by_id, "by_bytes": ~by_text}
        return {
            f"relevant_negatives_{how}": self._found(
                np.flatnonzero(mask), lambda row: self._contradiction(queries[row], documents[row])
            )
            for how, mask in kinds.items()
        }

    def lists(self, listed: _Listed, usable: np.ndarray, per_query: Mapping[int, int]) -> dict[str, _Found]:
        """Lists that are short or empty, as they are used, and pages that stand in one twice."""
        usual = most_common(per_query) if per_query else 0
        is_without = usable == 0 if per_query else np.zeros(len(usable), dtype=bool)
        return {
            "queries_without_negatives": self._queries(is_without),
            "short_negative_lists": self._queries(usable < usual),
            "repeated_negatives": self._found(
                np.flatnonzero(~listed.is_first),
                lambda entry: self._example([listed.queries[entry]], [listed.documents[entry]]),
            ),
        }

    def texts(self) -> dict[str, _Found]:
        """Texts under several query ids, and those of them with different judgements."""
        text = self._relevance.text
        return {
            key: self._found(texts, lambda number: self._example(np.flatnonzero(text == number)))
            for key, texts in {
                "repeated_texts": np.flatnonzero(np.bincount(text) > 1),
                "differing_judgements": self._texts_judged_differently(),
            }.items()
        }

    def pages(self, listed: _Listed) -> dict[str, _Found]:
        """Copies of a page, those that evaluation would count as wrong, and pages that nothing refers to."""
        page = self._relevance.page
        referred = np.zeros(len(page), dtype=bool)
        referred[self._relevance.judged_document] = True
        referred[listed.documents] = True
        groups = np.flatnonzero(np.bincount(page) > 1)
        copies = self._found(groups, lambda number: self._example((), np.flatnonzero(page == number)))
        return {
            "identical_pages": _Found(self._relevance.num_copies, copies.examples),
            "unjudged_copies": self._unjudged_copies(),
            "unreferenced_pages": self._documents(~referred),
        }

    def contents(self) -> dict[str, _Found]:
        """Documents without what they are made of: images where the corpus has them, else texts."""
        corpus = self._tables.corpus
        nothing = np.zeros(len(corpus), dtype=bool)
        no_image, unreadable, no_text = nothing.copy(), nothing.copy(), nothing
        if "image" in corpus.column_names:
            images = EncodedImages(corpus)
            for row in np.flatnonzero(images.lengths <= 0):
                is_null = images.lengths[row] < 0 and images.path(int(row)) is None
                (no_image if is_null else unreadable)[row] = True
        else:
            no_text = is_blank(column(corpus, "text"))
        return {
            "documents_without_image": self._documents(no_image),
            "unreadable_images": self._documents(unreadable),
            "documents_without_text": self._documents(no_text),
        }

    def _texts_judged_differently(self) -> np.ndarray:
        """The texts with a judgement, of a page with a score, that not all of their queries share."""
        relevance = self._relevance
        scores = column(self._tables.qrels, "score").to_numpy(zero_copy_only=False)
        levels, level = np.unique(scores, return_inverse=True)
        judgement = relevance.page[relevance.judged_document] * len(levels) + level
        num_judgements = len(relevance.page) * len(levels)
        distinct = np.unique(relevance.judged_query * num_judgements + judgement, return_index=True)[0]
        query, judgement = np.divmod(distinct, num_judgements)
        keys, queries = np.unique(relevance.text[query] * num_judgements + judgement, return_counts=True)
        text = keys // num_judgements
        is_shared = queries == np.bincount(relevance.text)[text]
        return np.unique(text[~is_shared], return_index=True)[0]

    def _unjudged_copies(self) -> _Found:
        """Pairs of a query and a document that has the bytes of a relevant page and is not judged for the query."""
        relevance = self._relevance
        page = relevance.page
        pairs = relevance.judged_query * len(page) + page[relevance.judged_document]
        keys, first, judged = np.unique(pairs, return_index=True, return_counts=True)
        missing = np.bincount(page, minlength=len(page))[keys % len(page)] - judged
        with_missing = self._found(np.sort(first[missing > 0]), self._unjudged_copy)
        return _Found(int(missing.sum()), with_missing.examples)

    def _unjudged_copy(self, judgement: int) -> Example:
        relevance = self._relevance
        query, document = relevance.judged_query[judgement], relevance.judged_document[judgement]
        judged = relevance.judged_document[relevance.judged_query == query]
        copies = np.setdiff1d(np.flatnonzero(relevance.page == relevance.page[document]), judged)
        return self._example([query], [copies[0], document])

    def _contradiction(self, query: int, document: int) -> Example:
        """The entry, and the judgement that makes it relevant where its ids differ."""
        relevance = self._relevance
        same_text = relevance.text[relevance.judged_query] == relevance.text[query]
        same_page = relevance.page[relevance.judged_document] == relevance.page[document]
        rows = np.flatnonzero(same_text & same_page)
        queries, documents = relevance.judged_query[rows], relevance.judged_document[rows]
        closest = np.lexsort((queries != query, documents != document))[0]
        return self._example([query, queries[closest]], [document, documents[closest]])

    def _queries(self, mask: np.ndarray) -> _Found:
        return self._found(np.flatnonzero(mask), lambda row: self._example([row]))

    def _documents(self, mask: np.ndarray) -> _Found:
        return self._found(np.flatnonzero(mask), lambda row: self._example((), [row]))

    def _found(self, rows: np.ndarray, example: Callable[[int], Example]) -> _Found:
        return _Found(len(rows), tuple(example(row) for row in rows[: self._limit]))

    def _example(self, queries: _Positions, documents: _Positions = ()) -> Example:
        return Example(
            self._ids(self._relevance.query_ids, queries), self._ids(self._relevance.document_ids, documents)
        )

    def _ids(self, ids: pa.Array, rows: _Positions) -> tuple[str, ...]:
        # An entry and what it contradicts are two, however few examples are asked for.
        return tuple(ids[row].as_py() for row in dict.fromkeys(map(int, rows[: max(2, self._limit)])))


def _noted(notes: BuildNotes, limit: int) -> dict[str, _Found]:
    found = {key: _Found(getattr(notes, key)) for key in _COUNTED_BY_BUILDERS}
    unknown = (Example((query_id,), (document_id,)) for query_id, document_id in notes.unknown_examples[:limit])
    return found | {"unknown_negatives": _Found(notes.unknown_negatives, tuple(unknown))}


def _isin_pairs(
    pairs: tuple[np.ndarray, np.ndarray], known: tuple[np.ndarray, np.ndarray], num_seconds: int
) -> np.ndarray:
    """Whether each pair of positions is one of the known pairs; seconds are below ``num_seconds``."""
    return np.isin(pairs[0] * num_seconds + pairs[1], known[0] * num_seconds + known[1])


def _histogram(lengths: np.ndarray) -> dict[int, int]:
    """How many queries have each length, by rising length."""
    values, counts = np.unique(lengths, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
