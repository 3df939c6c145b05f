"""The folder of a run: what may be written into it, and where a run goes on."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmtune.errors import ConfigError

CSV_OF_EVALUATORS = "eval/Information-Retrieval_evaluation_vdr*_results.csv"


def resolve_output_dir(output_dir: str | os.PathLike[str] | None, args_output_dir: str | None) -> Path:
    """The folder of the run, absolute, so that it stays the same when the working directory changes.

    Raises:
        ConfigError: Two different folders were given, or a file stands where the folder should be.
    """
    folder = _absolute(output_dir or args_output_dir or "mmtune-output")
    if args_output_dir is not None and _absolute(args_output_dir) != folder:
        raise ConfigError(
            f"output_dir={str(output_dir)!r} and args.output_dir={args_output_dir!r} differ. Leave output_dir out, or "
            "set both to one folder."
        )
    files = [path for path in (folder, *folder.parents) if path.is_file()]
    if files:
        raise ConfigError(f"output_dir={str(folder)!r} can't be a folder: {str(files[0])!r} is a file. Name another.")
    return folder


def check_output_dir(folder: Path, *, overwrite: bool, resume: bool, inputs: Iterable[object]) -> Path | None:
    """Find out whether a run may use the folder; nothing is changed.

    Args:
        folder: The folder of the run.
        overwrite: Whether a run that the folder holds may be replaced.
        resume: Whether to go on with it.
        inputs: The model and the data that the run reads; only those given by path count.

    Returns:
        The checkpoint to go on from; ``None`` to start from the beginning.

    Raises:
        ConfigError: The folder holds a run and neither ``overwrite`` nor ``resume`` is set, both are, there is nothing
            to resume, or the run would overwrite what it reads.
    """
    if overwrite and resume:
        raise ConfigError("overwrite=True deletes the run that resume=True would go on with. Set one of them.")
    if resume:
        return find_last_checkpoint(folder)
    run = find_run(folder)
    if run and not overwrite:
        raise ConfigError(
            f"output_dir={str(folder)!r} holds a run already ({', '.join(path.name for path in run[:4])}). "
            "Name another folder, or pass resume=True to go on with that run or overwrite=True to replace it."
        )
    parts = (part for each in inputs for part in (each.values() if isinstance(each, Mapping) else [each]))
    for path in (_absolute(part) for part in parts if isinstance(part, (str, os.PathLike)) and Path(part).exists()):
        if any(path == part or part in path.parents for part in run):
            raise ConfigError(
                f"overwrite=True would delete {str(path)!r}, which this run reads. Name another output_dir, or copy "
                "that first."
            )
    return None


def find_last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that is whole.

    One without ``trainer_state.json`` was cut off while it was written, and would fail or restart the count of steps.

    Raises:
        ConfigError: There is none.
    """
    checkpoints = [path for path in find_run(folder) if _checkpoint_step(path) is not None]
    whole = [path for path in checkpoints if (path / "trainer_state.json").is_file()]
    if not whole:
        cut_off = f" ({len(checkpoints)} were cut off while they were written)" if checkpoints else ""
        raise ConfigError(
            f"resume=True, and output_dir={str(folder)!r} has no checkpoint to go on from{cut_off}. "
            "Check the folder, or start over without resume."
        )
    return max(whole, key=lambda path: _checkpoint_step(path) or 0)


def clear_run(folder: Path) -> None:
    """Delete the run that the folder holds, and nothing else; for the one process that writes."""
    for path in [*find_run(folder), *folder.glob(CSV_OF_EVALUATORS)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_run(folder: Path) -> list[Path]:
    """What a run has left in the folder: checkpoints, the model, metrics and report; empty where there was none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _checkpoint_step(path) is not None]
    found += [path for path in [folder / "final"] if (path / "modules.json").is_file()]
    metrics = folder / "metrics.json"
    try:
        is_ours = {"before", "after", "settings", "versions"} <= set(json.loads(metrics.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        is_ours = False
    return sorted([*found, metrics, *folder.glob("report.md")] if is_ours else found)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - resolve() would follow links


def _checkpoint_step(path: Path) -> int | None:
    prefix, _, step = path.name.partition("-")
    return int(step) if prefix == "checkpoint" and step.isdigit() and path.is_dir() else None
