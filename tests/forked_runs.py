"""Runs of every kind of model in two processes that are killed or asked to end, for `test_distributed.py`.

Two processes are two forks of one that has imported everything, built the models and connected to nothing. So a process
can be killed in every run, and the import is paid for once.

    python forked_runs.py FUNCTION FOLDER ARGUMENT
"""

import hashlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 - before the host is imported

# isort: split

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune import (
    RetrievalDataset,
    build_late_interaction,
    build_reranker,
    compose_router,
    finetune,
    finetune_reranker,
    load_model,
)
from mmtune.inference import preprocessing
from mmtune.testing import generated_pages, tiny_clip, tiny_llava, tiny_qwen3_vl, tiny_siglip, tiny_text_encoder
from mmtune.training.records import RunRecord, why_unusable

RANKS = (0, 1)
LONGEST_S = 120
"""Of a run, which is over in seconds: two processes that do not agree wait for one another for ever."""
CALLS = {"logit_score": finetune_reranker, "dense": finetune_reranker}
LOSSES: dict[str, Any] = {
    kind: {"loss": MultipleNegativesRankingLoss} for kind in ("clip", "siglip", "llava", "qwen3_vl", "router")
}


def build(kind: str, base: Path) -> Any:
    """A model of a kind, from a checkpoint of its own in ``base``."""
    builders: dict[str, Callable[[], Any]] = {
        "clip": lambda: load_model(tiny_clip(base / "clip"), device="cpu"),
        "siglip": lambda: load_model(tiny_siglip(base / "siglip"), device="cpu"),
        "llava": lambda: load_model(tiny_llava(base / "llava"), device="cpu"),
        "qwen3_vl": lambda: load_model(tiny_qwen3_vl(base / "qwen"), device="cpu"),
        "router": lambda: compose_router(tiny_text_encoder(base / "text"), tiny_siglip(base / "image"), device="cpu"),
        "late interaction": lambda: build_late_interaction(tiny_llava(base / "late"), device="cpu"),
        "logit_score": lambda: build_reranker(tiny_llava(base / "llava"), device="cpu"),
        "dense": lambda: build_reranker(tiny_llava(base / "llava"), head="dense", device="cpu"),
    }
    return builders[kind]()


def train(model: Any, kind: str, folder: Path, **options: Any) -> Any:
    """The call for a model of a kind on a few pages, two rows a process and step."""
    train, evaluation = RetrievalDataset.from_id_rows(generated_pages(20, seed=1)).split(4)
    return CALLS.get(kind, finetune)(
        model,
        train,
        evaluation,
        output_dir=folder,
        use_cpu=True,
        num_negatives=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        eval_strategy="no",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        **LOSSES.get(kind, {}),
        **options,
    )


# Two processes


def in_two_processes(call: Callable[[], Any]) -> list[tuple[int, Any]]:
    """The exit status of each process, negative for the signal that killed it, and what its call returned, if it did.

    They find in the environment what torchrun tells its processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in RANKS:
        reading, writing = os.pipe()
        process_id = os.fork()
        if not process_id:
            os.environ |= {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            _call_and_exit(call, writing)
        os.close(writing)
        processes.append((process_id, reading))
    ended = []
    for process_id, reading in processes:
        with os.fdopen(reading) as told:
            text = told.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
        ended.append((status, eval(text) if text else None))
    return ended


def _call_and_exit(call: Callable[[], Any], writing: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores Ctrl-C
    signal.alarm(LONGEST_S)
    status: Any = 1
    try:
        os.write(writing, repr(call()).encode())
        status = 0
    except SystemExit as ended:
        status = ended.code
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def digest(model: torch.nn.Module) -> str:
    """A digest of all weights with their names."""
    found = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        found.update(name.encode() + values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights_in(folder: Path) -> str:
    """A digest of the files with weights."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


class AfterStep(TrainerCallback):
    """Does something after a step of one process, before anything is saved."""

    def __init__(self, step: int, rank: int, act: Callable[[], None]) -> None:
        self.step, self.rank, self.act = step, rank, act

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == self.rank:
            self.act()


def signal_after_step(step: int, rank: int, number: int) -> AfterStep:
    """A process signals itself."""
    return AfterStep(step, rank, lambda: os.kill(os.getpid(), number))


class Noting(TrainerCallback):
    """Writes the steps of each process into a file, and the folders that it saves the model to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        save = SentenceTransformer.save_pretrained

        def save_noted(model: SentenceTransformer, path: str, **options: Any) -> None:
            self.note(Path(path).name)
            save(model, path, **options)

        SentenceTransformer.save_pretrained = save_noted  # type: ignore[method-assign]

    def note(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(f"{text}\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.note(f"step {state.global_step}")


# What is tested


def save_models(folder: Path, kinds: Iterable[str]) -> dict[str, str]:
    """A folder for each kind, from which every process begins with the same weights."""
    saved = {kind: str(folder / f"model {kind}") for kind in kinds}
    for kind, path in saved.items():
        build(kind, folder / "base").save_pretrained(path)
    return saved


def kill_and_resume(folder: Path, kinds: Sequence[tuple[str, bool | None]]) -> dict[Any, Any]:
    """For each kind an undisturbed run, what a kill left of another, and how that ended when it went on.

    By turns the second process dies after a step, and the first while it writes a checkpoint.
    """
    models = save_models(folder, (kind for kind, _ in kinds))

    def run(kind: str, lora: bool | None, name: str, callbacks: Sequence[TrainerCallback] = ()) -> Any:
        options = {"max_steps": 4, "save_steps": 2, "resume": "auto", "lora": lora, "callbacks": callbacks}
        result = train(models[kind], kind, folder / name, **options)
        return digest(result.model), weights_in(folder / name / "final"), result.before, result.after

    def run_and_die(kind: str, lora: bool | None, name: str, *, in_checkpoint: bool) -> Any:
        if not in_checkpoint:
            return run(kind, lora, name, [signal_after_step(3, 1, signal.SIGKILL)])
        write = RunRecord.write

        def write_and_die(record: RunRecord, checkpoint: Path) -> None:
            write(record, checkpoint)
            if checkpoint.name == "checkpoint-4":
                os.kill(os.getpid(), signal.SIGKILL)

        RunRecord.write = write_and_die  # type: ignore[method-assign]
        return run(kind, lora, name)

    found = {}
    for number, (kind, lora) in enumerate(kinds):
        name, in_checkpoint = f"{kind}-{lora}-killed", bool(number % 2)
        found[kind, lora] = {
            "whole": in_two_processes(partial(run, kind, lora, f"{kind}-{lora}-whole")),
            "killed": in_two_processes(partial(run_and_die, kind, lora, name, in_checkpoint=in_checkpoint)),
            "left": {path.name: why_unusable(path) for path in sorted((folder / name).glob("checkpoint-*"))},
            "resumed": in_two_processes(partial(run, kind, lora, name)),
        }
    return found


def signal_and_resume(folder: Path, cases: Sequence[tuple[int, int]]) -> dict[Any, Any]:
    """An undisturbed run; and for each signal to one process how both ended, what is left, and how the run went on."""
    model = save_models(folder, ["clip"])["clip"]

    def run(name: str, callbacks: Sequence[TrainerCallback] = ()) -> Any:
        notes = Noting(folder / f"{name}-{os.environ['RANK']}.txt")
        options = {"max_steps": 4, "save_steps": 4, "resume": "auto", "callbacks": [*callbacks, notes]}
        result = train(model, "clip", folder / name, **options)
        return digest(result.model), weights_in(folder / name / "final"), result.before, result.after

    found: dict[Any, Any] = {"whole": in_two_processes(partial(run, "whole"))}
    for number, rank in cases:
        name = f"{number}-{rank}"
        found[number, rank] = {
            "ended": [
                status for status, _ in in_two_processes(partial(run, name, [signal_after_step(2, rank, number)]))
            ],
            "noted": [(folder / f"{name}-{process}.txt").read_text().split("\n")[:-1] for process in RANKS],
            "left": {path.name: why_unusable(path) for path in sorted((folder / name).glob("checkpoint-*"))},
            "resumed": in_two_processes(partial(run, name)),
        }
    return found


def read_pages_both_ways(folder: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """For each kind a run on pages as bytes that are kept, and one on pages as floats that are not."""
    models = save_models(folder, kinds)

    def run(kind: str, *, as_bytes: bool) -> Any:
        if not as_bytes:
            preprocessing.read_table = lambda *_: (_ for _ in ()).throw(ValueError("as floats"))
        name, store = f"{kind}-{as_bytes}", "auto" if as_bytes else None
        result = train(models[kind], kind, folder / name, max_steps=3, save_strategy="no", page_store=store)
        return set(result.settings["training"]["pages"].values()), digest(result.model)

    return {kind: [in_two_processes(partial(run, kind, as_bytes=each)) for each in (True, False)] for kind in kinds}


if __name__ == "__main__":
    function, folder, argument = sys.argv[1:]
    found = globals()[function](Path(folder), eval(argument))
    Path(folder, "found.txt").write_text(repr(found))
