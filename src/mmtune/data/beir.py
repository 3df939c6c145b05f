"""The three tables of BEIR, in the spellings of ViDoRe, JinaVDR and Tevatron."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from mmtune.data.arrow import as_id_strings, column, flat_lists, id_column, is_lists, lists, table_dataset
from mmtune.data.tables import BuildNotes, Tables, checked_tables, is_blank, text_column
from mmtune.errors import DatasetError

DOCUMENT_ID = ("document_id", "corpus-id", "corpus_id", "docid", "_id", "id")
QUERY_ID = ("query_id", "query-id", "_id", "id")
QUERY_TEXT = ("query", "query_text", "text")
SCORE = ("score", "relevance", "label")
POSITIVES, NEGATIVES = "positive_document_ids", "negative_document_ids"


def tables_from_beir(corpus: Dataset, queries: Dataset, qrels: Dataset | None) -> Tables:
    """Three tables in any known spelling; see ``RetrievalDataset.from_beir``."""
    corpus = _with_names(corpus, {"document_id": _one_of(corpus, DOCUMENT_ID, "corpus")})
    query_id = _one_of(queries, QUERY_ID, "table of queries")
    ids = id_column(queries, query_id)
    judged = _judgements(qrels) if qrels is not None else _listed_judgements(queries, ids)
    negatives = _listed(queries, NEGATIVES, ids) if NEGATIVES in queries.column_names else None

    lists_of_ids = [name for name in (POSITIVES, NEGATIVES) if name in queries.column_names]
    names = {"query_id": query_id, "text": _one_of(queries, QUERY_TEXT, "table of queries")}
    queries = _with_names(queries.remove_columns(lists_of_ids), names)
    blank = is_blank(text_column(queries, "text"))
    unasked = pc.is_in(judged["query_id"], value_set=ids.filter(pa.array(blank))).to_numpy(zero_copy_only=False)
    relevant = pc.greater(judged["score"], 0).to_numpy(zero_copy_only=False)
    return checked_tables(
        corpus,
        queries.select(np.flatnonzero(~blank)),
        table_dataset({name: values.filter(pa.array(relevant & ~unasked)) for name, values in judged.items()}),
        negatives if negatives is None else negatives.select(np.flatnonzero(~blank)),
        notes=BuildNotes(blank_queries=int(blank.sum()), judged_not_relevant=int((~relevant).sum())),
    )


def _one_of(table: Dataset, spellings: tuple[str, ...], what: str) -> str:
    """The first of the spellings that the table has."""
    for name in spellings:
        if name in table.column_names:
            return name
    raise DatasetError(
        f"The {what} has none of the columns {', '.join(map(repr, spellings))}; it has {table.column_names}. "
        "Rename the column that holds it."
    )


def _with_names(table: Dataset, names: Mapping[str, str]) -> Dataset:
    """The table with columns under our names, and without columns that have these names and mean something else."""
    table = table.with_format(None)
    clashing = [new for new, old in names.items() if new != old and new in table.column_names]
    return table.remove_columns(clashing).rename_columns({old: new for new, old in names.items() if new != old})


def _judgements(qrels: Dataset) -> dict[str, pa.Array]:
    """Query ids, document ids and scores; integers, also where the table has them as floats."""
    scores = column(qrels, _one_of(qrels, SCORE, "table of relevance judgements (qrels)"))
    if not (pa.types.is_integer(scores.type) or pa.types.is_floating(scores.type)):
        raise DatasetError(f"The scores of the qrels are {scores.type}, expected numbers.")
    return {
        "query_id": id_column(qrels, _one_of(qrels, QUERY_ID[:2], "table of relevance judgements (qrels)")),
        "document_id": id_column(qrels, _one_of(qrels, DOCUMENT_ID[:4], "table of relevance judgements (qrels)")),
        "score": pc.fill_null(scores, 0),
    }


def _listed_judgements(queries: Dataset, ids: pa.Array) -> dict[str, pa.Array]:
    """What the queries list as their positives, with the score 1 each."""
    if POSITIVES not in queries.column_names:
        raise DatasetError(
            f"There are no qrels, and the table of queries has no column {POSITIVES!r}; it has {queries.column_names}. "
            "Pass the qrels, or queries that list their positives."
        )
    rows, items = flat_lists(column(_listed(queries, POSITIVES, ids), "document_ids"))
    scores = pa.array(np.ones(len(items), dtype=np.int64))
    return {"query_id": ids.take(pa.array(rows)), "document_id": items, "score": scores}


def _listed(queries: Dataset, name: str, ids: pa.Array) -> Dataset:
    values = column(queries, name)
    if not is_lists(values.type):
        raise DatasetError(f"Column {name!r} of the queries holds {values.type}, expected lists of ids.")
    rows, items = flat_lists(values)
    offsets = np.r_[0, np.cumsum(np.bincount(rows, minlength=len(ids)))]
    return table_dataset({"query_id": ids, "document_ids": lists(offsets, as_id_strings(items, name))})
