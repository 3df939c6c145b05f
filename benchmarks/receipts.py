"""Trains a small model with random weights on real scanned receipts, and reports what it learned and what it did not.

A model from random weights learns the training pages by heart; on other receipts it knows next to nothing. Both
figures are printed as they come. This shows that pages, ids and negatives of real scans go the right way, and how long
it takes; it says nothing about pretrained models.

    python benchmarks/receipts.py --data FOLDER

FOLDER holds ``train.parquet`` and ``eval.parquet`` with the columns id, query, image, negatives.
"""

import argparse
import tempfile
import time
from pathlib import Path

from mmtune import RetrievalDataset, build_evaluator, finetune
from mmtune.report.markdown import markdown_table
from mmtune.testing import tiny_clip


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and eval.parquet")
    parser.add_argument("--output", type=Path, default=Path("receipts-output"))
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode scans beside the training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    train = RetrievalDataset.load(options.data / "train.parquet")
    unseen = build_evaluator(options.data / "eval.parquet", name="unseen")
    print(f"To train on: {train}\n")
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            tiny_clip(folder, hidden_size=128, image_size=128, seed=options.seed),
            train,
            train,
            output_dir=options.output,
            allow_overlap=True,  # on purpose: the figure is how well the training pages are known by heart
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            seed=options.seed,
            dataloader_num_workers=options.workers,
            eval_strategy="epoch",
            save_strategy="no",
            eval_delay=options.epochs,
            overwrite=True,
        )
    metric = "vdr_cosine_ndcg@10"
    rows = [
        ["training pages, before", f"{result.before[metric]:.4f}"],
        ["training pages, after", f"{result.after[metric]:.4f}"],
        ["unseen receipts, after", f"{unseen(result.model)['unseen_cosine_ndcg@10']:.4f}"],
        ["CPU seconds of this process", f"{time.process_time() - started:.0f}"],
    ]
    print(f"\n{markdown_table(('ndcg@10', 'value'), rows)}")


if __name__ == "__main__":
    main()
