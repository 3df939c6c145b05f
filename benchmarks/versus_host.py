"""Trains on scanned pages with mmtune and with a plain script of the host, and compares CPU time.

Both sides take the same triplets, model, loss, arguments and number of steps, in a process of their own. The host's
script is the one of its guide: image columns, and batches without duplicates. Its table of images is built beforehand
and not counted. A third run is the host's script on rows of ours with ``max_pixels``: pages are then decoded at the
scale that is needed, so their pixels are not quite the same.

    python benchmarks/versus_host.py
    python benchmarks/versus_host.py --data FOLDER

FOLDER holds parquet files with a column image.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value, load_from_disk
from measure import in_fresh_process, machine, report
from scans import id_rows, scanned_pages
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from transformers import Trainer

from mmtune import ConflictFreeBatchSampler, RetrievalDataset, finetune
from mmtune.report.markdown import markdown_table
from mmtune.testing import tiny_clip

DIMS = [128, 64]
MAX_PIXELS = 256 * 256


class Stopwatch:
    """CPU seconds inside and outside of ``train``, whichever trainer it belongs to."""

    def __init__(self) -> None:
        self._started = time.process_time()
        self._training = 0.0
        self._steps = 0

    def watch(self) -> None:
        """Time every call of the host's ``train`` from now on."""
        train: Callable[..., Any] = Trainer.train

        def timed(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = train(trainer, *args, **kwargs)
            self._training += time.process_time() - started
            self._steps += trainer.state.global_step
            return result

        Trainer.train = timed

    def report(self) -> None:
        """Hand over what was measured."""
        outside = time.process_time() - self._started - self._training
        report(training=self._training, outside=outside, steps=self._steps)


def with_mmtune(folder: Path, arguments: dict[str, Any]) -> None:
    """One call; pages are checked, resolved by id and decoded as they are used."""
    rows = load_from_disk(str(folder / "rows"))
    finetune(
        str(folder / "clip"), rows, output_dir=folder / "run", matryoshka_dims=DIMS, mini_batch_size=32, **arguments
    )


def with_the_host(folder: Path, arguments: dict[str, Any]) -> None:
    """The guide's script."""
    host_script(folder, load_from_disk(str(folder / "triplets")), arguments | {"batch_sampler": "no_duplicates"})


def with_small_pages(folder: Path, arguments: dict[str, Any]) -> None:
    """The guide's script on rows of ours that decode a page no larger than the model needs."""
    rows = RetrievalDataset.from_id_rows(load_from_disk(str(folder / "rows"))).training_rows(1, max_pixels=MAX_PIXELS)
    host_script(folder, rows, arguments | {"batch_sampler": ConflictFreeBatchSampler})


def host_script(folder: Path, rows: Dataset, arguments: dict[str, Any]) -> None:
    """Model, loss, arguments and trainer of the host on some rows."""
    model = SentenceTransformer(str(folder / "clip"), device="cpu")
    loss = MatryoshkaLoss(model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=32), matryoshka_dims=DIMS)
    args = SentenceTransformerTrainingArguments(output_dir=str(folder / "run"), **arguments)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss)
    trainer.train()
    model.save_pretrained(str(folder / "run" / "final"))


SIDES = {"host": with_the_host, "mmtune": with_mmtune, "mmtune-max-pixels": with_small_pages}


def triplets(rows: Dataset) -> Dataset:
    """The same rows with the images in them."""
    encoded = rows.cast_column("image", Image(decode=False))
    image_by_id = dict(zip(encoded["id"], encoded["image"], strict=True))
    return Dataset.from_dict(
        {
            "query": rows["query"][:],
            "image": encoded["image"][:],
            "negative_0": [image_by_id[negatives[0]] for negatives in rows["negatives"]],
        },
        features=Features({"query": Value("string"), "image": Image(), "negative_0": Image()}),
    )


def train(side: str, folder: Path, epochs: int) -> None:
    """Train on one side and report CPU seconds."""
    arguments = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    stopwatch = Stopwatch()
    stopwatch.watch()
    SIDES[side](folder, arguments)
    stopwatch.report()


def measure(num_rows: int, epochs: int, data: Path | None) -> dict[str, dict[str, float]]:
    """CPU seconds and steps of both sides."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = id_rows(scanned_pages(num_rows, data))
        rows.save_to_disk(f"{folder}/rows")
        triplets(rows).save_to_disk(f"{folder}/triplets")
        tiny_clip(f"{folder}/clip")
        for side in SIDES:
            found[side] = in_fresh_process(__file__, "--side", side, "--folder", folder, "--epochs", epochs)
            Path(f"{folder}/run").rename(f"{folder}/run-{side}")
    return found


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image; drawn pages without")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        train(options.side, options.folder, options.epochs)
        return
    found = measure(options.rows, options.epochs, options.data)
    seconds = {side: (run["training"], run["outside"], run["training"] + run["outside"]) for side, run in found.items()}
    cells = [
        [
            side,
            f"{run['steps']:.0f}",
            *(f"{value:.1f}" for value in seconds[side]),
            *(f"{theirs / ours:.1f}" for theirs, ours in zip(seconds["host"], seconds[side], strict=True)),
        ]
        for side, run in found.items()
    ]
    head = ("side", "steps", "CPU s training", "around it", "together", "speed-up", "around it", "together")
    print(machine())
    print(markdown_table(head, cells))


if __name__ == "__main__":
    main()
