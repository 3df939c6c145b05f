"""LoRA: small trained matrices beside frozen weights, by peft, on any host model."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from torch import nn

from mmtune.arguments import require_flag, require_mapping, require_number, require_one_of, require_whole
from mmtune.errors import ConfigError, MissingExtraError
from mmtune.host import adapter_layers, forget_adapter, take_out_adapters
from mmtune.models.adapters import encoders_of, has_adapters, is_quantized
from mmtune.models.checkpoints import how_to_install
from mmtune.models.fresh import seeded
from mmtune.models.kinds import require_model
from mmtune.models.parts import PROJECTION, encoder_parts, parts_named

if TYPE_CHECKING:
    from peft import PeftConfig

LoraChoice: TypeAlias = "PeftConfig | bool | None"
"""What ``lora=`` takes."""

DEFAULTS = {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0}
"""``lora=True``: rank and scaling of ColPali (Faysse et al., 2024, arXiv 2407.01449), on all linear layers of the
language model (QLoRA, Dettmers et al., 2023, arXiv 2305.14314: with fewer, LoRA stays behind full finetuning). No
dropout, so that the size of a cached loss's mini-batches does not change the result."""


def check_lora(lora: LoraChoice) -> None:
    """Make sure, before weights are loaded, that ``lora`` can be used.

    Args:
        lora: ``None`` or ``False`` for none, ``True`` for the defaults, or a config of peft.

    Raises:
        ConfigError: It is something else, a method that adds no weights to layers (prompt tuning), or a config with a
            value that can't be.
        MissingExtraError: peft is not installed.
    """
    if lora is None or lora is False:
        return
    if find_spec("peft") is None:
        raise MissingExtraError(f"lora={lora!r} needs peft, which is not installed. {how_to_install('peft')}")
    from peft import PeftConfig

    if lora is not True and not isinstance(lora, PeftConfig):
        raise ConfigError(
            f"lora={lora!r:.80} is a {type(lora).__name__}. Expected True, None or a config of peft: pass "
            f"peft.LoraConfig(r=32, lora_alpha=32)."
        )
    if lora is not True and (lora.is_prompt_learning or lora.is_adaption_prompt):
        raise ConfigError(
            f"lora={type(lora).__name__}(...) adds tokens to the input and no weights to layers, so that it can't be "
            f"saved. Expected a config such as peft.LoraConfig. Pass that, or True."
        )
    if lora is not True:
        _check_config(lora)


def _check_config(config: "PeftConfig") -> None:
    """Look at what peft takes as it is, and fails on, or trains nothing with, once the weights are loaded."""
    from peft import LoraConfig

    kind = f"lora: {type(config).__name__}"
    for flag in fields(config):
        if flag.type in (bool, "bool"):
            require_flag(f"{kind}.{flag.name}", getattr(config, flag.name))
    saved = getattr(config, "modules_to_save", None)
    if saved is not None and (isinstance(saved, str) or not isinstance(saved, Iterable)):
        raise ConfigError(f"{kind}.modules_to_save={saved!r:.80}: expected the names of modules in a list.")
    if isinstance(config, LoraConfig):
        require_whole(f"{kind}.r", config.r)
        require_one_of(f"{kind}.bias", config.bias, ("none", "all", "lora_only"))
        patterns = config.alpha_pattern or {}
        require_mapping(f"{kind}.alpha_pattern", patterns, expected="numbers by the names of layers")
        for alpha in (config.lora_alpha, *patterns.values()):
            if require_number(f"{kind}.lora_alpha", alpha) <= 0:
                raise ConfigError(f"{kind}.lora_alpha={alpha!r}: expected a number above 0, which adapters count by.")
        if not 0 <= require_number(f"{kind}.lora_dropout", config.lora_dropout) < 1:
            raise ConfigError(f"{kind}.lora_dropout={config.lora_dropout!r}: expected a share from 0 up to 1.")


def add_lora(model: BaseModel, lora: LoraChoice, *, freeze: Sequence[str] = (), seed: int = 42) -> dict[str, Any]:
    """Attach adapters to a model and freeze all else, except what follows the encoders (Dense modules).

    Where the config names no ``target_modules``, adapters go to every linear layer of the language model of a VLM, and
    not to its vision tower; in a dual encoder (CLIP, SigLIP) to both towers, which have to meet; in a text encoder to
    all of it; in a Router to each of its encoders by the same rule. Parts in ``freeze`` get none, nor does what is
    frozen in the model as it comes, unless that is all of it. Encoders that are no transformers models, such as
    ``StaticEmbedding``, can't carry adapters and stay as trainable as they were.

    Args:
        model: Any host model, changed in place. Weights that bitsandbytes has quantised are prepared (QLoRA).
        lora: As in ``check_lora``. A config with ``target_modules`` is taken as it stands. ``None`` adds nothing; the
            adapters that a loaded model brings are then trained on.
        freeze: Parts of the model, as in ``freeze_parts``.
        seed: Of the adapters' first weights. The caller's random state is left as it was.

    Returns:
        Plain values for ``settings``: ``type``, ``rank``, ``alpha``, ``dropout``, ``layers`` (how many have an
        adapter), ``targets`` (the last words of their names), ``parameters`` (of the adapters) and ``quantized``.
        Empty for a model without adapters.

    Raises:
        ConfigError: The model has adapters already, no layer fits, the config reaches into a frozen part, or quantised
            weights are to be trained without adapters.
        MissingExtraError: peft is not installed.

    Warns:
        UserWarning: Quantised weights are on a CPU.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> model = SentenceTransformer("my-model", device="cpu")  # a CLIP
        >>> facts = add_lora(model, True, freeze=("text",))
        >>> facts["rank"], facts["layers"]
        (32, 12)
    """
    check_lora(lora)
    require_model(model)
    encoders = encoders_of(model)
    adapted = [module for module in encoders if has_adapters(module)]
    if not lora:
        _train_on(encoders, adapted)
        return _facts(adapted)
    if adapted:
        raise ConfigError(
            f"lora={lora!r}, but the model has adapters already. Expected one without. To train these on, leave lora "
            f"out; to start others on top of them, pass merge_lora(model)."
        )
    frozen = {id(parameter) for part in parts_named(model, freeze).values() for parameter in part}
    modules = [name for module in encoders for name, _ in module.model.named_modules()]
    for name in getattr(lora, "modules_to_save", None) or ():
        if not any(module.endswith(str(name)) for module in modules):
            raise ConfigError(
                f"lora: modules_to_save has {name!r}, and the model no such module. Name one that it has."
            )
    adapted = attach_adapters(encoders, lora, frozen | _frozen_before(model), seed=seed)
    inside = [
        name
        for module in adapted
        for name, layer in adapter_layers(module.model)
        if any(id(parameter) in frozen for parameter in layer.get_base_layer().parameters())
    ]
    if inside:
        for module in adapted:
            take_out_adapters(module.model, merge=False)
        raise ConfigError(
            f"lora: target_modules reaches {len(inside)} layers of frozen parts, e.g. {inside[0]!r}. Expected adapters "
            f"outside of these. Leave the part out of freeze, or target_modules out of the config."
        )
    # peft has frozen the encoders that it reached; a VLM's own projection among them
    reached = {id(parameter) for module in adapted for parameter in module.parameters()}
    for module in encoders:
        for name, part in encoder_parts(module).items():
            for parameter in part:
                if name != PROJECTION and id(parameter) not in reached:
                    parameter.requires_grad_(False)
    return _facts(adapted)


def _train_on(encoders: Sequence[Transformer], adapted: Sequence[Transformer]) -> None:
    """Train the adapters that a model has brought along: the host loads them for inference."""
    if any(is_quantized(module) and not has_adapters(module) for module in encoders):
        raise ConfigError(
            "The weights are quantised, and can't be trained. Expected adapters beside them: pass lora=True, or load "
            "the model without quantization_config."
        )
    for module in adapted:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            for name in module.model.active_adapters():
                module.model.peft_config[name].inference_mode = False
                module.model.set_adapter(name)
            _make_precise(module)


def _frozen_before(model: BaseModel) -> set[int]:
    """Weights that are frozen as the model is, such as a tower that no input of a route reaches.

    None where all are: then adapters are what is to be trained beside them.
    """
    weights = list(model.parameters())
    if not any(parameter.requires_grad for parameter in weights):
        return set()
    # quantised weights never take gradients
    return {id(weight) for weight in weights if not weight.requires_grad and weight.is_floating_point()}


def attach_adapters(
    encoders: Sequence[Transformer], lora: LoraChoice, frozen: set[int], *, seed: int
) -> list[Transformer]:
    """Attach to each encoder what fits it.

    Args:
        encoders: The host's modules, changed in place; they may be on the ``meta`` device.
        lora: ``True`` or a config of peft.
        frozen: The ids of the weights that get no adapters by default.
        seed: Of the adapters' first weights.

    Returns:
        The encoders that have adapters now.

    Raises:
        ConfigError: None has a layer that fits.
    """
    reasons = []
    # peft draws on the CPU and moves the weights then
    with seeded(seed), torch.device("cpu"):
        for module in encoders:
            config = _config_for(module, lora, frozen)
            if config is None:
                continue
            if is_quantized(module):
                _prepare_quantized(module)
            try:
                module.model.add_adapter(config)
            except Exception as error:  # peft refuses in every way; in a Router another encoder may fit
                forget_adapter(module.model)
                reasons.append(f" {type(module.model).__name__}: {error}")
                continue
            _make_precise(module)
            if config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
                # a relative path would only load from the folder where the training was started
                config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    adapted = [module for module in encoders if has_adapters(module)]
    if adapted:
        return adapted
    if not encoders:
        raise ConfigError(
            f"lora={lora!r}: the model has no transformers model. Expected one to attach to. Leave lora out."
        )
    if reasons:
        raise ConfigError(
            f"lora: no layer fits.{' '.join(reasons)} Name layers of the model in target_modules, or leave it out."
        )
    raise ConfigError(
        f"lora={lora!r}: all layers that would get adapters are in frozen parts. Expected adapters outside of these. "
        f"Leave the language model or an encoder out of freeze, or name other layers in target_modules."
    )


def _config_for(module: Transformer, lora: LoraChoice, frozen: set[int]) -> "PeftConfig | None":
    """An own copy of the config, with targets; ``None`` where an encoder has nothing to attach to."""
    from peft import LoraConfig, TaskType

    defaults = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **DEFAULTS)
    config: Any = defaults if isinstance(lora, bool) else copy.deepcopy(lora)
    if not getattr(config, "target_modules", None) and not getattr(config, "target_parameters", None):
        config.target_modules = _linear_layers(module, frozen)
        return config if config.target_modules else None
    return config


def _linear_layers(module: Transformer, frozen: set[int]) -> set[str]:
    """Names of the linear layers that get adapters by default. The output layer is none of them, as in QLoRA.

    Neither are those of torch's own attention, as in SigLIP's pooling head: it reads their weights and never calls
    them, so that an adapter there would do nothing until it is merged.
    """
    parts = {name: part for name, part in encoder_parts(module).items() if name != PROJECTION}
    # a route for texts may use one side of a dual encoder
    unused = {"text", "vision"} - {"vision" if key == "image" else key for key in module.modality_config}
    chosen = [part for name, part in parts.items() if name not in unused or len(parts) == 1]
    if "language" in parts:
        chosen = [parts["language"]]
    wanted = {id(parameter) for part in chosen for parameter in part} - frozen

    attentions = [layer for layer in module.model.modules() if isinstance(layer, nn.MultiheadAttention)]
    uncalled = {id(inner) for layer in attentions for inner in layer.children()}
    uncalled.add(id(module.model.get_output_embeddings()))
    return {
        name
        for name, layer in module.model.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in uncalled and id(layer.weight) in wanted
    }


def _prepare_quantized(module: Transformer) -> None:
    from peft import prepare_model_for_kbit_training

    if module.model.device.type == "cpu":
        warnings.warn(
            "The weights are quantised and on a CPU, where bitsandbytes packs them anew for the first evaluation, and "
            "gradients do not pass from then on (bitsandbytes 0.50). Train on a GPU, or without quantization_config.",
            UserWarning,
            stacklevel=4,
        )
    # checkpointing is for the training arguments to say
    prepare_model_for_kbit_training(module.model, use_gradient_checkpointing=False)


def _make_precise(module: Transformer) -> None:
    # as peft does in models of its own: small updates of bfloat16 weights are rounded away
    for _, layer in adapter_layers(module.model):
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and not name.startswith("base_layer."):
                parameter.data = parameter.data.float()


def _facts(adapted: Sequence[Transformer]) -> dict[str, Any]:
    if not adapted:
        return {}
    layers = [name for module in adapted for name, _ in adapter_layers(module.model)]
    config = next(iter(adapted[0].model.peft_config.values()))
    return {
        "type": getattr(config.peft_type, "value", str(config.peft_type)),
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "dropout": getattr(config, "lora_dropout", None),
        "layers": len(layers),
        "targets": sorted({name.rpartition(".")[2] for name in layers}),
        "parameters": sum(p.numel() for module in adapted for p in module.parameters() if p.requires_grad),
        "quantized": any(is_quantized(module) for module in adapted),
    }
