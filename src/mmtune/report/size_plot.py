"""Quality by size as a picture: a line a kind of number, bytes a document from small to large."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from mmtune.errors import ConfigError

Point: TypeAlias = tuple[float, float, tuple[float, float] | None]
"""Bytes a document, a measure, and the interval of the measure; ``None`` where it has none."""

_MARKERS = "osD^vP*X"


def draw_sizes(lines: Mapping[str, Sequence[Point]], chosen: Point, path: Path, *, measure: str) -> None:
    """Draw a line for each name, and a ring around the chosen point; the ending of ``path`` says as what.

    Args:
        lines: Points by the name of their line.
        chosen: The point to mark.
        path: Where the picture goes; its folder is made.
        measure: What stands on the upright axis.

    Raises:
        ConfigError: The ending is of no format that matplotlib writes, or the file can't be written.
    """
    # without pyplot: nothing is opened, and the caller's backend and figures stay as they are
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"path={str(path)!r}: expected a name that ends in one of {', '.join(known)}.")
    axes = figure.add_subplot()
    for at, (name, points) in enumerate(lines.items()):
        sizes, values, intervals = zip(*sorted(points), strict=True)
        reach = [
            [value - (span[0] if span else value) for value, span in zip(values, intervals, strict=True)],
            [(span[1] if span else value) - value for value, span in zip(values, intervals, strict=True)],
        ]
        axes.errorbar(sizes, values, reach, label=name, marker=_MARKERS[at % len(_MARKERS)], capsize=2, linewidth=1)
    axes.plot(*chosen[:2], "o", markersize=14, markerfacecolor="none", markeredgecolor="black", label="recommended")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("bytes a document")
    axes.set_ylabel(measure)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"path={str(path)!r} can't be written to: {error}. Pass another.") from error
