"""Mistakes that newcomers make, each with the message that helps: the value, what was expected, and the next step."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mmtune import MmtuneError, finetune, finetune_reranker
from mmtune.testing import generated_pages, tiny_clip
from mmtune.training.host_arguments import hint_for
from mmtune.training.trainers import EMBEDDING

Change = Callable[[Dataset], Any]


def without_column(name: str) -> Change:
    return lambda rows: rows.remove_columns(name)


MISTAKES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    # names
    ("another name for the rate", {"lr": 1e-4}, ("'lr'", "'learning_rate'")),
    ("another name for the batch", {"batch_size": 8}, ("'batch_size'", "'per_device_train_batch_size'")),
    ("another name for epochs", {"epochs": 3}, ("'epochs'", "'num_train_epochs'")),
    ("another name for epochs, longer", {"num_epochs": 3}, ("'num_epochs'", "'num_train_epochs'")),
    ("the evaluation's batch", {"eval_batch_size": 1}, ("'eval_batch_size'", "'per_device_eval_batch_size'")),
    ("a length of texts", {"max_length": 512}, ("'max_length'", "model.max_seq_length")),
    ("a slip of the pen", {"learning_rte": 1e-4}, ("'learning_rte'", "'learning_rate'")),
    ("nothing like it", {"zzz": 1}, ("'zzz'", "SentenceTransformerTrainingArguments", "num_train_epochs")),
    ("early stopping", {"early_stopping_patience": 3}, ("'early_stopping_patience'", "'callbacks'")),
    # values
    ("a rate as text", {"learning_rate": "1e-5"}, ("learning_rate='1e-5'", "a number of 0 or more")),
    ("a negative rate", {"learning_rate": -2e-5}, ("learning_rate=-2e-05", "a number of 0 or more")),
    ("no steps", {"max_steps": 0}, ("max_steps=0", "1 or more", "-1 for none")),
    ("half a seed", {"seed": 4.2}, ("seed=4.2", "whole number")),
    ("no as a text", {"overwrite": "no"}, ("overwrite='no'", "True or False")),
    ("a tracker that is not there", {"report_to": "wandb"}, ("'wandb'", "not installed", 'report_to="none"')),
    ("an optimizer that is not there", {"optim": "adamw_bnb_8bit"}, ("bitsandbytes", "pip install bitsandbytes")),
    ("an unknown optimizer", {"optim": "adam"}, ("optim='adam'", "'adamw_torch'")),
    ("more negatives than pages", {"num_negatives": 500}, ("num_negatives=500", "7 documents", "1 to 4")),
    ("a loss by name", {"loss": "mnrl"}, ("loss='mnrl'", "loss=lambda model: MyLoss(model)")),
    ("a loss that takes nothing", {"loss": lambda: None}, ("can't be called with the model", "lambda model:")),
    ("a part by its bare name", {"freeze": "vision"}, ("freeze='vision'", 'freeze=("vision",)')),
    ("dimensions as a number", {"matryoshka_dims": 256}, ("matryoshka_dims=256", "list or tuple")),
    ("an evaluator class", {"evaluator": dict}, ("evaluator=<class 'dict'>", "build_evaluator(dataset)")),
    ("a callback alone", {"callbacks": 3}, ("callbacks=3", "callbacks=[EarlyStoppingCallback(3)]")),
    ("prompts for no column", {"prompts": {"qery": "find: "}}, ("'qery'", "'query', 'image'")),
    ("evaluation without data", {"eval_strategy": "epoch"}, ("eval_strategy='epoch'", "Pass eval_dataset")),
    ("resuming nothing", {"resume": True}, ("resume=True", "no checkpoint to go on from")),
    ("too few rows", {"dataloader_drop_last": True, "per_device_train_batch_size": 32}, ("32", "to 6 or less")),
    ("texts that are not there", {"documents": "text"}, ("documents='text'", "needs a column 'text'")),
    ("a model that is not there", {"model": "no/such/model/here"}, ("no/such/model/here",)),
    ("a folder that is a number", {"output_dir": 5}, ("output_dir=5", "path of a folder")),
    ("the same data twice", {"eval_dataset": "same"}, ("relevant in training and in evaluation", "split")),
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_clip(tmp_path_factory.mktemp("models") / "clip")
    for path in Path(folder).rglob("*.safetensors"):
        path.write_bytes(b"broken")
    return folder


@pytest.mark.parametrize(("arguments", "parts"), [pytest.param(*rest, id=name) for name, *rest in MISTAKES])
def test_a_mistake_gets_a_message_that_helps(
    clip: str, tmp_path: Path, arguments: dict[str, Any], parts: tuple[str, ...]
) -> None:
    rows = generated_pages(6)
    given = {name: rows if value == "same" else value for name, value in arguments.items()}
    with pytest.raises(MmtuneError, match=re.escape(parts[0])) as caught:
        finetune(**{"model": clip, "train_dataset": rows, "output_dir": tmp_path / "run", **given})
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert len(message) < 1200


def test_rerankers_get_the_same_hints(tmp_path: Path) -> None:
    with pytest.raises(MmtuneError, match=r"expected a CrossEncoder|Expected a CrossEncoder"):
        finetune_reranker(5, generated_pages(6), output_dir=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("typed", ["lr", "rate", "bs", "wd", "steps", "scheduler", "device", "amp", "patience"])
def test_no_hint_is_a_neighbour_by_spelling_alone(typed: str) -> None:
    hint = hint_for(typed, {"callbacks", "evaluator"}, EMBEDDING.arguments_class)
    assert "local_rank" not in hint
    assert hint.startswith("Did you mean")
