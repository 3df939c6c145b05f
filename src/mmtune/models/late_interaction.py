"""Models of late interaction: a vector a token, for ColPali-style retrieval, loaded or made from a backbone."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import transformers
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from torch import nn

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import CheckpointFiles, reading
from mmtune.models.fresh import TOKENS, mark_fresh, seeded
from mmtune.models.loading import load_host_model
from mmtune.models.opening import LoadOptions, open_checkpoint, require_dimension

FRESH_DIMENSION = 128
"""Of a token vector where nothing else is asked for; ColBERT's, and the host's."""

SAVED_TYPES = ("MultiVectorEncoder", "ColBERT")
"""``model_type`` of saved models of late interaction: the host's, and PyLate's."""

ONE_VECTOR_MODULES = ("CLIPModel", "Router", "Asym", "StaticEmbedding", "BoW")
"""First modules of checkpoints that have no single encoder with token embeddings behind them."""


def build_late_interaction(
    name_or_path: str | Path,
    *,
    dimension: int | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    max_seconds: float | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    device: str | torch.device | None = None,
    seed: int = 42,
    **host_kwargs: Any,
) -> MultiVectorEncoder:
    """A host model of late interaction: a page is a vector a patch, and each query token looks for its best one.

    A checkpoint of late interaction is loaded as it is: a ``MultiVectorEncoder``, a PyLate model, or one of the
    ``...ForRetrieval`` models of transformers, such as ColPali and ColQwen2. Any other encoder with token embeddings,
    such as Qwen3-VL, loses its pooling and gets what the host adds: a projection without bias, the mask of what is
    scored, and normalisation. A projection that a checkpoint has for its pooled embedding goes on with the tokens. The
    host's own defaults hold for the rest: no query expansion, no skipped words, and the checkpoint's prompts.

    Args:
        name_or_path: The folder of a checkpoint or its name on the Hub.
        dimension: Of a token vector. ``None`` is the checkpoint's own, and 128 where the projection is new.
        max_pixels: As for ``load_model``. It is also what the number of vectors a page goes by.
        min_pixels: As for ``load_model``.
        max_seconds: As for ``load_model``.
        fps: As for ``load_model``.
        max_frames: As for ``load_model``.
        dtype: As for ``load_model``.
        attention: As for ``load_model``.
        device: As for ``load_model``.
        seed: Of a new projection. The caller's random state is left as it was.
        **host_kwargs: Further arguments of ``MultiVectorEncoder``; see ``load_model``.

    Returns:
        A new model. A projection that was drawn here is marked as fresh, so that ``finetune`` trains it at a larger
        rate.

    Raises:
        ConfigError: The checkpoint gives one vector a text or page, has another dimension than asked for, embeds no
            images, or can't be read; or an argument does not fit.
        MissingExtraError: A package that the checkpoint needs is not installed.

    Example:
        >>> model = build_late_interaction("Qwen/Qwen3-VL-2B-Instruct", max_pixels=600 * 600)  # doctest: +SKIP
    """
    options = LoadOptions(max_pixels, min_pixels, dtype, attention, device, host_kwargs, max_seconds, fps, max_frames)
    dimension = require_dimension(dimension, "a vector")
    files = open_checkpoint(name_or_path, options)
    with reading(files.name):
        source = read_source(files)
    _check_own_dimension(files.name, dimension, source.dimension)
    with seeded(seed):
        model = load_host_model(MultiVectorEncoder, name_or_path, options)
    encoder = model[0]
    if isinstance(encoder, Transformer):
        # some pool by themselves, which shows only once they are built
        pooled = [params["method_output_name"] for params in encoder.modality_config.values()].count("pooler_output")
        if encoder.module_output_name != TOKENS or pooled:
            raise _no_tokens(files.name, f"pools by itself (model type {encoder.config.model_type})")
    if not source.has_projection:
        # one that is drawn from the seed alone, in place of the one that the host has drawn
        dense = [(at, module) for at, module in enumerate(model) if isinstance(module, Dense)]
        at, drawn = next((at, module.linear.weight) for at, module in dense if module.module_input_name == TOKENS)
        sizes = (drawn.shape[1], dimension or FRESH_DIMENSION)
        with seeded(seed), torch.device("cpu"):
            projection = Dense(*sizes, bias=False, activation_function=nn.Identity(), module_input_name=TOKENS)
        model[at] = projection.to(drawn.device, drawn.dtype)
        mark_fresh(projection)
    _check_own_dimension(files.name, dimension, model.get_embedding_dimension())
    return model


def is_late_interaction(name_or_path: str | Path, options: LoadOptions | None = None) -> bool:
    """Whether a checkpoint is a model of late interaction, from its small files alone.

    Args:
        name_or_path: The folder of a checkpoint or its name on the Hub.
        options: How it will be loaded; says where on the Hub to look.

    Raises:
        ConfigError: There is no checkpoint.
    """
    files = open_checkpoint(name_or_path, options)
    return files.saved_type in SAVED_TYPES or _has_native_head(files)


@dataclass(frozen=True)
class Source:
    """What a checkpoint brings along for late interaction.

    Attributes:
        has_projection: Whether there is one already, of its own or to a pooled embedding.
        dimension: What that one projects to; ``None`` where there is none, or where only the weights say so.
    """

    has_projection: bool
    dimension: int | None = None


def read_source(files: CheckpointFiles) -> Source:
    """What a checkpoint brings along for late interaction, from its small files alone.

    Raises:
        ConfigError: It gives one vector a text or page, so that there are no token embeddings.
    """
    modules = files.modules
    if modules is None:
        if _has_native_head(files):
            config = files.read_json("config.json")
            return Source(True, config.get("embedding_dim", config.get("dim")))
        _refuse_dual_encoder(files, "")
        return Source(False)
    class_name = modules[0]["type"].rpartition(".")[2]
    if class_name in ONE_VECTOR_MODULES:
        raise _no_tokens(files.name, f"starts with a {class_name}")
    if files.saved_type not in SAVED_TYPES:
        _refuse_dual_encoder(files, modules[0]["path"])
    heads = [files.read_json("config.json", module["path"]) for module in modules if module["type"].endswith(".Dense")]
    kept = files.saved_type in (*SAVED_TYPES, "SentenceTransformer")
    dimension = heads[-1].get("out_features") if heads and kept else None
    return Source(files.saved_type in SAVED_TYPES or dimension is not None, dimension)


def _has_native_head(files: CheckpointFiles) -> bool:
    """Whether a checkpoint without ``modules.json`` is a retriever of transformers, or of Stanford's ColBERT."""
    return any(name.endswith("ForRetrieval") or name == "HF_ColBERT" for name in files.architectures)


def _refuse_dual_encoder(files: CheckpointFiles, subfolder: str) -> None:
    """Raise a ``ConfigError`` for CLIP, SigLIP and their relatives, whose output is an embedding a side."""
    config = files.config(subfolder)
    model_class = None if config is None else transformers.MODEL_MAPPING.get(type(config), None)
    if config is None or not isinstance(model_class, type):
        return
    # what forward returns, by its annotation
    returned = get_type_hints(model_class.forward).get("return")
    outputs: list[Any] = [part for part in (returned, *get_args(returned)) if is_dataclass(part)]
    if {"text_embeds", "image_embeds"} <= {field.name for output in outputs for field in fields(output)}:
        raise _no_tokens(files.name, f"is a dual encoder (model type {config.model_type})")


def _no_tokens(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{name!r} gives one vector for a text or a page: it {reason}. Late interaction needs token embeddings, one "
        "vector for each token and patch. Pass a model that has them, such as Qwen3-VL or ColQwen2, or train this one "
        "as an embedding model with load_model."
    )


def _check_own_dimension(name: str, dimension: int | None, own: int | None) -> None:
    if dimension is not None and own not in (None, dimension):
        raise ConfigError(
            f"dimension={dimension} was asked for, and {name!r} has a projection to {own} dimensions. Leave dimension "
            "out to keep it, or start from the backbone that it was trained from."
        )
