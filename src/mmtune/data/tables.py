"""The four tables behind a ``RetrievalDataset``: their columns, and the checks every builder ends in."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value

from mmtune.data.arrow import (
    as_id_strings,
    column,
    first_repeated,
    flat_lists,
    id_column,
    is_lists,
    is_text,
    lists,
    positions,
    table_dataset,
    with_columns,
    with_encoded_images,
)
from mmtune.errors import DatasetError, MissingDocumentError


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
        ids_are_row_numbers: The builder made up the ids from row numbers, so that they mean nothing elsewhere.
    """

    blank_queries: int = 0
    null_documents: int = 0
    null_negatives: int = 0
    unknown_negatives: int = 0
    unknown_examples: tuple[tuple[str, str], ...] = ()
    queries_without_document: int = 0
    judged_not_relevant: int = 0
    held_out_negatives: int = 0
    ids_are_row_numbers: bool = False


@dataclass(frozen=True)
class Tables:
    """Four checked tables; see ``RetrievalDataset`` for their columns."""

    corpus: Dataset
    queries: Dataset
    qrels: Dataset
    negatives: Dataset | None
    notes: BuildNotes = BuildNotes()


def checked_tables(
    corpus: Dataset,
    queries: Dataset,
    qrels: Dataset,
    negatives: Dataset | None = None,
    *,
    notes: BuildNotes | None = None,
) -> Tables:
    """The four tables with ids as strings and images encoded, or an error that names what does not fit.

    Queries to which nothing is relevant are left out and counted in the notes.

    Raises:
        DatasetError: A column is missing or of the wrong type, an id stands twice, or no query is left.
        MissingDocumentError: A judgement or a negative refers to a document that is not there.
    """
    for what, table in {"corpus": corpus, "queries": queries, "qrels": qrels, "negatives": negatives}.items():
        if not isinstance(table, Dataset) and not (what == "negatives" and table is None):
            raise DatasetError(
                f"Expected a datasets.Dataset, got {type(table).__name__}, for {what}. "
                "Build one, e.g. with Dataset.from_dict."
            )
    corpus = _checked_corpus(corpus)
    queries = _checked_queries(queries)
    qrels = _checked_qrels(qrels, corpus, queries)
    kept = np.isin(np.arange(len(queries)), positions(column(qrels, "query_id"), column(queries, "query_id")))
    if negatives is not None:
        negatives = _checked_negatives(negatives, corpus, queries)
    tables = Tables(corpus, queries, qrels, negatives, notes or BuildNotes())
    if not kept.all():
        tables = replace(
            with_queries(tables, np.flatnonzero(kept)),
            notes=replace(tables.notes, queries_without_document=int((~kept).sum())),
        )
    if not len(tables.queries):
        raise DatasetError(
            f"No query is left: {len(queries)} queries, {len(qrels)} relevance judgements, {len(corpus)} documents. "
            "At least one query needs a relevant document. Check the query column for null or blank texts."
        )
    return tables


def with_queries(tables: Tables, rows: np.ndarray) -> Tables:
    """The tables reduced to some queries, by their rows, with their judgements and negatives; the corpus stays."""
    queries = tables.queries.select(rows)
    ids = column(queries, "query_id")
    negatives = tables.negatives
    if negatives is not None:
        negatives = negatives.select(np.flatnonzero(positions(column(negatives, "query_id"), ids) >= 0))
    qrels = tables.qrels.select(np.flatnonzero(positions(column(tables.qrels, "query_id"), ids) >= 0))
    return replace(tables, queries=queries, qrels=qrels, negatives=negatives)


def require_columns(dataset: Dataset, names: tuple[str, ...], what: str) -> None:
    """Make sure that the columns are there.

    Raises:
        DatasetError: A column is missing; the message lists those found.
    """
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        raise DatasetError(
            f"{what} has no column {missing[0]!r}; it has {dataset.column_names}. "
            f"Expected: {', '.join(map(repr, names))}. Rename a column, or name it in the call."
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


def _checked_corpus(corpus: Dataset) -> Dataset:
    require_columns(corpus, ("document_id",), "The corpus")
    if not {"image", "text"} & set(corpus.column_names):
        raise DatasetError(
            f"The corpus has neither an 'image' nor a 'text' column; it has {corpus.column_names}. "
            "A document is an image of a page, a text, or both."
        )
    if not len(corpus):
        raise DatasetError("The corpus has zero rows. At least one document is needed.")
    corpus = _with_string_ids(corpus.with_format(None), "document_id")
    _require_unique(column(corpus, "document_id"), "document")
    return with_encoded_images(corpus, "image") if "image" in corpus.column_names else corpus


def _checked_queries(queries: Dataset) -> Dataset:
    require_columns(queries, ("query_id", "text"), "The table of queries")
    queries = _with_string_ids(queries.with_format(None), "query_id")
    _require_unique(column(queries, "query_id"), "query")
    texts = text_column(queries, "text")
    blank = is_blank(texts)
    if blank.any():
        query_id = column(queries, "query_id")[int(np.flatnonzero(blank)[0])].as_py()
        raise DatasetError(
            f"Query {query_id!r} has no text (null or blank). Give it one, or leave the query out of the table."
        )
    return queries


def is_blank(texts: pa.Array) -> np.ndarray:
    """Which texts are null, empty or white space."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy(zero_copy_only=False)


def _checked_qrels(qrels: Dataset, corpus: Dataset, queries: Dataset) -> Dataset:
    require_columns(qrels, ("query_id", "document_id", "score"), "The table of relevance judgements (qrels)")
    query_ids, document_ids = id_column(qrels, "query_id"), id_column(qrels, "document_id")
    _require_known(query_ids, column(queries, "query_id"), "relevance judgements", "queries")
    _require_known(document_ids, column(corpus, "document_id"), "relevance judgements", "corpus", query_ids)
    scores = column(qrels, "score")
    if not (pa.types.is_integer(scores.type) or pa.types.is_floating(scores.type)):
        raise DatasetError(f"The scores of the qrels are {scores.type}, expected integers of 1 and above.")
    values = pc.fill_null(scores, 0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((values < 1) | (values != np.floor(values)))
    if len(wrong):
        row = int(wrong[0])
        raise DatasetError(
            f"{len(wrong)} scores of the qrels are no integers of 1 and above, e.g. {values[row]} for query "
            f"{query_ids[row].as_py()!r}, document {document_ids[row].as_py()!r}. Leave judgements of 0 out."
        )
    first = _first_judgements(query_ids, document_ids, values)
    judgements = {"query_id": query_ids, "document_id": document_ids, "score": pa.array(values.astype(np.int64))}
    return table_dataset({name: column_values.take(pa.array(first)) for name, column_values in judgements.items()})


def _first_judgements(query_ids: pa.Array, document_ids: pa.Array, scores: np.ndarray) -> np.ndarray:
    """The rows of the qrels without those that say the same again.

    Raises:
        DatasetError: A query and a document are judged twice, differently.
    """
    codes = [ids.dictionary_encode().indices.to_numpy(zero_copy_only=False) for ids in (query_ids, document_ids)]
    pairs = codes[0].astype(np.int64) * len(document_ids) + codes[1]
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    differing = np.flatnonzero(scores != scores[first][inverse])
    if len(differing):
        row = int(differing[0])
        raise DatasetError(
            f"Query {query_ids[row].as_py()!r} and document {document_ids[row].as_py()!r} are judged twice, with the "
            f"scores {int(scores[first[inverse[row]]])} and {int(scores[row])}. Keep one of the judgements."
        )
    return np.sort(first)


def _checked_negatives(negatives: Dataset, corpus: Dataset, queries: Dataset) -> Dataset:
    require_columns(negatives, ("query_id", "document_ids"), "The table of negatives")
    query_ids = id_column(negatives, "query_id")
    _require_known(query_ids, column(queries, "query_id"), "rows of negatives", "queries")
    _require_unique(query_ids, "query (in the table of negatives)")
    values = column(negatives, "document_ids")
    if not is_lists(values.type):
        raise DatasetError(f"Column 'document_ids' of the negatives holds {values.type}, expected lists of ids.")
    rows, items = flat_lists(values)
    items = as_id_strings(items, "document_ids")
    _require_known(items, column(corpus, "document_id"), "negatives", "corpus", query_ids.take(pa.array(rows)))
    counts = np.bincount(rows, minlength=len(query_ids))
    return table_dataset({"query_id": query_ids, "document_ids": lists(np.r_[0, np.cumsum(counts)], items)})


def _with_string_ids(dataset: Dataset, name: str) -> Dataset:
    ids = id_column(dataset, name)
    if dataset.features[name] == Value("string"):
        return dataset
    others = dataset.remove_columns([name])
    return with_columns(others, {name: ids}) if others.column_names else table_dataset({name: ids})


def _require_unique(ids: pa.Array, what: str) -> None:
    repeated = first_repeated(ids)
    if repeated is not None:
        value, rows = repeated
        raise DatasetError(
            f"The {what} id {value!r} stands in {len(rows)} rows ({', '.join(map(str, rows[:5]))}). "
            "Each id names one row: drop the repeated rows, or give them ids of their own."
        )


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
