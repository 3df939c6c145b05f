import io
import pickle
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset, Image, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from torch.utils.data import DataLoader

from mmtune import ConfigError, DatasetError, ImageDecodeError, RetrievalDataset
from mmtune.data.judgements import Judgements
from mmtune.data.negatives import choose_negatives
from mmtune.data.rows import view_of
from mmtune.testing import generated_pages

NUM_PAGES = 30


def page(number: int, size: tuple[int, int] = (2, 2)) -> dict:
    """A page whose colour is its number."""
    buffer = io.BytesIO()
    PillowImage.new("RGB", size, (number % 256, number // 256, 99)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def number_of(image: PillowImage.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def id_rows(id_of=str) -> Dataset:
    """Page k has the query "ask k" (not every third), and the pages k + 1, k + 2, k + 3 as negatives."""
    numbers = range(NUM_PAGES)
    table = {
        "id": [id_of(k) for k in numbers],
        "query": [f"ask {k}" if k % 3 else None for k in numbers],
        "image": [page(k) for k in numbers],
        "negatives": [[id_of((k + step) % NUM_PAGES) for step in (1, 2, 3)] for k in numbers],
    }
    return Dataset.from_dict(table).cast_column("image", Image())


def tables(
    content: list[int], texts: list[str], qrels: list[tuple[int, int]], negatives: list[list[int]] | None = None
) -> RetrievalDataset:
    """A dataset from numbers: document k is ``d<k>`` with page ``content[k]``, query k is ``q<k>``."""
    corpus = {"document_id": [f"d{k}" for k in range(len(content))], "image": [page(number) for number in content]}
    queries = {"query_id": [f"q{k}" for k in range(len(texts))], "text": texts}
    judged = {
        "query_id": [f"q{query}" for query, _ in qrels],
        "document_id": [f"d{document}" for _, document in qrels],
        "score": [1] * len(qrels),
    }
    listed = None
    if negatives is not None:
        listed = Dataset.from_dict(
            {
                "query_id": [f"q{k}" for k in range(len(negatives))],
                "document_ids": [[f"d{document}" for document in row] for row in negatives],
            }
        )
    corpus = Dataset.from_dict(corpus).cast_column("image", Image())
    return RetrievalDataset(corpus, Dataset.from_dict(queries), Dataset.from_dict(judged), listed)


def assert_each_id_has_its_page(rows: Dataset, id_of=str, count: int | None = None) -> None:
    number_by_id = {str(id_of(k)): k for k in range(NUM_PAGES)}
    ids = rows.with_format(None)[:]
    read = rows[:]
    assert len(read["query"]) == (len(rows) if count is None else count)
    for k, query in enumerate(read["query"]):
        number = number_by_id[ids["document_id"][k]]
        assert query == f"ask {number}"
        assert ids["query_id"][k] == ids["document_id"][k]
        assert number_of(read["image"][k]) == number
        for place, negative_id in enumerate(ids["negative_document_ids"][k]):
            assert number_of(read[f"negative_{place}"][k]) == number_by_id[negative_id]
        expected = [str(id_of((number + step) % NUM_PAGES)) for step in (1, 2, 3)]
        assert ids["negative_document_ids"][k] == expected[: len(ids["negative_document_ids"][k])]


OPERATIONS = {
    "as it is": lambda rows: rows,
    "shuffle": lambda rows: rows.shuffle(seed=3),
    "select a range": lambda rows: rows.select(range(2, len(rows))),
    "select": lambda rows: rows.select([*range(len(rows) - 1, -1, -2), *range(0, len(rows), 2)]),
    "filter": lambda rows: rows.filter(lambda row: row["query"] is None or row["query"] != "ask 4"),
    "train_test_split": lambda rows: rows.train_test_split(test_size=2, seed=1)["train"],
    "twice": lambda rows: rows.shuffle(seed=1).select(range(len(rows) // 2, len(rows))).shuffle(seed=2),
    "concatenate": lambda rows: concatenate_datasets([rows.select([k]) for k in range(len(rows) - 1, -1, -1)]),
    "concatenate shuffled": lambda rows: concatenate_datasets(
        [rows.select(range(len(rows) // 2)).shuffle(seed=4), rows.select(range(len(rows) // 2, len(rows)))]
    ),
    "shard": lambda rows: rows.shard(2, 1),
}

ID_SPELLINGS = {
    "strings": str,
    "integers": lambda k: k + 100,
    "leading zeros": lambda k: f"{k:07d}",
    "unicode": lambda k: f"página/{k} 收据 🧾",
    "alike": lambda k: "0" * k + "1",
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("spelling", ["strings", "integers"])
def test_every_id_has_its_page_whatever_was_done_to_the_input(operation, spelling):
    id_of = ID_SPELLINGS[spelling]
    changed = OPERATIONS[operation](id_rows(id_of))
    dataset = RetrievalDataset.from_id_rows(changed, on_missing="drop")
    number_by_id = {str(id_of(k)): k for k in range(NUM_PAGES)}
    rows = dataset.training_rows(2)
    assert len(rows) == sum(query is not None for query in changed["query"])
    for ids, row in zip(rows.with_format(None), rows, strict=True):
        assert row["query"] == f"ask {number_by_id[ids['query_id']]}"
        read = [number_of(row[name]) for name in ("image", "negative_0", "negative_1")]
        assert read == [number_by_id[value] for value in (ids["document_id"], *ids["negative_document_ids"])]
        assert number_by_id[ids["query_id"]] == read[0]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_keep_their_view_whatever_is_done_to_them(operation):
    rows = RetrievalDataset.from_id_rows(id_rows()).training_rows(3)
    changed = OPERATIONS[operation](rows)
    assert list(changed[0]) == ["query", "image", "negative_0", "negative_1", "negative_2"]
    assert len(changed) >= len(rows) // 2
    assert_each_id_has_its_page(changed)


def test_filtered_rows_are_the_ones_asked_for():
    rows = RetrievalDataset.from_id_rows(id_rows()).training_rows(1)
    kept = rows.filter(lambda row: number_of(row["image"]) > 20)
    assert [row["query"] for row in kept] == [f"ask {k}" for k in range(21, 30) if k % 3]
    assert_each_id_has_its_page(kept)


@pytest.mark.parametrize("spelling", ID_SPELLINGS)
def test_ids_of_any_spelling_resolve(spelling):
    id_of = ID_SPELLINGS[spelling]
    rows = RetrievalDataset.from_id_rows(id_rows(id_of).shuffle(seed=5)).training_rows(3)
    assert_each_id_has_its_page(rows, id_of, count=20)


def test_a_row_reads_as_the_guide_has_it():
    rows = RetrievalDataset.from_id_rows(id_rows()).training_rows(2)
    row = rows[0]
    assert list(row) == ["query", "image", "negative_0", "negative_1"]
    assert type(row["query"]) is str
    assert all(isinstance(row[name], PillowImage.Image) and row[name].mode == "RGB" for name in list(row)[1:])
    ids = rows.with_format(None)[0]
    assert ids == {
        "query_id": "1",
        "document_id": "1",
        "negative_document_ids": ["2", "3"],
        "relevance_group": 0,
    }


def test_slices_lists_and_empty_slices_read_as_batches():
    rows = RetrievalDataset.from_id_rows(id_rows()).training_rows(1)
    assert [number_of(image) for image in rows[[3, 0, 3]]["image"]] == [5, 1, 5]
    assert rows[0:0] == {"query": [], "image": [], "negative_0": []}


def relevant_by_query(rows):
    """The ids of what the view of the rows knows to be relevant to each query, copies included."""
    ids = rows.with_format(None)[:]
    at, document_ids = view_of(rows).relevant_to(np.array(ids["relevance_group"]))
    return {
        query_id: sorted(document_ids.filter(at == row).to_pylist()) for row, query_id in enumerate(ids["query_id"])
    }


def test_rows_are_one_per_query_and_relevant_document():
    dataset = tables([0, 1, 2, 3], ["x", "y"], [(0, 0), (1, 1), (0, 2)], [[3], [3]])
    ids = dataset.training_rows(1).with_format(None)[:]
    pairs = sorted(zip(ids["query_id"], ids["document_id"], strict=True))
    assert pairs == [("q0", "d0"), ("q0", "d2"), ("q1", "d1")]
    by_query = relevant_by_query(dataset.training_rows(1))
    assert by_query == {"q0": ["d0", "d2"], "q1": ["d1"]}


def test_everything_relevant_to_the_text_is_listed_copies_included():
    # q0 and q1 ask the same; d2 is a copy of d1
    dataset = tables([0, 1, 1, 3], ["x", "x", "y"], [(0, 0), (1, 1), (2, 3)])
    relevant = relevant_by_query(dataset.training_rows())
    assert relevant == {"q0": ["d0", "d1", "d2"], "q1": ["d0", "d1", "d2"], "q2": ["d3"]}


def test_a_query_that_is_left_out_makes_nothing_relevant():
    # q1 asks the same as q0 but is judged nowhere
    dataset = tables([0, 1], ["x", "x"], [(0, 0)], [[1], [0]])
    assert dataset.training_rows(1).with_format(None)[:]["negative_document_ids"] == [["d1"]]


# --- negatives ---------------------------------------------------------------------------------------------------


def test_negatives_come_best_first():
    dataset = tables([0, 1, 2, 3, 4], ["x"], [(0, 0)], [[4, 1, 3, 2]])
    assert dataset.training_rows(3).with_format(None)[0]["negative_document_ids"] == ["d4", "d1", "d3"]


def test_a_negative_relevant_under_another_id_of_the_same_text_is_replaced():
    dataset = tables([0, 1, 2], ["x", "x"], [(0, 0), (1, 1)], [[1, 2], [0, 2]])
    for row in dataset.training_rows(1).with_format(None):
        assert row["negative_document_ids"] == ["d2"]


def test_a_negative_that_is_a_copy_of_the_relevant_page_is_replaced():
    dataset = tables([0, 0, 2], ["x"], [(0, 0)], [[1, 2]])
    assert dataset.training_rows(1).with_format(None)[0]["negative_document_ids"] == ["d2"]


def test_a_page_stands_once_among_the_negatives_of_a_row():
    dataset = tables([0, 1, 1, 3], ["x"], [(0, 0)], [[1, 2, 1, 3]])
    assert dataset.training_rows(2).with_format(None)[0]["negative_document_ids"] == ["d1", "d3"]


def test_short_lists_are_filled_with_what_is_not_relevant():
    dataset = tables([0, 1, 2, 0], ["x", "y"], [(0, 0), (1, 1)], [[2], []])
    negatives = dataset.training_rows(2).with_format(None)[:]["negative_document_ids"]
    assert negatives[0] == ["d2", "d1"]
    assert {int(value[1]) % 3 for value in negatives[1]} == {0, 2}


def test_short_lists_are_dropped_on_request():
    dataset = tables([0, 1, 2, 3], ["x", "y", "z"], [(0, 0), (1, 1), (2, 2)], [[2, 3], [3], []])
    rows = dataset.training_rows(2, on_short="drop")
    assert rows.with_format(None)[:]["query_id"] == ["q0"]
    with pytest.raises(DatasetError, match=r"No query has 3 usable negatives"):
        dataset.training_rows(3, on_short="drop")


def test_short_lists_are_an_error_on_request():
    dataset = tables([0, 1, 2, 3], ["x", "y", "z"], [(0, 0), (1, 1), (2, 2)], [[2, 3], [3], []])
    with pytest.raises(
        DatasetError, match=r"2 queries have fewer than 2 usable negatives, e.g. 'q1' \(1\), 'q2' \(0\)"
    ):
        dataset.training_rows(2, on_short="error")


@pytest.mark.parametrize(
    ("content", "qrels"), [([0], [(0, 0)]), ([0, 0, 0], [(0, 1)]), ([0, 1], [(0, 0), (0, 1)]), ([0, 1], [(0, 0)])]
)
def test_where_filling_is_impossible_the_query_is_named(content, qrels):
    dataset = tables(content, ["x"], qrels, [[]])
    with pytest.raises(DatasetError, match=r"Query 'q0' can't get 2 negatives.*Lower num_negatives"):
        dataset.training_rows(2)


def test_filling_depends_on_the_seed_alone():
    dataset = tables(list(range(40)), ["x", "y"], [(0, 0), (1, 1)], [[], []])
    draws = [dataset.training_rows(4, seed=seed).with_format(None)[:] for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("on_short", ["random", "drop", "error"])
def test_without_negatives_there_are_no_negative_columns(on_short):
    plain = tables([0, 1], ["x", "y"], [(0, 0), (1, 1)])
    with pytest.warns(UserWarning, match=r"num_negatives=4 is not used.*mine_hard_negatives"):
        assert list(plain.training_rows(4, on_short=on_short)[0]) == ["query", "image"]
    listed = tables([0, 1], ["x", "y"], [(0, 0), (1, 1)], [[1], [0]])
    rows = listed.training_rows(0, on_short=on_short)
    assert list(rows[0]) == ["query", "image"]
    assert len(rows) == 2
    assert rows.with_format(None)[0]["negative_document_ids"] == []


@st.composite
def small_data(draw) -> tuple:
    content = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    texts = draw(st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=5))
    pair = st.tuples(st.integers(0, len(texts) - 1), st.integers(0, len(content) - 1))
    qrels = draw(st.lists(pair, min_size=1, max_size=8, unique=True))
    row = st.lists(st.integers(0, len(content) - 1), max_size=5)
    negatives = draw(st.lists(row, min_size=len(texts), max_size=len(texts)))
    return content, texts, qrels, negatives


@given(data=small_data(), num_negatives=st.integers(0, 4), on_short=st.sampled_from(["random", "drop", "error"]))
@settings(max_examples=60, deadline=None)
def test_no_negative_is_ever_relevant(data, num_negatives, on_short):
    content, texts, qrels, negatives = data
    pages_of_text = {text: {content[d] for q, d in qrels if texts[q] == text} for text in texts}
    usable, reachable = {}, {}
    for query in {query for query, _ in qrels}:
        bad = pages_of_text[texts[query]]
        first = {content[d]: d for d in reversed(negatives[query]) if content[d] not in bad}
        usable[query] = sorted(first.values(), key=negatives[query].index)[:num_negatives]
        reachable[query] = len(set(content) - bad)
    short = {query for query in usable if len(usable[query]) < num_negatives}
    dataset = tables(*data)
    fails = {
        "random": any(reachable[query] < num_negatives for query in usable),
        "drop": short == set(usable),
        "error": bool(short),
    }[on_short]
    if fails:
        with pytest.raises(DatasetError, match=r"negatives"):
            dataset.training_rows(num_negatives, on_short=on_short)
        return
    view = dataset.training_rows(num_negatives, on_short=on_short)
    rows = view.with_format(None)[:]
    relevant_ids = relevant_by_query(view)
    kept = set(usable) - short if on_short == "drop" else set(usable)
    expected = sorted((f"q{query}", f"d{document}") for query, document in qrels if query in kept)
    assert sorted(zip(rows["query_id"], rows["document_id"], strict=True)) == expected
    for query_id, ids in zip(rows["query_id"], rows["negative_document_ids"], strict=True):
        query = int(query_id[1:])
        bad = pages_of_text[texts[query]]
        chosen = [int(value[1:]) for value in ids]
        assert chosen[: len(usable[query])] == usable[query]
        assert len(chosen) == num_negatives
        assert len({content[document] for document in chosen}) == num_negatives
        assert not {content[document] for document in chosen} & bad
        assert relevant_ids[query_id] == sorted(f"d{k}" for k, number in enumerate(content) if number in bad)


def test_many_relevant_documents_leave_the_right_ones_to_fill_with():
    # everything but the last two pages is relevant: drawing at random rarely hits
    dataset = tables(list(range(200)), ["x"], [(0, k) for k in range(198)], [[]])
    assert set(dataset.training_rows(2).with_format(None)[0]["negative_document_ids"]) == {"d198", "d199"}


# --- arguments and documents -------------------------------------------------------------------------------------


def test_arguments_out_of_range_are_named():
    dataset = tables([0, 1], ["x"], [(0, 0)], [[1]])
    with pytest.raises(ConfigError, match=r"on_short='fill' is unknown.*'random'"):
        dataset.training_rows(on_short="fill")
    with pytest.raises(ConfigError, match=r"num_negatives=-1"):
        dataset.training_rows(-1)
    with pytest.raises(ConfigError, match=r"documents='sound' is unknown"):
        dataset.training_rows(documents="sound")
    with pytest.raises(ConfigError, match=r"needs a column 'text'.*\['document_id', 'image'\]"):
        dataset.training_rows(documents="text+image")


@pytest.mark.parametrize("max_pixels", [0, -5])
def test_max_pixels_below_one_is_a_named_error_before_a_page_is_read(max_pixels):
    dataset = tables([0, 1], ["x"], [(0, 0)], [[1]])
    with pytest.raises(ConfigError, match=rf"max_pixels={max_pixels}"):
        dataset.training_rows(max_pixels=max_pixels)


def test_max_pixels_bounds_what_is_read():
    rows = Dataset.from_dict({"query": ["x"], "image": [page(1, (100, 50))], "negative_0": [page(2, (10, 10))]})
    with pytest.warns(UserWarning, match="max_pixels=800 scales pages down before"):
        row = RetrievalDataset.from_columns(rows).training_rows(max_pixels=800)[0]
    assert (row["image"].size, row["negative_0"].size) == ((40, 20), (10, 10))
    with pytest.warns(UserWarning, match="max_pixels=800"):
        bounded = RetrievalDataset.from_columns(rows).training_rows(max_pixels=800, input_size=(48, 30))[0]
    assert (bounded["image"].size, bounded["negative_0"].size) == ((60, 30), (10, 10)), "no side below the input's"


@pytest.mark.parametrize(
    ("input_size", "expected"),
    [((160, 80), (400, 200)), ((160, 81), (800, 400)), (50_000, (400, 200)), (None, (800, 400))],
)
def test_a_jpeg_is_decoded_at_a_fraction_that_leaves_enough(input_size, expected):
    buffer = io.BytesIO()
    PillowImage.new("RGB", (800, 400), "white").save(buffer, "jpeg")
    data = tables([0, 1], ["x"], [(0, 0)])
    corpus = Dataset.from_dict({"document_id": ["d0", "d1"], "image": [buffer.getvalue(), page(1)["bytes"]]})
    data = RetrievalDataset(corpus, data.queries, data.qrels)
    assert data.training_rows(0, input_size=input_size)[0]["image"].size == expected


@pytest.mark.parametrize("input_size", [0, -1, 1.5, "224", True, (224,), (1, 2, 3), (0, 5), {"width": 3}])
def test_an_input_size_that_is_none_is_refused(input_size):
    with pytest.raises(ConfigError, match="input_size"):
        tables([0, 1], ["x"], [(0, 0)]).training_rows(0, input_size=input_size)


def test_documents_can_be_texts_or_both():
    corpus = {"document_id": ["a", "b"], "text": ["of a", "of b"], "image": [page(1), page(2)]}
    dataset = RetrievalDataset(
        Dataset.from_dict(corpus).cast_column("image", Image()),
        Dataset.from_dict({"query_id": ["q"], "text": ["x"]}),
        Dataset.from_dict({"query_id": ["q"], "document_id": ["a"], "score": [1]}),
        Dataset.from_dict({"query_id": ["q"], "document_ids": [["b"]]}),
    )
    assert dataset.training_rows(documents="text")[0] == {"query": "x", "image": "of a", "negative_0": "of b"}
    both = dataset.training_rows(documents="text+image")[0]["negative_0"]
    assert list(both) == ["text", "image"]
    assert (both["text"], number_of(both["image"])) == ("of b", 2)
    assert number_of(dataset.training_rows()[0]["image"]) == 1


def test_a_page_that_does_not_decode_is_named_when_it_is_read():
    rows = Dataset.from_dict(
        {"id": ["good", "bad"], "query": ["x", "y"], "image": [page(1), {"bytes": b"no image", "path": None}]}
    )
    read = RetrievalDataset.from_id_rows(rows, negatives_column=None).training_rows()
    assert number_of(read[0]["image"]) == 1
    with pytest.raises(ImageDecodeError, match=r"Document 'bad' can't be decoded"):
        read[1]


# --- processes ---------------------------------------------------------------------------------------------------


def test_rows_can_be_pickled_and_read_the_same():
    rows = RetrievalDataset.from_id_rows(id_rows().shuffle(seed=2)).training_rows(2).shuffle(seed=1)
    rows[0]  # the index of ids has been built
    copy = pickle.loads(pickle.dumps(rows))
    assert_each_id_has_its_page(copy, count=20)
    assert copy.with_format(None)[:] == rows.with_format(None)[:]


def as_arrays(batch: list[dict]) -> list:
    return [(row["query"], *(np.asarray(row[name]).tobytes() for name in ("image", "negative_0"))) for row in batch]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_worker_processes_read_the_same_rows():
    rows = RetrievalDataset.from_id_rows(id_rows()).training_rows(1).shuffle(seed=1)
    options = {"batch_size": 4, "collate_fn": as_arrays, "shuffle": False}
    alone = list(DataLoader(rows, **options))
    workers = list(DataLoader(rows, num_workers=2, multiprocessing_context="fork", **options))
    assert workers == alone
    assert sum(map(len, alone)) == 20


def test_rows_can_be_filtered_by_an_id_column_without_reading_pages():
    dataset = RetrievalDataset.from_id_rows(generated_pages(8))
    wanted = dataset.queries["query_id"][2]
    rows = dataset.training_rows(1).filter(lambda query_id: query_id == wanted, input_columns=["query_id"])
    assert rows.with_format(None)["query_id"][:] == [wanted]
    assert rows[0]["query"] == dataset.queries["text"][2]


def test_a_huge_jpeg_is_decoded_at_half_its_size_unless_asked_otherwise():
    buffer = io.BytesIO()
    PillowImage.new("RGB", (8000, 4000), "white").save(buffer, "jpeg")
    data = tables([0, 1], ["x"], [(0, 0)])
    corpus = Dataset.from_dict({"document_id": ["d0", "d1"], "image": [buffer.getvalue(), page(1)["bytes"]]})
    data = RetrievalDataset(corpus, data.queries, data.qrels)
    assert data.training_rows(0)[0]["image"].size == (4000, 2000)
    with pytest.warns(UserWarning, match="max_pixels=200"):
        assert data.training_rows(0, max_pixels=200)[0]["image"].size == (20, 10)


def test_filling_long_lists_takes_memory_in_proportion():
    data = tables(list(range(250)), [f"ask {k}" for k in range(60)], [(k, k) for k in range(60)], [[]] * 60)
    tracemalloc.start()
    chosen = choose_negatives(Judgements.of(data.relevance, "text_to_image").candidates, 240, "random", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(len(set(items)) == 240 for items in chosen.items.tolist())
    assert peak < 2_500_000
