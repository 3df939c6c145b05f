"""The host's training arguments of one call: the recipe, fitted to the rows, then completed by what the model tells."""

import copy
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.losses import uses_gradient_cache
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.errors import ConfigError
from mmtune.inference.preprocessing import local_processes, page_bytes
from mmtune.models.adapters import encoders_of, has_lora
from mmtune.models.kinds import HostModel
from mmtune.models.routes import find_router, router_mapping
from mmtune.training.batches import (
    ConflictFreeBatchSampler,
    ShuffledBatchSampler,
    StepwiseProportionalBatchSampler,
    StepwiseRoundRobinBatchSampler,
)
from mmtune.training.mini_batches import plain_losses
from mmtune.training.records import RunRecord
from mmtune.training.trainers import Kind
from mmtune.training.weights import optimizer_for

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=BaseTrainingArguments)

EVALUATIONS = 10
EVALUATION_BATCH_SIZE = 16
METRIC_OF_RECIPE = "eval_primary"
"""Stands for the metric whose key is only known once the model is there."""
MIN_STEPS_AN_EPOCH = 4
ADAPTER_RATE = 10
"""How much faster adapters learn than the weights of a full finetuning."""
FRESH_RATE = 10
"""How much faster layers learn that start from random numbers."""
FRESH_LATE_INTERACTION_CLIP = 30.0
_TURNS = "multi_dataset_batch_sampler"
_READY = 2
"""Batches that a worker of torch's data loader has ready."""
_SHARE_OF_SHARED = 0.5
_SCHEDULE_ARGUMENTS = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")


class EvenTenths(TrainerCallback):
    """Evaluates, saves and logs after each tenth of the run; after each step of a run of fewer than ten."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for evaluation and saving where a tenth ends."""
        tenths = {math.ceil(state.max_steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
        if state.global_step in tenths:
            control.should_save = True
            control.should_log = args.logging_strategy != "no"
            control.should_evaluate = args.eval_strategy != "no" and state.global_step >= args.eval_delay


def follows_own_schedule(given: Mapping[str, Any]) -> bool:
    """Whether the caller says when to evaluate or save, so that the tenths of the recipe don't apply."""
    return any(name in given for name in _SCHEDULE_ARGUMENTS)


def training_arguments(
    kind: Kind,
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
    # A run keeps ten steps, and an epoch four: in a batch of nearly all rows, rows that may not meet would find no
    # place. At least 2 rows meet where there are 2.
    processes = _count_processes(given)
    rows, epochs = num_rows / processes, given.get("num_train_epochs", 1)
    given = {name: _stepwise(value) if name == _TURNS else value for name, value in given.items()}
    fitting = max(2, math.floor(min(rows * epochs / EVALUATIONS, rows / MIN_STEPS_AN_EPOCH)))
    rows_a_step = max(1, min(kind.batch_size * kind.accumulation_steps, fitting, math.floor(rows)))
    own_batch = "per_device_train_batch_size" in given
    recipe: dict[str, Any] = {
        "output_dir": output_dir,
        "seed": seed,
        "num_train_epochs": 1,
        "per_device_train_batch_size": min(rows_a_step, kind.batch_size),
        "gradient_accumulation_steps": 1 if own_batch else max(1, rows_a_step // kind.batch_size),
        "per_device_eval_batch_size": EVALUATION_BATCH_SIZE,
        "learning_rate": kind.learning_rate,
        "batch_sampler": ConflictFreeBatchSampler if in_batch_negatives else ShuffledBatchSampler,
        "multi_dataset_batch_sampler": StepwiseProportionalBatchSampler,
        "save_total_limit": 2,
        "bf16": not given.get("fp16")
        and torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False),
        "dataloader_num_workers": _count_workers(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # without it accelerate does not connect the processes where there is no accelerator; torch has that since 2.6
        "use_cpu": processes > 1 and not getattr(torch, "accelerator", torch.cuda).is_available(),
    }
    chosen = recipe | given
    _check_schedule(_schedule_run(1, evaluates, given) | given)
    try:
        steps = chosen.get("max_steps", -1)
        if steps <= 0:
            together = chosen["per_device_train_batch_size"] * processes * chosen["gradient_accumulation_steps"]
            steps = math.ceil(math.ceil(num_rows / together) * epochs)
        # A warm-up of one step starts at a learning rate of zero: a shorter run would spend much of itself there.
        warmup = given.get("warmup_ratio")
        recipe["warmup_steps"] = warmup if warmup is not None else (0.1 if steps >= EVALUATIONS else 0)
        chosen = {**recipe, **_schedule_run(steps, evaluates, given), **given}
        chosen.pop("warmup_ratio", None)
        return kind.arguments_class(**chosen)
    except Exception as error:  # the host and its libraries refuse values in every way
        named = ", ".join(f"{name}={value!r:.40}" for name, value in given.items()) or "these training arguments"
        raise ConfigError(
            f"Sentence Transformers refuses {named}: {str(error).rstrip('. ')}. Change or leave out what it names."
        ) from error


def _schedule_run(steps: int, evaluates: bool, given: Mapping[str, Any]) -> dict[str, Any]:
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
        # the loss stands in the line of the measurement
        "logging_steps": interval if given.get("eval_steps") or given.get("save_steps") else 1 / EVALUATIONS,
        "load_best_model_at_end": "no" not in (evaluated, saved),
        "metric_for_best_model": METRIC_OF_RECIPE,
        "greater_is_better": True,
    }


def _check_schedule(chosen: Mapping[str, Any]) -> None:
    """Make sure that the best checkpoint is among those that are measured.

    Raises:
        ConfigError: Measuring and saving go by different clocks, or nothing is measured.
    """
    names = ("eval_strategy", "save_strategy")
    evaluated, saved = (str(getattr(chosen.get(name, "no"), "value", chosen.get(name, "no"))) for name in names)
    if not chosen.get("load_best_model_at_end") or saved in (evaluated, "best"):
        return
    if evaluated == "no":
        raise ConfigError(
            "load_best_model_at_end=True needs something to measure. Pass eval_dataset=..., or leave it out."
        )
    raise ConfigError(
        f"eval_strategy={evaluated!r} and save_strategy={saved!r} differ, and the best checkpoint is one that was "
        f"measured. Pass save_strategy={evaluated!r}, or keep='last' for the last weights."
    )


def _count_processes(given: Mapping[str, Any]) -> int:
    """The batches of one device that make a step: one a process, or one a GPU where a single process uses them all."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return processes if processes > 1 or given.get("use_cpu") else max(1, torch.cuda.device_count())


def _stepwise(sampler: Any) -> Any:
    """The sampler of this package for the host's turns, which mix datasets in a step of several processes."""
    in_turn = isinstance(sampler, str) and getattr(sampler, "value", sampler) == "round_robin"
    return StepwiseRoundRobinBatchSampler if in_turn else sampler


def _count_workers() -> int:
    """Worker processes that decode pages while a GPU computes; on a CPU they would take its cores from training."""
    if not torch.cuda.is_available():
        return 0
    return min(4, (os.cpu_count() or 1) // (2 * local_processes()))


def fit_workers(args: BaseTrainingArguments, model: HostModel, columns: Sequence[str]) -> int:
    """As many of the workers as keep their batches within half of the shared memory, through which they hand them over.

    Each has two batches ready. A container has 64 MB of it unless it is told otherwise, and a worker that finds none
    left is killed.

    Args:
        args: The recipe's arguments.
        model: The model, whose image processor says how large a page is.
        columns: Of the rows; all but the query may be pages.
    """
    workers, shared = args.dataloader_num_workers, Path("/dev/shm")
    page = max((page_bytes(encoder) for encoder in encoders_of(model)), default=0)
    if not workers or not page or not shared.is_dir():
        return workers
    batch = args.per_device_train_batch_size * max(1, len(columns) - 1) * page
    ready = args.dataloader_prefetch_factor or _READY
    fitting = int(_SHARE_OF_SHARED * shutil.disk_usage(shared).free / (ready * batch * local_processes()))
    if fitting < workers:
        logger.warning(
            "%d workers in place of %d: a batch takes up to %.0f MB, %d wait in each worker, and %s has %.0f MB. Give "
            "a container more with --shm-size, or pass dataloader_num_workers.",
            fitting,
            workers,
            batch / 1e6,
            ready,
            shared,
            shutil.disk_usage(shared).free / 1e6,
        )
    return min(workers, fitting)


def choose_rates(
    args: BaseTrainingArguments,
    model: HostModel,
    fresh: Mapping[str, nn.Module],
    began: RunRecord | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The learning rates and the optimizer that this model's layers need, as the host's training arguments.

    Adapters, and layers that start from random numbers, learn at ten times the rate ("LoRA Without Regret", Schulman
    et al., 2025). A fresh projection of late interaction has gradients that are larger by an order of magnitude; with
    the usual clip at 1 the backbone would stand still. Its rate and its clip are those of the host's example for late
    interaction on pages (sentence-transformers 6.2). Weights in bfloat16 are trained by compensated AdamW, unless the
    caller names an optimizer. A run that goes on keeps what it began with.

    Args:
        args: The recipe's arguments.
        model: The model to train, with its adapters.
        fresh: Its layers that start from random numbers, by name.
        began: What the run that goes on was begun with; ``None`` for a new run.
        given: The caller's training arguments by name, which win.
    """
    learning = [name for name, layer in fresh.items() if any(weight.requires_grad for weight in layer.parameters())]
    rates: dict[str, Any] = {}
    if began is not None:
        rates = dict(began.rates)
    elif has_lora(model):
        rates["learning_rate"] = ADAPTER_RATE * args.learning_rate
    elif learning:
        names = "|".join(map(re.escape, learning))
        rates["learning_rate_mapping"] = {rf"(^|\.)model\.({names})\.": FRESH_RATE * args.learning_rate}
    if began is None and learning and isinstance(model, MultiVectorEncoder):
        rates["max_grad_norm"] = FRESH_LATE_INTERACTION_CLIP
    if began is None and "optim" not in given:
        rates |= optimizer_for(model, args)
    return {name: value for name, value in rates.items() if name not in given}


def settle_metric(args: BaseTrainingArguments, metric: str | None) -> None:
    """Put the metric that chooses the checkpoint into the recipe's arguments; in place, where it is open still.

    Raises:
        ConfigError: The evaluator was called and tells no metric.
    """
    if args.metric_for_best_model != METRIC_OF_RECIPE:
        return
    if metric is None:
        raise ConfigError(
            "The evaluator has no primary_metric after its first call, so nothing says which checkpoint is the best. "
            "Set its primary_metric, or pass metric_for_best_model with the key of one of its metrics."
        )
    args.metric_for_best_model = f"eval_{metric}"


def steps_of_fractions(args: BaseTrainingArguments, checkpoint: Path | None) -> dict[str, int]:
    """The steps that logging, evaluating and saving after a fraction of the run came to when it began.

    The host compares the fraction with them when a run goes on, and warns that they differ (transformers 5.23).
    """
    if checkpoint is None:
        return {}
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    names = [name for name in ("logging_steps", "eval_steps", "save_steps") if 0 < (getattr(args, name) or 0) < 1]
    return {name: state[name] for name in names if state.get(name)}


def complete_arguments(
    args: Arguments,
    model: HostModel,
    loss: nn.Module | Mapping[str, nn.Module],
    columns: Sequence[str],
    *,
    prompts: Any,
    metric: str | None,
    rates: Mapping[str, Any] | None,
    saved_steps: Mapping[str, int] | None = None,
) -> Arguments:
    """A copy of ``args`` with what only the model, its loss and its evaluator tell.

    Args:
        args: The caller's arguments, or the recipe's.
        model: The model to train.
        loss: What is minimised; one for each training set where they are several.
        columns: The columns of the rows, for the routes of a Router.
        prompts: What is trained with.
        metric: The key of the metric that chooses the checkpoint, for the recipe's arguments; ``None`` as long as it
            is not known.
        rates: Learning rates, for the recipe's arguments; ``None`` where they are the caller's.
        saved_steps: What fractions of the run came to when it began, where it goes on.

    Raises:
        ConfigError: Several processes are to train without cached gradients, and the caller's arguments would fail.
    """
    args = copy.copy(args)
    args.prompts = prompts
    for name, value in (rates or {}).items():
        setattr(args, name, value)
    for name, steps in (saved_steps or {}).items():
        setattr(args, name, steps)
    if metric is not None:
        settle_metric(args, metric)
    if find_router(model) is not None:
        args.router_mapping = args.router_mapping or router_mapping(columns)

    # Without cached gradients each column is a forward pass of its own. torch would take what one of them does not use
    # for unused, and fail when it is used after all. Nothing is: what no query and no document reaches is frozen.
    inner = plain_losses(loss)
    if args.ddp_find_unused_parameters is not False and not all(map(uses_gradient_cache, inner)):
        if rates is not None:
            args.ddp_find_unused_parameters = False
        elif args.world_size > 1:
            raise ConfigError(
                f"{type(inner[0]).__name__} with {args.world_size} processes needs ddp_find_unused_parameters=False: "
                "torch takes the weights that one forward pass does not use for unused while the next one uses them. "
                "Set it in args, or take a cached loss."
            )
    return args
