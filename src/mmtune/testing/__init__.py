"""Tiny models and generated pages, sounds and clips, for tests and demonstrations without a network."""

from mmtune.testing.models import (
    tiny_ast,
    tiny_clap,
    tiny_clip,
    tiny_llava,
    tiny_qwen3_vl,
    tiny_siglip,
    tiny_text_encoder,
    tiny_videomae,
    tiny_whisper,
)
from mmtune.testing.pages import generated_pages
from mmtune.testing.pdfs import generated_pdfs
from mmtune.testing.recordings import generated_audio, generated_clips

__all__ = [
    "generated_audio",
    "generated_clips",
    "generated_pages",
    "generated_pdfs",
    "tiny_ast",
    "tiny_clap",
    "tiny_clip",
    "tiny_llava",
    "tiny_qwen3_vl",
    "tiny_siglip",
    "tiny_text_encoder",
    "tiny_videomae",
    "tiny_whisper",
]
