"""load_model: what it chooses, what it keeps after saving, and what it refuses before reading weights."""

import json
import logging
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Router
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoProcessor,
    CLIPConfig,
    Gemma3Config,
    LlavaConfig,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    Siglip2Processor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from comparing import without_weights
from families import (
    SQUARE,
    VISION,
    tiny_chinese_clip,
    tiny_git,
    tiny_idefics3,
    tiny_llava,
    tiny_modernvbert,
    tiny_paligemma,
    tiny_raw_siglip,
    tiny_siglip2_naflex,
)
from mmtune.errors import ConfigError, MissingExtraError
from mmtune.host import flash_attention_loads
from mmtune.models import load_model
from mmtune.models.checkpoints import Encoder
from mmtune.models.loading import check_checkpoint, check_documents, describe_model, load_host_model
from mmtune.models.opening import LoadOptions
from mmtune.models.pixels import PixelLimits, image_arguments, warn_unused_limits
from mmtune.testing import tiny_clip

PAGE = Image.new("RGB", (500, 700), "white")

MISSING_TORCHVISION = (
    "\nQwen3VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check out the "
    "instructions\nPlease note that you may need to restart your runtime after installation.\n"
)


def patches(model: SentenceTransformer, **arguments: str) -> int:
    return int(model.preprocess([PAGE], **arguments)["image_grid_thw"].prod())


def patch_pixels(model: SentenceTransformer) -> int:
    encoders = [module for module in model.modules() if hasattr(module, "processing_kwargs")]
    return encoders[-1].config.vision_config.patch_size ** 2


@pytest.fixture(scope="module")
def saved_text_encoder(text_encoder_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "saved_text_encoder"
    SentenceTransformer(text_encoder_path, device="cpu").save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def router_path(text_encoder_path: str, clip_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    text = SentenceTransformer(text_encoder_path, device="cpu")
    image = SentenceTransformer(clip_path, device="cpu")
    folder = tmp_path_factory.mktemp("models") / "router"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        routes = {"text": list(text), "image": list(image)}
        SentenceTransformer(modules=[Router(routes, route_mappings={(None, "text"): "text"})]).save_pretrained(
            str(folder)
        )
    return str(folder)


@pytest.fixture(scope="module")
def saved_qwen3_vl(qwen3_vl_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With ``modules.json``, and the mean that the host chose."""
    folder = tmp_path_factory.mktemp("models") / "saved_qwen3_vl"
    SentenceTransformer(qwen3_vl_path, device="cpu").save_pretrained(str(folder))
    return str(folder)


# what is loaded


@pytest.mark.parametrize("fixture", ["clip_path", "siglip_path", "saved_qwen3_vl"])
def test_embeds_like_the_host(fixture, request):
    path = request.getfixturevalue(fixture)
    ours, hosts = load_model(path, device="cpu"), SentenceTransformer(path, device="cpu")
    for inputs in ([PAGE], ["total revenue"]):
        assert abs(ours.encode(inputs) - hosts.encode(inputs)).max() == 0
    assert not ours.training


def test_what_was_chosen_can_be_read(clip_path):
    description = describe_model(load_model(clip_path, device="cpu"))
    assert description["dtype"] == "float32"
    assert description["attention"] == "sdpa"
    assert description["base_model"] == clip_path
    assert description["modalities"] == ["text", "image"]
    assert description["max_pixels"] is None
    assert description["parameters"] > 0
    assert description["device"] == "cpu"
    assert description["pooling"] is None
    assert description["text_padding"] == "longest"
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_what_was_asked_for(clip_path, dtype):
    assert load_model(clip_path, dtype=dtype, device="cpu").dtype == torch.bfloat16


def test_dtype_may_stand_in_model_kwargs(clip_path):
    assert load_model(clip_path, device="cpu", model_kwargs={"dtype": "bfloat16"}).dtype == torch.bfloat16


def test_float32_on_a_cpu_whatever_the_checkpoint_holds(clip_path, tmp_path):
    load_model(clip_path, dtype="bfloat16", device="cpu").save_pretrained(str(tmp_path))
    assert load_model(tmp_path, device="cpu").dtype == torch.float32


def test_attention_is_what_was_asked_for(clip_path):
    assert describe_model(load_model(clip_path, attention="eager", device="cpu"))["attention"] == "eager"


@pytest.mark.parametrize(
    ("computes_bfloat16", "has_flash_attention", "dtype", "expected"),
    [
        (True, True, "auto", (torch.bfloat16, "flash_attention_2")),
        (True, False, "auto", (torch.bfloat16, None)),
        (False, True, "auto", (torch.float32, None)),
        (False, True, "float16", (torch.float16, "flash_attention_2")),
        (True, True, "float32", (torch.float32, None)),
    ],
)
def test_dtype_and_attention_fit_the_gpu(
    clip_path, monkeypatch, computes_bfloat16, has_flash_attention, dtype, expected
):
    asked = {}
    monkeypatch.setattr("mmtune.models.opening.get_device_name", lambda: "cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: computes_bfloat16)
    monkeypatch.setattr("mmtune.models.opening.flash_attention_loads", lambda: has_flash_attention)
    monkeypatch.setattr("mmtune.models.loading.build", lambda kind, name, **kwargs: asked.update(kwargs) or stop())
    with pytest.raises(InterruptedError, match="before the weights"):
        load_model(clip_path, dtype=dtype)
    assert (asked["model_kwargs"]["dtype"], asked["model_kwargs"].get("attn_implementation")) == expected


CLIP_VISION = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        (CLIPConfig(), True),
        (LlavaConfig(vision_config=CLIP_VISION, text_config={"model_type": "llama"}), True),
        (Gemma3Config(), False),
        (PaliGemmaConfig(), False),
        (LlavaConfig(vision_config=CLIP_VISION, text_config={"model_type": "gemma3_text"}), False),
        (SiglipVisionConfig(), True),
    ],
    ids=["clip", "llava", "gemma3", "paligemma", "llava on gemma3", "siglip vision"],
)
def test_flash_attention_is_for_models_whose_mask_it_can_express(config, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mmtune.models.opening.flash_attention_loads", lambda: True)
    encoder = Encoder(frozenset({"text", "image"}), config)
    chosen = LoadOptions(dtype="bfloat16", device="cuda").for_host([encoder])["model_kwargs"]
    assert chosen.get("attn_implementation") == ("flash_attention_2" if runs else None)
    asked = LoadOptions(dtype="bfloat16", device="cuda", attention="flash_attention_2").for_host([encoder])
    assert asked["model_kwargs"]["attn_implementation"] == "flash_attention_2"


def test_flash_attention_by_the_kernels_package_counts(monkeypatch):
    monkeypatch.setattr(
        "transformers.utils.is_flash_attn_2_available", lambda kernels_fallback_ok=False: kernels_fallback_ok
    )
    assert flash_attention_loads()
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert not flash_attention_loads()


def stop():
    raise InterruptedError("before the weights")


def test_a_saved_router_with_an_image_route_loads(router_path):
    model = load_model(router_path, device="cpu")
    assert "image" in model.modalities
    assert describe_model(model)["embedding_dimension"]


def test_a_clip_model_saved_by_an_old_host_loads(clip_path, tmp_path):
    shutil.copytree(clip_path, tmp_path / "0_CLIPModel")
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    assert load_model(tmp_path, device="cpu").supports("image")


def test_host_arguments_are_passed_on(clip_path):
    model = load_model(clip_path, device="cpu", truncate_dim=16, prompts={"query": "search: "})
    assert model.encode(["revenue"]).shape == (1, 16)
    assert model.prompts["query"] == "search: "


def test_a_model_that_was_saved_cut_off_says_so(clip_path, tmp_path):
    SentenceTransformer(clip_path, device="cpu", truncate_dim=16).save_pretrained(str(tmp_path / "cut"))
    model = load_model(tmp_path / "cut", device="cpu")
    assert model.encode(["revenue"]).shape == (1, 16), "kept, as the host keeps it"
    told = describe_model(model)
    assert (told["embedding_dimension"], told["full_dimension"], told["truncate_dim"]) == (16, 128, 16)
    assert model.truncate_dim == 16
    whole = describe_model(load_model(clip_path, device="cpu"))
    assert (whole["embedding_dimension"], whole["full_dimension"], whole["truncate_dim"]) == (128, 128, None)


# what a fresh checkpoint gets


def test_a_fresh_causal_encoder_is_pooled_by_its_last_token_and_says_so(tmp_path, caplog):
    model = load_model(tiny_llava(tmp_path), device="cpu")
    assert describe_model(model)["pooling"] == "lasttoken"
    assert [record.levelno for record in caplog.records if "last token" in record.message] == [logging.WARNING]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("build", "pooling"), [(tiny_idefics3, "lasttoken"), (tiny_modernvbert, "mean")])
def test_causal_is_causal_in_any_precision(build, pooling, dtype, attention, tmp_path):
    model = load_model(build(tmp_path), dtype=dtype, attention=attention, device="cpu")
    assert describe_model(model)["pooling"] == pooling


def test_a_causal_config_that_looks_both_ways_keeps_the_mean(tmp_path):
    path = tiny_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["is_causal"] = False
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert describe_model(load_model(path, device="cpu"))["pooling"] == "mean"


def test_a_saved_model_keeps_its_pooling(saved_qwen3_vl, caplog):
    assert describe_model(load_model(saved_qwen3_vl, device="cpu"))["pooling"] == "mean"
    assert not [record for record in caplog.records if record.name.startswith("mmtune")]


def test_an_encoder_that_looks_both_ways_keeps_the_mean(tmp_path):
    assert describe_model(load_model(tiny_modernvbert(tmp_path), device="cpu"))["pooling"] == "mean"


def test_a_text_encoder_that_looks_both_ways_keeps_the_mean(text_encoder_path):
    options = LoadOptions(device="cpu")
    model = load_host_model(SentenceTransformer, text_encoder_path, options, modality="text")
    assert describe_model(model)["pooling"] == "mean"


def test_late_interaction_is_left_as_the_host_makes_it(tmp_path):
    path = tiny_llava(tmp_path)
    ours = load_host_model(MultiVectorEncoder, path, LoadOptions(device="cpu"))
    assert [type(module) for module in ours] == [type(module) for module in MultiVectorEncoder(path, device="cpu")]


TEXTS = ["revenue", "the total revenue of the company in the year 2021, by region", "costs"]


def change_by_batch(model: SentenceTransformer) -> float:
    """The largest change of a text's embedding from its batch."""
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    return abs(model.encode(TEXTS) - alone).max()


@pytest.mark.parametrize("build", [tiny_raw_siglip, tiny_siglip2_naflex])
def test_a_fresh_siglip_embeds_a_text_alike_in_every_batch(build, tmp_path, caplog):
    path = build(tmp_path / "fresh")
    assert change_by_batch(SentenceTransformer(path, device="cpu")) > 0.1
    model = load_model(path, device="cpu")
    assert change_by_batch(model) <= 1e-5
    assert describe_model(model)["text_padding"] == "max_length"
    assert "every text is padded to 64 tokens" in caplog.text
    model.save_pretrained(str(tmp_path / "saved"))
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for inputs in (TEXTS, [PAGE]):
        assert abs(plain.encode(inputs) - model.encode(inputs)).max() <= 1e-6


@pytest.mark.parametrize("build", [tiny_raw_siglip, tiny_siglip2_naflex])
def test_a_siglip_that_the_host_saved_embeds_a_text_alike_in_every_batch_too(build, tmp_path, caplog):
    host = SentenceTransformer(build(tmp_path / "fresh"), device="cpu")
    host.save_pretrained(str(tmp_path / "host"))
    model = load_model(tmp_path / "host", device="cpu")
    assert change_by_batch(model) <= 1e-5
    assert "every text is padded to 64 tokens" in caplog.text
    model.save_pretrained(str(tmp_path / "saved"))
    assert change_by_batch(SentenceTransformer(str(tmp_path / "saved"), device="cpu")) <= 1e-5


def test_what_a_checkpoint_says_about_padding_stands(tmp_path, caplog):
    host = SentenceTransformer(tiny_raw_siglip(tmp_path / "fresh"), device="cpu")
    host[0].processing_kwargs = {"text": {"padding": "max_length", "max_length": 32}}
    host.save_pretrained(str(tmp_path / "host"))
    model = load_model(tmp_path / "host", device="cpu")
    assert model[0].processing_kwargs["text"] == {"padding": "max_length", "max_length": 32}
    assert "feels padding" not in caplog.text


def test_a_tokenizer_without_a_length_is_held_to_the_positions_of_the_encoder(tmp_path):
    model = load_model(tiny_raw_siglip(tmp_path / "fresh", model_max_length=10**30), device="cpu")
    assert model.max_seq_length == 64
    assert model.encode(["revenue " * 100]).shape == (1, 64)
    model.save_pretrained(str(tmp_path / "saved"))
    assert change_by_batch(SentenceTransformer(str(tmp_path / "saved"), device="cpu")) <= 1e-5


@pytest.mark.parametrize("build", [tiny_clip, tiny_chinese_clip])
def test_a_text_encoder_that_heeds_its_mask_needs_no_padding(build, tmp_path, caplog):
    model = load_model(build(tmp_path), device="cpu")
    assert change_by_batch(model) <= 1e-5
    assert describe_model(model)["text_padding"] == "longest"
    assert not [record for record in caplog.records if record.name.startswith("mmtune")]


# pixel limits


def test_the_limit_counts_pixels_after_resizing(qwen3_vl_path):
    free = load_model(qwen3_vl_path, device="cpu")
    limited = load_model(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    assert patches(limited) * patch_pixels(limited) <= 64 * 64 < patches(free) * patch_pixels(free)
    # not much below it either
    assert patches(limited) * patch_pixels(limited) > 0.4 * 64 * 64
    description = describe_model(limited)
    assert description["max_pixels"] == 64 * 64
    assert describe_model(free)["max_pixels"] == 128 * 128


def test_the_lower_limit_enlarges_small_images(qwen3_vl_path):
    model = load_model(qwen3_vl_path, min_pixels=96 * 96, max_pixels=128 * 128, device="cpu")
    grid = model.preprocess([Image.new("RGB", (20, 20))])["image_grid_thw"]
    assert int(grid.prod()) * patch_pixels(model) >= 96 * 96


def test_a_limit_below_the_checkpoints_minimum_holds_for_small_images_too(qwen3_vl_path, tmp_path):
    load_model(qwen3_vl_path, min_pixels=96 * 96, device="cpu").save_pretrained(str(tmp_path))
    model = load_model(tmp_path, max_pixels=64 * 64, device="cpu")
    for side in (20, 60, 70, 90):
        grid = model.preprocess([Image.new("RGB", (side, side))])["image_grid_thw"]
        assert int(grid.prod()) * patch_pixels(model) <= 64 * 64


def test_the_limit_survives_saving_and_reloading_in_the_plain_host(qwen3_vl_path, tmp_path):
    model = load_model(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    model.save_pretrained(str(tmp_path))
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert patches(plain) == patches(model)
    assert abs(plain.encode([PAGE]) - model.encode([PAGE])).max() <= 1e-6
    assert "size" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "pixels" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    # and mmtune keeps it when none is given
    assert describe_model(load_model(tmp_path, device="cpu"))["max_pixels"] == 64 * 64


def test_the_guides_processor_kwargs_mean_the_same_and_do_not_leak(qwen3_vl_path, tmp_path):
    model = load_model(qwen3_vl_path, device="cpu", processor_kwargs={"max_pixels": 64 * 64})
    model.save_pretrained(str(tmp_path))
    assert describe_model(SentenceTransformer(str(tmp_path), device="cpu"))["max_pixels"] == 64 * 64
    assert "max_pixels" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")


def test_the_limit_holds_inside_a_router(text_encoder_path, qwen3_vl_path, tmp_path):
    routes = {
        "text": list(SentenceTransformer(text_encoder_path, device="cpu")),
        "image": list(SentenceTransformer(qwen3_vl_path, device="cpu")),
    }
    mappings = {(None, "text"): "text", (None, "image"): "image"}
    SentenceTransformer(modules=[Router(routes, route_mappings=mappings)]).save_pretrained(str(tmp_path / "router"))
    model = load_model(tmp_path / "router", max_pixels=64 * 64, device="cpu")
    model.save_pretrained(str(tmp_path / "limited"))
    plain = SentenceTransformer(str(tmp_path / "limited"), device="cpu")
    assert patches(plain, modality="image") == patches(model, modality="image")
    assert patches(model, modality="image") * patch_pixels(model) <= 64 * 64


@pytest.mark.parametrize("fixture", ["clip_path", "siglip_path"])
def test_a_fixed_image_size_warns_that_the_limit_is_not_applied(fixture, request):
    with pytest.warns(UserWarning, match="max_pixels=4096 is not applied: .*fixed size"):
        model = load_model(request.getfixturevalue(fixture), max_pixels=4096, device="cpu")
    assert describe_model(model)["max_pixels"] is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 0}, "max_pixels=0 is no pixel limit"),
        ({"min_pixels": -5}, "min_pixels=-5 is no pixel limit"),
        ({"max_pixels": 1e6}, "max_pixels=1000000.0 is no pixel limit"),
        ({"max_pixels": True}, "max_pixels=True is no pixel limit"),
        ({"min_pixels": 200, "max_pixels": 100}, "min_pixels=200 is above max_pixels=100"),
        ({"max_pixels": 10}, "max_pixels=10 is below one patch"),
        ({"min_pixels": 10**9}, "min_pixels=1000000000 is above the checkpoint's own limit"),
    ],
)
def test_impossible_limits_are_refused_before_weights(qwen3_vl_path, tmp_path, limits, message):
    with pytest.raises(ConfigError, match=message):
        load_model(without_weights(qwen3_vl_path, tmp_path / "copy"), device="cpu", **limits)


# what is refused before weights are read


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            tiny_paligemma,
            r"can't embed images by themselves \(model type paligemma\): it takes image and text only together",
        ),
        (tiny_git, r"can't embed images by themselves \(model type git\): it takes image and text only together"),
        (
            lambda folder: tiny_llava(folder, chat_template=None),
            r"can't embed images by themselves \(model type llava\): it has no chat template",
        ),
    ],
)
def test_a_family_that_takes_no_images_alone_is_refused_before_weights(build, message, tmp_path):
    folder = without_weights(build(tmp_path / "fresh"), tmp_path / "copy")
    with pytest.raises(ConfigError, match=message):
        load_model(folder)
    with pytest.raises(ConfigError, match=message):
        check_checkpoint(folder)


def test_a_family_that_takes_no_text_alone_is_refused_before_weights(tmp_path):
    folder = without_weights(tiny_paligemma(tmp_path / "fresh"), tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"can't embed texts by themselves .*only together"):
        load_host_model(SentenceTransformer, folder, LoadOptions(), modality="text")


def test_an_image_encoder_is_loaded_but_not_finetuned(tmp_path):
    vision = SiglipVisionModel(SiglipVisionConfig(**VISION))
    vision.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size=SQUARE).save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").modalities == ["image"]
    with pytest.raises(ConfigError, match=r"embeds no texts, only image \(model type siglip_vision_model\)"):
        check_checkpoint(tmp_path)


def test_a_missing_package_without_an_extra_is_named(clip_path, tmp_path, monkeypatch):
    def from_pretrained(*args, **kwargs):
        raise ImportError(
            "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`."
        )

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    with pytest.raises(
        MissingExtraError, match=r"needs num2words, which is not installed: .*Run: pip install num2words"
    ):
        load_model(without_weights(clip_path, tmp_path / "copy"))


@pytest.mark.parametrize("fixture", ["text_encoder_path", "saved_text_encoder"])
def test_a_text_only_checkpoint_is_refused_before_weights(fixture, request, tmp_path):
    folder = without_weights(request.getfixturevalue(fixture), tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"embeds no images, only text \(model type bert\)"):
        load_model(folder)


def test_a_router_of_text_encoders_is_refused_before_weights(text_encoder_path, tmp_path):
    encoders = [SentenceTransformer(text_encoder_path, device="cpu") for _ in range(2)]
    router = Router.for_query_document(list(encoders[0]), list(encoders[1]))
    SentenceTransformer(modules=[router]).save_pretrained(str(tmp_path / "router"))
    with pytest.raises(ConfigError, match="embeds no images, only text"):
        load_model(without_weights(str(tmp_path / "router"), tmp_path / "copy"))


def test_a_missing_path_names_the_parent_that_exists(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(ConfigError, match=r"does not exist: .*exists and holds no 'checkpoint-10' \(did you mean"):
        load_model(tmp_path / "checkpoint-10" / "final")


@pytest.mark.parametrize("name", ["no-organisation/no-model", "no-model"])
def test_a_name_the_hub_does_not_give_is_a_config_error(name):
    with pytest.raises(ConfigError, match=f"'{name}' was not found: .*Hub and its cache did not give it") as raised:
        load_model(name)
    assert isinstance(raised.value.__cause__, OSError)


def test_a_folder_without_a_checkpoint_lists_its_files(tmp_path):
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds no checkpoint: found notes\.txt\. Expected one of modules\.json"):
        load_model(tmp_path)


def test_an_output_folder_points_to_the_model_in_it(clip_path, tmp_path):
    shutil.copytree(clip_path, tmp_path / "final")
    with pytest.raises(ConfigError, match=r"found final\. .*Pass '.*final', which holds one"):
        load_model(tmp_path)


def test_a_file_is_no_checkpoint(clip_path):
    with pytest.raises(ConfigError, match=r"is a file\. Expected the folder"):
        load_model(Path(clip_path) / "config.json")


@pytest.mark.parametrize("nothing", ["", None])
def test_no_name_at_all(nothing):
    with pytest.raises(ConfigError, match=f"name_or_path={nothing!r} names no checkpoint"):
        load_model(nothing)


def test_an_unknown_model_type_is_a_config_error(clip_path, tmp_path):
    folder = without_weights(clip_path, tmp_path / "copy")
    (Path(folder) / "config.json").write_text('{"model_type": "no_such_type"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config or processor of .* can't be read: .*no_such_type"):
        load_model(folder)


def test_broken_weights_are_a_config_error(clip_path, tmp_path):
    with pytest.raises(ConfigError, match=r"The weights of .* can't be loaded"):
        load_model(without_weights(clip_path, tmp_path / "copy"), device="cpu")


def test_absent_weights_are_a_config_error(clip_path, tmp_path):
    folder = Path(without_weights(clip_path, tmp_path / "copy"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"The weights of .* can't be loaded"):
        load_model(folder, device="cpu")


def test_a_missing_extra_is_named_before_weights(clip_path, tmp_path, monkeypatch):
    def from_pretrained(*args, **kwargs):
        raise ImportError(MISSING_TORCHVISION)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    with pytest.raises(
        MissingExtraError,
        match=r'needs torchvision, .*pip install torchvision .*"\.\[vlm\]"',
    ):
        load_model(without_weights(clip_path, tmp_path / "copy"))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_qwen3_vl_without_torchvision_names_the_extra(clip_path, tmp_path):
    folder = Path(without_weights(clip_path, tmp_path / "copy"))
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}', encoding="utf-8")
    parts = {
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    processor = json.dumps({"processor_class": "Qwen3VLProcessor", **parts})
    (folder / "processor_config.json").write_text(processor, encoding="utf-8")
    with pytest.raises(
        MissingExtraError,
        match=r'needs torchvision, .*pip install torchvision .*"\.\[vlm\]"',
    ):
        load_model(folder)


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat61"}, "dtype='bfloat61' is no dtype for weights"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no dtype for weights"),
        ({"dtype": "float32", "model_kwargs": {"torch_dtype": "float32"}}, "dtype is given twice.*'torch_dtype'"),
        ({"attention": "sdpa", "model_kwargs": {"attn_implementation": "sdpa"}}, "attention is given twice"),
        ({"max_pixels": 9999, "processor_kwargs": {"max_pixels": 9999}}, "max_pixels is given twice"),
        ({"max_pixels": 9999, "processor_kwargs": {"size": {}}}, "max_pixels is given twice.*'size'"),
        ({"max_pixel": 9999}, "no argument 'max_pixel'. The nearest is 'max_pixels'"),
        ({"model_kwarg": {}}, "no argument 'model_kwarg'. The nearest is 'model_kwargs'"),
        ({"modules": []}, "no argument 'modules'"),
        ({"device": "gpu"}, "device='gpu' is no device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_weights(clip_path, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_model(without_weights(clip_path, tmp_path / "copy"), **arguments)


def test_a_gpu_that_is_not_there_is_refused_before_weights(clip_path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='cuda' was asked for, but torch finds no GPU"):
        load_model(without_weights(clip_path, tmp_path / "copy"), device="cuda")


def test_the_callers_mappings_are_not_changed(clip_path):
    model_kwargs, processor_kwargs = {"dtype": "float32"}, {"use_fast": True}
    load_model(clip_path, device="cpu", model_kwargs=model_kwargs, processor_kwargs=processor_kwargs)
    assert (model_kwargs, processor_kwargs) == ({"dtype": "float32"}, {"use_fast": True})


# check_documents


def fake_model(*modalities: str | tuple[str, ...]) -> SentenceTransformer:
    first_module = torch.nn.Identity()
    first_module.modalities = list(modalities)
    model = SentenceTransformer.__new__(SentenceTransformer)
    torch.nn.Sequential.__init__(model, first_module)
    return model


@pytest.mark.parametrize(
    ("modalities", "documents"),
    [
        (("text", "image"), "image"),
        (("text",), "text"),
        (("text", "image", "message"), "text+image"),
        (("text", ("image", "text")), "text+image"),
        (("text", "video"), "video"),
    ],
)
def test_documents_that_a_model_embeds_pass(modalities, documents):
    check_documents(fake_model(*modalities), documents)


@pytest.mark.parametrize(
    ("modalities", "documents", "message"),
    [
        (("text",), "image", "can't embed documents='image'. Its modalities are text"),
        (("text", "image"), "text+image", r"can't embed documents='text\+image'. Its modalities are text, image"),
        (("text", "image"), "pages", "can't embed documents='pages'"),
        (("image",), "image", "can't embed queries, which are text. Its modalities are image"),
        ((("image", "text"),), "image", r"Its modalities are image\+text: it takes image and text only together"),
    ],
)
def test_documents_that_a_model_can_not_embed_are_refused(modalities, documents, message):
    with pytest.raises(ConfigError, match=message):
        check_documents(fake_model(*modalities), documents)


@pytest.fixture(scope="module")
def siglip2_processor() -> Siglip2Processor:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    return Siglip2Processor(Siglip2ImageProcessorPil(patch_size=16), tokenizer)


def test_where_the_processor_counts_patches_a_limit_in_pixels_stands_for_them(siglip2_processor):
    arguments = image_arguments(siglip2_processor, {}, PixelLimits(max_pixels=128 * 128))
    shown = siglip2_processor.image_processor(PAGE, **arguments)
    assert int(torch.tensor(shown["spatial_shapes"]).prod()) <= 128 * 128 // 16**2 == arguments["max_num_patches"]
    with pytest.raises(ConfigError, match="max_pixels=255 is below one patch, which is 256 pixels"):
        image_arguments(siglip2_processor, {}, PixelLimits(max_pixels=255))


def test_where_the_processor_counts_patches_a_lower_limit_warns(siglip2_processor):
    with pytest.warns(UserWarning, match="min_pixels=4096 is not applied: .*only knows a largest number of patches"):
        warn_unused_limits([siglip2_processor], PixelLimits(min_pixels=4096, max_pixels=8192))


def test_an_unknown_attention_is_a_named_error(clip_path: str) -> None:
    with pytest.raises(ConfigError, match="can't be built with these arguments"):
        load_model(clip_path, attention="zz")
