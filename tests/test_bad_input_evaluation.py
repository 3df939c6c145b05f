"""What is given wrongly to evaluation and mining ends in an error that names it, before anything is encoded."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from mmtune import ConfigError, DatasetError, RetrievalDataset, build_evaluator
from mmtune.evaluation import build_reranking_evaluator, evaluate_pipeline
from mmtune.inference.mining import mine_hard_negatives
from mmtune.inference.teacher import TeacherScores, score_rows
from mmtune.testing import generated_pages

NUM_DOCUMENTS = 12


class Vectors(SentenceTransformer):
    """Embeds the text "1 -2" as the vector (1, -2), and compares by dot product."""

    def __init__(self) -> None:
        super().__init__(modules=[torch.nn.Identity()], similarity_fn_name="dot", device="cpu")

    def encode_query(self, inputs: Any, **options: Any) -> Any:
        return torch.tensor([[float(part) for part in item["text"].split()] for item in inputs])

    encode_document = encode_query

    def get_embedding_dimension(self) -> int:
        return 2


class Scores(CrossEncoder):
    """Scores a pair by the first number of its document."""

    def predict(self, inputs: Any, **options: Any) -> Any:
        return torch.tensor([float(document.split()[0]) for _, document in inputs])


def dataset_of(documents: list[str], queries: list[str] | None = None) -> RetrievalDataset:
    """Document ``d<k>`` answers query ``q<k>``."""
    asked = queries or ["1 0", "0 1"]
    document_ids, query_ids = (
        [f"{kind}{k}" for k in range(len(part))] for kind, part in (("d", documents), ("q", asked))
    )
    return RetrievalDataset(
        Dataset.from_dict({"document_id": document_ids, "text": documents}),
        Dataset.from_dict({"query_id": query_ids, "text": asked}),
        Dataset.from_dict(
            {"query_id": query_ids, "document_id": document_ids[: len(asked)], "score": [1] * len(asked)}
        ),
        Dataset.from_dict({"query_id": query_ids, "document_ids": [["d4", "d5"]] * len(asked)}),
    )


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    return dataset_of([f"{k} {k + 1}" for k in range(NUM_DOCUMENTS)])


@pytest.fixture(scope="module")
def reranker(text_encoder_path: str) -> CrossEncoder:
    return Scores(text_encoder_path, num_labels=1, device="cpu")


@pytest.fixture(scope="module")
def late(text_encoder_path: str) -> MultiVectorEncoder:
    return MultiVectorEncoder(text_encoder_path, device="cpu")


@pytest.fixture(scope="module")
def calls(data: RetrievalDataset, reranker: CrossEncoder) -> dict[str, Callable[..., Any]]:
    """Each function with arguments that work, of which a case changes one."""
    quiet = {"documents": "text", "show_progress_bar": False}
    rows = data.training_rows(2, documents="text")
    scores = score_rows(rows, reranker, show_progress_bar=False)
    common = {"dataset": data, **quiet}

    def call(function: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
        return lambda **given: function(**{**defaults, **given})

    return {
        "evaluator": call(build_evaluator, **common),
        "evaluate": build_evaluator(data, **quiet),
        "late": build_evaluator(data, model=MultiVectorEncoder(modules=[torch.nn.Identity()]), **quiet),
        "reranking": call(build_reranking_evaluator, num_candidates=4, **common),
        "rerank": build_reranking_evaluator(data, num_candidates=4, **quiet),
        "pipeline": call(evaluate_pipeline, retriever=Vectors(), reranker=reranker, **common),
        "mine": call(mine_hard_negatives, model=Vectors(), num_negatives=1, **common),
        "score": call(score_rows, rows=rows, teacher=reranker, show_progress_bar=False),
        "load": TeacherScores.load,
        "scale": scores.scaled,
        "label": scores.label_rows,
    }


WHOLE = "expected a whole number of 1 or more"
SERIES = "expected whole numbers in a list or tuple"
NAME = "Names become part of metric keys"
NO_DATASET = "is no dataset"
RETRIEVER = "is no retriever. Expected a SentenceTransformer or a MultiVectorEncoder"
RERANKER = "is no reranker. Expected a CrossEncoder"
LONG = "x" * 300

WRONG_WHOLES = (0, -1, 2.5, "16", None, True, math.nan)
WRONG_NAMES = ("", "a/b", "a\\b", "a|b", "a\nb", "a:b", "a\x00b", " a", "..", LONG, "\ud800", "é" * 40)
WRONG_NUMBERS = ("x", math.nan, math.inf, True, [0.1])

CASES: list[tuple[str, dict[str, Any], str]] = [
    *[("evaluator", {"dataset": each}, NO_DATASET) for each in (None, 5, 2.5, ["a"], b"a")],
    ("evaluator", {"dataset": {}}, "The mapping of datasets is empty"),
    ("evaluator", {"dataset": {"a": None}}, NO_DATASET),
    ("evaluator", {"dataset": "no/such/folder.parquet"}, "no/such/folder.parquet"),
    *[("evaluator", {"dataset": {name: None}}, NAME) for name in WRONG_NAMES],
    *[("evaluator", {"dataset": {name: None}}, "expected a text such as 'vdr'") for name in (5, None, ("a",))],
    *[("evaluator", {"dataset": {name: None}}, "other than 'mean'") for name in ("mean", "64d", "a-64d", "a_b")],
    *[("evaluator", {"name": name}, NAME) for name in WRONG_NAMES],
    *[("evaluator", {"name": name}, "expected a text such as 'vdr'") for name in (5, None, ["a"])],
    *[("evaluator", {"truncate_dims": each}, SERIES) for each in (64, None, "64", True)],
    *[("evaluator", {"truncate_dims": [each]}, "truncate_dims holds") for each in WRONG_WHOLES],
    ("evaluator", {"truncate_dims": [4], "model": Vectors()}, "4 is larger than the 2 dimensions"),
    *[("evaluator", {"ndcg_at_k": each}, SERIES) for each in (10, None, "10")],
    *[("evaluator", {"ndcg_at_k": [each]}, "ndcg_at_k holds") for each in WRONG_WHOLES],
    ("evaluator", {"ndcg_at_k": []}, "ndcg_at_k is empty"),
    *[("evaluator", {"batch_size": each}, WHOLE) for each in WRONG_WHOLES],
    *[("evaluator", {"documents": each}, "documents=.* is unknown") for each in ("sound", None, 5, ["text"])],
    ("evaluator", {"documents": "image"}, "needs a column 'image'"),
    *[("evaluator", {"model": each}, RETRIEVER) for each in ("clip", 5, torch.nn.Identity())],
    *[("evaluate", {"model": each}, "is no SentenceTransformer") for each in ("text", 5, None)],
    *[("late", {"model": each}, "is no MultiVectorEncoder") for each in ("text", 5, None)],
    ("late", {"model": Vectors()}, "scores a MultiVectorEncoder, and the model is a Vectors"),
    *[("reranking", {"num_candidates": each}, "whole number of 2 or more") for each in (1, *WRONG_WHOLES)],
    ("reranking", {"num_candidates": 10**6}, "is more than the 12 different documents"),
    *[("reranking", {"direction": each}, "direction=.* is unknown") for each in ("sideways", None, 5)],
    *[("reranking", {"at_k": each}, WHOLE) for each in WRONG_WHOLES],
    *[("reranking", {"seed": each}, "whole number of 0 or more") for each in (-1, None, "x", 0.5)],
    *[("reranking", {"batch_size": each}, WHOLE) for each in WRONG_WHOLES],
    *[("reranking", {"name": name}, NAME) for name in ("", "a/b", LONG)],
    ("reranking", {"name": 5}, "expected a text such as 'vdr'"),
    *[("reranking", {"retriever": each}, RETRIEVER) for each in ("clip", 5)],
    ("reranking", {"always_rerank_positives": False}, "without a retriever"),
    ("reranking", {"dataset": {}}, "The mapping of datasets is empty"),
    *[("rerank", {"model": each}, RERANKER) for each in ("text", 5, None, Vectors())],
    *[("pipeline", {"retriever": each}, RETRIEVER) for each in (5, None, ["clip"])],
    *[("pipeline", {"reranker": each}, RERANKER) for each in (5, None, Vectors())],
    *[("pipeline", {name: "no/such/model"}, "no/such/model") for name in ("retriever", "reranker")],
    *[("pipeline", {name: ""}, "names no checkpoint") for name in ("retriever", "reranker")],
    *[("pipeline", {"depths": each}, SERIES) for each in (5, "5", True)],
    *[("pipeline", {"depths": [each]}, "depths holds") for each in (*WRONG_WHOLES, 10**6)],
    ("pipeline", {"depths": []}, "depths is empty"),
    *[("pipeline", {"ndcg_at_k": each}, WHOLE) for each in (*WRONG_WHOLES, [10])],
    *[("pipeline", {"batch_size": each}, WHOLE) for each in WRONG_WHOLES],
    *[("pipeline", {"dataset": each}, NO_DATASET) for each in (None, 5, {})],
    ("pipeline", {"documents": "sound"}, "documents='sound' is unknown"),
    *[("mine", {"model": each}, RETRIEVER) for each in (5, None, "clip")],
    *[("mine", {"reranker": each}, RERANKER) for each in (5, "reranker", Vectors())],
    *[
        ("mine", {"cache_folder": each}, "cache_folder=.*expected the path of a folder")
        for each in (5, "", b"a", ["a"])
    ],
    *[("mine", {name: each}, WHOLE) for name in ("num_negatives", "batch_size") for each in WRONG_WHOLES],
    *[("mine", {"range_min": each}, "whole number of 0 or more") for each in (-1, None, "x", 0.5)],
    *[("mine", {"range_max": each}, WHOLE) for each in (0, "x", 0.5)],
    ("mine", {"range_min": 3, "range_max": 3}, "leave room for 0 documents"),
    *[
        ("mine", {name: each}, "expected a finite number")
        for name in ("relative_margin", "absolute_margin", "max_score")
        for each in WRONG_NUMBERS
    ],
    *[("mine", {"relative_margin": each}, "is no share of a score") for each in (1, -0.1)],
    *[("mine", {"dataset": each}, NO_DATASET) for each in (None, 5, {})],
    ("mine", {"documents": 5}, "documents=5 is unknown"),
    *[("score", {"rows": each}, "Expected rows of RetrievalDataset.training_rows") for each in (None, 5, "rows")],
    ("score", {"rows": Dataset.from_dict({"query": ["a"]})}, "with their view, got columns"),
    *[("score", {"teacher": each}, RERANKER) for each in (None, 5, Vectors())],
    *[("score", {"folder": each}, "folder=.*expected the path of a folder") for each in (5, "", b"a")],
    *[("score", {"batch_size": each}, WHOLE) for each in WRONG_WHOLES],
    *[("load", {"folder": each}, "folder=.*expected the path of a folder") for each in (5, None, "", b"a")],
    ("load", {"folder": "no/such/folder"}, "'no/such/folder' holds no scores"),
    *[("scale", {"factor": each}, "expected a finite number") for each in (*WRONG_NUMBERS, None)],
    *[("label", {"rows": each}, "Expected rows of RetrievalDataset.training_rows") for each in (None, 5)],
]


@pytest.mark.parametrize(("name", "given", "message"), CASES, ids=lambda value: ascii(value)[:60])
def test_wrong_arguments_are_named(calls: dict, name: str, given: dict, message: str) -> None:
    with pytest.raises((ConfigError, DatasetError), match=message):
        calls[name](**given)


def test_a_dataset_without_queries_is_named(calls: dict) -> None:
    rows = generated_pages(4).map(lambda row: {"query": None, "text": "a page"})
    for name in ("evaluator", "reranking", "pipeline", "mine"):
        with pytest.raises(DatasetError, match="quer"):
            calls[name](dataset=rows)


@pytest.mark.parametrize("name", ["vdr", "my_set", "mine (fr) 2.0", "données", "x" * 64])
def test_names_that_work(data: RetrievalDataset, reranker: CrossEncoder, name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"documents": "text", "show_progress_bar": False, "name": name}
    for evaluator, model in (
        (build_evaluator(data, truncate_dims=[1], **options), Vectors()),
        (build_reranking_evaluator(data, num_candidates=np.int64(3), **options), reranker),
    ):
        metrics = evaluator(model, str(tmp_path))
        assert evaluator.primary_metric in metrics
        assert all(key.startswith(name) for key in metrics)
    assert len(list(tmp_path.glob("*.csv"))) == 3


# Numbers that are none


def measure(kind: str, dataset: RetrievalDataset, model: Any, reranker: CrossEncoder) -> None:
    options: dict[str, Any] = {"documents": "text", "show_progress_bar": False}
    match kind:
        case "evaluator":
            build_evaluator(dataset, truncate_dims=[1], **options)(model)
        case "late evaluator":
            build_evaluator(dataset, model=model, **options)(model)
        case "candidates":
            build_reranking_evaluator(dataset, num_candidates=4, retriever=model, **options)
        case "pages ask":
            backwards = {"direction": "image_to_text", "num_candidates": 2, "retriever": model}
            build_reranking_evaluator(dataset, **backwards, **options)
        case "pipeline":
            evaluate_pipeline(model, reranker, dataset, **options)
        case "mining":
            mine_hard_negatives(dataset, model, num_negatives=1, **options)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", ["evaluator", "candidates", "pipeline", "mining"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_an_embedding_that_is_no_number_is_named(reranker: CrossEncoder, side: str, kind: str, number: str) -> None:
    """One of them, which answers nothing: the others would get a score all the same."""
    documents, queries = [f"{k} {k + 1}" for k in range(8)], ["1 0", "0 1", "1 1"]
    (documents if side == "document" else queries)[2] = f"1 {number}"
    dataset = dataset_of(documents, queries)
    with pytest.raises(DatasetError, match=f"not finite for the {side} '{side[0]}2'"):
        measure(kind, dataset, Vectors(), reranker)


@pytest.mark.parametrize("kind", ["evaluator", "candidates", "pages ask", "pipeline", "mining"])
def test_a_similarity_that_is_no_number_is_named(reranker: CrossEncoder, kind: str) -> None:
    """Finite embeddings, too large to be compared."""
    dataset = dataset_of([f"{k} {k + 1}" for k in range(7)], ["1 0", "3e38 3e38"])
    with pytest.raises(DatasetError, match=r"The model compares '[qd]\d' with '[qd]\d' as inf"):
        measure(kind, dataset, Vectors(), reranker)


@pytest.mark.parametrize("kind", ["late evaluator", "candidates", "pipeline", "mining"])
def test_one_token_that_is_no_number_is_named(
    late: MultiVectorEncoder, reranker: CrossEncoder, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = late.encode_document

    def broken(inputs: Any, **options: Any) -> Any:
        embeddings = [tokens.clone() for tokens in encode(inputs, **options)]
        for item, tokens in zip(inputs, embeddings, strict=True):
            if item["text"] == "6 7":
                tokens[1, 0] = math.nan
        return embeddings

    monkeypatch.setattr(late, "encode_document", broken)
    dataset = dataset_of([f"{k} {k + 1}" for k in range(8)])
    with pytest.raises(DatasetError, match="not finite for the document 'd6'"):
        measure(kind, dataset, late, reranker)


def measure_reranker(kind: str, dataset: RetrievalDataset, reranker: CrossEncoder) -> None:
    options: dict[str, Any] = {"documents": "text", "show_progress_bar": False}
    match kind:
        case "evaluator":
            build_reranking_evaluator(dataset, num_candidates=5, **options)(reranker)
        case "pipeline":
            evaluate_pipeline(Vectors(), reranker, dataset, depths=[6], **options)
        case "mining":
            mine_hard_negatives(dataset, Vectors(), reranker=reranker, num_negatives=1, **options)
        case "teacher":
            score_rows(dataset.training_rows(2, documents="text"), reranker, show_progress_bar=False)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", ["evaluator", "pipeline", "mining", "teacher"])
def test_a_score_that_is_no_number_is_named(
    reranker: CrossEncoder, kind: str, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of([f"{k} {k + 1}" for k in range(6)])

    def predict(inputs: Any, **_: Any) -> Any:
        return torch.tensor([float(number) if document == "5 6" else 1.0 for _, document in inputs])

    monkeypatch.setattr(reranker, "predict", predict)
    with pytest.raises(ConfigError, match=f"scores query 'q[01]' with document 'd5' as {number}"):
        measure_reranker(kind, dataset, reranker)


def test_a_model_whose_training_diverged_gets_no_score(pages: Dataset, clip_path: str) -> None:
    model = SentenceTransformer(clip_path, device="cpu")
    with torch.no_grad():
        for weights in model.parameters():
            weights.fill_(math.nan)
    with pytest.raises(DatasetError, match=r"not finite for the query .* whether the training diverged"):
        build_evaluator(pages, show_progress_bar=False)(model)
