"""Trains every kind of model for a few steps and prints a digest of the weights and the metrics of each.

A change that should not change numbers prints the same lines before and after. The batches are the host's, so that the
planning of batches has no part in it; models are tiny, one thread, no dropout.

    python benchmarks/parity.py > after.txt; git switch --detach BEFORE; python benchmarks/parity.py | diff - after.txt
"""

import argparse
import hashlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import without_gpu  # noqa: F401

# isort: split

import torch
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers

from mmtune import (
    RetrievalDataset,
    build_late_interaction,
    build_reranker,
    compose_router,
    finetune,
    finetune_reranker,
    load_model,
)
from mmtune.testing import generated_pages, tiny_clip, tiny_qwen3_vl, tiny_siglip, tiny_text_encoder

HOST_BATCHES = {
    "batch_sampler": BatchSamplers.BATCH_SAMPLER,
    "multi_dataset_batch_sampler": MultiDatasetBatchSamplers.PROPORTIONAL,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    # the last weights, whatever they are worth: the best of so few steps may be those that a run began with
    "load_best_model_at_end": False,
    "disable_tqdm": True,
    "report_to": "none",
    "num_negatives": 1,
}
BOTH = ("text_to_image", "image_to_text")


def digest(model: torch.nn.Module) -> str:
    """A digest of all weights with their names, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def kinds(folder: Path) -> dict[str, Callable[[Path], object]]:
    """A run for each kind of model, by name; it takes the folder that it writes to."""
    train, evaluation = RetrievalDataset.from_id_rows(generated_pages(32, seed=1)).split(12)
    clip, siglip = tiny_clip(folder / "clip"), tiny_siglip(folder / "siglip")
    text, qwen = tiny_text_encoder(folder / "text"), tiny_qwen3_vl(folder / "qwen")
    data = (train, evaluation)

    def router(route_by: str) -> Callable[[Path], object]:
        # Heads are drawn in this process, so they learn at the larger rate.
        return lambda out: finetune(
            compose_router(text, siglip, dimension=32, device="cpu", route_by=route_by),
            *data,
            output_dir=out,
            learning_rate=1e-3,
            **HOST_BATCHES,
        )

    def reranker(head: str) -> Callable[[Path], object]:
        return lambda out: finetune_reranker(
            build_reranker(qwen, head=head, device="cpu"),
            *data,
            output_dir=out,
            directions=BOTH,
            learning_rate=1e-3,
            **HOST_BATCHES,
        )

    def embedding(path: str, **options: object) -> Callable[[Path], object]:
        return lambda out: finetune(
            load_model(path, device="cpu"), *data, output_dir=out, learning_rate=1e-3, **{**HOST_BATCHES, **options}
        )

    return {
        "CLIP": embedding(clip),
        "SigLIP": embedding(siglip),
        "Qwen3-VL": embedding(qwen),
        "Qwen3-VL, LoRA": embedding(qwen, lora=True),
        "Qwen3-VL, vision frozen": embedding(qwen, freeze=("vision",)),
        "Router by modality": router("modality"),
        "Router by task": router("task"),
        "late interaction": lambda out: finetune(
            build_late_interaction(qwen, device="cpu"), *data, output_dir=out, **HOST_BATCHES
        ),
        "reranker, logit_score": reranker("logit_score"),
        "reranker, dense": reranker("dense"),
    }


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="run the kinds whose name contains this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name, run in kinds(Path(folder)).items():
            if options.only and options.only not in name:
                continue
            result = run(Path(folder, "runs", name.replace(" ", "-")))
            logs = "".join(f"{entry['loss']!r} " for entry in result.trainer.state.log_history if "loss" in entry)
            print(f"{name}: weights {digest(result.model)}")
            print(f"  losses {logs.strip()}")
            for when, metrics in (("before", result.before), ("after", result.after)):
                print(f"  {when} {hashlib.sha256(repr(sorted(metrics.items())).encode()).hexdigest()[:16]}", end="")
                print(f" {result.primary_metric} {metrics[result.primary_metric]!r}", flush=True)


if __name__ == "__main__":
    main()
