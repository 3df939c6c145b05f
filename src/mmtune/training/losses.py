"""The loss of one call: the caller's or the recipe's, its dimensions, and the rows that it reads."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from sentence_transformers.cross_encoder import losses as reranking
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import nn

from mmtune.errors import ConfigError
from mmtune.evaluation.corpus import Retriever
from mmtune.models.kinds import HostModel
from mmtune.training.inputs import Form
from mmtune.training.trainers import Kind

Loss: TypeAlias = nn.Module | Callable[[Any], nn.Module]
"""A host loss, built or as a callable that takes the model."""

MATRYOSHKA_DIMS = (2048, 1536, 1024, 512, 256, 128, 64)

_LISTWISE = (reranking.LambdaLoss, reranking.ListNetLoss, reranking.PListMLELoss, reranking.ADRMSELoss)
_CONTRASTIVE = (reranking.MultipleNegativesRankingLoss,)
_UNFIT = {
    reranking.CrossEntropyLoss: "a model with a score for each of several classes",
    reranking.MarginMSELoss: "scores of a teacher",
}


def build_loss(loss: Loss, model: HostModel) -> nn.Module:
    """The caller's loss, built for the model.

    Raises:
        ConfigError: It trains another model.
    """
    built = loss if isinstance(loss, nn.Module) else loss(model)
    if getattr(built, "model", model) is not model:
        raise ConfigError(
            f"The loss {type(built).__name__} was built for another model than the one to train. Pass that "
            "model, or pass the loss as a callable, e.g. loss=lambda model: MyLoss(model)."
        )
    return built


def in_batch_loss(
    model: Retriever,
    kind: Kind,
    *,
    matryoshka_dims: Literal["auto"] | Sequence[int] | None,
    mini_batch_size: Literal["auto"] | int,
    batch_size: int,
) -> nn.Module:
    """The recipe's loss of models that find pages: in-batch negatives at every dimension.

    Gradients are cached (Gao et al., 2021), so that memory grows with ``mini_batch_size`` alone: by the size of the
    model for ``"auto"``. Each of the dimensions is trained (Kusupati et al., 2022), where there are any.

    Raises:
        ConfigError: See ``choose_dims``.
    """
    dims = choose_dims(matryoshka_dims, model)
    if mini_batch_size == "auto":
        parameters = sum(parameter.numel() for parameter in model.parameters())
        fitting = 1 if parameters > 1_000_000_000 else 8 if parameters > 150_000_000 else 32
        mini_batch_size = min(fitting, batch_size)
    if isinstance(model, SentenceTransformer) and has_static_embedding_input(model):
        # its texts lie end to end, and the host can't cut them into mini-batches (sentence-transformers 6.2)
        loss: nn.Module = MultipleNegativesRankingLoss(model)
    else:
        assert kind.cached_loss is not None
        loss = kind.cached_loss(model, mini_batch_size=int(mini_batch_size))
    if not dims or isinstance(model, MultiVectorEncoder):
        return loss
    return MatryoshkaLoss(model, loss, matryoshka_dims=list(dims))


def choose_dims(choice: Literal["auto"] | Sequence[int] | None, model: Retriever) -> tuple[int, ...]:
    """The dimensions of a model that are trained, largest first; empty for the full size only.

    Late interaction has no smaller sizes (sentence-transformers 6.2).

    Raises:
        ConfigError: A dimension is larger than the model's, or the model does not tell its dimension.
    """
    if choice is None or isinstance(model, MultiVectorEncoder):
        return ()
    full = model.get_embedding_dimension()
    if full is None:
        raise ConfigError("The model does not tell its embedding dimension. Pass matryoshka_dims=None.")
    if choice == "auto":
        return (full, *(dim for dim in MATRYOSHKA_DIMS if dim < full))
    larger = [dim for dim in choice if dim > full]
    if larger:
        raise ConfigError(
            f"matryoshka_dims holds {larger[0]}, and the model has {full} dimensions. Name dimensions of up to {full}."
        )
    return tuple(sorted({int(dim) for dim in choice}, reverse=True))


def find_form(loss: Loss | None) -> Form | None:
    """The rows that a loss of rerankers reads; ``None`` for a callable that tells only by what it returns.

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
    loss_class = target if isinstance(target, type) else type(target)
    for unfit, needed in _UNFIT.items():
        if issubclass(loss_class, unfit):
            raise ConfigError(
                f"{loss_class.__name__} needs {needed}, and relevance has one label for each pair. Leave loss out, or "
                "pass LambdaLoss or MultipleNegativesRankingLoss."
            )
    if issubclass(loss_class, _LISTWISE):
        return "lists"
    return "columns" if issubclass(loss_class, _CONTRASTIVE) else "pairs"


def check_negatives(form: Form | None, num_negatives: int) -> None:
    """Make sure that a loss of rerankers meets pairs that are not relevant.

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
        return reranking.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(max(1, num_negatives))))
    built = build_loss(loss, model)
    compares_raw_scores = isinstance(built, (*_LISTWISE, reranking.BinaryCrossEntropyLoss))
    if compares_raw_scores and isinstance(built.activation_fn, nn.Sigmoid):
        warnings.warn(
            f"{type(built).__name__} has a sigmoid in front of it. It compares raw scores: behind a sigmoid they "
            "differ by at most 1, and the ranking stops improving. Leave activation_fn out.",
            stacklevel=5,
        )
    return built
