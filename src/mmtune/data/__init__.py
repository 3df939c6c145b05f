"""From the rows that users have to rows the host trains on."""

from mmtune.data.audit import AuditReport
from mmtune.data.dataset import RetrievalDataset

__all__ = ["AuditReport", "RetrievalDataset"]
