"""Builds, views and splits a table of the size of the real data sets, and measures time and memory of each.

Each figure is from a process of its own that reads its input from disk, so that building the input hides nothing. The
images are a few bytes each: what is measured is the handling of ids, judgements and negatives.

    python benchmarks/scale.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Image, load_from_disk
from measure import in_fresh_process, machine, peak_mb, report

from mmtune import RetrievalDataset
from mmtune.report.markdown import markdown_table

MOST_SECONDS = 20
MOST_MB = 1500


def make_rows(num_rows: int, num_negatives: int) -> Dataset:
    """Rows in the id layout, each with a query and random negatives."""
    rng = np.random.default_rng(0)
    negatives = (np.arange(num_rows)[:, None] + rng.integers(1, num_rows, size=(num_rows, num_negatives))) % num_rows
    ids = pa.array([f"page-{row:07d}" for row in range(num_rows)])
    offsets = pa.array(np.arange(num_rows + 1) * num_negatives, type=pa.int32())
    images = pa.StructArray.from_arrays(
        [pa.array([b"image %d" % row for row in range(num_rows)]), pa.nulls(num_rows, pa.string())], ["bytes", "path"]
    )
    columns = {
        "id": ids,
        "query": pa.array([f"What does page {row} say?" for row in range(num_rows)]),
        "image": images,
        "negatives": pa.ListArray.from_arrays(offsets, ids.take(pa.array(negatives.reshape(-1)))),
    }
    return Dataset(pa.table(columns)).cast_column("image", Image())


def from_id_rows(folder: Path) -> Callable[[], object]:
    """The four tables from the rows."""
    rows = load_from_disk(str(folder / "rows"))
    return lambda: RetrievalDataset.from_id_rows(rows)


def from_shuffled_rows(folder: Path) -> Callable[[], object]:
    """The four tables from the rows in random order."""
    rows = load_from_disk(str(folder / "rows")).shuffle(seed=0)
    return lambda: RetrievalDataset.from_id_rows(rows)


def training_rows(folder: Path) -> Callable[[], object]:
    """Training rows with all of the negatives."""
    dataset = RetrievalDataset.load(folder / "tables")
    return lambda: dataset.training_rows(dataset.relevance.listed_negatives.lengths.max())


def split(folder: Path) -> Callable[[], object]:
    """A thousand queries kept for evaluation."""
    dataset = RetrievalDataset.load(folder / "tables")
    return lambda: dataset.split(min(1000, len(dataset) // 4))


def one_after_the_other(folder: Path) -> Callable[[], object]:
    """All three in one process, as a training script does it."""
    rows = load_from_disk(str(folder / "rows"))

    def run() -> object:
        train, _ = RetrievalDataset.from_id_rows(rows).split(min(1000, len(rows) // 4))
        return train.training_rows(16)

    return run


STEPS = {step.__name__: step for step in (from_id_rows, from_shuffled_rows, training_rows, split, one_after_the_other)}


def run_step(name: str, folder: Path, bare_mb: float) -> None:
    """Run one step on what ``folder`` holds, and report seconds and the peak of this process above the import."""
    step = STEPS[name](folder)
    started = time.perf_counter(), time.process_time()
    step()
    report(
        seconds=time.perf_counter() - started[0],
        cpu_seconds=time.process_time() - started[1],
        peak_mb=peak_mb() - bare_mb,
    )


def measure(num_rows: int, num_negatives: int) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each step, by its name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(num_rows, num_negatives).save_to_disk(str(folder / "rows"))
        RetrievalDataset.from_id_rows(load_from_disk(str(folder / "rows"))).save(folder / "tables")
        return {step: in_fresh_process(__file__, "--step", step, "--folder", folder) for step in STEPS}


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    bare_mb = peak_mb()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[125_000, 250_000, 500_000])
    parser.add_argument("--negatives", type=int, default=16, help="negatives a row")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.folder, bare_mb)
        return
    measured = {num_rows: measure(num_rows, options.negatives) for num_rows in options.rows}
    cells = [
        [step, f"{num_rows:,}", f"{found[step]['seconds']:.1f}", f"{found[step]['peak_mb']:.0f}"]
        for step in STEPS
        for num_rows, found in measured.items()
    ]
    print(machine())
    print(markdown_table(("step", "rows", "seconds", "MB above the import"), cells))
    print(f"\nLimits: {MOST_SECONDS} s and {MOST_MB} MB for each step.")


if __name__ == "__main__":
    main()
