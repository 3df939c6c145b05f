"""The training arguments of one call, fitted to the data and to the model."""

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.losses import uses_gradient_cache
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.data.relevance import Direction
from mmtune.errors import ConfigError
from mmtune.evaluation.corpus import Retriever
from mmtune.models.adapters import has_lora
from mmtune.models.fresh import fresh_layers
from mmtune.models.kinds import HostModel
from mmtune.models.routes import find_router, router_mapping
from mmtune.training.batches import (
    ConflictFreeBatchSampler,
    ShuffledBatchSampler,
    StepwiseProportionalBatchSampler,
)
from mmtune.training.kinds import Kind

Arguments = TypeVar("Arguments", bound=BaseTrainingArguments)

EVALUATIONS = 10
METRIC_OF_RECIPE = "eval_primary"
"""Stands for the metric whose key is only known once the model is there."""
MIN_STEPS_AN_EPOCH = 4
FRESH_RATE = 10
FRESH_LATE_INTERACTION_CLIP = 30.0
_SCHEDULE_ARGUMENTS = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")


class EvenTenths(TrainerCallback):
    """Evaluates, saves and logs after each tenth of the run; after each step of a run of fewer than ten."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for evaluation and saving where a tenth ends."""
        if state.global_step in tenths(state.max_steps):
            control.should_save = True
            control.should_log = args.logging_strategy != "no"
            control.should_evaluate = args.eval_strategy != "no" and state.global_step >= args.eval_delay


def tenths(total_steps: int) -> list[int]:
    """The steps that end a tenth of the run: ten of them, or every step of a shorter run."""
    return sorted({math.ceil(total_steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)})


def training_arguments(
    kind: Kind[Any],
    num_rows: int,
    *,
    output_dir: str,
    seed: int,
    evaluates: bool,
    in_batch_negatives: bool = True,
    **given: Any,
) -> BaseTrainingArguments:
    """The recipe of the VDR guide as the host's training arguments, fitted to the number of rows.

    One epoch with warm-up over the first tenth, bf16 on a GPU that has it, conflict-free batches, the best checkpoint
    and the last one kept. Embedding models learn from batches of 64 at a rate of 2e-5, rerankers from 4 batches of 8
    a step at 5e-6. Small data get smaller batches, so that a run has ten steps where the rows allow it.

    Args:
        kind: The kind of model.
        num_rows: Training rows.
        output_dir: Where the host writes checkpoints.
        seed: Of training.
        evaluates: Whether there is an evaluation set, by which the best checkpoint is kept.
        in_batch_negatives: Whether the loss takes documents of other rows as negatives, so that batches must be free of
            conflicts.
        **given: Training arguments of the host by name, in place of the recipe's.

    Raises:
        ConfigError: The host refuses a value.
    """
    recipe: dict[str, Any] = {
        "output_dir": output_dir,
        "seed": seed,
        "num_train_epochs": 1,
        "learning_rate": kind.learning_rate,
        "batch_sampler": ConflictFreeBatchSampler if in_batch_negatives else ShuffledBatchSampler,
        "multi_dataset_batch_sampler": StepwiseProportionalBatchSampler,
        "save_total_limit": 2,
        "bf16": not given.get("fp16") and _computes_in_bf16(),
        "dataloader_num_workers": _workers(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    epochs = given.get("num_train_epochs", 1)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or epochs <= 0:
        raise ConfigError(f"num_train_epochs={epochs!r}: expected a positive number.")
    rows = rows_a_step(num_rows, epochs, _num_processes(), at_most=kind.batch_size * kind.accumulation_steps)
    recipe["per_device_train_batch_size"] = min(rows, kind.batch_size)
    own_batch = "per_device_train_batch_size" in given
    recipe["gradient_accumulation_steps"] = 1 if own_batch else max(1, rows // kind.batch_size)
    try:
        steps = total_steps(num_rows, recipe | given)
        # A warm-up of one step starts at a learning rate of zero: a shorter run would spend much of itself there.
        recipe["warmup_steps"] = given.get("warmup_ratio") or (0.1 if steps >= EVALUATIONS else 0)
        recipe |= _schedule(steps, evaluates, given)
        given = {name: value for name, value in given.items() if name != "warmup_ratio"}
        return kind.arguments_class(**(recipe | given))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"The host refuses these training arguments: {error}") from error


def _schedule(steps: int, evaluates: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """When to evaluate, save and log. Both happen together, as the host asks for keeping the best checkpoint."""
    interval = given.get("eval_steps") or given.get("save_steps")
    # The tenths between come from EvenTenths: the host's fraction rounds up, and 11 steps would make 6 evaluations.
    interval = interval or (1 / EVALUATIONS if follows_own_schedule(given) else max(1, steps))
    saved, evaluated = given.get("save_strategy"), given.get("eval_strategy")
    evaluated = evaluated or (saved if saved in ("steps", "epoch") else "steps")
    saved = saved or (evaluated if evaluated != "no" else "steps")
    schedule: dict[str, Any] = {"save_strategy": saved, "save_steps": interval, "logging_steps": 1 / EVALUATIONS}
    if not evaluates:
        return schedule
    return schedule | {
        "eval_strategy": evaluated,
        "eval_steps": interval,
        "load_best_model_at_end": "no" not in (evaluated, saved),
        "metric_for_best_model": METRIC_OF_RECIPE,
        "greater_is_better": True,
    }


def follows_own_schedule(given: Mapping[str, Any]) -> bool:
    """Whether the caller says when to evaluate or save, so that the tenths of the recipe don't apply."""
    return any(name in given for name in _SCHEDULE_ARGUMENTS)


def rows_a_step(num_rows: int, epochs: float, num_processes: int, *, at_most: int) -> int:
    """Rows a device and step: fewer than ``at_most`` where data are small; at least 2 where there are 2.

    A run keeps ten steps, and an epoch four: in a batch of nearly all rows, rows that may not meet would find no place.
    """
    rows = num_rows / num_processes
    fitting = min(rows * epochs / EVALUATIONS, rows / MIN_STEPS_AN_EPOCH)
    return max(1, min(at_most, max(2, math.floor(fitting)), math.floor(rows)))


def total_steps(num_rows: int, arguments: Mapping[str, Any]) -> int:
    """Optimizer steps of the run, up to rows that find no batch."""
    if arguments.get("max_steps", -1) > 0:
        return arguments["max_steps"]
    rows_a_step = (
        arguments["per_device_train_batch_size"] * _num_processes() * arguments.get("gradient_accumulation_steps", 1)
    )
    return math.ceil(math.ceil(num_rows / rows_a_step) * arguments["num_train_epochs"])


def callbacks(args: BaseTrainingArguments | None, given: Mapping[str, Any]) -> list[TrainerCallback]:
    """``EvenTenths``, unless the caller brought a schedule of evaluations."""
    return [] if args is not None or follows_own_schedule(given) else [EvenTenths()]


def arguments_for_model(
    args: Arguments,
    model: Retriever,
    prompts: dict[str, str] | str | None,
    columns: Sequence[str],
    metric: str | None,
) -> Arguments:
    """A copy of ``args`` with what only the model knows: its prompts and routes, where there are none.

    Args:
        args: The caller's arguments, or the recipe's.
        model: The model to train.
        prompts: As ``finetune`` takes it.
        columns: The columns of the rows.
        metric: The key of the metric that chooses the checkpoint, for the recipe's arguments.
    """
    args = copy.copy(args)
    if not args.prompts:
        args.prompts = column_prompts(model, columns) if prompts == "model" else prompts
    if not args.router_mapping and find_router(model) is not None:
        args.router_mapping = router_mapping(columns)
    if args.metric_for_best_model == METRIC_OF_RECIPE:
        args.metric_for_best_model = f"eval_{metric}"
    return args


def reranking_arguments_for_model(
    args: Arguments, model: CrossEncoder, direction_by_name: Mapping[str, Direction], metric: str | None
) -> Arguments:
    """A copy of ``args`` with the model's prompt for each direction that has none.

    Prompts in ``args`` become the model's own, so that evaluation, the saved model and ``predict`` use them too.

    Args:
        args: The caller's arguments, or the recipe's.
        model: The reranker to train.
        direction_by_name: What asks in each of the training sets; a single one has the name ``""``.
        metric: The key of the metric that chooses the checkpoint, for the recipe's arguments.
    """
    args = copy.copy(args)
    given: Any = args.prompts
    default = model.prompts.get(model.default_prompt_name or "", "")
    prompts: dict[str, Any] = {
        name: model.prompts.get(direction, default) for name, direction in direction_by_name.items()
    }
    if given:
        prompts |= dict.fromkeys(prompts, given) if isinstance(given, str) else dict(given)
        # what is trained is what is measured, saved and used
        for name, direction in direction_by_name.items():
            model.prompts[direction] = prompts[name]
    prompts = {name: prompt for name, prompt in prompts.items() if prompt}
    if prompts:
        args.prompts = prompts[""] if "" in prompts else prompts  # noqa: SIM401 - two types
    if args.metric_for_best_model == METRIC_OF_RECIPE:
        args.metric_for_best_model = f"eval_{metric}"
    return args


def with_rates(
    args: Arguments,
    kind: Kind[Any],
    model: HostModel,
    given: Mapping[str, Any],
    checkpoint: Path | None,
) -> Arguments:
    """A copy of the recipe's arguments with the learning rates that this model's layers need.

    Adapters, and layers that start from random numbers, learn at ten times the rate ("LoRA Without Regret", Schulman
    et al., 2025). A fresh projection of late interaction has gradients that are larger by an order of magnitude; with
    the usual clip at 1 the backbone would stand still. Its rate and its clip are those of the host's example for late
    interaction on pages (sentence-transformers 6.2). A run that goes on keeps the rates that it began with.

    Args:
        args: The recipe's arguments.
        kind: The kind of model.
        model: The model to train, with its adapters.
        given: The caller's training arguments by name, which win.
        checkpoint: What the run goes on from; ``None`` for a new run.
    """
    args = copy.copy(args)
    rates: dict[str, Any] = _saved_rates(checkpoint) if checkpoint is not None else _fresh_rates(args, kind, model)
    for name, value in rates.items():
        if name not in given:
            setattr(args, name, value)
    return args


def _fresh_rates(args: BaseTrainingArguments, kind: Kind[Any], model: HostModel) -> dict[str, Any]:
    if has_lora(model):
        return {"learning_rate": FRESH_RATE * kind.learning_rate}
    fresh = {name: layer for name, layer in fresh_layers(model).items() if _learns(layer)}
    if not fresh:
        return {}
    names = "|".join(re.escape(name) for name in fresh)
    clip = {"max_grad_norm": FRESH_LATE_INTERACTION_CLIP} if isinstance(model, MultiVectorEncoder) else {}
    return {"learning_rate_mapping": {rf"(^|\.)model\.({names})\.": FRESH_RATE * args.learning_rate}, **clip}


def _saved_rates(checkpoint: Path) -> dict[str, Any]:
    saved = torch.load(checkpoint / "training_args.bin", weights_only=False)
    return {name: getattr(saved, name) for name in ("learning_rate", "learning_rate_mapping", "max_grad_norm")}


def _learns(layer: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def for_routes(args: Arguments, model: HostModel, loss: object, *, own: bool) -> Arguments:
    """A copy of ``args`` that lets several processes train a Router by a loss without cached gradients.

    Each route is a forward pass of its own. torch would take the weights of the other route for unused, and fail when
    they are used after all. None is: what no route reaches is frozen.

    Args:
        args: The recipe's arguments, or the caller's.
        model: The model to train.
        loss: What is minimised.
        own: Whether they are the caller's, which stay as they are.

    Raises:
        ConfigError: They are the caller's, and would fail.
    """
    losses = list(loss.values()) if isinstance(loss, Mapping) else [loss]
    inner = [part.loss if isinstance(part, MatryoshkaLoss) else part for part in losses]
    is_cached = all(uses_gradient_cache(part) for part in inner)
    if find_router(model) is None or is_cached or args.ddp_find_unused_parameters is False:
        return args
    if own and args.world_size == 1:
        return args
    if own:
        raise ConfigError(
            f"{type(inner[0]).__name__} with a Router and {args.world_size} processes needs "
            "ddp_find_unused_parameters=False: torch takes the weights of one route for unused while the other runs. "
            "Set it in args, or take a cached loss."
        )
    args = copy.copy(args)
    args.ddp_find_unused_parameters = False
    return args


def column_prompts(model: Retriever, columns: Sequence[str]) -> dict[str, str]:
    """For each column the prompt that ``encode_query`` and ``encode_document`` will use; without empty ones.

    The host's trainer applies no prompts by itself, and its ``encode`` methods do (sentence-transformers 6.2):
    training and use would differ.
    """
    default = model.prompts.get(model.default_prompt_name or "", "")
    query = model.prompts.get("query", default)
    names = (name for name in ("document", "passage", "corpus") if name in model.prompts)
    document = model.prompts.get(next(names, ""), default)
    by_column = {name: query if name == "query" else document for name in columns}
    return {name: prompt for name, prompt in by_column.items() if prompt}


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _computes_in_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _workers() -> int:
    """Worker processes that decode pages while a GPU computes; on a CPU they would take its cores from training."""
    if not torch.cuda.is_available():
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, (os.cpu_count() or 1) // (2 * local))
