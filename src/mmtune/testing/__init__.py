"""Tiny models and generated pages, for tests and demonstrations without a network."""

from mmtune.testing.models import tiny_clip, tiny_llava, tiny_qwen3_vl, tiny_siglip, tiny_text_encoder
from mmtune.testing.pages import generated_pages
from mmtune.testing.pdfs import generated_pdfs

__all__ = [
    "generated_pages",
    "generated_pdfs",
    "tiny_clip",
    "tiny_llava",
    "tiny_qwen3_vl",
    "tiny_siglip",
    "tiny_text_encoder",
]
