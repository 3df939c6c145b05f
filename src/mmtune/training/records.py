"""What a run was begun with, written into each checkpoint, and which checkpoint it can go on from."""

import dataclasses
import enum
import functools
import json
import numbers
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn

from mmtune.data.arrow import column, media_columns
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.images import EncodedImages
from mmtune.data.query_kinds import as_documents
from mmtune.errors import ConfigError
from mmtune.evaluation.history import CHECKPOINT_FILE
from mmtune.training.inputs import TrainingSets

RECORD = "mmtune_run.json"
_SAMPLE_BYTES = 1 << 16
_TORCH_FILES = ("optimizer.pt", "scheduler.pt")
_SET_BY_PEFT = ("base_model_name_or_path", "inference_mode", "revision", "peft_version")
_DECIDING_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "learning_rate_mapping",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "batch_sampler",
    "multi_dataset_batch_sampler",
    "dataloader_drop_last",
    "router_mapping",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "world_size",
    "n_gpu",
)
MAY_CHANGE = (
    "logging, when to evaluate and save, save_total_limit, per_device_eval_batch_size, mini_batch_size, workers of the "
    "data loader and pushing to the Hub"
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run was begun with; as ``mmtune_run.json`` in every checkpoint, and beside the result.

    Attributes:
        settings: What decides the weights, as ``run`` describes the call.
        rates: Learning rates and clip that the recipe chose.
        before: Metrics of the model as it came.
    """

    settings: dict[str, Any]
    rates: dict[str, Any]
    before: dict[str, float]

    def write(self, folder: Path) -> None:
        """Write the record; in a checkpoint with the size of each file that it has so far."""
        parts = _files_of(folder) if checkpoint_step(folder) is not None else []
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in parts}
        files.pop(RECORD, None)
        (folder / RECORD).write_text(json.dumps({**dataclasses.asdict(self), "files": files}, indent=1), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record of a checkpoint that is whole, or of a run that is at its end."""
        found = json.loads((folder / RECORD).read_text("utf-8"))
        return cls(found["settings"], found["rates"], found["before"])


# Which checkpoint


def checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint's folder; ``None`` for anything else."""
    prefix, _, step = path.name.partition("-")
    return int(step) if prefix == "checkpoint" and step.isdigit() and path.is_dir() else None


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the last step first."""
    paths = [path for path in folder.iterdir() if checkpoint_step(path) is not None] if folder.is_dir() else []
    return sorted(paths, key=lambda path: checkpoint_step(path) or 0, reverse=True)


def find_last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that a run can go on from.

    Raises:
        ConfigError: There is none; the message says what is wrong with each.

    Warns:
        UserWarning: A newer one can't be used; the message says why.
    """
    reasons = []
    for checkpoint in checkpoints_of(folder):
        reason = why_unusable(checkpoint)
        if reason is None:
            if reasons:
                warnings.warn(f"{'; '.join(reasons)}. The run goes on from {checkpoint.name}.", stacklevel=6)
            return checkpoint
        reasons.append(f"{checkpoint.name} is passed over: {reason}")
    found = f" ({'; '.join(reasons)})" if reasons else ""
    raise ConfigError(
        f"resume=True, and output_dir={str(folder)!r} has no checkpoint to go on from{found}. "
        "Check the folder, or start over without resume."
    )


def why_unusable(checkpoint: Path) -> str | None:
    """What keeps a run from going on from a checkpoint; ``None`` for one that is whole.

    Sizes, headers and small files are read, not the weights.
    """
    if not (checkpoint / "trainer_state.json").is_file():
        return "it was cut off while it was written"
    for path in _files_of(checkpoint):
        if path.suffix == ".json" and not _is_json(path):
            return f"{path.relative_to(checkpoint)} is damaged"
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    if not isinstance(state, dict) or state.get("global_step") != checkpoint_step(checkpoint):
        return "trainer_state.json is of another step"
    if not (checkpoint / RECORD).is_file():
        return f"it has no {RECORD}, which says what the run was begun with"
    record = json.loads((checkpoint / RECORD).read_text("utf-8"))
    try:
        sizes, settings = record["files"], record["settings"]
        processes = settings["world_size"]
        for name, size in sizes.items():
            if name == CHECKPOINT_FILE and not (checkpoint / name).is_file():
                continue  # it is never published: a checkpoint from the Hub is whole without it
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size} bytes in place of {size}"
    except (KeyError, TypeError, AttributeError):
        return f"{RECORD} is damaged"
    for path in _files_of(checkpoint):
        if not _HEADER_IS_RIGHT.get(path.suffix, lambda _: True)(path):
            return f"{path.relative_to(checkpoint)} is damaged"
    if settings.get("save_only_model"):
        return "it has weights only, as save_only_model=True asked for"
    is_sharded = any(
        path.is_dir() and path.name.startswith(("optimizer", "global_step")) for path in checkpoint.iterdir()
    )
    random_states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    for name in (*(() if is_sharded else _TORCH_FILES), *random_states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    return None


def _files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _has_right_header(path: Path) -> bool:
    """Whether a file of safetensors is as long as its header says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return False
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        return False


def _has_directory(path: Path) -> bool:
    """Whether a file of torch has the directory that stands at its end, with every entry where it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    return True


_HEADER_IS_RIGHT: dict[str, Callable[[Path], bool]] = {
    ".safetensors": _has_right_header,
    ".bin": _has_directory,
    ".pt": _has_directory,
    ".pth": _has_directory,
}


# What it was begun with


def require_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that a run goes on with what it was begun with.

    Args:
        folder: Of the run, for the message.
        then: The settings that it was begun with, as read from its record.
        now: Those of this call; what is not in both is not compared.

    Raises:
        ConfigError: Some differ; the message gives both values of each.
    """
    now = json.loads(json.dumps(now))
    differ = [name for name in now if name in then and then[name] != now[name]]
    if differ:
        values = "; ".join(f"{name}: {then[name]!r} then, {now[name]!r} now" for name in differ)
        raise ConfigError(
            f"The run in {str(folder)!r} was begun with other settings: {values}. Its batches, its rates or its scores "
            "would not be those of one run. Pass them as they were, or start anew in another folder or with "
            f"overwrite=True. Only these may change: {MAY_CHANGE}."
        )


def describe_arguments(args: BaseTrainingArguments) -> dict[str, Any]:
    """The host's arguments that decide the weights, as JSON has them."""
    named = {name: as_json(getattr(args, name, None)) for name in _DECIDING_ARGUMENTS}
    return {**named, "training_seed": [args.seed, args.data_seed], "save_only_model": args.save_only_model}


def describe_training_data(train: TrainingSets) -> dict[str, str]:
    """What tells the training data of each set from others, without reading a page."""
    found = {}
    for name, part in train.by_name.items():
        rows, limits = _digest(_content(part.rows, part.rows.column_names)), part.view.source.reader.limits.given()
        found[f"{name}: training data".removeprefix(": ")] = (
            f"{len(part.rows)} rows {rows}, {describe_content(part.data)}{f', read within {limits}' if limits else ''}"
        )
    return found


def describe_content(data: RetrievalDataset) -> str:
    """What tells a dataset from others: its ids, texts, judgements and the sizes of its pages."""
    content = _digest(
        [
            *_content(data.corpus, ("document_id", "text")),
            *_images_of(data.corpus),
            *_content(data.queries, ("query_id", "text")),
            *_images_of(as_documents(data.queries)),
            *_content(data.qrels, ("query_id", "document_id", "score")),
        ]
    )
    return f"{len(data)} queries and {len(data.corpus)} documents {content}"


def _images_of(table: Dataset) -> list[Any]:
    """What tells the images, sounds and clips of a table from others: their sizes."""
    found: list[Any] = []
    for name in media_columns(table.column_names):
        images = EncodedImages(table, name)
        # of a page of a PDF what is read names its content
        found += [images.lengths.tolist(), *(bytes(images.read(int(row))) for row in images.pdf_rows)]
    return found


def describe_checkpoint(path: str) -> str:
    """What tells a checkpoint from others, also in a folder that was moved."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    hasher = xxhash.xxh3_64()
    for file in (file for file in _files_of(folder) if file.suffix in (".safetensors", ".bin")):
        with file.open("rb") as opened:
            size = file.stat().st_size
            hasher.update(f"{file.relative_to(folder)} {size}".encode())
            hasher.update(opened.read(_SAMPLE_BYTES))
            opened.seek(max(0, size - _SAMPLE_BYTES))
            hasher.update(opened.read())
    return f"weights {hasher.hexdigest()}"


def describe_structure(model: nn.Module) -> str:
    """What tells the layers of a model from those of another, whatever their weights are."""
    shapes = sorted((name, tuple(weight.shape), weight.requires_grad) for name, weight in model.named_parameters())
    return f"{type(model).__name__} with {len(shapes)} tensors {_digest(shapes)}"


def as_json(value: Any) -> Any:
    """A setting as JSON has it: classes and functions by their names, losses and configs by what they were given."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return as_json(value.value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Sequence):
        return [as_json(part) for part in value]
    if isinstance(value, functools.partial):
        return {"of": as_json(value.func), **as_json(value.keywords), "arguments": as_json(value.args)}
    if isinstance(value, nn.Module):
        config: Any = getattr(value, "get_config_dict", dict)()
        given = {name: as_json(part) for name, part in config.items() if name != "mini_batch_size"}
        inner = {"loss": as_json(value.loss)} if isinstance(getattr(value, "loss", None), nn.Module) else {}
        return {"class": type(value).__name__, **given, **inner}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: as_json(part) for name, part in fields.items() if name not in _SET_BY_PEFT}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _content(table: Dataset, names: Iterable[str]) -> list[Any]:
    return [column(table, name).to_pylist() for name in names if name in table.column_names]


def _digest(values: Iterable[Any]) -> str:
    hasher = xxhash.xxh3_64()
    for value in values:
        hasher.update(repr(value).encode())
    return hasher.hexdigest()
