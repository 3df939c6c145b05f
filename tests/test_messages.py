"""Mistakes that newcomers make, each with the message that helps: the value, what was expected, and the next step."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from sentence_transformers.cross_encoder import losses as reranking_losses
from sentence_transformers.sentence_transformer import losses as embedding_losses

from mmtune import MmtuneError, build_evaluator, build_reranking_evaluator, finetune, finetune_reranker
from mmtune.testing import generated_pages, tiny_clip, tiny_llava
from mmtune.training.host_arguments import hint_for
from mmtune.training.trainers import EMBEDDING

Arguments = dict[str, Any]
STOPPING = transformers.EarlyStoppingCallback(3)

MISTAKES: list[tuple[str, Arguments, tuple[str, ...], Arguments | None]] = [
    # What it is, what was passed, what the message holds, and the step that it names; None where that is no argument.
    # names
    ("another name for the rate", {"lr": 1e-4}, ("'lr'", "'learning_rate'"), {"learning_rate": 1e-4}),
    (
        "another name for the batch",
        {"batch_size": 8},
        ("'batch_size'", "'per_device_train_batch_size'"),
        {"per_device_train_batch_size": 8},
    ),
    ("another name for epochs", {"epochs": 3}, ("'epochs'", "'num_train_epochs'"), {"num_train_epochs": 3}),
    (
        "another name for epochs, longer",
        {"num_epochs": 3},
        ("'num_epochs'", "'num_train_epochs'"),
        {"num_train_epochs": 3},
    ),
    (
        "the evaluation's batch",
        {"eval_batch_size": 1},
        ("'eval_batch_size'", "'per_device_eval_batch_size'"),
        {"per_device_eval_batch_size": 1},
    ),
    (
        "a length of texts",
        {"max_length": 512},
        ("'max_length'", "model = load_model(path); model.max_seq_length = 77", "up to what the model reads"),
        None,
    ),
    ("a device", {"device": "cuda:1"}, ("'device'", "CUDA_VISIBLE_DEVICES=1", "use_cpu=True"), {"use_cpu": True}),
    (
        "an argument of the model",
        {"attention": "sdpa"},
        ("'attention'", "model = load_model(path, attention='sdpa')"),
        None,
    ),
    (
        "an argument of the other call",
        {"directions": ["text_to_image"]},
        ("'directions'", "finetune_reranker", "Leave it out"),
        {},
    ),
    ("a slip of the pen", {"learning_rte": 1e-4}, ("'learning_rte'", "'learning_rate'"), {"learning_rate": 1e-4}),
    (
        "nothing like it",
        {"zzz": 1},
        ("'zzz'", "Leave it out", "help(sentence_transformers.SentenceTransformerTrainingArguments)"),
        {},
    ),
    (
        "early stopping",
        {"early_stopping_patience": 3},
        ("'early_stopping_patience'", "Pass eval_dataset=... and callbacks=[transformers.EarlyStoppingCallback(3)]"),
        {"eval_dataset": "others", "callbacks": [STOPPING]},
    ),
    # values
    (
        "a rate as text",
        {"learning_rate": "1e-5"},
        ("learning_rate='1e-5'", "a number of 0 or more", "Pass e.g. learning_rate=1e-05, without quotes"),
        {"learning_rate": 1e-05},
    ),
    (
        "a rate in words",
        {"learning_rate": "low"},
        ("learning_rate='low'", "Pass e.g. learning_rate=2e-05, without quotes"),
        {"learning_rate": 2e-05},
    ),
    (
        "a negative rate",
        {"learning_rate": -2e-5},
        ("learning_rate=-2e-05", "a number of 0 or more", "Pass e.g. learning_rate=2e-05."),
        {"learning_rate": 2e-05},
    ),
    (
        "no steps",
        {"max_steps": 0},
        (
            "max_steps=0",
            "1 or more",
            "-1 for none",
            "Leave it out to train for num_train_epochs",
            "build_evaluator(dataset)(model)",
        ),
        {},
    ),
    (
        "half a batch",
        {"per_device_train_batch_size": 2.5},
        ("per_device_train_batch_size=2.5", "Pass e.g. per_device_train_batch_size=2."),
        {"per_device_train_batch_size": 2},
    ),
    ("half a seed", {"seed": 4.2}, ("seed=4.2", "whole number", "Pass e.g. seed=4."), {"seed": 4}),
    (
        "no as a text",
        {"overwrite": "no"},
        ("overwrite='no'", "True or False", "Pass overwrite=False, without quotes"),
        {"overwrite": False},
    ),
    (
        "a flag of the host as a text",
        {"use_cpu": "cpu"},
        ("use_cpu='cpu'", "Pass use_cpu=True, without quotes"),
        {"use_cpu": True},
    ),
    (
        "resuming as a text",
        {"resume": "yes"},
        ("resume='yes'", "True or False or 'auto'", "Pass resume=True, without quotes"),
        {"resume": "auto"},
    ),
    (
        "a tracker that is not there",
        {"report_to": "wandb"},
        ("report_to='wandb'", "not installed", "Run: pip install wandb", 'report_to="none"'),
        {"report_to": "none"},
    ),
    (
        "a tracker of another package",
        {"report_to": ["flyte"]},
        ("report_to=['flyte']", "Run: pip install flytekit"),
        {"report_to": "none"},
    ),
    (
        "a tracker that needs no package",
        {"report_to": "kubeflow"},
        ("report_to='kubeflow'", "KUBEFLOW_TRAINER_SERVER_URL", 'report_to="none"'),
        {"report_to": "none"},
    ),
    ("a misspelled tracker", {"report_to": "wandbb"}, ("report_to='wandbb'", "Did you mean 'wandb'?"), None),
    (
        "an optimizer that is not there",
        {"optim": "adamw_bnb_8bit"},
        ("bitsandbytes", "pip install bitsandbytes", "leave optim out"),
        {},
    ),
    (
        "an optimizer of other hardware",
        {"optim": "adamw_torch_npu_fused"},
        ("optim='adamw_torch_npu_fused'", "torch-npu", "leave optim out"),
        {},
    ),
    (
        "another optimizer of other hardware",
        {"optim": "adamw_torch_xla"},
        ("optim='adamw_torch_xla'", "torch-xla", "leave optim out"),
        {},
    ),
    (
        "an unknown optimizer",
        {"optim": "adam"},
        ("optim='adam'", "Did you mean 'adamw_torch'?", "'adafactor' and 36 more"),
        {"optim": "adamw_torch"},
    ),
    (
        "more negatives than pages",
        {"num_negatives": 500},
        ("num_negatives=500", "7 documents", "1 to 4", "6 at most"),
        {"num_negatives": 4},
    ),
    ("a loss by name", {"loss": "mnrl"}, ("loss='mnrl'", "loss=lambda model: MyLoss(model)"), {}),
    ("a loss that takes nothing", {"loss": lambda: None}, ("can't be called with the model", "lambda model:"), None),
    (
        "a part by its bare name",
        {"freeze": "vision"},
        ("freeze='vision'", 'freeze=("vision",)'),
        {"freeze": ("vision",)},
    ),
    (
        "dimensions as a number",
        {"matryoshka_dims": 256},
        (
            "matryoshka_dims=256",
            "list or tuple",
            "Pass e.g. matryoshka_dims=[256, 128], the dimension of the model itself first",
        ),
        {"matryoshka_dims": [256, 128]},
    ),
    ("an evaluator class", {"evaluator": dict}, ("evaluator=<class 'dict'>", "build_evaluator(dataset)"), None),
    (
        "a number for callbacks",
        {"callbacks": 3},
        ("callbacks=3", "callbacks=[transformers.EarlyStoppingCallback(3)]"),
        None,
    ),
    (
        "a callback alone",
        {"callbacks": STOPPING, "eval_dataset": "others"},
        ("callbacks=<transformers", "Put it in one: [EarlyStoppingCallback(...)]"),
        {"callbacks": [STOPPING], "eval_dataset": "others"},
    ),
    (
        "stopping early by nothing",
        {"callbacks": [STOPPING]},
        ("EarlyStoppingCallback", "something to measure", "Pass eval_dataset"),
        {"callbacks": [STOPPING], "eval_dataset": "others"},
    ),
    (
        "stopping early without measuring",
        {"callbacks": [transformers.EarlyStoppingCallback], "eval_dataset": "others", "eval_strategy": "no"},
        ("EarlyStoppingCallback", 'without eval_strategy="no"'),
        {"callbacks": [STOPPING], "eval_dataset": "others"},
    ),
    (
        "a loss of rerankers",
        {"loss": reranking_losses.LambdaLoss},
        ("loss=LambdaLoss", "can't train a SentenceTransformer", "sentence_transformers.sentence_transformer.losses"),
        {},
    ),
    (
        "an evaluator of rerankers",
        {"evaluator": "reranking"},
        (
            "evaluator is a RerankingEvaluator",
            "can't measure a SentenceTransformer",
            "evaluator=build_evaluator(dataset)",
        ),
        {"evaluator": "retrieval"},
    ),
    (
        "prompts for no column",
        {"prompts": {"qery": "find: "}},
        ("'qery'", "'query', 'image'", "e.g. prompts={'query': 'find: '}"),
        {"prompts": {"query": "find: "}},
    ),
    (
        "evaluation without data",
        {"eval_strategy": "epoch"},
        ("eval_strategy='epoch'", "Pass eval_dataset=..., or leave eval_strategy out"),
        {},
    ),
    (
        "resuming nothing",
        {"resume": True},
        ("resume=True", "no checkpoint to go on from", "start over without resume"),
        {},
    ),
    (
        "too few rows",
        {"dataloader_drop_last": True, "per_device_train_batch_size": 32},
        ("32", "to 6 or less"),
        {"dataloader_drop_last": True, "per_device_train_batch_size": 6},
    ),
    (
        "texts that are not there",
        {"documents": "text"},
        ("documents='text'", "needs a column 'text'", "or pass documents='image'"),
        {"documents": "image"},
    ),
    ("a model that is not there", {"model": "no/such/model/here"}, ("no/such/model/here", "Correct the path"), {}),
    ("a number for a model", {"model": 5}, ("model=5", "expected a SentenceTransformer"), None),
    (
        "a folder that is a number",
        {"output_dir": 5},
        ("output_dir=5", "path of a folder", "None, which is ./mmtune-output", "Pass e.g. output_dir='my-run'"),
        {},
    ),
    (
        "the same data twice",
        {"eval_dataset": "same"},
        ("relevant in training and in evaluation", "e.g. train, evaluation = dataset.split(1)", "allow_overlap=True"),
        {"eval_dataset": "same", "allow_overlap": True},
    ),
]


RERANKER_MISTAKES: list[tuple[str, Arguments, tuple[str, ...], Arguments | None]] = [
    ("a number for a model", {"model": 5}, ("model=5", "expected a CrossEncoder", "build_reranker"), None),
    ("a length", {"max_length": 9}, ("'max_length'", "model = build_reranker(path); model.max_seq_length = 77"), None),
    ("a head", {"head": "dense"}, ("'head'", "model = build_reranker(path, head='dense')"), None),
    ("dimensions", {"matryoshka_dims": [64]}, ("'matryoshka_dims'", "of finetune", "Leave it out"), {}),
    (
        "mini-batches",
        {"mini_batch_size": 4},
        ("'mini_batch_size'", "per_device_train_batch_size=4, gradient_accumulation_steps=8"),
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
    ),
    (
        "a loss of embedding models",
        {"loss": embedding_losses.CachedMultipleNegativesRankingLoss},
        (
            "loss=CachedMultipleNegativesRankingLoss of sentence_transformers.sentence_transformer.losses",
            "can't train a CrossEncoder",
            "Import one from sentence_transformers.cross_encoder.losses, which has a CachedMultipleNegativesRanking",
        ),
        {"loss": reranking_losses.CachedMultipleNegativesRankingLoss},
    ),
    (
        "a loss of embedding models with its arguments",
        {"loss": functools.partial(embedding_losses.CoSENTLoss, scale=2)},
        ("loss=CoSENTLoss", "sentence_transformers.cross_encoder.losses, or leave it out"),
        {},
    ),
    (
        "an evaluator of retrievers",
        {"evaluator": "retrieval"},
        ("evaluator is a RetrievalEvaluator", "evaluator=build_reranking_evaluator(dataset)"),
        {"evaluator": "reranking"},
    ),
    (
        "an evaluator of retrievers by name",
        {"evaluator": "several"},
        ("evaluator is a RetrievalEvaluator", "evaluator=build_reranking_evaluator(dataset)"),
        {"evaluator": "reranking"},
    ),
]


CASES = [
    pytest.param(call, *rest, id=f"{call.__name__}: {name}")
    for call, mistakes in ((finetune, MISTAKES), (finetune_reranker, RERANKER_MISTAKES))
    for name, *rest in mistakes
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    """Models whose weights can't be read, for each call: a call that gets there has passed every check before."""
    folder = tmp_path_factory.mktemp("models")
    found = {finetune: tiny_clip(folder / "clip"), finetune_reranker: tiny_llava(folder / "llava")}
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"broken")
    return found


@pytest.fixture(scope="module")
def things() -> dict[str, Any]:
    """What a mistake or a step passes by the name of it."""
    rows, others = generated_pages(6), generated_pages(6, seed=1)
    return {
        "same": rows,
        "others": others,
        "retrieval": build_evaluator(others),
        "several": build_evaluator({"a": others, "b": rows}),
        "reranking": build_reranking_evaluator(others, num_candidates=4),
    }


def message_of(call: Any, model: str, folder: Path, things: dict[str, Any], given: Arguments) -> str:
    """The message of a call that fails."""
    named = {name: things.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(MmtuneError, match=r"\w") as caught:
        call(**{"model": model, "train_dataset": things["same"], "output_dir": folder / "run", **named})
    return str(caught.value)


@pytest.mark.parametrize(("call", "mistake", "parts", "step"), CASES)
@pytest.mark.filterwarnings("ignore:Training has seen a part of the evaluation")
def test_a_mistake_gets_a_message_that_helps(
    checkpoints: dict[Any, str],
    things: dict[str, Any],
    tmp_path: Path,
    call: Any,
    mistake: Arguments,
    parts: tuple[str, ...],
    step: Arguments | None,
) -> None:
    message = message_of(call, checkpoints[call], tmp_path, things, mistake)
    assert [part for part in parts if part not in message] == []
    assert re.search(r"\bhost\b", message) is None
    assert len(message) < 1200
    if step is not None:
        assert "The weights of" in message_of(call, checkpoints[call], tmp_path, things, step)


@pytest.mark.parametrize("typed", ["lr", "rate", "bs", "wd", "steps", "scheduler", "cpu", "amp"])
def test_no_hint_is_a_neighbour_by_spelling_alone(typed: str) -> None:
    hint = hint_for(typed, 1, {"callbacks", "evaluator"}, EMBEDDING)
    assert "local_rank" not in hint
    assert hint.startswith("Did you mean")
