"""Three tables in every spelling that public data sets use."""

import io

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from mmtune import DatasetError, MissingDocumentError, RetrievalDataset
from mmtune.data.rows import view_of


def page(shade: int) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def tables(corpus_id: str, query_id: str, text: str = "query", ids: type = str, **columns: list) -> dict[str, Dataset]:
    """Four pages, three queries: 0 and 1 share page 1, query 2 has a judgement of 0 as well."""
    qrels = [(0, 0, 2), (0, 1, 1), (1, 1, 1), (2, 3, 3), (2, 2, 0)]
    return {
        "corpus": Dataset.from_dict({corpus_id: [ids(k) for k in range(4)], "image": [page(k) for k in range(4)]}),
        "queries": Dataset.from_dict({query_id: [ids(k) for k in range(3)], text: ["a", "b", "c"], **columns}),
        "qrels": Dataset.from_dict(
            {
                query_id: [ids(query) for query, _, _ in qrels],
                corpus_id: [ids(document) for _, document, _ in qrels],
                "score": [score for _, _, score in qrels],
            }
        ),
    }


def shade_by_id(dataset: RetrievalDataset) -> dict[str, int]:
    rows = dataset.training_rows(0)
    ids = rows.with_format(None)["document_id"][:]
    return {name: rows[at]["image"].getpixel((0, 0))[0] for at, name in enumerate(ids)}


@pytest.mark.parametrize(
    ("corpus_id", "query_id", "text"),
    [
        ("corpus-id", "query-id", "query"),
        ("corpus_id", "query_id", "query"),
        ("docid", "query_id", "query_text"),
        ("_id", "_id", "text"),
        ("document_id", "query_id", "text"),
    ],
    ids=["vidore v1 and v2, jina", "vidore v3", "tevatron", "beir", "ours"],
)
@pytest.mark.parametrize("ids", [str, int])
def test_every_spelling_gives_the_same_judgements(corpus_id: str, query_id: str, text: str, ids: type) -> None:
    given = tables(corpus_id, query_id, text, ids)
    if corpus_id == query_id:
        given["qrels"] = given["qrels"].remove_columns(corpus_id)
        given["qrels"] = given["qrels"].add_column("query-id", [ids(k) for k in (0, 0, 1, 2, 2)])
        given["qrels"] = given["qrels"].add_column("corpus-id", [ids(k) for k in (0, 1, 1, 3, 2)])
    dataset = RetrievalDataset.from_beir(**given)
    judged = {(row["query_id"], row["document_id"]): row["score"] for row in dataset.qrels}
    assert judged == {("0", "0"): 2, ("0", "1"): 1, ("1", "1"): 1, ("2", "3"): 3}
    assert dataset.notes.judged_not_relevant == 1
    assert dataset.queries["text"][:] == ["a", "b", "c"]
    assert shade_by_id(dataset) == {"0": 0, "1": 1, "3": 3}


@pytest.mark.parametrize("ids", [str, int])
def test_shuffled_tables_resolve_by_id(ids: type) -> None:
    given = {name: table.shuffle(seed=3) for name, table in tables("corpus-id", "query-id", ids=ids).items()}
    assert shade_by_id(RetrievalDataset.from_beir(**given)) == {"0": 0, "1": 1, "3": 3}


def test_scores_may_be_floats() -> None:
    given = tables("corpus-id", "query-id")
    given["qrels"] = given["qrels"].remove_columns("score").add_column("score", [1.0, 0.0, 2.0, 1.0, -1.0])
    dataset = RetrievalDataset.from_beir(**given)
    assert sorted(dataset.qrels["score"][:]) == [1, 1, 2]
    assert dataset.notes.judged_not_relevant == 2


def test_vidore_v3_keeps_its_other_columns() -> None:
    given = tables("corpus_id", "query_id", language=["en", "fr", "en"])
    given["corpus"] = given["corpus"].add_column("doc_id", list("aabb")).add_column("markdown", list("wxyz"))
    dataset = RetrievalDataset.from_beir(**given)
    assert dataset.corpus["doc_id"][:] == list("aabb")
    assert dataset.queries["language"][:] == ["en", "fr", "en"]
    assert dataset.split(1, group_column="doc_id")[1].corpus["doc_id"][:] in (["a", "a"], ["b"])


def test_tevatron_queries_list_positives_and_negatives() -> None:
    given = tables(
        "docid",
        "query_id",
        "query_text",
        positive_document_ids=[["0"], ["1"], ["3", "2"]],
        negative_document_ids=[["3"], None, ["0"]],
    )
    dataset = RetrievalDataset.from_beir(given["corpus"], given["queries"], None)
    assert {(row["query_id"], row["document_id"]) for row in dataset.qrels} == {
        ("0", "0"),
        ("1", "1"),
        ("2", "3"),
        ("2", "2"),
    }
    assert dict(zip(dataset.negatives["query_id"], dataset.negatives["document_ids"], strict=True)) == {
        "0": ["3"],
        "1": [],
        "2": ["0"],
    }
    assert "positive_document_ids" not in dataset.queries.column_names


def test_queries_without_text_or_document_are_left_out_and_counted() -> None:
    given = tables("corpus-id", "query-id")
    given["queries"] = given["queries"].remove_columns("query").add_column("query", ["a", None, "c"])
    given["qrels"] = given["qrels"].select([0, 1, 2])
    dataset = RetrievalDataset.from_beir(**given)
    assert dataset.queries["query_id"][:] == ["0"]
    assert (dataset.notes.blank_queries, dataset.notes.queries_without_document) == (1, 1)


def test_several_relevant_pages_make_a_row_each() -> None:
    view = RetrievalDataset.from_beir(**tables("corpus-id", "query-id")).training_rows(0)
    rows = view.with_format(None)
    assert [(row["query_id"], row["document_id"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "1"), ("2", "3")]
    assert view_of(view).relevant_to(np.array([rows[0]["relevance_group"]]))[1].to_pylist() == ["0", "1"]


@pytest.mark.parametrize(
    ("table", "column", "error", "message"),
    [
        ("corpus", "corpus-id", DatasetError, r"corpus has none of the columns .*'docid'.*it has \['image'\]"),
        ("queries", "query-id", DatasetError, r"table of queries has none of the columns .*it has \['query'\]"),
        ("queries", "query", DatasetError, r"none of the columns 'query', 'query_text', 'text'"),
        ("qrels", "score", DatasetError, r"qrels\) has none of the columns 'score'"),
        ("corpus", "image", DatasetError, "neither an 'image' nor a 'text' column"),
    ],
)
def test_a_missing_column_is_named(table: str, column: str, error: type[Exception], message: str) -> None:
    given = tables("corpus-id", "query-id")
    given[table] = given[table].remove_columns(column)
    with pytest.raises(error, match=message):
        RetrievalDataset.from_beir(**given)


def test_a_judgement_of_an_unknown_page_is_named() -> None:
    given = tables("corpus-id", "query-id")
    given["corpus"] = given["corpus"].select([0, 1])
    with pytest.raises(MissingDocumentError, match=r"'3' \(query '2'\)"):
        RetrievalDataset.from_beir(**given)


def test_a_judgement_of_an_unknown_query_is_named() -> None:
    given = tables("corpus-id", "query-id")
    given["queries"] = given["queries"].select([0, 1])
    with pytest.raises(MissingDocumentError, match=r"not in the queries, e\.g\. '2'"):
        RetrievalDataset.from_beir(**given)


@pytest.mark.parametrize("layout", ["{}.parquet", "{}/test-00000-of-00001.parquet", "{}-test.parquet"])
def test_a_folder_of_three_tables_is_recognised(tmp_path, layout: str) -> None:
    for name, table in tables("corpus-id", "query-id", ids=int).items():
        path = tmp_path / layout.format(name)
        path.parent.mkdir(exist_ok=True)
        table.to_parquet(path)
    dataset = RetrievalDataset.load(tmp_path)
    assert shade_by_id(dataset) == {"0": 0, "1": 1, "3": 3}


def test_images_are_not_copied_for_integer_ids(tmp_path) -> None:
    count = 40
    rng = np.random.default_rng(0)
    pages = [{"bytes": rng.bytes(50_000), "path": None} for _ in range(count)]
    corpus = Dataset.from_dict({"corpus-id": list(range(count)), "image": pages})
    corpus.save_to_disk(tmp_path / "corpus")
    mapped = Dataset.load_from_disk(str(tmp_path / "corpus")).shuffle(seed=1)
    before = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    dataset = RetrievalDataset.from_beir(
        mapped,
        Dataset.from_dict({"query-id": [0], "query": ["a"]}),
        Dataset.from_dict({"query-id": [0], "corpus-id": [7], "score": [1]}),
    )
    assert dataset.corpus.filter(lambda row: row["document_id"] == "7")[0]["image"]["bytes"] == pages[7]["bytes"]
    after = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert after <= before * 1.01 + 60_000  # the one page that the filter above wrote


def write_splits(folder) -> None:
    """One corpus and one table of queries for both splits, and judgements of each, as BEIR has them."""
    (folder / "qrels").mkdir()
    Dataset.from_dict({"_id": ["d0", "d1"], "text": ["x", "y"]}).to_parquet(folder / "corpus.parquet")
    Dataset.from_dict({"_id": ["q0", "q1"], "text": ["a", "b"]}).to_parquet(folder / "queries.parquet")
    for k, split in enumerate(("train", "test")):
        judged = {"query-id": [f"q{k}"], "corpus-id": [f"d{k}"], "score": [1]}
        Dataset.from_dict(judged).to_parquet(folder / "qrels" / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(("split", "query_id"), [("train", "q0"), ("test", "q1")])
def test_of_a_folder_with_splits_one_is_read(tmp_path, split, query_id) -> None:
    write_splits(tmp_path)
    data = RetrievalDataset.load(tmp_path, split=split)
    assert (data.queries["query_id"][:], len(data.corpus)) == ([query_id], 2)
    assert data.notes.queries_without_document == 1


@pytest.mark.parametrize("split", [None, "dev"])
def test_of_a_folder_with_splits_one_must_be_named(tmp_path, split) -> None:
    write_splits(tmp_path)
    with pytest.raises(DatasetError, match=rf"has the splits \['test', 'train'\], and split={split!r}"):
        RetrievalDataset.load(tmp_path, split=split)


def test_a_table_without_the_split_of_the_judgements_is_named(tmp_path) -> None:
    write_splits(tmp_path)
    (tmp_path / "qrels" / "test-00000-of-00001.parquet").unlink()
    Dataset.from_dict({"_id": ["q1"], "text": ["b"]}).to_parquet(tmp_path / "queries-test.parquet")
    with pytest.raises(DatasetError, match=r"The qrels of .* have the splits \['train'\], and the split 'test'"):
        RetrievalDataset.load(tmp_path, split="test")


def test_parts_of_a_table_are_no_splits(tmp_path) -> None:
    for name, table in tables("corpus-id", "query-id").items():
        (tmp_path / name).mkdir()
        for part in range(2):
            table.shard(2, part).to_parquet(tmp_path / name / f"part-{part}.parquet")
    assert len(RetrievalDataset.load(tmp_path)) == 3


def test_negatives_of_queries_under_another_name_are_an_error() -> None:
    given = tables("corpus-id", "query-id")
    given["queries"] = given["queries"].add_column("hard_negatives", [["1"]] * len(given["queries"]))
    with pytest.raises(DatasetError, match=r"'hard_negatives' .* looks like hard negatives.*'negative_document_ids'"):
        RetrievalDataset.from_beir(**given)
