"""Finetune multimodal embedding models on your own pages, and know that they got better."""

from mmtune.data import AuditReport, RetrievalDataset
from mmtune.errors import (
    ConfigError,
    DatasetError,
    ImageDecodeError,
    MissingDocumentError,
    MissingExtraError,
    MmtuneError,
)
from mmtune.evaluation import build_evaluator
from mmtune.models import load_model
from mmtune.training import ConflictFreeBatchSampler, FinetuneResult, finetune

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "ConfigError",
    "ConflictFreeBatchSampler",
    "DatasetError",
    "FinetuneResult",
    "ImageDecodeError",
    "MissingDocumentError",
    "MissingExtraError",
    "MmtuneError",
    "RetrievalDataset",
    "build_evaluator",
    "finetune",
    "load_model",
]
