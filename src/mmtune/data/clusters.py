"""What ties queries together: the pages and texts that they share, and what ties these in turn."""

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmtune.data.arrow import number_values
from mmtune.data.relevance import Relevance


def connected_queries(relevance: Relevance) -> dict[str, str]:
    """What each query hangs together with: ``{query_id: id of the first query of its cluster}``.

    Queries are of one cluster where one page is relevant to both, where their texts are equal, or where further queries
    connect them. They rise and fall together, so that a test of a difference has to count them as one.
    """
    number = find_tied_sets(relevance)
    first = np.unique(number, return_index=True)[1]
    return dict(zip(relevance.query_ids.to_pylist(), relevance.query_ids.take(first[number]).to_pylist(), strict=True))


def connected_documents(relevance: Relevance) -> dict[str, str]:
    """The cluster of each document that answers a query, under every id of its page: as in ``connected_queries``."""
    of_query = connected_queries(relevance)
    queries = relevance.query_ids.take(relevance.judged_query).to_pylist()
    of_page = dict(zip(relevance.page[relevance.judged_document].tolist(), queries, strict=True))
    pages = zip(relevance.document_ids.to_pylist(), relevance.page.tolist(), strict=True)
    return {document: of_query[of_page[page]] for document, page in pages if page in of_page}


def find_tied_sets(
    relevance: Relevance, groups: pa.Array | None = None, together: np.ndarray | None = None
) -> np.ndarray:
    """The number of the tied set of each query: components of the graph of queries, texts, pages and groups.

    Args:
        relevance: The judgements.
        groups: For each document its group; a null ties nothing.
        together: For each document the number of a set that stays together; -1 ties nothing.
    """
    num_queries, num_documents = len(relevance.query_ids), len(relevance.document_ids)
    first_page, first_text = num_queries, num_queries + num_documents
    first_group = first_text + int(relevance.text.max()) + 1
    pages = relevance.page[relevance.judged_document]
    edges = [
        (relevance.judged_query, first_page + pages),
        (np.arange(num_queries), first_text + relevance.text),
    ]
    num_nodes = first_group
    numbered = [] if together is None else [together]
    if groups is not None:
        numbered.append(number_values(groups))
    for number in numbered:
        group = number[relevance.judged_document]
        edges.append((relevance.judged_query[group >= 0], num_nodes + group[group >= 0]))
        num_nodes += int(number.max(initial=-1)) + 1
    sources, targets = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(sources), dtype=np.int8), (sources, targets)), shape=(num_nodes, num_nodes))
    labels = connected_components(graph, directed=False)[1][:num_queries]
    return np.unique(labels, return_inverse=True)[1]
