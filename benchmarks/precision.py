"""Trains the same steps in float32, in bfloat16 with plain AdamW, and in bfloat16 as ``finetune`` chooses by itself.

A tiny CLIP and a tiny Qwen3-VL learn drawn pages in float32 until they find some unseen ones, and then 100 steps of 32
more, at rates at which bfloat16 rounds steps away. On a CPU bfloat16 weights also compute in bfloat16. What came out
goes into its section of RESULTS.md.

    python benchmarks/precision.py
"""

import argparse
import sys
import tempfile
import textwrap
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

# Before the host is imported: one thread, no network, and torchvision beside a CPU torch.
import conftest  # noqa: F401

# isort: split

from measure import machine
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from mmtune import FinetuneResult, RetrievalDataset, finetune, load_model
from mmtune.models.precision import share_lost
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages, tiny_clip, tiny_qwen3_vl

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADING = "## Precision"
LEAST_KEPT = 0.85
STEPS = 100
RATES = (1e-4, 2e-4)
SEEDS = (0, 1, 2)

FLOAT32, PLAIN, CHOSEN, CLIPPED = "float32", "bfloat16, plain AdamW", "bfloat16, as chosen", "bfloat16, stable_adamw"
VARIANTS: dict[str, dict[str, Any]] = {
    FLOAT32: {"dtype": "float32"},
    PLAIN: {"dtype": "bfloat16", "optim": "adamw_torch"},
    CHOSEN: {"dtype": "bfloat16"},
    CLIPPED: {"dtype": "bfloat16", "optim": "stable_adamw"},
}
# smaller pages and no hard negatives make the steps of the VLM half as long
MODELS: dict[str, dict[str, Any]] = {
    "CLIP": {"build": tiny_clip, "first_steps": 40, "variants": list(VARIANTS), "options": {}},
    "Qwen3-VL": {
        "build": lambda folder, seed: tiny_qwen3_vl(folder, seed=seed, max_pixels=96 * 96),
        "first_steps": 45,
        "variants": [FLOAT32, PLAIN, CHOSEN],
        "options": {"num_negatives": 0, "loss": MultipleNegativesRankingLoss},
    },
}
QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "matryoshka_dims": None,
    "eval_strategy": "no",
    "save_strategy": "no",
    "keep": "last",
    "disable_tqdm": True,
    "overwrite": True,
}


def gain(result: FinetuneResult) -> float:
    """What the primary metric gained."""
    return result.after[result.primary_metric] - result.before[result.primary_metric]


def measure(name: str, folder: Path) -> tuple[dict[tuple[float, str], list[float]], dict[float, float], list[float]]:
    """The gains of one model.

    Args:
        name: Of the model, in ``MODELS``.
        folder: For what the runs write.

    Returns:
        The gain in nDCG@10 for each seed, by rate and variant; by rate, the share of steps that plain AdamW loses in
        the rounding of the weights; and nDCG@10 where each seed starts.
    """
    setup = MODELS[name]
    gains: dict[tuple[float, str], list[float]] = {}
    lost: dict[float, float] = {}
    starts = []
    for seed in SEEDS:
        data = RetrievalDataset.from_id_rows(generated_pages(400, seed=seed)).split(80, seed=seed)
        options = {**QUIET, **setup["options"], "seed": seed}
        base = load_model(setup["build"](folder / f"base-{seed}", seed=seed), device="cpu")
        steps = setup["first_steps"]
        first = finetune(base, *data, output_dir=folder / "first", max_steps=steps, learning_rate=1e-3, **options)
        starts.append(first.after[first.primary_metric])
        for rate in RATES:
            half = load_model(folder / "first" / "final", dtype="bfloat16", device="cpu")
            lost[rate] = share_lost((weight, rate / 2) for weight in half.parameters())
            for variant in setup["variants"]:
                choice = dict(VARIANTS[variant])
                model = load_model(folder / "first" / "final", dtype=choice.pop("dtype"), device="cpu")
                result = finetune(
                    model, *data, output_dir=folder / "run", max_steps=STEPS, learning_rate=rate, **options, **choice
                )
                gains.setdefault((rate, variant), []).append(gain(result))
                print(f"{name}, seed {seed}, {rate:g}, {variant}: {gains[rate, variant][-1]:+.4f}", flush=True)
    return gains, lost, starts


def write_section(path: Path, text: str) -> None:
    """Put a section into RESULTS.md, in place of the one with the same heading or at its end."""
    before, _, after = path.read_text("utf-8").partition(f"{HEADING}\n")
    _, separator, rest = after.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{HEADING}\n\n{text}\n{separator}{rest}", "utf-8")


def describe(name: str, folder: Path) -> tuple[list[list[str]], float]:
    """The rows of a model for the table, and the share of the gain in float32 that the choice keeps."""
    gains, lost, starts = measure(name, folder)
    rows = []
    for rate in RATES:
        exact = gains[rate, FLOAT32]
        row = [f"{name}, {rate:g}", f"{sum(starts) / len(starts):.3f}", f"{lost[rate]:.0%}"]
        row.append(f"{sum(exact) / len(exact):.3f}")
        for variant in (PLAIN, CHOSEN, CLIPPED):
            found = gains.get((rate, variant))
            shares = [one / other for one, other in zip(found or exact, exact, strict=True)]
            row.append(f"{sum(found) / sum(exact):.0%} ({min(shares):.0%} to {max(shares):.0%})" if found else "")
        rows.append(row)
    totals = {variant: sum(sum(gains[rate, variant]) for rate in RATES) for variant in (FLOAT32, CHOSEN)}
    return rows, totals[CHOSEN] / totals[FLOAT32]


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(MODELS), help="run one model, and write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.process_time()
    rows: list[list[str]] = []
    kept: dict[str, float] = {}
    for name in [options.only] if options.only else MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found, kept[name] = describe(name, Path(folder))
        rows += found
    header = ("model, rate", "start", "steps lost in bfloat16", "gain in float32", PLAIN, CHOSEN, CLIPPED)
    text = f"""\
`python benchmarks/precision.py`, {date.today()}, {time.process_time() - started:.0f} s of CPU time on one thread.
{textwrap.fill(machine(), 120, break_long_words=False, break_on_hyphens=False)}.

What {STEPS} steps of 32 gain in nDCG@10 on 80 unseen queries, the mean of {len(SEEDS)} seeds; in bfloat16 as a share of
the gain in float32, with the least and the most of a seed, which on so few queries is mostly noise. *As chosen* is what
`finetune` takes for such weights: AdamW with Kahan summation. The host's `stable_adamw` is of the same package and
clips each step besides.

{markdown_table(header, rows)}

Over both rates the choice keeps {", ".join(f"{share:.0%} ({name})" for name, share in kept.items())} of the gain.
Limit: {LEAST_KEPT:.0%}."""
    print(f"\n{text}")
    if not options.only:
        write_section(RESULTS, text)
    if min(kept.values()) < LEAST_KEPT:
        raise SystemExit(f"The choice keeps less than {LEAST_KEPT:.0%} of the gain.")


if __name__ == "__main__":
    main()
