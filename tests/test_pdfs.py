"""Pages of PDFs are documents like others: rendered when they are read, the same under every name, errors by name."""

import logging
import os
import pickle
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from mmtune import (
    ConfigError,
    DatasetError,
    ImageDecodeError,
    MissingExtraError,
    RetrievalDataset,
    build_evaluator,
    finetune,
    finetune_reranker,
    mine_hard_negatives,
)
from mmtune.data import pdfs
from mmtune.data.documents import DocumentReader
from mmtune.data.images import decode_page
from mmtune.data.intake import relevant_on_both_sides
from mmtune.data.pages import Page
from mmtune.testing import generated_pdfs
from mmtune.testing.pdfs import PdfPageContent, show_text, write_pdf, write_scans

pytest.importorskip("pypdfium2")

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(generated_pdfs(tmp_path_factory.mktemp("pdfs")))


@pytest.fixture(scope="module")
def dataset(folder: Path) -> RetrievalDataset:
    return RetrievalDataset.from_pdfs(folder)


def coloured(number: int, size: tuple[int, int] = (200, 100), **options) -> PdfPageContent:
    """A page whose red is its number, and whose text says so."""
    paint = f"{number / 255:.5f} 0 0 rg 0 0 {size[0]} {size[1]} re f 1 g\n".encode()
    return PdfPageContent(paint + show_text(20, 20, 12, f"page {number}"), size, **options)


def write_pages(path: Path, *numbers: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pdf(path, [coloured(number) for number in numbers])
    return path


def read(dataset: RetrievalDataset, document_id: str, **options) -> Image.Image:
    row = dataset.corpus["document_id"][:].index(document_id)
    return decode_page(dataset.corpus[row]["image"], document_id, **options)


def test_each_page_is_a_document_with_its_file_its_number_and_its_text(dataset: RetrievalDataset) -> None:
    assert len(dataset.corpus) == 40
    row = next(row for row in dataset.corpus if row["text"] and row["page_number"] == 2)
    source, number = row["source"], row["page_number"]
    assert (row["document_id"], number) == (f"{source}#2", 2)
    assert Path(source).stem in row["text"]
    assert "40 documents (text+image)" in repr(dataset)
    assert dataset.audit().problems == ()


def test_the_queries_of_the_folder_point_to_what_answers_them(dataset: RetrievalDataset) -> None:
    text_by_id = dict(zip(dataset.corpus["document_id"], dataset.corpus["text"], strict=True))
    query_by_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    judged = [(query_by_id[row["query_id"]], row["document_id"]) for row in dataset.qrels]
    assert len(judged) == 30
    for query, document_id in judged:
        company, topic = Path(document_id.partition("#")[0]).stem, (text_by_id[document_id] or "").lower()
        assert company in query
        assert document_id.startswith(query.rstrip("?")[-4:]) or document_id[:4] in query
        if topic:
            assert any(word.strip("?") in topic for word in query.lower().split() if word != company.lower())


def test_kinds_of_pages_look_as_a_reader_shows_them(tmp_path: Path) -> None:
    corner = PdfPageContent(b"1 0 0 rg 0 80 20 20 re f", (200, 100))
    write_pdf(
        tmp_path / "kinds.pdf",
        [
            corner,
            PdfPageContent(corner.operators, corner.size, rotation=90),
            PdfPageContent(corner.operators, corner.size, rotation=180),
            PdfPageContent(b"", (200, 300), fields={"name": "MMMMMMMMMMMM"}),
        ],
    )
    scan = Image.new("RGB", (30, 40), (0, 128, 0))
    scan.save(tmp_path / "scan.png")
    write_scans(tmp_path / "scan.pdf", [(tmp_path / "scan.png").read_bytes()])
    built = RetrievalDataset.from_pdfs(tmp_path, max_pixels=20_000)
    upper_left, upper_right, lower_right = (
        read(built, f"kinds.pdf#{number}").getpixel(place)
        for number, place in [(1, (5, 5)), (2, (90, 5)), (3, (190, 90))]
    )
    assert upper_left == upper_right == lower_right == (255, 0, 0)
    assert read(built, "kinds.pdf#1").size == (200, 100)
    assert read(built, "kinds.pdf#2").size == (100, 200)
    assert np.asarray(read(built, "kinds.pdf#4")).min() < 100, "the values in forms are drawn"
    assert read(built, "scan.pdf#1").getpixel((10, 10)) == pytest.approx((0, 128, 0), abs=3)
    assert built.corpus["text"][-1] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1732, 866)),
        ({"max_pixels": 20_000}, (200, 100)),
        ({"max_pixels": 20_000, "at_least": (10, 300)}, (600, 300)),
        ({"enough": 80_000}, (400, 200)),
        ({"enough": (560, 560)}, (1120, 560)),
        ({"enough": (5000, 5000)}, (1732, 866)),
    ],
)
def test_a_page_is_rendered_at_the_size_that_it_is_read_at(tmp_path: Path, options: dict, expected: tuple) -> None:
    write_pdf(tmp_path / "a.pdf", [coloured(200, (2000, 1000))])
    built = RetrievalDataset.from_pdfs(tmp_path)
    assert read(built, "a.pdf#1", **options).size == expected
    assert Page(built.corpus[0]["image"], "a.pdf#1").size == (1732, 866)


def test_small_pages_are_not_blown_up_and_strips_keep_a_pixel(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [coloured(1, (72, 36)), coloured(2, (14_000, 1))])
    built = RetrievalDataset.from_pdfs(tmp_path, max_pixels=100_000)
    assert read(built, "a.pdf#1").size == (300, 150)
    assert read(built, "a.pdf#2").size[1] >= 1
    assert np.prod(read(built, "a.pdf#2").size) <= 100_000


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
def test_a_page_of_20000_pixels_takes_the_memory_of_what_is_read(tmp_path: Path) -> None:
    write_pdf(tmp_path / "plan.pdf", [coloured(99, (20_000, 20_000))])
    before = peak_bytes()
    built = RetrievalDataset.from_pdfs(tmp_path)
    assert read(built, "plan.pdf#1").size == (1224, 1224)
    assert peak_bytes() - before < 100e6


def test_a_long_file_is_read_from_both_ends(tmp_path: Path) -> None:
    write_pages(tmp_path / "long.pdf", *(number % 256 for number in range(600)))
    built = RetrievalDataset.from_pdfs(tmp_path / "long.pdf")
    assert len(built.corpus) == 600
    for number in (600, 1, 301):
        red = read(built, f"long.pdf#{number}", max_pixels=5000).getpixel((95, 2))[0]
        assert red == pytest.approx((number - 1) % 256, abs=1)


def test_what_cannot_be_read_is_named_at_the_end_and_left_out(tmp_path: Path, caplog, monkeypatch) -> None:
    write_pages(tmp_path / "good.pdf", 1, 2)
    whole = write_pages(tmp_path / "cut.pdf", 3).read_bytes()
    (tmp_path / "cut.pdf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pdf").write_bytes(b"")
    (tmp_path / "text.pdf").write_bytes(b"no PDF")
    write_pdf(tmp_path / "nothing.pdf", [])
    (tmp_path / "good.pdf").with_name("pages.pdf").write_bytes(
        write_pages(tmp_path / "x" / "pages.pdf", 4, 5)
        .read_bytes()
        .replace(b"/Kids [4 0 R 6 0 R]", b"/Kids [4 0 R 9 0 R]")
    )
    shutil.rmtree(tmp_path / "x")
    with caplog.at_level(logging.WARNING):
        built = RetrievalDataset.from_pdfs(tmp_path)
    assert built.corpus["document_id"][:] == ["good.pdf#1", "good.pdf#2", "pages.pdf#1"]
    message = caplog.messages[-1]
    for name, why in {
        "cut.pdf": "it is no PDF, is damaged, or has no pages",
        "empty.pdf": "it is empty",
        "text.pdf": "it is no PDF",
        "nothing.pdf": "it is no PDF, is damaged, or has no pages",
        "pages.pdf#2": "the page can't be loaded",
    }.items():
        assert f"\n  {name}: {why}" in message
    finding = built.audit()["unreadable_sources"]
    assert (finding.count, finding.is_problem) == (5, True)
    assert ("cut.pdf",) in [example.document_ids for example in finding.examples]
    built.save(tmp_path / "saved")
    assert RetrievalDataset.load(tmp_path / "saved").audit()["unreadable_sources"].count == 5
    with pytest.raises(
        DatasetError, match=r"5 files or pages of 6 PDFs can't be read:(.|\n)*text\.pdf.*(.|\n)*on_bad_file"
    ):
        RetrievalDataset.from_pdfs(tmp_path, on_bad_file="error")


def test_files_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pages(tmp_path / "good.pdf", 1)
    locked = write_pages(tmp_path / "locked.pdf", 2)
    opened = Path.open

    def refuse(path: Path, *args, **kwargs):
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, who may read everything
    built = RetrievalDataset.from_pdfs(tmp_path)
    assert built.notes.unreadable_sources == (("locked.pdf", "it can't be read: Permission denied"),)


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """Three files: one that asks for a password, one for another, one that has one for its owner alone."""
    fpdf = pytest.importorskip("fpdf")
    for name, user in {"first.pdf": "sesame", "second.pdf": "mellon", "owner.pdf": ""}.items():
        document = fpdf.FPDF()
        document.add_page()
        document.set_font("helvetica", size=24)
        document.cell(text=f"secret of {name}")
        document.set_encryption(
            owner_password="owner", user_password=user, permissions=fpdf.enums.AccessPermission.none()
        )
        document.output(str(tmp_path / name))
    return tmp_path


def test_encrypted_files_open_with_their_passwords(encrypted: Path) -> None:
    without = RetrievalDataset.from_pdfs(encrypted)
    assert without.corpus["source"][:] == ["owner.pdf"]
    assert {why for _, why in without.notes.unreadable_sources} == {"it is encrypted: pass its password in passwords="}
    one = RetrievalDataset.from_pdfs(encrypted, passwords="sesame")
    assert one.corpus["source"][:] == ["first.pdf", "owner.pdf"]
    assert one.notes.unreadable_sources[0][1] == "it is encrypted, and the password of passwords= does not open it"
    passwords = {"first.pdf": "sesame", str(encrypted / "second.pdf"): "mellon"}
    both = pickle.loads(pickle.dumps(RetrievalDataset.from_pdfs(encrypted, passwords=passwords)))
    assert both.corpus["text"][1] == "secret of owner.pdf"
    assert "first" in both.corpus["text"][0]
    assert np.asarray(read(both, "second.pdf#1")).min() < 100
    both.save(encrypted / "saved")
    written = b"".join(file.read_bytes() for file in (encrypted / "saved").rglob("*") if file.is_file())
    assert b"sesame" not in written
    assert np.array_equal(read(RetrievalDataset.load(encrypted / "saved"), "first.pdf#1"), read(both, "first.pdf#1"))


def test_ids_take_folders_where_names_clash(tmp_path: Path) -> None:
    for number, name in enumerate(["a/report.pdf", "b/report.pdf", "b/other.pdf", "x/c/same.PDF", "y/c/same.PDF"]):
        write_pages(tmp_path / name, number)
    ids = ["a/report.pdf#1", "b/other.pdf#1".removeprefix("b/"), "b/report.pdf#1", "x/c/same.PDF#1", "y/c/same.PDF#1"]
    whole = RetrievalDataset.from_pdfs(tmp_path)
    assert whole.corpus["document_id"][:] == ids
    assert RetrievalDataset.from_pdfs([tmp_path / "a", tmp_path / "b"]).corpus["document_id"][:] == ids[:3]
    twice = [tmp_path / "a", f"{tmp_path}/b/../a", tmp_path / "a" / "report.pdf", str(tmp_path / "**" / "rep*.pdf")]
    assert RetrievalDataset.from_pdfs(twice).corpus["document_id"][:] == [ids[0], ids[2]]
    assert RetrievalDataset.from_pdfs(tmp_path / "a").corpus["document_id"][:] == ["report.pdf#1"]


NAMES = [
    "Prüfbericht „2021“.pdf",
    'it\'s "quoted".pdf',
    "#1 50% a+b.pdf",
    "日本語.pdf",
    "[x] {y}.pdf",
    "~tilde $HOME.pdf",
]


def test_names_of_all_kinds_are_found_read_saved_and_asked_about(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        write_pages(tmp_path / name, 10 * number)
    rows = [{"text": f"ask {name}", "source": unicodedata.normalize("NFD", name), "page_number": 1} for name in NAMES]
    built = RetrievalDataset.from_pdfs([str(tmp_path / name) for name in NAMES], rows)
    assert built.qrels["document_id"][:] == [f"{name}#1" for name in NAMES]
    built.check_pages(show_progress_bar=False)
    built.save(tmp_path / "saved")
    for loaded in (built, RetrievalDataset.load(tmp_path / "saved")):
        for number, name in enumerate(NAMES):
            assert read(loaded, f"{name}#1", max_pixels=5000).getpixel((95, 2))[0] == pytest.approx(10 * number, abs=1)


def test_a_name_that_is_no_utf8_is_listed(tmp_path: Path) -> None:
    write_pages(tmp_path / "good.pdf", 1)
    try:
        shutil.copy(tmp_path / "good.pdf", os.fsencode(tmp_path) + b"/bad\xff.pdf")
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    built = RetrievalDataset.from_pdfs(tmp_path)
    assert built.notes.unreadable_sources == (("bad?.pdf", "its name is no UTF-8: rename it"),)


def test_one_file_under_two_names_holds_the_same_pages(tmp_path: Path) -> None:
    write_pages(tmp_path / "a" / "one.pdf", 1, 2)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "one.pdf", tmp_path / "b" / "two.pdf")
    rows = [{"text": "ask", "source": "one.pdf", "page_number": 1}]
    built = RetrievalDataset.from_pdfs([tmp_path / "a", tmp_path / "b"], rows)
    assert built.relevance.page.tolist() == [0, 1, 0, 1]
    assert built.audit().counts["identical_pages"] == 2
    single = built.deduplicate()
    assert single.corpus["document_id"][:] == ["one.pdf#1", "one.pdf#2"]
    first, second = (Page(built.corpus[row]["image"], "x").digest() for row in (0, 2))
    assert first == second != Page(built.corpus[1]["image"], "x").digest()
    joined = RetrievalDataset.concatenate({"a": built, "b": single})
    assert len(joined.deduplicate().corpus) == 2
    assert read(joined, "b/one.pdf#2").getpixel((1, 1))[0] == 2


def test_a_changed_file_is_noticed_and_the_others_are_read_on(tmp_path: Path) -> None:
    changed, other = write_pages(tmp_path / "a.pdf", 1), write_pages(tmp_path / "b.pdf", 2)
    built = RetrievalDataset.from_pdfs(tmp_path)
    assert read(built, "a.pdf#1").getpixel((1, 1))[0] == 1
    original = changed.read_bytes()
    write_pages(changed, 7)
    with pytest.raises(
        ImageDecodeError, match=r"'a\.pdf#1' can't be rendered .*a\.pdf'\): the file has changed since.*again"
    ):
        read(built, "a.pdf#1")
    with pytest.raises(ImageDecodeError, match="has changed"):
        built.check_pages(show_progress_bar=False)
    assert read(built, "b.pdf#1").getpixel((1, 1))[0] == 2
    assert read(RetrievalDataset.from_pdfs(tmp_path), "a.pdf#1").getpixel((1, 1))[0] == 7
    changed.write_bytes(original)
    os.utime(changed, ns=(1, 1))
    assert read(built, "a.pdf#1").getpixel((1, 1))[0] == 1
    other.unlink()
    assert built.audit().counts["unreadable_images"] == 1
    with pytest.raises(ImageDecodeError, match=r"'b\.pdf#1' .*can't be read: No such file"):
        read(built, "b.pdf#1")
    with pytest.raises(DatasetError, match=r"1 pages are missing, e\.g\. .*b\.pdf"):
        built.save(tmp_path / "saved")


def test_what_is_saved_is_read_without_the_pdfs(folder: Path, tmp_path: Path) -> None:
    built = RetrievalDataset.from_pdfs(folder, max_pixels=40_000)
    built.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"corpus", "queries", "qrels"}
    loaded = RetrievalDataset.load(tmp_path / "saved")
    assert loaded.corpus.column_names == built.corpus.column_names
    for name in ("document_id", "text", "source", "page_number"):
        assert loaded.corpus[name][:] == built.corpus[name][:]
    for row in (0, 7, 39):
        image = loaded.corpus[row]["image"]
        assert image["bytes"].startswith(b"\x89PNG")
        assert np.array_equal(decode_page(image, "x"), decode_page(built.corpus[row]["image"], "x"))


def test_pages_of_pdfs_and_images_are_saved_together_in_their_order(tmp_path: Path, pages) -> None:
    write_pages(tmp_path / "a.pdf", 1, 2)
    images = RetrievalDataset.from_id_rows(pages)
    joined = RetrievalDataset.concatenate([RetrievalDataset.from_pdfs(tmp_path), images])
    order = np.random.default_rng(0).permutation(len(joined.corpus))
    mixed = RetrievalDataset(joined.corpus.select(order), joined.queries, joined.qrels, joined.negatives)
    mixed.save(tmp_path / "saved")
    loaded = RetrievalDataset.load(tmp_path / "saved")
    assert loaded.corpus["document_id"][:] == mixed.corpus["document_id"][:]
    for row in range(len(order)):
        assert np.array_equal(
            decode_page(loaded.corpus[row]["image"], "x"), decode_page(mixed.corpus[row]["image"], "x")
        )


def test_workers_and_threads_read_the_same_pixels(dataset: RetrievalDataset) -> None:
    rows = dataset.training_rows(input_size=(64, 64))
    expected = [np.asarray(rows[at]["image"]) for at in range(len(rows))]
    for workers in (1, 2):
        loader = DataLoader(rows, batch_size=4, num_workers=workers, collate_fn=list)
        found = [np.asarray(row["image"]) for batch in loader for row in batch]
        assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: np.asarray(rows[at]["image"]), list(range(len(rows))) * 4))
    assert all(np.array_equal(one, other) for one, other in zip(expected * 4, found, strict=True))


def test_rows_travel_in_pickles(dataset: RetrievalDataset) -> None:
    rows = dataset.training_rows()
    copied = pickle.loads(pickle.dumps(rows))
    assert np.array_equal(copied[3]["image"], rows[3]["image"])


def test_text_is_read_where_it_is_asked_for_alone(dataset: RetrievalDataset) -> None:
    ids = [name for name, text in zip(dataset.corpus["document_id"], dataset.corpus["text"], strict=True) if text][:2]
    assert all(isinstance(page, Image.Image) for page in DocumentReader(dataset.corpus).read(ids))
    assert all(isinstance(text, str) for text in DocumentReader(dataset.corpus, "text").read(ids))
    both = DocumentReader(dataset.corpus, "text+image").read(ids)
    assert [sorted(each) for each in both] == [["image", "text"]] * 2
    scanned = next(
        name for name, text in zip(dataset.corpus["document_id"], dataset.corpus["text"], strict=True) if not text
    )
    with pytest.raises(DatasetError, match=rf"'{scanned}' has no text"):
        DocumentReader(dataset.corpus, "text").read([scanned])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_no_more_than_a_few_files_are_open(tmp_path: Path) -> None:
    for number in range(20):
        write_pages(tmp_path / f"{number:02}.pdf", number)
    pdfs._DOCUMENTS.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    built = RetrievalDataset.from_pdfs(tmp_path)
    for _ in range(3):
        for number in range(20):
            assert read(built, f"{number:02}.pdf#1", max_pixels=5000).getpixel((95, 2))[0] == pytest.approx(
                number, abs=1
            )
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    write_pages(tmp_path / "report.pdf", 1)
    with pytest.raises(DatasetError, match=r"reprot\.pdf' does not exist.*Did you mean .*report\.pdf'"):
        RetrievalDataset.from_pdfs(tmp_path / "reprot.pdf")
    with pytest.raises(DatasetError, match="matches nothing"):
        RetrievalDataset.from_pdfs(str(tmp_path / "*.doc"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DatasetError, match="There is no PDF in paths="):
        RetrievalDataset.from_pdfs(tmp_path / "none")
    with pytest.raises(DatasetError, match=r"'a\\x00b'"):
        RetrievalDataset.from_pdfs("a\0b")


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        *[({"paths": value}, ConfigError) for value in (None, 5, "", [None], [5], True, b"x")],
        ({"paths": []}, DatasetError),
        *[({"max_pixels": value}, ConfigError) for value in (0, -1, 1.5, True, "1", None)],
        *[({"on_bad_file": value}, ConfigError) for value in ("skip", None, True)],
        *[({"store": value}, ConfigError) for value in (5, "", True)],
        *[({"passwords": value}, ConfigError) for value in (5, ["a"], {"a": 5}, {5: "a"}, b"x")],
        *[({"queries": value}, DatasetError) for value in (5, [5], "x.csv", "x.txt", True, {"text": "a"})],
    ],
)
def test_arguments_of_the_wrong_kind_are_named(folder: Path, changed: dict, error: type[Exception]) -> None:
    name = next(iter(changed))
    with pytest.raises(error, match=name if error is ConfigError else "."):
        RetrievalDataset.from_pdfs(**{"paths": folder, **changed})


def test_a_folder_that_can_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("2024"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=r"The folder '.*2024' can't be read: Permission denied"):
        RetrievalDataset.from_pdfs(folder)


def test_numbers_of_numpy_are_numbers(folder: Path) -> None:
    built = RetrievalDataset.from_pdfs(folder, max_pixels=np.int64(10_000))
    assert np.prod(decode_page(built.corpus[0]["image"], "x").size) <= 10_000


def test_without_the_package_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(pdfs, "_pdfium", pdfs._pdfium.__wrapped__)
    monkeypatch.setattr(pdfs.importlib, "import_module", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install pypdfium2 .*\[pdf\]"):
        RetrievalDataset.from_pdfs(folder)


def test_a_table_from_elsewhere_names_no_pdf_of_this_machine(dataset: RetrievalDataset, tmp_path: Path) -> None:
    rows = dataset.corpus.select(range(2)).rename_column("document_id", "id").add_column("query", ["a", "b"])
    (tmp_path / "other").mkdir()
    parquet.write_table(rows.data.table, tmp_path / "other" / "rows.parquet")
    with pytest.raises(DatasetError, match="2 images lie outside the folder of the table"):
        RetrievalDataset.load(tmp_path / "other" / "rows.parquet")


def test_a_damaged_reference_is_named() -> None:
    with pytest.raises(ImageDecodeError, match="'x' can't be read: the reference"):
        decode_page({"bytes": b"%mmtune-pdf-page {", "path": "a.pdf"}, "x")


def test_a_folder_of_pdfs_is_loaded_and_takes_no_configurations(folder: Path, tmp_path: Path) -> None:
    assert len(RetrievalDataset.load(folder)) == 30
    assert len(RetrievalDataset.load(next(folder.rglob("*.pdf"))).corpus) == 4
    with pytest.raises(DatasetError, match="A folder of PDFs without tables has no configurations"):
        RetrievalDataset.load(folder, split="train")


def test_calls_that_ask_refuse_a_folder_without_queries(folder: Path, tmp_path: Path, clip_path: str) -> None:
    shutil.copytree(folder, tmp_path / "pdfs")
    (tmp_path / "pdfs" / "queries.csv").unlink()
    needed = r"no queries: 40 documents.*generate_queries\(dataset, generator\)"
    for call in (finetune, finetune_reranker):
        with pytest.raises(DatasetError, match=needed):
            call(clip_path, tmp_path / "pdfs", output_dir=tmp_path / "run")
    with pytest.raises(DatasetError, match=needed):
        finetune(clip_path, folder, tmp_path / "pdfs", output_dir=tmp_path / "run")
    with pytest.raises(DatasetError, match=needed):
        build_evaluator(tmp_path / "pdfs")


def test_negatives_are_mined_from_pages_of_pdfs(dataset: RetrievalDataset, clip_path: str) -> None:
    model = SentenceTransformer(clip_path, device="cpu")
    mined = mine_hard_negatives(dataset, model, num_negatives=2, show_progress_bar=False)
    assert len(mined.negatives) == 30


def test_finetuning_takes_a_folder(folder: Path, clip_path: str, tmp_path: Path) -> None:
    train, evaluation = RetrievalDataset.load(folder).split(9)
    result = finetune(
        clip_path, train, evaluation, output_dir=tmp_path / "run", max_steps=2, per_device_train_batch_size=4
    )
    assert result.after
    assert (tmp_path / "run" / "final" / "modules.json").is_file()


def copied_under_another_name(tmp_path: Path) -> Path:
    """Two files of one content, x.pdf and y.pdf, and another, z.pdf."""
    write_pages(tmp_path / "a" / "x.pdf", 1, 2, 3, 4, 5, 6)
    shutil.copy(tmp_path / "a" / "x.pdf", tmp_path / "a" / "y.pdf")
    write_pages(tmp_path / "a" / "z.pdf", 11, 12, 13, 14, 15, 16)
    return tmp_path / "a"


def asking(*document_ids: str) -> list[dict]:
    pages = (document_id.split("#") for document_id in document_ids)
    return [{"text": f"ask {name} {number}", "source": name, "page_number": int(number)} for name, number in pages]


@pytest.mark.parametrize("first_pixels", [100_000, 1_500_000])
def test_a_page_is_the_same_at_any_size(tmp_path: Path, clip_path: str, first_pixels: int) -> None:
    folder = copied_under_another_name(tmp_path)
    one = RetrievalDataset.from_pdfs(folder / "x.pdf", asking("x.pdf#1", "x.pdf#3"), max_pixels=first_pixels)
    other = RetrievalDataset.from_pdfs(folder / "y.pdf", asking("y.pdf#1", "y.pdf#2"), max_pixels=90_000)
    assert relevant_on_both_sides(one, other) == [("x.pdf#1", "y.pdf#1")]
    with pytest.raises(DatasetError, match=r"1 documents are relevant in training and in evaluation"):
        finetune(clip_path, one, other, output_dir=tmp_path / "run", dry_run=True)
    joined = RetrievalDataset.concatenate([one, other])
    assert joined.relevance.page.tolist() == [0, 1, 2, 3, 4, 5] * 2
    model = SentenceTransformer(clip_path, device="cpu")
    mined = mine_hard_negatives(
        joined, model, num_negatives=3, neighbors=0, relative_margin=None, show_progress_bar=False
    ).negatives
    listed = dict(zip(mined["query_id"], mined["document_ids"], strict=True))
    for row in joined.qrels:
        own = row["document_id"].partition("#")[2]
        assert own not in {each.partition("#")[2] for each in listed[row["query_id"]]}
    pages = [Page(each.corpus[0]["image"], "x").digest() for each in (one, other)]
    assert pages[0] != pages[1], "what is stored of a page is stored by size"


def test_a_page_is_the_same_with_and_without_a_password() -> None:
    references = [pdfs.PdfPage("digest", 1, 5, password).encode() for password in (None, "sesame", "a\nb c")]
    assert {pdfs.name_page(reference) for reference in references} == {b"%mmtune-pdf-page digest 1"}
    assert [pdfs.PdfPage.decode(reference).password for reference in references] == [None, "sesame", "a\nb c"]


def test_a_file_under_two_names_is_on_one_side_of_a_split(tmp_path: Path) -> None:
    folder = copied_under_another_name(tmp_path)
    rows = asking("x.pdf#1", "x.pdf#2", "y.pdf#3", "y.pdf#4", "z.pdf#1", "z.pdf#2")
    built = RetrievalDataset.from_pdfs(folder, rows)
    built.save(tmp_path / "saved")
    for dataset in (built, RetrievalDataset.load(tmp_path / "saved")):
        for seed in range(6):
            held_out = dataset.split(2, seed=seed)[1]
            assert sorted(held_out.qrels["document_id"]) == ["z.pdf#1", "z.pdf#2"]
    part = built.split(2)[0].split(2, group_column="document_id")[0]
    with pytest.raises(DatasetError, match=r"tied into 1 sets.*the group 'x\.pdf'"):
        part.split(1)


def test_files_of_one_name_stay_apart_when_datasets_are_joined(tmp_path: Path) -> None:
    parts = []
    for number, name in enumerate("ab"):
        write_pages(tmp_path / name / "report.pdf", 10 * number + 1, 10 * number + 2)
        write_pages(tmp_path / name / f"{name}.pdf", 50 + number)
        write_pages(tmp_path / name / "shared.pdf", 99)
        parts.append(RetrievalDataset.from_pdfs(tmp_path / name, asking(f"report.pdf#{number + 1}")))
    expected = ["a.pdf", "0/report.pdf", "0/report.pdf", "shared.pdf", "b.pdf", "1/report.pdf", "1/report.pdf"]
    joined = RetrievalDataset.concatenate(parts)
    assert joined.corpus["source"][:] == [*expected, "shared.pdf"]
    assert len(joined.split(1)[1]) == 1
    for number, part in enumerate(parts):
        part.save(tmp_path / f"saved-{number}")
    loaded = [RetrievalDataset.load(tmp_path / f"saved-{number}") for number in range(2)]
    sources = RetrievalDataset.concatenate(loaded).corpus["source"][:]
    assert sources == [*expected[:3], "0/shared.pdf", *expected[4:], "1/shared.pdf"]


def test_pages_without_queries_are_joined(tmp_path: Path) -> None:
    parts = [
        RetrievalDataset.from_pdfs(write_pages(tmp_path / name / "r.pdf", number)) for number, name in enumerate("ab")
    ]
    joined = RetrievalDataset.concatenate(parts)
    assert joined.corpus["document_id"][:] == ["0/r.pdf#1", "1/r.pdf#1"]
    asked = RetrievalDataset.from_pdfs(tmp_path / "a", asking("r.pdf#1"))
    assert len(RetrievalDataset.concatenate([*parts, asked])) == 1


def test_linked_folders_are_read_and_lead_round_in_no_circle(tmp_path: Path) -> None:
    folder = tmp_path / "pdfs"
    write_pages(folder / "b" / "inside.pdf", 1)
    write_pages(tmp_path / "elsewhere" / "deep" / "linked.pdf", 2)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a").symlink_to(folder / "b")
    (folder / "b" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "gone.pdf").symlink_to(tmp_path / "nowhere.pdf")
    for built in (RetrievalDataset.from_pdfs(folder), RetrievalDataset.load(folder, allow_outside=True)):
        assert built.corpus["document_id"][:] == ["inside.pdf#1", "linked.pdf#1"]
        assert built.notes.unreadable_sources == (("gone.pdf", "it can't be read: No such file or directory"),)


def test_files_of_one_name_and_other_pages_leak_nothing(tmp_path: Path) -> None:
    sides = []
    for number, name in enumerate("ab"):
        write_pages(tmp_path / name / "report.pdf", 10 * number + 1, 2)
        sides.append(RetrievalDataset.from_pdfs(tmp_path / name, asking("report.pdf#1", "report.pdf#2")))
    assert relevant_on_both_sides(*sides) == []
    shutil.copy(tmp_path / "a" / "report.pdf", tmp_path / "b" / "report.pdf")
    changed = RetrievalDataset.from_pdfs(tmp_path / "b", asking("report.pdf#1"), max_pixels=50_000)
    assert relevant_on_both_sides(sides[0], changed) == [("report.pdf#1", "report.pdf#1")]


def test_what_is_written_below_a_folder_of_pdfs_leaves_it_one(tmp_path: Path) -> None:
    folder = tmp_path / "pdfs"
    write_pages(folder / "deep" / "a.pdf", 1, 2)
    built = RetrievalDataset.from_pdfs(folder, asking("a.pdf#1"))
    built.save(folder / "saved")
    built.export(folder / "exported", show_progress_bar=False)
    assert RetrievalDataset.load(folder).corpus["document_id"][:] == ["a.pdf#1", "a.pdf#2"]
    assert RetrievalDataset.load(folder / "exported").qrels["document_id"][:] == ["a.pdf#1"]
    write_pages(folder / "exported" / "paper.pdf", 3)
    assert RetrievalDataset.load(folder / "exported").qrels["document_id"][:] == ["a.pdf#1"], "a PDF beside tables"
    shutil.copy(next((folder / "exported" / "corpus").glob("*.parquet")), folder / "rows.parquet")
    with pytest.raises(
        DatasetError, match=r"holds PDFs, e\.g\. 'deep/a\.pdf', and tables, e\.g\. 'rows\.parquet'.*from_pdfs\(.*load\("
    ):
        RetrievalDataset.load(folder)
    assert len(RetrievalDataset.from_pdfs(folder).corpus) == 3
