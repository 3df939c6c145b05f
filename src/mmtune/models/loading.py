"""Loading a model for training on pages: what fits the hardware, checked before the weights are read."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from mmtune.errors import ConfigError
from mmtune.host import attention_of
from mmtune.models.checkpoints import (
    read_encoders,
    require_modality,
)
from mmtune.models.fitting import fit_modules
from mmtune.models.kinds import HostModel, SameModel
from mmtune.models.opening import build, check_host_kwargs, check_limits, checked_name, checkpoint_files
from mmtune.models.options import LoadOptions
from mmtune.models.pixels import (
    apply_pixel_limits,
    effective_pixel_limits,
)
from mmtune.models.prompts import check_prompts
from mmtune.models.routes import unify_dtypes


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

    A checkpoint without ``modules.json`` was made for something else, and gets what its encoder needs: the last token
    as the embedding where each token sees only those before it (the host takes the mean of all), and texts padded to
    one length where padding changes their embedding (SigLIP). A log line says so, and it is saved with the model.

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
        ConfigError: There is no checkpoint, it does not embed images by themselves, it can't be read, or an argument
            or prompt does not fit.
        MissingExtraError: A package that the checkpoint needs is not installed.

    Warns:
        UserWarning: A pixel limit can't be applied, because the image processor resizes to a fixed size; or a prompt
            has no effect, because the chat template leaves it out.

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
    check_host_kwargs(model_class, options.host_kwargs)
    limits, name = options.limits, checked_name(name_or_path)
    files = checkpoint_files(name, {**options.host_kwargs, "processor_kwargs": options.processor_kwargs})
    encoders = read_encoders(files, modality, model_class=model_class)
    check_limits(encoders, limits)
    model = build(model_class, name, **options.for_host(encoders))
    unify_dtypes(model)
    if Path(name).is_dir():
        # The host looks on the Hub for a model that is called like the folder, and may find one.
        model.model_card_data.local_files_only = True
    _require(model, modality, "pages, which are images" if modality == "image" else "texts")
    if isinstance(model, SentenceTransformer):
        if files.read_json("modules.json") is None:
            fit_modules(model)
        check_prompts(model)
    return apply_pixel_limits(model, limits)


def check_checkpoint(name_or_path: str | Path, *, model_class: type[HostModel] = SentenceTransformer) -> None:
    """Make sure, from its small files alone, that a checkpoint can be loaded for finetuning.

    Args:
        name_or_path: As ``load_model`` takes it.
        model_class: What it is loaded as.

    Raises:
        ConfigError: There is none, it does not embed images and texts by themselves, or it can't be read.
        MissingExtraError: A package that it needs is not installed.
    """
    files = checkpoint_files(checked_name(name_or_path), {})
    encoders = read_encoders(files, model_class=model_class)
    require_modality(files, encoders, "text")


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
        (their number), ``dtype`` and ``attention`` (several are joined by ``", "``), ``device``, ``min_pixels``
        and ``max_pixels`` (``None`` where the image size is fixed), ``pooling`` (``"mean"``, ``"lasttoken"``, ...;
        ``None`` where the encoder pools by itself) and ``text_padding`` (``"longest"`` of a batch, or to
        ``"max_length"``).
    """
    limits = effective_pixel_limits(model)
    transformers = [module for module in model.modules() if isinstance(module, Transformer)]
    configs = [module.config for module in transformers]
    return {
        "base_model": model.model_card_data.base_model or next((c.name_or_path for c in configs), None) or None,
        "modalities": [_modality_name(modality) for modality in model.modalities],
        "embedding_dimension": None if isinstance(model, CrossEncoder) else model.get_embedding_dimension(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": _joined(_dtype_name(parameter.dtype) for parameter in model.parameters()),
        "attention": _joined(attention_of(config) for config in configs),
        "device": str(model.device),
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "pooling": _joined(_pooling_name(module) for module in model.modules() if isinstance(module, Pooling)),
        "text_padding": _joined(_text_padding(module) for module in transformers if "text" in module.modalities),
    }


def _pooling_name(pooling: Pooling) -> str:
    mode = pooling.pooling_mode
    return mode if isinstance(mode, str) else "+".join(mode)


def _text_padding(encoder: Transformer) -> str:
    padding = encoder.processing_kwargs.get("text", {}).get("padding", True)
    return padding if isinstance(padding, str) else "longest" if padding else "none"


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
            f"The model can't embed {what}. Its modalities are {modalities}{_only_together(model, modality)}. Pass a "
            f"model that also embeds {_modality_name(modality)}, or join it with an encoder that does in a Router."
        )


def _only_together(model: HostModel, modality: Any) -> str:
    together = [key for key in model.modalities if isinstance(key, tuple) and modality in key]
    return f": it takes {' and '.join(sorted(together[0]))} only together" if together else ""
