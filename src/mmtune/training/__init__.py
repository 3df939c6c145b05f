"""Training embedding models and rerankers on pages."""

from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.embedding import finetune
from mmtune.training.plan import Plan
from mmtune.training.reranking import finetune_reranker
from mmtune.training.result import FinetuneResult

__all__ = ["ConflictFreeBatchSampler", "FinetuneResult", "Plan", "finetune", "finetune_reranker"]
