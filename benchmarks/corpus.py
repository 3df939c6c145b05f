"""Encodes a corpus of few and of many pages into shards, and measures how the peak memory grows.

Each figure is from a process of its own that reads its pages from disk.

    python benchmarks/corpus.py
    python benchmarks/corpus.py --late --pages 200 2000
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

from datasets import Dataset, load_from_disk
from measure import in_fresh_process, machine, peak_mb, report

from mmtune import RetrievalDataset, build_late_interaction, encode_corpus, load_model
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages, tiny_clip, tiny_llava

MOST_MB_MORE = 100
_DRAWN = 200


def draw(num_pages: int, folder: Path) -> None:
    """Pages on disk; a few hundred are drawn, and the others have their images under ids of their own."""
    drawn = RetrievalDataset.from_id_rows(generated_pages(_DRAWN)).corpus
    rows = drawn.select([at % len(drawn) for at in range(num_pages)])
    images = [row["image"] for row in rows]
    ids = [f"page-{at}" for at in range(num_pages)]
    Dataset.from_dict(
        {"document_id": ids, "image": images}, features=rows.select_columns(["document_id", "image"]).features
    ).save_to_disk(str(folder))


def anonymous_mb() -> float:
    """The memory of this process that is no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if "RssAnon" in line)


class Watch(threading.Thread):
    """Looks at the memory every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        """Until ``ended`` is set."""
        while not self.ended.wait(0.02):
            self.most = max(self.most, anonymous_mb())


def encode(folder: Path, late: bool) -> None:
    """Encode the pages in ``folder``, and report seconds and memory."""
    corpus = load_from_disk(str(folder / "rows"))
    none = {"query_id": [], "text": []}, {"query_id": [], "document_id": [], "score": []}
    dataset = RetrievalDataset(corpus, *(_empty(columns) for columns in none))
    if late:
        model = build_late_interaction(str(folder / "model"), device="cpu")
    else:
        model = load_model(str(folder / "model"), device="cpu")
    before, started, watch = anonymous_mb(), time.process_time(), Watch()
    watch.start()
    written = encode_corpus(dataset, model, folder / "shards", show_progress_bar=False)
    watch.ended.set()
    size = sum(path.stat().st_size for path in written.glob("*.parquet")) / 1e6
    report(seconds=time.process_time() - started, more_mb=watch.most - before, peak_mb=peak_mb(), written_mb=size)


def _empty(columns: dict[str, list]) -> Dataset:
    example = {"query_id": ["q"], "text": ["t"], "document_id": ["d"], "score": [1]}
    return Dataset.from_dict({name: example[name] for name in columns}).select([])


def measure(num_pages: int, late: bool) -> dict[str, float]:
    """CPU seconds, memory and size of one corpus."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(num_pages, folder / "rows")
        (tiny_llava if late else tiny_clip)(folder / "model")
        return in_fresh_process(__file__, "--folder", folder, *["--late"] * late)


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--late", action="store_true", help="several vectors a page")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        encode(options.folder, options.late)
        return
    found = {size: measure(size, options.late) for size in options.pages}
    cells = [
        [
            f"{size:,}",
            f"{run['more_mb']:.0f}",
            f"{run['peak_mb']:.0f}",
            f"{run['written_mb']:.1f}",
            f"{run['seconds']:.0f}",
        ]
        for size, run in found.items()
    ]
    print(machine())
    print(
        markdown_table(
            ("pages", "MB more than before", "MB at most, mapped files included", "MB written", "CPU seconds"), cells
        )
    )
    few, many = options.pages[0], options.pages[-1]
    print(f"{found[many]['more_mb'] - found[few]['more_mb']:.0f} MB more for {many - few:,} more pages")
    print(f"Limit: {MOST_MB_MORE} MB.")


if __name__ == "__main__":
    main()
