"""What each measurement of a run found for each query, kept beside its checkpoints, so that a resumed run has it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BEGINNING, END = 0, -1
"""The steps under which the model as it came and the model that is kept are noted."""

FILE = "mmtune_per_query.parquet"
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
        """
        found: dict[str, np.ndarray] = {}
        for part in parts:
            primary = part.metric_name(model)
            measure = primary.rpartition("_")[2]
            for metric, values in part.per_query.items():
                if metric.rpartition("_")[2] == measure:
                    self.ids[metric] = list(values)
                    found[metric] = np.array(list(values.values()), dtype=np.float64)
            if step in (BEGINNING, END) and getattr(part, "top_ids", None):
                best = {query_id: ids[:DEPTH] for query_id, ids in part.top_ids.items()}
                self.top_ids.setdefault(step, {})[primary] = best
        if found:
            self.values[step] = found

    @property
    def steps(self) -> list[int]:
        """The steps of the training that were measured."""
        return sorted(step for step in self.values if step not in (BEGINNING, END))

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
            pq.write_table(pa.concat_tables(parts).unify_dictionaries(), folder / FILE, compression="zstd")

    @classmethod
    def read(cls, folder: Path) -> "History":
        """What a checkpoint holds; nothing where it has none."""
        found = cls()
        if not (folder / FILE).is_file():
            return found
        rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in pq.read_table(folder / FILE).to_pylist():
            rows.setdefault((row["step"], row["metric"]), []).append(row)
        for (step, metric), part in rows.items():
            found.ids[metric] = [row["query_id"] for row in part]
            found.values.setdefault(step, {})[metric] = np.array([row["value"] for row in part])
            if part[0]["top_ids"] is not None:
                best = {row["query_id"]: row["top_ids"] for row in part}
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
