"""The folder of a run: what may be written into it, and where a run goes on."""

import os
import shutil
from pathlib import Path

from mmtune.errors import ConfigError

RUN_FILES = ("final", "metrics.json", "report.md", "eval")
"""What a run leaves beside the host's checkpoints."""


def resolve_output_dir(output_dir: str | os.PathLike[str] | None, args_output_dir: str | None) -> Path:
    """The folder of the run.

    Raises:
        ConfigError: Two different folders were given.
    """
    if output_dir is None:
        return Path(args_output_dir or "mmtune-output")
    if args_output_dir is not None and Path(args_output_dir) != Path(output_dir):
        raise ConfigError(
            f"output_dir={str(output_dir)!r} and args.output_dir={args_output_dir!r} differ. Give only one of them."
        )
    return Path(output_dir)


def prepare_output_dir(folder: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """Make the folder ready for a run.

    Returns:
        The checkpoint to go on from; ``None`` to start from the beginning.

    Raises:
        ConfigError: The folder holds a run and neither ``overwrite`` nor ``resume`` is set, both are, or there is
            nothing to resume.
    """
    if overwrite and resume:
        raise ConfigError("overwrite=True deletes the run that resume=True would go on with. Set one of them.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={str(folder)!r} is a file. Name a folder.")
    if resume:
        return last_checkpoint(folder)
    run = run_files(folder)
    if run and not overwrite:
        raise ConfigError(
            f"output_dir={str(folder)!r} holds a run already ({', '.join(path.name for path in run[:4])}). "
            "Name another folder, or pass resume=True to go on with that run or overwrite=True to replace it."
        )
    if _is_main_process():
        for path in run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def run_files(folder: Path) -> list[Path]:
    """What runs have left in the folder: checkpoints, models, metrics and reports; nothing else is ever deleted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name in RUN_FILES or _checkpoint_step(path) is not None)


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that is whole.

    One without ``trainer_state.json`` was cut off while it was written, and would fail or restart the count of steps.

    Raises:
        ConfigError: There is none.
    """
    checkpoints = [path for path in run_files(folder) if _checkpoint_step(path) is not None]
    whole = [path for path in checkpoints if (path / "trainer_state.json").is_file()]
    if not whole:
        cut_off = f" ({len(checkpoints)} were cut off while they were written)" if checkpoints else ""
        raise ConfigError(
            f"resume=True, and output_dir={str(folder)!r} has no checkpoint to go on from{cut_off}. "
            "Check the folder, or start over with overwrite=True."
        )
    return max(whole, key=lambda path: _checkpoint_step(path) or 0)


def _checkpoint_step(path: Path) -> int | None:
    prefix, _, step = path.name.partition("-")
    return int(step) if prefix == "checkpoint" and step.isdigit() and path.is_dir() else None


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
