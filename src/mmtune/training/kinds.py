"""The kinds of models that can be trained, each with what the host has for it and where its recipe differs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn

from mmtune.errors import ConfigError
from mmtune.evaluation.corpus import Retriever
from mmtune.models.kinds import HostModel
from mmtune.models.late_interaction import build_late_interaction, is_late_interaction
from mmtune.models.loading import check_checkpoint, load_model
from mmtune.models.rerankers import build_reranker
from mmtune.training.trainers import EmbeddingTrainer, LateInteractionTrainer, PageTrainer, RerankingTrainer

Model = TypeVar("Model", bound=HostModel, covariant=True)


@dataclass(frozen=True)
class Kind(Generic[Model]):
    """A kind of model, with what trains it.

    Attributes:
        arguments_class: The host's training arguments.
        trainer_class: The host's trainer, for pages.
        load: Makes a model from a folder or a name on the Hub.
        cached_loss: In-batch negatives with cached gradients; takes the model and ``mini_batch_size``. ``None`` for
            rerankers, which compare what they read in one pass.
        truncates: Whether embeddings can be cut to fewer dimensions (Matryoshka).
        batch_size: Rows a device at most, in the recipe.
        accumulation_steps: Batches whose gradients make one step at most, in the recipe.
        learning_rate: In the recipe.
    """

    arguments_class: type[BaseTrainingArguments]
    trainer_class: type[PageTrainer]
    load: Callable[[str], Model]
    cached_loss: Callable[..., nn.Module] | None = None
    truncates: bool = False
    batch_size: int = 64
    accumulation_steps: int = 1
    learning_rate: float = 2e-5


EMBEDDING = Kind(
    arguments_class=SentenceTransformerTrainingArguments,
    trainer_class=EmbeddingTrainer,
    load=load_model,
    cached_loss=CachedMultipleNegativesRankingLoss,
    truncates=True,
)

LATE_INTERACTION = Kind(
    arguments_class=MultiVectorEncoderTrainingArguments,
    trainer_class=LateInteractionTrainer,
    load=build_late_interaction,
    cached_loss=CachedMultiVectorMultipleNegativesRankingLoss,
)

RERANKING = Kind(
    arguments_class=CrossEncoderTrainingArguments,
    trainer_class=RerankingTrainer,
    load=build_reranker,
    batch_size=8,
    accumulation_steps=4,
    learning_rate=5e-6,
)


def kind_of(model: object) -> Kind[Retriever]:
    """The kind of a retriever or of its checkpoint, which is checked as far as its small files go.

    Raises:
        ConfigError: It is neither, a reranker, or a checkpoint that can't be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        late = is_late_interaction(path)
        check_checkpoint(path, model_class=MultiVectorEncoder if late else SentenceTransformer)
        return LATE_INTERACTION if late else EMBEDDING
    if isinstance(model, SentenceTransformer):
        return EMBEDDING
    if isinstance(model, MultiVectorEncoder):
        return LATE_INTERACTION
    if isinstance(model, CrossEncoder):
        raise ConfigError("finetune trains what finds pages, and got a CrossEncoder. Use finetune_reranker for it.")
    raise ConfigError(
        "Expected a SentenceTransformer, a MultiVectorEncoder, a checkpoint's folder or its name, got "
        f"{type(model).__name__}."
    )


def require_reranker(model: object, documents: str) -> None:
    """Make sure that there is a reranker, or a checkpoint to build one from, before the data are read.

    Args:
        model: What is to be trained.
        documents: What a document is made of: a checkpoint for texts alone does for ``"text"``.

    Raises:
        ConfigError: It is neither, or a checkpoint that can't be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        modality = "image" if "image" in str(documents) else "text"
        check_checkpoint(os.fspath(model), model_class=CrossEncoder, modalities=(modality,))
    elif not isinstance(model, CrossEncoder):
        raise ConfigError(
            f"Expected a CrossEncoder, a checkpoint's folder or its name, got {type(model).__name__}. "
            "build_reranker makes one from a model that reads text and images together."
        )
    elif model.num_labels != 1:
        raise ConfigError(
            f"The model gives {model.num_labels} scores to a pair, and a reranker gives one, to rank by. Load it with "
            "num_labels=1."
        )
