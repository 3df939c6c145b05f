"""Two processes on this machine, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TORCHVISION_WORKS

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
import conftest
from mmtune import (
    RetrievalDataset, build_late_interaction, build_reranker, compose_router, finetune, finetune_reranker, load_model,
)
from mmtune.testing import generated_pages, tiny_clip, tiny_llava, tiny_qwen3_vl, tiny_siglip, tiny_text_encoder
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

folder, kinds = Path(sys.argv[1]), eval(sys.argv[2])
rank = os.environ["RANK"]
base = folder / f"base-{rank}"
plain, cached = {"loss": MultipleNegativesRankingLoss}, {}
BUILD = {
    "clip": (lambda: load_model(tiny_clip(base / "clip"), device="cpu"), finetune, plain),
    "siglip": (lambda: load_model(tiny_siglip(base / "siglip"), device="cpu"), finetune, plain),
    "llava": (lambda: load_model(tiny_llava(base / "llava"), device="cpu"), finetune, plain),
    "qwen3_vl": (lambda: load_model(tiny_qwen3_vl(base / "qwen"), device="cpu"), finetune, plain),
    "router": (
        lambda: compose_router(tiny_text_encoder(base / "text"), tiny_siglip(base / "image"), device="cpu"),
        finetune,
        plain,
    ),
    "late interaction": (lambda: build_late_interaction(tiny_llava(base / "late"), device="cpu"), finetune, cached),
    "logit_score": (lambda: build_reranker(tiny_llava(base / "llava"), device="cpu"), finetune_reranker, {}),
    "dense": (lambda: build_reranker(tiny_llava(base / "llava"), head="dense", device="cpu"), finetune_reranker, {}),
}

def size_of(model):
    return sum(float(value.double().abs().sum()) for value in model.state_dict().values())

train, evaluation = RetrievalDataset.from_id_rows(generated_pages(20, seed=1)).split(4)
# all are built before the first call: transformers saves from the first process alone once these are connected
models = {(kind, lora): BUILD[kind][0]() for kind, lora in kinds}
results = {}
for (kind, lora), model in models.items():
    _, call, options = BUILD[kind]
    learned = sum(parameter.requires_grad for parameter in model.parameters())
    before = size_of(model)
    call(
        model, train, evaluation, output_dir=folder / f"{kind}-{lora}", use_cpu=True, lora=lora, num_negatives=1,
        per_device_train_batch_size=2, max_steps=2, learning_rate=1e-3, eval_strategy="no", save_strategy="no",
        ddp_find_unused_parameters=False, disable_tqdm=True, **options,
    )
    restored = lora or learned == sum(parameter.requires_grad for parameter in model.parameters())
    results[kind, lora] = (before, size_of(model), restored)
(folder / f"rank-{rank}.txt").write_text(repr(results))
"""

ALL_KINDS = ("clip", "siglip", "llava", "qwen3_vl", "router", "late interaction", "logit_score", "dense")


def torchrun(folder: Path, **options: object) -> list[tuple]:
    """Each process's weights in a number, metrics, whether the files were there, rows left over, steps, saves."""
    return run_processes(folder, SCRIPT, options)


def run_processes(folder: Path, text: str, options: object) -> list:
    """What each of two processes leaves in its file; they get the folder and ``options``."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, str(script), str(folder), repr(options)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [eval((folder / f"rank-{rank}.txt").read_text()) for rank in (0, 1)]


def assert_kinds_train(folder: Path, kinds: list[tuple[str, bool | None]]) -> None:
    one, other = run_processes(folder, KINDS_SCRIPT, kinds)
    assert list(one) == kinds
    for kind in kinds:
        before, after, restored = one[kind]
        assert after != before, f"{kind} did not train"
        assert after == other[kind][1], f"the processes trained {kind} apart"
        assert restored, f"{kind} has layers that the run left frozen"


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
