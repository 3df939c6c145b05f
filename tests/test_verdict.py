"""The verdict of a run: what is compared, what hangs together, for whom, the guard set, and after a resume."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from comparing import assert_same_weights, weights, without_weights
from mmtune import (
    ConfigError,
    RetrievalDataset,
    build_evaluator,
    build_reranking_evaluator,
    compare_per_query,
    finetune,
)
from mmtune.data.clusters import connected_documents, connected_queries
from mmtune.evaluation.history import BEGINNING, END, History
from mmtune.evaluation.significance import Verdict
from mmtune.evaluation.verdict import find_hubs, judge
from mmtune.testing import generated_pages
from mmtune.training.callbacks import ShortLogs
from mmtune.training.evaluators import RunEvaluator

QUIET = {"disable_tqdm": True, "per_device_train_batch_size": 8}
METRIC = "vdr_cosine_ndcg@10"


def table(qrels: dict[str, list[str]], texts: dict[str, str] | None = None, **columns: list[str]) -> RetrievalDataset:
    """A corpus of texts, with the documents that answer each query."""
    ids = sorted({each for found in qrels.values() for each in found})
    pairs = [(query, each) for query, found in qrels.items() for each in found]
    asked = [(texts or {}).get(name, f"text of {name}") for name in qrels]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"page {each}" for each in ids]}),
        Dataset.from_dict({"query_id": list(qrels), "text": asked, **columns}),
        Dataset.from_dict(
            {"query_id": [a for a, _ in pairs], "document_id": [b for _, b in pairs], "score": [1] * len(pairs)}
        ),
    )


# What hangs together


def test_queries_of_one_page_or_text_are_connected() -> None:
    qrels = {"a": ["1"], "b": ["1", "2"], "c": ["2"], "d": ["3"], "e": ["4"], "f": ["5"]}
    data = table(qrels, texts={"d": "same", "e": "same"})
    found = connected_queries(data.relevance_of("text"))
    assert found == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "d", "f": "f"}
    assert connected_documents(data.relevance_of("text")) == {"1": "a", "2": "a", "3": "d", "4": "d", "5": "f"}


def test_copies_of_a_page_connect_what_asks_for_them() -> None:
    data = RetrievalDataset(
        Dataset.from_dict({"document_id": ["1", "2", "3"], "text": ["page", "page", "other"]}),
        Dataset.from_dict({"query_id": ["a", "b"], "text": ["one", "two"]}),
        Dataset.from_dict({"query_id": ["a", "b"], "document_id": ["1", "2"], "score": [1, 1]}),
    )
    assert connected_queries(data.relevance_of("text")) == {"a": "a", "b": "a"}
    assert connected_documents(data.relevance_of("text")) == {"1": "a", "2": "a"}


def test_evaluators_tell_what_hangs_together() -> None:
    data = table({"a": ["1"], "b": ["1"], "c": ["2"], "d": ["3"]})
    assert build_evaluator(data, documents="text").groups == {"a": "a", "b": "a", "c": "c", "d": "d"}
    options: dict[str, Any] = {"documents": "text", "num_candidates": 2}
    assert build_reranking_evaluator(data, **options).groups["b"] == "a"
    asking = build_reranking_evaluator(data, direction="image_to_text", **options)
    assert asking.groups == {"1": "a", "2": "c", "3": "d"}


# What is compared


def part_of(name: str, data: RetrievalDataset | None, **options: Any) -> Any:
    """An evaluator as far as verdicts need one."""
    known = {"name": name, "metric_name": lambda model: f"{name}_cosine_ndcg@10", "per_query": {}, "top_ids": {}}
    groups = {} if data is None else {"data": data, "groups": connected_queries(data.relevance_of("text"))}
    return SimpleNamespace(**known, **groups, **options)


def measured(*by_step: tuple[int, list[tuple[Any, dict[str, float]]]]) -> History:
    found = History()
    for step, values_of_parts in by_step:
        for part, values in values_of_parts:
            part.per_query = {f"{part.name}_cosine_ndcg@10": values}
        found.note(step, [part for part, _ in values_of_parts], None)
    return found


def test_sets_weigh_the_same_whatever_their_sizes() -> None:
    large, small = part_of("vdr-large", None), part_of("vdr-small", None)
    before = [(large, {f"q{n}": 0.5 for n in range(90)}), (small, {f"q{n}": 0.5 for n in range(10)})]
    after = [(large, {f"q{n}": 0.6 for n in range(90)}), (small, {f"q{n}": 0.1 for n in range(10)})]
    found = judge(
        measured((BEGINNING, before), (END, after)), SimpleNamespace(parts=[large, small]), None, was_chosen=True
    )
    assert found is not None
    assert (found.before, found.after) == pytest.approx((0.5, 0.35))
    assert found.delta == pytest.approx(-0.15)
    assert (found.wins, found.losses, found.num_queries) == (90, 10, 100)
    assert found.num_clusters == 100, "queries of one name in two sets are two"


def test_two_directions_of_one_dataset_share_their_clusters() -> None:
    data = table({f"q{n}": [f"d{n}"] for n in range(12)})
    asking = connected_documents(data.relevance_of("text"))
    texts = part_of("vdr-text", data)
    pages = part_of("vdr-page", None, direction="image_to_text")
    pages.data, pages.groups = data, asking
    values = [(texts, {f"q{n}": 0.5 for n in range(12)}), (pages, {f"d{n}": 0.5 for n in range(12)})]
    found = judge(
        measured((BEGINNING, values), (END, values)), SimpleNamespace(parts=[texts, pages]), None, was_chosen=False
    )
    assert found is not None
    assert (found.num_queries, found.num_clusters) == (24, 12)


def test_the_best_of_many_measurements_has_to_be_better_by_more() -> None:
    rng, part = np.random.default_rng(0), part_of("vdr", None)
    ids = [f"q{n}" for n in range(40)]
    noise = [dict(zip(ids, row, strict=True)) for row in rng.normal(0.5, 0.1, (12, 40)).tolist()]
    best = max(noise[1:], key=lambda row: sum(row.values()))
    steps = [(step, [(part, row)]) for step, row in enumerate(noise)]
    values = measured(*steps, (END, [(part, best)]))
    chosen, alone = (judge(values, SimpleNamespace(parts=[part]), None, was_chosen=each) for each in (True, False))
    assert chosen is not None
    assert alone is not None
    assert chosen.p_value > 2 * alone.p_value
    assert chosen.delta == alone.delta


def test_groups_and_sizes_have_verdicts_of_their_own() -> None:
    names = [f"q{n}" for n in range(40)]
    language = ["en"] * 20 + ["de"] * 19 + ["fi"]
    data = table({name: [f"d-{name}"] for name in names}, language=language, note=names)
    part = part_of("vdr", data, truncations=[SimpleNamespace(name="vdr-32d", truncate_dim=32)])
    found = History()
    for step, english, german, short in ((BEGINNING, 0.5, 0.5, 0.4), (END, 0.9, 0.4, 0.4)):
        full = {name: english if own == "en" else german for name, own in zip(names, language, strict=True)}
        part.per_query = {METRIC: full, "vdr-32d_cosine_ndcg@10": dict.fromkeys(names, short), "vdr_cosine_map": {}}
        found.note(step, [part], None)
    verdict = judge(found, SimpleNamespace(parts=[part]), None, was_chosen=True)
    assert verdict is not None
    assert list(verdict.by_group) == ["language"], "a column with a value for each query tells no groups apart"
    by_language = verdict.by_group["language"]
    assert list(by_language) == ["de", "en"], "a single query in another language is no group, and hides none"
    assert [by_language[each].outcome for each in ("en", "de")] == ["WIN", "REGRESSION"]
    assert "worse where language is de, 0.50 to 0.40" in verdict.sentence
    assert [verdict.by_size[each].outcome for each in ("full", "32")] == ["WIN", "MARGINAL"]
    assert Verdict.from_dict(json.loads(json.dumps(verdict.as_dict()))) == verdict


def test_a_kind_of_page_that_nothing_is_asked_with_has_no_verdict() -> None:
    data = table({f"q{n}": [f"d{n}", f"e{n}"] for n in range(12)})
    kinds = ["chart" if each.startswith("d") else "cover" for each in data.corpus["document_id"]]
    data = RetrievalDataset(data.corpus.add_column("kind", kinds), data.queries, data.qrels)
    asking = part_of("vdr", data, direction="image_to_text")
    asking.groups = {f"d{n}": f"d{n}" for n in range(12)}
    values = [(asking, {f"d{n}": 0.5 for n in range(12)})]
    found = judge(measured((BEGINNING, values), (END, values)), SimpleNamespace(parts=[asking]), None, was_chosen=False)
    assert found is not None
    assert list(found.by_group["kind"]) == ["chart"]


@pytest.mark.parametrize(
    "given", [None, {METRIC: None}, {METRIC: [0.5]}, {METRIC: {1: float("nan")}}, {METRIC: {1: 0.5, 3: 0.5}}]
)
def test_values_of_a_foreign_evaluator_that_are_none_lose_no_run(given: Any, tmp_path: Path) -> None:
    part = part_of("vdr", None)
    part.per_query, part.top_ids = {METRIC: {1: 0.5, 2: 0.5}}, {1: [7]}
    found = History()
    found.note(BEGINNING, [part], None)
    part.per_query = {METRIC: {2: 0.75, 1: 0.25}}
    found.note(3, [part], None)
    assert found.of(3, METRIC) == {"1": 0.25, "2": 0.75}
    part.per_query = given
    with nullcontext() if given is None else pytest.warns(UserWarning, match="there is no verdict by it"):
        found.note(END, [part], None)
    found.write(tmp_path)
    assert History.read(tmp_path).of(3, METRIC) == {"1": 0.25, "2": 0.75}
    assert judge(found, SimpleNamespace(parts=[part]), None, was_chosen=True) is None


def test_without_values_by_query_there_is_no_verdict() -> None:
    assert judge(History(), SimpleNamespace(parts=[part_of("vdr", None)]), None, was_chosen=True) is None
    assert judge(History(), SimpleNamespace(evaluators=[]), None, was_chosen=True) is None


def test_hubs_are_named() -> None:
    ids = [f"d{n}" for n in range(200)]
    rng = np.random.default_rng(0)
    top = {f"q{n}": ["d0", *rng.choice(ids[1:], 9, replace=False).tolist()] for n in range(60)}
    top |= {f"r{n}": rng.choice(ids[1:], 10, replace=False).tolist() for n in range(20)}
    part = SimpleNamespace(corpus=ids, top_ids=top, relevant_docs={"q0": {"d0"}})
    assert find_hubs([part]) == [{"document_id": "d0", "wrongly_in": 59, "queries": 80, "by_chance": 4.0}]
    assert find_hubs([SimpleNamespace(corpus=ids[:8], top_ids=top, relevant_docs={})]) == [], "all of a small corpus"


def test_measurements_are_read_as_they_were_written(tmp_path: Path) -> None:
    part = part_of("vdr", None)
    values = {"q'1": 0.1 + 0.2, 'q"2': 1 / 3}
    part.top_ids = {name: [str(n) for n in range(30)] for name in values}
    found = measured((BEGINNING, [(part, values)]), (4, [(part, values)]), (END, [(part, values)]))
    found.write(tmp_path)
    again = History.read(tmp_path)
    assert (again.ids, again.steps, again.top_ids) == (found.ids, [4], found.top_ids)
    assert again.of(4, METRIC) == values
    assert again.of(5, METRIC) == {}
    assert again.before_and_after().equals(found.before_and_after())
    assert History.read(tmp_path / "nothing").values == {}


# In a run


@pytest.fixture(scope="module")
def old() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(generated_pages(16, seed=1))


@pytest.fixture(scope="module")
def new() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(generated_pages(16, seed=2))


@pytest.fixture(scope="module")
def knows_old(old, clip_path: str, tmp_path_factory) -> str:
    """A model that has learned the old pages, and forgets them when it learns the new ones."""
    folder = tmp_path_factory.mktemp("old")
    options = {**QUIET, "learning_rate": 1e-3, "num_train_epochs": 20, "save_strategy": "no"}
    finetune(clip_path, old, output_dir=folder, **options)
    return str(folder / "final")


FORGETS = {
    **QUIET,
    "allow_overlap": True,
    "learning_rate": 3e-3,
    "num_train_epochs": 12,
    "eval_steps": 4,
    "save_steps": 4,
}


def test_better_here_and_worse_on_the_guard_set_is_said(knows_old: str, old, new, tmp_path: Path, capfd) -> None:
    result = finetune(knows_old, new, new, guard_dataset=old, output_dir=tmp_path, keep="last", **FORGETS)
    verdict = result.verdict
    assert verdict is not None
    assert verdict.guard is not None
    assert verdict.delta > 0 > verdict.guard.delta
    assert (verdict.outcome, verdict.guard.outcome) == ("REGRESSION", "REGRESSION")
    first = (tmp_path / "report.md").read_text().splitlines()[0]
    assert first.startswith("Better here, worse on the guard set: nDCG@10 ")
    assert f"on the guard set {verdict.guard.before:.2f} to {verdict.guard.after:.2f}, worse, p" in first
    assert str(result).splitlines()[0] == first
    log = capfd.readouterr().err.splitlines()
    assert [line for line in log if line.startswith("VERDICT: ")] == [verdict.line]
    assert verdict.line.startswith("VERDICT: REGRESSION | score=")
    steps = [line for line in log if line.startswith("step ")]
    assert len(steps) == 6, "one line a measurement"
    assert all("loss " in line and f"{METRIC} " in line and "guard_cosine_ndcg@10 " in line for line in steps)
    assert "left" in steps[0]
    assert json.loads((tmp_path / "metrics.json").read_text())["verdict"]["guard"]["outcome"] == "REGRESSION"


def test_no_checkpoint_with_a_loss_on_the_guard_set_is_kept(knows_old: str, old, new, tmp_path: Path) -> None:
    alone = finetune(knows_old, new, new, output_dir=tmp_path / "alone", **FORGETS)
    result = finetune(knows_old, new, new, guard_dataset=old, output_dir=tmp_path / "guarded", **FORGETS)
    log = result.trainer.state.log_history
    worse = {each["step"]: each["eval_guard_is_worse"] for each in log if "eval_guard_is_worse" in each}
    best_alone = alone.trainer.state.best_global_step
    assert worse[best_alone], "without a guard set that one is kept"
    kept = result.trainer.state.best_global_step
    assert kept is None or not worse[kept]
    assert result.verdict is not None
    assert result.verdict.guard is not None
    assert result.verdict.guard.outcome != "REGRESSION"
    assert result.after["guard_is_worse"] == 0
    host = build_evaluator(old, name="guard", show_progress_bar=False)
    final = SentenceTransformer(str(tmp_path / "guarded" / "final"), device="cpu")
    assert host(final)["guard_cosine_ndcg@10"] == pytest.approx(result.after["guard_cosine_ndcg@10"], abs=1e-9)


def test_a_resumed_run_has_the_verdict_of_an_undisturbed_one(clip_path: str, old, new, tmp_path: Path) -> None:
    options = {**QUIET, "learning_rate": 1e-3, "max_steps": 4, "eval_steps": 1, "save_steps": 1, "save_total_limit": 4}
    data = {"train_dataset": new, "eval_dataset": old, "guard_dataset": new, "allow_overlap": True}
    whole = finetune(clip_path, **data, output_dir=tmp_path, **options)
    kept = pq.read_table(tmp_path / "per_query.parquet")
    for name in ("checkpoint-4", "checkpoint-3", "final"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    again = finetune(clip_path, **data, output_dir=tmp_path, resume=True, **options)
    assert again.verdict == whole.verdict
    assert pq.read_table(tmp_path / "per_query.parquet").equals(kept)
    assert again.settings["evaluation"] == whole.settings["evaluation"]
    assert_same_weights(again.model, weights(whole.model))
    returned = finetune(clip_path, **data, output_dir=tmp_path, resume="auto", **options)
    assert returned.trainer is None
    assert (returned.verdict, str(returned)) == (again.verdict, str(again))


def test_the_values_of_each_query_are_kept(clip_path: str, old, new, tmp_path: Path) -> None:
    data = {"one": old, "two": new}
    train = RetrievalDataset.from_id_rows(generated_pages(8, seed=3))
    result = finetune(clip_path, train, data, output_dir=tmp_path, max_steps=2, **QUIET)
    rows = pq.read_table(tmp_path / "per_query.parquet").to_pylist()
    model = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    for name, part in data.items():
        evaluator = build_evaluator(part, name=f"vdr-{name}", show_progress_bar=False)
        evaluator(model)
        metric = f"vdr-{name}_cosine_ndcg@10"
        own = [row for row in rows if row["metric"] == metric]
        assert {row["query_id"]: row["after"] for row in own} == pytest.approx(evaluator.per_query[metric], abs=1e-9)
        assert all(row["top_ids_after"] == evaluator.top_ids[row["query_id"]][:10] for row in own)
        assert np.mean([row["before"] for row in own]) == pytest.approx(result.before[metric])
    assert {row["top_ids_after"] is None for row in rows if "64d" in row["metric"]} == {True}
    assert result.verdict is not None
    assert result.verdict.after == pytest.approx(result.after["vdr-mean_cosine_ndcg@10"])
    assert list(result.verdict.by_size) == ["full", "64"]


def test_an_evaluator_of_the_caller_gives_a_verdict_where_it_tells_values(clip_path: str, old, new, tmp_path) -> None:
    own = build_evaluator(old, name="mine", show_progress_bar=False)
    result = finetune(clip_path, new, evaluator=own, output_dir=tmp_path / "a", max_steps=1, **QUIET)
    assert result.primary_metric == "mine_cosine_ndcg@10"
    assert result.verdict is not None
    assert result.verdict.num_queries == 16
    unknown = SimpleNamespace(primary_metric="score", name="own", __call__=None)
    assert RunEvaluator(None, unknown).parts == []


def test_embeddings_that_move_with_the_size_of_the_batch_are_reported(old) -> None:
    sizes: list[int] = []

    class Moves:
        similarity_fn_name = "cosine"

        def encode_query(self, inputs: Any, **options: Any) -> Any:
            import torch

            sizes.append(options["batch_size"])
            return torch.full((len(inputs), 4), 1.0 + 0.25 * (options["batch_size"] > 1))

        encode_document = encode_query

    evaluator = build_evaluator(old, show_progress_bar=False)
    assert evaluator.measure_effect_of_batch_size(Moves()) == pytest.approx(0.25)
    evaluator.batch_size = 4
    sizes.clear()
    evaluator.measure_effect_of_batch_size(Moves())
    assert set(sizes) == {1, 4}, "a larger batch than those of the evaluation may not fit"


@pytest.mark.parametrize("given", [3, "no-such-folder", []])
def test_a_guard_set_that_is_none_is_refused_before_weights(given: Any, old, clip_path: str, tmp_path: Path) -> None:
    broken = without_weights(clip_path, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"guard_dataset|no-such-folder"):
        finetune(broken, old, old, guard_dataset=given, output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="guard_dataset was given without eval_dataset"):
        finetune(broken, old, guard_dataset=old, output_dir=tmp_path / "run")


def test_a_guard_set_is_no_training_set(clip_path: str, old, new, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relevant in training and in evaluation"):
        finetune(clip_path, old, new, guard_dataset=old, output_dir=tmp_path)


def test_groups_of_an_evaluator_go_into_a_comparison(old) -> None:
    evaluator = build_evaluator(old, show_progress_bar=False)
    values = dict.fromkeys(evaluator.groups, 0.5)
    assert compare_per_query(values, values, groups=evaluator.groups).num_clusters == len(
        set(evaluator.groups.values())
    )


def test_the_card_tells_nothing_of_this_machine_and_of_no_group(clip_path: str, old, new, tmp_path: Path) -> None:
    sources = ["/home/me/merger.pdf", "/home/me/layoffs.pdf"]
    queries = old.queries.add_column("source", [sources[at % 2] for at in range(len(old))])
    data = RetrievalDataset(old.corpus, queries, old.qrels, old.negatives)
    store = tmp_path / "store"
    result = finetune(
        clip_path, new, data, output_dir=tmp_path / "run", page_store=store, keep="last", max_steps=1, **QUIET
    )
    assert result.verdict is not None
    assert list(result.verdict.by_group["source"]) == sorted(sources)
    card = (result.output_dir / "final" / "README.md").read_text()
    assert "| size 64 |" in card
    assert not [line for line in card.splitlines() if "/home/me" in line or str(store) in line]
    assert "/home/me/merger.pdf" in result.report


@pytest.mark.parametrize("prefix", ["eval_", ""])
def test_a_line_of_the_log_has_the_metric_that_chooses_and_the_mean_of_guards(prefix: str, capfd) -> None:
    args: Any = SimpleNamespace(metric_for_best_model=f"{prefix}{METRIC}")
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)
    control: Any = SimpleNamespace(should_evaluate=True)
    logs = ShortLogs()
    logs.on_log(args, state, control, {"loss": 1.5})
    guards = {f"eval_guard-{name}_cosine_ndcg@10": value for name, value in (("a", 0.1), ("a-64d", 0.9), ("mean", 0.3))}
    logs.on_log(args, state, control, {f"eval_{METRIC}": 0.5, **guards})
    line = f"step 2/4  loss 1.5000  {METRIC} 0.5000  guard-mean_cosine_ndcg@10 0.3000"
    assert capfd.readouterr().err.strip() == line
