"""From the signature and the docstring of a function to the flags of a command."""

import builtins
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from docstring_parser import DocstringStyle, parse
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from mmtune.arguments import nearest_name
from mmtune.command_line.commands import Command, load
from mmtune.command_line.spelling import Spelling, spell

_OF_SHELL = Group("For the shell", sort_key=2)
_HIDDEN = Group("Training arguments of Sentence Transformers", show=False)
_END_OF_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)\.\s+(?=[A-Z`])|;\s")
_LITERAL: Any = Literal  # its members are known only here
_UNSET = inspect.Parameter.empty


class UsageError(Exception):
    """A command was typed in a way that it can't be meant."""


@dataclass(frozen=True)
class Flag:
    """A parameter of a function as a shell has it.

    Attributes:
        name: In Python.
        spelling: What it can be.
        default: Of the function; what ``--config`` says in its place.
        help: What the docstring says.
        is_positional: Whether it may be given without its name.
        is_shown: Whether the help lists it.
        is_given: Whether ``default`` is of a file.
    """

    name: str
    spelling: Spelling
    default: Any = None
    help: str = ""
    is_positional: bool = False
    is_shown: bool = True
    is_given: bool = False

    @property
    def option(self) -> str:
        """As it is typed."""
        return "--" + self.name.replace("_", "-")

    def as_parameter(self) -> inspect.Parameter:
        """For the signature that cyclopts reads: plain types, the texts read by ``spelling``."""
        how: dict[str, Any] = {"name": self.option, "help": self.help, "required": self.default is _UNSET}
        # texts, which ``value_of`` reads: where pydantic is loaded, cyclopts holds values against the types
        hint: Any = str | None
        if self.spelling.is_flag:
            hint = bool | _LITERAL[self.spelling.choices] | None if self.spelling.choices else bool | None
        else:
            if self.spelling.elements is not None:
                hint = list[str] | None
                how |= {"consume_multiple": True, "negative_iterable": ""}
            # a method would be called without the type
            how |= {"converter": lambda _, tokens: self._checked([token.value for token in tokens])}
            how |= {} if self.is_positional else {"metavar": self.spelling.metavar}
        if not self.is_shown:
            how["group"] = _HIDDEN
        kinds = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        shown = None if self.default is _UNSET else self.default
        if not self.spelling.is_flag:
            has_default = shown is not None and shown not in ((), [], {}, "")
            how["show_default"] = (lambda _: " ".join(spell(self.default))) if has_default else False
            shown = None
        return inspect.Parameter(
            self.name, kinds[self.is_positional], default=shown, annotation=Annotated[hint, Parameter(**how)]
        )

    def _checked(self, texts: list[str]) -> str | list[str]:
        self.spelling.read(texts)
        return texts[0] if self.spelling.elements is None else texts

    def value_of(self, typed: Any) -> Any:
        """What was typed, as cyclopts gives it, for Python."""
        if self.spelling.is_flag or typed is None:
            return typed
        return self.spelling.read([typed] if isinstance(typed, str) else typed)


def flags_of(command: Command) -> dict[str, Flag]:
    """The flags of a command by their names in Python, in the order of the signatures.

    What a shell can't spell, such as a loss or a callback, is left out.
    """
    sources = [load(path) for path in (command.function, command.options_of) if path]
    models = (SentenceTransformer, MultiVectorEncoder, CrossEncoder)
    found: dict[str, Flag] = {}
    for source in sources:
        for name, parameter in inspect.signature(source).parameters.items():
            spelling = Spelling.of(_hint_of(parameter, source), models)
            if name in found or name == "self" or parameter.kind is parameter.VAR_KEYWORD or spelling is None:
                continue
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and source is sources[0]
            found[name] = Flag(name, spelling, parameter.default, is_positional=positional)
    texts = _read_docstrings(sources, found)
    found = {name: replace(flag, help=texts.get(name, "")) for name, flag in found.items()}
    return {**found, **{name: flag for name, flag in _flags_of_host(command).items() if name not in found}}


def _hint_of(parameter: inspect.Parameter, source: Any) -> Any:
    """The type of a parameter; in one that is written as a text, what is not imported at run time is an object."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    names = {**vars(builtins), **source.__globals__}
    unknown = {name: object for name in re.findall(r"\w+", parameter.annotation) if name not in names}
    return eval(parameter.annotation, {**names, **unknown})


def _flags_of_host(command: Command) -> dict[str, Flag]:
    """The training arguments of the host that a command passes on."""
    if not command.kind:
        return {}
    kind = load(command.kind)
    hints = typing.get_type_hints(kind.arguments_class)
    spellings = {field.name: Spelling.of(hints[field.name]) for field in fields(kind.arguments_class) if field.init}
    return {name: Flag(name, spelling, is_shown=False) for name, spelling in spellings.items() if spelling}


def _read_docstrings(sources: Sequence[Callable[..., Any]], names: Iterable[str]) -> dict[str, str]:
    """What the docstrings say of each parameter, in one sentence, with the words of a shell."""
    found: dict[str, str] = {}
    for source in sources:
        for entry in parse(inspect.getdoc(source) or "", style=DocstringStyle.GOOGLE).params:
            text = " ".join((entry.description or "").split())
            sentence = _END_OF_SENTENCE.split(text, maxsplit=1)[0].rstrip(".;")
            found.setdefault(entry.arg_name, _in_words_of_a_shell(sentence, names) + ".")
    return found


def _in_words_of_a_shell(text: str, names: Iterable[str]) -> str:
    """A sentence of a docstring: ``batch_size`` becomes ``--batch-size``, ``None`` ``none``, quotes and ticks go."""

    def spelled(match: re.Match[str]) -> str:
        word = match.group(1)
        if word in names:
            return "--" + word.replace("_", "-")
        return {"None": "none", "True": "true", "False": "false"}.get(word, word.strip("\"'"))

    return re.sub(r"``(.+?)``", spelled, text)


def with_defaults(flags: Mapping[str, Flag], values: Mapping[str, Any], source: str) -> dict[str, Flag]:
    """The flags with values of a file as their defaults.

    Raises:
        UsageError: A name is none of the flags, or a value can't be.
    """
    changed = dict(flags)
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in flags:
            near = nearest_name(name, flags)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UsageError(f"{source} has {key!r}, which is no argument of this command.{hint}")
        try:
            known = flags[name].spelling.read(spell(value)) if value not in ([], ()) else []
        except ValueError as error:
            raise UsageError(f"{source} has {key} = {value!r}: {error}") from error
        changed[name] = replace(flags[name], default=known, is_given=True)
    return changed


def make_target(command: Command, flags: Mapping[str, Flag]) -> Callable[..., None]:
    """What cyclopts reads as the function of a command: its flags, and those that every command has."""

    def target(*positional: Any, **options: Any) -> None: ...

    own = [flag.as_parameter() for flag in flags.values()]
    own.sort(key=lambda parameter: parameter.kind)  # positional ones first, else in their order
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, how])
        for name, hint, default, how in (
            (
                "config",
                str | None,
                None,
                Parameter(
                    help="A TOML file of arguments, or the metrics.json of an earlier run. Flags go over it.",
                    group=_OF_SHELL,
                ),
            ),
            ("json", bool, False, Parameter(help="Print the result as JSON.", negative="", group=_OF_SHELL)),
        )
    ]
    signature = inspect.Signature([*own, *shared])
    target.__doc__ = command.summary
    target.__signature__ = signature  # type: ignore[attr-defined]
    target.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return target
