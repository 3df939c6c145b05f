"""Values of the host's training arguments: what each can be, before the host builds anything from them.

The types come from the fields of the host's class, the ranges from the table here.
"""

import dataclasses
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from sentence_transformers.base.training_args import BaseTrainingArguments
from transformers.integrations import get_available_reporting_integrations

from mmtune.arguments import is_whole, nearest_name, require_one_of
from mmtune.errors import ConfigError, MissingExtraError
from mmtune.host import tracker_names

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy takes, which the host seeds too."""


@dataclass(frozen=True)
class Range:
    """The numbers that an argument can be.

    Attributes:
        least: The smallest, or what it must be above.
        most: The largest.
        is_open: Whether ``least`` itself is out.
        besides: A number outside that means something, such as -1 for "not set".
    """

    least: float = 0
    most: float = math.inf
    is_open: bool = False
    besides: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` is one of them; no NaN and no infinity is."""
        inside = self.least < value if self.is_open else self.least <= value
        return math.isfinite(value) and (value == self.besides or (inside and value <= self.most))

    def describe(self, noun: str) -> str:
        """The numbers in words, for a message."""
        if math.isfinite(self.most):
            words = f"{noun} {'above' if self.is_open else 'from'} {self.least:g} up to {int(self.most)}"
        else:
            words = f"{noun} above {self.least:g}" if self.is_open else f"{noun} of {self.least:g} or more"
        return words if self.besides is None else f"{words}, or {self.besides:g} for none"


_ANY = Range(-math.inf)
_POSITIVE, _COUNT, _SHARE = Range(is_open=True), Range(1), Range(most=1)

RANGES: Mapping[str, Range] = {
    "learning_rate": Range(),
    "num_train_epochs": _POSITIVE,
    "max_steps": Range(1, besides=-1),
    "warmup_steps": Range(),
    "warmup_ratio": _SHARE,
    "weight_decay": Range(),
    "max_grad_norm": Range(),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _POSITIVE,
    "label_smoothing_factor": _SHARE,
    "neftune_noise_alpha": Range(),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "logging_steps": _POSITIVE,
    "eval_delay": Range(),
    "save_total_limit": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "dataloader_num_workers": Range(),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_timeout": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "seed": Range(most=MAX_SEED),
    "data_seed": Range(most=MAX_SEED),
}

_LEFT_TO_HOST = ("fsdp", "debug", "parallelism_config", "accelerator_config", "trackio_static_space_id")
"""What the host takes in more forms than the types of its fields say."""

_PACKAGE_OF_OPTIMIZER: Mapping[str, tuple[str, str]] = {
    r"adamw_8bit|.*bnb.*|ademamix.*|lion_.*|paged_.*": ("bitsandbytes", "bitsandbytes"),
    r"galore_.*": ("galore_torch", "galore-torch"),
    r".*lomo": ("lomo_optim", "lomo-optim"),
    r"grokadamw": ("grokadamw", "grokadamw"),
    r"schedule_free_.*": ("schedulefree", "schedulefree"),
    r"apollo_.*": ("apollo_torch", "apollo-torch"),
    r"adamw_torch_(4|8)bit": ("torchao", "torchao"),
    r"adamw_anyprecision": ("torchdistx", "torchdistx"),
    r"stable_adamw": ("optimi", "torch-optimi"),
}
"""What an optimizer of transformers needs: the module to look for, and the package that has it."""


def check_host_values(arguments_class: type[BaseTrainingArguments], values: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments by name with values that can be, NumPy's numbers as Python's.

    Args:
        arguments_class: The host's class, which says the types.
        values: By the names of its fields.

    Raises:
        ConfigError: A value is of another type or out of its range; the message says what was expected.
        MissingExtraError: A value needs a package that is not installed.
    """
    hints = _type_hints(arguments_class)
    checked = {}
    for name, value in values.items():
        checked[name] = value if name in _LEFT_TO_HOST else _require_type(name, value, _alternatives(hints[name]))
        if name in _OWN_CHECKS and value is not None:
            _OWN_CHECKS[name](name, checked[name])
    return checked


def check_built_values(args: BaseTrainingArguments) -> None:
    """The same for arguments that the caller built, as far as the host left the values as they were given.

    Raises:
        ConfigError: A number or a sampler can't be.
    """
    names = {*RANGES, "batch_sampler", "multi_dataset_batch_sampler", "router_mapping", "learning_rate_mapping"}
    values = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    check_host_values(type(args), values)


@cache
def _type_hints(arguments_class: type) -> dict[str, Any]:
    return typing.get_type_hints(arguments_class)


_SAMPLERS = (DefaultBatchSampler, MultiDatasetDefaultBatchSampler)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union; ``hint`` itself where it is none."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _require_type(name: str, value: Any, alternatives: list[Any]) -> Any:
    plain = [typing.get_origin(each) or each for each in alternatives]
    if value is None and type(None) in plain:
        return None
    enums = [each for each in plain if isinstance(each, type) and issubclass(each, Enum)]
    if enums and isinstance(value, str | enums[0]):
        require_one_of(name, getattr(value, "value", value), [member.value for member in enums[0]])
        return value
    if bool in plain and isinstance(value, bool | np.bool_):
        return bool(value)
    if (int in plain or float in plain) and not isinstance(value, bool | np.bool_ | str):
        return _require_in_range(name, value, is_count=float not in plain)
    matching: dict[Any, Any] = {str: str | os.PathLike, dict: Mapping, list: list | tuple}
    if not enums and any(isinstance(value, matching[each]) for each in plain if each in matching):
        return value
    if Callable in plain and (callable(value) or isinstance(value, _SAMPLERS)):
        return value
    if not any(each in (bool, int, float, *matching) for each in plain):
        return value  # an object of another package, which the host knows
    raise ConfigError(f"{name}={value!r}: expected {_describe(name, plain, enums)}.")


def _require_in_range(name: str, value: Any, *, is_count: bool) -> Any:
    bounds = RANGES.get(name, _ANY)
    is_number = is_whole(value) if is_count else isinstance(value, numbers.Real)
    if not is_number or not bounds.holds(float(value)):
        raise ConfigError(f"{name}={value!r}: expected {_describe(name, [int if is_count else float], [])}.")
    return int(value) if is_whole(value) else float(value)


def _describe(name: str, plain: Iterable[Any], enums: list[Any]) -> str:
    words = []
    for each in plain:
        if each in (int, float):
            noun = "a whole number" if each is int else "a number"
            words.append(RANGES[name].describe(noun) if name in RANGES else noun)
        elif each in enums:
            words.append("one of " + ", ".join(repr(member.value) for member in each))
        elif not (each is str and (enums or Callable in plain)):
            words.append(_WORDS.get(each, getattr(each, "__name__", str(each))))
    return " or ".join(dict.fromkeys(words))


_WORDS: Mapping[Any, str] = {
    bool: "True or False",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    type(None): "None",
    Callable: "a class of batch samplers",
    DefaultBatchSampler: "a class of batch samplers",
    MultiDatasetDefaultBatchSampler: "a class of batch samplers",
}


def _check_rates(name: str, mapping: Any) -> None:
    """Make sure of a learning rate for each pattern of parameter names."""
    if not isinstance(mapping, Mapping):
        return  # a text, which the host parses
    for pattern, rate in mapping.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"{name} has the key {pattern!r}, which is no regular expression ({error}). Expected patterns of "
                r"parameter names, e.g. {r'projection\.': 1e-4}."
            ) from error
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not Range().holds(float(rate)):
            raise ConfigError(f"{name}[{pattern!r}]={rate!r}: expected a learning rate, a number of 0 or more.")


def _check_trackers(name: str, given: Any) -> None:
    """Make sure that the host can report to what was named."""
    known = ["all", "none", *tracker_names()]
    for tracker in [given] if isinstance(given, str) else given:
        require_one_of(name, tracker, known)
        if tracker not in ("all", "none", *get_available_reporting_integrations()):
            raise MissingExtraError(
                f"{name}={given!r} needs a package that is not installed. Install what the host names for {tracker!r}, "
                'or pass report_to="none".'
            )


def _check_optimizer(name: str, given: Any) -> None:
    """Make sure that the package of an optimizer is installed."""
    value = str(getattr(given, "value", given))
    for pattern, (module, package) in _PACKAGE_OF_OPTIMIZER.items():
        if re.fullmatch(pattern, value) and find_spec(module) is None:
            raise MissingExtraError(
                f"{name}={value!r} needs {package}, which is not installed. Run: pip install {package}. Or leave "
                f"{name} out for AdamW of torch."
            )


def _check_deepspeed(name: str, given: Any) -> None:
    """Make sure of the package, and of the file of settings."""
    if find_spec("deepspeed") is None:
        raise MissingExtraError(
            f"{name}={given!r} needs deepspeed, which is not installed. Run: pip install deepspeed."
        )


_OWN_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "learning_rate_mapping": _check_rates,
    "report_to": _check_trackers,
    "optim": _check_optimizer,
    "deepspeed": _check_deepspeed,
}

# Names

_MEANT: Mapping[str, str] = {
    typed: meant
    for meant, names in {
        "learning_rate": "lr rate learn_rate",
        "num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs",
        "max_steps": "steps num_steps num_train_steps total_steps train_steps",
        "per_device_train_batch_size": "batch_size batch bs train_batch_size per_gpu_train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size test_batch_size",
        "gradient_accumulation_steps": "grad_accum accumulation_steps gradient_accumulation accumulate_grad_batches",
        "warmup_steps": "warmup num_warmup_steps",
        "weight_decay": "wd decay",
        "max_grad_norm": "clip grad_clip max_norm gradient_clip_val",
        "optim": "optimizer optimiser",
        "lr_scheduler_type": "scheduler lr_scheduler schedule",
        "dataloader_num_workers": "num_workers workers n_workers",
        "bf16": "precision mixed_precision amp",
        "eval_strategy": "evaluation_strategy",
        "eval_steps": "evaluation_steps eval_every",
        "save_steps": "save_every checkpoint_steps",
        "logging_steps": "log_every log_steps",
        "report_to": "wandb tensorboard logger tracker",
        "disable_tqdm": "show_progress_bar progress_bar progress verbose quiet",
        "hub_model_id": "repo_id hub_id repo",
        "use_cpu": "device cpu no_cuda",
        "callbacks": "callback early_stopping patience early_stopping_patience",
        "evaluator": "evaluators metrics compute_metrics",
        "eval_dataset": "eval eval_data eval_set test_dataset test_data val_dataset val_data validation_dataset "
        "evaluation_dataset",
        "train_dataset": "dataset data train_data training_dataset train",
        "output_dir": "out output output_folder output_path save_dir save_path",
        "num_negatives": "negatives n_negatives num_hard_negatives hard_negatives",
        "matryoshka_dims": "dims dimensions matryoshka truncate_dims truncate_dim",
        "mini_batch_size": "mini_batch minibatch_size micro_batch_size",
        "max_pixels": "image_size resolution pixels max_image_pixels max_image_size",
        "loss": "loss_fn loss_function criterion",
        "lora": "peft peft_config use_lora lora_config adapter adapters",
        "freeze": "frozen freeze_layers freeze_vision",
        "overwrite": "force exist_ok replace overwrite_output_dir",
        "resume": "resume_from continue_training",
        "seed": "random_state random_seed",
        "prompts": "prompt instruction instructions",
        "directions": "direction",
        "documents": "document modality modalities",
        "args": "training_args training_arguments arguments",
    }.items()
    for typed in names.split()
}
"""What people type for an argument that has another name."""


def hint_for(name: str, own: Iterable[str], arguments_class: type[BaseTrainingArguments]) -> str:
    """What was probably meant by the name of an argument that there is not, as a sentence.

    Args:
        name: What was typed.
        own: The arguments of the function itself.
        arguments_class: The host's, whose fields are arguments too.
    """
    if name in ("max_length", "max_seq_length", "max_seq_len"):
        return "It belongs to the model: set model.max_seq_length, and pass that model."
    if name in ("dtype", "torch_dtype"):
        return f"It belongs to the model: load it with {name.removeprefix('torch_')}=..., and pass that model."
    known = {*own, *(field.name for field in dataclasses.fields(arguments_class) if field.init)}
    meant = _MEANT.get(name.lower())
    meant = meant if meant in known else nearest_name(name, known - {"local_rank"}, cutoff=0.6)
    if meant:
        return f"Did you mean {meant!r}?"
    return f"Training arguments are the fields of {arguments_class.__name__}, e.g. learning_rate, num_train_epochs."
