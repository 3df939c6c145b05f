"""``finetune_reranker``: from pages, queries and negatives to a better reranker, in one call."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sentence_transformers import CrossEncoder, CrossEncoderTrainingArguments
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.judgements import Judgements
from mmtune.data.relevance import Direction
from mmtune.errors import ConfigError
from mmtune.evaluation.mean import MeanEvaluator
from mmtune.evaluation.reranking import AnyRerankingEvaluator, build_reranking_evaluator
from mmtune.models.lora import LoraChoice, check_lora
from mmtune.training import recipe
from mmtune.training.checks import (
    check_arguments,
    check_candidates,
    check_contrast,
    check_directions,
    check_host_arguments,
    check_reranking_prompts,
    check_resumed,
    warn_of_rounding,
)
from mmtune.training.inputs import DatasetsLike, TrainingSets, evaluation_sets, paths_of, refuse_overlap, reranking_sets
from mmtune.training.kinds import RERANKING, require_reranker
from mmtune.training.losses import Loss
from mmtune.training.output import check_output_dir, resolve_output_dir
from mmtune.training.preparing import ready_model, thawed_afterwards
from mmtune.training.reranking_losses import check_negatives, form_of, reranking_loss
from mmtune.training.result import FinetuneResult
from mmtune.training.running import Place, run
from mmtune.training.settings import settings

EVALUATOR_NAME = "vdr-rerank"


def finetune_reranker(
    model: CrossEncoder | str | os.PathLike[str],
    train_dataset: DatasetsLike,
    eval_dataset: DatasetsLike | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    num_negatives: int = 4,
    directions: Sequence[Direction] = ("text_to_image",),
    loss: Loss | None = None,
    args: CrossEncoderTrainingArguments | None = None,
    documents: DocumentKind = "image",
    num_candidates: int = 10,
    lora: LoraChoice = None,
    freeze: Sequence[str] = (),
    allow_overlap: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 42,
    **training_arguments: Any,
) -> FinetuneResult:
    """Finetune a reranker on pages and queries, and measure what it gained.

    Without ``args`` this is the recipe of the guide to training multimodal rerankers with Sentence Transformers: one
    epoch, 4 batches of 8 pairs a step, learning rate 5e-6, binary cross-entropy. Data, arguments and the output folder
    are checked before weights are loaded.

    Args:
        model: A ``CrossEncoder``, or a checkpoint for ``build_reranker``. A model is trained in place.
        train_dataset: What to train on: a ``RetrievalDataset``, rows in a known layout, or what
            ``RetrievalDataset.load`` takes; several by name train together. Negatives are those that the dataset
            lists, as ``mine_hard_negatives`` finds them with a retriever, and random ones where lists are short.
        eval_dataset: What to measure on, before, during and after, likewise. The mean over several sets and directions
            chooses the checkpoint. ``None`` measures nothing.
        output_dir: Folder for checkpoints, model and report. ``None`` is ``args.output_dir``, or ``mmtune-output``.
        num_negatives: Negatives to each relevant pair.
        directions: What asks: ``"text_to_image"``, ``"image_to_text"`` or both, each batch from one of them.
        loss: A host loss in place of binary cross-entropy, built, as a class, or as a callable that takes the model.
            Listwise losses get a list a query, graded; contrastive ones conflict-free batches.
        args: The host's training arguments, passed on as they are; only empty ``prompts`` are filled, on a copy.
        documents: What a document is made of: ``"image"``, ``"text"`` or ``"text+image"``.
        num_candidates: The length of the lists that are ranked to measure, what is relevant included. They are longer
            where something has more relevant ones, and shorter where a small set has no more.
        lora: As in ``finetune``.
        freeze: As in ``finetune``.
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
        >>> from mmtune import build_reranker, finetune_reranker
        >>> reranker = build_reranker("Qwen/Qwen3-VL-2B-Instruct")  # doctest: +SKIP
        >>> finetune_reranker(reranker, "pages.parquet", directions=["text_to_image"])  # doctest: +SKIP
    """
    require_reranker(model, documents)
    check_arguments(RERANKING, args, training_arguments, loss=loss)
    check_directions(directions)
    check_candidates(num_candidates)
    check_negatives(form_of(loss), num_negatives)
    check_lora(lora)
    folder = resolve_output_dir(output_dir, args.output_dir if args else None)
    data = partial(
        reranking_sets, train_dataset, directions, num_negatives=num_negatives, documents=documents, seed=seed
    )
    train = data(form=form_of(loss) or "pairs")
    evaluation = evaluation_sets(eval_dataset, documents)
    if not allow_overlap:
        refuse_overlap(train, evaluation)
    inputs = paths_of(model, train_dataset, eval_dataset)
    place = Place(folder, check_output_dir(folder, overwrite=overwrite, resume=resume, inputs=inputs), overwrite)
    arguments = partial(
        _arguments,
        args,
        output_dir=str(folder),
        seed=seed,
        evaluates=bool(evaluation),
        **training_arguments,
    )
    host_args = arguments(train)
    options = {"documents": documents, "seed": seed, "show_progress_bar": not host_args.disable_tqdm}
    evaluator = _evaluator(evaluation, directions, num_candidates, **options)

    start = ready_model(model, RERANKING, documents=documents, freeze=freeze, lora=lora, seed=seed)
    with thawed_afterwards(start):
        model = start.model
        check_resumed(place.checkpoint, has_adapters=bool(start.facts["lora"]))
        loss = reranking_loss(loss, model, num_negatives)
        check_negatives(form_of(loss) or train.form, num_negatives)
        if (form := form_of(loss) or train.form) != train.form:  # a callable has only now told what it makes
            train = data(form=form)
            host_args = arguments(train)
        if args is None:
            host_args = recipe.with_rates(host_args, RERANKING, model, training_arguments, place.checkpoint)
        warn_of_rounding(model, host_args.learning_rate)
        metric = evaluator.metric_name(model) if evaluator else None
        trainer = RERANKING.trainer_class(
            model=model,
            args=recipe.reranking_arguments_for_model(host_args, model, train.direction_by_name, metric),
            train_dataset=train.for_host,
            loss=loss,
            evaluator=evaluator,
            callbacks=recipe.callbacks(args, training_arguments),
        )
        chosen = {"train": train, "evaluation": evaluation, "model": start.facts, "dims": (), "seed": seed}
        return run(
            trainer,
            evaluator,
            metric,
            place=place,
            settings=lambda: _with_facts(settings(trainer, **chosen), directions, train, evaluator, loss),
        )


def _arguments(
    args: CrossEncoderTrainingArguments | None,
    train: TrainingSets,
    *,
    evaluates: bool,
    **options: Any,
) -> BaseTrainingArguments:
    """The caller's arguments, or the recipe's, fitted to the rows and checked."""
    in_batch_negatives = train.form == "columns"
    host_args = args or recipe.training_arguments(
        RERANKING, train.num_rows, evaluates=evaluates, in_batch_negatives=in_batch_negatives, **options
    )
    check_host_arguments(host_args, None, None, evaluates=evaluates, in_batch_negatives=in_batch_negatives)
    check_reranking_prompts(host_args.prompts, list(train.by_name))
    if in_batch_negatives:
        check_contrast(host_args.per_device_train_batch_size, train.fewest_negatives)
    return host_args


def _evaluator(
    evaluation: Mapping[str, RetrievalDataset], directions: Sequence[Direction], num_candidates: int, **options: Any
) -> AnyRerankingEvaluator | None:
    """One evaluator for each set and direction; their mean where there are several."""
    several = len(evaluation) * len(directions) > 1
    parts: list[Any] = [
        build_reranking_evaluator(
            data,
            direction=direction,
            num_candidates=_fitting_candidates(num_candidates, data, direction),
            name=_name(name, direction if len(directions) > 1 else "") if several else EVALUATOR_NAME,
            **options,
        )
        for name, data in evaluation.items()
        for direction in directions
    ]
    return MeanEvaluator(parts, EVALUATOR_NAME) if several else next(iter(parts), None)


def _fitting_candidates(num_candidates: int, data: RetrievalDataset, direction: Direction) -> int:
    """More where more is relevant, and fewer where a small set has no more."""
    judgements = Judgements.of(data.relevance, direction)
    available = len(judgements.distinct_items)
    if available < 2:
        raise ConfigError(
            f"direction {direction!r} ranks {judgements.candidates.what[1]}, and the evaluation data have only "
            f"{available}. Add some, or leave the direction out."
        )
    return min(max(num_candidates, int(judgements.relevant.lengths.max())), available)


def _with_facts(
    chosen: dict[str, dict[str, Any]],
    directions: Sequence[Direction],
    train: TrainingSets,
    evaluator: AnyRerankingEvaluator | None,
    loss: nn.Module,
) -> dict[str, dict[str, Any]]:
    """The settings of a run, with what only rerankers have in place of what only embeddings have."""
    parts: list[Any] = list(getattr(evaluator, "parts", [evaluator])) if evaluator else []
    data = {"directions": list(directions), "form_of_rows": train.form, **chosen["data"]}
    data["evaluation_candidates"] = {part.name: len(part.lists[0].candidate_ids) for part in parts}
    arguments = getattr(loss, "get_config_dict", dict)()
    training = {"loss": chosen["training"]["loss"], "loss_arguments": arguments, **chosen["training"]}
    only_embeddings = ("matryoshka_dims", "evaluated_dims")
    return {
        **chosen,
        "data": data,
        "training": {name: value for name, value in training.items() if name not in only_embeddings},
    }


def _name(*parts: str) -> str:
    # metric keys are split at "_"
    return "-".join([EVALUATOR_NAME, *(part.replace("_", "-") for part in parts if part)])
