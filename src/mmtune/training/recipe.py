"""The choices of one call: training arguments, dimensions and mini-batches, fitted to the data."""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.errors import ConfigError
from mmtune.training.batches import ConflictFreeBatchSampler, StepwiseProportionalBatchSampler

Loss: TypeAlias = torch.nn.Module | Callable[[SentenceTransformer], torch.nn.Module]
"""A host loss, built or as a callable that takes the model."""

BATCH_SIZE = 64
EVALUATIONS = 10
METRIC_OF_RECIPE = "eval_primary"
"""Stands for the metric whose key is only known once the model is there."""
MIN_STEPS_AN_EPOCH = 4
MATRYOSHKA_DIMS = (2048, 1536, 1024, 512, 256, 128, 64)
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
    num_rows: int, *, output_dir: str, seed: int, evaluates: bool, **given: Any
) -> SentenceTransformerTrainingArguments:
    """The recipe of the VDR guide as the host's training arguments, fitted to the number of rows.

    One epoch, batches of 64, learning rate 2e-5 with warm-up over the first tenth, bf16 on a GPU that has it,
    conflict-free batches, the best checkpoint and the last one kept. Small data get smaller batches, so that a run has
    ten steps where the rows allow it.

    Args:
        num_rows: Training rows.
        output_dir: Where the host writes checkpoints.
        seed: Of training.
        evaluates: Whether there is an evaluation set, by which the best checkpoint is kept.
        **given: Training arguments of the host by name, in place of the recipe's.

    Raises:
        ConfigError: The host refuses a value.
    """
    recipe: dict[str, Any] = {
        "output_dir": output_dir,
        "seed": seed,
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "batch_sampler": ConflictFreeBatchSampler,
        "multi_dataset_batch_sampler": StepwiseProportionalBatchSampler,
        "save_total_limit": 2,
        "bf16": not given.get("fp16") and _computes_in_bf16(),
        "dataloader_num_workers": _workers(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    epochs = given.get("num_train_epochs", 1)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or epochs <= 0:
        raise ConfigError(f"num_train_epochs={epochs!r}: expected a positive number.")
    recipe["per_device_train_batch_size"] = batch_size(num_rows, epochs, _num_processes())
    try:
        steps = total_steps(num_rows, recipe | given)
        # A warm-up of one step starts at a learning rate of zero: a shorter run would spend much of itself there.
        recipe["warmup_steps"] = given.get("warmup_ratio") or (0.1 if steps >= EVALUATIONS else 0)
        recipe |= _schedule(steps, evaluates, given)
        given = {name: value for name, value in given.items() if name != "warmup_ratio"}
        return SentenceTransformerTrainingArguments(**(recipe | given))
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


def batch_size(num_rows: int, epochs: float, num_processes: int) -> int:
    """Rows a device: 64, or fewer where data are small; at least 2 where there are 2.

    A run keeps ten steps, and an epoch four: in a batch of nearly all rows, rows that may not meet would find no place.
    """
    rows = num_rows / num_processes
    fitting = min(rows * epochs / EVALUATIONS, rows / MIN_STEPS_AN_EPOCH)
    return max(1, min(BATCH_SIZE, max(2, math.floor(fitting)), math.floor(rows)))


def total_steps(num_rows: int, arguments: Mapping[str, Any]) -> int:
    """Optimizer steps of the run, up to rows that find no batch."""
    if arguments.get("max_steps", -1) > 0:
        return arguments["max_steps"]
    rows_a_step = (
        arguments["per_device_train_batch_size"] * _num_processes() * arguments.get("gradient_accumulation_steps", 1)
    )
    return math.ceil(math.ceil(num_rows / rows_a_step) * arguments["num_train_epochs"])


def callbacks(args: SentenceTransformerTrainingArguments | None, given: Mapping[str, Any]) -> list[TrainerCallback]:
    """``EvenTenths``, unless the caller brought a schedule of evaluations."""
    return [] if args is not None or follows_own_schedule(given) else [EvenTenths()]


def arguments_for_model(
    args: SentenceTransformerTrainingArguments,
    model: SentenceTransformer,
    prompts: dict[str, str] | str | None,
    columns: Sequence[str],
    metric: str | None,
) -> SentenceTransformerTrainingArguments:
    """A copy of ``args`` with what only the model knows: its prompts, where there are none, and the recipe's metric.

    Args:
        args: The caller's arguments, or the recipe's.
        model: The model to train.
        prompts: As ``finetune`` takes it.
        columns: The columns of the rows.
        metric: The key of the metric that chooses the checkpoint.
    """
    args = copy.copy(args)
    if not args.prompts:
        args.prompts = column_prompts(model, columns) if prompts == "model" else prompts
    if args.metric_for_best_model == METRIC_OF_RECIPE:
        args.metric_for_best_model = f"eval_{metric}"
    return args


def column_prompts(model: SentenceTransformer, columns: Sequence[str]) -> dict[str, str]:
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


def loss_for_model(
    loss: Loss | Mapping[str, Loss] | None,
    model: SentenceTransformer,
    dims: Sequence[int],
    mini_batch: Literal["auto"] | int,
    batch: int,
) -> torch.nn.Module | dict[str, torch.nn.Module]:
    """The caller's loss, built, or that of the recipe.

    The recipe's is cached in-batch negatives (Gao et al., 2021), at each of ``dims`` (Kusupati et al., 2022) where
    there are any.

    Raises:
        ConfigError: The caller's loss trains another model.
    """
    if loss is None:
        cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size(mini_batch, model, batch))
        return MatryoshkaLoss(model, cached, matryoshka_dims=list(dims)) if dims else cached
    if isinstance(loss, Mapping):
        return {name: _built(part, model) for name, part in loss.items()}
    return _built(loss, model)


def _built(loss: Loss, model: SentenceTransformer) -> torch.nn.Module:
    built = loss if isinstance(loss, torch.nn.Module) else loss(model)
    if getattr(built, "model", model) is not model:
        raise ConfigError(
            f"The loss {type(built).__name__} was built for another model than the one to train. Pass that model to "
            "finetune, or pass the loss as a callable, e.g. loss=lambda model: MyLoss(model)."
        )
    return built


def trained_dims(choice: Literal["auto"] | Sequence[int] | None, model: SentenceTransformer) -> tuple[int, ...]:
    """The dimensions that the recipe's loss trains, largest first; empty for the full size only.

    Raises:
        ConfigError: A dimension is larger than the model's, or the model does not tell its dimension.
    """
    if choice is None:
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


def evaluated_dims(
    choice: Literal["auto"] | Sequence[int] | None, model: SentenceTransformer, loss: object
) -> tuple[int, ...]:
    """The dimensions to score: those that the caller names, else those that the loss trains."""
    if choice == "auto":
        choice = getattr(loss, "matryoshka_dims", None)
    return trained_dims(choice, model)


def mini_batch_size(choice: Literal["auto"] | int, model: SentenceTransformer, batch_size: int) -> int:
    """Documents in one forward pass of the cached loss: by the size of the model, at most a batch."""
    if choice != "auto":
        return choice
    parameters = sum(parameter.numel() for parameter in model.parameters())
    fitting = 1 if parameters > 1_000_000_000 else 8 if parameters > 150_000_000 else 32
    return min(fitting, batch_size)


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
