"""Values of the host's training arguments: what each can be, before the host builds anything from them.

The types come from the fields of the host's class, the ranges from the table here.
"""

import dataclasses
import inspect
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from sentence_transformers.base.training_args import BaseTrainingArguments
from transformers.integrations import get_available_reporting_integrations

from mmtune.arguments import advise_flag, advise_number, is_whole, nearest_name, require_one_of
from mmtune.errors import ConfigError, MissingExtraError
from mmtune.host import tracker_names
from mmtune.training.trainers import Kind

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
        otherwise: What a message tells to pass where nothing near the value fits; a text is the whole sentence.
    """

    least: float = 0
    most: float = math.inf
    is_open: bool = False
    besides: float | None = None
    otherwise: float | str = 1

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
_POSITIVE, _COUNT, _SHARE = Range(is_open=True), Range(1), Range(most=1, otherwise=0.1)
_INTERVAL = Range(is_open=True, otherwise=0.1)  # steps, or a share of them below 1
_NO_STEPS = (
    "Leave it out to train for num_train_epochs. To measure without training, call build_evaluator(dataset)(model), or "
    "build_reranking_evaluator(dataset)(model) for a reranker."
)

RANGES: Mapping[str, Range] = {
    "learning_rate": Range(otherwise=2e-5),
    "num_train_epochs": _POSITIVE,
    "max_steps": Range(1, besides=-1, otherwise=_NO_STEPS),
    "warmup_steps": Range(),
    "warmup_ratio": _SHARE,
    "weight_decay": Range(),
    "max_grad_norm": Range(),
    "adam_beta1": Range(most=1, otherwise=0.9),
    "adam_beta2": Range(most=1, otherwise=0.999),
    "adam_epsilon": Range(is_open=True, otherwise=1e-8),
    "label_smoothing_factor": _SHARE,
    "neftune_noise_alpha": Range(),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "eval_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "logging_steps": _INTERVAL,
    "eval_delay": Range(),
    "save_total_limit": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "dataloader_num_workers": Range(),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_timeout": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "seed": Range(most=MAX_SEED, otherwise=42),
    "data_seed": Range(most=MAX_SEED, otherwise=42),
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
    r"adamw_torch_npu_fused": ("torch_npu", "torch-npu"),
    r"adamw_torch_xla": ("torch_xla", "torch-xla"),
}
"""What an optimizer of transformers needs: the module to look for, and the package that has it."""

_PACKAGE_OF_TRACKER: Mapping[str, str] = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
}
"""What a tracker of transformers needs, where the package has another name."""


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
    raise _refusal(name, value, plain, enums)


def _require_in_range(name: str, value: Any, *, is_count: bool) -> Any:
    if not _fits(name, value, is_count=is_count):
        raise _refusal(name, value, [int if is_count else float], [])
    return int(value) if is_whole(value) else float(value)


def _fits(name: str, value: Any, *, is_count: bool) -> bool:
    is_number = is_whole(value) if is_count else isinstance(value, numbers.Real)
    return is_number and RANGES.get(name, _ANY).holds(float(value))


def _refusal(name: str, value: Any, plain: list[Any], enums: list[Any]) -> ConfigError:
    """The error of a value that can't be: what was expected, and a value that can be where it is a number or a flag."""
    advice = ""
    if int in plain or float in plain:
        fits = partial(_fits, name, is_count=float not in plain)
        advice = " " + advise_number(name, value, fits, RANGES.get(name, _ANY).otherwise)
    elif bool in plain:
        advice = " " + advise_flag(name, value)
    return ConfigError(f"{name}={value!r}: expected {_describe(name, plain, enums)}.{advice}")


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
            raise ConfigError(
                f"{name}[{pattern!r}]={rate!r}: expected a learning rate, a number of 0 or more, e.g. 1e-4."
            )


_WITHOUT_TRACKER = 'Or pass report_to="none" to report to nothing.'


def _check_trackers(name: str, given: Any) -> None:
    """Make sure that the host can report to what was named."""
    known = ["all", "none", *tracker_names()]
    for tracker in [given] if isinstance(given, str) else given:
        require_one_of(name, tracker, known)
        if tracker in ("all", "none", *get_available_reporting_integrations()):
            continue
        wrong = f"{name}={given!r} needs"
        if tracker == "kubeflow":
            raise ConfigError(f"{wrong} a job of Kubeflow, which sets KUBEFLOW_TRAINER_SERVER_URL. {_WITHOUT_TRACKER}")
        package = _PACKAGE_OF_TRACKER.get(tracker, tracker)
        raise MissingExtraError(
            f"{wrong} {package}, which is not installed. Run: pip install {package}. {_WITHOUT_TRACKER}"
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
        "use_cpu": "cpu no_cuda",
        "callbacks": "callback",
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


_ADVICE: Mapping[str, str] = {
    name: advice
    for names, advice in {
        "max_length max_seq_length max_seq_len": "The length belongs to the model: model = {load}(path); "
        "model.max_seq_length = 77, up to what the model reads, and pass that model.",
        "early_stopping early_stopping_patience patience": "Pass eval_dataset=... and "
        "callbacks=[transformers.EarlyStoppingCallback(3)], which ends the run when 3 measurements in a row bring "
        "nothing.",
        "device": "The training takes the first GPU that it sees: start it with CUDA_VISIBLE_DEVICES=1 in the "
        "environment for another one, or pass use_cpu=True to train on the CPU.",
        "mini_batch_size": "It is an argument of finetune, for its cached loss. A reranker takes less memory with "
        "per_device_train_batch_size=4, gradient_accumulation_steps=8.",
        "matryoshka_dims": "It is an argument of finetune: a reranker gives scores, and no embeddings to shorten. "
        "Leave it out.",
        "directions num_candidates": "It is an argument of finetune_reranker. Leave it out.",
    }.items()
    for name in names.split()
}
"""What to do in place of an argument that there is not, and that no other one stands for."""


def hint_for(name: str, value: object, own: Iterable[str], kind: Kind) -> str:
    """What was probably meant by the name of an argument that there is not, as a sentence or two.

    Args:
        name: What was typed.
        value: What was given to it.
        own: The arguments of the function itself.
        kind: The kind of model, whose training arguments are arguments too.
    """
    typed, load = name.lower(), kind.load.__name__
    if typed in _ADVICE:
        return _ADVICE[typed].format(load=load)
    if name in inspect.signature(kind.load).parameters:
        return f"It belongs to the model: model = {load}(path, {name}={value!r:.80}), and pass that model."
    known = {*own, *(field.name for field in dataclasses.fields(kind.arguments_class) if field.init)}
    meant = _MEANT.get(typed)
    meant = meant if meant in known else nearest_name(name, known - {"local_rank"}, cutoff=0.6)
    if meant:
        return f"Did you mean {meant!r}?"
    return (
        "Leave it out. Training arguments are e.g. learning_rate and num_train_epochs; "
        f"help(sentence_transformers.{kind.arguments_class.__name__}) lists them all."
    )
