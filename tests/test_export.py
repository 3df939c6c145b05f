"""Datasets on their way out: every layout is read back, what is lost is said, and no half of one is taken for whole."""

import io
import multiprocessing
import os
import resource
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image as Pillow

from mmtune import ConfigError, DatasetError, RetrievalDataset
from mmtune.data import export
from mmtune.data.files import CARD

QUIET = {"show_progress_bar": False}
ODD = 'ü "p"/1'


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def dataset(judged=((0, 0), (1, 1)), scores=None, negatives=((2, 3), (3,)), texts=None, images=True, **columns):
    """Four pages, two queries; ids that are hard to write down."""
    document_ids = [ODD, "p1", "2", "p3"]
    corpus = {"document_id": document_ids, **columns}
    corpus |= {"image": [{"bytes": png(k), "path": None} for k in range(4)]} if images else {}
    corpus |= {"text": texts} if texts else {}
    rows = Dataset.from_dict(corpus)
    listed = {"query_id": ["q/0", "q'1"], "document_ids": [[document_ids[k] for k in each] for each in negatives or []]}
    return RetrievalDataset(
        rows.cast_column("image", Image(decode=False)) if images else rows,
        Dataset.from_dict({"query_id": ["q/0", "q'1"], "text": ["a", "b"], "language": ["en", "fr"]}),
        Dataset.from_dict(
            {
                "query_id": [listed["query_id"][query] for query, _ in judged],
                "document_id": [document_ids[document] for _, document in judged],
                "score": scores or [1] * len(judged),
            }
        ),
        Dataset.from_dict(listed) if negatives else None,
    )


def by_content(data):
    """What a dataset says, whatever its ids are: for each query text its pages with scores, and its negatives."""
    keys = "image" if "image" in data.corpus.column_names else "text"
    content = {row["document_id"]: row[keys]["bytes"] if keys == "image" else row[keys] for row in data.corpus}
    text = dict(zip(data.queries["query_id"], data.queries["text"], strict=True))
    judged = sorted((text[row["query_id"]], content[row["document_id"]], row["score"]) for row in data.qrels)
    listed = {text[row["query_id"]]: [content[each] for each in row["document_ids"]] for row in data.negatives or ()}
    return judged, listed


def tables_of(data):
    return [table and table.to_list() for table in (data.corpus, data.queries, data.qrels, data.negatives)]


def shuffled(data):
    tables = (data.corpus, data.queries, data.qrels, data.negatives)
    return RetrievalDataset(*(table and table.shuffle(seed=3) for table in tables))


MANY_TO_MANY = {"judged": ((0, 0), (0, 1), (1, 1)), "scores": [3, 1, 2]}


@pytest.mark.parametrize(
    "given",
    [
        {},
        MANY_TO_MANY,
        {"negatives": None},
        {"texts": ["w", "x", None, "z"], "source": ["a.pdf"] * 4, "page_number": [1, 2, 3, 4]},
        {"images": False, "texts": ["w", "x", "y", "z"]},
    ],
    ids=["plain", "graded, many to many", "no negatives", "with text and files", "texts alone"],
)
def test_beir_keeps_everything(given, tmp_path):
    for name, data in {"as built": dataset(**given), "shuffled": shuffled(dataset(**given))}.items():
        again = RetrievalDataset.load(data.export(tmp_path / name, **QUIET))
        for one, other in zip(tables_of(again), tables_of(data), strict=True):
            key = (lambda row: [str(row.get(name)) for name in ("document_id", "query_id")]) if one else None
            assert (one and sorted(one, key=key)) == (other and sorted(other, key=key))


def test_beir_is_what_readers_of_beir_expect(tmp_path):
    folder = str(dataset(**MANY_TO_MANY).export(tmp_path / "beir", split="test", **QUIET))
    corpus, queries, qrels = (load_dataset(folder, name, split="test") for name in ("corpus", "queries", "qrels"))
    assert corpus.column_names == ["corpus-id", "image"]
    assert corpus[1]["image"].getpixel((0, 0)) == (1, 0, 0)
    assert queries.column_names == ["query-id", "query", "negative_document_ids", "language"]
    assert qrels[0] == {"query-id": "q/0", "corpus-id": ODD, "score": 3}


@pytest.mark.parametrize("layout", ["id_rows", "columns", "tevatron"])
@pytest.mark.parametrize("negatives", [((2, 3), (3,)), ((), (3,)), None], ids=["listed", "some", "none"])
def test_other_layouts_keep_pages_texts_and_negatives(layout, negatives, tmp_path):
    data = shuffled(dataset(negatives=negatives, page_number=[1, 2, 3, 4]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again = RetrievalDataset.load(data.export(tmp_path / layout, layout, **QUIET))
    assert by_content(again) == by_content(data)
    languages = zip(again.queries["text"], again.queries["language"], strict=True)
    assert dict(languages) == {"a": "en", "b": "fr"}
    pages = {row["image"]["bytes"]: row["page_number"] for row in again.corpus if row["page_number"] is not None}
    assert pages.items() <= {png(k): k + 1 for k in range(4)}.items()
    assert len(pages) == 2 if layout == "columns" else 4


def test_id_rows_keep_ids_where_queries_have_those_of_their_pages(pages, tmp_path):
    data = RetrievalDataset.from_id_rows(pages)
    again = RetrievalDataset.load(data.export(tmp_path / "rows", "id_rows", **QUIET))
    assert tables_of(again) == tables_of(data)
    rows = load_dataset(str(tmp_path / "rows"), split="train")
    assert rows.column_names == ["id", "query", "negatives", "language", "image"]
    assert rows[0]["image"].size == pages[0]["image"].size


def test_the_host_reads_an_export_of_the_same_name_anew(tmp_path):
    for number, query in ((0, "a"), (1, "b")):
        rows = Dataset.from_dict({"id": ["x"], "query": [query], "image": [png(number)]})
        folder = RetrievalDataset.from_id_rows(rows).export(tmp_path / "out", "id_rows", overwrite=True, **QUIET)
        assert load_dataset(str(folder), split="train")["query"][:] == [query]


def test_columns_may_hold_several_pages_of_a_query(tmp_path):
    data = dataset(judged=((0, 0), (0, 1), (1, 1)))
    with pytest.warns(UserWarning, match=r"the ids of 2 queries and 4 pages. save\(folder\) keeps everything"):
        folder = data.export(tmp_path / "columns", "columns", **QUIET)
    again = RetrievalDataset.load(folder)
    assert by_content(again)[0] == by_content(data)[0]
    rows = load_dataset(str(folder), split="train")
    assert rows.column_names == ["query", "language", "image", "negative_0", "negative_1"]
    assert rows[2]["negative_1"] is None


@pytest.mark.parametrize(
    ("layout", "given", "message"),
    [
        ("id_rows", {}, "the ids of 2 queries, which become those of their pages"),
        ("id_rows", {"scores": [2, 1]}, "the scores of 1 judgements, which become 1"),
        ("tevatron", {"scores": [2, 3]}, "the scores of 2 judgements, which become 1"),
        ("columns", {"scores": [2, 1]}, "the scores of 1 judgements"),
        ("columns", {"negatives": ((2,), (2,))}, "1 pages that are neither relevant nor a negative"),
        ("columns", {"source": ["f"] * 4}, "the columns 'source' of negatives"),
    ],
)
def test_what_a_layout_has_no_place_for_is_counted(layout, given, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        dataset(**given).export(tmp_path / "out", layout, **QUIET)


LOST_PAGE = {"bytes": None, "path": None}


def without_a_page():
    data = dataset()
    corpus = Dataset.from_list([*data.corpus.to_list()[1:], {"document_id": ODD, "image": LOST_PAGE}])
    return RetrievalDataset(corpus.cast_column("image", Image(decode=False)), data.queries, data.qrels)


@pytest.mark.parametrize(
    ("layout", "data", "message"),
    [
        (
            "id_rows",
            lambda: dataset(judged=((0, 0), (0, 1), (1, 2))),
            "1 queries with several relevant pages, e.g. 'q/0'",
        ),
        ("id_rows", lambda: dataset(judged=((0, 1), (1, 1))), "1 pages that answer several queries, e.g. 'p1'"),
        ("id_rows", lambda: dataset(images=False, texts=list("wxyz")), "the corpus has none"),
        ("columns", lambda: dataset(images=False, texts=list("wxyz")), "the corpus has none"),
        ("id_rows", without_a_page, "1 documents have none, e.g. 'ü"),
        ("columns", without_a_page, "1 documents have none, e.g. 'ü"),
        ("id_rows", lambda: dataset(language=["de"] * 4), "Column 'language' differs between queries and their pages"),
        ("id_rows", lambda: dataset(query=["?"] * 4), "a column 'query' of its own"),
        ("beir", lambda: dataset(**{"corpus-id": list("wxyz")}), "a column 'corpus-id' of its own"),
    ],
)
def test_what_cannot_be_left_out_is_an_error_before_anything_is_written(layout, data, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        data().export(tmp_path / "out", layout, **QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["beir", "id_rows", "columns", "tevatron"])
def test_pages_without_queries(layout, tmp_path):
    data = dataset(negatives=None)
    queries, qrels = data.queries.select([]), data.qrels.select([])
    alone = RetrievalDataset.from_tables(replace(data.tables, queries=queries, qrels=qrels))
    if layout != "id_rows":
        with pytest.raises(DatasetError, match="has a table of queries, and the dataset has none"):
            alone.export(tmp_path / "out", layout, **QUIET)
    else:
        again = RetrievalDataset.load(alone.export(tmp_path / "out", layout, **QUIET))
        assert (len(again), again.corpus["document_id"][:]) == (0, data.corpus["document_id"][:])


@pytest.mark.parametrize("place", ["corpus/mine.pdf", "data/report.pdf", "corpus/2024/page.parquet", "data/notes.txt"])
def test_overwrite_deletes_nothing_that_no_export_wrote(place, tmp_path):
    own = tmp_path / "project" / place
    own.parent.mkdir(parents=True)
    own.write_bytes(b"of the user")
    with pytest.raises(DatasetError, match=r"overwrite=True would delete .*which no export wrote"):
        dataset().export(tmp_path / "project", overwrite=True, **QUIET)
    assert own.read_bytes() == b"of the user"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]


def test_columns_that_agree_are_one(tmp_path):
    data = dataset(language=["en", "fr", "de", "de"])
    with pytest.warns(UserWarning, match="the ids"):
        again = RetrievalDataset.load(data.export(tmp_path / "rows", "id_rows", **QUIET))
    assert again.corpus["language"][:] == ["en", "fr", "de", "de"]


def test_pages_in_files_are_embedded_and_a_lost_one_is_named(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(png(k))
    data = dataset()
    paths = Dataset.from_dict(
        {"document_id": data.corpus["document_id"][:], "image": [str(tmp_path / f"{k}.png") for k in range(4)]}
    )
    filed = RetrievalDataset(paths, data.queries, data.qrels, data.negatives)
    again = RetrievalDataset.load(filed.export(tmp_path / "out", **QUIET))
    (tmp_path / "2.png").unlink()
    assert by_content(again) == by_content(data)
    with pytest.raises(DatasetError, match="The files of 1 pages are missing"):
        filed.export(tmp_path / "lost", **QUIET)
    assert not (tmp_path / "lost").exists()


def test_large_tables_are_cut_into_portions_and_files(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_BYTES_AT_ONCE", 3 * len(png(0)))
    monkeypatch.setattr(export, "_BYTES_A_FILE", 40 * len(png(0)))
    rows = Dataset.from_dict(
        {"id": list(range(100)), "query": ["x"] + [None] * 99, "image": [png(k) for k in range(100)]}
    )
    data = RetrievalDataset.from_id_rows(rows)
    folder = data.export(tmp_path / "out", "id_rows", **QUIET)
    files = sorted((folder / "data").iterdir())
    assert [file.name for file in files] == [f"train-0000{k}-of-00003.parquet" for k in range(3)]
    assert max(pq.ParquetFile(files[0]).metadata.row_group(k).num_rows for k in range(10)) <= 3
    assert RetrievalDataset.load(folder).corpus["image"][:] == data.corpus["image"][:]


def test_no_image_is_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr(Pillow, "open", None)
    dataset().export(tmp_path / "out", **QUIET)


# ---- whole or not at all


def test_a_folder_that_holds_something_is_refused(tmp_path):
    dataset().export(tmp_path / "out", **QUIET)
    with pytest.raises(DatasetError, match=r"is not empty: it holds \['README.md', 'corpus'.*overwrite=True"):
        dataset().export(tmp_path / "out", **QUIET)
    with pytest.warns(UserWarning, match="the ids"):
        dataset().export(tmp_path / "out", "id_rows", overwrite=True, **QUIET)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [CARD, "data"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match=r"overwrite=True would delete .*thesis\.tex"):
        dataset().export(tmp_path / "out", overwrite=True, **QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="is a file"):
        dataset().export(tmp_path / "file", overwrite=True, **QUIET)
    (tmp_path / "empty").mkdir()
    assert RetrievalDataset.load(dataset().export(tmp_path / "empty", **QUIET))


def test_a_failure_leaves_what_stood_there(monkeypatch, tmp_path):
    dataset().export(tmp_path / "out", **QUIET)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_read_portion", full)
    with pytest.raises(DatasetError, match=r"No space left on device.*Make room or get permission"):
        dataset().export(tmp_path / "out", overwrite=True, **QUIET)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert by_content(RetrievalDataset.load(tmp_path / "out")) == by_content(dataset())


@pytest.fixture
def small_files():
    """No file may grow above 5,000 bytes: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [lambda data, folder: data.export(folder, **QUIET), RetrievalDataset.save])
def test_no_room_is_named(write, tmp_path, small_files):
    pages = [np.random.default_rng(k).bytes(4000) for k in range(9)]
    rows = Dataset.from_dict({"id": list(range(9)), "query": ["x"] * 9, "image": pages})
    with pytest.raises(DatasetError, match=r"could not be written: .*File too large"):
        write(RetrievalDataset.from_id_rows(rows), tmp_path / "out")
    with pytest.raises(DatasetError, match=r"holds no parquet file|does not exist"):
        RetrievalDataset.load(tmp_path / "out")


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (dataset().save, dataset().export):
        with pytest.raises(DatasetError, match=r"can't be written to|could not be written"):
            write(tmp_path / "file" / "out")


def killed_export(data, folder, at_portion):
    read, calls = export._read_portion, []

    def read_and_die(*arguments):
        calls.append(1)
        if len(calls) == at_portion:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*arguments)

    export._read_portion = read_and_die
    data.export(folder, **QUIET)


@pytest.mark.parametrize("at_portion", [1, 2, 3])
def test_a_killed_export_is_not_taken_for_a_dataset(at_portion, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the pool of Arrow sleeps
        child = multiprocessing.get_context("fork").Process(
            target=killed_export, args=(dataset(), tmp_path / "out", at_portion)
        )
        child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(DatasetError, match="does not exist"):
        RetrievalDataset.load(tmp_path / "out")
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".partial"]
    dataset().export(tmp_path / "out", **QUIET)
    assert by_content(RetrievalDataset.load(tmp_path / "out")) == by_content(dataset())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"folder": value}, "folder=") for value in (None, 5, "", ["x"], "a\0b", "\ud800")],
        *[({"layout": value}, "layout=") for value in ("csv", None, 5, "BEIR")],
        *[({"split": value}, "split=") for value in ("all", None, 5, "../x")],
        *[({"overwrite": value}, "overwrite=") for value in ("no", None, 1)],
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        dataset().export(**{"folder": tmp_path / "out", **arguments})
    assert not list(tmp_path.iterdir())


# ---- the Hub, whose client is a folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder in the place of the Hub."""
    root = tmp_path / "hub"

    def create_repo(self, repo_id, **options):
        (root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])
        return f"https://hub/datasets/{repo_id}"

    def download(self, repo_id, filename, **options):
        if not (root / repo_id / filename).exists():
            raise EntryNotFoundError(filename)
        return str(root / repo_id / filename)

    def upload_folder(self, *, repo_id, folder_path, delete_patterns, **options):
        for pattern in delete_patterns:
            for old in (root / repo_id).glob(pattern):
                old.unlink()
        for file in Path(folder_path).rglob("*"):
            if file.is_file():
                target = root / repo_id / file.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return root


def test_a_pushed_dataset_is_read_back(hub, pages):
    data = RetrievalDataset.from_id_rows(pages)
    assert data.push_to_hub("me/pages", **QUIET) == "https://hub/datasets/me/pages"
    again = RetrievalDataset.load(hub / "me" / "pages")
    assert tables_of(again) == tables_of(data)
    assert (hub / "me/pages/data").is_dir(), "one page a query: a row for each page"
    dataset(**MANY_TO_MANY).push_to_hub("me/graded", **QUIET)
    assert tables_of(RetrievalDataset.load(hub / "me/graded")) == tables_of(dataset(**MANY_TO_MANY))


def test_the_card_says_what_the_dataset_holds(hub, tmp_path):
    data = dataset(**MANY_TO_MANY, source=["a.pdf", "a.pdf", "b.pdf", None])
    data.push_to_hub("me/pages", split="test", **QUIET)
    card = (hub / "me/pages" / CARD).read_text()
    for line in (
        "- config_name: corpus",
        "path: corpus/test-*",
        "- en",
        "| documents | 4 (image) |",
        "| queries | 2 |",
        "| judgements | 3, scores 1, 2, 3 |",
        "| hard negatives | 3 |",
        "| languages | en (1), fr (1) |",
        "| pages come from | 2 sources (column `source`) |",
        "RetrievalDataset.load('me/pages', split='test')",
        "No licence is given",
    ):
        assert line in card, line
    assert "license:" not in card.partition("No licence")[0]
    data.save(tmp_path / "saved")
    assert "| documents | 4 (image) |" in (tmp_path / "saved" / CARD).read_text()
    assert tables_of(RetrievalDataset.load(tmp_path / "saved")) == tables_of(data)


def test_another_split_and_what_people_wrote_stay(hub):
    dataset().push_to_hub("me/pages", layout="beir", **QUIET)
    path = hub / "me/pages" / CARD
    path.write_text(path.read_text().replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + "\nScanned by hand.\n")
    dataset(**MANY_TO_MANY).push_to_hub("me/pages", layout="beir", split="test", **QUIET)
    dataset(negatives=None).push_to_hub("me/pages", layout="beir", **QUIET)
    card = path.read_text()
    assert "license: cc-by-4.0" in card
    assert "Scanned by hand." in card
    assert "No licence is given" not in card
    assert card.count("## train") == card.count("## test") == 1
    assert "path: corpus/train-*" in card
    assert "path: corpus/test-*" in card
    assert tables_of(RetrievalDataset.load(path.parent, split="train")) == tables_of(dataset(negatives=None))
    assert tables_of(RetrievalDataset.load(path.parent, split="test")) == tables_of(dataset(**MANY_TO_MANY))
    refused = pytest.raises(DatasetError, match=r"has the configurations \['corpus', 'qrels', 'queries'\]")
    with pytest.warns(UserWarning, match=r"layout='id_rows' has no place for"), refused:
        dataset().push_to_hub("me/pages", layout="id_rows", **QUIET)


def test_what_the_hub_refuses_is_named(hub, monkeypatch):
    def refuse(*_, **options):
        raise OSError("401 Client Error: Unauthorized")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(DatasetError, match=r"'me/pages' could not be pushed: .*Unauthorized.*hf auth login"):
        dataset().push_to_hub("me/pages", **QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"repo_id": value}, "repo_id=") for value in (None, 5, "", "a/b/c", "a b", "../x/y")],
        *[({"layout": value}, "layout=") for value in ("csv", 5)],
        *[({"split": value}, "split=") for value in ("all", None)],
        *[({"private": value}, "private=") for value in ("no", 1)],
        *[({"token": value}, "token is") for value in (True, 5, "")],
        *[({"revision": value}, "revision is") for value in (5, "")],
    ],
    ids=str,
)
def test_arguments_of_pushing_are_checked(hub, arguments, message):
    with pytest.raises(ConfigError, match=message):
        dataset().push_to_hub(**{"repo_id": "me/pages", **arguments})
    assert not hub.exists()
