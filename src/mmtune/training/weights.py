"""The type of the weights in a run: what they are trained in, by which AdamW, and what they are saved in."""

import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from accelerate.utils import gather_object
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn

from mmtune.host import uncompiled
from mmtune.models.adapters import has_lora
from mmtune.models.kinds import HostModel
from mmtune.models.memory import choose_dtype, count_weights, free_bytes, portions_of, training_bytes
from mmtune.models.opening import DTYPES, open_checkpoint
from mmtune.models.precision import HALF_TYPES, share_lost
from mmtune.training.call import Finetuning
from mmtune.training.trainers import PageTrainer

logger = logging.getLogger(__name__)

COMPENSATED = "stable_adamw"
"""The host's name for an optimizer of torch-optimi, which keeps what half precision rounds away (Kahan summation)."""

COMPENSATED_ARGUMENTS: Mapping[str, Any] = {"optim": COMPENSATED, "adam_beta2": 0.99}
"""Its moments are in the type of the weights. With the usual 0.999 a second moment in bfloat16 never falls again, since
a thousandth is less than half a step: after 16,000 steps weights had moved 0.7 times as far as in float32, and 1.01
times with 0.99, torch-optimi's own default."""

SavedTypes: TypeAlias = Mapping[int, torch.dtype]
"""The type of each weight as it will be saved, by its ``id``."""

_FALLS_TO_ZERO = ("linear", "cosine", "cosine_with_restarts", "polynomial")
_LEAST_TO_TELL = 0.01


@dataclass(frozen=True)
class WeightsChoice:
    """The type of the weights in a run.

    Attributes:
        dtype: That they are loaded in, or have in the model that was given.
        reason: Why, as a sentence without its full stop.
        saved: The type of the checkpoint, for ``final/``; ``None`` where it is not known, or a model was given.
    """

    dtype: torch.dtype
    reason: str
    saved: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The type in words, e.g. ``"bfloat16"``."""
        return name_of(self.dtype)


def name_of(dtype: torch.dtype) -> str:
    """A type in words, e.g. ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def choose_weights(call: Finetuning, args: BaseTrainingArguments, began_in: str | None) -> WeightsChoice:
    """The type of the weights for a call, before they are loaded; the same in all processes.

    Args:
        call: The call; a model that is given keeps the type that it has.
        args: The host's arguments.
        began_in: The type by name that the run began with, where it goes on.
    """
    if not isinstance(call.model, (str, os.PathLike)):
        dtype = call.model.dtype or torch.float32
        return WeightsChoice(dtype, "the model was given with weights of this type")
    files = open_checkpoint(os.fspath(call.model))
    if began_in is not None:
        return WeightsChoice(DTYPES[began_in], "the run began with it", files.dtype)
    computes_in_half = args.bf16 and args.device.type == "cuda"
    if not computes_in_half:
        return WeightsChoice(torch.float32, "no CUDA device computes the training in bfloat16", files.dtype)
    if files.has_router:
        return WeightsChoice(torch.float32, "Sentence Transformers can't load a Router in half precision again")
    if is_sharded(args):
        return WeightsChoice(torch.bfloat16, "FSDP and DeepSpeed keep weights in float32 themselves")
    choice = choose_dtype(
        count_weights(files, call.kind.model_class, freeze=call.freeze, lora=call.lora),
        min(gather_object([free_bytes(args.device)])),
        saved=files.dtype,
        compensated=call.args is None and "optim" not in call.training_arguments,
        processes=args.world_size,
    )
    if not choice.fits:
        logger.warning("The training will probably not fit: %s. lora=True or freeze takes less.", choice.reason)
    return WeightsChoice(choice.dtype, choice.reason, files.dtype)


def is_sharded(args: BaseTrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed split the weights among the processes, and hold them in types of their own."""
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp) or bool(args.deepspeed) or any(launched)


def saved_types(model: HostModel, saved: torch.dtype | None) -> SavedTypes:
    """The type of each weight in ``final/``: that of the checkpoint; beside adapters, and as these, each its own.

    Args:
        model: As it was loaded or given, with its adapters.
        saved: The type of the checkpoint; ``None`` leaves each weight in its own.
    """
    saved = None if has_lora(model) else saved
    return {
        id(weight): saved if saved is not None and weight.is_floating_point() else weight.dtype
        for weight in model.parameters()
    }


def optimizer_for(model: nn.Module, args: BaseTrainingArguments) -> dict[str, Any]:
    """The host's arguments for AdamW by which this model loses no steps, where the usual ones would."""
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    return dict(COMPENSATED_ARGUMENTS) if torch.bfloat16 in trained and not is_sharded(args) else {}


def describe_weights(trainer: PageTrainer, choice: WeightsChoice) -> dict[str, Any]:
    """What was chosen for the weights, for ``settings``: types, optimizer and the memory that these take."""
    model, args = uncompiled(trainer.model), trainer.args
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = optimizer_name(args)
    estimate = training_bytes(
        portions_of(model),
        autocast=args.bf16 or args.fp16,
        compensated=optimizer == COMPENSATED,
        processes=args.world_size,
    )
    return {
        "weights": _names(weight.dtype for weight in trained),
        "weights_reason": choice.reason,
        "weights_saved_in": _names(trainer.saved_types.get(id(weight), weight.dtype) for weight in trained),
        "optimizer": "optimi.AdamW, compensated" if trainer.compensates else optimizer,
        "bytes_of_weights_gradients_optimizer": estimate,
    }


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({name_of(dtype) for dtype in dtypes}))


def optimizer_name(args: BaseTrainingArguments) -> str:
    """The optimizer by the name that the host gives it."""
    return str(getattr(args.optim, "value", args.optim))


def warn_of_rounding(model: nn.Module, args: BaseTrainingArguments) -> None:
    """Warn where steps are lost in the rounding of the weights.

    Warns:
        UserWarning: Weights in half precision are trained by an optimizer that moves them by about the learning rate
            and keeps nothing of what is rounded away, or with a weight decay that is.
    """
    half = {
        name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype in HALF_TYPES
    }
    if not half or is_sharded(args):
        return
    dtype, optimizer = next(iter(half.values())).dtype, optimizer_name(args)
    kept = "pass a model that was loaded with dtype='float32' (a GPU computes in bfloat16 all the same)"
    if 0 < args.learning_rate * args.weight_decay < torch.finfo(dtype).eps / 4:
        warnings.warn(
            f"The weights are in {name_of(dtype)}, and weight_decay={args.weight_decay:g} at learning_rate="
            f"{args.learning_rate:g} is rounded away at every step. Leave it out, or {kept}.",
            stacklevel=5,
        )
    if optimizer == COMPENSATED or not re.search("adam|lion", optimizer):
        return
    on_average = 0.5 if getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type) in _FALLS_TO_ZERO else 1.0
    share = share_lost((weight, on_average * _rate_of(name, args)) for name, weight in half.items())
    if share >= _LEAST_TO_TELL:
        compensated = f"leave optim out, or set optim={COMPENSATED!r}, which keeps what is rounded away; "
        warnings.warn(
            f"The weights are in {name_of(dtype)}, and optim={optimizer!r} loses about {share:.0%} of its steps in "
            f"their rounding (learning_rate={args.learning_rate:g}, {on_average * args.learning_rate:g} on average). "
            f"To keep them, {compensated if dtype == torch.bfloat16 else ''}{kept}; or train adapters with lora=True.",
            stacklevel=5,
        )


def _rate_of(name: str, args: BaseTrainingArguments) -> float:
    """The learning rate of a weight; the host looks for the patterns in the names that the loss gives."""
    mapping: Any = args.learning_rate_mapping  # the host has parsed a text
    found = [rate for pattern, rate in mapping.items() if re.search(pattern, f"model.{name}")]
    return found[-1] if found else args.learning_rate
