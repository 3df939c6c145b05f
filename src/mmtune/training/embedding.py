"""``finetune``: from pages, queries and negatives to a better embedding model, in one call."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.errors import ConfigError
from mmtune.evaluation.retrieval import Evaluator, build_evaluator
from mmtune.models.loading import check_documents, describe_model, load_model
from mmtune.training import recipe
from mmtune.training.output import prepare_output_dir, resolve_output_dir
from mmtune.training.recipe import Loss
from mmtune.training.result import FinetuneResult
from mmtune.training.sets import DatasetsLike, evaluation_sets, refuse_overlap, training_sets
from mmtune.training.settings import settings
from mmtune.training.trainer import PageTrainer


def finetune(
    model: SentenceTransformer | str | os.PathLike[str],
    train_dataset: DatasetsLike,
    eval_dataset: DatasetsLike | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    num_negatives: int = 1,
    matryoshka_dims: Literal["auto"] | Sequence[int] | None = "auto",
    mini_batch_size: Literal["auto"] | int = "auto",
    loss: Loss | None = None,
    args: SentenceTransformerTrainingArguments | None = None,
    prompts: dict[str, str] | str | None = "model",
    documents: DocumentKind = "image",
    allow_overlap: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 42,
    **training_arguments: Any,
) -> FinetuneResult:
    """Finetune an embedding model on pages and queries, and measure what it gained.

    Without ``args`` this is the recipe of the guide to training multimodal models with Sentence Transformers: one
    epoch, batches of 64, learning rate 2e-5, cached in-batch negatives with hard negatives, and Matryoshka dimensions.
    Data, arguments and the output folder are checked before weights are loaded.

    Args:
        model: A model, or a checkpoint for ``load_model``. A model is trained in place.
        train_dataset: What to train on: a ``RetrievalDataset``, rows in a known layout, what
            ``RetrievalDataset.load`` takes, or rows of ``training_rows``. Several by name train together, each batch
            from one of them: in proportion to their sizes, or in turn with
            ``multi_dataset_batch_sampler="round_robin"``.
        eval_dataset: What to measure on, before, during and after, likewise. The mean over several chooses the
            checkpoint. ``None`` measures nothing.
        output_dir: Folder for checkpoints, model and report. ``None`` is ``args.output_dir``, or ``mmtune-output``.
        num_negatives: Hard negatives a row.
        matryoshka_dims: Dimensions that the loss trains and the evaluator scores. ``"auto"`` is the model's and those
            of 2048, 1536, 1024, 512, 256, 128 and 64 below it; ``None`` trains the full size only.
        mini_batch_size: Rows in one forward pass of the cached loss; changes memory and speed, not the result.
            ``"auto"`` goes by the size of the model.
        loss: A host loss in place of the cached one, built or as a callable that takes the model.
            ``matryoshka_dims`` then only says what is evaluated.
        args: The host's training arguments, passed on as they are; only an empty ``prompts`` or ``router_mapping`` is
            filled, on a copy.
        prompts: ``"model"`` trains with the prompts that ``encode_query`` and ``encode_document`` will use; else what
            the host's ``prompts`` takes, or ``None`` for none.
        documents: What a document is made of: ``"image"``, ``"text"`` or ``"text+image"``.
        allow_overlap: Accept documents that are relevant in training and in evaluation.
        overwrite: Replace the run that ``output_dir`` holds.
        resume: Go on with the run that ``output_dir`` holds, from its last whole checkpoint.
        seed: Of filling up negatives, and of training where there are no ``args``.
        **training_arguments: Training arguments of the host by name, in place of the recipe's.

    Returns:
        The trained model with its metrics; ``final/``, ``metrics.json`` and ``report.md`` are in ``output_dir``.

    Raises:
        ConfigError: An argument, the model or the output folder does not fit.
        DatasetError: The data can't be used, or evaluation pages are among the training pages.
        ImageDecodeError: A page can't be decoded; the message names the document.
        MissingExtraError: The model needs a package that is not installed.

    Example:
        >>> from mmtune import finetune
        >>> from mmtune.testing import generated_pages, tiny_clip
        >>> result = finetune(tiny_clip("tiny-clip"), generated_pages(8), output_dir="run")
        >>> sorted(path.name for path in result.output_dir.iterdir() if not path.name.startswith("checkpoint"))
        ['final', 'metrics.json', 'report.md']
    """
    _check_arguments(args, training_arguments, matryoshka_dims, mini_batch_size)
    folder = resolve_output_dir(output_dir, args.output_dir if args else None)
    train = training_sets(train_dataset, num_negatives=num_negatives, documents=documents, seed=seed)
    evaluation = evaluation_sets(eval_dataset, documents)
    if not allow_overlap:
        refuse_overlap(train, evaluation)
    host_args = args or recipe.training_arguments(
        train.num_rows, output_dir=str(folder), seed=seed, evaluates=bool(evaluation), **training_arguments
    )
    checkpoint = prepare_output_dir(folder, overwrite=overwrite, resume=resume)

    model = model if isinstance(model, SentenceTransformer) else load_model(os.fspath(model))
    check_documents(model, documents)
    dims = recipe.matryoshka_dims(matryoshka_dims, model, loss)
    evaluator = _evaluator(evaluation, model, dims, documents, show_progress_bar=not host_args.disable_tqdm)
    metric = evaluator.metric_name(model) if evaluator else None
    host_args = recipe.arguments_for_model(host_args, model, prompts, train.columns, metric)
    loss = recipe.loss_for_model(loss, model, dims, mini_batch_size, host_args.per_device_train_batch_size)
    description = describe_model(model)
    trainer = PageTrainer(
        model=model,
        args=host_args,
        train_dataset=train.for_host,
        loss=loss,
        evaluator=evaluator,
        callbacks=recipe.callbacks(args, training_arguments),
    )

    before = measure(trainer, evaluator)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    result = FinetuneResult(
        model=model,
        trainer=trainer,
        before=before,
        after=measure(trainer, evaluator),
        primary_metric=metric,
        output_dir=folder,
        settings=settings(trainer, train=train, evaluation=evaluation, model=description, dims=dims, seed=seed),
    )
    if trainer.is_world_process_zero():
        result.save()
    return result


def _check_arguments(
    args: SentenceTransformerTrainingArguments | None,
    training_arguments: Mapping[str, Any],
    matryoshka_dims: Literal["auto"] | Sequence[int] | None,
    mini_batch_size: Literal["auto"] | int,
) -> None:
    recipe.check_training_arguments(training_arguments)
    if args is not None and training_arguments:
        raise ConfigError(
            f"args and {next(iter(training_arguments))}={next(iter(training_arguments.values()))!r} were both given. "
            "Set it in args, or leave args out."
        )
    recipe.check_matryoshka_dims(matryoshka_dims)
    if mini_batch_size != "auto" and (not isinstance(mini_batch_size, int) or mini_batch_size < 1):
        raise ConfigError(f"mini_batch_size={mini_batch_size!r}: expected 'auto' or a positive whole number.")
    if args is not None and not recipe.is_conflict_free(args):
        warnings.warn(
            f"args.batch_sampler is {args.batch_sampler!r}, which may put documents that are relevant to a query among "
            "its in-batch negatives. Pass batch_sampler=ConflictFreeBatchSampler to rule that out.",
            stacklevel=3,
        )


def _evaluator(
    evaluation: Mapping[str, RetrievalDataset],
    model: SentenceTransformer,
    dims: Sequence[int],
    documents: DocumentKind,
    *,
    show_progress_bar: bool,
) -> Evaluator | None:
    if not evaluation:
        return None
    return build_evaluator(
        evaluation[""] if list(evaluation) == [""] else evaluation,
        model=model,
        truncate_dims=[dim for dim in dims if dim != model.get_embedding_dimension()],
        documents=documents,
        show_progress_bar=show_progress_bar,
    )


def measure(trainer: PageTrainer, evaluator: Evaluator | None) -> dict[str, float]:
    """The evaluator's metrics for the model as it is, shared among the processes; empty without an evaluator.

    The state of the random numbers stays, so that the training after it is the host's to the last bit.
    """
    if evaluator is None:
        return {}
    device = trainer.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        metrics = trainer.evaluate()
    own = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {key: float(value) for key, value in own.items() if key.startswith("vdr")}
