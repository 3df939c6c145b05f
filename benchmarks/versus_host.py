"""Trains and evaluates on scanned pages with mmtune and with scripts of the host, and compares CPU time and memory.

All sides take the same model, pages, negatives, loss, arguments and number of steps, each in a process of its own, one
after the other, several times. ``guide`` is the script of the host's guide: image columns, batches without duplicates,
an evaluator over decoded pages. ``best`` is the best script of the host that we could write: rows of ids that are
joined when they are read, batches at random, pages that are decoded when they are used. The host decodes every page
whole.

    python benchmarks/versus_host.py --data FOLDER

FOLDER holds parquet files with a column image; without it, noisy pages of the size of scans are drawn. The results go
into RESULTS.md.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import without_gpu  # noqa: F401

# isort: split

from datasets import Dataset, Features, Image, Value, load_from_disk
from measure import in_fresh_process, peak_mb, report, write_section
from PIL import Image as Pictures
from scans import id_rows, scanned_pages
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from sentence_transformers.util import resolve_ids
from transformers import Trainer

from mmtune import build_evaluator, finetune, load_model
from mmtune.inference.page_store import MemoryPageStore
from mmtune.inference.preprocessing import reading_pages
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages, tiny_clip, tiny_qwen3_vl

DIMS = [128, 64]
SEVEN_DIMS = [120, 112, 96, 80, 64, 32, 16]
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "seed": 1,
}
WORK: dict[str, dict[str, Any]] = {
    "one epoch": {"rows": 128, "num_train_epochs": 1, "per_device_train_batch_size": 32, "save_strategy": "no"},
    "three epochs, fourteen evaluations": {
        "rows": 64,
        "eval_rows": 60,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "small pages": {
        "pages": "small",
        "rows": 256,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 32,
        "save_strategy": "no",
    },
}
_NOT_ARGUMENTS = ("rows", "eval_rows", "pages")


class Stopwatch:
    """CPU seconds inside and outside of ``train``, whichever trainer it belongs to, and memory."""

    def __init__(self) -> None:
        self._started = time.process_time()
        self._training = 0.0
        self._steps = 0
        self._loaded_mb = 0.0

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

    def loaded(self) -> None:
        """The model is there; what it and its packages take is no part of the peak."""
        self._loaded_mb = peak_mb()

    def report(self, **more: float) -> None:
        """Hand over what was measured."""
        together = time.process_time() - self._started
        report(
            training=self._training,
            together=together,
            steps=self._steps,
            peak_mb=peak_mb() - self._loaded_mb,
            **more,
        )


# Sides


def with_mmtune(folder: Path, work: dict[str, Any], stopwatch: Stopwatch) -> None:
    """One call."""
    model = load_model(str(folder / "model"), device="cpu")
    stopwatch.loaded()
    evaluation = load_from_disk(str(folder / "evaluation")) if "eval_rows" in work else None
    finetune(
        model,
        load_from_disk(str(folder / "rows")),
        evaluation,
        output_dir=folder / "run",
        matryoshka_dims=DIMS,
        mini_batch_size=32,
        keep="last",
        **host_arguments(work),
    )


def with_guide(folder: Path, work: dict[str, Any], stopwatch: Stopwatch) -> None:
    """The script of the guide: image columns, and the evaluator on a corpus of decoded pages."""
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    stopwatch.loaded()
    evaluators = []
    if "eval_rows" in work:
        rows = load_from_disk(str(folder / "evaluation"))
        evaluators = evaluators_of(rows, dict(zip(rows["id"], rows["image"], strict=True)))
    rows = load_from_disk(str(folder / "triplets"))
    run_host(model, rows, evaluators, folder, host_arguments(work) | {"batch_sampler": "no_duplicates"})


def with_best(folder: Path, work: dict[str, Any], stopwatch: Stopwatch) -> None:
    """Rows of ids, joined and decoded as they are read; random batches; the corpus decoded page by page."""
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    stopwatch.loaded()
    evaluators = []
    if "eval_rows" in work:
        rows = load_from_disk(str(folder / "evaluation")).cast_column("image", Image(decode=False))
        pages = [Pictures.open(io.BytesIO(image["bytes"])) for image in rows["image"]]
        evaluators = evaluators_of(rows, dict(zip(rows["id"], pages, strict=True)))
    rows = load_from_disk(str(folder / "rows"))
    pages = rows.select_columns(["id", "image"])
    ids = Dataset.from_dict(
        {"query": rows["query"][:], "image": rows["id"][:], "negative_0": [names[0] for names in rows["negatives"]]}
    )
    texts = Dataset.from_dict({"id": sorted(set(ids["query"])), "text": sorted(set(ids["query"]))})
    ids.set_transform(resolve_ids({"query": texts, "image": pages, "negative_0": pages}))
    run_host(model, ids, evaluators, folder, host_arguments(work))


SIDES = {"guide": with_guide, "best": with_best, "mmtune": with_mmtune}


def host_arguments(work: dict[str, Any]) -> dict[str, Any]:
    """The training arguments of some work."""
    return ARGUMENTS | {name: value for name, value in work.items() if name not in _NOT_ARGUMENTS}


def evaluators_of(rows: Dataset, corpus: dict[str, Any]) -> list[InformationRetrievalEvaluator]:
    """An evaluator for each dimension, as the guide has them."""
    options = {
        "queries": dict(zip(rows["id"], rows["query"], strict=True)),
        "corpus": corpus,
        "relevant_docs": {name: {name} for name in rows["id"]},
        "batch_size": 16,
    }
    return [InformationRetrievalEvaluator(**options, truncate_dim=dim, name=f"vdr-{dim}") for dim in DIMS[:1]]


def run_host(model: SentenceTransformer, rows: Dataset, evaluators: list[Any], folder: Path, arguments: Any) -> None:
    """The host's trainer, with the model measured before and after."""
    loss = MatryoshkaLoss(model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=32), matryoshka_dims=DIMS)
    args = SentenceTransformerTrainingArguments(output_dir=str(folder / "run"), **arguments)
    evaluator = evaluators[0] if evaluators else None
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss, evaluator=evaluator)
    if evaluator:
        evaluator(model)
    trainer.train()
    if evaluator:
        evaluator(model)
    model.save_pretrained(str(folder / "run" / "final"))


def run_side(side: str, folder: Path, name: str) -> None:
    """Do the work on one side and report."""
    stopwatch = Stopwatch()
    stopwatch.watch()
    SIDES[side](folder, WORK[name], stopwatch)
    stopwatch.report()


def prepare(folder: Path, work: dict[str, Any], data: Path | None) -> None:
    """The rows, the same with images in them, pages to evaluate on, and the model."""
    if work.get("pages") == "small":
        drawn = generated_pages(work["rows"], num_negatives=1, seed=1)
        rows = drawn.filter(lambda query: query is not None, input_columns=["query"])
        known = set(rows["id"])
        rows = rows.map(
            lambda row: {"negatives": [name for name in row["negatives"] if name in known] or [rows[0]["id"]]}
        )
    else:
        pages = scanned_pages(work["rows"] + work.get("eval_rows", 0), data)
        rows = id_rows(pages[: work["rows"]])
        if "eval_rows" in work:
            evaluation = id_rows(pages[work["rows"] :])
            names = [f"e{name}" for name in evaluation["id"]]
            evaluation.remove_columns(["id", "negatives"]).add_column("id", names).save_to_disk(folder / "evaluation")
    rows.save_to_disk(folder / "rows")
    triplets(rows).save_to_disk(folder / "triplets")
    tiny_clip(folder / "model")


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


def compare_sides(name: str, data: Path | None, repeats: int) -> str:
    """A table of the sides for some work: medians over the repeats, taken in turn."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), WORK[name], data)
        for repeat in range(repeats):
            for side in SIDES:
                found[side].append(in_fresh_process(__file__, "--side", side, "--folder", folder, "--work", name))
                Path(f"{folder}/run").rename(f"{folder}/run-{side}-{repeat}")
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()
    }
    cells = []
    for side, run in median.items():
        ratios = [[median[host][key] / run[key] for host in ("guide", "best")] for key in ("training", "together")]
        ratios.append([run["peak_mb"] / median["guide"]["peak_mb"]])
        cells.append(
            [
                side,
                f"{run['steps']:.0f}",
                f"{run['training']:.1f}",
                f"{run['together']:.1f}",
                f"{run['peak_mb']:.0f}",
                *(f"{value:.2f}" for pair in ratios for value in pair),
            ]
        )
    head = (
        *("side", "steps", "CPU s in `train`", "CPU s in all", "peak MB"),
        *("`train`: guide /", "best /", "in all: guide /", "best /", "peak / guide"),
    )
    return f"{name}, medians of {repeats}:\n\n{markdown_table(head, cells)}"


# Memory of a batch


def run_batch(side: str, folder: Path, size: int) -> None:
    """One step of a tiny Qwen3-VL on pages of up to 600 x 600 pixels, and its peak above the loaded model."""
    rows = load_from_disk(str(folder / "pairs")).select(range(size))
    arguments = ARGUMENTS | {"max_steps": 1, "per_device_train_batch_size": size, "save_strategy": "no"}
    stopwatch = Stopwatch()
    model = load_model(str(folder / "qwen"), device="cpu")
    stopwatch.loaded()
    if side == "mmtune":
        finetune(model, rows, output_dir=folder / f"run-{size}", matryoshka_dims=None, mini_batch_size=4, **arguments)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
        args = SentenceTransformerTrainingArguments(output_dir=str(folder / f"host-{size}"), **arguments)
        SentenceTransformerTrainer(
            model=model, args=args, train_dataset=rows.select_columns(["query", "image"]), loss=loss
        ).train()
    stopwatch.report()


def compare_batches(data: Path | None, sizes: Sequence[tuple[str, int]]) -> str:
    """A table of the peak memory of one step by the size of its batch."""
    with tempfile.TemporaryDirectory() as folder:
        pages = [
            Pictures.open(io.BytesIO(page)).convert("RGB").resize((600, 600)) for page in scanned_pages(60, data)[:60]
        ]
        count = max(size for _, size in sizes)
        encoded = []
        for number in range(count):
            page = pages[number % len(pages)].copy()
            page.putpixel((number % 600, number // 600), (255, 0, 0))
            file = io.BytesIO()
            page.save(file, "JPEG", quality=90)
            encoded.append(file.getvalue())
        rows = id_rows(encoded).remove_columns("negatives")
        rows.save_to_disk(f"{folder}/pairs")
        tiny_qwen3_vl(f"{folder}/qwen", max_pixels=600 * 600)
        found = {
            (side, size): in_fresh_process(__file__, "--side", side, "--folder", folder, "--batch", size)
            for side, size in sizes
        }
    cells = [
        [side, f"{size}", f"{run['peak_mb']:,.0f}", f"{run['peak_mb'] / size:.2f}", f"{run['together']:.0f}"]
        for (side, size), run in found.items()
    ]
    return (
        "One step of a tiny Qwen3-VL, a batch of pages of 600 x 600 pixels, mini-batches of 4: peak memory above the "
        f"loaded model.\n\n{markdown_table(('side', 'batch', 'MB', 'MB a page', 'CPU s'), cells)}"
    )


# Evaluation


def run_evaluations(folder: Path) -> None:
    """CPU seconds of one evaluation and of seven sizes, and of a second one, beside the host's."""
    rows = load_from_disk(str(folder / "evaluation"))
    model = load_model(str(folder / "model"), device="cpu")
    model.encode(rows[0]["image"])  # warm
    seconds = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.process_time()
        call()
        seconds[name] = time.process_time() - started

    corpus = dict(zip(rows["id"], rows["image"], strict=True))
    timed("host", lambda: evaluators_of(rows, corpus)[0](model))
    one = build_evaluator(rows, show_progress_bar=False)
    seven = build_evaluator(rows, truncate_dims=SEVEN_DIMS, show_progress_bar=False)
    timed("one", lambda: one(model))
    timed("seven", lambda: seven(model))
    timed("one_again", lambda: one(model))
    timed("seven_again", lambda: seven(model))
    with reading_pages(model, MemoryPageStore(1 << 30)):
        timed("first_of_a_run", lambda: one(model))
        timed("second_of_a_run", lambda: one(model))
    report(**seconds)


def compare_evaluations(data: Path | None, repeats: int) -> str:
    """A table of the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), {"rows": 2, "eval_rows": 60}, data)
        runs = [in_fresh_process(__file__, "--evaluations", "--folder", folder) for _ in range(repeats)]
    run = {name: statistics.median(each[name] for each in runs) for name in runs[0]}
    one, seven = min(run["one"], run["one_again"]), min(run["seven"], run["seven_again"])
    cells = [
        ["seven truncations / one size", f"{seven / one:.2f}"],
        ["first evaluation of a run / the host's", f"{run['first_of_a_run'] / run['host']:.2f}"],
        ["second evaluation of a run / the host's", f"{run['second_of_a_run'] / run['host']:.2f}"],
    ]
    return (
        f"Evaluation on 60 pages, medians of {repeats}. The host encodes anew for each size; its one size is compared, "
        f"with pages that it has decoded already.\n\n{markdown_table(('CPU seconds', 'ratio'), cells)}"
    )


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image; drawn pages without")
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("--side", "--work"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--evaluations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return run_side(options.side, options.folder, options.work)
    if options.batch:
        return run_batch(options.side, options.folder, options.batch)
    if options.evaluations:
        return run_evaluations(options.folder)
    pages = "scanned receipts" if options.data else "drawn scans"
    parts = [
        f"`python benchmarks/versus_host.py`: a tiny CLIP on triplets of {pages}, Matryoshka over the cached loss. "
        "The side guide is the script of the host's guide, best the best script of the host that we could write; see "
        "the program. A ratio such as guide / is how many times as long that script takes. All that happens around the "
        "training counts as well, except for the tables of the guide's script, which are built before. Peak is memory "
        "above the loaded model."
    ]
    parts += [compare_sides(name, options.data, options.repeats) for name in WORK]
    parts.append(compare_evaluations(options.data, options.repeats))
    sizes = [(side, size) for size in (64, 256) for side in ("host", "mmtune")] + [("mmtune", 512)]
    parts.append(compare_batches(options.data, sizes))
    text = "\n\n".join(parts)
    print(text)
    write_section("Against scripts of the host", text)
    return None


if __name__ == "__main__":
    main()
