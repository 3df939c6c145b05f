"""Adapters that a model has: merging, saving and loading them.

Host models that end in one encoder save and load adapters themselves. The host can't load adapters inside a Router
(sentence-transformers 6.2, transformers 5.23: it looks for the base model in the route's subfolder). ``save_model`` and
``load_adapters`` are for these.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from torch import nn

from mmtune.errors import ConfigError
from mmtune.host import forget_conversions

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
"""Words that peft puts into the name of a weight that it has wrapped."""


def has_lora(model: BaseModel) -> bool:
    """Whether a model has adapters, in any of its encoders."""
    return any(has_adapters(module) for module in encoders_of(model))


def has_adapters(module: Transformer) -> bool:
    """Whether an encoder has adapters."""
    return bool(getattr(module.model, "peft_config", None))


def merge_lora(model: BaseModel) -> BaseModel:
    """Add the adapters to the weights beside which they were trained, and remove them.

    Afterwards embeddings are the same up to rounding (1e-6 in float32), ``save_pretrained`` writes full weights that
    load without peft, and all weights can be trained again.

    Args:
        model: Any host model; one without adapters stays as it is.

    Returns:
        The same model, changed in place.

    Raises:
        ConfigError: The weights are quantised, so that the sum would be rounded to a few bits.
    """
    adapted = [module for module in encoders_of(model) if has_adapters(module)]
    if any(is_quantized(module) for module in adapted):
        raise ConfigError(
            "merge_lora: the weights are quantised, and the sum would be rounded to a few bits. Expected adapters on "
            "weights as they are. Save the model, load that folder without quantization_config, and merge it then."
        )
    for module in adapted:
        take_out(module, merge=True)
        forget_conversions(module.model)
        module.model.requires_grad_(True)
        # these weights are in no checkpoint yet, on which other adapters could be loaded again
        module.model.name_or_path = ""
    return model


def save_model(model: BaseModel, folder: str | Path) -> bool:
    """Save a model so that it loads in the plain host, with the adapters apart wherever the host can load them.

    Adapters are saved without their base model, which is named beside them and must stay where it is. A merged copy is
    saved where they would load as another model: inside a Router, beside weights that are not those of the named
    checkpoint (any more), which is read to find out, and where that checkpoint lies in the folder that is written.

    Args:
        model: Any host model; it embeds as before.
        folder: Where it goes, as in ``save_pretrained``. Merging takes memory for another copy of the weights, on the
            CPU.

    Returns:
        Whether the adapters were merged for saving.

    Raises:
        ConfigError: They would have to be, and the weights are quantised.
    """
    merges = has_lora(model) and not _host_can_reload(model, Path(folder))
    saved = merge_lora(_copy_on_cpu(model)) if merges else model
    saved.save_pretrained(str(folder))
    if not has_lora(model) and isinstance(model[0], Transformer):
        # adapters that come later are for these weights, not for those that were loaded before training
        model[0].model.name_or_path = str(Path(folder).resolve())
    return merges


def load_adapters(model: BaseModel, folder: str | Path) -> None:
    """Read what was trained from a checkpoint of the same model: adapters and the modules after the encoders.

    For ``_load_from_checkpoint`` of the host's trainer, which builds the whole model again for it: that fails inside a
    Router, and ``load_best_model_at_end`` then keeps the last weights with no more than a log entry.

    Args:
        model: The model with its adapters, changed in place.
        folder: What ``save_pretrained`` wrote for a model of this structure.

    Raises:
        ConfigError: The checkpoint has no adapters, or others.
    """
    saved = json.loads(Path(folder, "modules.json").read_text(encoding="utf-8"))
    paths = (entry["path"] for entry in sorted(saved, key=lambda entry: entry["idx"]))
    for module, path in zip(model.children(), paths, strict=True):
        _load_module(module, Path(folder), path)


def encoders_of(model: nn.Module) -> list[Transformer]:
    """The encoders of a model, those in the routes of a Router too."""
    return [module for module in model.modules() if isinstance(module, Transformer)]


def adapter_layers(module: Transformer) -> list[tuple[str, Any]]:
    """The layers of an encoder that have adapters, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in module.model.named_modules() if isinstance(layer, BaseTunerLayer)]


def take_out(module: Transformer, *, merge: bool) -> None:
    """Put the layers back that the adapters are wrapped around. peft has this for its own models only."""
    from peft.utils import ModulesToSaveWrapper

    for name, layer in adapter_layers(module):
        if merge:
            layer.merge(safe_merge=True)
        module.model.set_submodule(name, layer.get_base_layer())
    for name, wrapper in list(module.model.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            kept = wrapper.modules_to_save[wrapper.active_adapters[0]] if merge else wrapper.original_module
            module.model.set_submodule(name, kept)
    module.model.delete_adapter(list(module.model.peft_config))


def is_quantized(module: Transformer) -> bool:
    """Whether the weights of an encoder are quantised."""
    return bool(getattr(module.model, "is_quantized", False))


def _copy_on_cpu(model: BaseModel) -> BaseModel:
    if any(is_quantized(module) for module in encoders_of(model)):
        return copy.deepcopy(model)  # these weights are a class of their own; merge_lora refuses them
    memo: dict[int, Any] = {id(value): value.detach().cpu().clone() for value in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().cpu().clone(), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _host_can_reload(model: BaseModel, folder: Path) -> bool:
    in_router = [module for router in model.modules() if isinstance(router, Router) for module in encoders_of(router)]
    for module in encoders_of(model):
        if has_adapters(module) and (
            any(module is other for other in in_router) or not _is_beside_checkpoint(module, folder)
        ):
            return False
    return True


def _is_beside_checkpoint(module: Transformer, folder: Path) -> bool:
    """Whether the weights beside the adapters are those that the host will load, and writing the folder leaves them."""
    base = next(iter(module.model.peft_config.values())).base_model_name_or_path
    if not base:
        return False
    # quantised weights can't be trained, and not be merged either
    return is_quantized(module) or (not _lies_in(str(base), folder) and _has_weights_of(module, str(base)))


def _lies_in(base: str, folder: Path) -> bool:
    path = Path(base).resolve()
    return path.is_dir() and folder.resolve() in (path, *path.parents)


def _has_weights_of(module: Transformer, base: str) -> bool:
    model_class: Any = type(module.model)
    try:
        with torch.random.fork_rng(devices=[]):  # weights that the checkpoint lacks are drawn
            loaded = model_class.from_pretrained(base, dtype=module.model.dtype, local_files_only=True).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError):  # not there (any more), or of another structure
        return False
    weights = {WRAPPERS.sub("", name): value for name, value in module.model.state_dict().items()}
    return all(name in weights and _same(weights[name], value) for name, value in loaded.items())


def _same(weight: torch.Tensor, loaded: torch.Tensor) -> bool:
    return torch.equal(weight.cpu(), loaded.to(weight.dtype))


def _load_module(module: nn.Module, folder: Path, path: str) -> None:
    if isinstance(module, Router):
        structure = json.loads((folder / path / "router_config.json").read_text(encoding="utf-8"))["structure"]
        for route, modules in module.sub_modules.items():
            for inner, name in zip(modules.children(), structure[route], strict=True):
                _load_module(inner, folder, Path(path, name).as_posix())
    elif isinstance(module, Transformer) and has_adapters(module):
        _load_adapter(module, folder / path / ADAPTER_FILE)
    elif any(parameter.requires_grad for parameter in module.parameters()):
        module_class: Any = type(module)
        module.load_state_dict(module_class.load(str(folder), subfolder=path).state_dict())


def _load_adapter(module: Transformer, file: Path) -> None:
    from peft import set_peft_model_state_dict

    if not file.is_file():
        raise ConfigError(f"{str(file)!r} does not exist. Expected a checkpoint with adapters. Pass the run's own.")
    state = {name.removeprefix(PEFT_PREFIX): value for name, value in load_file(file).items()}
    adapter_name = module.model.active_adapters()[0]
    expected = module.model.get_adapter_state_dict(adapter_name)
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in expected.items()}:
        raise ConfigError(
            f"{str(file)!r} holds other adapters than the model: {len(state)} tensors, expected {len(expected)} of the "
            f"same names and shapes. Pass the lora config of the run that wrote it."
        )
    set_peft_model_state_dict(module.model, state, adapter_name)
