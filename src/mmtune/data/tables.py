"""The four tables behind a ``RetrievalDataset``: their columns, and the checks every builder ends in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value

from mmtune.arguments import listed, nearest_name
from mmtune.data.arrow import (
    as_id_strings,
    column,
    flat_lists,
    id_column,
    is_lists,
    is_text,
    lists_of_rows,
    media_columns,
    positions,
    table_dataset,
    with_columns,
    with_encoded_images,
)
from mmtune.data.label_changes import label_changes, with_label_changes
from mmtune.errors import DatasetError, MissingDocumentError
from mmtune.host import stored_positions

_LARGEST_SCORE = 2.0**31
ASKING = ("image", "audio")
"""Columns of the queries that ask beside a text, or without one."""


@dataclass(frozen=True)
class DroppedQuery:
    """A query that was written for a page and left out, or a call for one that failed.

    Attributes:
        document_id: The page.
        text: The query; empty where a call failed.
        reason: Why.
    """

    document_id: str
    text: str
    reason: str


@dataclass(frozen=True)
class BuildNotes:
    """What a builder met and left out, so that nothing is dropped without a trace.

    Attributes:
        blank_queries: Rows whose query is null or blank; they serve as documents only.
        null_documents: Rows whose image is null, so that their query has no document.
        null_negatives: Null entries among the negatives.
        unknown_negatives: Negative ids that no document has, dropped with ``on_missing="drop"``.
        unknown_examples: Up to ten of these, as (query id, negative id).
        queries_without_document: Queries left out because nothing is relevant to them.
        judged_not_relevant: Judgements with a score of 0 or less; they are no judgements here.
        held_out_negatives: Entries taken out of lists of negatives because ``split`` keeps them for evaluation.
        unreadable_sources: Files and pages of PDFs that can't be read, as (name, reason).
        neighbors_left_out: Pages beside a relevant one in its file that mining ranked high and left out.
        taken_out: What ``RetrievalDataset.without`` took out, as (query id, document id): of a negative both, else the
            other is ``None``.
        ids_are_row_numbers: The builder made up the ids from row numbers, so that they mean nothing elsewhere.
        dropped_queries: What ``generate_queries`` left out.
    """

    blank_queries: int = 0
    null_documents: int = 0
    null_negatives: int = 0
    unknown_negatives: int = 0
    unknown_examples: tuple[tuple[str, str], ...] = ()
    queries_without_document: int = 0
    judged_not_relevant: int = 0
    held_out_negatives: int = 0
    unreadable_sources: tuple[tuple[str, str], ...] = ()
    neighbors_left_out: int = 0
    taken_out: tuple[tuple[str | None, str | None], ...] = ()
    ids_are_row_numbers: bool = False
    dropped_queries: tuple[DroppedQuery, ...] = ()


@dataclass(frozen=True)
class Tables:
    """Four checked tables; see ``RetrievalDataset`` for their columns."""

    corpus: Dataset
    queries: Dataset
    qrels: Dataset
    negatives: Dataset | None
    notes: BuildNotes = BuildNotes()


def check_tables(
    corpus: Dataset,
    queries: Dataset,
    qrels: Dataset,
    negatives: Dataset | None = None,
    *,
    notes: BuildNotes | None = None,
) -> Tables:
    """The four tables with ids as strings and images encoded, or an error that names what does not fit.

    Queries to which nothing is relevant are left out and counted in the notes. There may be none from the beginning:
    pages that nobody asked about yet.

    Raises:
        DatasetError: A column is missing or of the wrong type, an id stands twice, or no query is left of some.
        MissingDocumentError: A judgement or a negative refers to a document that is not there.
    """
    for what, table in {"corpus": corpus, "queries": queries, "qrels": qrels, "negatives": negatives}.items():
        if not isinstance(table, Dataset) and not (what == "negatives" and table is None):
            raise DatasetError(
                f"Expected a datasets.Dataset, got {type(table).__name__}, for {what}. {advise_on(table)}"
            )
    corpus = _check_corpus(corpus)
    queries = _check_queries(queries)
    qrels = _check_qrels(qrels, corpus, queries)
    if negatives is not None:
        negatives = _check_negatives(negatives, corpus, queries)
    tables = Tables(corpus, queries, qrels, negatives, notes or BuildNotes())
    judged = positions(column(qrels, "query_id"), column(queries, "query_id"))
    is_judged = np.isin(np.arange(len(queries)), judged)
    if not is_judged.all():
        tables = _select_queries(tables, np.flatnonzero(is_judged))
    if not len(tables.queries) and (len(queries) or tables.notes.queries_without_document):
        raise DatasetError(
            f"No query is left: {len(queries)} queries, {len(qrels)} relevance judgements, {len(corpus)} documents. "
            "At least one query needs a relevant document. Check the query column for null or blank texts."
        )
    return tables


def advise_on(value: object) -> str:
    """How a table is made of a value that is none; for messages."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, (str, os.PathLike)):
        return f"For a path call RetrievalDataset.load({os.fspath(value)!r:.80})."
    if package in ("pandas", "polars"):
        return f"Pass datasets.Dataset.from_{package}(frame)."
    maker = "from_list(rows)" if isinstance(value, (list, tuple)) else "from_dict(columns)"
    return f"Build one, e.g. with datasets.Dataset.{maker}."


def require_finite(scores: pa.Array) -> None:
    """Make sure that scores are numbers that a judgement can have.

    Raises:
        DatasetError: One is infinite, not a number, or beyond any grade.
    """
    values = pc.fill_null(scores, 0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(~(np.abs(values.astype(np.float64)) < _LARGEST_SCORE))
    if len(wrong):
        row = int(wrong[0])
        raise DatasetError(
            f"{len(wrong)} scores of the qrels are no grades, e.g. {values[row]} in row {row}. Expected whole numbers "
            "such as 1, 2, 3; leave out what was not judged."
        )


def require_columns(dataset: Dataset, names: Sequence[str], what: str) -> None:
    """Make sure that the columns are there.

    Raises:
        DatasetError: A column is missing; the message lists those found.
    """
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        alike = nearest_name(missing[0], dataset.column_names, cutoff=0.6)
        hint = f" Did you mean {alike!r}?" if alike else ""
        raise DatasetError(
            f"{what} has no column {missing[0]!r}; it has {dataset.column_names}. "
            f"Expected: {listed(names)}. Rename a column, or name it in the call.{hint}"
        )


def require_unique(
    ids: pa.Array,
    what: str,
    where: str = "",
    advice: str = "Each id names one row: drop the repeated rows, or give them ids of their own.",
) -> None:
    """Make sure that no id stands twice.

    Raises:
        DatasetError: One does; the message names it and its rows.
    """
    codes = ids.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    repeated = np.flatnonzero(np.bincount(codes) > 1)
    if len(repeated):
        rows = np.flatnonzero(codes == repeated[0]).tolist()
        raise DatasetError(
            f"The {what} {ids[rows[0]].as_py()!r} stands in {len(rows)} rows ({', '.join(map(str, rows[:5]))}){where}. "
            f"{advice}"
        )


def text_column(dataset: Dataset, name: str) -> pa.Array:
    """A column of texts in the order of the rows.

    Raises:
        DatasetError: The column holds something else.
    """
    values = column(dataset, name)
    if not (is_text(values.type) or pa.types.is_null(values.type)):
        raise DatasetError(
            f"Column {name!r} holds {values.type}, expected text. It is among {dataset.column_names}; "
            "name another column, or cast this one to string."
        )
    return values.cast(pa.string())


def id_lists(dataset: Dataset, name: str) -> tuple[np.ndarray, pa.Array]:
    """A column of lists of ids taken apart: the row of each id (int64, rising) and the ids, nulls among them.

    Raises:
        DatasetError: The column holds something else.
    """
    values = column(dataset, name)
    if not is_lists(values.type):
        raise DatasetError(
            f"Column {name!r} holds {values.type}, expected lists of ids. It is among {dataset.column_names}; "
            "name another column, or turn its values into lists, e.g. rows.map(lambda row: "
            f"{{{name!r}: row[{name!r}].split(',') if row[{name!r}] else []}})."
        )
    rows, items = flat_lists(values)
    return rows, as_id_strings(items, name)


def is_blank(texts: pa.Array) -> np.ndarray:
    """Which texts are null, empty or white space."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy(zero_copy_only=False)


def has_content(table: Dataset, name: str) -> np.ndarray:
    """Which rows have something in a column of texts, or of what is encoded: other than null, and no blank text.

    Args:
        table: Documents or queries.
        name: ``"text"``, or a column of ``bytes`` and ``path``; one that is not there holds nothing.
    """
    if name not in table.column_names:
        return np.zeros(len(table), dtype=bool)
    stored = table.data.table.column(name)
    if not pa.types.is_struct(stored.type):
        return ~is_blank(text_column(table, name))
    empty = pc.and_(pc.is_null(pc.struct_field(stored, "bytes")), pc.is_null(pc.struct_field(stored, "path")))
    order = stored_positions(table)
    return ~empty.to_numpy() if order is None else ~empty.to_numpy()[order]


def has_file(table: Dataset) -> np.ndarray:
    """Which rows have an image, a sound or a clip."""
    has = [has_content(table, name) for name in media_columns(table.column_names)]
    return np.any([np.zeros(len(table), dtype=bool), *has], axis=0)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds integers or floats."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _select_queries(tables: Tables, rows: np.ndarray) -> Tables:
    """Some of the queries, with their judgements and negatives, the others counted; the corpus stays."""
    queries = tables.queries.select(rows)
    ids = column(queries, "query_id")
    negatives = tables.negatives
    if negatives is not None:
        negatives = negatives.select(np.flatnonzero(positions(column(negatives, "query_id"), ids) >= 0))
    notes = replace(tables.notes, queries_without_document=len(tables.queries) - len(rows))
    return replace(tables, queries=queries, negatives=negatives, notes=notes)


def _check_corpus(corpus: Dataset) -> Dataset:
    require_columns(corpus, ("document_id",), "The corpus")
    media = media_columns(corpus.column_names)
    if not media and "text" not in corpus.column_names:
        raise DatasetError(
            f"The corpus has neither an 'image' nor a 'text' column; it has {corpus.column_names}. "
            "A document is an image of a page, a text, a sound ('audio'), a clip ('video'), or several of these."
        )
    if not len(corpus):
        raise DatasetError("The corpus has zero rows. At least one document is needed.")
    corpus = _with_unique_ids(corpus, "document")
    for name in media:
        corpus = with_encoded_images(corpus, name, name)
    return corpus


def _check_queries(queries: Dataset) -> Dataset:
    parts = query_parts(queries)
    require_columns(queries, ("query_id", "text") if parts == ["text"] else ("query_id",), "The table of queries")
    queries = _with_unique_ids(queries, "query")
    for name in parts[1:]:
        queries = with_encoded_images(queries, name, name)
    texts = text_column(queries, "text") if "text" in queries.column_names else pa.nulls(len(queries), pa.string())
    if "text" not in queries.column_names:
        queries = with_columns(queries, {"text": texts})
    elif pa.types.is_null(queries.data.table.schema.field("text").type):
        queries = with_ids(queries, "text", texts)
    blank = np.flatnonzero(~np.any([has_content(queries, name) for name in parts], axis=0))
    if len(blank):
        query_id = column(queries, "query_id")[int(blank[0])].as_py()
        others = "".join(f" and no {name}" for name in parts if name != "text")
        raise DatasetError(
            f"Query {query_id!r} has no text (null or blank){others}. Give it one, or leave the query out of the table."
        )
    return queries


def query_parts(queries: Dataset) -> list[str]:
    """What the queries of a table are made of: ``"text"``, and each other column that may ask beside it or alone."""
    return ["text", *(name for name in ASKING if name in queries.column_names)]


def _check_qrels(qrels: Dataset, corpus: Dataset, queries: Dataset) -> Dataset:
    require_columns(qrels, ("query_id", "document_id", "score"), "The table of relevance judgements (qrels)")
    query_ids, document_ids = id_column(qrels, "query_id"), id_column(qrels, "document_id")
    _require_known(query_ids, column(queries, "query_id"), "relevance judgements", "queries")
    _require_known(document_ids, column(corpus, "document_id"), "relevance judgements", "corpus", query_ids)
    scores = column(qrels, "score")
    if not is_number(scores.type):
        raise DatasetError(f"The scores of the qrels are {scores.type}, expected integers of 1 and above.")
    values = pc.fill_null(scores, 0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(~((values >= 1) & (values == np.floor(values)) & (values < _LARGEST_SCORE)))
    if len(wrong):
        row = int(wrong[0])
        raise DatasetError(
            f"{len(wrong)} scores of the qrels are no integers of 1 and above, e.g. {values[row]} for query "
            f"{query_ids[row].as_py()!r}, document {document_ids[row].as_py()!r}. Leave judgements of 0 out."
        )

    # The same judgement again is left out; another one for the same pair is an error.
    codes = [ids.dictionary_encode().indices.to_numpy(zero_copy_only=False) for ids in (query_ids, document_ids)]
    pairs = codes[0].astype(np.int64) * len(document_ids) + codes[1]
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    differing = np.flatnonzero(values != values[first][inverse])
    if len(differing):
        row = int(differing[0])
        raise DatasetError(
            f"Query {query_ids[row].as_py()!r} and document {document_ids[row].as_py()!r} are judged twice, with the "
            f"scores {int(values[first[inverse[row]]])} and {int(values[row])}. Keep one of the judgements."
        )
    judgements = {"query_id": query_ids, "document_id": document_ids, "score": pa.array(values.astype(np.int64))}
    return table_dataset({name: part.take(np.sort(first)) for name, part in judgements.items()})


def _check_negatives(negatives: Dataset, corpus: Dataset, queries: Dataset) -> Dataset:
    require_columns(negatives, ("query_id", "document_ids"), "The table of negatives")
    query_ids = id_column(negatives, "query_id")
    _require_known(query_ids, column(queries, "query_id"), "rows of negatives", "queries")
    require_unique(query_ids, "query (in the table of negatives) id")
    rows, items = id_lists(negatives, "document_ids")
    _require_known(items, column(corpus, "document_id"), "negatives", "corpus", query_ids.take(rows))
    checked = table_dataset({"query_id": query_ids, "document_ids": lists_of_rows(rows, items, len(query_ids))})
    changes = label_changes(negatives)
    _require_known(changes["document_id"].combine_chunks(), column(corpus, "document_id"), "label changes", "corpus")
    return with_label_changes(checked, changes)


def _with_unique_ids(table: Dataset, what: str) -> Dataset:
    name = f"{what}_id"
    table = table.with_format(None)
    ids = id_column(table, name)
    require_unique(ids, f"{what} id")
    return table if table.features[name] == Value("string") else with_ids(table, name, ids)


def with_ids(table: Dataset, name: str, ids: pa.Array) -> Dataset:
    """The table with other ids in a column that it has."""
    others = table.remove_columns([name])
    return with_columns(others, {name: ids}) if others.column_names else table_dataset({name: ids})


def _require_known(values: pa.Array, keys: pa.Array, what: str, where: str, query_ids: pa.Array | None = None) -> None:
    missing = np.flatnonzero(positions(values, keys) < 0)
    if not len(missing):
        return
    examples = [
        f"{values[int(row)].as_py()!r}" + (f" (query {query_ids[int(row)].as_py()!r})" if query_ids else "")
        for row in missing[:3]
    ]
    raise MissingDocumentError(
        f"{len(missing)} {what} point to ids that are not in the {where}, e.g. {', '.join(examples)}. "
        f"Every id must be that of a row of the {where}. Fix the ids, or drop these rows."
    )
