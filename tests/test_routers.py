"""compose_router: routes that meet in one dimension, train by one attribute, and load in the plain host."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding
from transformers import (
    AutoTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
)

from families import tiny_raw_siglip
from mmtune.data import RetrievalDataset
from mmtune.errors import ConfigError
from mmtune.host import let_read_typed_texts
from mmtune.models.fresh import fresh_layers, guess_fresh_layers, seeded
from mmtune.models.loading import check_checkpoint, load_model
from mmtune.models.routers import compose_router, router_mapping
from mmtune.models.routes import check_routes, extract_route
from mmtune.testing import generated_pages

PAGE = Image.effect_noise((300, 200), 80).convert("RGB")
TEXTS = ["total revenue of the year", "staff"]
PAIR = {"text": "total revenue", "image": PAGE}


def static_queries(text_encoder_path: str, dimension: int = 32) -> list[torch.nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [StaticEmbedding(AutoTokenizer.from_pretrained(text_encoder_path), embedding_dim=dimension)]


def compose(text, image, **arguments) -> SentenceTransformer:
    return compose_router(text, image, device="cpu", **arguments)


def plain(model: SentenceTransformer, folder: Path) -> SentenceTransformer:
    model.save_pretrained(str(folder))
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def largest_difference(one: SentenceTransformer, other: SentenceTransformer, inputs: list) -> float:
    pairs = [
        (one.encode(inputs), other.encode(inputs)),
        (one.encode_query(inputs), other.encode_query(inputs)),
        (one.encode_document(inputs), other.encode_document(inputs)),
    ]
    return max(float(abs(left - right).max()) for left, right in pairs)


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module")
def metaclip_path(clip_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dual encoder that is not taken apart."""
    folder = tmp_path_factory.mktemp("models") / "metaclip"
    shutil.copytree(clip_path, folder)
    config = json.loads((folder / "config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {name: config[name] for name in ("text_config", "vision_config")}
        for part in parts.values():
            part.pop("model_type")
        model = MetaClip2Model(MetaClip2Config(**parts, projection_dim=config["projection_dim"]))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def naflex_path(siglip_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SigLIP2 whose images keep their shape."""
    folder = tmp_path_factory.mktemp("models") / "naflex"
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 600, "max_position_embeddings": 64, "projection_size": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = Siglip2Config(text_config=text | tokens, vision_config={**size, "num_patches": 64, "patch_size": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Siglip2Model(config).save_pretrained(folder)
    image_processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=64)
    Siglip2Processor(image_processor, AutoTokenizer.from_pretrained(siglip_path)).save_pretrained(folder)
    # this family's tokenizer brings an unknown token
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<unk>"] = 590
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


# what is put together


def test_routes_meet_in_the_dimension_of_the_image_encoder(text_encoder_path, clip_path):
    model = compose(text_encoder_path, clip_path)
    assert model.encode(TEXTS).shape == (2, 128)
    assert model.encode([PAGE]).shape == (1, 128)
    assert list(fresh_layers(model)) == ["0.sub_modules.text.2"]
    assert torch.tensor(model.encode(TEXTS)).norm(dim=1).tolist() == pytest.approx([1, 1])
    assert not model.training


def test_a_dimension_projects_the_sides_that_differ(text_encoder_path, siglip_path, clip_path):
    assert not fresh_layers(compose(text_encoder_path, siglip_path, dimension=64))
    both = compose(text_encoder_path, clip_path, dimension=32)
    assert len(fresh_layers(both)) == 2
    assert both.get_embedding_dimension() == 32


def test_a_projection_keeps_angles_and_is_the_same_in_every_run(text_encoder_path, clip_path):
    state = torch.get_rng_state()
    model = compose(text_encoder_path, clip_path)
    assert torch.equal(torch.get_rng_state(), state)
    again = compose(text_encoder_path, clip_path)
    assert abs(model.encode(TEXTS) - again.encode(TEXTS)).max() == 0
    alone = SentenceTransformer(text_encoder_path, device="cpu")
    assert model.similarity(model.encode(TEXTS), model.encode(TEXTS)).numpy() == pytest.approx(
        alone.similarity(alone.encode(TEXTS), alone.encode(TEXTS)).numpy(), abs=1e-5
    )


def test_says_what_was_added_in_repr_and_card(text_encoder_path, clip_path, tmp_path):
    model = compose(text_encoder_path, clip_path, freeze="text")
    assert "Dense" in repr(model)
    assert "Normalize" in repr(model)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "added projection of the text side: 64 to 128 dimensions" in card
    assert "of it the image tower alone" in card
    assert "frozen: the text encoder" in card


def test_normalises_once(text_encoder_path, siglip_path):
    host = SentenceTransformer(text_encoder_path, device="cpu")
    model = compose([*host, Normalize()], siglip_path)
    assert sum(isinstance(module, Normalize) for module in model.modules()) == 1


def test_adds_the_pooling_that_modules_lack(text_encoder_path, siglip_path):
    model = compose([Transformer(text_encoder_path)], siglip_path)
    (pooling,) = (module for module in model.modules() if isinstance(module, Pooling))
    assert pooling.pooling_mode == "mean"


def test_pools_causal_modules_by_their_last_token(siglip_path, qwen3_vl_path):
    model = compose([Transformer(qwen3_vl_path)], siglip_path)
    (pooling,) = (module for module in model.modules() if isinstance(module, Pooling))
    assert pooling.pooling_mode == "lasttoken"


def test_carries_the_prompts_of_the_text_encoder(text_encoder_path, siglip_path, qwen3_vl_path):
    prompts = {"query": "query: ", "passage": "passage: ", "topic": "topic: "}
    text = SentenceTransformer(text_encoder_path, device="cpu", prompts=prompts)
    by_modality = compose(text, siglip_path)
    expected = text.encode(["query: staff"], prompt="", normalize_embeddings=True)
    assert by_modality.prompts == {"document": "passage: ", **prompts}
    assert abs(by_modality.encode_query(["staff"]) - expected).max() < 1e-6
    by_task = compose(text, siglip_path, route_by="task")
    assert by_task.prompts == {"query": "query: ", "document": ""}
    # a VLM would read the text encoder's prompt for documents with every page
    assert compose(text, qwen3_vl_path).prompts == {"query": "query: ", "document": ""}


# towers


@pytest.mark.parametrize("fixture", ["clip_path", "siglip_path"])
def test_takes_one_tower_of_a_dual_encoder(fixture, text_encoder_path, request, tmp_path):
    path = request.getfixturevalue(fixture)
    whole = SentenceTransformer(path, device="cpu")
    expected_page = whole.encode([PAGE], normalize_embeddings=True)
    expected_texts = whole.encode(TEXTS, normalize_embeddings=True)
    for model in (compose(path, path), plain(compose(path, path), tmp_path / "model")):
        assert abs(model.encode([PAGE]) - expected_page).max() < 1e-6
        assert abs(model.encode(TEXTS) - expected_texts).max() < 1e-6
    image_route = extract_route(compose(text_encoder_path, path), "image")
    assert sum(p.numel() for p in image_route.parameters()) < sum(p.numel() for p in whole[0].model.parameters())
    unnormalised = SentenceTransformer(modules=list(image_route)[:-1], device="cpu")
    assert abs(unnormalised.encode([PAGE]) - whole.encode([PAGE])).max() == 0


def test_takes_the_tower_of_a_siglip2_that_keeps_the_shape_of_images(naflex_path, text_encoder_path, tmp_path):
    whole = SentenceTransformer(naflex_path, device="cpu")
    expected = whole.encode([PAGE], normalize_embeddings=True)
    model = compose(text_encoder_path, naflex_path)
    assert abs(model.encode([PAGE]) - expected).max() < 1e-6
    assert largest_difference(model, plain(model, tmp_path / "model"), [PAGE]) < 1e-6
    small = plain(compose(naflex_path, naflex_path, max_pixels=16 * 16**2), tmp_path / "small")
    assert small.preprocess([PAGE])["pixel_values"].shape[1] == 16
    check_routes(small)


def test_a_tower_loads_where_files_name_the_joint_processor(siglip_path, text_encoder_path, tmp_path):
    folder = tmp_path / "siglip"
    shutil.copytree(siglip_path, folder)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text()) | {"processor_class": "SiglipProcessor"}
            (folder / name).write_text(json.dumps(content))
    model = compose(text_encoder_path, str(folder))
    assert largest_difference(model, plain(model, tmp_path / "model"), [PAGE]) < 1e-6


def test_texts_of_siglip_do_not_depend_on_their_batch(siglip_path, clip_path):
    module = Transformer(siglip_path)
    module.processing_kwargs = {}
    for model in (compose(siglip_path, siglip_path), compose([module], siglip_path)):
        assert abs(model.encode(TEXTS)[1] - model.encode(TEXTS[1:])[0]).max() < 1e-6


@pytest.mark.parametrize("as_modules", [False, True])
def test_texts_of_siglip_train_as_they_are_served(as_modules, clip_path, tmp_path):
    path = tiny_raw_siglip(tmp_path / "siglip")
    model = compose([Transformer(path)] if as_modules else path, clip_path)
    model.save_pretrained(str(tmp_path / "router"))
    loaded = load_model(tmp_path / "router", device="cpu")
    texts = [*TEXTS, "how the profits of the paper division developed over the years", "costs"]
    pages = [Image.effect_noise((64, 64), spread).convert("RGB") for spread in (20, 60, 100, 140)]
    features = [loaded.preprocess(texts, task="query"), loaded.preprocess(pages, task="document")]
    cached = CachedMultipleNegativesRankingLoss(loaded, mini_batch_size=1)
    plain_loss = MultipleNegativesRankingLoss(loaded)
    with torch.no_grad():
        expected = plain_loss([dict(part) for part in features], None).item()
    assert cached([dict(part) for part in features], None).item() == pytest.approx(expected, abs=1e-5)
    for router in (model, loaded):
        alone = np.concatenate([router.encode([text]) for text in texts])
        assert abs(alone - router.encode(texts)).max() < 1e-5


def test_freezes_what_no_route_reaches_in_a_dual_encoder_kept_whole(text_encoder_path, metaclip_path):
    model = compose(text_encoder_path, metaclip_path)
    encoder = model[0].sub_modules["image"][0].model
    trained = {name.partition(".")[0] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"vision_model", "visual_projection"}
    assert any("no route reaches" in note for note in model.model_card_data.composition)


def test_both_sides_have_one_dtype(text_encoder_path, siglip_path, tmp_path):
    static = SentenceTransformer(modules=static_queries(text_encoder_path), device="cpu")
    static.save_pretrained(str(tmp_path / "static"))
    model = compose(str(tmp_path / "static"), siglip_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    check_routes(model)


def test_half_precision_that_the_host_could_not_load_again_is_refused(text_encoder_path, siglip_path, tmp_path):
    with pytest.raises(ConfigError, match=r"layers after its encoder and is in bfloat16.*dtype=\"float32\""):
        compose(text_encoder_path, siglip_path, dimension=32, dtype="bfloat16")
    compose(text_encoder_path, siglip_path, dimension=32).save_pretrained(str(tmp_path / "router"))
    # for inference alone, in memory, the layers follow their encoder
    model = load_model(tmp_path / "router", dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.encode_query(TEXTS).shape == (2, 32)


def test_a_router_is_loaded_in_float32_where_a_gpu_computes_in_bfloat16(
    text_encoder_path, siglip_path, tmp_path, monkeypatch
):
    compose(text_encoder_path, siglip_path, dimension=32).save_pretrained(str(tmp_path / "router"))
    monkeypatch.setattr("mmtune.models.opening._target_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert load_model(tmp_path / "router", device="cpu").dtype == torch.float32
    assert load_model(siglip_path, device="cpu").dtype == torch.bfloat16


def test_a_projection_is_fresh_until_it_was_trained_also_after_loading(text_encoder_path, siglip_path, tmp_path):
    compose(text_encoder_path, siglip_path, dimension=32).save_pretrained(str(tmp_path / "router"))
    loaded = SentenceTransformer(str(tmp_path / "router"), device="cpu")
    assert fresh_layers(loaded) == {}
    assert len(guess_fresh_layers(loaded)) == 2
    assert len(fresh_layers(loaded)) == 2
    trained = SentenceTransformer(str(tmp_path / "router"), device="cpu")
    for module in trained.modules():
        if isinstance(module, Dense):
            module.linear.weight.data += 1e-3
    guess_fresh_layers(trained)
    assert fresh_layers(trained) == {}


def test_the_layers_of_a_router_put_together_by_hand_are_found(text_encoder_path, siglip_path, caplog):
    with seeded(0):
        text = [Transformer(text_encoder_path), Pooling(64), Dense(64, 96), Dense(96, 48, bias=False)]
        routes = {"text": text, "image": [Transformer(siglip_path), Dense(64, 48)]}
    mappings = {(None, "text"): "text", (None, "image"): "image"}
    model = SentenceTransformer(modules=[Router(routes, route_mappings=mappings), Normalize()], device="cpu")
    found = ("0.sub_modules.text.2", "0.sub_modules.text.3", "0.sub_modules.image.1")
    assert guess_fresh_layers(model) == found
    assert all(f"{name!r} is taken for fresh" in caplog.text for name in found)
    for layer in fresh_layers(model).values():
        layer.linear.weight.data += 2e-2 * torch.randn_like(layer.linear.weight)
    assert guess_fresh_layers(model) == ()
    assert fresh_layers(model) == {}


def test_every_trained_parameter_of_a_tower_gets_a_gradient(text_encoder_path, siglip_path):
    model = compose(siglip_path, siglip_path)
    for inputs in (TEXTS, [PAGE]):
        model(model.preprocess(inputs))["sentence_embedding"].pow(3).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# routes


def test_by_task_documents_go_to_the_image_encoder(text_encoder_path, qwen3_vl_path):
    model = compose(text_encoder_path, qwen3_vl_path, route_by="task")
    vlm = SentenceTransformer(qwen3_vl_path, device="cpu")
    vlm[1].pooling_mode = "lasttoken"
    for document in ("staff", PAGE, PAIR):
        expected = vlm.encode([document], normalize_embeddings=True)
        assert abs(model.encode_document([document]) - expected).max() < 1e-6
    queries = SentenceTransformer(text_encoder_path, device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert abs(model.encode_query(TEXTS) - queries).max() < 1e-6
    assert abs(model.encode(TEXTS) - queries).max() < 1e-6
    assert abs(model.encode([PAGE]) - model.encode_document([PAGE])).max() == 0


def test_by_modality_a_vlm_takes_text_with_image(text_encoder_path, qwen3_vl_path):
    model = compose(text_encoder_path, qwen3_vl_path)
    vlm = SentenceTransformer(qwen3_vl_path, device="cpu")
    vlm[1].pooling_mode = "lasttoken"
    assert abs(model.encode([PAIR]) - vlm.encode([PAIR], normalize_embeddings=True)).max() < 1e-6
    texts = SentenceTransformer(text_encoder_path, device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert abs(model.encode_document(TEXTS) - texts).max() < 1e-6
    for documents in ("image", "text", "text+image"):
        check_routes(model, documents)


def test_lists_of_mixed_modalities_are_refused_by_the_host(text_encoder_path, siglip_path, qwen3_vl_path):
    with pytest.raises(ValueError, match="mixes multiple modalities"):
        compose(text_encoder_path, siglip_path).encode(["staff", PAGE])
    with pytest.raises(ValueError, match="Could not determine route"):
        compose(text_encoder_path, qwen3_vl_path).encode(["staff", PAGE])


COMBINATIONS = [
    ("text_encoder_path", "siglip_path", {}),
    ("text_encoder_path", "clip_path", {"dimension": 32}),
    ("text_encoder_path", "metaclip_path", {}),
    ("siglip_path", "qwen3_vl_path", {}),
    ("clip_path", "clip_path", {}),
    ("text_encoder_path", "siglip_path", {"route_by": "task"}),
    ("text_encoder_path", "qwen3_vl_path", {"route_by": "task", "dimension": 96}),
    ("static", "qwen3_vl_path", {"route_by": "task"}),
    ("static", "clip_path", {}),
]


@pytest.mark.parametrize(("text", "image", "arguments"), COMBINATIONS)
def test_loads_in_the_plain_host(text, image, arguments, request, tmp_path):
    text_encoder_path = request.getfixturevalue("text_encoder_path")
    side = static_queries(text_encoder_path) if text == "static" else request.getfixturevalue(text)
    model = compose(side, request.getfixturevalue(image), **arguments)
    loaded = plain(model, tmp_path / "model")
    for inputs in (TEXTS, [PAGE], *([[PAIR]] if image == "qwen3_vl_path" else [])):
        assert largest_difference(model, loaded, inputs) < 1e-6
    check_routes(loaded)
    check_checkpoint(tmp_path / "model")


def test_pixel_limits_hold_inside_the_router_and_after_reloading(text_encoder_path, qwen3_vl_path, tmp_path):
    large = compose(text_encoder_path, qwen3_vl_path)
    small = compose(text_encoder_path, qwen3_vl_path, max_pixels=64 * 64)
    of_modules = compose(text_encoder_path, [Transformer(qwen3_vl_path)], max_pixels=64 * 64)
    patch = 16**2

    def pixels(model):
        features = model.preprocess([PAGE], task="document")
        assert len(features["pixel_values"]) == int(features["image_grid_thw"].prod())
        return len(features["pixel_values"]) * patch

    assert 64 * 64 < pixels(large) <= 128 * 128
    for model in (small, plain(small, tmp_path / "model"), of_modules):
        assert pixels(model) <= 64 * 64


# training


@pytest.fixture(scope="module")
def rows():
    return RetrievalDataset.from_id_rows(generated_pages(16)).training_rows(2)


def train(model: SentenceTransformer, rows, folder: Path, loss: torch.nn.Module | None = None, **arguments) -> None:
    args = SentenceTransformerTrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        **{"router_mapping": model.router_mapping, **arguments},
    )  # fmt: skip
    loss = loss or CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    SentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss).train()


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("frozen", ["text", "image"])
def test_trains_in_the_plain_host(frozen, matryoshka, text_encoder_path, clip_path, rows, tmp_path):
    model = compose(text_encoder_path, clip_path, freeze=frozen, dimension=64 if frozen == "image" else None)
    routes = model[0].sub_modules
    before = {name: parameters(route) for name, route in routes.items()}
    cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    train(model, rows, tmp_path, MatryoshkaLoss(model, cached, [64, 32]) if matryoshka else cached)
    projections = {f"{name.split('.')[-1]}.linear" for name in fresh_layers(model)}
    for side, route in routes.items():
        after = parameters(route)
        changed = {name for name in after if not torch.equal(after[name], before[side][name])}
        if side == frozen:
            assert {name.rpartition(".")[0] for name in changed} <= projections
        else:
            assert changed


def test_trains_by_task_with_static_queries(text_encoder_path, siglip_path, rows, tmp_path):
    model = compose(static_queries(text_encoder_path), siglip_path, route_by="task")
    before = parameters(model)
    # the host's cached losses refuse static embeddings
    train(model, rows, tmp_path, MultipleNegativesRankingLoss(model))
    after = parameters(model)
    assert not torch.equal(*(side["0.sub_modules.text.0.embedding.weight"] for side in (before, after)))


def test_columns_without_a_task_go_by_their_modality(text_encoder_path, siglip_path, rows, tmp_path):
    weights = []
    for mapping in ({"query": "query", "image": "document"}, router_mapping(["query", "image", "negative_0"])):
        model = compose(text_encoder_path, siglip_path)
        train(model, rows, tmp_path, router_mapping=mapping)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_the_mapping_names_queries_and_documents(text_encoder_path, siglip_path):
    model = compose(text_encoder_path, siglip_path)
    assert list(model.router_mapping) == ["query", "image", *(f"negative_{k}" for k in range(16))]
    assert model.router_mapping["query"] == "query"
    assert set(model.router_mapping.values()) == {"query", "document"}
    assert router_mapping(["question", "page"]) == {"question": "query", "page": "document"}


# one route alone


@pytest.mark.parametrize("route", ["text", "image"])
def test_a_route_alone_embeds_as_in_the_router(route, text_encoder_path, clip_path, tmp_path):
    prompts = {"query": "query: "}
    model = compose(SentenceTransformer(text_encoder_path, device="cpu", prompts=prompts), clip_path)
    inputs = TEXTS if route == "text" else [PAGE]
    extracted = extract_route(model, route)
    loaded = plain(extracted, tmp_path / "route")
    for alone in (extracted, loaded):
        assert largest_difference(model, alone, inputs) < 1e-6
    assert not any(isinstance(module, Router) for module in loaded.modules())
    assert loaded.prompts["query"] == "query: "


def test_an_unknown_route_is_refused_with_those_there_are(text_encoder_path, siglip_path):
    model = compose(text_encoder_path, siglip_path)
    with pytest.raises(ConfigError, match=r"no route 'query'\. The routes are 'text' \(takes text; 64 dim"):
        extract_route(model, "query")
    with pytest.raises(ConfigError, match="has no Router, only Transformer"):
        extract_route(SentenceTransformer(siglip_path, device="cpu"))


# checks before training


def own_router(text_path: str, image_path: str, **arguments) -> SentenceTransformer:
    text, image = (SentenceTransformer(path, device="cpu") for path in (text_path, image_path))
    return SentenceTransformer(modules=[Router({"text": list(text), "image": list(image)}, **arguments)], device="cpu")


def test_a_router_of_ones_own_passes_where_its_routes_meet(text_encoder_path, siglip_path):
    model = own_router(text_encoder_path, siglip_path).train()
    state = torch.get_rng_state()
    check_routes(model)
    check_routes(SentenceTransformer(text_encoder_path, device="cpu"), "image")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_routes_that_end_apart_are_refused(text_encoder_path, clip_path):
    model = own_router(text_encoder_path, clip_path)
    with pytest.raises(ConfigError, match="different dimensions: text queries in 64, image documents in 128"):
        check_routes(model)


@pytest.mark.parametrize("image", ["siglip_path", "qwen3_vl_path"])
def test_text_with_image_is_refused_where_no_route_takes_it(image, text_encoder_path, request):
    model = own_router(text_encoder_path, request.getfixturevalue(image))
    with pytest.raises(ConfigError, match=r"can't embed text\+image documents.*'image' \(takes text, image"):
        check_routes(model, "text+image")


def test_a_missing_route_is_refused(text_encoder_path):
    text = list(SentenceTransformer(text_encoder_path, device="cpu"))
    model = SentenceTransformer(modules=[Router.for_query_document(text, text)], device="cpu")
    with pytest.raises(ConfigError, match=r"can't embed image documents.*'query' \(takes text; 64.*task 'document'"):
        check_routes(model)
    strange = SentenceTransformer(modules=[Router({"left": text, "right": text})], device="cpu")
    with pytest.raises(ConfigError, match=r"can't embed text queries.*'left' \(takes text"):
        check_routes(strange, "text")


def test_static_queries_read_typed_texts_and_open_no_file(text_encoder_path, siglip_path):
    model = compose(static_queries(text_encoder_path), siglip_path)
    plain = model.encode_query(["revenue"])
    let_read_typed_texts(model)
    assert (model.encode_query([{"text": "revenue"}]) == plain).all()
    assert (model.encode_query(["revenue"]) == plain).all()
    features = model.preprocess([{"text": "https://example.org/chart.png"}], task="query")
    assert "pixel_values" not in features


# what is refused


def test_freezing_everything_is_refused_where_no_projection_learns(text_encoder_path, siglip_path):
    with pytest.raises(ConfigError, match="leaves nothing to train: both encoders end in 64 dimensions"):
        compose(text_encoder_path, siglip_path, freeze=("text", "image"))
    model = compose(text_encoder_path, siglip_path, freeze=("text", "image"), dimension=32)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.rpartition(".linear")[0] for name in trained}
    assert layers == set(fresh_layers(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": "vision"}, "freeze names 'vision'.*'text' and 'image'"),
        ({"route_by": "language"}, "route_by='language' is unknown"),
        ({"dimension": 0}, "dimension=0 is no size"),
        ({"dimension": True}, "dimension=True is no size"),
        ({"text": []}, r"text=\[\] is no encoder"),
        ({"image": 3}, "image=3 is no encoder"),
        ({"image": "no such folder/model"}, "does not exist"),
    ],
)
def test_arguments_that_can_not_be_are_refused(arguments, message, text_encoder_path, siglip_path):
    sides = {"text": text_encoder_path, "image": siglip_path}
    with pytest.raises(ConfigError, match=message):
        compose(**{**sides, **arguments})


def test_an_encoder_of_another_modality_is_refused(text_encoder_path, siglip_path):
    with pytest.raises(ConfigError, match="embeds no images"):
        compose(text_encoder_path, text_encoder_path)
    text = list(SentenceTransformer(text_encoder_path, device="cpu"))
    with pytest.raises(ConfigError, match=r"The image side can't embed image.*Transformer, Pooling"):
        compose(text_encoder_path, text)
    with pytest.raises(ConfigError, match="has a Router of its own"):
        compose(text_encoder_path, compose(text_encoder_path, siglip_path))


def test_a_route_that_reads_only_tokens_is_pooled_before_its_projection(text_encoder_path, clip_path):
    model = compose([Transformer(text_encoder_path)], clip_path)
    kinds = [type(module) for module in model[0].sub_modules["text"]]
    assert kinds == [Transformer, Pooling, Dense]
