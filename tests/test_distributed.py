"""Two processes on this machine, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from mmtune import RetrievalDataset, compose_router, finetune
from mmtune.testing import generated_pages, tiny_clip, tiny_siglip, tiny_text_encoder
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

folder, options = Path(sys.argv[1]), eval(sys.argv[2])
rank = os.environ["RANK"]
base = folder / f"base-{rank}"
model = tiny_clip(base / "clip")
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
(folder / f"rank-{rank}.txt").write_text(repr((digest, result.after, there, left_over, result.trainer.state.max_steps)))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def torchrun(folder: Path, **options: object) -> list[tuple]:
    """The result of each process: weights in a number, metrics, whether the files were there, rows left over, steps."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(script), str(folder), repr(options)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [eval((folder / f"rank-{rank}.txt").read_text()) for rank in (0, 1)]


def test_two_processes_agree_and_write_once(tmp_path: Path) -> None:
    one, other = torchrun(tmp_path)
    assert one[:2] == other[:2]
    assert (one[2], other[2]) == (True, True), "a process went on before the files were written"
    assert one[4] == 12, "36 rows in steps of two batches of three, twice"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["settings"]["training"]["processes"] == 2
    assert metrics["after"] == one[1]


def test_gradients_are_shared_after_a_measurement(tmp_path: Path) -> None:
    one, other = torchrun(tmp_path, eval_strategy="no", save_strategy="no")
    assert one[0] == other[0], "the processes trained apart"


@pytest.mark.parametrize("router", ["cached loss", "plain loss"])
def test_the_routes_of_a_router_train_in_several_processes(tmp_path: Path, router: str) -> None:
    one, other = torchrun(tmp_path, router=router)
    assert one[:2] == other[:2]


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
