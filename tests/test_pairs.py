"""Rows for rerankers, in both directions."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune import ConfigError, DatasetError, RetrievalDataset
from mmtune.testing import generated_pages


@pytest.fixture(scope="module")
def dataset() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(generated_pages(12))


def test_each_positive_is_followed_by_its_listed_negatives(dataset: RetrievalDataset) -> None:
    rows = dataset.labeled_pairs(3)
    ids = rows.with_format(None)
    assert len(rows) == 4 * len(dataset)
    assert rows.format["type"] == "custom"
    assert ids["label"][:] == [1, 0, 0, 0] * len(dataset)
    listed = dict(zip(dataset.negatives["query_id"], dataset.negatives["document_ids"], strict=True))
    for start in range(0, len(rows), 4):
        group = ids[start : start + 4]
        assert len(set(group["query_id"])) == 1
        assert group["document_id"] == [group["query_id"][0], *listed[group["query_id"][0]][:3]]


def test_rows_read_as_query_document_and_label(dataset: RetrievalDataset) -> None:
    row = dataset.labeled_pairs(1)[0]
    assert list(row) == ["query", "document", "label"]
    assert isinstance(row["query"], str)
    assert row["document"].mode == "RGB"


def test_pages_ask_for_texts(dataset: RetrievalDataset) -> None:
    rows = dataset.labeled_pairs(2, direction="image_to_text")
    ids = rows.with_format(None)
    text_by_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    listed = dict(zip(dataset.negatives["query_id"], dataset.negatives["document_ids"], strict=True))
    for start in range(0, len(rows), 3):
        group = ids[start : start + 3]
        page = group["document_id"][0]
        assert group["document_id"] == [page] * 3
        assert group["query_id"][0] == page
        assert page not in group["query_id"][1:]
        asking = [query_id for query_id, documents in listed.items() if page in documents]
        assert set(group["query_id"][1:]) <= set(asking) or len(asking) < 2
    assert rows[0]["query"].mode == "RGB"
    assert rows[0]["document"] == text_by_id[ids[0]["query_id"]]


def test_a_dataset_without_negatives_draws_them() -> None:
    bare = RetrievalDataset.from_id_rows(generated_pages(8), negatives_column=None)
    ids = bare.labeled_pairs(2, seed=1).with_format(None)
    assert ids[:] == bare.labeled_pairs(2, seed=1).with_format(None)[:]
    assert ids[:] != bare.labeled_pairs(2, seed=2).with_format(None)[:]
    assert all(row["query_id"] != row["document_id"] for row in ids if row["label"] == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"num_negatives": -1}, "num_negatives=-1"),
        ({"documents": "text"}, "needs a column 'text'"),
    ],
)
def test_wrong_arguments(dataset: RetrievalDataset, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset.labeled_pairs(**arguments)


def test_too_few_texts_are_named() -> None:
    two = RetrievalDataset.from_id_rows(generated_pages(2))
    with pytest.raises(DatasetError, match=r"Page '.*' can't get 4 negatives: there are only 2 different query texts"):
        two.labeled_pairs(4, direction="image_to_text")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_negative_pair_is_relevant(data) -> None:
    """Neither by id nor by an equal text under another id nor by an equal document under another id."""
    count = data.draw(st.integers(4, 9))
    texts = data.draw(st.lists(st.sampled_from("abcdef"), min_size=count, max_size=count))
    contents = data.draw(st.lists(st.sampled_from("uvwxyz"), min_size=count, max_size=count))
    ids = [str(k) for k in range(count)]
    relevant = data.draw(st.lists(st.sampled_from(ids), min_size=count, max_size=count))
    listed = data.draw(st.lists(st.lists(st.sampled_from(ids), max_size=4), min_size=count, max_size=count))
    direction = data.draw(st.sampled_from(["text_to_image", "image_to_text"]))
    dataset = RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": contents}),
        Dataset.from_dict({"query_id": ids, "text": texts}),
        Dataset.from_dict({"query_id": ids, "document_id": relevant, "score": [1] * count}),
        Dataset.from_dict({"query_id": ids, "document_ids": listed}),
    )
    truth = {(texts[k], contents[int(relevant[k])]) for k in range(count)}
    try:
        rows = dataset.labeled_pairs(2, direction=direction, documents="text")
    except DatasetError:  # too few are left; that error has a test of its own
        return
    for row in rows:
        pair = (row["query"], row["document"])
        pair = pair if direction == "text_to_image" else pair[::-1]
        assert (pair in truth) == (row["label"] == 1)
    for row in dataset.labeled_lists(2, direction=direction, documents="text"):
        for document, label in zip(row["documents"], row["labels"], strict=True):
            pair = (row["query"], document)
            pair = pair if direction == "text_to_image" else pair[::-1]
            assert (pair in truth) == (label == 1)


def graded_dataset() -> RetrievalDataset:
    pages = generated_pages(6)
    data = RetrievalDataset.from_id_rows(pages)
    queries, qrels = data.queries[:], data.qrels[:]
    second = {"query_id": [queries["query_id"][0]], "document_id": [queries["query_id"][1]], "score": [3]}
    judged = {name: [*qrels[name], *second[name]] for name in ("query_id", "document_id", "score")}
    return RetrievalDataset(data.corpus, data.queries, Dataset.from_dict(judged), data.negatives)


def test_a_list_holds_all_that_is_relevant_with_its_score_and_then_negatives() -> None:
    dataset = graded_dataset()
    rows = dataset.labeled_lists(2)
    assert len(rows) == len(dataset)
    first, second = rows.with_format(None)[:2]["labels"]
    assert first == [1, 3, 0, 0]
    assert second == [1, 0, 0]
    ids = rows.with_format(None)[0]
    assert set(ids["query_ids"]) == {dataset.queries["query_id"][0]}
    assert ids["document_ids"][1] == dataset.queries["query_id"][1]
    assert not set(ids["document_ids"][:2]) & set(ids["document_ids"][2:])


def test_lists_read_as_query_documents_and_labels(dataset: RetrievalDataset) -> None:
    row = dataset.labeled_lists(2)[0]
    assert list(row) == ["query", "documents", "labels"]
    assert isinstance(row["query"], str)
    assert [page.mode for page in row["documents"]] == ["RGB"] * 3
    batch = dataset.labeled_lists(2)[:3]
    assert [len(documents) for documents in batch["documents"]] == [3, 3, 3]


def test_a_page_gets_a_list_of_the_texts_that_ask_for_it() -> None:
    dataset = graded_dataset()
    rows = dataset.labeled_lists(2, direction="image_to_text")
    ids = rows.with_format(None)[:]
    page = dataset.queries["query_id"][1]
    at = next(row for row, documents in enumerate(ids["document_ids"]) if documents[0] == page)
    assert sorted(ids["labels"][at], reverse=True) == [3, 1, 0, 0]
    text_by_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    assert rows[at]["documents"] == [text_by_id[query_id] for query_id in ids["query_ids"][at]]
    assert rows[at]["query"].mode == "RGB"


def test_lists_keep_their_view_through_shuffle_and_select(dataset: RetrievalDataset) -> None:
    rows = dataset.labeled_lists(1).shuffle(seed=3).select(range(4))
    ids = rows.with_format(None)[:]
    text_by_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    assert rows[:]["query"] == [text_by_id[queries[0]] for queries in ids["query_ids"]]


def test_lists_refuse_what_pairs_refuse(dataset: RetrievalDataset) -> None:
    with pytest.raises(ConfigError, match="direction='sideways'"):
        dataset.labeled_lists(direction="sideways")
    with pytest.raises(DatasetError, match="can't get 99 negatives"):
        dataset.labeled_lists(99)
