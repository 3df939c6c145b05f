"""Loading a model for training on pages: what fits the hardware, checked before the weights are read."""

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import get_device_name
from transformers.utils import is_flash_attn_2_available

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import (
    TEXT_ONLY,
    CheckpointFiles,
    Encoder,
    find_checkpoint,
    first_line,
    missing_extra,
    read_encoders,
)
from mmtune.models.pixels import (
    PixelLimits,
    apply_pixel_limits,
    effective_pixel_limits,
    image_arguments,
    warn_unused_limits,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

FLASH_ATTENTION = "flash_attention_2"


def load_model(
    name_or_path: str | Path,
    *,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    device: str | torch.device | None = None,
    **host_kwargs: Any,
) -> SentenceTransformer:
    """A host model that embeds pages, with dtype and attention chosen for the hardware.

    ``describe_model`` says what was chosen. Whatever can be checked without weights is checked first.

    Args:
        name_or_path: The folder of a checkpoint or its name on the Hub, with or without ``modules.json``.
        max_pixels: Largest number of pixels per image after resizing, such as ``600 * 600``; sides are whole patches.
            It is saved with the model. ``None`` leaves the checkpoint's own limit.
        min_pixels: Smallest number of pixels per image, likewise.
        dtype: Of the weights: ``"bfloat16"``, ``"float16"``, ``"float32"``, or a torch dtype. ``"auto"`` is bfloat16
            on a GPU that computes in it, else float32.
        attention: An ``attn_implementation`` of transformers. ``"auto"`` is flash attention where flash-attn is
            installed, the weights are in half precision on a GPU and every encoder supports it; else transformers
            chooses (SDPA where it can).
        device: Where the model goes; ``None`` lets the host choose.
        **host_kwargs: Further arguments of ``SentenceTransformer``. A dtype, attention or pixel limit may stand in
            ``model_kwargs`` or ``processor_kwargs`` instead of above, not in both.

    Returns:
        A new model, in evaluation mode as the host gives it.

    Raises:
        ConfigError: There is no checkpoint, it embeds no images, it can't be read, or an argument does not fit.
        MissingExtraError: A package that the checkpoint needs is not installed.

    Warns:
        UserWarning: A pixel limit can't be applied, because the image processor resizes to a fixed size.

    Example:
        >>> model = load_model("Qwen/Qwen3-VL-Embedding-2B", max_pixels=600 * 600)  # doctest: +SKIP
    """
    _check_host_kwargs(host_kwargs)
    limits, processor_kwargs = _split_limits(PixelLimits(min_pixels, max_pixels), host_kwargs)
    target = _target_device(device)
    name = _checked_name(name_or_path)
    files = _checkpoint_files(name, {**host_kwargs, "processor_kwargs": processor_kwargs})
    encoders = read_encoders(files)
    _check_limits(encoders, limits)
    model_kwargs = _model_kwargs(host_kwargs, dtype=dtype, attention=attention, target=target, encoders=encoders)
    host_kwargs |= {"model_kwargs": model_kwargs, "processor_kwargs": processor_kwargs}
    model = _build(name, device=device, **host_kwargs)
    if Path(name).is_dir():
        # The host looks on the Hub for a model that is called like the folder, and may find one.
        model.model_card_data.local_files_only = True
    _require(model, "image", "pages, which are images")
    return apply_pixel_limits(model, limits)


def check_checkpoint(name_or_path: str | Path) -> None:
    """Make sure, from its small files alone, that ``load_model`` can load a checkpoint.

    Raises:
        ConfigError: There is none, it embeds no images, or it can't be read.
        MissingExtraError: A package that it needs is not installed.
    """
    read_encoders(_checkpoint_files(_checked_name(name_or_path), {}))


def check_documents(model: SentenceTransformer, documents: str = "image") -> None:
    """Make sure that a model embeds text queries and documents of this kind.

    Args:
        model: Any host model.
        documents: ``"image"``, ``"text"``, ``"text+image"``; any of the host's modalities, joined by ``+``.

    Raises:
        ConfigError: It does not; the message lists what it embeds.
    """
    parts = sorted(documents.split("+"))
    _require(model, parts[0] if len(parts) == 1 else tuple(parts), f"documents={documents!r}")
    _require(model, "text", "queries, which are text")


def describe_model(model: SentenceTransformer) -> dict[str, Any]:
    """What a model is and what was chosen when loading it, as plain values for ``settings`` and ``metrics.json``.

    Args:
        model: Any host model, also one that ``load_model`` did not load.

    Returns:
        ``base_model`` (name or path, ``None`` where unknown), ``modalities``, ``embedding_dimension``, ``parameters``
        (their number), ``dtype`` and ``attention`` (several are joined by ``", "``), ``device``, and ``min_pixels``
        and ``max_pixels`` (``None`` where the image size is fixed).
    """
    limits = effective_pixel_limits(model)
    configs = [module.config for module in model.modules() if isinstance(module, Transformer)]
    return {
        "base_model": model.model_card_data.base_model or next((c.name_or_path for c in configs), None) or None,
        "modalities": [_modality_name(modality) for modality in model.modalities],
        "embedding_dimension": model.get_embedding_dimension(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": _joined(_dtype_name(parameter.dtype) for parameter in model.parameters()),
        "attention": _joined(getattr(config, "_attn_implementation", None) for config in configs),
        "device": str(model.device),
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
    }


def _joined(names: Any) -> str | None:
    return ", ".join(sorted({name for name in names if name})) or None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _modality_name(modality: str | tuple[str, ...]) -> str:
    return modality if isinstance(modality, str) else "+".join(modality)


def _require(model: SentenceTransformer, modality: Any, what: str) -> None:
    if not model.supports(modality):
        modalities = ", ".join(map(_modality_name, model.modalities))
        raise ConfigError(
            f"The model can't embed {what}. Its modalities are {modalities}. Pass a model that also embeds "
            f"{_modality_name(modality)}, or join it with an encoder that does in a Router."
        )


def _check_host_kwargs(host_kwargs: Mapping[str, Any]) -> None:
    known = set(inspect.signature(SentenceTransformer.__init__).parameters) - {"self", "model_name_or_path", "modules"}
    known |= set(inspect.signature(load_model).parameters) - {"host_kwargs"}
    for name in host_kwargs.keys() - known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
        hint = f"The nearest is {nearest[0]!r}." if nearest else f"Known are {', '.join(sorted(known))}."
        raise ConfigError(f"load_model and SentenceTransformer know no argument {name!r}. {hint} Rename or remove it.")


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


def _checked_name(name_or_path: str | Path) -> str:
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path).strip():
        raise ConfigError(
            f"name_or_path={name_or_path!r} names no checkpoint. Expected a folder or a name on the Hub. Pass one; a "
            f"model that is already built needs no load_model."
        )
    name = str(name_or_path)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _checkpoint_files(name: str, host_kwargs: Mapping[str, Any]) -> CheckpointFiles:
    hub = {
        # the host reads the same variable
        "cache_dir": host_kwargs.get("cache_folder") or os.getenv("SENTENCE_TRANSFORMERS_HOME"),
        "token": host_kwargs.get("token"),
        "revision": host_kwargs.get("revision"),
        "local_files_only": host_kwargs.get("local_files_only", False),
    }
    code = {"trust_remote_code": host_kwargs.get("trust_remote_code", False)}
    given = {key: code | (host_kwargs.get(key) or {}) for key in ("processor_kwargs", "config_kwargs")}
    return find_checkpoint(name, hub=hub, **given)


def _check_limits(encoders: Sequence[Encoder], limits: PixelLimits) -> None:
    with_images = [encoder for encoder in encoders if encoder.processor is not None]
    for encoder in with_images:
        image_arguments(encoder.processor, encoder.image_arguments, limits)
    warn_unused_limits([encoder.processor for encoder in with_images], limits)


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
    return all(_supports_flash_attention(encoder) for encoder in with_attention)


def _supports_flash_attention(encoder: Encoder) -> bool:
    if encoder.config is None:
        return False
    model_class = transformers.MODEL_MAPPING.get(type(encoder.config), None)
    return getattr(model_class, "_supports_flash_attn", False)


def _build(name: str, **host_kwargs: Any) -> SentenceTransformer:
    try:
        return SentenceTransformer(name, **host_kwargs)
    except ImportError as error:
        raise missing_extra(name, error) from error
    except ValueError as error:  # an attention that transformers does not know, among others
        raise ConfigError(f"{name!r} can't be built with these arguments: {first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The weights of {name!r} can't be loaded: {first_line(error)} Expected the weight files that belong to "
            f"its config. Download or save the checkpoint again."
        ) from error
