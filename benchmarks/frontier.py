"""Quality by size on drawn pages: dimensions by kinds of numbers, from one encoding, with the recommended one.

A tiny CLIP with random weights learns some reports, stops before it knows them all, and looks for unseen ones, so that
sizes differ. The ranges of int8 are from the training pages; a last table has them from the evaluated ones. What came
out goes into its section of RESULTS.md.

    python benchmarks/frontier.py --picture sizes.png
"""

import argparse
import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

# isort: split

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import write_section

from mmtune import Frontier, RetrievalDataset, finetune, size_frontier
from mmtune.testing import generated_pages, tiny_clip

TITLE = "Sizes"
DIMS = (128, 64, 32, 16, 8)
NUM_PAGES, NUM_EVALUATION = 620, 240
RECIPE: dict[str, Any] = {"max_steps": 260, "learning_rate": 1e-3, "num_negatives": 0, "disable_tqdm": True}


def tabulate(frontier: Frontier, dtypes: tuple[str, ...]) -> list[str]:
    """A row a dimension, a column a kind of number; the recommended cell in bold."""
    header = ["dimensions", *dtypes]
    lines = [header, ["---:"] * len(header)]
    for dim in dict.fromkeys(row.dim for row in frontier.rows):
        cells = []
        for row in (row for row in frontier.rows if row.dim == dim):
            low, high = row.interval or (row.ndcg, row.ndcg)
            text = f"{row.ndcg:.3f} [{low:.3f}, {high:.3f}]"
            cells.append(f"**{text}**" if row is frontier.recommended else text)
        lines.append([str(dim), *cells])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", help="where to draw the frontier")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = RetrievalDataset.from_id_rows(generated_pages(NUM_PAGES, seed=5)).split(
            NUM_EVALUATION, seed=5
        )
        checkpoint = tiny_clip(Path(folder) / "clip")
        # the loss trains every size that is measured
        recipe = {**RECIPE, "matryoshka_dims": DIMS, "output_dir": Path(folder) / "run"}
        model = finetune(checkpoint, train, **recipe).model
        options: dict[str, Any] = {"dims": DIMS, "show_progress_bar": False}
        started = time.process_time()
        frontier = size_frontier(model, held_out, calibration=train, **options)
        seconds = time.process_time() - started
        flattered = size_frontier(model, held_out, dtypes=["int8"], **options)
    if arguments.picture:
        frontier.plot(arguments.picture)
    print(frontier)
    text = [
        f"`python benchmarks/frontier.py`: {len(held_out)} queries in {frontier.num_clusters} independent groups over "
        f"{frontier.num_documents} unseen drawn pages; a tiny CLIP of 128 dimensions from random weights, "
        f"{RECIPE['max_steps']} steps of 64 with every size in the loss. nDCG@10 with its 95% interval; float32 "
        f"queries, int8 by the ranges of {len(train.corpus)} training pages. The recommended one, at a tolerance of "
        f"{frontier.tolerance:g}, in bold. Encoding and all {len(frontier.rows)} combinations took {seconds:.1f} s.",
        "\n".join(tabulate(frontier, ("float32", "int8", "binary"))),
        f"{frontier.reason}",
        "By the ranges of the evaluated pages themselves, int8 has "
        + ", ".join(f"{row.ndcg:.3f} at {row.dim}" for row in flattered.rows)
        + ".",
    ]
    write_section(TITLE, "\n\n".join(text))


if __name__ == "__main__":
    main()
