"""The parts of a model by name, found by its structure: what can be frozen, and where adapters go.

.. code-block:: text

    part         in a VLM                          in a dual encoder (CLIP, SigLIP)    in a Router
    vision       the image encoder                 the image encoder                   of a VLM in one of its routes
    language     the language model and LM head                                        of a VLM in one of its routes
    connector    from the one to the other                                             of a VLM in one of its routes
    text                                           the text encoder                    the encoder of the route "text"
    image                                                                              the encoder of the route "image"
    projection   what follows the encoders, in every kind of model: Dense modules, CLIP's own projections, a score head

A Router's routes give their own names, also others than ``text`` and ``image``. A model for text alone has the part
``text``, one for images alone ``vision``; an audio encoder is ``audio``, also CLAP's. ``image`` and ``vision`` mean the
same, and so do ``text`` and ``language``, wherever a model has one of the two.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from torch import nn

from mmtune.arguments import listed
from mmtune.errors import ConfigError
from mmtune.models.kinds import require_model

PROJECTION = "projection"
TOWERS = {"vision": "image", "audio": "audio"}
"""The part that an encoder of its own for a modality is."""
VLM_PARTS = ("vision", "audio", "connector", "language")
HOLDS_STATISTICS = "holds_statistics"
"""Marks batch normalisation that has the hook of ``freeze_parts``."""
SYNONYMS = {"image": "vision", "vision": "image", "text": "language", "language": "text"}


def model_parts(model: BaseModel) -> dict[str, tuple[nn.Parameter, ...]]:
    """The parameters of each part of a model, with those of adapters in it.

    The merger of a Qwen-VL lies inside the module that transformers calls ``visual`` and is ``connector`` here, with
    the deepstack mergers of Qwen3-VL: the Qwen team's own finetuning script switches tower (``tune_mm_vision``), merger
    (``tune_mm_mlp``) and language model (``tune_mm_llm``) apart, too. So ``freeze=("vision",)`` leaves the merger to
    train, as it leaves the connector of Idefics3 and the projector of LLaVA.

    CLIP's projections are a part of their own for the same reason: to freeze an encoder and train what maps its output
    into the common space is the usual wish. SigLIP has no projections; the pooling heads inside its encoders belong to
    these. A dual encoder's temperature and bias (``logit_scale``), which no embedding depends on, are in no part.

    Args:
        model: Any host model: ``SentenceTransformer``, ``MultiVectorEncoder``, ``SparseEncoder`` or ``CrossEncoder``.

    Returns:
        The parts in the order in which the model runs; one without parameters is left out. A parameter is in one part,
        except that a VLM in a route of a Router is a part by the name of the route and has its own parts besides.

    Raises:
        ConfigError: ``model`` is no model.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> list(model_parts(SentenceTransformer("my-model", device="cpu")))  # a CLIP
        ['vision', 'text', 'projection']
    """
    require_model(model)
    return _pipeline_parts(model.children())


def part_names(freeze: Iterable[str] | None) -> tuple[str, ...]:
    """What ``freeze`` takes, as a tuple; ``None`` freezes nothing.

    Raises:
        ConfigError: It is a string, or no series of names.
    """
    if isinstance(freeze, str):
        raise ConfigError(f'freeze={freeze!r} is a string. Expected the names of parts: pass freeze=("{freeze}",).')
    if not isinstance(freeze, Iterable | None):
        raise ConfigError(f'freeze={freeze!r} names no parts. Expected their names: pass some, as in ("vision",).')
    return tuple(freeze or ())


def parts_named(model: BaseModel, names: Iterable[str] | None) -> dict[str, tuple[nn.Parameter, ...]]:
    """The parts with these names, or with names that mean the same.

    Args:
        model: Any host model.
        names: Names of parts; ``None`` for none.

    Returns:
        Their parameters by the names that ``model_parts`` gives.

    Raises:
        ConfigError: ``names`` is a string instead of a tuple, or the model has no such part.
    """
    parts = model_parts(model)
    found = {}
    for name in part_names(names):
        known = name if name in list(parts) else SYNONYMS.get(str(name))  # a list has no key
        if known not in parts:
            raise ConfigError(
                f"freeze: the model has no part {name!r}. Its parts are {listed(list(parts))}. Pass some of these."
            )
        found[known] = parts[known]
    return found


def freeze_parts(model: BaseModel, names: Iterable[str] | None) -> None:
    """Keep parts of a model as they are in training: parameters, and running statistics of batch normalisation.

    Weights that two layers share are frozen with either of them: freezing ``language`` freezes an LM head and the
    embeddings that it is tied to.

    Args:
        model: Any host model, changed in place.
        names: Parts as in ``model_parts``; none, or ``None``, leaves the model as it is.

    Raises:
        ConfigError: ``names`` is a string, the model has no such part, or nothing would be left to train.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> model = SentenceTransformer("my-model", device="cpu")
        >>> freeze_parts(model, ("vision",))
        >>> describe_training(model)["frozen_parts"]
        ['vision']
    """
    names = part_names(names)
    chosen = parts_named(model, names)
    frozen = {id(parameter) for part in chosen.values() for parameter in part}
    parts = model_parts(model)
    rest = [parameter for part in parts.values() for parameter in part if id(parameter) not in frozen]
    # quantised weights stay as they are, and still carry adapters
    if names and not any(parameter.requires_grad or not parameter.is_floating_point() for parameter in rest):
        raise ConfigError(
            f"freeze={names!r} leaves nothing to train. The model's parts are {listed(list(parts))}. Leave one of them "
            f"out of freeze."
        )
    for part in chosen.values():
        for parameter in part:
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
            weights = [id(parameter) for parameter in module.parameters()]
            if weights and frozen.issuperset(weights) and not hasattr(module, HOLDS_STATISTICS):
                module.register_forward_pre_hook(_hold_statistics)
                setattr(module, HOLDS_STATISTICS, True)


def _hold_statistics(module: nn.Module, *_: object) -> None:
    """Let frozen batch normalisation use its running statistics: in training mode it would change them."""
    # at every call: the trainer puts all modules into training mode again after each evaluation
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.eval()


def describe_training(model: BaseModel) -> dict[str, Any]:
    """What of a model is trained, as plain values for ``settings`` and ``metrics.json``.

    Args:
        model: Any host model, after ``freeze_parts`` and ``add_lora``.

    Returns:
        ``trained_parameters`` (their number), ``trained_share`` (of all parameters, 0 to 1), ``trained_parts`` and
        ``frozen_parts`` (names; a part with adapters is trained).
    """
    parts = model_parts(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # bitsandbytes packs two weights of 4 bits into a byte
    shapes = [getattr(getattr(weight, "quant_state", None), "shape", weight.shape) for weight in model.parameters()]
    is_trained = {name: any(p.requires_grad for p in part) for name, part in parts.items()}
    return {
        "trained_parameters": trained,
        "trained_share": trained / max(1, sum(shape.numel() for shape in shapes)),
        "trained_parts": [name for name, value in is_trained.items() if value],
        "frozen_parts": [name for name, value in is_trained.items() if not value],
    }


def encoder_parts(module: Transformer) -> dict[str, tuple[nn.Parameter, ...]]:
    """The parts of one encoder, as in ``model_parts``.

    Args:
        module: The host's module around a transformers model.
    """
    model = module.model
    towers = {part: tower for part, modality in TOWERS.items() if (tower := _tower(model, modality)) is not None}
    entries = (module.modality_config.get(modality, {}) for modality in ("text", "image"))
    claims: Iterator[tuple[str, nn.Module]]
    if not towers:
        claims = _single_claims(module)
    elif any(entry.get("method", "forward") != "forward" for entry in entries):
        # images and texts go through methods of their own, and so never meet; also where one of them is unused
        text = ("text", model.get_decoder())
        claims = iter([*towers.items(), text, *((PROJECTION, child) for child in model.children())])
    else:
        claims = _vlm_claims(model, towers)

    # a parameter that several claim, as tied weights are, belongs to the first
    parts: dict[str, list[nn.Parameter]] = {}
    taken: set[int] = set()
    for name, claimed in claims:
        new = [parameter for parameter in claimed.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in new}
        parts.setdefault(name, []).extend(new)
    return {name: tuple(part) for name, part in parts.items() if part}


def _pipeline_parts(modules: Iterable[nn.Module]) -> dict[str, tuple[nn.Parameter, ...]]:
    """The parts of modules that run one after the other: an encoder first, then what works on its output."""
    parts: dict[str, tuple[nn.Parameter, ...]] = {}
    for position, module in enumerate(modules):
        if isinstance(module, Router):
            found = _router_parts(module)
        elif isinstance(module, Transformer):
            found = encoder_parts(module)
        else:
            found = {"text" if position == 0 else PROJECTION: tuple(module.parameters())}
        parts = _joined(parts, found)
    return {name: part for name, part in parts.items() if part}


def _router_parts(router: Router) -> dict[str, tuple[nn.Parameter, ...]]:
    routes = {name: list(modules.children()) for name, modules in router.sub_modules.items()}
    uses = Counter(id(modules[0]) for modules in routes.values())
    parts: dict[str, tuple[nn.Parameter, ...]] = {}
    for route, modules in routes.items():
        found = _pipeline_parts(modules)
        # an encoder that several routes share has the parts that it has alone
        if uses[id(modules[0])] == 1:
            encoder = tuple(parameter for name, part in found.items() if name != PROJECTION for parameter in part)
            inner = [name for name in VLM_PARTS if name not in routes] if "language" in found else []
            found = {route: encoder, **{name: part for name, part in found.items() if name in (*inner, PROJECTION)}}
        parts = _joined(parts, found)
    return parts


def _joined(
    parts: Mapping[str, tuple[nn.Parameter, ...]], more: Mapping[str, tuple[nn.Parameter, ...]]
) -> dict[str, tuple[nn.Parameter, ...]]:
    # modules that two routes share count once
    together = {name: (*parts.get(name, ()), *more.get(name, ())) for name in [*parts, *more]}
    return {name: tuple({id(parameter): parameter for parameter in part}.values()) for name, part in together.items()}


def _tower(model: Any, modality: str) -> nn.Module | None:
    """The encoder that a transformers model has for a modality besides its language model or text encoder."""
    try:
        tower = model.get_encoder(modality=modality)
    except (AttributeError, TypeError):  # a model with code of its own, or an encoder-decoder for text
        return None
    if tower is model and modality == "audio":  # CLAP's name for it is not looked up (transformers 5.23)
        tower = getattr(model, "audio_model", None)
    return tower if isinstance(tower, nn.Module) and tower is not model else None


def _single_claims(module: Transformer) -> Iterator[tuple[str, nn.Module]]:
    part = "text" if {"text", "message"} & set(module.modality_config) else "vision"
    yield part, module.model.base_model
    yield from _output_layer(module.model, part)
    yield PROJECTION, module.model


def _vlm_claims(model: Any, towers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    language = model.get_decoder()
    for part, tower in towers.items():
        # Qwen-VL and its relatives keep what maps patches into the language model in the tower's own module
        yield from (("connector", child) for name, child in tower.named_children() if "merger" in name)
        yield part, tower
    yield "language", language
    yield from _output_layer(model, "language")
    # the smallest module with all of them around it
    around, wanted = model, {*towers.values(), language}
    while inside := next((child for child in around.children() if wanted.issubset(child.modules())), None):
        around = inside
    yield "connector", around
    yield PROJECTION, model


def _output_layer(model: Any, part: str) -> Iterator[tuple[str, nn.Module]]:
    layer = model.get_output_embeddings()
    if layer is not None:
        yield part, layer
