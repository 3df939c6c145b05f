"""Both recipes of the guide to training multimodal rerankers: doodles and captions, two heads, two directions.

    python examples/doodles_reranker.py                                  # captions ask for doodles; log-odds of the LM
    python examples/doodles_reranker.py --head dense --directions image_to_text     # doodles ask for captions
    python examples/doodles_reranker.py --directions text_to_image image_to_text    # one model for both
    python examples/doodles_reranker.py --tiny      # the same steps on a tiny model and drawn pages, on a CPU

The real run needs the Hub, a GPU and mmtune[vlm]; the tiny one needs mmtune[vlm]. Tom Aarsen's guide "Training and
Finetuning Multimodal Embedding & Reranker Models with Sentence Transformers" (April 2026) publishes no figures for it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset

from mmtune import FinetuneResult, RetrievalDataset, build_reranker, finetune_reranker
from mmtune.testing import generated_pages, tiny_qwen3_vl

DATA = "julianmoraes/doodles-captions-manual"
MODEL = "Qwen/Qwen3.5-0.8B"
DIRECTIONS = ("text_to_image", "image_to_text")


def main() -> None:
    """Run a recipe; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("qwen3.5-0.8b-doodles"))
    parser.add_argument("--head", choices=("logit_score", "dense"), default="logit_score")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS[:1])
    parser.add_argument("--tiny", action="store_true", help="a tiny model and drawn pages instead of the real ones")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    options = parser.parse_args()
    if options.tiny:
        result = tiny(options.output, options.head, options.directions)
    else:
        result = guide(options.output, options.head, options.directions, resume=options.resume)
    print(result)


def guide(output: Path, head: str, directions: Sequence[str], *, resume: bool) -> FinetuneResult:
    """The guide's run: four random negatives to each pair, and one relevant among 101 candidates to measure."""
    train, evaluation = captioned(load_dataset(DATA, split="train")).split(200)
    return finetune_reranker(
        build_reranker(MODEL, head=head, max_pixels=128 * 128),
        train,
        evaluation,
        output_dir=output,
        resume=resume,
        directions=directions,
        num_negatives=4,
        num_candidates=101,
        num_train_epochs=1,
        learning_rate=5e-6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
    )


def tiny(output: Path, head: str, directions: Sequence[str]) -> FinetuneResult:
    """The same call on what fits a laptop: the rows have the columns of the real data set."""
    train, evaluation = captioned(drawn_captions(num_rows=32)).split(8)
    return finetune_reranker(
        build_reranker(tiny_qwen3_vl(output.with_name(f"{output.name}-base")), head=head, max_pixels=64 * 64),
        train,
        evaluation,
        output_dir=output,
        overwrite=True,
        directions=directions,
        num_negatives=4,
        num_candidates=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
    )


def captioned(rows: Dataset) -> RetrievalDataset:
    """A doodle with its caption in each row: the caption is a query, and nothing is listed as a negative."""
    return RetrievalDataset.from_columns(rows, query_column="text", image_column="image", negative_columns=())


def drawn_captions(num_rows: int) -> Dataset:
    """Drawn pages with the columns ``image, text``."""
    pages = generated_pages(num_rows)
    pages = pages.filter(lambda text: text is not None, input_columns="query")
    return pages.select_columns(["image", "query"]).rename_column("query", "text")


if __name__ == "__main__":
    main()
