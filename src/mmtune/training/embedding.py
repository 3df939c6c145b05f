"""``finetune``: from pages, queries and negatives to a better embedding model, in one call."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.util.distributed import distributed_evaluation

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.errors import ConfigError
from mmtune.evaluation.retrieval import Evaluator, build_evaluator
from mmtune.models.loading import check_checkpoint, check_documents, describe_model, load_model
from mmtune.training import recipe
from mmtune.training.checks import check_arguments, check_contrast, check_host_arguments, check_metric
from mmtune.training.output import check_output_dir, clear_run, resolve_output_dir
from mmtune.training.recipe import Loss
from mmtune.training.result import FinetuneResult
from mmtune.training.sets import DatasetsLike, evaluation_sets, paths_of, refuse_overlap, training_sets
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
    loss: Loss | Mapping[str, Loss] | None = None,
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
        loss: A host loss in place of the cached one, built or as a callable that takes the model; with several
            datasets also one for each by name. ``matryoshka_dims`` then only says what is evaluated, and ``"auto"``
            is what that loss trains.
        args: The host's training arguments, passed on as they are; only empty ``prompts`` are filled, on a copy.
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
    check_arguments(args, training_arguments, matryoshka_dims, mini_batch_size, loss)
    check_model(model)
    folder = resolve_output_dir(output_dir, args.output_dir if args else None)
    train = training_sets(train_dataset, num_negatives=num_negatives, documents=documents, seed=seed)
    evaluation = evaluation_sets(eval_dataset, documents)
    if not allow_overlap:
        refuse_overlap(train, evaluation)
    inputs = paths_of(model, train_dataset, eval_dataset)
    checkpoint = check_output_dir(folder, overwrite=overwrite, resume=resume, inputs=inputs)
    host_args = args or recipe.training_arguments(
        train.num_rows, output_dir=str(folder), seed=seed, evaluates=bool(evaluation), **training_arguments
    )
    check_host_arguments(host_args, prompts, train.columns, evaluates=bool(evaluation))
    if loss is None:
        check_contrast(min(host_args.per_device_train_batch_size, train.num_rows), train.num_negatives)

    model = model if isinstance(model, SentenceTransformer) else load_model(os.fspath(model))
    check_documents(model, documents)
    description = describe_model(model)
    dims = recipe.trained_dims(matryoshka_dims, model) if loss is None else ()
    loss = recipe.loss_for_model(loss, model, dims, mini_batch_size, host_args.per_device_train_batch_size)
    dims = recipe.evaluated_dims(matryoshka_dims, model, loss)
    evaluator = _evaluator(evaluation, model, dims, documents, show_progress_bar=not host_args.disable_tqdm)
    metric = evaluator.metric_name(model) if evaluator else None
    trainer = PageTrainer(
        model=model,
        args=recipe.arguments_for_model(host_args, model, prompts, train.columns, metric),
        train_dataset=train.for_host,
        loss=loss,
        evaluator=evaluator,
        callbacks=recipe.callbacks(args, training_arguments),
    )

    before = measure(trainer, evaluator)
    check_metric(trainer.args, before)
    if overwrite and trainer.is_world_process_zero():
        clear_run(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = measure(trainer, evaluator)
    if trainer.is_world_process_zero():
        model.save_pretrained(str(folder / "final"))
    chosen = settings(trainer, train=train, evaluation=evaluation, model=description, dims=dims, seed=seed)
    result = FinetuneResult(model.eval(), trainer, before, after, metric, folder, chosen)
    if trainer.is_world_process_zero():
        result.save()
    # A script that goes on with final/ in every process finds it whole.
    trainer.accelerator.wait_for_everyone()
    return result


def check_model(model: object) -> None:
    """Make sure that there is a model or a checkpoint, before the data are read.

    Raises:
        ConfigError: It is neither, or the checkpoint can't be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        check_checkpoint(os.fspath(model))
    elif not isinstance(model, SentenceTransformer):
        raise ConfigError(
            f"Expected a SentenceTransformer, a checkpoint's folder or its name, got {type(model).__name__}."
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

    Not by ``trainer.evaluate()``: called before ``train()`` with several processes, it makes the trainer take the model
    for wrapped already, the loss never gets the wrapped one, and the processes train apart without a word
    (sentence-transformers 6.2, transformers 5.23).
    """
    if evaluator is None:
        return {}
    with distributed_evaluation(trainer.model) as evaluates:
        metrics = evaluator(trainer.model) if evaluates else {}
    return {key: float(value) for key, value in broadcast_object_list([metrics])[0].items()}
