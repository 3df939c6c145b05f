"""A folder for a server: read back by a reader written after the server's source, it computes what was trained."""

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from torch import nn
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLModel

from mmtune import (
    ConfigError,
    build_late_interaction,
    build_reranker,
    compose_router,
    export_model,
    extract_route,
    load_model,
)
from mmtune.models.lora import add_lora
from mmtune.models.query_routes import route_queries
from mmtune.serving.requests import embedding_request
from mmtune.testing import tiny_clip
from served import NotServedError, Served, ServedTexts

QUERIES = ["total revenue of 2021", "Ünïcode “quotes” / slashes"]
PROMPTS = {"query": "Find the page: ", "document": "A page: "}


PROMPT = 'Another direction: "quoted", {{ braces }} %} and 😀 ünïcode\nin two lines'


def adapted(model: Any, lora: bool) -> Any:
    """The model, with adapters that change something where asked for."""
    if lora:
        pytest.importorskip("peft")
        add_lora(model, True, freeze=(), seed=0)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
    return model.eval()


@pytest.fixture
def pages_of(pages) -> list[Any]:
    return [pages[row]["image"].convert("RGB") for row in range(2)]


def served_vectors(served: Served, model: Any, path: str, task: Any, items: list[Any]) -> list[torch.Tensor]:
    key = "data" if path == "/pooling" else "embedding"
    with torch.inference_mode():
        answers = [served.answer(path, embedding_request(model, "m", task, item)) for item in items]
    return [torch.tensor(answer["data"][0][key]) for answer in answers]


def assert_same(found: list[torch.Tensor], expected: Any) -> None:
    for own, wanted in zip(found, expected, strict=True):
        unit = nn.functional.normalize(torch.as_tensor(wanted).float(), dim=-1)
        torch.testing.assert_close(nn.functional.normalize(own, dim=-1), unit, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_a_dense_vlm(qwen3_vl_path: str, pages_of: list[Any], tmp_path: Path, lora: bool) -> None:
    model = adapted(load_model(qwen3_vl_path, max_pixels=64 * 64), lora)
    model.prompts = dict(PROMPTS)
    folder = export_model(model, tmp_path / "out")
    served = Served(folder)
    for task, items in (("query", QUERIES), ("document", pages_of)):
        embed = model.encode_query if task == "query" else model.encode_document
        assert_same(served_vectors(served, model, "/v1/embeddings", task, items), embed(items, batch_size=1))
    again = SentenceTransformer(str(folder), device="cpu")
    assert_same(list(torch.as_tensor(again.encode_document(pages_of))), model.encode_document(pages_of))
    assert not list(folder.glob("adapter*"))


def test_the_folder_as_the_host_saves_it_is_refused(qwen3_vl_path: str, tmp_path: Path) -> None:
    load_model(qwen3_vl_path).save_pretrained(str(tmp_path / "host"))
    with pytest.raises(NotServedError, match="24 weights find no place"):
        Served(tmp_path / "host")


@pytest.mark.parametrize("lora", [False, True])
def test_clip(clip_path: str, pages_of: list[Any], tmp_path: Path, lora: bool) -> None:
    model = adapted(load_model(clip_path), lora)
    model.prompts = {"query": "Find: ", "document": ""}
    folder = export_model(model, tmp_path / "out")
    served = Served(folder)
    assert_same(served_vectors(served, model, "/v1/embeddings", "query", QUERIES), model.encode_query(QUERIES))
    assert_same(served_vectors(served, model, "/v1/embeddings", "document", pages_of), model.encode_document(pages_of))
    assert_same(
        list(torch.as_tensor(SentenceTransformer(str(folder)).encode_query(QUERIES))), model.encode_query(QUERIES)
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("head", ["logit_score", "dense"])
def test_a_reranker(qwen3_vl_path: str, pages_of: list[Any], tmp_path: Path, head: str, lora: bool) -> None:
    prompts = {"text_to_image": f"{PROMPT} and back"}
    model = adapted(build_reranker(qwen3_vl_path, head=head, max_pixels=64 * 64, prompts=prompts), lora)
    folder = export_model(model, tmp_path / "out")
    serve = json.loads((folder / "serve.json").read_text())
    served = Served(folder, chat_template=serve["chat_template"])
    pairs = [(query, page) for query in QUERIES for page in pages_of] + [("a text", "another")]
    documents = [embedding_request(SentenceTransformer(modules=[model[0]]), "m", "document", page) for _, page in pairs]
    for (query, _), body, expected in zip(pairs, documents, model.predict(pairs, batch_size=1), strict=True):
        content = {"content": body["messages"][-1]["content"]}
        with torch.inference_mode():
            score = served.answer("/v1/rerank", {"query": query, "documents": [content]})["results"][0]
        assert score["relevance_score"] == pytest.approx(float(expected), abs=1e-5)
    asked = {"query": QUERIES[0], "documents": ["a text"], "chat_template_kwargs": {"instruction": PROMPT}}
    with torch.inference_mode():
        score = served.answer("/v1/rerank", asked)["results"][0]["relevance_score"]
    assert score == pytest.approx(float(model.predict((QUERIES[0], "a text"), prompt=PROMPT)), abs=1e-5)
    both = {"image": pages_of[0], "text": "total of march"}
    content = embedding_request(SentenceTransformer(modules=[model[0]]), "m", "document", both)["messages"][-1][
        "content"
    ]
    with torch.inference_mode():
        turned = [
            served.answer("/v1/rerank", {"query": "a text", "documents": [{"content": parts}]})["results"][0]
            for parts in (content, content[::-1])
        ]
    assert turned[0] == turned[1]  # the page comes first, whatever the order: what serve.json says
    assert turned[0]["relevance_score"] == pytest.approx(float(model.predict(("a text", both))), abs=1e-5)
    assert not list(folder.glob("*sentence*"))
    assert not (folder / "modules.json").exists()
    assert not serve["loads_in_host"]


@pytest.mark.parametrize("lora", [False, True])
def test_late_interaction(qwen3_vl_path: str, pages_of: list[Any], tmp_path: Path, lora: bool) -> None:
    model = adapted(build_late_interaction(qwen3_vl_path, dimension=16, max_pixels=64 * 64), lora)
    model.prompts = dict(PROMPTS)
    folder = export_model(model, tmp_path / "out")
    command = json.loads((folder / "serve.json").read_text())["command"]
    task = command[command.index("--pooler-config.task") + 1]  # without it the server embeds, and refuses token_embed
    served = Served(folder, task=task)
    assert_same(
        served_vectors(served, model, "/pooling", "document", pages_of), model.encode_document(pages_of, batch_size=1)
    )
    assert_same(served_vectors(served, model, "/pooling", "query", QUERIES), model.encode_query(QUERIES, batch_size=1))
    again = MultiVectorEncoder(str(folder), device="cpu")
    assert_same(again.encode_query(QUERIES), model.encode_query(QUERIES))


def test_a_reranker_with_an_lm_head_of_its_own(qwen3_vl_path: str, tmp_path: Path) -> None:
    source = Qwen3VLForConditionalGeneration.from_pretrained(qwen3_vl_path)
    source.config.tie_word_embeddings = source.config.text_config.tie_word_embeddings = False
    source.lm_head.weight = nn.Parameter(torch.randn_like(source.lm_head.weight))
    source.save_pretrained(tmp_path / "untied")
    AutoProcessor.from_pretrained(qwen3_vl_path).save_pretrained(tmp_path / "untied")
    model = build_reranker(tmp_path / "untied")
    served = Served(export_model(model, tmp_path / "out"), chat_template="reranker.jinja")
    with torch.inference_mode():
        found = served.answer("/v1/rerank", {"query": "a text", "documents": ["another"]})["results"][0]
    assert found["relevance_score"] == pytest.approx(float(model.predict(("a text", "another"))), abs=1e-5)


def test_weights_in_several_files(qwen3_vl_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Qwen3VLModel.save_pretrained
    monkeypatch.setattr(Qwen3VLModel, "save_pretrained", partialmethod(save, max_shard_size="300KB"))
    for model in (load_model(qwen3_vl_path), build_reranker(qwen3_vl_path, head="dense")):
        folder = export_model(model, tmp_path / type(model).__name__)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        Served(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for name, file in index.items():
            assert name in load_file(folder / file)
    assert "score.weight" in index


def test_a_route_alone_and_no_router(clip_path: str, text_encoder_path: str, tmp_path: Path) -> None:
    router = compose_router(text_encoder_path, clip_path)
    with pytest.raises(ConfigError, match=r"Export each route alone: export_model\(extract_route\(model, 'text'\)"):
        export_model(router, tmp_path / "router")
    route = extract_route(router, "text")
    served = Served(export_model(route, tmp_path / "out"))
    assert_same(served_vectors(served, route, "/v1/embeddings", "query", QUERIES), route.encode_query(QUERIES))


def test_the_query_encoder_of_a_router_for_tei(clip_path: str, text_encoder_path: str, tmp_path: Path) -> None:
    router = route_queries(load_model(clip_path), text_encoder_path).model
    router.prompts = {"query": "Find: "}
    with pytest.raises(ConfigError, match=r"extract_route\(model, 'small_query'\), folder, target='tei'\)"):
        export_model(router, tmp_path / "router", target="tei")
    route = extract_route(router, "small_query")
    route.max_seq_length = 12
    asked = [*QUERIES, "much longer than the twelve tokens that the model reads of any text " * 3]
    expected = route.encode_query(asked)
    folder = export_model(route, tmp_path / "out", target="tei")
    serve = json.loads((folder / "serve.json").read_text())
    assert (serve["endpoint"], serve["example"]["prompt_name"], serve["reads_pages"]) == ("/embed", "query", False)
    assert "A page is a part" not in (folder / "README.md").read_text()
    body = {**serve["example"], "inputs": asked, "normalize": False}
    assert_same([torch.tensor(each) for each in ServedTexts(folder).answer("/embed", body)], expected)
    again = SentenceTransformer(str(folder), device="cpu")
    assert_same(list(torch.as_tensor(again.encode_query(asked))), expected)


def test_tei_refuses_the_folder_as_the_host_saves_it(text_encoder_path: str, tmp_path: Path) -> None:
    SentenceTransformer(text_encoder_path, device="cpu").save_pretrained(str(tmp_path / "host"))
    with pytest.raises(KeyError, match="max_seq_length"):
        ServedTexts(tmp_path / "host")


def test_modules_that_a_server_would_leave_out(text_encoder_path: str, tmp_path: Path) -> None:
    encoder = Transformer(text_encoder_path)
    for modules, message in [
        ([encoder, Pooling(64, "max")], "pools by 'max', include_prompt=True, and {} knows 'cls'"),
        ([encoder, Pooling(64, ("cls", "mean"))], "pools by"),
        ([encoder, Pooling(64, "mean", include_prompt=False)], "include_prompt=False"),
        ([encoder, Pooling(64, "mean"), LayerNorm(64)], "computes 'Transformer', 'Pooling', 'LayerNorm', and {} knows"),
        ([encoder, Pooling(64, "mean"), Normalize(), Dense(64, 8)], "in this order"),
        ([encoder, Pooling(64, "mean"), Dense(64, 8, activation_function=nn.ELU())], "ends in ELU.*, and {} knows"),
    ]:
        for target, server in (("vllm", "vLLM"), ("tei", "TEI")):
            with pytest.raises(ConfigError, match=message.format(server)):
                export_model(SentenceTransformer(modules=modules), tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


def test_what_is_written_beside_the_weights(clip_path: str, tmp_path: Path) -> None:
    model = load_model(clip_path)
    model.truncate_dim, model.prompts = 32, {"query": "it's '''this''': "}
    folder = export_model(model, tmp_path / "new" / "out")
    serve = json.loads((folder / "serve.json").read_text())
    assert (serve["truncate_dim"], serve["least_version"]) == (32, "0.30.0")
    assert json.loads((folder / "config.json").read_text())["matryoshka_dimensions"] == [32]
    assert "not run in a server" in serve["verified"]
    assert all("0.33.0" in source for source in serve["read_from"].values())
    readme = (folder / "README.md").read_text()
    assert all(words in readme for words in ("curl", "urllib", "not run in a server", "A page is a part"))
    body = readme.partition("r'''")[2].partition("'''")[0]
    assert json.loads(body) == serve["example"]
    compile(readme.partition("```python\n")[2].partition("```")[0], "readme", "exec")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]


def test_a_trained_folder_is_exported_by_its_path(qwen3_vl_path: str, tmp_path: Path) -> None:
    for name, model in {
        "dense": load_model(qwen3_vl_path),
        "late": build_late_interaction(qwen3_vl_path),
        "reranker": build_reranker(qwen3_vl_path),
    }.items():
        model.save_pretrained(str(tmp_path / name))
        serve = json.loads((export_model(tmp_path / name, tmp_path / f"{name}-out") / "serve.json").read_text())
        assert serve["loads_in_host"] is not isinstance(model, CrossEncoder)


def test_adapters_that_add_nothing_are_refused(clip_path: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load_model(clip_path)
    add_lora(model, True, freeze=(), seed=0)
    with pytest.raises(ConfigError, match=r"the product of all .* is zero, so the model computes what its base does"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "ollama"}, "target='ollama' is unknown. Expected one of 'vllm', 'tei'"),
        ({"target": 3}, "target=3 is unknown"),
        ({"target": "tei"}, r"a SentenceTransformer of the type 'clip', and TEI 1.9.3 embeds texts, by 'bert', "),
        ({"folder": 3}, "folder=3: expected the path of a folder"),
        ({"folder": ""}, "folder='': expected the path"),
        ({"model": 3}, "Expected a model of sentence-transformers, got 3"),
        ({"model": "no/such/model"}, "does not exist"),
    ],
)
def test_wrong_arguments(clip_path: str, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"model": clip_path, "folder": tmp_path / "out", **arguments}
    with pytest.raises(ConfigError, match=message):
        export_model(**given)


def test_a_folder_with_something_in_it_and_unknown_families(clip_path: str, siglip_path: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(clip_path, tmp_path)
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(clip_path, tmp_path / "kept")
    with pytest.raises(ConfigError, match="can't be written to"):
        export_model(clip_path, tmp_path / "kept" / "out")
    with pytest.raises(ConfigError, match=r"type 'siglip' is not known here; known are 'qwen3_vl', 'clip', 'bert'"):
        export_model(siglip_path, tmp_path / "out")
    narrow = tiny_clip(tmp_path / "narrow", projection_dim=32)
    with pytest.raises(ConfigError, match="have 32 numbers and its text encoder has 64"):
        export_model(narrow, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "narrow"]
