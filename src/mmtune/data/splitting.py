"""A split by relevance: what answers a query on one side answers none on the other."""

import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmtune.data.arrow import column
from mmtune.data.relevance import Relevance
from mmtune.data.tables import Tables, require_columns
from mmtune.errors import DatasetError


def split_tables(
    relevance: Relevance, eval_queries: int, *, seed: int, group_column: str | None
) -> tuple[Tables, Tables]:
    """The tables for training and for evaluation; see ``RetrievalDataset.split``."""
    corpus, groups = relevance.tables.corpus, None
    if group_column is not None:
        require_columns(corpus, (group_column,), f"group_column={group_column!r}: the corpus")
        groups = column(corpus, group_column)
        if pa.types.is_nested(groups.type):
            raise DatasetError(f"Column {group_column!r} holds {groups.type}, expected one value a document.")
    chosen = draw_evaluation_queries(relevance, eval_queries, seed=seed, groups=groups)
    rest = np.setdiff1d(np.arange(len(relevance.query_ids)), chosen)
    if len(rest) < len(chosen):
        _warn_of_few(relevance, groups, len(rest), len(chosen), eval_queries)
    answers = relevance.judged_document[np.isin(relevance.judged_query, chosen)]
    needed = np.union1d(answers, relevance.listed_negatives.take(chosen).values)
    others = np.flatnonzero(~np.isin(relevance.page, relevance.page[answers]))
    return relevance.subset(rest, others), relevance.subset(chosen, needed)


def draw_evaluation_queries(
    relevance: Relevance, eval_queries: int, *, seed: int, groups: pa.Array | None = None
) -> np.ndarray:
    """Positions of at most ``eval_queries`` queries that share no page, text or group with the others.

    Queries are tied when one page is relevant to both, when their texts are equal, or when their relevant pages lie in
    one group. Tied queries stay together; whole sets are drawn at random until no further one fits.

    Args:
        relevance: The judgements.
        eval_queries: Upper bound; met as closely as the sizes of the tied sets allow.
        seed: Of the draw.
        groups: For each document its group; a null ties nothing.

    Raises:
        DatasetError: Every set of tied queries is larger than ``eval_queries``, or nothing would be left to train on.
    """
    set_of_query = _find_tied_sets(relevance, groups)
    sizes = np.bincount(set_of_query)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # Something must be left to train on, at the least the smallest set.
    chosen = _draw_sets(order, sizes, min(eval_queries, int(sizes.sum() - sizes.min())))
    if not len(chosen):
        largest = np.flatnonzero(set_of_query == int(sizes.argmax()))
        examples = ", ".join(repr(relevance.query_ids[int(query)].as_py()) for query in largest[:3])
        raise DatasetError(
            f"No split of {len(set_of_query)} queries leaves 1 to {eval_queries} of them for evaluation and the others "
            f"for training: they are tied into {len(sizes)} sets of {sizes.min()} to {sizes.max()} queries. The "
            f"largest holds {examples} and is tied by {_find_ties(relevance, largest, groups)}. "
            + (f"Pass eval_queries={sizes.min()} or more, or add" if len(sizes) > 1 else "Add")
            + " data"
            + (", or name a finer group_column." if groups is not None else ".")
        )
    return np.flatnonzero(np.isin(set_of_query, chosen))


def _warn_of_few(relevance: Relevance, groups: pa.Array | None, left: int, taken: int, eval_queries: int) -> None:
    """Warn that most queries went to evaluation, and say how many would leave the most to training."""
    sizes = np.bincount(_find_tied_sets(relevance, groups))
    enough = max((left + taken) // 5, int(sizes.min()))
    remedy = f"eval_queries={enough} would do" if 2 * enough <= left + taken else "add data"
    warnings.warn(
        f"{left} queries are left to train on, and {taken} are for evaluation: eval_queries={eval_queries} of "
        f"{left + taken}. Training needs the larger part: {remedy}.",
        stacklevel=4,
    )


def _find_tied_sets(relevance: Relevance, groups: pa.Array | None) -> np.ndarray:
    """The number of the tied set of each query: components of the graph of queries, texts, pages and groups."""
    num_queries, num_documents = len(relevance.query_ids), len(relevance.document_ids)
    first_page, first_text = num_queries, num_queries + num_documents
    first_group = first_text + int(relevance.text.max()) + 1
    pages = relevance.page[relevance.judged_document]
    edges = [
        (relevance.judged_query, first_page + pages),
        (np.arange(num_queries), first_text + relevance.text),
    ]
    num_nodes = first_group
    if groups is not None:
        encoded = groups.dictionary_encode()
        code = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        in_group = code[relevance.judged_document] >= 0
        group = code[relevance.judged_document][in_group]
        edges.append((relevance.judged_query[in_group], first_group + group))
        num_nodes += len(encoded.dictionary)
    sources, targets = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(sources), dtype=np.int8), (sources, targets)), shape=(num_nodes, num_nodes))
    labels = connected_components(graph, directed=False)[1][:num_queries]
    return np.unique(labels, return_inverse=True)[1]


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
    distinct, counts = np.unique(sizes[sizes <= limit], return_counts=True)
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
        taken.extend(order[sizes[order] == size][: uses[rest]].tolist())
        rest -= int(size) * int(uses[rest])
    return np.array(taken, dtype=np.int64)


def _find_ties(relevance: Relevance, queries: np.ndarray, groups: pa.Array | None) -> str:
    """What most queries of a tied set have in common: a document, a text, a group."""
    judged = np.isin(relevance.judged_query, queries)
    documents = relevance.judged_document[judged]
    pairs = np.unique(np.stack([relevance.judged_query[judged], relevance.page[documents]]), axis=1)[1]
    shared = {
        "document": relevance.document_ids.take(pairs),
        "text": relevance.query_texts.take(queries),
        "group": groups.take(documents) if groups is not None else pa.array([], type=pa.string()),
    }
    most = {kind: Counter(values.drop_null().to_pylist()).most_common(1) for kind, values in shared.items()}
    found = [f"the {kind} {top[0][0]!r}" for kind, top in most.items() if top and top[0][1] > 1]
    return " and ".join(found) or "nothing else"
