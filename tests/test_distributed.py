"""Two processes on this machine, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import distributed
from transformers import TrainerControl

from conftest import TORCHVISION_WORKS
from mmtune import ConfigError, RetrievalDataset, encode_corpus, finetune, load_model
from mmtune.training.interruption import Interrupted, SavesWhenAsked
from mmtune.training.records import checkpoints_of, why_unusable

pytestmark = pytest.mark.timeout(600)

SCRIPT = """
import os, sys
from pathlib import Path
from mmtune import RetrievalDataset, compose_router, finetune, load_model
from mmtune.testing import generated_pages, tiny_clip, tiny_siglip, tiny_text_encoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

folder, options = Path(sys.argv[1]), eval(sys.argv[2])
rank = os.environ["RANK"]
saved, save = [], SentenceTransformer.save_pretrained

def save_noted(model, path, **given):
    saved.append(Path(path).name)
    save(model, path, **given)

SentenceTransformer.save_pretrained = save_noted
base = folder / f"base-{rank}"
model = tiny_clip(base / "clip")
if options.pop("half", None):
    load_model(model, dtype="bfloat16", device="cpu").save_pretrained(str(base / "half"))
    model = base / "half"
if kind := options.pop("router", None):
    text = tiny_text_encoder(base / "text", hidden_size=32)
    model = compose_router(text, tiny_siglip(base / "image"), device="cpu")
    options["loss"] = MultipleNegativesRankingLoss if kind == "plain loss" else None
train, evaluation = RetrievalDataset.from_id_rows(generated_pages(44, seed=1)).split(8)
result = finetune(
    model, train, evaluation, output_dir=folder / "run", use_cpu=True,
    per_device_train_batch_size=3, num_train_epochs=2, learning_rate=1e-3, disable_tqdm=True, **options,
)
digest = sum(float(value.double().abs().sum()) for value in result.model.state_dict().values())
there = (result.output_dir / "final" / "modules.json").is_file() and (result.output_dir / "metrics.json").is_file()
left_over = result.settings["training"]["rows_left_over_in_last_epoch"]
(folder / f"rank-{rank}.txt").write_text(
    repr((digest, result.after, there, left_over, result.trainer.state.max_steps, saved))
)
"""

KINDS_SCRIPT = """
import os, sys
from pathlib import Path
from forked_runs import build, train

folder, kinds = Path(sys.argv[1]), eval(sys.argv[2])
rank = os.environ["RANK"]

def size_of(model):
    return sum(float(value.double().abs().sum()) for value in model.state_dict().values())

# all are built before the first call: transformers saves from the first process alone once these are connected
models = {(kind, lora): build(kind, folder / f"base-{rank}") for kind, lora in kinds}
results = {}
for (kind, lora), model in models.items():
    learned = sum(parameter.requires_grad for parameter in model.parameters())
    before = size_of(model)
    train(model, kind, folder / f"{kind}-{lora}", lora=lora, max_steps=2, save_strategy="no")
    restored = lora or learned == sum(parameter.requires_grad for parameter in model.parameters())
    results[kind, lora] = (before, size_of(model), restored)
(folder / f"rank-{rank}.txt").write_text(repr(results))
"""

SIGNALS_SCRIPT = """
import os, sys, time
from pathlib import Path
from transformers import TrainerCallback
from forked_runs import digest, signal_after_step, train
from mmtune.testing import tiny_clip

folder, options = Path(sys.argv[1]), eval(sys.argv[2])
rank, start = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
model = tiny_clip(folder / f"base-{rank}")
callbacks = [signal_after_step(3, 1, number) for number in options.get("sent", [])[start : start + 1]]

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        (folder / "begun").touch()
        time.sleep(0.5)

def run(name, callbacks=()):
    given = {key: options[key] for key in ("max_steps", "dataloader_num_workers")}
    result = train(model, "clip", folder / name, resume="auto", callbacks=callbacks, save_steps=2, **given)
    return digest(result.model), result.before, result.after

if options.get("slow"):
    callbacks.append(Slow())
results = run("run", callbacks), run("whole")
(folder / f"rank-{rank}.txt").write_text(repr(results))
"""

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ALL_KINDS = ("clip", "siglip", "llava", "qwen3_vl", "router", "late interaction", "logit_score", "dense")


def torchrun(folder: Path, **options: object) -> list[tuple]:
    """Each process's weights in a number, metrics, whether the files were there, rows left over, steps, saves."""
    return run_processes(folder, SCRIPT, options)


def run_processes(folder: Path, text: str, options: object) -> list:
    """What each of two processes leaves in its file; they get the folder and ``options``."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(text)
    run_python(*TORCHRUN, str(script), str(folder), repr(options))
    return what_each_left(folder)


def what_each_left(folder: Path) -> list:
    return [eval((folder / f"rank-{rank}.txt").read_text()) for rank in (0, 1)]


def run_python(*command: str) -> str:
    """What a command wrote to its stderr; it has to end well."""
    done = subprocess.run([sys.executable, *command], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}


def in_forks(function: str, folder: Path, argument: object) -> tuple[Any, str]:
    """What a function of `forked_runs.py` found, and what it wrote to its stderr."""
    said = run_python(str(TESTS / "forked_runs.py"), function, str(folder), repr(argument))
    return eval((folder / "found.txt").read_text()), said


def assert_kinds_train(folder: Path, kinds: list[tuple[str, bool | None]]) -> None:
    one, other = run_processes(folder, KINDS_SCRIPT, kinds)
    assert list(one) == kinds
    for kind in kinds:
        before, after, restored = one[kind]
        assert after != before, f"{kind} did not train"
        assert after == other[kind][1], f"the processes trained {kind} apart"
        assert restored, f"{kind} has layers that the run left frozen"


def test_processes_that_the_host_does_not_connect(
    clip_path: str, pages: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without an accelerator, where the host is not told to use the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = SentenceTransformerTrainingArguments(str(tmp_path / "run"))
    dataset, model = RetrievalDataset.from_id_rows(pages), load_model(clip_path, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="each would train apart"):
        finetune(clip_path, dataset, args=args)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="accelerate does not connect them"):
        encode_corpus(dataset, model, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


@pytest.mark.slow
def test_weights_that_are_measured_in_another_type_are_still_shared(tmp_path: Path) -> None:
    """Gradients go by the parameters that the processes began with: to measure must not replace them for good."""
    one, other = torchrun(tmp_path, half=True, keep="last")
    assert one[:2] == other[:2]


def test_models_with_weights_that_nothing_reaches_train_in_two_processes(tmp_path: Path) -> None:
    assert_kinds_train(tmp_path, [("clip", None), ("router", None), ("logit_score", None)])


@pytest.mark.slow
def test_every_kind_of_model_trains_in_two_processes(tmp_path: Path) -> None:
    if not TORCHVISION_WORKS:
        pytest.skip("Qwen3-VL needs torchvision, which is not installed")
    assert_kinds_train(tmp_path, [(kind, None) for kind in ALL_KINDS])


@pytest.mark.slow
def test_every_kind_of_model_trains_adapters_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    if not TORCHVISION_WORKS:
        pytest.skip("Qwen3-VL needs torchvision, which is not installed")
    assert_kinds_train(tmp_path, [(kind, True) for kind in ALL_KINDS])


@pytest.mark.slow
def test_two_processes_agree_and_write_once(tmp_path: Path) -> None:
    one, other = torchrun(tmp_path)
    assert one[:2] == other[:2]
    assert (one[2], other[2]) == (True, True), "a process went on before the files were written"
    assert one[4] == 12, "36 rows in steps of two batches of three, twice"
    assert {"start", "checkpoint-12", "final"} <= set(one[5])
    assert not other[5], "the processes wrote over one another"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["settings"]["training"]["processes"] == 2
    assert metrics["after"] == one[1]


@pytest.mark.slow
def test_gradients_are_shared_after_a_measurement(tmp_path: Path) -> None:
    one, other = torchrun(tmp_path, eval_strategy="no", save_strategy="no")
    assert one[0] == other[0], "the processes trained apart"


@pytest.mark.slow
@pytest.mark.parametrize("router", ["cached loss", "plain loss"])
def test_the_routes_of_a_router_train_in_several_processes(tmp_path: Path, router: str) -> None:
    one, other = torchrun(tmp_path, router=router)
    assert one[:2] == other[:2]


@pytest.mark.slow
def test_resuming_within_an_epoch_gives_the_same_weights(tmp_path: Path) -> None:
    whole = torchrun(tmp_path / "whole", eval_strategy="no", save_steps=9)
    half = tmp_path / "half"
    torchrun(half, eval_strategy="no", save_steps=9)
    for name in ("checkpoint-12", "final"):
        for path in sorted((half / "run" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (half / "run" / name).rmdir()
    resumed = torchrun(half, eval_strategy="no", save_steps=9, resume=True)
    assert [result[:2] for result in resumed] == [result[:2] for result in whole]


@pytest.mark.slow
def test_pages_as_bytes_train_the_same_weights_in_two_processes(tmp_path: Path) -> None:
    kinds = ["clip", "llava", "late interaction", "dense"]
    found, said = in_forks("read_pages_both_ways", tmp_path, kinds)
    assert list(found) == kinds
    for kind, (as_bytes, as_floats) in found.items():
        ended = [status for status, _ in as_bytes + as_floats]
        assert ended == [0] * 4, f"{kind}: {said[-4000:]}"
        assert [how for _, (how, _) in as_bytes + as_floats] == [{"bytes"}] * 2 + [{"floats"}] * 2
        assert len({weights for _, (_, weights) in as_bytes + as_floats}) == 1, f"{kind} learned other weights"


# Killed and asked to end


def assert_runs_survive(folder: Path, kinds: list[tuple[str, bool | None]]) -> None:
    found, said = in_forks("kill_and_resume", folder, kinds)
    assert list(found) == kinds
    for number, kind in enumerate(kinds):
        runs, (died, other) = found[kind], (0, 1) if number % 2 else (1, 0)
        assert [status for status, _ in runs["whole"]] == [0, 0], f"{kind}: {said[-4000:]}"
        assert runs["whole"][0] == runs["whole"][1], f"the processes trained {kind} apart"
        assert runs["killed"][died][0] == -signal.SIGKILL
        assert runs["killed"][other][0] == 1, f"{kind} went on without the other process"
        assert runs["left"].pop("checkpoint-2") is None
        assert [why for why in runs["left"].values() if "cut off" not in why] == []
        assert bool(runs["left"]) == bool(number % 2)
        assert runs["resumed"] == runs["whole"], f"{kind} ended otherwise after a kill"


@pytest.mark.slow
def test_every_kind_of_model_survives_a_kill_in_two_processes(tmp_path: Path) -> None:
    if not TORCHVISION_WORKS:
        pytest.skip("Qwen3-VL needs torchvision, which is not installed")
    assert_runs_survive(tmp_path, [(kind, None) for kind in ALL_KINDS])


@pytest.mark.slow
def test_adapters_on_every_kind_of_model_survive_a_kill_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    if not TORCHVISION_WORKS:
        pytest.skip("Qwen3-VL needs torchvision, which is not installed")
    assert_runs_survive(tmp_path, [(kind, True) for kind in ALL_KINDS])


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_after_the_same_step(tmp_path: Path) -> None:
    cases = [(number.value, rank) for number, rank in ((signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1))]
    found, said = in_forks("signal_and_resume", tmp_path, cases)
    for number, rank in cases:
        runs = found[number, rank]
        assert runs["ended"] == [128 + number] * 2
        assert runs["noted"] == [["step 1", "step 2", "checkpoint-2"], ["step 1", "step 2"]]
        assert runs["left"] == {"checkpoint-2": None}
        assert said.count(f"{number}-{rank}/checkpoint-2 of 4 steps. The same call with resume=True goes on") == 1
        assert runs["resumed"] == found["whole"]


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_all_with_one_checkpoint(tmp_path: Path) -> None:
    # with a worker: torchrun signals it, too, and to torch a worker that dies is an error
    script, options = tmp_path / "script.py", {"max_steps": 20, "dataloader_num_workers": 1}
    script.write_text(SIGNALS_SCRIPT)
    command = [sys.executable, *TORCHRUN, str(script), str(tmp_path)]
    with subprocess.Popen(
        [*command, repr({**options, "slow": True})], env=environment(), stderr=subprocess.PIPE, text=True
    ) as launched:
        while not (tmp_path / "begun").exists():
            assert launched.poll() is None, launched.communicate()[1][-4000:]
            time.sleep(0.05)
        launched.send_signal(signal.SIGTERM)
        said = launched.communicate()[1]
    assert launched.returncode == 1
    newest = checkpoints_of(tmp_path / "run")[0]
    assert why_unusable(newest) is None
    assert said.count("goes on from there") == 1
    assert f"SIGTERM: saved {newest} of 20 steps" in said
    assert not (tmp_path / "run" / "final").exists()
    one, other = run_processes(tmp_path, SIGNALS_SCRIPT, options)
    assert one == other
    assert one[0] == one[1]


def test_a_signal_that_comes_while_processes_agree_is_not_lost(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, control = SavesWhenAsked(), TrainerControl()
    args: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"), output_dir=str(tmp_path))
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=4)

    def reduce_slowly(tensor: torch.Tensor, op: object) -> None:
        if not asked.asked_by:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", reduce_slowly)
    with asked.listening():
        asked.on_step_end(args, state, control)
        assert not control.should_save, "the other process knows nothing of it yet"
        asked.on_step_end(args, state, control)
        assert control.should_save
        with pytest.raises(Interrupted, match=str(signal.SIGTERM.value)):
            asked.on_save(args, state, control)
