"""Relevance from the side of what asks: a query for documents, or a page for texts."""

import pytest
from datasets import Dataset

from mmtune import ConfigError, RetrievalDataset
from mmtune.data.judgements import Judgements


@pytest.fixture
def dataset() -> RetrievalDataset:
    """``a`` and ``b`` have one content, and so have the texts of ``q1`` and ``q2``."""
    return RetrievalDataset(
        Dataset.from_dict({"document_id": list("abcd"), "text": ["one", "one", "two", "three"]}),
        Dataset.from_dict({"query_id": ["q1", "q2", "q3"], "text": ["same", "same", "other"]}),
        Dataset.from_dict({"query_id": ["q1", "q2", "q3"], "document_id": ["a", "b", "c"], "score": [1, 3, 2]}),
    )


@pytest.mark.parametrize(
    ("direction", "each_copy", "asking", "relevant", "scores", "distinct"),
    [
        ("text_to_image", False, ["q1", "q2", "q3"], [["a"], ["a"], ["c"]], [[3], [3], [2]], ["a", "c", "d"]),
        ("image_to_text", False, ["a", "c"], [["q1"], ["q3"]], [[3], [2]], ["q1", "q3"]),
        ("image_to_text", True, ["a", "b", "c"], [["q1"], ["q1"], ["q3"]], [[3], [3], [2]], ["q1", "q3"]),
    ],
)
def test_equal_content_counts_as_one(dataset, direction, each_copy, asking, relevant, scores, distinct) -> None:
    judgements = Judgements.of(dataset.relevance, direction, each_copy=each_copy)
    assert judgements.asking_ids.to_pylist() == asking
    rows = range(len(asking))
    assert [judgements.item_ids.take(judgements.relevant[row]).to_pylist() for row in rows] == relevant
    assert [judgements.scores[row].tolist() for row in rows] == scores
    assert judgements.item_ids.take(judgements.distinct_items).to_pylist() == distinct


@pytest.mark.parametrize("each_copy", [False, True])
@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_a_judgement_belongs_to_the_row_of_its_content(dataset, direction, each_copy) -> None:
    judgements = Judgements.of(dataset.relevance, direction, each_copy=each_copy)
    queries, documents = judgements.ids(judgements.judged_rows, judgements.judged_items)
    first = "b" if each_copy or direction == "text_to_image" else "a"
    assert queries.to_pylist() == ["q1", "q2", "q3"]
    assert documents.to_pylist() == ["a", first, "c"]


def test_an_unknown_direction(dataset) -> None:
    with pytest.raises(ConfigError, match="direction='sideways' is unknown"):
        Judgements.of(dataset.relevance, "sideways")
