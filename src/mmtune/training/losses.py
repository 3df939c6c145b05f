"""The loss of one call: the caller's or the recipe's, its dimensions and its mini-batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from mmtune.errors import ConfigError
from mmtune.evaluation.corpus import Retriever
from mmtune.models.kinds import HostModel
from mmtune.training.kinds import Kind

Loss: TypeAlias = torch.nn.Module | Callable[[Any], torch.nn.Module]
"""A host loss, built or as a callable that takes the model."""

MATRYOSHKA_DIMS = (2048, 1536, 1024, 512, 256, 128, 64)


def loss_for_model(
    loss: Loss | Mapping[str, Loss] | None,
    model: Retriever,
    kind: Kind[Retriever],
    dims: Sequence[int],
    mini_batch: Literal["auto"] | int,
    batch: int,
) -> torch.nn.Module | dict[str, torch.nn.Module]:
    """The caller's loss, built, or that of the recipe.

    The recipe's is cached in-batch negatives (Gao et al., 2021), at each of ``dims`` (Kusupati et al., 2022) where
    there are any.

    Raises:
        ConfigError: The caller's loss trains another model.
    """
    if loss is None:
        own = _in_batch_loss(model, kind, mini_batch_size(mini_batch, model, batch))
        if not dims or isinstance(model, MultiVectorEncoder):
            return own
        return MatryoshkaLoss(model, own, matryoshka_dims=list(dims))
    if isinstance(loss, Mapping):
        return {name: built(part, model) for name, part in loss.items()}
    return built(loss, model)


def _in_batch_loss(model: Retriever, kind: Kind[Retriever], mini_batch_size: int) -> torch.nn.Module:
    if isinstance(model, SentenceTransformer) and has_static_embedding_input(model):
        # its texts lie end to end, and the host can't cut them into mini-batches (sentence-transformers 6.2)
        return MultipleNegativesRankingLoss(model)
    assert kind.cached_loss is not None
    return kind.cached_loss(model, mini_batch_size=mini_batch_size)


def built(loss: Loss, model: HostModel) -> torch.nn.Module:
    """The caller's loss, built for the model.

    Raises:
        ConfigError: It trains another model.
    """
    made = loss if isinstance(loss, torch.nn.Module) else loss(model)
    if getattr(made, "model", model) is not model:
        raise ConfigError(
            f"The loss {type(made).__name__} was built for another model than the one to train. Pass that "
            "model, or pass the loss as a callable, e.g. loss=lambda model: MyLoss(model)."
        )
    return made


def trained_dims(choice: Literal["auto"] | Sequence[int] | None, model: Retriever) -> tuple[int, ...]:
    """The dimensions that the recipe's loss trains, largest first; empty for the full size only.

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


def evaluated_dims(choice: Literal["auto"] | Sequence[int] | None, model: Retriever, loss: object) -> tuple[int, ...]:
    """The dimensions to score: those that the caller names, else those that the loss trains."""
    if choice == "auto":
        choice = getattr(loss, "matryoshka_dims", None)
    return trained_dims(choice, model)


def mini_batch_size(choice: Literal["auto"] | int, model: Retriever, batch_size: int) -> int:
    """Documents in one forward pass of the cached loss: by the size of the model, at most a batch."""
    if choice != "auto":
        return choice
    parameters = sum(parameter.numel() for parameter in model.parameters())
    fitting = 1 if parameters > 1_000_000_000 else 8 if parameters > 150_000_000 else 32
    return min(fitting, batch_size)
