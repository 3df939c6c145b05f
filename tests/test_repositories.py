"""Repositories as they lie on the Hub, here as folders: found by their configurations, without a builder for any."""

import io

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from mmtune import DatasetError, RetrievalDataset

VIDORE_V2 = """
configs:
- config_name: corpus
  data_files: [{split: test, path: corpus/test-*}]
- config_name: docs
  data_files: [{split: test, path: docs/test-*}]
- config_name: qrels
  data_files: [{split: test, path: qrels/test-*}]
- config_name: queries
  data_files: [{split: test, path: queries/test-*}]
"""
ELSEWHERE = """
configs:
- config_name: documents_metadata
  data_files: [{split: test, path: extra/docs-*}]
- config_name: corpus
  data_files: [{split: test, path: data/pages-*}]
- config_name: queries
  data_files: [{split: test, path: data/asked-*}]
- config_name: %s
  data_files: [{split: test, path: data/judged-*}]
"""
LANGUAGES = "configs:\n" + "".join(
    f"- config_name: {language}-{table}\n  data_files: [{{split: test, path: {language}/{table}-*}}]\n"
    for language in ("en", "fr")
    for table in ("corpus", "queries", "qrels")
)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def tables(hyphen: str, ids: type, first: int = 0) -> dict[str, Dataset]:
    """Three pages and two queries, as ViDoRe has them; the pages of another language begin with another number."""
    query, page = f"query{hyphen}id", f"corpus{hyphen}id"
    images = [{"bytes": png(first + k), "path": None} for k in range(3)]
    corpus = Dataset.from_dict({page: [ids(k) for k in range(3)], "image": images, "doc_id": ["x", "x", "y"]})
    return {
        "corpus": corpus.cast_column("image", Image()),
        "queries": Dataset.from_dict({query: [ids(0), ids(1)], "query": ["a", "b"], "language": ["en", "en"]}),
        "qrels": Dataset.from_dict(
            {query: [ids(0), ids(0), ids(1)], page: [ids(0), ids(2), ids(1)], "score": [2, 1, 1]}
        ),
    }


def write(folder, files, card):
    for name, table in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text(f"---\n{card}\n---\n# A data set\n")


def assert_is_whole(data, first=0):
    judged = {(row["query_id"], row["document_id"]): row["score"] for row in data.qrels}
    assert judged == {("0", "0"): 2, ("0", "2"): 1, ("1", "1"): 1}
    assert [row["image"]["bytes"] for row in data.corpus] == [png(first + k) for k in range(3)]
    assert data.queries["text"][:] == ["a", "b"]


@pytest.mark.parametrize("hyphen", ["-", "_"], ids=["v1 and v2", "v3"])
@pytest.mark.parametrize("ids", [str, int])
def test_vidore_is_read_as_it_lies(hyphen, ids, tmp_path):
    given = tables(hyphen, ids)
    files = {f"{name}/test": table for name, table in given.items()} | {"docs/test": Dataset.from_dict({"doc": ["x"]})}
    write(tmp_path / "economics", files, VIDORE_V2)
    assert_is_whole(RetrievalDataset.load(tmp_path / "economics"))
    assert_is_whole(RetrievalDataset.load(tmp_path / "economics", split="test"))
    with pytest.raises(DatasetError, match=r"has the splits \['test'\], and split='train'"):
        RetrievalDataset.load(tmp_path / "economics", split="train")


@pytest.mark.parametrize("qrels", ["qrels", "default"])
def test_tables_are_found_by_their_configurations(qrels, tmp_path):
    given = tables("_", str)
    files = {"data/pages": given["corpus"], "data/asked": given["queries"], "data/judged": given["qrels"]}
    files["extra/docs"] = Dataset.from_dict({"doc": ["x"]})
    write(tmp_path / "v3", files, ELSEWHERE % qrels)
    assert_is_whole(RetrievalDataset.load(tmp_path / "v3"))


def test_a_language_is_named_by_the_configuration(tmp_path):
    files = {
        f"{language}/{name}": table
        for first, language in ((0, "en"), (10, "fr"))
        for name, table in tables("-", str, first).items()
    }
    write(tmp_path / "jina", files, LANGUAGES)
    assert_is_whole(RetrievalDataset.load(tmp_path / "jina", "en"))
    assert_is_whole(RetrievalDataset.load(tmp_path / "jina", "fr"), first=10)


def test_folders_of_one_name_are_not_taken_for_one(tmp_path):
    for first in (0, 20):
        folder = tmp_path / str(first) / "same-name"
        write(folder, {f"{name}/test": table for name, table in tables("-", str, first).items()}, VIDORE_V2)
        assert_is_whole(RetrievalDataset.load(folder), first)
        rows = Dataset.from_dict({"query": ["a"], "image": [{"bytes": png(first), "path": None}]})
        card = "configs:\n- config_name: default\n  data_files: [{split: train, path: data/train-*}]"
        write(tmp_path / str(first) / "rows", {"data/train": rows.cast_column("image", Image())}, card)
        assert RetrievalDataset.load(tmp_path / str(first) / "rows").corpus[0]["image"]["bytes"] == png(first)


def test_tevatron_lists_what_is_relevant_in_its_queries(tmp_path):
    kinds = {"query_id": Value("string"), "query_text": Value("string"), "query_image": Image()}
    kinds |= {name: List(Value("string")) for name in ("positive_document_ids", "negative_document_ids")}
    queries = {"query_id": ["0", "1"], "query_text": ["a", "b"], "query_image": [None, None]}
    queries |= {"positive_document_ids": [["0_x"], ["1_x", "2_x"]], "negative_document_ids": [["2_x"], []]}
    images = [{"bytes": png(k), "path": None} for k in range(3)]
    corpus = {"docid": ["0_x", "1_x", "2_x"], "image": images, "text": [None, "t", None], "source": ["s"] * 3}
    folder = tmp_path / "tevatron"
    for name, table in {
        "corpus": Dataset.from_dict(corpus).cast_column("image", Image()),
        "queries": Dataset.from_dict(queries, features=Features(kinds)),
    }.items():
        (folder / name).mkdir(parents=True)
        table.to_parquet(folder / name / "train-00000-of-00001.parquet")
    data = RetrievalDataset.load(folder)
    judged = [(row["query_id"], row["document_id"]) for row in data.qrels]
    assert judged == [("0", "0_x"), ("1", "1_x"), ("1", "2_x")]
    assert data.negatives["document_ids"][:] == [["2_x"], []]
    again = RetrievalDataset.load(data.export(tmp_path / "again", "tevatron", show_progress_bar=False))
    assert [table.to_list() for table in (again.qrels, again.negatives)] == [
        table.to_list() for table in (data.qrels, data.negatives)
    ]
