"""The parts of a model: found in every family, frozen to the bit, and refused where a model lacks them."""

from functools import partial

import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Module, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    Idefics3Config,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmtune.errors import ConfigError
from mmtune.models import build_late_interaction, build_reranker, load_model
from mmtune.models.parts import describe_training, encoder_parts, freeze_parts, model_parts, parts_named
from mmtune.models.routes import freeze_unreached
from mmtune.testing import tiny_clap, tiny_llava
from mmtune.training.run import ready_model
from mmtune.training.trainers import EMBEDDING, RERANKING

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
SIGLIP_VISION = {"model_type": "siglip_vision_model", **SMALL}
SMALL_QWEN_VISION = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 1, "intermediate_size": 32}


class OnlyModel(Transformer):
    """The host's module around a random model, without a processor."""

    def __init__(self, model, modality_config):
        nn.Module.__init__(self)
        self.model, self.modality_config = model, modality_config


def joint(model):
    return OnlyModel(model, {key: {"method": "forward"} for key in ("text", "image")})


def names(model: nn.Module, parameters) -> set[str]:
    """The first two words of the parameters' names."""
    chosen = {id(parameter) for parameter in parameters}
    return {".".join(name.split(".")[:2]) for name, value in model.named_parameters() if id(value) in chosen}


def clip(path):
    return SentenceTransformer(path, device="cpu")


def router(text_path, image_path):
    text, image = Transformer(text_path), Transformer(image_path)
    routes = {"text": [text, Pooling(64), Dense(64, 128)], "image": [image]}
    return SentenceTransformer(
        modules=[Router(routes, route_mappings={(None, "text"): "text", (None, "image"): "image"})], device="cpu"
    )


# found by structure


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            LlavaConfig(vision_config=SIGLIP_VISION, text_config={"model_type": "llama", "vocab_size": 8, **SMALL}),
            {
                "vision": {"vision_tower.embeddings", "vision_tower.encoder", "vision_tower.post_layernorm"}
                | {"vision_tower.head"},
                "connector": {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"},
                "language": {"language_model.embed_tokens", "language_model.layers", "language_model.norm"},
            },
        ),
        (
            LlavaNextConfig(vision_config=SIGLIP_VISION, text_config={"model_type": "llama", "vocab_size": 8, **SMALL}),
            {"connector": {"image_newline", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}},
        ),
        (
            Idefics3Config(vision_config=SMALL, text_config={"model_type": "llama", "vocab_size": 8, **SMALL}),
            {
                "vision": {"vision_model.embeddings", "vision_model.encoder", "vision_model.post_layernorm"},
                "connector": {"connector.modality_projection"},
                "language": {"text_model.embed_tokens", "text_model.layers", "text_model.norm"},
            },
        ),
        (
            Qwen2VLConfig(vision_config=SMALL_QWEN_VISION, text_config={"vocab_size": 8, **SMALL}),
            {"vision": {"visual.patch_embed", "visual.blocks"}, "connector": {"visual.merger"}},
        ),
        (
            Qwen2_5_VLConfig(vision_config=SMALL_QWEN_VISION, text_config={"vocab_size": 8, **SMALL}),
            {"vision": {"visual.patch_embed", "visual.blocks"}, "connector": {"visual.merger"}},
        ),
    ],
    ids=["llava", "llava-next", "idefics3", "qwen2-vl", "qwen2.5-vl"],
)
def test_vlms_are_told_apart(config: PreTrainedConfig, expected):
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    parts = encoder_parts(joint(model))
    assert sorted(parts) == ["connector", "language", "vision"]
    assert {name: names(model, parts[name]) for name in expected} == expected
    assert sum(map(len, parts.values())) == len(list(model.parameters())), "each parameter in one part"


def test_qwen3_vl_keeps_its_mergers_out_of_the_tower(qwen3_vl_path):
    model = SentenceTransformer(qwen3_vl_path, device="cpu")
    parts = model_parts(model)
    inner = model[0].model
    assert sorted(parts) == ["connector", "language", "vision"]
    assert names(inner, parts["connector"]) == {"visual.merger", "visual.deepstack_merger_list"}
    assert names(inner, parts["vision"]) == {"visual.patch_embed", "visual.pos_embed", "visual.blocks"}


def test_clip_has_towers_and_projections(clip_path):
    parts = model_parts(clip(clip_path))
    assert sorted(parts) == ["projection", "text", "vision"]
    assert len(parts["projection"]) == 2


def test_siglip_has_towers_alone(siglip_path):
    model = SentenceTransformer(siglip_path, device="cpu")
    parts = model_parts(model)
    assert sorted(parts) == ["text", "vision"]
    without_part = {name for name, value in model.named_parameters() if id(value) not in ids(parts)}
    assert {name.rpartition(".")[2] for name in without_part} == {"logit_scale", "logit_bias"}


def ids(parts):
    return {id(parameter) for part in parts.values() for parameter in part}


def test_clap_has_an_encoder_of_sounds_of_its_own(tmp_path):
    model = load_model(tiny_clap(tmp_path / "clap"), device="cpu")
    assert list(model_parts(model)) == ["audio", "text", "projection"]
    freeze_parts(model, ("audio",))
    assert describe_training(model)["frozen_parts"] == ["audio"]


def test_encoders_for_one_modality(text_encoder_path):
    assert list(model_parts(SentenceTransformer(text_encoder_path, device="cpu"))) == ["text"]
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(**SMALL))
    assert list(encoder_parts(OnlyModel(tower, {"image": {"method": "forward"}}))) == ["vision"]


def test_score_heads_and_dense_modules_are_projections(text_encoder_path, qwen3_vl_path):
    reranker = CrossEncoder(text_encoder_path, device="cpu")
    assert sorted(model_parts(reranker)) == ["projection", "text"]
    assert names(reranker[0].model, model_parts(reranker)["projection"]) == {"classifier.weight", "classifier.bias"}
    late = MultiVectorEncoder(qwen3_vl_path, device="cpu")
    assert sorted(model_parts(late)) == ["connector", "language", "projection", "vision"]


def test_an_output_layer_belongs_to_the_language_model(qwen3_vl_path):
    module = Transformer(qwen3_vl_path, transformer_task="any-to-any")
    untied = nn.Linear(64, module.model.lm_head.out_features, bias=False)
    module.model.set_output_embeddings(untied)
    assert any(untied.weight is parameter for parameter in encoder_parts(module)["language"])


def test_routes_give_their_names(text_encoder_path, siglip_path, clip_path):
    assert sorted(model_parts(router(text_encoder_path, siglip_path))) == ["image", "projection", "text"]
    parts = model_parts(router(text_encoder_path, clip_path))
    # the Dense module with its bias, and CLIP's own two projections
    assert len(parts["projection"]) == 4
    assert not ids({"projection": parts["projection"]}) & ids({"text": parts["text"], "image": parts["image"]})


def test_a_vlm_in_a_route_has_parts_of_its_own(text_encoder_path, qwen3_vl_path):
    parts = model_parts(router(text_encoder_path, qwen3_vl_path))
    assert sorted(parts) == ["connector", "image", "language", "projection", "text", "vision"]
    inner = [*parts["vision"], *parts["connector"], *parts["language"]]
    assert {id(parameter) for parameter in inner} == {id(parameter) for parameter in parts["image"]}


def test_an_encoder_that_routes_share_has_the_parts_it_has_alone(clip_path):
    shared = Transformer(clip_path)
    mappings = {(None, "text"): "text", (None, "image"): "image"}
    model = SentenceTransformer(modules=[Router({"text": [shared], "image": [shared]}, route_mappings=mappings)])
    assert {name: len(part) for name, part in model_parts(model).items()} == {
        name: len(part) for name, part in model_parts(clip(clip_path)).items()
    }


# freezing


def test_frozen_parts_stay_to_the_bit_and_the_rest_learns(clip_path):
    model = clip(clip_path)
    freeze_parts(model, ("vision", "projection"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = ids(parts_named(model, ("vision", "projection")))
    frozen_names = {name for name, value in model.named_parameters() if id(value) in frozen}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    features = model.preprocess(["total revenue in 2021"])
    model(features)["sentence_embedding"].square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not changed & frozen_names
    assert all("text_model" in name or "logit" in name for name in changed)


@pytest.mark.parametrize(("name", "meant"), [("image", "vision"), ("language", "text"), ("text", "text")])
def test_names_that_mean_the_same(clip_path, name, meant):
    model = clip(clip_path)
    freeze_parts(model, (name,))
    assert describe_training(model)["frozen_parts"] == [meant]


def test_text_means_the_language_model_of_a_vlm(qwen3_vl_path):
    model = SentenceTransformer(qwen3_vl_path, device="cpu")
    freeze_parts(model, ["text"])
    assert describe_training(model)["frozen_parts"] == ["language"]


def test_tied_weights_are_frozen_once_and_together(qwen3_vl_path):
    module = Transformer(qwen3_vl_path, transformer_task="any-to-any")
    assert module.model.lm_head.weight is module.model.get_input_embeddings().weight
    parts = encoder_parts(module)
    assert sum(map(len, parts.values())) == len(list(module.model.parameters()))


def test_what_is_trained_is_told(clip_path):
    model = clip(clip_path)
    whole = describe_training(model)
    assert whole["trained_share"] == 1.0
    assert whole["frozen_parts"] == []
    freeze_parts(model, ("vision", "text"))
    facts = describe_training(model)
    assert facts["trained_parts"] == ["projection"]
    assert facts["trained_parameters"] == 2 * 64 * 128 + 1  # and the temperature
    assert facts["trained_share"] == facts["trained_parameters"] / whole["trained_parameters"]


@pytest.mark.parametrize("nothing", [(), None])
def test_nothing_to_freeze_changes_nothing(clip_path, nothing):
    model = clip(clip_path)
    freeze_parts(model, nothing)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Normalized(Module):
    """An encoder with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, features):
        return {"sentence_embedding": self.norm(features["values"])}

    def save(self, output_path, *args, **kwargs): ...


def test_frozen_batch_normalisation_keeps_its_statistics():
    model = SentenceTransformer(modules=[Normalized(), Dense(4, 2)], device="cpu")
    features = {"values": torch.arange(8.0).reshape(2, 4)}
    model.train()
    model(dict(features))
    before = [value.clone() for value in model[0].norm.buffers()]
    freeze_parts(model, ("text",))
    model.train()
    model(dict(features))
    assert all(torch.equal(now, then) for now, then in zip(model[0].norm.buffers(), before, strict=True))
    model.requires_grad_(True)
    model.train()
    model(dict(features))
    assert not torch.equal(next(model[0].norm.buffers()), before[0]), "what learns again keeps statistics again"


def test_freezing_again_holds_statistics_once():
    model = SentenceTransformer(modules=[Normalized(), Dense(4, 2)], device="cpu")
    for _ in range(3):
        freeze_parts(model, ("text",))
    assert len(model[0].norm._forward_pre_hooks) == 1


# refused


def test_a_part_that_the_model_lacks_is_refused(clip_path):
    with pytest.raises(ConfigError, match=r"no part 'connector'.*'vision', 'text', 'projection'"):
        freeze_parts(clip(clip_path), ("vision", "connector"))


def test_a_refused_freeze_leaves_the_model_as_it_was(clip_path):
    model = clip(clip_path)
    with pytest.raises(ConfigError, match="no part 'tower'"):
        freeze_parts(model, ("vision", "tower"))
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze_parts(model, ("vision", "text", "projection"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_string_is_refused_with_the_right_spelling(clip_path):
    with pytest.raises(ConfigError, match=r'pass freeze=\("vision",\)'):
        freeze_parts(clip(clip_path), "vision")


def test_what_is_no_series_of_names_is_refused(clip_path):
    with pytest.raises(ConfigError, match="freeze=3 names no parts"):
        freeze_parts(clip(clip_path), 3)


def test_names_may_come_one_by_one(clip_path):
    model = clip(clip_path)
    freeze_parts(model, (name for name in ["vision"]))
    assert describe_training(model)["frozen_parts"] == ["vision"]


@pytest.mark.parametrize("name", [None, 3])
def test_names_are_strings(clip_path, name):
    with pytest.raises(ConfigError, match=f"no part {name}"):
        freeze_parts(clip(clip_path), (name,))


def test_dual_encoders_of_the_family_are_told_apart():
    with torch.device("meta"):
        model = AutoModel.from_config(
            CLIPConfig(text_config={"vocab_size": 8, **SMALL}, vision_config={"image_size": 32, **SMALL})
        )
    methods = {"text": {"method": "get_text_features"}, "image": {"method": "get_image_features"}}
    for used in (["text", "image"], ["text"], ["image"]):
        module = OnlyModel(model, {key: methods[key] for key in used})
        assert sorted(encoder_parts(module)) == ["projection", "text", "vision"]


# out of reach


BEHIND = "vision_tower.encoder.layers.1"


@pytest.mark.parametrize(
    ("load", "path", "documents", "expected"),
    [
        (load_model, "clip_path", "image", {"logit_scale"}),
        (load_model, "siglip_path", "image", {"logit_scale", "logit_bias"}),
        (load_model, "qwen3_vl_path", "image", set()),
        (load_model, "qwen3_vl_path", "text", {"visual"}),
        (load_model, "llava_path", "image", {BEHIND, "vision_tower.post_layernorm"}),
        (build_late_interaction, "qwen3_vl_path", "text+image", set()),
        (build_late_interaction, "llava_path", "image", {BEHIND, "vision_tower.post_layernorm"}),
        (build_reranker, "llava_path", "image", {BEHIND, "vision_tower.post_layernorm"}),
        (partial(build_reranker, head="dense"), "llava_path", "image", {BEHIND, "vision_tower.post_layernorm"}),
        (partial(build_reranker, head="dense"), "qwen3_vl_path", "text", {"visual"}),
    ],
)
def test_what_nothing_reaches_is_frozen(load, path, documents, expected, request):
    model = load(request.getfixturevalue(path), device="cpu")
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    random_state = torch.get_rng_state()
    freeze_unreached(model, documents)
    assert torch.equal(torch.get_rng_state(), random_state)
    frozen = before - {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(f".{part}" in name for part in expected) for name in frozen)
    assert all(any(f".{part}" in name for name in frozen) for part in expected)


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_what_a_run_does_not_reach_learns_again_after_it(kind, llava_path):
    load = {"embedding": load_model, "reranker": build_reranker}[kind]
    model = load(llava_path, device="cpu")
    learned = [parameter.requires_grad for parameter in model.parameters()]
    chosen = {"embedding": EMBEDDING, "reranker": RERANKING}[kind]
    with ready_model(model, chosen, documents="image", freeze=(), lora=None, seed=0):
        assert any(f".{BEHIND}" in name and not p.requires_grad for name, p in model.named_parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == learned


@pytest.fixture(scope="module")
def llava_path(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("models") / "llava")
