import io
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from mmtune import RetrievalDataset
from mmtune.data.identity import identical_documents
from mmtune.data.intake import Leaks, leaks_between, relevant_on_both_sides


def page(number: int) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def corpus(images: list, ids: list[str] | None = None) -> Dataset:
    rows = Dataset.from_dict({"document_id": ids or [f"d{k}" for k in range(len(images))], "image": images})
    return rows.cast_column("image", Image(decode=False))


def in_memory(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def in_file(path: Path) -> dict:
    return {"bytes": None, "path": str(path)}


def dataset(pages: Dataset, relevant: list[str]) -> RetrievalDataset:
    """One query for each relevant document."""
    numbers = [str(k) for k in range(len(relevant))]
    return RetrievalDataset(
        pages,
        Dataset.from_dict({"query_id": numbers, "text": [f"ask {k}" for k in numbers]}),
        Dataset.from_dict({"query_id": numbers, "document_id": relevant, "score": [1] * len(relevant)}),
    )


@given(
    kinds=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    length=st.sampled_from([0, 1, 5, 3000, 5000]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_documents_are_the_same_where_their_bytes_are(kinds, length, seed):
    # equal lengths and equal ends: only one byte near the start tells the kinds apart
    contents = [bytes([kind] * min(1, length)) + bytes(max(0, length - 1)) for kind in kinds]
    order = np.random.default_rng(seed).permutation(len(kinds))
    first = identical_documents(corpus([in_memory(content) for content in contents]).select(order), "image")
    shuffled = [contents[k] for k in order]
    assert first.tolist() == [shuffled.index(content) for content in shuffled]


def test_bytes_in_files_and_in_memory_are_compared(tmp_path):
    for name, number in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).write_bytes(page(number))
    images = [in_file(tmp_path / "a"), in_memory(page(1)), in_file(tmp_path / "b"), in_file(tmp_path / "c")]
    assert identical_documents(corpus(images), "image").tolist() == [0, 0, 0, 3]


def test_documents_that_can_not_be_found_are_all_different(tmp_path):
    images = [
        in_file(tmp_path / "missing"),
        in_file(tmp_path / "missing too"),
        None,
        None,
        in_memory(b""),
        in_memory(b""),
    ]
    assert identical_documents(corpus(images), "image").tolist() == [0, 1, 2, 3, 4, 4]


def test_texts_are_compared_where_there_are_no_images():
    texts = Dataset.from_dict({"document_id": list("abcde"), "text": ["x", "y", "x", None, None]})
    assert identical_documents(texts, "text").tolist() == [0, 1, 0, 3, 4]
    assert identical_documents(texts.select([2, 1, 0]), "text").tolist() == [0, 1, 0]


# --- relevant on both sides --------------------------------------------------------------------------------------


def test_documents_relevant_on_both_sides_are_found_by_id_and_by_bytes():
    train = dataset(corpus([in_memory(page(k)) for k in (1, 2, 3)], ["a", "b", "c"]), ["a", "b", "c"])
    evaluation = dataset(corpus([in_memory(page(k)) for k in (9, 2, 8)], ["a", "x", "y"]), ["a", "x", "y"])
    assert relevant_on_both_sides(train, evaluation) == [("a", "a"), ("b", "x")]
    assert relevant_on_both_sides(evaluation, train) == [("a", "a"), ("x", "b")]


def test_a_document_found_by_id_and_by_bytes_is_listed_once():
    pages = corpus([in_memory(page(1)), in_memory(page(2))], ["a", "b"])
    assert relevant_on_both_sides(dataset(pages, ["a"]), dataset(pages, ["a"])) == [("a", "a")]


def test_pages_that_are_only_negatives_on_one_side_are_no_overlap():
    pages = corpus([in_memory(page(1)), in_memory(page(2))], ["a", "b"])
    assert relevant_on_both_sides(dataset(pages, ["a"]), dataset(pages, ["b"])) == []


def test_ids_made_from_row_numbers_are_not_compared():
    rows = [Dataset.from_dict({"query": ["x"], "image": [in_memory(page(number))]}) for number in (1, 2, 1)]
    one, other, same = (RetrievalDataset.from_columns(row) for row in rows)
    assert relevant_on_both_sides(one, other) == []
    assert relevant_on_both_sides(one, same) == [("0", "0")]


def test_every_copy_on_either_side_is_listed():
    train = dataset(corpus([in_memory(page(1)), in_memory(page(1))], ["a", "b"]), ["a", "b"])
    evaluation = dataset(corpus([in_memory(page(1)), in_memory(page(1))], ["x", "y"]), ["x", "y"])
    found = relevant_on_both_sides(train, evaluation)
    assert {left for left, _ in found} == {"a", "b"}
    assert {right for _, right in found} == {"x", "y"}


def test_missing_files_on_both_sides_are_no_overlap(tmp_path):
    train = dataset(corpus([in_file(tmp_path / "one.png")], ["a"]), ["a"])
    evaluation = dataset(corpus([in_file(tmp_path / "two.png")], ["b"]), ["b"])
    assert relevant_on_both_sides(train, evaluation) == []


def test_equal_texts_are_an_overlap_where_there_are_no_images():
    sides = [Dataset.from_dict({"document_id": [name], "text": ["the same text"]}) for name in ("a", "b")]
    assert relevant_on_both_sides(dataset(sides[0], ["a"]), dataset(sides[1], ["b"])) == [("a", "b")]


@pytest.mark.parametrize("storage", ["files", "memory"])
def test_pages_in_files_overlap_with_pages_in_memory(storage, tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(page(4))
    train = dataset(corpus([in_file(path)], ["a"]), ["a"])
    evaluation = dataset(corpus([in_file(path) if storage == "files" else in_memory(page(4))], ["b"]), ["b"])
    assert relevant_on_both_sides(train, evaluation) == [("a", "b")]


def asked(
    document_ids: list[str], images: list[int], queries: dict[str, str], negatives: dict[str, list[str]] | None = None
):
    """Queries as ``{document id: text}``, which name the relevant document, over pages of some numbers."""
    query_ids = [f"q-{document_id}" for document_id in queries]
    listed = None
    if negatives is not None:
        lists = {
            "query_id": [f"q-{document_id}" for document_id in negatives],
            "document_ids": list(negatives.values()),
        }
        listed = Dataset.from_dict(lists)
    return RetrievalDataset(
        corpus([in_memory(page(number)) for number in images], document_ids),
        Dataset.from_dict({"query_id": query_ids, "text": list(queries.values())}),
        Dataset.from_dict({"query_id": query_ids, "document_id": list(queries), "score": [1] * len(queries)}),
        listed,
    )


def test_integer_ids_mean_nothing_in_another_dataset_unless_contents_agree():
    one = asked(["1", "2"], [1, 2], {"1": "x"})
    assert relevant_on_both_sides(one, asked(["1", "2"], [11, 12], {"1": "y"})) == []
    assert relevant_on_both_sides(one, asked(["7", "8"], [1, 12], {"7": "y"})) == [("1", "7")]
    named = asked(["a", "b"], [1, 2], {"a": "x"})
    assert relevant_on_both_sides(named, asked(["a", "c"], [11, 12], {"a": "y"})) == [("a", "a")]


def test_answers_of_the_evaluation_among_training_negatives_are_found_by_content_and_by_id():
    train = asked(["a", "b", "c", "d"], [1, 2, 3, 4], {"a": "one"}, {"a": ["b"]})
    by_content = asked(["x", "y"], [2, 3], {"x": "two", "y": "three"})
    assert leaks_between(train, by_content) == Leaks(listed_negatives=(("b", "x"),), fill_candidates=(("c", "y"),))
    by_id = asked(["b", "d"], [12, 14], {"b": "two", "d": "four"})
    assert leaks_between(train, by_id) == Leaks(listed_negatives=(("b", "b"),), fill_candidates=(("d", "d"),))


def test_query_texts_on_both_sides_are_found_and_said():
    train = asked(["a", "b"], [1, 2], {"a": "same", "b": "other"})
    found = leaks_between(train, asked(["x", "y"], [11, 12], {"x": "new", "y": "same"}))
    assert found == Leaks(query_texts=(("q-a", "q-y"),))
    assert found
    assert str(found) == "1 queries stand on both sides, e.g. 'q-a' (there 'q-y')"


def test_a_split_leaks_nothing():
    data = asked(
        list("abcdef"), list(range(6)), {name: f"ask {name}" for name in "abcdef"}, {"a": ["b", "c"], "d": ["a"]}
    )
    found = leaks_between(*data.split(2))
    assert (bool(found), str(found)) == (False, "nothing is shared")
