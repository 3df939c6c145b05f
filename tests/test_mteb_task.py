"""A dataset as a task of mteb: its numbers are ours, on any kind of document."""

import importlib
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from sentence_transformers import MultiVectorEncoder

from mmtune import (
    ConfigError,
    DatasetError,
    MissingExtraError,
    RetrievalDataset,
    as_mteb_task,
    build_evaluator,
    load_model,
)
from mmtune.testing import generated_pages, generated_pdfs, tiny_llava


@pytest.fixture(scope="module")
def graded() -> RetrievalDataset:
    """Pages with texts, judged from 1 to 3, some of them copies of another, under ids of any kind."""
    base = RetrievalDataset.from_id_rows(generated_pages(16, page_size_px=64))
    pages = [row["image"] for row in base.corpus]
    ids = [f"ü/{at}'\" #{at}" for at in range(len(pages))]
    rng = np.random.default_rng(0)
    judged = {(f"q{at}", ids[page]): 1 + int(page) % 3 for at in range(16) for page in {at, *rng.choice(len(ids), 3)}}
    columns = {"query_id": [pair[0] for pair in judged], "document_id": [pair[1] for pair in judged]}
    texts = [f"revenue of region {at * 7 % 11} in year {at}" for at in range(len(ids))]
    corpus = Dataset.from_dict(
        {"document_id": [*ids, "copy"], "image": [*pages, pages[0]], "text": [*texts, texts[0]]},
        features=Features(
            {"document_id": Value("string"), "image": base.corpus.features["image"], "text": Value("string")}
        ),
    )
    queries = Dataset.from_dict({"query_id": [f"q{at}" for at in range(16)], "text": base.queries["text"][:]})
    return RetrievalDataset(corpus, queries, Dataset.from_dict({**columns, "score": list(judged.values())}))


def run(task: Any, model: Any) -> float:
    """``ndcg_at_10`` as ``docs/comparing.md`` says to run it."""
    mteb = pytest.importorskip("mteb")
    wrappers = importlib.import_module("mteb.models.sentence_transformer_wrapper")
    is_late = isinstance(model, MultiVectorEncoder)
    wrapped = (wrappers.MultiVectorWrapper if is_late else wrappers.SentenceTransformerEncoderWrapper)(model)
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
    options: dict[str, Any] = {"batch_size": 8, "show_progress_bar": False}
    found = mteb.evaluate(wrapped, task, cache=None, show_progress_bar=False, encode_kwargs=options)
    return found.task_results[0].get_score()


def measured(data: RetrievalDataset, model: Any, documents: Any) -> float:
    evaluator = build_evaluator(data, model=model, documents=documents, show_progress_bar=False)
    return evaluator(model)[evaluator.metric_name(model)]


@pytest.mark.parametrize("documents", ["image", "text"])
def test_mteb_measures_what_we_measure(documents: Any, graded: RetrievalDataset, clip_path: str) -> None:
    pytest.importorskip("mteb")
    model = load_model(clip_path)
    ours = measured(graded, model, documents)
    task = as_mteb_task(graded, name="private", documents=documents)
    assert 0.05 < ours < 0.95
    assert run(task, model) == pytest.approx(ours, abs=1e-5)
    assert run(task, model) == pytest.approx(ours, abs=1e-5)  # mteb lets the data go in between


def test_texts_beside_pages(graded: RetrievalDataset, tmp_path) -> None:
    pytest.importorskip("mteb")
    model = load_model(tiny_llava(tmp_path / "vlm"))
    task = as_mteb_task(graded, name="private", documents="text+image")
    assert run(task, model) == pytest.approx(measured(graded, model, "text+image"), abs=1e-5)


def test_late_interaction(graded: RetrievalDataset, text_encoder_path: str) -> None:
    pytest.importorskip("mteb")
    model = MultiVectorEncoder(text_encoder_path, device="cpu")
    task = as_mteb_task(graded, name="private", documents="text")
    assert run(task, model) == pytest.approx(measured(graded, model, "text"), abs=1e-5)


def test_pages_of_pdfs_are_rendered(tmp_path) -> None:
    pytest.importorskip("mteb")
    pytest.importorskip("pypdfium2")
    task = as_mteb_task(generated_pdfs(tmp_path / "pdfs"), name="reports")
    task.load_data()
    corpus = task.dataset["default"]["test"]["corpus"]
    assert corpus[0]["image"].size > (500, 500)
    assert corpus[0]["id"].endswith(".pdf#1")
    assert list(corpus.select(range(2))["id"])[1].endswith(".pdf#2")


def test_changed_data_is_another_revision(graded: RetrievalDataset) -> None:
    pytest.importorskip("mteb")
    fewer = graded.select_queries(15)
    tasks = [as_mteb_task(data, name="private", documents="text") for data in (graded, graded, fewer)]
    first, again, other = (task.metadata.dataset["revision"] for task in tasks)
    assert first == again != other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[({"name": each}, "name=") for each in ("", "a/b", 5, None)],
        *[({"languages": each}, "languages=") for each in ("eng-Latn", [], ["german"], [5], 5, None)],
        *[({"documents": each}, "documents=") for each in ("page", None, 5)],
    ],
)
def test_wrong_arguments_are_refused(given: dict, message: str, graded: RetrievalDataset) -> None:
    pytest.importorskip("mteb")
    with pytest.raises(ConfigError, match=message):
        as_mteb_task(**{"dataset": graded, "name": "private", **given})


def test_data_that_cannot_be_asked_is_refused(graded: RetrievalDataset) -> None:
    pytest.importorskip("mteb")
    nothing = RetrievalDataset(graded.corpus, graded.queries.select([]), graded.qrels.select([]))
    with pytest.raises(DatasetError, match="generate_queries"):
        as_mteb_task(nothing, name="private")
    with pytest.raises(DatasetError, match="is no dataset"):
        as_mteb_task(5, name="private")
    images = RetrievalDataset.from_id_rows(generated_pages(4, page_size_px=64)).corpus["image"][:2]
    queries = Dataset.from_dict({"query_id": ["q0", "q1"], "image": images}).cast_column("image", Image(decode=False))
    corpus = graded.corpus.select(range(2))
    judged = {"query_id": ["q0", "q1"], "document_id": corpus["document_id"][:], "score": [1, 1]}
    with pytest.raises(DatasetError, match="'q0' has no text"):
        as_mteb_task(RetrievalDataset(corpus, queries, Dataset.from_dict(judged)), name="private", documents="text")


def test_without_mteb_the_install_line_is_named(graded: RetrievalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("mmtune.evaluation.mteb_task.importlib.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"needs mteb.*pip install mteb.*\[mteb\]"):
        as_mteb_task(graded, name="private")
