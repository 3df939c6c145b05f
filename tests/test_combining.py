"""Concatenating, selecting, deduplicating."""

import pytest
from datasets import Dataset

from mmtune import ConfigError, DatasetError, RetrievalDataset
from mmtune.testing import generated_pages


def text_dataset(ids: list[str], **columns: list) -> RetrievalDataset:
    """A document, a query and a negative (the next document) for each id."""
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"text {name}" for name in ids], **columns}),
        Dataset.from_dict({"query_id": ids, "text": [f"ask {name}" for name in ids]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * len(ids)}),
        Dataset.from_dict({"query_id": ids, "document_ids": [[name] for name in ids[1:] + ids[:1]]}),
    )


def meaning(dataset: RetrievalDataset) -> set[tuple[str, str, str]]:
    """What each row says, without its ids: query text, relevant text, text of the negative."""
    return {(row["query"], row["image"], row["negative_0"]) for row in dataset.training_rows(1, documents="text")}


def test_only_ids_that_clash_are_prefixed() -> None:
    joined = RetrievalDataset.concatenate([text_dataset(["a", "b"]), text_dataset(["b", "c"])])
    assert joined.corpus["document_id"][:] == ["a", "0/b", "1/b", "c"]
    assert joined.queries["query_id"][:] == ["a", "0/b", "1/b", "c"]
    assert joined.qrels["document_id"][:] == ["a", "0/b", "1/b", "c"]
    assert joined.negatives["document_ids"][:] == [["0/b"], ["a"], ["c"], ["1/b"]]


def test_a_mapping_gives_the_prefixes() -> None:
    joined = RetrievalDataset.concatenate({"en": text_dataset(["a"] * 1 + ["b"]), "de": text_dataset(["a", "x"])})
    assert joined.corpus["document_id"][:] == ["en/a", "b", "de/a", "x"]


def test_every_row_says_the_same_as_in_its_part() -> None:
    parts = [text_dataset([f"{k}" for k in range(n)]) for n in (3, 5, 2)]
    joined = RetrievalDataset.concatenate(parts)
    assert meaning(joined) == set().union(*map(meaning, parts))
    assert len(joined) == 10


def test_pages_keep_their_ids_by_pixels() -> None:
    parts = [
        RetrievalDataset.from_columns(generated_pages(6, seed=seed).select_columns(["query", "image"]).shuffle(seed=2))
        for seed in (0, 1)
    ]
    joined = RetrievalDataset.concatenate(parts)
    content = {row["document_id"]: row["image"]["bytes"] for row in joined.corpus}
    for at, part in enumerate(parts):
        for row in part.corpus:
            assert content[f"{at}/{row['document_id']}"] == row["image"]["bytes"]
    assert joined.notes.ids_are_row_numbers
    assert joined.notes.blank_queries == sum(part.notes.blank_queries for part in parts)


def test_a_part_without_negatives_gives_queries_without() -> None:
    bare = text_dataset(["x", "y"])
    bare = RetrievalDataset(bare.corpus, bare.queries, bare.qrels)
    joined = RetrievalDataset.concatenate([text_dataset(["a", "b"]), bare])
    assert joined.negatives["query_id"][:] == ["a", "b"]


def test_columns_that_one_part_lacks_are_null_there() -> None:
    joined = RetrievalDataset.concatenate([text_dataset(["a", "b"], source=["s", "t"]), text_dataset(["x", "y"])])
    assert joined.corpus["source"][:] == ["s", "t", None, None]


def test_columns_of_different_types_are_named() -> None:
    with pytest.raises(DatasetError, match=r"corpora have columns of one name and different types.*source"):
        RetrievalDataset.concatenate([text_dataset(["a", "b"], source=["s", "t"]), text_dataset(["x"], source=[[1]])])


def test_nothing_to_concatenate_is_an_error() -> None:
    with pytest.raises(DatasetError, match="no datasets to concatenate"):
        RetrievalDataset.concatenate([])


def test_selecting_the_first_queries() -> None:
    dataset = text_dataset(list("abcd"))
    selected = dataset.select_queries(2)
    assert selected.queries["query_id"][:] == ["a", "b"]
    assert selected.qrels["query_id"][:] == ["a", "b"]
    assert len(selected.corpus) == 4
    assert len(dataset.select_queries(99)) == 4


def test_selecting_by_id_keeps_the_order_of_the_dataset() -> None:
    selected = text_dataset(list("abcd")).select_queries(["d", "b"])
    assert selected.queries["query_id"][:] == ["b", "d"]
    assert selected.negatives["document_ids"][:] == [["c"], ["a"]]


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (0, ConfigError, "n_or_ids=0"),
        ([], ConfigError, "holds no id"),
        (["a", "zz"], DatasetError, "1 of the ids are of no query, e.g. 'zz'"),
    ],
)
def test_selecting_what_is_not_there(wanted, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        text_dataset(list("abc")).select_queries(wanted)


def test_copies_of_a_page_become_one_document() -> None:
    images = generated_pages(3).cast_column("image", generated_pages(1).features["image"].__class__(decode=False))
    one, two = images["image"][0], images["image"][1]
    dataset = RetrievalDataset(
        Dataset.from_dict({"document_id": list("abcd"), "image": [one, two, one, one]}),
        Dataset.from_dict({"query_id": ["p", "q"], "text": ["first", "second"]}),
        Dataset.from_dict(
            {"query_id": ["p", "p", "q"], "document_id": ["c", "d", "b"], "score": [1, 3, 1]},
        ),
        Dataset.from_dict({"query_id": ["q"], "document_ids": [["d", "a", "c"]]}),
    )
    distinct = dataset.deduplicate()
    assert distinct.corpus["document_id"][:] == ["a", "b"]
    assert [tuple(row.values()) for row in distinct.qrels] == [("p", "a", 3), ("q", "b", 1)]
    by_query = dict(zip(distinct.negatives["query_id"], distinct.negatives["document_ids"], strict=True))
    assert by_query["q"] == ["a"]
    assert distinct.relevance.num_copies == 0


def test_a_dataset_without_copies_stays_as_it_is() -> None:
    dataset = RetrievalDataset.from_id_rows(generated_pages(8))
    distinct = dataset.deduplicate()
    assert distinct.corpus["document_id"][:] == dataset.corpus["document_id"][:]
    assert distinct.qrels[:] == dataset.qrels[:]
    assert distinct.negatives["document_ids"][:] == dataset.negatives["document_ids"][:]
