"""Near misses: texts that the pages of a query seem to answer and do not, kept beside the query."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from mmtune.data.arrow import IntLists, column, flat_lists, is_lists, is_text, table_dataset
from mmtune.data.relevance import Relevance
from mmtune.errors import DatasetError

NEAR_MISSES = "near_misses"
"""The column of the queries that holds them."""


@dataclass(frozen=True)
class NearMisses:
    """Texts that are no queries: nothing is relevant to them, and the pages of their query are not.

    Attributes:
        query: The query that each belongs to, by position, int64, rising.
        ids: An id for each, that no query has.
        texts: The texts.
    """

    query: np.ndarray
    ids: pa.Array
    texts: pa.Array

    @classmethod
    def of(cls, queries: Dataset) -> "NearMisses":
        """Those of a table of queries.

        Raises:
            DatasetError: The column holds something else.
        """
        found = near_misses_of(queries)
        query_ids = column(queries, "query_id").to_pylist()
        taken = set(query_ids)
        ids: list[str] = []
        for query_id, texts in zip(query_ids, found, strict=True):
            for number in range(1, len(texts) + 1):
                own = f"{query_id}-near-miss-{number}"
                while own in taken:
                    own += "'"
                ids.append(own)
                taken.add(own)
        texts = pa.array([text for part in found for text in part], type=pa.string())
        return cls(np.repeat(np.arange(len(found)), [len(part) for part in found]), pa.array(ids, pa.string()), texts)

    def __len__(self) -> int:
        return len(self.ids)

    def by_judgement(self, relevance: Relevance) -> IntLists:
        """Their numbers for each judgement: those of its query that its page does not answer.

        Pages that became relevant later, by ``judge_negatives``, were never asked about near misses. And one that has
        the words of a query, whatever their case and spacing, is no near miss of the pages that may answer that query.
        """
        count = len(relevance.query_ids)
        found = IntLists.grouped(self.query, np.arange(len(self)), count).take(relevance.judged_query)
        words = [_words(text) for text in self.texts.to_pylist()]
        asked: defaultdict[str, list[int]] = defaultdict(list)
        for query, text in enumerate(relevance.query_texts.to_pylist()):
            asked[_words(text)].append(query)
        pairs = [
            (at, query) for at, number in enumerate(found.values.tolist()) for query in asked.get(words[number], ())
        ]
        at, queries = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        is_answered = np.zeros(len(found.values), dtype=bool)
        is_answered[at[relevance.may_be_relevant(queries, relevance.judged_document[found.rows[at]])]] = True
        kept = ~is_answered & ~relevance.is_judged_by_machine[found.rows]
        return IntLists.grouped(found.rows[kept], found.values[kept], len(relevance.judged_query))

    def below(self, queries: Dataset) -> Dataset:
        """A table of ``query_id`` and ``text`` of the queries, and of these behind them."""
        asked = queries.with_format(None).select_columns(["query_id", "text"])
        return concatenate_datasets([asked, table_dataset({"query_id": self.ids, "text": self.texts})])


def _words(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def near_misses_of(queries: Dataset) -> list[list[str]]:
    """The near misses of each query; empty lists where there are none.

    Raises:
        DatasetError: The column holds something else.
    """
    found: list[list[str]] = [[] for _ in range(len(queries))]
    if NEAR_MISSES not in queries.column_names:
        return found
    values = column(queries, NEAR_MISSES)
    rows, texts = flat_lists(values) if is_lists(values.type) else (np.array([]), values)
    if not is_lists(values.type) or not (is_text(texts.type) or pa.types.is_null(texts.type)):
        raise DatasetError(
            f"Column {NEAR_MISSES!r} of the queries holds {values.type}, expected lists of texts. Rename the column "
            "where it is one of your own."
        )
    for row, text in zip(rows.tolist(), texts.to_pylist(), strict=True):
        if text is not None:
            found[row].append(text)
    return found
