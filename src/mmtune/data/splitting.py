"""A split by relevance: what answers a query on one side answers none on the other.

What ties queries together is a graph: queries, the texts and the pages that they share, and groups of documents, as of
one file or of near-copies. What is connected stays on one side.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmtune.data.arrow import IntLists, as_texts, column, number_values, positions
from mmtune.data.clusters import find_tied_sets
from mmtune.data.identity import pdf_pages
from mmtune.data.neighbors import FILE_COLUMN, PAGE_COLUMN
from mmtune.data.pdfs import name_file
from mmtune.data.relevance import Relevance
from mmtune.data.tables import Tables, has_content, query_parts, require_columns
from mmtune.errors import ConfigError, DatasetError


def split_tables(
    relevance: Relevance,
    sizes: Sequence[int],
    *,
    seed: int,
    group_column: str | None,
    stratify_column: str | None,
    together: Sequence[Sequence[str]],
) -> list[Tables]:
    """The tables for training and those held out, with as many queries as ``sizes`` says; see ``split``.

    What is held out last is drawn first, so that nothing before it holds what answers there, not even as a negative.
    """
    copies, sides = _number_sets(relevance, together), []
    for size in reversed(sizes):
        rest, kept, held_out = _hold_out(relevance, size, seed, group_column, stratify_column, copies)
        relevance, copies = Relevance(rest, relevance.documents, relevance.queries), copies[kept]
        sides.append(held_out)
    return [relevance.tables, *reversed(sides)]


def _hold_out(
    relevance: Relevance,
    eval_queries: int,
    seed: int,
    group_column: str | None,
    stratify_column: str | None,
    copies: np.ndarray,
) -> tuple[Tables, np.ndarray, Tables]:
    """What is left, the documents in it, and what is held out."""
    corpus = relevance.tables.corpus
    if group_column is None and {FILE_COLUMN, PAGE_COLUMN} <= set(corpus.column_names):
        group_column = FILE_COLUMN
    groups = None if group_column is None else _values(corpus, group_column, "group_column", "corpus")
    if groups is not None and group_column == FILE_COLUMN:
        groups = _name_files(relevance, groups)
    queries = relevance.tables.queries
    strata = (
        None if stratify_column is None else _values(queries, stratify_column, "stratify_column", "table of queries")
    )
    chosen = draw_evaluation_queries(relevance, eval_queries, seed=seed, groups=groups, strata=strata, together=copies)
    rest = np.setdiff1d(np.arange(len(relevance.query_ids)), chosen)
    if len(rest) < len(chosen):
        _warn_of_few(relevance, groups, copies, len(rest), len(chosen), eval_queries)
    answers = relevance.judged_document[np.isin(relevance.judged_query, chosen)]
    needed = np.union1d(answers, relevance.listed_negatives.take(chosen).values)
    is_answer = np.isin(relevance.page, relevance.page[answers])
    is_answer |= np.isin(copies, np.setdiff1d(copies[is_answer], [-1]))
    kept = np.flatnonzero(~is_answer)
    return relevance.subset(rest, kept), kept, relevance.subset(chosen, needed)


def _values(table: Dataset, name: str, argument: str, what: str) -> pa.Array:
    require_columns(table, (name,), f"{argument}={name!r}: the {what}")
    values = column(table, name)
    if pa.types.is_nested(values.type):
        raise DatasetError(f"Column {name!r} holds {values.type}, expected one value a row.")
    return values


def _name_files(relevance: Relevance, sources: pa.Array) -> pa.Array:
    """For each document what its file is called: a file that stands under several names, by the first of these.

    Names are of one file where they are of the same PDF, or where all their pages are the same.
    """
    content, of_pdfs = relevance.page.copy(), pdf_pages(relevance.tables.corpus)
    files = np.array([name_file(page) for page in of_pdfs.values()], dtype=object)
    content[list(of_pdfs)] = len(content) + np.unique(files, return_inverse=True)[1]
    encoded, numbers = sources.dictionary_encode(), number_values(sources)
    named = np.flatnonzero(numbers >= 0)
    contents = IntLists.grouped(numbers[named], content[named], len(encoded.dictionary))
    first: dict[bytes, int] = {}
    same = [first.setdefault(np.unique(contents[at]).tobytes(), at) for at in range(len(encoded.dictionary))]
    return encoded.dictionary.take(pa.array(np.array([*same, -1])[numbers], mask=numbers < 0))


def _number_sets(relevance: Relevance, together: Sequence[Sequence[str]]) -> np.ndarray:
    """For each document the number of the set that its page is in, -1 for none; sets that share a page are one.

    Raises:
        DatasetError: An id is of no document.
        ConfigError: ``together`` is no list of lists of ids.
    """
    if (
        not isinstance(together, Iterable)
        or isinstance(together, str)
        or any(isinstance(ids, str) or not isinstance(ids, Sequence) for ids in together)
    ):
        raise ConfigError(f"together={together!r:.80}: expected lists of document ids, e.g. [['a', 'b'], ['c', 'd']].")
    if not together:
        return np.full(len(relevance.document_ids), -1)
    sizes = [len(ids) for ids in together]
    documents = positions(as_texts("document id", [each for ids in together for each in ids]), relevance.document_ids)
    if (documents < 0).any():
        unknown = [each for ids in together for each in ids][int(np.argmin(documents))]
        raise DatasetError(f"together= names {unknown!r}, which is the id of no document. Pass ids of this dataset.")
    pages = relevance.page[documents]
    sets = np.repeat(np.arange(len(sizes)), sizes) + len(relevance.document_ids)
    count = len(relevance.document_ids) + len(sizes)
    graph = coo_array((np.ones(len(sets), dtype=np.int8), (pages, sets)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1][relevance.page]
    return np.where(np.isin(relevance.page, pages), labels, -1)


def draw_evaluation_queries(
    relevance: Relevance,
    eval_queries: int,
    *,
    seed: int,
    groups: pa.Array | None = None,
    strata: pa.Array | None = None,
    together: np.ndarray | None = None,
) -> np.ndarray:
    """Positions of at most ``eval_queries`` queries that share no page, text or group with the others.

    Queries are tied when one page is relevant to both, when their texts are equal, or when their relevant pages lie in
    one group. Tied queries stay together; whole sets are drawn at random until no further one fits.

    Args:
        relevance: The judgements.
        eval_queries: Upper bound; met as closely as the sizes of the tied sets allow.
        seed: Of the draw.
        groups: For each document its group; a null ties nothing.
        strata: For each query what it is, as its language: each kind gets its share of the evaluation, as nearly as
            whole sets allow. A set counts as what most of its queries are.
        together: For each document the number of a set that stays together; -1 ties nothing.

    Raises:
        DatasetError: Every set of tied queries is larger than ``eval_queries``, or nothing would be left to train on.
    """
    set_of_query = find_tied_sets(relevance, groups, together)
    sizes = np.bincount(set_of_query)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # Something must be left to train on, at the least the smallest set.
    limit = min(eval_queries, int(sizes.sum() - sizes.min()))
    chosen = _draw_sets(order, sizes, limit)
    if strata is not None:
        chosen = _draw_strata(order, sizes, limit, _main_stratum(set_of_query, strata))
    if not len(chosen):
        largest = np.flatnonzero(set_of_query == int(sizes.argmax()))
        examples = ", ".join(repr(relevance.query_ids[int(query)].as_py()) for query in largest[:3])
        raise DatasetError(
            f"No split of {len(set_of_query)} queries leaves 1 to {eval_queries} of them for evaluation and the others "
            f"for training: they are tied into {len(sizes)} sets of {sizes.min()} to {sizes.max()} queries. The "
            f"largest holds {examples} and is tied by {_find_ties(relevance, largest, groups, together)}. "
            + (f"Pass eval_queries={sizes.min()} or more, or add" if len(sizes) > 1 else "Add")
            + " data"
            + (", or name a finer group_column: 'document_id' splits by page." if groups is not None else ".")
        )
    return np.flatnonzero(np.isin(set_of_query, chosen))


def _main_stratum(set_of_query: np.ndarray, strata: pa.Array) -> np.ndarray:
    """For each tied set the number of what most of its queries are; a null is a kind of its own."""
    codes = number_values(strata) + 1
    pairs, counts = np.unique(np.stack([set_of_query, codes]), axis=1, return_counts=True)
    commonest_last = pairs[:, np.lexsort((counts, pairs[0]))]
    last = np.r_[np.flatnonzero(np.diff(commonest_last[0])), commonest_last.shape[1] - 1]
    return commonest_last[1, last]


def _draw_strata(order: np.ndarray, sizes: np.ndarray, limit: int, stratum: np.ndarray) -> np.ndarray:
    """Of each kind of sets its share of ``limit``, and what is left of ``limit`` from any."""
    shares = np.bincount(stratum, weights=sizes) * limit / sizes.sum()
    quota = np.floor(shares).astype(np.int64)
    # the largest remainders get the rest
    quota[np.argsort(quota - shares, kind="stable")[: limit - quota.sum()]] += 1
    sets_of_kind = IntLists.grouped(stratum[order], order, len(quota))
    chosen = np.concatenate([_draw_sets(sets_of_kind[kind], sizes, share) for kind, share in enumerate(quota.tolist())])
    left = order[~np.isin(order, chosen)]
    return np.concatenate([chosen, _draw_sets(left, sizes, limit - int(sizes[chosen].sum()))])


def _warn_of_few(
    relevance: Relevance, groups: pa.Array | None, together: np.ndarray, left: int, taken: int, eval_queries: int
) -> None:
    """Warn that most queries went to evaluation, and say how many would leave the most to training."""
    sizes = np.bincount(find_tied_sets(relevance, groups, together))
    enough = max((left + taken) // 5, int(sizes.min()))
    remedy = f"eval_queries={enough} would do" if 2 * enough <= left + taken else "add data"
    warnings.warn(
        f"{left} queries are left to train on, and {taken} are for evaluation: eval_queries={eval_queries} of "
        f"{left + taken}. Training needs the larger part: {remedy}.",
        stacklevel=5,
    )


def _draw_sets(order: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """The sets to take so that their sizes add up to ``limit`` or as near below it as can be.

    Random sets come first; only the gap at the end is closed by an exact search over the sizes.
    """
    taken: list[int] = []
    total = 0
    for at in order:
        if total + sizes[at] <= limit:
            taken.append(int(at))
            total += int(sizes[at])
    if total == limit:
        return np.array(taken, dtype=np.int64)
    closest = _find_closest_subset(order, sizes, limit)
    return closest if sizes[closest].sum() > total else np.array(taken, dtype=np.int64)


def _find_closest_subset(order: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """Sets whose sizes add up to as much as can be without passing ``limit``: subset sum over the distinct sizes."""
    own = sizes[order]
    distinct, counts = np.unique(own[own <= limit], return_counts=True)
    reachable = np.zeros(limit + 1, dtype=bool)
    reachable[0] = True
    uses_at = []
    for size, count in zip(distinct, counts, strict=True):
        # uses[j]: how many sets of this size the sum j takes; -1 where j was reached before or is not reached.
        uses = np.where(reachable, 0, -1)
        for j in range(size, limit + 1):
            if uses[j] < 0 and 0 <= uses[j - size] < count:
                uses[j] = uses[j - size] + 1
        reachable = uses >= 0
        uses_at.append(uses)
    rest = int(np.flatnonzero(reachable)[-1])
    taken: list[int] = []
    for size, uses in zip(distinct[::-1], uses_at[::-1], strict=True):
        taken.extend(order[own == size][: uses[rest]].tolist())
        rest -= int(size) * int(uses[rest])
    return np.array(taken, dtype=np.int64)


def _find_ties(relevance: Relevance, queries: np.ndarray, groups: pa.Array | None, together: np.ndarray | None) -> str:
    """What most queries of a tied set have in common: a document, a text, a group, a set that stays together."""
    judged = np.isin(relevance.judged_query, queries)
    documents = relevance.judged_document[judged]
    pairs = np.unique(np.stack([relevance.judged_query[judged], relevance.page[documents]]), axis=1)[1]
    shared = {
        "document": relevance.document_ids.take(pairs),
        "text": relevance.query_texts.take(queries),
        f"{' or '.join(query_parts(relevance.tables.queries)[1:])} of query": _first_alike(relevance, queries),
        "group": groups.take(documents) if groups is not None else pa.array([], type=pa.string()),
        "set of copies of": _first_of_sets(relevance, together, documents),
    }
    most = {kind: Counter(values.drop_null().to_pylist()).most_common(1) for kind, values in shared.items()}
    found = [f"the {kind} {top[0][0]!r}" for kind, top in most.items() if top and top[0][1] > 1]
    return " and ".join(found) or "nothing else"


def _first_alike(relevance: Relevance, queries: np.ndarray) -> pa.Array:
    """For each query the first one that is the same; null where its text says so."""
    first = np.unique(relevance.text, return_index=True)[1][relevance.text[queries]]
    has_text = has_content(relevance.tables.queries, "text")[queries]
    if "text" not in (relevance.queries or "text").split("+"):
        has_text[:] = False
    return relevance.query_ids.take(pa.array(first, mask=has_text))


def _first_of_sets(relevance: Relevance, together: np.ndarray | None, documents: np.ndarray) -> pa.Array:
    """For each document the first one of the set that it stays together with; null for those in none."""
    numbers = np.full(len(relevance.document_ids), -1) if together is None else together
    first = [int(np.argmax(numbers == number)) if number >= 0 else None for number in numbers[documents]]
    return relevance.document_ids.take(pa.array(first, pa.int64()))
