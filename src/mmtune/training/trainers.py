"""The host's trainers for rows of pages: texts stay texts, and no training image ends in the model card."""

from typing import Any

from sentence_transformers import CrossEncoderTrainer, MultiVectorEncoderTrainer, SentenceTransformerTrainer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardCallback
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from sentence_transformers.multi_vector_encoder.model_card import MultiVectorEncoderModelCardCallback
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardCallback
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback

from mmtune.data.documents import as_host_input
from mmtune.host import ReadsCheckpoints, innermost_sampler, uncompiled
from mmtune.models.adapters import has_lora, load_adapters
from mmtune.training.callbacks import (
    BestCheckpointHere,
    CardWithoutRows,
    EpochOfSampler,
    ShortLogs,
    ShortProgress,
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
        rows = [{name: row[name] if name in kept else _as_inputs(row[name]) for name in row} for row in features]
        return super().__call__(rows)


def _as_inputs(value: Any) -> Any:
    """What a column holds, for the host: one query or document, or the list of them that listwise losses take."""
    return [as_host_input(part) for part in value] if isinstance(value, list) else as_host_input(value)


class EmbeddingCollator(TextsAsTexts, SentenceTransformerDataCollator):
    """For embedding models."""


class LateInteractionCollator(TextsAsTexts, MultiVectorEncoderDataCollator):
    """For models of late interaction."""


class RerankingCollator(TextsAsTexts, CrossEncoderDataCollator):
    """For rerankers."""


class EmbeddingCard(CardWithoutRows, SentenceTransformerModelCardCallback):
    """For embedding models."""


class LateInteractionCard(CardWithoutRows, MultiVectorEncoderModelCardCallback):
    """For models of late interaction."""


class RerankingCard(CardWithoutRows, CrossEncoderModelCardCallback):
    """For rerankers."""


class PageTrainer(ReadsCheckpoints, BaseTrainer):
    """A host's trainer for rows that decode pages when they are read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(EpochOfSampler)
        self.add_callback(BestCheckpointHere)
        # In a notebook the host shows a table of its own, which stays.
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ShortProgress)
            self.add_callback(ShortLogs)
        elif self.pop_callback(PrinterCallback) is not None:
            self.add_callback(ShortLogs)

    def get_train_dataloader(self) -> DataLoader:
        """The host's data loader; its sampler stays in ``train_sampler``."""
        loader = super().get_train_dataloader()
        self.train_sampler = innermost_sampler(loader)
        return loader

    def read_checkpoint(self, folder: str) -> None:
        """Loads what was trained; adapters without building the model again."""
        model = uncompiled(self.model)
        if has_lora(model):
            load_adapters(model, folder)
        else:
            super().read_checkpoint(folder)


class EmbeddingTrainer(PageTrainer, SentenceTransformerTrainer):
    """``SentenceTransformerTrainer`` on pages."""

    data_collator_class = EmbeddingCollator
    model_card_callback_class = EmbeddingCard


class LateInteractionTrainer(PageTrainer, MultiVectorEncoderTrainer):
    """``MultiVectorEncoderTrainer`` on pages."""

    data_collator_class = LateInteractionCollator
    model_card_callback_class = LateInteractionCard


class RerankingTrainer(PageTrainer, CrossEncoderTrainer):
    """``CrossEncoderTrainer`` on pages."""

    data_collator_class = RerankingCollator
    model_card_callback_class = RerankingCard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.data_collator, RerankingCollator):
            self.data_collator.says_texts = self.model.supports("message")
