"""Bad input to what makes, loads, changes and saves models: each is refused by name, before weights load where it can.

Most of it goes to checkpoints whose weights are broken: whoever reads these gets another error than those of the table.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer

from comparing import assert_same_weights, weights, without_weights
from mmtune import (
    ROUTER_PRESETS,
    ConfigError,
    build_late_interaction,
    build_reranker,
    compose_router,
    extract_route,
    load_model,
    merge_lora,
    router_preset,
)
from mmtune.models.adapters import load_adapters, save_model
from mmtune.models.loading import check_checkpoint, check_documents, describe_model
from mmtune.models.lora import add_lora, check_lora
from mmtune.models.opening import LARGEST_DIMENSION
from mmtune.models.parts import describe_training, freeze_parts, model_parts
from mmtune.models.pixels import PixelLimits, limit_pixels
from mmtune.models.routes import check_routes
from mmtune.testing import tiny_llava

Arguments = dict[str, Any]
Damage = Callable[[Path], object]


class Thing:
    def __repr__(self) -> str:
        return "Thing()"


NAN, INF = math.nan, math.inf
LAYER = torch.nn.Linear(2, 2)
LONG = "x" * 5000

NO_NUMBERS = ("64", b"64", [64], {"a": 64}, {64}, Thing(), Thing, np.float64(64), np.bool_(True), torch.tensor(64))
NO_SIZES = (0, -1, 1.5, True, NAN, INF, *NO_NUMBERS)
NO_TEXTS = (5, 1.5, NAN, True, b"x", ["x"], {"x": 1}, {"x"}, Thing(), Thing, LAYER)
NO_FLAGS = ("no", 1, 0, [], np.bool_(True))
NO_MAPPINGS = (5, NAN, True, "query", b"query", ["query"], {"query"}, [], "", 0, Thing(), {5: "x"})
NO_MODELS = (None, 5, "vdr", b"vdr", [], LAYER, torch.nn.Sequential(LAYER), SentenceTransformer, Thing())


def rows(call: str, name: str, values: Any, message: str) -> list[tuple[str, Arguments, str]]:
    return [(call, {name: value}, message) for value in values]


NAMES_NONE = "names no checkpoint"
NO_PIXELS = r"_pixels=.* is no pixel limit"
NO_DTYPE = r"dtype=.* is no dtype for weights"
NO_ATTENTION = r"attention=.*: expected 'auto', or one"
NO_DEVICE = r"device=.*(is no device|expected 'cpu'|finds no GPU)"
NO_ENCODER = r"(text|image)=.* is no encoder"
NO_DIMENSION = r"dimension=.* is no size of"
NO_SEED = r"seed=.*whole number from 0 to"
WHOLE = "expected a whole number of 1 or more"
FLAG = "expected True or False"

LOADING: list[tuple[str, Arguments, str]] = [
    row
    for call in ("load", "reranker", "ready", "late")
    for row in (
        *rows(call, "max_pixels", NO_SIZES, NO_PIXELS),
        *rows(call, "min_pixels", (0, -1, True, NAN, "600"), NO_PIXELS),
        (call, {"min_pixels": 5000, "max_pixels": 4000}, "min_pixels=5000 is above max_pixels=4000"),
        (call, {"max_pixels": 64, "processor_kwargs": {"max_pixels": 64}}, "max_pixels is given twice"),
        *rows(call, "dtype", (None, "float17", "fp16", "BF16", "", torch.int8, np.float32, *NO_TEXTS), NO_DTYPE),
        (call, {"dtype": "float32", "model_kwargs": {"dtype": "float32"}}, "dtype is given twice"),
        *rows(call, "attention", (None, "paged|sdpa", *NO_TEXTS), NO_ATTENTION),
        *rows(call, "attention", ("sdpaa", "Auto", ""), "can't be built with these arguments: .*attn_implementation"),
        *rows(call, "device", ("cpuu", "gpu", "auto", "", "meta", "mps", "xpu", torch.device("meta"), -1), NO_DEVICE),
        *rows(call, "device", ("cuda", "cuda:99", 0, np.int64(0), True, 1.5, b"cpu", ["cpu"], {}, Thing()), NO_DEVICE),
        (call, {"max_pixles": 9}, "no argument 'max_pixles'. The nearest is 'max_pixels'"),
        (call, {"modules": [LAYER]}, "no argument 'modules'"),
    )
]  # fmt: skip

OF_THE_HOST: list[tuple[str, Arguments, str]] = [
    *rows("load", "prompts", (*NO_MAPPINGS, {"query": 5}), "prompts=.* is no mapping of texts"),
    *rows("late", "prompts", (5, "query", {"query": 5}), "prompts=.* is no mapping of texts"),
    *rows("load", "default_prompt_name", NO_TEXTS, "default_prompt_name=.*the name of a prompt"),
    *rows("reranker", "default_prompt_name", (5, ["x"], {}), "default_prompt_name=.*the name of a prompt"),
    ("reranker", {"default_prompt_name": "text_to_imgae"}, "default_prompt_name='text_to_imgae' is no direction"),
    *rows("load", "cache_folder", (5, NAN, "", b"x", ["x"], {}), "cache_folder=.*the path of a folder"),
    *rows("load", "trust_remote_code", NO_FLAGS, f"trust_remote_code=.*{FLAG}"),
    *rows("load", "local_files_only", NO_FLAGS, f"local_files_only=.*{FLAG}"),
    *rows("load", "revision", (5, NAN, b"main", ["main"]), "revision=.*a branch, a tag or a commit"),
    *[
        row
        for name in ("model_kwargs", "processor_kwargs", "config_kwargs")
        for row in rows("load", name, NO_MAPPINGS, f"{name}=.* is no mapping by names")
    ],
    ("load", {"model_kwargs": {"nope": 1}}, "can't be built with these arguments: TypeError.*'nope'"),
    *rows("load", "model_card_data", (5, "card", {}), "model_card_data=.*data of a model card"),
    *rows("load", "backend", ("torhc", 5, None, ["torch"])[:2], "backend=.* is unknown. Expected one of 'torch'"),
    *rows("load", "similarity_fn_name", ("cosin", 5), "can't be built with these arguments: .*(cosin|5)"),
    *rows("load", "truncate_dim", NO_SIZES, f"truncate_dim=.*{WHOLE}"),
    *rows("reranker", "max_length", NO_SIZES, f"max_length=.*{WHOLE}"),
    *rows("ready", "max_length", (0, True, "64"), f"max_length=.*{WHOLE}"),
    *rows("reranker", "max_length", (2**40,), "max_length=.* is more than the 512 positions"),
    *rows("ready", "max_length", (2**40,), "max_length=.* is more than the 512 positions"),
    *rows("reranker", "num_labels", NO_SIZES, f"num_labels=.*{WHOLE}"),
    *rows("reranker", "num_labels", (2, 2**40), "num_labels=.* does not rank"),
    *rows("ready", "activation_fn", (5, "sigmoid", [], torch.nn.Sigmoid), "activation_fn=.*a function of scores"),
]  # fmt: skip

OF_RERANKERS: list[tuple[str, Arguments, str]] = [
    *rows("reranker", "head", (None, 5, "densed", "Dense", b"dense", ["dense"], {}), "head=.* is no head"),
    *rows("reranker", "true_token", (None, 5, "", True, b"1", ["1"], {}), "true_token=.* is no token"),
    ("reranker", {"false_token": "yes no maybe"}, r"false_token=.* is \d+ tokens"),
    ("reranker", {"true_token": "0"}, "are the same token"),
    *rows("reranker", "prompts", NO_MAPPINGS, "prompts=.* is no mapping of texts"),
    *rows("ready", "prompts", (5, "Same?", {"image_to_text": 5}), "prompts=.* is no mapping of texts"),
    ("reranker", {"prompts": {"image_to_txt": "x"}}, "'image_to_txt', which is no direction.*'image_to_text': rename"),
    ("reranker", {"backend": "onnx"}, "backend='onnx' can't be built on"),
]

OF_LATE_INTERACTION: list[tuple[str, Arguments, str]] = [
    *rows("late", "dimension", (*NO_SIZES, LARGEST_DIMENSION + 1, 2**40), NO_DIMENSION),
    ("late", {"name_or_path": "late", "dimension": 64}, "dimension=64 was asked for.*to 128 dimensions"),
    *rows("late", "seed", (None, -1, 1.5, "7", True, NAN, [1], 2**32, 2**70), NO_SEED),
]

OF_ROUTERS: list[tuple[str, Arguments, str]] = [
    *[
        row
        for side in ("text", "image")
        for row in (
            *rows("router", side, (None, *NO_TEXTS, [], (), [None], [5], Transformer), NO_ENCODER),
            *rows("router", side, ("", " "), NAMES_NONE),
            *rows("router", side, ("no/such/folder", Path("no such")), "does not exist"),
            (f"router of {side}", {"kind": "reranker model"}, NO_ENCODER),
            (f"router of {side}", {"kind": "late model"}, NO_ENCODER),
            (f"router of {side}", {"kind": "router model"}, "has a Router of its own"),
            (f"router of {side}", {"kind": "router"}, "has a Router of its own"),
        )
    ],
    ("router of image", {"kind": "text"}, "embeds no images"),
    *rows("router", "dimension", (*NO_SIZES, 2**40), NO_DIMENSION),
    *rows("router", "freeze", ("visoin", b"text", ["vision"], [None], [["text"]]), "freeze names .*'text' and"),
    *rows("router", "freeze", (0, 5, True, NAN, Thing(), Thing), "freeze=.* names no parts"),
    *rows("router", "route_by", (None, 5, "modaliti", b"task", ["task"], True), "route_by=.* is unknown"),
    *rows("router", "text_prompts", (*NO_MAPPINGS, {"query": 5}), "text_prompts=.* is no mapping of texts"),
    *rows("router", "device", ("cpuu", True, [], "meta"), NO_DEVICE),
    *rows("router", "dtype", ("float17", 5), NO_DTYPE),
    *rows("router", "attention", (5, None), NO_ATTENTION),
    *rows("router", "max_pixels", (0, "600"), NO_PIXELS),
    *rows("modules", "device", (True, [], "cpuu", 0), NO_DEVICE),
    *rows("modules", "dtype", (5, "float17"), NO_DTYPE),
    *rows("preset", "name", (None, 5, True, "", b"light", ["light"], {}, Thing), "There is no preset"),
    *rows("preset", "name", ("Light", "lihgt"), "The nearest is 'light'"),
    ("preset", {"dimensions": 5}, "no argument 'dimensions'. The nearest is 'dimension'"),
    ("preset", {"text": None}, NO_ENCODER),
    ("preset", {"dimension": 0}, NO_DIMENSION),
    ("preset", {"freeze": "visoin"}, "freeze names 'visoin'"),
    ("preset", {"device": "cpuu"}, NO_DEVICE),
]  # fmt: skip

CHECKPOINTS_THAT_ARE_NONE: list[tuple[Any, str]] = [
    *((value, NAMES_NONE) for value in (None, "", " ", *NO_TEXTS)),
    *((value, "does not exist") for value in ("no such", "a/b/c", "a\0b", "../nothing", "\ud800", Path("no such"))),
    *((value, "was not found") for value in ("no-org/no-model", "--x")),
    (LONG, "can't be a path: .*too long"),
]

LOADS_ANY = ("load", "reranker", "late")


def name_of(value: object) -> str:
    return ascii(value)[:40]


@pytest.fixture(scope="module")
def checkpoints(
    clip_path: str, siglip_path: str, text_encoder_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Of each kind one whole checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    llava = tiny_llava(folder / "llava")
    made = {
        "st": load_model(clip_path, device="cpu"),
        "ready": build_reranker(llava, device="cpu"),
        "late": build_late_interaction(llava, device="cpu"),
        "router": compose_router(text_encoder_path, siglip_path, device="cpu"),
    }
    for name, model in made.items():
        model.save_pretrained(str(folder / name))
    saved = {name: str(folder / name) for name in made}
    return {"clip": clip_path, "siglip": siglip_path, "text": text_encoder_path, "llava": llava, **saved}


@pytest.fixture(scope="module")
def broken(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same, and whoever reads their weights fails."""
    folder = tmp_path_factory.mktemp("broken")
    return {name: without_weights(path, folder / name) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, str]) -> dict[str, Any]:
    return {
        "clip": SentenceTransformer(checkpoints["clip"], device="cpu"),
        "router model": SentenceTransformer(checkpoints["router"], device="cpu"),
        "reranker model": CrossEncoder(checkpoints["ready"], device="cpu"),
        "late model": MultiVectorEncoder(checkpoints["late"], device="cpu"),
    }


@pytest.fixture(scope="module")
def calls(broken: dict[str, str], models: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Each function with arguments that work but for the weights, of which a row changes one."""

    def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            path = given.pop("name_or_path", name)
            return function(broken.get(path, path) if isinstance(path, str) else path, **given)

        return call

    def of_side(side: str, kind: str) -> Any:
        return compose_router(**{"text": broken["text"], "image": broken["siglip"], side: {**broken, **models}[kind]})

    sides = {"text": broken["text"], "image": broken["siglip"]}
    modules = {"text": list(models["clip"]), "image": list(models["clip"])}
    return {
        "load": named(load_model, "clip"),
        "reranker": named(build_reranker, "llava"),
        "ready": named(build_reranker, "ready"),
        "late": named(build_late_interaction, "llava"),
        "router": lambda **given: compose_router(**{**sides, **given}),
        "router of text": partial(of_side, "text"),
        "router of image": partial(of_side, "image"),
        "modules": lambda **given: compose_router(**{**modules, **given}),
        "preset": lambda **given: router_preset(**{"name": "light", **sides, **given}),
    }


def refuse(call: Callable[..., Any], arguments: Arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        call(**arguments)
    assert "weights of" not in str(caught.value), "it was found out after the weights"
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [*LOADING, *OF_THE_HOST, *OF_RERANKERS, *OF_LATE_INTERACTION, *OF_ROUTERS],
    ids=name_of,
)
def test_a_wrong_argument_is_refused_before_weights(
    calls: dict[str, Any], call: str, arguments: Arguments, message: str
) -> None:
    refuse(calls[call], arguments, message)


@pytest.mark.parametrize("call", LOADS_ANY)
@pytest.mark.parametrize(("name", "message"), CHECKPOINTS_THAT_ARE_NONE, ids=name_of)
def test_what_is_no_checkpoint_is_refused(calls: dict[str, Any], call: str, name: Any, message: str) -> None:
    refuse(calls[call], {"name_or_path": name}, message)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ("load", "text", "embeds no images, only text"),
        ("reranker", "text", "has no LM head"),
        ("reranker", "clip", "has no LM head"),
        ("reranker", "router", "is a Router"),
        ("reranker", "late", "saved without its LM head"),
        ("late", "text", "embeds no images, only text"),
        ("late", "clip", "is a dual encoder"),
        ("late", "router", "starts with a Router"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(calls: dict[str, Any], call: str, kind: str, message: str) -> None:
    refuse(calls[call], {"name_or_path": kind}, message)


def test_a_checkpoint_for_another_use_gives_its_encoder(checkpoints: dict[str, str]) -> None:
    """The host converts it, and chooses the mean although LLaVA is causal."""
    for kind in ("ready", "late"):
        assert describe_model(load_model(checkpoints[kind], device="cpu"))["pooling"] == "lasttoken"
    assert describe_model(build_late_interaction(checkpoints["ready"], device="cpu"))["pooling"] is None
    router = compose_router(checkpoints["ready"], checkpoints["siglip"], device="cpu")
    assert describe_model(router)["pooling"] == "lasttoken"


# damaged checkpoints


def written(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def changed(name: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values), encoding="utf-8")

    return damage


def without(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    changed_weights = change(load_file(folder / "model.safetensors"))
    save_file(changed_weights, folder / "model.safetensors", metadata={"format": "pt"})


def crop_largest(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = max(tensors, key=lambda each: tensors[each].numel())
    return tensors | {name: tensors[name][:-3].clone()}


def drop_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if ".layers.1." not in name and ".layer.1." not in name}


def instead_of_safetensors(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return damage


def without_vocabulary(folder: Path) -> None:
    without("tokenizer.json", "tokenizer_config.json")(folder)


UNREADABLE = "config or processor of .* can't be read"
NO_JSON = ("", "{", "null", "5", '"x"', "[1]", "[{}]", b"\xff\xfe\x00")
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"

DAMAGED: list[tuple[str, Damage, str]] = [
    *((f"config {text!r}", written("config.json", text), UNREADABLE) for text in (*NO_JSON, "{}", "[]")),
    ("unknown type", changed("config.json", model_type="clipp"), UNREADABLE),
    ("type of no text", changed("config.json", model_type=5), UNREADABLE),
    ("classes of no list", changed("config.json", architectures=5), UNREADABLE),
    ("classes of no text", changed("config.json", architectures=[5]), UNREADABLE),
    *((f"tokenizer {text!r}", written("tokenizer.json", text), UNREADABLE) for text in (*NO_JSON, "{}")),
    *((f"tokenizer's config {text!r}", written("tokenizer_config.json", text), UNREADABLE) for text in NO_JSON),
    *((f"processor {text!r}", written("processor_config.json", text), UNREADABLE) for text in NO_JSON),
    ("no processor", without("processor_config.json"), UNREADABLE),
    ("no vocabulary", without_vocabulary, f"knows no words|{UNREADABLE}"),
]

DAMAGED_WHERE_THE_HOST_SAVED: list[tuple[str, Damage, str]] = [
    *((f"modules {text!r}", written("modules.json", text), UNREADABLE) for text in (*NO_JSON, '{"a": 1}')),
    ("no modules", written("modules.json", "[]"), "can't be"),
    *(
        (f"module {kind!r} in {path!r}", written("modules.json", json.dumps([module])), "can't be|embeds no images")
        for kind, path in ((5, ""), (None, ""), ("no.No", ""), ("os.path", ""), (TRANSFORMER, 5), (TRANSFORMER, "no"))
        for module in [{"idx": 0, "name": "0", "path": path, "type": kind}]
    ),
    *(
        (f"the host's {text!r}", written("config_sentence_transformers.json", text), "can't be")
        for text in ("", "{", "5", "[1]", '"x"')
    ),
    ("prompts of no mapping", changed("config_sentence_transformers.json", prompts=5), "can't be built"),
    ("a prompt of no text", changed("config_sentence_transformers.json", prompts={"query": 5}), "can't be built"),
    *((f"encoder {text!r}", written("sentence_bert_config.json", text), UNREADABLE) for text in NO_JSON),
    ("modalities of no mapping", changed("sentence_bert_config.json", modality_config=5), UNREADABLE),
    ("arguments of no mapping", changed("sentence_bert_config.json", processing_kwargs={"image": 5}), UNREADABLE),
    ("an unknown argument", changed("sentence_bert_config.json", nope=1), "can't be built.*nope"),
]  # fmt: skip

DAMAGED_WEIGHTS: list[tuple[str, Damage, str]] = [
    ("no file", without("model.safetensors"), "can't be loaded: .*no file named"),
    ("an empty file", written("model.safetensors", ""), "can't be loaded"),
    ("half a file", cut_weights, "can't be loaded"),
    ("text", written("model.safetensors", "weights"), "can't be loaded"),
    ("other sizes", partial(change_weights, change=crop_largest), "can't be loaded"),
    ("a layer of two", partial(change_weights, change=drop_layers), "lack .* of the .* in its config, e.g. '.*1"),
    ("no names", partial(change_weights, change=lambda tensors: {}), "lack .* of the .* in its config"),
    ("text for torch", instead_of_safetensors("pytorch_model.bin", b"text"), "can't be"),
    ("no list of parts", instead_of_safetensors("model.safetensors.index.json", b"{}"), "can't be"),
    (
        "a missing part",
        instead_of_safetensors("model.safetensors.index.json", b'{"metadata": {}, "weight_map": {"a": "b"}}'),
        "can't be",
    ),
]  # fmt: skip


def load_damaged(call: Callable[..., Any], checkpoint: str, folder: Path, damage: Damage, message: str) -> str:
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        call(folder, device="cpu")
    assert folder.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "kind"),
    [(load_model, "clip"), (load_model, "st"), (build_reranker, "llava"), (build_late_interaction, "llava")],
)
@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_damaged_files_are_named_before_weights(
    broken: dict[str, str], tmp_path: Path, call: Any, kind: str, damage: Damage, message: str
) -> None:
    assert "weights of" not in load_damaged(call, broken[kind], tmp_path / "damaged", damage, message)


@pytest.mark.parametrize(
    ("call", "kind"), [(load_model, "st"), (build_reranker, "ready"), (build_late_interaction, "late")]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [row[1:] for row in DAMAGED_WHERE_THE_HOST_SAVED],
    ids=[row[0] for row in DAMAGED_WHERE_THE_HOST_SAVED],
)
def test_damaged_files_of_the_host_are_named(
    checkpoints: dict[str, str], tmp_path: Path, call: Any, kind: str, damage: Damage, message: str
) -> None:
    load_damaged(call, checkpoints[kind], tmp_path / "damaged", damage, message)


@pytest.mark.parametrize("text", [*NO_JSON, '{"structure": {}}', '{"structure": 5, "types": {}}'])
def test_a_damaged_router_is_named(broken: dict[str, str], tmp_path: Path, text: str) -> None:
    load_damaged(
        load_model,
        broken["router"],
        tmp_path / "damaged",
        written("router_config.json", text),
        "can't be read|embeds no",
    )


@pytest.mark.parametrize("config", [{}, {"peft_type": "LORA", "base_model_name_or_path": "no/such"}, {"peft_type": 5}])
@pytest.mark.parametrize("call", [load_model, build_reranker, build_late_interaction])
def test_an_adapter_of_nothing_is_named(tmp_path: Path, call: Any, config: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=tmp_path.name):
        call(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("call", "kind"), [(load_model, "clip"), (build_reranker, "llava"), (build_late_interaction, "llava")]
)
@pytest.mark.parametrize(
    ("damage", "message"), [row[1:] for row in DAMAGED_WEIGHTS], ids=[row[0] for row in DAMAGED_WEIGHTS]
)
def test_damaged_weights_are_named(
    checkpoints: dict[str, str], tmp_path: Path, call: Any, kind: str, damage: Damage, message: str
) -> None:
    load_damaged(call, checkpoints[kind], tmp_path / "damaged", damage, message)


@pytest.mark.parametrize(
    ("call", "kind", "other"),
    [
        (load_model, "clip", "text"),
        (load_model, "clip", "siglip"),
        (load_model, "st", "llava"),
        (build_reranker, "llava", "clip"),
        (build_reranker, "ready", "text"),
        (build_late_interaction, "llava", "clip"),
        (build_late_interaction, "late", "text"),
    ],
)
def test_weights_of_another_model_are_named(
    checkpoints: dict[str, str], tmp_path: Path, call: Any, kind: str, other: str
) -> None:
    """transformers would draw the weights at random, with a log entry."""
    source = Path(checkpoints[other], "model.safetensors")
    message = "(lack .* of the .* in its config|can't be loaded)"
    load_damaged(call, checkpoints[kind], tmp_path / "damaged", lambda folder: shutil.copy(source, folder), message)


def test_a_head_that_no_file_has_is_drawn_as_the_host_does(text_encoder_path: str, tmp_path: Path) -> None:
    shutil.copytree(text_encoder_path, tmp_path / "scores")
    changed("config.json", architectures=["BertForSequenceClassification"], num_labels=1)(tmp_path / "scores")
    assert build_reranker(tmp_path / "scores", device="cpu").num_labels == 1


def test_a_folder_that_holds_no_checkpoint_is_named(checkpoints: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").mkdir()
    for path, message in (
        (tmp_path / "empty", "holds no checkpoint: found no files"),
        (tmp_path, "holds no checkpoint: found config.json, empty"),
        (Path(checkpoints["clip"], "config.json"), "is a file"),
    ):
        for call in (load_model, build_reranker, build_late_interaction, check_checkpoint):
            with pytest.raises(ConfigError, match=message):
                call(path)
        with pytest.raises(ConfigError, match=message):
            compose_router(path, checkpoints["siglip"])


# models in memory


@pytest.mark.parametrize(
    "call",
    [
        merge_lora,
        model_parts,
        describe_training,
        describe_model,
        check_documents,
        check_routes,
        extract_route,
        partial(freeze_parts, names=("text",)),
        partial(freeze_parts, names=None),
        partial(add_lora, lora=True),
        partial(add_lora, lora=None),
        partial(save_model, folder="never"),
        partial(load_adapters, folder="never"),
        partial(limit_pixels, limits=PixelLimits(max_pixels=64)),
    ],
    ids=lambda call: getattr(call, "func", call).__name__,
)
@pytest.mark.parametrize("model", NO_MODELS, ids=name_of)
def test_what_is_no_model_is_refused(call: Callable[..., Any], model: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)Expected a .*, got .* Load one with load_model"):
        call(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reranker model", "Expected a SentenceTransformer, got .*CrossEncoder"),
        ("late model", "Expected a SentenceTransformer, got .*MultiVectorEncoder"),
        ("clip", "has no Router, only Transformer"),
    ],
)
def test_a_model_of_another_kind_has_no_route(models: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        extract_route(models[name])


@pytest.mark.parametrize("route", [None, "", "txt", "query", *NO_TEXTS], ids=name_of)
def test_an_unknown_route_is_named(models: dict[str, Any], route: Any) -> None:
    with pytest.raises(ConfigError, match=r"has no route .*The routes are 'text'"):
        extract_route(models["router model"], route)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("vision", r'pass freeze=\("vision",\)'),
        *((each, "freeze=.* names no parts") for each in (5, True, NAN, Thing(), Thing)),
        *(([each], "has no part") for each in ("visoin", None, *NO_TEXTS)),
        (b"vision", "has no part 118"),
        (("vision", "text", "projection"), "leaves nothing to train"),
    ],
    ids=name_of,
)
def test_parts_that_there_are_not(models: dict[str, Any], names: Any, message: str) -> None:
    model = models["clip"]
    for call in (freeze_parts, partial(add_lora, lora=True)):
        if "nothing to train" in message and call is not freeze_parts:
            continue
        with pytest.raises(ConfigError, match=message):
            call(model, **{"names" if call is freeze_parts else "freeze": names})
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("documents", [None, "", "imgae", "video", "image+", *NO_TEXTS], ids=name_of)
def test_documents_that_there_are_not(models: dict[str, Any], documents: Any) -> None:
    for call in (check_documents, check_routes):
        with pytest.raises(ConfigError, match="documents"):
            call(models["router model"], documents)


@pytest.mark.parametrize("folder", [None, "", 5, NAN, b"x", [], {}, Thing()], ids=name_of)
def test_no_folder_for_a_model(models: dict[str, Any], folder: Any) -> None:
    for call in (save_model, load_adapters):
        with pytest.raises(ConfigError, match=r"folder=.*expected the path of a folder"):
            call(models["clip"], folder)


def test_a_folder_that_does_not_fit_a_model(
    models: dict[str, Any], checkpoints: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"is a file\. Expected a folder"):
        save_model(models["clip"], tmp_path / "file")
    for folder, message in (
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "none", "does not exist"),
        (checkpoints["ready"], "holds 2 modules, and the model 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_adapters(models["clip"], folder)


# adapters

NO_LORA = (0, 1, 5, NAN, "all", b"x", [], {}, {"r": 8}, Thing(), Thing, np.bool_(True))

BAD_CONFIGS: list[tuple[Arguments, str]] = [
    *(({"r": value}, rf"LoraConfig\.r=.*{WHOLE}") for value in (0, -1, 1.5, "8", None, True, NAN)),
    *(({"lora_alpha": value}, "lora_alpha=.*a finite number") for value in (NAN, INF, "32", None, True)),
    *(({"lora_alpha": value}, "lora_alpha=.*a number above 0") for value in (0, -1)),
    *(({"lora_dropout": value}, "lora_dropout=.*a finite number") for value in (NAN, "0", None)),
    *(({"lora_dropout": value}, "lora_dropout=.*a share from 0 up to 1") for value in (-1, 1.0, 2)),
    *(({"bias": value}, r"LoraConfig\.bias=.* is unknown") for value in ("al", 5)),
    *(({name: "no"}, rf"LoraConfig\.{name}='no': {FLAG}") for name in ("use_rslora", "use_dora", "fan_in_fan_out")),
    *(({"modules_to_save": value}, "modules_to_save=.*names of modules in a list") for value in ("projection", 5)),
    ({"alpha_pattern": {"q_proj": NAN}}, "lora_alpha=nan"),
    ({"alpha_pattern": 5}, "alpha_pattern=5 is no mapping"),
]  # fmt: skip

CONFIGS_THAT_FIT_NOTHING: list[tuple[Arguments, str]] = [
    ({"r": 2**40}, "no layer fits"),
    *(({"target_modules": value}, "no layer fits") for value in (["nope"], "nope", [5], 5, "(", ["layer_norm1"])),
    ({"init_lora_weights": "gausian"}, "no layer fits.*gausian"),
    ({"layers_to_transform": [99]}, "no layer fits"),
    ({"rank_pattern": 5}, "no layer fits"),
    ({"rank_pattern": {"vision_model.encoder.layers.1.self_attn.q_proj": 0}}, "no layer fits.*positive"),
    *(({"modules_to_save": [name]}, "modules_to_save has .*, and the model no such module") for name in ("nope", 5)),
]


def lora_config(arguments: Arguments) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"target_modules": ["q_proj"], **arguments})


@pytest.mark.parametrize("lora", NO_LORA, ids=name_of)
def test_what_is_no_config_of_adapters(models: dict[str, Any], lora: Any) -> None:
    pytest.importorskip("peft")
    for call in (check_lora, partial(add_lora, models["clip"])):
        with pytest.raises(ConfigError, match=r"lora=.*Expected True, None or a config of peft"):
            call(lora)


@pytest.mark.parametrize(("arguments", "message"), BAD_CONFIGS, ids=name_of)
def test_a_config_of_adapters_is_looked_at_before_weights(arguments: Arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_lora(lora_config(arguments))


@pytest.mark.parametrize(("arguments", "message"), CONFIGS_THAT_FIT_NOTHING, ids=name_of)
def test_adapters_that_fit_nothing_leave_the_model_as_it_was(
    models: dict[str, Any], arguments: Arguments, message: str
) -> None:
    model = models["clip"]
    before, trained = weights(model), [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        add_lora(model, lora_config(arguments))
    assert_same_weights(model, before)
    assert [weight.requires_grad for weight in model.parameters()] == trained


@pytest.mark.parametrize("seed", [None, -1, 1.5, "7", True, NAN, [1], 2**40], ids=name_of)
def test_a_seed_of_adapters(models: dict[str, Any], seed: Any) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=NO_SEED):
        add_lora(models["clip"], True, seed=seed)


# what passes


def test_whole_numbers_of_numpy_pass_everywhere(checkpoints: dict[str, str], tmp_path: Path) -> None:
    sides = (checkpoints["text"], checkpoints["siglip"])
    number = np.int64
    cut = load_model(checkpoints["clip"], truncate_dim=number(16), device="cpu")
    assert cut.encode(["revenue"]).shape == (1, 16)
    late = build_late_interaction(checkpoints["llava"], dimension=number(24), seed=np.uint8(3), device="cpu")
    assert late.get_embedding_dimension() == 24
    router = compose_router(*sides, dimension=number(24), device="cpu")
    assert router.get_embedding_dimension() == 24
    reranker = build_reranker(checkpoints["llava"], num_labels=number(1), max_length=number(64), device="cpu")
    assert reranker.max_seq_length == 64
    for at, model in enumerate((cut, late, router, reranker)):
        model.save_pretrained(str(tmp_path / str(at)))  # NumPy's numbers can't be written as JSON
    assert json.loads((tmp_path / "0" / "config_sentence_transformers.json").read_text())["truncate_dim"] == 16
    adapted = copy.deepcopy(cut)
    assert add_lora(adapted, lora_config({"r": number(4), "lora_alpha": np.float32(8)}), seed=number(3))["rank"] == 4


def test_more_dimensions_than_there_are_are_refused(checkpoints: dict[str, str]) -> None:
    for dimension in (129, 2**40):
        with pytest.raises(ConfigError, match=f"truncate_dim={dimension} is more than the 128 dimensions"):
            load_model(checkpoints["clip"], truncate_dim=dimension, device="cpu")


@pytest.mark.filterwarnings("ignore:.* is not applied")
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_pixels": 2**40},
        {"min_pixels": None, "max_pixels": None},
        {"dtype": "torch.float32"},
        {"dtype": torch.float64},
        {"attention": "eager"},
        {"device": torch.device("cpu")},
        {"prompts": None, "model_kwargs": None, "processor_kwargs": {}, "config_kwargs": None, "truncate_dim": None},
        {"truncate_dim": 128, "prompts": {"query": ""}, "token": False, "local_files_only": True},
        {"model_kwargs": {"dtype": "float32"}},
    ],
    ids=name_of,
)
def test_unusual_arguments_that_are_right(checkpoints: dict[str, str], arguments: Arguments) -> None:
    model = load_model(checkpoints["clip"], **{"device": "cpu", **arguments})
    assert model.encode(["revenue"]).shape == (1, 128)


@pytest.mark.parametrize("freeze", [None, (), [], "text", ["text"], {"text"}, ("text", "text")], ids=name_of)
def test_ways_to_name_a_side(checkpoints: dict[str, str], freeze: Any) -> None:
    model = compose_router(checkpoints["text"], checkpoints["siglip"], freeze=freeze, dimension=24, device="cpu")
    assert describe_training(model)["frozen_parts"] == (["text"] if freeze else [])


def test_presets_are_values(broken: dict[str, str]) -> None:
    preset = ROUTER_PRESETS["light"]
    with pytest.raises(ConfigError, match=NO_ENCODER):
        preset.compose(text=5, image=broken["siglip"])
    with pytest.raises(ConfigError, match="no argument 'dimensionn'"):
        preset.compose(dimensionn=5)
