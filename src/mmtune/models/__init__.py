"""Models: loading them for training on pages, joining encoders, and building what they need."""

from mmtune.models.adapters import merge_lora
from mmtune.models.late_interaction import build_late_interaction
from mmtune.models.loading import load_model
from mmtune.models.presets import ROUTER_PRESETS, RouterPreset, router_preset
from mmtune.models.rerankers import build_reranker
from mmtune.models.routers import compose_router
from mmtune.models.routes import extract_route

__all__ = [
    "ROUTER_PRESETS",
    "RouterPreset",
    "build_late_interaction",
    "build_reranker",
    "compose_router",
    "extract_route",
    "load_model",
    "merge_lora",
    "router_preset",
]
