"""Adapters that a model has: merging, saving and loading them.

Host models that end in one encoder save and load adapters themselves. The host can't load adapters inside a Router
(sentence-transformers 6.2, transformers 5.23: it looks for the base model in the route's subfolder). ``save_model`` and
``load_adapters`` are for these.
"""

import copy
import json
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from torch import nn

from mmtune.arguments import require_path
from mmtune.errors import ConfigError
from mmtune.host import take_out_adapters, weights_beside_adapters
from mmtune.models.checkpoints import CheckpointFiles, find_checkpoint
from mmtune.models.kinds import require_model

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


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
        ConfigError: The weights are quantised, so that the sum would be rounded to a few bits; or this is no model.
    """
    require_model(model)
    adapted = [module for module in encoders_of(model) if has_adapters(module)]
    if any(is_quantized(module) for module in adapted):
        raise ConfigError(
            "merge_lora: the weights are quantised, and the sum would be rounded to a few bits. Expected adapters on "
            "weights as they are. Save the model, load that folder without quantization_config, and merge it then."
        )
    for module in adapted:
        take_out_adapters(module.model, merge=True)
        module.model.requires_grad_(True)
        # these weights are in no checkpoint yet, on which other adapters could be loaded again
        module.model.name_or_path = ""
    return model


def save_model(model: BaseModel, folder: str | Path) -> bool:
    """Save a model so that it loads in the plain host, with the adapters apart wherever the host can load them.

    Adapters are saved without their base model, which is named beside them and must stay where it is. A merged copy is
    saved where they would load as another model: inside a Router, beside weights that are not those of the named
    checkpoint (any more), whose files are read to find out, and where that checkpoint lies in the folder that is
    written.

    Args:
        model: Any host model; it embeds as before.
        folder: Where it goes, as in ``save_pretrained``. Merging takes memory for another copy of the weights, on the
            CPU.

    Returns:
        Whether the adapters were merged for saving.

    Raises:
        ConfigError: They would have to be, and the weights are quantised; or ``folder`` is none.
    """
    require_model(model)
    require_path("folder", folder)
    if Path(folder).is_file():
        raise ConfigError(f"folder={str(folder)!r} is a file. Expected a folder, which may be new. Pass one.")
    merges = has_lora(model) and not _host_can_reload(model, Path(folder))
    saved = merged_copy(model) if merges else model
    saved.save_pretrained(str(folder))
    if not has_lora(model) and isinstance(model[0], Transformer):
        # adapters that come later are for these weights, not for those that were loaded before training
        model[0].model.name_or_path = str(Path(folder).resolve())
    return merges


def merged_copy(model: BaseModel) -> BaseModel:
    """A copy of a model on the CPU with its adapters merged; the model itself stays as it is.

    Raises:
        ConfigError: As for ``merge_lora``.
    """
    return merge_lora(_copy_on_cpu(model))


def load_adapters(model: BaseModel, folder: str | Path) -> None:
    """Read what was trained from a checkpoint of the same model: adapters and the modules after the encoders.

    For ``_load_from_checkpoint`` of the host's trainer, which builds the whole model again for it: that fails inside a
    Router, and ``load_best_model_at_end`` then keeps the last weights with no more than a log entry.

    Args:
        model: The model with its adapters, changed in place.
        folder: What ``save_pretrained`` wrote for a model of this structure.

    Raises:
        ConfigError: There is no checkpoint, or it has no adapters, or others.
    """
    require_model(model)
    require_path("folder", folder)
    saved = find_checkpoint(os.fspath(folder)).modules or []
    if len(saved) != len(model):
        raise ConfigError(
            f"{str(folder)!r} holds {len(saved)} modules, and the model {len(model)}. Pass the run's own."
        )
    paths = (entry["path"] for entry in sorted(saved, key=lambda entry: entry["idx"]))
    for module, path in zip(model.children(), paths, strict=True):
        _load_module(module, Path(folder), path)


def encoders_of(model: nn.Module) -> list[Transformer]:
    """The encoders of a model, those in the routes of a Router too."""
    return [module for module in model.modules() if isinstance(module, Transformer)]


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
    """Whether the host will load the adapters beside the weights that they have now, and writing leaves these."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    in_routers = {id(module) for router in routers for module in encoders_of(router)}
    for module in filter(has_adapters, encoders_of(model)):
        base = next(iter(module.model.peft_config.values())).base_model_name_or_path
        if not base or id(module) in in_routers:
            return False
        if is_quantized(module):  # these can't be trained, and not be merged either
            continue
        path = Path(base).resolve()
        is_overwritten = path.is_dir() and folder.resolve() in (path, *path.parents)
        if is_overwritten or not _has_weights_of(module, str(base)):
            return False
    return True


def _has_weights_of(module: Transformer, base: str) -> bool:
    """Whether the weights beside the adapters are those of a checkpoint, which is read one tensor at a time.

    Nothing tells whether weights were trained before adapters came to them, so they are compared. transformers renames
    some as it loads them: one may lie there under a name with another beginning, but with the same layer's number.
    """
    model_class: Any = type(module.model)
    weights = weights_beside_adapters(module.model)
    saved: dict[str, Callable[[], torch.Tensor]] = {}
    try:
        with ExitStack() as opened:
            for path in CheckpointFiles(base, {"local_files_only": True}).weight_files():
                if path.suffix == ".safetensors":
                    file = opened.enter_context(safe_open(path, framework="pt"))
                    saved |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - no mapping
                else:
                    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                    saved |= {name: partial(tensors.get, name) for name in tensors}
            # what the host will build: other layers than there are now need other weights
            with torch.device("meta"):
                config = model_class.config_class.from_pretrained(base, local_files_only=True)
                expected = model_class(config).state_dict().keys()
            return expected <= weights.keys() and _are_saved({name: weights[name] for name in expected}, saved)
    except (OSError, ValueError, RuntimeError, SafetensorError):  # not there (any more), or of another structure
        return False


def _are_saved(weights: dict[str, torch.Tensor], saved: dict[str, Callable[[], torch.Tensor]]) -> bool:
    names_by_end: dict[str, list[str]] = defaultdict(list)
    for name in saved:
        words = name.split(".")
        for start in range(len(words)):
            names_by_end[".".join(words[start:])].append(name)

    def is_saved(name: str) -> bool:
        words = name.split(".")
        number = next((at for at, word in enumerate(words) if word.isdigit()), len(words) - 1)
        ends = (".".join(words[start:]) for start in range(max(1, number)))
        alike = next((names_by_end[end] for end in ends if end in names_by_end), [])
        weight = weights[name].detach().cpu()
        return any(torch.equal(weight, saved[other]().to(weight.dtype)) for other in alike)

    # tied weights are saved once
    names_by_weight: dict[int, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        names_by_weight[id(weight)].append(name)
    return all(any(map(is_saved, names)) for names in names_by_weight.values())


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
