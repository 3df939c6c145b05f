"""Runs that are replaced, killed, interrupted, damaged or resumed, and models that get worse."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from comparing import assert_same_weights
from mmtune import ConfigError, FinetuneResult, RetrievalDataset, finetune
from mmtune.testing import generated_pages, tiny_clip
from mmtune.training import result, run
from mmtune.training.output import only_run, recover, set_aside
from mmtune.training.records import find_last_checkpoint, require_same, why_unusable
from mmtune.training.trainers import EmbeddingTrainer, PageTrainer

OPTIONS: dict[str, Any] = {
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "save_steps": 2,
    "eval_steps": 2,
    "save_total_limit": None,
}
SIDES = "training", "evaluation"
IGNORED = "ignore_patterns"


@pytest.fixture(autouse=True)
def _ctrl_c_ends_a_process() -> Iterator[None]:
    """As in a terminal: a process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(16, seed=1)).split(5)


@pytest.fixture(scope="module")
def finished(data, clip_path: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A run of four steps with checkpoint-2 and checkpoint-4."""
    return finetune(clip_path, *data, output_dir=tmp_path_factory.mktemp("runs") / "run", **OPTIONS)


@pytest.fixture
def folder(finished: FinetuneResult, tmp_path: Path) -> Path:
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(folder), device="cpu").state_dict()


class Watched(MultipleNegativesRankingLoss):
    """Calls a function at a certain forward pass."""

    at = 1
    act: Callable[[], None]

    def forward(self, *args: Any) -> Any:
        """The loss."""
        self.passed = getattr(self, "passed", 0) + 1
        if self.passed == self.at:
            type(self).act()
        return super().forward(*args)


def acting(at: int, act: Callable[[], None]) -> type[Watched]:
    return type("Watched", (Watched,), {"at": at, "act": staticmethod(act)})


def run_out_of_memory() -> None:
    raise RuntimeError("out of memory")


# Replacing a run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": acting(1, run_out_of_memory)}, "out of memory"),
        ({"optim": "no-such-optimizer"}, "no-such-optimizer"),
        ({"overwrite": "no"}, r"overwrite='no': expected True or False"),
    ],
    ids=["first step", "argument", "flag"],
)
def test_a_call_that_fails_leaves_the_run_it_was_to_replace(data, clip_path, folder: Path, arguments, message) -> None:
    before = contents(folder)
    with pytest.raises((ConfigError, RuntimeError), match=message):
        finetune(
            clip_path, data[0], output_dir=folder, **{"overwrite": True, **OPTIONS, "eval_steps": None, **arguments}
        )
    assert contents(folder) == before


def test_the_run_that_is_replaced_goes_when_the_new_one_has_a_checkpoint(data, clip_path, folder: Path) -> None:
    seen = []
    names = lambda: seen.append(sorted(path.name for path in folder.iterdir()))  # noqa: E731
    options = {**OPTIONS, "eval_steps": None, "overwrite": True}
    finetune(clip_path, data[0], output_dir=folder, loss=acting(1, names), **options)
    assert ".replaced-run" in seen[0]
    assert not {"final", "checkpoint-2", "checkpoint-4"} & set(seen[0])
    finetune(clip_path, data[0], output_dir=folder, loss=acting(3, names), **options)
    assert ".replaced-run" not in seen[1]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("moved", ["all", "some"])
def test_what_a_killed_call_had_set_aside_comes_back(folder: Path, moved: str) -> None:
    before = contents(folder)
    set_aside(folder)
    (folder / "checkpoint-2").mkdir()  # cut off
    if moved == "some":
        (folder / "checkpoint-2").rmdir()
        (folder / ".replaced-run").rename(folder / ".replacing-run")
        (folder / ".replacing-run" / "checkpoint-4").rename(folder / "checkpoint-4")
    with only_run(folder):
        pass
    assert contents(folder) == before


def test_other_processes_wait_until_the_first_has_put_it_back(folder: Path, monkeypatch) -> None:
    set_aside(folder)
    monkeypatch.setenv("RANK", "1")
    first = threading.Timer(0.5, recover, [folder])
    first.start()
    with only_run(folder):
        assert find_last_checkpoint(folder).name == "checkpoint-4"
    first.join()


def test_what_a_killed_call_had_replaced_does_not_come_back(folder: Path) -> None:
    shutil.copytree(folder / "checkpoint-2", folder.parent / "checkpoint-2")
    set_aside(folder)
    shutil.copytree(folder.parent / "checkpoint-2", folder / "checkpoint-2")
    with only_run(folder):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "eval"]


def test_scores_in_tables_of_the_replaced_run_are_not_appended_to(folder: Path) -> None:
    (folder / "eval" / "RerankingEvaluator_vdr-rerank_results.csv").write_text("epoch,steps\n")
    (folder / "eval" / "mine.csv").write_text("mine")
    set_aside(folder)
    assert [path.name for path in (folder / "eval").iterdir()] == ["mine.csv"]


@pytest.mark.parametrize(
    "arguments", [{"resume": "yes"}, {"allow_overlap": 1}, {"keep": "first"}], ids=lambda each: next(iter(each))
)
def test_flags_are_checked(data, clip_path: str, tmp_path: Path, arguments) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ConfigError, match=rf"{name}={value!r}"):
        finetune(clip_path, data[0], output_dir=tmp_path, **arguments)


# One run a folder


def test_two_runs_in_one_folder_are_an_error(tmp_path: Path) -> None:
    in_use = pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()} ")
    with only_run(tmp_path), in_use, only_run(tmp_path):
        pass
    with only_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_another_process_holds_its_folder_until_it_dies(tmp_path: Path) -> None:
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "file.write('process 7 on node-3'); file.flush(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / ".run-lock")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=r"another run \(process 7 on node-3\)"), only_run(tmp_path):
            pass
        process.kill()
        process.wait()
    with only_run(tmp_path):
        pass


# Going on with what was begun


def other_data(data: tuple[RetrievalDataset, RetrievalDataset]) -> RetrievalDataset:
    return data[0].select_queries(len(data[0]) - 1)


CHANGED: dict[str, Any] = {
    "learning_rate": 1e-4,
    "max_steps": 6,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 5.0,
    "optim": "sgd",
    "adam_beta1": 0.8,
    "label_smoothing_factor": 0.1,
    "dataloader_drop_last": True,
    "batch_sampler": "batch_sampler",
    "metric_for_best_model": "vdr_cosine_mrr@10",
    "seed": 7,
    "num_negatives": 2,
    "matryoshka_dims": [32],
    "loss": MultipleNegativesRankingLoss,
    "prompts": None,
    "freeze": ["vision"],
    "keep": "last",
    "model": "other",
    "training data": "other",
    "evaluation data": "other",
    "no evaluation data": None,
}


@pytest.mark.filterwarnings("ignore:The batch sampler is")
@pytest.mark.parametrize("name", CHANGED)
def test_a_run_does_not_go_on_with_another_setting(name: str, data, clip_path: str, folder: Path, tmp_path) -> None:
    model, train, evaluation, arguments = clip_path, *data, dict(OPTIONS)
    if name == "model":
        model = tiny_clip(tmp_path / "clip", seed=5)
    elif name == "training data":
        train = other_data(data)
    elif name.endswith("evaluation data"):
        evaluation = evaluation.select_queries(3) if CHANGED[name] else None
        arguments |= {} if evaluation else {"eval_steps": None}
    else:
        arguments |= {name: CHANGED[name]}
    shown = name.removeprefix("no ")
    with pytest.raises(ConfigError, match=rf"begun with other settings: .*{shown}: .* then, .* now.*may change"):
        finetune(model, train, evaluation, output_dir=folder, resume=True, **arguments)


@pytest.mark.parametrize("changed", ["guard", "evaluation", "training"])
def test_a_run_does_not_go_on_with_sets_of_other_names(changed: str, data, clip_path: str, folder: Path) -> None:
    train, evaluation = ({"more": part} if changed == name else part for name, part in zip(SIDES, data, strict=True))
    guard = {"more": data[1]} if changed == "guard" else None
    with pytest.raises(ConfigError, match=rf"begun with other settings: .*{changed} sets: .* then, \['more'\] now"):
        finetune(clip_path, train, evaluation, guard_dataset=guard, output_dir=folder, resume=True, **OPTIONS)


def test_a_run_without_its_values_by_query_says_that_there_is_no_verdict(data, clip_path: str, folder: Path) -> None:
    shutil.rmtree(folder / "final")
    for path in folder.glob("checkpoint-*/mmtune_per_query.parquet"):
        path.unlink()
    with pytest.warns(UserWarning, match="checkpoint-4 has no mmtune_per_query.parquet, .* without a verdict"):
        result = finetune(clip_path, *data, output_dir=folder, resume=True, **OPTIONS)
    assert result.verdict is None


def test_what_a_killed_run_left_of_its_result_is_not_taken_for_that_of_the_next(data, clip_path, tmp_path) -> None:
    for name in ("per_query.parquet", "report.html"):
        (tmp_path / name).write_text("of another run")
    finetune(clip_path, data[0], output_dir=tmp_path, **{**OPTIONS, "eval_steps": None})
    assert not (tmp_path / "per_query.parquet").exists()
    assert not (tmp_path / "report.html").exists()


def test_another_number_of_processes_is_named(folder: Path) -> None:
    record = json.loads((folder / "checkpoint-4" / "mmtune_run.json").read_text())["settings"]
    with pytest.raises(ConfigError, match="world_size: 1 then, 2 now"):
        require_same(folder, record, {**record, "world_size": 2})


def test_pages_are_looked_at_once_and_by_one_process(
    data, clip_path: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(RetrievalDataset, "check_pages", lambda self, **_: checked.append(len(self.corpus)))
    shutil.rmtree(folder / "final")
    finetune(clip_path, *data, output_dir=folder, resume=True, **OPTIONS)
    assert checked == [], "a run that goes on has looked at its pages before"
    monkeypatch.setattr(run, "is_first_process", lambda: False)
    finetune(clip_path, *data, output_dir=folder / "other", **OPTIONS)
    assert checked == [], "another process looks at them"
    monkeypatch.setattr(run, "is_first_process", lambda: True)
    finetune(clip_path, data[0], {"one": data[1], "again": data[1]}, output_dir=folder / "first", **OPTIONS)
    assert checked == [len(part.corpus) for part in data]


def test_a_package_under_another_name_loses_no_run(data, clip_path: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(result, "_PACKAGES", (*result._PACKAGES, "pillow-of-someone-else"))
    found = finetune(clip_path, data[0], output_dir=tmp_path / "run", **{**OPTIONS, "eval_steps": None})
    metrics = json.loads((found.output_dir / "metrics.json").read_text())
    assert metrics["versions"]["pillow-of-someone-else"] == "unknown"
    assert metrics["versions"]["torch"] != "unknown"


def test_what_decides_nothing_may_change(data, clip_path, finished, folder: Path, caplog) -> None:
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "final")
    changed = {**OPTIONS, "save_total_limit": 5, "per_device_eval_batch_size": 2, "logging_steps": 0.5}
    again = finetune(Path(clip_path), *data, output_dir=folder, resume=True, **changed)
    assert_same_weights(weights(folder / "final"), weights(finished.output_dir / "final"))
    assert again.after == finished.after


def test_going_on_with_the_trained_object_reports_the_start_and_no_false_alarm(
    data, clip_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = SentenceTransformer(clip_path, device="cpu")
    options = {**OPTIONS, "max_steps": 12, "save_steps": 0.5, "eval_steps": 0.5}
    first = finetune(model, *data, output_dir=tmp_path, **options)
    again = finetune(model, *data, output_dir=tmp_path, resume=True, **options)
    assert again.before == first.before
    assert not [record for record in caplog.records if "do not match" in record.getMessage()]


def test_nothing_is_unpickled_from_a_checkpoint(data, clip_path: str, folder: Path, tmp_path: Path) -> None:
    class Crafted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was-here"),)

    shutil.rmtree(folder / "checkpoint-4")
    path = folder / "checkpoint-2" / "training_args.bin"
    size = path.stat().st_size
    torch.save(Crafted(), path)
    with path.open("ab") as file:
        file.write(b"\0" * (size - path.stat().st_size))
    record = folder / "checkpoint-2" / "mmtune_run.json"
    assert pickle  # what torch.save writes with
    assert json.loads(record.read_text())["files"]["training_args.bin"] == size
    finetune(clip_path, *data, output_dir=folder, resume=True, **OPTIONS)
    assert not (tmp_path / "was-here").exists()


def test_a_run_that_was_killed_behind_its_last_step_takes_no_step_more(data, clip_path, tmp_path) -> None:
    options = {**OPTIONS, "max_steps": 5, "save_steps": 5, "eval_steps": 5, "keep": "last"}
    whole = finetune(clip_path, *data, output_dir=tmp_path, **options)
    steps_an_epoch = 5 / whole.trainer.state.epoch
    assert 5 % steps_an_epoch, "at the end of an epoch there is none to take"
    shutil.move(tmp_path / "final", tmp_path / "whole")
    again = finetune(clip_path, *data, output_dir=tmp_path, resume=True, **options)
    assert again.trainer.state.global_step == 5
    assert again.after == whole.after
    assert_same_weights(weights(tmp_path / "final"), weights(tmp_path / "whole"))


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGE = [
    *((name, act) for name in ("trainer_state.json", "model.safetensors") for act in (cut, empty, zero, Path.unlink)),
    *((name, act) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") for act in (cut, empty, Path.unlink)),
    *((name, act) for name in ("mmtune_run.json", "config.json", "modules.json") for act in (cut, Path.unlink)),
    ("training_args.bin", cut),
    ("tokenizer.json", empty),
]


@pytest.mark.parametrize(("name", "act"), DAMAGE, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_damaged_checkpoint_is_passed_over(name: str, act: Callable[[Path], None], folder: Path) -> None:
    act(next((folder / "checkpoint-4").rglob(name)))
    with pytest.warns(UserWarning, match=r"checkpoint-4 is passed over: .*goes on from checkpoint-2"):
        assert find_last_checkpoint(folder) == folder / "checkpoint-2"
    act(next((folder / "checkpoint-2").rglob(name)))
    with pytest.raises(ConfigError, match=r"no checkpoint to go on from \(checkpoint-4 .*; checkpoint-2 "):
        find_last_checkpoint(folder)


def test_a_run_ends_the_same_after_its_newest_checkpoint_was_damaged(data, clip_path, finished, folder: Path) -> None:
    cut(folder / "checkpoint-4" / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"passed over: optimizer.pt is damaged") as warned:
        finetune(clip_path, *data, output_dir=folder, resume=True, **OPTIONS)
    assert warned[0].filename == __file__
    assert_same_weights(weights(folder / "final"), weights(finished.output_dir / "final"))


def test_a_run_that_saved_weights_only_is_not_resumed(data, clip_path: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 2, "eval_steps": None, "save_only_model": True}
    finetune(clip_path, data[0], output_dir=tmp_path, **options)
    with pytest.raises(ConfigError, match="save_only_model=True"):
        finetune(clip_path, data[0], output_dir=tmp_path, resume=True, **options)


# Interruption


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(number, ends_with, data, clip_path, tmp_path, capfd) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    interrupting = acting(3, lambda: os.kill(os.getpid(), number))
    options = {**OPTIONS, "save_steps": 4, "eval_steps": 4}
    with pytest.raises(ends_with) as ended:
        finetune(clip_path, *data, output_dir=tmp_path / "run", loss=interrupting, **options)
    assert getattr(ended.value, "code", 143) == 143
    assert "resume=True goes on" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert find_last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    harmless = acting(0, lambda: None)
    finetune(clip_path, *data, output_dir=tmp_path / "run", loss=harmless, resume="auto", **options)
    finetune(clip_path, *data, output_dir=tmp_path / "whole", loss=harmless, resume="auto", **options)
    assert_same_weights(weights(tmp_path / "run" / "checkpoint-4"), weights(tmp_path / "whole" / "checkpoint-4"))
    assert_same_weights(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))


def test_a_second_request_ends_at_once(data, clip_path: str, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        finetune(clip_path, data[0], output_dir=tmp_path, loss=acting(1, twice), **{**OPTIONS, "eval_steps": None})
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_handler_of_ones_own_is_left_alone(data, clip_path: str, tmp_path: Path) -> None:
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        options = {**OPTIONS, "max_steps": 2, "eval_steps": None}
        asking = acting(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune(clip_path, data[0], output_dir=tmp_path, loss=asking, **options)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [1]


def test_a_finished_run_is_returned(data, clip_path: str, finished: FinetuneResult, folder: Path) -> None:
    before = contents(folder)
    again = finetune(clip_path, *data, output_dir=folder, resume="auto", **OPTIONS)
    assert again.trainer is None
    assert (again.before, again.after, str(again.rows)) == (finished.before, finished.after, str(finished.rows))
    assert_same_weights(again.model.state_dict(), weights(folder / "final"))
    assert contents(folder) == before
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.001 then, 0\.01 now"):
        finetune(clip_path, *data, output_dir=folder, resume="auto", **{**OPTIONS, "learning_rate": 0.01})


def test_a_finished_run_without_checkpoints_is_returned(data, clip_path: str, folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert finetune(clip_path, *data, output_dir=folder, resume="auto", **OPTIONS).trainer is None


def test_a_run_that_was_cut_off_in_its_first_checkpoint_starts_again(data, clip_path, finished, tmp_path) -> None:
    shutil.copytree(finished.output_dir / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").rename(tmp_path / "checkpoint-2" / "of_other_settings.json")
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        finetune(clip_path, *data, output_dir=tmp_path, resume=True, **OPTIONS)
    with pytest.warns(UserWarning, match="cut off while it wrote its first checkpoint") as warned:
        again = finetune(clip_path, *data, output_dir=tmp_path, resume="auto", **OPTIONS)
    assert warned[0].filename == __file__
    assert again.after == finished.after
    assert not (tmp_path / "checkpoint-2" / "of_other_settings.json").exists()
    assert_same_weights(weights(tmp_path / "checkpoint-4"), weights(finished.output_dir / "checkpoint-4"))


@pytest.mark.parametrize("left", ["final", "metrics.json", "damaged checkpoint"])
def test_what_is_not_of_a_kill_is_not_written_over(left: str, data, clip_path: str, folder: Path) -> None:
    for path in [path for path in folder.iterdir() if path.name != left]:
        if path.name == "checkpoint-2" and left == "damaged checkpoint":
            cut(path / "model.safetensors")
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"holds a run already|no checkpoint to go on from"):
        finetune(clip_path, *data, output_dir=folder, resume="auto", **OPTIONS)
    assert contents(folder) == before


def test_a_full_disk_is_said(data, clip_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = EmbeddingTrainer.save_model

    def save_once(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.state.global_step > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output_dir, _internal_call)

    monkeypatch.setattr(EmbeddingTrainer, "save_model", save_once)
    with pytest.raises(OSError, match=r"The disk is full. The last whole checkpoint is checkpoint-2"):
        finetune(clip_path, *data, output_dir=tmp_path, **OPTIONS)


@pytest.mark.parametrize("evaluates", [True, False], ids=["with evaluation", "without"])
def test_a_run_that_diverges_is_an_error_with_its_step_and_queries(data, clip_path, tmp_path, evaluates) -> None:
    class Diverging(MultipleNegativesRankingLoss):
        def forward(self, *args: Any) -> Any:
            self.passed = getattr(self, "passed", 0) + 1
            return super().forward(*args) * (float("nan") if self.passed == 3 else 1)

    options = OPTIONS if evaluates else {**OPTIONS, "eval_steps": None}
    evaluation = data[1] if evaluates else None
    with pytest.raises(ConfigError, match=r"diverges: the loss of step 3 is nan, on the queries '") as raised:
        finetune(clip_path, data[0], evaluation, output_dir=tmp_path, loss=Diverging, **options)
    named = [query_id for query_id in data[0].queries["query_id"] if repr(query_id) in str(raised.value)]
    assert len(named) == 2  # the rows of a batch
    assert find_last_checkpoint(tmp_path).name == "checkpoint-2"
    assert not (tmp_path / "final").exists()


def test_weights_that_are_no_numbers_are_not_saved(data, clip_path: str, tmp_path: Path) -> None:
    model = SentenceTransformer(clip_path, device="cpu")

    def spoil() -> None:
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad).fill_(float("inf"))

    class Constant(MultipleNegativesRankingLoss):
        def forward(self, *args: Any) -> Any:
            self.passed = getattr(self, "passed", 0) + 1
            if self.passed == 3:
                spoil()
            return sum((weight * 0).sum() for weight in [list(model.parameters())[-1]])

    with pytest.raises(ConfigError, match=r"diverges: after step 4 the weight '.*' is no number any more"):
        finetune(model, data[0], output_dir=tmp_path, loss=Constant, **{**OPTIONS, "eval_steps": None})
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# The best


def test_a_best_checkpoint_that_does_not_load_is_an_error(data, clip_path, tmp_path, monkeypatch) -> None:
    def fail(self: Any, folder: str) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(EmbeddingTrainer, "read_checkpoint", fail)
    with pytest.raises(ConfigError, match=r"(?s)can't be loaded: RuntimeError: CUDA out of memory.*final/ is not writ"):
        finetune(clip_path, *data, output_dir=tmp_path, **OPTIONS)
    assert not (tmp_path / "final").exists()


HARMFUL = {**OPTIONS, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def seen(data) -> RetrievalDataset:
    """What a trained model ranks well, so that harm shows."""
    return RetrievalDataset.from_id_rows(generated_pages(16, seed=1))


@pytest.fixture(scope="module")
def good(seen, clip_path: str, tmp_path_factory) -> str:
    """A model that has learned its pages."""
    folder = tmp_path_factory.mktemp("good")
    options = {"disable_tqdm": True, "learning_rate": 1e-3, "num_train_epochs": 20, "save_strategy": "no"}
    finetune(clip_path, seen, output_dir=folder, per_device_train_batch_size=8, **options)
    return str(folder / "final")


@pytest.mark.parametrize("lora", [None, True], ids=["full", "lora"])
def test_the_start_is_kept_where_nothing_beats_it(lora, good: str, seen, tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft")
    options = {**HARMFUL, "lora": lora, "allow_overlap": True, "learning_rate": 0.5 if lora else 0.05}
    result = finetune(good, seen, seen, output_dir=tmp_path, **options)
    assert result.after == result.before
    assert result.settings["training"]["kept"].startswith("the start")
    for text in (str(result), (tmp_path / "report.md").read_text()):
        assert text.startswith("No change: ")
        assert "\nNothing beat the start" in text
    found = SentenceTransformer(str(tmp_path / "final"), device="cpu").encode("a report")
    assert torch.equal(torch.tensor(found), torch.tensor(SentenceTransformer(good, device="cpu").encode("a report")))
    again = finetune(good, seen, seen, output_dir=tmp_path, resume=True, **options)
    assert again.after == result.before


def test_a_worse_result_is_said(good: str, seen, tmp_path: Path) -> None:
    result = finetune(good, seen, seen, output_dir=tmp_path, keep="last", allow_overlap=True, **HARMFUL)
    for text in (str(result), result.report):
        assert text.startswith("Worse: ")
        assert "\nThe model is worse than it was" in text
    assert result.verdict is not None
    assert result.verdict.outcome == "REGRESSION"
    assert result.settings["training"]["kept"] == "the last weights"


# Publishing


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
@pytest.mark.parametrize("works", [True, False], ids=["works", "fails"])
def test_the_result_is_published_and_a_push_that_fails_is_said(
    works: bool, data, clip_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[dict[str, Any], dict[str, bytes]]] = []

    def upload(self: HfApi, *, folder_path: str, run_as_future: bool = False, **options: Any) -> Any:
        pushed.append(({"folder": Path(folder_path).name, **options}, contents(Path(folder_path))))
        done: Future[None] = Future()
        if works:
            done.set_result(None)
        else:
            done.set_exception(OSError("no route to the Hub"))
        return done if run_as_future else done.result()

    # without a name the host takes that of the folder, and the Hub puts the user in front
    tmp_path = tmp_path / "pages"
    url = "https://huggingface.co/me/pages"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(url))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    options = {**OPTIONS, "push_to_hub": True, "hub_token": "hf_secret"}
    if works:
        result = finetune(clip_path, *data, output_dir=tmp_path, **options)
    else:
        with pytest.warns(UserWarning, match=r"A checkpoint was not pushed: OSError: no route.*The result was not"):
            result = finetune(clip_path, *data, output_dir=tmp_path, **options)
        assert len(result.settings["training"]["failed_pushes"]) == 3
        assert "no route" in (tmp_path / "metrics.json").read_text()
    assert [each["folder"] for each, _ in pushed] == ["checkpoint-2", "checkpoint-4", "final"]
    assert pushed[-1][1] == contents(tmp_path / "final")
    assert b"## Finetuning" in pushed[-1][1]["README.md"]
    assert b"SentenceTransformer('me/pages')" in pushed[-1][1]["README.md"]
    published = [name for to, files in pushed for name in filter_repo_objects(files, ignore_patterns=to.get(IGNORED))]
    assert "model.safetensors" in published
    assert not [name for name in published if "per_query" in name], "ids of the data are never published"
    assert not [name for _, files in pushed for name, content in files.items() if b"hf_secret" in content]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert not [name for _, files in pushed for name in files if name.endswith((".png", ".jpg")) or "assets" in name]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_no_way_to_publish_a_checkpoint_takes_ids_of_the_data_along(strategy: str, folder: Path) -> None:
    pushed: list[dict[str, Any]] = []
    checkpoint = str(folder / "checkpoint-4")
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(hub_strategy=strategy),
        state=SimpleNamespace(global_step=4),
        is_world_process_zero=lambda: True,
        _upload=lambda folder, message, **options: pushed.append(options),
        _pushes=[],
    )
    PageTrainer.push_checkpoint(trainer, checkpoint)
    assert len(pushed) == (1 if strategy == "every_save" else 2)
    for options in pushed:
        published = list(filter_repo_objects(contents(Path(checkpoint)), ignore_patterns=options.get(IGNORED)))
        assert "model.safetensors" in published
        assert not [name for name in published if "per_query" in name]
    (folder / "checkpoint-4" / "mmtune_per_query.parquet").unlink()
    assert why_unusable(folder / "checkpoint-4") is None, "and it can be gone on from"
