"""The one way to check an argument: whole numbers, numbers, choices, limits, and the name that was probably meant.

NumPy's numbers are numbers everywhere, and booleans are none: ``True`` would pass as 1.
"""

import contextlib
import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

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
        mmtune.errors.ConfigError: batch_size=True: expected a whole number of 1 or more. Pass e.g. batch_size=1.
    """

    def fits(number: Any) -> bool:
        return is_whole(number) and number >= at_least

    if not fits(value):
        expected = " or ".join(filter(None, (or_else, f"a whole number of {at_least} or more")))
        raise ConfigError(f"{name}={value!r}: expected {expected}. {advise_number(name, value, fits, at_least)}")
    return int(value)  # type: ignore[call-overload]


def require_wholes(name: str, values: object, *, at_least: int = 1, or_else: str = "", example: str = "") -> list[int]:
    """``values`` as a list of Python integers, in their order.

    Args:
        name: Of the argument, for the message.
        values: What was given.
        at_least: The smallest value that can be.
        or_else: What else the argument takes, for the message, e.g. ``"'auto'"``.
        example: Values to show in the message; ``""`` is the number that was given alone.

    Raises:
        ConfigError: It is no series, or holds something that ``require_whole`` refuses.

    Example:
        >>> require_wholes("truncate_dims", (256, 64))
        [256, 64]
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        expected = " or ".join(filter(None, (or_else, "whole numbers in a list or tuple")))
        shown = example or f"[{int(values) if is_whole(values) else 10}]"  # type: ignore[call-overload] - as above
        raise ConfigError(f"{name}={values!r}: expected {expected}. Pass e.g. {name}={shown}.")
    given = list(values)
    for value in given:
        if not is_whole(value) or value < at_least:
            raise ConfigError(
                f"{name} holds {value!r}: expected whole numbers of {at_least} or more. Pass e.g. "
                f"{name}={example or '[10]'}."
            )
    return [int(value) for value in given]


def require_number(name: str, value: object, *, or_else: str = "") -> float:
    """``value`` as a Python float.

    Raises:
        ConfigError: It is no finite number, or a boolean.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        expected = " or ".join(filter(None, (or_else, "a finite number")))
        raise ConfigError(f"{name}={value!r}: expected {expected}. {advise_number(name, value, lambda _: True, 0.1)}")
    return float(value)


def advise_number(name: str, value: object, fits: Callable[[Any], bool], otherwise: float | str) -> str:
    """The next step after a number that can't be, as a sentence for a message.

    Args:
        name: Of the argument.
        value: What was given.
        fits: Whether the argument takes a number.
        otherwise: What to pass where no number near ``value`` fits, or the whole sentence.

    Example:
        >>> advise_number("seed", 4.2, is_whole, 42)
        'Pass e.g. seed=4.'
        >>> advise_number("learning_rate", "1e-5", lambda number: number > 0, 2e-5)
        'Pass e.g. learning_rate=1e-05, without quotes.'
    """
    meant = float("nan")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (str, numbers.Real)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            meant = float(value)
    near = (meant, abs(meant), round(meant), abs(round(meant))) if math.isfinite(meant) else ()
    found = next(filter(fits, near), otherwise)
    if isinstance(found, str):
        return found
    return f"Pass e.g. {name}={found!r}{', without quotes' if isinstance(value, str) else ''}."


def advise_flag(name: str, value: object) -> str:
    """The next step after something that is neither ``True`` nor ``False``, as a sentence for a message."""
    meant = str(value).strip().lower() not in ("no", "n", "off", "false", "0", "0.0", "none", "never", "")
    return f"Pass {name}={meant}{', without quotes' if isinstance(value, str) else ''}."


def require_flag(name: str, value: object, *, or_else: str = "") -> None:
    """Make sure that ``value`` is ``True`` or ``False``: a text such as ``"no"`` would count as true.

    Args:
        name: Of the argument, for the message.
        value: What was given.
        or_else: What else the argument takes, for the message, e.g. ``"'auto'"``.

    Raises:
        ConfigError: It is neither.
    """
    if not isinstance(value, bool):
        expected = " or ".join(filter(None, ("True", "False", or_else)))
        raise ConfigError(f"{name}={value!r}: expected {expected}. {advise_flag(name, value)}")


_MOST_SHOWN = 10
"""The choices that a message lists in full."""


def require_one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Make sure that ``value`` is one of the choices.

    Raises:
        ConfigError: It is none; the message lists them, or the nearest and a few where they are many.
    """
    choices = list(known)
    if isinstance(value, str) and value in choices:
        return
    begun = [choice for choice in choices if isinstance(value, str) and value and choice.startswith(value)]
    nearest = (begun or [nearest_name(value, choices, cutoff=0.6)])[0]
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    shown = choices if len(choices) <= _MOST_SHOWN else choices[: _MOST_SHOWN // 2]
    more = f" and {len(choices) - len(shown)} more" if len(choices) > len(shown) else ""
    raise ConfigError(f"{name}={value!r} is unknown. Expected one of {listed(shown)}{more}.{hint}")


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


def require_path(name: str, value: object, *, what: str = "a folder", advice: str = "") -> None:
    """Make sure that ``value`` is a text or a path.

    Args:
        name: Of the argument, for the message.
        value: What was given.
        what: What lies there, for the message.
        advice: The next step, for the message; ``""`` shows a path.

    Raises:
        ConfigError: It is something else, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        advice = advice or f"Pass e.g. {name}='my-folder'."
        raise ConfigError(f"{name}={shown(value)}: expected the path of {what}, as a text or a Path. {advice}")


def require_seed(name: str, value: object) -> int:
    """``value`` as a Python integer that every generator of random numbers takes.

    Raises:
        ConfigError: It is no whole number from 0 to 2**32 - 1, or a boolean.
    """

    def fits(number: Any) -> bool:
        return is_whole(number) and 0 <= number < 2**32

    if not fits(value):
        advice = advise_number(name, value, fits, 42)
        raise ConfigError(f"{name}={value!r:.80}: expected a whole number from 0 to 2**32 - 1. {advice}")
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


def shown(value: object) -> str:
    """A value for a message: as it is where that is short, else its type, as of a model or a dataset.

    Example:
        >>> shown(5), shown("x" * 100)
        ('5', 'a str')
    """
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def listed(names: Sequence[str]) -> str:
    """Names in quotes, for a message.

    Example:
        >>> print(listed(["text", "image"]))
        'text', 'image'
    """
    return ", ".join(map(repr, names))


class QueryId(str):
    """The id of a query where that of a document would stand: what is read of it is read as a document is."""


def item_of(item_id: str) -> str:
    """``"document"``, or ``"query"`` for a ``QueryId``: what a message says that an id is of."""
    return "query" if isinstance(item_id, QueryId) else "document"


def name_item(item_id: str) -> str:
    """An id with what it is of, as a message begins: ``"Document 'p1'"``, or ``"Query 'q1'"`` for a ``QueryId``."""
    return f"{item_of(item_id).capitalize()} {item_id!r}"


MODALITIES = ("text", "image", "audio", "video")
"""What documents are made of."""

PLURALS = {"text": "texts", "image": "images", "audio": "sounds", "video": "clips"}
"""What several of a modality are called in messages."""

MIXED = "mixed"
"""The kind of documents of which each is what it has."""


@dataclass(frozen=True)
class MediaLimits:
    """How much is read of a sound or a clip; ``None`` leaves that to the file.

    Attributes:
        max_seconds: The first seconds of it.
        fps: Frames a second of a clip, at most.
        max_frames: Frames of a clip at most, 2 or more, evenly spread over what is read of it.
        max_pixels: Width times height of a frame, at most.
        num_frames: Frames of a clip exactly, as some models take them; the last one is repeated where there are fewer.
        sampling_rate: Samples a second that a sound is resampled to.

    Raises:
        ConfigError: A limit is no positive number, or no whole one where frames, pixels or samples are counted.

    Example:
        >>> MediaLimits(max_seconds=30, fps=2).given()
        {'max_seconds': 30.0, 'fps': 2.0}
    """

    max_seconds: float | None = None
    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    num_frames: int | None = None
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if name in ("max_seconds", "fps"):
                checked: float = require_number(name, value, or_else="None")
                if checked <= 0:
                    raise ConfigError(f"{name}={value!r}: expected a number above 0, or None.")
            else:
                # models of video read pairs of frames
                least = 2 if name in ("max_frames", "num_frames") else 1
                checked = require_whole(name, value, at_least=least, or_else="None")
            # NumPy's numbers could not be saved with a model
            object.__setattr__(self, name, checked)

    def given(self) -> dict[str, Any]:
        """The limits that are not ``None``, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def within(self, other: "MediaLimits") -> "MediaLimits":
        """What both allow; how many frames and samples there are, ``other`` says where it does."""
        both: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            own, others = getattr(self, name), getattr(other, name)
            is_fixed = name in ("num_frames", "sampling_rate")
            both[name] = own if others is None else others if own is None or is_fixed else min(own, others)
        return MediaLimits(**both)


ALL_OF_IT = MediaLimits()
