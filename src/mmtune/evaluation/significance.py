"""Whether a model got better, or it only looks so: two models on the same queries, tested by what hangs together.

Queries about one page, or of one group, rise and fall together. Tests that take them for independent find a difference
in a fifth of all comparisons where there is none; so the unit here is the cluster, not the query.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import stats

from mmtune.arguments import require_whole, shown
from mmtune.errors import ConfigError, DatasetError
from mmtune.report.markdown import show_p

Outcome: TypeAlias = Literal["WIN", "MARGINAL", "REGRESSION"]

LEVEL = 0.05
"""A difference is called below this p."""

FEWEST_CLUSTERS, FEW_CLUSTERS = 10, 20
"""Below the first nothing is called; below the second the sentence says that there are few."""

_LONGEST_NAME = 60
_MOST_FLIPS = 9_999
_SIGNS_AT_ONCE = 2_000_000
_TIE = 1e-9
"""Values of a query that differ by less are the same: embeddings carry rounding."""


@dataclass(frozen=True)
class Verdict:
    """Whether one model is better than another on the same queries. ``str(verdict)`` is its sentence.

    Attributes:
        outcome: ``"WIN"`` or ``"REGRESSION"`` where p is below 0.05, by the sign of the difference; ``"MARGINAL"``
            otherwise, and wherever there are fewer than 10 clusters. A significant loss on the guard set makes a
            ``"REGRESSION"``.
        measure: What the values are, e.g. ``"nDCG@10"``.
        before: Mean over the queries of the first model; of several sets the mean of their means.
        after: The same of the second.
        interval: Of ``delta``, at 95%: cluster-robust, by Student's t with a degree of freedom less than there are
            clusters. ``None`` for a single cluster. It is not corrected for a choice among several measurements.
        p_value: Of no difference: the share of all ways to flip the signs of the clusters' sums that give a difference
            as large, on either side. Where ``after`` was chosen among several measurements, the largest of all of them
            is looked at in each flip, so that choosing wins nothing.
        wins: Queries with a higher value after.
        ties: Queries with the same value.
        losses: Queries with a lower value after.
        num_queries: All of them.
        num_clusters: Groups of queries that hang together.
        guard: The verdict on a guard set; ``None`` without one.
        by_size: The verdict at each size of the embeddings, e.g. ``{"full": ..., "256": ...}``; p-values are corrected
            for their number (Holm). Empty where there is one size.
        by_group: The verdict for each kind of query or source, e.g. ``{"language": {"en": ..., "de": ...}}``; p-values
            are corrected for the number of groups.
    """

    outcome: Outcome
    measure: str
    before: float
    after: float
    interval: tuple[float, float] | None
    p_value: float
    wins: int
    ties: int
    losses: int
    num_queries: int
    num_clusters: int
    guard: "Verdict | None" = None
    by_size: Mapping[str, "Verdict"] = field(default_factory=dict)
    by_group: Mapping[str, Mapping[str, "Verdict"]] = field(default_factory=dict)

    @property
    def delta(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def is_significant(self) -> bool:
        """Whether there is a difference, on this set alone."""
        return self.p_value < LEVEL and self.num_clusters >= FEWEST_CLUSTERS

    @property
    def sentence(self) -> str:
        """What a person wants to know, in one sentence without a full stop."""
        span = f" [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]" if self.interval else ""
        found = (
            f"{self._judgement}: {self.measure} {self.before:.2f} to {self.after:.2f}, {self.delta:+.2f}{span}, "
            f"{self.wins} {'query' if self.wins == 1 else 'queries'} better, {self.losses} worse, "
            f"{show_p(self.p_value)}"
        )
        if self.num_clusters < FEWEST_CLUSTERS:
            found += f"; {self.num_clusters} independent groups of queries, and {FEWEST_CLUSTERS} are needed to tell"
        elif self.num_clusters < FEW_CLUSTERS:
            found += f"; few: {self.num_clusters} independent groups of queries"
        for column, verdicts in self.by_group.items():
            for group, verdict in verdicts.items():
                if verdict.is_significant and verdict.delta < 0 < self.delta:
                    where = f"{_on_one_line(column)} is {_on_one_line(group)}"
                    found += f"; worse where {where}, {verdict.before:.2f} to {verdict.after:.2f}"
        if self.guard is None:
            return found
        return f"{found}; on the guard set {self.guard.before:.2f} to {self.guard.after:.2f}, {self.guard.in_short}"

    @property
    def in_short(self) -> str:
        """Whether there is a difference, in a word or two."""
        if self.num_clusters < FEWEST_CLUSTERS:
            return "too few queries to tell"
        if not self.is_significant:
            return "within noise"
        return f"{'better' if self.delta > 0 else 'worse'}, {show_p(self.p_value)}"

    @property
    def line(self) -> str:
        """The verdict for programs, e.g. ``VERDICT: WIN | score=0.8300 | delta=+0.2200``."""
        return f"VERDICT: {self.outcome} | score={self.after:.4f} | delta={self.delta:+.4f}"

    @property
    def cells(self) -> list[str]:
        """As a row of a table: before, after, change, interval, wins and losses, p, what it says."""
        span = f"{self.interval[0]:+.3f} to {self.interval[1]:+.3f}" if self.interval else "-"
        changes = [f"{self.before:.4f}", f"{self.after:.4f}", f"{self.delta:+.4f}", span]
        return [*changes, f"{self.wins} / {self.losses} of {self.num_queries}", f"{self.p_value:.3f}", self.in_short]

    def __str__(self) -> str:
        return self.sentence

    def as_dict(self) -> dict[str, Any]:
        """Everything in it as JSON has it, with ``delta``, ``sentence`` and ``line``; ``from_dict`` reads it back."""
        own: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        own["interval"] = list(self.interval) if self.interval else None
        own["guard"] = self.guard.as_dict() if self.guard else None
        own["by_size"] = {size: each.as_dict() for size, each in self.by_size.items()}
        own["by_group"] = {
            column: {group: each.as_dict() for group, each in verdicts.items()}
            for column, verdicts in self.by_group.items()
        }
        return {**own, "delta": self.delta, "sentence": self.sentence, "line": self.line}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Verdict":
        """The verdict that ``as_dict`` gave."""
        own = {each.name: given[each.name] for each in fields(cls)}
        own["interval"] = tuple(given["interval"]) if given["interval"] else None
        own["guard"] = cls.from_dict(given["guard"]) if given["guard"] else None
        own["by_size"] = {size: cls.from_dict(each) for size, each in given["by_size"].items()}
        own["by_group"] = {
            column: {group: cls.from_dict(each) for group, each in verdicts.items()}
            for column, verdicts in given["by_group"].items()
        }
        return cls(**own)

    @property
    def _judgement(self) -> str:
        if self.num_clusters < FEWEST_CLUSTERS:
            return "Too few queries to tell"
        if not self.is_significant:
            is_same = self.wins == self.losses == 0
            return "No change" if is_same else "No difference that chance would not make"
        is_guarded = self.delta > 0 and self.guard is not None and self.outcome == "REGRESSION"
        return "Better here, worse on the guard set" if is_guarded else "Better" if self.delta > 0 else "Worse"


def _on_one_line(name: str) -> str:
    """What names a group, without what would begin a line of a log or a report of its own."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 3]}..."


def correct_verdicts(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same comparisons with p-values that are corrected for their number (Holm), and what these say."""
    return [
        replace(each, p_value=p_value, outcome=_outcome(p_value, each.num_clusters, each.delta, each.guard))
        for each, p_value in zip(verdicts, correct_for_several([each.p_value for each in verdicts]), strict=True)
    ]


def _outcome(p_value: float, num_clusters: int, delta: float, guard: Verdict | None) -> Outcome:
    if guard is not None and guard.outcome == "REGRESSION":
        return "REGRESSION"
    if p_value >= LEVEL or num_clusters < FEWEST_CLUSTERS:
        return "MARGINAL"
    return "WIN" if delta > 0 else "REGRESSION"


@dataclass(frozen=True)
class ValuesOfSet:
    """Two models on the queries of one set.

    Attributes:
        before: ``{query_id: value}`` of the first model.
        after: The same of the second.
        groups: ``{query_id: group}``: what hangs together, also across sets; ``None`` where nothing does.
        chosen_among: All measurements of which ``after`` is the best.
        name: Of the set, for messages.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    groups: Mapping[str, str] | None = None
    chosen_among: Sequence[Mapping[str, float]] = ()
    name: str = ""


def compare_per_query(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
    measure: str = "nDCG@10",
    chosen_among: Sequence[Mapping[str, float]] = (),
    guard: Verdict | None = None,
) -> Verdict:
    """Whether ``after`` is better than ``before``, by the values of each query, as in ``evaluator.per_query``.

    Args:
        before: ``{query_id: value}`` of the first model.
        after: The same of the second, for the same queries.
        groups: ``{query_id: group}``: queries of one group are not independent, e.g. those about one page or one file;
            ``evaluator.groups`` has what shared pages connect. ``None`` takes each query for independent, which finds
            differences that are none where some are about the same page.
        seed: Of the flips, where there are too many to look at all.
        measure: What the values are, for the sentence.
        chosen_among: The values of all measurements of which ``after`` is the best, e.g. those of each checkpoint.
        guard: The verdict on a guard set.

    Returns:
        The verdict; the same for the same values and seed, in any order of the queries.

    Raises:
        ConfigError: ``groups``, ``seed`` or ``guard`` is of another type.
        DatasetError: There are no queries, the queries differ, a value is not a finite number, or a query has no group.

    Example:
        >>> before = {f"q{number}": 0.5 for number in range(12)}
        >>> print(compare_per_query(before, {name: 0.75 for name in before}).line)
        VERDICT: WIN | score=0.7500 | delta=+0.2500
    """
    require_whole("seed", seed, at_least=0)
    if groups is not None and not isinstance(groups, Mapping):
        raise ConfigError(f"groups={shown(groups)}: expected {{query_id: group}}. Pass e.g. {{'q1': 'report.pdf'}}.")
    if guard is not None and not isinstance(guard, Verdict):
        raise ConfigError(f"guard={shown(guard)}: expected a Verdict, as compare_per_query gives it, or None.")
    values = ValuesOfSet(before, after, groups, tuple(chosen_among))
    return compare_sets([values], seed=seed, measure=measure, guard=guard)


def compare_sets(
    sets: Sequence[ValuesOfSet], *, measure: str = "nDCG@10", seed: int = 0, guard: Verdict | None = None
) -> Verdict:
    """As ``compare_per_query``, over several sets that weigh the same, whatever their sizes.

    Args:
        sets: Each with as many ``chosen_among`` as the others.
        measure: What the values are.
        seed: Of the flips.
        guard: The verdict on a guard set.
    """
    read = [_read_values(each) for each in sets]
    differences = np.concatenate([values[1:] - values[0] for values, _ in read], axis=1)
    differences[np.abs(differences) <= _TIE] = 0.0
    stratum = np.repeat(np.arange(len(read)), [values.shape[1] for values, _ in read])
    # numbered as they come in the order of the queries' ids: how clusters are called changes no flip
    _, first, cluster = np.unique(
        np.concatenate([clusters for _, clusters in read]), return_index=True, return_inverse=True
    )
    cluster = np.argsort(np.argsort(first))[cluster]
    weight = 1 / (len(read) * np.bincount(stratum)[stratum])
    sums = np.stack([np.bincount(cluster, weights=each * weight) for each in differences])
    p_value, num_clusters = flip_signs(sums, seed=seed), sums.shape[1]
    before, after = (float(np.mean([values[at].mean() for values, _ in read])) for at in (0, 1))
    return Verdict(
        outcome=_outcome(p_value, num_clusters, float(sums[0].sum()), guard),
        measure=measure,
        before=before,
        after=after,
        interval=mean_interval(differences[0], cluster, stratum),
        p_value=p_value,
        wins=int((differences[0] > 0).sum()),
        ties=int((differences[0] == 0).sum()),
        losses=int((differences[0] < 0).sum()),
        num_queries=len(stratum),
        num_clusters=num_clusters,
        guard=guard,
    )


def _read_values(given: ValuesOfSet) -> tuple[np.ndarray, np.ndarray]:
    """Values, float, shape ``(2 + chosen among, queries)``, and the name of the cluster of each query."""
    ids = sorted(given.before, key=str) if isinstance(given.before, Mapping) else []
    if not ids:
        raise DatasetError(
            f"before={shown(given.before)}: expected {{query_id: value}} of one query or more, as in "
            "evaluator.per_query[metric]."
        )
    named = {"before": given.before, "after": given.after}
    named |= {f"chosen_among[{at}]": each for at, each in enumerate(given.chosen_among)}
    values = np.stack([_values_of(each, ids, name) for name, each in named.items()])
    if given.groups is None:
        return values, np.array([f"{given.name}: {query_id}" for query_id in ids])
    # a null of a column, None or NaN, is no group: taken for one, it would tie together all queries without one
    missing = [query_id for query_id in ids if _is_null(given.groups.get(query_id))]
    if missing:
        raise DatasetError(
            f"{len(missing)} queries have no group, e.g. {missing[0]!r}. Give each one, its own id where it stands "
            "alone."
        )
    return values, np.array([str(given.groups[query_id]) for query_id in ids])


def _is_null(value: object) -> bool:
    return value is None or value != value


def _values_of(values: Mapping[str, float], ids: Sequence[str], name: str) -> np.ndarray:
    if not isinstance(values, Mapping):
        raise DatasetError(f"{name}={shown(values)}: expected {{query_id: value}}, as in evaluator.per_query[metric].")
    missing = [query_id for query_id in ids if query_id not in values]
    if missing or len(values) != len(ids):
        odd = missing or sorted(set(values) - set(ids), key=str)
        raise DatasetError(
            f"{name} and before have not the same queries: {len(odd)} are in one of them only, e.g. {odd[0]!r}. "
            "Compare two models on the same evaluation set."
        )
    for query_id in ids:
        value = values[query_id]
        if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise DatasetError(f"{name} has {shown(value)} for the query {query_id!r}. Expected finite numbers.")
    return np.array([values[query_id] for query_id in ids], dtype=np.float64)


def flip_signs(sums: np.ndarray, *, seed: int) -> float:
    """The p-value of no difference, by flips of the signs of the clusters' sums.

    If there is no difference, each cluster could as well have come out the other way round. All ways to flip are looked
    at where there are up to 9,999 of them, else as many at random.

    Args:
        sums: The sum of the differences in each cluster, shape ``(measurements, clusters)``; the first measurement is
            tested. Where it is the best of several, the others follow: the largest of all is compared in each flip,
            which is the maximum-statistic correction (Westfall and Young, 1993).
        seed: Of random flips.
    """
    count = sums.shape[1]
    # flips that give the same difference count, also where their parts cancel out and rounding is all that is left
    least = abs(float(sums[0].sum())) - _TIE * float(np.abs(sums[0]).sum())
    if 2**count <= _MOST_FLIPS:
        # half of them: the others mirror these, and the test has two sides
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count - 1)))
        signs = np.hstack([np.ones((len(signs), 1)), signs])
        return float((np.abs(signs @ sums.T).max(axis=1) >= least).mean())
    rng, as_large, total = np.random.default_rng(seed), 0, sums.sum(axis=1)
    at_once = max(1, _SIGNS_AT_ONCE // count)
    for start in range(0, _MOST_FLIPS, at_once):
        drawn = rng.integers(0, 256, (min(at_once, _MOST_FLIPS - start), -(-count // 8)), dtype=np.uint8)
        stays = np.unpackbits(drawn, axis=1, count=count)
        as_large += int((np.abs(2 * (stays @ sums.T) - total).max(axis=1) >= least).sum())
    return (as_large + 1) / (_MOST_FLIPS + 1)


def mean_interval(
    values: np.ndarray, cluster: np.ndarray, stratum: np.ndarray | None = None, level: float = LEVEL
) -> tuple[float, float] | None:
    """An interval of the mean of values that hang together in clusters; ``None`` for a single cluster.

    The cluster-robust standard error of a mean, with the usual factor for few clusters, and Student's t.

    Args:
        values: float, shape ``(queries,)``.
        cluster: The number of the cluster of each, from 0.
        stratum: The number of the set of each, from 0, where the mean is that of the sets' means.
        level: What the interval leaves out.
    """
    count = int(cluster.max()) + 1
    if count < 2:
        return None
    stratum = np.zeros(len(values), dtype=np.int64) if stratum is None else stratum
    sizes = np.bincount(stratum)
    means = np.bincount(stratum, weights=values) / sizes
    spread = np.bincount(cluster, weights=(values - means[stratum]) / (len(sizes) * sizes[stratum]))
    error = math.sqrt(count / (count - 1) * float((spread**2).sum()))
    reach, mean = float(stats.t.ppf(1 - level / 2, count - 1)) * error, float(means.mean())
    return mean - reach, mean + reach


def correct_for_several(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected so that one in twenty families has a false call (Holm, 1979).

    Example:
        >>> correct_for_several([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    raised = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(raised), 1.0)
    found = np.empty_like(corrected)
    found[order] = corrected
    return [float(value) for value in found]
