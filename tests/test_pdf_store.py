"""Pages of PDFs in a folder: rendered once, also by several processes, and after any kill."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmtune import DatasetError, RetrievalDataset
from mmtune.data import pdf_corpus
from mmtune.data.images import decode_page
from mmtune.testing import generated_pdfs
from mmtune.testing.pdfs import PdfPageContent, write_pdf

pytest.importorskip("pypdfium2")

NUM_PAGES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(generated_pdfs(tmp_path_factory.mktemp("pdfs")))


def build(folder: Path, store: Path) -> RetrievalDataset:
    return RetrievalDataset.from_pdfs(folder, store=store, max_pixels=100_000)


def written(store: Path) -> dict[str, tuple[int, int]]:
    """When each file of a page was written, and which file it is on the disk."""
    found = ((path, path.stat()) for path in store.rglob("*.png"))
    return {str(path.relative_to(store)): (stat.st_mtime_ns, stat.st_ino) for path, stat in found}


def start(target: Callable, *arguments) -> multiprocessing.Process:
    # forked: importing the stack takes five seconds
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def require_whole(dataset: RetrievalDataset, folder: Path, store: Path) -> None:
    """Each page is there once, and shows what the PDF shows."""
    direct = RetrievalDataset.from_pdfs(folder, max_pixels=100_000)
    assert dataset.corpus["document_id"][:] == direct.corpus["document_id"][:]
    assert len(written(store)) == NUM_PAGES
    for row in range(0, NUM_PAGES, 3):
        stored, rendered = (each.corpus[row]["image"] for each in (dataset, direct))
        assert np.array_equal(decode_page(stored, "x"), decode_page(rendered, "x"))
    assert not list(store.rglob("*.partial"))


def test_pages_are_rendered_once_by_the_content_of_their_file(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "deep" / "store"
    dataset = build(folder, store)
    require_whole(dataset, folder, store)
    assert dataset.corpus[0]["image"]["bytes"] is None
    first = written(store)
    assert build(folder, store).corpus[0]["image"] == dataset.corpus[0]["image"]
    copied = tmp_path / "moved"
    folder.rename(copied)
    try:
        build(copied, store)
    finally:
        copied.rename(folder)
    assert written(store) == first
    RetrievalDataset.from_pdfs(folder, store=store, max_pixels=50_000)
    assert len(written(store)) == 2 * NUM_PAGES, "pages of another size are other files"
    assert len(dataset) == 30
    assert len(dataset.split(6)[1]) == 6


def test_a_changed_file_is_rendered_again_and_the_others_are_not(tmp_path: Path) -> None:
    folder, store = tmp_path / "pdfs", tmp_path / "store"
    folder.mkdir()
    for name in ("a.pdf", "b.pdf"):
        write_pdf(folder / name, [PdfPageContent(), PdfPageContent(b"0 0 50 50 re f")])
    write_pdf(folder / "c.pdf", [PdfPageContent(b"0 0 60 50 re f")])
    build(folder, store)
    first = written(store)
    assert len(first) == 3, "a and b are the same file"
    write_pdf(folder / "c.pdf", [PdfPageContent(b"0 0 99 50 re f")])
    build(folder, store)
    assert len(written(store)) == 4
    assert first.items() <= written(store).items()


def kill_while_rendering(folder: Path, store: Path, num_files: int) -> None:
    """A process that renders into a store is killed when so many files of pages are there."""
    process = start(build, folder, store)
    deadline = time.monotonic() + 60
    while process.is_alive() and len(list(store.rglob("*.png"))) < num_files and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def require_resumes(folder: Path, store: Path, moments: list[int]) -> None:
    before: dict[str, tuple[int, int]] = {}
    for num_files in moments:
        kill_while_rendering(folder, store, num_files)
        now = written(store)
        assert before.items() <= now.items(), "nothing is rendered twice"
        before = now
    dataset = build(folder, store)
    assert before.items() <= written(store).items()
    require_whole(dataset, folder, store)


def test_a_process_that_was_killed_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    require_resumes(folder, tmp_path / "store", [1, 17])


@pytest.mark.slow
def test_ten_kills_lose_no_page_and_render_none_twice(folder: Path, tmp_path: Path) -> None:
    require_resumes(folder, tmp_path / "store", [0, 1, 3, 7, 11, 16, 22, 29, 33, 39])


def count_rendered(folder: Path, store: Path, rendered: "multiprocessing.Queue") -> None:
    write_page = pdf_corpus._write_page

    def count(encoded: dict, document_id: str, file: Path) -> None:
        write_page(encoded, document_id, file)
        rendered.put(document_id)

    pdf_corpus._write_page = count
    build(folder, store)


def test_two_processes_share_the_work_and_render_nothing_twice(folder: Path, tmp_path: Path) -> None:
    rendered = multiprocessing.get_context("fork").Queue()
    store = tmp_path / "store"
    processes = [start(count_rendered, folder, store, rendered) for _ in range(2)]
    ids = [rendered.get(timeout=60) for _ in range(NUM_PAGES)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert rendered.empty()
    assert len(set(ids)) == NUM_PAGES
    require_whole(build(folder, store), folder, store)


def test_a_fork_waits_for_the_page_that_is_rendered(folder: Path) -> None:
    """A child that was forked in the middle of PDFium would hang or crash."""
    dataset = RetrievalDataset.from_pdfs(folder)
    is_over = threading.Event()

    def render() -> None:
        while not is_over.is_set():
            decode_page(dataset.corpus[1]["image"], "x", max_pixels=200_000)

    thread = threading.Thread(target=render)
    thread.start()
    try:
        for row in range(5):
            child = start(decode_page, dataset.corpus[row]["image"], "x")
            child.join(30)
            assert child.exitcode == 0
    finally:
        is_over.set()
        thread.join()


def test_what_can_not_be_written_is_named_and_what_was_stays(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"Pages can't be written to .*file': (File exists|Not a directory)"):
        build(folder, tmp_path / "file")
    write_page = pdf_corpus._write_page

    def fail(encoded: dict, document_id: str, file: Path) -> None:
        if len(written(tmp_path / "store")) == 5:
            raise OSError(28, "No space left on device")
        write_page(encoded, document_id, file)

    monkeypatch.setattr(pdf_corpus, "_write_page", fail)
    with pytest.raises(DatasetError, match=r"'.*store': No space left on device\. What was rendered stays there"):
        build(folder, tmp_path / "store")
    first = written(tmp_path / "store")
    assert len(first) == 5
    monkeypatch.undo()
    require_whole(build(folder, tmp_path / "store"), folder, tmp_path / "store")
    assert first.items() <= written(tmp_path / "store").items()
