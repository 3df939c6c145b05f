"""Training embedding models on pages."""

from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.embedding import finetune
from mmtune.training.result import FinetuneResult

__all__ = ["ConflictFreeBatchSampler", "FinetuneResult", "finetune"]
