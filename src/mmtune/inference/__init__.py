"""Models at work on a dataset: embeddings, scores, search, and what is mined and taught with them."""

from mmtune.inference.corpus import encode_corpus
from mmtune.inference.false_negatives import find_false_negatives
from mmtune.inference.generators import OpenAICompatible
from mmtune.inference.judging import judge_negatives
from mmtune.inference.mining import mine_hard_negatives
from mmtune.inference.queries import generate_queries
from mmtune.inference.shards import read_shards
from mmtune.inference.teacher import TeacherScores, score_rows

__all__ = [
    "OpenAICompatible",
    "TeacherScores",
    "encode_corpus",
    "find_false_negatives",
    "generate_queries",
    "judge_negatives",
    "mine_hard_negatives",
    "read_shards",
    "score_rows",
]
