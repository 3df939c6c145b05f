"""Results as a person reads them: tables, and the report of a run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERDICT_HEADER = ("what", "before", "after", "change", "95% interval", "better / worse", "p", "says")
_HOW_TO_READ = (
    "p is of no difference, by flips of the signs of what hangs together, counting that the best of all measurements "
    "was chosen; by size and by group it is corrected for their number."
)
_SECONDS_A_MINUTE, _SECONDS_AN_HOUR = 60, 3600


@dataclass(frozen=True)
class BeforeAfter:
    """One row of the table: a metric at one size of the embeddings.

    Attributes:
        label: ``"full"``, or the dimension such as ``"256"``.
        before: The metric of the untrained model.
        after: The metric of the trained one.
    """

    label: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def cells(self) -> list[str]:
        """The row as text, with four decimals and a signed change."""
        return [self.label, f"{self.before:.4f}", f"{self.after:.4f}", f"{self.change:+.4f}"]


def compare_metrics(before: Mapping[str, float], after: Mapping[str, float], primary_metric: str) -> list[BeforeAfter]:
    """A row per size of the embeddings, full size first, then by falling dimension.

    Where several sets were evaluated, their mean comes first, then each set.

    Args:
        before: Metrics by key.
        after: Metrics by key.
        primary_metric: The key at full size, e.g. ``"vdr_cosine_ndcg@10"`` or ``"vdr-mean_cosine_ndcg@10"``; its
            truncations are found by name, e.g. ``"vdr-256d_cosine_ndcg@10"``.
    """
    name, _, measure = primary_metric.partition("_")
    pattern = re.compile(rf"([^_]+?)(?:-(\d+)d)?_{re.escape(measure)}")
    found = [(match.group(1), int(match.group(2) or 0), key) for key in after if (match := pattern.fullmatch(key))]
    order = list(dict.fromkeys([name, *(part for part, _, _ in found)]))
    found.sort(key=lambda each: (order.index(each[0]), -(each[1] or float("inf"))))
    rows = []
    for part, dim, key in found:
        own_name = part.removeprefix(f"{name.removesuffix('-mean')}-") if len(order) > 1 else ""
        # embeddings have sizes, and a similarity in front of their measures; rerankers have neither
        size = str(dim) if dim else "full" if "_" in measure else ""
        if key in before:
            rows.append(BeforeAfter(f"{own_name} {size}".strip() or "all", before[key], after[key]))
    if not rows and primary_metric in before and primary_metric in after:  # a name of the caller's own
        rows = [BeforeAfter("all", before[primary_metric], after[primary_metric])]
    return rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, ["-" * width for width in widths], *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(_escape, row)) + " |" for row in (header, rule, *rows))


def _escape(cell: str) -> str:
    """A cell on one line, with no end of a column in it."""
    return " ".join(cell.split("\n")).replace("\r", " ").replace("|", "\\|")


def write_report(
    title: str,
    rows: list[BeforeAfter],
    measure: str,
    settings: Mapping[str, Any],
    verdicts: Sequence[Sequence[str]] = (),
) -> str:
    """The report of a run in Markdown: what it gained, on which data, and everything that was chosen.

    Args:
        title: Heading.
        rows: The table; empty without an evaluation set.
        measure: What the table shows, e.g. ``"ndcg@10"``.
        settings: By topic, e.g. ``{"data": {...}, "training": {...}}``.
        verdicts: What is better or worse, a row each, with cells for ``VERDICT_HEADER``.
    """
    parts = [f"# {title}", "## Before and after", show_gain(rows, measure)]
    if verdicts:
        parts += ["## By size and by group", markdown_table(VERDICT_HEADER, verdicts), _HOW_TO_READ]
    for topic, values in settings.items():
        cells = [[f"`{name}`", show(value)] for name, value in values.items()]
        parts += [f"## {topic.capitalize()}", markdown_table(("setting", "value"), cells)]
    return "\n\n".join(parts) + "\n"


def show_gain(rows: list[BeforeAfter], measure: str) -> str:
    """The table of what a run gained, or that nothing is known of it."""
    if not rows:
        return "No evaluation set was given, so nothing is known about the gain."
    has_sizes = any(row.label.rpartition(" ")[2] == "full" for row in rows)
    by, first = ("dimension of the embeddings", "dimension") if has_sizes else ("what was evaluated", "set")
    table = markdown_table((first, "before", "after", "change"), [row.cells for row in rows])
    return f"{measure} by {by}:\n\n{table}"


def show(value: Any) -> str:
    """A setting as text: what it holds with commas between."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {show(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item) for item in value) or "none"
    return str(value)


def show_p(value: float) -> str:
    """A p-value as a person reads it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def show_seconds(value: float) -> str:
    """A time in the unit that a person would choose."""
    if value < 2 * _SECONDS_A_MINUTE:
        return f"{value:.0f} s"
    if value < 2 * _SECONDS_AN_HOUR:
        return f"{value / _SECONDS_A_MINUTE:.0f} min"
    return f"{value / _SECONDS_AN_HOUR:.1f} h"
