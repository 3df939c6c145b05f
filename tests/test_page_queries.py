"""Queries that name pages: several a page, several pages a query, graded; what names nothing is an error by name."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from mmtune import DatasetError, MissingDocumentError, RetrievalDataset
from mmtune.testing.pdfs import PdfPageContent, write_pdf

pytest.importorskip("pypdfium2")

ROWS = [
    {"text": "one, of two", "source": "a.pdf", "page_number": 1, "language": "en"},
    {"text": "one, of two", "source": "b.pdf", "page_number": 2, "language": "de"},
    {"text": "another", "source": "a.pdf", "page_number": 1, "language": "fr"},
]
JUDGED = {("one, of two", "a.pdf#1", 1), ("one, of two", "b.pdf#2", 1), ("another", "a.pdf#1", 1)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pdfs"
    path.mkdir()
    for name in ("a.pdf", "b.pdf"):
        write_pdf(path / name, [PdfPageContent(), PdfPageContent()])
    return path


class FrameOfPolars:
    """What polars has for this; it is not among the packages of the tests."""

    def to_dicts(self) -> list[dict]:
        return ROWS


def build(folder: Path, *rows: dict, **options) -> RetrievalDataset:
    return RetrievalDataset.from_pdfs(folder, list(rows) or ROWS, **options)


def judged(dataset: RetrievalDataset) -> set[tuple[str, str, int]]:
    text_by_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    return {(text_by_id[row["query_id"]], row["document_id"], row["score"]) for row in dataset.qrels}


def row(**changed) -> dict:
    return {"text": "ask", "source": "a.pdf", "page_number": 1} | changed


def write_csv(path: Path, rows: list[dict]) -> Path:
    Dataset.from_list(rows).to_csv(path)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "table",
    [
        lambda path: ROWS,
        lambda path: tuple(ROWS),
        lambda path: Dataset.from_list(ROWS),
        lambda path: Dataset.from_list(ROWS).shuffle(seed=0).with_format("numpy"),
        lambda path: Dataset.from_list(ROWS).to_pandas(),
        lambda path: FrameOfPolars(),
        lambda path: write_csv(path / "q.csv", ROWS),
        lambda path: str(write_jsonl(path / "q.jsonl", ROWS)),
    ],
    ids=["list", "tuple", "dataset", "shuffled", "pandas", "polars", "csv", "jsonl"],
)
def test_tables_of_all_kinds_say_the_same(folder: Path, tmp_path: Path, table) -> None:
    dataset = RetrievalDataset.from_pdfs(folder, table(tmp_path))
    assert judged(dataset) == JUDGED
    assert sorted(dataset.queries["text"]) == ["another", "one, of two"]
    assert set(dataset.queries.column_names) == {"query_id", "text", "language"}


def test_ids_scores_and_other_columns_are_kept(folder: Path) -> None:
    rows = [
        row(query_id="x", score=3, kind="table", number=7),
        row(query_id="x", score=1, page_number=2, kind="other"),
        row(query_id=5, source="b.pdf", score=0),
        row(query_id=5, source="b.pdf", page_number="2", score="2"),
        row(query_id="y", text=" "),
        row(query_id="z", text=None),
        row(query_id="w", text="never", score=-1),
    ]
    dataset = build(folder, *rows)
    assert {(each["query_id"], each["document_id"], each["score"]) for each in dataset.qrels} == {
        ("x", "a.pdf#1", 3),
        ("x", "a.pdf#2", 1),
        ("5", "b.pdf#2", 2),
    }
    assert dataset.queries["kind"][:] == ["table", None]
    assert dataset.queries["number"][:] == [7, None]
    notes = dataset.notes
    assert (notes.blank_queries, notes.judged_not_relevant, notes.queries_without_document) == (2, 2, 1)


def test_a_folder_is_asked_about_by_the_table_in_it(folder: Path, tmp_path: Path) -> None:
    write_csv(folder / "queries.csv", ROWS)
    assert judged(RetrievalDataset.load(folder)) == JUDGED
    assert len(RetrievalDataset.from_pdfs(folder, [row()])) == 1, "what is passed counts alone"
    assert len(RetrievalDataset.from_pdfs(str(folder / "*.pdf"))) == 0
    (folder / "queries.csv").rename(folder / "other.csv")
    write_jsonl(folder / "queries.jsonl", ROWS[:1])
    assert len(RetrievalDataset.load(folder)) == 1
    write_csv(folder / "queries.csv", ROWS)
    with pytest.raises(DatasetError, match=r"holds queries\.csv and queries\.jsonl"):
        RetrievalDataset.load(folder)


def test_two_folders_are_asked_about_by_their_own_tables(folder: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    write_pdf(second / "a.pdf", [PdfPageContent()] * 3)
    write_csv(folder / "queries.csv", ROWS)
    write_jsonl(second / "queries.jsonl", [row(text="of the second", page_number=3)])
    dataset = RetrievalDataset.from_pdfs([folder, second])
    assert judged(dataset) == {
        ("one, of two", "pdfs/a.pdf#1", 1),
        ("one, of two", "b.pdf#2", 1),
        ("another", "pdfs/a.pdf#1", 1),
        ("of the second", "second/a.pdf#3", 1),
    }
    with pytest.raises(MissingDocumentError, match=r"may be any of \['pdfs/a\.pdf', 'second/a\.pdf'\]"):
        RetrievalDataset.from_pdfs([folder, second], [row()])
    asked = RetrievalDataset.from_pdfs([folder, second], [row(source=str(second / "a.pdf"), page_number=3)])
    assert asked.qrels["document_id"][:] == ["second/a.pdf#3"]


def test_queries_about_what_cannot_be_read_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "c.pdf").write_bytes(b"")
    dataset = build(folder, *ROWS, row(text="lost", source="c.pdf", page_number=9))
    assert judged(dataset) == JUDGED
    assert dataset.notes.queries_without_document == 1
    assert "left out, with 1 rows of queries about them" in caplog.text


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"page_number": 3}, MissingDocumentError, r"row 0 of queries=: page_number=3 .* 'a\.pdf', .* pages 1 to 2"),
        ({"page_number": 0}, MissingDocumentError, "counted from 1"),
        ({"page_number": -1}, MissingDocumentError, "page_number=-1"),
        *[
            ({"page_number": value}, DatasetError, "page_number=")
            for value in (None, "x", 1.5, True, [1], float("inf"))
        ],
        (
            {"source": "c.pdf"},
            MissingDocumentError,
            r"source='c\.pdf' is no PDF of this dataset.*Did you mean '[ab]\.pdf'",
        ),
        ({"source": "what else"}, MissingDocumentError, r"There are 2, e\.g\. \['a\.pdf', 'b\.pdf'\]"),
        *[({"source": value}, DatasetError, "source=") for value in (None, 5, "", ["a.pdf"])],
        *[({"text": value}, DatasetError, "text=5|text=.'a'") for value in (5, ["a"])],
        *[({"score": value}, DatasetError, "score=") for value in (1.5, "x", True)],
        *[({"query_id": value}, DatasetError, "query_id=") for value in (1.5, True, ["q"])],
    ],
)
def test_rows_that_can_not_be_are_named(folder: Path, changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(folder, row(**changed))


def test_one_id_with_two_texts_is_an_error(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"row 1 .*query_id 'x' has the text 'other' here and 'ask' in row 0"):
        build(folder, row(query_id="x"), row(query_id="x", text="other"))


def test_ids_that_are_made_up_differ_from_those_that_are_given(folder: Path) -> None:
    dataset = build(folder, row(query_id="q1"), row(text="without"), row(text="q1"))
    assert dataset.queries["query_id"][:] == ["q1", "q0", "q2"]
    assert dataset.queries["text"][:] == ["ask", "without", "q1"]


def test_scores_that_contradict_each_other_are_an_error(folder: Path) -> None:
    with pytest.raises(DatasetError, match="judged twice"):
        build(folder, row(score=1), row(score=2))
    assert len(build(folder, row(), row()).qrels) == 1


FILES = {
    "other columns": (
        b"query,file,page\na,a.pdf,1\n",
        r"q\.csv' has no column 'text'; it has \['query', 'file', 'page'\]",
    ),
    "semicolons": (b"text;source;page_number\na;a.pdf;1\n", "with commas between the columns"),
    "latin-1": ("text,source,page_number\nPrüfung,a.pdf,1\n".encode("cp1252"), r"not in UTF-8: .*encoding='cp1252'"),
    "utf-16": ("text,source,page_number\na,a.pdf,1\n".encode("utf-16"), "not in UTF-8"),
    "a comma": (b"text,source,page_number\na, b,a.pdf,1\n", "line 2: more values than columns"),
    "too few": (b"text,source,page_number\na,a.pdf\n", r"line 2: page_number=None"),
    "a page": (b'text,source,page_number\n"a\nb",a.pdf,1\nc,a.pdf,x\n', r"q\.csv', line 4: page_number='x'"),
    "nothing": (b"", r"q\.csv' is empty: it has no line of column names"),
    "an open quote": (b'text,source,page_number\n"a,a.pdf,1\n', "can't be read"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_such_table_are_named(folder: Path, tmp_path: Path, case: str) -> None:
    content, message = FILES[case]
    (tmp_path / "q.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        RetrievalDataset.from_pdfs(folder, tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"line 1: no JSON"), ("[1]", r"line 1: \[1\] is no JSON object"), ('{"a": 1}', "no column 'text'")],
)
def test_lines_that_are_no_objects_are_named(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(DatasetError, match=message):
        RetrievalDataset.from_pdfs(folder, tmp_path / "q.jsonl")


def test_a_byte_order_mark_and_quotes_are_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(b'\xef\xbb\xbftext,source,page_number\r\n"say ""a, b""",a.pdf,2\r\n')
    assert judged(RetrievalDataset.from_pdfs(folder, tmp_path / "q.csv")) == {('say "a, b"', "a.pdf#2", 1)}


@pytest.mark.parametrize("rows", [[], Dataset.from_dict({"text": [], "source": [], "page_number": []})])
def test_a_table_without_rows_asks_nothing(folder: Path, rows) -> None:
    assert len(RetrievalDataset.from_pdfs(folder, rows)) == 0
