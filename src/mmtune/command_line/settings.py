"""Arguments from a file: TOML, or what an earlier run left behind."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cyclopts.config import Toml

from mmtune.arguments import listed
from mmtune.command_line.parameters import UsageError

CALL = "call"


def read_arguments(path: str, command: str, flags: Iterable[str], given: Iterable[str]) -> dict[str, Any]:
    """The arguments that a file holds, by their names in Python or as flags.

    Args:
        path: A TOML file, or the ``metrics.json`` of a run.
        command: The name of the command that they are for.
        flags: The names that the command knows, as Python has them.
        given: What flags give besides, by the names in Python: it goes over the file.

    Raises:
        UsageError: There is no such file, it can't be read, or it is of a run of another command.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--config {path}: there is no such file. Expected a TOML file or the metrics.json of a run.")
    try:
        if file.suffix == ".json":
            return _read_run(file, json.loads(file.read_text("utf-8")), command, flags, given)
        return dict(Toml(file, must_exist=True).config)
    except UsageError:
        raise
    except Exception as error:  # each reader of TOML has its own
        raise UsageError(f"--config {path} can't be read: {error}") from error


def _read_run(file: Path, metrics: Any, command: str, flags: Iterable[str], given: Iterable[str]) -> dict[str, Any]:
    try:
        call = metrics["settings"][CALL]
        function, in_memory = call["function"], [name for name in call["in_memory"] if name not in given]
        # what only Python can give is there as well, empty
        arguments = {name: value for name, value in call["arguments"].items() if name in flags or value}
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"--config {file} does not say what its run was called with. Expected the metrics.json of finetune or "
            "finetune-reranker; write a TOML file for others."
        ) from error
    if function.replace("_", "-") != command:
        raise UsageError(f"--config {file} is of {function}, and this is {command}. Pass it to mmtune {function}.")
    if in_memory:
        raise UsageError(
            f"--config {file}: that run had {listed(in_memory)} as objects in Python, which no file holds. Give what a "
            "shell can, by its flag; a loss, callbacks or built training arguments need Python."
        )
    return arguments
