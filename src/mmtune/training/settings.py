"""Everything that a run chose, as it stands in its result, its report and its model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from mmtune.data.dataset import RetrievalDataset
from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.recipe import EvenTenths, tenths
from mmtune.training.sets import TrainingSet, TrainingSets
from mmtune.training.trainer import PageTrainer


def settings(
    trainer: PageTrainer,
    *,
    train: TrainingSets,
    evaluation: Mapping[str, RetrievalDataset],
    model: Mapping[str, Any],
    dims: Sequence[int],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What was chosen, by topic: ``model``, ``data``, ``training``.

    Args:
        trainer: After training.
        train: The training data.
        evaluation: The evaluation data by name.
        model: The model as it came, from ``describe_model``.
        dims: The dimensions that were trained.
        seed: Of filling up negatives.
    """
    return {
        "model": dict(model),
        "data": _data(train, evaluation, seed),
        "training": _training(trainer, dims),
    }


def _data(train: TrainingSets, evaluation: Mapping[str, RetrievalDataset], seed: int) -> dict[str, Any]:
    """The facts of each set; those of a single one without its name."""
    facts: dict[str, Any] = {}
    for name, part in train.by_name.items():
        facts |= {f"{name}: {fact}" if name else fact: value for fact, value in _training_data(part).items()}
    for name, data in evaluation.items():
        prefix = f"{name}: " if name else ""
        facts |= {f"{prefix}evaluation_queries": len(data), f"{prefix}evaluation_documents": len(data.corpus)}
    return facts | {"seed_of_filling": seed}


def _training_data(part: TrainingSet) -> dict[str, Any]:
    view, notes = part.view, part.data.notes
    return {
        "training_queries": len(part.data),
        "training_documents": len(part.data.corpus),
        "training_rows": len(part.rows),
        "documents": view.documents,
        "negatives_a_row": view.num_negatives,
        "negatives_listed": view.chosen["listed"],
        "negatives_filled_at_random": view.chosen["filled"],
        "negatives_refused_as_relevant": view.chosen["refused"],
        "byte_identical_copies": part.data.relevance.num_copies,
        "rows_without_query": notes.blank_queries,
        "unknown_negatives_dropped": notes.unknown_negatives,
        "negatives_held_out_for_evaluation": notes.held_out_negatives,
        "queries_without_document": notes.queries_without_document,
    }


def _training(trainer: PageTrainer, dims: Sequence[int]) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    loss = trainer.loss.loss if isinstance(trainer.loss, MatryoshkaLoss) else trainer.loss
    sampler = trainer.get_train_dataloader().batch_sampler
    facts = {
        "loss": type(loss).__name__,
        "matryoshka_dims": list(dims),
        "mini_batch_size": getattr(loss, "mini_batch_size", None),
        "batch_size": args.per_device_train_batch_size,
        "processes": args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "epochs": args.num_train_epochs,
        "steps": state.max_steps,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "batch_sampler": getattr(args.batch_sampler, "__name__", str(args.batch_sampler)),
        "prompts": args.prompts or {},
        "router_mapping": args.router_mapping or {},
        "seed": args.seed,
        "best_step": state.best_global_step,
    }
    if isinstance(sampler, ConflictFreeBatchSampler):
        facts["rows_left_over_in_first_epoch"] = sampler.left_over
    if any(isinstance(callback, EvenTenths) for callback in trainer.callback_handler.callbacks):
        facts["evaluated_at_steps"] = tenths(state.max_steps)
    return facts
