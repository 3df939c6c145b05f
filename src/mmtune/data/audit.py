"""What may be wrong with a dataset: counted, with examples by id, before it is trained on. No image is decoded."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtune.data.arrow import column
from mmtune.data.encoded import EncodedImages
from mmtune.data.relevance import Relevance
from mmtune.data.tables import BuildNotes, Tables, is_blank

_LINE_WIDTH = 120
_ID_WIDTH = 24


class _Kind(NamedTuple):
    """One kind of finding: its key, whether it is a problem, what is counted, and what it means."""

    key: str
    is_problem: bool
    title: str
    meaning: str


_KINDS = (
    _Kind(
        "relevant_negatives_by_id",
        True,
        "negatives that are relevant to their own query",
        "Judgement and list contradict each other. They are not used as negatives; others take their place.",
    ),
    _Kind(
        "relevant_negatives_by_text",
        True,
        "negatives relevant to the same text under another query id",
        "The page answers the same words elsewhere. They are not used as negatives; others take their place.",
    ),
    _Kind(
        "relevant_negatives_by_bytes",
        True,
        "negatives that are a byte-identical copy of a relevant page",
        "The same page under another id. They are not used as negatives; others take their place.",
    ),
    _Kind(
        "unknown_negatives",
        True,
        "negative ids that no document has",
        'Dropped, as on_missing="drop" says. Often rows were filtered out before the dataset was built.',
    ),
    _Kind(
        "queries_without_negatives",
        True,
        "queries without a usable negative",
        "Their rows get random pages, are left out or raise an error, as on_short says.",
    ),
    _Kind(
        "differing_judgements",
        True,
        "query texts with different judgements under different ids",
        "Training takes the pages of all ids as relevant; evaluation counts those of the other ids as wrong.",
    ),
    _Kind(
        "unjudged_copies",
        True,
        "copies of a relevant page that are not judged themselves",
        "Training knows them by their bytes; evaluation counts them as wrong. deduplicate() makes them one page.",
    ),
    _Kind(
        "documents_without_image",
        True,
        "documents without an image, where the corpus has images",
        "Reading one as an image raises an error that names it. Leave them out, or read their text.",
    ),
    _Kind(
        "unreadable_images",
        True,
        "images that are empty, or whose file is missing",
        "Reading one raises an error that names it. Restore the files, or leave the documents out.",
    ),
    _Kind(
        "documents_without_text",
        True,
        "documents with a null or blank text, and no image",
        "There is nothing to embed, and reading a null raises an error. Leave them out.",
    ),
    _Kind(
        "short_negative_lists",
        False,
        "queries with fewer usable negatives than most have",
        "Filled with random pages, left out or refused when rows are made, as on_short says.",
    ),
    _Kind(
        "repeated_negatives",
        False,
        "negatives listed again for a query, by id or by bytes",
        "A page is used once a row, so that the list is shorter than it looks.",
    ),
    _Kind("null_negatives", False, "null negatives", "Left out of the lists."),
    _Kind(
        "held_out_negatives",
        False,
        "negatives taken out because they answer in evaluation",
        "split() keeps them off the training side, also as negatives.",
    ),
    _Kind("blank_queries", False, "rows with a null or blank query", "They are documents only, or left out."),
    _Kind("null_documents", False, "rows with a null image", "They are no documents, and their queries are left out."),
    _Kind(
        "queries_without_document",
        False,
        "queries to which nothing is relevant",
        "Left out of training and of evaluation.",
    ),
    _Kind(
        "judged_not_relevant",
        False,
        "judgements with a score of 0 or less",
        "They are no judgements here: what is not listed is not relevant.",
    ),
    _Kind(
        "identical_pages",
        False,
        "documents that are a byte-identical copy of another one",
        "They count as one page in batches and negatives. deduplicate() makes them one document.",
    ),
    _Kind(
        "repeated_texts",
        False,
        "query texts that stand under several query ids",
        "Two of them never share a batch, and what is relevant to one is no negative of the other.",
    ),
    _Kind(
        "unreferenced_pages",
        False,
        "pages that are neither relevant to a query nor a negative",
        "Random negatives are drawn from them too, and evaluation ranks them with the others.",
    ),
)
"""Every kind, problems first, in the order of the report."""

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


@dataclass(frozen=True)
class Example:
    """Where a finding shows.

    Attributes:
        query_ids: The query it is about first; further ids have the same text.
        document_ids: The document it is about first; further ids have the same bytes.
    """

    query_ids: tuple[str, ...] = ()
    document_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [("query", "queries", self.query_ids), ("document", "documents", self.document_ids)]
        return ", ".join(
            f"{one if len(ids) == 1 else many} {', '.join(map(_short_id, ids))}" for one, many, ids in parts if ids
        )


@dataclass(frozen=True)
class Finding:
    """One kind of thing that an audit looks for.

    Attributes:
        key: Its name, which stays the same between versions.
        count: How often it was found; what is counted, ``title`` says.
        is_problem: Whether it can hurt training or scores, rather than being good to know.
        title: What is counted, in a few words.
        meaning: What it means, and what is done about it.
        examples: The first ones in the order of the tables; none where only a count was kept.
    """

    key: str
    count: int
    is_problem: bool
    title: str
    meaning: str
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, repr=False)
class AuditReport:
    """What an audit found. ``print(report)`` shows it on one screen.

    Attributes:
        tables: The number of ``documents``, ``queries``, ``judgements``, and listed ``negatives``.
        negatives_per_query: How many queries have how many usable negatives, by rising number: those that are not
            relevant, each page once. Empty for a dataset without a table of negatives.
        findings: Every kind of finding, also those with a count of 0; problems first.

    Example:
        >>> from mmtune import RetrievalDataset
        >>> from mmtune.testing import generated_pages
        >>> report = RetrievalDataset.from_id_rows(generated_pages(20)).audit()
        >>> report.problems, report["blank_queries"].count, report.negatives_per_query
        ((), 4, {4: 20})
    """

    tables: Mapping[str, int]
    negatives_per_query: Mapping[int, int]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that can hurt training or scores, and were found."""
        return tuple(finding for finding in self.findings if finding.is_problem and finding.count)

    @property
    def counts(self) -> dict[str, int]:
        """The count of every finding by its key, zeros included."""
        return {finding.key: finding.count for finding in self.findings}

    def __getitem__(self, key: str) -> Finding:
        for finding in self.findings:
            if finding.key == key:
                return finding
        raise KeyError(f"{key!r} is no finding. Known are: {', '.join(self.counts)}")

    def to_dict(self) -> dict[str, Any]:
        """The report in values that JSON has; the numbers in ``negatives_per_query`` become strings."""
        return {
            "tables": dict(self.tables),
            "negatives_per_query": {str(length): queries for length, queries in self.negatives_per_query.items()},
            "findings": [_plain(finding) for finding in self.findings],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict()`` as JSON to a file, replacing what is there."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")

    def __str__(self) -> str:
        sizes = self.tables
        known = [finding for finding in self.findings if finding.count and not finding.is_problem]
        lines = [
            "Audit",
            f"  corpus     {sizes['documents']:,} documents",
            f"  queries    {sizes['queries']:,}",
            f"  qrels      {sizes['judgements']:,} judgements",
            f"  negatives  {self._describe_negatives()}",
            "",
            "Problems" if self.problems else "No problem was found." if known else "Nothing was found.",
            *(line for finding in self.problems for line in (_line(finding), f"{'':11}{finding.meaning}")),
        ]
        if known:
            lines += ["", "Good to know", *map(_line, known)]
        return "\n".join(_cut(line, _LINE_WIDTH) for line in lines)

    __repr__ = __str__

    def _describe_negatives(self) -> str:
        lengths = self.negatives_per_query
        if not lengths:
            return "none"
        listed = f"{self.tables['negatives']:,} listed"
        if len(lengths) <= 5:
            each = ", ".join(f"{length} for {queries:,}" for length, queries in lengths.items())
            return f"{listed}; usable a query: {each}"
        usual = _most_common(lengths)
        return (
            f"{listed}; usable a query: {min(lengths)} to {max(lengths)}, most often {usual} (for {lengths[usual]:,})"
        )


def audit(tables: Tables, relevance: Relevance, *, num_examples: int = 5) -> AuditReport:
    """What is odd about a dataset; see ``RetrievalDataset.audit``.

    Args:
        tables: The data.
        relevance: Its judgements.
        num_examples: Examples a finding, and ids an example, at most.
    """
    examiner = _Examiner(tables, relevance, num_examples)
    listed = examiner.listed_negatives()
    usable = listed.usable(relevance) if tables.negatives is not None else np.array([], dtype=np.int64)
    per_query = {int(length): int(queries) for length, queries in zip(*np.unique(usable, return_counts=True))}
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
            Finding(kind.key, found[kind.key].count, kind.is_problem, kind.title, kind.meaning, found[kind.key].examples)
            for kind in _KINDS
        ),
    )


@dataclass(frozen=True)
class _Found:
    count: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class _Listed:
    """The entries of all lists of negatives, end to end: positions, and whether the entry is relevant to the query."""

    queries: np.ndarray
    documents: np.ndarray
    is_relevant: np.ndarray

    def page_keys(self, relevance: Relevance) -> np.ndarray:
        """A number for the query and the page of each entry."""
        return self.queries * len(relevance.page) + relevance.page[self.documents]

    def usable(self, relevance: Relevance) -> np.ndarray:
        """How many different pages that are not relevant each query lists."""
        keys = np.unique(self.page_keys(relevance)[~self.is_relevant])
        return np.bincount(keys // len(relevance.page), minlength=len(relevance.query_ids))


class _Examiner:
    """Looks for each kind of finding; positions inside, ids in the examples."""

    def __init__(self, tables: Tables, relevance: Relevance, limit: int) -> None:
        self._tables = tables
        self._relevance = relevance
        self._limit = limit

    def listed_negatives(self) -> _Listed:
        listed = self._relevance.listed_negatives
        rows = listed.rows
        return _Listed(rows, listed.values, self._relevance.is_relevant(rows, listed.values))

    def relevant_negatives(self, listed: _Listed) -> dict[str, _Found]:
        """Each relevant entry in one of three kinds: by id, else by text, else by bytes."""
        relevance, num_documents = self._relevance, len(self._relevance.document_ids)
        at = np.flatnonzero(listed.is_relevant)
        queries, documents = listed.queries[at], listed.documents[at]
        judged, judged_text = relevance.judged_query, relevance.text[relevance.judged_query]
        by_id = _isin_pairs(queries, documents, judged, relevance.judged_document, num_documents)
        by_text = _isin_pairs(
            relevance.text[queries], documents, judged_text, relevance.judged_document, num_documents
        )
        kinds = {"by_id": by_id, "by_text": by_text & ~by_id, "by_bytes": ~by_text}
        return {
            f"relevant_negatives_{how}": self._found(
                np.flatnonzero(mask), lambda row: self._contradiction(queries[row], documents[row])
            )
            for how, mask in kinds.items()
        }

    def lists(self, listed: _Listed, usable: np.ndarray, per_query: Mapping[int, int]) -> dict[str, _Found]:
        usual = _most_common(per_query) if per_query else 0
        again = self._repeated(listed)
        return {
            "queries_without_negatives": self._found(np.flatnonzero(usable == 0), lambda row: self._example([row])),
            "short_negative_lists": self._found(np.flatnonzero(usable < usual), lambda row: self._example([row])),
            "repeated_negatives": self._found(
                again, lambda row: self._example([listed.queries[row]], [listed.documents[row]])
            ),
        }

    def texts(self) -> dict[str, _Found]:
        text = self._relevance.text
        return {
            key: self._found(texts, lambda number: self._example(np.flatnonzero(text == number)))
            for key, texts in {
                "repeated_texts": np.flatnonzero(np.bincount(text) > 1),
                "differing_judgements": self._texts_judged_differently(),
            }.items()
        }

    def pages(self, listed: _Listed) -> dict[str, _Found]:
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

    def _repeated(self, listed: _Listed) -> np.ndarray:
        """The entries whose page stands earlier in the same list."""
        keys = listed.page_keys(self._relevance)
        first = np.unique(keys, return_index=True)[1]
        is_again = np.ones(len(keys), dtype=bool)
        is_again[first] = False
        return np.flatnonzero(is_again)

    def _texts_judged_differently(self) -> np.ndarray:
        """The texts whose queries do not all have the same judgements, as pairs of page and score."""
        relevance = self._relevance
        scores = column(self._tables.qrels, "score").to_numpy(zero_copy_only=False)
        levels, level = np.unique(scores, return_inverse=True)
        judgement = relevance.page[relevance.judged_document] * len(levels) + level
        num_judgements = len(relevance.page) * len(levels)
        query, judgement = np.divmod(np.unique(relevance.judged_query * num_judgements + judgement), num_judgements)
        keys, queries = np.unique(relevance.text[query] * num_judgements + judgement, return_counts=True)
        text = keys // num_judgements
        return np.unique(text[queries != np.bincount(relevance.text)[text]])

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
        return self._example([query], [document, copies[0]])

    def _contradiction(self, query: int, document: int) -> Example:
        """The entry, and the judgement that makes it relevant where its ids differ."""
        relevance = self._relevance
        same_text = relevance.text[relevance.judged_query] == relevance.text[query]
        same_page = relevance.page[relevance.judged_document] == relevance.page[document]
        rows = np.flatnonzero(same_text & same_page)
        queries, documents = relevance.judged_query[rows], relevance.judged_document[rows]
        closest = np.lexsort((queries != query, documents != document))[0]
        return self._example([query, queries[closest]], [document, documents[closest]])

    def _documents(self, mask: np.ndarray) -> _Found:
        return self._found(np.flatnonzero(mask), lambda row: self._example((), [row]))

    def _found(self, rows: np.ndarray, example: Any) -> _Found:
        return _Found(len(rows), tuple(example(row) for row in rows[: self._limit]))

    def _example(self, queries: Iterable[int], documents: Iterable[int] = ()) -> Example:
        return Example(self._ids(self._relevance.query_ids, queries), self._ids(self._relevance.document_ids, documents))

    def _ids(self, ids: Any, rows: Iterable[int]) -> tuple[str, ...]:
        return tuple(ids[row].as_py() for row in list(dict.fromkeys(map(int, rows)))[: max(2, self._limit)])
