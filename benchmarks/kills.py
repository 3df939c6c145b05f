"""Kills runs of every kind of model at random moments, lets them go on, and compares them with runs left in peace.

Each start is a process of its own that calls with ``resume="auto"``, as a scheduler starts a job again. A run is killed
by SIGKILL, alternately at any moment from the beginning of its training to its end, and while it writes a checkpoint.
Then it goes on until it ends. Weights are compared to the last bit, those of ``final/`` and of the last checkpoint, and
so are the metrics.

    python benchmarks/kills.py

Models are tiny, one thread, no dropout. Qwen3-VL needs torchvision, see the Makefile.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

# Before the host is imported: one thread, no network, and torchvision beside a CPU torch.
import conftest  # noqa: F401

# isort: split

from measure import machine
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune import (
    FinetuneResult,
    RetrievalDataset,
    build_late_interaction,
    build_reranker,
    compose_router,
    finetune,
    finetune_reranker,
)
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages, tiny_clip, tiny_llava, tiny_qwen3_vl, tiny_siglip, tiny_text_encoder
from mmtune.training.output import is_finished
from mmtune.training.records import checkpoints_of

STEPS = 12
SAVE_STEPS = 2
KINDS: dict[str, Callable[..., FinetuneResult]] = {
    "CLIP": finetune,
    "SigLIP": finetune,
    "LLaVA": finetune,
    "Qwen3-VL": finetune,
    "Router": finetune,
    "late interaction": finetune,
    "reranker, logit_score": finetune_reranker,
    "reranker, dense": finetune_reranker,
}


def save_models(folder: Path) -> None:
    """A folder for each kind, so that every process begins with the same weights."""
    tiny_clip(folder / "CLIP")
    siglip, llava = tiny_siglip(folder / "SigLIP"), tiny_llava(folder / "LLaVA")
    tiny_qwen3_vl(folder / "Qwen3-VL")
    compose_router(tiny_text_encoder(folder / "text"), siglip, device="cpu").save_pretrained(str(folder / "Router"))
    build_late_interaction(llava, device="cpu").save_pretrained(str(folder / "late interaction"))
    for head in ("logit_score", "dense"):
        build_reranker(llava, head=head, device="cpu").save_pretrained(str(folder / f"reranker, {head}"))


# In the process that is killed


class Tells(TrainerCallback):
    """Prints how far the run is, for the process that kills it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step that it goes on from."""
        print(f"trains {state.global_step}", flush=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is written next."""
        print(f"saves {state.global_step}", flush=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is complete."""
        print(f"saved {state.global_step}", flush=True)


def train(kind: str, lora: bool, model: Path, folder: Path) -> None:
    """One call, the same each time that the run is started."""
    warnings.simplefilter("ignore")
    train, evaluation = RetrievalDataset.from_id_rows(generated_pages(20, seed=1)).split(4)
    KINDS[kind](
        model,
        train,
        evaluation,
        output_dir=folder,
        resume="auto",
        lora=lora or None,
        num_negatives=1,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        eval_steps=SAVE_STEPS,
        learning_rate=1e-3,
        callbacks=[Tells],
        disable_tqdm=True,
        use_cpu=True,
    )
    print("ends", flush=True)


# In the process that kills


@dataclass(frozen=True)
class Run:
    """A run in a process of its own.

    Attributes:
        process: What can be killed.
        log: What it says besides the lines that are waited for.
    """

    process: "subprocess.Popen[str]"
    log: Path

    def wait_for(self, what: str) -> str:
        """The next line that begins so.

        Raises:
            SystemExit: The run ended without it.
        """
        told: Iterable[str] = self.process.stdout or ()
        line = next((line for line in told if line.startswith(what)), None)
        if line is None:
            raise SystemExit(f"A run ended with {self.process.wait()} before {what!r}:\n{self.log.read_text()[-4000:]}")
        return line


def start(kind: str, lora: bool, models: Path, folder: Path) -> Run:
    """The run of a kind; what it says besides goes into a file beside its folder."""
    command = [sys.executable, __file__, "--train", kind, "lora" if lora else "full", str(models / kind), str(folder)]
    log = folder.with_suffix(".log")
    with log.open("a") as file:
        return Run(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True), log)


@dataclass(frozen=True)
class Pace:
    """How long an undisturbed run takes.

    Attributes:
        run_s: From the beginning of the training to the end of the call.
        save_s: For a checkpoint, on average.
    """

    run_s: float
    save_s: float


def leave_in_peace(run: Run) -> Pace:
    """Let a run that starts from the beginning go on to its end."""
    run.wait_for("trains 0")
    began, saving_s = time.perf_counter(), 0.0
    for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS):
        run.wait_for(f"saves {step}")
        saves = time.perf_counter()
        run.wait_for(f"saved {step}")
        saving_s += time.perf_counter() - saves
    run.wait_for("ends")
    run_s = time.perf_counter() - began
    run.process.wait()
    return Pace(run_s, saving_s * SAVE_STEPS / STEPS)


def kill(run: Run, pace: Pace, draw: random.Random, *, in_checkpoint: bool) -> None:
    """Kill a run at a moment that is drawn from what it has still to do."""
    step = int(run.wait_for("trains").split()[1])
    to_save = range(step + SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    if in_checkpoint and to_save:
        run.wait_for(f"saves {draw.choice(to_save)}")
        time.sleep(draw.uniform(0, pace.save_s))
    else:
        time.sleep(draw.uniform(0, pace.run_s * max(STEPS - step, 1) / STEPS))
    run.process.kill()
    run.process.wait()


def was_saving(folder: Path, since: float) -> bool:
    """Whether a run that began at a time, in seconds since the epoch, has left a checkpoint that is not complete."""
    cut_off = [path for path in checkpoints_of(folder) if not (path / "trainer_state.json").is_file()]
    return any(file.stat().st_mtime > since for path in cut_off for file in path.rglob("*"))


def outcome(folder: Path) -> dict[str, Any]:
    """What a run has made: weights by their file, and metrics."""
    files = [path for part in ("final", f"checkpoint-{STEPS}") for path in (folder / part).rglob("*.safetensors")]
    if len(files) < 2:
        raise SystemExit(f"{folder} lacks weights: {files}")
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {**weights, "before": metrics["before"], "after": metrics["after"]}


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3, help="kills a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="run the kinds whose name contains this")
    parser.add_argument("--train", nargs=4, metavar=("KIND", "WEIGHTS", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        kind, weights, model, folder = options.train
        train(kind, weights == "lora", Path(model), Path(folder))
        return

    draw, cells = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        models, runs = Path(temporary, "models"), Path(temporary, "runs")
        runs.mkdir()
        save_models(models)
        for kind, lora in [(kind, lora) for kind in KINDS for lora in (False, True) if options.only in kind]:
            whole, killed = runs / f"{kind} {lora} whole", runs / f"{kind} {lora} killed"
            pace = leave_in_peace(start(kind, lora, models, whole))
            kills, in_checkpoint = 0, 0
            for number in range(options.kills):
                began = time.time()
                kill(start(kind, lora, models, killed), pace, draw, in_checkpoint=number % 2 == 0)
                if is_finished(killed):  # it was quicker than the kill
                    break
                kills, in_checkpoint = kills + 1, in_checkpoint + was_saving(killed, began)
            last = start(kind, lora, models, killed)
            last.wait_for("ends")
            last.process.wait()
            same = outcome(whole) == outcome(killed)
            cells.append([kind, "LoRA" if lora else "full", kills, in_checkpoint, "yes" if same else "NO"])
            print(f"{cells[-1]}, in {pace.run_s:.1f} s, {pace.save_s:.3f} s a checkpoint", flush=True)
    cells.append(["together", "", sum(row[2] for row in cells), sum(row[3] for row in cells), ""])
    print(f"\n{machine()}\n")
    head = ("kind", "trained", "kills", "in a checkpoint", "same bits")
    print(markdown_table(head, [[str(cell) for cell in row] for row in cells]))


if __name__ == "__main__":
    main()
