import io

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, List, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from mmtune import ConfigError, DatasetError, ImageDecodeError, MissingDocumentError, RetrievalDataset
from mmtune.data.rows import view_of


def page(number: int) -> dict:
    """A page whose colour is its number."""
    buffer = io.BytesIO()
    PillowImage.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def number_of(row: dict) -> int:
    return PillowImage.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0))[0]


def numbers_by_id(dataset: RetrievalDataset) -> dict[str, int]:
    return {row["document_id"]: number_of(row) for row in dataset.corpus}


def id_rows(count: int = 4, **columns) -> Dataset:
    """Pages "p0", "p1", ... each with a query and the next page as its negative, with columns changed or added."""
    table = {
        "id": [f"p{k}" for k in range(count)],
        "query": [f"ask {k}" for k in range(count)],
        "image": [page(k) for k in range(count)],
        "negatives": [[f"p{(k + 1) % count}"] for k in range(count)],
    }
    return with_image_type(Dataset.from_dict(table | columns))


def column_rows(count: int = 3, **columns) -> Dataset:
    """Rows "ask 0", "ask 1", ... whose page is the number of the row."""
    table = {"query": [f"ask {k}" for k in range(count)], "image": [page(k) for k in range(count)]}
    return with_image_type(Dataset.from_dict(table | columns))


def with_image_type(rows: Dataset) -> Dataset:
    """``rows`` whose columns of bytes and path are typed as images."""
    for name, feature in rows.features.items():
        if isinstance(feature, dict):
            rows = rows.cast_column(name, Image())
    return rows


def negatives_of(dataset: RetrievalDataset) -> dict[str, list[str]]:
    return {row["query_id"]: row["document_ids"] for row in dataset.negatives}


def relevant_of(dataset: RetrievalDataset) -> set[tuple[str, str, int]]:
    return {(row["query_id"], row["document_id"], row["score"]) for row in dataset.qrels}


# --- from_id_rows ------------------------------------------------------------------------------------------------


def test_id_rows_become_four_tables():
    dataset = RetrievalDataset.from_id_rows(id_rows(3, query=["x", None, "z"], language=["en", "de", "fr"]))
    assert dataset.corpus.features["image"] == Image(decode=False)
    assert numbers_by_id(dataset) == {"p0": 0, "p1": 1, "p2": 2}
    assert dataset.queries[:] == {"query_id": ["p0", "p2"], "text": ["x", "z"], "language": ["en", "fr"]}
    assert dataset.corpus["language"][:] == ["en", "de", "fr"]
    assert relevant_of(dataset) == {("p0", "p0", 1), ("p2", "p2", 1)}
    assert negatives_of(dataset) == {"p0": ["p1"], "p2": ["p0"]}
    assert len(dataset) == 2


def test_columns_can_have_other_names():
    rows = id_rows().rename_columns({"id": "key", "query": "question", "image": "scan", "negatives": "hard"})
    dataset = RetrievalDataset.from_id_rows(
        rows, id_column="key", query_column="question", image_column="scan", negatives_column="hard"
    )
    assert numbers_by_id(dataset) == {f"p{k}": k for k in range(4)}
    assert dataset.queries.column_names == ["query_id", "text"]
    assert negatives_of(dataset)["p3"] == ["p0"]


@pytest.mark.parametrize("blank", [None, "", "  ", "\n\t"])
def test_a_blank_query_makes_a_document_only(blank):
    dataset = RetrievalDataset.from_id_rows(id_rows(3, query=["x", blank, "z"]))
    assert dataset.queries["query_id"][:] == ["p0", "p2"]
    assert len(dataset.corpus) == 3
    assert dataset.notes.blank_queries == 1


@pytest.mark.parametrize("queries", [[None] * 3, ["", " ", None]])
def test_pages_without_a_query_are_a_dataset_that_can_be_joined_saved_and_audited(queries, tmp_path):
    dataset = RetrievalDataset.from_id_rows(id_rows(3, query=queries))
    assert (len(dataset), len(dataset.corpus), dataset.notes.blank_queries) == (0, 3, 3)
    assert "queries    0" in repr(dataset)
    assert dataset.audit().counts["unreferenced_pages"] == 3
    assert len(dataset.deduplicate().corpus) == 3
    dataset.save(tmp_path / "saved")
    loaded = RetrievalDataset.load(tmp_path / "saved")
    joined = RetrievalDataset.concatenate([loaded, RetrievalDataset.from_id_rows(id_rows(2))])
    assert (len(joined), len(joined.corpus)) == (2, 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda dataset: dataset.training_rows(),
        lambda dataset: dataset.labeled_pairs(),
        lambda dataset: dataset.labeled_lists(),
        lambda dataset: dataset.split(1),
        lambda dataset: dataset.select_queries(1),
        lambda dataset: dataset.select_queries(["q"]),
    ],
)
def test_what_asks_something_refuses_pages_without_a_query(call):
    dataset = RetrievalDataset.from_id_rows(id_rows(3, query=[None] * 3))
    with pytest.raises(DatasetError, match=r"no queries: 3 rows have a null .* generate_queries\(dataset, generator\)"):
        call(dataset)


def test_zero_rows_are_an_error():
    for build in (RetrievalDataset.from_id_rows, RetrievalDataset.from_columns):
        with pytest.raises(DatasetError, match=r"zero rows \(columns: \['id', 'query', 'image', 'negatives'\]"):
            build(id_rows().select([]))


@pytest.mark.parametrize(
    ("ids", "negatives"),
    [
        ([7, 8, 9], [[8, 9], [], [7]]),
        (["007", "08", "9"], [["08", "9"], [], ["007"]]),
        (["é/1", "β 2", "🧾"], [["β 2", "🧾"], [], ["é/1"]]),
    ],
)
def test_ids_of_every_kind_resolve(ids, negatives):
    dataset = RetrievalDataset.from_id_rows(id_rows(3, id=ids, negatives=negatives).shuffle(seed=2))
    assert numbers_by_id(dataset) == {str(name): k for k, name in enumerate(ids)}
    expected = {str(name): [str(value) for value in row] for name, row in zip(ids, negatives, strict=True)}
    assert negatives_of(dataset) == expected


def test_strings_of_arrow_of_every_kind_are_ids_and_texts():
    import pyarrow as pa

    columns = {
        "plain": (pa.array(["a", "b"]), pa.array(["x", "y"]), pa.array([["b"], ["a"]])),
        "large": (
            pa.array(["a", "b"], pa.large_string()),
            pa.array(["x", "y"], pa.large_string()),
            pa.array([["b"], ["a"]], pa.large_list(pa.large_string())),
        ),
        "dictionary": (pa.array(["a", "b"]).dictionary_encode(), pa.array(["x", "y"]), pa.array([["b"], ["a"]])),
    }
    for ids, queries, negatives in columns.values():
        table = pa.table({"id": ids, "query": queries, "negatives": negatives})
        images = pa.array([page(0)["bytes"], page(1)["bytes"]])
        dataset = RetrievalDataset.from_id_rows(Dataset(table.append_column("image", images)))
        assert dataset.queries.select_columns(["query_id", "text"])[:] == {"query_id": ["a", "b"], "text": ["x", "y"]}
        assert negatives_of(dataset) == {"a": ["b"], "b": ["a"]}
        assert dataset.corpus.features["document_id"] == Value("string")


def test_lists_of_one_length_are_lists():
    rows = id_rows().cast_column("negatives", List(Value("string"), length=1))
    assert negatives_of(RetrievalDataset.from_id_rows(rows))["p0"] == ["p1"]


def test_a_null_list_that_arrow_stores_with_values_is_empty():
    import pyarrow as pa

    values = pa.array(["p1", "p2", "p0"])
    hidden = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), values, mask=pa.array([True, False, False]))
    table = id_rows(3).remove_columns("negatives").data.table.append_column("negatives", hidden)
    dataset = RetrievalDataset.from_id_rows(Dataset(table))
    assert negatives_of(dataset) == {"p0": [], "p1": ["p2"], "p2": ["p0"]}


def test_an_id_that_stands_twice_is_named_with_its_rows():
    with pytest.raises(DatasetError, match=r"The id 'p1' stands in 2 rows \(1, 3\) of column 'id'"):
        RetrievalDataset.from_id_rows(id_rows(id=["p0", "p1", "p2", "p1"]))


def test_a_row_without_an_id_is_named():
    with pytest.raises(DatasetError, match=r"Row 2 has no id: column 'id' is null"):
        RetrievalDataset.from_id_rows(id_rows(id=["p0", "p1", None, "p3"]))


def test_a_row_that_lists_its_own_id_is_audited_and_the_page_is_not_used():
    data = RetrievalDataset.from_id_rows(id_rows(negatives=[["p0", "p1"], ["p0"], ["p2", "p3"], ["p1"]]))
    assert data.audit()["relevant_negatives_by_id"].count == 2
    rows = data.training_rows(1)
    assert rows.with_format(None)["negative_document_ids"][:] == [["p1"], ["p0"], ["p3"], ["p1"]]
    assert view_of(rows).chosen["refused"] == 2


LOOK_LIKE_NEGATIVES = [
    "neg_0",
    "hard_negative_0",
    "negative_image",
    "hardNegatives",
    "Negatives",
    "neg",
    "image_negative",
]


@pytest.mark.parametrize("name", LOOK_LIKE_NEGATIVES)
def test_a_column_that_looks_like_negatives_and_would_not_be_used_is_an_error(name, tmp_path):
    rows = column_rows(2, **{name: [page(10), page(11)]})
    with pytest.raises(DatasetError, match=rf"Column '{name}' looks like hard negatives.*negative_columns="):
        RetrievalDataset.from_columns(rows)
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match=rf"Column '{name}' looks like hard negatives"):
        RetrievalDataset.load(tmp_path / "rows.parquet")


def test_rows_with_another_id_column_do_not_lose_their_negatives(tmp_path):
    id_rows().rename_column("id", "_id").to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(
        DatasetError, match=r"Column 'negatives' looks like hard negatives.*from_id_rows\(rows, id_column"
    ):
        RetrievalDataset.load(tmp_path / "rows.parquet")


def test_where_others_were_named_columns_that_look_like_negatives_are_a_warning():
    rows = column_rows(2, negative_0=[page(10), page(11)], neg_1=[page(20), page(21)])
    with pytest.warns(UserWarning, match=r"'neg_1' look like hard negatives and are not used.*'negative_0'"):
        RetrievalDataset.from_columns(rows, negative_columns=["negative_0"])
    with pytest.warns(UserWarning, match=r"'hard_negatives' look like hard negatives"):
        RetrievalDataset.from_id_rows(id_rows(hard_negatives=[["p1"]] * 4))


def test_counts_and_notes_of_negatives_are_no_negatives():
    rows = column_rows(2, num_negatives=[1, 2], negative_note=["x", "y"], is_negative=[True, False])
    assert RetrievalDataset.from_columns(rows).negatives is None


def test_an_unknown_negative_is_an_error_or_dropped_and_noted():
    rows = id_rows(negatives=[["p9", "p1"], ["q8"], ["p1"], ["p9"]])
    with pytest.raises(MissingDocumentError, match=r"3 negatives .* e.g. 'p9' \(query 'p0'\), 'q8' \(query 'p1'\)"):
        RetrievalDataset.from_id_rows(rows)
    dataset = RetrievalDataset.from_id_rows(rows, on_missing="drop")
    assert negatives_of(dataset) == {"p0": ["p1"], "p1": [], "p2": ["p1"], "p3": []}
    assert dataset.notes.unknown_negatives == 3
    assert dataset.notes.unknown_examples == (("p0", "p9"), ("p1", "q8"), ("p3", "p9"))
    with pytest.raises(ConfigError, match=r"on_missing='ignore' is unknown"):
        RetrievalDataset.from_id_rows(rows, on_missing="ignore")


def test_null_lists_and_null_entries_are_no_negatives():
    dataset = RetrievalDataset.from_id_rows(id_rows(negatives=[[None, "p1", None], None, [], ["p0"]]))
    assert negatives_of(dataset) == {"p0": ["p1"], "p1": [], "p2": [], "p3": ["p0"]}
    assert dataset.notes.null_negatives == 2


@pytest.mark.parametrize("negatives", [[None] * 4, [[]] * 4, [[None]] * 4])
def test_a_column_of_empty_lists_is_a_table_of_none(negatives):
    dataset = RetrievalDataset.from_id_rows(id_rows(negatives=negatives))
    assert negatives_of(dataset) == {f"p{k}": [] for k in range(4)}
    assert list(dataset.training_rows(2)[0]) == ["query", "image", "negative_0", "negative_1"]


def test_rows_without_negatives_are_built_on_request():
    rows = id_rows().remove_columns("negatives")
    assert RetrievalDataset.from_id_rows(rows, negatives_column=None).negatives is None
    assert RetrievalDataset.from_id_rows(rows).negatives is None
    with pytest.raises(DatasetError, match=r"no column 'negs'.*\['id', 'query', 'image'\].*negatives_column=None"):
        RetrievalDataset.from_id_rows(rows, negatives_column="negs")


def test_a_renamed_column_of_negatives_is_not_overlooked():
    with pytest.raises(DatasetError, match=r"no column 'negatives'.*'hard_negs'"):
        RetrievalDataset.from_id_rows(id_rows().rename_column("negatives", "hard_negs"))


@pytest.mark.parametrize("missing", ["id", "query", "image"])
def test_a_missing_or_renamed_column_lists_those_found(missing):
    with pytest.raises(DatasetError, match=rf"no column '{missing}'; it has \[.*'renamed'.*\]"):
        RetrievalDataset.from_id_rows(id_rows().rename_column(missing, "renamed"))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", [0.0, 1.0, 2.0, 3.0], r"'id' holds double"),
        ("id", [["a"]] * 4, r"'id' holds list"),
        ("query", [1, 2, 3, 4], r"'query' holds int64, expected text.*\['id', 'query', 'image', 'negatives'\]"),
        ("query", [["a"]] * 4, r"'query' holds list"),
        ("image", [1, 2, 3, 4], r"'image' holds int64, which can't be images"),
        ("negatives", ["p1", "p2", "p3", "p0"], r"'negatives' holds string, expected lists of ids"),
        ("negatives", [[1.5]] * 4, r"'negatives' holds double"),
    ],
)
def test_a_column_of_another_type_is_named(column, values, message):
    with pytest.raises(DatasetError, match=message):
        RetrievalDataset.from_id_rows(id_rows(**{column: values}))


def test_a_null_image_is_named_by_its_id():
    with pytest.raises(DatasetError, match=r"2 rows have no image.*'p1'"):
        RetrievalDataset.from_id_rows(id_rows(image=[page(0), None, page(2), {"bytes": None, "path": None}]))


@pytest.mark.parametrize("name", ["text", "query_id", "score", "document_ids"])
@pytest.mark.parametrize("build", ["from_id_rows", "from_columns"])
def test_other_columns_may_have_the_names_of_ours(build, name):
    rows = id_rows(**{name: ["w", "x", "y", "z"]})
    if build == "from_columns":
        dataset = RetrievalDataset.from_columns(rows.remove_columns(["id", "negatives"]))
        assert numbers_by_id(dataset) == {str(k): k for k in range(4)}
    else:
        dataset = RetrievalDataset.from_id_rows(rows)
        assert numbers_by_id(dataset) == {f"p{k}": k for k in range(4)}
    assert dataset.queries["text"][:] == [f"ask {k}" for k in range(4)]


def test_a_column_that_clashes_with_one_of_the_corpus_is_named():
    with pytest.raises(DatasetError, match=r"column 'image' beside 'scan'.*Rename"):
        RetrievalDataset.from_id_rows(id_rows(scan=[page(k + 10) for k in range(4)]), image_column="scan")
    with pytest.raises(DatasetError, match=r"column 'document_id' beside 'image'.*Rename"):
        RetrievalDataset.from_id_rows(id_rows(document_id=list("wxyz")))


def test_images_as_paths_and_as_plain_bytes(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    for k, path in enumerate(paths):
        path.write_bytes(page(k)["bytes"])
    for images in ([str(path) for path in paths], [page(k)["bytes"] for k in range(4)]):
        dataset = RetrievalDataset.from_id_rows(id_rows(image=images).shuffle(seed=3))
        assert "image" not in dataset.queries.column_names
        for ids, row in zip(dataset.training_rows(1).with_format(None), dataset.training_rows(1), strict=True):
            assert f"p{row['image'].getpixel((0, 0))[0]}" == ids["document_id"]
            assert f"p{row['negative_0'].getpixel((0, 0))[0]}" == ids["negative_document_ids"][0]


@pytest.mark.parametrize("build", [RetrievalDataset.from_id_rows, RetrievalDataset.from_columns])
def test_what_is_no_table_is_a_named_error(build):
    with pytest.raises(DatasetError, match=r"got the splits \['train', 'test'\].*rows\['train'\]"):
        build(DatasetDict({"train": id_rows(), "test": id_rows()}))
    with pytest.raises(DatasetError, match=r"streamed dataset.*streaming=True"):
        build(id_rows().to_iterable_dataset())
    with pytest.raises(DatasetError, match=r"Expected a datasets.Dataset, got list"):
        build([{"id": "p0"}])


@given(data=st.data(), count=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_id_rows_in_any_order_give_what_stands_in_them(data, count):
    queries = data.draw(st.lists(st.sampled_from([None, " ", "x", "y"]), min_size=count, max_size=count))
    names = data.draw(st.lists(st.text(max_size=4), min_size=count, max_size=count, unique=True))
    negatives = [
        data.draw(st.none() | st.lists(st.sampled_from([*(set(names) - {names[k]}), None]), max_size=3))
        for k in range(count)
    ]
    order = data.draw(st.permutations(range(count)))
    rows = id_rows(count, id=names, query=queries, negatives=negatives).select(order)
    asking = [k for k in order if (queries[k] or "").strip()]
    dataset = RetrievalDataset.from_id_rows(rows)
    assert dataset.corpus["document_id"][:] == [names[k] for k in order]
    assert numbers_by_id(dataset) == {names[k]: k for k in range(count)}
    assert dataset.queries[:] == {"query_id": [names[k] for k in asking], "text": [queries[k] for k in asking]}
    assert negatives_of(dataset) == {
        names[k]: [value for value in negatives[k] or [] if value is not None] for k in asking
    }
    assert dataset.notes.blank_queries == count - len(asking)


# --- from_columns ------------------------------------------------------------------------------------------------


def test_columns_become_numbered_documents():
    rows = column_rows(3, negative_0=[page(10 + k) for k in range(3)], negative_1=[page(20 + k) for k in range(3)])
    dataset = RetrievalDataset.from_columns(rows)
    assert numbers_by_id(dataset) == {str(3 * k + i): 10 * k + i for k in range(3) for i in range(3)}
    assert dataset.queries[:] == {"query_id": ["0", "1", "2"], "text": ["ask 0", "ask 1", "ask 2"]}
    assert relevant_of(dataset) == {(str(i), str(i), 1) for i in range(3)}
    assert negatives_of(dataset) == {str(i): [str(3 + i), str(6 + i)] for i in range(3)}
    assert dataset.notes.ids_are_row_numbers


def test_negative_columns_are_taken_by_number():
    names = ["negative_10", "negative_2", "negative", "negative_1"]
    rows = column_rows(1, **{name: [page(k + 1)] for k, name in enumerate(names)}, negative_note=["no image"])
    dataset = RetrievalDataset.from_columns(rows)
    numbers = numbers_by_id(dataset)
    assert [numbers[name] for name in negatives_of(dataset)["0"]] == [3, 4, 2, 1]
    assert negatives_of(dataset)["0"] == ["1", "2", "3", "4"]


def test_negative_columns_can_be_named_or_left_out():
    rows = column_rows(2, hard=[page(10), page(11)], negative_0=[page(20), page(21)])
    with pytest.warns(UserWarning, match=r"'negative_0' look like"):
        named = RetrievalDataset.from_columns(rows, negative_columns=["hard"])
    assert numbers_by_id(named) == {"0": 0, "1": 1, "2": 10, "3": 11}
    assert RetrievalDataset.from_columns(rows, negative_columns=[]).negatives is None
    with pytest.raises(DatasetError, match=r"no column 'easy'; it has \['query', 'image', 'hard', 'negative_0'\]"):
        RetrievalDataset.from_columns(rows, negative_columns=["easy"])


def test_null_negatives_are_no_documents():
    rows = column_rows(3, negative_0=[page(10), None, page(12)], negative_1=[None, None, page(22)])
    dataset = RetrievalDataset.from_columns(rows)
    assert numbers_by_id(dataset) == {"0": 0, "1": 1, "2": 2, "3": 10, "5": 12, "8": 22}
    assert negatives_of(dataset) == {"0": ["3"], "1": [], "2": ["5", "8"]}
    assert dataset.notes.null_negatives == 3


def test_a_column_of_null_negatives_is_no_document():
    rows = column_rows(2, negative_0=[page(10), page(11)], negative_1=[None, None])
    assert negatives_of(RetrievalDataset.from_columns(rows)) == {"0": ["2"], "1": ["3"]}


def test_rows_without_a_query_or_an_image_are_noted():
    rows = column_rows(4, query=["x", None, " ", "z"], image=[page(0), page(1), None, None], negative=[page(9)] * 4)
    dataset = RetrievalDataset.from_columns(rows)
    assert numbers_by_id(dataset) == {"0": 0, "1": 1, "4": 9, "5": 9, "6": 9, "7": 9}
    assert dataset.queries["query_id"][:] == ["0"]
    notes = dataset.notes
    assert (notes.blank_queries, notes.null_documents, notes.queries_without_document) == (2, 2, 1)
    with pytest.raises(DatasetError, match=r"No query is left"):
        RetrievalDataset.from_columns(rows.select([1, 2, 3]))


def test_repeated_and_reordered_rows_are_numbered_as_they_stand():
    order = [2, 0, 0, 1, 2]
    rows = column_rows(3, negative=[page(10 + k) for k in range(3)], source=["a", "b", "c"]).select(order)
    dataset = RetrievalDataset.from_columns(rows)
    expected = {str(i): k for i, k in enumerate(order)} | {str(5 + i): 10 + k for i, k in enumerate(order)}
    assert numbers_by_id(dataset) == expected
    assert dataset.queries["text"][:] == [f"ask {k}" for k in order]
    assert dataset.queries["source"][:] == ["abc"[k] for k in order]
    assert dataset.corpus["source"][:5] == ["abc"[k] for k in order]
    # rows 1 and 2 are the same page: neither is a negative of the other, though their ids differ
    rows = dataset.training_rows(1)
    at, ids = view_of(rows).relevant_to(np.array(rows.with_format(None)[:]["relevance_group"]))
    assert [sorted(ids.filter(at == row).to_pylist()) for row in range(5)] == [
        ["0", "4"],
        ["1", "2"],
        ["1", "2"],
        ["3"],
        ["0", "4"],
    ]


def test_a_missing_column_of_rows_lists_those_found():
    with pytest.raises(DatasetError, match=r"no column 'image'; it has \['query', 'scan'\]"):
        RetrievalDataset.from_columns(column_rows().rename_column("image", "scan"))


# --- the constructor ---------------------------------------------------------------------------------------------


def small(**changes) -> RetrievalDataset:
    tables = {
        "corpus": Dataset.from_dict({"document_id": ["a", "b", "c"], "image": [page(0), page(1), page(2)]}),
        "queries": Dataset.from_dict({"query_id": ["q", "r"], "text": ["x", "y"]}),
        "qrels": Dataset.from_dict({"query_id": ["q", "q", "r"], "document_id": ["a", "b", "c"], "score": [2, 1, 3]}),
        "negatives": Dataset.from_dict({"query_id": ["q"], "document_ids": [["c"]]}),
    }
    return RetrievalDataset(**(tables | changes))


def test_graded_judgements_of_several_documents_are_kept():
    dataset = small()
    assert relevant_of(dataset) == {("q", "a", 2), ("q", "b", 1), ("r", "c", 3)}
    assert len(dataset.training_rows(1)) == 3


def test_scores_may_be_whole_floats_and_ids_integers():
    dataset = small(
        corpus=Dataset.from_dict({"document_id": [1, 2], "text": ["s", "t"]}),
        queries=Dataset.from_dict({"query_id": [7], "text": ["x"]}),
        qrels=Dataset.from_dict({"query_id": [7], "document_id": [2], "score": [2.0]}),
        negatives=Dataset.from_dict({"query_id": [7], "document_ids": [[1]]}),
    )
    assert relevant_of(dataset) == {("7", "2", 2)}
    assert negatives_of(dataset) == {"7": ["1"]}
    assert dataset.qrels.features["score"] == Value("int64")


@pytest.mark.parametrize("score", [0, -1, 1.5, None, float("nan")])
def test_a_score_that_is_no_positive_integer_is_named(score):
    qrels = Dataset.from_dict({"query_id": ["q", "r"], "document_id": ["a", "c"], "score": [1, score]})
    with pytest.raises(DatasetError, match=r"1 scores .*query 'r', document 'c'"):
        small(qrels=qrels)


def test_queries_without_a_document_are_left_out_and_noted():
    qrels = Dataset.from_dict({"query_id": ["r"], "document_id": ["c"], "score": [1]})
    dataset = small(qrels=qrels)
    assert dataset.queries["query_id"][:] == ["r"]
    assert dataset.notes.queries_without_document == 1
    assert negatives_of(dataset) == {}


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ("corpus", {"document_id": ["a"]}, r"neither an 'image' nor a 'text' column; it has \['document_id'\]"),
        ("corpus", {"doc": ["a"], "text": ["x"]}, r"The corpus has no column 'document_id'; it has \['doc', 'text'\]"),
        ("corpus", {"document_id": ["a", "a"], "text": ["x", "y"]}, r"document id 'a' stands in 2 rows"),
        ("corpus", {"document_id": [], "text": []}, r"The corpus has zero rows"),
        ("queries", {"query_id": ["q", "q"], "text": ["x", "y"]}, r"query id 'q' stands in 2 rows"),
        ("queries", {"query_id": ["q", "r"], "text": ["x", " "]}, r"Query 'r' has no text"),
        ("queries", {"query_id": ["q"], "query": ["x"]}, r"no column 'text'; it has \['query_id', 'query'\]"),
        ("qrels", {"query_id": ["q"], "document_id": ["a"]}, r"no column 'score'"),
        ("qrels", {"query_id": ["q"], "document_id": ["a"], "score": ["1"]}, r"scores .* string"),
        ("negatives", {"query_id": ["q"], "document_ids": ["c"]}, r"'document_ids' .* string, expected lists"),
        ("negatives", {"query_id": ["q", "q"], "document_ids": [["c"], ["c"]]}, r"'q' stands in 2 rows"),
    ],
)
def test_tables_that_do_not_fit_are_named(table, columns, message):
    with pytest.raises(DatasetError, match=message):
        small(**{table: Dataset.from_dict(columns)})


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (
            "qrels",
            {"query_id": ["q"], "document_id": ["z"], "score": [1]},
            r"not in the corpus, e.g. 'z' \(query 'q'\)",
        ),
        ("qrels", {"query_id": ["s"], "document_id": ["a"], "score": [1]}, r"not in the queries, e.g. 's'"),
        ("negatives", {"query_id": ["q"], "document_ids": [["z"]]}, r"not in the corpus, e.g. 'z' \(query 'q'\)"),
        ("negatives", {"query_id": ["s"], "document_ids": [["a"]]}, r"not in the queries, e.g. 's'"),
    ],
)
def test_references_to_what_is_not_there_are_named(table, columns, message):
    with pytest.raises(MissingDocumentError, match=message):
        small(**{table: Dataset.from_dict(columns)})


@pytest.mark.parametrize("table", ["corpus", "queries", "qrels", "negatives"])
def test_tables_of_another_kind_are_named(table):
    with pytest.raises(DatasetError, match=r"Expected a datasets.Dataset, got list"):
        small(**{table: [{"query_id": "q"}]})


def test_a_judgement_that_stands_twice_is_no_second_row():
    qrels = Dataset.from_dict({"query_id": ["q", "q"], "document_id": ["a", "a"], "score": [1, 1]})
    try:
        dataset = small(qrels=qrels)
    except DatasetError as error:
        assert "'a'" in str(error)  # noqa: PT017  an error that names it is as good
    else:
        assert len(dataset.training_rows(1)) == 1


def test_a_page_that_is_null_is_found_by_the_check():
    corpus = Dataset.from_dict({"document_id": ["a", "b", "c"], "image": [page(0), None, page(2)]})
    with pytest.raises(DatasetError, match=r"'b'"):
        small(corpus=corpus).check_pages(show_progress_bar=False)


def test_damaged_and_missing_pages_are_found_by_the_check(tmp_path):
    small().check_pages(show_progress_bar=False)
    cut = {"bytes": page(1)["bytes"][:40], "path": None}
    missing = {"bytes": None, "path": str(tmp_path / "missing.png")}
    for wrong in (cut, missing):
        corpus = Dataset.from_dict({"document_id": ["a", "b", "c"], "image": [page(0), wrong, page(2)]})
        with pytest.raises(ImageDecodeError, match=r"'b'"):
            small(corpus=corpus.select([1, 0, 2])).check_pages(show_progress_bar=False)


def test_the_text_of_a_dataset_fits_one_screen():
    shown = repr(RetrievalDataset.from_id_rows(id_rows(4, negatives=[["p1", "p2"], [], ["p1"], ["p0"]])))
    lines = shown.splitlines()
    assert len(lines) == 5
    assert "4 documents (image)" in lines[1]
    assert [line.split()[:2] for line in lines[2:]] == [["queries", "4"], ["qrels", "4"], ["negatives", "0"]]
    assert "0 to 2 a query, 1.0 on average" in lines[4]


# --- save and load -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def as_values(dataset: RetrievalDataset) -> list:
    tables = (dataset.corpus, dataset.queries, dataset.qrels, dataset.negatives)
    return [None if table is None else (table.features, table[:]) for table in tables]


@pytest.mark.parametrize("negatives", [True, False])
def test_a_saved_dataset_loads_as_it_was(negatives, tmp_path):
    rows = id_rows(negatives=[["gone", "p1"], [None], [], ["p0"]], language=["en"] * 4).shuffle(seed=1)
    column = "negatives" if negatives else None
    dataset = RetrievalDataset.from_id_rows(rows, negatives_column=column, on_missing="drop")
    dataset.save(tmp_path / "deep" / "saved")
    loaded = RetrievalDataset.load(tmp_path / "deep" / "saved")
    assert as_values(loaded) == as_values(dataset)
    assert loaded.notes == dataset.notes
    assert loaded.training_rows(1).with_format(None)[:] == dataset.training_rows(1).with_format(None)[:]


def test_a_split_and_a_dataset_of_columns_survive_saving(tmp_path):
    _, evaluation = RetrievalDataset.from_columns(column_rows(4, negative=[page(9), None] * 2)).split(2)
    evaluation.save(str(tmp_path / "saved"))
    loaded = RetrievalDataset.load(str(tmp_path / "saved"))
    assert as_values(loaded) == as_values(evaluation)
    assert loaded.notes == evaluation.notes
    assert loaded.notes.ids_are_row_numbers


def test_images_in_files_are_saved_with_the_dataset(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(page(7)["bytes"])
    RetrievalDataset.from_columns(Dataset.from_dict({"query": ["x"], "image": [str(path)]})).save(tmp_path / "saved")
    path.unlink()
    assert numbers_by_id(RetrievalDataset.load(tmp_path / "saved")) == {"0": 7}


def test_a_missing_image_file_is_named_when_saving(tmp_path):
    rows = Dataset.from_dict({"query": ["x"], "image": [str(tmp_path / "missing.png")]})
    with pytest.raises(DatasetError, match=r"missing.png"):
        RetrievalDataset.from_columns(rows).save(tmp_path / "saved")


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"is not empty"):
        small().save(tmp_path)
    with pytest.raises(DatasetError, match=r"is not empty"):
        small().save(tmp_path / "notes.txt")


@pytest.mark.parametrize("layout", ["parquet file", "parquet folder", "saved dataset", "saved splits"])
def test_every_place_that_holds_rows_loads(layout, tmp_path):
    rows = id_rows().cast_column("image", Image())
    path = tmp_path / "rows"
    if layout == "parquet file":
        path = tmp_path / "rows.parquet"
        rows.to_parquet(path)
    elif layout == "parquet folder":
        path.mkdir()
        rows.select([0, 1]).to_parquet(path / "part-0.parquet")
        rows.select([2, 3]).to_parquet(path / "part-1.parquet")
    elif layout == "saved dataset":
        rows.save_to_disk(path)
    else:
        DatasetDict({"train": rows}).save_to_disk(path)
    assert as_values(RetrievalDataset.load(path)) == as_values(RetrievalDataset.from_id_rows(rows))
    assert as_values(RetrievalDataset.load(str(path), split="train"))[1] == as_values(RetrievalDataset.load(path))[1]


def test_a_table_of_columns_loads_by_its_layout(tmp_path):
    rows = column_rows(2, negative_0=[page(8), page(9)]).cast_column("image", Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    assert negatives_of(RetrievalDataset.load(tmp_path / "rows.parquet")) == {"0": ["2"], "1": ["3"]}


def test_rows_with_ids_and_without_negatives_load(tmp_path):
    id_rows().remove_columns("negatives").to_parquet(tmp_path / "rows.parquet")
    dataset = RetrievalDataset.load(tmp_path / "rows.parquet")
    assert (dataset.negatives, set(dataset.queries["query_id"])) == (None, {"p0", "p1", "p2", "p3"})


def test_of_several_splits_one_must_be_named(tmp_path):
    DatasetDict({"train": id_rows(), "test": id_rows(3)}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DatasetError, match=r"has the splits \['train', 'test'\].*Name one"):
        RetrievalDataset.load(tmp_path / "rows")
    with pytest.raises(DatasetError, match=r"\['train', 'test'\], and split='dev'"):
        RetrievalDataset.load(tmp_path / "rows", split="dev")
    assert len(RetrievalDataset.load(tmp_path / "rows", split="test")) == 3


def test_an_unknown_layout_lists_what_was_found_and_what_is_known(tmp_path):
    Dataset.from_dict({"qry": ["x"], "picture": ["y"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match=r"\['qry', 'picture'\].*'id', 'query', 'image'.*from_columns"):
        RetrievalDataset.load(tmp_path / "rows.parquet")


def test_wrong_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("id,query\n1,x\n")
    for name in ("missing.parquet", "empty", "rows.csv"):
        with pytest.raises(DatasetError, match=name):
            RetrievalDataset.load(tmp_path / name)


def test_a_saved_folder_with_a_part_missing_is_named(tmp_path):
    small().save(tmp_path / "saved")
    (tmp_path / "saved" / "corpus").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"saved.*corpus"):
        RetrievalDataset.load(tmp_path / "saved")


def test_input_that_is_memory_mapped_and_formatted_reads_the_same(tmp_path):
    id_rows().cast_column("image", Image()).save_to_disk(tmp_path / "rows")
    rows = load_from_disk(str(tmp_path / "rows")).shuffle(seed=1)
    for changed in (rows, rows.with_format("numpy"), rows.with_transform(lambda batch: batch)):
        assert numbers_by_id(RetrievalDataset.from_id_rows(changed)) == {f"p{k}": k for k in range(4)}


def test_generated_pages_build(pages):
    dataset = RetrievalDataset.from_id_rows(pages.shuffle(seed=1))
    assert (len(dataset), len(dataset.corpus)) == (24, len(pages))
    dataset.check_pages(show_progress_bar=False)


@pytest.mark.parametrize("link", [False, True])
def test_a_loaded_table_names_no_image_outside_its_folder(link, tmp_path):
    (tmp_path / "private.png").write_bytes(page(1)["bytes"])
    (tmp_path / "table").mkdir()
    path = tmp_path / "private.png"
    if link:
        path = tmp_path / "table" / "linked.png"
        path.symlink_to(tmp_path / "private.png")
    rows = Dataset.from_dict({"id": ["p0"], "query": ["x"], "image": [str(path)]})
    assert len(RetrievalDataset.from_id_rows(rows)) == 1
    rows.to_parquet(tmp_path / "table" / "rows.parquet")
    for name in ("table", "table/rows.parquet"):
        with pytest.raises(DatasetError, match=r"'.*png' of document 'p0'.*allow_outside=True"):
            RetrievalDataset.load(tmp_path / name)
        assert len(RetrievalDataset.load(tmp_path / name, allow_outside=True)) == 1


def test_a_loaded_table_reads_images_below_its_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(page(1)["bytes"])
    rows = Dataset.from_dict({"id": ["p0"], "query": ["x"], "image": [str(tmp_path / "images" / "a.png")]})
    rows.to_parquet(tmp_path / "rows.parquet")
    RetrievalDataset.load(tmp_path / "rows.parquet").check_pages(show_progress_bar=False)
