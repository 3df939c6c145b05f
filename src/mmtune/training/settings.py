"""Everything that a run chose, as it stands in its result, its report and its model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from mmtune.data.dataset import RetrievalDataset
from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.inputs import TrainingSet, TrainingSets
from mmtune.training.trainers import PageTrainer


def settings(
    trainer: PageTrainer,
    *,
    train: TrainingSets,
    evaluation: Mapping[str, RetrievalDataset],
    model: Mapping[str, Any],
    dims: Sequence[int],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What was chosen, by topic: ``model``, ``data``, ``training``; and ``audit``, what was found in the data.

    Args:
        trainer: After training.
        train: The training data.
        evaluation: The evaluation data by name.
        model: The model as it came, from ``describe_model``.
        dims: The dimensions that were evaluated besides the full one.
        seed: Of filling up negatives.
    """
    return {
        "model": dict(model),
        "data": _data(train, evaluation, seed),
        "training": _training(trainer, dims),
        "audit": _audit(train),
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


def _audit(train: TrainingSets) -> dict[str, int]:
    """The findings of each set with their counts; empty where nothing was found."""
    return {
        f"{name}: {key}" if name else key: count
        for name, part in train.by_name.items()
        for key, count in part.data.audit().counts.items()
        if count
    }


def _training_data(part: TrainingSet) -> dict[str, Any]:
    view = part.view
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
    }


def _training(trainer: PageTrainer, dims: Sequence[int]) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    losses = list(trainer.loss.values()) if isinstance(trainer.loss, dict) else [trainer.loss]
    inner = [loss.loss if isinstance(loss, MatryoshkaLoss) else loss for loss in losses]
    facts = {
        "loss": ", ".join(type(loss).__name__ for loss in inner),
        "matryoshka_dims": list(getattr(losses[0], "matryoshka_dims", ())),
        "evaluated_dims": list(dims),
        "mini_batch_size": getattr(inner[0], "mini_batch_size", None),
        "batch_size": args.per_device_train_batch_size,
        "processes": args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "epochs": args.num_train_epochs,
        "steps": state.max_steps,
        "learning_rate": args.learning_rate,
        "learning_rate_mapping": args.learning_rate_mapping or {},
        "max_grad_norm": args.max_grad_norm,
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "batch_sampler": getattr(args.batch_sampler, "__name__", str(args.batch_sampler)),
        "prompts": args.prompts or {},
        "router_mapping": args.router_mapping or {},
        "seed": args.seed,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
    }
    samplers = getattr(trainer.train_sampler, "batch_samplers", [trainer.train_sampler])
    if all(isinstance(sampler, ConflictFreeBatchSampler) for sampler in samplers):
        facts["rows_left_over_in_last_epoch"] = sum(sampler.left_over for sampler in samplers)
    steps = [entry["step"] for entry in state.log_history if "eval_runtime" in entry]
    return facts | ({"evaluated_at_steps": sorted(set(steps))} if steps else {})
