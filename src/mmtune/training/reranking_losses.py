"""The loss of a reranker: the caller's or the recipe's, and the rows that it reads."""

import functools
import warnings

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import (
    ADRMSELoss,
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    LambdaLoss,
    ListNetLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
    PListMLELoss,
)
from torch import nn

from mmtune.errors import ConfigError
from mmtune.training.inputs import Form
from mmtune.training.losses import Loss, built

_LISTWISE = (LambdaLoss, ListNetLoss, PListMLELoss, ADRMSELoss)
_CONTRASTIVE = (MultipleNegativesRankingLoss,)
_UNFIT = {CrossEntropyLoss: "a model with a score for each of several classes", MarginMSELoss: "scores of a teacher"}


def form_of(loss: Loss | None) -> Form | None:
    """The rows that a loss reads; ``None`` for a callable that tells only by what it returns.

    Args:
        loss: As ``finetune_reranker`` takes it, or built.

    Raises:
        ConfigError: It is no loss, or one that needs what the data don't hold.
    """
    if not (loss is None or callable(loss)):
        raise ConfigError(
            f"loss={loss!r} is no loss. Pass a host loss, built or as a callable that takes the model, e.g. LambdaLoss."
        )
    target = loss.func if isinstance(loss, functools.partial) else loss
    if not (target is None or isinstance(target, (type, nn.Module))):
        return None
    kind = target if isinstance(target, type) else type(target)
    for unfit, needed in _UNFIT.items():
        if issubclass(kind, unfit):
            raise ConfigError(
                f"{kind.__name__} needs {needed}, and relevance has one label for each pair. Leave loss out, or pass "
                "LambdaLoss or MultipleNegativesRankingLoss."
            )
    if issubclass(kind, _LISTWISE):
        return "lists"
    return "columns" if issubclass(kind, _CONTRASTIVE) else "pairs"


def check_negatives(form: Form | None, num_negatives: int) -> None:
    """Make sure that a loss meets pairs that are not relevant.

    Raises:
        ConfigError: It meets none: a reranker that says yes to everything would be right.
    """
    if num_negatives == 0 and form in ("pairs", "lists"):
        raise ConfigError(
            "num_negatives=0: every pair would be relevant, and nothing can be learned. Pass 1 or more, or a loss that "
            "takes negatives from the batch, such as MultipleNegativesRankingLoss."
        )


def reranking_loss(loss: Loss | None, model: CrossEncoder, num_negatives: int) -> nn.Module:
    """The caller's loss, built, or binary cross-entropy in which relevant pairs weigh as much as all the others.

    Args:
        loss: As ``finetune_reranker`` takes it.
        model: The reranker.
        num_negatives: Pairs of label 0 to each pair of label 1.

    Raises:
        ConfigError: The caller's loss trains another model.

    Warns:
        UserWarning: A listwise loss, or binary cross-entropy, has a sigmoid in front: scores that differ by at most 1
            can't separate.
    """
    if loss is None:
        return BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(max(1, num_negatives))))
    made = built(loss, model)
    if isinstance(made, (*_LISTWISE, BinaryCrossEntropyLoss)) and isinstance(made.activation_fn, nn.Sigmoid):
        warnings.warn(
            f"{type(made).__name__} has a sigmoid in front of it. It compares raw scores: behind a sigmoid they differ "
            "by at most 1, and the ranking stops improving. Leave activation_fn out.",
            stacklevel=3,
        )
    return made
