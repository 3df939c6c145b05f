"""Finetune multimodal embedding models and rerankers on your own pages, and know that they got better."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        Comparison,
        Frontier,
        FrontierRow,
        PipelineReport,
        Verdict,
        as_mteb_task,
        build_evaluator,
        build_reranking_evaluator,
        compare_models,
        compare_per_query,
        evaluate_pipeline,
        size_frontier,
    )
    from mmtune.inference import (
        OpenAICompatible,
        TeacherScores,
        encode_corpus,
        find_false_negatives,
        generate_queries,
        judge_negatives,
        mine_hard_negatives,
        read_shards,
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
    from mmtune.serving import ServingReport, check_serving, export_model
    from mmtune.training import (
        ConflictFreeBatchSampler,
        FinetuneResult,
        Plan,
        distill_query_encoder,
        finetune,
        finetune_reranker,
    )

__version__ = "0.1.0"

__all__ = [
    "ROUTER_PRESETS",
    "AuditReport",
    "Comparison",
    "ConfigError",
    "ConflictFreeBatchSampler",
    "DatasetError",
    "FinetuneResult",
    "Frontier",
    "FrontierRow",
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
    "ServingReport",
    "TeacherScores",
    "Verdict",
    "as_mteb_task",
    "build_evaluator",
    "build_late_interaction",
    "build_reranker",
    "build_reranking_evaluator",
    "check_serving",
    "compare_models",
    "compare_per_query",
    "compose_router",
    "distill_query_encoder",
    "encode_corpus",
    "evaluate_pipeline",
    "export_model",
    "extract_route",
    "find_false_negatives",
    "finetune",
    "finetune_reranker",
    "generate_queries",
    "judge_negatives",
    "load_model",
    "merge_lora",
    "mine_hard_negatives",
    "read_shards",
    "router_preset",
    "score_rows",
    "size_frontier",
]

_LAYERS = ("errors", "data", "models", "inference", "evaluation", "serving", "training")


def __getattr__(name: str) -> Any:
    """A public name, or a layer, imported when it is first used: tables need no torch, and help no second."""
    if name in (*_LAYERS, "report", "host", "arguments"):
        return importlib.import_module(f"mmtune.{name}")
    for layer in _LAYERS if name in __all__ else ():
        found = vars(importlib.import_module(f"mmtune.{layer}"))
        if name in found:
            globals()[name] = found[name]
            return found[name]
    raise AttributeError(f"module 'mmtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
