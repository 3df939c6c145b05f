"""A model made ready to train: loaded, checked against the documents, parts frozen, adapters attached."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from sentence_transformers import MultiVectorEncoder

from mmtune.data.documents import DocumentKind, let_read_typed_texts
from mmtune.models.fresh import fresh_layers
from mmtune.models.late_interaction import mark_fresh_projections
from mmtune.models.loading import check_documents, describe_model
from mmtune.models.lora import LoraChoice, add_lora
from mmtune.models.parts import describe_training, freeze_parts
from mmtune.models.routes import check_routes
from mmtune.training.kinds import Kind, Model


@dataclass(frozen=True)
class Start(Generic[Model]):
    """A model before training.

    Attributes:
        model: As it will be trained.
        facts: What it is, and which of its weights will change, for ``settings``.
    """

    model: Model
    facts: dict[str, Any]


def ready_model(
    model: Model | str | os.PathLike[str],
    kind: Kind[Model],
    *,
    documents: DocumentKind,
    freeze: Sequence[str],
    lora: LoraChoice,
    seed: int,
) -> Start[Model]:
    """The model as it will be trained; one that was given is changed in place.

    Args:
        model: A model or a checkpoint.
        kind: What it is.
        documents: What it must embed, besides texts.
        freeze: Parts that stay as they are.
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
    if isinstance(ready, MultiVectorEncoder):
        mark_fresh_projections(ready)
    freeze_parts(ready, freeze)
    adapters = add_lora(ready, lora, freeze=freeze, seed=seed)
    facts = {**describe_model(ready), **describe_training(ready), "lora": adapters}
    return Start(ready, {**facts, "fresh_layers": list(fresh_layers(ready))})
