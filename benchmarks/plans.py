"""Holds what ``finetune(..., dry_run=True)`` estimates against what then happens: CPU seconds and peak memory.

The work is that of ``versus_host.py``, and a batch of a tiny Qwen3-VL. Each plan and each run has a process of its own;
a plan's clock is set to CPU time, because these seconds do not depend on what else the machine does.

    python benchmarks/plans.py --data FOLDER

FOLDER holds parquet files with a column image; without it, noisy pages of the size of scans are drawn. The results go
into RESULTS.md.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import without_gpu  # noqa: F401

# isort: split

import versus_host
from datasets import load_from_disk
from measure import in_fresh_process, peak_mb, report, write_section
from scans import id_rows, scanned_pages

from mmtune import finetune, load_model
from mmtune.report.markdown import markdown_table
from mmtune.testing import tiny_qwen3_vl
from mmtune.training import rehearsal

QWEN3_VL = "tiny Qwen3-VL"
WORK = versus_host.WORK | {
    QWEN3_VL: {"rows": 128, "num_train_epochs": 1, "per_device_train_batch_size": 16, "save_strategy": "no"}
}
GOALS = {"seconds": 0.30, "mb": 0.20}


def prepare(folder: Path, name: str, data: Path | None) -> None:
    """The rows, the pages to evaluate on, and the model."""
    if name != QWEN3_VL:
        versus_host.prepare(folder, WORK[name], data)
        return
    id_rows(scanned_pages(WORK[name]["rows"], data)).save_to_disk(folder / "rows")
    tiny_qwen3_vl(folder / "model", max_pixels=300 * 300)


def call(folder: Path, name: str, *, dry_run: bool) -> None:
    """Plan or run, and report the seconds and the peak above the loaded model."""
    rehearsal.clock = time.process_time
    work = WORK[name]
    model = load_model(str(folder / "model"), device="cpu")
    rows = load_from_disk(str(folder / "rows"))
    evaluation = load_from_disk(str(folder / "evaluation")) if "eval_rows" in work else None
    options: dict[str, Any] = {"matryoshka_dims": [64], "mini_batch_size": 16, "keep": "last"}
    loaded, started = peak_mb(), time.process_time()
    found: Any = finetune(
        model,
        rows,
        evaluation,
        output_dir=folder / f"run-{time.time_ns()}",
        dry_run=dry_run,
        **options,
        **versus_host.host_arguments(work),
    )
    if dry_run:
        report(seconds=found.seconds, mb=found.memory_bytes / 1024**2)
    else:
        report(seconds=time.process_time() - started, mb=peak_mb() - loaded)


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image; drawn pages without")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return call(options.folder, options.work, dry_run=options.plan)
    cells = []
    for name in WORK:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), name, options.data)
            arguments = ("--work", name, "--folder", folder)
            plans, runs = (
                [in_fresh_process(__file__, *arguments, *more) for _ in range(options.repeats)]
                for more in (("--plan",), ())
            )
        row = [name]
        for key, goal in GOALS.items():
            planned, happened = (statistics.median(each[key] for each in found) for found in (plans, runs))
            off = planned / happened - 1
            row += [f"{planned:.1f}", f"{happened:.1f}", f"{off:+.0%}" + ("" if abs(off) <= goal else " (!)")]
        cells.append(row)
        print(row)
    head = ("work", "CPU s planned", "happened", "off by", "MB planned", "happened", "off by")
    pages = "scanned receipts" if options.data else "drawn scans"
    text = (
        f"`python benchmarks/plans.py`: `dry_run` on {pages}, medians of {options.repeats}; the goals are 30% of the "
        f"time and 20% of the memory. Memory is the peak above the loaded model.\n\n{markdown_table(head, cells)}"
    )
    print(text)
    write_section("Plans", text)
    return None


if __name__ == "__main__":
    main()
