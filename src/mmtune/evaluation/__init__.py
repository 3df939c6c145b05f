"""How good a model is on a dataset: a retriever, a reranker, or the two together."""

from mmtune.evaluation.comparison import Comparison, compare_models
from mmtune.evaluation.frontier import Frontier, FrontierRow, size_frontier
from mmtune.evaluation.mteb_task import as_mteb_task
from mmtune.evaluation.pipeline import PipelineReport, evaluate_pipeline
from mmtune.evaluation.reranking import build_reranking_evaluator
from mmtune.evaluation.retrieval import build_evaluator
from mmtune.evaluation.significance import Verdict, compare_per_query

__all__ = [
    "Comparison",
    "Frontier",
    "FrontierRow",
    "PipelineReport",
    "Verdict",
    "as_mteb_task",
    "build_evaluator",
    "build_reranking_evaluator",
    "compare_models",
    "compare_per_query",
    "evaluate_pipeline",
    "size_frontier",
]
