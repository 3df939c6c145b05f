"""A plan says what the run will come to, and leaves no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from comparing import assert_same_weights
from mmtune import (
    ConfigError,
    RetrievalDataset,
    build_evaluator,
    build_reranker,
    finetune,
    finetune_reranker,
    load_model,
)
from mmtune.testing import generated_pages, tiny_llava
from mmtune.training.plan import Plan, show_seconds

OPTIONS: dict[str, Any] = {"per_device_train_batch_size": 3, "learning_rate": 1e-3, "disable_tqdm": True}


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(26, num_negatives=1, seed=1)).split(6)


def plan_of(call: Any, *args: Any, **options: Any) -> Plan:
    plan = call(*args, dry_run=True, **options)
    assert isinstance(plan, Plan)
    return plan


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"num_train_epochs": 3},
        {"max_steps": 5, "keep": "last"},
        {"eval_steps": 2, "save_steps": 2},
        {"eval_strategy": "epoch", "num_train_epochs": 2},
        {"eval_strategy": "no", "save_strategy": "no", "gradient_accumulation_steps": 2},
    ],
    ids=["recipe", "epochs", "few steps", "steps", "each epoch", "never"],
)
def test_what_is_planned_is_what_happens(schedule, data, clip_path: str, tmp_path: Path, monkeypatch) -> None:
    plan = plan_of(finetune, clip_path, *data, output_dir=tmp_path / "run", **OPTIONS, **schedule)
    assert not (tmp_path / "run").exists()
    evaluated: list[int] = []
    call = type(build_evaluator(data[1], show_progress_bar=False)).__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        evaluated.append(1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr("mmtune.evaluation.retrieval.RetrievalEvaluator.__call__", counted)
    result = finetune(clip_path, *data, output_dir=tmp_path / "run", save_total_limit=None, **OPTIONS, **schedule)
    assert plan.steps == result.trainer.state.max_steps
    assert plan.facts["evaluations"] == len(evaluated)
    assert plan.facts["checkpoints"] == len(list((tmp_path / "run").glob("checkpoint-*")))
    assert plan.seconds > 0
    assert plan.memory_bytes > 0


def test_a_run_after_its_plan_is_the_run_without(data, clip_path: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 4, "freeze": ("vision",)}
    models = [load_model(clip_path, device="cpu") for _ in range(2)]
    before = {name: weight.clone() for name, weight in models[0].state_dict().items()}
    plan_of(finetune, models[0], *data, output_dir=tmp_path / "a", **options)
    assert all(torch.equal(weight, before[name]) for name, weight in models[0].state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in models[0].parameters())
    results = [finetune(model, *data, output_dir=tmp_path / "a", overwrite=True, **options) for model in models]
    assert results[0].before == results[1].before
    assert results[0].after == results[1].after
    assert_same_weights(results[0].model, results[1].model)


def test_nothing_is_written_reported_or_told_to_callbacks(data, clip_path: str, tmp_path: Path) -> None:
    told = []

    class Mine(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            told.append(1)

    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    plan = plan_of(finetune, clip_path, *data, output_dir=tmp_path / "run", callbacks=[Mine], **OPTIONS)
    assert sorted(tmp_path.rglob("*")) == before
    assert told == []
    assert f"{plan.steps} steps, about" in str(plan)


def test_a_reranker_and_rows_without_evaluation_are_planned(data, tmp_path: Path) -> None:
    reranker = build_reranker(tiny_llava(tmp_path / "llava"), device="cpu")
    plan = plan_of(finetune_reranker, reranker, *data, output_dir=tmp_path / "run", num_negatives=1, **OPTIONS)
    assert plan.facts["evaluations"] == 12
    alone = plan_of(finetune_reranker, reranker, data[0], output_dir=tmp_path / "run", num_negatives=1, **OPTIONS)
    assert alone.facts["evaluations"] == 0
    assert alone.steps == plan.steps


def test_each_choice_has_its_reason(data, clip_path: str, tmp_path: Path) -> None:
    plan = plan_of(finetune, clip_path, *data, output_dir=tmp_path / "run", lora=True, learning_rate=1e-3)
    assert plan.choices["learning_rate"] == (1e-3, "given")
    batch, reason = plan.choices["per_device_train_batch_size"]
    assert batch < 64
    assert "ten steps" in reason
    assert plan.choices["pages"][0] == {"CLIPImageProcessor": "bytes"}
    assert "in memory" in plan.choices["page_store"][0]
    assert all(isinstance(reason, str) for _, reason in plan.choices.values())
    assert plan.facts["pixels a page"] == f"{64 * 64:,}"


def test_an_evaluator_of_ones_own_is_timed(data, clip_path: str, tmp_path: Path) -> None:
    evaluator = build_evaluator(data[1], name="own", show_progress_bar=False)
    plan = plan_of(finetune, clip_path, data[0], output_dir=tmp_path / "run", evaluator=evaluator, **OPTIONS)
    assert plan.facts["evaluations"] == min(10, plan.steps) + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dry_run": 1}, "dry_run=1"),
        ({"dry_run": True, "resume": "auto"}, "plans a run from its start, and resume='auto'"),
    ],
)
def test_what_can_not_be_planned_is_refused(options, message: str, data, clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(clip_path, *data, output_dir=tmp_path / "run", **options)


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
