"""What can be known to fail before weights load, or before hours of training."""

import dataclasses
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.base.training_args import BaseTrainingArguments
from transformers import EarlyStoppingCallback, TrainerCallback

from mmtune.arguments import require_flag, require_one_of, require_path, require_seed, shown
from mmtune.errors import ConfigError
from mmtune.models.parts import part_names
from mmtune.models.pixels import PixelLimits
from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.call import Finetuning
from mmtune.training.host_arguments import check_built_values, check_host_values, hint_for
from mmtune.training.losses import check_loss
from mmtune.training.trainers import Kind, is_for_rerankers


def check_training_arguments(
    kind: Kind, args: BaseTrainingArguments | None, given: Mapping[str, Any], *, own: Iterable[str] = ()
) -> dict[str, Any]:
    """The training arguments that were given by name, with NumPy's numbers as Python's.

    Args:
        kind: The kind of model.
        args: The host's arguments, where the caller built them.
        given: The caller's training arguments by name.
        own: The other arguments of the call, for the hint where a name is unknown.

    Raises:
        ConfigError: A name is no training argument of the host, ``args`` are of another class or were given besides,
            or a value can't be.
        MissingExtraError: A value needs a package that is not installed.
    """
    known = [field.name for field in dataclasses.fields(kind.arguments_class) if field.init]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"{name!r} is neither an argument of this function nor a training argument of Sentence Transformers. "
                f"{hint_for(name, value, own, kind)}"
            )
    if given.get("resume_from_checkpoint") is not None:
        raise ConfigError("resume_from_checkpoint is for the trainer of Sentence Transformers. Pass resume=True.")
    if args is not None and not isinstance(args, kind.arguments_class):
        raise ConfigError(f"args is a {type(args).__name__}, expected {kind.arguments_class.__name__}.")
    if args is not None and given:
        name, value = next(iter(given.items()))
        raise ConfigError(f"args and {name}={value!r} were both given. Set it in args, or leave args out.")
    if args is not None:
        check_built_values(args)
    if given.get("fp16") and given.get("bf16"):
        raise ConfigError("fp16=True and bf16=True were both given. Expected one precision. Leave one of them out.")
    # what a prompt is for depends on the columns, which are not there yet
    return dict(given) | check_host_values(
        kind.arguments_class, {name: value for name, value in given.items() if name != "prompts"}
    )


def check_choices(call: Finetuning) -> None:
    """Make sure of the arguments that both calls have, from their types alone.

    Raises:
        ConfigError: One can't be; the message says what was expected.
    """
    for name in ("allow_overlap", "overwrite", "dry_run", "thumbnails"):
        require_flag(name, getattr(call, name))
    if call.dry_run and call.resume:
        raise ConfigError(
            f"dry_run=True plans a run from its start, and resume={call.resume!r}. Leave one of them out."
        )
    if call.resume != "auto":
        require_flag("resume", call.resume, or_else="'auto'")
    require_one_of("keep", call.keep, ("best", "last"))
    if call.keep == "last" and call.args is not None and call.args.load_best_model_at_end:
        raise ConfigError("keep='last' and args.load_best_model_at_end=True contradict each other. Set one of them.")
    require_seed("seed", call.seed)
    if call.guard_dataset is not None and call.eval_dataset is None and call.evaluator is None:
        raise ConfigError(
            "guard_dataset was given without eval_dataset: it guards what is chosen by that. Pass eval_dataset as well."
        )
    folder = call.output_dir
    if folder is not None and not (isinstance(folder, (str, os.PathLike)) and str(folder).strip()):
        raise ConfigError(
            f"output_dir={folder!r}: expected the path of a folder as a text or a Path, or None, which is "
            "./mmtune-output. Pass e.g. output_dir='my-run'."
        )
    if folder is not None and "\0" in str(folder):
        raise ConfigError(f"output_dir={str(folder)!r} holds a null character, and no path can. Name another folder.")
    PixelLimits(max_pixels=call.max_pixels)
    if call.page_store is not None:
        require_path("page_store", call.page_store)
    part_names(call.freeze)
    check_loss(call.loss, call.kind)
    _check_callbacks(call.callbacks)
    if call.evaluator is not None and (isinstance(call.evaluator, type) or not callable(call.evaluator)):
        raise ConfigError(
            f"evaluator={shown(call.evaluator)}: expected an evaluator of Sentence Transformers, built, e.g. "
            "build_evaluator(dataset), or None. To measure on a dataset, pass it as eval_dataset."
        )
    _check_evaluator(call.evaluator, call.kind)


def _check_evaluator(evaluator: Any, kind: Kind) -> None:
    """Make sure that an evaluator measures what is trained: retrievers or rerankers."""
    for part in getattr(evaluator, "evaluators", [evaluator]):
        trains_reranker = is_for_rerankers(kind.model_class)
        if is_for_rerankers(part) not in (None, trains_reranker):
            builder = "build_reranking_evaluator" if trains_reranker else "build_evaluator"
            raise ConfigError(
                f"evaluator is a {type(part).__name__}, which can't measure a {kind.model_class.__name__}. Pass "
                f"evaluator={builder}(dataset), or the dataset as eval_dataset."
            )


def _check_callbacks(callbacks: Any) -> None:
    is_series = isinstance(callbacks, Sequence) and not isinstance(callbacks, (str, bytes))
    wrong = [each for each in (callbacks if is_series else [callbacks]) if not _is_callback(each)]
    if wrong or not is_series:
        found = f"callbacks holds {wrong[0]!r}" if wrong and is_series else f"callbacks={callbacks!r}"
        name = getattr(callbacks, "__name__", type(callbacks).__name__)
        remedy = (
            "Pass e.g. callbacks=[transformers.EarlyStoppingCallback(3)]"
            if wrong
            else f"Put it in one: callbacks=[{name}(...)]"
        )
        raise ConfigError(f"{found}: expected callbacks of transformers in a list. {remedy}.")


def _is_callback(value: Any) -> bool:
    return isinstance(value, TrainerCallback) or (isinstance(value, type) and issubclass(value, TrainerCallback))


def check_early_stopping(args: BaseTrainingArguments, callbacks: Iterable[Any]) -> None:
    """Make sure that there is something to stop by, before weights load.

    Raises:
        ConfigError: A callback stops early, and nothing is measured, or no metric is named.
    """
    if not any(isinstance(each, EarlyStoppingCallback) or each is EarlyStoppingCallback for each in callbacks):
        return
    if args.eval_strategy == "no":
        raise ConfigError(
            "EarlyStoppingCallback needs something to measure, and nothing is measured in this run: without an "
            "eval_dataset, or with eval_strategy='no'. Pass eval_dataset=... and eval_strategy='steps', or leave the "
            "callback out."
        )
    if not args.metric_for_best_model:
        raise ConfigError(
            "EarlyStoppingCallback needs a metric, and args.metric_for_best_model is None. Set it and "
            "load_best_model_at_end in args, e.g. to 'vdr_cosine_ndcg@10' and True."
        )


def check_host_arguments(args: BaseTrainingArguments, *, evaluates: bool, in_batch_negatives: bool) -> None:
    """Make sure that the host's arguments go with the data, before hours of training end in an error.

    Raises:
        ConfigError: Evaluation without an evaluation set, processes that would train apart, or a batch sampler that
            can't be saved with a checkpoint.

    Warns:
        UserWarning: The sampler knows nothing of relevance, and the loss takes documents of other rows as negatives.
    """
    require_connected(args)
    if args.eval_strategy != "no" and not evaluates:
        strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
        raise ConfigError(
            f"eval_strategy={strategy!r} needs something to measure. Pass eval_dataset=..., or leave eval_strategy out."
        )
    try:
        pickle.dumps(args.batch_sampler)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"args.batch_sampler={args.batch_sampler!r} can't be pickled, and every checkpoint stores it. Pass a class "
            "or a function of a module, such as ConflictFreeBatchSampler."
        ) from error
    sampler = args.batch_sampler
    is_conflict_free = isinstance(sampler, type) and issubclass(sampler, ConflictFreeBatchSampler)
    if in_batch_negatives and not is_conflict_free:
        warnings.warn(
            f"The batch sampler is {sampler!r}, which may put documents that are relevant to a query among its "
            "in-batch negatives. Pass batch_sampler=ConflictFreeBatchSampler to rule that out.",
            stacklevel=5,
        )


def require_connected(args: BaseTrainingArguments) -> None:
    """Make sure that the processes of torchrun train one model.

    Raises:
        ConfigError: The host takes each for the only one, as on a machine without an accelerator.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise ConfigError(
            f"WORLD_SIZE={started} processes were started, and with use_cpu={args.use_cpu} transformers does not "
            f"connect them on {args.device.type!r}: each would train apart. Pass use_cpu=True, or start it without "
            "torchrun."
        )


def check_full_batch(args: BaseTrainingArguments, rows_by_set: Mapping[str, int]) -> None:
    """Make sure that there is a batch where short ones are left out.

    Args:
        args: The host's arguments.
        rows_by_set: The number of rows of each training set by its name.

    Raises:
        ConfigError: A set has fewer rows than a batch.
    """
    name, rows = min(rows_by_set.items(), key=lambda each: each[1])
    if args.dataloader_drop_last and rows < args.train_batch_size:
        of_set = f" of {name!r}" if name else ""
        raise ConfigError(
            f"dataloader_drop_last leaves out short batches, and the {rows} training rows{of_set} don't fill one of "
            f"{args.train_batch_size}: there would be no step. Lower per_device_train_batch_size to {rows} or less, "
            f"e.g. {max(1, rows // 3)}, or leave dataloader_drop_last out."
        )


def check_contrast(batch_size: int, num_negatives: int) -> None:
    """Make sure that a loss of in-batch negatives has something to tell the relevant page from.

    Raises:
        ConfigError: A batch is one row, and rows have no negatives: the loss is zero whatever the model does.
    """
    if batch_size == 1 and num_negatives == 0:
        raise ConfigError(
            "Nothing can be learned: batches hold one row, and rows have no negatives, so the loss is always zero. Add "
            "queries, add negatives with num_negatives=1 or more, or raise per_device_train_batch_size."
        )


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
