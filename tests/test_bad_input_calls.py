"""Bad input to the two calls: each is refused by a named error, before weights load and before a run is deleted."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import (
    CrossEncoderTrainingArguments,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformerTrainingArguments,
)

from mmtune import ConfigError, MmtuneError, RetrievalDataset, finetune, finetune_reranker
from mmtune.testing import generated_pages, tiny_clip, tiny_llava
from mmtune.training.host_arguments import RANGES, check_host_values

Arguments = dict[str, Any]

NAN, INF = math.nan, math.inf
BIG = 10**6

OF_BOTH: list[tuple[Arguments, str]] = [
    # seeds
    *(({"seed": value}, r"seed=.*whole number") for value in (-1, 1.5, "7", None, 2**40, True, NAN, [1])),
    *(({"data_seed": value}, r"data_seed=.*whole number") for value in (-1, 1.5, "7", 2**40)),
    # rates
    *(({"learning_rate": value}, "learning_rate=.*a number of 0 or more") for value in (-1, NAN, INF, "1e-5", None)),
    *(({"learning_rate_mapping": value}, "learning_rate_mapping") for value in (5, {"(": 1.0}, {"a": "b"}, {"a": -1})),
    *(({"weight_decay": value}, "weight_decay=") for value in (-0.1, "0", NAN, None)),
    *(({"max_grad_norm": value}, "max_grad_norm=") for value in (-1, "1", NAN)),
    *(({"warmup_steps": value}, "warmup_steps=") for value in (-1, NAN, "10", None)),
    *(({"warmup_ratio": value}, "warmup_ratio=.*from 0 up to 1") for value in (-0.1, 1.5, "0.1", NAN)),
    *(({"adam_beta1": value}, "adam_beta1=") for value in (-1, 2, "0.9")),
    ({"adam_epsilon": -1e-8}, "adam_epsilon="),
    # steps and epochs
    *(({"max_steps": value}, "max_steps=.*whole number of 1 or more") for value in (0, -5, 1.5, "10", NAN, None)),
    *(({"num_train_epochs": value}, "num_train_epochs=.*above 0") for value in (0, -1, NAN, INF, "3", None, [1])),
    *(({"eval_steps": value}, "eval_steps=") for value in (0, -1, "often", NAN)),
    *(({"save_steps": value}, "save_steps=") for value in (0, -1, "often")),
    *(({"logging_steps": value}, "logging_steps=") for value in (0, NAN, "5")),
    *(({"save_total_limit": value}, "save_total_limit=") for value in (0, -1, "2", 1.5)),
    # sizes
    *(({"per_device_train_batch_size": value}, "per_device_train_batch_size=") for value in (0, 1.5, "8", None, True)),
    *(({"per_device_eval_batch_size": value}, "per_device_eval_batch_size=") for value in (0, -1, "8", 2.5)),
    *(({"gradient_accumulation_steps": value}, "gradient_accumulation_steps=") for value in (0, "2", 1.5)),
    *(({"dataloader_num_workers": value}, "dataloader_num_workers=") for value in (-1, "2", 1.5, None)),
    *(({"num_negatives": value}, "num_negatives=") for value in (-1, 1.5, "2", None, True, BIG)),
    *(({"max_pixels": value}, "max_pixels=") for value in (0, -1, "600", 1.5, True)),
    ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "don't fill one of 64"),
    # choices
    *(({"bf16": value}, "bf16=.*True or False") for value in ("yes", 1, None)),
    ({"bf16": True, "fp16": True}, "one precision"),
    *(({"optim": value}, "optim=") for value in ("adam", 5, "adamw_bnb_8bit")),
    *(({"lr_scheduler_type": value}, "lr_scheduler_type=") for value in ("cos", 5)),
    *(({"report_to": value}, "report_to=") for value in ("wand", 5, ["tensorbord"], "wandb")),
    *(({"save_strategy": value}, "save_strategy=") for value in ("never", 5)),
    *(({"deepspeed": value}, "deepspeed") for value in ("missing.json", {"stage": 2})),
    *(({"batch_sampler": value}, "batch_sampler=") for value in (5, "no_dupes", [])),
    *(({"multi_dataset_batch_sampler": value}, "multi_dataset_batch_sampler=") for value in (5, "robin")),
    *(({"router_mapping": value}, "router_mapping=") for value in (5, ["query"])),
    *(({"disable_tqdm": value}, "disable_tqdm=") for value in ("no", 1)),
    # the calls' own
    *(({"overwrite": value}, "overwrite=.*True or False") for value in ("no", 1, None)),
    *(({"allow_overlap": value}, "allow_overlap=.*True or False") for value in ("yes", 0, None)),
    *(({"resume": value}, "resume=.*True or False") for value in ("no", 1, None)),
    *(({"output_dir": value}, "output_dir=") for value in (5, b"run", ["run"], " ", "a\0b", {})),
    *(({"loss": value}, "loss=.*(is no loss|takes the model)") for value in (5, "mnrl", {}, lambda: None, list)),
    *(({"callbacks": value}, "callbacks") for value in (5, "early", [5], None, [Path])),
    *(({"evaluator": value}, "evaluator=") for value in (5, "vdr", [], RetrievalDataset)),
    *(({"freeze": value}, "freeze=") for value in ("vision", 5)),
    *(({"lora": value}, "lora=") for value in ("all", 5, {"r": 8})),
    *(({"documents": value}, "documents=") for value in ("movie", 5, None, ["image"])),
    *(({"prompts": value}, "prompts") for value in (5, ["find"], {"qery": "find"})),
    *(({"args": value}, "args is a") for value in (5, {"seed": 1}, "args")),
    *(({"train_dataset": value}, ".") for value in (None, 5, {}, [], {"mean": "x"})),
    *(({"eval_dataset": value}, ".") for value in (5, {}, [])),
    *(({"model": value}, ".") for value in (None, 5, "", "no/such/model/at/all")),
]  # fmt: skip

OF_FINETUNE: list[tuple[Arguments, str]] = [
    *(({"matryoshka_dims": value}, "matryoshka_dims") for value in (NAN, 5, "all", [0], [1.5], ["64"], [True], [])),
    *(({"mini_batch_size": value}, "mini_batch_size=") for value in (0, -1, 1.5, "all", None, True)),
    ({"prompts": {"image": "a: ", "negative_0": "b: "}}, "one prompt for each document"),
    ({"prompts": {"query": 5}}, "prompts has 5 for 'query'"),
    ({"loss": {"other": lambda model: None}}, r"loss has the names \['other'\]"),
]

OF_RERANKER: list[tuple[Arguments, str]] = [
    *(
        ({"directions": value}, "directions")
        for value in ((), "image_to_text", 5, None, ("x",), ("image_to_text",) * 2)
    ),
    *(({"num_candidates": value}, "num_candidates=") for value in (1, 0, 2.5, "10", None, True)),
]


def name_of(arguments: object) -> str:
    return ",".join(f"{name}={value!r:.20}" for name, value in arguments.items()) if isinstance(arguments, dict) else ""


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return generated_pages(6)


def with_broken_weights(folder: str) -> str:
    """The checkpoint without its numbers: whoever reads them gets another error than those of this table."""
    for path in Path(folder).rglob("*.safetensors"):
        path.write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def broken_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_broken_weights(tiny_clip(tmp_path_factory.mktemp("models") / "clip"))


@pytest.fixture(scope="module")
def broken_reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_broken_weights(tiny_llava(tmp_path_factory.mktemp("models") / "llava"))


def refuse(
    call: Callable[..., Any], model: str, rows: Dataset, folder: Path, arguments: Arguments, message: str
) -> None:
    """The call fails by name, and the run that the folder holds is as it was."""
    run = folder / "run"
    (run / "checkpoint-7").mkdir(parents=True)
    given = {"model": model, "train_dataset": rows, "output_dir": run, "overwrite": True, **arguments}
    with pytest.raises(MmtuneError, match=message) as caught:
        call(**given)
    assert "weights of" not in str(caught.value)
    assert (run / "checkpoint-7").is_dir()


@pytest.mark.filterwarnings("ignore:The batch sampler is")
@pytest.mark.parametrize(("arguments", "message"), [*OF_BOTH, *OF_FINETUNE], ids=name_of)
def test_finetune(rows: Dataset, broken_clip: str, tmp_path: Path, arguments: Arguments, message: str) -> None:
    refuse(finetune, broken_clip, rows, tmp_path, arguments, message)


@pytest.mark.parametrize(("arguments", "message"), [*OF_BOTH, *OF_RERANKER], ids=name_of)
def test_finetune_reranker(
    rows: Dataset, broken_reranker: str, tmp_path: Path, arguments: Arguments, message: str
) -> None:
    refuse(finetune_reranker, broken_reranker, rows, tmp_path, arguments, message)


@pytest.mark.parametrize(
    "arguments_class",
    [SentenceTransformerTrainingArguments, CrossEncoderTrainingArguments, MultiVectorEncoderTrainingArguments],
)
def test_what_the_host_has_by_itself_passes(arguments_class: Any, tmp_path: Path) -> None:
    built = arguments_class(output_dir=str(tmp_path))
    values = {name: getattr(built, name) for name in RANGES if hasattr(built, name)}
    assert check_host_values(arguments_class, values) == values
    given = {"learning_rate": np.float32(0.5), "max_steps": np.int64(3), "report_to": "none", "optim": "adamw_torch"}
    checked = check_host_values(arguments_class, given)
    assert [type(value) for value in checked.values()] == [float, int, str, str]


def test_args_of_the_caller_are_checked_too(rows: Dataset, broken_clip: str, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path))
    for name, value in (
        ("learning_rate", -1.0),
        ("seed", 2**40),
        ("per_device_eval_batch_size", 0),
        ("batch_sampler", 5),
    ):
        broken = SentenceTransformerTrainingArguments(output_dir=str(tmp_path))
        setattr(broken, name, value)
        with pytest.raises(ConfigError, match=f"{name}="):
            finetune(broken_clip, rows, args=broken)
    assert args.learning_rate > 0
