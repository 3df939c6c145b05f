"""A server that computes something else than its model: ten faults are planted, each is found and named first."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from mmtune import (
    ConfigError,
    DatasetError,
    MmtuneError,
    RetrievalDataset,
    ServingReport,
    build_late_interaction,
    build_reranker,
    check_serving,
    compose_router,
    export_model,
    load_model,
)
from mmtune.models.lora import add_lora
from served import BARE, Served, ServedTexts, serving

PROMPTS = {"query": "Find the page that answers this question: ", "document": "A page of a report: "}


@pytest.fixture(scope="module")
def dataset(pages) -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(pages)


def vlm(path: str, *layers: Any) -> SentenceTransformer:
    """A dense VLM with prompts, a pixel limit, and what else comes behind its pooling."""
    loaded = load_model(path, max_pixels=64 * 64, dtype="float32")
    model = SentenceTransformer(modules=[*loaded.children(), *layers], device="cpu", prompts=dict(PROMPTS))
    return model.eval()


@pytest.fixture(scope="module")
def dense(qwen3_vl_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceTransformer, Path]:
    torch.manual_seed(0)
    head = Dense(64, 64, bias=False, activation_function=nn.Identity())
    model = vlm(qwen3_vl_path, head, Normalize())
    return model, export_model(model, tmp_path_factory.mktemp("served") / "dense")


def check(model: Any, served: Any, dataset: RetrievalDataset, **options: Any) -> ServingReport:
    with serving(served) as url:
        return check_serving(url, model, dataset, **{"num_documents": 4, **options})


def other_pixels(served: Served) -> None:
    served.processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}


def bare_template(served: Served) -> None:
    served.processor.chat_template = BARE


def planted(**values: Any) -> Callable[[Served], None]:
    def plant(served: Served) -> None:
        for name, value in values.items():
            assert hasattr(served, name)
            setattr(served, name, value)

    return plant


FAULTS = {
    "pooling": (planted(pooling="mean"), "pooling: the server pools by mean"),
    "template": (bare_template, "template: the server applies no chat template"),
    "prompt": (planted(drops_prompt=True), "prompt: the server computes without the prompt"),
    "pixels": (other_pixels, "pixel limit: the server does not know the model's own"),
    "normalisation": (planted(normalizes=False), "normalisation: the server's vectors have lengths of"),
    "truncation": (
        planted(dims=32, renormalizes=False),
        "truncation: the server cuts vectors to 32 of 64 .* not norm",
    ),
    "truncation and back": (planted(dims=32), "truncation: the server cuts vectors to 32 of 64 dimensions; ask"),
    "head": (planted(projector=None), "head: the Dense layer behind the encoder is lost"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_first(dense, dataset: RetrievalDataset, name: str) -> None:
    model, folder = dense
    served = Served(folder)
    plant, cause = FAULTS[name]
    plant(served)
    report = check(model, served, dataset)
    assert not report.ok
    assert re.match(cause, report.causes[0]), report


def test_no_fault_none_reported_and_the_model_stays(dense, dataset: RetrievalDataset) -> None:
    model, folder = dense
    before = model.encode_query(["a text"])
    report = check(model, Served(folder), dataset)
    assert report.ok
    assert report.causes == ()
    assert report.query_gap < 1e-5
    assert report.rank_overlap == 1
    assert report.ndcg == report.served_ndcg
    assert "computes what the model does" in str(report)
    served = Served(folder)
    bare_template(served)
    check(model, served, dataset, num_documents=2)
    assert (model.encode_query(["a text"]) == before).all()


def test_bfloat16_passes(dense, dataset: RetrievalDataset) -> None:
    model, folder = dense
    served = Served(folder)
    served.model.to(torch.bfloat16)
    report = check(model, served, dataset)
    assert report.ok, report
    assert report.query_gap > 1e-6  # it is not the same


def clip(path: str) -> SentenceTransformer:
    model = load_model(path)
    model.prompts = {"query": "find: ", "document": ""}
    return model


def test_shuffled_order(clip_path: str, dataset: RetrievalDataset, tmp_path: Path) -> None:
    model = clip(clip_path)
    served = Served(export_model(model, tmp_path / "out"))
    assert check(model, served, dataset).ok  # of length 1, which the model's are not
    served.shuffles = True
    assert check(model, served, dataset).causes[0].startswith("order: the vectors are right and stand at other places")


def test_an_unmerged_adapter(clip_path: str, dataset: RetrievalDataset, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = Served(export_model(clip(clip_path), tmp_path / "base"))
    model = clip(clip_path)
    add_lora(model, True, freeze=(), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    learned = [weight.requires_grad for weight in model.parameters()]
    assert check(model, Served(export_model(model, tmp_path / "merged")), dataset).ok
    report = check(model, base, dataset)
    assert report.causes[0].startswith("adapter: the server computes without the adapters, which are not merged")
    assert [weight.requires_grad for weight in model.parameters()] == learned
    assert check(model, Served(tmp_path / "merged"), dataset).ok  # the adapters are on again
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert "adapters that are not merged" in check(merged, base, dataset).causes[0]


@pytest.mark.parametrize("head", ["dense", "logit_score"])
def test_a_reranker(qwen3_vl_path: str, dataset: RetrievalDataset, tmp_path: Path, head: str) -> None:
    model = build_reranker(qwen3_vl_path, head=head, max_pixels=64 * 64, dtype="float32")
    served = Served(export_model(model, tmp_path / "out"), chat_template="reranker.jinja")
    report = check(model, served, dataset, num_documents=3)
    assert report.ok, report
    served.use_activation = True
    report = check(model, served, dataset, num_documents=3)
    assert report.ok, report
    assert "sigmoid" in report.notes[0]
    torch.manual_seed(0)
    served.score = torch.randn_like(served.score) * 1e-3
    report = check(model, served, dataset, num_documents=3)
    assert report.causes[0].startswith("head: the scores lie between 0."), report
    assert "Dense" in report.causes[0]


def test_late_interaction(qwen3_vl_path: str, dataset: RetrievalDataset, tmp_path: Path) -> None:
    model = build_late_interaction(qwen3_vl_path, dimension=16, max_pixels=64 * 64, dtype="float32")
    model.prompts = dict(PROMPTS)
    served = Served(export_model(model, tmp_path / "out"), task="token_embed")
    report = check(model, served, dataset)
    assert report.ok, report
    assert report.rank_overlap == 1
    served.drops_prompt = True
    assert check(model, served, dataset, num_documents=3).causes[0].startswith("prompt")


def test_texts_by_the_api_of_tei(text_encoder_path: str, tmp_path: Path) -> None:
    model = SentenceTransformer(text_encoder_path, device="cpu")
    texts = ["“ünïcode”, a/b", "the second page", "the third page", "last"]
    data = RetrievalDataset(
        corpus=Dataset.from_dict({"document_id": [1, 2, 3, 4], "text": texts}),
        queries=Dataset.from_dict({"query_id": ["q/1", "q 2"], "text": ["ünïcode?", "third"]}),
        qrels=Dataset.from_dict({"query_id": ["q/1", "q 2"], "document_id": [1, 3], "score": [2, 1]}),
    )
    served = Served(export_model(model, tmp_path / "out"))
    for api in ("auto", "tei", "openai"):
        report = check(model, served, data, api=api)
        assert report.ok, report
        assert report.num_documents == 4
    served.dims = 16
    assert check(model, served, data, api="tei").causes[0].startswith("truncation")
    model.truncate_dim = 16
    served = ServedTexts(export_model(model, tmp_path / "for-tei", target="tei"))
    assert check(model, served, data, api="tei").ok


def test_a_url_with_or_without_its_end(clip_path: str, dataset: RetrievalDataset, tmp_path: Path) -> None:
    model = clip(clip_path)
    served = Served(export_model(model, tmp_path / "out"))
    with serving(served) as url:
        for end in ("", "/", "/v1", "/v1/", "/v1/embeddings"):
            assert check_serving(url + end, model, dataset, num_documents=1).ok


class Answers:
    """A server that answers everything alike."""

    def __init__(self, answer: Any) -> None:
        self.given = answer

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "answered 404: .* Check the URL"),
        ({"data": []}, "with 0 vectors. Expected"),
        ({"data": [{"embedding": "AAAA"}]}, "with 0 vectors"),
        ({"data": [{"embedding": [float("nan")]}] * 2}, "not finite"),
        ([1, 2], "Expected"),
        ("<html>", "Expected"),
    ],
)
def test_answers_that_are_none(clip_path: str, dataset: RetrievalDataset, answer: Any, message: str) -> None:
    with pytest.raises(MmtuneError, match=message):
        check(load_model(clip_path), Answers(answer), dataset, num_documents=2)


def test_scores_that_are_no_numbers(qwen3_vl_path: str, dataset: RetrievalDataset) -> None:
    answer = {"results": [{"index": at, "relevance_score": float("nan")} for at in range(4)]}
    with pytest.raises(MmtuneError, match="not finite"):
        check(build_reranker(qwen3_vl_path), Answers(answer), dataset, num_documents=4)


def test_a_model_that_gives_no_numbers_equals_no_server(clip_path: str, dataset: RetrievalDataset) -> None:
    model = load_model(clip_path)
    for weight in model.parameters():
        nn.init.constant_(weight, float("nan"))
    answer = {"data": [{"embedding": [1.0] * 128}] * 2}
    few = RetrievalDataset(dataset.corpus.select(range(1)), dataset.queries.select([]), dataset.qrels.select([]))
    assert not check(model, Answers({"data": answer["data"][:1]}), few, num_documents=1).ok


def test_no_server(clip_path: str, dataset: RetrievalDataset) -> None:
    with pytest.raises(MmtuneError, match="gave no answer in JSON: URLError"):
        check_serving("http://127.0.0.1:9", load_model(clip_path), dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000': expected that of a server"),
        ({"url": 8000}, "url=8000: expected"),
        ({"model": "my-model"}, "Expected a model of sentence-transformers, got 'my-model'"),
        ({"api": "grpc"}, "api='grpc' is unknown"),
        ({"api": None}, "api=None is unknown"),
        ({"api": "rerank"}, "api='rerank' does not fit a SentenceTransformer"),
        ({"num_documents": 0}, "num_documents=0: expected a whole number of 1 or more"),
        ({"num_documents": True}, "num_documents=True: expected"),
        ({"num_documents": "8"}, "num_documents='8': expected"),
        ({"dataset": 5}, "dataset=5 is no dataset"),
    ],
)
def test_wrong_arguments(clip_path: str, dataset: RetrievalDataset, arguments: dict[str, Any], message: str) -> None:
    given = {"url": "http://127.0.0.1:9", "model": load_model(clip_path), "dataset": dataset, **arguments}
    with pytest.raises((ConfigError, DatasetError), match=message):
        check_serving(given.pop("url"), given.pop("model"), given.pop("dataset"), **given)


def test_a_router_and_documents_that_are_not_read(clip_path: str, text_encoder_path: str, dataset) -> None:
    with pytest.raises(ConfigError, match="Check each route alone"):
        check_serving("http://127.0.0.1:9", compose_router(text_encoder_path, clip_path), dataset)
    with pytest.raises(DatasetError, match="no documents that the model reads"):
        check_serving("http://127.0.0.1:9", SentenceTransformer(text_encoder_path, device="cpu"), dataset)
    with pytest.raises(ConfigError, match="takes texts only"):
        check_serving("http://127.0.0.1:9", load_model(clip_path), dataset, api="tei")
