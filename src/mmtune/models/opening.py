"""From the name of a checkpoint to its files and to what the host makes of them, fitted to the hardware."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import get_device_name
from torch import nn
from transformers import PreTrainedConfig

from mmtune.arguments import is_whole, nearest_name, shown
from mmtune.errors import ConfigError
from mmtune.host import flash_attention_loads, supports_flash_attention
from mmtune.models.checkpoints import TEXT_ONLY, CheckpointFiles, Encoder, find_checkpoint, first_line, missing_extra
from mmtune.models.kinds import HostModel
from mmtune.models.pixels import PixelLimits, image_arguments, warn_unused_limits

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

OWN_ARGUMENTS = frozenset({"max_pixels", "min_pixels", "dtype", "attention", "device"})
"""What every function that loads a checkpoint takes besides the host's arguments."""

PADDED_ALWAYS = ("qwen2_vl",)
"""Model types that don't work when flash attention gets the texts of a batch as one row, as the host says of them
(``unpad_inputs``, sentence-transformers 6.2)."""

Built = TypeVar("Built", bound=nn.Module)


@dataclass(frozen=True)
class LoadOptions:
    """The arguments that every function which loads a checkpoint takes; ``load_model`` explains them.

    Attributes:
        limits: The pixel limits, also those that stand in ``processor_kwargs``.
        processor_kwargs: What the host's processors get, without the pixel limits.

    Raises:
        ConfigError: A pixel limit is no limit, or is given twice.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    dtype: str | torch.dtype = "auto"
    attention: str = "auto"
    device: str | torch.device | None = None
    host_kwargs: Mapping[str, Any] = field(default_factory=dict)
    limits: PixelLimits = field(init=False)
    processor_kwargs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        # taken out of processor_kwargs, from where they would leak into the tokenizer's config
        given = PixelLimits(self.min_pixels, self.max_pixels).given()
        processor_kwargs = dict(self.host_kwargs.get("processor_kwargs") or {})
        if given and "size" in processor_kwargs:
            raise _given_twice(next(iter(given)), "processor_kwargs", "size")
        moved = {name: processor_kwargs.pop(name) for name in ("min_pixels", "max_pixels") if name in processor_kwargs}
        for name in moved.keys() & given.keys():
            raise _given_twice(name, "processor_kwargs", name)
        object.__setattr__(self, "limits", PixelLimits(**given, **moved))
        object.__setattr__(self, "processor_kwargs", processor_kwargs)

    def for_host(self, encoders: Sequence[Encoder]) -> dict[str, Any]:
        """Arguments of a host model, with dtype and attention chosen for the hardware and these encoders.

        Raises:
            ConfigError: dtype, attention or device can't be, or is given twice.
        """
        device = _target_device(self.device)
        chosen = {"device": self.device, "processor_kwargs": self.processor_kwargs}
        model_kwargs = dict(self.host_kwargs.get("model_kwargs") or {})
        for key, name, argument in (
            ("dtype", "dtype", self.dtype),
            ("torch_dtype", "dtype", self.dtype),
            ("attn_implementation", "attention", self.attention),
        ):
            if argument != "auto" and key in model_kwargs:
                raise _given_twice(name, "model_kwargs", key)
        if self.host_kwargs.get("backend", "torch") == "torch":
            # A Router in half precision can't be loaded again: the host leaves the Dense layers of its routes in
            # float32 (sentence-transformers 6.2). Training computes in bfloat16 all the same.
            dtype = "float32" if self.dtype == "auto" and len(encoders) > 1 else self.dtype
            given = model_kwargs.pop("torch_dtype", None) or model_kwargs.pop("dtype", None)
            dtype = _chosen_dtype(given or dtype, device)
            fits = self.attention == "auto" and _flash_attention_fits(dtype, device, encoders)
            attention = "flash_attention_2" if fits else self.attention
            own = {} if attention == "auto" else {"attn_implementation": attention}
            model_kwargs = {**own, **model_kwargs, "dtype": dtype}
        return {**self.host_kwargs, **chosen, "model_kwargs": model_kwargs}


def _given_twice(name: str, container: str, key: str) -> ConfigError:
    return ConfigError(
        f"{name} is given twice: as an argument and as {key!r} in {container}. Expected one of them. Remove one."
    )


def _target_device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device(get_device_name() if device is None else device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no device: {first_line(error)} Pass 'cpu' or 'cuda'.") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} was asked for, but torch finds no GPU. Leave device out, or pass 'cpu'.")
    return target


def _chosen_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        # emulated bfloat16, as on GPUs before Ampere, is slower than float32
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    chosen = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ConfigError(
            f"dtype={dtype!r} is no dtype for weights. Expected 'auto', {', '.join(map(repr, DTYPES))}, or one of "
            f"torch's own. Pass one of these."
        )
    return chosen


def _flash_attention_fits(dtype: torch.dtype, device: torch.device, encoders: Sequence[Encoder]) -> bool:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    configs = [encoder.config for encoder in encoders if encoder.config or encoder.modalities != TEXT_ONLY]
    # the kernels package may have to download: asked last
    return all(map(_runs_with_flash_attention, configs)) and flash_attention_loads()


def _runs_with_flash_attention(config: PreTrainedConfig | None) -> bool:
    """Whether a model does, with all models inside it, such as the PaliGemma of a ColPali."""
    if config is None or not supports_flash_attention(transformers.MODEL_MAPPING.get(type(config), None)):
        return False
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    classes = [transformers.MODEL_MAPPING.get(type(part), None) for part in inner]
    return all(supports_flash_attention(part) for part in classes if part is not None)


def check_host_kwargs(model_class: type[HostModel], host_kwargs: Mapping[str, Any]) -> None:
    """Make sure that a host model takes these arguments.

    Raises:
        ConfigError: It does not; the message names the nearest one.
    """
    known = set(inspect.signature(model_class.__init__).parameters) - {"self", "model_name_or_path", "modules"}
    known |= OWN_ARGUMENTS
    for name in host_kwargs.keys() - known:
        nearest = nearest_name(name, known)
        hint = f"The nearest is {nearest!r}." if nearest else f"Known are {', '.join(sorted(known))}."
        raise ConfigError(f"mmtune and {model_class.__name__} know no argument {name!r}. {hint} Rename or remove it.")


def require_dimension(dimension: object, what: str) -> int | None:
    """``dimension`` as a Python integer, or ``None``; ``what`` has it, for the message.

    Raises:
        ConfigError: It is no positive whole number.
    """
    if dimension is None:
        return None
    if not is_whole(dimension) or int(dimension) < 1:  # type: ignore[call-overload] - a number, as is_whole has found
        raise ConfigError(
            f"dimension={dimension!r} is no size of {what}. Expected a positive whole number such as 768, or None."
        )
    return int(dimension)  # type: ignore[call-overload]


def open_checkpoint(name_or_path: str | Path, options: LoadOptions | None = None) -> CheckpointFiles:
    """The small files of a checkpoint, looked for where a host model with these options would look.

    Args:
        name_or_path: A folder, in which ``~`` is the user's own, or a name on the Hub.
        options: How it will be loaded.

    Raises:
        ConfigError: It is no name, or there is no checkpoint.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path).strip():
        raise ConfigError(
            f"name_or_path={shown(name_or_path)} names no checkpoint. Expected a folder or a Hub name. Pass one; "
            f"a model that is built already is used as it is, as in finetune(model, dataset)."
        )
    name = str(name_or_path)
    options = options or LoadOptions()
    given = options.host_kwargs
    hub = {
        # the host reads the same variable
        "cache_dir": given.get("cache_folder") or os.getenv("SENTENCE_TRANSFORMERS_HOME"),
        "token": given.get("token"),
        "revision": given.get("revision"),
        "local_files_only": given.get("local_files_only", False),
    }
    code = {"trust_remote_code": given.get("trust_remote_code", False)}
    return find_checkpoint(
        str(Path(name).expanduser()) if name.startswith("~") else name,
        hub=hub,
        processor_kwargs=code | options.processor_kwargs,
        config_kwargs=code | (given.get("config_kwargs") or {}),
    )


def check_limits(encoders: Sequence[Encoder], limits: PixelLimits) -> None:
    """Make sure that the encoders of a checkpoint can keep pixel limits.

    Raises:
        ConfigError: As in ``image_arguments``.

    Warns:
        UserWarning: An image processor resizes to a fixed size.
    """
    with_images = [encoder for encoder in encoders if encoder.processor is not None]
    for encoder in with_images:
        image_arguments(encoder.processor, encoder.image_arguments, limits)
    warn_unused_limits([encoder.processor for encoder in with_images], limits)


def build(host_class: Callable[..., Built], name: str, **host_kwargs: Any) -> Built:
    """What a host class makes of a checkpoint.

    Raises:
        ConfigError: An argument does not fit, or the weights can't be loaded.
        MissingExtraError: A package that the checkpoint needs is not installed.
    """
    try:
        built = host_class(name, **host_kwargs)
    except ImportError as error:
        raise missing_extra(name, error) from error
    except ValueError as error:  # an attention that transformers does not know, among others
        raise ConfigError(f"{name!r} can't be built with these arguments: {first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The weights of {name!r} can't be loaded: {first_line(error)} Expected the weight files that belong to "
            f"its config. Download or save the checkpoint again."
        ) from error
    for module in built.modules():
        if isinstance(module, Transformer) and module.config.model_type in PADDED_ALWAYS:
            module.unpad_inputs = False
    return built
