"""How good a model is on a dataset."""

from mmtune.evaluation.retrieval import build_evaluator

__all__ = ["build_evaluator"]
