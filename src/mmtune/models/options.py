"""How a model is loaded: dtype, attention and pixel limits for the hardware, settled before the weights are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from sentence_transformers.util import get_device_name
from transformers.utils import is_flash_attn_2_available

from mmtune.errors import ConfigError
from mmtune.host import supports_flash_attention
from mmtune.models.checkpoints import TEXT_ONLY, Encoder, first_line
from mmtune.models.pixels import PixelLimits

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

FLASH_ATTENTION = "flash_attention_2"


@dataclass(frozen=True)
class LoadOptions:
    """The arguments that every function which loads a checkpoint takes; ``load_model`` explains them.

    Raises:
        ConfigError: A pixel limit is no limit, or is given twice.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    dtype: str | torch.dtype = "auto"
    attention: str = "auto"
    device: str | torch.device | None = None
    host_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._split()

    @property
    def limits(self) -> PixelLimits:
        """The pixel limits, also those that stand in ``processor_kwargs``."""
        return self._split()[0]

    @property
    def processor_kwargs(self) -> dict[str, Any]:
        """What the host's processors get, without the pixel limits."""
        return self._split()[1]

    def _split(self) -> tuple[PixelLimits, dict[str, Any]]:
        return _split_limits(PixelLimits(self.min_pixels, self.max_pixels), self.host_kwargs)

    def for_host(self, encoders: Sequence[Encoder]) -> dict[str, Any]:
        """Arguments of a host model, with dtype and attention chosen for the hardware and these encoders.

        Raises:
            ConfigError: dtype, attention or device can't be, or is given twice.
        """
        target = _target_device(self.device)
        # A Router in half precision can't be loaded again: the host leaves the Dense layers of its routes in float32
        # (sentence-transformers 6.2). Training computes in bfloat16 all the same.
        dtype = "float32" if self.dtype == "auto" and len(encoders) > 1 else self.dtype
        model_kwargs = _model_kwargs(
            self.host_kwargs, dtype=dtype, attention=self.attention, target=target, encoders=encoders
        )
        chosen = {"device": self.device, "model_kwargs": model_kwargs, "processor_kwargs": self.processor_kwargs}
        return {**self.host_kwargs, **chosen}


def _split_limits(limits: PixelLimits, host_kwargs: Mapping[str, Any]) -> tuple[PixelLimits, dict[str, Any]]:
    """Take pixel limits out of ``processor_kwargs``, from where they would leak into the tokenizer's config."""
    processor_kwargs = dict(host_kwargs.get("processor_kwargs") or {})
    if limits.given() and "size" in processor_kwargs:
        raise _given_twice(next(iter(limits.given())), "processor_kwargs", "size")
    moved = {name: processor_kwargs.pop(name) for name in ("min_pixels", "max_pixels") if name in processor_kwargs}
    for name in moved.keys() & limits.given().keys():
        raise _given_twice(name, "processor_kwargs", name)
    return PixelLimits(**{**limits.given(), **moved}), processor_kwargs


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


def _model_kwargs(
    host_kwargs: Mapping[str, Any],
    *,
    dtype: str | torch.dtype,
    attention: str,
    target: torch.device,
    encoders: Sequence[Encoder],
) -> dict[str, Any]:
    model_kwargs = dict(host_kwargs.get("model_kwargs") or {})
    for name, given, keys in (
        ("dtype", dtype, ("dtype", "torch_dtype")),
        ("attention", attention, ("attn_implementation",)),
    ):
        for key in keys:
            if given != "auto" and key in model_kwargs:
                raise _given_twice(name, "model_kwargs", key)
    if host_kwargs.get("backend", "torch") != "torch":
        return model_kwargs
    chosen = model_kwargs.pop("torch_dtype", None) or model_kwargs.pop("dtype", None) or dtype
    model_kwargs["dtype"] = _chosen_dtype(chosen, target)
    if attention == "auto" and _flash_attention_fits(model_kwargs["dtype"], target, encoders):
        attention = FLASH_ATTENTION
    return model_kwargs if attention == "auto" else {"attn_implementation": attention} | model_kwargs


def _chosen_dtype(dtype: str | torch.dtype, target: torch.device) -> torch.dtype:
    if dtype == "auto":
        # emulated bfloat16, as on GPUs before Ampere, is slower than float32
        fast = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    chosen = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ConfigError(
            f"dtype={dtype!r} is no dtype for weights. Expected 'auto', {', '.join(map(repr, DTYPES))}, or one of "
            f"torch's own. Pass one of these."
        )
    return chosen


def _flash_attention_fits(dtype: torch.dtype, target: torch.device, encoders: Sequence[Encoder]) -> bool:
    if target.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not is_flash_attn_2_available():
        return False
    with_attention = [encoder for encoder in encoders if encoder.config or encoder.modalities != TEXT_ONLY]
    return all(_runs_flash_attention(encoder) for encoder in with_attention)


def _runs_flash_attention(encoder: Encoder) -> bool:
    if encoder.config is None:
        return False
    model_class = transformers.MODEL_MAPPING.get(type(encoder.config), None)
    return supports_flash_attention(model_class)
