"""A run from its trainer to its result: measure, train, measure again, save."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util.distributed import distributed_evaluation

from mmtune.models.adapters import save_model
from mmtune.models.fresh import fresh_layers, mark_fresh
from mmtune.models.kinds import HostModel
from mmtune.training.checks import check_metric
from mmtune.training.output import clear_run
from mmtune.training.result import FinetuneResult
from mmtune.training.trainers import PageTrainer


@dataclass(frozen=True)
class Place:
    """Where a run writes, and where it starts.

    Attributes:
        folder: What the run leaves behind goes here.
        checkpoint: The checkpoint to go on from; ``None`` starts anew.
        overwrite: Whether the run that the folder holds is deleted, once everything was checked.
    """

    folder: Path
    checkpoint: Path | None
    overwrite: bool


def run(
    trainer: PageTrainer,
    evaluator: BaseEvaluator | None,
    metric: str | None,
    *,
    place: Place,
    settings: Callable[[], Mapping[str, Mapping[str, Any]]],
) -> FinetuneResult:
    """Train, measured before and after, and write everything that the run leaves behind.

    Args:
        trainer: With model, data and loss.
        evaluator: What measures; ``None`` measures nothing.
        metric: The key of the metric that says how good the model is.
        place: Where to write and to start.
        settings: What was chosen, asked for after training.

    Raises:
        ConfigError: The metric that chooses the checkpoint is none of the evaluator's.
    """
    model = cast(HostModel, trainer.model)
    before = measure(trainer, evaluator)
    check_metric(trainer.args, before)
    if place.overwrite and trainer.is_world_process_zero():
        clear_run(place.folder)
    trainer.train(resume_from_checkpoint=str(place.checkpoint) if place.checkpoint else None)
    for layer in fresh_layers(model).values():
        mark_fresh(layer, fresh=False)
    after = measure(trainer, evaluator)
    if trainer.is_world_process_zero():
        save_model(model, place.folder / "final")
    chosen = {topic: dict(values) for topic, values in settings().items()}
    result = FinetuneResult(model.eval(), trainer, before, after, metric, place.folder, chosen)
    if trainer.is_world_process_zero():
        result.save()
    # A script that goes on with final/ in every process finds it whole.
    trainer.accelerator.wait_for_everyone()
    return result


def measure(trainer: PageTrainer, evaluator: BaseEvaluator | None) -> dict[str, float]:
    """The evaluator's metrics for the model as it is, shared among the processes; empty without an evaluator.

    Not by ``trainer.evaluate()``: called before ``train()`` with several processes, it makes the trainer take the model
    for wrapped already, the loss never gets the wrapped one, and the processes train apart without a word
    (sentence-transformers 6.2, transformers 5.23).
    """
    if evaluator is None:
        return {}
    with distributed_evaluation(trainer.model) as evaluates:
        metrics = evaluator(trainer.model) if evaluates else {}
    return {key: float(value) for key, value in broadcast_object_list([metrics])[0].items()}
