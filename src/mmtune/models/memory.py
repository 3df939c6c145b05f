"""How much memory a training takes besides its activations, in bytes, and which type of weights fits a device."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmtune.models.adapters import has_adapters
from mmtune.models.checkpoints import CheckpointFiles, lay_out
from mmtune.models.kinds import HostModel
from mmtune.models.lora import LoraChoice, attach_adapters
from mmtune.models.parts import SYNONYMS, encoder_parts, part_names

logger = logging.getLogger(__name__)

SHARE_FOR_WEIGHTS = 0.75
"""What weights, gradients and optimizer may take of the memory that is free; the rest is for activations, for the
context of the device and for gaps between tensors."""

GIB = 1 << 30


@dataclass(frozen=True)
class Portion:
    """Weights that are alike.

    Attributes:
        count: How many numbers.
        dtype: Their type.
        is_trained: Whether they have gradients and a state of the optimizer.
    """

    count: int
    dtype: torch.dtype
    is_trained: bool


@dataclass(frozen=True)
class WeightCounts:
    """The weights of a checkpoint as they would be trained, before they are loaded.

    Attributes:
        trained: How many learn.
        frozen: How many stay as they are.
        adapters: How many adapters come beside them, which learn in float32.
    """

    trained: int
    frozen: int = 0
    adapters: int = 0

    def portions(self, dtype: torch.dtype) -> list[Portion]:
        """The weights in one type, the adapters in float32."""
        adapters = Portion(self.adapters, torch.float32, True)
        return [Portion(self.trained, dtype, True), Portion(self.frozen, dtype, False), adapters]


def training_bytes(
    portions: Iterable[Portion], *, autocast: bool, compensated: bool = False, processes: int = 1
) -> int:
    """Bytes of weights, gradients and the state of AdamW; activations come on top.

    A trained weight is there four times: itself, its gradient and two moments. Compensated AdamW keeps for one in half
    precision what was rounded away; autocast keeps a copy of one in float32, in half precision, from the forward pass
    to the backward pass; several processes keep the gradients that they exchange.

    Args:
        portions: All weights of the model.
        autocast: Whether the training computes in half precision.
        compensated: Whether the optimizer is compensated AdamW.
        processes: That train one model together, each with all of it.
    """
    portions = list(portions)
    total = optimizer_bytes(portions, compensated=compensated)
    for portion in portions:
        size = portion.dtype.itemsize
        gradients = (1 + (processes > 1)) * size + (2 if autocast and size == 4 else 0)
        total += portion.count * (size + (gradients if portion.is_trained else 0))
    return total


def optimizer_bytes(portions: Iterable[Portion], *, compensated: bool) -> int:
    """Bytes of the state of AdamW; see ``training_bytes``."""
    trained = [(portion.count, portion.dtype.itemsize) for portion in portions if portion.is_trained]
    return sum(count * size * (2 + (compensated and size == 2)) for count, size in trained)


def portions_of(model: nn.Module) -> list[Portion]:
    """The weights of a model as it is."""
    return [Portion(weight.numel(), weight.dtype, weight.requires_grad) for weight in model.parameters()]


def count_weights(
    files: CheckpointFiles, model_class: type[HostModel], *, freeze: Sequence[str] = (), lora: LoraChoice = None
) -> WeightCounts | None:
    """The weights of a checkpoint with one encoder, from its small files alone.

    Args:
        files: The checkpoint.
        model_class: What it is loaded as.
        freeze: Parts that stay as they are; those behind the encoder, which are small, are not looked for.
        lora: As in ``check_lora``.

    Returns:
        Their numbers; ``None`` for an encoder whose layers only show once it is loaded.
    """
    try:
        encoder = lay_out(files, model_class)
        parts = encoder_parts(encoder)
        names = [name if name in parts else SYNONYMS.get(name, name) for name in part_names(freeze)]
        frozen = {id(weight) for name in names for weight in parts.get(name, ())}
        if lora:
            attach_adapters([encoder], lora, frozen, seed=0)
    except Exception as error:  # code that comes with a checkpoint fails without weights in every way
        logger.info("The weights of %r can't be counted before they are loaded: %s", files.name, error)
        return None
    weights = list(encoder.parameters())
    total = sum(weight.numel() for weight in weights)
    learning = sum(weight.numel() for weight in weights if weight.requires_grad and id(weight) not in frozen)
    if has_adapters(encoder):
        return WeightCounts(0, total - learning, learning)
    return WeightCounts(learning, total - learning)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class DtypeChoice:
    """A type for weights, and why.

    Attributes:
        dtype: The type.
        reason: As a sentence without its full stop.
        fits: Whether what was estimated fits.
    """

    dtype: torch.dtype
    reason: str
    fits: bool = True


def choose_dtype(
    counts: WeightCounts | None,
    available_bytes: int,
    *,
    saved: torch.dtype | None = None,
    compensated: bool = True,
    processes: int = 1,
) -> DtypeChoice:
    """The type in which a training that computes in bfloat16 holds its weights.

    Float32 where it fits, because no step is rounded away then. Weights beside adapters make no steps: they stay in
    bfloat16 if that is how they were saved.

    Args:
        counts: The weights as they would be trained; ``None`` where they are not known.
        available_bytes: The memory of the device that is free.
        saved: The type of the checkpoint; ``None`` where it is not known.
        compensated: Whether bfloat16 weights would be trained by compensated AdamW, as the recipe does.
        processes: That train one model together.
    """
    if counts is None:
        return DtypeChoice(torch.bfloat16, "the memory that float32 takes can't be estimated for this checkpoint")
    if not counts.trained and saved == torch.bfloat16:
        return DtypeChoice(torch.bfloat16, "the weights beside the adapters stay as they were saved")
    options = {"compensated": compensated, "processes": processes}
    needed, less = (
        training_bytes(counts.portions(dtype), autocast=True, **options) for dtype in (torch.float32, torch.bfloat16)
    )
    usable = int(SHARE_FOR_WEIGHTS * available_bytes)
    bound = f"{usable / GIB:.1f} GiB, which is {SHARE_FOR_WEIGHTS:.0%} of the memory that is free"
    told = f"weights, gradients and optimizer take {needed / GIB:.1f} GiB in float32"
    if needed <= usable:
        return DtypeChoice(torch.float32, f"{told}, within {bound}")
    told = f"{told} and {less / GIB:.1f} GiB in bfloat16, with {bound}"
    return DtypeChoice(torch.bfloat16, told, fits=less <= usable)
