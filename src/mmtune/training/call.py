"""A call of ``finetune`` or ``finetune_reranker`` as a value: what it was given, and the steps where the two differ."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Real
from typing import Any, ClassVar, Literal

from sentence_transformers.base.training_args import BaseTrainingArguments
from torch import nn
from transformers import TrainerCallback

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.query_kinds import QueryKind
from mmtune.evaluation.mean import AnyEvaluator
from mmtune.models.kinds import HostModel
from mmtune.models.lora import LoraChoice
from mmtune.training.inputs import DatasetsLike, Form, TrainingSets
from mmtune.training.losses import Loss
from mmtune.training.records import RunRecord, as_json
from mmtune.training.trainers import Kind

_OF_THE_MOMENT = ("kind", "resume", "overwrite", "dry_run")


def _is_writable(value: Any) -> bool:
    """Whether JSON can hold a value as it is."""
    if isinstance(value, Mapping):
        return all(map(_is_writable, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_writable, value))
    return value is None or isinstance(value, (str, os.PathLike, Real, Enum))


@dataclass(frozen=True, kw_only=True)
class Finetuning(ABC):
    """A call: what it was given, as ``finetune`` documents it, and the steps that each kind of call takes in its way.

    Attributes:
        function: The name of the function that was called.
        kind: The kind of ``model``.
    """

    function: ClassVar[str]
    kind: Kind
    model: HostModel | str | os.PathLike[str]
    train_dataset: DatasetsLike
    eval_dataset: DatasetsLike | None
    guard_dataset: DatasetsLike | None
    output_dir: str | os.PathLike[str] | None
    loss: Loss | Mapping[str, Loss] | None
    args: BaseTrainingArguments | None
    documents: DocumentKind
    queries: QueryKind
    lora: LoraChoice
    freeze: Sequence[str]
    allow_overlap: bool
    overwrite: bool
    resume: bool | Literal["auto"]
    keep: Literal["best", "last"]
    seed: int
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]]
    evaluator: Any
    max_pixels: int | None
    page_store: str | os.PathLike[str] | None
    thumbnails: bool
    dry_run: bool
    training_arguments: Mapping[str, Any]

    def describe_call(self) -> dict[str, Any]:
        """What was called with which arguments, so that the same can be called again.

        ``resume``, ``overwrite`` and ``dry_run`` are of the moment, and left out, as is what gives access, such as
        ``hub_token``: what a run leaves behind is shown to others. Objects that no file can hold stand under
        ``in_memory`` by their names.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OF_THE_MOMENT}
        given |= given.pop("training_arguments")
        given = {name: value for name, value in given.items() if not name.endswith("_token")}
        written = {name: as_json(value) for name, value in given.items() if _is_writable(value)}
        return {
            "function": self.function,
            "arguments": written,
            "in_memory": [name for name in given if name not in written],
        }

    @abstractmethod
    def check_arguments(self) -> None:
        """Make sure of the arguments that only this kind of call has, without data and model."""

    @abstractmethod
    def form_of(self, loss: Any) -> Form:
        """The rows that a loss reads, given or built."""

    @abstractmethod
    def read_rows(self, form: Form) -> TrainingSets:
        """The training data with its rows."""

    @abstractmethod
    def check_data(
        self, train: TrainingSets, evaluation: Mapping[str, RetrievalDataset], args: BaseTrainingArguments
    ) -> None:
        """Make sure that the data go with the arguments, before weights load."""

    @abstractmethod
    def build_loss(
        self, model: Any, args: BaseTrainingArguments, train: TrainingSets, began: RunRecord | None
    ) -> nn.Module | dict[str, nn.Module]:
        """The loss for the model; a run that goes on keeps how it began."""

    @abstractmethod
    def build_evaluator(
        self,
        evaluation: Mapping[str, RetrievalDataset],
        model: Any,
        loss: Any,
        args: BaseTrainingArguments,
        name: str | None = None,
    ) -> AnyEvaluator:
        """The evaluator over one evaluation set or more, under its usual name or another."""

    @abstractmethod
    def settle_prompts(self, model: Any, train: TrainingSets, args: BaseTrainingArguments) -> Any:
        """The prompts to train with, for the host's arguments; what the model is to use besides is written into it."""

    def settle_size(
        self, model: Any, loss: Any, args: BaseTrainingArguments, evaluation: Mapping[str, RetrievalDataset]
    ) -> dict[str, Any]:
        """What the trained model is cut to, written into it, and the settings of that; nothing by default."""
        return {}

    @abstractmethod
    def describe(
        self, train: TrainingSets, evaluator: AnyEvaluator | None, model: Any, loss: Any
    ) -> dict[str, dict[str, Any]]:
        """The settings that only this kind of call has: ``data`` and ``training``."""
