"""The size that a trained model cuts its embeddings to: the dimension asked for, or the smallest that is enough."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from sentence_transformers import SentenceTransformer

from mmtune.arguments import require_whole
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError
from mmtune.evaluation.frontier import size_frontier
from mmtune.training.trainers import Kind

TargetSize: TypeAlias = Literal["auto"] | int | None
"""The most dimensions that an embedding may have; ``"auto"`` is what is enough, ``None`` cuts nothing."""


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
            "dimensions that an embedding may have, e.g. target_size=256."
        )


def fit_size(target: Literal["auto"] | int, dims: Sequence[int]) -> int:
    """The largest of the trained sizes of ``target`` dimensions at most; the largest of all for ``"auto"``.

    Raises:
        ConfigError: None does.
    """
    if target == "auto":
        return max(dims)
    fitting = [dim for dim in dims if dim <= target]
    if not fitting:
        least = min(dims)
        raise ConfigError(
            f"target_size={target!r}: the smallest size that is trained has {least} dimensions. Pass "
            f"target_size={least}, or train a smaller one with matryoshka_dims=[{max(dims)}, {target}]."
        )
    return max(fitting)


def settle_size(
    target: Literal["auto"] | int,
    model: SentenceTransformer,
    dims: Sequence[int],
    data: RetrievalDataset | None,
    *,
    documents: DocumentKind,
    queries: QueryKind,
    batch_size: int,
    show_progress_bar: bool,
) -> dict[str, Any]:
    """Choose the size, write it into the model as ``truncate_dim``, which is saved with it, and say what was chosen.

    Args:
        target: The most dimensions, or ``"auto"``.
        model: The trained model.
        dims: The sizes that it was trained at.
        data: What ``"auto"`` measures on.
        documents: What a document is made of.
        queries: What a query is made of.
        batch_size: Of that measurement.
        show_progress_bar: Of that measurement.
    """
    if target == "auto" and data is not None:
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        options |= {"documents": documents, "queries": queries}
        found = size_frontier(model, data, dims=dims, dtypes=["float32"], **options)
        dim, reason = found.recommended.dim, found.reason
    else:
        dim, reason = fit_size(target, dims), f"the largest trained size of at most {target} dimensions"
    if dim < (model.get_embedding_dimension() or 0):
        model.truncate_dim = dim
    asked = target if isinstance(target, str) else int(target)
    return {"target_size": asked, "truncate_dim": dim, "truncate_dim_because": reason}
