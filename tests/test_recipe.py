"""What the two calls choose: prompts, sizes and similarity, measuring, batches, and the host's arguments."""

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback

from mmtune import ConfigError, ConflictFreeBatchSampler, RetrievalDataset, build_evaluator, finetune
from mmtune.testing import generated_pages
from mmtune.training import recipe
from mmtune.training.batches import StepwiseRoundRobinBatchSampler
from mmtune.training.losses import in_batch_loss
from mmtune.training.mini_batches import MiniBatches
from mmtune.training.trainers import EMBEDDING, RERANKING

QUIET = {"disable_tqdm": True, "max_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(20, seed=1)).split(6)


@pytest.fixture
def model(clip_path: str) -> SentenceTransformer:
    return SentenceTransformer(clip_path, device="cpu")


# Prompts


@pytest.mark.parametrize(
    ("given", "query", "document"),
    [
        ({"query": "find: "}, "find: ", "page: "),
        ({"query": "find: ", "image": "scan: "}, "find: ", "scan: "),
        ("all: ", "all: ", "all: "),
        (None, "", ""),
    ],
)
def test_prompts_that_are_trained_with_are_the_models(
    model: SentenceTransformer,
    data: tuple[RetrievalDataset, RetrievalDataset],
    tmp_path: Path,
    given: Any,
    query: str,
    document: str,
) -> None:
    model.prompts = {"query": "old: ", "document": "page: "}
    result = finetune(model, *data, output_dir=tmp_path, prompts=given, **QUIET)
    trained = result.trainer.data_collator.prompts or {}
    assert (trained.get("query", ""), trained.get("image", "")) == (query, document)
    saved = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert {"query": query, "document": document}.items() <= saved.prompts.items()
    assert result.settings["training"]["prompts_of_model"] == {"query": query, "document": document}
    # what was measured is what a user gets
    again = build_evaluator(data[1], truncate_dims=[64], show_progress_bar=False)(saved)
    assert result.after == pytest.approx(again, abs=1e-6)


def test_prompts_of_args_are_the_models_too(
    model: SentenceTransformer, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path
) -> None:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        prompts={"query": "find: "},
        batch_sampler=ConflictFreeBatchSampler,
        save_strategy="no",
        max_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model.prompts = {"query": "", "document": "page: "}
    result = finetune(model, data[0], args=args)
    assert result.trainer.args.prompts == {"query": "find: "}
    assert result.model.prompts == {"query": "find: ", "document": ""}


def test_two_prompts_for_documents_are_refused(
    model: SentenceTransformer, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path
) -> None:
    before = dict(model.prompts)
    for prompts in ({"image": "a", "negative_0": "b"}, {"one": {"image": "a"}, "two": {"image": "b"}}):
        train: Any = data[0] if "image" in prompts else {"one": data[0], "two": data[1]}
        with pytest.raises(ConfigError, match=r"'a' and 'b'.*one prompt for each document"):
            finetune(model, train, output_dir=tmp_path / "run", prompts=prompts, **QUIET)
    assert model.prompts == before


# Sizes and similarity


def test_a_model_that_cuts_its_embeddings_trains_all_its_sizes(
    model: SentenceTransformer, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path
) -> None:
    model.truncate_dim = 64
    with pytest.warns(UserWarning, match=r"truncate_dim=64, and gives all 128"):
        result = finetune(model, *data, output_dir=tmp_path, **QUIET)
    assert result.settings["training"]["matryoshka_dims"] == [128, 64]
    assert [row.label for row in result.rows] == ["full", "64"]
    assert SentenceTransformer(str(tmp_path / "final"), device="cpu").get_embedding_dimension() == 128


def test_a_model_of_dot_products_trains_with_them(
    model: SentenceTransformer, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path
) -> None:
    model.similarity_fn_name = "dot"
    result = finetune(model, *data, output_dir=tmp_path, **QUIET)
    loss = result.trainer.loss
    assert isinstance(loss, CachedMultipleNegativesRankingLoss)
    one = torch.tensor([[3.0, 4.0]])
    assert (loss.similarity_fct(one, one).item(), loss.scale) == (25.0, 1.0)
    assert result.primary_metric == "vdr_dot_ndcg@10"
    assert result.settings["training"]["similarity"] == "dot"


def test_dot_products_of_length_one_are_cosines_and_sizes_need_cosines(model: SentenceTransformer) -> None:
    options: dict[str, Any] = {"mini_batches": MiniBatches(2, is_cached=True, reason="")}
    model.similarity_fn_name = "dot"
    with pytest.warns(UserWarning, match="trains with cosine similarity, and the model compares by dot"):
        loss: Any = in_batch_loss(model, EMBEDDING, matryoshka_dims=[64], **options)
    assert loss.loss.scale == 20
    model.append(Normalize())
    loss = in_batch_loss(model, EMBEDDING, matryoshka_dims="auto", **options)
    assert (loss.loss.scale, loss.matryoshka_dims) == (20, (128, 64))


# Measuring


class Constant(BaseEvaluator):
    """Gives one number, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        self.calls += 1
        self.primary_metric = "mine_score"
        return {"mine_score": float(self.calls), "mine_other": 0.5}


class Stops(TrainerCallback):
    """Stops after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_an_evaluator_alone_measures_before_during_and_after(
    clip_path: str, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path
) -> None:
    evaluator = Constant()
    result = finetune(clip_path, data[0], output_dir=tmp_path, evaluator=evaluator, **QUIET | {"max_steps": 2})
    assert evaluator.calls == 4
    assert (result.before["mine_score"], result.after["mine_score"]) == (1.0, 4.0)
    assert result.primary_metric == "mine_score"
    assert result.settings["training"]["best_step"] == 2
    assert "1.0000" in str(result)


def test_an_evaluator_beside_an_evaluation_set_adds_its_metrics(
    clip_path: str, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path
) -> None:
    result = finetune(clip_path, *data, output_dir=tmp_path / "run", evaluator=Constant(), **QUIET)
    assert result.primary_metric == "vdr_cosine_ndcg@10"
    assert {"mine_score", "vdr_cosine_ndcg@10"} <= result.after.keys()
    same = build_evaluator(data[1], show_progress_bar=False)
    with pytest.raises(ConfigError, match=r"gives 'vdr.*Build it with another name"):
        finetune(clip_path, *data, output_dir=tmp_path / "other", evaluator=same, **QUIET)


def test_callbacks_are_called(clip_path: str, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path) -> None:
    result = finetune(clip_path, data[0], output_dir=tmp_path, callbacks=[Stops()], **QUIET | {"max_steps": 5})
    assert result.trainer.state.global_step == 1


@pytest.mark.parametrize(("given", "used"), [({}, 16), ({"per_device_eval_batch_size": 3}, 3)])
def test_the_evaluation_batch_of_the_caller_is_used(
    clip_path: str, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path, given: Mapping[str, Any], used: int
) -> None:
    evaluator: Any = finetune(clip_path, *data, output_dir=tmp_path, **QUIET, **given).trainer.evaluator.own
    assert evaluator.batch_size == used


def test_pages_are_limited_where_the_model_can(qwen3_vl_path: str, tmp_path: Path) -> None:
    result = finetune(qwen3_vl_path, generated_pages(6), output_dir=tmp_path, max_pixels=4096, **QUIET)
    assert result.settings["model"]["max_pixels"] == 4096


# Leaks


def test_leaks_are_warned_of(clip_path: str, tmp_path: Path) -> None:
    pages = RetrievalDataset.from_id_rows(generated_pages(24))
    ids = pages.queries["query_id"][:]
    train, evaluation = pages.select_queries(ids[:16]), pages.select_queries(ids[16:])
    with pytest.warns(
        UserWarning, match=r"\d+ answers of the evaluation are listed as training negatives, e.g. .*split"
    ):
        finetune(clip_path, train, evaluation, output_dir=tmp_path, **QUIET)


def test_a_split_leaks_nothing(
    clip_path: str, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    finetune(clip_path, *data, output_dir=tmp_path, **QUIET)
    assert not [each for each in recwarn if "seen a part of the evaluation" in str(each.message)]


# Batches


def rows_without_negatives(count: int) -> Dataset:
    rows = generated_pages(count).remove_columns("negatives")
    return RetrievalDataset.from_id_rows(rows, negatives_column=None).training_rows()


def test_no_batch_is_one_row_that_nothing_can_be_learned_from() -> None:
    rows = rows_without_negatives(9)
    sampler = ConflictFreeBatchSampler(rows, batch_size=4, drop_last=False, num_processes=1)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(map(len, batches)) == [4, 4]
        assert len(sampler) == 2
        seen.append(set(itertools.chain(*batches)))
    assert set(range(9)) == seen[0] | seen[1]
    with_negatives = RetrievalDataset.from_id_rows(generated_pages(9)).training_rows()
    assert sorted(map(len, ConflictFreeBatchSampler(with_negatives, 4, False, num_processes=1))) == [1, 4, 4]


def test_missing_negatives_suggest_mining(clip_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = generated_pages(8).remove_columns("negatives")
    data = RetrievalDataset.from_id_rows(rows, negatives_column=None)
    with caplog.at_level(logging.WARNING):
        finetune(clip_path, data, output_dir=tmp_path, **QUIET)
    assert "mine_hard_negatives(train_dataset, model)" in caplog.text


def test_processes_in_turn_take_a_step_from_one_dataset() -> None:
    parts = [RetrievalDataset.from_id_rows(generated_pages(count)).training_rows() for count in (9, 17)]
    samplers = [ConflictFreeBatchSampler(rows, 2, False, num_processes=2) for rows in parts]
    sampler = StepwiseRoundRobinBatchSampler(dataset=ConcatDataset(parts), batch_samplers=samplers, seed=0)
    batches = list(sampler)
    owner = [{int(row >= len(parts[0])) for row in batch} for batch in batches]
    assert owner == [{0}, {0}, {1}, {1}] * 2
    assert len(sampler) == len(batches) == 8


def test_in_turn_is_stepwise_by_name() -> None:
    args = recipe.training_arguments(
        EMBEDDING, 40, output_dir="x", seed=1, evaluates=False, multi_dataset_batch_sampler="round_robin"
    )
    assert args.multi_dataset_batch_sampler is StepwiseRoundRobinBatchSampler


def test_fewer_rows_than_a_batch_without_short_ones_are_named(clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the 6 training rows don't fill one of 8"):
        finetune(
            clip_path, generated_pages(6), output_dir=tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8
        )


# The host's arguments


@pytest.mark.parametrize(("given", "warmup"), [({"warmup_ratio": 0.0}, 0), ({"warmup_ratio": 0.3}, 0.3), ({}, 0.1)])
def test_no_warm_up_is_none(given: dict[str, Any], warmup: float) -> None:
    args = recipe.training_arguments(EMBEDDING, 1000, output_dir="x", seed=1, evaluates=False, **given)
    assert args.warmup_steps == warmup


def test_several_gpus_of_one_process_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(**given: Any) -> int:
        args = recipe.training_arguments(EMBEDDING, 400, output_dir="x", seed=1, evaluates=False, **given)
        return args.per_device_train_batch_size

    assert batch() == 40
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (batch(), batch(use_cpu=True)) == (10, 40)


@pytest.mark.parametrize(
    ("loss", "flag"), [(MultipleNegativesRankingLoss, False), (CachedMultipleNegativesRankingLoss, None)]
)
def test_processes_wait_for_all_weights_where_each_column_is_a_pass(
    model: SentenceTransformer, loss: type[torch.nn.Module], flag: bool | None
) -> None:
    args = recipe.training_arguments(EMBEDDING, 40, output_dir="x", seed=1, evaluates=False)
    done = recipe.complete_arguments(args, model, loss(model), ["query"], prompts=None, metric=None, rates={})
    assert done.ddp_find_unused_parameters is flag


def test_rerankers_in_processes_wait_for_all_weights(text_encoder_path: str) -> None:
    model = CrossEncoder(text_encoder_path, num_labels=1, device="cpu")
    args = recipe.training_arguments(RERANKING, 40, output_dir="x", seed=1, evaluates=False)
    loss = BinaryCrossEntropyLoss(model)
    done = recipe.complete_arguments(args, model, loss, ["query"], prompts=None, metric=None, rates={})
    assert done.ddp_find_unused_parameters is False


def test_no_bar_is_shown_where_none_is_wanted(
    clip_path: str, data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    finetune(clip_path, *data, output_dir=tmp_path / "quiet", **QUIET)
    assert "it/s]" not in capsys.readouterr().err
    finetune(clip_path, *data, output_dir=tmp_path / "loud", **QUIET | {"disable_tqdm": False})
    assert "it/s]" in capsys.readouterr().err
