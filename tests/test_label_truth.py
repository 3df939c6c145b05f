"""No label is made up: unknowns stay unknown, and near misses are asked about pages that do not answer them."""

import numpy as np
import pytest
from datasets import Dataset

from mmtune import DatasetError, RetrievalDataset, build_reranking_evaluator
from mmtune.data.findings import Example, FalseNegative, Finding

TITLE, REMEDY = "negatives that the model scores above every relevant document of their query", "Look."


def texts_dataset(texts, queries, judged, listed=None, **columns):
    """Documents ``a``, ``b``, ... of these texts, and queries ``q1``, ``q2``, ..."""
    ids = [chr(ord("a") + at) for at in range(len(texts))]
    names = [f"q{at + 1}" for at in range(len(queries))]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": texts}),
        Dataset.from_dict({"query_id": names, "text": queries, **columns}),
        Dataset.from_dict(
            {"query_id": [q for q, _ in judged], "document_id": [d for _, d in judged], "score": [1] * len(judged)}
        ),
        None
        if listed is None
        else Dataset.from_dict({"query_id": list(listed), "document_ids": list(listed.values())}),
    )


def unknown(query_id, document_id, positive_id):
    example = Example((query_id,), (document_id, positive_id))
    finding = "false_negatives", 1, True, TITLE, REMEDY, (example,)
    return FalseNegative(*finding, query_id, document_id, positive_id, 0.9, 0.8)


def drawn(dataset, query_id):
    """All documents that are drawn as negatives of a query over some seeds."""
    found = set()
    for seed in range(12):
        for row in dataset.training_rows(1, documents="text", seed=seed).with_format(None):
            if row["query_id"] == query_id:
                found |= set(row["negative_document_ids"])
    return found


def test_what_is_unknown_to_a_text_is_unknown_to_its_other_queries():
    data = texts_dataset(list("uvwxyz"), ["same", "same"], [("q1", "a"), ("q2", "b")], {"q1": ["c"], "q2": []})
    found = data.without(unknown("q1", "c", "a"))
    assert "c" not in drawn(found, "q2")
    assert "c" not in drawn(found.select_queries(["q2"]), "q2")


def test_a_copy_of_what_is_unknown_is_unknown_where_only_the_copy_stays():
    texts = ["u", "v", "same", "same", "x", "y"]
    listed = {"q1": ["c"], "q2": ["e"]}
    data = texts_dataset(texts, ["one", "two"], [("q1", "a"), ("q2", "b")], listed).without(unknown("q1", "c", "a"))
    kept = data.relevance.subset(np.array([0]), np.array([0, 1, 3, 4, 5]))  # without c, whose copy is d
    assert drawn(RetrievalDataset.from_tables(kept), "q1") == {"b", "e", "f"}


def test_a_copy_of_what_is_unknown_is_unknown_also_when_the_other_is_taken_out():
    listed = {"q1": ["c"], "q2": ["e"]}
    data = texts_dataset(["u", "v", "same", "same", "x"], ["one", "two"], [("q1", "a"), ("q2", "b")], listed)
    found = data.without(unknown("q1", "c", "a"))
    alone = found.without(found.audit(num_examples=None)["unreferenced_pages"].only([Example((), ("c",))]))
    assert "c" not in alone.corpus["document_id"][:]
    assert drawn(alone, "q1") == {"b", "e"}


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_a_page_that_goes_takes_nothing_of_its_copies_along(gone):
    data = texts_dataset(list("uvwxy"), ["one", "two", "three"], [("q1", "b"), ("q2", "c"), ("q3", "a"), ("q3", "d")])
    copies = Finding("near_copies", 2, True, "copies", "Look.", (Example((), ("a", "b", "c")),))
    found = data.without([copies, Finding("blank_pages", 1, True, "blank", "Look.", (Example((), (gone,)),))])
    stays = "b" if gone == "a" else "a"
    assert found.corpus["document_id"][:] == [stays, "d", "e"]
    judged = set(zip(found.qrels["query_id"][:], found.qrels["document_id"][:], strict=True))
    expected = {("q1", "b"), ("q2", "c"), ("q3", "a")} - {(query, gone) for query in ("q1", "q2", "q3")}
    assert judged == {(query, stays) for query, _ in expected} | {("q3", "d")}


def test_a_false_negative_that_is_in_no_list_is_refused_and_one_is_taken_out_once():
    data = texts_dataset(list("uvwx"), ["one"], [("q1", "a")], {"q1": ["c", "d"]})
    with pytest.raises(DatasetError, match="'b' as a negative of the query 'q1', whose list has no such document"):
        data.without(unknown("q1", "b", "a"))
    twice = data.without(unknown("q1", "c", "a")).without(unknown("q1", "c", "a"))
    assert len(twice.label_changes) == 1
    assert twice.undo_label_changes().negatives["document_ids"][:] == [["c", "d"]]


@pytest.mark.parametrize("words", ["beta question", " Beta  QUESTION"])
def test_a_near_miss_with_the_words_of_a_query_is_none_of_the_pages_that_answer_it(words):
    near = [[words, "another thing"], []]
    queries = ["alpha question", "beta question"]
    data = texts_dataset(list("uvwx"), queries, [("q1", "a"), ("q2", "a")], near_misses=near)
    for direction in ("text_to_image", "image_to_text"):
        rows = data.labeled_pairs(1, direction=direction, documents="text")[:]
        wrong = [
            query
            for query, document, label in zip(rows["query"], rows["document"], rows["label"], strict=True)
            if not label and "u" in (query, document) and words in (query, document)
        ]
        assert wrong == []


def test_near_misses_were_not_asked_about_pages_that_became_relevant_later():
    near = [["delta question"]]
    changes = [[{"document_id": "c", "label": "relevant", "rank": 0, "score": 0.9}]]
    data = texts_dataset(list("uvwx"), ["alpha"], [("q1", "a"), ("q1", "c")], {"q1": ["d"]}, near_misses=near)
    judged = RetrievalDataset(
        data.corpus, data.queries, data.qrels, data.negatives.add_column("label_changes", changes)
    )
    rows = judged.labeled_pairs(1, documents="text")[:]
    asked = {document for query, document in zip(rows["query"], rows["document"], strict=True) if "delta" in query}
    assert asked == {"u"}


def test_lists_for_rerankers_are_shorter_where_documents_are_unknown():
    data = texts_dataset(list("uvwx"), ["one"], [("q1", "a")], {"q1": ["c"]}).without(unknown("q1", "c", "a"))
    evaluator = build_reranking_evaluator(data, num_candidates=4, documents="text")
    assert set(evaluator.lists[0].candidate_ids) == {"a", "b", "d"}


def test_changed_labels_that_a_push_loses_are_told(monkeypatch):
    data = texts_dataset(list("uvwx"), ["one"], [("q1", "a")], {"q1": ["c"]}).without(unknown("q1", "c", "a"))
    monkeypatch.setattr("mmtune.data.hub._upload", lambda *_: "https://hub/me/pages")
    with pytest.warns(UserWarning, match="1 changes of labels, so that 1 documents that are unknown may be drawn"):
        data.push_to_hub("me/pages", show_progress_bar=False)
