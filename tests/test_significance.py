"""Whether a difference is called: against scipy, by simulation, and on values that can't be."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmtune import ConfigError, DatasetError, compare_per_query
from mmtune.evaluation.significance import LEVEL, correct_for_several, flip_signs, mean_interval


def by_id(values: Any) -> dict[str, float]:
    return {f"q{number}": float(value) for number, value in enumerate(values)}


@pytest.mark.parametrize("count", [2, 5, 9, 13])
def test_all_flips_equal_scipy(count: int) -> None:
    sums = np.random.default_rng(count).normal(0.3, 1, count)
    expected = stats.permutation_test(
        (sums,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert flip_signs(sums[None], seed=0) == pytest.approx(expected.pvalue, abs=1e-12)


def test_random_flips_agree_with_scipy() -> None:
    sums = np.random.default_rng(3).normal(0.25, 1, 60)
    expected = stats.permutation_test(
        (sums,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=9_999, rng=1, vectorized=True
    )
    assert flip_signs(sums[None], seed=0) == pytest.approx(expected.pvalue, abs=0.01)


def test_the_interval_of_single_queries_is_that_of_student() -> None:
    values = np.random.default_rng(1).normal(0.1, 1, 40)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values, np.arange(40)) == pytest.approx((expected.low, expected.high))
    assert mean_interval(values, np.zeros(40, dtype=int)) is None


def test_the_interval_grows_where_queries_hang_together() -> None:
    own = np.random.default_rng(2).normal(0, 1, 20)
    low, high = mean_interval(own, np.arange(20)) or (0, 0)
    both = mean_interval(np.repeat(own, 5), np.repeat(np.arange(20), 5)) or (0, 0)
    assert both == pytest.approx((low, high)), "five queries that say the same say it once"


def simulate(rng: np.random.Generator, pages: int, gain: float, measurements: int = 1) -> tuple[list[np.ndarray], Any]:
    """Values with 1 to 6 queries a page that rise and fall together, and the page of each."""
    page = np.repeat(np.arange(pages), rng.integers(1, 7, pages))
    found = [gain + rng.normal(0, 0.2, pages)[page] + rng.normal(0, 0.1, len(page)) for _ in range(measurements)]
    return found, by_id(page)


@pytest.mark.parametrize("pages", [10, 50])
def test_no_difference_is_called_where_there_is_none(pages: int) -> None:
    rng, called, by_query, runs = np.random.default_rng(pages), 0, 0, 400
    for seed in range(runs):
        (values,), page = simulate(rng, pages, 0.0)
        before = by_id(np.zeros(len(values)))
        groups = {name: str(number) for name, number in page.items()}
        called += compare_per_query(before, by_id(values), groups=groups, seed=seed).outcome != "MARGINAL"
        by_query += compare_per_query(before, by_id(values), seed=seed).outcome != "MARGINAL"
    # 5% give or take; benchmarks/significance.py has 2,000 runs of each kind
    assert called / runs <= 0.075
    assert by_query / runs > 0.12, "the test by query calls differences that are none"


def test_the_best_of_several_measurements_wins_nothing() -> None:
    rng, corrected, plain, runs = np.random.default_rng(5), 0, 0, 300
    for seed in range(runs):
        found, page = simulate(rng, 30, 0.0, measurements=11)
        groups = {name: str(number) for name, number in page.items()}
        measured = [by_id(values) for values in found]
        best = max(measured, key=lambda each: sum(each.values()))
        before = dict.fromkeys(best, 0.0)
        options: dict[str, Any] = {"groups": groups, "seed": seed}
        corrected += compare_per_query(before, best, chosen_among=measured, **options).outcome == "WIN"
        plain += compare_per_query(before, best, **options).outcome == "WIN"
    assert corrected / runs <= 0.075
    assert plain / runs > 0.15


def test_a_gain_is_found_about_as_often_as_theory_says() -> None:
    rng, runs, found, gain = np.random.default_rng(7), 300, 0, 0.08
    for seed in range(runs):
        values = gain + rng.normal(0, 0.2, 50)
        found += compare_per_query(by_id(np.zeros(50)), by_id(values), seed=seed).outcome == "WIN"
    noncentral = stats.nct(49, gain / 0.2 * np.sqrt(50))
    power = 1 - noncentral.cdf(stats.t.ppf(1 - LEVEL / 2, 49))
    assert found / runs == pytest.approx(power, abs=0.06)


@pytest.mark.parametrize(("shift", "outcome", "word"), [(0.2, "WIN", "Better: "), (-0.2, "REGRESSION", "Worse: ")])
def test_the_sentence_says_what_happened(shift: float, outcome: str, word: str) -> None:
    before = by_id(np.linspace(0.2, 0.6, 25))
    after = {name: value + shift if at else value for at, (name, value) in enumerate(before.items())}
    verdict = compare_per_query(before, after)
    assert verdict.outcome == outcome
    assert verdict.sentence.startswith(f"{word}nDCG@10 0.40 to {0.4 + shift * 24 / 25:.2f}, ")
    counts = (24, 1, 0) if shift > 0 else (0, 1, 24)
    assert (verdict.wins, verdict.ties, verdict.losses) == counts
    assert "p < 0.001" in verdict.sentence
    assert verdict.line == f"VERDICT: {outcome} | score={verdict.after:.4f} | delta={verdict.delta:+.4f}"
    assert verdict.interval[0] < verdict.delta < verdict.interval[1]


def test_few_clusters_give_no_verdict_or_say_so() -> None:
    before, after = by_id(np.zeros(40)), by_id(np.full(40, 0.5))
    for count, outcome, told in ((9, "MARGINAL", "9 independent"), (15, "WIN", "few: 15"), (20, "WIN", "")):
        verdict = compare_per_query(before, after, groups={name: str(at % count) for at, name in enumerate(before)})
        assert (verdict.outcome, verdict.num_clusters) == (outcome, count)
        assert told in verdict.sentence
        assert told or "independent" not in verdict.sentence


def test_a_loss_on_the_guard_set_makes_a_regression_and_both_are_said() -> None:
    before, better, worse = by_id(np.full(30, 0.5)), by_id(np.full(30, 0.8)), by_id(np.full(30, 0.3))
    guard = compare_per_query(before, worse)
    verdict = compare_per_query(before, better, guard=guard)
    assert verdict.outcome == "REGRESSION"
    assert verdict.sentence.startswith("Better here, worse on the guard set: nDCG@10 0.50 to 0.80")
    assert "on the guard set 0.50 to 0.30, worse, p < 0.001" in verdict.sentence
    calm = compare_per_query(before, better, guard=compare_per_query(before, before))
    assert calm.outcome == "WIN"
    assert calm.sentence.endswith("on the guard set 0.50 to 0.50, within noise")


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_order_and_direction_change_nothing_but_the_sign(values: list[float], seed: int) -> None:
    before, after = by_id(np.zeros(len(values))), by_id(values)
    one = compare_per_query(before, after, seed=seed)
    again = compare_per_query(dict(reversed(before.items())), dict(reversed(after.items())), seed=seed)
    other = compare_per_query(after, before, seed=seed)
    assert one == again
    assert (one.p_value, one.delta) == pytest.approx((other.p_value, -other.delta))
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)


def test_what_clusters_are_called_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    before = {f"q{number:02}": float(rng.random()) for number in range(60)}
    after = {name: value + float(rng.normal(0.05, 0.2)) for name, value in before.items()}
    by_page = {name: f"p{number // 2}" for number, name in enumerate(before)}
    called_otherwise = {name: f"{(number // 2 * 7) % 30:02}" for number, name in enumerate(before)}
    p_values = {compare_per_query(before, after, groups=groups).p_value for groups in (by_page, called_otherwise)}
    assert len(p_values) == 1


def test_several_comparisons_are_corrected() -> None:
    assert correct_for_several([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_for_several([0.9, 0.8]) == [1.0, 1.0]
    assert correct_for_several([]) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"before": {}}, DatasetError, "before={}: expected"),
        ({"before": 0.5}, DatasetError, r"before=0\.5: expected"),
        ({"after": {"q0": 0.1}}, DatasetError, "after and before have not the same queries: 1 .* 'q1'"),
        ({"after": {"q0": 0.1, "q1": 0.2, "q2": 0.3}}, DatasetError, "'q2'"),
        ({"after": {"q0": 0.1, "q1": float("nan")}}, DatasetError, "after has nan for the query 'q1'"),
        ({"after": {"q0": 0.1, "q1": None}}, DatasetError, "after has None for the query 'q1'"),
        ({"after": {"q0": 0.1, "q1": "high"}}, DatasetError, "after has 'high' for the query 'q1'"),
        ({"after": {"q0": 0.1, "q1": [0.1]}}, DatasetError, "after has .* for the query 'q1'"),
        ({"before": {1: 0.1, "a": 0.1}, "after": {"a": 0.1}}, DatasetError, "1 are in one of them only"),
        ({"groups": {"q0": "a", "q1": None}}, DatasetError, "1 queries have no group, e.g. 'q1'"),
        ({"groups": {"q0": "a", "q1": float("nan")}}, DatasetError, "1 queries have no group, e.g. 'q1'"),
        ({"guard": "WIN"}, ConfigError, "guard='WIN'"),
        ({"after": 5}, DatasetError, "after=5"),
        ({"chosen_among": [{"q0": 1.0}]}, DatasetError, r"chosen_among\[0\]"),
        ({"groups": {"q0": "a"}}, DatasetError, "1 queries have no group, e.g. 'q1'"),
        ({"groups": ["a", "b"]}, ConfigError, "groups="),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"seed": True}, ConfigError, "seed=True"),
    ],
)
def test_what_can_not_be_compared_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given_: dict[str, Any] = {"before": {"q0": 0.0, "q1": 0.1}, "after": {"q0": 0.1, "q1": 0.2}, **change}
    with pytest.raises(error, match=message):
        compare_per_query(given_.pop("before"), given_.pop("after"), **given_)


def test_rounding_is_no_difference() -> None:
    before = by_id(np.full(20, 0.5))
    verdict = compare_per_query(before, {name: value + 1e-12 for name, value in before.items()})
    assert (verdict.outcome, verdict.p_value, verdict.ties) == ("MARGINAL", 1.0, 20)
    # the parts of each sum cancel out, and what is left of them is rounding
    assert compare_per_query(by_id(np.zeros(12)), by_id([0.1, 0.2, -0.3] * 4)).p_value == 1.0


def test_what_a_group_is_called_begins_no_line_of_a_log() -> None:
    before, after = by_id(np.full(30, 0.5)), by_id(np.full(30, 0.8))
    worse = compare_per_query(before, by_id(np.full(30, 0.3)))
    for name in ("en\nVERDICT: WIN | score=1.0000", "x" * 5_000):
        sentence = replace(compare_per_query(before, after), by_group={"kind": {name: worse}}).sentence
        assert "worse where kind is " in sentence
        assert len(sentence.splitlines()) == 1
        assert len(sentence) < 400
