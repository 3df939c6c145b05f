"""Several datasets into one, and copies of a page into one document."""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from mmtune.data.arrow import IntLists, column, flat_lists, is_text, lists_of_rows, positions, table_dataset
from mmtune.data.identity import pdf_pages
from mmtune.data.label_changes import label_changes, lists_before, mapped, with_label_changes
from mmtune.data.neighbors import FILE_COLUMN, PAGE_COLUMN
from mmtune.data.pdfs import name_file
from mmtune.data.relevance import Relevance
from mmtune.data.tables import BuildNotes, Tables, check_tables, with_ids
from mmtune.errors import DatasetError


def concatenate_tables(parts: Mapping[str, Tables]) -> Tables:
    """The tables of all parts under each other; ids that stand in several parts are prefixed with the part's name.

    So is ``source``, where it names different files in several parts.

    Raises:
        DatasetError: There are no parts, or columns of one name have different types.
    """
    if not parts:
        raise DatasetError("There are no datasets to concatenate. Pass at least one.")
    names, tables = list(parts), list(parts.values())
    document_ids = _distinguish_ids([column(part.corpus, "document_id") for part in tables], names)
    query_ids = _distinguish_ids([column(part.queries, "query_id") for part in tables], names)
    sources = _distinguish_sources(tables, document_ids, names)
    corpora, queries, qrels, negatives = [], [], [], []
    for part, documents, asking, named in zip(tables, document_ids, query_ids, sources, strict=True):
        old_documents, old_asking = column(part.corpus, "document_id"), column(part.queries, "query_id")
        corpus = part.corpus if named is None else with_ids(part.corpus, FILE_COLUMN, named)
        corpora.append(with_ids(corpus, "document_id", documents))
        queries.append(with_ids(part.queries, "query_id", asking))
        judgements = {
            "query_id": asking.take(positions(column(part.qrels, "query_id"), old_asking)),
            "document_id": documents.take(positions(column(part.qrels, "document_id"), old_documents)),
            "score": column(part.qrels, "score"),
        }
        qrels.append(table_dataset(judgements))
        if part.negatives is not None:
            rows, items = flat_lists(column(part.negatives, "document_ids"))
            listed = documents.take(positions(items, old_documents))
            ids = {
                "query_id": asking.take(positions(column(part.negatives, "query_id"), old_asking)),
                "document_ids": lists_of_rows(rows, listed, len(part.negatives)),
            }
            changes = label_changes(part.negatives)
            asked = asking.take(positions(changes["query_id"].combine_chunks(), old_asking))
            changed = documents.take(positions(changes["document_id"].combine_chunks(), old_documents))
            changes = mapped(changes, query_id=asked, document_id=changed)
            negatives.append(with_label_changes(table_dataset(ids), changes))
    return check_tables(
        stack(corpora, "corpora"),
        stack(queries, "queries"),
        concatenate_datasets(qrels),
        concatenate_datasets(negatives) if negatives else None,
        notes=_add_notes([part.notes for part in tables]),
    )


def merge_copies(
    relevance: Relevance, page: np.ndarray, *, is_listed: np.ndarray | None = None, changes: pa.Table | None = None
) -> Tables:
    """The tables with one document for each page: the first of its copies. Qrels, negatives and label changes follow.

    Of several scores that copies of one page have for a query, the highest is kept. A changed label of a page that is
    relevant by another judgement than the judge's is no change any more: taking it back would take that judgement, too.

    Args:
        relevance: The judgements by position.
        page: For each document the position of the one that stays, e.g. ``relevance.page``.
        is_listed: Which of ``relevance.listed_negatives`` are kept; ``None`` keeps all.
        changes: The label changes, where there are others than those of the negatives.
    """
    tables, num_documents, scores = relevance.tables, len(page), relevance.judged_score
    pages = page[relevance.judged_document]
    best_first = np.argsort(-scores, kind="stable")
    _, first = np.unique((relevance.judged_query * num_documents + pages)[best_first], return_index=True)
    kept = np.sort(best_first[first])
    qrels = {
        "query_id": relevance.query_ids.take(relevance.judged_query[kept]),
        "document_id": relevance.document_ids.take(pages[kept]),
        "score": pa.array(scores[kept]),
    }
    negatives = tables.negatives
    if negatives is not None:
        changes = _merge_changes(relevance, page, label_changes(negatives) if changes is None else changes)
        negatives = _merge_negatives(relevance, page, negatives, is_listed, changes)
    corpus = tables.corpus.select(np.unique(page))
    return check_tables(corpus, tables.queries, table_dataset(qrels), negatives, notes=tables.notes)


def _merge_negatives(
    relevance: Relevance, page: np.ndarray, negatives: Dataset, is_listed: np.ndarray | None, changes: pa.Table
) -> Dataset:
    """The lists of the pages that stay, with these changes: each page once for a query, in a list or changed."""
    query_ids, document_ids, num_documents = relevance.query_ids, relevance.document_ids, len(page)
    changed_query = positions(changes["query_id"].combine_chunks(), query_ids)
    changed_page = positions(changes["document_id"].combine_chunks(), document_ids)

    listed = relevance.listed_negatives
    codes = listed.rows * num_documents + page[listed.values]
    codes = codes if is_listed is None else codes[is_listed]
    first = np.sort(np.unique(codes, return_index=True)[1])
    rows, pages = np.divmod(codes[first], num_documents)
    is_left = ~np.isin(codes[first], changed_query * num_documents + changed_page)
    left = IntLists.grouped(rows[is_left], pages[is_left], len(query_ids))
    merged = table_dataset({"query_id": query_ids, "document_ids": left.ids(document_ids)})
    if not len(changes):
        return merged

    # What is gone from a list no longer counts in the ranks of what was taken from it.
    stays = dict(zip(document_ids.to_pylist(), document_ids.take(page).to_pylist(), strict=True))
    before, changed = lists_before(negatives), changes.to_pylist()
    present = {query_id: set(ids) for query_id, ids in zip(query_ids.to_pylist(), merged["document_ids"], strict=True)}
    for change in changed:
        present[change["query_id"]].add(change["document_id"])
    for change in changed:
        # a copy that stands in for a document that went was in no list: it is behind them
        order = dict.fromkeys([*(stays[each] for each in before[change["query_id"]]), change["document_id"]])
        change["rank"] = [each for each in order if each in present[change["query_id"]]].index(change["document_id"])
    return with_label_changes(merged, pa.Table.from_pylist(changed, schema=changes.schema))


def _merge_changes(relevance: Relevance, page: np.ndarray, changes: pa.Table) -> pa.Table:
    """The changes of the pages that stay, one for a query and page, without those that are relevant all the same."""
    num_documents = len(page)
    queries = positions(changes["query_id"].combine_chunks(), relevance.query_ids)
    documents = positions(changes["document_id"].combine_chunks(), relevance.document_ids)
    became_relevant = pc.equal(changes["label"], "relevant").to_numpy()

    judged_query, judged_document = relevance.judged_query, relevance.judged_document
    added = (queries * num_documents + documents)[became_relevant]
    is_own = ~np.isin(judged_query * num_documents + judged_document, added)
    own = (relevance.text[judged_query] * num_documents + page[judged_document])[is_own]

    # Of a page that is relevant under one id and unknown under another, the judgement has to go with the change.
    order = np.lexsort((changes["rank"].to_numpy(), ~became_relevant))
    kept = order[np.sort(np.unique((queries * num_documents + page[documents])[order], return_index=True)[1])]
    kept = kept[~np.isin(relevance.text[queries[kept]] * num_documents + page[documents[kept]], own)]
    ids = relevance.document_ids.take(page[documents[kept]])
    return mapped(changes.take(pa.array(kept)), document_id=ids)


def _distinguish_ids(ids: list[pa.Array], names: list[str]) -> list[pa.Array]:
    """The ids of each part; those that another part has too with the part's name before them."""
    everything = pc.value_counts(pa.concat_arrays(ids))
    clashing = everything.field("values").filter(pc.greater(everything.field("counts"), 1))
    return [_with_prefix(part, clashing, name) for name, part in zip(names, ids, strict=True)]


def _distinguish_sources(tables: list[Tables], document_ids: list[pa.Array], names: list[str]) -> list[pa.Array | None]:
    """The files of each part; the part's name before those that name another file elsewhere. ``None``: as it is.

    A PDF is known by its content. Of other pages those whose ids are prefixed are taken for pages of another file.
    """
    sources = [_sources_of(part.corpus) for part in tables]
    files: defaultdict[str, set[Hashable]] = defaultdict(set)
    for part, ids, name, named in zip(tables, document_ids, names, sources, strict=True):
        if named is None:
            continue
        of_pdfs = pdf_pages(part.corpus)
        is_prefixed = pc.not_equal(ids, column(part.corpus, "document_id")).to_pylist()
        for row, source in enumerate(named.to_pylist()):
            if row in of_pdfs:
                files[source].add(name_file(of_pdfs[row]))
            elif is_prefixed[row]:
                files[source].add(name)
    clashing = pa.array([source for source, known in files.items() if source and len(known) > 1], pa.string())
    if not len(clashing):
        return [None] * len(tables)
    return [
        named if named is None else _with_prefix(named, clashing, name)
        for name, named in zip(names, sources, strict=True)
    ]


def _with_prefix(values: pa.Array, clashing: pa.Array, name: str) -> pa.Array:
    return pc.if_else(pc.is_in(values, value_set=clashing), pc.binary_join_element_wise(name, values, "/"), values)


def _sources_of(corpus: Dataset) -> pa.Array | None:
    """The names of the files that the documents are pages of; ``None`` where they are of none."""
    if not {FILE_COLUMN, PAGE_COLUMN} <= set(corpus.column_names):
        return None
    sources = column(corpus, FILE_COLUMN)
    return sources.cast(pa.string()) if is_text(sources.type) else None


def stack(parts: list[Dataset], what: str) -> Dataset:
    """Tables under each other; a column that one of them lacks is null there.

    Raises:
        DatasetError: Columns of one name have different types.
    """
    try:
        return concatenate_datasets(parts)
    except (ValueError, pa.ArrowInvalid) as error:
        columns = " and ".join(str({name: str(kind) for name, kind in part.features.items()}) for part in parts[:2])
        raise DatasetError(
            f"The {what} have columns of one name and different types: {columns}. Cast or remove those that differ."
        ) from error


def _add_notes(notes: list[BuildNotes]) -> BuildNotes:
    """Counts added up, names joined, examples up to ten, and row numbers as ids where any part has them."""
    values: dict[str, Any] = {}
    for field in fields(BuildNotes):
        parts = [getattr(note, field.name) for note in notes]
        if isinstance(parts[0], tuple):
            values[field.name] = sum(parts, ())[: 10 if field.name == "unknown_examples" else None]
        else:
            values[field.name] = any(parts) if isinstance(parts[0], bool) else sum(parts)
    return BuildNotes(**values)


def undo_label_changes(tables: Tables) -> Tables:
    """The tables as they were before negatives were judged; see ``RetrievalDataset.undo_label_changes``."""
    changes = label_changes(tables.negatives)
    if tables.negatives is None or not len(changes):
        return tables
    found = changes.filter(pc.equal(changes["label"], "relevant"))
    added = set(zip(found["query_id"].to_pylist(), found["document_id"].to_pylist(), strict=True))
    judged = zip(tables.qrels["query_id"][:], tables.qrels["document_id"][:], strict=True)
    lists = lists_before(tables.negatives)
    return check_tables(
        tables.corpus,
        tables.queries,
        tables.qrels.select([row for row, pair in enumerate(judged) if pair not in added]),
        table_dataset(
            {"query_id": pa.array(list(lists)), "document_ids": pa.array(list(lists.values()), pa.list_(pa.string()))}
        ),
        notes=tables.notes,
    )
