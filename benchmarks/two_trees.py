"""Times rows, encoding and training of pages with two source trees in turn, and prints the ratios with their spread.

Run ``git worktree add ../before COMMIT``, then ``python benchmarks/two_trees.py ../before/src src --rounds 5``.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import without_gpu  # noqa: F401
from measure import in_fresh_process, report, write_section
from transformers import TrainerCallback

PAGES, SIZE_PX, STEPS = 96, 512, 40


class Clock(TrainerCallback):
    """CPU seconds from the first step of a training to its end."""

    seconds = 0.0

    def on_train_begin(self, *args: object, **options: object) -> None:
        """Start."""
        self.seconds = -time.process_time()

    def on_train_end(self, *args: object, **options: object) -> None:
        """Stop."""
        self.seconds += time.process_time()


def measure(folder: Path) -> dict[str, float]:
    """CPU seconds of each piece of work, by name, with the mmtune that is imported."""
    from mmtune import RetrievalDataset, build_evaluator, finetune, load_model, mine_hard_negatives
    from mmtune.testing import generated_pages, tiny_clip

    data = RetrievalDataset.from_id_rows(generated_pages(PAGES, page_size_px=SIZE_PX))
    path, seconds = tiny_clip(folder / "clip"), {}

    def timed(name: str, work: object) -> None:
        started = time.process_time()
        work()
        seconds[name] = time.process_time() - started

    model = load_model(path, device="cpu")
    evaluator = build_evaluator(data, show_progress_bar=False)
    evaluator(model)  # what is imported and built once
    rows = data.training_rows(2)
    timed("training rows read", lambda: [rows[at] for at in range(len(rows))])
    timed("encoded and scored", lambda: evaluator(model))
    timed("mined", lambda: mine_hard_negatives(data, model, relative_margin=None, show_progress_bar=False))
    options = {"max_steps": STEPS, "per_device_train_batch_size": 16, "eval_strategy": "no", "save_strategy": "no"}
    out = {"output_dir": folder / "run", "disable_tqdm": True, "report_to": "none"}
    clock = Clock()
    options |= {"num_negatives": 1, "callbacks": [clock]}
    timed("finetune, the whole call", lambda: finetune(model, data, **options, **out))
    seconds[f"its {STEPS} steps"] = clock.seconds
    return seconds


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", help="two folders that hold the package mmtune: before, and after")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not options.trees:
        with tempfile.TemporaryDirectory() as folder:
            report(**measure(Path(folder)))
        return
    found: dict[str, list[dict[str, float]]] = {tree: [] for tree in options.trees}
    for at in range(options.rounds):
        for tree in options.trees if at % 2 else options.trees[::-1]:
            os.environ["PYTHONPATH"] = tree
            found[tree].append(in_fresh_process(__file__))
    before, after = found.values()
    lines = [
        "| CPU seconds | before | after | ratio | ratios of single rounds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in before[0]:
        one, other = ([each[name] for each in runs] for runs in (before, after))
        ratios = [b / a for a, b in zip(one, other, strict=True)]
        first, second, ratio = map(statistics.median, (one, other, ratios))
        lines.append(f"| {name} | {first:.2f} | {second:.2f} | {ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")
    text = f"`{' '.join(sys.argv)}`: medians of {options.rounds} rounds, each a process of its own, in turn.\n\n"
    print("\n".join(lines))
    write_section("Pages, before and after", text + "\n".join(lines))


if __name__ == "__main__":
    main()
