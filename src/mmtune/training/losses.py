"""The loss of one call: the caller's or the recipe's, its dimensions, and the rows that it reads."""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from sentence_transformers.cross_encoder import losses as reranking
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import SimilarityFunction
from torch import nn

from mmtune.errors import ConfigError, MmtuneError
from mmtune.evaluation.base import Retriever
from mmtune.models.kinds import HostModel
from mmtune.training.inputs import Form
from mmtune.training.mini_batches import MiniBatches
from mmtune.training.trainers import Kind, is_for_rerankers

Loss: TypeAlias = nn.Module | Callable[[Any], nn.Module]
"""A host loss, built or as a callable that takes the model."""

MATRYOSHKA_DIMS = (2048, 1536, 1024, 512, 256, 128, 64)

_LISTWISE = (reranking.LambdaLoss, reranking.ListNetLoss, reranking.PListMLELoss, reranking.ADRMSELoss)
_CONTRASTIVE = (reranking.MultipleNegativesRankingLoss,)
_UNFIT = {
    reranking.CrossEntropyLoss: "a model with a score for each of several classes",
    reranking.MarginMSELoss: "scores of a teacher",
}


def check_loss(loss: Any, kind: Kind) -> None:
    """Make sure that ``loss`` can be one, from its type and its signature: it is not built yet.

    Args:
        loss: As the two calls take it; ``None`` for that of the recipe.
        kind: The kind of model that it is to train.

    Raises:
        ConfigError: It is neither a loss nor a callable that takes the model, an empty mapping, or a loss of rerankers
            for another model, or the other way round.
    """
    if isinstance(loss, Mapping) and loss:
        for part in loss.values():
            check_loss(part, kind)
        return
    if loss is None:
        return
    known = f"{kind.model_class.__module__.rpartition('.')[0]}.losses"
    target: Any = loss.func if isinstance(loss, functools.partial) else loss
    is_loss = issubclass(target, nn.Module) if isinstance(target, type) else isinstance(target, nn.Module)
    if not (is_loss or (callable(target) and not isinstance(target, (type, Mapping)))):
        raise ConfigError(
            f"loss={loss!r} is no loss. Pass one of {known}, built, as a class or as a callable that takes the model, "
            "e.g. loss=lambda model: MyLoss(model), or leave it out."
        )
    if is_loss and is_for_rerankers(target) not in (None, is_for_rerankers(kind.model_class)):
        name = getattr(target, "__name__", type(target).__name__)
        same = f", which has a {name} too" if hasattr(importlib.import_module(known), name) else ""
        raise ConfigError(
            f"loss={name} of {target.__module__} can't train a {kind.model_class.__name__}. Import one from "
            f"{known}{same}, or leave it out."
        )
    if isinstance(loss, nn.Module):
        return
    try:
        inspect.signature(loss).bind(object())
    except TypeError as error:
        raise ConfigError(
            f"loss={loss!r} can't be called with the model alone: {error}. Expected a callable that takes the model "
            "and gives a loss, e.g. loss=lambda model: MyLoss(model, scale=20)."
        ) from error
    except ValueError:  # a built-in without a signature
        return


def build_loss(loss: Loss, model: HostModel) -> nn.Module:
    """The caller's loss, built for the model.

    Raises:
        ConfigError: It can't be built for this model, is none, or trains another model.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        built = loss if isinstance(loss, nn.Module) else loss(model)
    except MmtuneError:
        raise
    except Exception as error:  # losses refuse a model in every way
        raise ConfigError(
            f"The loss {name} can't be built for this {type(model).__name__}: {type(error).__name__}: {error} Pass a "
            "loss of this kind of model."
        ) from error
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"The callable {name} gave {built!r} in place of a loss. Expected a torch.nn.Module. "
            "Return it from the callable."
        )
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
    mini_batches: MiniBatches,
) -> nn.Module:
    """The recipe's loss of models that find pages: in-batch negatives at every dimension.

    Gradients are cached (Gao et al., 2021), so that memory grows with the mini-batch alone, unless the whole batch fits
    at once. Each of the dimensions is trained (Kusupati et al., 2022), where there are any.

    Raises:
        ConfigError: See ``choose_dims``.
    """
    similarity = _trained_similarity(model)
    # MatryoshkaLoss brings each size to length 1, so that it could only learn cosines (sentence-transformers 6.2)
    dims = () if similarity and matryoshka_dims == "auto" else choose_dims(matryoshka_dims, model)
    if dims and similarity:
        warnings.warn(
            f"matryoshka_dims={list(dims)} trains with cosine similarity, and the model compares by "
            f"{model.similarity_fn_name}: MatryoshkaLoss brings embeddings to length 1. Leave matryoshka_dims out to "
            f"train with {model.similarity_fn_name}, or set model.similarity_fn_name = 'cosine'.",
            stacklevel=5,
        )
        similarity = {}
    if isinstance(model, SentenceTransformer) and has_static_embedding_input(model):
        # its texts lie end to end, and the host can't cut them into mini-batches (sentence-transformers 6.2)
        loss: nn.Module = MultipleNegativesRankingLoss(model, **similarity)
    else:
        assert kind.cached_loss is not None
        assert kind.plain_loss is not None
        cached = {"mini_batch_size": mini_batches.size} if mini_batches.is_cached else {}
        loss = (kind.cached_loss if mini_batches.is_cached else kind.plain_loss)(model, **cached, **similarity)
    if not dims or isinstance(model, MultiVectorEncoder):
        return loss
    return MatryoshkaLoss(model, loss, matryoshka_dims=list(dims))


def _trained_similarity(model: Retriever) -> dict[str, Any]:
    """What an in-batch loss takes to compare as the model does; nothing for cosines, which it takes by itself.

    A cosine is multiplied by 20 to reach the range of logits; a dot product has it already (the host's docs).
    """
    name = model.similarity_fn_name
    if not isinstance(model, SentenceTransformer) or name == SimilarityFunction.COSINE.value:
        return {}
    if name == SimilarityFunction.DOT_PRODUCT.value and any(
        isinstance(module, Normalize) for module in model.modules()
    ):
        return {}  # of length 1, dot products are cosines
    return {"similarity_fct": SimilarityFunction.to_similarity_fn(name), "scale": 1.0}


def use_full_size(model: HostModel) -> None:
    """Let a model that cuts its embeddings give all of them again; this changes the model.

    Training and measuring would else know the cut size only, and call it full.

    Warns:
        UserWarning: It did cut them; how to do so again.
    """
    if not isinstance(model, SentenceTransformer) or model.truncate_dim is None:
        return
    size, model.truncate_dim = model.truncate_dim, None
    warnings.warn(
        f"The model cut its embeddings to truncate_dim={size}, and gives all {model.get_embedding_dimension()} "
        "dimensions from now on, so that each size is trained and measured. To cut them again, load the result with "
        f"SentenceTransformer(path, truncate_dim={size}).",
        stacklevel=5,
    )


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
            f"loss={loss!r} is no loss. Pass one of sentence_transformers.cross_encoder.losses, e.g. LambdaLoss."
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
