"""The size that a trained model cuts its embeddings to: as many bytes as were asked for, or as few as are enough."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from sentence_transformers import SentenceTransformer

from mmtune.arguments import require_whole
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.errors import ConfigError
from mmtune.evaluation.frontier import size_frontier
from mmtune.training.trainers import Kind

TargetSize: TypeAlias = Literal["auto"] | int | None
"""The most bytes that an embedding may take as float32; ``"auto"`` is what is enough, ``None`` cuts nothing."""

_FLOAT32_BYTES = 4


def check_target_size(target: Any, kind: Kind, dims: object, eval_dataset: object) -> None:
    """Make sure of what can be known of a target before weights load.

    Args:
        target: As ``finetune`` takes it.
        kind: The kind of model.
        dims: The trained sizes, as ``finetune`` takes them, checked.
        eval_dataset: As ``finetune`` takes it.

    Raises:
        ConfigError: It is none, smaller than the smallest size, for late interaction, or ``"auto"`` without a set to
            measure on.
    """
    if target is None:
        return
    is_auto = isinstance(target, str) and target == "auto"
    if not is_auto:
        require_whole("target_size", target, or_else="'auto', None")
    if not kind.truncates:
        raise ConfigError(
            f"target_size={target!r}: late interaction has one vector a token, of one size (sentence-transformers "
            "6.2). Leave target_size out; build_late_interaction takes the dimension."
        )
    if isinstance(dims, Iterable) and not isinstance(dims, str):
        fit_size(target, list(dims))
    if is_auto and (eval_dataset is None or isinstance(eval_dataset, Mapping)):
        given = "none" if eval_dataset is None else "several by name"
        raise ConfigError(
            f"target_size='auto' measures on one evaluation set, and eval_dataset is {given}. Pass one, or the most "
            "bytes that an embedding may take, e.g. target_size=1024."
        )


def fit_size(target: Literal["auto"] | int, dims: Sequence[int]) -> int:
    """The largest of the trained sizes that takes ``target`` bytes at most; the largest of all for ``"auto"``.

    Raises:
        ConfigError: None does.
    """
    if target == "auto":
        return max(dims)
    fitting = [dim for dim in dims if _FLOAT32_BYTES * dim <= target]
    if not fitting:
        least, asked = min(dims), target // _FLOAT32_BYTES
        smaller = f", or train a smaller one with matryoshka_dims=[{least}, {asked}]" if asked else ""
        raise ConfigError(
            f"target_size={target!r} bytes: the smallest size that is trained has {least} numbers, which take "
            f"{_FLOAT32_BYTES * least} bytes as float32. Pass target_size={_FLOAT32_BYTES * least}{smaller}."
        )
    return max(fitting)


def settle_size(
    target: Literal["auto"] | int,
    model: SentenceTransformer,
    dims: Sequence[int],
    data: RetrievalDataset | None,
    *,
    documents: DocumentKind,
    batch_size: int,
    show_progress_bar: bool,
) -> dict[str, Any]:
    """Choose the size, write it into the model as ``truncate_dim``, which is saved with it, and say what was chosen.

    Args:
        target: The most bytes, or ``"auto"``.
        model: The trained model.
        dims: The sizes that it was trained at.
        data: What ``"auto"`` measures on.
        documents: What a document is made of.
        batch_size: Of that measurement.
        show_progress_bar: Of that measurement.
    """
    if target == "auto" and data is not None:
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        found = size_frontier(model, data, dims=dims, dtypes=["float32"], documents=documents, **options)
        dim, reason = found.recommended.dim, found.reason
    else:
        dim, reason = fit_size(target, dims), f"the largest trained size within {target} bytes as float32"
    if dim < (model.get_embedding_dimension() or 0):
        model.truncate_dim = dim
    asked = target if isinstance(target, str) else int(target)
    return {"target_size": asked, "truncate_dim": dim, "truncate_dim_because": reason}
