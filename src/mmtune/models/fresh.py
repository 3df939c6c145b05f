"""Layers that start from random numbers, beside encoders that were trained before: they learn at a larger rate."""

from torch import nn

from mmtune.models.kinds import HostModel

_MARK = "starts_fresh"


def mark_fresh(layer: nn.Module, *, fresh: bool = True) -> None:
    """Note that a layer starts from random numbers, or that it has been trained. The mark is not saved."""
    setattr(layer, _MARK, fresh)


def is_fresh(layer: nn.Module) -> bool:
    """Whether a layer is marked as fresh."""
    return getattr(layer, _MARK, False)


def fresh_layers(model: HostModel) -> dict[str, nn.Module]:
    """The fresh layers of a model by their names, as in ``model.named_modules()``."""
    return {name: layer for name, layer in model.named_modules() if is_fresh(layer)}
