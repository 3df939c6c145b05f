"""The examples run as a user starts them, in their tiny mode."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from PIL import Image

from mmtune.testing import generated_pages, generated_pdfs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a script of the repository in an empty folder, in this process."""

    def run_script(name: str, *arguments: str) -> ModuleType:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        return module

    return run_script


def test_the_demo_trains_measures_searches_and_saves(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("examples/demo.py", "--queries", "40", "--epochs", "1", "--output", "out")
    printed = capsys.readouterr().out
    assert "ndcg@10" in printed
    assert "Searching" in printed
    assert {"final", "metrics.json", "report.md", "search.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with Image.open(tmp_path / "out" / "search.png") as sheet:
        assert sheet.width > sheet.height > 200


def test_the_demo_runs_a_second_time_into_the_same_folder(run, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        run("examples/demo.py", "--queries", "24", "--epochs", "1", "--output", "out", "--seed", seed)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["training"]["seed"] == 1


def test_the_recipe_of_the_guide_runs_in_tiny_mode(run, capsys: pytest.CaptureFixture) -> None:
    run("examples/vdr_qwen3_vl.py", "--tiny", "--output", "vdr")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:6]] == ["full", "64", "32"]


def test_the_guide_recipe_asks_for_what_the_guide_trains(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real call can't run without the Hub; what it passes on can be looked at."""
    module = run("examples/vdr_qwen3_vl.py", "--tiny", "--output", "vdr")
    loaded, called = [], {}
    monkeypatch.setattr(module, "load_model", lambda name, **options: (name, options))
    monkeypatch.setattr(module.RetrievalDataset, "load", lambda *args, **options: loaded.append((*args, options)))
    monkeypatch.setattr(module, "finetune", lambda model, *data, **options: called.update(options, model=model))
    module.guide(tmp_path, resume=False)
    assert called["model"] == ("Qwen/Qwen3-VL-Embedding-2B", {"min_pixels": 784, "max_pixels": 360_000})
    assert [(config, options) for _, config, options in loaded] == [
        ("train", {"split": "train"}),
        ("eval", {"split": "train"}),
    ]
    assert (called["num_negatives"], called["mini_batch_size"]) == (1, 1)
    assert called["matryoshka_dims"] == [2048, 1536, 1024, 512, 256, 128, 64]


@pytest.mark.parametrize(
    ("head", "directions"),
    [("logit_score", ["text_to_image"]), ("dense", ["text_to_image", "image_to_text"])],
)
def test_the_recipes_for_rerankers_run_in_tiny_mode(
    run, qwen3_vl_path: str, capsys: pytest.CaptureFixture, head: str, directions: list[str]
) -> None:
    run("examples/doodles_reranker.py", "--tiny", "--output", "doodles", "--head", head, "--directions", *directions)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split() == ["ndcg@10", "before", "after", "change"]
    assert len(lines) == (4 if len(directions) == 1 else 6)
    settings = json.loads(Path("doodles", "metrics.json").read_text())["settings"]
    assert settings["data"]["directions"] == directions
    assert settings["data"]["form_of_rows"] == "pairs"


def test_the_recipes_for_rerankers_ask_for_what_the_guide_trains(run, monkeypatch, qwen3_vl_path, tmp_path) -> None:
    """The real call can't run without the Hub; what it passes on can be looked at."""
    module = run("examples/doodles_reranker.py", "--tiny", "--output", "doodles")
    asked, called = [], {}

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return module.drawn_captions(400)

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    monkeypatch.setattr(module, "build_reranker", lambda name, **options: (name, options))
    monkeypatch.setattr(module, "finetune_reranker", lambda *given, **options: called.update(options, given=given))
    module.guide(tmp_path, "dense", ["image_to_text"], resume=False)
    model, train, evaluation = called["given"]
    assert asked == [("julianmoraes/doodles-captions-manual", "train")]
    assert model == ("Qwen/Qwen3.5-0.8B", {"head": "dense", "max_pixels": 16_384})
    assert len(train) + len(evaluation) == 400
    assert called["num_candidates"] - 1 == 100 < len(evaluation)
    assert (called["num_negatives"], called["directions"]) == (4, ["image_to_text"])
    assert (called["per_device_train_batch_size"], called["gradient_accumulation_steps"]) == (8, 4)
    assert (called["learning_rate"], called["num_train_epochs"]) == (5e-6, 1)


def test_a_table_of_ones_own_in_tiny_mode(run, tmp_path: Path) -> None:
    run("examples/own_table.py", "--tiny", "--output", "mine")
    assert (tmp_path / "mine" / "final" / "modules.json").is_file()


def test_sounds_of_ones_own_in_tiny_mode(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("soundfile")
    run("examples/own_sounds.py", "--tiny", "--output", "mine", "--search", "two beats of a low bell, rising")
    found = capsys.readouterr().out.splitlines()[-3:]
    assert all(line.endswith(".wav") and Path(line.split()[1]).is_file() for line in found)
    assert (tmp_path / "mine" / "final" / "modules.json").is_file()


@pytest.mark.usefixtures("qwen3_vl_path")
def test_clips_of_ones_own_in_tiny_mode(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("av")
    run("examples/own_clips.py", "--tiny", "--output", "mine", "--search", "a red square creeps left")
    printed = capsys.readouterr().out.splitlines()
    assert "  corpus     48 documents (video)" in printed
    assert "  queries    32" in printed
    assert all(line.endswith(".mp4") and Path(line.split()[1]).is_file() for line in printed[-3:])


@pytest.mark.usefixtures("qwen3_vl_path")
def test_one_model_of_four_routes_in_tiny_mode(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("soundfile")
    pytest.importorskip("av")
    run("examples/mixed_corpus.py", "--tiny", "--output", "one")
    measured = re.findall(r"^ *(\w+): nDCG@10 ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(measured) == ["audio", "image", "text", "video"]
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    batched = {key.partition(": ")[0] for key in metrics["settings"]["data"] if key.endswith(": training_rows")}
    assert batched == {"audio", "image", "text", "video"}


def test_a_folder_of_ones_own_pdfs_in_eight_lines(monkeypatch, tmp_path: Path, clip_path: str) -> None:
    pytest.importorskip("pypdfium2")
    script = ROOT / "examples" / "own_pdfs.py"
    code = script.read_text(encoding="utf-8").split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) == 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), generated_pdfs("pdfs"), clip_path, "tuned"])
    runpy.run_path(str(script), run_name="__main__")
    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    assert (tmp_path / "tuned" / "final" / "modules.json").is_file()
    assert metrics["before"].keys() == metrics["after"].keys() != set()


def test_a_table_of_ones_own_with_groups(run, tmp_path: Path, clip_path: str) -> None:
    rows = generated_pages(24)
    rows = rows.add_column("file", [f"{row_id.rsplit('-', 1)[0][:9]}.pdf" for row_id in rows["id"]])
    rows.to_parquet(tmp_path / "pages.parquet")
    run(
        "examples/own_table.py",
        *("--table", "pages.parquet", "--model", clip_path, "--output", "mine"),
        *("--eval-queries", "6", "--group-column", "file"),
    )
    assert (tmp_path / "mine" / "metrics.json").is_file()


@pytest.mark.parametrize("way", ["router", "vlm", "late-interaction", "lora"])
def test_every_way_to_a_model_runs_in_tiny_mode(run, way: str, tmp_path: Path) -> None:
    if way == "lora":
        pytest.importorskip("peft")
    run("examples/encoders.py", way, "--tiny", "--output", "tuned")
    assert {"final", "metrics.json", "report.md"} <= {path.name for path in (tmp_path / "tuned").iterdir()}
    assert (tmp_path / "tuned" / "queries" / "modules.json").is_file() == (way == "router")


def test_an_example_without_data_says_what_to_pass(run, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("examples/encoders.py", "vlm")
    assert "pass --table, or --tiny" in capsys.readouterr().err


def test_the_receipts_benchmark_runs_on_a_folder(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, seed in (("train", 0), ("eval", 1)):
        part: Dataset = generated_pages(12, seed=seed)
        part.to_parquet(tmp_path / f"{name}.parquet")
    run("benchmarks/receipts.py", "--data", str(tmp_path), "--output", "out", "--epochs", "1")
    assert "unseen receipts, after" in capsys.readouterr().out


def test_the_models_of_the_guide_are_compared_in_tiny_mode(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    module = run("examples/compare_guide_models.py", "--tiny", "--output", "out")
    printed = capsys.readouterr().out
    assert "vdr-eval-hard: 16 queries" in printed
    assert "- not there: " in printed
    assert len(list((tmp_path / "out" / "measured").glob("*.json"))) == 2
    assert (tmp_path / "out" / "models.png").is_file()
    assert len(module.PUBLISHED) == 20
