"""Layers that start from random numbers, beside encoders that were trained before: they learn at a larger rate.

What draws a layer in this process marks it. ``guess_fresh_layers`` is for the models where nobody did.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Router
from torch import nn

from mmtune.arguments import require_seed
from mmtune.models.kinds import HostModel

TOKENS = "token_embeddings"
"""Where the host's modules pass on a vector a token."""

ENOUGH_TO_EXPECT = 20
"""How many numbers of a fresh layer lie, on average, in the outermost strip that must not be empty."""

ENOUGH_TO_TELL = 20 * ENOUGH_TO_EXPECT
"""Weights of the smallest layer that is judged: a few numbers look even by chance."""

_MARK = "weights_as_drawn"

logger = logging.getLogger(__name__)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws numbers on the CPU from the seed alone, and leaves the caller's random state as it was.

    Raises:
        ConfigError: The seed is no whole number from 0 to 2**32 - 1.
    """
    seed = require_seed("seed", seed)
    # torch.manual_seed would also seed, and start, every accelerator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mark_fresh(layer: nn.Module, *, fresh: bool = True) -> None:
    """Note that a layer has just been drawn, or that it is so no more. The mark is not saved."""
    setattr(layer, _MARK, [weight.detach().clone() for weight in layer.parameters()] if fresh else [])


def is_fresh(layer: nn.Module) -> bool:
    """Whether a layer is marked as fresh."""
    return bool(getattr(layer, _MARK, []))


def fresh_layers(model: HostModel) -> dict[str, nn.Module]:
    """The fresh layers of a model by their names, as in ``model.named_modules()``."""
    return {name: layer for name, layer in model.named_modules() if is_fresh(layer)}


def guess_fresh_layers(model: HostModel) -> tuple[str, ...]:
    """Mark the layers that nobody has marked and that look as they were drawn; the one place that guesses.

    The host adds a random projection to a bare backbone and keeps no note of it, whoever puts a ``Dense`` behind an
    encoder keeps none, and none of a Router's projection is saved. So the numbers are all there is: a fresh ``Dense``
    is even, as torch draws it, or, in a Router, orthogonal with a bias of zero, as ``compose_router`` starts it. A few
    steps of training leave neither. The marks of layers that other means have trained since, such as the host's
    trainer, are removed. The score head of a reranker is none of these.

    Args:
        model: Any host model; its weights stay as they are.

    Returns:
        The names of the layers that were guessed to be fresh, which are logged. What was marked before is not in it.
    """
    in_routers = {id(layer) for router in model.modules() if isinstance(router, Router) for layer in router.modules()}
    guessed = []
    for name, layer in model.named_modules():
        for drawn, now in zip(getattr(layer, _MARK, []), layer.parameters(), strict=False):
            if not torch.equal(drawn.to(now), now):
                mark_fresh(layer, fresh=False)
        if isinstance(layer, Dense) and not is_fresh(layer):
            even = not isinstance(model, CrossEncoder) and is_even(layer.linear)
            if even or (id(layer) in in_routers and _is_orthogonal(layer.linear)):
                mark_fresh(layer)
                guessed.append(name)
                reason = "even, as torch draws them" if even else "orthogonal, with a bias of zero"
                logger.warning("The layer %r is taken for fresh: its weights are %s.", name, reason)
    return tuple(guessed)


def is_even(layer: nn.Linear) -> bool:
    """Whether the weights of a layer are as torch draws them: even between plus and minus ``1 / sqrt(in_features)``.

    Training takes some weights across that edge within a few steps, and in the end leaves nothing even.
    """
    weights = layer.weight.detach().flatten()
    edge, count = layer.in_features**-0.5, len(weights)
    if count < ENOUGH_TO_TELL:
        return False
    # rounded as the weights are: in half precision, those at the edge may lie beyond it
    strip = torch.tensor([edge * (1 - ENOUGH_TO_EXPECT / count), edge * (1 + 1e-6)]).to(weights.dtype).tolist()
    largest = weights.abs().max().item()
    variance = weights.double().square().mean().item()
    # the mean square of n even draws varies by sqrt(0.8 / n) of itself
    return strip[0] <= largest <= strip[1] and abs(3 * variance / edge**2 - 1) < 6 * math.sqrt(0.8 / count)


def _is_orthogonal(layer: nn.Linear) -> bool:
    if layer.bias is None or bool(layer.bias.any()):
        return False
    weight = layer.weight.detach().double()
    products = weight @ weight.T if layer.out_features <= layer.in_features else weight.T @ weight
    return torch.allclose(products, torch.eye(len(products), dtype=products.dtype, device=products.device), atol=1e-4)
