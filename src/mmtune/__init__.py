"""Finetune multimodal embedding models and rerankers on your own pages, and know that they got better."""

from mmtune.data import AuditReport, RetrievalDataset
from mmtune.errors import (
    ConfigError,
    DatasetError,
    ImageDecodeError,
    MediaDecodeError,
    MissingDocumentError,
    MissingExtraError,
    MmtuneError,
)
from mmtune.evaluation import (
    PipelineReport,
    Verdict,
    build_evaluator,
    build_reranking_evaluator,
    compare_per_query,
    evaluate_pipeline,
)
from mmtune.inference import (
    OpenAICompatible,
    TeacherScores,
    find_false_negatives,
    generate_queries,
    judge_negatives,
    mine_hard_negatives,
    score_rows,
)
from mmtune.models import (
    ROUTER_PRESETS,
    RouterPreset,
    build_late_interaction,
    build_reranker,
    compose_router,
    extract_route,
    load_model,
    merge_lora,
    router_preset,
)
from mmtune.training import ConflictFreeBatchSampler, FinetuneResult, Plan, finetune, finetune_reranker

__version__ = "0.1.0"

__all__ = [
    "ROUTER_PRESETS",
    "AuditReport",
    "ConfigError",
    "ConflictFreeBatchSampler",
    "DatasetError",
    "FinetuneResult",
    "ImageDecodeError",
    "MediaDecodeError",
    "MissingDocumentError",
    "MissingExtraError",
    "MmtuneError",
    "OpenAICompatible",
    "PipelineReport",
    "Plan",
    "RetrievalDataset",
    "RouterPreset",
    "TeacherScores",
    "Verdict",
    "build_evaluator",
    "build_late_interaction",
    "build_reranker",
    "build_reranking_evaluator",
    "compare_per_query",
    "compose_router",
    "evaluate_pipeline",
    "extract_route",
    "find_false_negatives",
    "finetune",
    "finetune_reranker",
    "generate_queries",
    "judge_negatives",
    "load_model",
    "merge_lora",
    "mine_hard_negatives",
    "router_preset",
    "score_rows",
]
