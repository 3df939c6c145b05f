"""What the host has for each kind of model, and what a trainer for pages does in another way.

Texts stay texts, no training image ends in a model card, logs are one line, and a run that resumes goes on as it began.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback

from mmtune.arguments import listed
from mmtune.data.documents import as_host_input
from mmtune.errors import ConfigError
from mmtune.evaluation.history import CHECKPOINT_FILE
from mmtune.host import OwnCheckpoints, innermost_sampler, is_in_parts, uncompiled
from mmtune.inference.preprocessing import prepare_pages
from mmtune.models.adapters import has_lora, load_adapters
from mmtune.models.kinds import HostModel
from mmtune.models.late_interaction import build_late_interaction
from mmtune.models.loading import load_model
from mmtune.models.precision import as_saved, convert_to_saved
from mmtune.models.rerankers import build_reranker
from mmtune.training.batches import ConflictFreeBatchSampler, ShuffledBatchSampler
from mmtune.training.callbacks import BestCheckpointHere, EpochOfSampler, ShortLogs, ShortProgress
from mmtune.training.evaluators import GUARD_IS_WORSE, RunEvaluator
from mmtune.training.mini_batches import describe_mini_batches, halve_mini_batches
from mmtune.training.records import RECORD, RunRecord, checkpoint_step

_STATE_OF_TRAINING = ["*.pt", "*.pth", "trainer_state.json", "training_args.bin", RECORD, "global_step*", "optimizer*"]
_OF_DATA = [CHECKPOINT_FILE]
"""Ids of queries and documents are nobody's business but the owner's: they are never published."""
_AGAINST_DIVERGENCE = (
    "The last checkpoint is as it was before. Lower learning_rate, lengthen the warm-up, or look at the pages of these "
    "queries, and start anew in another folder or with overwrite=True."
)


class TextsAsTexts(BaseDataCollator):
    """A host's collator, told that every text is a text, also one that looks like the path of an image.

    Attributes:
        says_texts: Whether texts are given as ``{"text": ...}``. A reranker that knows no messages takes bare texts
            only, and the host never takes those for paths.
    """

    says_texts = True

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as the host collates it."""
        if not self.says_texts:
            return super().__call__(features)
        kept = {"dataset_name", *self.valid_label_columns}
        return super().__call__(
            [{name: value if name in kept else _as_inputs(value) for name, value in row.items()} for row in features]
        )


def _as_inputs(value: Any) -> Any:
    """What a column holds, for the host: one query or document, or the list of them that listwise losses take."""
    return [as_host_input(part) for part in value] if isinstance(value, list) else as_host_input(value)


class PageTrainer(OwnCheckpoints, BaseTrainer):
    """A host's trainer for rows that decode pages when they are read.

    Attributes:
        record: What the run was begun with, for its checkpoints.
        logs: What writes a line for each measurement; ``None`` in a notebook, where the host shows a table.
        compensates: Whether AdamW keeps what half precision rounds away of its steps (Kahan summation). The arguments
            name the host's ``stable_adamw`` then, which is of the same package and also clips each step.
        saved_types: The type of each weight in ``final/``, by ``id``; one that is missing is saved as it is.
    """

    record: RunRecord | None = None
    compensates: bool = False
    saved_types: Mapping[int, torch.dtype] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pushes: list[Future[Any]] = []
        self.add_callback(EpochOfSampler)
        self.add_callback(BestCheckpointHere)
        # In a notebook the host shows a table of its own, which stays.
        self.logs: ShortLogs | None = None
        if self.pop_callback(ProgressCallback) is not None:
            self.logs = ShortProgress()
        elif self.pop_callback(PrinterCallback) is not None:
            self.logs = ShortLogs()
        if self.logs is not None:
            self.add_callback(self.logs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The host's model card with everything that the host fills in, except from the rows.

        The host decodes 100 rows a column for examples and statistics, twice, and copies pages into ``assets/`` of
        every checkpoint, from where a push to the Hub would publish them (sentence-transformers 6.2).
        """
        card = self.model_card_callback_class(default_args_dict)
        self.add_callback(card)
        without_rows = copy.copy(self)
        without_rows.train_dataset = without_rows.eval_dataset = None
        card.on_init_end(self.args, self.state, self.control, model=self.model, trainer=without_rows)
        data: Any = self.model.model_card_data
        data.generate_widget_examples = False
        if isinstance(data, SentenceTransformerModelCardData):
            data.ir_model = True

    def as_saved(self) -> AbstractContextManager[None]:
        """The model as ``final/`` will have it, for as long as the block runs, so that it can be measured and saved."""
        return nullcontext() if is_in_parts(self) else as_saved(uncompiled(self.model), self.saved_types)

    def become_saved(self) -> None:
        """Makes the model for good what ``as_saved`` shows."""
        if not is_in_parts(self):
            model = self.accelerator.unwrap_model(uncompiled(self.model), keep_fp32_wrapper=False)
            convert_to_saved(model, self.saved_types)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The host's metrics, of the model as it would be saved."""
        with self.as_saved():
            return super().evaluate(*args, **kwargs)

    def may_be_best(self, metrics: dict[str, float]) -> bool:
        """Not with a significant loss on the guard set."""
        return not metrics.get(f"eval_{GUARD_IS_WORSE}")

    def get_optimizer_cls_and_kwargs(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The host's, or compensated AdamW with what the host gives ``stable_adamw``."""
        optimizer, options = super().get_optimizer_cls_and_kwargs(*args, **kwargs)
        if not self.compensates:
            return optimizer, options
        import optimi

        # Its Triton kernel has to be compiled, which some images for GPUs can't. In torch it takes milliseconds a step.
        return optimi.AdamW, {**options, "triton": False}

    def get_train_dataloader(self) -> DataLoader:
        """The host's data loader; its sampler stays in ``train_sampler``."""
        loader = super().get_train_dataloader()
        self.train_sampler = innermost_sampler(loader)
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The host's, which leaves a loss that is no number out of its log and goes on.

        Raises:
            ConfigError: The loss is no number; the message names the queries of the step.
        """
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            self._halve_mini_batches(error)
            return self.training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            raise ConfigError(
                f"The training diverges: the loss of step {self.state.global_step + 1} is {float(loss.mean())}"
                f"{self._describe_step()}. {_AGAINST_DIVERGENCE}"
            )
        return loss

    def _halve_mini_batches(self, error: torch.OutOfMemoryError) -> None:
        """Let a step that ran out of memory be done again with mini-batches of half the size.

        Only where the step is all that its gradients come from: else those of earlier batches would be lost, or other
        processes wait for this one.

        Raises:
            ConfigError: It can't be.
        """
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        size = halve_mini_batches(self.loss) if alone else None
        if size is None:
            tried = describe_mini_batches(self.loss, self.args.per_device_train_batch_size)["size"]
            raise ConfigError(
                f"Step {self.state.global_step + 1} ran out of memory with mini-batches of {tried}: {error} Pass a "
                "smaller mini_batch_size, per_device_train_batch_size or max_pixels, or lora=True, and resume='auto'."
            ) from error
        self.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"Step {self.state.global_step + 1} ran out of memory and is done again, with mini-batches of {size} "
            f"in place of {2 * size}.",
            stacklevel=2,
        )

    def check_weights(self) -> None:
        """Make sure that the weights are numbers.

        Raises:
            ConfigError: Some are not.
        """
        for name, weight in uncompiled(self.model).named_parameters():
            if weight.requires_grad and not torch.isfinite(weight).all():
                raise ConfigError(
                    f"The training diverges: after step {self.state.global_step} the weight {name!r} is no number any "
                    f"more{self._describe_step(-1)}. {_AGAINST_DIVERGENCE}"
                )

    def _describe_step(self, offset: int = 0) -> str:
        """The queries of the step that is under way, where the order of batches can be read again."""
        sampler, rows = self.train_sampler, self.train_dataset
        if not isinstance(sampler, (ConflictFreeBatchSampler, ShuffledBatchSampler)) or not isinstance(rows, Dataset):
            return ""
        processes, accumulated = self.args.world_size, self.args.gradient_accumulation_steps
        own = list(sampler)[self.args.process_index :: processes]
        first = round((self.state.epoch or 0) % 1 * len(own)) + offset * accumulated
        drawn = [row for batch in own[first : first + accumulated] for row in batch]
        table = rows.with_format(None).select(drawn)
        known = list(dict.fromkeys(table["query_id"])) if drawn and "query_id" in table.column_names else []
        return f", on the queries {listed(known[:8])}" if known else ""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and in a checkpoint what the run was begun with.

        Before the host's ``trainer_state.json``, which it writes last: a checkpoint that has one is complete.

        Raises:
            ConfigError: Weights are no numbers, and would take the place of those that are.
        """
        self.check_weights()
        super().save_model(output_dir, _internal_call=_internal_call)
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.record is not None and self.args.should_save and checkpoint_step(folder) is not None:
            if isinstance(self.evaluator, RunEvaluator):
                self.evaluator.history.write(folder)
            self.record.write(folder)  # last: it lists the files

    def push_checkpoint(self, folder: str) -> None:
        """Begins to publish the model of a checkpoint, and its state where ``hub_strategy`` asks for it."""
        strategy = str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))
        if strategy == "end" or not self.is_world_process_zero():
            return
        message = f"Training in progress, step {self.state.global_step}"
        self._pushes.append(
            self._upload(folder, message, run_as_future=True, ignore_patterns=[*_STATE_OF_TRAINING, *_OF_DATA])
        )
        if strategy in ("checkpoint", "all_checkpoints"):
            place = "last-checkpoint" if strategy == "checkpoint" else Path(folder).name
            state: dict[str, Any] = {"path_in_repo": place, "ignore_patterns": _OF_DATA}
            self._pushes.append(self._upload(folder, message, run_as_future=True, **state))

    def push_result(self, folder: Path) -> list[str]:
        """Publish the result, after the checkpoints that are still on their way; for the one process that writes.

        Args:
            folder: The model as it was saved, with its card.

        Returns:
            What failed: a sentence for each push. None of it is lost: everything lies in the folder of the run.
        """
        failed = []
        for push in self._pushes:
            if (error := push.exception()) is not None:
                failed.append(f"A checkpoint was not pushed: {type(error).__name__}: {error}")
        try:
            self._upload(str(folder), "End of training")
        except Exception as error:
            failed.append(f"The result was not pushed: {type(error).__name__}: {error}")
        return failed

    def _upload(self, folder: str, message: str, **options: Any) -> Any:
        to = {"repo_id": self.hub_model_id, "token": self.args.hub_token, "revision": self.args.hub_revision}
        api: Any = HfApi()
        return api.upload_folder(folder_path=folder, commit_message=message, **to, **options)

    def read_checkpoint(self, folder: str) -> None:
        """Loads what was trained; adapters without building the model again, all else by way of the CPU."""
        model = uncompiled(self.model)
        if has_lora(model):
            load_adapters(model, folder)
        else:
            super().read_checkpoint(folder)

    def read_best_checkpoint(self, folder: str) -> None:
        """Loads the best checkpoint; the host logs a failure, and the last weights would pass for the best.

        Raises:
            ConfigError: It can't be loaded.
        """
        try:
            self.read_checkpoint(folder)
        except Exception as error:
            raise ConfigError(
                f"The best checkpoint, {folder!r}, can't be loaded: {type(error).__name__}: {error}. The weights are "
                "those of the last step, so final/ is not written. Load that folder, or repair the cause (often "
                "memory, or a file that is gone) and pass resume=True."
            ) from error


class EmbeddingCollator(TextsAsTexts, SentenceTransformerDataCollator):
    """For embedding models."""


class EmbeddingTrainer(PageTrainer, SentenceTransformerTrainer):
    """``SentenceTransformerTrainer`` on pages."""

    data_collator_class = EmbeddingCollator


class LateInteractionCollator(TextsAsTexts, MultiVectorEncoderDataCollator):
    """For models of late interaction."""


class LateInteractionTrainer(PageTrainer, MultiVectorEncoderTrainer):
    """``MultiVectorEncoderTrainer`` on pages."""

    data_collator_class = LateInteractionCollator


class RerankingCollator(TextsAsTexts, CrossEncoderDataCollator):
    """For rerankers, whose losses preprocess pairs by themselves: what images cost is done here, in the workers."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as the host collates it, with pages that the image processor has seen."""
        return prepare_pages(getattr(self.preprocess_fn, "__self__", None), super().__call__(features))


class RerankingTrainer(PageTrainer, CrossEncoderTrainer):
    """``CrossEncoderTrainer`` on pages."""

    data_collator_class = RerankingCollator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.data_collator, RerankingCollator):
            self.data_collator.says_texts = self.model.supports("message")


# Kinds


@dataclass(frozen=True)
class Kind:
    """A kind of model, with what trains it and where its recipe differs.

    Attributes:
        arguments_class: The host's training arguments.
        trainer_class: The host's trainer, for pages.
        model_class: The host's model.
        load: Makes a model from a folder or a name on the Hub.
        cached_loss: In-batch negatives with cached gradients; takes the model and ``mini_batch_size``. ``None`` for
            rerankers, which compare what they read in one pass.
        plain_loss: The same without cached gradients.
        truncates: Whether embeddings can be cut to fewer dimensions (Matryoshka).
        batch_size: Rows a device at most, in the recipe.
        accumulation_steps: Batches whose gradients make one step at most, in the recipe.
        learning_rate: In the recipe.
    """

    arguments_class: type[BaseTrainingArguments]
    trainer_class: type[PageTrainer]
    model_class: type[HostModel]
    load: Callable[..., HostModel]
    cached_loss: Callable[..., nn.Module] | None = None
    plain_loss: Callable[..., nn.Module] | None = None
    truncates: bool = False
    batch_size: int = 64
    accumulation_steps: int = 1
    learning_rate: float = 2e-5


EMBEDDING = Kind(
    arguments_class=SentenceTransformerTrainingArguments,
    trainer_class=EmbeddingTrainer,
    model_class=SentenceTransformer,
    load=load_model,
    cached_loss=CachedMultipleNegativesRankingLoss,
    plain_loss=MultipleNegativesRankingLoss,
    truncates=True,
)

LATE_INTERACTION = Kind(
    arguments_class=MultiVectorEncoderTrainingArguments,
    trainer_class=LateInteractionTrainer,
    model_class=MultiVectorEncoder,
    load=build_late_interaction,
    cached_loss=CachedMultiVectorMultipleNegativesRankingLoss,
    plain_loss=MultiVectorMultipleNegativesRankingLoss,
)

RERANKING = Kind(
    arguments_class=CrossEncoderTrainingArguments,
    trainer_class=RerankingTrainer,
    model_class=CrossEncoder,
    load=build_reranker,
    batch_size=8,
    accumulation_steps=4,
    learning_rate=5e-6,
)


def is_for_rerankers(value: object) -> bool | None:
    """Whether a loss, an evaluator or a model, or a class of these, is for rerankers; ``None`` where it does not tell.

    The host has a package for each kind of model, and its classes, or what is derived from them, say where they are.
    """
    own = value if isinstance(value, type) else type(value)
    bases = getattr(own, "model_class", own).__mro__
    packages = (base.__module__.split(".")[:2] for base in bases)
    package = next((names[1] for names in packages if names[0] == "sentence_transformers" and names[1:]), "base")
    return None if package == "base" else package == "cross_encoder"
