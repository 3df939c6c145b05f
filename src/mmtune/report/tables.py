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
    base = name.removesuffix("-mean")
    order = {part: at for at, part in enumerate(dict.fromkeys([name, *(part for part, _, _ in found)]))}
    found.sort(key=lambda each: (order[each[0]], -(each[1] or float("inf"))))
    return [
        BeforeAfter(
            _label(part.removeprefix(f"{base}-") if len(order) > 1 else "", dim, measure), before[key], after[key]
        )
        for part, dim, key in found
        if key in before
    ]


def _label(name: str, dim: int, measure: str) -> str:
    # embeddings have sizes, and a similarity in front of their measures; rerankers have neither
    size = str(dim) if dim else "full" if "_" in measure else ""
    return f"{name} {size}".strip() or "all"


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
