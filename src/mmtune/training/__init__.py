"""Training embedding models and rerankers on pages."""

from mmtune.training.batches import ConflictFreeBatchSampler
from mmtune.training.embedding import finetune
from mmtune.training.plan import Plan
from mmtune.training.query_encoder import distill_query_encoder
from mmtune.training.reranking import finetune_reranker
from mmtune.training.result import FinetuneResult

__all__ = [
    "ConflictFreeBatchSampler",
    "FinetuneResult",
    "Plan",
    "distill_query_encoder",
    "finetune",
    "finetune_reranker",
]
