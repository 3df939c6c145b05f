"""What tells one checkpoint from another before it is loaded: the content of its files, wherever they lie."""

import os
from pathlib import Path

import sentence_transformers
import transformers
import xxhash

from mmtune.models.checkpoints import MARKERS, CheckpointFiles

_CHUNK_BYTES = 1 << 20
_WITHOUT_MEANING = ("README.md",)


def fingerprint_checkpoint(files: CheckpointFiles) -> str | None:
    """A digest of all files of a checkpoint, weights included, and of the versions that will read them.

    Args:
        files: The checkpoint.

    Returns:
        The same for a copy of a folder under another name. Of a name on the Hub, the name and its commit: nothing more
        is downloaded. ``None`` where the files don't say it all: an adapter names its base model, and is not it.

    Raises:
        OSError: A file can't be read.
    """
    marker = next(path for path in map(files.path, MARKERS) if path is not None)
    digest = xxhash.xxh3_128(f"{sentence_transformers.__version__} {transformers.__version__}".encode())
    folder = Path(files.name)
    if not folder.is_dir():
        # the Hub's cache has a folder for each commit
        digest.update(f"{files.name} {marker.parent.name}".encode())
        return None if files.path("adapter_config.json") else digest.hexdigest()
    # rglob does not look into folders that are links (Python 3.11)
    paths = (Path(within, name) for within, _, names in os.walk(folder, followlinks=True) for name in names)
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    if any(path.name == "adapter_config.json" for path in names.values()):
        return None
    for name in sorted(names):
        if names[name].name in _WITHOUT_MEANING or any(part.startswith(".") for part in Path(name).parts):
            continue
        digest.update(f"{name} {names[name].stat().st_size} ".encode())
        with names[name].open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
