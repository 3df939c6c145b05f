"""The folder of a run: one run at a time, what may be written into it, and what becomes of the run it replaces.

A run that is replaced is set aside in the folder, and deleted once the new one has something to show. Each step is a
rename whose name says how far it came, so that a later call can finish or undo it after a kill.
"""

import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from mmtune.errors import ConfigError
from mmtune.evaluation.history import PER_QUERY_FILE
from mmtune.training.records import RECORD, checkpoint_step, checkpoints_of, find_last_checkpoint, why_unusable

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

CSV_OF_EVALUATORS = "eval/*_vdr*_results.csv", "eval/*_guard*_results.csv"
START = "start"
"""The untrained model, for as long as it may be the best."""
_RESULTS = ("metrics.json", "report.md", "report.html", PER_QUERY_FILE, RECORD)
_LOCK = ".run-lock"
_SETTING_ASIDE, _SET_ASIDE, _DELETING = ".replacing-run", ".replaced-run", ".deleted-run"
_PATIENCE_S = 30.0
_held: set[Path] = set()


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


def check_output_dir(
    folder: Path, *, overwrite: bool, resume: bool | Literal["auto"], inputs: Iterable[object]
) -> Path | None:
    """Find out whether a run may use the folder; nothing is changed.

    Args:
        folder: The folder of the run.
        overwrite: Whether a run that the folder holds may be replaced.
        resume: Whether to go on with it; ``"auto"`` if there is something to go on from.
        inputs: The model and the data that the run reads; only those given by path count.

    Returns:
        The checkpoint to go on from; ``None`` to start from the beginning, and with ``"auto"`` for a run at its end.

    Raises:
        ConfigError: The folder holds a run and neither ``overwrite`` nor ``resume`` is set, both are, there is nothing
            to resume, or the run would overwrite what it reads.
    """
    if overwrite and resume:
        raise ConfigError(f"overwrite=True deletes the run that resume={resume!r} would go on with. Set one of them.")
    if resume == "auto" and is_finished(folder):
        return None
    run = find_run(folder)
    if run and resume == "auto" and all(map(_is_cut_off, run)):
        warnings.warn(
            f"The run in {str(folder)!r} was cut off while it wrote its first checkpoint. It starts anew.", stacklevel=5
        )
    elif resume is True or (resume and checkpoints_of(folder)):
        return find_last_checkpoint(folder)
    elif run and not overwrite:
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


def is_first_process() -> bool:
    """Whether this process is the only one, or the one that writes; known before the processes are connected."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder, and tidy up after one that was killed while it replaced another.

    The system gives the lock back when the process ends, however it ends. With several processes the first holds it for
    all, and the others wait until it has tidied up.

    Raises:
        ConfigError: Another run uses the folder.
    """
    if not is_first_process():
        _wait_while_first_recovers(folder)
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            recover(folder)
            yield
    finally:
        for path in made:  # a call that was refused leaves no empty folders
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _wait_while_first_recovers(folder: Path) -> None:
    # not for ever: what lies aside may be of the call that is under way, when this process comes late to it
    latest = time.monotonic() + _PATIENCE_S
    while any((folder / name).exists() for name in (_SETTING_ASIDE, _SET_ASIDE)) and time.monotonic() < latest:
        time.sleep(0.05)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path, own = folder / _LOCK, f"process {os.getpid()} on {socket.gethostname()}"
    if folder in _held:
        raise _is_in_use(folder, own)
    file = _open_locked(path, own)
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        path.unlink(missing_ok=True)
        file.close()


def _open_locked(path: Path, own: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise _is_in_use(path.parent, holder) from None
        except OSError as error:
            warnings.warn(
                f"{str(path.parent)!r} is on a file system without locks ({error}), so nothing keeps a second run out "
                "of it.",
                stacklevel=2,
            )
        # the run that held it may have deleted the file between our opening and locking it
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            file.truncate(0)
            file.write(own)
            file.flush()
            return file
        file.close()


def _is_in_use(folder: Path, holder: str) -> ConfigError:
    return ConfigError(
        f"output_dir={str(folder)!r} is in use by another run ({holder}). Wait for it to end, or name another folder."
    )


def set_aside(folder: Path) -> None:
    """Put the run that the folder holds out of the way, complete; for the one process that writes."""
    moving = folder / _SETTING_ASIDE
    for path in [*find_run(folder), *_csv_files(folder)]:
        place = moving / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    if moving.is_dir():
        moving.rename(folder / _SET_ASIDE)


def delete_set_aside(folder: Path) -> None:
    """Delete the run that was set aside, if there is one."""
    replaced, deleting = folder / _SET_ASIDE, folder / _DELETING
    if replaced.is_dir():
        replaced.rename(deleting)
    shutil.rmtree(deleting, ignore_errors=True)


def recover(folder: Path) -> None:
    """Delete the run that was set aside if the new one has something of its own; else put it back in its place."""
    moving, replaced = folder / _SETTING_ASIDE, folder / _SET_ASIDE
    if replaced.is_dir() and not has_own(folder):
        for path in [*find_run(folder), folder / START, *_csv_files(folder)]:
            _delete(path)
        replaced.rename(moving)
    if moving.is_dir():
        for path in [path for path in moving.rglob("*") if not (folder / path.relative_to(moving)).exists()]:
            if path.exists():  # its folder has not been moved yet
                path.rename(folder / path.relative_to(moving))
        shutil.rmtree(moving)
    delete_set_aside(folder)


def has_own(folder: Path) -> bool:
    """Whether the folder holds a whole checkpoint, or a result."""
    return is_finished(folder) or any(why_unusable(path) is None for path in checkpoints_of(folder))


def is_finished(folder: Path) -> bool:
    """Whether the folder holds the result of a run that came to its end."""
    parts = (folder / "final" / "modules.json", folder / RECORD)
    return all(part.is_file() for part in parts) and read_metrics(folder) is not None


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """What ``metrics.json`` holds; ``None`` where there is none of a run."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        return metrics if {"before", "after", "settings", "versions"} <= set(metrics) else None
    except (OSError, ValueError, TypeError):
        return None


def _csv_files(folder: Path) -> list[Path]:
    return [path for pattern in CSV_OF_EVALUATORS for path in folder.glob(pattern)]


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_cut_off(path: Path) -> bool:
    """Whether a part of a run is of no use by itself: a checkpoint in the middle of which the run was killed."""
    return path.name == START or not (checkpoint_step(path) is None or (path / "trainer_state.json").is_file())


def find_run(folder: Path) -> list[Path]:
    """What a run has left in the folder: checkpoints, the model, metrics and report; empty where there was none."""
    if not folder.is_dir():
        return []
    found = checkpoints_of(folder)
    found += [path for path in [folder / "final"] if (path / "modules.json").is_file()]
    if read_metrics(folder) is not None:
        found += [folder / name for name in _RESULTS if (folder / name).is_file()]
    return sorted(found + [path for path in [folder / START] if found and path.is_dir()])


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - resolve() would follow links
