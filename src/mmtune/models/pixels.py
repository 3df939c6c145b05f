"""Pixel limits: how large a page is when an encoder sees it.

The limits live in the ``processing_kwargs`` of the host's ``Transformer`` module, which the host applies on every call
and saves with the model, so they hold after reloading in the plain host. As ``processor_kwargs`` they would leak into
``tokenizer_config.json``.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sentence_transformers.base.modules import Transformer
from transformers import ImageProcessingMixin

from mmtune.arguments import is_whole
from mmtune.errors import ConfigError
from mmtune.models.kinds import HostModel, SameModel, require_model


@dataclass(frozen=True)
class PixelLimits:
    """Pixels per image after resizing; ``None`` leaves that side to the checkpoint.

    Raises:
        ConfigError: A limit is not a positive whole number, or the minimum is above the maximum.

    Example:
        >>> PixelLimits(max_pixels=600 * 600)
        PixelLimits(min_pixels=None, max_pixels=360000)
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not is_whole(value) or value < 1:
                raise ConfigError(
                    f"{name}={value!r} is no pixel limit. Expected a positive whole number of pixels per image, "
                    f"such as 600 * 600. Pass one, or None for the checkpoint's own limit."
                )
            # NumPy's integers could not be saved with the model
            object.__setattr__(self, name, int(value))
        if (self.min_pixels or 0) > (self.max_pixels or math.inf):
            raise ConfigError(
                f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}. Expected min_pixels <= "
                f"max_pixels. Lower min_pixels or raise max_pixels."
            )

    def given(self) -> dict[str, int]:
        """The limits that are not ``None``, by name."""
        pairs = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {name: value for name, value in pairs.items() if value is not None}


def image_arguments(processor: object, current: Mapping[str, Any], limits: PixelLimits) -> dict[str, Any] | None:
    """The image arguments of a processor call that put the limits into effect.

    Args:
        processor: What ``AutoProcessor`` gives, or its image processor.
        current: Image arguments that the checkpoint already applies, from its ``processing_kwargs``.
        limits: The limits asked for. With a maximum below the checkpoint's own minimum, that minimum becomes one patch.

    Returns:
        ``current`` with the limits in it, or ``None`` where the image processor resizes to a fixed size.

    Raises:
        ConfigError: ``max_pixels`` is below one patch, or ``min_pixels`` above the checkpoint's own maximum.
    """
    image_processor = _image_processor(processor)
    if not limits.given():
        return dict(current)
    by_area = _sizes_by_area(image_processor)
    if not by_area and not (_sizes_by_patch_count(image_processor) and limits.max_pixels is not None):
        return None
    patch_pixels = (image_processor.patch_size * (image_processor.merge_size if by_area else 1)) ** 2
    if limits.max_pixels is not None and limits.max_pixels < patch_pixels:
        raise ConfigError(
            f"max_pixels={limits.max_pixels} is below one patch, which is {patch_pixels} pixels in this checkpoint. "
            f"Expected at least that, for pages some hundred times as much. Raise max_pixels."
        )
    if not by_area:
        return {**current, "max_num_patches": (limits.max_pixels or 0) // patch_pixels}
    own = _current_size(image_processor, current)
    longest = limits.max_pixels or own["longest_edge"]
    shortest = limits.min_pixels or own["shortest_edge"]
    if limits.min_pixels and shortest > longest:
        raise ConfigError(
            f"min_pixels={shortest} is above the checkpoint's own limit of {longest} pixels per image. Expected "
            f"at most that. Lower min_pixels, or pass max_pixels as well."
        )
    # The processor enlarges small images to the minimum, rounded up to whole patches: above the maximum if left as is.
    shortest = shortest if shortest <= longest else patch_pixels
    return {**current, "size": {"shortest_edge": shortest, "longest_edge": longest}}


def warn_unused_limits(processors: Iterable[object], limits: PixelLimits) -> None:
    """Warn of limits that an image processor can't apply, because it resizes to a fixed size.

    Warns:
        UserWarning: Once for each image processor and limit, naming both.
    """
    for image_processor in filter(None, map(_image_processor, processors)):
        if _sizes_by_area(image_processor):
            continue
        counts_patches = _sizes_by_patch_count(image_processor)
        reason = f"resizes every image to its own fixed size ({_size(image_processor)})"
        if counts_patches:
            reason = "only knows a largest number of patches"
        for name, value in limits.given().items():
            if not (counts_patches and name == "max_pixels"):
                warnings.warn(
                    f"{name}={value} is not applied: {type(image_processor).__name__} {reason}. Leave {name} out, or "
                    f"choose a checkpoint whose image size varies, such as a Qwen-VL or SigLIP2 NaFlex one.",
                    UserWarning,
                    stacklevel=4,
                )


def apply_pixel_limits(model: SameModel, limits: PixelLimits) -> SameModel:
    """Make every image encoder of a model keep the limits, also inside a Router and after saving and reloading.

    Args:
        model: Any host model; encoders with a fixed image size stay as they are.
        limits: The limits; where none is given, nothing changes.

    Returns:
        The same model, changed in place.

    Raises:
        ConfigError: As in ``image_arguments``.
    """
    for module in _image_modules(model):
        arguments = image_arguments(module.processor, module.processing_kwargs.get("image", {}), limits)
        if arguments:
            module.processing_kwargs = {**module.processing_kwargs, "image": arguments}
    return model


def limit_pixels(model: SameModel, limits: PixelLimits) -> SameModel:
    """The same model with the limits in every image encoder, after a warning of those that can't keep them.

    Raises:
        ConfigError: As in ``image_arguments``.

    Warns:
        UserWarning: As in ``warn_unused_limits``.
    """
    require_model(model)
    warn_unused_limits([module.processor for module in _image_modules(model)], limits)
    return apply_pixel_limits(model, limits)


def effective_pixel_limits(model: HostModel) -> PixelLimits:
    """The limits that hold in the model's first image encoder, its own or those asked for.

    Both are ``None`` where the image processor resizes to a fixed size, or where there is no image encoder.
    """
    for module in _image_modules(model):
        image_processor = _image_processor(module.processor)
        current = module.processing_kwargs.get("image", {})
        if _sizes_by_area(image_processor):
            size = _current_size(image_processor, current)
            return PixelLimits(size["shortest_edge"], size["longest_edge"])
        if _sizes_by_patch_count(image_processor):
            count = current.get("max_num_patches", image_processor.max_num_patches)
            return PixelLimits(max_pixels=count * image_processor.patch_size**2)
    return PixelLimits()


def _image_modules(model: HostModel) -> list[Transformer]:
    modules = [module for module in model.modules() if isinstance(module, Transformer)]
    return [module for module in modules if image_processor_of(module) is not None]


def image_processor_of(encoder: Transformer) -> Any:
    """The image processor of an encoder; ``None`` where it reads no images."""
    return _image_processor(encoder.processor)


def input_size_of(image_processor: Any, options: Mapping[str, Any]) -> int | tuple[int, int] | None:
    """What an image processor makes an image fit into.

    Args:
        image_processor: Of an encoder.
        options: What it is called with.

    Returns:
        Width and height where these are fixed, or those of which the image covers both; a number of pixels where that
        is what is limited; ``None`` for anything else.
    """
    size = {**_size(image_processor), **_as_size(options.get("size"))}
    if _sizes_by_area(image_processor):
        return size["longest_edge"]
    if {"height", "width"} <= size.keys():
        return size["width"], size["height"]
    return (size["shortest_edge"],) * 2 if set(size) == {"shortest_edge"} else None


def _image_processor(processor: object) -> Any:
    return processor if isinstance(processor, ImageProcessingMixin) else getattr(processor, "image_processor", None)


def _sizes_by_area(image_processor: Any) -> bool:
    # Qwen-VL and its relatives name the edges and mean areas; the others that have both edges (DETR) merge no patches.
    return hasattr(image_processor, "merge_size") and {"shortest_edge", "longest_edge"} <= _size(image_processor).keys()


def _sizes_by_patch_count(image_processor: Any) -> bool:
    return not _sizes_by_area(image_processor) and all(
        isinstance(getattr(image_processor, name, None), int) for name in ("max_num_patches", "patch_size")
    )


def _size(image_processor: Any) -> dict[str, int]:
    return _as_size(getattr(image_processor, "size", None))


def _as_size(size: Any) -> dict[str, int]:
    # a checkpoint's own code may give a number; transformers' own class gives None for what it has not
    known = {} if isinstance(size, int | tuple | list) else dict(size or {})
    return {edge: value for edge, value in known.items() if value is not None}


def _current_size(image_processor: Any, current: Mapping[str, Any]) -> dict[str, int]:
    size = {**_size(image_processor), **current.get("size", {})}
    return {edge: size[edge] for edge in ("shortest_edge", "longest_edge")}
