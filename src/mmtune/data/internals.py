"""The undocumented parts of ``datasets`` that are needed, and why; seen in version 5.2."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from datasets.utils._dill import pklregister

Class = TypeVar("Class", bound=type)


def stored_positions(rows: Dataset) -> np.ndarray | None:
    """The stored row behind each row, int64; ``None`` where the rows stand as they are stored.

    Without it, ids could only be laid beside shuffled images by writing the images anew. No public accessor exists.
    """
    mapping = rows._indices
    return None if mapping is None else mapping.column(0).to_numpy().astype(np.int64)


def fingerprint(rows: Dataset) -> str:
    """What ``datasets`` tells one content from another by. No public accessor exists."""
    return rows._fingerprint


def hashed_by(key: Callable[[Any], str]) -> Callable[[Class], Class]:
    """Lets ``datasets`` hash objects of a class by a key instead of by their pickle.

    It hashes the transform of a dataset whenever rows are selected or shuffled: with a corpus in memory that pickled
    every image. There is no public way to say how an object is hashed.
    """

    def register(cls: Class) -> Class:
        pklregister(cls)(lambda pickler, value: pickler.save_reduce(str, (key(value),), obj=value))
        return cls

    return register
