"""From the name of a checkpoint to its files and to what the host makes of them, fitted to the hardware."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import CardData
from safetensors import SafetensorError
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import get_device_name
from torch import nn
from transformers import PreTrainedConfig

from mmtune.arguments import (
    MediaLimits,
    is_whole,
    nearest_name,
    require_flag,
    require_mapping,
    require_one_of,
    require_path,
    require_type,
    require_whole,
    shown,
)
from mmtune.errors import ConfigError
from mmtune.host import flash_attention_loads, supports_flash_attention, unread_weights
from mmtune.models.adapters import has_adapters, is_quantized
from mmtune.models.checkpoints import TEXT_ONLY, CheckpointFiles, Encoder, find_checkpoint, first_line, missing_extra
from mmtune.models.kinds import HostModel
from mmtune.models.pixels import PixelLimits, image_arguments, warn_unused_limits

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

OWN_ARGUMENTS = frozenset(
    {"max_pixels", "min_pixels", "max_seconds", "fps", "max_frames", "dtype", "attention", "device"}
)
"""What every function that loads a checkpoint takes besides the host's arguments."""

LARGEST_DIMENSION = 2**16
"""Of an embedding that is asked for; far above what anything stores."""

ENOUGH_MISSING = 0.2
"""Share of an encoder's weights that are in no file, from which on the files are not its own: above that of a head."""

PADDED_ALWAYS = ("qwen2_vl",)
"""Model types that don't work when flash attention gets the texts of a batch as one row, as the host says of them
(``unpad_inputs``, sentence-transformers 6.2)."""

Built = TypeVar("Built", bound=nn.Module)


@dataclass(frozen=True)
class LoadOptions:
    """The arguments that every function which loads a checkpoint takes; ``load_model`` explains them.

    Attributes:
        limits: The pixel limits, also those that stand in ``processor_kwargs``.
        media: The limits of sounds and clips.
        processor_kwargs: What the host's processors get, without the pixel limits.

    Raises:
        ConfigError: A limit is no limit, or is given twice; dtype, attention, device or an argument of the host
            can't be.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    dtype: str | torch.dtype = "auto"
    attention: str = "auto"
    device: str | torch.device | None = None
    host_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_seconds: float | None = None
    fps: float | None = None
    max_frames: int | None = None
    limits: PixelLimits = field(init=False)
    media: MediaLimits = field(init=False)
    processor_kwargs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        for name, value in self.host_kwargs.items():
            if value is not None and name in _HOST_CHECKS:
                _HOST_CHECKS[name](name, value)
        # NumPy's integers could not be saved with the model
        whole = {name: int(value) for name, value in self.host_kwargs.items() if is_whole(value)}
        object.__setattr__(self, "host_kwargs", {**self.host_kwargs, **whole})
        expected = "'auto', or one of transformers that embeds, such as 'sdpa' or 'eager'"
        require_type("attention", self.attention, str, expected=expected)
        if self.attention.startswith("paged|"):  # for generating texts: what else they give is wrong
            raise ConfigError(f"attention={self.attention!r}: expected {expected}.")
        _chosen_dtype(self.dtype, torch.device("cpu"))  # only to see whether it can be
        if self.device is not None:
            _target_device(self.device)
            object.__setattr__(self, "device", str(torch.device(self.device)))
        # taken out of processor_kwargs, from where they would leak into the tokenizer's config
        given = PixelLimits(self.min_pixels, self.max_pixels).given()
        processor_kwargs = dict(self.host_kwargs.get("processor_kwargs") or {})
        if given and "size" in processor_kwargs:
            raise _given_twice(next(iter(given)), "processor_kwargs", "size")
        moved = {name: processor_kwargs.pop(name) for name in ("min_pixels", "max_pixels") if name in processor_kwargs}
        for name in moved.keys() & given.keys():
            raise _given_twice(name, "processor_kwargs", name)
        object.__setattr__(self, "limits", PixelLimits(**given, **moved))
        object.__setattr__(self, "media", MediaLimits(self.max_seconds, self.fps, self.max_frames))
        object.__setattr__(self, "processor_kwargs", processor_kwargs)

    def for_host(self, encoders: Sequence[Encoder]) -> dict[str, Any]:
        """Arguments of a host model, with dtype and attention chosen for the hardware and these encoders.

        Raises:
            ConfigError: dtype, attention or device can't be, or is given twice; ``max_length`` is above what an encoder
                takes.
        """
        max_length = self.host_kwargs.get("max_length") or 0
        for config in filter(None, (encoder.config for encoder in encoders)):
            positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
            if 0 < positions < max_length:
                raise ConfigError(
                    f"max_length={max_length} is more than the {positions} positions of the encoder. Lower it, or "
                    f"raise max_position_embeddings in config_kwargs."
                )
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
    if not is_whole(device):  # the number of a GPU, for torch
        require_type("device", device, (str, torch.device, type(None)), expected="'cpu', 'cuda' or 'cuda:1'")
    try:
        target = torch.device(get_device_name() if device is None else device)
        if target.type != "cuda":
            torch.empty(0, device=target).cpu()  # 'meta' gives nothing back
    except Exception as error:  # devices that are not there fail in every way
        raise ConfigError(f"device={device!r} is no device: {first_line(error)} Pass 'cpu' or 'cuda'.") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} was asked for, but torch finds no GPU. Leave device out, or pass 'cpu'.")
    num_gpus = max(1, torch.cuda.device_count())
    if target.type == "cuda" and (target.index or 0) >= num_gpus:
        raise ConfigError(f"device={device!r} was asked for, and torch finds {num_gpus} GPUs. Pass a smaller number.")
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


def _require_function(name: str, value: object) -> None:
    if not callable(value) or isinstance(value, type):
        raise ConfigError(f"{name}={value!r:.80}: expected a function of scores, such as torch.nn.Sigmoid().")


_HOST_CHECKS: Mapping[str, Callable[[str, Any], object]] = MappingProxyType(
    {
        "prompts": partial(require_mapping, of=str, expected="prompts by name, as in {'query': 'query: '}"),
        "default_prompt_name": partial(require_type, types=str, expected="the name of a prompt"),
        "cache_folder": require_path,
        "trust_remote_code": require_flag,
        "revision": partial(require_type, types=str, expected="a branch, a tag or a commit"),
        "local_files_only": require_flag,
        "model_kwargs": partial(require_mapping, expected="arguments of a model of transformers"),
        "processor_kwargs": partial(require_mapping, expected="arguments of a processor of transformers"),
        "config_kwargs": partial(require_mapping, expected="arguments of a config of transformers"),
        "model_card_data": partial(require_type, types=CardData, expected="the data of a model card, a CardData"),
        "backend": partial(require_one_of, known=("torch", "onnx", "openvino")),
        "truncate_dim": require_whole,
        "num_labels": require_whole,
        "max_length": require_whole,
        "activation_fn": _require_function,
    }
)
"""What the host takes as it is, and fails on, or works wrongly with, once the weights are loaded. ``None`` is always
the host's default."""


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
    # a number, as is_whole has found
    if not is_whole(dimension) or not 1 <= dimension <= LARGEST_DIMENSION:  # type: ignore[operator]
        raise ConfigError(
            f"dimension={dimension!r} is no size of {what}. Expected a positive whole number such as 768, of "
            f"{LARGEST_DIMENSION} at most, or None."
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
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path).strip():
        raise ConfigError(
            f"name_or_path={shown(name_or_path)} names no checkpoint. Expected a folder or a Hub name. Pass one; "
            f"a model that is built already is used as it is, as in finetune(model, dataset)."
        )
    name = os.fsdecode(name_or_path)
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
    except torch.cuda.OutOfMemoryError:  # a RuntimeError, and no matter of files
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _weights_error(name, f"can't be loaded: {first_line(error)}") from error
    except Exception as error:  # an attention that transformers does not know, among many others
        raise ConfigError(
            f"{name!r} can't be built with these arguments: {type(error).__name__}: {first_line(error)} Check them, "
            f"and the files of the checkpoint."
        ) from error
    for module in built.modules():
        if isinstance(module, Transformer):
            _require_read(module, name)
            if module.config.model_type in PADDED_ALWAYS:
                module.unpad_inputs = False
    return built


def _require_read(encoder: Transformer, name: str) -> None:
    """Refuse weights of another encoder: transformers draws what no file has, with no more than a log entry."""
    if encoder.backend != "torch" or has_adapters(encoder) or is_quantized(encoder):
        return
    unread, num_weights = unread_weights(encoder.model), len(list(encoder.model.parameters()))
    if len(unread) > ENOUGH_MISSING * num_weights:
        reason = f"lack {len(unread)} of the {num_weights} in its config, e.g. {unread[0]!r}: they would be random."
        raise _weights_error(name, reason)


def _weights_error(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"The weights of {name!r} {reason} Expected the weight files that belong to its config. Download or save the "
        f"checkpoint again."
    )
