"""Two encoders that become one model: the host's Router, with the parts that make its routes meet."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

from mmtune.arguments import require_mapping, require_one_of, shown
from mmtune.errors import ConfigError
from mmtune.host import declare_modalities
from mmtune.models.checkpoints import first_line, read_encoders
from mmtune.models.fitting import fit_padding, is_causal
from mmtune.models.fresh import mark_fresh
from mmtune.models.loading import load_host_model
from mmtune.models.opening import LoadOptions, open_checkpoint, require_dimension
from mmtune.models.parts import part_names
from mmtune.models.pixels import apply_pixel_limits
from mmtune.models.routes import check_routes, model_of, output_of, router_mapping, sample_of
from mmtune.models.towers import freeze_unused, is_dual_encoder, take_tower

__all__ = ["Side", "compose_router", "router_mapping"]

Side: TypeAlias = str | os.PathLike[str] | Sequence[nn.Module]
"""One side of a Router: a checkpoint's name or folder, or host modules."""

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
        modality: ``"text"``, ``"image"``, ``"audio"`` or ``"video"``, also the name of its route.
        model: Its modules as a model.
        kinds: What its route will take, as in ``sample_of``.
        notes: What was done to it.
    """

    modality: str
    model: SentenceTransformer
    kinds: tuple[str, ...]
    notes: tuple[str, ...]

    def noted(self, note: str, *more_modules: nn.Module) -> "_Encoder":
        """The same side with a note of what was done to it, and the modules that were added at its end."""
        model = model_of([*self.model, *more_modules], self.model) if more_modules else self.model
        return replace(self, model=model, notes=(*self.notes, note))

    def features(self, kind: str, *, gradients: bool = False) -> dict[str, Any]:
        """What the side gives for a sample.

        Raises:
            ConfigError: It can't embed it.
        """
        try:
            return output_of(self.model, sample_of(kind, self.model), gradients=gradients)
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
    image: Side | None = None,
    *,
    audio: Side | None = None,
    video: Side | None = None,
    dimension: int | None = None,
    freeze: str | Sequence[str] = (),
    device: str | torch.device | None = None,
    route_by: Literal["modality", "task"] = "modality",
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    text_prompts: Mapping[str, str] | None = None,
) -> SentenceTransformer:
    """One model of a text encoder and an encoder of images, sounds or clips, or several of these, by the host's Router.

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
        audio: An encoder of sounds likewise, such as AST or that of Whisper.
        video: An encoder of clips likewise, such as VideoMAE.
        dimension: Of the embeddings. ``None`` is that of the image encoder, else of the one of sounds, else of clips.
        freeze: ``"text"``, ``"image"``, several sides: encoders that are not trained. Projections are trained always.
        device: Where the model goes; ``None`` lets the host choose.
        route_by: ``"modality"`` sends every text to the text encoder. ``"task"`` sends only queries there, and
            documents of every modality that the image encoder takes to the image encoder; an input without a task goes
            by its modality.
        max_pixels: As in ``load_model``, for the image encoder.
        min_pixels: As in ``load_model``, for the image encoder.
        dtype: As in ``load_model``, for checkpoints; ``"auto"`` is float32, because the host can't load a Router in
            half precision again where a route has a projection.
        attention: As in ``load_model``, for checkpoints.
        text_prompts: What the text encoder wants in front of texts and does not bring along, by the names that the host
            uses, such as ``{"query": "query: ", "document": "passage: "}``. One for documents is left out where it
            would reach an image encoder that reads prompts, as a VLM does.

    Returns:
        A new model in evaluation mode, with a route for each side and an attribute ``router_mapping``,
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
    given = {"image": image, "audio": audio, "video": video}
    sources: dict[str, Side] = {name: source for name, source in given.items() if source is not None}
    if not sources:
        raise ConfigError(
            "image=None is no encoder, and a Router needs one beside that of texts. Pass image=, audio= or video=, or "
            "use load_model."
        )
    sides = ["text", *sources]
    frozen = (freeze,) if isinstance(freeze, str) else part_names(freeze)
    unknown = [side for side in frozen if side not in sides]
    if unknown:
        raise ConfigError(
            f"freeze names {unknown[0]!r}. A Router has the sides {' and '.join(map(repr, sides))}. Pass e.g. "
            f"freeze={sides[1]!r}."
        )
    require_one_of("route_by", route_by, ("modality", "task"))
    dimension = require_dimension(dimension, "an embedding")
    prompts = {} if text_prompts is None else text_prompts
    require_mapping("text_prompts", prompts, of=str, expected='prompts by name, as in {"query": "query: "}, or None')
    # in half precision the host could not load the projections again, see LoadOptions.for_host
    options = LoadOptions(max_pixels, min_pixels, "float32" if dtype == "auto" else dtype, attention, device)
    for modality, source in {"text": text, **sources}.items():
        _check_source(modality, source)
    without_limits = replace(options, max_pixels=None, min_pixels=None)
    others = [
        _encoder(name, source, options if name == "image" else without_limits, whole=route_by == "task")
        for name, source in sources.items()
    ]
    text_side = _encoder("text", text, without_limits, whole=False)
    text_side.model.prompts.update(prompts)
    if all(isinstance(source, str | os.PathLike) for source in (text, *sources.values())):
        # the host loads static embeddings in float32 whatever it is told, and a loss takes one dtype only
        text_side.model.to(next(others[0].model.parameters()).dtype)

    size = dimension or others[0].dimension()
    text_side, *others = (_fitted(side, size, freezes=side.modality in frozen) for side in (text_side, *others))
    model = _routed(text_side, others, route_by)
    for kind in (kind for side in others for kind in side.kinds):
        check_routes(model, kind)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        ends = "both encoders" if len(others) == 1 else "all encoders"
        raise ConfigError(
            f"freeze={freeze!r} leaves nothing to train: {ends} end in {size} dimensions, so no projection was "
            f"added. Freeze one side, or pass another dimension to add projections."
        )
    return model


def fit_text_encoder(source: Side, size: int, device: str) -> tuple[SentenceTransformer, tuple[str, ...]]:
    """A text encoder that ends in ``size`` dimensions and normalises nothing, and what was done to it.

    Raises:
        ConfigError: It is no text encoder.
    """
    _check_source("text", source, "text_encoder")
    side = _encoder("text", source, LoadOptions(dtype="float32", device=device), whole=False)
    side = _fitted(replace(side, model=side.model.to(device)), size, freezes=False)
    return side.model, side.notes


def _check_source(modality: str, source: Side, argument: str = "") -> None:
    """Look at what a side is, before any weights are read; ``argument`` is what it was given as, where alone."""
    if isinstance(source, str | os.PathLike):
        files = open_checkpoint(os.fspath(source))
        try:
            read_encoders(files, modality)
        except ConfigError as error:
            if argument:
                raise ConfigError(f"{argument}={os.fspath(source)!r}: {error}") from error
            raise ConfigError(
                f"{error} It was given as {modality}= of compose_router(text, image): swap the two if they are in the "
                "other order."
            ) from error
        if files.modules and files.modules[0]["type"].endswith((".Router", ".Asym")):
            raise _nested_router(modality)
        return
    modules = list(source) if isinstance(source, Sequence | nn.Sequential) else []
    # a reranker and a model of late interaction end in something else than an embedding
    is_other = isinstance(source, BaseModel) and not isinstance(source, SentenceTransformer)
    if is_other or not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise ConfigError(
            f"{argument or modality}={shown(source)} is no encoder. Expected a checkpoint's name or folder, a "
            f"SentenceTransformer, or a list of modules such as [Transformer(...), Pooling(...)]. Pass one of these."
        )
    if any(isinstance(module, Router) for module in modules):
        raise _nested_router(modality)


def _nested_router(modality: str) -> ConfigError:
    return ConfigError(
        f"The {modality} side has a Router of its own. Expected an encoder with one route. Take one out with "
        f"extract_route."
    )


def _encoder(modality: str, source: Side, options: LoadOptions, *, whole: bool) -> _Encoder:
    """A side with its missing parts, up to the projection."""
    is_checkpoint = isinstance(source, str | os.PathLike)
    if isinstance(source, str | os.PathLike):
        loaded = load_host_model(SentenceTransformer, os.fspath(source), options, modality=modality)
    elif isinstance(source, SentenceTransformer):
        loaded = apply_pixel_limits(source, options.limits)
    else:
        device: Any = options.device
        loaded = apply_pixel_limits(SentenceTransformer(modules=list(source), device=device), options.limits)
    notes = [f"{modality} encoder: {os.fspath(source) if is_checkpoint else 'modules that were passed'}"]

    # the Router normalises at its end, and a dual encoder of a checkpoint is needed by half
    modules: list[Any] = list(loaded)
    while len(modules) > 1 and isinstance(modules[-1], Normalize):
        modules.pop()
    if not is_checkpoint:  # else load_host_model has
        fit_padding(loaded, loaded.device)
    if is_checkpoint and not whole and is_dual_encoder(modules[0]):
        tower = take_tower(modules[0], modality)
        if tower is not None:
            modules = [*tower, *modules[1:]]
            notes.append(f"of it the {modality} tower alone")
    kinds = _image_kinds(modules[0], whole=whole) if modality == "image" else (modality,)
    side = _pooled(_Encoder(modality, model_of(modules, loaded), kinds, tuple(notes)))

    first: Any = side.model[0]
    if not is_dual_encoder(first):
        return side
    idle = freeze_unused(first, [side.features(kind, gradients=True)["sentence_embedding"] for kind in kinds])
    return side.noted(f"frozen, because no route reaches it: {idle:,} parameters")


def _image_kinds(module: nn.Module, *, whole: bool) -> tuple[str, ...]:
    """What the image route takes; a VLM is told to take text with image."""
    take_with_text(module, ("image",))
    modalities = getattr(module, "modalities", ["image"])
    together = PAIR in modalities or ("message" in modalities and {"image", "text"} <= set(modalities))
    texts = ("text",) if whole and "text" in modalities else ()
    return ("image", *texts, *(("text+image",) if together else ()))


def take_with_text(module: nn.Module, kinds: Sequence[str]) -> None:
    """Tell an encoder that reads messages to take text with images or clips in a Router, as it does outside of one."""
    if isinstance(module, Transformer) and "message" in module.modalities:
        # the Router names the pair in the features, and the encoder looks it up (sentence-transformers 6.2)
        message = {name: value for name, value in module.modality_config["message"].items() if name != "format"}
        known: dict[Any, Any] = module.modality_config
        pairs = [tuple(sorted((kind, "text"))) for kind in kinds if {kind, "text"} <= known.keys()]
        declare_modalities(module, {**known, **{pair: message for pair in pairs if pair not in known}})


def _pooled(side: _Encoder) -> _Encoder:
    features = side.features(side.modality)
    if "sentence_embedding" in features:
        return side
    if "token_embeddings" not in features:
        raise ConfigError(
            f"The {side.modality} side gives neither sentence nor token embeddings, only {', '.join(features)}. "
            f"Expected modules that embed, such as [Transformer(...), Pooling(...)]. Add what is missing."
        )
    first = side.model[0]
    causal = isinstance(first, Transformer) and "text" in first.modalities and is_causal(first, side.model.device)
    pooling = Pooling(features["token_embeddings"].shape[-1], pooling_mode="lasttoken" if causal else "mean")
    return side.noted(f"added pooling of the {side.modality} side: {pooling.pooling_mode}", pooling)


def _fitted(side: _Encoder, size: int, *, freezes: bool) -> _Encoder:
    """A side that ends in ``size`` dimensions, with its encoder frozen or not; a projection is trained always."""
    if freezes:
        side.model.requires_grad_(False)
        side = side.noted(f"frozen: the {side.modality} encoder")
    found = side.dimension()
    if found == size:
        return side
    weight = torch.empty(size, found)
    nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(PROJECTION_SEED))
    with torch.random.fork_rng(devices=[]):  # the host draws weights, which are replaced
        dense = Dense(found, size, activation_function=nn.Identity(), init_weight=weight, init_bias=torch.zeros(size))
    dense.to(side.model.device, next(side.model.parameters()).dtype)
    mark_fresh(dense)
    return side.noted(f"added projection of the {side.modality} side: {found} to {size} dimensions", dense)


def _routed(text: _Encoder, others: Sequence[_Encoder], route_by: str) -> SentenceTransformer:
    keys: dict[str, Any] = {"text+image": PAIR}
    kinds = [(kind, side.modality) for side in others for kind in side.kinds]
    mappings: dict[Any, str] = {(None, keys.get(kind, kind)): route for kind, route in kinds if kind != "text"}
    mappings[(None, "text")] = "text"
    if route_by == "task":
        # where several read texts, the first does
        documents = {("document", keys.get(kind, kind)): route for kind, route in reversed(kinds)}
        mappings = {("query", "text"): "text"} | documents | mappings
    modules: dict[str, list[Any]] = {side.modality: list(side.model) for side in (text, *others)}
    # of encoders that read prompts, as a VLM does, there is one at most among those that are made for pages
    image = next((side for side in others if _reads_prompts(side.model)), others[0])
    prompts = _prompts(text.model, image.model, route_by)
    default = text.model.default_prompt_name
    names_texts = default in prompts and not _reads_prompts(image.model)
    model = SentenceTransformer(
        modules=[Router(modules, route_mappings=mappings, allow_empty_key=False), Normalize()],
        device=str(image.model.device),
        prompts=prompts,
        default_prompt_name=default if names_texts and route_by == "modality" else None,
        model_card_data=ComposedCardData(
            composition=(
                *text.notes,
                *(note for side in others for note in side.notes),
                "added at the end: normalisation",
                f"routed by {route_by}",
            )
        ),
    )
    # the host looks on the Hub for a model that is called like a folder
    cards = [side.model.model_card_data for side in (text, *others)]
    model.model_card_data.local_files_only = any(card.local_files_only for card in cards)
    columns = ["query", "image", *(f"negative_{k}" for k in range(NUM_NEGATIVES))]
    setattr(model, ROUTER_MAPPING, router_mapping(columns))
    return model.eval()


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
