"""Draws an epoch of batches from dense data, and counts by brute force what must not be in them.

Thousands of queries over few pages: one to three relevant pages a query, query texts that repeat with other
judgements, and listed negatives that are relevant to the same text. Then data so dense that not all rows find a place,
and the host's sampler on fewer rows, which reads the images that ours never reads. ``--large`` plans half a million.

    python benchmarks/batches.py
"""

import argparse
import gc
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from measure import machine, peak_mb
from scale import make_rows
from scans import id_rows, scanned_pages
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from mmtune import ConflictFreeBatchSampler, RetrievalDataset
from mmtune.report.markdown import markdown_table

MOST_MS_A_ROW = 0.05
LEAST_USED = 0.99
# share of the queries that repeat a text, negatives a row, rows a batch, processes
SHAPES = (
    *((0.1, 1, 64, 1), (0.1, 1, 64, 2), (0.1, 1, 16, 8), (0.1, 1, 32, 8), (0.1, 1, 256, 1)),
    *((0.1, 4, 16, 1), (0.1, 4, 16, 2), (0.1, 4, 8, 8), (0.1, 4, 16, 8), (0.1, 4, 128, 1)),
    *((0.5, 1, 64, 1), (0.5, 1, 64, 2), (0.5, 4, 64, 1)),
)
DENSE_SHAPES = (
    *((0.1, 1, 64, 8), (0.1, 1, 512, 1), (0.1, 4, 32, 8), (0.1, 4, 256, 1)),
    *((0.5, 1, 32, 8), (0.5, 1, 256, 1), (0.5, 1, 48, 8), (0.5, 1, 64, 8)),
    *((0.5, 4, 16, 8), (0.5, 4, 128, 1), (0.5, 4, 32, 8)),
)


def dense_dataset(num_queries: int = 4000, num_pages: int = 1200, *, repeated: float = 0.1) -> RetrievalDataset:
    """Queries that share pages and texts, and negatives of which some are relevant.

    Args:
        num_queries: Number of queries.
        num_pages: Number of pages that they share.
        repeated: Share of the queries whose text is that of another one.
    """
    rng = np.random.default_rng(0)
    num_texts = num_queries - int(repeated * num_queries)
    numbers = [*range(num_texts), *rng.choice(num_texts, num_queries - num_texts)]
    texts = [f"question {number}" for number in rng.permutation(numbers)]
    relevant = [rng.choice(num_pages, rng.integers(1, 4), replace=False) for _ in texts]
    by_text: dict[str, set[int]] = defaultdict(set)
    for text, pages in zip(texts, relevant, strict=True):
        by_text[text] |= set(pages.tolist())
    listed = [
        # in a third of the lists, the first is relevant to the same text
        list(dict.fromkeys([*(list(by_text[text])[:1] if rng.random() < 1 / 3 else []), *_some(rng, num_pages)]))
        for text in texts
    ]
    query_ids = [f"q{query}" for query in range(num_queries)]
    judged = [(query_ids[query], f"p{page}") for query, pages in enumerate(relevant) for page in pages]
    return RetrievalDataset(
        Dataset.from_dict(
            {
                "document_id": [f"p{page}" for page in range(num_pages)],
                "text": [f"page {page}" for page in range(num_pages)],
            }
        ),
        Dataset.from_dict({"query_id": query_ids, "text": texts}),
        Dataset.from_dict(
            {
                "query_id": [query for query, _ in judged],
                "document_id": [page for _, page in judged],
                "score": [1] * len(judged),
            }
        ),
        Dataset.from_dict(
            {
                "query_id": query_ids,
                "document_ids": [[f"p{page}" for page in pages] for pages in listed],
            }
        ),
    )


def _some(rng: np.random.Generator, num_pages: int, count: int = 8) -> list[int]:
    return rng.choice(num_pages, count, replace=False).tolist()


def count_conflicts(dataset: RetrievalDataset, rows: Dataset, groups: list[list[int]]) -> int:
    """Pairs of rows in one group where a document of one is relevant to the query text of the other.

    Counted from the tables of the dataset alone, without what the rows say about relevance.
    """
    text_by_query = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    relevant: dict[str, set[str]] = defaultdict(set)
    for judgement in dataset.qrels:
        relevant[text_by_query[judgement["query_id"]]].add(judgement["document_id"])
    ids = rows.with_format(None)[:]
    needed = [relevant[text_by_query[query_id]] for query_id in ids["query_id"]]
    brought = [
        {positive, *negatives}
        for positive, negatives in zip(ids["document_id"], ids["negative_document_ids"], strict=True)
    ]
    own = sum(not needed[row].isdisjoint(ids["negative_document_ids"][row]) for group in groups for row in group)
    return own + sum(
        not needed[one].isdisjoint(brought[other])
        for group in groups
        for one in group
        for other in group
        if one != other
    )


@dataclass(frozen=True)
class Epoch:
    """What one epoch of batches came to.

    Attributes:
        num_rows: Rows there are.
        num_used: Rows in the batches.
        conflicts: Pairs of rows that must not be together, over the batches that all processes take in one step.
        ms_a_row: CPU time of planning, in milliseconds a row.
        batches_by_rank: Batches that accelerate gives each process.
        smallest: Rows of the smallest batch, the last one left out.
        lost: Rows of the plan that no process gets, or that two get.
    """

    num_rows: int
    num_used: int
    conflicts: int
    ms_a_row: float
    batches_by_rank: list[int]
    smallest: int
    lost: int

    @property
    def used(self) -> float:
        """Share of the rows that are in a batch."""
        return self.num_used / self.num_rows


def draw_epoch(dataset: RetrievalDataset, rows: Dataset, batch_size: int, num_processes: int) -> Epoch:
    """Draw one epoch for some processes, hand it out as accelerate does, and check it."""
    gc.collect()  # so that a full collection, which takes as long as the plan, does not fall into it
    started = time.process_time()
    sampler = ConflictFreeBatchSampler(rows, batch_size, drop_last=False, num_processes=num_processes)
    batches = list(sampler)
    ms_a_row = 1000 * (time.process_time() - started) / len(rows)
    # accelerate (1.15) leaves the sampler of a single process alone
    shards = [batches]
    if num_processes > 1:
        shards = [
            list(BatchSamplerShard(sampler, num_processes, rank, split_batches=False, even_batches=False))
            for rank in range(num_processes)
        ]
    # what the processes hold in one step, from what they were given
    steps = [[row for batch in step for row in batch] for step in zip(*shards, strict=False)]
    planned = sorted(row for batch in batches for row in batch)
    received = sorted(row for shard in shards for batch in shard for row in batch)
    return Epoch(
        num_rows=len(rows),
        num_used=len(set(planned)),
        conflicts=count_conflicts(dataset, rows, steps),
        ms_a_row=ms_a_row,
        batches_by_rank=[len(shard) for shard in shards],
        smallest=min(map(len, batches[:-1] or batches)),
        lost=abs(len(planned) - len(received)) + len(set(planned) ^ set(received)),
    )


def host_ratio(num_rows: int, batch_size: int, data: Path | None) -> tuple[float, float]:
    """Milliseconds a row of the host's sampler and of ours on the same rows of scanned pages."""
    table = id_rows(scanned_pages(num_rows, data))
    eager = Dataset.from_dict(
        {
            "query": table["query"][:],
            "image": table["image"][:],
            "negative_0": [table[int(negatives[0].removeprefix("p"))]["image"] for negatives in table["negatives"]],
        }
    )
    rows = RetrievalDataset.from_id_rows(table).training_rows(1)
    started = time.process_time()
    theirs = list(NoDuplicatesBatchSampler(eager, batch_size, drop_last=False))
    between = time.process_time()
    ours = list(ConflictFreeBatchSampler(rows, batch_size, drop_last=False))
    ended = time.process_time()
    assert sum(map(len, theirs)) == sum(map(len, ours)) == num_rows
    return 1000 * (between - started) / num_rows, 1000 * (ended - between) / num_rows


def plan_large(num_rows: int, num_negatives: int, batch_size: int) -> str:
    """Time and memory of two epochs of a large table, with a query a row and random negatives."""
    rows = RetrievalDataset.from_id_rows(make_rows(num_rows, num_negatives)).training_rows(num_negatives)
    before, started = peak_mb(), time.process_time()
    sampler = ConflictFreeBatchSampler(rows, batch_size, drop_last=False)
    first = time.process_time()
    sampler.set_epoch(1)
    used = sum(map(len, sampler)) / num_rows
    return (
        f"{num_rows:,} rows with {num_negatives} negatives in batches of {batch_size}: {100 * used:.2f}% used, "
        f"{first - started:.1f} CPU seconds for reading and the first epoch, {time.process_time() - first:.1f} for the "
        f"second, peak {peak_mb():.0f} MB after {before:.0f} MB for the table"
    )


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--pages", type=int, default=1200)
    parser.add_argument("--large", action="store_true", help="half a million rows instead")
    parser.add_argument("--host-rows", type=int, default=96, help="rows for the host's sampler; 0 leaves it out")
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image, for the host's sampler")
    options = parser.parse_args()
    print(machine())
    if options.large:
        print(plan_large(500_000, 4, 64))
        return
    for shapes in (SHAPES, DENSE_SHAPES):
        cells = []
        for repeated, num_negatives, batch_size, num_processes in shapes:
            dataset = dense_dataset(options.queries, options.pages, repeated=repeated)
            rows = dataset.training_rows(num_negatives, documents="text")
            epoch = draw_epoch(dataset, rows, batch_size, num_processes)
            cells.append(
                [
                    f"{100 * repeated:.0f}%",
                    *(str(number) for number in (num_negatives, batch_size, num_processes)),
                    f"{epoch.num_rows:,}",
                    f"{100 * epoch.used:.2f}%",
                    str(epoch.smallest),
                    str(epoch.conflicts),
                    f"{epoch.ms_a_row:.3f}",
                    " or ".join(map(str, sorted(set(epoch.batches_by_rank)))),
                    str(epoch.lost),
                ]
            )
        head = ("texts repeated", "negatives", "batch", "processes", "rows", "used", "smallest batch", "conflicts")
        print(markdown_table((*head, "ms a row", "batches a process", "lost"), cells), "\n")
    if options.host_rows:
        theirs, ours = host_ratio(options.host_rows, 32, options.data)
        print(
            f"\nOn {options.host_rows} rows of scanned pages: {theirs:.1f} ms a row with the host's NO_DUPLICATES, "
            f"{ours:.3f} ms with ours, {theirs / ours:.0f} times as long"
        )


if __name__ == "__main__":
    main()
