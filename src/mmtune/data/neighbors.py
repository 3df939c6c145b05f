"""Which pages lie beside a relevant one in its file: they often answer too, and nobody judged them."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from mmtune.data.arrow import IntLists, column, is_text
from mmtune.data.relevance import Relevance

logger = logging.getLogger(__name__)

FILE_COLUMN, PAGE_COLUMN = "source", "page_number"
_PAGES_A_FILE = 2**32
"""Places of one file, so that a file and a page number make one integer; page numbers stay below half of it."""


def find_neighbors(relevance: Relevance, distance: int) -> IntLists:
    """For each text the pages beside a relevant one in the same file, and what else stands on that page of the file.

    Files and page numbers are the columns ``source`` and ``page_number`` of the corpus, as ``from_pdfs`` makes them.
    Where a relevant page, or a copy of it, has neither, nothing is beside it.

    Args:
        relevance: The judgements.
        distance: How many pages on either side; 0 finds none.

    Returns:
        Pages as positions of documents, rising, none relevant to the text; empty lists where the corpus has no such
        columns.
    """
    num_texts = int(relevance.text.max()) + 1
    places = _find_places(relevance.tables.corpus)
    if not distance or places is None:
        return IntLists(np.zeros(num_texts + 1, dtype=np.int64), np.array([], dtype=np.int64))
    order = np.argsort(places, kind="stable")
    order = order[np.searchsorted(places[order], 0) :]
    relevant = relevance.documents_of_text
    at, texts = places[relevant.values], relevant.rows
    at, texts = at[at >= 0], texts[at >= 0]

    # In the order of places the neighbours are a run; between files there is more room than it can reach.
    reach = min(distance, _PAGES_A_FILE // 2 - 1)
    begins = np.searchsorted(places[order], at - reach)
    lengths = np.searchsorted(places[order], at + reach, side="right") - begins
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    pages = relevance.page[order[np.repeat(begins, lengths) + within]]

    found = np.unique(np.stack([np.repeat(texts, lengths), pages]), axis=1)
    codes, (relevant_texts, relevant_pages) = found[0] * len(places) + found[1], relevance.relevant_pairs
    texts, pages = found[:, ~np.isin(codes, relevant_texts * len(places) + relevant_pages)]
    return IntLists.grouped(texts, pages, num_texts)


def _find_places(corpus: Dataset) -> np.ndarray | None:
    """A number for each document, int64: those of one file follow each other by page; -1 where there is none."""
    if not {FILE_COLUMN, PAGE_COLUMN} <= set(corpus.column_names):
        return None
    files, numbers = column(corpus, FILE_COLUMN), column(corpus, PAGE_COLUMN)
    try:
        numbers = pc.fill_null(numbers.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        if not (is_text(files.type) or pa.types.is_integer(files.type) or pa.types.is_dictionary(files.type)):
            raise pa.ArrowInvalid(f"files are {files.type}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        logger.warning(
            "Which pages lie beside each other is not known: %r should hold texts and %r whole numbers (%s).",
            FILE_COLUMN,
            PAGE_COLUMN,
            error,
        )
        return None
    codes = files if pa.types.is_dictionary(files.type) else files.dictionary_encode()
    file_numbers = pc.fill_null(codes.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    is_known = (file_numbers >= 0) & (numbers >= 0) & (numbers < _PAGES_A_FILE // 2)
    return np.where(is_known, file_numbers * _PAGES_A_FILE + numbers, -1)
