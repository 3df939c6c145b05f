"""A retriever, the negatives that it confuses, a reranker trained on them, and what the pair is worth, on real scans.

Both models start from random weights, and a short run leaves the reranker near chance: the figures show what each stage
costs and what a report looks like, and say nothing about pretrained models. That ids, pages and scores go the right way
is for the tests.

    python benchmarks/pipeline.py --data FOLDER

FOLDER holds ``train.parquet`` and ``eval.parquet`` with the columns id, query, image, negatives. The reports are
written to the output folder.
"""

import argparse
import tempfile
from pathlib import Path

from mmtune import (
    RetrievalDataset,
    build_reranker,
    evaluate_pipeline,
    finetune,
    finetune_reranker,
    mine_hard_negatives,
)
from mmtune.testing import tiny_clip, tiny_llava


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and eval.parquet")
    parser.add_argument("--output", type=Path, default=Path("pipeline-output"))
    parser.add_argument("--retriever-epochs", type=float, default=10)
    parser.add_argument("--reranker-epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    train = RetrievalDataset.load(options.data / "train.parquet")
    common = {"learning_rate": 1e-3, "seed": options.seed, "overwrite": True, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        retriever = finetune(
            tiny_clip(Path(folder, "clip"), hidden_size=128, image_size=128, seed=options.seed),
            train,
            output_dir=options.output / "retriever",
            num_train_epochs=options.retriever_epochs,
            per_device_train_batch_size=32,
            **common,
        ).model
        mined = mine_hard_negatives(train, retriever, cache_folder=options.output / "embeddings")
        reranker = finetune_reranker(
            build_reranker(tiny_llava(Path(folder, "llava"), image_size=128, seed=options.seed)),
            mined,
            output_dir=options.output / "reranker",
            num_train_epochs=options.reranker_epochs,
            **common,
        ).model
    for name, data in (("training-pages", train), ("unseen", options.data / "eval.parquet")):
        report = evaluate_pipeline(retriever, reranker, data)
        report.save(options.output / name)
        print(f"\n{name}\n{report}")


if __name__ == "__main__":
    main()
