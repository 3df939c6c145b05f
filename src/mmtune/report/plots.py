"""Comparisons as pictures: models by size and quality, and quality by the bytes of a document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from mmtune.errors import ConfigError, MissingExtraError

Interval: TypeAlias = tuple[float, float]
Point: TypeAlias = tuple[float, float, Interval | None]
"""Bytes a document, a measure, and the interval of the measure; ``None`` where it has none."""

_MARKERS, _COLOURS = "osD^vP*X", ("#1d4ed8", "#b91c1c", "#15803d", "#7c3aed", "#ca8a04")
_ROOM = 1.4
"""Left and right of the marks, as a factor."""

_LINE = 0.03
"""Height of a name, as a share of the axes."""


@dataclass(frozen=True)
class PlottedModel:
    """One mark.

    Attributes:
        name: What stands beside it, as it is.
        kind: Models of one kind have one colour and shape.
        parameters: How many weights, 1 or more.
        value: How good it is.
        interval: Of ``value``; ``None`` where it has none.
    """

    name: str
    kind: str
    parameters: int
    value: float
    interval: Interval | None


def _open_figure(path: Path, size: tuple[float, float]) -> Any:
    """An empty figure for a file, in inches.

    Raises:
        ConfigError: The ending is of no format that matplotlib writes.
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            "A plot needs matplotlib, which is not installed. Run: pip install matplotlib (in a clone of mmtune: pip "
            'install ".[report]")'
        )
    # without pyplot: nothing is opened, and the caller's backend and figures stay as they are
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"path={str(path)!r}: expected a name that ends in one of {', '.join(known)}.")
    return figure


def _reach(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    """How far error bars go down and up from each value."""
    spans = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    down = [value - low for value, (low, _) in zip(values, spans, strict=True)]
    return [down, [high - value for value, (_, high) in zip(values, spans, strict=True)]]


def _write_figure(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"path={str(path)!r} can't be written to: {error}. Pass another.") from error


def draw_models(models: Sequence[PlottedModel], path: Path, *, title: str, measure: str) -> None:
    """Draw each model by its number of parameters, on a logarithmic scale, and its value with its interval.

    Args:
        models: One or more.
        path: Where the picture goes; its folder is made, and its ending is the format.
        title: Heading.
        measure: What stands on the upright axis.

    Raises:
        ConfigError: The ending is of no format that matplotlib writes, or the file can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    figure = _open_figure(path, (10, 5.5))
    from matplotlib.ticker import LogLocator

    axes = figure.add_subplot()
    axes.set_xscale("log")
    counts = [max(model.parameters, 1) for model in models]
    axes.set_xlim(min(counts) / _ROOM, max(counts) * _ROOM)
    for at, kind in enumerate(dict.fromkeys(model.kind for model in models)):
        own = [model for model in models if model.kind == kind]
        values = [model.value for model in own]
        reach = _reach(values, [model.interval for model in own])
        style = {"fmt": _MARKERS[at % len(_MARKERS)], "color": _COLOURS[at % len(_COLOURS)], "label": kind}
        axes.errorbar([max(model.parameters, 1) for model in own], values, reach, capsize=2, elinewidth=0.8, **style)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_major_formatter(lambda count, _: show_count(count))
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("parameters")
    axes.set_ylabel(measure)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    _name_marks(axes, models)
    _write_figure(figure, path)


def draw_frontier(lines: Mapping[str, Sequence[Point]], chosen: Point, path: Path, *, measure: str) -> None:
    """Draw a line for each kind of number, bytes a document from small to large, and a ring around the chosen point.

    Args:
        lines: Points by the name of their line.
        chosen: The point to mark.
        path: Where the picture goes; its folder is made, and its ending is the format.
        measure: What stands on the upright axis.

    Raises:
        ConfigError: The ending is of no format that matplotlib writes, or the file can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    figure = _open_figure(path, (7, 4.5))
    axes = figure.add_subplot()
    for at, (name, points) in enumerate(lines.items()):
        sizes, values, intervals = zip(*sorted(points), strict=True)
        marker = _MARKERS[at % len(_MARKERS)]
        axes.errorbar(sizes, values, _reach(values, intervals), label=name, marker=marker, capsize=2, linewidth=1)
    axes.plot(*chosen[:2], "o", markersize=14, markerfacecolor="none", markeredgecolor="black", label="recommended")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("bytes a document")
    axes.set_ylabel(measure)
    axes.grid(alpha=0.3)
    axes.legend()
    _write_figure(figure, path)


def _name_marks(axes: Any, models: Sequence[PlottedModel]) -> None:
    """Write the names at the right edge in the order of their marks, each with a line to its own.

    Beside the marks they would cover each other: the best models lie close together.
    """
    ordered = sorted(models, key=lambda model: (-model.value, model.parameters))
    low, high = axes.get_ylim()
    line, free = min(_LINE, 1 / len(ordered)), 1.0
    for left, model in zip(range(len(ordered) - 1, -1, -1), ordered, strict=True):
        at = (model.value - low) / (high - low)
        # under the name above, and with room for those below
        height = max(min(at, free), left * line)
        free = height - line
        axes.annotate(
            model.name,
            (max(model.parameters, 1), model.value),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def show_count(count: float) -> str:
    """A number of parameters in short.

    Example:
        >>> show_count(2_130_000_000), show_count(428e6), show_count(950)
        ('2.1B', '428M', '950')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}".removesuffix(".0") + unit
    return f"{count:.0f}"
