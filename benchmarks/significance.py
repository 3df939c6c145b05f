"""How often a verdict is called where there is no difference, and where there is one, by simulation.

    python benchmarks/significance.py

Each run has a number of pages with 1 to 6 queries each, whose differences share a part of their noise. The results go
into RESULTS.md.
"""

import argparse

import numpy as np
from measure import write_section
from scipy import stats

from mmtune import compare_per_query
from mmtune.evaluation.significance import FEWEST_CLUSTERS, LEVEL
from mmtune.report.markdown import markdown_table

PAGES = (10, 20, 50, 300)
SHARED, OWN = 0.2, 0.1
MEASUREMENTS = 11


def draw(rng: np.random.Generator, pages: int, gain: float, measurements: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Differences of shape ``(measurements, queries)``, and the page of each query."""
    page = np.repeat(np.arange(pages), rng.integers(1, 7, pages))
    shared = rng.normal(0, SHARED, (measurements, pages))[:, page]
    return gain + shared + rng.normal(0, OWN, (measurements, len(page))), page


def judge(found: np.ndarray, page: np.ndarray | None, seed: int, among: np.ndarray | None = None) -> str:
    """The outcome."""
    ids = [f"q{at}" for at in range(len(found))]
    return compare_per_query(
        dict.fromkeys(ids, 0.0),
        dict(zip(ids, found.tolist(), strict=True)),
        groups=None if page is None else dict(zip(ids, map(str, page), strict=True)),
        seed=seed,
        chosen_among=() if among is None else [dict(zip(ids, each.tolist(), strict=True)) for each in among],
    ).outcome


def false_calls(runs: int) -> str:
    """How often a difference is called where there is none."""
    rows = []
    for pages in PAGES:
        rng, calls = np.random.default_rng(pages), np.zeros(2)
        for seed in range(runs):
            (found,), page = draw(rng, pages, 0.0)
            calls += [judge(found, page, seed) != "MARGINAL", judge(found, None, seed) != "MARGINAL"]
        rows.append([f"{pages}", *(f"{share:.1%}" for share in calls / runs)])
        print(rows[-1], flush=True)
    return markdown_table(("pages", "by page (the verdict)", "by query"), rows)


def true_calls(runs: int) -> str:
    """How often a gain is found, beside the power of Student's t on the same clusters."""
    rows = []
    for pages in PAGES:
        rng, called = np.random.default_rng(pages + 1), 0
        # one query a page, so that theory has a formula; a gain that is found in about two of three runs
        gain = 2.5 * SHARED / np.sqrt(pages)
        for seed in range(runs):
            called += judge(rng.normal(gain, SHARED, pages), None, seed) == "WIN"
        theory = 1 - stats.nct(pages - 1, 2.5).cdf(stats.t.ppf(1 - LEVEL / 2, pages - 1))
        rows.append([f"{pages}", f"{gain:.3f}", f"{called / runs:.1%}", f"{theory:.1%}"])
        print(rows[-1], flush=True)
    return markdown_table(("pages", "gain", "called", "theory"), rows)


def chosen_calls(runs: int) -> str:
    """How often the best of several measurements of no effect is called a gain."""
    rows = []
    for pages in (10, 50):
        rng, calls = np.random.default_rng(pages + 2), np.zeros(2)
        for seed in range(runs):
            found, page = draw(rng, pages, 0.0, MEASUREMENTS)
            best = found[found.mean(axis=1).argmax()]
            calls += [judge(best, page, seed, found) == "WIN", judge(best, page, seed) == "WIN"]
        rows.append([f"{pages}", *(f"{share:.1%}" for share in calls / runs)])
        print(rows[-1], flush=True)
    return markdown_table(("pages", "corrected for the choice (the verdict)", "not corrected"), rows)


def main() -> None:
    """Run the simulations; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2_000)
    runs = parser.parse_args().runs
    parts = [
        f"`python benchmarks/significance.py`: {runs:,} simulated comparisons of each kind, 1 to 6 queries a page; "
        f"below {FEWEST_CLUSTERS} pages nothing is called. A difference is called where there is none:",
        false_calls(runs),
        "A gain is called where there is one, a query a page; theory is the power of Student's t:",
        true_calls(runs),
        f"The best of {MEASUREMENTS} measurements without any effect is called a gain:",
        chosen_calls(runs),
    ]
    write_section("Verdicts", "\n\n".join(parts))


if __name__ == "__main__":
    main()
