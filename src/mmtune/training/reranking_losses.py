"""The loss of a reranker: the caller's or the recipe's, and the rows that it reads."""

import functools
import warnings

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import (
    ADRMSELoss,
    BinaryCrossEntropyLoss,
    LambdaLoss,
    ListNetLoss,
    MultipleNegativesRankingLoss,
    PListMLELoss,
)
from torch import nn

from mmtune.training.losses import Loss, built
from mmtune.training.sets import Form

_LISTWISE = (LambdaLoss, ListNetLoss, PListMLELoss, ADRMSELoss)
_CONTRASTIVE = (MultipleNegativesRankingLoss,)


def form_of(loss: Loss | None) -> Form:
    """The rows that a loss reads. A callable that is no class tells only once it was called: until then, pairs.

    Args:
        loss: As ``finetune_reranker`` takes it, or built.
    """
    target = loss.func if isinstance(loss, functools.partial) else loss
    kind = target if isinstance(target, type) else type(target)
    if issubclass(kind, _LISTWISE):
        return "lists"
    return "columns" if issubclass(kind, _CONTRASTIVE) else "pairs"


def reranking_loss(loss: Loss | None, model: CrossEncoder, num_negatives: int) -> nn.Module:
    """The caller's loss, built, or binary cross-entropy in which relevant pairs weigh as much as all the others.

    Args:
        loss: As ``finetune_reranker`` takes it.
        model: The reranker.
        num_negatives: Pairs of label 0 to each pair of label 1.

    Raises:
        ConfigError: The caller's loss trains another model.

    Warns:
        UserWarning: A listwise loss has a sigmoid in front: it sees differences of at most 1, and can't separate.
    """
    if loss is None:
        return BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(max(1, num_negatives))))
    made = built(loss, model)
    if form_of(made) == "lists" and isinstance(getattr(made, "activation_fn", None), nn.Sigmoid):
        warnings.warn(
            f"{type(made).__name__} has a sigmoid in front of it. A listwise loss compares raw scores: behind a "
            "sigmoid they differ by at most 1, and the ranking stops improving. Leave activation_fn out.",
            stacklevel=3,
        )
    return made
