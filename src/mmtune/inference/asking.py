"""Many questions about many pages, asked side by side, and none of them twice."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from mmtune.data.arrow import column
from mmtune.data.documents import DocumentKind
from mmtune.data.identity import text_digest, usual_kind
from mmtune.data.images import DECODING, EncodedImages, decode_page
from mmtune.data.tables import has_content, has_file
from mmtune.errors import ConfigError, DatasetError, ImageDecodeError
from mmtune.inference.generators import Generator, generator_name
from mmtune.inference.store import ReplyStore

_HOPELESS = 20
"""After so many failures, and no reply, nobody is there."""


class Call(NamedTuple):
    """An instruction about the page in a row of the corpus."""

    row: int
    instruction: str


@dataclass(frozen=True)
class Failure:
    """A call that was not answered, and why."""

    document_id: str
    reason: str


def everything_of(corpus: Dataset) -> DocumentKind:
    """What a document is made of for whom reads all that there is of it."""
    return "text+image" if {"text", "image"} <= {*corpus.column_names} else usual_kind(corpus)


class Pages:
    """Image, text and digest of the documents of a corpus: all that there is, for whom reads it as a person would.

    Args:
        corpus: A table with ``document_id`` and ``image`` (encoded) and/or ``text``.

    Raises:
        DatasetError: A document is a sound or a clip alone; the message names it.
    """

    def __init__(self, corpus: Dataset) -> None:
        names = [name for name in ("document_id", "image", "text") if name in corpus.column_names]
        shows_nothing = has_file(corpus)
        for name in names[1:]:
            shows_nothing &= ~has_content(corpus, name)
        if shows_nothing.any():
            unseen = column(corpus, "document_id").filter(pa.array(shows_nothing))
            raise DatasetError(
                f"{len(unseen)} documents are sounds or clips alone, e.g. {unseen[0].as_py()!r}, and a generator is "
                "shown images and texts. Give them a text, such as what is said in them, or leave them out."
            )
        self._corpus = corpus.with_format(None).select_columns(names)
        self._images = EncodedImages(corpus) if "image" in names else None
        self._digest_by_row: dict[int, str] = {}
        self._lock = threading.Lock()

    def document_id(self, row: int) -> str:
        """The id of the document in a row."""
        return self._row(row)["document_id"]

    def read(self, row: int) -> tuple[Image.Image | None, str | None]:
        """The page as an image, and its text; ``None`` for what the document has not.

        Raises:
            ImageDecodeError: The page is no readable image, or there is neither image nor text.
        """
        found = self._row(row)
        text = (found.get("text") or "").strip() or None
        has_image = any((found.get("image") or {}).values())
        if text and not has_image:
            return None, text
        return decode_page(found.get("image"), found["document_id"]), text

    def digest(self, row: int) -> str:
        """A digest of image and text, 32 hexadecimal digits, without decoding.

        Raises:
            ImageDecodeError: The file of the page can't be read.
        """
        if row not in self._digest_by_row:
            found = self._row(row)
            has_image = self._images is not None and any((found.get("image") or {}).values())
            content = self._images.read(row) if self._images is not None and has_image else b""
            parts = DECODING, xxhash.xxh3_128_hexdigest(content), text_digest(found.get("text") or "")
            self._digest_by_row[row] = text_digest(" ".join(map(str, parts)))
        return self._digest_by_row[row]

    def turn(self, row: int) -> int:
        """A number of its content, so that neither order nor other pages decide what is asked about it."""
        try:
            return int(self.digest(row)[:8], 16)
        except ImageDecodeError:  # reported when it is read
            return 0

    def _row(self, row: int) -> dict[str, Any]:
        with self._lock:
            return self._corpus[row]


class Asker:
    """A generator or a judge, asked about pages by several threads; replies are kept as they come.

    Args:
        generator: Whom to ask.
        pages: What about.
        store: The folder of replies, by page content, instruction and name of the generator; ``None`` keeps none.
        max_workers: Calls at a time.
        show_progress_bar: Whether to show a bar, with the tokens spent where the generator counts them.

    Raises:
        ConfigError: The store can't be written to, or nothing tells the generator from others.
    """

    def __init__(
        self,
        generator: Generator,
        pages: Pages,
        *,
        store: str | os.PathLike[str] | None,
        max_workers: int,
        show_progress_bar: bool,
    ) -> None:
        self.name = generator_name(generator)
        if store is not None and self.name is None:
            raise ConfigError(
                f"store={str(store)!r}: replies are kept by the name of who gave them, and {generator!r:.80} has none. "
                "Give it an attribute `name`, or pass a function that is defined in a module, not inside another."
            )
        self._generator, self._pages = generator, pages
        self._store = None if store is None else ReplyStore(store)
        self._max_workers, self._shows_progress = max_workers, show_progress_bar
        self._has_answered = False

    def ask(self, calls: Sequence[Call], what: str) -> list[str | Failure]:
        """The reply to each call, in their order; equal calls are made once.

        Args:
            calls: What to ask.
            what: What is done, for the progress bar.

        Raises:
            ConfigError: No call was answered, nor one of those before, the generator refuses all, or the store can't be
                written to.
        """
        replies: dict[Call, str | Failure] = {}
        pool = ThreadPoolExecutor(self._max_workers)
        try:
            call_by_future = {pool.submit(self._reply, call): call for call in dict.fromkeys(calls)}
            with tqdm(total=len(call_by_future), desc=what, disable=not self._shows_progress, leave=False) as bar:
                for future in as_completed(call_by_future):
                    reply = replies[call_by_future[future]] = future.result()
                    self._has_answered = self._has_answered or isinstance(reply, str)
                    if not self._has_answered and len(replies) >= _HOPELESS:
                        break
                    tokens = getattr(self._generator, "tokens_spent", None)
                    if tokens is not None:
                        bar.set_postfix_str(f"{tokens:,} tokens")
                    bar.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        failed = next((reply for reply in replies.values() if isinstance(reply, Failure)), None)
        if failed is not None and not self._has_answered:
            raise ConfigError(
                f"{what}: none of {len(replies)} calls to {self.name or self._generator!r} was answered. Document "
                f"{failed.document_id!r}: {failed.reason}"
            )
        return [replies[call] for call in calls]

    def _reply(self, call: Call) -> str | Failure:
        try:
            key = text_digest(f"{self.name}\n{call.instruction}\n{self._pages.digest(call.row)}")
            stored = None if self._store is None else self._store.load(key)
            if stored is not None:
                return stored
            reply = self._generator(*self._pages.read(call.row), call.instruction)
            if not isinstance(reply, str):
                raise TypeError(f"the reply is a {type(reply).__name__}, expected a text")
            if self._store is not None:
                document_id = self._pages.document_id(call.row)
                self._store.save(key, reply, document_id=document_id, name=str(self.name), instruction=call.instruction)
            return reply
        except ConfigError:
            raise
        except Exception as error:  # a generator may raise anything, and one page must not cost the others
            return Failure(self._pages.document_id(call.row), f"{type(error).__name__}: {error}")
