"""Types of Python as a shell can spell them: which flag a parameter becomes, and what a text on it means."""

import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

NONE = types.NoneType
_PLAIN: tuple[Any, ...] = (bool, int, float, str)


@dataclass(frozen=True)
class Spelling:
    """What the value of a flag can be.

    Attributes:
        choices: Words that stand for themselves, e.g. ``"auto"``.
        plain: Of ``bool``, ``int``, ``float`` and ``str`` those that fit.
        elements: The same for the elements of a list; ``None`` where it takes no list.
        is_mapping: Whether it takes a mapping, spelled as JSON.
        is_optional: Whether ``none`` stands for ``None``.
        models: Of the types of models those that Python takes in memory, and not by path: the shell gives the path.
    """

    choices: tuple[str, ...] = ()
    plain: tuple[type, ...] = ()
    elements: "Spelling | None" = None
    is_mapping: bool = False
    is_optional: bool = False
    models: tuple[type, ...] = ()

    @classmethod
    def of(cls, hint: Any, models: Sequence[type] = ()) -> "Spelling | None":
        """How a shell spells a type; ``None`` where it can't, as with a function or an object of the host.

        Args:
            hint: The type in a signature, a union or one alone.
            models: Types of models, which a shell gives by their paths.
        """
        members = list(_members(hint))
        plain = tuple(each for each in _PLAIN if each in members)
        # what takes anything takes a path, as a dataset
        if any(each is Any or _is_path(each) for each in members) and str not in plain:
            plain = (*plain, str)
        lists = [each for each in members if _origin_in(each, (list, tuple, Sequence, Iterable))]
        elements = next(filter(None, (cls.of(typing.get_args(each)[0], models) for each in lists)), None)
        choices = tuple(word for each in members for word in _words(each))
        mappings = [each for each in members if _origin_in(each, (dict, Mapping))]
        is_mapping = any(cls.of(typing.get_args(each)[-1]) is not None for each in mappings if typing.get_args(each))
        is_mapping = is_mapping or any(each is dict for each in members)
        by_path = () if str in plain else tuple(each for each in members if each in models)
        if not (plain or choices or elements or is_mapping or by_path):
            return None
        return cls(choices, plain, elements, is_mapping, NONE in members, by_path)

    @property
    def is_flag(self) -> bool:
        """Whether it needs no value: ``--overwrite``, ``--no-overwrite``."""
        return bool in self.plain

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        inner = self.elements.metavar + "..." if self.elements else ""
        words = [*self.choices, *(["none"] if self.is_optional and self.choices else [])]
        kinds = {int: "N", float: "X", str: "TEXT"}
        words += [kinds[each] for each in self.plain if each in kinds and not (each is int and float in self.plain)]
        return "|".join(word for word in (*words, inner, "PATH" if self.models else "") if word)

    def read(self, texts: Sequence[str]) -> Any:
        """What texts on a flag mean.

        Raises:
            ValueError: They mean nothing; the message says what was expected.
        """
        if len(texts) == 1 and self._reads(texts[0]):
            return self._read(texts[0])
        if self.elements is not None and all(map(self.elements._reads, texts)):
            return [self.elements._read(text) for text in texts]
        wrong = " ".join(texts)
        raise ValueError(f"{wrong!r} is not {self.describe()}.")

    def describe(self) -> str:
        """What can be given, in words."""
        words = [*self.choices, *(["none"] if self.is_optional else [])]
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        words += [names[each] for each in self.plain if not (each is int and float in self.plain)]
        if self.elements is not None:
            words.append(f"a list, each {self.elements.describe()}")
        words += ["a mapping in JSON"] * self.is_mapping + ["the path of a model"] * bool(self.models)
        return " or ".join(words)

    def _reads(self, text: str) -> bool:
        try:
            self._read(text)
        except ValueError:
            return False
        return True

    def _read(self, text: str) -> Any:
        word = text.lower()
        if text in self.choices:
            return text
        if self.is_optional and word in ("none", "null"):
            return None
        if self.is_flag and word in ("true", "false", "yes", "no"):
            return word in ("true", "yes")
        if self.is_mapping and text.lstrip().startswith("{"):
            return json.loads(text)
        if int in self.plain and text.removeprefix("-").isdecimal():
            return int(text)
        if float in self.plain:
            return float(text)
        if str in self.plain or self.models:
            return text
        raise ValueError(text)


def spell(value: Any) -> list[str]:
    """The texts that stand for a value on a command line, so that reading them gives it again."""
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in spell(each)]
    if value is None or isinstance(value, bool):
        return [str(value).lower()]
    return [repr(value) if isinstance(value, float) else str(value)]


def _members(hint: Any) -> Iterable[Any]:
    """The members of a union, of aliases and of unions in it; ``hint`` itself where it is none."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from _members(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType):
        for each in typing.get_args(hint):
            yield from _members(each)
    else:
        yield hint


def _words(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return tuple(each for each in typing.get_args(hint) if isinstance(each, str))
    values = [member.value for member in hint] if isinstance(hint, type) and issubclass(hint, Enum) else []
    return tuple(each for each in values if isinstance(each, str))


def _is_path(hint: Any) -> bool:
    return getattr(typing.get_origin(hint) or hint, "__name__", "") in ("PathLike", "Path")


def _origin_in(hint: Any, kinds: tuple[type, ...]) -> bool:
    return typing.get_origin(hint) in kinds
