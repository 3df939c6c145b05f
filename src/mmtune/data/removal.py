"""Findings applied: documents, queries and negatives that are taken out, and near-copies that become one document."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from datasets import Dataset

from mmtune.arguments import shown
from mmtune.data.arrow import as_texts, column, positions
from mmtune.data.combining import merge_copies
from mmtune.data.findings import COPIES, Finding, count_entries
from mmtune.data.label_changes import CHANGES, label_changes, lists_before
from mmtune.data.relevance import Relevance
from mmtune.data.tables import Tables, check_tables
from mmtune.errors import ConfigError, DatasetError

_OF_DOCUMENTS = (
    "blank_pages",
    "damaged_pages",
    "damaged_recordings",
    "silent_sounds",
    "still_clips",
    "leaked_documents",
    "leaked_near_copies",
    "documents_without_image",
    "unreadable_images",
    "documents_without_text",
    "unreferenced_pages",
)
_OF_QUERIES = ("short_queries", "copied_queries", "leaked_queries", "incomplete_queries")
_OF_NEGATIVES = (
    "false_negatives",
    "relevant_negatives_by_id",
    "relevant_negatives_by_text",
    "relevant_negatives_by_bytes",
)
_REMEDIES = {
    "look_alikes": "Forms with other entries look alike and are no copies, so a person has to judge. Pass those that "
    "are copies as report['near_copies'].only([example, ...]).",
    "identical_pages": "Call deduplicate().",
}


def take_out(relevance: Relevance, findings: object) -> Tables:
    """The tables without what findings name; see ``RetrievalDataset.without``."""
    chosen = _require_findings(findings)
    documents, queries, entries = _Rows(relevance.document_ids, "document"), _Rows(relevance.query_ids, "query"), []
    unknown: list[tuple[str, str, float | None]] = []
    stays = np.arange(len(documents.ids))
    gone = np.zeros(len(stays), dtype=bool), np.zeros(len(queries.ids), dtype=bool)
    for finding in chosen:
        for example in finding.examples:
            if finding.key in COPIES:
                rows = documents.find(example.document_ids)
                _require_one_text_each(relevance, rows)
                _join(stays, rows)
            elif finding.key in _OF_DOCUMENTS:
                gone[0][documents.find(example.document_ids[:1])] = True
            elif finding.key in _OF_QUERIES:
                gone[1][queries.find(example.query_ids[:1])] = True
            else:
                entry = queries.find(example.query_ids[:1]), documents.find(example.document_ids[:1])
                entries.append([int(part[0]) for part in entry])
                if finding.key == "false_negatives":
                    unknown.append((example.query_ids[0], example.document_ids[0], getattr(finding, "score", None)))
    # A page that goes for itself takes nothing of its copies along: the first that is left stands for the others.
    left = np.flatnonzero(~gone[0])
    _, first, group = np.unique(stays[left], return_index=True, return_inverse=True)
    stays[left] = left[first[group]]
    stays[gone[0]] = np.flatnonzero(gone[0])
    changes = pa.concat_tables(
        [label_changes(relevance.tables.negatives), _unknown_labels(relevance.tables.negatives, unknown)]
    )
    return _apply(relevance, stays, gone, np.array(entries, dtype=np.int64).reshape(-1, 2), changes)


class _Rows:
    """The rows of a table by their ids."""

    def __init__(self, ids: pa.Array, what: str) -> None:
        self.ids, self._what = ids, what

    def find(self, wanted: Iterable[str]) -> np.ndarray:
        """The rows with these ids.

        Raises:
            DatasetError: There is none with one of them.
        """
        texts = as_texts(f"{self._what} id", wanted)
        rows = positions(texts, self.ids)
        if (rows < 0).any():
            raise DatasetError(
                f"A finding names the {self._what} {texts[int(np.argmin(rows))].as_py()!r}, which is not in this "
                "dataset. Pass findings of its own audit."
            )
        return rows


def _require_findings(findings: object) -> list[Finding]:
    """The findings as a list.

    Raises:
        ConfigError: They are something else, of a kind that is not taken out, or do not list all that they count.
    """
    if isinstance(findings, (str, bytes)) or not isinstance(findings, (Finding, Iterable)):
        raise _no_findings(findings)
    chosen = [findings] if isinstance(findings, Finding) else list(findings)
    for finding in chosen:
        if not isinstance(finding, Finding):
            raise _no_findings(finding)
        if finding.key not in (*COPIES, *_OF_DOCUMENTS, *_OF_QUERIES, *_OF_NEGATIVES):
            remedy = _REMEDIES.get(finding.key, "What it counts is good to know, or to repair in the rows.")
            raise ConfigError(f"without() takes out no {finding.key!r}: {finding.title}. {remedy}")
        if count_entries(finding.key, finding.examples) < finding.count:
            raise ConfigError(
                f"The finding {finding.key!r} lists {len(finding.examples)} of its {finding.count}. Pass one of "
                "audit(num_examples=None), which lists all, or finding.only(finding.examples)."
            )
    return chosen


def _no_findings(value: object) -> ConfigError:
    return ConfigError(
        f"findings={shown(value)}: expected a finding of an audit, or a list of them. Pass e.g. "
        "dataset.without(report['blank_pages'])."
    )


def _require_one_text_each(relevance: Relevance, rows: np.ndarray) -> None:
    """Make sure that joining these pages loses no text.

    Raises:
        DatasetError: One page image is several documents with texts of their own.
    """
    corpus = relevance.tables.corpus
    pages = relevance.page[rows]
    if "text" not in corpus.column_names or len(np.unique(pages)) == len(pages):
        return
    texts = column(corpus, "text").take(rows).to_pylist()
    if len(set(zip(pages.tolist(), texts, strict=True))) > len(np.unique(pages)):
        ids = relevance.document_ids.take(rows[:2]).to_pylist()
        raise DatasetError(
            f"The near-copies {', '.join(map(repr, ids))} ... are pages that are several documents with a text each; "
            "made one, they would lose texts. Leave the copies out of the rows before the dataset is built."
        )


def _join(stays: np.ndarray, rows: np.ndarray) -> None:
    """Let the first of some documents stand for all of them, and for those that they stand for; in place."""
    roots = np.unique(stays[rows])
    stays[np.isin(stays, roots)] = roots.min()


def _unknown_labels(negatives: Dataset | None, entries: Sequence[tuple[str, str, float | None]]) -> pa.Table:
    """False negatives as changes of labels: nobody knows what they are, so that nothing draws them as negatives."""
    before = {} if negatives is None or not entries else lists_before(negatives)
    rows = []
    for query, document, score in dict.fromkeys(entries):
        if document not in before.get(query, ()):
            raise DatasetError(
                f"A finding names {document!r} as a negative of the query {query!r}, whose list has no such document. "
                "Pass what find_false_negatives gives for this dataset."
            )
        rank = before[query].index(document)
        rows.append({"query_id": query, "document_id": document, "label": "unknown", "rank": rank, "score": score})
    return pa.Table.from_pylist(rows, schema=CHANGES)


def _apply(
    relevance: Relevance,
    stays: np.ndarray,
    gone: tuple[np.ndarray, np.ndarray],
    entries: np.ndarray,
    changes: pa.Table,
) -> Tables:
    """The tables after documents were joined, and documents, queries and negatives left out; with notes of it."""
    tables, num_documents = relevance.tables, len(stays)
    dropped = set(map(tuple, entries.tolist()))
    # A copy of an answer that was listed as a negative is an answer now.
    judged = set((relevance.judged_query * num_documents + stays[relevance.judged_document]).tolist())
    listed = relevance.listed_negatives
    moved = np.flatnonzero(stays[listed.values] != listed.values)
    codes = (listed.rows * num_documents + stays[listed.values])[moved]
    became = moved[np.isin(codes, np.array(sorted(judged), dtype=np.int64))]
    dropped |= set(zip(listed.rows[became].tolist(), listed.values[became].tolist(), strict=True))

    leaving = relevance.document_ids.take(np.flatnonzero(gone[0]))
    is_listed = np.array(
        [pair not in dropped for pair in zip(listed.rows.tolist(), listed.values.tolist(), strict=True)]
    )
    is_listed = is_listed.astype(bool) & ~gone[0][listed.values]
    queries = np.flatnonzero(~gone[1])
    changes = relevance.label_changes_within(queries, np.flatnonzero(~gone[0]), changes)
    merged = merge_copies(relevance, stays, is_listed=is_listed, changes=changes)

    remaining = relevance.query_ids.take(queries)
    qrels = merged.qrels
    is_left = (positions(column(qrels, "query_id"), remaining) >= 0) & (
        positions(column(qrels, "document_id"), leaving) < 0
    )
    negatives = merged.negatives
    if negatives is not None:
        negatives = negatives.select(np.flatnonzero(positions(column(negatives, "query_id"), remaining) >= 0))
    corpus = merged.corpus.select(np.flatnonzero(positions(column(merged.corpus, "document_id"), leaving) < 0))
    taken = _describe(relevance, np.flatnonzero(gone[0] | (stays != np.arange(num_documents))), gone[1], dropped)
    notes = replace(tables.notes, taken_out=(*tables.notes.taken_out, *taken))
    return check_tables(
        corpus, tables.queries.select(queries), qrels.select(np.flatnonzero(is_left)), negatives, notes=notes
    )


def _describe(
    relevance: Relevance, documents: np.ndarray, is_gone: np.ndarray, negatives: set[tuple[int, int]]
) -> list[tuple[str | None, str | None]]:
    """What went, for the notes: documents, then queries, then negatives."""
    document_ids, query_ids = relevance.document_ids, relevance.query_ids
    return [
        *((None, document_id) for document_id in document_ids.take(documents).to_pylist()),
        *((query_id, None) for query_id in query_ids.take(np.flatnonzero(is_gone)).to_pylist()),
        *((query_ids[query].as_py(), document_ids[document].as_py()) for query, document in sorted(negatives)),
    ]
