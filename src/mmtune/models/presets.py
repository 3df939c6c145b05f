"""Routers for common problems, as data."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from sentence_transformers import SentenceTransformer

from mmtune.arguments import listed, nearest_name
from mmtune.errors import ConfigError
from mmtune.models.routers import compose_router


@dataclass(frozen=True)
class RouterPreset:
    """Checkpoints that go well together, and how.

    Attributes:
        name: As ``router_preset`` takes it.
        purpose: What it is for.
        text: Checkpoint of the text encoder.
        dimension: Of the embeddings.
        text_license: License of the text checkpoint, as the Hub names it.
        image: Checkpoint of the image encoder; ``None`` where there is none, as of the next two.
        image_license: License of the image checkpoint.
        audio: Checkpoint of the encoder of sounds.
        audio_license: Its license.
        video: Checkpoint of the encoder of clips.
        video_license: Its license.
        route_by: See ``compose_router``.
        freeze: Sides that are not trained.
        prompts: What the text checkpoint wants in front of texts and does not bring along.
    """

    name: str
    purpose: str
    text: str
    dimension: int
    text_license: str
    image: str | None = None
    image_license: str | None = None
    audio: str | None = None
    audio_license: str | None = None
    video: str | None = None
    video_license: str | None = None
    route_by: Literal["modality", "task"] = "modality"
    freeze: tuple[str, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def compose(self, **overrides: Any) -> SentenceTransformer:
        """The model; ``overrides`` are arguments of ``compose_router`` in place of the preset's.

        Raises:
            ConfigError: An override is no argument of ``compose_router``, or as there.
        """
        known = list(inspect.signature(compose_router).parameters)
        for name in overrides:
            if name not in known:
                raise ConfigError(f"A Router has no argument {name!r}. {_hint(name, known)} Rename or remove it.")
        own = {name: getattr(self, name) for name in _COMPOSED}
        if "text" not in overrides:
            own["text_prompts"] = self.prompts
        return compose_router(**{**own, **overrides})


_COMPOSED = ("text", "image", "audio", "video", "dimension", "route_by", "freeze")

_PRESETS = (
    RouterPreset(
        name="minilm-siglip2",
        purpose="English queries on figures, photos and simple pages; the pair of the multimodal guide",
        text="sentence-transformers/all-MiniLM-L6-v2",
        image="google/siglip2-base-patch16-224",
        dimension=768,
        text_license="apache-2.0",
        image_license="apache-2.0",
    ),
    RouterPreset(
        name="multilingual-siglip2",
        purpose="Queries in about a hundred languages on pages, at 512 pixels a side",
        text="intfloat/multilingual-e5-small",
        image="google/siglip2-base-patch16-512",
        dimension=768,
        text_license="mit",
        image_license="apache-2.0",
        prompts=MappingProxyType({"query": "query: ", "document": "passage: "}),
    ),
    RouterPreset(
        name="light",
        purpose="Training and search on CPUs: few patches, three text layers, small embeddings",
        text="sentence-transformers/paraphrase-MiniLM-L3-v2",
        image="openai/clip-vit-base-patch32",
        dimension=384,
        text_license="apache-2.0",
        image_license="mit",
    ),
    RouterPreset(
        name="static-queries",
        purpose="Queries without a transformer, on an index of a VLM that stays as it is",
        text="sentence-transformers/static-retrieval-mrl-en-v1",
        image="Qwen/Qwen3-VL-Embedding-2B",
        dimension=2048,
        text_license="apache-2.0",
        image_license="apache-2.0",
        route_by="task",
        freeze=("image",),
    ),
    RouterPreset(
        name="clip-towers",
        purpose="CLIP in two routes, which are aligned already: to freeze, replace or extract one of its towers",
        text="openai/clip-vit-base-patch32",
        image="openai/clip-vit-base-patch32",
        dimension=512,
        text_license="mit",
        image_license="mit",
    ),
    RouterPreset(
        name="sounds",
        purpose="English queries on ten seconds of noise, music or nature",
        text="sentence-transformers/all-MiniLM-L6-v2",
        audio="MIT/ast-finetuned-audioset-10-10-0.4593",
        dimension=768,
        text_license="apache-2.0",
        audio_license="bsd-3-clause",
    ),
    RouterPreset(
        name="clips",
        purpose="English queries on clips of up to 64 frames, by what moves in them",
        text="sentence-transformers/all-MiniLM-L6-v2",
        video="facebook/vjepa2-vitl-fpc64-256",
        dimension=1024,
        text_license="apache-2.0",
        video_license="mit",
    ),
)

ROUTER_PRESETS: Mapping[str, RouterPreset] = MappingProxyType({preset.name: preset for preset in _PRESETS})
"""Presets by name. A preset stands for a shape of problem; any checkpoint of it can be replaced."""


def router_preset(name: str, **overrides: Any) -> SentenceTransformer:
    """A model from ``ROUTER_PRESETS``, composed by ``compose_router``.

    Args:
        name: A preset.
        **overrides: Arguments of ``compose_router`` in place of the preset's, such as ``text``, ``image``,
            ``audio``, ``video``, ``dimension`` and ``device``.

    Raises:
        ConfigError: There is no such preset or argument; the message names the nearest. Or as in ``compose_router``.

    Example:
        >>> model = router_preset("minilm-siglip2", freeze="text")  # doctest: +SKIP
    """
    if name not in list(ROUTER_PRESETS):  # a list looks for what can't be a key, too
        raise ConfigError(f"There is no preset {name!r}. {_hint(name, list(ROUTER_PRESETS))} Name one of them.")
    return ROUTER_PRESETS[name].compose(**overrides)


def _hint(name: str, known: list[str]) -> str:
    nearest = nearest_name(name, known, cutoff=0.3)
    return f"The nearest is {nearest!r}; known are {listed(known)}." if nearest else f"Known are {listed(known)}."
