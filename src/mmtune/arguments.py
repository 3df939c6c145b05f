"""The one way to check an argument: whole numbers, numbers, choices, and the name that was probably meant.

NumPy's numbers are numbers everywhere, and booleans are none: ``True`` would pass as 1.
"""

import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from mmtune.errors import ConfigError


def require_whole(name: str, value: object, *, at_least: int = 1, or_else: str = "") -> int:
    """``value`` as a Python integer.

    Args:
        name: Of the argument, for the message.
        value: What was given.
        at_least: The smallest value that can be.
        or_else: What else the argument takes, for the message, e.g. ``"'auto'"``.

    Raises:
        ConfigError: It is no whole number, a boolean, or smaller.

    Example:
        >>> import numpy as np
        >>> require_whole("batch_size", np.int64(16))
        16
        >>> require_whole("batch_size", True)
        Traceback (most recent call last):
        mmtune.errors.ConfigError: batch_size=True: expected a whole number of 1 or more.
    """
    if not is_whole(value) or value < at_least:  # type: ignore[operator] - a number, as is_whole has found
        expected = " or ".join(filter(None, (or_else, f"a whole number of {at_least} or more")))
        raise ConfigError(f"{name}={value!r}: expected {expected}.")
    return int(value)  # type: ignore[call-overload]


def require_wholes(name: str, values: object, *, at_least: int = 1, or_else: str = "") -> list[int]:
    """``values`` as a list of Python integers, in their order.

    Args:
        name: Of the argument, for the message.
        values: What was given.
        at_least: The smallest value that can be.
        or_else: What else the argument takes, for the message, e.g. ``"'auto'"``.

    Raises:
        ConfigError: It is no series, or holds something that ``require_whole`` refuses.

    Example:
        >>> require_wholes("truncate_dims", (256, 64))
        [256, 64]
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        expected = " or ".join(filter(None, (or_else, "whole numbers in a list or tuple, e.g. (10,)")))
        raise ConfigError(f"{name}={values!r}: expected {expected}.")
    given = list(values)
    for value in given:
        if not is_whole(value) or value < at_least:
            raise ConfigError(f"{name} holds {value!r}: expected whole numbers of {at_least} or more.")
    return [int(value) for value in given]


def require_number(name: str, value: object, *, or_else: str = "") -> float:
    """``value`` as a Python float.

    Raises:
        ConfigError: It is no finite number, or a boolean.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        expected = " or ".join(filter(None, (or_else, "a finite number")))
        raise ConfigError(f"{name}={value!r}: expected {expected}.")
    return float(value)


def require_flag(name: str, value: object) -> None:
    """Make sure that ``value`` is ``True`` or ``False``: a text such as ``"no"`` would count as true.

    Raises:
        ConfigError: It is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected True or False.")


def require_one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Make sure that ``value`` is one of the choices.

    Raises:
        ConfigError: It is none; the message lists them.
    """
    choices = list(known)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown. Expected one of {', '.join(map(repr, choices))}.")


def require_type(name: str, value: object, types: type | tuple[type, ...], *, expected: str) -> None:
    """Make sure that ``value`` is of one of these types; ``expected`` says in words what is, for the message.

    Raises:
        ConfigError: It is of another.
    """
    if not isinstance(value, types):
        raise ConfigError(f"{name}={value!r:.80}: expected {expected}.")


def require_mapping(name: str, value: object, *, expected: str, of: type = object) -> None:
    """Make sure that ``value`` maps texts to values of a type.

    Args:
        name: Of the argument, for the message.
        value: What was given.
        expected: What it should be, for the message.
        of: The type of its values.

    Raises:
        ConfigError: It is no mapping, or holds something else.

    Example:
        >>> require_mapping("prompts", {"query": 5}, of=str, expected="prompts by name")
        Traceback (most recent call last):
        mmtune.errors.ConfigError: prompts={'query': 5} is no mapping of texts. Expected prompts by name.
    """
    pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(part, of) for key, part in pairs):
        kind = "mapping of texts" if of is str else "mapping by names"
        raise ConfigError(f"{name}={value!r:.80} is no {kind}. Expected {expected}.")


def require_path(name: str, value: object, *, what: str = "a folder") -> None:
    """Make sure that ``value`` is a text or a path.

    Raises:
        ConfigError: It is something else, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigError(f"{name}={value!r:.80}: expected the path of {what}, as a text or a Path.")


def require_seed(name: str, value: object) -> int:
    """``value`` as a Python integer that every generator of random numbers takes.

    Raises:
        ConfigError: It is no whole number from 0 to 2**32 - 1, or a boolean.
    """
    if not is_whole(value) or not 0 <= value < 2**32:  # type: ignore[operator] - a number, as is_whole has found
        raise ConfigError(f"{name}={value!r:.80}: expected a whole number from 0 to 2**32 - 1.")
    return int(value)  # type: ignore[call-overload]


_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\|<>:"*?]')
_LONGEST_NAME = 64


def require_name(what: str, value: object) -> str:
    r"""``value``, after making sure that it can be part of a metric key, of a file's name and of a table.

    Args:
        what: What has the name, for the message.
        value: What was given.

    Raises:
        ConfigError: It is no text, empty, longer than 64 bytes, begins or ends with a space or a dot, or holds a line
            break or one of ``/ \ | < > : " * ?``.

    Example:
        >>> require_name("name", "vdr-fr")
        'vdr-fr'
        >>> require_name("name", "a/b")
        Traceback (most recent call last):
        mmtune.errors.ConfigError: name='a/b' holds '/'. Names become part of metric keys, file names and tables: ...
    """
    wrong = f"{what}={value!r:.80}"
    if not isinstance(value, str):
        raise ConfigError(f"{wrong}: expected a text such as 'vdr'.")
    rule = (
        f"Names become part of metric keys, file names and tables: give it another, of {_LONGEST_NAME} bytes at most."
    )
    found = _NOT_IN_NAMES.search(value)
    if found is not None:
        raise ConfigError(f"{wrong} holds {found.group()!r}. {rule}")
    if not value or value != value.strip(" .") or len(value.encode()) > _LONGEST_NAME:
        raise ConfigError(f"{wrong} is empty, too long, or begins or ends with a space or a dot. {rule}")
    return value


def nearest_name(name: object, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """The name that was probably meant, or ``None`` where none is alike.

    Args:
        name: What was given.
        known: The names that there are.
        cutoff: How alike they must be, from 0 to 1; 0 finds one always.

    Example:
        >>> nearest_name("learing_rate", ["learning_rate", "seed"])
        'learning_rate'
    """
    return next(iter(difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=cutoff)), None)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, NumPy's too; a boolean is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def listed(names: Sequence[str]) -> str:
    """Names in quotes, for a message.

    Example:
        >>> print(listed(["text", "image"]))
        'text', 'image'
    """
    return ", ".join(map(repr, names))
