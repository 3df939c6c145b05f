"""Relevance from the side of what asks: a query for documents, or a page for texts."""

import pytest
from datasets import Dataset

from mmtune import ConfigError, RetrievalDataset
from mmtune.data.judgements import Judgements
from mmtune.data.relevance import resolve_direction
from mmtune.testing import generated_audio


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


@pytest.mark.parametrize(
    ("name", "documents", "queries", "expected"),
    [
        ("text_to_image", "video", "text", "text_to_image"),
        ("image_to_text", "video", "image", "image_to_text"),
        ("text_to_video", "video", "text", "text_to_image"),
        ("video_to_text", "video", "text", "image_to_text"),
        ("audio_to_audio", "audio", "audio", "text_to_image"),
        ("text+image_to_text", "text+image", "text", "image_to_text"),
        ("text_to_mixed", "mixed", "text", "text_to_image"),
        ("image_to_text", "text", "image", "image_to_text"),
    ],
)
def test_a_direction_may_name_what_asks_and_what_is_asked_for(name, documents, queries, expected):
    assert resolve_direction(name, queries, documents) == expected


@pytest.mark.parametrize(
    "name", ["text_to_audio", "video_to_video", "video", "", None, 3, ["text_to_video"], "TEXT_TO_VIDEO"]
)
def test_a_direction_that_names_other_kinds_is_refused_with_those_that_there_are(name):
    expected = "'text_to_image', 'image_to_text', 'text_to_video', 'video_to_text'"
    with pytest.raises(ConfigError, match=rf"is unknown where queries='text' and documents='video'.*{expected}"):
        resolve_direction(name, "text", "video")


def test_pairs_are_the_same_under_either_name_of_a_direction():
    rows = generated_audio(6)
    data = RetrievalDataset.from_id_rows(rows)
    for general, named in (("text_to_image", "text_to_audio"), ("image_to_text", "audio_to_text")):
        pairs = [
            data.labeled_pairs(2, direction=each, documents="audio").with_format(None)[:] for each in (general, named)
        ]
        lists = [
            data.labeled_lists(2, direction=each, documents="audio").with_format(None)[:] for each in (general, named)
        ]
        assert pairs[0] == pairs[1]
        assert lists[0] == lists[1]
    with pytest.raises(
        ConfigError, match="direction='text_to_video' is unknown where queries='text' and documents='audio'"
    ):
        data.labeled_pairs(2, direction="text_to_video", documents="audio")
