"""finetune_reranker: one call trains, measures and saves a reranker, and equals the host's own script."""

import functools
import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, SentenceTransformer
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.cross_encoder.losses import (
    BinaryCrossEntropyLoss,
    CachedMultipleNegativesRankingLoss,
    CrossEntropyLoss,
    LambdaLoss,
    ListNetLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from torch import nn

from comparing import assert_same_weights, weights, without_weights
from mmtune import (
    ConfigError,
    DatasetError,
    FinetuneResult,
    ImageDecodeError,
    RetrievalDataset,
    build_reranker,
    build_reranking_evaluator,
    finetune_reranker,
    mine_hard_negatives,
)
from mmtune.models.rerankers import HEADS
from mmtune.testing import generated_pages, tiny_clip
from mmtune.training import recipe
from mmtune.training.batches import ShuffledBatchSampler, StepwiseProportionalBatchSampler
from mmtune.training.trainers import RERANKING
from test_rerankers import TEXTS_ONLY, with_template

QUIET = {"disable_tqdm": True, "learning_rate": 1e-3}
BOTH = ("text_to_image", "image_to_text")
IGNORE_SIZES = {"model_kwargs": {"ignore_mismatched_sizes": True}}
COLOURS = ("red", "green", "blue", "grey", "pink")


def table(count: int, *, seed: int = 0, score=lambda row: 1, texts: list[str] | None = None) -> RetrievalDataset:
    """Short texts as documents; each query has one relevant and three listed negatives."""
    ids = [f"{seed}-d{row}" for row in range(count)]
    queries = texts or [f"{COLOURS[row % 5]} {seed} {row}" for row in range(count)]
    query_ids = [f"q{row}" for row in range(count)]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"page {queries[row]}" for row in range(count)]}),
        Dataset.from_dict({"query_id": query_ids, "text": queries}),
        Dataset.from_dict(
            {"query_id": query_ids, "document_id": ids, "score": [score(row) for row in range(count)]},
        ),
        Dataset.from_dict(
            {
                "query_id": query_ids,
                "document_ids": [[ids[(row + step) % count] for step in (1, 2, 3)] for row in range(count)],
            }
        ),
    )


@pytest.fixture(scope="module")
def on_texts(text_reranker_path: str):
    """Calls finetune_reranker with the text reranker."""

    def call(*data: object, **options: object) -> FinetuneResult:
        model = options.pop("model", text_reranker_path)
        return finetune_reranker(model, *data, documents="text", **{**QUIET, **options})

    return call


@pytest.fixture(scope="module")
def pages_apart() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(24, seed=1)).split(6)


@pytest.fixture(scope="module")
def run(
    pages_apart: tuple[RetrievalDataset, RetrievalDataset],
    qwen3_vl_path: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> FinetuneResult:
    """Both directions, on pages, by the defaults."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finetune_reranker(qwen3_vl_path, *pages_apart, output_dir=folder, directions=BOTH, max_steps=4, **QUIET)


@pytest.fixture
def broken_weights(qwen3_vl_path: str, tmp_path: Path) -> str:
    """A checkpoint whose weights can't be read: an error about anything else came before them."""
    return without_weights(qwen3_vl_path, tmp_path / "broken")


# What a run leaves behind


def test_a_run_leaves_model_metrics_report_and_card(run: FinetuneResult) -> None:
    assert {"final", "metrics.json", "report.md"} <= {path.name for path in run.output_dir.iterdir()}
    metrics = json.loads((run.output_dir / "metrics.json").read_text())
    assert set(metrics) == {"before", "after", "primary_metric", "settings", "verdict", "versions"}
    assert (metrics["before"], metrics["after"]) == (run.before, run.after)
    card = (run.output_dir / "final" / "README.md").read_text()
    section = card.split("## Finetuning")[1].split("## Model Details")[0]
    for fact in ("| loss | BinaryCrossEntropyLoss |", "pos_weight: 4.0", f"{run.after[run.primary_metric]:.4f}"):
        assert fact in section


def test_the_saved_model_scores_the_same_in_the_plain_host(run: FinetuneResult, pages: Dataset) -> None:
    loaded = CrossEncoder(str(run.output_dir / "final"), device="cpu")
    assert type(loaded) is CrossEncoder
    pairs = [({"text": "total revenue"}, page) for page in pages["image"][:4]]
    for direction, asked in (
        ("text_to_image", pairs),
        ("image_to_text", [(page, text) for text, page in pairs]),
    ):
        ours = run.model.predict(asked, prompt_name=direction)
        assert np.ptp(ours) > 0
        assert loaded.predict(asked, prompt_name=direction) == pytest.approx(ours, abs=1e-6)
    modules = json.loads((run.output_dir / "final" / "modules.json").read_text())
    assert [module["type"] for module in modules if "mmtune" in module["type"]] == []


def test_no_training_page_is_copied_anywhere(run: FinetuneResult) -> None:
    assert [path for path in run.output_dir.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".webp")] == []


def rows_of_table(result: FinetuneResult) -> list[str]:
    """The first word of each row that the result prints, below the line under the head."""
    lines = str(result).splitlines()
    rule = next(at for at, line in enumerate(lines) if set(line) == {"-", " "})
    return [line.split()[0] for line in lines[rule + 1 : -1]]


def test_the_mean_over_directions_is_the_metric_and_says_so(run: FinetuneResult) -> None:
    assert run.primary_metric == "vdr-rerank-mean_ndcg@10"
    parts = [run.after[f"vdr-rerank-{name}_ndcg@10"] for name in ("text-to-image", "image-to-text")]
    assert run.after[run.primary_metric] == pytest.approx(np.mean(parts))
    assert run.trainer.args.metric_for_best_model == f"eval_{run.primary_metric}"
    assert rows_of_table(run) == ["mean", "text-to-image", "image-to-text"]


def test_before_and_after_are_the_scores_of_the_two_models(
    run: FinetuneResult, pages_apart: tuple[RetrievalDataset, RetrievalDataset], qwen3_vl_path: str
) -> None:
    for direction in BOTH:
        name = f"vdr-rerank-{direction.replace('_', '-')}"
        count = 10 if direction == "text_to_image" else 6
        options = {"direction": direction, "num_candidates": count, "name": name, "show_progress_bar": False}
        evaluator = build_reranking_evaluator(pages_apart[1], **options)
        for metrics, model in ((run.before, build_reranker(qwen3_vl_path, device="cpu")), (run.after, run.model)):
            for key, value in evaluator(model).items():
                assert metrics[key] == pytest.approx(value, abs=1e-9)


def test_each_direction_is_trained_with_its_own_prompt(run: FinetuneResult) -> None:
    prompts = {direction: run.model.prompts[direction] for direction in BOTH}
    assert run.settings["training"]["prompts"] == prompts
    batches = list(run.trainer.get_train_dataloader())
    assert {batch["dataset_name"]: batch["prompt"] for batch in batches} == prompts


def test_settings_say_what_was_chosen(run: FinetuneResult) -> None:
    training, data = run.settings["training"], run.settings["data"]
    assert training["loss"] == "BinaryCrossEntropyLoss"
    assert training["loss_arguments"]["pos_weight"] == 4.0
    # 2 x 90 pairs make at least ten steps
    assert (training["batch_size"], training["gradient_accumulation_steps"]) == (8, 2)
    assert training["batch_sampler"] == "ShuffledBatchSampler"
    assert "matryoshka_dims" not in training
    assert data["directions"] == list(BOTH)
    assert data["form_of_rows"] == "pairs"
    assert data["evaluation_candidates"] == {"vdr-rerank-text-to-image": 10, "vdr-rerank-image-to-text": 6}
    for direction in BOTH:
        listed, filled = (data[f"{direction}: negatives_{how}"] for how in ("listed", "filled_at_random"))
        assert listed + filled == 18 * 4
        assert data[f"{direction}: negatives_refused_as_relevant"] == 0
        assert data[f"{direction}: training_rows"] == 18 * 5


def test_one_direction_has_the_plain_name_and_one_prompt(on_texts, tmp_path: Path) -> None:
    result = on_texts(table(8), table(12, seed=1), output_dir=tmp_path, num_negatives=2, num_candidates=5, max_steps=1)
    assert result.settings["data"]["evaluation_candidates"] == {"vdr-rerank": 5}
    assert result.primary_metric == "vdr-rerank_ndcg@10"
    assert rows_of_table(result) == ["all"]
    assert result.settings["training"]["loss_arguments"]["pos_weight"] == 2.0
    assert result.settings["data"]["training_rows"] == 8 * 3


def test_one_query_with_many_relevant_documents_does_not_lengthen_every_list(on_texts, tmp_path: Path) -> None:
    evaluation = table(40, seed=1)
    ids = evaluation.corpus["document_id"][:]
    qrels = {"query_id": ["q0"] * 30 + ["q35"], "document_id": [*ids[:30], ids[35]], "score": [1] * 31}
    asked = evaluation.queries.select([0, 35])
    evaluation = RetrievalDataset(evaluation.corpus, asked, Dataset.from_dict(qrels))
    result = on_texts(table(8), evaluation, output_dir=tmp_path, num_negatives=2, max_steps=1)
    assert result.settings["data"]["evaluation_candidates"] == {"vdr-rerank": 10}
    many, one = result.trainer.evaluator.own.lists
    assert [(sum(gain > 0 for gain in each.gains), len(each.gains)) for each in (many, one)] == [(10, 19), (1, 10)]

    everything = {"query_id": ["q0"] * 40 + ["q35"], "document_id": [*ids, ids[35]], "score": [1] * 41}
    trivial = RetrievalDataset(evaluation.corpus, asked, Dataset.from_dict(everything))
    with pytest.raises(ConfigError, match="All 40 different documents are relevant to query 'q0'"):
        on_texts(table(8), trivial, output_dir=tmp_path / "other", max_steps=1)


def test_without_evaluation_data_nothing_is_measured(on_texts, tmp_path: Path) -> None:
    result = on_texts(table(8), output_dir=tmp_path, max_steps=1)
    assert (result.before, result.after, result.primary_metric) == ({}, {}, None)
    assert (tmp_path / "final" / "config.json").is_file()


def test_several_sets_by_name_and_both_directions(on_texts, tmp_path: Path) -> None:
    train = {"a": table(8, seed=1), "b": table(6, seed=2)}
    evaluation = {"c": table(6, seed=3), "d": table(6, seed=4)}
    result = on_texts(train, evaluation, output_dir=tmp_path, directions=BOTH, max_steps=2)
    names = {f"vdr-rerank-{part}" for part in ("c-text-to-image", "c-image-to-text", "d-text-to-image", "mean")}
    assert names < {key.partition("_")[0] for key in result.after}
    assert set(result.trainer.train_dataset) == {f"{name}-{direction}" for name in "ab" for direction in BOTH}
    assert result.primary_metric == "vdr-rerank-mean_ndcg@10"


# Parity with the plain host


@pytest.mark.parametrize("head", HEADS)
def test_weights_equal_those_of_a_plain_host_script(
    head: str, pages_apart: tuple[RetrievalDataset, RetrievalDataset], qwen3_vl_path: str, tmp_path: Path
) -> None:
    train, evaluation = pages_apart

    def args(folder: str) -> CrossEncoderTrainingArguments:
        return CrossEncoderTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=3,
            learning_rate=1e-3,
            warmup_steps=0.1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=7,
        )

    model = build_reranker(qwen3_vl_path, head=head, device="cpu")
    ours = finetune_reranker(model, train, evaluation, args=args("ours"))

    model = build_reranker(qwen3_vl_path, head=head, device="cpu")
    host_args = args("theirs")
    host_args.prompts = model.prompts["text_to_image"]
    trainer = CrossEncoderTrainer(
        model=model,
        args=host_args,
        train_dataset=train.labeled_pairs(4),
        loss=BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(4.0)),
        evaluator=build_reranking_evaluator(evaluation, show_progress_bar=False),
    )
    trainer.train()
    assert_same_weights(ours.model, model)


def test_two_directions_equal_a_plain_host_script(text_reranker_path: str, on_texts, tmp_path: Path) -> None:
    train, evaluation = table(16), table(12, seed=1)

    def args(folder: str) -> CrossEncoderTrainingArguments:
        return CrossEncoderTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=1e-3,
            batch_sampler=ShuffledBatchSampler,
            multi_dataset_batch_sampler=StepwiseProportionalBatchSampler,
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            prompts={"text_to_image": "page? ", "image_to_text": "text? "},
        )

    ours = finetune_reranker(
        text_reranker_path, train, evaluation, args=args("ours"), directions=BOTH, documents="text", loss=LambdaLoss
    )
    model = CrossEncoder(text_reranker_path, device="cpu")
    parts = [
        build_reranking_evaluator(
            evaluation, direction=direction, name=f"part-{direction}", documents="text", show_progress_bar=False
        )
        for direction in BOTH
    ]
    trainer = CrossEncoderTrainer(
        model=model,
        args=args("theirs"),
        train_dataset=DatasetDict(
            {direction: train.labeled_lists(4, direction=direction, documents="text") for direction in BOTH}
        ),
        loss=LambdaLoss(model),
        evaluator=SequentialEvaluator(parts),
    )
    trainer.train()
    assert_same_weights(ours.model, model)


# Losses and their rows


@pytest.mark.parametrize(
    "loss",
    [
        LambdaLoss,
        functools.partial(LambdaLoss, mini_batch_size=4),
        lambda model: LambdaLoss(model, sigma=2.0),
        "built",
        ListNetLoss,
    ],
    ids=["class", "partial", "callable", "built", "another"],
)
def test_listwise_losses_get_graded_lists(loss: object, on_texts, text_reranker_path: str, tmp_path: Path) -> None:
    model = CrossEncoder(text_reranker_path, device="cpu")
    loss = LambdaLoss(model) if loss == "built" else loss
    data = table(8, score=lambda row: 1 + row % 3)
    result = on_texts(data, model=model, loss=loss, directions=BOTH, output_dir=tmp_path, max_steps=2)
    assert result.settings["data"]["form_of_rows"] == "lists"
    for direction in BOTH:
        rows = result.trainer.train_dataset[direction]
        assert sorted(rows["labels"][row][0] for row in range(8)) == [1, 1, 1, 2, 2, 2, 3, 3]
        assert {len(row["documents"]) for row in rows} == {5}
    assert result.settings["training"]["loss"] == type(result.trainer.loss).__name__


@pytest.mark.parametrize(
    "loss",
    [
        MultipleNegativesRankingLoss,
        functools.partial(CachedMultipleNegativesRankingLoss, mini_batch_size=4),
        lambda model: MultipleNegativesRankingLoss(model, scale=5.0),
    ],
    ids=["class", "cached", "callable"],
)
def test_contrastive_losses_get_batches_free_of_conflicts(loss: object, on_texts, tmp_path: Path) -> None:
    # every text is asked twice: each of its two pages is relevant to both queries
    data = table(24, texts=[f"{COLOURS[row % 5]} {row}" for row in range(12)] * 2)
    result = on_texts(data, loss=loss, directions=BOTH, output_dir=tmp_path, num_negatives=2, max_steps=2)
    assert result.settings["data"]["form_of_rows"] == "columns"
    assert result.settings["training"]["batch_sampler"] == "ConflictFreeBatchSampler"
    names = {"text_to_image": ["query", "image", "negative_0", "negative_1"], "image_to_text": ["query", "document"]}
    for direction in BOTH:
        assert list(result.trainer.train_dataset[direction][0])[: len(names[direction])] == names[direction]
    for batch in result.trainer.get_train_dataloader():
        asks, documents = ("query", [name for name in batch if name not in ("query", "label")])
        if documents == ["document"]:
            asks, documents = ("document", ["query"])
        for row, text in enumerate(batch[asks]):
            others = [batch[name][other] for name in documents for other in range(len(batch[asks])) if other != row]
            assert others
            assert f"page {text}" not in others


def test_a_contrastive_loss_needs_no_listed_negatives(on_texts, tmp_path: Path) -> None:
    for loss in (MultipleNegativesRankingLoss, lambda model: MultipleNegativesRankingLoss(model, scale=5.0)):
        result = on_texts(table(8), loss=loss, output_dir=tmp_path, num_negatives=0, max_steps=1, overwrite=True)
        assert result.settings["data"]["negatives_a_row"] == 0


@pytest.mark.parametrize("loss", [LambdaLoss, BinaryCrossEntropyLoss])
def test_a_sigmoid_in_front_of_raw_scores_is_warned_of(loss: type, on_texts, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{loss.__name__} has a sigmoid in front"):
        on_texts(
            table(8),
            loss=functools.partial(loss, activation_fn=nn.Sigmoid()),
            output_dir=tmp_path,
            max_steps=1,
        )


def test_a_loss_of_another_model_is_refused(on_texts, text_reranker_path: str, tmp_path: Path) -> None:
    other = CrossEncoder(text_reranker_path, device="cpu")
    with pytest.raises(ConfigError, match="built for another model"):
        on_texts(table(8), loss=LambdaLoss(other), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"text_to_image": LambdaLoss}, "is no loss"),
        ("LambdaLoss", "loss='LambdaLoss' is no loss"),
        (CrossEntropyLoss, "CrossEntropyLoss needs a model with a score for each of several classes"),
        (MarginMSELoss, "MarginMSELoss needs scores of a teacher"),
    ],
)
def test_losses_that_do_not_fit_are_refused_before_weights_load(
    loss: object, message: str, broken_weights: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune_reranker(broken_weights, generated_pages(6), loss=loss, output_dir=tmp_path / "run")


# Resuming


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(on_texts, tmp_path: Path, options: dict) -> None:
    # ten batches of eight in an epoch: resumed within the second one
    options = {
        **options,
        "directions": BOTH,
        "per_device_train_batch_size": 8,
        "save_steps": 8 if options else 13,
        "max_steps": 9 if options else 16,
        "save_total_limit": None,
    }
    whole = on_texts(table(8), output_dir=tmp_path, **options)
    shutil.rmtree(tmp_path / f"checkpoint-{options['max_steps']}", ignore_errors=True)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == [f"checkpoint-{options['save_steps']}"]
    resumed = on_texts(table(8), output_dir=tmp_path, resume=True, **options)
    assert resumed.trainer.state.global_step == options["max_steps"]
    assert_same_weights(whole.model, resumed.model)


def test_a_folder_with_a_run_is_kept_or_replaced(on_texts, tmp_path: Path) -> None:
    on_texts(table(8), output_dir=tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=r"holds a run already.*resume=True.*overwrite=True"):
        on_texts(table(8), output_dir=tmp_path, max_steps=1)
    result = on_texts(table(8), output_dir=tmp_path, overwrite=True, max_steps=2)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    assert result.trainer.state.global_step == 2


# Adapters and frozen parts


@pytest.mark.parametrize("head", HEADS)
def test_adapters_train_and_load_in_the_plain_host(
    head: str,
    pages_apart: tuple[RetrievalDataset, RetrievalDataset],
    qwen3_vl_path: str,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    model = build_reranker(qwen3_vl_path, head=head, device="cpu")
    options = {"lora": True, "max_steps": 2, "disable_tqdm": True, "per_device_train_batch_size": 4, "keep": "last"}
    result = finetune_reranker(model, *pages_apart, output_dir=tmp_path, **options)
    assert result.settings["model"]["lora"]
    assert 0 < result.settings["model"]["trained_share"] < 0.5
    assert result.settings["training"]["learning_rate"] == pytest.approx(5e-5)
    page = generated_pages(1)["image"][0]
    pairs = [({"text": "revenue"}, page), ({"text": "staff"}, page)]
    before = build_reranker(qwen3_vl_path, head=head, device="cpu").predict(pairs)
    after = result.model.predict(pairs)
    assert abs(after - before).max() > 1e-6
    assert CrossEncoder(str(tmp_path / "final"), device="cpu").predict(pairs) == pytest.approx(after, abs=1e-6)


def test_frozen_parts_stay(
    pages_apart: tuple[RetrievalDataset, RetrievalDataset], qwen3_vl_path: str, tmp_path: Path
) -> None:
    model = build_reranker(qwen3_vl_path, device="cpu")
    before = weights(model)
    options = {"freeze": ["vision"], "max_steps": 2, "per_device_train_batch_size": 4}
    result = finetune_reranker(model, pages_apart[0], output_dir=tmp_path, **options, **QUIET)
    changed = {name for name, value in weights(result.model).items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if ".visual." in name and "merger" not in name]
    assert result.settings["model"]["frozen_parts"] == ["vision"]


# Arguments


def test_args_of_the_caller_are_passed_on_and_only_prompts_filled(qwen3_vl_path: str, tmp_path: Path) -> None:
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    before = dict(vars(args))
    model = build_reranker(qwen3_vl_path, device="cpu")
    result = finetune_reranker(model, generated_pages(6), args=args)
    assert dict(vars(args)) == before
    assert result.output_dir == tmp_path
    given = dict(vars(result.trainer.args))
    assert {name for name in before if before[name] != given[name]} == {"prompts"}
    assert given["prompts"] == model.prompts["text_to_image"]


def test_prompts_of_the_caller_win(on_texts, tmp_path: Path) -> None:
    prompts = {"text_to_image": "page? "}
    result = on_texts(table(8), directions=BOTH, prompts=prompts, output_dir=tmp_path, max_steps=1)
    trained = result.settings["training"]["prompts"]
    assert trained["text_to_image"] == "page? "
    # what was trained is what is used, and saved
    assert result.model.prompts["text_to_image"] == "page? "
    saved = CrossEncoder(str(result.output_dir / "final"), device="cpu")
    assert saved.prompts["text_to_image"] == "page? "


def test_a_prompt_of_the_caller_is_what_predict_uses(on_texts, tmp_path: Path) -> None:
    result = on_texts(table(8), prompts="page? ", output_dir=tmp_path, max_steps=1)
    saved = CrossEncoder(str(tmp_path / "final"), device="cpu")
    assert saved.default_prompt_name == "text_to_image"
    assert saved.prompts["text_to_image"] == result.settings["training"]["prompts"] == "page? "


def test_two_prompts_for_one_direction_are_refused(broken_weights: str, tmp_path: Path) -> None:
    train = {"one": generated_pages(6), "two": generated_pages(6, seed=1)}
    with pytest.raises(ConfigError, match=r"'a' and 'b' for sets of the direction 'text_to_image'"):
        finetune_reranker(broken_weights, train, output_dir=tmp_path, prompts={"one": "a", "two": "b"})


def test_small_steps_on_half_precision_weights_warn(text_reranker_path: str, tmp_path: Path) -> None:
    model = CrossEncoder(text_reranker_path, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    options = {"max_steps": 1, "disable_tqdm": True, "num_negatives": 1, "optim": "adamw_torch"}
    with pytest.warns(UserWarning, match=r"bfloat16, and optim='adamw_torch' loses about 9\d% of its steps"):
        finetune_reranker(model, table(8), documents="text", output_dir=tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": ("text_to_imgae",)}, "directions holds 'text_to_imgae'"),
        ({"directions": ()}, r"directions=\(\): expected one or both"),
        ({"directions": "image_to_text"}, "directions='image_to_text': expected one or both"),
        ({"directions": 5}, "directions=5: expected one or both"),
        ({"directions": ("image_to_text", "image_to_text")}, "names one twice"),
        ({"num_train_epoch": 3}, "'num_train_epoch' is neither.*Did you mean 'num_train_epochs'"),
        ({"num_candidates": 1}, "num_candidates=1: expected a whole number of 2 or more"),
        ({"num_negatives": -1}, "num_negatives=-1"),
        ({"num_negatives": 0}, "num_negatives=0: every pair would be relevant"),
        ({"documents": "movie"}, "documents='movie'"),
        ({"documents": "text"}, "needs a column 'text'"),
        ({"eval_strategy": "steps"}, "needs something to measure"),
        ({"overwrite": True, "resume": True}, "Set one of them"),
        ({"resume": True}, "no checkpoint to go on from"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"lora": "all"}, "lora='all'"),
        ({"prompts": {"text_to_image": "?"}}, "prompts has a text for 'text_to_image', which is no training set"),
        (
            {"prompts": {"image": "?"}, "directions": BOTH},
            r"'image', which is no .*\('text_to_image', 'image_to_text'\)",
        ),
        (
            {"prompts": {"text_to_image": {"query": "?"}}, "directions": BOTH},
            "expected a text, or texts by training set",
        ),
        ({"prompts": 5}, "prompts=5: expected a text"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_weights_load(
    broken_weights: str, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune_reranker(broken_weights, generated_pages(6), output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_args_and_training_arguments_exclude_each_other(broken_weights: str, tmp_path: Path) -> None:
    args = CrossEncoderTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"args and learning_rate=0\.1 were both given"):
        finetune_reranker(broken_weights, generated_pages(6), args=args, learning_rate=0.1)


def test_other_models_are_refused(clip_path: str, text_reranker_path: str, tmp_path: Path) -> None:
    retriever = SentenceTransformer(clip_path, device="cpu")
    with pytest.raises(ConfigError, match=r"model=a SentenceTransformer: expected a CrossEncoder"):
        finetune_reranker(retriever, generated_pages(6), output_dir=tmp_path / "run")
    two_scores = CrossEncoder(text_reranker_path, device="cpu", num_labels=2, **IGNORE_SIZES)
    with pytest.raises(ConfigError, match="gives 2 scores to a pair"):
        finetune_reranker(two_scores, generated_pages(6), output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="no images"):
        finetune_reranker(text_reranker_path, generated_pages(6), output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="has no LM head"):
        finetune_reranker(
            without_weights(clip_path, tmp_path / "clip"), generated_pages(6), output_dir=tmp_path / "run"
        )


def test_a_template_without_roles_is_refused_before_weights_load(broken_weights: str, tmp_path: Path) -> None:
    path = with_template(broken_weights, tmp_path / "template", TEXTS_ONLY)
    with pytest.raises(ConfigError, match="chat template"):
        finetune_reranker(path, generated_pages(6), output_dir=tmp_path / "run")


@pytest.mark.parametrize("token", ["certainly not", "<|nowhere|>"], ids=["splits", "unknown"])
def test_a_token_that_is_not_one_id_is_refused_before_training(broken_weights: str, token: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(token))):
        finetune_reranker(build_reranker(broken_weights, true_token=token), generated_pages(6), output_dir=tmp_path)


def test_a_direction_that_the_data_can_not_give_is_refused(broken_weights: str, tmp_path: Path) -> None:
    few = RetrievalDataset.from_id_rows(generated_pages(3, seed=2, num_negatives=2))
    with pytest.raises(DatasetError, match="can't get 3 negatives: only 2 of the 3 query texts"):
        finetune_reranker(broken_weights, few, num_negatives=3, directions=BOTH, output_dir=tmp_path / "run")
    one = few.select_queries(1)
    with pytest.raises(ConfigError, match=r"'image_to_text' ranks query texts, and the evaluation data have only 1"):
        finetune_reranker(broken_weights, generated_pages(8), one, directions=BOTH, output_dir=tmp_path / "run")


def test_evaluation_pages_inside_the_training_pages_are_refused(broken_weights: str, tmp_path: Path) -> None:
    rows = generated_pages(12, seed=2)
    with pytest.raises(DatasetError, match="12 documents are relevant in training and in evaluation"):
        finetune_reranker(broken_weights, rows, rows, output_dir=tmp_path / "run")


def test_overlap_can_be_allowed(on_texts, tmp_path: Path) -> None:
    assert on_texts(table(8), table(8), allow_overlap=True, output_dir=tmp_path, max_steps=1).after


def test_a_damaged_page_is_refused_before_weights_load(broken_weights: str, tmp_path: Path) -> None:
    rows = generated_pages(6, seed=2).cast_column("image", generated_pages(1).features["image"].__class__(decode=False))
    images = rows["image"][:]
    images[3] = {"bytes": images[3]["bytes"][:-200], "path": None}
    damaged = rows.remove_columns("image").add_column("image", images)
    with pytest.raises(ImageDecodeError, match=re.escape(repr(rows["id"][3]))):
        finetune_reranker(broken_weights, damaged, output_dir=tmp_path / "run")


# Texts and negatives


def test_a_text_that_looks_like_a_path_stays_a_text(
    run: FinetuneResult, on_texts, pages: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.png"
    pages["image"][0].save(file)
    rows = [{"query": str(file), "document": pages["image"][1], "label": 1}]
    assert run.trainer.data_collator(rows)["query"] == [{"text": str(file)}]
    # a cross-encoder for texts takes bare ones, and never opens them
    texts = [f"{COLOURS[row % 5]} {row}" for row in range(7)]
    result = on_texts(table(8, texts=[str(file), *texts]), output_dir=tmp_path / "run", loss=LambdaLoss, max_steps=1)
    assert str(file) in [row["query"] for row in result.trainer.train_dataset]


def test_negatives_that_a_retriever_confuses_are_trained_on(
    pages_apart: tuple[RetrievalDataset, RetrievalDataset], qwen3_vl_path: str, tmp_path: Path
) -> None:
    retriever = SentenceTransformer(tiny_clip(tmp_path / "clip"), device="cpu")
    train = pages_apart[0]
    mined = mine_hard_negatives(train, retriever, num_negatives=3, relative_margin=None, show_progress_bar=False)
    options = {"num_negatives": 3, "max_steps": 1, "per_device_train_batch_size": 4}
    result = finetune_reranker(qwen3_vl_path, mined, output_dir=tmp_path / "run", **options, **QUIET)
    data = result.settings["data"]
    assert (data["negatives_listed"], data["negatives_filled_at_random"]) == (18 * 3, 0)
    ids = result.trainer.train_dataset.with_format(None)
    trained_on: dict[str, list[str]] = {}
    for query_id, document_id, label in zip(ids["query_id"], ids["document_id"], ids["label"], strict=True):
        trained_on.setdefault(query_id, []).extend([document_id] * (label == 0))
    found = dict(zip(mined.negatives["query_id"], mined.negatives["document_ids"], strict=True))
    assert trained_on == {query_id: list(found[query_id]) for query_id in trained_on}


# The recipe


@pytest.mark.parametrize(
    ("num_queries", "batch", "accumulation"),
    [(3, 2, 1), (8, 4, 1), (16, 8, 1), (40, 8, 2), (100, 8, 4), (400, 8, 4)],
)
def test_small_data_get_small_steps(num_queries: int, batch: int, accumulation: int, tmp_path: Path) -> None:
    args = recipe.training_arguments(
        RERANKING,
        num_queries * 5,
        output_dir=str(tmp_path),
        seed=0,
        evaluates=True,
        in_batch_negatives=False,
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (batch, accumulation)
    assert args.learning_rate == 5e-6
    assert args.num_train_epochs == 1


def test_shuffled_batches_depend_on_seed_and_epoch_alone() -> None:
    rows = Dataset.from_dict({"label": list(range(10))})
    one, other = (ShuffledBatchSampler(rows, 4, False, generator=torch.Generator(), seed=3) for _ in range(2))
    first = list(one)
    assert sorted(row for batch in first for row in batch) == list(range(10))
    assert [len(batch) for batch in first] == [4, 4, 2]
    one.set_epoch(1)
    other.set_epoch(1)
    assert list(one) == list(other) != first
    assert len(ShuffledBatchSampler(rows, 4, True, seed=3)) == 2


def test_shuffled_batches_are_full_and_even_for_several_processes() -> None:
    rows = Dataset.from_dict({"label": list(range(21))})
    batches = list(ShuffledBatchSampler(rows, 4, False, seed=3, num_processes=2))
    assert [len(batch) for batch in batches] == [4] * 4
    with pytest.raises(DatasetError, match="21 rows do not fill one batch of 12 rows for each of 2 processes"):
        ShuffledBatchSampler(rows, 12, False, num_processes=2)


def test_the_call_is_the_contract() -> None:
    parameters = inspect.signature(finetune_reranker).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}
    assert defaults == {
        "guard_dataset": None,
        "thumbnails": True,
        "output_dir": None,
        "num_negatives": 4,
        "directions": ("text_to_image",),
        "loss": None,
        "args": None,
        "documents": "image",
        "num_candidates": 10,
        "lora": None,
        "freeze": (),
        "allow_overlap": False,
        "overwrite": False,
        "resume": False,
        "keep": "best",
        "seed": 42,
        "callbacks": (),
        "evaluator": None,
        "max_pixels": None,
        "page_store": "auto",
        "dry_run": False,
        "queries": "text",
    }
