"""What can be known to fail before weights load, or before hours of training."""

import dataclasses
import difflib
import numbers
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn

from mmtune.data.relevance import Direction
from mmtune.errors import ConfigError
from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.kinds import Kind

_HALF = (torch.bfloat16, torch.float16)
_RATE_FOR_HALF_PRECISION = 1e-5


def check_arguments(
    kind: Kind[Any],
    args: BaseTrainingArguments | None,
    given: Mapping[str, Any],
    *,
    loss: object,
    matryoshka_dims: Literal["auto"] | Sequence[int] | None = "auto",
    mini_batch_size: Literal["auto"] | int = "auto",
) -> None:
    """Make sure of the arguments of the call, as far as they show without data and model.

    Args:
        kind: The kind of model.
        args: The host's arguments, if given.
        given: Training arguments by name.
        loss: As ``finetune`` takes it.
        matryoshka_dims: As ``finetune`` takes it.
        mini_batch_size: As ``finetune`` takes it.

    Raises:
        ConfigError: A name is no training argument of the host, two arguments exclude each other, or a value can't be.
    """
    _check_names(kind.arguments_class, given)
    if args is not None and not isinstance(args, kind.arguments_class):
        raise ConfigError(f"args is a {type(args).__name__}, expected {kind.arguments_class.__name__}.")
    if args is not None and given:
        name, value = next(iter(given.items()))
        raise ConfigError(f"args and {name}={value!r} were both given. Set it in args, or leave args out.")
    _check_matryoshka_dims(matryoshka_dims)
    if not kind.truncates and matryoshka_dims not in (None, "auto"):
        raise ConfigError(
            f"matryoshka_dims={matryoshka_dims!r}: late interaction has one vector a token, of one size "
            "(sentence-transformers 6.2). Leave matryoshka_dims out; build_late_interaction takes the dimension."
        )
    if mini_batch_size != "auto":
        _require_positive("mini_batch_size", mini_batch_size, or_else="'auto'")
        if loss is not None:
            warnings.warn("mini_batch_size is not used: the loss that was given has its own.", stacklevel=3)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        _require_positive(name, given.get(name, 1))


def check_host_arguments(
    args: BaseTrainingArguments,
    prompts: dict[str, str] | str | None,
    columns: Sequence[str] | None,
    *,
    evaluates: bool,
    in_batch_negatives: bool = True,
) -> None:
    """Make sure that the host's arguments go with the data, before hours of training end in an error.

    Args:
        args: The host's arguments.
        prompts: As ``finetune`` takes it.
        columns: The columns of the rows, which prompts are for; ``None`` where they are for something else.
        evaluates: Whether there is an evaluation set.
        in_batch_negatives: Whether the loss takes documents of other rows as negatives.

    Raises:
        ConfigError: Evaluation without an evaluation set, prompts for columns that are not there, or a batch sampler
            that can't be saved with a checkpoint.
    """
    if args.eval_strategy != "no" and not evaluates:
        raise ConfigError(f"eval_strategy={str(args.eval_strategy)!r} needs an evaluation set. Pass eval_dataset.")
    if columns is not None:
        _check_prompts(args.prompts or prompts, columns)
    if args.prompts and prompts not in ("model", None, args.prompts):
        warnings.warn(f"prompts={prompts!r} is not used: args.prompts is {args.prompts!r}.", stacklevel=3)
    try:
        pickle.dumps(args.batch_sampler)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"args.batch_sampler={args.batch_sampler!r} can't be pickled, and every checkpoint stores it. Pass a class "
            "or a function of a module, such as ConflictFreeBatchSampler."
        ) from error
    if in_batch_negatives and not is_conflict_free(args):
        warnings.warn(
            f"The batch sampler is {args.batch_sampler!r}, which may put documents that are relevant to a query among "
            "its in-batch negatives. Pass batch_sampler=ConflictFreeBatchSampler to rule that out.",
            stacklevel=3,
        )


def check_contrast(batch_size: int, num_negatives: int) -> None:
    """Make sure that the recipe's loss has something to tell the relevant page from.

    Raises:
        ConfigError: A batch is one row, and rows have no negatives: the loss is zero whatever the model does.
    """
    if batch_size == 1 and num_negatives == 0:
        raise ConfigError(
            "Nothing can be learned: batches hold one row, and rows have no negatives, so the loss is always zero. Add "
            "queries, add negatives with num_negatives=1 or more, or raise per_device_train_batch_size."
        )


def check_metric(args: BaseTrainingArguments, metrics: Mapping[str, float]) -> None:
    """Make sure that the metric that chooses the checkpoint exists.

    Raises:
        ConfigError: The evaluators give no such metric; the message lists some that they give.
    """
    if not metrics or not args.load_best_model_at_end:
        return
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in metrics:
        known = [key for key in metrics if "ndcg" in key]
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model!r} is none of the metrics, which are {known} and "
            f"{len(metrics) - len(known)} more. Name one of them."
        )


def is_conflict_free(args: BaseTrainingArguments) -> bool:
    """Whether the batches keep what is relevant to a query from its in-batch negatives."""
    return isinstance(args.batch_sampler, type) and issubclass(args.batch_sampler, ConflictFreeBatchSampler)


def _check_names(arguments_class: type[BaseTrainingArguments], given: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(arguments_class) if field.init]
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{name!r} is neither an argument of this function nor a training argument of the host. "
                f"Did you mean {nearest!r}?"
            )
    if given.get("resume_from_checkpoint") is not None:
        raise ConfigError("resume_from_checkpoint is for the host's trainer. Pass resume=True.")


def _check_matryoshka_dims(choice: Literal["auto"] | Sequence[int] | None) -> None:
    """Make sure that the choice can be a list of dimensions, as far as that shows without the model.

    Raises:
        ConfigError: The choice is neither ``"auto"``, ``None`` nor positive dimensions.
    """
    if choice is None or choice == "auto":
        return
    if isinstance(choice, (str, int)) or not len(choice) or not all(_is_dimension(dim) for dim in choice):
        raise ConfigError(
            f"matryoshka_dims={choice!r}: expected 'auto', None, or positive dimensions such as [512, 64]."
        )


def _is_dimension(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def _require_positive(name: str, value: object, *, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        expected = " or ".join(filter(None, (or_else, "a positive whole number")))
        raise ConfigError(f"{name}={value!r}: expected {expected}.")


def _check_prompts(prompts: object, columns: Sequence[str]) -> None:
    if prompts is None or isinstance(prompts, str):
        return
    if not isinstance(prompts, dict):
        raise ConfigError(f"prompts={prompts!r}: expected 'model', a text, a mapping of columns to texts, or None.")
    unknown = [name for name, value in prompts.items() if name not in columns and not isinstance(value, dict)]
    if unknown:
        raise ConfigError(f"prompts has a text for {unknown[0]!r}, and the rows have the columns {list(columns)}.")


def check_reranking_prompts(prompts: object, names: Sequence[str]) -> None:
    """Make sure that every prompt is one that the host applies: it reads a pair under one prompt, by training set.

    Args:
        prompts: Of the host's training arguments.
        names: The names of the training sets; a single one has the name ``""``.

    Raises:
        ConfigError: A prompt is no text, or is for something that is no training set.
    """
    if prompts is None or isinstance(prompts, str):
        return
    named = [name for name in names if name]
    expected = f"a text, or a mapping of the training sets {named} to texts" if named else "a text"
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ConfigError(f"prompts={prompts!r}: expected {expected}.")
    unknown = [name for name in prompts if name not in named]
    if unknown:
        raise ConfigError(f"prompts has a text for {unknown[0]!r}, which is no training set. Expected {expected}.")


def check_resumed(checkpoint: Path | None, *, has_adapters: bool) -> None:
    """Make sure that a run goes on with adapters if it began with some, before anything is measured.

    Raises:
        ConfigError: The checkpoint has adapters and the model has none, or the other way round.
    """
    if checkpoint is None or has_adapters == any(checkpoint.rglob("adapter_model.safetensors")):
        return
    found, remedy = ("none", "Leave lora out") if has_adapters else ("some", "Pass the lora of that run")
    raise ConfigError(
        f"The model {'has' if has_adapters else 'has no'} adapters, and {str(checkpoint)!r} has {found}. {remedy}, or "
        "start anew with overwrite=True."
    )


def warn_of_rounding(model: nn.Module, learning_rate: float) -> None:
    """Warn where most steps would be lost in the rounding of the weights.

    AdamW moves a weight by about the learning rate. A bfloat16 of 0.02 has its neighbours 1.2e-4 away: in a run of
    three steps at 5e-6, 4.5% of a small reranker's weights changed, and 64% in float32.

    Warns:
        UserWarning: Weights that are trained are in half precision, and the rate is below 1e-5.
    """
    half = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype in _HALF]
    if half and learning_rate < _RATE_FOR_HALF_PRECISION:
        warnings.warn(
            f"The weights are in {str(half[0].dtype).removeprefix('torch.')} and learning_rate={learning_rate:g}: most "
            'steps are lost in rounding. Pass a model that was loaded with dtype="float32" (training computes in '
            "bfloat16 on a GPU all the same), lora=True, or a larger rate.",
            stacklevel=3,
        )


def check_directions(directions: object) -> None:
    """Make sure that a reranker is asked to learn at least one direction, and only known ones.

    Raises:
        ConfigError: None, an unknown one, one twice, or a text in place of a sequence.
    """
    known = get_args(Direction)
    if not isinstance(directions, (list, tuple)) or not directions:
        raise ConfigError(f"directions={directions!r}: expected one or both of {known}, e.g. ({known[0]!r},).")
    unknown = [direction for direction in directions if direction not in known]
    if unknown:
        raise ConfigError(f"directions holds {unknown[0]!r}: expected one or both of {known}.")
    if len(set(directions)) < len(directions):
        raise ConfigError(f"directions={directions!r} names one twice. Name each once.")


def check_candidates(num_candidates: object) -> None:
    """Make sure that lists of candidates hold something to rank.

    Raises:
        ConfigError: They hold fewer than two, or the length is no whole number.
    """
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 2:
        raise ConfigError(f"num_candidates={num_candidates!r}: expected a whole number of 2 or more.")
