"""Loading a model for training on pages: what fits the hardware, checked before the weights are read."""

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import (
    CheckpointFiles,
    Encoder,
    find_checkpoint,
    first_line,
    missing_extra,
    read_encoders,
)
from mmtune.models.kinds import HostModel, SameModel
from mmtune.models.options import LoadOptions
from mmtune.models.pixels import (
    PixelLimits,
    apply_pixel_limits,
    effective_pixel_limits,
    image_arguments,
    warn_unused_limits,
)


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
    options = LoadOptions(max_pixels, min_pixels, dtype, attention, device, host_kwargs)
    return load_host_model(SentenceTransformer, name_or_path, options)


def load_host_model(
    model_class: type[SameModel], name_or_path: str | Path, options: LoadOptions, *, modality: str = "image"
) -> SameModel:
    """A model of any of the host's kinds, from a checkpoint.

    Args:
        model_class: ``SentenceTransformer``, ``MultiVectorEncoder`` or ``CrossEncoder``.
        name_or_path: As ``load_model`` takes it.
        options: What ``load_model`` takes besides.
        modality: What the model must be able to read, ``"image"`` or ``"text"``.

    Raises:
        ConfigError: As in ``load_model``.
        MissingExtraError: A package that the checkpoint needs is not installed.
    """
    _check_host_kwargs(model_class, options.host_kwargs)
    limits, name = options.limits, _checked_name(name_or_path)
    files = _checkpoint_files(name, {**options.host_kwargs, "processor_kwargs": options.processor_kwargs})
    encoders = read_encoders(files, modality)
    _check_limits(encoders, limits)
    model = _build(model_class, name, **options.for_host(encoders))
    if Path(name).is_dir():
        # The host looks on the Hub for a model that is called like the folder, and may find one.
        model.model_card_data.local_files_only = True
    _require(model, modality, "pages, which are images" if modality == "image" else "texts")
    return apply_pixel_limits(model, limits)


def check_checkpoint(name_or_path: str | Path) -> None:
    """Make sure, from its small files alone, that ``load_model`` can load a checkpoint.

    Raises:
        ConfigError: There is none, it embeds no images, or it can't be read.
        MissingExtraError: A package that it needs is not installed.
    """
    read_encoders(_checkpoint_files(_checked_name(name_or_path), {}))


def check_documents(model: HostModel, documents: str = "image") -> None:
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


def describe_model(model: HostModel) -> dict[str, Any]:
    """What a model is and what was chosen when loading it, as plain values for ``settings`` and ``metrics.json``.

    Args:
        model: Any host model, also one that ``load_model`` did not load.

    Returns:
        ``base_model`` (name or path, ``None`` where unknown), ``modalities``, ``embedding_dimension``
        (``None`` for a reranker), ``parameters``
        (their number), ``dtype`` and ``attention`` (several are joined by ``", "``), ``device``, and ``min_pixels``
        and ``max_pixels`` (``None`` where the image size is fixed).
    """
    limits = effective_pixel_limits(model)
    configs = [module.config for module in model.modules() if isinstance(module, Transformer)]
    return {
        "base_model": model.model_card_data.base_model or next((c.name_or_path for c in configs), None) or None,
        "modalities": [_modality_name(modality) for modality in model.modalities],
        "embedding_dimension": None if isinstance(model, CrossEncoder) else model.get_embedding_dimension(),
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


def _require(model: HostModel, modality: Any, what: str) -> None:
    if not model.supports(modality):
        modalities = ", ".join(map(_modality_name, model.modalities))
        raise ConfigError(
            f"The model can't embed {what}. Its modalities are {modalities}. Pass a model that also embeds "
            f"{_modality_name(modality)}, or join it with an encoder that does in a Router."
        )


def _check_host_kwargs(model_class: type[HostModel], host_kwargs: Mapping[str, Any]) -> None:
    known = set(inspect.signature(model_class.__init__).parameters) - {"self", "model_name_or_path", "modules"}
    known |= set(inspect.signature(load_model).parameters) - {"host_kwargs"}
    for name in host_kwargs.keys() - known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
        hint = f"The nearest is {nearest[0]!r}." if nearest else f"Known are {', '.join(sorted(known))}."
        raise ConfigError(f"mmtune and {model_class.__name__} know no argument {name!r}. {hint} Rename or remove it.")


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


def _build(model_class: type[SameModel], name: str, **host_kwargs: Any) -> SameModel:
    try:
        return model_class(name, **host_kwargs)
    except ImportError as error:
        raise missing_extra(name, error) from error
    except ValueError as error:  # an attention that transformers does not know, among others
        raise ConfigError(f"{name!r} can't be built with these arguments: {first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The weights of {name!r} can't be loaded: {first_line(error)} Expected the weight files that belong to "
            f"its config. Download or save the checkpoint again."
        ) from error
