"""The command line on real data: each command, what it prints, its exit code, and what it says when it is misspelt."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mmtune
from mmtune import RetrievalDataset
from mmtune.command_line.app import main
from mmtune.command_line.commands import COMMANDS, show_comparison, show_run
from mmtune.command_line.parameters import flags_of
from mmtune.command_line.spelling import Spelling, spell
from mmtune.evaluation.comparison import Comparison, ComparisonRow, SizeRow
from mmtune.testing import generated_pages, tiny_clip, tiny_qwen3_vl
from mmtune.training.trainers import EMBEDDING

QUICK = ["--per-device-train-batch-size", "4", "--matryoshka-dims", "none", "--max-steps", "2", "--use-cpu"]
LAST = ["--keep", "last"]  # weights that were trained, whatever was measured
NAMED = {command.name: command for command in COMMANDS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint and datasets."""
    folder = tmp_path_factory.mktemp("shell")
    tiny_clip(folder / "clip")
    data = RetrievalDataset.from_id_rows(generated_pages(24, seed=3))
    train, evaluation = data.split(8)
    train.save(folder / "train")
    evaluation.save(folder / "eval")
    return folder


@pytest.fixture(scope="module")
def run(place):
    """A finished run of ``mmtune finetune``."""
    paths = [str(place / name) for name in ("clip", "train", "eval")]
    main(["finetune", *paths, "--output-dir", str(place / "run"), "--learning-rate", "3e-4", "--seed=7", *QUICK, *LAST])
    return place / "run"


def said(capsys, *words):
    """The exit code, what was printed, and what was said besides."""
    code = main([str(word) for word in words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_run_from_the_shell_is_that_of_python(run, place):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["settings"]["training"]["learning_rate"] == 3e-4
    assert metrics["settings"]["training"]["steps"] == 2
    assert metrics["settings"]["call"]["arguments"]["seed"] == 7
    result = mmtune.finetune(
        str(place / "clip"),
        place / "train",
        place / "eval",
        output_dir=place / "python",
        learning_rate=3e-4,
        seed=7,
        per_device_train_batch_size=4,
        matryoshka_dims=None,
        max_steps=2,
        use_cpu=True,
        keep="last",
    )
    assert_same_weights(run, result.output_dir)
    trained, untrained = (load_file(folder / "model.safetensors") for folder in (run / "final", place / "clip"))
    assert any(not trained[name].equal(untrained[name]) for name in untrained)


def assert_same_weights(one, other):
    files = sorted(path.relative_to(one) for path in (one / "final").rglob("*.safetensors"))
    assert files
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert all(left[name].equal(right[name]) for name in left)


def test_the_metrics_of_a_run_give_the_same_run(run, place, capsys):
    code, out, _ = said(capsys, "finetune", "--config", run / "metrics.json", "--output-dir", place / "again", "--json")
    assert code in (0, 3)
    assert_same_weights(run, place / "again")
    found = json.loads(out)
    assert found["after"] == json.loads((run / "metrics.json").read_text())["after"]
    assert found["output_dir"] == str(place / "again")


def test_flags_go_over_the_file(run, place, capsys):
    words = ["--config", run / "metrics.json", "--output-dir", place / "other", "--seed", "8", "--max-steps", 1]
    assert said(capsys, "finetune", *words)[0] in (0, 3)
    settings = json.loads((place / "other" / "metrics.json").read_text())["settings"]
    assert (settings["training"]["seed"], settings["training"]["steps"]) == (8, 1)
    assert settings["training"]["learning_rate"] == 3e-4


def test_a_file_of_toml(place, capsys):
    file = place / "run.toml"
    lines = {"model": place / "clip", "train_dataset": place / "train", "output-dir": place / "toml"}
    own = "matryoshka_dims = [16, 8]\nlearning_rate = 1e-4\nmax_steps = 1\noverwrite = true\nuse_cpu = true\n"
    file.write_text("".join(f"{name} = {str(value)!r}\n" for name, value in lines.items()) + own)
    code, out, _ = said(capsys, "finetune", f"--config={file}")
    assert code == 0
    assert "No evaluation set" in out
    training = json.loads((place / "toml" / "metrics.json").read_text())["settings"]["training"]
    assert (training["evaluated_dims"], training["learning_rate"]) == ([16, 8], 1e-4)


def test_a_dry_run_is_a_plan(place, capsys):
    paths = [place / "clip", place / "train", "--output-dir", place / "none"]
    code, out, _ = said(capsys, "finetune", *paths, "--dry-run", "--json", *QUICK)
    assert code == 0
    assert json.loads(out)["steps"] == 2
    assert not (place / "none").exists()


def test_the_other_commands(run, place, capsys):
    final, held_out = run / "final", place / "eval"
    code, out, _ = said(capsys, "evaluate", final, held_out, "--truncate-dims", 16, 8, "--json")
    assert code == 0
    assert {"vdr_cosine_ndcg@10", "vdr-16d_cosine_ndcg@10", "vdr-8d_cosine_ndcg@10"} <= set(json.loads(out))
    measured = json.loads((run / "metrics.json").read_text())["after"]
    assert json.loads(out)["vdr_cosine_ndcg@10"] == pytest.approx(measured["vdr_cosine_ndcg@10"])

    code, out, _ = said(capsys, "compare", place / "clip", final, "--dataset", held_out, "--json")
    assert code in (0, 3)
    assert {row["name"] for row in json.loads(out)["rows"]} == {"clip", "final"}

    code, out, _ = said(capsys, "audit", place / "train", "--against", held_out, "--json")
    assert code == 0
    assert {finding["key"] for finding in json.loads(out)["findings"]} >= {"leaked_documents"}

    code, out, _ = said(capsys, "mine", place / "train", final, place / "mined", "--num-negatives", 2)
    assert code == 0
    assert str(place / "mined") in out
    mined = RetrievalDataset.load(place / "mined")
    assert max(map(len, mined.negatives["document_ids"])) == 2
    code, _, err = said(capsys, "mine", place / "train", final, place / "mined")
    assert (code, "holds something already" in err) == (1, True)


def test_what_is_trained_is_encoded_exported_and_looked_for_at_a_server(run, place, capsys):
    final, held_out = run / "final", place / "eval"
    assert said(capsys, "encode", held_out, final, place / "shards", "--dtype", "float16")[0] == 0
    ids = [each for part in mmtune.read_shards(place / "shards") for each in part[0]]
    assert len(ids) == len(RetrievalDataset.load(held_out).corpus)
    assert said(capsys, "export", final, place / "served")[0] == 0
    assert (place / "served" / "serve.json").is_file()
    code, _, err = said(capsys, "check-serving", "http://localhost:9", final, held_out)
    assert (code, "Start the server" in err) == (1, True)


def test_a_reranker_is_finetuned_and_evaluated(place, capsys):
    pytest.importorskip("torchvision")
    vlm = tiny_qwen3_vl(place / "vlm")
    words = [vlm, place / "train", "--output-dir", place / "reranker", "--max-steps", 1, "--use-cpu"]
    assert said(capsys, "finetune-reranker", *words, "--num-negatives", 1, "--max-pixels", 3136)[0] == 0
    code, out, _ = said(capsys, "evaluate", place / "reranker" / "final", place / "eval", "--json")
    assert code == 0
    assert 0 < json.loads(out)["vdr-rerank_ndcg@10"] <= 1


def test_a_regression_has_a_code_of_its_own(run):
    verdict = mmtune.compare_per_query({str(k): 1.0 for k in range(20)}, {str(k): 0.01 * k for k in range(20)})
    assert verdict.outcome == "REGRESSION"
    result = mmtune.FinetuneResult.read(run, EMBEDDING)
    outcome = show_run(replace(result, verdict=verdict), {})
    assert (outcome.exit_code, outcome.data["verdict"]["outcome"]) == (3, "REGRESSION")
    assert show_run(result, {}).exit_code == 0


@pytest.mark.parametrize(("order", "code"), [(["good", "bad"], 3), (["bad", "good"], 0)])
def test_a_comparison_is_a_regression_where_the_first_is_the_best(order, code):
    verdict = mmtune.compare_per_query({str(k): 1.0 for k in range(20)}, {str(k): 0.01 * k for k in range(20)})
    size = SizeRow(64, 0.9, None, 256.0)
    rows = [ComparisonRow(name, "retriever", 1, (size,), 0.1, 0.1, {}) for name in ("good", "bad")]
    found = Comparison("vdr", (rows[0], replace(rows[1], against_best=verdict)), {}, 20, 20, 20)
    models = [f"models/{name}" for name in order]
    assert show_comparison(found, {"models": models}).exit_code == code
    assert show_comparison(replace(found, failures={"x": "broken"}), {"models": models}).exit_code == 1
    assert show_comparison(found, {"models": dict(zip(order, models, strict=True))}).exit_code == code


def test_models_of_a_comparison_by_name_and_in_pairs(place, capsys):
    models = json.dumps({"one": str(place / "clip"), "both": [str(place / "clip"), str(place / "nowhere")]})
    code, out, _ = said(capsys, "compare", models, "--dataset", place / "eval", "--json")
    assert (code, [row["name"] for row in json.loads(out)["rows"]]) == (1, ["one"])
    assert "holds no 'nowhere'" in json.loads(out)["failures"]["both"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["finetun"], "Did you mean finetune?"),
        (["finetune", "m", "t", "--lr", "1e-5"], "Did you mean --learning-rate?"),
        (["finetune", "m", "t", "--learing-rate", "1e-5"], "Did you mean --learning-rate?"),
        (["finetune", "m", "t", "--num-negative=3"], "Did you mean --num-negatives?"),
        (["finetune", "m", "t", "--epochs", "3"], "Did you mean --num-train-epochs?"),
        (["mine", "d", "m", "o", "--num-negativ", "3"], "Did you mean --num-negatives?"),
        (["audit", "d", "--contents"], "Did you mean --content?"),
        (["finetune", "m"], "--train-dataset"),
        (["finetune", "m", "t", "e", "more"], "more"),
        (["finetune", "m", "t", "--num-negatives", "many"], "'many' is not a whole number"),
        (["finetune", "m", "t", "--keep", "first"], "'first' is not best or last"),
        (["finetune", "m", "t", "--learning-rate", "fast"], "'fast' is not"),
        (["finetune", "m", "t", "--matryoshka-dims", "64", "half"], "'64 half' is not auto or none or a list"),
        (["finetune", "m", "t", "--config", "nowhere.toml"], "there is no such file"),
        (["finetune", "--config"], "--config"),
    ],
)
def test_wrong_usage_names_what_was_meant(words, expected, capsys):
    code, out, err = said(capsys, *words)
    assert code == 2
    assert expected in err
    assert not out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lerning_rate = 1", "Did you mean 'learning_rate'?"),
        ("num_negatives = 'many'", "num_negatives = 'many'"),
        ("num_negatives = = 2", "can't be read"),
        ("[finetune]\nseed = 1", "'finetune', which is no argument"),
    ],
)
def test_a_wrong_file_is_wrong_usage(content, expected, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(content)
    code, _, err = said(capsys, "finetune", "m", "t", "--config", tmp_path / "run.toml")
    assert code == 2
    assert expected in err


def test_a_file_of_another_run_is_refused(run, tmp_path, capsys):
    assert "is of finetune" in said(capsys, "finetune-reranker", "--config", run / "metrics.json")[2]
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["settings"]["call"]["in_memory"] = ["loss"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    code, _, err = said(capsys, "finetune", "--config", tmp_path / "metrics.json")
    assert (code, "'loss' as objects in Python" in err) == (2, True)
    (tmp_path / "other.json").write_text("{}")
    assert (
        "does not say what its run was called with" in said(capsys, "finetune", "--config", tmp_path / "other.json")[2]
    )


def test_an_error_has_code_1_and_no_traceback(place, capsys):
    code, out, err = said(capsys, "audit", place / "nowhere")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    code, out, _ = said(capsys, "finetune", place / "clip", place / "train", "--seed", -1, "--json")
    assert code == 1
    assert json.loads(out)["type"] == "ConfigError"


def test_the_help_fits_a_screen_and_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"]):
        code, out, _ = said(capsys, *words)
        assert code == 0
        assert all(f"│ {name} " in out for name in NAMED)
        assert len(out.splitlines()) < 40


@pytest.mark.parametrize("name", list(NAMED))
def test_every_flag_has_a_text_from_the_docstring(name, capsys):
    assert said(capsys, name, "--help")[0] == 0
    shown = [flag for flag in flags_of(NAMED[name]).values() if flag.is_shown]
    assert [flag.name for flag in shown if not flag.help] == []
    assert not any("``" in flag.help or flag.help.endswith("e.g.") for flag in shown)


def test_flags_have_the_defaults_of_the_function():
    flags = flags_of(NAMED["finetune"])
    assert (flags["num_negatives"].default, flags["matryoshka_dims"].default) == (1, "auto")
    assert {"loss", "args", "callbacks", "evaluator"}.isdisjoint(flags)
    assert not flags["learning_rate"].is_shown


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("matryoshka_dims", ["auto", None, [64, 32], [8]]),
        ("train_dataset", ["pages", {"en": "a b", "fr": "c"}]),
        ("lora", [True, False, None]),
        ("page_store", ["auto", None, "folder"]),
        ("learning_rate", [1e-5, 0.1 + 0.2, 3.0]),
        ("resume", [True, False, "auto"]),
        ("prompts", ["model", None, {"query": "find: "}]),
        ("target_size", ["auto", None, 32]),
        ("freeze", [["vision", "text"]]),
    ],
)
def test_values_come_back_from_their_texts(name, values):
    spelling = flags_of(NAMED["finetune"])[name].spelling
    for value in values:
        assert spelling.read(spell(value)) == value
        assert type(spelling.read(spell(value))) is type(value)


def test_what_a_shell_can_spell():
    assert Spelling.of(object) is None
    assert Spelling.of(int | float).read(["0.5"]) == 0.5  # not the first member that fits
    assert Spelling.of(int | float).read(["5"]) == 5


def test_python_dash_m_and_the_speed_of_help():
    probe = [sys.executable, "-X", "importtime", "-m", "mmtune", "--help"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0
    assert "finetune-reranker" in found.stdout
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "sentence_transformers", "datasets"}


def test_the_program_is_installed_under_its_name():
    scripts = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'mmtune = "mmtune.command_line.app:main"' in scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "mine", "export"])
def test_two_processes_of_torchrun(name, place):
    out = place / f"two-{name}"
    on_a_cpu = QUICK[:-1]  # which has to be found out
    words = {
        "finetune": [place / "clip", place / "train", place / "eval", "--output-dir", out, *on_a_cpu],
        "mine": [place / "train", place / "clip", out, "--num-negatives", 2],
        "export": [place / "clip", out],
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmtune"]
    typed = [*launcher, name, *map(str, words[name]), "--json"]
    found = subprocess.run(typed, capture_output=True, text=True, check=False, timeout=280)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)  # one of them speaks
    assert said["output_dir" if name == "finetune" else "path"] == str(out)
    if name == "finetune":
        assert json.loads((out / "metrics.json").read_text())["settings"]["training"]["processes"] == 2
