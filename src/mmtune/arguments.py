"""The one way to check an argument: whole numbers, numbers, choices, and the name that was probably meant.

NumPy's numbers are numbers everywhere, and booleans are none: ``True`` would pass as 1.
"""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence

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
