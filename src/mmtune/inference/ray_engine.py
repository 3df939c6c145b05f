"""Shards that workers of Ray write, each with a model of its own."""

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from mmtune.errors import ConfigError, MissingExtraError, MmtuneError
from mmtune.inference.shard_writer import ShardWriter
from mmtune.inference.shards import Shard

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else Ray 2.60 writes a token into the home folder
}


def require_ray() -> None:
    """Make sure that Ray is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec("ray") is None:
        raise MissingExtraError(
            "engine='ray' needs Ray, which is not installed. Run: pip install 'ray[data]' (in a clone of mmtune: pip "
            'install ".[ray]")'
        )


def run_on_ray(
    writer: ShardWriter, shards: Sequence[Shard], num_workers: int | None, advance: Callable[[int], object]
) -> None:
    """Have workers write shards; that of one that dies is written by another.

    The running cluster is used, or one of this machine is started for the call.

    Args:
        writer: Writes a shard; each worker gets it with a copy of the model.
        shards: What to write.
        num_workers: ``None`` is one a GPU of the cluster, or one.
        advance: Gets the documents of each shard that is done.

    Raises:
        ConfigError: The cluster is smaller than the number of workers.
        MmtuneError: A worker raised it.
    """
    if not shards:
        return
    import ray

    with _cluster(num_workers or 1):
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
        workers = num_workers or (int(resources["GPU"]) if kind == "GPU" else 1)
        if workers > resources.get(kind, 0):
            raise ConfigError(
                f"num_workers={workers}, and the cluster has {resources.get(kind, 0):.0f} {kind}s: a worker takes one. "
                "Pass fewer, or None."
            )
        # One row is one shard: the borders of Ray's blocks and batches are not stable (2.60).
        rows = ray.data.from_items([{"at": at} for at in range(len(shards))], override_num_blocks=len(shards))
        rows.context.enable_progress_bars = False
        packed = ray.put(_pack(writer))  # held until the end: a worker that starts again needs it
        done = rows.map_batches(
            _Worker,
            fn_constructor_args=(packed, list(shards), torch.get_num_threads()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
            **{"num_gpus" if kind == "GPU" else "num_cpus": 1},
        )
        for row in done.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            advance(int(row["documents"]))


@contextmanager
def _cluster(num_workers: int) -> Iterator[None]:
    """A running cluster of Ray; one that is started here ends here."""
    import ray

    if ray.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    try:
        # one more than the workers, for the tasks of Ray Data itself
        cpus = max(os.cpu_count() or 1, num_workers + 1)
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _pack(writer: ShardWriter) -> bytes:
    """A writer with its model, to be opened on any device."""
    packed = io.BytesIO()
    torch.save(writer, packed)
    return packed.getvalue()


class _Worker:
    """Writes shards in a process of its own."""

    def __init__(self, packed: Any, shards: Sequence[Shard], num_threads: int) -> None:
        import ray

        # with other threads a CPU gives other bits
        torch.set_num_threads(num_threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # it comes from the process that started this one
        writer = torch.load(io.BytesIO(ray.get(packed)), map_location=device, weights_only=False)
        self._writer: ShardWriter = replace(writer, model=writer.model.to(device))
        self._shards = shards

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        documents, errors = [], []
        for at in batch["at"]:
            shard, error = self._shards[int(at)], b""
            try:
                # a batch that is tried again may have been written by the worker that died
                if self._writer.folder.missing([shard]):
                    self._writer.write(shard)
            except MmtuneError as failure:
                error = pickle.dumps(failure)  # raised here it would come back as one of Ray's, as a text
            documents.append(len(shard.digests))
            errors.append(error)
        return {"documents": np.array(documents), "error": np.array(errors, dtype=object)}
