"""The verdict of a run: what its measurements say, over the sets, by size and by group, and against a guard set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from scipy import stats

from mmtune.data.arrow import column, is_text
from mmtune.data.dataset import RetrievalDataset
from mmtune.evaluation.history import BEGINNING, DEPTH, END, History
from mmtune.evaluation.significance import ValuesOfSet, Verdict, compare_sets, correct_verdicts

_MOST_GROUPS = 12
"""A column with more different values names no groups."""

_MEASURES = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}
_HUB_LEVEL, _FAR_MORE = 0.001, 3
_MOST_HUBS = 5


def parts_of(evaluator: Any) -> list[Any]:
    """The evaluators of one set each whose mean chooses the checkpoint, as far as they tell values by query."""
    parts = list(getattr(evaluator, "parts", [evaluator]))
    return parts if all(hasattr(part, "per_query") and hasattr(part, "metric_name") for part in parts) else []


def guard_parts_of(evaluator: Any) -> list[Any]:
    """The evaluators of the guard set."""
    return list(getattr(evaluator, "guard_parts", []))


def judge(history: History, evaluator: Any, model: Any, *, was_chosen: bool) -> Verdict | None:
    """The verdict on the model that is kept against the one that came.

    Args:
        history: Of the run, its beginning and its end among them.
        evaluator: What measured.
        model: What was measured.
        was_chosen: Whether the model is the best of all measurements, so that the choice has to be counted.

    Returns:
        ``None`` where values by query are not known, as with an evaluator of the host.
    """
    guard = _judge_sets(history, guard_parts_of(evaluator), model, [])
    steps = history.steps if was_chosen else []
    return _judge_sets(history, parts_of(evaluator), model, steps, guard)


def is_guard_worse(history: History, evaluator: Any, model: Any, step: int) -> bool:
    """Whether a measurement has a significant loss on the guard set."""
    parts = guard_parts_of(evaluator)
    metrics = [part.metric_name(model) for part in parts]
    if not history.has(metrics, (BEGINNING, step)):
        return False
    return _Sets(history, _groups_of(parts), (BEGINNING, step)).compare(metrics).outcome == "REGRESSION"


def _judge_sets(
    history: History,
    parts: Sequence[Any],
    model: Any,
    steps: Sequence[int],
    guard: Verdict | None = None,
) -> Verdict | None:
    metrics = [part.metric_name(model) for part in parts]
    if not history.has(metrics, (BEGINNING, END, *steps)):
        return None
    sets = _Sets(history, _groups_of(parts), (BEGINNING, END, *steps))
    sizes = _metrics_by_size(parts, metrics)
    # a page of the corpus that nothing is asked with has labels as well, and no value
    asked = [history.of(BEGINNING, metric) for metric in metrics]
    labels = [
        {name: {each: value for each, value in own.items() if each in known} for name, own in _labels_of(part).items()}
        for part, known in zip(parts, asked, strict=True)
    ]
    by_size = {size: sets.compare(of_size) for size, of_size in sizes.items()} if len(sizes) > 1 else {}
    groups = {
        (name, value): [{query_id for query_id, own in each.get(name, {}).items() if own == value} for each in labels]
        for name in dict.fromkeys(name for each in labels for name in each)
        for value in sorted({value for each in labels for value in each.get(name, {}).values()})
    }
    by_group: dict[str, dict[str, Verdict]] = {}
    for (name, value), verdict in _correct({key: sets.compare(metrics, only) for key, only in groups.items()}).items():
        by_group.setdefault(name, {})[value] = verdict
    return replace(sets.compare(metrics, guard=guard), by_size=_correct(by_size), by_group=by_group)


@dataclass(frozen=True)
class _Sets:
    """The sets of an evaluator, to be compared whole or in part.

    Attributes:
        history: Of the run.
        groups: What hangs together in each set.
        steps: The measurements before and after, then all of which the latter is the best.
    """

    history: History
    groups: Sequence[Mapping[str, str] | None]
    steps: Sequence[int]

    def compare(
        self, metrics: Sequence[str], only: Sequence[set[str]] | None = None, guard: Verdict | None = None
    ) -> Verdict:
        """The verdict by one metric of each set, over all queries or those of ``only``."""
        sets = []
        for number, metric in enumerate(metrics):
            values = [self.history.of(step, metric) for step in self.steps]
            if only is not None:
                values = [{each: value for each, value in found.items() if each in only[number]} for found in values]
            if values[0]:
                sets.append(ValuesOfSet(values[0], values[1], self.groups[number], values[2:], name=metric))
        name, _, depth = metrics[0].rpartition("_")[2].partition("@")
        return compare_sets(sets, measure=f"{_MEASURES.get(name, name)}{depth and '@'}{depth}", guard=guard)


_Key = TypeVar("_Key")


def _correct(verdicts: Mapping[_Key, Verdict]) -> dict[_Key, Verdict]:
    return dict(zip(verdicts, correct_verdicts([*verdicts.values()]), strict=True))


def _groups_of(parts: Sequence[Any]) -> list[dict[str, str] | None]:
    """What hangs together in each set; sets of one dataset, as two directions of it, share their clusters."""
    numbers: dict[int, int] = {}
    found = []
    for part in parts:
        groups, data = getattr(part, "groups", None), getattr(part, "data", part)
        number = numbers.setdefault(id(data), len(numbers))
        found.append(None if groups is None else {each: f"{number}: {group}" for each, group in groups.items()})
    return found


def _metrics_by_size(parts: Sequence[Any], metrics: Sequence[str]) -> dict[str, list[str]]:
    """The metrics of all sets at each size of the embeddings, full size first."""
    by_size: dict[str, list[str]] = {"full": list(metrics)}
    for part, metric in zip(parts, metrics, strict=True):
        for truncation in getattr(part, "truncations", []):
            own = f"{truncation.name}{metric.removeprefix(part.name)}"
            by_size.setdefault(str(truncation.truncate_dim), []).append(own)
    return by_size


def _labels_of(part: Any) -> dict[str, dict[str, str]]:
    """What each query of a set is, by column: its language, its kind, the source of what answers it."""
    data: RetrievalDataset | None = getattr(part, "data", None)
    if data is None:
        return {}
    asked_by_text = getattr(part, "direction", "text_to_image") == "text_to_image"
    ids = data.queries["query_id"][:] if asked_by_text else data.corpus["document_id"][:]
    found = {}
    for name, values in _group_columns(data.queries if asked_by_text else data.corpus):
        found[name] = {each: value for each, value in zip(ids, values, strict=True) if value is not None}
    if asked_by_text:
        relevance = data.relevance
        queries = relevance.query_ids.take(relevance.judged_query).to_pylist()
        for name, values in _group_columns(data.corpus):
            answers: dict[str, set[str | None]] = {}
            for query_id, row in zip(queries, relevance.judged_document.tolist(), strict=True):
                answers.setdefault(query_id, set()).add(values[row])
            single = {query_id: next(iter(own)) for query_id, own in answers.items() if len(own) == 1}
            found.setdefault(name, {query_id: value for query_id, value in single.items() if value is not None})
    return found


def _group_columns(table: Dataset) -> list[tuple[str, list[str | None]]]:
    """The columns that tell groups apart: texts of a few different values. One that stands once makes no group."""
    found = []
    for name in table.column_names:
        values: pa.Array = column(table, name)
        if name in ("query_id", "document_id", "text") or not is_text(values.type):
            continue
        counts = pc.value_counts(values.drop_null())
        groups = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        if len(groups) >= 2 and len(counts) <= _MOST_GROUPS:
            known = set(groups.to_pylist())
            found.append((name, [each if each in known else None for each in values.to_pylist()]))
    return found


def find_hubs(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Documents that stand among the ten best of far more queries than chance puts there, without being relevant.

    Chance is each query drawing its ten from the corpus; a document is named where that many would come up in less than
    one of a thousand corpora of this size (binomial, corrected for the number of documents), and three times as often.

    Returns:
        ``document_id``, ``wrongly_in`` how many lists, of how many ``queries``, and how many lists ``by_chance``; the
        worst first, five at most.
    """
    found: list[dict[str, Any]] = []
    for part in parts:
        size, relevant = len(getattr(part, "corpus", ())), getattr(part, "relevant_docs", {})
        if size <= DEPTH:
            continue
        counts = Counter(
            each
            for query_id, ids in part.top_ids.items()
            for each in set(ids[:DEPTH]) - set(relevant.get(query_id, ()))
        )
        asked = len(part.top_ids)
        expected = asked * DEPTH / size
        for document_id, count in counts.items():
            if count > _FAR_MORE * expected and stats.binom.sf(count - 1, asked, DEPTH / size) * size < _HUB_LEVEL:
                place = {"wrongly_in": count, "queries": asked, "by_chance": round(expected, 1)}
                found.append({"document_id": str(document_id), **place})
    return sorted(found, key=lambda each: (-each["wrongly_in"] / each["queries"], each["document_id"]))[:_MOST_HUBS]


def describe_measuring(evaluator: Any, model: Any | None) -> dict[str, Any]:
    """What the last measurement tells besides: hubs, and how far the model moves with the size of batches.

    Args:
        evaluator: What measured.
        model: What was measured; ``None`` does not look at batches.
    """
    parts = [part for part in parts_of(evaluator) if hasattr(part, "measure_effect_of_batch_size")]
    if not parts:
        return {}
    found: dict[str, Any] = {"hubs": find_hubs(parts)}
    if model is not None:
        found["largest_change_by_batch_size"] = max(part.measure_effect_of_batch_size(model) for part in parts)
    return found
