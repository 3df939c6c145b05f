"""From the trained model to a server: what is saved computes what was trained, and so does what is served."""

from mmtune.serving.checking import ServingReport, check_serving
from mmtune.serving.export import export_model

__all__ = ["ServingReport", "check_serving", "export_model"]
