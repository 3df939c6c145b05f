"""The evaluator of a run: over the evaluation data, over a guard set, and what the caller gave."""

from collections.abc import Mapping
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from mmtune.errors import ConfigError
from mmtune.evaluation.history import BEGINNING, END, History
from mmtune.evaluation.mean import AnyEvaluator
from mmtune.evaluation.verdict import is_guard_worse, parts_of

GUARD = "guard"
"""The name of the guard set's metrics."""

GUARD_IS_WORSE = "guard_is_worse"
"""The metric that tells whether a measurement has a significant loss on the guard set: 1 or 0."""


class RunEvaluator(BaseEvaluator):
    """Everything that a run measures, in one call, with the values by query of each measurement.

    Args:
        own: The evaluator over the evaluation data, which then says how good a model is; ``None`` without such data.
        given: What the caller passed as ``evaluator``: any evaluator of the host's protocol.
        guard: The evaluator over the guard set.
        history: Of the run so far, where it goes on.

    Attributes:
        parts: The evaluators of one set each whose mean says how good a model is.
        guard_parts: Those of the guard set.
        history: Values by query of each measurement; in the process that measures.
        per_query: After a call, the values by query of all of them, as far as they have some.
    """

    def __init__(
        self,
        own: AnyEvaluator | None,
        given: Any = None,
        guard: AnyEvaluator | None = None,
        history: History | None = None,
    ) -> None:
        super().__init__()
        self.own, self.given, self.guard = own, given, guard
        chooses: Any = own or given
        self.name = own.name if own else getattr(given, "name", "") or type(given).__name__
        self.parts = parts_of(chooses)
        self.guard_parts = parts_of(guard) if guard else []
        self.history = history or History()
        self.per_query: dict[str, dict[str, float]] = {}
        self._was_called = False
        self._step = BEGINNING

    @property
    def tells_values(self) -> bool:
        """Whether there are values by query, so that there can be a verdict or a guard."""
        return bool(self.parts or self.guard_parts)

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of all of them; with a guard set also ``guard_is_worse``.

        Args:
            model: What is measured.
            output_path: Where evaluators write their lines.
            epoch: Of the training.
            steps: Of the training; -1 before and after it.

        Raises:
            ConfigError: Two of them give a metric of one name.
        """
        metrics: dict[str, float] = {}
        self.per_query = {}
        for evaluator in (self.own, self.guard, self.given):
            if evaluator is None:
                continue
            found = evaluator(model, output_path, epoch, steps)
            new = dict(found) if isinstance(found, Mapping) else {self.name: found}
            twice = sorted(metrics.keys() & new.keys())
            if twice:
                raise ConfigError(
                    f"The evaluator gives {twice[0]!r}, and so does the one over eval_dataset or guard_dataset. "
                    "Expected names of its own. Build it with another name, e.g. build_evaluator(dataset, "
                    "name='other')."
                )
            metrics |= new
            self.per_query |= getattr(evaluator, "per_query", {})
        self._was_called = True
        self._note(model, steps)
        if self.guard_parts:
            worse = is_guard_worse(self.history, self, model, self._step)
            metrics[GUARD_IS_WORSE] = float(worse)
        return metrics

    def _note(self, model: Any, steps: int) -> None:
        # before and after training there is no step: the first measurement without one is the beginning
        at_end = END if BEGINNING in self.history.values else BEGINNING
        self._step = steps if steps > 0 else at_end
        self.history.note(self._step, [*self.parts, *self.guard_parts], model)

    def metric_name(self, model: Any) -> str:
        """The key of the metric that says how good a model is; ``""`` as long as the evaluator does not tell.

        The host's evaluators settle it when they are called (sentence-transformers 6.2).
        """
        chooses: Any = self.own or self.given
        if hasattr(chooses, "metric_name"):
            return chooses.metric_name(model)
        return getattr(chooses, "primary_metric", None) or "" if self._was_called else ""
