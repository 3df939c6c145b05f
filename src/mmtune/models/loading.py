"""Loading a model for training on pages: what fits the hardware, checked before the weights are read."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from mmtune.arguments import MIXED, MODALITIES, PLURALS, require_type
from mmtune.errors import ConfigError
from mmtune.host import attention_of
from mmtune.models.adapters import encoders_of
from mmtune.models.checkpoints import lay_out, read_encoders, require_modality
from mmtune.models.fitting import check_prompts, fit_padding, fit_pooling
from mmtune.models.kinds import HostModel, SameModel, require_model
from mmtune.models.opening import LoadOptions, build, check_host_kwargs, check_limits, open_checkpoint
from mmtune.models.pixels import apply_pixel_limits, effective_pixel_limits
from mmtune.models.recordings import apply_media_limits, media_limits_of, read_all_frames
from mmtune.models.routes import find_router, unify_dtypes


def load_model(
    name_or_path: str | Path,
    *,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    max_seconds: float | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    device: str | torch.device | None = None,
    **host_kwargs: Any,
) -> SentenceTransformer:
    """A host model that embeds pages, sounds or clips, with dtype and attention chosen for the hardware.

    A checkpoint without ``modules.json``, or a saved reranker, was made for something else, and gets what its encoder
    needs: the last token as the embedding where each token sees only those before it (the host takes the mean of all).
    With any checkpoint, texts are padded to one length where padding changes their embedding (SigLIP) and nothing is
    said about it. A log line tells, and it is saved with the model.

    ``describe_model`` says what was chosen. Whatever can be checked without weights is checked first.

    Args:
        name_or_path: The folder of a checkpoint or its name on the Hub, with or without ``modules.json``.
        max_pixels: Largest number of pixels per image after resizing, such as ``600 * 600``; sides are whole patches.
            It is saved with the model, and mmtune reads frames of clips no larger. ``None`` leaves the checkpoint's own
            limit.
        min_pixels: Smallest number of pixels per image, likewise.
        max_seconds: How much is read of a sound or a clip, from its beginning; ``None`` is what the encoder takes. Like
            the next two it is saved with the model, for mmtune; the plain host reads what it is given.
        fps: Frames a second of a clip, at most; ``None`` keeps those that there are.
        max_frames: Frames of a clip, at most, evenly spread; ``None`` is as many as the encoder takes, or 768.
        dtype: Of the weights: ``"bfloat16"``, ``"float16"``, ``"float32"``, or a torch dtype. ``"auto"`` is bfloat16
            on a GPU that computes in it, else float32. For a training, ``finetune`` takes the name of the checkpoint
            and chooses what fits.
        attention: An ``attn_implementation`` of transformers. ``"auto"`` is flash attention where flash-attn or the
            package kernels is installed, the weights are in half precision on a GPU, and every encoder computes the
            same with it (Gemma 3 does not: the tokens of an image look both ways); else transformers chooses (SDPA
            where it can).
        device: Where the model goes; ``None`` lets the host choose.
        **host_kwargs: Further arguments of ``SentenceTransformer``. A dtype, attention or pixel limit may stand in
            ``model_kwargs`` or ``processor_kwargs`` instead of above, not in both.

    Returns:
        A new model, in evaluation mode as the host gives it.

    Raises:
        ConfigError: There is no checkpoint, it embeds neither images nor sounds nor clips by themselves, it can't be
            read, its weights are those of another, or an argument or prompt does not fit.
        MissingExtraError: A package that the checkpoint needs is not installed.

    Warns:
        UserWarning: A pixel limit can't be applied, because the image processor resizes to a fixed size; or a prompt
            has no effect, because the chat template leaves it out.

    Example:
        >>> model = load_model("Qwen/Qwen3-VL-Embedding-2B", max_pixels=600 * 600)  # doctest: +SKIP
    """
    options = LoadOptions(max_pixels, min_pixels, dtype, attention, device, host_kwargs, max_seconds, fps, max_frames)
    return load_host_model(SentenceTransformer, name_or_path, options, or_else=("audio", "video"))


def load_host_model(
    model_class: type[SameModel],
    name_or_path: str | Path,
    options: LoadOptions,
    *,
    modality: str = "image",
    or_else: Sequence[str] = (),
) -> SameModel:
    """A model of any of the host's kinds, from a checkpoint.

    Args:
        model_class: ``SentenceTransformer``, ``MultiVectorEncoder`` or ``CrossEncoder``.
        name_or_path: As ``load_model`` takes it.
        options: What ``load_model`` takes besides.
        modality: What the model must be able to read, ``"image"`` or ``"text"``, ``"audio"`` or ``"video"``.
        or_else: What is enough in its place.

    Raises:
        ConfigError: As in ``load_model``.
        MissingExtraError: A package that the checkpoint needs is not installed.
    """
    check_host_kwargs(model_class, options.host_kwargs)
    files = open_checkpoint(name_or_path, options)
    encoders = read_encoders(files, modality, model_class=model_class, or_else=or_else)
    check_limits(encoders, options.limits)
    model = build(model_class, files.name, **options.for_host(encoders))
    unify_dtypes(model)
    if Path(files.name).is_dir():
        # The host looks on the Hub for a model that is called like the folder, and may find one.
        model.model_card_data.local_files_only = True
    modality = next((name for name in (modality, *or_else) if model.supports(name)), modality)
    _require(model, modality, {**PLURALS, "image": "pages, which are images"}[modality])
    if isinstance(model, SentenceTransformer):
        asked, found = options.host_kwargs.get("truncate_dim") or 0, full_dimension(model)
        if asked > (found or asked):
            raise ConfigError(f"truncate_dim={asked} is more than the {found} dimensions of {files.name!r}. Lower it.")
        if files.saved_type != "SentenceTransformer":  # the host has chosen the pooling just now
            fit_pooling(model)
        fit_padding(model, model.device)
        check_prompts(model)
    return apply_limits(model, options)


def apply_limits(model: SameModel, options: LoadOptions) -> SameModel:
    """The same model, which keeps the limits of images, sounds and clips that were asked for."""
    if options.media.given():
        read_all_frames(model)
    return apply_media_limits(apply_pixel_limits(model, options.limits), options.media)


def check_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    model_class: type[HostModel] = SentenceTransformer,
    modalities: Sequence[str] = ("image", "text"),
) -> None:
    """Make sure, from its small files alone, that a checkpoint can be loaded for finetuning.

    Args:
        name_or_path: As ``load_model`` takes it.
        model_class: What it is loaded as.
        modalities: What it must embed, each by itself.

    Raises:
        ConfigError: There is none, it does not embed these, or it can't be read.
        MissingExtraError: A package that it needs is not installed.
    """
    files = open_checkpoint(os.fspath(name_or_path))
    encoders = read_encoders(files, modalities[0], model_class=model_class)
    for modality in modalities[1:]:
        require_modality(files, encoders, modality)


def check_documents(model: HostModel, documents: str = "image", queries: str = "text") -> None:
    """Make sure that a model embeds queries and documents of these kinds.

    Args:
        model: Any host model.
        documents: ``"image"``, ``"text"``, ``"text+image"``; any of the host's modalities, joined by ``+``. Of
            ``"mixed"`` documents only their corpus knows what they are.
        queries: Likewise.

    Raises:
        ConfigError: It does not; the message lists what it embeds.
    """
    require_model(model)
    require_type("documents", documents, str, expected="a kind of document, such as 'image'")
    require_type("queries", queries, str, expected="a kind of query, such as 'text'")
    asked = "queries, which are text" if queries == "text" else f"queries={queries!r}"
    for kind, what in ((documents, f"documents={documents!r}"), (queries, asked)):
        if kind != MIXED:
            _require(model, _parts(kind), what)


def takes_mixed(model: HostModel | str | os.PathLike[str]) -> bool:
    """Whether a model reads texts, images, sounds and clips in one batch: as messages, and not by encoder or route.

    Raises:
        ConfigError: There is no checkpoint, or it can't be read.
    """
    return parts_apart(model) != frozenset(MODALITIES)


def parts_apart(model: HostModel | str | os.PathLike[str]) -> frozenset[str]:
    """Which parts all documents of a training batch have, or none of them.

    Encoders side by side take one kind of document at a time. A model that reads messages takes all of them, but losses
    with a cache cut a batch into pieces, document by document (sentence-transformers 6.2): of sounds, and of the times
    of clips in the Qwen2.5 families, there are fewer rows than documents, and the pieces would get those of others.

    Args:
        model: A host model, or its checkpoint.

    Raises:
        ConfigError: There is no checkpoint, or it can't be read.
    """
    if isinstance(model, (str, os.PathLike)):
        files = open_checkpoint(os.fspath(model))
        encoder = None if files.has_router else lay_out(files, SentenceTransformer)
    else:
        encoder = None if find_router(model) is not None else next(iter(encoders_of(model)), None)
    if encoder is None or "message" not in encoder.modalities:
        return frozenset(MODALITIES)
    times_clips = any("second_per_grid" in name for name in getattr(encoder.processor, "model_input_names", ()))
    return frozenset({"audio", *(["video"] if times_clips else [])}) & {*encoder.modalities}


def check_kinds(model: HostModel | str | os.PathLike[str], kinds: Iterable[str]) -> None:
    """Make sure that a model embeds all kinds of documents of a mixed corpus, of a checkpoint as far as it says.

    Raises:
        ConfigError: It does not; the message names the first.
    """
    if not isinstance(model, (str, os.PathLike)):
        for kind in kinds:
            _require(model, _parts(kind), f"documents made of {kind!r}")
        return
    for modality in dict.fromkeys(part for kind in kinds for part in kind.split("+")):
        check_checkpoint(model, modalities=(modality,))


def describe_model(model: HostModel) -> dict[str, Any]:
    """What a model is and what was chosen when loading it, as plain values for ``settings`` and ``metrics.json``.

    Args:
        model: Any host model, also one that ``load_model`` did not load.

    Returns:
        ``base_model`` (name or path, ``None`` where unknown), ``modalities``, ``embedding_dimension`` (what it gives,
        cut off at ``truncate_dim``; ``None`` for a reranker), ``full_dimension`` (before anything is cut off),
        ``truncate_dim`` (``None`` where nothing is), ``parameters`` (their number), ``dtype`` and ``attention``
        (several are joined by ``", "``), ``device``, ``min_pixels`` and ``max_pixels`` (``None`` where the image size
        is fixed), ``media_limits`` (what is read of sounds and of clips, ``{"audio": {"max_seconds": 10.0, ...}}``;
        ``None`` where neither is), ``pooling`` (``"mean"``, ``"lasttoken"``, ...; ``None`` where the encoder pools by
        itself) and ``text_padding`` (``"longest"`` of a batch, or to ``"max_length"``).

    Raises:
        ConfigError: ``model`` is no model.
    """
    require_model(model)
    limits = effective_pixel_limits(model)
    transformers = [module for module in model.modules() if isinstance(module, Transformer)]
    configs = [module.config for module in transformers]
    listening = [(kind, module) for module in transformers for kind in ("audio", "video") if kind in module.modalities]
    poolings = [module.pooling_mode for module in model.modules() if isinstance(module, Pooling)]
    paddings = [
        module.processing_kwargs.get("text", {}).get("padding", True)
        for module in transformers
        if "text" in module.modalities
    ]
    return {
        "base_model": model.model_card_data.base_model or next((c.name_or_path for c in configs), None) or None,
        "modalities": list(map(_plus, model.modalities)),
        "embedding_dimension": None if isinstance(model, CrossEncoder) else model.get_embedding_dimension(),
        "full_dimension": full_dimension(model),
        "truncate_dim": getattr(model, "truncate_dim", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": _joined(str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()),
        "attention": _joined(map(attention_of, configs)),
        "device": str(model.device),
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "media_limits": {kind: media_limits_of(module, kind).given() for kind, module in listening} or None,
        "pooling": _joined(map(_plus, poolings)),
        "text_padding": _joined(
            padding if isinstance(padding, str) else "longest" if padding else "none" for padding in paddings
        ),
    }


def full_dimension(model: HostModel) -> int | None:
    """The size of a model's embeddings before its ``truncate_dim`` cuts them off; ``None`` for a reranker."""
    if isinstance(model, CrossEncoder):
        return None
    if not isinstance(model, SentenceTransformer):
        return model.get_embedding_dimension()
    with model.truncate_embeddings(None):
        return model.get_embedding_dimension()


def _joined(names: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({name for name in names if name})) or None


def _plus(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else "+".join(names)


def _parts(kind: str) -> Any:
    """A kind of document as the host names modalities."""
    parts = sorted(kind.split("+"))
    return parts[0] if len(parts) == 1 else tuple(parts)


def _require(model: HostModel, modality: Any, what: str) -> None:
    if model.supports(modality):
        return
    together = [key for key in model.modalities if isinstance(key, tuple) and modality in key]
    reason = f": it takes {' and '.join(sorted(together[0]))} only together" if together else ""
    side = f"{modality}=..." if modality in ("audio", "video") else "image"
    # an input of a Router is of one kind, unless its image side is a VLM
    alone = isinstance(modality, tuple) and not {"audio", "video"}.isdisjoint(modality)
    join = "" if alone else f", or join it with an encoder that does by compose_router(text, {side})"
    raise ConfigError(
        f"The model can't embed {what}. Its modalities are {', '.join(map(_plus, model.modalities))}{reason}. Pass a "
        f"model that also embeds {_plus(modality)}{join}."
    )
