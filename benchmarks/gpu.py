"""What needs a GPU: a Qwen3-VL of the size of 2B, random weights, trained by the guide's script and by ``finetune``.

Needs no network: the checkpoint is made here, the tokenizer is small, pages are drawn. It first goes through all that a
user does (finetune 20 steps, evaluate, save, resume, a reranker), then measures both sides: rows a second in ``train``,
peak memory, and the share of the time in which the GPU waited for data. Meant for an H200, in under nine minutes.

    python benchmarks/gpu.py            # writes its section of RESULTS.md
    python benchmarks/gpu.py --tiny     # the same program on a tiny model, also on a CPU; writes nothing
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from measure import write_section
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration, Trainer

from mmtune import RetrievalDataset, build_reranker, finetune, finetune_reranker, load_model
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages, tiny_qwen3_vl

DIMS = [2048, 1536, 1024, 512, 256, 128, 64]
TEXT_2B = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151_936,
}
VISION_2B = {
    "hidden_size": 1024,
    "depth": 24,
    "num_heads": 16,
    "intermediate_size": 4096,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [5, 11, 17],
}


def make_checkpoint(folder: Path, *, tiny: bool) -> str:
    """A Qwen3-VL with random weights in bfloat16; of the size of 2B unless ``tiny``."""
    small = tiny_qwen3_vl(folder / "tiny", max_pixels=64 * 64 if tiny else 600 * 600)
    if tiny:
        return small
    config = AutoConfig.from_pretrained(small)
    for part, values in ((config.text_config, TEXT_2B), (config.vision_config, VISION_2B)):
        for name, value in values.items():
            setattr(part, name, value)
    rope = dict(config.text_config.rope_parameters or {})
    config.text_config.rope_parameters = {**rope, "mrope_section": [24, 20, 20]}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "2b")
    AutoProcessor.from_pretrained(small).save_pretrained(folder / "2b")
    del model
    torch.cuda.empty_cache()
    return str(folder / "2b")


def make_rows(count: int, side: int) -> Dataset:
    """Rows by id with one negative, each page ``side`` pixels wide and high, as JPEG."""
    drawn = generated_pages(24, num_negatives=1, seed=0)
    pages = [image.convert("RGB").resize((side, side)) for image in drawn["image"][:24]]
    encoded = []
    for number in range(count):
        page = pages[number % len(pages)].copy()
        page.putpixel((number % side, number // side), (255, 0, 0))
        file = io.BytesIO()
        page.save(file, "JPEG", quality=92)
        encoded.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict(
        {
            "id": [f"p{row}" for row in range(count)],
            "query": [
                f"Which report has the number {row}, and what was the output of its second plant?"
                for row in range(count)
            ],
            "image": encoded,
            "negatives": [[f"p{(row + 7) % count}"] for row in range(count)],
        },
        features=Features(
            {"id": Value("string"), "query": Value("string"), "image": Image(), "negatives": List(Value("string"))}
        ),
    )


class Waiting:
    """Seconds in ``train`` of any trainer, and those in which it waited for the next batch."""

    def __init__(self) -> None:
        self.seconds = self.training = 0.0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Time each batch of torch's data loader, and each ``train``."""
        own_batches: Callable[..., Any] = DataLoader.__iter__
        own_train: Callable[..., Any] = Trainer.train

        def batches(loader: DataLoader) -> Iterator[Any]:
            found = own_batches(loader)
            while True:
                started = time.perf_counter()
                try:
                    batch = next(found)
                except StopIteration:
                    return
                self.seconds += time.perf_counter() - started
                yield batch

        def train(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = own_train(trainer, *args, **kwargs)
            self.training += time.perf_counter() - started
            return result

        DataLoader.__iter__, Trainer.train = batches, train
        try:
            yield
        finally:
            DataLoader.__iter__, Trainer.train = own_batches, own_train


def measured(call: Callable[[], int]) -> dict[str, float]:
    """Rows a second, peak memory and the share of waiting of a call that returns how many rows it trained on."""
    waiting = Waiting()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with waiting.noted():
        rows = call()
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return {"rows": rows / waiting.training, "peak": peak, "waiting": waiting.seconds / waiting.training}


def with_guide(path: str, rows: Dataset, folder: Path, batch: int, steps: int) -> int:
    """The guide's script: bf16 weights, mini-batches of one, images in the rows."""
    model = SentenceTransformer(path, model_kwargs={"dtype": torch.bfloat16})
    encoded = rows.cast_column("image", Image(decode=False))
    image_by_id = dict(zip(encoded["id"], encoded["image"], strict=True))
    triplets = Dataset.from_dict(
        {
            "query": rows["query"][:],
            "image": encoded["image"][:],
            "negative_0": [image_by_id[names[0]] for names in rows["negatives"]],
        },
        features=Features({"query": Value("string"), "image": Image(), "negative_0": Image()}),
    )
    size = model.get_embedding_dimension() or 0
    dims = [dim for dim in DIMS if dim <= size]
    loss = MatryoshkaLoss(model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=1), matryoshka_dims=dims)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-5,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,
    )
    SentenceTransformerTrainer(model=model, args=args, train_dataset=triplets, loss=loss).train()
    return batch * steps


def with_mmtune(path: str, rows: Dataset, folder: Path, batch: int, steps: int) -> int:
    """One call."""
    finetune(
        path,
        rows,
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        save_strategy="no",
        disable_tqdm=True,
    )
    return batch * steps


def smoke(path: str, rows: Dataset, folder: Path, *, tiny: bool) -> list[list[str]]:
    """All that a user does, with how long each took."""
    done: list[list[str]] = []
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "disable_tqdm": True}
    steps = 4 if tiny else 20

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = call()
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
        done.append([name, f"{time.perf_counter() - started:.0f} s", peak])
        print(" | ".join(done[-1]), flush=True)
        return found

    train, evaluation = RetrievalDataset.from_id_rows(rows).split(8)
    run = {
        "output_dir": folder / "run",
        "max_steps": steps,
        "save_steps": steps // 2,
        "eval_steps": steps // 2,
        **options,
    }
    plan = timed("dry_run", lambda: finetune(path, train, evaluation, dry_run=True, **run))
    print(plan)
    result = timed(f"finetune, {steps} steps, evaluated and saved", lambda: finetune(path, train, evaluation, **run))
    done.append(["weights, optimizer", str(result.settings["training"].get("weights", "")), ""])
    timed("the result loads in the plain host", lambda: SentenceTransformer(str(folder / "run" / "final")))
    (folder / "run" / "final" / "modules.json").unlink()
    again = timed("resumed from the last checkpoint", lambda: finetune(path, train, evaluation, resume=True, **run))
    done.append(["metrics as before the resume", str(again.after == result.after), ""])
    del result, again
    reranker = timed("build_reranker", lambda: build_reranker(path))
    timed(
        "finetune_reranker, 5 steps",
        lambda: finetune_reranker(
            reranker, train, evaluation, output_dir=folder / "rerank", max_steps=5, num_negatives=1, **options
        ),
    )
    timed("load_model", lambda: load_model(path))
    return done


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program itself")
    parser.add_argument("--steps", type=int, default=4, help="steps that are measured on each side")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("No GPU here. --tiny tries the program itself on a CPU.")
    batch = 4 if options.tiny else options.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_checkpoint(folder, tiny=options.tiny)
        rows = make_rows(24 if options.tiny else batch * options.steps, 64 if options.tiny else 600)
        done = smoke(path, rows.select(range(24)), folder, tiny=options.tiny)
        sides = {
            "guide": measured(lambda: with_guide(path, rows, folder / "guide", batch, options.steps)),
            "mmtune": measured(lambda: with_mmtune(path, rows, folder / "mmtune", batch, options.steps)),
        }
    cells = [[side, f"{run['rows']:.2f}", f"{run['peak']:.1f}", f"{run['waiting']:.1%}"] for side, run in sides.items()]
    ratio = sides["mmtune"]["rows"] / sides["guide"]["rows"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    head = ("side", "rows a second", "peak GB", "waiting for data")
    text = (
        f"`python benchmarks/gpu.py` on {gpu}: a Qwen3-VL of the size of 2B, random weights, pages of 600 x 600, batch "
        f"{batch}, one negative, seven sizes, {options.steps} steps.\n\n{markdown_table(head, cells)}\n\n"
        f"mmtune trains {ratio:.2f} times as many rows a second.\n\n"
        + markdown_table(("what a user does", "took", "peak"), done)
    )
    print(text)
    if not options.tiny:
        write_section("On a GPU", text)


if __name__ == "__main__":
    main()
