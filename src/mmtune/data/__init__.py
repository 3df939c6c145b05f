"""From the rows that users have to rows the host trains on."""

from mmtune.data.audit import AuditReport
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.mining import mine_hard_negatives
from mmtune.data.scoring import TeacherScores, score_rows

__all__ = ["AuditReport", "RetrievalDataset", "TeacherScores", "mine_hard_negatives", "score_rows"]
