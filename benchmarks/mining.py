"""Mines among 100,000 documents for 20,000 queries, and trains on mined and on random negatives for as many steps.

The embeddings of the search are made before: what is measured is ``mine_hard_negatives`` without a model. What is
trained is a tiny CLIP on drawn pages, of which many share company, topic or year: it learns a little, mines what it
confuses, and goes on from there once with these negatives and once with random ones.

    python benchmarks/mining.py
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from measure import in_fresh_process, peak_mb, report, write_section
from sentence_transformers import SentenceTransformer

from mmtune import RetrievalDataset, finetune, mine_hard_negatives
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages, tiny_clip

MOST_SECONDS = 60
MOST_MB = 1500
MEASURE = "vdr_cosine_ndcg@10"


class Precomputed(SentenceTransformer):
    """Gives the vector whose number a text is: a query's after "q", a document's after "d"."""

    def __init__(self, num_queries: int, num_documents: int, dimension: int) -> None:
        super().__init__(modules=[torch.nn.Identity()], device="cpu")
        generator = torch.Generator().manual_seed(0)
        documents = torch.randn(num_documents, dimension, generator=generator)
        near = documents[relevant_to(num_queries, num_documents)]
        self.vectors = {"q": near + torch.randn(near.shape, generator=generator), "d": documents}

    def encode_query(self, inputs: list[dict[str, str]], **options: object) -> torch.Tensor:  # noqa: D102
        rows = [int(item["text"][1:]) for item in inputs]
        return self.vectors[inputs[0]["text"][0]][rows]

    encode_document = encode_query


def relevant_to(num_queries: int, num_documents: int) -> np.ndarray:
    """The number of the document that is relevant to each query."""
    return np.random.default_rng(0).integers(num_documents, size=num_queries)


def text_dataset(num_queries: int, num_documents: int) -> RetrievalDataset:
    """Documents and queries whose texts are their numbers, a relevant document each."""
    document_ids, query_ids = (
        [f"{kind}{k}" for k in range(n)] for kind, n in (("d", num_documents), ("q", num_queries))
    )
    relevant = relevant_to(num_queries, num_documents)
    return RetrievalDataset(
        corpus=Dataset.from_dict({"document_id": document_ids, "text": document_ids}),
        queries=Dataset.from_dict({"query_id": query_ids, "text": query_ids}),
        qrels=Dataset.from_dict(
            {"query_id": query_ids, "document_id": [f"d{k}" for k in relevant], "score": [1] * num_queries}
        ),
    )


def measure_search(num_queries: int, num_documents: int, dimension: int, threads: int) -> None:
    """Mine, and report seconds and the peak of this process above what it held before."""
    torch.set_num_threads(threads)
    pa.set_cpu_count(threads)
    dataset = text_dataset(num_queries, num_documents)
    model = Precomputed(num_queries, num_documents, dimension)
    before_mb, started, cpu_started = peak_mb(), time.perf_counter(), time.process_time()
    mined = mine_hard_negatives(dataset, model, documents="text", batch_size=512, show_progress_bar=False)
    assert len(mined.negatives) == num_queries
    report(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        peak_mb=peak_mb() - before_mb,
    )


def train_on_both(seed: int, *, num_queries: int = 200) -> dict[str, float]:
    """nDCG@10 on unseen queries after the warm-up, and after as many steps with mined and with random negatives."""
    dataset = RetrievalDataset.from_id_rows(generated_pages(num_queries, seed=seed).remove_columns("negatives"))
    train, evaluation = dataset.split(num_queries // 4, seed=seed)
    # All pages are searched, so that those which look alike stand against each other.
    evaluation = RetrievalDataset(dataset.corpus, evaluation.queries, evaluation.qrels)
    options = {"seed": seed, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = finetune(
            tiny_clip(folder / "clip", hidden_size=128, image_size=128, seed=seed),
            train,
            evaluation,
            output_dir=folder / "begun",
            num_train_epochs=25,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            **options,
        )
        mined = mine_hard_negatives(train, begun.model, show_progress_bar=False)
        # Lists without ids are filled at random.
        nobody = mined.negatives.map(lambda _: {"document_ids": []})
        sides = {"mined": mined, "random": RetrievalDataset(train.corpus, train.queries, train.qrels, nobody)}
        found = {"start": begun.after[MEASURE]}
        for side, data in sides.items():
            result = finetune(
                str(begun.output_dir / "final"),
                data,
                evaluation,
                output_dir=folder / side,
                num_negatives=2,
                num_train_epochs=4,
                per_device_train_batch_size=4,
                learning_rate=3e-4,
                matryoshka_dims=None,
                **options,
            )
            found |= {side: result.after[MEASURE], f"{side} steps": result.trainer.state.max_steps}
    return found


def main() -> None:
    """Run the benchmark and write its sections of RESULTS.md; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=["search", "training"], default=["search", "training"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    size = options.queries, options.documents, options.dimension
    if options.threads:
        measure_search(*size, options.threads)
        return
    if "search" in options.parts:
        compare_searches(*size)
    if "training" in options.parts:
        compare_trainings(options.seeds)


def compare_searches(num_queries: int, num_documents: int, dimension: int) -> None:
    """Mine on one and on two threads, and write that section."""
    given = ("--queries", num_queries, "--documents", num_documents, "--dimension", dimension)
    searched = {threads: in_fresh_process(__file__, *given, "--threads", threads) for threads in (1, 2)}
    text = [
        f"`python benchmarks/mining.py`: `mine_hard_negatives` for {num_queries:,} queries among {num_documents:,} "
        f"documents, with embeddings of {dimension} numbers that are made before; peak is memory above the process "
        "that holds them.",
        markdown_table(
            ("threads", "seconds", "CPU seconds", "peak MB"),
            [
                [str(threads), f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}", f"{found['peak_mb']:.0f}"]
                for threads, found in searched.items()
            ],
        ),
        f"Limits: {MOST_SECONDS} s and {MOST_MB:,} MB. Load of the machine at the end, this program's own included: "
        f"{os.getloadavg()[0]:.1f}.",
    ]
    write_section("Mining among many", "\n\n".join(text))


def compare_trainings(seeds: list[int]) -> None:
    """Train on mined and on random negatives with each seed, and write that section."""
    started = time.process_time()
    trained = {seed: train_on_both(seed) for seed in seeds}
    cpu_seconds = time.process_time() - started
    gains = np.array([found["mined"] - found["random"] for found in trained.values()])
    text = [
        "`python benchmarks/mining.py`: a tiny CLIP on drawn pages that share companies, topics and years, trained on "
        "from one checkpoint with two negatives a row: mined by that checkpoint, or random. nDCG@10 of 50 unseen "
        f"queries over all 240 pages; {cpu_seconds:.0f} CPU seconds in all.",
        markdown_table(
            ("seed", "steps", "start", "random negatives", "mined negatives"),
            [
                [str(seed), str(found["mined steps"]), *(f"{found[side]:.3f}" for side in ("start", "random", "mined"))]
                for seed, found in trained.items()
            ],
        ),
        f"Mined less random: {gains.mean():+.3f} on average, {gains.min():+.3f} to {gains.max():+.3f}.",
    ]
    write_section("Mined against random negatives", "\n\n".join(text))


if __name__ == "__main__":
    main()
