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
``text``, one for images alone ``vision``; an audio encoder is ``audio``. ``image`` and ``vision`` mean the same, and so
do ``text`` and ``language``, wherever a model has one of the two.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from torch import nn

from mmtune.errors import ConfigError

PROJECTION = "projection"
TOWERS = {"vision": "image", "audio": "audio"}
"""The part that an encoder of its own for a modality is."""
VLM_PARTS = ("vision", "audio", "connector", "language")
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

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> list(model_parts(SentenceTransformer("my-model", device="cpu")))  # a CLIP
        ['vision', 'text', 'projection']
    """
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
    return {name: parts[name] for name in (_known(name, parts) for name in part_names(names))}


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
    rest = [parameter for part in model_parts(model).values() for parameter in part if id(parameter) not in frozen]
    # quantised weights stay as they are, and still carry adapters
    if names and not any(parameter.requires_grad or not parameter.is_floating_point() for parameter in rest):
        raise ConfigError(_nothing_left_message(model, names))
    for part in chosen.values():
        for parameter in part:
            parameter.requires_grad_(False)
    _hold_statistics(model, frozen)


def describe_training(model: BaseModel) -> dict[str, Any]:
    """What of a model is trained, as plain values for ``settings`` and ``metrics.json``.

    Args:
        model: Any host model, after ``freeze_parts`` and ``add_lora``.

    Returns:
        ``trained_parameters`` (their number), ``trained_share`` (of all parameters, 0 to 1), ``trained_parts`` and
        ``frozen_parts`` (names; a part with adapters is trained).
    """
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    is_trained = {name: any(p.requires_grad for p in part) for name, part in model_parts(model).items()}
    return {
        "trained_parameters": trained,
        "trained_share": trained / max(1, sum(map(_num_weights, parameters))),
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
    if not towers:
        return _claimed(_single_claims(module))
    return _claimed(_dual_claims(model, towers) if _is_dual(module) else _vlm_claims(model, towers))


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
            found = _named_by_route(route, found, taken=routes)
        parts = _joined(parts, found)
    return parts


def _named_by_route(
    route: str, found: Mapping[str, tuple[nn.Parameter, ...]], *, taken: Iterable[str]
) -> dict[str, tuple[nn.Parameter, ...]]:
    encoder = tuple(parameter for name, part in found.items() if name != PROJECTION for parameter in part)
    inner = [name for name in VLM_PARTS if name not in taken] if "language" in found else []
    kept = {name: part for name, part in found.items() if name in (*inner, PROJECTION)}
    return {route: encoder, **kept}


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
    return tower if isinstance(tower, nn.Module) and tower is not model else None


def _is_dual(module: Transformer) -> bool:
    """Whether images and texts go through methods of their own, and so never meet; also where one of them is unused."""
    entries = (module.modality_config.get(modality, {}) for modality in ("text", "image"))
    return any(entry.get("method", "forward") != "forward" for entry in entries)


def _single_claims(module: Transformer) -> Iterator[tuple[str, nn.Module]]:
    part = "text" if {"text", "message"} & set(module.modality_config) else "vision"
    yield part, module.model.base_model
    yield from _output_layer(module.model, part)
    yield PROJECTION, module.model


def _dual_claims(model: Any, towers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    yield from towers.items()
    yield "text", model.get_decoder()
    for child in model.children():
        yield PROJECTION, child


def _vlm_claims(model: Any, towers: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    language = model.get_decoder()
    for part, tower in towers.items():
        # Qwen-VL and its relatives keep what maps patches into the language model in the tower's own module
        yield from (("connector", child) for name, child in tower.named_children() if "merger" in name)
        yield part, tower
    yield "language", language
    yield from _output_layer(model, "language")
    yield "connector", _smallest_module_with(model, [*towers.values(), language])
    yield PROJECTION, model


def _output_layer(model: Any, part: str) -> Iterator[tuple[str, nn.Module]]:
    layer = model.get_output_embeddings()
    if layer is not None:
        yield part, layer


def _smallest_module_with(model: nn.Module, wanted: Sequence[nn.Module]) -> nn.Module:
    for child in model.children():
        inside = set(child.modules())
        if inside.issuperset(wanted):
            return _smallest_module_with(child, wanted)
    return model


def _claimed(claims: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[nn.Parameter, ...]]:
    """Parameters by part; one that several claim, as tied weights are, belongs to the first."""
    parts: dict[str, list[nn.Parameter]] = {}
    taken: set[int] = set()
    for name, module in claims:
        new = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in new}
        parts.setdefault(name, []).extend(new)
    return {name: tuple(part) for name, part in parts.items() if part}


def _known(name: str, parts: Mapping[str, object]) -> str:
    if name in parts:
        return name
    if SYNONYMS.get(name) in parts:
        return SYNONYMS[name]
    raise ConfigError(
        f"freeze: the model has no part {name!r}. Its parts are {', '.join(map(repr, parts))}. Pass some of these."
    )


def _hold_statistics(model: nn.Module, frozen: set[int]) -> None:
    """Let frozen batch normalisation use its running statistics: in training mode it would change them."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
            weights = [id(parameter) for parameter in module.parameters()]
            if weights and frozen.issuperset(weights):
                module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, *_: object) -> None:
    # at every call: the trainer puts all modules into training mode again after each evaluation
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.eval()


def _num_weights(parameter: torch.Tensor) -> int:
    # bitsandbytes packs two weights of 4 bits into a byte
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()


def _nothing_left_message(model: BaseModel, names: Sequence[str]) -> str:
    return (
        f"freeze={tuple(names)!r} leaves nothing to train. The model's parts are "
        f"{', '.join(map(repr, model_parts(model)))}. Leave one of them out of freeze."
    )
