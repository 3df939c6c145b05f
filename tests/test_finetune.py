"""The main job: what a user loses when it goes wrong is tested first."""

import json
import logging
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from huggingface_hub import ModelCard
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from comparing import assert_same_weights, weights
from mmtune import (
    ConfigError,
    ConflictFreeBatchSampler,
    DatasetError,
    FinetuneResult,
    ImageDecodeError,
    MissingDocumentError,
    RetrievalDataset,
    build_evaluator,
    finetune,
)
from mmtune.testing import generated_pages, tiny_clip

QUIET = {"disable_tqdm": True, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(40, seed=5)).split(10)


@pytest.fixture(scope="module")
def run(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path_factory: pytest.TempPathFactory
) -> FinetuneResult:
    return finetune(clip_path, *data, output_dir=tmp_path_factory.mktemp("runs") / "run", num_train_epochs=8, **QUIET)


# What a run leaves behind


def test_a_run_leaves_model_metrics_and_report(run: FinetuneResult) -> None:
    names = {path.name for path in run.output_dir.iterdir()}
    assert {"final", "metrics.json", "report.md", "per_query.parquet"} <= names
    metrics = json.loads((run.output_dir / "metrics.json").read_text())
    assert set(metrics) == {"before", "after", "primary_metric", "settings", "verdict", "versions"}
    assert metrics["primary_metric"] == "vdr_cosine_ndcg@10" == run.primary_metric
    assert metrics["before"] == run.before
    assert metrics["after"] == run.after
    assert metrics["versions"]["sentence-transformers"]


def test_the_card_says_what_was_found_on_which_data_and_the_hub_reads_it(run: FinetuneResult, clip_path: str) -> None:
    path = run.output_dir / "final" / "README.md"
    card = path.read_text()
    assert f"**{run.verdict}.**" in card
    assert run.settings["data"]["fingerprints"]["training data"] in card
    assert "### Limits\n\n- Measured on " in card
    assert "truncate_dim=64" in card
    assert str(Path(clip_path).parent) not in card.split("## Usage")[0], "where a folder lay is nobody's business"
    parsed = ModelCard.load(path)
    measured = {each.metric_type: each.metric_value for each in parsed.data.eval_results if each.dataset_type == "vdr"}
    assert measured["cosine_ndcg@10"] == pytest.approx(run.after[run.primary_metric], abs=1e-9)
    assert not [each for each in path.parent.rglob("*") if each.suffix in (".png", ".jpg", ".webp")]


def test_before_and_after_are_the_scores_of_the_two_models(
    run: FinetuneResult, data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str
) -> None:
    base = SentenceTransformer(clip_path, device="cpu")
    evaluator = build_evaluator(data[1], truncate_dims=[64], show_progress_bar=False)
    assert run.before == pytest.approx(evaluator(base), abs=1e-9)
    assert run.after == pytest.approx(evaluator(run.model), abs=1e-9)
    assert [name for name, value in weights(base).items() if not torch.equal(value, weights(run.model)[name])]


def test_the_result_prints_as_a_table_with_a_row_per_dimension(run: FinetuneResult) -> None:
    table = str(run).splitlines()[1:]
    assert str(run).splitlines()[0] == f"{run.verdict}."
    assert table[0].split() == ["ndcg@10", "before", "after", "change"]
    assert [line.split()[0] for line in table[2:-1]] == ["full", "64"]
    assert f"{run.after[run.primary_metric]:.4f}" in table[2]


def test_the_saved_model_embeds_the_same_in_the_plain_host(run: FinetuneResult, pages: Dataset) -> None:
    loaded = SentenceTransformer(str(run.output_dir / "final"), device="cpu")
    images = pages["image"][:4]
    assert type(loaded) is SentenceTransformer
    torch.testing.assert_close(
        loaded.encode_document(images, convert_to_tensor=True),
        run.model.encode_document(images, convert_to_tensor=True),
        atol=1e-6,
        rtol=0,
    )


def test_the_saved_model_needs_no_mmtune(run: FinetuneResult) -> None:
    modules = json.loads((run.output_dir / "final" / "modules.json").read_text())
    assert [module["type"] for module in modules if "mmtune" in module["type"]] == []


def test_no_training_image_is_copied_anywhere(run: FinetuneResult) -> None:
    images = [path for path in run.output_dir.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".webp")]
    assert images == []
    assert not list(run.output_dir.rglob("assets"))


def test_the_model_card_states_base_data_recipe_and_gain(run: FinetuneResult, clip_path: str) -> None:
    card = (run.output_dir / "final" / "README.md").read_text()
    section = card.split("## Finetuning")[1].split("## Model Details")[0]
    for fact in (
        f"| base model | {Path(clip_path).name} |",
        "| training queries | 30 |",
        "| learning rate | 0.001 |",
        f"{run.after[run.primary_metric]:.4f}",
    ):
        assert fact in section


def test_the_model_card_is_of_pages_and_of_this_model(run: FinetuneResult, clip_path: str) -> None:
    card = (run.output_dir / "final" / "README.md").read_text()
    usage = card.split("## Usage")[1].split("```python\n")[1].split("```")[0]
    assert repr(str(run.output_dir / "final")) in usage
    assert 'Image.open("page-1.png")' in usage
    compile(usage, "usage", "exec")
    assert "sentence_transformers_model_id" not in card
    assert "Red Planet" not in card
    assert f"**Base model:** `{Path(clip_path).name}`" in card
    assert "- visual-document-retrieval" in card.split("---")[1]
    assert card.index("## Finetuning") < card.index("<details>") < card.index("## Model Details")


def test_settings_say_what_was_chosen(run: FinetuneResult) -> None:
    training, data = run.settings["training"], run.settings["data"]
    assert training["matryoshka_dims"] == [128, 64]
    assert training["loss"] == "CachedMultipleNegativesRankingLoss"
    assert training["batch_sampler"] == "ConflictFreeBatchSampler"
    assert training["batch_size"] == 7  # a quarter of 30 rows
    assert data["training_rows"] == data["negatives_listed"] == 30
    assert data["evaluation_queries"] == 10


def test_ten_evaluations_also_in_a_short_run(run: FinetuneResult) -> None:
    evaluations = [entry["step"] for entry in run.trainer.state.log_history if "eval_vdr_cosine_ndcg@10" in entry]
    during = [step for step in evaluations if step > 0]
    assert len(set(during)) == 10
    assert max(during) == run.trainer.state.max_steps


EARLY_IS_BEST = {**QUIET, "allow_overlap": True}
"""Scores of so short a run go up and down: on these pages an early checkpoint is the best."""


def early_is_best() -> tuple[Dataset, Dataset]:
    rows = generated_pages(24, seed=1)
    return rows, rows


def test_the_best_checkpoint_is_the_result(clip_path: str, tmp_path: Path) -> None:
    run = finetune(clip_path, *early_is_best(), output_dir=tmp_path, **EARLY_IS_BEST)
    state = run.trainer.state
    assert state.best_global_step < state.max_steps
    best = SentenceTransformer(str(tmp_path / f"checkpoint-{state.best_global_step}"), device="cpu")
    last = SentenceTransformer(str(tmp_path / f"checkpoint-{state.max_steps}"), device="cpu")
    final = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert_same_weights(weights(final), weights(best))
    assert any(not torch.equal(value, weights(last)[name]) for name, value in weights(final).items())
    assert run.settings["training"]["best_step"] == state.best_global_step
    assert run.after["vdr_cosine_ndcg@10"] == pytest.approx(state.best_metric, abs=1e-9)


def test_the_best_of_all_evaluations_is_kept(run: FinetuneResult) -> None:
    best = max(
        entry["eval_vdr_cosine_ndcg@10"]
        for entry in run.trainer.state.log_history
        if entry.get("step", 0) > 0 and "eval_vdr_cosine_ndcg@10" in entry
    )
    best = max(best, run.before["vdr_cosine_ndcg@10"])
    assert run.after["vdr_cosine_ndcg@10"] == pytest.approx(best, abs=1e-9)


# Parity with the plain host


@pytest.mark.parametrize("evaluates", [True, False], ids=["with evaluation", "without evaluation"])
def test_weights_equal_those_of_a_plain_host_script(
    data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path, evaluates: bool
) -> None:
    train, evaluation = data
    path = tiny_clip(tmp_path / "clip")

    def args(folder: str) -> SentenceTransformerTrainingArguments:
        return SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=6,
            num_train_epochs=2,
            learning_rate=1e-3,
            warmup_steps=0.1,
            batch_sampler=ConflictFreeBatchSampler,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=4,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=7,
        )

    ours = finetune(path, train, evaluation if evaluates else None, args=args("ours"))

    model = SentenceTransformer(path, device="cpu")
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=6)
    loss = MatryoshkaLoss(model, loss, matryoshka_dims=[128, 64])
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args("theirs"),
        train_dataset=train.training_rows(1),
        loss=loss,
        evaluator=build_evaluator(evaluation, truncate_dims=[64]) if evaluates else None,
    )
    trainer.train()
    assert_same_weights(weights(ours.model), weights(model))


def test_a_dropout_model_trains_as_in_the_host(data: tuple[RetrievalDataset, RetrievalDataset], tmp_path: Path) -> None:
    path = tiny_clip(tmp_path / "clip")

    def model() -> SentenceTransformer:
        loaded = SentenceTransformer(path, device="cpu")
        loaded[0].model.config.vision_config.attention_dropout = 0.2
        for module in loaded.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.2
        return loaded

    def args(folder: str) -> SentenceTransformerTrainingArguments:
        return SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=6,
            max_steps=3,
            learning_rate=1e-3,
            batch_sampler=ConflictFreeBatchSampler,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )

    # The measurement before training must not draw from the generators that dropout draws from.
    ours = finetune(model(), *data, args=args("ours"), loss=MultipleNegativesRankingLoss)
    plain = model()
    SentenceTransformerTrainer(
        model=plain,
        args=args("theirs"),
        train_dataset=data[0].training_rows(1),
        loss=MultipleNegativesRankingLoss(plain),
    ).train()
    assert_same_weights(weights(ours.model), weights(plain))


def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    train = data[0]
    options = {**QUIET, "num_train_epochs": 2, "save_steps": 8, "save_total_limit": None, "max_steps": 12}
    whole = finetune(clip_path, train, output_dir=tmp_path / "whole", **options)
    steps_an_epoch = math.ceil(30 / whole.settings["training"]["batch_size"])
    assert 8 % steps_an_epoch != 0, "resumed within an epoch"
    shutil.rmtree(tmp_path / "whole" / "checkpoint-12")
    resumed = finetune(clip_path, train, output_dir=tmp_path / "whole", resume=True, **options)
    assert_same_weights(weights(whole.model), weights(resumed.model))


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    options = {**QUIET, "save_steps": 5}
    finetune(clip_path, data[0], output_dir=tmp_path, **options)
    (tmp_path / "checkpoint-99").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-99 is passed over: it was cut off"):
        resumed = finetune(clip_path, data[0], output_dir=tmp_path, resume=True, **options)
    assert resumed.trainer.state.global_step == 10


def test_a_moved_run_finds_its_best_checkpoint(clip_path: str, tmp_path: Path) -> None:
    first = finetune(clip_path, *early_is_best(), output_dir=tmp_path / "a", **EARLY_IS_BEST)
    assert first.trainer.state.best_global_step < first.trainer.state.max_steps
    (tmp_path / "a").rename(tmp_path / "b")
    again = finetune(clip_path, *early_is_best(), output_dir=tmp_path / "b", resume=True, **EARLY_IS_BEST)
    assert again.after == pytest.approx(first.after, abs=1e-9)


def test_a_run_that_failed_early_does_not_block_its_folder(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    class Failing(MultipleNegativesRankingLoss):
        def forward(self, *args: object) -> torch.Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(clip_path, *data, output_dir=tmp_path, loss=Failing, **QUIET)
    finetune(clip_path, *data, output_dir=tmp_path, max_steps=1, **QUIET)


# Choices


def test_prompts_of_the_model_are_trained_with(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    model = SentenceTransformer(clip_path, device="cpu", prompts={"query": "find: ", "document": ""})
    result = finetune(model, data[0], output_dir=tmp_path, max_steps=1, **QUIET)
    assert result.settings["training"]["prompts"] == {"query": "find: "}
    assert result.trainer.data_collator.prompts == {"query": "find: "}


def test_args_of_the_caller_are_not_changed(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        batch_sampler=ConflictFreeBatchSampler,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    before = dict(vars(args))
    model = SentenceTransformer(clip_path, device="cpu", prompts={"query": "find: "})
    result = finetune(model, data[0], args=args)
    assert dict(vars(args)) == before
    assert result.output_dir == tmp_path
    assert result.trainer.args.prompts == {"query": "find: "}


def test_a_sampler_that_knows_no_relevance_is_warned_of(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False
    )
    with pytest.warns(UserWarning, match="may put documents that are relevant"):
        finetune(clip_path, data[0], args=args)


def test_a_loss_by_callable_trains(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    result = finetune(clip_path, *data, output_dir=tmp_path, loss=MultipleNegativesRankingLoss, max_steps=2, **QUIET)
    assert result.settings["training"]["loss"] == "MultipleNegativesRankingLoss"
    assert [row.label for row in result.rows] == ["full"]


def test_without_an_evaluation_set_nothing_is_claimed(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    result = finetune(clip_path, data[0], output_dir=tmp_path, max_steps=1, **QUIET)
    assert (result.before, result.after, result.primary_metric) == ({}, {}, None)
    assert "nothing is known about the gain" in str(result)
    assert "nothing is known about the gain" in result.report


def test_a_query_that_looks_like_an_image_trains_as_text(clip_path: str, tmp_path: Path) -> None:
    rows = generated_pages(8, seed=3)
    path = tmp_path / "page.png"
    rows[0]["image"].save(path)
    queries = [str(path) if query is not None else None for query in rows["query"]]
    # Equal texts can't share a batch, so the other rows keep theirs.
    queries[1:] = rows["query"][1:]
    data = RetrievalDataset.from_id_rows(rows.remove_columns("query").add_column("query", queries))
    result = finetune(clip_path, data, output_dir=tmp_path / "run", max_steps=1, **QUIET)
    batch = result.trainer.data_collator([data.training_rows(1)[row] for row in range(len(data))])
    assert "query_input_ids" in batch
    assert "query_pixel_values" not in batch


def test_documents_may_be_texts(text_rows: RetrievalDataset, clip_path: str, tmp_path: Path) -> None:
    result = finetune(clip_path, text_rows, output_dir=tmp_path, documents="text", max_steps=1, **QUIET)
    assert result.settings["data"]["documents"] == "text"


@pytest.fixture
def text_rows() -> RetrievalDataset:
    names = [f"report {i}" for i in range(6)]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": names, "text": [f"the text of {name}" for name in names]}),
        Dataset.from_dict({"query_id": names, "text": [f"what says {name}" for name in names]}),
        Dataset.from_dict({"query_id": names, "document_id": names, "score": [1] * 6}),
        Dataset.from_dict({"query_id": names, "document_ids": [[names[(i + 1) % 6]] for i in range(6)]}),
    )


# Bad input: a named error, before weights are loaded wherever that is possible


@pytest.fixture
def broken_weights(clip_path: str, tmp_path: Path) -> str:
    """A checkpoint whose weights can't be read: an error about anything else came before them."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in Path(clip_path).iterdir():
        content = b"no weights" if path.suffix == ".safetensors" else path.read_bytes()
        (folder / path.name).write_bytes(content)
    return str(folder)


def with_value(name: str, value: object) -> Dataset:
    """Generated pages with one value in all rows of a column."""
    rows = generated_pages(6, seed=2)
    return rows.remove_columns(name).add_column(name, [value] * len(rows))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (lambda: with_value("negatives", ["nowhere"]), MissingDocumentError, "'nowhere'"),
        (lambda: with_value("id", "twice"), DatasetError, "'twice' stands in 7 rows"),
        (lambda: with_value("query", None), DatasetError, "has no queries"),
        (lambda: with_value("query", 7), DatasetError, "'query' holds int64, expected text"),
        (lambda: with_value("negatives", "a"), DatasetError, "'negatives' holds string, expected lists"),
        (lambda: with_value("image", 1.0), DatasetError, "'image' holds double, which can't be images"),
        (lambda: generated_pages(6).rename_column("query", "question"), DatasetError, "'question'"),
        (lambda: generated_pages(6).select([]), DatasetError, "zero rows"),
        (lambda: "no/such/file.parquet", DatasetError, "no/such/file.parquet"),
        (lambda: [1, 2], DatasetError, r"\[1, 2\] is no dataset"),
    ],
    ids=[
        "unknown negative",
        "id twice",
        "no query",
        "query type",
        "negatives type",
        "image type",
        "renamed",
        "zero rows",
        "no file",
        "no table",
    ],
)
def test_bad_data_is_refused_before_weights_load(
    broken_weights: str, tmp_path: Path, rows, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(broken_weights, rows(), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [b"just some text", b"", None], ids=["text", "empty", "truncated"])
def test_a_damaged_page_is_refused_before_weights_load(
    broken_weights: str, tmp_path: Path, damage: bytes | None
) -> None:
    rows = generated_pages(6, seed=2).cast_column("image", generated_pages(1).features["image"].__class__(decode=False))
    images = rows["image"][:]
    images[3] = {"bytes": images[3]["bytes"][:-200] if damage is None else damage, "path": None}
    damaged = rows.remove_columns("image").add_column("image", images)
    with pytest.raises(ImageDecodeError, match=re.escape(repr(rows["id"][3]))):
        finetune(broken_weights, damaged, output_dir=tmp_path / "run")


def test_evaluation_pages_inside_the_training_pages_are_refused(broken_weights: str, tmp_path: Path) -> None:
    rows = generated_pages(12, seed=2)
    shared = min(row["id"] for row in rows if row["query"] is not None)
    with pytest.raises(DatasetError, match=f"12 documents are relevant in training and in evaluation: {shared}"):
        finetune(broken_weights, rows, rows, output_dir=tmp_path / "run")


def test_the_same_page_under_another_id_is_refused_too(broken_weights: str, tmp_path: Path) -> None:
    rows = generated_pages(12, seed=2)
    renamed = RetrievalDataset.from_id_rows(
        rows.remove_columns(["id", "negatives"]).add_column("id", [f"other-{i}" for i in range(len(rows))]),
        negatives_column=None,
    )
    with pytest.raises(DatasetError, match=r"there other-\d+"):
        finetune(broken_weights, rows, renamed, output_dir=tmp_path / "run")


def test_overlap_can_be_allowed(clip_path: str, tmp_path: Path) -> None:
    rows = generated_pages(12, seed=2)
    result = finetune(clip_path, rows, rows, output_dir=tmp_path, allow_overlap=True, max_steps=1, **QUIET)
    assert result.after


def test_rows_by_columns_do_not_overlap_by_their_row_numbers() -> None:
    from mmtune.data.intake import relevant_on_both_sides

    one, other = (
        RetrievalDataset.from_columns(generated_pages(4, seed=seed).select_columns(["query", "image"]))
        for seed in (1, 2)
    )
    assert one.corpus["document_id"][:2] == other.corpus["document_id"][:2]
    assert relevant_on_both_sides(one, other) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_epoch": 3}, "'num_train_epoch' is neither.*Did you mean 'num_train_epochs'"),
        ({"matryoshka_dims": [0]}, "matryoshka_dims"),
        ({"matryoshka_dims": "all"}, "matryoshka_dims"),
        ({"mini_batch_size": 0}, "mini_batch_size=0"),
        ({"num_negatives": -1}, "num_negatives=-1"),
        ({"documents": "movie"}, "documents='movie'"),
        ({"documents": "text"}, "needs a column 'text'"),
        ({"eval_strategy": "steps"}, "needs something to measure"),
        ({"overwrite": True, "resume": True}, "Set one of them"),
        ({"resume": True}, "no checkpoint to go on from"),
        ({"eval_steps": "often"}, "eval_steps='often': expected a number above 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_weights_load(
    broken_weights: str, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(broken_weights, generated_pages(6), output_dir=tmp_path / "run", **arguments)


def test_args_and_training_arguments_exclude_each_other(broken_weights: str, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path), batch_sampler=ConflictFreeBatchSampler)
    with pytest.raises(ConfigError, match=r"args and learning_rate=0\.1 were both given"):
        finetune(broken_weights, generated_pages(6), args=args, learning_rate=0.1)


def test_two_output_folders_are_an_error(broken_weights: str, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "a"), batch_sampler=ConflictFreeBatchSampler)
    with pytest.raises(ConfigError, match="differ"):
        finetune(broken_weights, generated_pages(6), args=args, output_dir=tmp_path / "b")


def test_a_dimension_beyond_the_model_is_refused(clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4096, and the model has 128"):
        finetune(clip_path, generated_pages(6), output_dir=tmp_path / "run", matryoshka_dims=[4096])


def test_a_text_model_is_refused(text_encoder_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image"):
        finetune(text_encoder_path, generated_pages(6), output_dir=tmp_path / "run")


def test_the_folder_of_a_reranker_is_refused(text_encoder_path: str, tmp_path: Path) -> None:
    CrossEncoder(text_encoder_path, num_labels=1, device="cpu").save_pretrained(str(tmp_path / "reranker"))
    with pytest.raises(ConfigError, match=r"reranker'.*Use finetune_reranker"):
        finetune(tmp_path / "reranker", generated_pages(6), documents="text", output_dir=tmp_path / "run")


def test_a_text_model_finds_passages(text_rows: RetrievalDataset, text_encoder_path: str, tmp_path: Path) -> None:
    result = finetune(text_encoder_path, text_rows, documents="text", output_dir=tmp_path / "run", max_steps=1, **QUIET)
    assert SentenceTransformer(str(result.output_dir / "final")).modalities == ["text"]


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-model"):
        finetune(tmp_path / "no-such-model", generated_pages(6), output_dir=tmp_path / "run")


def test_a_folder_with_a_run_is_kept(run: FinetuneResult, broken_weights: str) -> None:
    before = sorted(path.name for path in run.output_dir.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds a run already.*resume=True.*overwrite=True"):
        finetune(broken_weights, generated_pages(6), output_dir=run.output_dir)
    assert sorted(path.name for path in run.output_dir.rglob("*")) == before


def test_overwriting_replaces_the_run_and_nothing_else(clip_path: str, tmp_path: Path) -> None:
    for name in ("checkpoint-7", "final"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    finetune(clip_path, generated_pages(6), output_dir=tmp_path, overwrite=True, max_steps=1, **QUIET)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoint-7").exists()
    assert (tmp_path / "final" / "modules.json").is_file()


def test_overwriting_deletes_nothing_before_everything_is_checked(run: FinetuneResult, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run.output_dir, folder)
    before = sorted(path.name for path in folder.rglob("*"))
    for model, message in (("no/such/model/here", "no/such/model/here"), (folder / "final", "which this run reads")):
        with pytest.raises(ConfigError, match=message):
            finetune(model, generated_pages(6), output_dir=folder, overwrite=True)
    with pytest.raises(ConfigError, match="4096"):
        finetune(run.model, generated_pages(6), output_dir=folder, overwrite=True, matryoshka_dims=[4096])
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_files_of_ones_own_are_no_run(clip_path: str, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "mine.parquet").write_bytes(b"mine")
    (tmp_path / "report.md").write_text("mine")
    finetune(clip_path, generated_pages(6), output_dir=tmp_path / "run", max_steps=1, **QUIET)
    for name in ("eval", "report.md"):
        (tmp_path / name).rename(tmp_path / "run" / f"{name}.kept" if name == "report.md" else tmp_path / "run" / name)
    finetune(clip_path, generated_pages(6), output_dir=tmp_path / "run", overwrite=True, max_steps=1, **QUIET)
    assert (tmp_path / "run" / "eval" / "mine.parquet").read_bytes() == b"mine"
    assert (tmp_path / "run" / "report.md.kept").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": {"qery": "find: "}}, r"text for 'qery', and the rows have the columns \['query', 'image'"),
        ({"prompts": 5}, "prompts=5"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"max_steps": "5"}, "max_steps='5': expected a whole number of 1 or more"),
        ({"mini_batch_size": True}, "mini_batch_size=True"),
        ({"args": {"output_dir": "x"}}, "args is a dict"),
        ({"model": 5}, "model=5: expected a SentenceTransformer"),
        ({"resume_from_checkpoint": "x"}, "resume=True"),
        ({"batch_sampler": lambda dataset, **options: None}, "can't be pickled"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_values_that_can_not_be_are_named(broken_weights: str, tmp_path: Path, arguments: dict, message: str) -> None:
    arguments = {"model": broken_weights, **arguments}
    with pytest.raises(ConfigError, match=message):
        finetune(train_dataset=generated_pages(6), output_dir=tmp_path / "run", **arguments)


def test_an_unknown_metric_is_refused_before_training(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"metric_for_best_model='ndcg@10' is none of the metrics.*vdr_cosine_ndcg"):
        finetune(clip_path, *data, output_dir=tmp_path, metric_for_best_model="ndcg@10", **QUIET)


def test_saving_nothing_still_evaluates(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    result = finetune(clip_path, *data, output_dir=tmp_path, save_strategy="no", eval_steps=2, max_steps=4, **QUIET)
    assert result.settings["training"]["evaluated_at_steps"] == [2, 4]
    assert result.settings["training"]["best_step"] is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_dimensions_of_a_loss_by_callable_are_evaluated(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    result = finetune(
        clip_path,
        *data,
        output_dir=tmp_path,
        loss=lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [128, 32]),
        max_steps=1,
        **QUIET,
    )
    assert [row.label for row in result.rows] == ["full", "32"]
    assert result.settings["training"]["matryoshka_dims"] == [128, 32]


def test_a_loss_for_each_dataset(clip_path: str, tmp_path: Path) -> None:
    data = {name: RetrievalDataset.from_id_rows(generated_pages(8, seed=seed)) for name, seed in (("a", 0), ("b", 1))}
    losses = {"a": MultipleNegativesRankingLoss, "b": CachedMultipleNegativesRankingLoss}
    result = finetune(clip_path, data, output_dir=tmp_path, loss=losses, max_steps=2, **QUIET)
    assert result.settings["training"]["loss"] == "MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss"


def test_what_is_not_used_is_said(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="mini_batch_size is not used"):
        finetune(
            clip_path,
            data[0],
            output_dir=tmp_path / "a",
            loss=MultipleNegativesRankingLoss,
            mini_batch_size=2,
            max_steps=1,
            **QUIET,
        )
    with pytest.warns(UserWarning, match="num_negatives=4 is not used"):
        finetune(clip_path, data[0].training_rows(2), output_dir=tmp_path / "b", num_negatives=4, max_steps=1, **QUIET)


def test_what_the_audit_finds_stands_in_the_settings(clip_path: str, tmp_path: Path) -> None:
    rows = generated_pages(8)
    twice = rows["negatives"][:]
    twice[next(at for at, query in enumerate(rows["query"]) if query)] *= 2
    data = RetrievalDataset.from_id_rows(rows.remove_columns("negatives").add_column("negatives", twice))
    result = finetune(clip_path, data, output_dir=tmp_path, max_steps=1, **QUIET)
    assert result.settings["audit"]["repeated_negatives"] > 0
    assert "repeated_negatives" in result.report


def test_a_loss_of_another_model_is_refused(clip_path: str, tmp_path: Path) -> None:
    other = SentenceTransformer(clip_path, device="cpu")
    with pytest.raises(ConfigError, match="built for another model"):
        finetune(clip_path, generated_pages(6), output_dir=tmp_path, loss=MultipleNegativesRankingLoss(other))


@pytest.mark.parametrize("join", [concatenate_datasets, interleave_datasets])
def test_rows_that_lost_their_view_are_refused(broken_weights: str, tmp_path: Path, join) -> None:
    parts = [RetrievalDataset.from_id_rows(generated_pages(6, seed=seed)).training_rows(1) for seed in (0, 1)]
    with pytest.raises(DatasetError, match=r"lost their view.*RetrievalDataset.concatenate"):
        finetune(broken_weights, join(parts), output_dir=tmp_path / "run")


def test_rows_are_trained_on_as_they_are_given(clip_path: str, tmp_path: Path) -> None:
    data = RetrievalDataset.from_id_rows(generated_pages(12))
    rows = data.training_rows(2).shuffle(seed=1).select(range(8))
    result = finetune(clip_path, rows, output_dir=tmp_path, max_steps=1, **QUIET)
    facts = result.settings["data"]
    assert (facts["training_rows"], facts["training_queries"], facts["negatives_a_row"]) == (8, 8, 2)


def test_rows_overlap_with_what_they_refer_to_only(clip_path: str, tmp_path: Path) -> None:
    data = RetrievalDataset.from_id_rows(generated_pages(12))
    rows, rest = data.training_rows(1), data.select_queries(data.queries["query_id"][6:])
    with pytest.warns(UserWarning, match="answers of the evaluation are listed as training negatives"):
        finetune(clip_path, rows.select(range(6)), rest, output_dir=tmp_path / "a", max_steps=1, **QUIET)
    with pytest.raises(DatasetError, match="1 documents are relevant in training and in evaluation"):
        finetune(clip_path, rows.select(range(7)), rest, output_dir=tmp_path / "b", max_steps=1, **QUIET)


# Data of every odd shape


def uneven(negatives: list | None, count: int = 4) -> RetrievalDataset:
    """Pages with lists of negatives of different lengths; ``None`` for no table of negatives at all."""
    rows = generated_pages(count, num_negatives=2).remove_columns("negatives")
    if negatives is None:
        return RetrievalDataset.from_id_rows(rows, negatives_column=None)
    ids = rows["id"][:]
    lists = [
        None if at is None else [ids[(row + 1 + k) % len(ids)] for k in range(at)] for row, at in enumerate(negatives)
    ]
    return RetrievalDataset.from_id_rows(rows.add_column("negatives", lists))


@pytest.mark.parametrize("on_short", ["random", "drop"])
def test_lists_of_different_lengths_train(clip_path: str, tmp_path: Path, on_short: str) -> None:
    data = uneven([2, 1, 0, None, 2])
    rows = data.training_rows(2, on_short=on_short)
    facts = finetune(clip_path, rows, output_dir=tmp_path, max_steps=1, **QUIET).settings["data"]
    full = sum(len(documents) == 2 for documents in data.negatives["document_ids"])
    assert facts["training_rows"] == (len(data) if on_short == "random" else full)
    assert (facts["negatives_filled_at_random"] > 0) == (on_short == "random")


def test_short_lists_can_be_an_error() -> None:
    with pytest.raises(DatasetError, match="fewer than 2 usable negatives"):
        uneven([2, 1, 0, None, 2]).training_rows(2, on_short="error")


def test_a_dataset_without_negatives_trains_on_those_of_the_batch(clip_path: str, tmp_path: Path) -> None:
    facts = finetune(clip_path, uneven(None), output_dir=tmp_path, max_steps=1, **QUIET).settings["data"]
    assert facts["negatives_a_row"] == 0


def test_one_query_with_negatives_trains(clip_path: str, tmp_path: Path) -> None:
    result = finetune(clip_path, generated_pages(1), output_dir=tmp_path, **QUIET)
    assert result.trainer.state.global_step == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_where_nothing_can_be_learned_it_is_said(broken_weights: str, tmp_path: Path, rows: int) -> None:
    page = generated_pages(1).remove_columns("negatives").select([0 if generated_pages(1)["query"][0] else 1])
    data = RetrievalDataset.from_id_rows(page, negatives_column=None) if rows == 1 else uneven(None)
    options = {} if rows == 1 else {"per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match="Nothing can be learned"):
        finetune(broken_weights, data, output_dir=tmp_path / "run", **options)


# Several datasets


@pytest.fixture(scope="module")
def several(clip_path: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    parts = {
        name: RetrievalDataset.from_id_rows(generated_pages(count, seed=seed)).split(5)
        for name, count, seed in (("small", 12, 0), ("large", 24, 1))
    }
    return finetune(
        clip_path,
        {name: train for name, (train, _) in parts.items()},
        {name: evaluation for name, (_, evaluation) in parts.items()},
        output_dir=tmp_path_factory.mktemp("several") / "run",
        allow_overlap=True,  # both parts are drawn from the same words, and a page may be drawn twice
        per_device_train_batch_size=3,
        **QUIET,
    )


def test_several_sets_are_averaged_under_a_name_that_says_so(several: FinetuneResult) -> None:
    assert several.primary_metric == "vdr-mean_cosine_ndcg@10"
    for metrics in (several.before, several.after):
        parts = [metrics[f"vdr-{name}_cosine_ndcg@10"] for name in ("small", "large")]
        assert metrics["vdr-mean_cosine_ndcg@10"] == pytest.approx(sum(parts) / 2)
        parts = [metrics[f"vdr-{name}-64d_cosine_ndcg@10"] for name in ("small", "large")]
        assert metrics["vdr-mean-64d_cosine_ndcg@10"] == pytest.approx(sum(parts) / 2)
    assert [row.label for row in several.rows] == [
        "mean full",
        "mean 64",
        "small full",
        "small 64",
        "large full",
        "large 64",
    ]


def test_each_batch_is_of_one_dataset_in_proportion_to_its_size(several: FinetuneResult) -> None:
    boundary = len(several.trainer.train_dataset["small"])
    batches = list(several.trainer.get_train_dataloader().batch_sampler)
    sides = [{row >= boundary for row in batch} for batch in batches]
    assert all(len(side) == 1 for side in sides)
    assert sum(side == {True} for side in sides) == math.ceil((24 - 5) / 3)
    assert sum(side == {False} for side in sides) == math.ceil((12 - 5) / 3)
    assert sides != sorted(sides, key=min)
    assert several.trainer.state.max_steps == len(batches)


def test_settings_say_what_each_dataset_gave(several: FinetuneResult) -> None:
    data = several.settings["data"]
    assert (data["small: training_rows"], data["large: training_rows"]) == (7, 19)
    assert (data["small: evaluation_queries"], data["large: evaluation_queries"]) == (5, 5)


def test_datasets_in_turn(clip_path: str, tmp_path: Path) -> None:
    data = {name: RetrievalDataset.from_id_rows(generated_pages(8, seed=seed)) for name, seed in (("a", 0), ("b", 1))}
    result = finetune(
        clip_path, data, output_dir=tmp_path, multi_dataset_batch_sampler="round_robin", max_steps=2, **QUIET
    )
    batches = list(result.trainer.get_train_dataloader().batch_sampler)
    assert [min(batch) >= 8 for batch in batches] == [False, True] * (len(batches) // 2)


def test_prompts_reach_every_dataset(clip_path: str, tmp_path: Path) -> None:
    model = SentenceTransformer(clip_path, device="cpu", prompts={"query": "find: "})
    data = {name: RetrievalDataset.from_id_rows(generated_pages(8, seed=seed)) for name, seed in (("a", 0), ("b", 1))}
    result = finetune(model, data, output_dir=tmp_path, max_steps=2, **QUIET)
    assert result.trainer.data_collator.prompts == {"query": "find: "}


@pytest.mark.parametrize(
    ("given", "message"), [({}, "mapping of datasets is empty"), ({"a_b": None}, r"named \['a_b'\]")]
)
def test_names_that_can_not_be_names(broken_weights: str, tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises((DatasetError, ConfigError), match=message):
        finetune(broken_weights, given, output_dir=tmp_path)


def test_importing_and_running_change_no_filters_or_handlers(
    data: tuple[RetrievalDataset, RetrievalDataset], clip_path: str, tmp_path: Path
) -> None:
    filters, handlers = list(warnings.filters), list(logging.getLogger().handlers)
    finetune(clip_path, data[0], output_dir=tmp_path, max_steps=1, **QUIET)
    assert warnings.filters == filters
    assert logging.getLogger().handlers == handlers
