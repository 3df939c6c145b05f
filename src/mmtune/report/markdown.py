"""The Markdown of a run: its report, and its part of the model card."""

from collections.abc import Mapping
from typing import Any

from mmtune.report.tables import BeforeAfter, before_after_cells, markdown_table

_HEADER = ("before", "after", "change")


def run_report(title: str, rows: list[BeforeAfter], measure: str, settings: Mapping[str, Any]) -> str:
    """The report of a run in Markdown: what it gained, on which data, and everything that was chosen.

    Args:
        title: Heading.
        rows: The table; empty without an evaluation set.
        measure: What the table shows, e.g. ``"ndcg@10"``.
        settings: By topic, e.g. ``{"data": {...}, "training": {...}}``.
    """
    parts = [f"# {title}", "## Before and after", _result(rows, measure)]
    for topic, values in settings.items():
        cells = [[f"`{name}`", _shown(value)] for name, value in values.items()]
        parts += [f"## {topic.capitalize()}", markdown_table(("setting", "value"), cells)]
    return "\n\n".join(parts) + "\n"


def with_finetuning_section(
    card: str, rows: list[BeforeAfter], measure: str, settings: Mapping[str, Mapping[str, Any]]
) -> str:
    """The host's model card with a section on this finetuning in front of its details."""
    facts = {**settings["model"], **settings["data"], **settings["training"]}
    lines = [f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in facts.items()]
    section = "\n\n".join(["## Finetuning", _result(rows, measure), "\n".join(lines)])
    head, details, tail = card.partition("\n## Model Details")
    return f"{head.rstrip()}\n\n{section}\n{details}{tail}"


def _result(rows: list[BeforeAfter], measure: str) -> str:
    if not rows:
        return "No evaluation set was given, so nothing is known about the gain."
    has_sizes = any(row.label.rpartition(" ")[2] == "full" for row in rows)
    by, first = ("dimension of the embeddings", "dimension") if has_sizes else ("what was evaluated", "set")
    return f"{measure} by {by}:\n\n{markdown_table((first, *_HEADER), before_after_cells(rows))}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value) or "none"
    return str(value).replace("|", "\\|").replace("\n", " ")
