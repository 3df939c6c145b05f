"""Metrics as tables a person reads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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


def before_after(before: Mapping[str, float], after: Mapping[str, float], primary_metric: str) -> list[BeforeAfter]:
    """A row per size of the embeddings, full size first, then by falling dimension.

    Args:
        before: Metrics by key.
        after: Metrics by key.
        primary_metric: The key at full size, e.g. ``"vdr_cosine_ndcg@10"``; its truncations are found by name, e.g.
            ``"vdr-256d_cosine_ndcg@10"``.
    """
    name, _, measure = primary_metric.partition("_")
    truncated = re.compile(rf"{re.escape(name)}-(\d+)d_{re.escape(measure)}")
    dims = {int(match.group(1)): key for key in after if (match := truncated.fullmatch(key))}
    keys = {"full": primary_metric} | {str(dim): dims[dim] for dim in sorted(dims, reverse=True)}
    return [
        BeforeAfter(label, before[key], after[key]) for label, key in keys.items() if key in before and key in after
    ]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def before_after_cells(rows: Sequence[BeforeAfter]) -> list[list[str]]:
    """The rows as text, with four decimals and a signed change."""
    return [[row.label, f"{row.before:.4f}", f"{row.after:.4f}", f"{row.change:+.4f}"] for row in rows]
