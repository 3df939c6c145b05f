"""What half precision rounds away: steps of the training, and differences between the scores of a reranker.

In bfloat16 a weight of 0.02 has its neighbours 1.2e-4 away, and AdamW moves a weight by about the learning rate: a
smaller step is lost. A score of 8 to 16 has a step of 1/16, so that many candidates of a query tie, and their order is
that of their ids. The features of a pair differ all the same: only the last product needs to be exact.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from mmtune.host import without_autocast

HALF_TYPES = (torch.float16, torch.bfloat16)

_MARK = "scores_in_float32"
_SAMPLED_WEIGHTS = 4096

# Steps of the training


def share_lost(weights: Iterable[tuple[torch.Tensor, float]]) -> float:
    """The share of weights that a step leaves as they are, since their nearest neighbours lie more than two steps away.

    Args:
        weights: Weights, each with the length of its step. Of large ones a few thousand numbers are looked at.

    Returns:
        0 to 1; 0 where there are no weights.
    """
    lost = total = 0.0
    for weight, step in weights:
        values = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED_WEIGHTS)]
        info = torch.finfo(weight.dtype)
        _, exponents = torch.frexp(values.double())
        spacing = (info.eps * 2.0 ** (exponents - 1)).clamp(min=info.smallest_normal * info.eps)
        spacing[values == 0] = 0
        lost += weight.numel() * (step < spacing / 2).double().mean().item()
        total += weight.numel()
    return lost / total if total else 0.0


# What is saved


@contextmanager
def as_saved(model: nn.Module, dtype_by_id: Mapping[int, torch.dtype]) -> Iterator[None]:
    """The model as it will be saved and used, for as long as the block runs; then exactly as it was.

    Its parameters are replaced, not converted: processes that train together watch the ones that they began with.

    Args:
        model: Any module, also one that accelerate has prepared.
        dtype_by_id: The type of each parameter as it will be saved, by ``id``; one that is missing keeps its own.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if dtype_by_id.get(id(parameter), parameter.dtype) != parameter.dtype
    ]
    # tied weights stay tied
    converted = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype_by_id[id(parameter)]), parameter.requires_grad)
        for _, _, parameter in places
    }
    try:
        for module, name, parameter in places:
            setattr(module, name, converted[id(parameter)])
        with without_autocast(model):
            yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def convert_to_saved(model: nn.Module, dtype_by_id: Mapping[int, torch.dtype]) -> None:
    """Make a model what ``as_saved`` shows; in place."""
    for parameter in model.parameters():
        dtype = dtype_by_id.get(id(parameter), parameter.dtype)
        if dtype != parameter.dtype:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


# Scores


def score_in_float32(model: CrossEncoder) -> list[RemovableHandle]:
    """Let the layer that makes the score of a pair compute it in float32, also in training under autocast.

    The layer is the LM head, of which the two rows of the answers are computed anew, or the ``Dense`` head, or the
    classifier of a model for sequence classification. Weights keep their dtype, and nothing is saved with the model:
    loaded in the plain host, its scores are in the precision of its weights again. A score that is in float32 anyway
    stays as it is, bit for bit.

    Args:
        model: A reranker, changed in place. Layers that adapters or bitsandbytes have wrapped are left alone.

    Returns:
        What takes the change back by ``remove()``; empty where the model has it already.
    """
    handles: list[RemovableHandle] = []
    for layer, rows in _score_layers(model):
        if type(layer) is nn.Linear and not getattr(layer, _MARK, False):
            handles.append(layer.register_forward_pre_hook(_in_type_of_weights))
            handles.append(layer.register_forward_hook(InFloat32(rows)))
            setattr(layer, _MARK, True)
    return handles


def learn_score_in_float32(model: CrossEncoder) -> None:
    """Let the layer that makes the score keep its weights in float32, so that none of its steps is rounded away.

    An LM head that is tied to the input embeddings stays as it is: the layers behind these read its type.

    Args:
        model: A reranker that ``score_in_float32`` has seen, changed in place. Layers that are frozen, or wrapped by
            adapters, are left alone.
    """
    uses = [id(weight) for part in model.modules() for weight in part.parameters(recurse=False)]
    for layer, _ in _score_layers(model):
        weights = list(layer.parameters())
        if type(layer) is not nn.Linear or any(uses.count(id(weight)) > 1 for weight in weights):
            continue
        for weight in weights:
            if weight.requires_grad and weight.dtype in HALF_TYPES:
                weight.data = weight.data.float()


@contextmanager
def scoring_in_float32(model: CrossEncoder) -> Iterator[None]:
    """``score_in_float32`` for as long as the block runs."""
    handles = score_in_float32(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if handles:
            for layer, _ in _score_layers(model):
                setattr(layer, _MARK, False)


class InFloat32:
    """A forward hook of a linear layer: what it gives, or some rows of it, in float32.

    Attributes:
        rows: Outputs to compute anew; the others are only converted. ``None`` computes all.
    """

    def __init__(self, rows: Sequence[int] | None) -> None:
        self.rows = None if rows is None else list(rows)

    def __call__(self, layer: nn.Linear, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The outputs of the layer, in float32."""
        if output.dtype not in HALF_TYPES:
            return output
        rows = slice(None) if self.rows is None else self.rows
        with torch.autocast(output.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias[rows].float()
            exact = functional.linear(inputs[0].float(), layer.weight[rows].float(), bias)
        if self.rows is None:
            return exact
        return output.float().index_copy(-1, torch.tensor(self.rows, device=output.device), exact)


def _in_type_of_weights(layer: nn.Linear, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a linear layer reads, in the type of its weights where these are in float32."""
    if layer.weight.dtype != torch.float32 or inputs[0].dtype not in HALF_TYPES:
        return None
    return (inputs[0].float(), *inputs[1:])


def _score_layers(model: CrossEncoder) -> list[tuple[nn.Module, tuple[int, ...] | None]]:
    """The layers that make scores, and which of their outputs these are, ``None`` for all."""
    found: list[tuple[nn.Module, tuple[int, ...] | None]] = []
    for module in model.children():
        if isinstance(module, LogitScore) and isinstance(model[0], Transformer):
            head = model[0].model.get_output_embeddings()
            ids = [row for row in (module.true_token_id, module.false_token_id) if row is not None]
            if head is not None and ids:
                found.append((head, tuple(ids)))
        elif isinstance(module, Dense) and module.module_output_name == "scores":
            found.append((module.linear, None))
        elif isinstance(module, Transformer) and module.transformer_task == "sequence-classification":
            found += [(layer, None) for layer in module.model.children() if isinstance(layer, nn.Linear)]
    return found
