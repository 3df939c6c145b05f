"""From what was typed to an exit code: 0, 1 for an error, 2 for wrong usage, 3 for a regression."""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError, UnknownOptionError

from mmtune.arguments import nearest_name
from mmtune.command_line.commands import COMMANDS, Command, Outcome, load
from mmtune.errors import MmtuneError

if TYPE_CHECKING:
    from mmtune.command_line.parameters import Flag

OK, ERROR, WRONG_USAGE = 0, 1, 2
_HELP = """Finetune models that find pages, and know that they got better.

Exit codes: 0, 1 for an error, 2 for wrong usage, 3 for a regression."""

_MORE_FLAGS = """Every training argument of Sentence Transformers is a flag too, e.g. --learning-rate 2e-5.
Lists take several words, e.g. --matryoshka-dims 256 64. Mappings are JSON, e.g. '{"en": "pages/en", "fr": "pages/fr"}'.
"""


def main(typed: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        typed: What stands after ``mmtune``; ``None`` is that of this process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if typed is None else typed)
    named = {command.name: command for command in COMMANDS}
    name = next((word for word in words if not word.startswith("-")), None)
    if not words or words[0].startswith("-") or name is None:
        return _run_root(words, named)
    if words[0] not in named:
        near = nearest_name(name, named)
        hint = f" Did you mean {near}?" if near else ""
        return _refuse(f"{name!r} is no command. Expected one of {', '.join(named)}.{hint}", "mmtune")
    return _run(named[name], words[1:])


def _app(**options: Any) -> App:
    return App("mmtune", version=lambda: version("mmtune"), help_format="plaintext", **options)


def _run_root(words: list[str], named: Mapping[str, Command]) -> int:
    """The help and the version; no command is imported for them."""
    app = _app(help=_HELP)
    for name, command in named.items():
        app.command(App(name, help=command.summary), name=name)
    try:
        app(words or ["--help"], exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _refuse(str(error), "mmtune")
    return OK


def _run(command: Command, words: list[str]) -> int:
    """A command from what was typed after its name."""
    from mmtune.command_line.parameters import UsageError, flags_of, make_target, with_defaults
    from mmtune.command_line.settings import read_arguments

    usage = f"mmtune {command.name}"
    if is_first_process():
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
        logging.getLogger("mmtune").setLevel(logging.INFO)
    flags = flags_of(command)
    try:
        path = _find_config(words)
        if path is not None:
            typed_names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
            flags = with_defaults(flags, read_arguments(path, command.name, flags, typed_names), path)
        app = _app(help_epilogue=_MORE_FLAGS if command.kind else None)
        app.command(make_target(command, flags), name=command.name)
        found, bound, _ = app.parse_args([command.name, *words], exit_on_error=False, print_error=False)
        if found.__name__ != "target":  # the help, or the version
            found(*bound.args, **bound.kwargs)
            return OK
    except UnknownOptionError as error:
        return _refuse(_explain_unknown(command, flags, error), usage)
    except (UsageError, CycloptsError) as error:
        return _refuse(str(error), usage)
    if not (command.is_shared or is_first_process()):
        return OK
    shell = {name: bound.arguments.pop(name) for name in ("config", "json") if name in bound.arguments}
    defaults = {name: flag.default for name, flag in flags.items() if path is not None and flag.is_given}
    typed = {name: flags[name].value_of(value) for name, value in bound.arguments.items()}
    return _call(command, flags, {**defaults, **typed}, as_json=shell.get("json", False))


def _call(command: Command, flags: Mapping[str, "Flag"], arguments: dict[str, Any], *, as_json: bool) -> int:
    """Call the function, and say what came of it; of several processes the first one does."""
    stream = sys.stdout
    try:
        given = {name: _opened(flags[name], value, arguments) for name, value in arguments.items()}
        outcome = command.show(load(command.function)(**given), arguments)
    except (MmtuneError, OSError) as error:
        outcome = Outcome(f"error: {error}", {"error": str(error), "type": type(error).__name__}, ERROR)
        stream = sys.stdout if as_json else sys.stderr
    if is_first_process():
        stream.write((json.dumps(outcome.data, indent=2, default=str) if as_json else outcome.text) + "\n")
    return outcome.exit_code


def _opened(flag: "Flag", value: Any, arguments: Mapping[str, Any]) -> Any:
    """A value for Python: where it takes a model in memory, the model that lies at the path."""
    if not flag.spelling.models or value is None:
        return value
    from sentence_transformers import CrossEncoder

    from mmtune.evaluation.pipeline import open_retriever
    from mmtune.models.opening import open_checkpoint
    from mmtune.models.rerankers import build_reranker, is_reranker

    is_alone = flag.spelling.models == (CrossEncoder,)
    if is_alone or (CrossEncoder in flag.spelling.models and is_reranker(open_checkpoint(value))):
        return build_reranker(value)
    return open_retriever(value, arguments.get("documents", "image"))


def _find_config(words: Sequence[str]) -> str | None:
    """The file of ``--config``, which must be known before the other flags are read."""
    for at, word in enumerate(words):
        if word == "--":
            break
        if word.startswith("--config="):
            return word.partition("=")[2]
        if word == "--config":
            return next(iter(words[at + 1 : at + 2]), None)
    return None


def _explain_unknown(command: Command, flags: Mapping[str, "Flag"], error: UnknownOptionError) -> str:
    """What a flag that there is not was probably meant to be, as ``finetune`` itself would say it."""
    typed = (error.token.keyword or error.token.value).split("=")[0]
    name = typed.lstrip("-").replace("-", "_")
    if command.kind:
        from mmtune.training.host_arguments import hint_for

        hint = hint_for(name, error.token.value, flags, load(command.kind))
    else:
        near = nearest_name(name, flags)
        hint = f"Did you mean {near!r}?" if near else f"See mmtune {command.name} --help."

    def spelled(match: re.Match[str]) -> str:
        known = flags.get(match.group(1))
        return known.option if known else match.group()

    return f"{typed} is no flag of it. " + re.sub(r"'(\w+)'", spelled, hint)


def _refuse(message: str, usage: str) -> int:
    if is_first_process():
        sys.stderr.write(f"{usage}: {message}\nSee {usage} --help.\n")
    return WRONG_USAGE


def is_first_process() -> bool:
    """Whether this process is the only one, or the one that speaks."""
    return os.environ.get("RANK", "0") == "0"
