"""Bad input to the public functions of the data: each ends in its named error, or in the right result."""

import io
import os

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from mmtune import ConfigError, DatasetError, ImageDecodeError, MissingDocumentError, MmtuneError, RetrievalDataset
from mmtune.data.intake import as_retrieval_dataset, datasets_by_name

SURROGATE = "\ud800"


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def id_rows(**changes) -> Dataset:
    """Four pages; the first three are asked for, and list the page after them as a negative."""
    columns = {
        "id": [f"p{k}" for k in range(4)],
        "query": ["a", "b", "c", None],
        "image": [png(k) for k in range(4)],
        "negatives": [["p1"], ["p2"], ["p3"], []],
    }
    return Dataset.from_dict({name: values for name, values in (columns | changes).items() if values is not None})


def column_rows(**changes) -> Dataset:
    columns = {"query": ["a", "b"], "image": [png(0), png(1)], "negative_0": [png(2), png(3)]}
    return Dataset.from_dict({name: values for name, values in (columns | changes).items() if values is not None})


def tables(**changes) -> dict[str, Dataset]:
    return {
        "corpus": Dataset.from_dict({"document_id": ["a", "b"], "text": ["x", "y"]}),
        "queries": Dataset.from_dict({"query_id": ["q"], "text": ["z"]}),
        "qrels": Dataset.from_dict({"query_id": ["q"], "document_id": ["a"], "score": [1]}),
    } | {name: table if not isinstance(table, dict) else Dataset.from_dict(table) for name, table in changes.items()}


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(id_rows())


# Every argument of the methods, with values of another type or out of range.
SEEDS = [-1, 2**32, 2**40, 1.5, "7", None, True, float("nan"), [1], np.float64(1)]
COUNTS = [-1, 1.5, "4", None, True, [1], float("nan")]
KINDS = ["pages", "", None, 5, ["image"], "image+text"]

METHODS = [
    *[("training_rows", {"seed": value}, ConfigError, "seed=") for value in SEEDS],
    *[("labeled_pairs", {"seed": value}, ConfigError, "seed=") for value in SEEDS],
    *[("labeled_lists", {"seed": value}, ConfigError, "seed=") for value in SEEDS],
    *[("split", {"eval_queries": 1, "seed": value}, ConfigError, "seed=") for value in SEEDS],
    *[("training_rows", {"num_negatives": value}, ConfigError, "num_negatives=") for value in COUNTS],
    *[("labeled_pairs", {"num_negatives": value}, ConfigError, "num_negatives=") for value in COUNTS],
    *[("labeled_lists", {"num_negatives": value}, ConfigError, "num_negatives=") for value in COUNTS],
    *[("split", {"eval_queries": value}, ConfigError, "eval_queries=") for value in [0, *COUNTS]],
    *[("training_rows", {"documents": value}, ConfigError, "documents=") for value in KINDS],
    *[("labeled_pairs", {"documents": value}, ConfigError, "documents=") for value in KINDS],
    *[("labeled_lists", {"documents": value}, ConfigError, "documents=") for value in KINDS],
    *[("deduplicate", {"documents": value}, ConfigError, "documents=") for value in KINDS if value is not None],
    *[("relevance_of", {"documents": value}, ConfigError, "documents=") for value in KINDS],
    ("training_rows", {"documents": "text"}, ConfigError, "needs a column 'text'"),
    ("deduplicate", {"documents": "text+image"}, ConfigError, "needs a column 'text'"),
    *[("training_rows", {"max_pixels": value}, ConfigError, "max_pixels=") for value in [0, -1, 1.5, "9", True]],
    *[("training_rows", {"on_short": value}, ConfigError, "on_short=") for value in ["fill", None, 1, ["drop"]]],
    *[("labeled_pairs", {"direction": value}, ConfigError, "direction=") for value in ["page_to_text", None, 5]],
    *[("labeled_lists", {"direction": value}, ConfigError, "direction=") for value in ["page_to_text", None, 5]],
    *[("training_rows", {"num_negatives": n}, DatasetError, "can't get .* negatives") for n in (4, 10**6, 10**30)],
    *[("labeled_pairs", {"num_negatives": n}, DatasetError, "can't get .* negatives") for n in (4, 10**6, 10**30)],
    *[("labeled_lists", {"num_negatives": n}, DatasetError, "can't get .* negatives") for n in (4, 10**6, 10**30)],
    ("training_rows", {"num_negatives": 10**30, "on_short": "drop"}, DatasetError, "No query has"),
    ("training_rows", {"num_negatives": 10**30, "on_short": "error"}, DatasetError, "fewer than"),
    *[("split", {"eval_queries": 1, "group_column": value}, DatasetError, "no column") for value in ["pdf", 5, True]],
    *[("select_queries", {"n_or_ids": value}, ConfigError, "n_or_ids") for value in [0, -1, True, None, 1.5, "p0", []]],
    ("select_queries", {"n_or_ids": ["p3"]}, DatasetError, "'p3'"),
    ("select_queries", {"n_or_ids": [None]}, DatasetError, "'None'"),
    ("select_queries", {"n_or_ids": [SURROGATE]}, DatasetError, "half of a surrogate pair"),
    *[("save", {"folder": value}, ConfigError, "folder=") for value in [None, 5, "", ["x"]]],
]


@pytest.mark.parametrize(("method", "arguments", "error", "message"), METHODS)
def test_arguments_of_methods_are_checked(data, method, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(data, method)(**arguments)


RIGHT = [
    ("training_rows", {"seed": np.int64(7), "num_negatives": np.int32(2)}, 3),
    ("training_rows", {"seed": 2**32 - 1, "num_negatives": 0}, 3),
    ("training_rows", {"input_size": 10**30}, 3),
    ("training_rows", {"input_size": (np.int64(224), 224)}, 3),
    ("labeled_pairs", {"num_negatives": np.int64(1), "seed": 0}, 6),
    ("labeled_lists", {"num_negatives": 0}, 3),
    ("select_queries", {"n_or_ids": 10**30}, 3),
    ("select_queries", {"n_or_ids": np.int64(2)}, 2),
    ("select_queries", {"n_or_ids": ("p1", "p1")}, 1),
    ("select_queries", {"n_or_ids": np.array(["p1", "p2"])}, 2),
]


@pytest.mark.parametrize(("method", "arguments", "length"), RIGHT)
def test_numbers_of_other_packages_and_large_ones_do(data, method, arguments, length):
    assert len(getattr(data, method)(**arguments)) == length


BUILDERS = {
    "no table": (lambda: RetrievalDataset.from_id_rows(None), DatasetError, "got NoneType"),
    "a list of rows": (lambda: RetrievalDataset.from_id_rows([{"id": 1}]), DatasetError, r"Dataset\.from_list"),
    "columns": (lambda: RetrievalDataset.from_columns({"query": ["a"]}), DatasetError, r"Dataset\.from_dict"),
    "a data frame": (
        lambda: RetrievalDataset.from_id_rows(id_rows().to_pandas()),
        DatasetError,
        r"Dataset\.from_pandas",
    ),
    "a frame of columns": (lambda: as_retrieval_dataset(id_rows().to_pandas()), DatasetError, r"Dataset\.from_pandas"),
    "a frame as corpus": (
        lambda: RetrievalDataset(**tables() | {"corpus": id_rows().to_pandas()}),
        DatasetError,
        r"for corpus.*Dataset\.from_pandas",
    ),
    "splits": (lambda: RetrievalDataset.from_id_rows(DatasetDict({"a": id_rows()})), DatasetError, r"rows\['a'\]"),
    "no rows": (lambda: RetrievalDataset.from_id_rows(id_rows().select([])), DatasetError, "zero rows"),
    "an id column of another type": (lambda: RetrievalDataset.from_id_rows(id_rows(), id_column=5), DatasetError, "5"),
    "a query column that is none": (
        lambda: RetrievalDataset.from_id_rows(id_rows(), query_column=None),
        DatasetError,
        "None",
    ),
    "an image column that is a list": (
        lambda: RetrievalDataset.from_id_rows(id_rows(), image_column=["image"]),
        DatasetError,
        r"\['image'\]",
    ),
    "negatives of another type": (
        lambda: RetrievalDataset.from_id_rows(id_rows(), negatives_column=5),
        DatasetError,
        "no column 5",
    ),
    "a way of missing": (lambda: RetrievalDataset.from_id_rows(id_rows(), on_missing=True), ConfigError, "on_missing="),
    "float ids": (lambda: RetrievalDataset.from_id_rows(id_rows(id=[0.0, 1, 2, 3])), DatasetError, "double"),
    "lists as ids": (lambda: RetrievalDataset.from_id_rows(id_rows(id=[["a"]] * 4)), DatasetError, "can't be ids"),
    "the same id twice": (
        lambda: RetrievalDataset.from_id_rows(id_rows(id=["p"] * 4)),
        DatasetError,
        "'p' stands in 4",
    ),
    "a null id": (lambda: RetrievalDataset.from_id_rows(id_rows(id=["p0", None, "x", "y"])), DatasetError, "Row 1"),
    "numbers as queries": (lambda: RetrievalDataset.from_id_rows(id_rows(query=[1, 2, 3, 4])), DatasetError, "int64"),
    "numbers as images": (lambda: RetrievalDataset.from_id_rows(id_rows(image=[1, 2, 3, 4])), DatasetError, "int64"),
    "a null image": (
        lambda: RetrievalDataset.from_id_rows(id_rows(image=[png(), None, png(), png()])),
        DatasetError,
        "'p1'",
    ),
    "negatives that are no lists": (
        lambda: RetrievalDataset.from_id_rows(id_rows(negatives=["p1", "p2", "p3", "p0"])),
        DatasetError,
        "negatives",
    ),
    "negatives of nobody": (
        lambda: RetrievalDataset.from_id_rows(id_rows(negatives=[["p9"], [], [], []])),
        MissingDocumentError,
        "'p9'",
    ),
    "negatives under another name": (
        lambda: RetrievalDataset.from_id_rows(id_rows().rename_column("negatives", "hard_negatives")),
        DatasetError,
        "no column 'negatives'",
    ),
    "one name for several": (
        lambda: RetrievalDataset.from_columns(column_rows(), negative_columns="negative_0"),
        ConfigError,
        r"\['negative_0'\]",
    ),
    "a number for names": (
        lambda: RetrievalDataset.from_columns(column_rows(), negative_columns=5),
        ConfigError,
        "negative_columns=5",
    ),
    "a column that is not there": (
        lambda: RetrievalDataset.from_columns(column_rows(), negative_columns=["x"]),
        DatasetError,
        "no column 'x'",
    ),
    "no corpus": (lambda: RetrievalDataset(**tables() | {"corpus": None}), DatasetError, "for corpus"),
    "a corpus without content": (
        lambda: RetrievalDataset(**tables(corpus={"document_id": ["a"]})),
        DatasetError,
        "neither an 'image' nor a 'text'",
    ),
    "a judgement of nothing": (
        lambda: RetrievalDataset(**tables(qrels={"query_id": ["q"], "document_id": ["z"], "score": [1]})),
        MissingDocumentError,
        "'z'",
    ),
    "a judgement by nobody": (
        lambda: RetrievalDataset(**tables(qrels={"query_id": ["r"], "document_id": ["a"], "score": [1]})),
        MissingDocumentError,
        "'r'",
    ),
    "nothing to concatenate": (lambda: RetrievalDataset.concatenate([]), DatasetError, "no datasets"),
    "a number to concatenate": (lambda: RetrievalDataset.concatenate(5), ConfigError, "datasets=5"),
    "a text to concatenate": (lambda: RetrievalDataset.concatenate("ab"), ConfigError, "datasets='ab'"),
    "rows to concatenate": (lambda: RetrievalDataset.concatenate([id_rows()]), DatasetError, "Part 0 is a Dataset"),
    "a part with half a character": (
        lambda: RetrievalDataset.concatenate({SURROGATE: RetrievalDataset.from_id_rows(id_rows())}),
        DatasetError,
        "half of a surrogate pair",
    ),
    "a number as dataset": (lambda: as_retrieval_dataset(5), DatasetError, "5 is no dataset"),
    "no dataset": (lambda: as_retrieval_dataset(None), DatasetError, "None is no dataset"),
    "no named dataset": (lambda: datasets_by_name({}), DatasetError, "is empty"),
    "a number as name": (lambda: datasets_by_name({1: id_rows()}), ConfigError, "name of a dataset=1"),
}


@pytest.mark.parametrize("case", BUILDERS)
def test_builders_refuse_what_they_can_not_read(case):
    build, error, message = BUILDERS[case]
    with pytest.raises(error, match=message):
        build()


SCORES = [0, -1, 1.5, None, float("nan"), float("inf"), -float("inf"), 1e300, 2**31, 2**62]


@pytest.mark.parametrize("score", SCORES)
def test_scores_that_are_no_grades_are_refused(score):
    judged = {"query_id": ["q", "q"], "document_id": ["a", "b"], "score": [1, score]}
    with pytest.raises(DatasetError, match=r"1 scores of the qrels .*document 'b'"):
        RetrievalDataset(**tables(qrels=judged))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_scores_of_a_beir_set_that_are_no_grades_are_refused(score):
    judged = {"query_id": ["q", "q"], "document_id": ["a", "b"], "score": [1.0, score]}
    with pytest.raises(DatasetError, match=r"1 scores of the qrels are no grades, e\.g\. .* in row 1"):
        RetrievalDataset.from_beir(**tables(qrels=judged))


NO_DATASETS = [None, 5, b"", "", ["rows.parquet"], {"a": 1}, True, 1.5]


@pytest.mark.parametrize("path", NO_DATASETS)
def test_what_is_no_path_is_not_loaded(path):
    with pytest.raises(ConfigError, match=r"name_or_path=.*expected the path of a dataset"):
        RetrievalDataset.load(path)


PATHS = ["missing.parquet", "a/b/c", "./missing", "/nowhere/at/all", "x\0y", SURROGATE, "n" * 5000, "~/rows", "a b"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_lead_nowhere_are_said_to_without_asking_the_hub(path):
    with pytest.raises(DatasetError, match=r"does not exist|can't be the path") as caught:
        RetrievalDataset.load(path)
    assert "Couldn't reach" not in str(caught.value)


@pytest.mark.parametrize("name", ["config", "split", "revision"])
@pytest.mark.parametrize("value", [5, True, ["en"]])
def test_configurations_splits_and_revisions_are_texts(name, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"{name}="):
        RetrievalDataset.load(tmp_path, **({"config": value} if name == "config" else {name: value}))


FILES = {
    "rows.csv": r"Dataset\.from_csv\(path\)",
    "rows.tsv": r"Dataset\.from_csv\(path, sep=",
    "rows.jsonl": r"Dataset\.from_json\(path\)",
    "rows.json": r"Dataset\.from_json\(path\)",
    "report.pdf": r"No page of 1 PDFs can be read, e\.g\. report\.pdf: it is no PDF",
    "rows.parquet": "could not be loaded",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds_say_how_they_are_read(name, tmp_path):
    (tmp_path / name).write_text("id,query\n1,x\n")
    with pytest.raises(DatasetError, match=FILES[name]):
        RetrievalDataset.load(tmp_path / name)


FOLDERS = {
    "a.pdf": "No page of 1 PDFs",
    "a.png": "These are images",
    "a.csv": "from_csv",
    "a.xyz": r"it has \['a\.xyz'\]",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_things_say_what_to_do(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=FOLDERS[name]):
        RetrievalDataset.load(tmp_path)


IMAGES = {
    "empty": b"",
    "text": b"no image at all",
    "cut": png()[:40],
    "header": b"\x89PNG\r\n\x1a\n",
    "zeros": bytes(1000),
    "a folder": "{}",
    "a pipe": "{}/pipe",
    "a device": "/dev/zero",
    "a missing file": "{}/missing.png",
    "a null byte": "{}/a\0b",
    "a long name": "{}/" + "n" * 5000,
    "an address": "https://example.org/a.png",
}


@pytest.mark.parametrize("case", IMAGES)
def test_pages_that_can_not_be_read_are_named_when_read_and_when_checked(case, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = IMAGES[case]
    image = content if isinstance(content, bytes) else content.format(tmp_path)
    rows = Dataset.from_dict({"id": ["page-7"], "query": ["x"], "image": [image]})
    broken = RetrievalDataset.from_id_rows(rows)
    with pytest.raises(ImageDecodeError, match="'page-7'"):
        broken.training_rows(0)[0]
    with pytest.raises(ImageDecodeError, match="'page-7'"):
        broken.check_pages(show_progress_bar=False)
    if not isinstance(content, bytes):
        with pytest.raises(DatasetError, match=r"missing, e\.g\. .*'page-7'"):
            broken.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


def test_every_error_is_one_of_ours():
    assert all(issubclass(error, MmtuneError) for _, _, error, _ in METHODS)
    assert len(METHODS) + len(BUILDERS) > 120
