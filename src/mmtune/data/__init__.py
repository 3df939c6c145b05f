"""From the rows that users have to rows the host trains on; no model, no torch."""

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.findings import AuditReport

__all__ = ["AuditReport", "RetrievalDataset"]
