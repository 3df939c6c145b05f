"""The recipe of the guide to training multimodal embedding models: Qwen3-VL-Embedding-2B on visual documents.

    python examples/vdr_qwen3_vl.py             # needs the Hub, a GPU with 40 GB or more, and mmtune[vlm]
    python examples/vdr_qwen3_vl.py --tiny      # the same steps on a tiny model and drawn pages, on a CPU

Tom Aarsen's guide "Training and Finetuning Multimodal Embedding & Reranker Models with Sentence Transformers" (April
2026) reports nDCG@10 0.888 before and 0.947 after on the 300 queries and 1,500 pages of the evaluation set.
"""

import argparse
from pathlib import Path

from datasets import Dataset

from mmtune import FinetuneResult, RetrievalDataset, finetune, load_model
from mmtune.testing import generated_pages, tiny_clip

DATA = "tomaarsen/llamaindex-vdr-en-train-preprocessed"


def main() -> None:
    """Run the recipe; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("qwen3-vl-embedding-2b-vdr"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and drawn pages instead of the real ones")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    options = parser.parse_args()
    result = tiny(options.output) if options.tiny else guide(options.output, resume=options.resume)
    print(result)


def guide(output: Path, *, resume: bool) -> FinetuneResult:
    """The guide's run: 10,000 queries with one hard negative each, one epoch, seven Matryoshka dimensions."""
    model = load_model("Qwen/Qwen3-VL-Embedding-2B", min_pixels=28 * 28, max_pixels=600 * 600)
    return finetune(
        model,
        RetrievalDataset.load(DATA, "train", split="train"),
        RetrievalDataset.load(DATA, "eval", split="train"),
        output_dir=output,
        resume=resume,
        num_negatives=1,
        mini_batch_size=1,  # rows in one forward pass: changes memory, not the result
        matryoshka_dims=[2048, 1536, 1024, 512, 256, 128, 64],
    )


def tiny(output: Path) -> FinetuneResult:
    """The same call on what fits a laptop: the rows have the columns of the real data set."""
    model = load_model(tiny_clip(output.with_name(f"{output.name}-base")))
    return finetune(
        model,
        RetrievalDataset.from_columns(rows_with_images(num_queries=48, seed=0)),
        RetrievalDataset.from_columns(rows_with_images(num_queries=12, seed=1)),
        output_dir=output,
        overwrite=True,
        num_negatives=1,
        mini_batch_size=1,
        matryoshka_dims=[128, 64, 32],
        learning_rate=1e-3,
    )


def rows_with_images(num_queries: int, seed: int) -> Dataset:
    """Drawn pages with the columns ``query, image, negative_0 .. negative_3``."""
    pages = generated_pages(num_queries, num_negatives=4, seed=seed)
    image_by_id = dict(zip(pages["id"], pages["image"], strict=True))
    asking = [row for row in pages if row["query"] is not None and len(row["negatives"]) == 4]
    columns = {f"negative_{k}": [image_by_id[row["negatives"][k]] for row in asking] for k in range(4)}
    queries, images = [row["query"] for row in asking], [row["image"] for row in asking]
    return Dataset.from_dict({"query": queries, "image": images, **columns})


if __name__ == "__main__":
    main()
