"""Two encoders that become one model: the host's Router, with the parts that make its routes meet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

from mmtune.errors import ConfigError
from mmtune.host import declare_modalities
from mmtune.models.checkpoints import find_checkpoint, first_line, read_encoders
from mmtune.models.fitting import is_causal
from mmtune.models.fresh import mark_fresh
from mmtune.models.loading import load_host_model
from mmtune.models.options import LoadOptions
from mmtune.models.pixels import apply_pixel_limits
from mmtune.models.routes import describe_routes, find_router, output_of, require_reloadable, router_mapping, sample_of
from mmtune.models.towers import freeze_unused, is_dual_encoder, pad_texts, take_tower

__all__ = ["Side", "compose_router", "router_mapping"]

Side: TypeAlias = str | os.PathLike[str] | Sequence[nn.Module]
"""One side of a Router: a checkpoint's name or folder, or host modules."""

SIDES = ("text", "image")
NUM_NEGATIVES = 16
"""As many columns of negatives as the training set of the VDR guide has."""
PROJECTION_SEED = 0
ROUTER_MAPPING = "router_mapping"
"""The attribute to pass on to the host's training arguments."""
PAIR = ("image", "text")


@dataclass
class ComposedCardData(SentenceTransformerModelCardData):
    """The host's model card data, with what ``compose_router`` put together under the model's architecture."""

    composition: tuple[str, ...] = field(default=(), kw_only=True)

    def set_widget_examples(self, dataset: Any) -> None:
        """No examples of the rows.

        For a Router the host takes them by the names of the stored columns, which lazy rows don't have when they are
        read: its trainer would not start (sentence-transformers 6.2).
        """

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """The host's values, the composition below the text of the model."""
        values = super().get_model_specific_metadata()
        if not self.composition or "model_string" not in values:
            return values
        lines = "\n".join(f"- {line}" for line in self.composition)
        return values | {"model_string": f"{values['model_string']}\n\nComposed by mmtune:\n{lines}"}


@dataclass(frozen=True)
class _Encoder:
    """One side while the Router is put together.

    Attributes:
        modality: ``"text"`` or ``"image"``, also the name of its route.
        model: Its modules as a model.
        kinds: What its route will take, as in ``sample_of``.
        notes: What was done to it.
    """

    modality: str
    model: SentenceTransformer
    kinds: tuple[str, ...]
    notes: tuple[str, ...]

    def with_modules(self, modules: Sequence[nn.Module], *notes: str) -> "_Encoder":
        return replace(self, model=_joined(modules, self.model), notes=(*self.notes, *notes))

    def features(self, kind: str, *, gradients: bool = False) -> dict[str, Any]:
        """What the side gives for a sample.

        Raises:
            ConfigError: It can't embed it.
        """
        try:
            return output_of(self.model, sample_of(kind), gradients=gradients)
        except Exception as error:  # processors and encoders refuse in every way
            raise ConfigError(
                f"The {self.modality} side can't embed {kind}: {type(error).__name__}: {first_line(error)} Expected an "
                f"encoder that does. Its modules are {', '.join(type(module).__name__ for module in self.model)}. "
                f"Pass another {self.modality} encoder."
            ) from error

    def dimension(self) -> int:
        """Size of its embeddings, by a forward pass."""
        return self.features(self.modality)["sentence_embedding"].shape[-1]


def compose_router(
    text: Side,
    image: Side,
    *,
    dimension: int | None = None,
    freeze: str | Sequence[str] = (),
    device: str | torch.device | None = None,
    route_by: Literal["modality", "task"] = "modality",
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
) -> SentenceTransformer:
    """One model of a text encoder and an image encoder, by the host's Router.

    What is missing is added: pooling where an encoder gives token embeddings (the last token where it is causal, else
    the mean), a projection where dimensions differ, and one normalisation at the end. A projection is a ``Dense``
    without activation. Its weight is orthogonal, so that it keeps lengths and angles as far as the sizes allow, and the
    same in every run; its bias starts at zero, with which it can take out the mean of an encoder that is frozen.

    Of CLIP, SigLIP and SigLIP2 checkpoints only the tower that is used is kept. Dual encoders of other families are
    kept whole, and what no route reaches is frozen. Both are in the model card, with all that was added.

    The routes agree only after training: ``finetune`` needs nothing more, and the host's training arguments take
    ``router_mapping=model.router_mapping``.

    Args:
        text: The text encoder: a checkpoint's name or folder, or a list of host modules.
        image: The image encoder likewise; also a VLM, which then takes text with image too.
        dimension: Of the embeddings. ``None`` is that of the image encoder.
        freeze: ``"text"``, ``"image"`` or both: encoders that are not trained. Projections are trained always.
        device: Where the model goes; ``None`` lets the host choose.
        route_by: ``"modality"`` sends every text to the text encoder. ``"task"`` sends only queries there, and
            documents of every modality that the image encoder takes to the image encoder; an input without a task goes
            by its modality.
        max_pixels: As in ``load_model``, for the image encoder.
        min_pixels: As in ``load_model``, for the image encoder.
        dtype: As in ``load_model``, for checkpoints; ``"auto"`` is float32, because the host can't load a Router in
            half precision again where a route has a projection.
        attention: As in ``load_model``, for checkpoints.

    Returns:
        A new model in evaluation mode, with the routes ``"text"`` and ``"image"`` and an attribute ``router_mapping``,
        which has the columns ``query``, ``image`` and ``negative_0`` to ``negative_15``. Modules that were passed are
        part of it.

    Raises:
        ConfigError: A checkpoint or an argument does not fit, an encoder can't embed its modality, or nothing would be
            trained.
        MissingExtraError: A package that a checkpoint needs is not installed.

    Example:
        >>> model = compose_router(
        ...     "sentence-transformers/all-MiniLM-L6-v2", "google/siglip2-base-patch16-224", freeze="text"
        ... )  # doctest: +SKIP
    """
    frozen = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    _check_arguments(dimension, frozen, route_by)
    for modality, source in (("text", text), ("image", image)):
        _check_source(modality, source)
    # in half precision the host could not load the projections again, see LoadOptions.for_host
    limits = LoadOptions(max_pixels, min_pixels, "float32" if dtype == "auto" else dtype, attention, device)
    image_encoder = _encoder("image", image, limits, whole=route_by == "task")
    text_encoder = _encoder("text", text, replace(limits, max_pixels=None, min_pixels=None), whole=False)
    if isinstance(text, str | os.PathLike) and isinstance(image, str | os.PathLike):
        # the host loads static embeddings in float32 whatever it is told, and a loss takes one dtype only
        text_encoder.model.to(next(image_encoder.model.parameters()).dtype)

    size = dimension or image_encoder.dimension()
    text_encoder, image_encoder = (
        _projected(_frozen(encoder, frozen), size) for encoder in (text_encoder, image_encoder)
    )
    model = _routed(text_encoder, image_encoder, route_by)
    require_reloadable(model)
    _check_sizes(model, image_encoder, route_by)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"freeze={freeze!r} leaves nothing to train: both encoders end in {size} dimensions, so no projection was "
            f"added. Freeze one side, or pass another dimension to add projections."
        )
    return model


def _check_arguments(dimension: int | None, freeze: Sequence[str], route_by: str) -> None:
    unknown = [side for side in freeze if side not in SIDES]
    if unknown:
        raise ConfigError(f"freeze names {unknown[0]!r}. A Router has the sides 'text' and 'image'. Name these.")
    if route_by not in ("modality", "task"):
        raise ConfigError(f"route_by={route_by!r} is unknown. Expected 'modality' or 'task'. Pass one of them.")
    if dimension is not None and (isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1):
        raise ConfigError(
            f"dimension={dimension!r} is no size of an embedding. Expected a positive whole number such as 768, or "
            f"None for that of the image encoder. Pass one."
        )


def _check_source(modality: str, source: Side) -> None:
    """Look at what a side is, before any weights are read."""
    if isinstance(source, str | os.PathLike):
        read_encoders(find_checkpoint(os.path.expanduser(source)), modality)  # noqa: PTH111 - a Hub name is no path
        return
    modules = list(source) if isinstance(source, Sequence | nn.Sequential) else []
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise ConfigError(
            f"{modality}={source!r:.80} is no encoder. Expected a checkpoint's name or folder, or a list of host "
            f"modules such as [Transformer(...), Pooling(...)]. Pass one of these."
        )
    if any(isinstance(module, Router) for module in modules):
        raise ConfigError(
            f"The {modality} side has a Router of its own. Expected an encoder with one route. Take one out with "
            f"extract_route."
        )


def _encoder(modality: str, source: Side, options: LoadOptions, *, whole: bool) -> _Encoder:
    """A side with its missing parts, up to the projection."""
    if isinstance(source, str | os.PathLike):
        loaded = load_host_model(SentenceTransformer, os.fspath(source), options, modality=modality)
        label = os.fspath(source)
    else:
        given = source if isinstance(source, SentenceTransformer) else None
        loaded = given or SentenceTransformer(modules=list(source), device=_device(options))
        apply_pixel_limits(loaded, options.limits)
        label = "modules that were passed"
    modules: list[Any] = list(loaded)
    notes = [f"{modality} encoder: {label}"]
    while len(modules) > 1 and isinstance(modules[-1], Normalize):
        modules.pop()
    pad_texts(modules[0])
    kinds: tuple[str, ...] = (modality,)
    if is_dual_encoder(modules[0]) and not whole and isinstance(source, str | os.PathLike):
        tower = take_tower(modules[0], modality)
        modules = modules if tower is None else [*tower, *modules[1:]]
        notes += [] if tower is None else [f"of it the {modality} tower alone"]
    if modality == "image":
        kinds = _image_kinds(modules[0], whole=whole)
    encoder = _Encoder(modality, _joined(modules, loaded), kinds, tuple(notes))
    return _without_idle_parts(_pooled(encoder))


def _image_kinds(module: nn.Module, *, whole: bool) -> tuple[str, ...]:
    """What the image route takes; a VLM is told to take text with image, which it does only outside a Router."""
    modalities = getattr(module, "modalities", ["image"])
    together = "message" in modalities and {"image", "text"} <= set(modalities)
    if together and isinstance(module, Transformer) and PAIR not in module.modality_config:
        # the Router names the pair in the features, and the encoder looks it up (sentence-transformers 6.2)
        message = {name: value for name, value in module.modality_config["message"].items() if name != "format"}
        declare_modalities(module, {**module.modality_config, PAIR: message})
    texts = ("text",) if whole and "text" in modalities else ()
    return ("image", *texts, *(("text+image",) if together or PAIR in modalities else ()))


def _pooled(encoder: _Encoder) -> _Encoder:
    features = encoder.features(encoder.modality)
    if "sentence_embedding" in features:
        return encoder
    if "token_embeddings" not in features:
        raise ConfigError(
            f"The {encoder.modality} side gives neither sentence nor token embeddings, only {', '.join(features)}. "
            f"Expected modules that embed, such as [Transformer(...), Pooling(...)]. Add what is missing."
        )
    first = encoder.model[0]
    causal = isinstance(first, Transformer) and "text" in first.modalities and is_causal(first, encoder.model.device)
    mode = "lasttoken" if causal else "mean"
    pooling = Pooling(features["token_embeddings"].shape[-1], pooling_mode=mode)
    return encoder.with_modules([*encoder.model, pooling], f"added pooling of the {encoder.modality} side: {mode}")


def _without_idle_parts(encoder: _Encoder) -> _Encoder:
    first: Any = encoder.model[0]
    if not is_dual_encoder(first):
        return encoder
    embeddings = [encoder.features(kind, gradients=True)["sentence_embedding"] for kind in encoder.kinds]
    idle = freeze_unused(first, embeddings)
    return replace(encoder, notes=(*encoder.notes, f"frozen, because no route reaches it: {idle:,} parameters"))


def _frozen(encoder: _Encoder, sides: Sequence[str]) -> _Encoder:
    if encoder.modality not in sides:
        return encoder
    encoder.model.requires_grad_(False)
    return replace(encoder, notes=(*encoder.notes, f"frozen: the {encoder.modality} encoder"))


def _projected(encoder: _Encoder, size: int) -> _Encoder:
    found = encoder.dimension()
    if found == size:
        return encoder
    dense = _projection(found, size).to(encoder.model.device, next(encoder.model.parameters()).dtype)
    return encoder.with_modules(
        [*encoder.model, dense], f"added projection of the {encoder.modality} side: {found} to {size} dimensions"
    )


def _projection(found: int, size: int) -> Dense:
    weight = torch.empty(size, found)
    nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(PROJECTION_SEED))
    with torch.random.fork_rng(devices=[]):
        dense = Dense(found, size, activation_function=nn.Identity(), init_weight=weight, init_bias=torch.zeros(size))
    mark_fresh(dense)
    return dense


def _routed(text: _Encoder, image: _Encoder, route_by: str) -> SentenceTransformer:
    modules: dict[str, list[Any]] = {"text": list(text.model), "image": list(image.model)}
    router = Router(
        modules,
        route_mappings=_route_mappings(image, route_by),
        allow_empty_key=False,
    )
    prompts = _prompts(text.model, image.model, route_by)
    notes = (*text.notes, *image.notes, "added at the end: normalisation", f"routed by {route_by}")
    names_texts = text.model.default_prompt_name in prompts and not _reads_prompts(image.model)
    model = SentenceTransformer(
        modules=[router, Normalize()],
        device=str(image.model.device),
        prompts=prompts,
        default_prompt_name=text.model.default_prompt_name if names_texts and route_by == "modality" else None,
        model_card_data=ComposedCardData(composition=notes),
    )
    # the host looks on the Hub for a model that is called like a folder
    cards = (text.model.model_card_data, image.model.model_card_data)
    model.model_card_data.local_files_only = any(card.local_files_only for card in cards)
    columns = ["query", "image", *(f"negative_{k}" for k in range(NUM_NEGATIVES))]
    setattr(model, ROUTER_MAPPING, router_mapping(columns))
    return model.eval()


def _route_mappings(image: _Encoder, route_by: str) -> dict[Any, str]:
    keys: dict[str, Any] = {"text": "text", "image": "image", "text+image": PAIR}
    by_modality = {(None, keys[kind]): "image" for kind in image.kinds if kind != "text"} | {(None, "text"): "text"}
    if route_by == "modality":
        return by_modality
    by_task = {("query", "text"): "text"} | {("document", keys[kind]): "image" for kind in image.kinds}
    return by_task | by_modality


def _prompts(text: SentenceTransformer, image: SentenceTransformer, route_by: str) -> dict[str, str]:
    """The prompts of both sides, each where its own encoder reads them.

    A VLM reads a prompt with an image too, so those of the text encoder for documents would reach it.
    """
    named = dict(text.prompts) if route_by == "modality" and not _reads_prompts(image) else {}
    document = _prompt_of(image, "document", "passage", "corpus") if _reads_prompts(image) else ""
    own = _prompt_of(text, "document", "passage", "corpus") if named else ""
    joined = {**named, "query": _prompt_of(text, "query"), "document": document or own}
    return {name: prompt for name, prompt in joined.items() if prompt}


def _prompt_of(model: SentenceTransformer, *names: str) -> str:
    """The prompt that the host would use, by the first of these names that has one."""
    given = (model.prompts.get(name) for name in (*names, model.default_prompt_name or ""))
    return next((prompt for prompt in given if prompt), "")


def _reads_prompts(model: SentenceTransformer) -> bool:
    return "message" in model.modalities


def _check_sizes(model: SentenceTransformer, image: _Encoder, route_by: str) -> None:
    """Prove that everything the routes take ends in one dimension, each by a forward pass."""
    document = "document" if route_by == "task" else None
    samples = [(None, "text"), *((document, kind) for kind in image.kinds)]
    sizes = {
        kind: output_of(model, sample_of(kind), task=task)["sentence_embedding"].shape[-1] for task, kind in samples
    }
    router = find_router(model)
    if len(set(sizes.values())) > 1 and router is not None:
        found = ", ".join(f"{kind} in {size}" for kind, size in sizes.items())
        raise ConfigError(
            f"The routes end in different dimensions: {found}. {describe_routes(router)} Expected one. Pass encoders "
            f"that give every modality in one dimension."
        )


def _joined(modules: Sequence[nn.Module], like: SentenceTransformer) -> SentenceTransformer:
    """A model of these modules with the prompts of another."""
    model = SentenceTransformer(
        modules=list(modules),
        device=str(like.device),
        prompts={name: prompt for name, prompt in like.prompts.items() if prompt},
        default_prompt_name=like.default_prompt_name,
    )
    model.model_card_data.local_files_only = like.model_card_data.local_files_only
    return model.eval()


def _device(options: LoadOptions) -> str | None:
    return None if options.device is None else str(options.device)
