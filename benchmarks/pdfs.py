"""Pages of PDFs: how fast they are read, by workers and sizes, and what memory that takes, by numbers of pages.

    python benchmarks/pdfs.py --data FOLDER

FOLDER holds PDFs, e.g. those of Debian's documentation packages (apt-get download r-doc-pdf gnuplot-doc; dpkg-deb -x);
without it, a few are generated and their pages repeated. Pages are read in a random order. The results go into
RESULTS.md.
"""

import argparse
import pickle
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import without_gpu  # noqa: F401

# isort: split

import numpy as np
from measure import in_fresh_process, peak_mb, report, write_section
from torch.utils.data import DataLoader

from mmtune import RetrievalDataset
from mmtune.data.documents import DocumentReader
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pdfs

SIZES = {"224 x 224 (CLIP)": (224, 224), "360,000 pixels (Qwen3-VL)": 360_000, "1,500,000 pixels": None}
WORKERS = (0, 1, 2, 4)
NUM_PAGES = (200, 1000, 4000)


def draw_ids(dataset: RetrievalDataset, num_pages: int) -> list[str]:
    """Ids of pages in a random order; each page once more where there are too few."""
    rows = np.random.default_rng(0).permutation(max(num_pages, len(dataset.corpus)))[:num_pages] % len(dataset.corpus)
    ids = dataset.corpus["document_id"][:]
    return [ids[row] for row in rows]


def read_page(reader: DocumentReader, document_ids: list[str]) -> int:
    """The number of pixels of a page, so that no pixels travel between processes."""
    return int(np.prod(reader.read(document_ids)[0].size))


def measure_reading(dataset: RetrievalDataset, size: str, workers: int, num_pages: int) -> None:
    """Seconds, pixels and peak memory of reading pages."""
    reader = DocumentReader(dataset.corpus, input_size=SIZES[size])
    started = time.perf_counter()
    loader = DataLoader(
        draw_ids(dataset, num_pages), batch_size=1, num_workers=workers, collate_fn=partial(read_page, reader)
    )
    pixels = sum(loader)
    report(seconds=time.perf_counter() - started, pixels=pixels / num_pages, peak_mb=peak_mb())


def measure_building(folder: Path, built: Path) -> None:
    """Seconds and peak memory of building a dataset, which is kept for the other measurements."""
    before, started = peak_mb(), time.perf_counter()
    dataset = RetrievalDataset.from_pdfs(folder, [])
    seconds = time.perf_counter() - started
    built.write_bytes(pickle.dumps(dataset))
    files = len(set(dataset.corpus["source"][:]))
    report(seconds=seconds, pages=len(dataset.corpus), files=files, before_mb=before, peak_mb=peak_mb())


def measure_store(dataset: RetrievalDataset, num_pages: int) -> None:
    """Seconds and bytes a page of writing a dataset with its pages rendered, and of reading it."""
    with tempfile.TemporaryDirectory() as store:
        kept = dataset.relevance.subset(np.array([], dtype=int), np.arange(min(num_pages, len(dataset.corpus))))
        few, started = RetrievalDataset.from_tables(kept), time.perf_counter()
        few.save(Path(store) / "saved")
        written = time.perf_counter() - started
        reader = DocumentReader(RetrievalDataset.load(Path(store) / "saved").corpus)
        started = time.perf_counter()
        for document_id in few.corpus["document_id"]:
            reader.read([document_id])
        read = time.perf_counter() - started
        size = sum(file.stat().st_size for file in (Path(store) / "saved" / "corpus").rglob("*.arrow"))
    report(written=written / len(few.corpus), read=read / len(few.corpus), kilobytes=size / len(few.corpus) / 1000)


def write_results(folder: str, data: str) -> None:
    """Run every measurement in a process of its own and write the section."""
    with tempfile.TemporaryDirectory() as scratch:
        run = partial(in_fresh_process, __file__, "--data", folder, "--built", Path(scratch) / "built")
        built = run("--part", "build")
        rates = []
        for size in SIZES:
            found = [run("--part", "read", "--size", size, "--workers", workers, "--pages", 400) for workers in WORKERS]
            rates.append([size, f"{found[0]['pixels']:,.0f}", *(f"{400 / each['seconds']:.0f}" for each in found)])
        memory = [run("--part", "read", "--size", list(SIZES)[-1], "--pages", number) for number in NUM_PAGES]
        store = run("--part", "store", "--pages", 100)
    peaks = [[f"{number:,}", f"{each['peak_mb']:.0f}"] for number, each in zip(NUM_PAGES, memory, strict=True)]
    more_mb = built["peak_mb"] - built["before_mb"]
    text = f"""\
`python benchmarks/pdfs.py{data}`, pypdfium2 {version("pypdfium2")}: {built["files"]:.0f} files,
{built["pages"]:,.0f} pages. Building a dataset of them took {built["seconds"]:.1f} s,
{1000 * built["seconds"] / built["pages"]:.1f} ms a page, most of
it for the text layer, and {more_mb:.0f} MB beside the {built["before_mb"]:.0f} MB of the imports.

400 pages in a random order, pages a second by workers of the data loader; with 0 the process itself reads, and starting
the others is counted.

{markdown_table(["read at", "pixels a page", *(f"{workers} workers" for workers in WORKERS)], rates)}

Peak memory of one process that reads pages at 1,500,000 pixels:

{markdown_table(["pages", "MB"], peaks)}

A page as PNG of 1,500,000 pixels, as `save` and `store` keep it: rendered and written in {1000 * store["written"]:.0f}
ms, read in {1000 * store["read"]:.0f} ms, {store["kilobytes"]:.0f} kB."""
    write_section("PDFs", text)


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of PDFs; generated ones without")
    parser.add_argument("--part", choices=("build", "read", "store"), help="one measurement, for a process of its own")
    parser.add_argument("--built", type=Path, help="where the measurements share what was built")
    parser.add_argument("--size", choices=list(SIZES), default=next(iter(SIZES)))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pages", type=int, default=200)
    options = parser.parse_args()
    if options.part == "build":
        measure_building(options.data, options.built)
    elif options.part == "read":
        measure_reading(pickle.loads(options.built.read_bytes()), options.size, options.workers, options.pages)
    elif options.part == "store":
        measure_store(pickle.loads(options.built.read_bytes()), options.pages)
    elif options.data is not None:
        write_results(str(options.data), " --data FOLDER")
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_results(generated_pdfs(folder), "")


if __name__ == "__main__":
    main()
