"""Models at work on a dataset: embeddings, scores, search, and what is mined and taught with them."""

from mmtune.inference.mining import mine_hard_negatives
from mmtune.inference.teacher import TeacherScores, score_rows

__all__ = ["TeacherScores", "mine_hard_negatives", "score_rows"]
