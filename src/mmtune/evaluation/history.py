"""What each measurement of a run found for each query, kept beside its checkpoints, so that a resumed run has it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BEGINNING, END = 0, -1
"""The steps under which the model as it came and the model that is kept are noted."""

CHECKPOINT_FILE = "mmtune_per_query.parquet"
"""Its name in a checkpoint."""

PER_QUERY_FILE = "per_query.parquet"
"""Its name beside the result."""

DEPTH = 10
"""Best documents a query that are kept."""


class History:
    """Values by query of several measurements of one evaluator.

    Attributes:
        ids: ``{metric: [query id, ...]}``.
        values: ``{step: {metric: values}}``, float64, in the order of ``ids``.
        top_ids: ``{step: {metric: {query id: [document id, ...]}}}`` of the beginning and the end, best first.
    """

    def __init__(self) -> None:
        self.ids: dict[str, list[str]] = {}
        self.values: dict[int, dict[str, np.ndarray]] = {}
        self.top_ids: dict[int, dict[str, dict[str, list[str]]]] = {}

    def note(self, step: int, parts: Sequence[Any], model: Any) -> None:
        """Keep what evaluators have just found.

        Args:
            step: Of the training; or ``BEGINNING``, or ``END``.
            parts: Evaluators of one set each, as far as they tell their values by query.
            model: What they have measured.

        Warns:
            UserWarning: An evaluator of the caller's own tells something else than ``{query id: number}``, or of other
                queries than before. It is left out: the run goes on, without a verdict.
        """
        found: dict[str, np.ndarray] = {}
        for part in parts:
            primary = part.metric_name(model)
            measure = primary.rpartition("_")[2]
            for metric, given in (part.per_query if isinstance(part.per_query, Mapping) else {}).items():
                if metric.rpartition("_")[2] != measure:
                    continue
                values = _read_values(given)
                ids = self.ids.get(metric, list(values or ()))
                if values is None or values.keys() != set(ids):
                    warnings.warn(
                        f"per_query[{metric!r}] of the {type(part).__name__} is not {{query id: number}} of the same "
                        "queries at each measurement, so there is no verdict by it. Expected a finite number for each.",
                        stacklevel=2,
                    )
                    continue
                self.ids[metric] = ids
                found[metric] = np.array([values[query_id] for query_id in ids], dtype=np.float64)
            if step in (BEGINNING, END) and isinstance(getattr(part, "top_ids", None), Mapping):
                best = {str(query_id): list(map(str, ids[:DEPTH])) for query_id, ids in part.top_ids.items()}
                self.top_ids.setdefault(step, {})[primary] = best
        if found:
            self.values[step] = found

    @property
    def steps(self) -> list[int]:
        """The steps of the training that were measured."""
        return sorted(step for step in self.values if step not in (BEGINNING, END))

    def has(self, metrics: Sequence[str], steps: Sequence[int]) -> bool:
        """Whether each of these measurements has values by query for all of some metrics."""
        return bool(metrics) and all(set(metrics) <= self.values.get(step, {}).keys() for step in steps)

    def of(self, step: int, metric: str) -> dict[str, float]:
        """``{query id: value}`` of one measurement; empty where it has none."""
        values = self.values.get(step, {}).get(metric)
        return {} if values is None else dict(zip(self.ids[metric], values.tolist(), strict=True))

    def write(self, folder: Path) -> None:
        """Write everything that was noted into a checkpoint; nothing where nothing was."""
        parts = []
        for step, by_metric in self.values.items():
            for metric, values in by_metric.items():
                ids, best = self.ids[metric], self.top_ids.get(step, {}).get(metric, {})
                columns: dict[str, Any] = {
                    "step": pa.array(np.full(len(ids), step), pa.int64()),
                    "metric": pa.array([metric] * len(ids)).dictionary_encode(),
                    "query_id": ids,
                    "value": values,
                    "top_ids": pa.array([best.get(query_id) for query_id in ids], pa.list_(pa.string())),
                }
                parts.append(pa.table(columns))
        if parts:
            pq.write_table(pa.concat_tables(parts).unify_dictionaries(), folder / CHECKPOINT_FILE, compression="zstd")

    @classmethod
    def read(cls, folder: Path) -> "History":
        """What a checkpoint holds; nothing where it has none."""
        found = cls()
        if not (folder / CHECKPOINT_FILE).is_file():
            return found
        table = pq.read_table(folder / CHECKPOINT_FILE)
        for step in pc.unique(table["step"]).to_pylist():
            of_step = table.filter(pc.equal(table["step"], step))
            for metric in pc.unique(of_step["metric"]).to_pylist():
                part = of_step.filter(pc.equal(of_step["metric"], metric))
                if metric not in found.ids:
                    found.ids[metric] = part["query_id"].to_pylist()
                found.values.setdefault(step, {})[metric] = part["value"].to_numpy()
                if part["top_ids"][0].is_valid:
                    best = dict(zip(found.ids[metric], part["top_ids"].to_pylist(), strict=True))
                    found.top_ids.setdefault(step, {})[metric] = best
        return found

    def before_and_after(self) -> pa.Table:
        """A row for each metric and query: ``metric, query_id, before, after, top_ids_before, top_ids_after``.

        Where a metric is of truncated embeddings, the ids are null: they are those at full size only.
        """
        kind = pa.list_(pa.string())
        parts = []
        for metric, after in self.values.get(END, {}).items():
            before = self.values.get(BEGINNING, {}).get(metric)
            if before is None:
                continue
            ids = self.ids[metric]
            best = [self.top_ids.get(step, {}).get(metric, {}) for step in (BEGINNING, END)]
            columns: Mapping[str, Any] = {
                "metric": [metric] * len(ids),
                "query_id": ids,
                "before": before,
                "after": after,
                "top_ids_before": pa.array([best[0].get(query_id) for query_id in ids], kind),
                "top_ids_after": pa.array([best[1].get(query_id) for query_id in ids], kind),
            }
            parts.append(pa.table(columns))
        schema = pa.schema(
            {
                **dict.fromkeys(("metric", "query_id"), pa.string()),
                **dict.fromkeys(("before", "after"), pa.float64()),
                **dict.fromkeys(("top_ids_before", "top_ids_after"), kind),
            }
        )
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def write_before_and_after(self, folder: Path) -> None:
        """Write ``per_query.parquet`` beside the result."""
        pq.write_table(self.before_and_after(), folder / PER_QUERY_FILE, compression="zstd")


def _read_values(given: object) -> dict[str, float] | None:
    """Values by query; ``None`` where they are none. Ours are always some, those of others need not be."""
    if not isinstance(given, Mapping):
        return None
    is_right = all(isinstance(each, (int, float, np.number)) and math.isfinite(each) for each in given.values())
    return {str(query_id): float(value) for query_id, value in given.items()} if is_right else None
