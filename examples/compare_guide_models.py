"""The twenty models of the guide, side by side on the guide's evaluation set.

    python examples/compare_guide_models.py                    # needs the Hub and a GPU of 24 GB or more
    python examples/compare_guide_models.py --tiny             # drawn pages and tiny models, on a CPU

The list is that of Tom Aarsen, "Training and Finetuning Multimodal Embedding & Reranker Models with Sentence
Transformers", Hugging Face blog, April 2026 (huggingface.co/blog/train-multimodal-sentence-transformers), with the
nDCG@10 that stands there for 300 queries over 1,500 pages. What a model needs besides (packages, code of its own) is on
its card; one that can't be loaded is listed beneath the table, and the others go on. A second run measures only what
is missing.
"""

import argparse
from pathlib import Path
from typing import Any

from mmtune import Comparison, RetrievalDataset, compare_models
from mmtune.testing import generated_pages, tiny_clip, tiny_siglip

DATA = "tomaarsen/llamaindex-vdr-en-train-preprocessed"
PUBLISHED = {
    "tomaarsen/Qwen3-VL-Embedding-2B-vdr": 0.947,
    "Qwen/Qwen3-VL-Embedding-8B": 0.923,
    "nvidia/omni-embed-nemotron-3b": 0.915,
    "nvidia/llama-nemotron-embed-vl-1b-v2": 0.912,
    "nomic-ai/nomic-embed-multimodal-7b": 0.912,
    "llamaindex/vdr-2b-multi-v1": 0.912,
    "llamaindex/vdr-2b-v1": 0.911,
    "nomic-ai/nomic-embed-multimodal-3b": 0.899,
    "Qwen/Qwen3-VL-Embedding-2B": 0.888,
    "LCO-Embedding/LCO-Embedding-Omni-7B": 0.888,
    "LCO-Embedding/LCO-Embedding-Omni-3B": 0.860,
    "BAAI/BGE-VL-v1.5-zs": 0.800,
    "BAAI/BGE-VL-v1.5-mmeb": 0.797,
    "BAAI/BGE-VL-MLLM-S2": 0.792,
    "BidirLM/BidirLM-Omni-2.5B-Embedding": 0.775,
    "royokong/e5-v": 0.767,
    "BAAI/BGE-VL-MLLM-S1": 0.710,
    "sentence-transformers/clip-ViT-L-14": 0.611,
    "BAAI/BGE-VL-large": 0.467,
    "BAAI/BGE-VL-base": 0.335,
}
MAX_PIXELS = 600 * 600


def main() -> None:
    """Measure the models and print the table; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="only these, by name or path")
    parser.add_argument("--output", type=Path, default=Path("guide-models"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that models bring along")
    parser.add_argument("--tiny", action="store_true", help="tiny models and drawn pages instead of the real ones")
    options = parser.parse_args()
    models: dict[str, Any] = {name: name for name in options.models or PUBLISHED}
    how: dict[str, Any] = {"max_pixels": MAX_PIXELS, "trust_remote_code": options.trust_remote_code}
    if options.tiny:
        data = RetrievalDataset.from_id_rows(generated_pages(16, page_size_px=64))
        folder = options.output / "checkpoints"
        models, how = {"clip": tiny_clip(folder / "clip"), "siglip": tiny_siglip(folder / "siglip")}, {}
        models["not there"] = folder / "none"
    else:
        data = RetrievalDataset.load(DATA, "eval", split="train")
    store = options.output / "measured"
    found = compare_models(
        models, data, name="vdr-eval-hard", store=store, batch_size=options.batch_size, load_kwargs=how
    )
    print(found)
    show_published(found)
    found.plot(options.output / "models.png")
    print(f"The picture is in {options.output / 'models.png'}.")


def show_published(found: Comparison) -> None:
    """Print what the guide has for the same models."""
    for row in found.rows:
        if row.name in PUBLISHED:
            print(f"{row.name}: {row.ndcg:.3f} here, {PUBLISHED[row.name]:.3f} in the guide")


if __name__ == "__main__":
    main()
