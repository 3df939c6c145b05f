"""Models: loading them for training on pages."""

from mmtune.models.loading import load_model

__all__ = ["load_model"]
