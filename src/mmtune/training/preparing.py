"""A model made ready to train: loaded, checked against the documents, parts frozen, adapters attached."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic

from torch import nn

from mmtune.data.documents import DocumentKind
from mmtune.errors import ConfigError
from mmtune.host import let_read_typed_texts
from mmtune.models.adapters import encoders_of, has_lora
from mmtune.models.fresh import fresh_layers, guess_fresh_layers
from mmtune.models.loading import check_documents, describe_model
from mmtune.models.lora import LoraChoice, add_lora
from mmtune.models.parts import describe_training, freeze_parts, model_parts, part_names
from mmtune.models.routes import check_routes, freeze_unreached
from mmtune.training.kinds import Kind, Model


@dataclass(frozen=True)
class Start(Generic[Model]):
    """A model before training.

    Attributes:
        model: As it will be trained.
        facts: What it is, and which of its weights will change, for ``settings``.
        frozen: What this run alone keeps as it is, for ``thawed_afterwards``.
    """

    model: Model
    facts: dict[str, Any]
    frozen: tuple[nn.Parameter, ...] = ()


def ready_model(
    model: Model | str | os.PathLike[str],
    kind: Kind[Model],
    *,
    documents: DocumentKind,
    freeze: Iterable[str] | None,
    lora: LoraChoice,
    seed: int,
) -> Start[Model]:
    """The model as it will be trained; one that was given is changed in place.

    A call that is refused leaves what was frozen, and what was not, as it was.

    Args:
        model: A model or a checkpoint.
        kind: What it is.
        documents: What it must embed, besides texts.
        freeze: Parts that stay as they are; ``None`` for none.
        lora: As ``finetune`` takes it.
        seed: Of the adapters' first weights.

    Raises:
        ConfigError: The model does not embed these documents, lacks a part, or nothing is left to train.
        MissingExtraError: peft, or another package that the model needs, is not installed.
    """
    ready = kind.load(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model
    let_read_typed_texts(ready)
    check_documents(ready, documents)
    check_routes(ready, documents)
    guess_fresh_layers(ready)
    names = part_names(freeze)
    with _kept_if_refused(ready) as trainable:
        freeze_parts(ready, names)
        freeze_unreached(ready, documents)
        newly_frozen = [parameter for parameter in trainable if not parameter.requires_grad]
        adapters = add_lora(ready, lora, freeze=names, seed=seed)
        _refuse_nothing_to_train(ready)
    facts = {**describe_model(ready), **describe_training(ready), "lora": adapters}
    facts["fresh_layers"] = list(fresh_layers(ready))
    return Start(ready, facts, _to_thaw(ready, newly_frozen))


@contextmanager
def thawed_afterwards(start: Start[Any]) -> Iterator[None]:
    """Lets the parts learn again that ``freeze`` kept as they were: it is a choice of one run, not of the model.

    What lies beside adapters stays frozen for as long as these are there.
    """
    try:
        yield
    finally:
        for parameter in start.frozen:
            parameter.requires_grad_(True)


@contextmanager
def _kept_if_refused(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Gives the parameters that take gradients; after an error all take them that did, and no others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield [parameter for parameter, is_trainable in before if is_trainable]
    except Exception:
        for parameter, is_trainable in before:
            parameter.requires_grad_(is_trainable)
        raise


def _to_thaw(model: Model, frozen: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    encoders = encoders_of(model) if has_lora(model) else []
    beside_adapters = {id(parameter) for module in encoders for parameter in module.parameters()}
    return tuple(parameter for parameter in frozen if id(parameter) not in beside_adapters)


def _refuse_nothing_to_train(model: Model) -> None:
    parts = model_parts(model)
    if not any(parameter.requires_grad for part in parts.values() for parameter in part):
        raise ConfigError(
            f"Nothing is left to train: all parts of the model ({', '.join(map(repr, parts))}) are frozen. Expected "
            "one that learns. Call requires_grad_(True) on the model or a part of it, or pass lora=True."
        )
