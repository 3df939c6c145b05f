"""From the name of a checkpoint to its files, and to what the host makes of them; errors say what to do."""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import CheckpointFiles, Encoder, find_checkpoint, first_line, missing_extra
from mmtune.models.kinds import HostModel
from mmtune.models.pixels import PixelLimits, image_arguments, warn_unused_limits

OWN_ARGUMENTS = frozenset({"max_pixels", "min_pixels", "dtype", "attention", "device"})
"""What every function that loads a checkpoint takes besides the host's arguments."""

Built = TypeVar("Built")


def check_host_kwargs(model_class: type[HostModel], host_kwargs: Mapping[str, Any]) -> None:
    """Make sure that a host model takes these arguments.

    Raises:
        ConfigError: It does not; the message names the nearest one.
    """
    known = set(inspect.signature(model_class.__init__).parameters) - {"self", "model_name_or_path", "modules"}
    known |= OWN_ARGUMENTS
    for name in host_kwargs.keys() - known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
        hint = f"The nearest is {nearest[0]!r}." if nearest else f"Known are {', '.join(sorted(known))}."
        raise ConfigError(f"mmtune and {model_class.__name__} know no argument {name!r}. {hint} Rename or remove it.")


def checked_name(name_or_path: str | Path) -> str:
    """The name of a checkpoint as a string, ``~`` replaced by the user's folder.

    Raises:
        ConfigError: It is no name.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path).strip():
        raise ConfigError(
            f"name_or_path={name_or_path!r} names no checkpoint. Expected a folder or a name on the Hub. Pass one; a "
            f"model that is already built needs no load_model."
        )
    name = str(name_or_path)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def checkpoint_files(name: str, host_kwargs: Mapping[str, Any]) -> CheckpointFiles:
    """The small files of a checkpoint, looked for where a host model with these arguments would look.

    Raises:
        ConfigError: There is no checkpoint.
    """
    hub = {
        # the host reads the same variable
        "cache_dir": host_kwargs.get("cache_folder") or os.getenv("SENTENCE_TRANSFORMERS_HOME"),
        "token": host_kwargs.get("token"),
        "revision": host_kwargs.get("revision"),
        "local_files_only": host_kwargs.get("local_files_only", False),
    }
    code = {"trust_remote_code": host_kwargs.get("trust_remote_code", False)}
    given = {key: code | (host_kwargs.get(key) or {}) for key in ("processor_kwargs", "config_kwargs")}
    return find_checkpoint(name, hub=hub, **given)


def check_limits(encoders: Sequence[Encoder], limits: PixelLimits) -> None:
    """Make sure that the encoders of a checkpoint can keep pixel limits.

    Raises:
        ConfigError: As in ``image_arguments``.

    Warns:
        UserWarning: An image processor resizes to a fixed size.
    """
    with_images = [encoder for encoder in encoders if encoder.processor is not None]
    for encoder in with_images:
        image_arguments(encoder.processor, encoder.image_arguments, limits)
    warn_unused_limits([encoder.processor for encoder in with_images], limits)


def build(host_class: Callable[..., Built], name: str, **host_kwargs: Any) -> Built:
    """What a host class makes of a checkpoint.

    Raises:
        ConfigError: An argument does not fit, or the weights can't be loaded.
        MissingExtraError: A package that the checkpoint needs is not installed.
    """
    try:
        return host_class(name, **host_kwargs)
    except ImportError as error:
        raise missing_extra(name, error) from error
    except ValueError as error:  # an attention that transformers does not know, among others
        raise ConfigError(f"{name!r} can't be built with these arguments: {first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The weights of {name!r} can't be loaded: {first_line(error)} Expected the weight files that belong to "
            f"its config. Download or save the checkpoint again."
        ) from error
