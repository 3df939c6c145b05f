"""``finetune``: from pages, queries and negatives to a better embedding model, in one call."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sentence_transformers.base.training_args import BaseTrainingArguments

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.evaluation.corpus import Retriever
from mmtune.evaluation.retrieval import Evaluator, build_evaluator
from mmtune.models.lora import LoraChoice, check_lora
from mmtune.training import recipe
from mmtune.training.checks import (
    check_arguments,
    check_contrast,
    check_host_arguments,
    check_resumed,
    warn_of_rounding,
)
from mmtune.training.inputs import DatasetsLike, evaluation_sets, paths_of, refuse_overlap, training_sets
from mmtune.training.kinds import kind_of
from mmtune.training.losses import Loss, evaluated_dims, loss_for_model, trained_dims
from mmtune.training.output import check_output_dir, resolve_output_dir
from mmtune.training.preparing import ready_model, thawed_afterwards
from mmtune.training.result import FinetuneResult
from mmtune.training.running import Place, run
from mmtune.training.settings import settings


def finetune(
    model: Retriever | str | os.PathLike[str],
    train_dataset: DatasetsLike,
    eval_dataset: DatasetsLike | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    num_negatives: int = 1,
    matryoshka_dims: Literal["auto"] | Sequence[int] | None = "auto",
    mini_batch_size: Literal["auto"] | int = "auto",
    loss: Loss | Mapping[str, Loss] | None = None,
    args: BaseTrainingArguments | None = None,
    prompts: dict[str, str] | str | None = "model",
    documents: DocumentKind = "image",
    lora: LoraChoice = None,
    freeze: Sequence[str] = (),
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
        model: A ``SentenceTransformer`` or, for late interaction, a ``MultiVectorEncoder``; or the checkpoint of
            either, for ``load_model`` or ``build_late_interaction``. A model is trained in place.
        train_dataset: What to train on: a ``RetrievalDataset``, rows in a known layout, what
            ``RetrievalDataset.load`` takes, or rows of ``training_rows``. Several by name train together, each batch
            from one of them: in proportion to their sizes, or in turn with
            ``multi_dataset_batch_sampler="round_robin"``.
        eval_dataset: What to measure on, before, during and after, likewise. The mean over several chooses the
            checkpoint. ``None`` measures nothing.
        output_dir: Folder for checkpoints, model and report. ``None`` is ``args.output_dir``, or ``mmtune-output``.
        num_negatives: Hard negatives a row.
        matryoshka_dims: Dimensions that the loss trains and the evaluator scores. ``"auto"`` is the model's and those
            of 2048, 1536, 1024, 512, 256, 128 and 64 below it; ``None`` trains the full size only, as late interaction
            always does.
        mini_batch_size: Rows in one forward pass of the cached loss; changes memory and speed, not the result.
            ``"auto"`` goes by the size of the model.
        loss: A host loss in place of the cached one, built or as a callable that takes the model; with several
            datasets also one for each by name. ``matryoshka_dims`` then only says what is evaluated, and ``"auto"``
            is what that loss trains.
        args: The host's training arguments for this kind of model, passed on as they are; only an empty ``prompts``
            or, for a Router, ``router_mapping`` is filled, on a copy.
        prompts: ``"model"`` trains with the prompts that ``encode_query`` and ``encode_document`` will use; else what
            the host's ``prompts`` takes, or ``None`` for none.
        documents: What a document is made of: ``"image"``, ``"text"`` or ``"text+image"``.
        lora: ``True`` trains adapters on the language model in place of all weights; or a config of peft.
        freeze: Parts of the model that stay as they are, e.g. ``("vision",)``; an unknown one is an error that lists
            those that the model has.
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
    kind = kind_of(model)
    check_arguments(
        kind, args, training_arguments, loss=loss, matryoshka_dims=matryoshka_dims, mini_batch_size=mini_batch_size
    )
    check_lora(lora)
    folder = resolve_output_dir(output_dir, args.output_dir if args else None)
    train = training_sets(train_dataset, num_negatives=num_negatives, documents=documents, seed=seed)
    evaluation = evaluation_sets(eval_dataset, documents)
    if not allow_overlap:
        refuse_overlap(train, evaluation)
    inputs = paths_of(model, train_dataset, eval_dataset)
    place = Place(folder, check_output_dir(folder, overwrite=overwrite, resume=resume, inputs=inputs), overwrite)
    host_args = args or recipe.training_arguments(
        kind,
        train.num_rows,
        output_dir=str(folder),
        seed=seed,
        evaluates=bool(evaluation),
        **training_arguments,
    )
    check_host_arguments(host_args, prompts, train.columns, evaluates=bool(evaluation))
    if loss is None:
        check_contrast(min(host_args.per_device_train_batch_size, train.num_rows), train.num_negatives)

    start = ready_model(model, kind, documents=documents, freeze=freeze, lora=lora, seed=seed)
    with thawed_afterwards(start):
        model = start.model
        check_resumed(place.checkpoint, has_adapters=bool(start.facts["lora"]))
        if args is None:
            host_args = recipe.with_rates(host_args, kind, model, training_arguments, place.checkpoint)
        warn_of_rounding(model, host_args.learning_rate)
        dims = trained_dims(matryoshka_dims, model) if loss is None else ()
        loss = loss_for_model(loss, model, kind, dims, mini_batch_size, host_args.per_device_train_batch_size)
        host_args = recipe.for_routes(host_args, model, loss, own=args is not None)
        dims = evaluated_dims(matryoshka_dims, model, loss)
        evaluator = _evaluator(evaluation, model, dims, documents, show_progress_bar=not host_args.disable_tqdm)
        metric = evaluator.metric_name(model) if evaluator else None
        trainer = kind.trainer_class(
            model=model,
            args=recipe.arguments_for_model(host_args, model, prompts, train.columns, metric),
            train_dataset=train.for_host,
            loss=loss,
            evaluator=evaluator,
            callbacks=recipe.callbacks(args, training_arguments),
        )
        chosen = {"train": train, "evaluation": evaluation, "model": start.facts, "dims": dims, "seed": seed}
        return run(trainer, evaluator, metric, place=place, settings=lambda: settings(trainer, **chosen))


def _evaluator(
    evaluation: Mapping[str, RetrievalDataset],
    model: Retriever,
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
