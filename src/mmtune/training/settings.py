"""Everything that a run chose, as it stands in its result, its report and its model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from mmtune.data.dataset import RetrievalDataset
from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.recipe import EvenTenths, tenths
from mmtune.training.trainer import PageTrainer


def settings(
    trainer: PageTrainer,
    *,
    rows: Dataset,
    train: RetrievalDataset,
    evaluation: RetrievalDataset | None,
    model: Mapping[str, Any],
    dims: Sequence[int],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What was chosen, by topic: ``model``, ``data``, ``training``.

    Args:
        trainer: After training.
        rows: What was trained on, from ``training_rows``.
        train: The training data.
        evaluation: The evaluation data.
        model: The model as it came, from ``describe_model``.
        dims: The dimensions that were trained.
        seed: Of filling up negatives.
    """
    return {
        "model": dict(model),
        "data": _data(rows, train, evaluation, seed),
        "training": _training(trainer, dims),
    }


def _data(rows: Dataset, train: RetrievalDataset, evaluation: RetrievalDataset | None, seed: int) -> dict[str, Any]:
    view = rows.format["format_kwargs"]["transform"]
    notes = train.notes
    facts = {
        "training_queries": len(train),
        "training_documents": len(train.corpus),
        "training_rows": len(rows),
        "documents": view.documents,
        "negatives_a_row": view.num_negatives,
        "negatives_listed": view.chosen["listed"],
        "negatives_filled_at_random": view.chosen["filled"],
        "negatives_refused_as_relevant": view.chosen["refused"],
        "byte_identical_copies": train.relevance.num_copies,
        "rows_without_query": notes.blank_queries,
        "unknown_negatives_dropped": notes.unknown_negatives,
        "negatives_held_out_for_evaluation": notes.held_out_negatives,
        "queries_without_document": notes.queries_without_document,
        "seed_of_filling": seed,
    }
    if evaluation is not None:
        facts |= {"evaluation_queries": len(evaluation), "evaluation_documents": len(evaluation.corpus)}
    return facts


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
