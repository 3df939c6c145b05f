"""``finetune``: from pages, queries and negatives to a better embedding model, in one call."""

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn
from transformers import TrainerCallback

from mmtune.arguments import MIXED, nearest_name, require_one_of, require_whole, require_wholes, shown
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DOCUMENT_KINDS, DocumentKind, kinds_of_documents
from mmtune.data.query_kinds import QUERY_KINDS, QueryKind, as_documents
from mmtune.errors import ConfigError
from mmtune.evaluation.base import Retriever
from mmtune.evaluation.mean import AnyEvaluator
from mmtune.evaluation.retrieval import build_evaluator
from mmtune.inference.recordings import count_cut
from mmtune.models.late_interaction import is_late_interaction
from mmtune.models.loading import check_checkpoint, check_kinds, parts_apart
from mmtune.models.lora import LoraChoice
from mmtune.models.opening import open_checkpoint
from mmtune.models.routes import ignores_prompt
from mmtune.serving.requests import prompt_of
from mmtune.training.call import Finetuning
from mmtune.training.checks import check_contrast, check_full_batch
from mmtune.training.inputs import DatasetsLike, Form, TrainingSets, training_sets
from mmtune.training.losses import Loss, build_loss, choose_dims, in_batch_loss, use_full_size
from mmtune.training.mini_batches import MINI_BATCHES, MiniBatches, choose_mini_batches
from mmtune.training.records import RunRecord
from mmtune.training.result import FinetuneResult
from mmtune.training.run import run
from mmtune.training.target_size import TargetSize, check_target_size, fit_size, settle_size
from mmtune.training.trainers import EMBEDDING, LATE_INTERACTION, Kind

logger = logging.getLogger(__name__)

_DIMS = "[64, 32], none above the dimension of the model"


def finetune(
    model: Retriever | str | os.PathLike[str],
    train_dataset: DatasetsLike,
    eval_dataset: DatasetsLike | None = None,
    *,
    guard_dataset: DatasetsLike | None = None,
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
    resume: bool | Literal["auto"] = False,
    keep: Literal["best", "last"] = "best",
    seed: int = 42,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    evaluator: BaseEvaluator | Callable[..., Any] | None = None,
    max_pixels: int | None = None,
    page_store: Literal["auto"] | str | os.PathLike[str] | None = "auto",
    thumbnails: bool = True,
    dry_run: bool = False,
    target_size: TargetSize = None,
    queries: QueryKind = "text",
    **training_arguments: Any,
) -> FinetuneResult:
    """Finetune an embedding model on pages and queries, and measure what it gained.

    Without ``args`` this is the recipe of the guide to training multimodal models with Sentence Transformers: one
    epoch, batches of 64, learning rate 2e-5, cached in-batch negatives with hard negatives, and Matryoshka dimensions.
    Data, arguments and the output folder are checked before weights are loaded.

    Args:
        model: A ``SentenceTransformer`` or, for late interaction, a ``MultiVectorEncoder``; or the checkpoint of
            either, for ``load_model`` or ``build_late_interaction``, in the type of weights whose training fits the
            device. A model is trained in place, in the type that it has.
        train_dataset: What to train on: a ``RetrievalDataset``, rows in a known layout, what
            ``RetrievalDataset.load`` takes, or rows of ``training_rows``. Several by name train together, each batch
            from one of them: in proportion to their sizes, or in turn with
            ``multi_dataset_batch_sampler="round_robin"``.
        eval_dataset: What to measure on, before, during and after, likewise. The mean over several chooses the
            checkpoint. ``None`` measures nothing.
        guard_dataset: What the model must not get worse at, e.g. pages of other fields: measured whenever
            ``eval_dataset`` is, and no checkpoint with a significant loss on it is kept as the best.
        output_dir: Folder for checkpoints, model and report. ``None`` is ``args.output_dir``, or ``mmtune-output``.
        num_negatives: Hard negatives a row.
        matryoshka_dims: Dimensions that the loss trains and the evaluator scores. ``"auto"`` is the model's and those
            of 2048, 1536, 1024, 512, 256, 128 and 64 below it; ``None`` trains the full size only, as late interaction
            always does.
        mini_batch_size: Rows in one forward pass of the cached loss; changes memory and speed, not the result.
            ``"auto"`` finds the largest that fits a GPU, without caching where the whole batch does; on a CPU it goes
            by the size of the model. A step that runs out of memory later is done again with half of it.
        loss: A host loss in place of the cached one, built or as a callable that takes the model; with several
            datasets also one for each by name. ``matryoshka_dims`` then only says what is evaluated, and ``"auto"``
            is what that loss trains.
        args: The host's training arguments for this kind of model, passed on as they are; only an empty ``prompts``
            or, for a Router, ``router_mapping`` is filled, on a copy.
        prompts: ``"model"`` trains with the prompts that ``encode_query`` and ``encode_document`` will use. A text,
            or texts by column, become the model's own, so that measuring, saving and using agree: that of ``query`` and
            that of the documents; a column without one keeps the model's. ``None`` takes the model's prompts away.
        documents: What a document is made of: ``"image"``, ``"text"``, ``"audio"``, ``"video"``, several joined as in
            ``"text+image"``, or ``"mixed"``, where each is what it has.
        lora: ``True`` trains adapters on the language model in place of all weights; or a config of peft.
        freeze: Parts of the model that stay as they are, e.g. ``("vision",)``; an unknown one is an error that lists
            those that the model has.
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
        target_size: The most dimensions that an embedding may have: the saved model cuts its embeddings to the
            largest trained size of no more, by the host's ``truncate_dim``. ``"auto"`` cuts to the smallest of these
            that ``size_frontier`` shows on the evaluation set to lose less than 0.01. ``None`` cuts nothing. What was
            chosen stands in ``settings``; ``SentenceTransformer(path, truncate_dim=...)`` loads another size.
        queries: What a query is made of, as ``documents`` says it of a document: ``"image"`` trains to find the page
            like this photo, ``"audio"`` the sound like this hum.
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
        ['final', 'metrics.json', 'mmtune_run.json', 'report.md']
    """
    call = EmbeddingFinetuning(
        kind=kind_of(model, documents, queries),
        model=model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        guard_dataset=guard_dataset,
        output_dir=output_dir,
        num_negatives=num_negatives,
        matryoshka_dims=matryoshka_dims,
        mini_batch_size=mini_batch_size,
        loss=loss,
        args=args,
        prompts=prompts,
        documents=documents,
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
        target_size=target_size,
        queries=queries,
        training_arguments=training_arguments,
    )
    return cast("FinetuneResult", run(call))  # a Plan for those who ask for one


def kind_of(model: object, documents: DocumentKind = "image", queries: QueryKind = "text") -> Kind:
    """The kind of a retriever or of its checkpoint, which is checked as far as its small files go.

    Args:
        model: A model, or its checkpoint.
        documents: What it is to embed; what is joined, it has to take in one input.
        queries: Likewise.

    Raises:
        ConfigError: It is neither, a reranker, or a checkpoint that can't be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        if open_checkpoint(path).saved_type == "CrossEncoder":  # the host would take its head off
            raise _is_reranker(repr(path))
        late = is_late_interaction(path)
        require_one_of("documents", documents, DOCUMENT_KINDS)
        require_one_of("queries", queries, QUERY_KINDS)
        kind_class = MultiVectorEncoder if late else SentenceTransformer
        check_checkpoint(path, model_class=kind_class, modalities=_modalities_for(documents, queries))
        return LATE_INTERACTION if late else EMBEDDING
    if isinstance(model, SentenceTransformer):
        return EMBEDDING
    if isinstance(model, MultiVectorEncoder):
        return LATE_INTERACTION
    if isinstance(model, CrossEncoder):
        raise _is_reranker("a CrossEncoder")
    raise ConfigError(
        f"model={shown(model)}: expected a SentenceTransformer, a MultiVectorEncoder, or a folder or name of one. "
        "Pass e.g. model='Qwen/Qwen3-VL-Embedding-2B'."
    )


def _is_reranker(model: str) -> ConfigError:
    return ConfigError(f"model={model}: finetune trains what finds pages. Use finetune_reranker(model, ...) for it.")


def _modalities_for(documents: DocumentKind, queries: QueryKind) -> tuple[str, ...]:
    """What a checkpoint has to take: texts, what else documents and queries are made of, and what is joined."""
    named = {*documents.split("+"), *queries.split("+")}
    files = [name for name in ("audio", "video", "image") if name in named]
    return (*dict.fromkeys([*files, "text", *(kind for kind in (documents, queries) if "+" in kind)]),)


def own_prompts(model: Retriever) -> dict[str, str]:
    """The prompts of ``encode_query`` and ``encode_document``, as ``query`` and ``document``; ``""`` for none."""
    return {"query": prompt_of(model, "query"), "document": prompt_of(model, "document")}


def prompts_by_side(given: Any, train: TrainingSets) -> dict[str, str | None]:
    """What prompts as the host takes them say for queries and for documents; ``None`` where they say nothing.

    Raises:
        ConfigError: They are none, are for columns that there are not, or differ within a side: a model has one prompt
            for all documents, so another one could be trained with, and never used.
    """
    if given is None or (isinstance(given, str) and given == "model"):
        return {"query": None, "document": None}
    if isinstance(given, str):
        return {"query": given, "document": given}
    if not isinstance(given, Mapping):
        raise ConfigError(f"prompts={given!r}: expected 'model', a text, a mapping of columns to texts, or None.")
    texts: dict[str, dict[str, str]] = {"query": {}, "document": {}}
    for name, value in given.items():
        columns = dict.fromkeys(train.columns, value) if name in train.by_name else {name: value}
        columns = dict(value) if isinstance(value, Mapping) and name in train.by_name else columns
        for column, text in columns.items():
            if column not in train.columns:
                nearest = nearest_name(column, train.columns) or train.columns[0]
                raise ConfigError(
                    f"prompts has a text for {column!r}, and the rows have the columns {train.columns}. Name one of "
                    f"these, e.g. prompts={{{nearest!r}: {text!r:.80}}}."
                )
            if not isinstance(text, str):
                raise ConfigError(f"prompts has {text!r} for {column!r}: expected a text.")
            texts["query" if column == "query" else "document"].setdefault(text, f"{name}: {column}")
    for side, found in texts.items():
        if len(found) > 1:
            one, other = list(found)[:2]
            raise ConfigError(
                f"prompts has {one!r} and {other!r} ({found[one]}, {found[other]}), and a model has one prompt for "
                f"each {side}. Pass one text for all columns and datasets of a side."
            )
    return {side: next(iter(found), None) for side, found in texts.items()}


@dataclass(frozen=True, kw_only=True)
class EmbeddingFinetuning(Finetuning):
    """A call of ``finetune``."""

    function: ClassVar[str] = "finetune"

    num_negatives: int
    matryoshka_dims: Literal["auto"] | Sequence[int] | None
    mini_batch_size: Literal["auto"] | int
    prompts: dict[str, str] | str | None
    target_size: TargetSize = None

    def check_arguments(self) -> None:
        """Make sure of dimensions, mini-batches and negatives."""
        require_whole("num_negatives", self.num_negatives, at_least=0)
        dims = self.matryoshka_dims
        if dims is not None and not (isinstance(dims, str) and dims == "auto"):
            if not require_wholes("matryoshka_dims", dims, or_else="'auto', None", example=_DIMS):
                raise ConfigError("matryoshka_dims is empty. Name a dimension, or pass None for the full size only.")
            if not self.kind.truncates:
                raise ConfigError(
                    f"matryoshka_dims={dims!r}: late interaction has one vector a token, of one "
                    "size (sentence-transformers 6.2). Leave matryoshka_dims out; build_late_interaction takes the "
                    "dimension."
                )
        check_target_size(self.target_size, self.kind, dims, self.eval_dataset)
        if not (isinstance(self.mini_batch_size, str) and self.mini_batch_size == "auto"):
            require_whole("mini_batch_size", self.mini_batch_size, or_else="'auto'")
            if self.loss is not None:
                warnings.warn("mini_batch_size is not used: the loss that was given has its own.", stacklevel=4)

    def settle_size(
        self, model: Any, loss: Any, args: BaseTrainingArguments, evaluation: Mapping[str, RetrievalDataset]
    ) -> dict[str, Any]:
        """What was asked for, as the model's ``truncate_dim``."""
        if self.target_size is None:
            return {}
        return settle_size(
            self.target_size,
            model,
            self._trained_dims(model, loss),
            next(iter(evaluation.values()), None),
            documents=self.documents,
            queries=self.queries,
            batch_size=args.per_device_eval_batch_size,
            show_progress_bar=not args.disable_tqdm,
        )

    def _trained_dims(self, model: Any, loss: Any) -> Sequence[int]:
        return self._evaluated_dims(model, loss) or (model.get_embedding_dimension(),)

    def form_of(self, loss: Any) -> Form:
        """A column for the query and for each document, whatever the loss."""
        return "columns"

    def read_rows(self, form: Form) -> TrainingSets:
        """A set for each dataset."""
        return training_sets(
            self.train_dataset,
            num_negatives=self.num_negatives,
            documents=self.documents,
            seed=self.seed,
            queries=self.queries,
            apart=parts_apart(self.model) if self.documents == MIXED else frozenset(),
        )

    def check_data(
        self, train: TrainingSets, evaluation: Mapping[str, RetrievalDataset], args: BaseTrainingArguments
    ) -> None:
        """Make sure that prompts are for columns that there are, and that a batch has something to contrast."""
        if self.documents == MIXED:
            corpora = [part.data.corpus for part in train.by_name.values()]
            corpora += [data.corpus for data in evaluation.values()]
            check_kinds(self.model, {kind: None for corpus in corpora for kind in kinds_of_documents(corpus, MIXED)})
        prompts_by_side(args.prompts or self.prompts, train)
        if args.prompts and self.prompts not in ("model", None, args.prompts):
            warnings.warn(f"prompts={self.prompts!r} is not used: args.prompts is {args.prompts!r}.", stacklevel=5)
        check_full_batch(args, {name: len(part.rows) for name, part in train.by_name.items()})
        if isinstance(self.loss, Mapping) and set(self.loss) != set(train.by_name):
            raise ConfigError(
                f"loss has the names {list(self.loss)}, and the training sets are {list(filter(None, train.by_name))}. "
                "Expected a loss for each of them, or one for all. Make the names agree."
            )
        if self.loss is None:
            most = max(part.view.num_negatives for part in train.by_name.values())
            check_contrast(min(args.per_device_train_batch_size, train.num_rows), most)
            if most == 0 < self.num_negatives:
                logger.warning(
                    "The training data list no negatives: pages are told apart from the others of their batch only. "
                    "mine_hard_negatives(train_dataset, model) finds some."
                )

    def build_loss(
        self, model: Retriever, args: BaseTrainingArguments, train: TrainingSets, began: RunRecord | None
    ) -> nn.Module | dict[str, nn.Module]:
        """The caller's loss, or one for each dataset, else that of the recipe; the model gives its full size again."""
        use_full_size(model)
        loss = self._build_loss(model, args, train, began)
        if self.target_size is not None:
            fit_size(self.target_size, self._trained_dims(model, loss))
        return loss

    def _build_loss(
        self, model: Retriever, args: BaseTrainingArguments, train: TrainingSets, began: RunRecord | None
    ) -> nn.Module | dict[str, nn.Module]:
        if isinstance(self.loss, Mapping):
            return {name: build_loss(part, model) for name, part in self.loss.items()}
        if self.loss is not None:
            return build_loss(self.loss, model)
        if self.mini_batch_size == "auto":
            found = choose_mini_batches(model, args, train, began.settings.get(MINI_BATCHES) if began else None)
        else:
            found = MiniBatches(int(self.mini_batch_size), is_cached=True, reason="given")
        return in_batch_loss(model, self.kind, matryoshka_dims=self.matryoshka_dims, mini_batches=found)

    def build_evaluator(
        self,
        evaluation: Mapping[str, RetrievalDataset],
        model: Retriever,
        loss: object,
        args: BaseTrainingArguments,
        name: str | None = None,
    ) -> AnyEvaluator:
        """An evaluator at the full size and at each dimension that is trained or asked for."""
        return build_evaluator(
            evaluation[""] if list(evaluation) == [""] else evaluation,
            model=model,
            name=name or "vdr",
            truncate_dims=[dim for dim in self._evaluated_dims(model, loss) if dim != model.get_embedding_dimension()],
            documents=self.documents,
            queries=self.queries,
            batch_size=args.per_device_eval_batch_size,
            show_progress_bar=not args.disable_tqdm,
        )

    def settle_prompts(self, model: Retriever, train: TrainingSets, args: BaseTrainingArguments) -> Any:
        """For each column the prompt that ``encode_query`` and ``encode_document`` will use; without empty ones.

        The host's trainer applies no prompts by itself, and its ``encode`` methods do (sentence-transformers 6.2):
        training and use would differ. Prompts that were given become the model's own: this changes the model.
        """
        given = args.prompts or self.prompts
        own = own_prompts(model)
        settled = dict(own)
        if given is None:
            settled = dict.fromkeys(own, "")
        elif given != "model":
            # args are trained with as they are: a column that they leave out has no prompt
            left_out = dict.fromkeys(own, "") if args.prompts else own
            settled = {
                side: left_out[side] if text is None else text for side, text in prompts_by_side(given, train).items()
            }
        if settled != own:
            model.prompts |= settled
        if args.prompts:
            return args.prompts
        by_column = {name: settled["query" if name == "query" else "document"] for name in train.columns}
        return {name: prompt for name, prompt in by_column.items() if prompt}

    def describe(
        self, train: TrainingSets, evaluator: AnyEvaluator | None, model: Retriever, loss: object
    ) -> dict[str, dict[str, Any]]:
        """The dimensions."""
        first = next(iter(loss.values())) if isinstance(loss, Mapping) else loss
        facts: dict[str, Any] = {
            "matryoshka_dims": list(getattr(first, "matryoshka_dims", ())),
            "evaluated_dims": list(self._evaluated_dims(model, loss)),
            "similarity": str(model.similarity_fn_name),
            "prompts_of_model": own_prompts(model),
        }
        if self.queries != "text":
            facts["query_prompt_has_no_effect"] = ignores_prompt(model, self.queries)
        # a mixed corpus may stand in several sets, one for each kind
        distinct = {id(part.data): (name, part) for name, part in train.by_name.items()}.values()
        cut: dict[str, dict[str, Any]] = {"read_in_part": {}, "queries_read_in_part": {}}
        for name, part in distinct:
            limits, asking = part.view.source.reader.limits, as_documents(part.data.queries)
            cut["read_in_part"][name] = count_cut(model, part.data.corpus, self.documents, limits)
            cut["queries_read_in_part"][name] = count_cut(model, asking, self.queries, limits, "query")
        read_in_part = {
            key: next(iter(found.values())) if len(found) == 1 else found
            for key, found in cut.items()
            if any(found.values())
        }
        return {"data": {"queries": self.queries, **read_in_part}, "training": facts}

    def _evaluated_dims(self, model: Retriever, loss: object) -> tuple[int, ...]:
        """The dimensions that the caller names, else those that the loss trains."""
        choice = getattr(loss, "matryoshka_dims", None) if self.matryoshka_dims == "auto" else self.matryoshka_dims
        return choose_dims(choice, model)
