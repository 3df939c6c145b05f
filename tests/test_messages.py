"""Mistakes that newcomers make, each with the message that helps: the value, what was expected, and the next step."""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder import losses as reranking_losses
from sentence_transformers.sentence_transformer import losses as embedding_losses

import mmtune
from mmtune import (
    ConflictFreeBatchSampler,
    MmtuneError,
    RetrievalDataset,
    build_evaluator,
    build_reranker,
    build_reranking_evaluator,
    compose_router,
    evaluate_pipeline,
    finetune,
    finetune_reranker,
    load_model,
    mine_hard_negatives,
)
from mmtune.testing import generated_pages, tiny_clip, tiny_llava, tiny_siglip, tiny_text_encoder
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
            "Pass e.g. matryoshka_dims=[64, 32], none above the dimension of the model",
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
        ("callbacks=<transformers", "Put it in one: callbacks=[EarlyStoppingCallback(...)]"),
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
        ("EarlyStoppingCallback", "or with eval_strategy='no'"),
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
        "two clocks",
        {"eval_dataset": "others", "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3},
        ("eval_strategy='epoch' and save_strategy='steps' differ", "Pass save_strategy='epoch'", "keep='last'"),
        {"eval_dataset": "others", "eval_strategy": "epoch", "save_strategy": "epoch"},
    ),
    (
        "two clocks, and the last weights",
        {"load_best_model_at_end": True},
        ("load_best_model_at_end=True", "something to measure", "Pass eval_dataset=..., or leave it out"),
        {"eval_dataset": "others", "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3, "keep": "last"},
    ),
    (
        "both sides of a split",
        {"train_dataset": "split"},
        ("train_dataset=a tuple is no dataset", "train, evaluation = dataset.split(...)"),
        {},
    ),
    (
        "all splits",
        {"train_dataset": "splits"},
        (
            "train_dataset=a DatasetDict is no dataset",
            "It has the splits ['train', 'test']",
            "train_dataset=rows['train']",
        ),
        {},
    ),
    (
        "rows in a list",
        {"eval_dataset": "list"},
        ("eval_dataset=a list is no dataset", "datasets.Dataset.from_list(rows)"),
        {"eval_dataset": "from list"},
    ),
    (
        "a share of the data",
        {"eval_dataset": 0.2},
        ("eval_dataset=0.2 is no dataset", "train, evaluation = RetrievalDataset.load('pages.parquet').split(100)"),
        None,
    ),
    (
        "a value of several",
        {"eval_dataset": {"other": 5}},
        ("eval_dataset['other']=5 is no dataset", "Expected a RetrievalDataset"),
        None,
    ),
    (
        "a name that is no part of a key",
        {"eval_dataset": {"my_set": 5}},
        ("['my_set']", "Name it 'my-set' in place of 'my_set'"),
        None,
    ),
    (
        "a reranker",
        {"model": "reranker"},
        ("model=a CrossEncoder", "Use finetune_reranker"),
        None,
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
        ("32", "to 6 or less, e.g. 2"),
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
        "prompts by column",
        {"prompts": {"query": "Find the page."}},
        ("'query'", "no training set", "Pass e.g. prompts='Find the page.'", "with several directions"),
        {"prompts": "Find the page."},
    ),
    (
        "prompts by column, in two directions",
        {"prompts": {"query": "x"}, "directions": ["text_to_image", "image_to_text"]},
        ("'query'", "'text_to_image', 'image_to_text'", "Pass e.g. prompts={'text_to_image': 'Find the page.'}"),
        {"prompts": {"text_to_image": "Find the page."}, "directions": ["text_to_image", "image_to_text"]},
    ),
    (
        "a text encoder",
        {"model": "text encoder"},
        ("embeds no images, only text", "a language model that reads images, such as Qwen/Qwen3-VL-2B-Instruct"),
        {},
    ),
    (
        "an embedding model",
        {"model": "retriever"},
        ("model=a SentenceTransformer", "expected a CrossEncoder", "build_reranker"),
        None,
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
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a mistake or a step passes by the name of it."""
    rows, others, folder = generated_pages(6), generated_pages(6, seed=1), tmp_path_factory.mktemp("things")
    data = RetrievalDataset.from_id_rows(generated_pages(20))
    text, llava = tiny_text_encoder(folder / "text"), tiny_llava(folder / "llava")
    data.save(folder / "saved")
    rows.to_parquet(folder / "pages.parquet")
    (folder / "run" / "final").mkdir(parents=True)
    (folder / "run" / "final" / "modules.json").write_text("[]")
    return {
        "same": rows,
        "others": others,
        "data": data,
        "split": data.split(6),
        "splits": DatasetDict(train=rows, test=others),
        "list": list(others),
        "from list": Dataset.from_list(list(others)),
        "retrieval": build_evaluator(others, show_progress_bar=False),
        "several": build_evaluator({"a": others, "b": rows}),
        "reranking": build_reranking_evaluator(others, num_candidates=4, show_progress_bar=False),
        "text encoder": text,
        "siglip": tiny_siglip(folder / "siglip"),
        "llava": llava,
        "reads texts": SentenceTransformer(text),
        "clip": tiny_clip(folder / "clip"),
        "retriever": load_model(tiny_clip(folder / "clip2")),
        "reranker": build_reranker(llava),
        "folder": folder,
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
    assert len(message) < 1200
    if step is not None:
        assert "The weights of" in message_of(call, checkpoints[call], tmp_path, things, step)


# Other calls: the call with the mistake, what the message holds, and the call that it names.
Things = dict[str, Any]
Call = Callable[[Things], Any]
QUIET: Arguments = {"show_progress_bar": False}
load, from_id_rows = RetrievalDataset.load, RetrievalDataset.from_id_rows


def with_text_for_negatives(rows: Dataset) -> Dataset:
    texts = [",".join(ids or ()) for ids in rows["negatives"]]
    return rows.remove_columns("negatives").add_column("negatives", texts)


def with_paths(paths: list[str]) -> Dataset:
    return Dataset.from_dict({"id": ["a", "b"], "query": ["x", "y"], "image": paths})


OTHER_CALLS: list[tuple[str, Call, tuple[str, ...], Call | None]] = [
    (
        "mining: swapped",
        lambda it: mine_hard_negatives(it["retriever"], it["data"]),
        ("model=a RetrievalDataset is no retriever", "mine_hard_negatives(dataset, model): the dataset comes first"),
        lambda it: mine_hard_negatives(it["data"], it["retriever"], relative_margin=None, **QUIET),
    ),
    (
        "mining: a path",
        lambda it: mine_hard_negatives(it["data"], it["clip"]),
        ("/clip' is no retriever", "Pass model=load_model('", "/clip')"),
        lambda it: mine_hard_negatives(it["data"], model=load_model(it["clip"]), relative_margin=None, **QUIET),
    ),
    (
        "mining: several by name",
        lambda it: mine_hard_negatives({"a": it["data"]}, it["retriever"]),
        ("dataset=a dict is no dataset", "pass one, e.g. that of 'a'"),
        None,
    ),
    (
        "mining: no room",
        lambda it: mine_hard_negatives(it["data"], it["retriever"], range_max=2),
        ("range_max=2", "num_negatives=4", "Pass range_max=4 or more"),
        lambda it: mine_hard_negatives(it["data"], it["retriever"], range_max=4, relative_margin=None, **QUIET),
    ),
    (
        "mining: a model of texts",
        lambda it: mine_hard_negatives(it["data"], it["reads texts"], **QUIET),
        ("can't embed documents='image'", "Its modalities are text", "compose_router(text, image)"),
        None,
    ),
    (
        "evaluator: a model of texts",
        lambda it: it["retrieval"](it["reads texts"]),
        ("can't embed documents='image'", "Its modalities are text", "compose_router(text, image)"),
        lambda it: it["retrieval"](compose_router(it["text encoder"], it["siglip"])),
    ),
    (
        "evaluator: a path",
        lambda it: it["retrieval"](it["clip"]),
        ("/clip' is no SentenceTransformer", "Pass evaluator(load_model('"),
        lambda it: it["retrieval"](load_model(it["clip"])),
    ),
    (
        "evaluator: a reranker",
        lambda it: it["retrieval"](it["reranker"]),
        ("model=a CrossEncoder", "build_reranking_evaluator(dataset)(model)"),
        lambda it: build_reranking_evaluator(it["data"], **QUIET)(it["reranker"]),
    ),
    (
        "evaluator of rerankers: a retriever",
        lambda it: it["reranking"](it["retriever"]),
        ("model=a SentenceTransformer is no reranker", "build_evaluator(dataset)"),
        lambda it: build_evaluator(it["data"], **QUIET)(it["retriever"]),
    ),
    (
        "evaluator: one depth",
        lambda it: build_evaluator(it["data"], ndcg_at_k=5),  # type: ignore[arg-type]
        ("ndcg_at_k=5", "Pass e.g. ndcg_at_k=[5]"),
        lambda it: build_evaluator(it["data"], ndcg_at_k=[5]),
    ),
    (
        "evaluator: a model for the data",
        lambda it: build_evaluator(it["retriever"]),
        ("dataset=a SentenceTransformer is no dataset", "It is a model"),
        None,
    ),
    (
        "pipeline: swapped",
        lambda it: evaluate_pipeline(it["reranker"], it["retriever"], it["data"]),
        ("retriever=a CrossEncoder is no retriever", "evaluate_pipeline(retriever, reranker, dataset)"),
        lambda it: evaluate_pipeline(it["retriever"], it["reranker"], it["data"], depths=[2], **QUIET),
    ),
    (
        "pipeline: swapped paths",
        lambda it: evaluate_pipeline(it["llava"], it["clip"], it["data"]),
        ("can't judge a pair", "reranker= of evaluate_pipeline(retriever, reranker, dataset)"),
        lambda it: evaluate_pipeline(it["clip"], it["llava"], it["data"], depths=[2], **QUIET),
    ),
    (
        "pipeline: several by name",
        lambda it: evaluate_pipeline(it["retriever"], it["reranker"], {"a": it["data"]}),  # type: ignore[arg-type]
        ("dataset=a dict is no dataset", "pass one, e.g. that of 'a'"),
        None,
    ),
    (
        "pipeline: depths in a tuple",
        lambda it: evaluate_pipeline(it["retriever"], it["reranker"], it["data"], ndcg_at_k=(10,)),  # type: ignore[arg-type]
        ("ndcg_at_k=(10,)", "Pass e.g. ndcg_at_k=10."),
        None,
    ),
    (
        "router: swapped",
        lambda it: compose_router(it["siglip"], it["text encoder"]),
        ("embeds no images, only text", "given as image= of compose_router(text, image): swap the two"),
        lambda it: compose_router(it["text encoder"], it["siglip"]),
    ),
    (
        "router: a part of a side",
        lambda it: compose_router(it["text encoder"], it["siglip"], freeze="vision"),
        ("'vision'", "Pass e.g. freeze='image'"),
        lambda it: compose_router(it["text encoder"], it["siglip"], freeze="image"),
    ),
    (
        "loading: a model",
        lambda it: build_reranker(it["reranker"]),
        ("name_or_path=a CrossEncoder", "used as it is"),
        None,
    ),
    (
        "loading: a name while offline",
        lambda _: load_model("no-such/model"),
        ("'no-such/model' was not found", "HF_HUB_OFFLINE=1 is set", "unset it"),
        None,
    ),
    (
        "data: a misspelled file",
        lambda it: load(it["folder"] / "pagez.parquet"),
        ("pagez.parquet' does not exist", "Did you mean", "pages.parquet'?"),
        lambda it: load(it["folder"] / "pages.parquet"),
    ),
    (
        "data: the folder of a run",
        lambda it: load(it["folder"] / "run"),
        ("the folder of a run, with its model", "/run/final' to load_model"),
        None,
    ),
    (
        "data: a name while offline",
        lambda it: load("llamaindex/vdr-multilingual-train"),
        ("'llamaindex/vdr-multilingual-train' could not be loaded", "HF_HUB_OFFLINE=1 is set", "unset it"),
        None,
    ),
    (
        "data: rows that are loaded",
        lambda it: load(it["same"]),
        ("name_or_path=a Dataset", "RetrievalDataset.from_id_rows(rows)"),
        lambda it: from_id_rows(it["same"]),
    ),
    (
        "data: a data frame",
        lambda it: load(it["same"].to_pandas()),
        ("name_or_path=a DataFrame", "from_id_rows(rows)", "datasets.Dataset.from_pandas(frame)"),
        lambda it: from_id_rows(Dataset.from_pandas(it["same"].to_pandas())),
    ),
    (
        "data: a path for rows",
        lambda it: from_id_rows(str(it["folder"] / "pages.parquet")),  # type: ignore[arg-type]
        ("got str", "RetrievalDataset.load('"),
        lambda it: load(str(it["folder"] / "pages.parquet")),
    ),
    (
        "data: a split that is not there",
        lambda it: load(it["folder"] / "pages.parquet", split="train[:10]"),
        ("split='train[:10]'", "e.g. split='train'", "select_queries"),
        lambda it: load(it["folder"] / "pages.parquet", split="train").select_queries(2),
    ),
    (
        "data: negatives in a text",
        lambda it: from_id_rows(with_text_for_negatives(it["same"])),
        (
            "'negatives' holds string",
            "rows.map(lambda row: {'negatives': row['negatives'].split(',') if row['negatives'] else []})",
        ),
        lambda it: from_id_rows(
            with_text_for_negatives(it["same"]).map(
                lambda row: {"negatives": row["negatives"].split(",") if row["negatives"] else []}
            )
        ),
    ),
    (
        "data: negatives under another name",
        lambda it: from_id_rows(it["same"].rename_column("negatives", "hard_negatives")),
        ("no column 'negatives'", "Pass negatives_column='hard_negatives'"),
        lambda it: from_id_rows(
            it["same"].rename_column("negatives", "hard_negatives"), negatives_column="hard_negatives"
        ),
    ),
    (
        "data: tables in another order",
        lambda it: RetrievalDataset.from_beir(it["data"].queries, it["data"].corpus, it["data"].qrels),
        ("The corpus has none of the columns 'document_id'", "from_beir(corpus, queries, qrels)"),
        lambda it: RetrievalDataset.from_beir(it["data"].corpus, it["data"].queries, it["data"].qrels),
    ),
    (
        "data: a misspelled column",
        lambda it: from_id_rows(it["same"], query_column="queries"),
        ("no column 'queries'", "Did you mean 'query'?"),
        lambda it: from_id_rows(it["same"], query_column="query"),
    ),
    (
        "data: a share of the queries",
        lambda it: it["data"].split(0.2),
        ("eval_queries=0.2", "Of these 20", "eval_queries=4"),
        lambda it: it["data"].split(eval_queries=4),
    ),
    (
        "data: groups by no column",
        lambda it: it["data"].split(4, group_column="languages"),
        ("group_column='languages': the corpus has no column", "Did you mean 'language'?"),
        None,
    ),
    (
        "data: an id alone",
        lambda it: it["data"].select_queries("p1"),
        ("n_or_ids='p1'", "Pass e.g. ['"),
        lambda it: it["data"].select_queries([it["data"].queries["query_id"][0]]),
    ),
    (
        "data: addresses for pages",
        lambda it: from_id_rows(with_paths(["https://x.org/a.png", "https://x.org/b.png"])).check_pages(),
        ("'https://x.org/a.png'", "it is a URL", "urllib.request.urlretrieve('https://x.org/a.png', 'page.png')"),
        None,
    ),
    (
        "data: paths that begin elsewhere",
        lambda it: from_id_rows(with_paths(["im/a.png", "im/b.png"])).check_pages(),
        ("'im/a.png'", f"looked for from the working directory {str(Path.cwd())!r}", "Write absolute paths"),
        None,
    ),
]


@pytest.mark.parametrize(("call", "parts", "step"), [pytest.param(*rest, id=name) for name, *rest in OTHER_CALLS])
@pytest.mark.filterwarnings("ignore:Default prompt name")
def test_a_mistake_of_another_call_gets_a_message_that_helps(
    things: Things, call: Call, parts: tuple[str, ...], step: Call | None
) -> None:
    with pytest.raises(MmtuneError, match=r"\w") as caught:
        call(things)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    if step is not None:
        assert step(things) is not None


def test_a_split_that_leaves_little_says_what_was_asked_for(things: Things) -> None:
    with pytest.warns(UserWarning, match=r"eval_queries=100 of 20. .*eval_queries=4 would do"):
        things["data"].split(100)


@pytest.mark.parametrize(
    ("given", "parts", "step"),
    [
        ({"num_negatives": 50}, ("The corpus has 24 different documents: pass num_negatives=4",), {"num_negatives": 4}),
        (
            {"relative_margin": 0.95},
            ("no more under relative_margin=0.95: pass", "relative_margin=0.05, the default", "relative_margin=None"),
            {},
        ),
        ({"max_score": -2}, ("no more under max_score=-2: pass", "max_score=None"), {}),
    ],
)
def test_mining_too_little_says_what_to_loosen(
    things: Things, given: Arguments, parts: tuple[str, ...], step: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    options: Arguments = {"relative_margin": None, **QUIET}
    mine_hard_negatives(things["data"], things["retriever"], **options | given)
    assert [part for part in parts if part not in caplog.text] == []
    caplog.clear()
    mine_hard_negatives(things["data"], things["retriever"], **options | step)
    assert caplog.text == ""


def test_rows_without_a_place_are_explained_with_a_batch_size_that_has_one(
    things: Things, caplog: pytest.LogCaptureFixture
) -> None:
    rows = from_id_rows(things["same"]).training_rows()
    ConflictFreeBatchSampler(rows, 6, False)
    assert "answers the query of the other" in caplog.text
    smaller = re.search(r"per_device_train_batch_size=(\d+)", caplog.text)
    assert smaller is not None
    caplog.clear()
    ConflictFreeBatchSampler(rows, int(smaller[1]), False)
    assert caplog.text == ""


def test_no_message_calls_sentence_transformers_the_host() -> None:
    found = []
    for path in sorted(Path(mmtune.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        found += [
            f"{path.name}:{node.lineno}"
            for node in texts
            if id(node) not in plain and node.value != "host" and re.search(r"\bhost\b", node.value)
        ]
    assert found == []


@pytest.mark.parametrize("typed", ["lr", "rate", "bs", "wd", "steps", "scheduler", "cpu", "amp"])
def test_no_hint_is_a_neighbour_by_spelling_alone(typed: str) -> None:
    hint = hint_for(typed, 1, {"callbacks", "evaluator"}, EMBEDDING)
    assert "local_rank" not in hint
    assert hint.startswith("Did you mean")
