"""The scores of rerankers in float32, where their weights are in half precision.

In bfloat16 a score of 8 to 16 has a step of 1/16, so that many candidates of a query tie, and their order is that of
their ids. The features of a pair differ all the same: only the last product needs to be exact.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

HALF_TYPES = (torch.float16, torch.bfloat16)

_MARK = "scores_in_float32"


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
    handles = []
    for layer, rows in _score_layers(model):
        if type(layer) is nn.Linear and not getattr(layer, _MARK, False):
            handles.append(layer.register_forward_hook(InFloat32(rows)))
            setattr(layer, _MARK, True)
    return handles


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
