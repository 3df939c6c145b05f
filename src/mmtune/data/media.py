"""Sounds and clips: encoded until they are used."""

import importlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from mmtune.arguments import ALL_OF_IT, MediaLimits, item_of, name_item
from mmtune.data.images import WHAT, missing_content, require_file
from mmtune.errors import MediaDecodeError, MissingExtraError


@dataclass(frozen=True)
class Look:
    """What one look at a sound or a clip found.

    Attributes:
        digest: Of its samples, or of some of its frames: the same in any container that keeps these.
        says_nothing: Whether a sound is silent, or the frames of a clip hardly differ.
    """

    digest: str
    says_nothing: bool


@dataclass(frozen=True)
class Recording(ABC):
    """A sound or a clip that is decoded for each that asks, so that no more than its encoded bytes are held.

    Attributes:
        encoded: A row of an ``Audio(decode=False)`` or ``Video(decode=False)`` column: ``{"bytes", "path"}``.
        document_id: Named in errors.
        limits: How much of it is read, whoever reads it.
    """

    kind: ClassVar[str]
    encoded: Mapping[str, Any] | None
    document_id: str
    limits: MediaLimits = ALL_OF_IT

    @abstractmethod
    def decode(self, limits: MediaLimits = ALL_OF_IT) -> dict[str, Any]:
        """It as the host takes it, within its own limits and these.

        Raises:
            MediaDecodeError: It can't be decoded; the message names the document.
            MissingExtraError: A package that decodes it is not installed.
        """

    @abstractmethod
    def is_cut(self, limits: MediaLimits) -> bool:
        """Whether something of it is left out, from its header; what can't be read is told by ``decode``."""

    @abstractmethod
    def check(self) -> None:
        """Make sure that its beginning can be decoded.

        Raises:
            MediaDecodeError: It can't.
        """

    @abstractmethod
    def look(self) -> Look:
        """What it holds, for an audit: all samples of a sound, 16 frames of a clip.

        Raises:
            MediaDecodeError: It can't be decoded.
        """

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """What decoders read: a path, or a file in memory; their errors become those of the document.

        Raises:
            MediaDecodeError: There is nothing to read, or it can't be decoded.
        """
        content, path = ((self.encoded or {}).get(name) for name in ("bytes", "path"))
        if content is None and not path:
            raise missing_content(self.document_id, self.kind)
        if content is None:
            require_file(str(path), self.document_id, self.kind)
        try:
            yield str(path) if content is None else io.BytesIO(content)
        except (MediaDecodeError, MissingExtraError):
            raise
        except Exception as error:  # a damaged file can raise nearly anything from inside a codec
            found = f"file {path!r}" if content is None else f"{len(content)} bytes, starting {content[:8]!r}"
            reason = re.sub(r"<_io\.BytesIO object at \w+>", "the bytes", str(error))
            raise self.error(f"can't be decoded as {WHAT[self.kind]} ({found}): {reason}") from error

    def error(self, problem: str) -> MediaDecodeError:
        """An error of this document."""
        return MediaDecodeError(
            f"{name_item(self.document_id)} {problem.rstrip('.')}. Replace the file, or leave the "
            f"{item_of(self.document_id)} out."
        )


@cache
def load_decoder(package: str, what: str, extra: str) -> Any:
    """A package that decodes, which is an extra.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} need {package}, which is not installed. Run: pip install {package} (in a clone of mmtune: "
            f'pip install ".[{extra}]")'
        ) from error
