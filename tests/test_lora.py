"""LoRA on every kind of host model: where adapters go, that they save, load, resume and merge, and what is refused."""

import copy
import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import (
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from transformers import AutoTokenizer

from mmtune.errors import ConfigError, MissingExtraError
from mmtune.models.adapters import has_lora, load_adapters, merge_lora, save_model
from mmtune.models.lora import add_lora, check_lora
from mmtune.models.parts import describe_training, freeze_parts, model_parts
from mmtune.testing import tiny_clip

peft = pytest.importorskip("peft")

PAGES = [Image.effect_noise((64, 64), sigma).convert("RGB") for sigma in (20, 90)]
TEXTS = ["total revenue in 2021", "number of employees"]
KINDS = ["clip", "siglip", "text", "qwen", "router", "late"]


def load(path, model_class=SentenceTransformer):
    return model_class(str(path), device="cpu")


def router(text_path, image_path):
    torch.manual_seed(0)
    text, image = Transformer(text_path), Transformer(image_path)
    routes = {"text": [text, Pooling(64), Dense(64, 128)], "image": [image]}
    mappings = {(None, "text"): "text", (None, "image"): "image"}
    return SentenceTransformer(modules=[Router(routes, route_mappings=mappings)], device="cpu")


@pytest.fixture
def build(request):
    """Builds a model of a kind by its name."""

    def built(kind):
        if kind == "router":
            return router(request.getfixturevalue("text_encoder_path"), request.getfixturevalue("clip_path"))
        paths = {"text": "text_encoder_path", "qwen": "qwen3_vl_path", "late": "qwen3_vl_path"}
        path = request.getfixturevalue(paths.get(kind, f"{kind}_path"))
        return load(path, MultiVectorEncoder if kind == "late" else SentenceTransformer)

    return built


def embeddings(model) -> np.ndarray:
    """Embeddings of texts and pages in one row, each of length 1."""
    inputs = [TEXTS] if "image" not in model.modalities else [TEXTS, PAGES]
    rows = [np.asarray(row, dtype="float32") for batch in inputs for row in model.encode(batch)]
    return np.concatenate([(row / np.linalg.norm(row, axis=-1, keepdims=True)).ravel() for row in rows])


def learned(model):
    """The same model after an update that moves all it trains, adapters that started at zero among it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapter_names(model) -> set[str]:
    return {name.rpartition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# where adapters go, and what is trained


def test_a_vlm_gets_them_in_its_language_model(build):
    model = build("qwen")
    facts = add_lora(model, True)
    assert all(".language_model." in name for name in adapter_names(model))
    assert facts["layers"] == 2 * 7
    assert facts["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert all(".lora_" in name for name in trained_names(model))
    told = describe_training(model)
    assert told["frozen_parts"] == ["connector", "vision"]
    assert told["trained_parameters"] == facts["parameters"]


@pytest.mark.parametrize(("kind", "layers"), [("clip", 24), ("siglip", 27), ("text", 13)])
def test_encoders_get_them_in_every_tower(build, kind, layers):
    model = build(kind)
    assert add_lora(model, True)["layers"] == layers
    assert all(".lora_" in name for name in trained_names(model))
    assert not any("projection" in name for name in adapter_names(model))


def test_layers_that_are_never_called_get_none(build):
    model = build("siglip")
    add_lora(model, True)
    assert not any("head.attention" in name for name in adapter_names(model))
    assert any("head.mlp" in name for name in adapter_names(model))


def test_the_unused_side_of_a_dual_encoder_gets_none(build):
    model = build("siglip")
    model[0].modality_config = {"text": model[0].modality_config["text"]}
    add_lora(model, True)
    assert all("text_model" in name for name in adapter_names(model))


def test_a_router_gets_them_in_every_encoder_and_keeps_training_its_projection(build):
    model = build("router")
    add_lora(model, True)
    assert {name.split(".")[2] for name in adapter_names(model)} == {"text", "image"}
    whole = {name for name in trained_names(model) if ".lora_" not in name}
    assert len(whole) == 2
    assert all(".text.2.linear." in name for name in whole)


def test_a_fresh_projection_of_late_interaction_is_trained(build):
    model = build("late")
    add_lora(model, True)
    assert {name for name in trained_names(model) if ".lora_" not in name} == {"1.linear.weight"}


@pytest.mark.parametrize(("kind", "part", "left"), [("clip", "vision", "text_model"), ("router", "image", ".text.")])
def test_frozen_parts_get_none(build, kind, part, left):
    model = build(kind)
    freeze_parts(model, (part,))
    add_lora(model, True, freeze=(part,))
    assert all(left in name for name in adapter_names(model))
    assert part in describe_training(model)["frozen_parts"]


def test_many_layers_of_one_tower_are_still_that_tower_alone(tmp_path):
    """peft shortens a list of twenty names to the ends by which it can tell them apart."""
    model = load(tiny_clip(tmp_path / "deep", num_layers=4))
    add_lora(model, True, freeze=("vision",))
    assert len(adapter_names(model)) == 24
    assert all("text_model" in name for name in adapter_names(model))
    expected = embeddings(learned(model))
    save_model(model, tmp_path / "saved")
    assert abs(embeddings(load(tmp_path / "saved")) - expected).max() < 1e-6


def test_a_tower_that_is_frozen_already_gets_none_unless_everything_is(build):
    model, frozen = build("clip"), build("clip")
    model[0].model.vision_model.requires_grad_(False)
    assert add_lora(model, True)["layers"] == 12
    assert all("text_model" in name for name in adapter_names(model))
    frozen.requires_grad_(False)
    assert add_lora(frozen, True)["layers"] == 24


def test_a_part_that_can_not_carry_adapters_stays_trainable(text_encoder_path, clip_path):
    static = StaticEmbedding(AutoTokenizer.from_pretrained(text_encoder_path), embedding_dim=128)

    def mixed(*, trains_images):
        routes = {"text": [static], "image": [Transformer(clip_path).requires_grad_(trains_images)]}
        mappings = {(None, "text"): "text", (None, "image"): "image"}
        return SentenceTransformer(modules=[Router(routes, route_mappings=mappings)], device="cpu")

    model = mixed(trains_images=True)
    add_lora(model, True)
    assert static.embedding.weight.requires_grad
    assert all(".image." in name for name in adapter_names(model))
    with pytest.raises(ConfigError, match="all layers that would get adapters are in frozen parts"):
        add_lora(mixed(trains_images=False), True)


def test_a_config_is_taken_as_it_stands(build):
    model = build("qwen")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["merger"])
    given = copy.deepcopy(config)
    facts = add_lora(model, config)
    assert (facts["rank"], facts["targets"]) == (2, ["qkv"])
    assert any("modules_to_save" in name for name in trained_names(model))
    assert config == given, "the caller's config is not written to"


def test_a_config_without_targets_gets_the_language_model(build):
    model = build("qwen")
    facts = add_lora(model, peft.LoraConfig(r=2, lora_dropout=0.1))
    assert (facts["layers"], facts["rank"], facts["dropout"]) == (14, 2, 0.1)


def test_a_config_may_fit_one_encoder_of_a_router_alone(build):
    model = build("router")
    add_lora(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(".image." in name for name in adapter_names(model))
    assert describe_training(model)["frozen_parts"] == ["text"]
    embeddings(model)


def test_at_first_the_model_embeds_as_before(build):
    model = build("clip")
    before = embeddings(model)
    add_lora(model, True)
    assert abs(embeddings(model) - before).max() == 0


def test_first_weights_depend_on_the_seed_alone(build):
    state = torch.get_rng_state()
    first, same, other = (build("clip") for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        torch.randn(3)
        torch.set_rng_state(state)
        add_lora(model, True, seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left as it was"
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_gradients_are_the_same_with_checkpointing(build):
    gradients = []
    for checkpoints in (False, True):
        # also in the vision tower, whose input takes no gradient
        model = learned(with_adapters(build("qwen"), peft.LoraConfig(r=2, target_modules=["qkv", "q_proj"])))
        model.train()
        if checkpoints:
            with warnings.catch_warnings():
                # the host calls a name of transformers that is deprecated since 5.23
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        model(model.preprocess(PAGES))["sentence_embedding"].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def with_adapters(model, lora=True):
    add_lora(model, lora)
    return model


def learned_adapters(model):
    return learned(with_adapters(model))


# saving, loading, merging


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_load_in_the_plain_host(build, kind, tmp_path):
    model = learned_adapters(build(kind))
    expected = embeddings(model)
    merged = save_model(model, tmp_path / "saved")
    assert merged is (kind == "router")
    again = load(tmp_path / "saved", type(model))
    assert has_lora(again) is not merged
    assert abs(embeddings(again) - expected).max() < 1e-6
    assert abs(embeddings(model) - expected).max() == 0, "saving leaves the model as it is"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_load_without_peft(build, kind, tmp_path):
    model = learned_adapters(build(kind))
    expected = embeddings(model)
    assert merge_lora(model) is model
    assert not has_lora(model)
    assert trained_names(model) == {name for name, _ in model.named_parameters()}
    save_model(model, tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("adapter_*"))
    again = load(tmp_path / "saved", type(model))
    assert abs(embeddings(again) - expected).max() < 1e-6
    assert not any("lora" in name or "base_layer" in name for name in again.state_dict())


def test_merging_keeps_modules_that_were_trained_whole(build):
    model = build("qwen")
    add_lora(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["merger"]))
    expected = embeddings(learned(model))
    assert abs(embeddings(merge_lora(model)) - expected).max() < 1e-6


def test_merging_nothing_changes_nothing(build):
    model = build("clip")
    before = embeddings(model)
    assert abs(embeddings(merge_lora(model)) - before).max() == 0


def test_a_relative_base_model_is_found_from_everywhere(clip_path, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(clip_path).parent)
    model = learned_adapters(load(Path(clip_path).name))
    save_model(model, tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    assert abs(embeddings(load("saved")) - embeddings(model)).max() < 1e-6


def test_weights_from_no_checkpoint_are_saved_merged(build, tmp_path):
    model = build("clip")
    model[0].model.name_or_path = ""
    learned_adapters(model)
    assert save_model(model, tmp_path / "saved")
    assert abs(embeddings(load(tmp_path / "saved")) - embeddings(model)).max() < 1e-6


def test_weights_that_are_not_those_of_the_checkpoint_any_more_are_saved_merged(build, tmp_path):
    model = learned_adapters(learned(build("clip")))
    assert save_model(model, tmp_path / "saved")
    assert abs(embeddings(load(tmp_path / "saved")) - embeddings(model)).max() < 1e-6


def test_a_base_model_that_is_gone_is_saved_merged(tmp_path):
    model = learned_adapters(load(tiny_clip(tmp_path / "base")))
    shutil.rmtree(tmp_path / "base")
    assert save_model(model, tmp_path / "saved")
    assert abs(embeddings(load(tmp_path / "saved")) - embeddings(model)).max() < 1e-6


def test_saving_builds_no_second_model(build, tmp_path, monkeypatch):
    model = learned_adapters(build("clip"))
    monkeypatch.setattr(type(model[0].model), "from_pretrained", None)
    assert not save_model(model, tmp_path / "saved")


def test_a_model_without_some_layers_of_its_checkpoint_is_saved_merged(build, tmp_path):
    model = build("text")
    model[0].model.encoder.layer = model[0].model.encoder.layer[:1]
    assert save_model(learned_adapters(model), tmp_path / "saved")


def test_a_base_model_that_torch_saved_is_the_same(tmp_path):
    base = Path(tiny_clip(tmp_path / "base"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert not save_model(learned_adapters(load(base)), tmp_path / "same")
    assert save_model(learned_adapters(learned(load(base))), tmp_path / "other")


@pytest.mark.parametrize("inside", ["", "base"])
def test_adapters_do_not_replace_their_base_model(inside, tmp_path):
    model = learned_adapters(load(tiny_clip(tmp_path / "run" / inside)))
    assert save_model(model, tmp_path / "run")
    assert abs(embeddings(load(tmp_path / "run")) - embeddings(model)).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_beside_half_precision_are_trained_in_float32(clip_path, dtype, tmp_path):
    half = {"device": "cpu", "model_kwargs": {"dtype": dtype}}
    model = SentenceTransformer(clip_path, **half)
    before = embeddings(model)
    add_lora(model, True)
    assert abs(embeddings(model) - before).max() == 0
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert not save_model(learned(model), tmp_path / "saved"), "the base model is the same in another dtype"
    again = SentenceTransformer(str(tmp_path / "saved"), **half)
    # the host loads adapters in the dtype of the base model
    assert abs(embeddings(again) - embeddings(model)).max() < 0.02
    add_lora(again, None)
    assert {parameter.dtype for parameter in again.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_base_model_in_several_files_is_the_same(build, tmp_path):
    build("qwen")[0].model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    build("qwen")[0].processor.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    assert not save_model(learned_adapters(load(tmp_path / "base")), tmp_path / "saved")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["merger"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
    ids=["modules_to_save", "dora", "tokens"],
)
def test_whatever_peft_wraps_is_compared(build, config, tmp_path):
    model = learned(with_adapters(build("qwen"), peft.LoraConfig(r=2, **config)))
    assert not save_model(model, tmp_path / "saved")


def test_adapters_refer_to_the_weights_they_were_trained_on(build, tmp_path):
    model = build("clip")
    learned(model)
    assert not save_model(model, tmp_path / "first")
    learned_adapters(model)
    assert not save_model(model, tmp_path / "second")
    assert abs(embeddings(load(tmp_path / "second")) - embeddings(model)).max() < 1e-6
    learned_adapters(merge_lora(model))
    assert save_model(model, tmp_path / "third"), "the merged weights are in no checkpoint"
    assert abs(embeddings(load(tmp_path / "third")) - embeddings(model)).max() < 1e-6


def test_a_model_without_adapters_is_saved_by_the_host(build, tmp_path):
    assert not save_model(build("clip"), tmp_path / "saved")
    load(tmp_path / "saved")


def test_loaded_adapters_are_trained_on(build, tmp_path):
    model = learned_adapters(build("qwen"))
    save_model(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert not trained_names(again)
    facts = add_lora(again, None)
    assert trained_names(again) == trained_names(model)
    assert facts["rank"] == 32


def test_without_lora_a_model_stays_as_it_is(build):
    model = build("clip")
    assert add_lora(model, None) == {}
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


# training


class LoraTrainer(SentenceTransformerTrainer):
    """The host's trainer, with checkpoints read by ``load_adapters``."""

    def _load_from_checkpoint(self, checkpoint_path):
        load_adapters(self.model, checkpoint_path)


def train(model, folder, trainer_class, *, resume=None, **arguments):
    rows = Dataset.from_dict({"query": [f"query {k}" for k in range(8)], "document": [f"page {k}" for k in range(8)]})
    args = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        router_mapping={"query": "text", "document": "text"} if isinstance(model[0], Router) else {},
        **arguments,
    )
    trainer = trainer_class(model, args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("kind", "trainer_class"),
    [("clip", SentenceTransformerTrainer), ("clip", LoraTrainer), ("qwen", LoraTrainer), ("router", LoraTrainer)],
)
def test_a_resumed_run_ends_with_the_same_bits(build, kind, trainer_class, tmp_path):
    whole = build(kind)
    add_lora(whole, True, seed=5)
    train(whole, tmp_path, trainer_class)
    resumed = build(kind)
    add_lora(resumed, True, seed=6)
    train(resumed, tmp_path, trainer_class, resume=str(tmp_path / "checkpoint-2"))
    expected = whole.state_dict()
    assert {name for name, value in resumed.state_dict().items() if not torch.equal(value, expected[name])} == set()


def test_a_checkpoint_brings_the_best_weights_back(build, tmp_path):
    model = build("router")
    add_lora(model, True)
    model.save_pretrained(str(tmp_path))
    before = embeddings(model)
    learned(model)
    assert abs(embeddings(model) - before).max() > 0
    load_adapters(model, tmp_path)
    assert abs(embeddings(model) - before).max() == 0


def test_other_adapters_are_refused(build, tmp_path):
    model, other = build("clip"), build("clip")
    add_lora(model, True)
    add_lora(other, peft.LoraConfig(r=2))
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="holds other adapters than the model: 48 tensors, expected 48"):
        load_adapters(model, tmp_path / "other")
    build("clip").save_pretrained(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors' does not exist"):
        load_adapters(model, tmp_path / "none")


def test_the_host_can_not_load_adapters_inside_a_router(build, tmp_path):
    """When this fails, the host has learnt it: save_model need not merge any more, and load_adapters can go."""
    model = build("router")
    add_lora(model, True)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(tmp_path)


# refused


@pytest.mark.parametrize("lora", ["yes", 16, {"r": 16}, 1])
def test_what_is_no_config_is_refused(lora):
    with pytest.raises(ConfigError, match="Expected True, None or a config of peft"):
        check_lora(lora)


@pytest.mark.parametrize("lora", [None, False, True])
def test_what_is_fine_passes(lora):
    check_lora(lora)


def test_prompt_tuning_is_refused():
    with pytest.raises(ConfigError, match="adds tokens to the input"):
        check_lora(peft.PromptTuningConfig(num_virtual_tokens=4))


def test_peft_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("mmtune.models.lora.find_spec", lambda name: None)
    check_lora(None)
    with pytest.raises(MissingExtraError, match=r'pip install peft \(in a clone of mmtune: pip install "\.\[lora\]"\)'):
        check_lora(True)


def test_a_second_adapter_is_refused(build):
    model = build("clip")
    add_lora(model, True)
    with pytest.raises(ConfigError, match=r"has adapters already.*merge_lora"):
        add_lora(model, True)


@pytest.mark.parametrize("kind", ["clip", "router"])
def test_layers_that_no_encoder_has_are_refused(build, kind):
    model = build(kind)
    with pytest.raises(ConfigError, match=r"no layer fits.*nowhere"):
        add_lora(model, peft.LoraConfig(target_modules=["nowhere"]))
    assert add_lora(model, True)["layers"], "the model can still be used"


def test_layers_of_frozen_parts_are_refused(build):
    model = build("qwen")
    before = embeddings(model)
    with pytest.raises(ConfigError, match=r"reaches \d+ layers of frozen parts, e.g. 'visual"):
        add_lora(model, peft.LoraConfig(target_modules=["qkv", "q_proj"]), freeze=("vision",))
    assert not has_lora(model)
    assert abs(embeddings(model) - before).max() == 0


def test_adapters_without_a_place_are_refused(build):
    with pytest.raises(ConfigError, match="all layers that would get adapters are in frozen parts"):
        add_lora(build("qwen"), True, freeze=("language",))


def test_a_model_without_transformers_is_refused():
    with pytest.raises(ConfigError, match="no transformers model"):
        add_lora(SentenceTransformer(modules=[Dense(4, 2)], device="cpu"), True)


# quantised weights


@pytest.fixture
def quantized(qwen3_vl_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("quantised weights need bitsandbytes, which is not installed")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return SentenceTransformer(qwen3_vl_path, device="cpu", model_kwargs={"quantization_config": config})


ON_A_CPU = "ignore:The weights are quantised and on a CPU:UserWarning"


@pytest.mark.filterwarnings(ON_A_CPU)
def test_quantised_weights_carry_adapters(quantized, tmp_path):
    facts = add_lora(quantized, True)
    assert facts["quantized"]
    assert all(".lora_" in name for name in trained_names(quantized))
    learned(quantized).train()
    quantized(quantized.preprocess(PAGES))["sentence_embedding"].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in quantized.parameters() if p.requires_grad)
    save_model(quantized, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
    # the same adapters beside the weights as they are: merge_lora asks for this way
    merge_lora(load(tmp_path / "saved"))


def test_training_quantised_weights_on_a_cpu_warns(quantized):
    with pytest.warns(UserWarning, match="quantised and on a CPU"):
        add_lora(quantized, True)


def test_quantised_weights_are_not_trained_themselves(quantized):
    with pytest.raises(ConfigError, match=r"quantised, and can't be trained.*pass lora=True"):
        add_lora(quantized, None)


@pytest.mark.filterwarnings(ON_A_CPU)
def test_quantised_weights_are_not_merged(quantized):
    add_lora(quantized, True)
    with pytest.raises(ConfigError, match="rounded to a few bits"):
        merge_lora(quantized)


def test_parts_of_quantised_weights_are_known(quantized):
    freeze_parts(quantized, ("vision",))
    assert sorted(model_parts(quantized)) == ["connector", "language", "vision"]
