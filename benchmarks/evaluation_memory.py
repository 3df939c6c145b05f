"""Evaluates few and many pages of the size of scanned receipts, and measures how the peak memory grows.

Each figure is from a process of its own that reads its pages from disk; the host's evaluator, built by hand as in its
documentation, stands beside it.

    python benchmarks/evaluation_memory.py
    python benchmarks/evaluation_memory.py --data FOLDER

FOLDER holds parquet files with a column image.
"""

import argparse
import tempfile
import time
from pathlib import Path

from datasets import load_from_disk
from measure import in_fresh_process, machine, peak_mb, report
from scans import id_rows, scanned_pages
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from mmtune import build_evaluator
from mmtune.report.markdown import markdown_table
from mmtune.testing import tiny_clip

MOST_MB_MORE = 400


def evaluate(side: str, folder: Path, bare_mb: float) -> None:
    """Evaluate the pages in ``folder`` with ours or the host's evaluator, and report seconds, memory and nDCG."""
    rows = load_from_disk(str(folder / "rows"))
    model = SentenceTransformer(str(folder / "clip"), device="cpu")
    started = time.process_time()
    if side == "mmtune":
        evaluator = build_evaluator(rows, show_progress_bar=False)
    else:
        evaluator = InformationRetrievalEvaluator(
            queries=dict(zip(rows["id"], rows["query"], strict=True)),
            corpus=dict(zip(rows["id"], rows["image"], strict=True)),
            relevant_docs={query_id: {query_id} for query_id in rows["id"]},
            batch_size=16,
            name="vdr",
        )
    metrics = evaluator(model)
    report(cpu_seconds=time.process_time() - started, peak_mb=peak_mb() - bare_mb, ndcg=metrics["vdr_cosine_ndcg@10"])


def measure(side: str, num_pages: int, data: Path | None) -> dict[str, float]:
    """CPU seconds, peak memory above the import and nDCG@10 of one evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        id_rows(scanned_pages(num_pages, data)).save_to_disk(f"{folder}/rows")
        tiny_clip(f"{folder}/clip")
        return in_fresh_process(__file__, "--side", side, "--folder", folder)


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    bare_mb = peak_mb()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image; drawn pages without")
    parser.add_argument("--pages", type=int, nargs="+", default=[60, 600])
    parser.add_argument("--host-pages", type=int, nargs="*", default=[60, 300], help="the host takes gigabytes")
    parser.add_argument("--side", choices=["mmtune", "host"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        evaluate(options.side, options.folder, bare_mb)
        return
    runs = [("mmtune", size) for size in options.pages] + [("host", size) for size in options.host_pages]
    found = {run: measure(*run, options.data) for run in runs}
    cells = [
        [side, str(size), f"{run['peak_mb']:.0f}", f"{run['cpu_seconds']:.1f}", f"{run['ndcg']:.6f}"]
        for (side, size), run in found.items()
    ]
    print(machine())
    print(markdown_table(("evaluator", "pages", "MB above the import", "CPU seconds", "ndcg@10"), cells))
    growth = {}
    for side, sizes in (("mmtune", options.pages), ("host", options.host_pages)):
        if len(sizes) > 1:
            more = found[side, sizes[-1]]["peak_mb"] - found[side, sizes[0]]["peak_mb"]
            growth[side] = more / (sizes[-1] - sizes[0])
            print(f"{side}: {more:.0f} MB more for {sizes[-1] - sizes[0]} more pages, {growth[side]:.2f} MB a page")
    if len(growth) == 2:
        print(f"mmtune grows by {growth['mmtune'] / growth['host']:.3f} of what the host grows by")
    print(f"Limit: {MOST_MB_MORE} MB more for 600 pages than for 60.")


if __name__ == "__main__":
    main()
