"""How good a model is on a dataset: a retriever, a reranker, or the two together."""

from mmtune.evaluation.pipeline import PipelineReport, evaluate_pipeline
from mmtune.evaluation.reranking import build_reranking_evaluator
from mmtune.evaluation.retrieval import build_evaluator

__all__ = ["PipelineReport", "build_evaluator", "build_reranking_evaluator", "evaluate_pipeline"]
