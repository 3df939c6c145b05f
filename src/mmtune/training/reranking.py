"""``finetune_reranker``: from pages, queries and negatives to a better reranker, in one call."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

from sentence_transformers import CrossEncoder, CrossEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn
from transformers import TrainerCallback

from mmtune.arguments import listed, require_whole, shown
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, kinds_of_documents, require_pairs_of
from mmtune.data.judgements import Judgements
from mmtune.data.query_kinds import QueryKind
from mmtune.data.relevance import Direction, DirectionName, resolve_direction
from mmtune.errors import ConfigError
from mmtune.evaluation.mean import AnyEvaluator, MeanEvaluator
from mmtune.evaluation.reranking import AnyRerankingEvaluator, build_reranking_evaluator
from mmtune.models.loading import check_checkpoint
from mmtune.models.lora import LoraChoice
from mmtune.training.call import Finetuning
from mmtune.training.checks import check_contrast, check_full_batch
from mmtune.training.inputs import DatasetsLike, Form, TrainingSets, reranking_sets
from mmtune.training.losses import Loss, check_negatives, find_form, reranking_loss
from mmtune.training.records import RunRecord
from mmtune.training.result import FinetuneResult
from mmtune.training.run import run
from mmtune.training.trainers import RERANKING

logger = logging.getLogger(__name__)

EVALUATOR_NAME = "vdr-rerank"


def finetune_reranker(
    model: CrossEncoder | str | os.PathLike[str],
    train_dataset: DatasetsLike,
    eval_dataset: DatasetsLike | None = None,
    *,
    guard_dataset: DatasetsLike | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    num_negatives: int = 4,
    directions: Sequence[DirectionName] = ("text_to_image",),
    loss: Loss | None = None,
    args: CrossEncoderTrainingArguments | None = None,
    documents: DocumentKind = "image",
    num_candidates: int = 10,
    lora: LoraChoice = None,
    freeze: Sequence[str] = (),
    allow_overlap: bool = False,
    overwrite: bool = False,
    resume: bool | Literal["auto"] = False,
    keep: Literal["best", "last"] = "best",
    seed: int = 42,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    evaluator: BaseEvaluator | Callable[..., Any] | None = None,
    max_pixels: int | None = None,
    page_store: Literal["auto"] | str | os.PathLike[str] | None = "auto",
    thumbnails: bool = True,
    dry_run: bool = False,
    queries: QueryKind = "text",
    **training_arguments: Any,
) -> FinetuneResult:
    """Finetune a reranker on pages and queries, and measure what it gained.

    Without ``args`` this is the recipe of the guide to training multimodal rerankers with Sentence Transformers: one
    epoch, 4 batches of 8 pairs a step, learning rate 5e-6, binary cross-entropy. Data, arguments and the output folder
    are checked before weights are loaded.

    Args:
        model: A ``CrossEncoder``, or a checkpoint for ``build_reranker``, in the type of weights whose training fits
            the device. A model is trained in place, in the type that it has.
        train_dataset: What to train on: a ``RetrievalDataset``, rows in a known layout, or what
            ``RetrievalDataset.load`` takes; several by name train together. Negatives are those that the dataset
            lists, as ``mine_hard_negatives`` finds them with a retriever, and random ones where lists are short.
        eval_dataset: What to measure on, before, during and after, likewise. The mean over several sets and directions
            chooses the checkpoint. ``None`` measures nothing.
        guard_dataset: What the model must not get worse at, e.g. pages of other fields: measured whenever
            ``eval_dataset`` is, and no checkpoint with a significant loss on it is kept as the best.
        output_dir: Folder for checkpoints, model and report. ``None`` is ``args.output_dir``, or ``mmtune-output``.
        num_negatives: Negatives to each relevant pair.
        directions: What asks: ``"text_to_image"`` is queries for documents, ``"image_to_text"`` documents for queries,
            or both, each batch from one of them. What they are made of may stand in their place, as in
            ``"video_to_text"``, and then stands in the names of metrics.
        loss: A host loss in place of binary cross-entropy, built, as a class, or as a callable that takes the model.
            Listwise losses get a list a query, graded; contrastive ones conflict-free batches.
        args: The host's training arguments, passed on as they are; only empty ``prompts`` are filled, on a copy.
        documents: What a document is made of: ``"image"``, ``"text"``, ``"text+image"``, ``"video"`` or ``"mixed"``.
        num_candidates: The length of the lists that are ranked to measure, one relevant candidate included. A list is
            longer where more is relevant, as in ``build_reranking_evaluator``, and shorter where a small set has no
            more.
        lora: As in ``finetune``.
        freeze: As in ``finetune``.
        allow_overlap: Accept documents that are relevant in training and in evaluation.
        overwrite: Replace the run that ``output_dir`` holds, once this one has a checkpoint of its own.
        resume: Go on with the run that ``output_dir`` holds, from its last whole checkpoint. ``"auto"`` goes on if
            there is something to go on from, starts otherwise, and returns a run that is at its end as it is.
        keep: ``"best"`` results in the best measurement, the model as it came included, where there is an evaluation
            set and the run loads its best checkpoint; ``"last"`` in the last weights.
        seed: Of filling up negatives, and of training where there are no ``args``.
        callbacks: Callbacks of transformers, e.g. ``[EarlyStoppingCallback(3)]``, besides those of the recipe.
        evaluator: An evaluator of the host to call before, during and after training. Beside ``eval_dataset`` it adds
            its metrics; alone, its ``primary_metric`` chooses the checkpoint.
        max_pixels: Largest number of pixels a page after resizing, as in ``load_model``; saved with the model. ``None``
            leaves the model's own limit.
        page_store: Where what the image processor makes of a page is kept, as bytes and by content, so that further
            epochs and evaluations neither decode nor resize it again. ``"auto"`` keeps it for the run: in memory, or
            in the output folder where several processes read pages. A folder keeps it for other runs, too.
            ``None`` keeps nothing. What is trained and measured is the same to the bit.
        thumbnails: Whether ``report.html`` shows pages of the evaluation set; ``False`` for confidential ones.
        dry_run: Train nothing and write nothing: time a few steps, an evaluation of a few pages and a checkpoint, put
            the weights back, and return a ``Plan`` of the run in place of its result.
        queries: What a query is made of, as ``documents`` says it of a document: ``"image"`` trains to find the page
            like this photo.
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
    _require_reranker(model, documents, queries)
    call = RerankerFinetuning(
        kind=RERANKING,
        model=model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        guard_dataset=guard_dataset,
        output_dir=output_dir,
        num_negatives=num_negatives,
        directions=directions,
        loss=loss,
        args=args,
        documents=documents,
        num_candidates=num_candidates,
        lora=lora,
        freeze=freeze,
        allow_overlap=allow_overlap,
        overwrite=overwrite,
        resume=resume,
        keep=keep,
        seed=seed,
        callbacks=callbacks,
        evaluator=evaluator,
        max_pixels=max_pixels,
        page_store=page_store,
        thumbnails=thumbnails,
        dry_run=dry_run,
        queries=queries,
        training_arguments=training_arguments,
    )
    return cast("FinetuneResult", run(call))  # a Plan for those who ask for one


def _require_reranker(model: object, documents: str, queries: str) -> None:
    """Make sure that there is a reranker, or a checkpoint to build one from, before the data are read."""
    require_pairs_of(documents, queries)
    if isinstance(model, (str, os.PathLike)):  # a checkpoint for texts alone does for documents="text"
        modality = next((name for name in ("image", "video") if name in documents), "text")
        check_checkpoint(os.fspath(model), model_class=CrossEncoder, modalities=(modality,))
    elif not isinstance(model, CrossEncoder):
        raise ConfigError(
            f"model={shown(model)}: expected a CrossEncoder, a checkpoint's folder or its name. Pass e.g. "
            "build_reranker('Qwen/Qwen3-VL-2B-Instruct'), which makes one from a model that reads text and images "
            "together."
        )
    elif model.num_labels != 1:
        raise ConfigError(
            f"The model gives {model.num_labels} scores to a pair, and a reranker gives one, to rank by. Load it with "
            "num_labels=1."
        )


@dataclass(frozen=True, kw_only=True)
class RerankerFinetuning(Finetuning):
    """A call of ``finetune_reranker``."""

    function: ClassVar[str] = "finetune_reranker"

    loss: Loss | None
    num_negatives: int
    directions: Sequence[DirectionName]
    num_candidates: int

    def check_arguments(self) -> None:
        """Make sure of directions, candidates and negatives."""
        directions = self.directions
        if not isinstance(directions, (list, tuple)) or not directions:
            known = get_args(Direction)
            raise ConfigError(f"directions={directions!r}: expected one or both of {known}, e.g. ({known[0]!r},).")
        asking = [
            resolve_direction(each, self.queries, self.documents, what="directions holds ") for each in directions
        ]
        if len(set(asking)) < len(asking):
            raise ConfigError(f"directions={directions!r} names one twice. Name each once.")
        require_whole("num_negatives", self.num_negatives, at_least=0)
        require_whole("num_candidates", self.num_candidates, at_least=2)
        check_negatives(find_form(self.loss), self.num_negatives)

    def form_of(self, loss: Any) -> Form:
        """Pairs for a callable that does not tell yet."""
        return find_form(loss) or "pairs"

    def read_rows(self, form: Form) -> TrainingSets:
        """A set for each dataset and direction."""
        return reranking_sets(
            self.train_dataset,
            self.directions,
            form=form,
            num_negatives=self.num_negatives,
            documents=self.documents,
            seed=self.seed,
            queries=self.queries,
        )

    def check_data(
        self, train: TrainingSets, evaluation: Mapping[str, RetrievalDataset], args: BaseTrainingArguments
    ) -> None:
        """Make sure of what mixed documents are, of prompts, and that there is something to tell apart."""
        for data in (*(part.data for part in train.by_name.values()), *evaluation.values()):
            require_pairs_of(self.documents, self.queries, kinds_of_documents(data.corpus, self.documents))
        # The host reads a pair under one prompt, by training set.
        prompts: Any = args.prompts
        if prompts is not None and not isinstance(prompts, str):
            named = [name for name in train.by_name if name]
            example = f"{{{named[0]!r}: 'Find the page.'}}" if named else "'Find the page.'"
            sets = f"texts by training set ({listed(named)})" if named else "with several directions texts by these"
            expected = f"a text, or {sets}. Pass e.g. prompts={example}"
            if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
                raise ConfigError(f"prompts={prompts!r}: expected {expected}.")
            unknown = [name for name in prompts if name not in named]
            if unknown:
                raise ConfigError(
                    f"prompts has a text for {unknown[0]!r}, which is no training set. Expected {expected}."
                )
        texts_of_direction: dict[str, set[str]] = {}
        for name, prompt in prompts.items() if isinstance(prompts, dict) else ():
            texts_of_direction.setdefault(train.by_name[name].view.direction, set()).add(prompt)
        for direction, texts in texts_of_direction.items():
            if len(texts) > 1:
                raise ConfigError(
                    f"prompts has {' and '.join(map(repr, sorted(texts)))} for sets of the direction {direction!r}, "
                    "and a model has one prompt for each direction. Pass one text for all of them."
                )
        check_full_batch(args, {name: len(part.rows) for name, part in train.by_name.items()})
        if train.form == "columns":
            fewest = min(part.view.num_negatives for part in train.by_name.values())
            check_contrast(args.per_device_train_batch_size, fewest)
        for data in evaluation.values():
            for direction in self.directions:
                self._fit_candidates(data, direction)  # raises where there is nothing to rank

    def build_loss(
        self, model: CrossEncoder, args: BaseTrainingArguments, train: TrainingSets, began: RunRecord | None
    ) -> nn.Module:
        """The caller's loss or that of the recipe."""
        loss = reranking_loss(self.loss, model, self.num_negatives)
        check_negatives(self.form_of(loss), self.num_negatives)
        return loss

    def build_evaluator(
        self,
        evaluation: Mapping[str, RetrievalDataset],
        model: CrossEncoder,
        loss: object,
        args: BaseTrainingArguments,
        name: str | None = None,
    ) -> AnyRerankingEvaluator:
        """One evaluator for each set and direction; their mean where there are several."""
        parts: list[Any] = []
        prefix = name or EVALUATOR_NAME
        several = len(evaluation) * len(self.directions) > 1
        for name, data in evaluation.items():
            for direction in self.directions:
                own_name = (name, direction.replace("_", "-") if len(self.directions) > 1 else "")
                part = build_reranking_evaluator(
                    data,
                    direction=direction,
                    num_candidates=self._fit_candidates(data, direction),
                    # metric keys are split at "_"
                    name="-".join(filter(None, (prefix, *own_name))) if several else prefix,
                    documents=self.documents,
                    queries=self.queries,
                    seed=self.seed,
                    batch_size=args.per_device_eval_batch_size,
                    show_progress_bar=not args.disable_tqdm,
                )
                parts.append(part)
        return MeanEvaluator(parts, prefix) if several else parts[0]

    def settle_prompts(self, model: CrossEncoder, train: TrainingSets, args: BaseTrainingArguments) -> Any:
        """The caller's prompt for each set, else the model's for what asks in it.

        The caller's become the model's own, so that evaluation and the saved model use them too: this changes the
        model. ``predict`` uses one by itself where there is one direction.
        """
        given: Any = args.prompts
        default = model.prompts.get(model.default_prompt_name or "", "")
        directions = {name: part.view.direction for name, part in train.by_name.items()}
        prompts = {name: model.prompts.get(direction, default) for name, direction in directions.items()}
        if given:
            chosen = dict.fromkeys(prompts, given) if isinstance(given, str) else given
            for name, prompt in chosen.items():
                model.prompts[directions[name]] = prompt
            prompts = {name: model.prompts.get(direction, default) for name, direction in directions.items()}
            if len(set(directions.values())) == 1 and not model.default_prompt_name:
                model.default_prompt_name = next(iter(directions.values()))
            elif not model.default_prompt_name:
                logger.warning(
                    "The model has a prompt for each direction, and predict() uses none by itself: pass prompt_name, "
                    "e.g. prompt_name=%r.",
                    next(iter(directions.values())),
                )
        prompts = {name: prompt for name, prompt in prompts.items() if prompt}
        return prompts.get("", prompts) or given

    def describe(
        self, train: TrainingSets, evaluator: AnyEvaluator | None, model: CrossEncoder, loss: object
    ) -> dict[str, dict[str, Any]]:
        """What asks, what the rows and the lists to rank look like, and how the loss is set."""
        parts: list[Any] = list(getattr(evaluator, "parts", [evaluator])) if evaluator else []
        data = {
            "directions": list(self.directions),
            "queries": self.queries,
            "form_of_rows": train.form,
            "evaluation_candidates": {part.name: min(len(each.candidate_ids) for each in part.lists) for part in parts},
        }
        return {"data": data, "training": {"loss_arguments": getattr(loss, "get_config_dict", dict)()}}

    def _fit_candidates(self, data: RetrievalDataset, direction: DirectionName) -> int:
        """Candidates in a list with one relevant one: fewer than asked for where a small set has no more."""
        judgements = Judgements.of(data.relevance_of(self.documents, self.queries), direction)
        available = len(judgements.distinct_items)
        if available < 2:
            raise ConfigError(
                f"direction {direction!r} ranks {judgements.candidates.what[1]}, and the evaluation data have only "
                f"{available}. Add some, or leave the direction out."
            )
        judgements.require_something_wrong()
        return min(self.num_candidates, available)
