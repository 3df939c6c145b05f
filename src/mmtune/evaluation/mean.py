"""Several evaluators of one kind, and the mean of what they say."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from sentence_transformers.base.evaluation import SequentialEvaluator

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.intake import DatasetsLike, as_retrieval_dataset, datasets_by_name

Single = TypeVar("Single")


class AnyEvaluator(Protocol):
    """What every evaluator of this package has, whatever the kind of model that it scores."""

    name: str
    primary_metric: str | None
    per_query: dict[str, dict[str, float]]

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of a model; their keys start with the name."""
        ...

    def metric_name(self, model: Any) -> str:
        """The key of the metric that says how good a model is."""
        ...


class MeanEvaluator(SequentialEvaluator):
    """Several evaluators and the mean of their metrics, under ``<name>-mean_...`` keys.

    Args:
        evaluators: Evaluators of this package, with names of their own; a metric has a mean where all have it.
        name: Prefix of the keys of the means.

    Attributes:
        parts: The evaluators, each with ``top_ids`` or ``lists`` of its own.
        per_query: After a call, that of each evaluator.
        batch_size: That of the evaluators; what is set here holds for all of them.
    """

    def __init__(self, evaluators: Sequence[Any], name: str) -> None:
        super().__init__(evaluators)
        self.parts: list[Any] = list(evaluators)
        self.name = name
        self.per_query: dict[str, dict[str, float]] = {}
        known = self.parts[0].primary_metric
        self.primary_metric = self._of_mean(known) if known else None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of each evaluator, and ``vdr-mean_cosine_ndcg@10`` and the like."""
        metrics = [part(model, output_path, epoch, steps) for part in self.parts]
        self.per_query = {key: values for part in self.parts for key, values in part.per_query.items()}
        self.primary_metric = self.metric_name(model)
        own = [
            {key.removeprefix(part.name): value for key, value in each.items()}
            for part, each in zip(self.parts, metrics, strict=True)
        ]
        # sets of mixed documents are measured by the kinds that each has
        shared = [key for key in own[0] if all(key in each for each in own)]
        means = {f"{self.name}-mean{key}": float(np.mean([each[key] for each in own])) for key in shared}
        return {key: value for each in (*metrics, means) for key, value in each.items()}

    @property
    def batch_size(self) -> int:
        """Items a forward pass."""
        return self.parts[0].batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        for part in self.parts:
            part.batch_size = value

    def metric_name(self, model: Any) -> str:
        """The key of the mean that says how good ``model`` is."""
        return self._of_mean(self.parts[0].metric_name(model))

    def _of_mean(self, key: str) -> str:
        return f"{self.name}-mean{key.removeprefix(self.parts[0].name)}"


def build_for_each(
    dataset: DatasetsLike, name: str, build: Callable[[RetrievalDataset, str], Single]
) -> "Single | MeanEvaluator":
    """The evaluator of one dataset, or of several by name with their mean.

    Args:
        dataset: What is evaluated on.
        name: Prefix of the metric keys; of several, each has ``<name>-<its own>``.
        build: Makes the evaluator of a dataset under a name.
    """
    data = {part: as_retrieval_dataset(each) for part, each in datasets_by_name(dataset).items()}
    if list(data) == [""]:
        return build(data[""], name)
    return MeanEvaluator([build(each, f"{name}-{part}") for part, each in data.items()], name)
