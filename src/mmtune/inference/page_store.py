"""What image processors made of pages, kept by content: in memory or in a folder, within a budget of bytes."""

import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

_SHARE = 4
"""A store takes at most this part of the memory or the disk that is free: 1 in 4."""
_MOST_FOR_A_RUN = 32 << 30
"""And on a disk, for one run, no more than 32 GiB: what is evaluated a dozen times is read first and fits."""


@contextmanager
def open_page_store(
    choice: str | os.PathLike[str] | None, folder: Path, *, is_shared: bool
) -> Iterator["PageStore | None"]:
    """The store of a run.

    Args:
        choice: ``"auto"``, a folder for this run and others, or ``None`` for no store.
        folder: Of the run.
        is_shared: Whether several processes read pages; what each keeps in memory, the others do not see.
    """
    if choice is None:
        yield None
    elif choice != "auto":
        yield FolderPageStore(choice, _free_disk(Path(choice)))
    elif is_shared:
        own = folder / ".pages"
        try:
            yield FolderPageStore(own, min(_MOST_FOR_A_RUN, _free_disk(folder)))
        finally:
            shutil.rmtree(own, ignore_errors=True)
    else:
        yield MemoryPageStore(_free_memory())


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE
    except (AttributeError, ValueError, OSError):  # not on Linux
        return 1 << 30


def _free_disk(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free // _SHARE


class PageStore(ABC):
    """Keeps arrays by name until it holds ``max_bytes``; what comes later is not kept.

    Nothing that is held makes room for something new: an epoch reads all pages in turn, so that what was put in last
    would be gone before it is asked for again.

    Attributes:
        max_bytes: How much it holds at most.
        num_bytes: How much it was given so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._lock = threading.Lock()

    @abstractmethod
    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept under a name, or ``None``."""

    def put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays, if there is room."""
        size = sum(array.nbytes for array in arrays.values())
        with self._lock:
            if self.num_bytes + size > self.max_bytes:
                return
            self.num_bytes += size
        self._keep(name, arrays)

    @abstractmethod
    def _keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> "PageStore":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class MemoryPageStore(PageStore):
    """Keeps arrays in the memory of this process."""

    def __str__(self) -> str:
        return f"in memory, up to {self.max_bytes / 1e9:.1f} GB"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._arrays_by_name: dict[str, dict[str, np.ndarray]] = {}

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept under a name, or ``None``."""
        return self._arrays_by_name.get(name)

    def _keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays_by_name[name] = dict(arrays)

    def __getstate__(self) -> dict[str, Any]:
        # a process that is spawned begins with nothing, which is quicker than to send it all
        return {**super().__getstate__(), "_arrays_by_name": {}, "num_bytes": 0}


class FolderPageStore(PageStore):
    """Keeps arrays in files that several processes, and later runs, read and write together.

    A file appears under its name only when it is whole, and one that can't be read counts as not there.

    Args:
        folder: Where the files go.
        max_bytes: How much the folder holds at most, what is in it already counted; each process counts what it writes
            itself.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_bytes = sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))

    def __str__(self) -> str:
        return f"in {str(self.folder)!r}, up to {self.max_bytes / 1e9:.1f} GB"

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept under a name, or ``None``."""
        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError):
            return None

    def _keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        path = self._path(name)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, partial)
            partial.replace(path)
        except OSError:  # the disk is full: a store is a convenience, and the page is there all the same
            partial.unlink(missing_ok=True)
            self.max_bytes = 0

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"
