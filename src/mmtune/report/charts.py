"""Charts for ``report.html``: values in, pictures out that stand in the file itself and say their numbers in words."""

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtune.report.markdown import BeforeAfter, compare_metrics

_BEFORE, _AFTER, _BETTER, _WORSE, _SAME = "#94a3b8", "#1d4ed8", "#15803d", "#b91c1c", "#cbd5e1"
_OTHERS = ("#0891b2", "#7c3aed", "#ca8a04", "#db2777", "#65a30d", "#9a3412")
_MOST_LINES, _MOST_ROWS, _NUM_BINS = 6, 24, 20
TIE = 1e-9
"""Values of a query that differ by less are the same: embeddings carry rounding."""

# The texts stay texts, in the reader's fonts; the salt makes the same chart the same bytes.
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmtune",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
}


@dataclass(frozen=True)
class Picture:
    """An image that stands in the file itself.

    Attributes:
        uri: ``data:`` with the bytes.
        alt: What it shows, in words.
    """

    uri: str
    alt: str


def as_data_uri(content: bytes, media_type: str) -> str:
    """Bytes as a ``data:`` URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def draw_loss(log: Sequence[Mapping[str, Any]]) -> Picture | None:
    """The loss over the steps; ``None`` where the log has none.

    Args:
        log: ``trainer.state.log_history``.
    """
    points = _points(log, "loss")
    if not points:
        return None
    (first, start), (last, end) = points[0], points[-1]
    with _Chart("step", "training loss") as chart:
        chart.axes.plot(*zip(*points, strict=True), color=_AFTER, linewidth=1.6, marker=_marker(points), markersize=3)
        chart.axes.set_ylim(bottom=min(0.0, *(value for _, value in points)))
    alt = f"Training loss over the steps: {start:.4g} at step {first}, {end:.4g} at step {last}."
    return chart.picture(alt)


def draw_measure(
    log: Sequence[Mapping[str, Any]], primary_metric: str, rows: Sequence[BeforeAfter], kept_step: int | None = None
) -> Picture | None:
    """The measure over the steps at each size, from the start; ``None`` where nothing was measured while training.

    Args:
        log: ``trainer.state.log_history``.
        primary_metric: As ``compare_metrics`` takes it.
        rows: Before and after, of which the start is taken.
        kept_step: The checkpoint that was kept, for a mark.
    """
    lines: dict[str, dict[int, float]] = {row.label: {0: row.before} for row in rows[:_MOST_LINES]}
    for entry in log:
        metrics = {str(key).removeprefix("eval_"): value for key, value in entry.items() if _is_number(value)}
        for row in compare_metrics(metrics, metrics, primary_metric):
            if row.label in lines:
                lines[row.label][int(entry["step"])] = row.after
    curves = {label: sorted(values.items()) for label, values in lines.items() if len(values) > 1}
    if not curves:
        return None
    with _Chart("step", name_measure(primary_metric)) as chart:
        for (label, points), color in zip(curves.items(), (_AFTER, *_OTHERS), strict=False):
            looks = {"linewidth": 2.0, "zorder": 3} if color == _AFTER else {"linewidth": 1.2}
            chart.axes.plot(
                *zip(*points, strict=True), label=label, color=color, marker=_marker(points), markersize=3, **looks
            )
        if kept_step is not None:
            chart.axes.axvline(kept_step, color="#64748b", linestyle=":", linewidth=1.2, label="kept")
        if len(curves) > 1 or kept_step is not None:
            chart.add_legend()
    parts = []
    for label, points in curves.items():
        step, best = max(points, key=lambda point: point[1])
        parts.append(f"{label}: {points[0][1]:.3f} at the start, {points[-1][1]:.3f} at step {points[-1][0]}")
        parts[-1] += f", highest {best:.3f} at step {step}"
    kept = "" if kept_step is None else f" The checkpoint of step {kept_step} was kept."
    return chart.picture(f"{name_measure(primary_metric)} over the steps. {'; '.join(parts)}.{kept}")


def draw_sizes(rows: Sequence[BeforeAfter], measure: str) -> Picture | None:
    """Before and after at each size or set, a line each; ``None`` without rows."""
    shown = [row for row in rows if math.isfinite(row.before) and math.isfinite(row.after)][:_MOST_ROWS]
    if not shown:
        return None
    with _Chart(measure, "", height=0.9 + 0.34 * len(shown)) as chart:
        places = range(len(shown))
        before, after = ([getattr(row, side) for row in shown] for side in ("before", "after"))
        colors = [_BETTER if row.change > TIE else _WORSE if row.change < -TIE else _SAME for row in shown]
        chart.axes.hlines(places, before, after, colors=colors, linewidth=2.5, alpha=0.5)
        chart.axes.scatter(before, places, s=34, color="white", edgecolors=_BEFORE, linewidths=1.8, label="before")
        chart.axes.scatter(after, places, s=42, color=_AFTER, label="after", zorder=3)
        chart.axes.set_yticks(list(places), [row.label for row in shown])
        chart.axes.set_ylim(len(shown) - 0.5, -0.5)
        chart.axes.grid(visible=False, axis="y")
        chart.add_legend()
    each = "; ".join(f"{row.label}: {row.before:.3f} to {row.after:.3f}" for row in shown)
    return chart.picture(f"{measure} before and after, by size or set. {each}.")


def draw_changes(changes: np.ndarray, measure: str) -> Picture | None:
    """How many queries changed by how much; ``None`` without queries.

    Args:
        changes: After minus before of each query, float, shape ``(queries,)``.
        measure: What changed, e.g. ``"nDCG@10"``.
    """
    if not len(changes):
        return None
    reach = max(1.0, float(np.abs(changes).max()))
    edges = np.linspace(-reach, reach, _NUM_BINS + 1)
    is_tie = np.abs(changes) <= TIE
    width = edges[1] - edges[0]
    with _Chart(f"change of {measure}", "queries") as chart:
        for color, side, label in (
            (_WORSE, changes[(changes < 0) & ~is_tie], "worse"),
            (_BETTER, changes[(changes > 0) & ~is_tie], "better"),
        ):
            chart.axes.bar(
                edges[:-1], np.histogram(side, edges)[0], width * 0.9, align="edge", color=color, label=label
            )
        chart.axes.bar(0, int(is_tie.sum()), width * 0.35, color=_SAME, edgecolor=_BEFORE, label="the same")
        chart.axes.set_xticks(np.linspace(-reach, reach, 5))
        chart.axes.grid(visible=False, axis="x")
        chart.add_legend()
    low, middle, high = np.percentile(changes, (5, 50, 95))
    wins, losses = int((changes > TIE).sum()), int((changes < -TIE).sum())
    return chart.picture(
        f"Change of {measure} of {len(changes):,} queries: {wins:,} better, {int(is_tie.sum()):,} the same, "
        f"{losses:,} worse. Median {middle:+.3f}; nine in ten lie between {low:+.3f} and {high:+.3f}."
    )


def name_measure(metric: str) -> str:
    """The measure of a metric key as it is written, e.g. ``"nDCG@10"`` of ``"vdr_cosine_ndcg@10"``."""
    measure = metric.rpartition("_")[2]
    kind, at, depth = measure.partition("@")
    return {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}.get(kind, kind) + at + depth


class _Chart:
    """A figure of its own, in a style of its own, without the state of ``pyplot``."""

    def __init__(self, across: str, up: str, *, height: float = 2.9) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        self._style: Any = matplotlib.rc_context(_STYLE)
        self._style.__enter__()
        # Narrow, so that its letters can be read on a phone, where it is as wide as the screen.
        self._figure = Figure(figsize=(4.6, height), layout="constrained")
        self.axes: Any = self._figure.add_subplot()
        self.axes.set_xlabel(across)
        self.axes.set_ylabel(up)
        self._content = b""

    def __enter__(self) -> "_Chart":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._content = self._save()
        finally:
            self._style.__exit__(*error)

    def add_legend(self) -> None:
        """The legend above the chart, where it hides nothing."""
        self._figure.legend(
            loc="outside upper left",
            ncols=5,
            frameon=False,
            fontsize=9,
            handlelength=1.4,
            columnspacing=1.2,
        )

    def _save(self) -> bytes:
        from matplotlib.text import Text

        for text in self._figure.findobj(Text):
            text.set_parse_math(False)  # a name with two dollar signs is no formula
        file = io.BytesIO()
        with warnings.catch_warnings():
            # The reader's fonts have the letters, whichever fonts this machine has.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
            self._figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    def picture(self, alt: str) -> Picture:
        """The chart as it was drawn."""
        return Picture(as_data_uri(self._content, "image/svg+xml"), alt)


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Step and value of each entry with this key, by step; of a step that was repeated the last."""
    found = {int(entry["step"]): float(entry[key]) for entry in log if "step" in entry and _is_number(entry.get(key))}
    return sorted(found.items())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _marker(points: Sequence[object]) -> str:
    return "o" if len(points) <= 30 else ""
