"""What ``report.html`` shows of a run, and how long it takes and how large it gets over many pages.

    python benchmarks/reports.py                          # 2,000 queries over 20,000 drawn scans: seconds and bytes
    python benchmarks/reports.py --output FOLDER          # a run on drawn pages, and its report.html
    python benchmarks/reports.py --output FOLDER --data RECEIPTS

RECEIPTS holds ``train.parquet`` and ``eval.parquet`` with the columns id, query, image, negatives.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage

from mmtune import RetrievalDataset, compare_per_query, finetune
from mmtune.report.html import write_page
from mmtune.report.markdown import compare_metrics, markdown_table
from mmtune.testing import generated_pages, tiny_clip


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a run and its report; without it the size is measured")
    parser.add_argument("--data", type=Path, help="folder with train.parquet and eval.parquet, for pages of yours")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--documents", type=int, default=20_000)
    options = parser.parse_args()
    if options.output:
        report_a_run(options.output, options.data, options.epochs)
    else:
        measure_size(options.queries, options.documents)


def report_a_run(output: Path, data: Path | None, epochs: float) -> None:
    """Train a small model from random weights, and write what changed."""
    if data:
        train, evaluation = (RetrievalDataset.load(data / f"{name}.parquet") for name in ("train", "eval"))
    else:
        train, evaluation = RetrievalDataset.from_id_rows(generated_pages(300)).split(60)
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            tiny_clip(folder, hidden_size=128, image_size=128),
            train,
            evaluation,
            output_dir=output,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            overwrite=True,
            matryoshka_dims=[128, 64, 32, 16],
        )
    print(f"{result.verdict}\n{output / 'report.html'}: {(output / 'report.html').stat().st_size:,} bytes")


def as_table(
    key: str,
    before: dict[str, float],
    after: dict[str, float],
    top_before: dict[str, list[str]],
    top_after: dict[str, list[str]],
) -> pa.Table:
    """``per_query.parquet``."""
    ids = list(before)
    return pa.table(
        {
            "metric": [key] * len(ids),
            "query_id": ids,
            "before": list(before.values()),
            "after": [after[query_id] for query_id in ids],
            "top_ids_before": [top_before[query_id][:10] for query_id in ids],
            "top_ids_after": [top_after[query_id][:10] for query_id in ids],
        }
    )


def measure_size(num_queries: int, num_documents: int) -> None:
    """Seconds and bytes of the report of many pages as noisy as scans, each query with other ones."""
    with tempfile.TemporaryDirectory() as folder:
        ids = [f"scan {number}" for number in range(num_documents)]
        queries = [f"question {number}" for number in range(num_queries)]
        features = Features({"document_id": Value("string"), "image": Image(decode=False)})
        corpus = Dataset.from_generator(draw_corpus, features, folder, gen_kwargs={"num_documents": num_documents})
        data = RetrievalDataset.from_beir(
            corpus,
            Dataset.from_dict({"query_id": queries, "text": queries}),
            Dataset.from_dict({"query_id": queries, "document_id": ids[:num_queries], "score": [1] * num_queries}),
        )
        data.relevance.is_relevant(np.arange(1), np.arange(1))  # the evaluation has looked for identical pages before
        rows = [measure_report(data, ids, queries, thumbnails) for thumbnails in (True, False)]
    print(markdown_table(("thumbnails", "queries", "pages", "CPU seconds", "MB"), rows))


def measure_report(data: RetrievalDataset, ids: list[str], queries: list[str], thumbnails: bool) -> list[str]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    before, after = (dict(zip(queries, rng.random(len(queries)).tolist(), strict=True)) for _ in range(2))
    tops = [{query_id: [ids[at] for at in rng.integers(0, len(ids), 10)] for query_id in queries} for _ in range(2)]
    log = [{"step": step, "loss": 3 / (1 + step / 50)} for step in range(1, 2_000)]
    log += [{"step": step, "eval_vdr_cosine_ndcg@10": 0.5, "eval_runtime": 1.0} for step in range(200, 2_000, 200)]
    key = "vdr_cosine_ndcg@10"
    verdict, table = compare_per_query(before, after).as_dict(), as_table(key, before, after, *tops)
    with tempfile.TemporaryDirectory() as folder:
        started, path = time.process_time(), Path(folder, "report.html")
        write_page(
            path,
            title="Finetuning report",
            verdict=verdict,
            rows=compare_metrics({key: 0.4}, {key: 0.5}, key),
            primary_metric=key,
            per_query=table,
            log=log,
            settings={"audit": {}},
            versions={},
            datasets={"": data},
            thumbnails=thumbnails,
        )
        seconds, size = time.process_time() - started, path.stat().st_size
    return [str(thumbnails), f"{len(queries):,}", f"{len(ids):,}", f"{seconds:.1f}", f"{size / 1e6:.2f}"]


def draw_corpus(num_documents: int) -> Iterator[dict[str, Any]]:
    """Rows of a corpus of pages that differ, of the size of scans."""
    rng = np.random.default_rng(0)
    pages = [draw_scan(rng) for _ in range(50)]
    for at in range(num_documents):
        # Some bytes after its end make another page of a copy.
        content = pages[at % len(pages)] + at.to_bytes(4, "big")
        yield {"document_id": f"scan {at}", "image": {"bytes": content, "path": None}}


def draw_scan(rng: np.random.Generator, width_px: int = 827, height_px: int = 1169) -> bytes:
    """A page of A4 at 100 dpi with lines, boxes and noise, as a JPEG."""
    page = np.full((height_px, width_px), 235, dtype=np.int16)
    for top in range(60, height_px - 60, 26):
        page[top : top + 12, 60 : rng.integers(300, width_px - 60)] = rng.integers(20, 120)
        page[top : top + 12, rng.integers(0, width_px, width_px // 4)] = 235
    page += rng.integers(-4, 4, page.shape, dtype=np.int16)
    file = io.BytesIO()
    PillowImage.fromarray(page.clip(0, 255).astype(np.uint8)).convert("RGB").save(file, "JPEG", quality=75)
    return file.getvalue()


if __name__ == "__main__":
    main()
