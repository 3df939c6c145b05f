"""An evaluator of the caller, by itself or beside the one over the evaluation data."""

from collections.abc import Mapping
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from mmtune.errors import ConfigError
from mmtune.evaluation.mean import AnyEvaluator


class GivenEvaluator(BaseEvaluator):
    """What the caller passed as ``evaluator``, with what the two calls ask of every evaluator.

    Args:
        given: Any evaluator of the host's protocol.
        own: The evaluator over the evaluation data, which then says how good a model is; ``None`` without such data.

    Attributes:
        per_query: After a call, the values by query of both, as far as they have some.
    """

    def __init__(self, given: Any, own: AnyEvaluator | None = None) -> None:
        super().__init__()
        self.given, self.own = given, own
        self.name = own.name if own else getattr(given, "name", "") or type(given).__name__
        self.parts = getattr(own, "parts", [own]) if own else []
        self.per_query: dict[str, dict[str, float]] = {}
        self._was_called = False

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of both.

        Raises:
            ConfigError: Both give a metric of one name.
        """
        own = self.own(model, output_path, epoch, steps) if self.own else {}
        found = self.given(model, output_path, epoch, steps)
        metrics = dict(found) if isinstance(found, Mapping) else {self.name: found}
        twice = sorted(own.keys() & metrics.keys())
        if twice:
            raise ConfigError(
                f"The evaluator gives {twice[0]!r}, and so does the one over eval_dataset. Expected names of its own. "
                "Build it with another name, e.g. build_evaluator(dataset, name='other')."
            )
        self.per_query = {**(self.own.per_query if self.own else {}), **getattr(self.given, "per_query", {})}
        self._was_called = True
        return {**own, **metrics}

    def metric_name(self, model: Any) -> str:
        """The key of the metric that says how good a model is; ``""`` as long as the evaluator does not tell.

        The host's evaluators settle it when they are called (sentence-transformers 6.2).
        """
        if self.own:
            return self.own.metric_name(model)
        if hasattr(self.given, "metric_name"):
            return self.given.metric_name(model)
        return getattr(self.given, "primary_metric", None) or "" if self._was_called else ""
