"""Why a server computes something else than its model: each known fault is tried on the model and compared."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from mmtune.models.adapters import encoders_of, has_adapters
from mmtune.models.kinds import HostModel
from mmtune.models.pixels import PixelLimits, apply_pixel_limits, effective_pixel_limits
from mmtune.serving.requests import speaks_in_messages

Vectors: TypeAlias = list[torch.Tensor]
"""What an item is to a model, float32 on the CPU: a vector, a vector a token, or the scores of a query's candidates."""

POOLINGS = ("mean", "cls", "lasttoken", "max")
PIXEL_FACTORS = (4.0, 2.0, 0.5, 0.25)

BARE_TEMPLATE = """\
{{%- for message in messages -%}}
{{%- for part in message.content -%}}
{{%- if part.type == "text" -%}}{{{{ part.text }}}}{{%- else -%}}{page}{{%- endif -%}}
{{%- endfor -%}}
{{%- endfor -%}}"""
"""The content alone, as a server has it that applies no chat template."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in servers.

    Attributes:
        cause: What it is and what to do, as a text.
        planted: The model computes with the fault for as long as the block runs.
    """

    cause: str
    planted: Callable[[], AbstractContextManager[object]]


def known_faults(model: HostModel, *, reads_pages: bool) -> list[Fault]:
    """The faults that can be tried on a model, which is as it was after each."""
    encoder: Any = model[0]
    found = []
    if any((model.prompts or {}).values()):
        remedy = "no server adds it: put it before the text, or into a system message"
        found.append(
            Fault(f"prompt: the server computes without the prompt; {remedy}", lambda: _without_prompts(model))
        )
    if speaks_in_messages(model):
        what = "template: the server applies no chat template; ask with messages in place of input"
        found.append(Fault(what, lambda: _bare_template(encoder)))
        if any((model.prompts or {}).values()):
            found.append(Fault(f"{what}, with the prompt as a system message", lambda: _bare_without_prompts(model)))
        what = "template: the server opens an answer (add_generation_prompt) where the training did not, or the reverse"
        found.append(Fault(what, lambda: _other_generation_prompt(encoder)))
    for pooling in [module for module in model if isinstance(module, Pooling)]:
        for mode in POOLINGS:
            if mode != pooling.pooling_mode:
                what = f"pooling: the server pools by {mode}, and the model by {pooling.pooling_mode}"
                found.append(Fault(what, lambda p=pooling, m=mode: _set(p, pooling_mode=m)))
    if reads_pages:
        found += _pixel_faults(model)
    if any(isinstance(module, Dense) for module in model) and not isinstance(model, CrossEncoder):
        what = "head: the Dense layer behind the encoder is lost; the server must read the one in modules.json"
        found.append(Fault(what, lambda: _without_dense(model)))
    if any(map(has_adapters, encoders_of(model))):
        what = "adapter: the server computes without the adapters, which are not merged; serve what export_model writes"
        found.append(Fault(what, lambda: _without_adapters(model)))
    return found


def _pixel_faults(model: HostModel) -> list[Fault]:
    encoder: Any = model[0]
    found, limits = [], effective_pixel_limits(model)
    if encoder.processing_kwargs.get("image"):
        without = {name: value for name, value in encoder.processing_kwargs.items() if name != "image"}
        what = "pixel limit: the server does not know the model's own; it must stand in processor_config.json"
        found.append(Fault(what, lambda: _set(encoder, processing_kwargs=without)))
    if limits.max_pixels is None:
        return found
    for factor in PIXEL_FACTORS:
        pixels = round(limits.max_pixels * factor)
        what = f"pixel limit: the server reads pages at about {pixels} pixels, and the model at {limits.max_pixels}"
        found.append(Fault(what, lambda n=pixels: _limited(model, n)))
    return found


@contextmanager
def _set(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _without_prompts(model: HostModel) -> AbstractContextManager[None]:
    return _set(model, prompts=dict.fromkeys(model.prompts, ""), default_prompt_name=None)


def _bare_template(encoder: Any) -> AbstractContextManager[None]:
    names = ("vision_start_token", "image_token", "vision_end_token")
    page = "".join(getattr(encoder.processor, name, None) or "" for name in names)
    return _set(encoder.processor, chat_template=BARE_TEMPLATE.format(page=page))


@contextmanager
def _bare_without_prompts(model: HostModel) -> Iterator[None]:
    with _bare_template(model[0]), _without_prompts(model):
        yield


def _other_generation_prompt(encoder: Any) -> AbstractContextManager[None]:
    arguments = dict(encoder.processing_kwargs.get("chat_template", {}))
    arguments["add_generation_prompt"] = not arguments.get("add_generation_prompt", False)
    return _set(encoder, processing_kwargs={**encoder.processing_kwargs, "chat_template": arguments})


@contextmanager
def _limited(model: HostModel, pixels: int) -> Iterator[None]:
    encoders = [module for module in model.modules() if isinstance(module, Transformer)]
    before = [copy.copy(encoder.processing_kwargs) for encoder in encoders]
    try:
        apply_pixel_limits(model, PixelLimits(max_pixels=pixels))
        yield
    finally:
        for encoder, own in zip(encoders, before, strict=True):
            encoder.processing_kwargs = own


@contextmanager
def _without_dense(model: HostModel) -> Iterator[None]:
    layers: list[Any] = [module for module in model if isinstance(module, Dense)]

    def skip(layer: Any) -> Callable[..., dict[str, Any]]:
        def forward(features: dict[str, Any], **_: Any) -> dict[str, Any]:
            return {**features, layer.module_output_name: features[layer.module_input_name]}

        return forward

    try:
        for layer in layers:
            layer.forward = skip(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@contextmanager
def _without_adapters(model: HostModel) -> Iterator[None]:
    adapted = [module.model for module in encoders_of(model) if has_adapters(module)]
    learned = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for each in adapted:
            each.disable_adapters()
        yield
    finally:
        for each in adapted:
            each.enable_adapters()
        for weight, was_learned in learned:
            weight.requires_grad_(was_learned)


def in_bfloat16(model: HostModel) -> AbstractContextManager[object]:
    """The model computes with what a server in bfloat16 rounds away."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16)


def gaps(served: Vectors, expected: Vectors) -> torch.Tensor:
    """How far each item is off: one minus the cosine, or the difference of scores in standard deviations.

    It is infinite where the shapes differ.
    """
    return torch.tensor([_gap(own, wanted) for own, wanted in zip(served, expected, strict=True)])


def _gap(own: torch.Tensor, wanted: torch.Tensor) -> float:
    if own.shape != wanted.shape:
        return float("inf")
    return float((1 - nn.functional.cosine_similarity(own, wanted, dim=-1)).mean())


def score_gaps(served: Vectors, expected: Vectors) -> torch.Tensor:
    """As ``gaps`` for scores: how far each query's are off, in the standard deviation of all expected ones."""
    everything = torch.cat(expected)
    spread = max(float(everything.std()) if len(everything) > 1 else 0.0, 1e-6)
    return torch.tensor(
        [float((own - wanted).abs().max()) / spread for own, wanted in zip(served, expected, strict=True)]
    )


def find_order(served: Vectors, expected: Vectors, tolerance: float) -> bool:
    """Whether the vectors are right and stand at other places."""
    if len(served) < 2 or any(
        one.ndim != 1 or one.shape != two.shape for one, two in zip(served, expected, strict=True)
    ):
        return False
    own, wanted = (nn.functional.normalize(torch.stack(side), dim=1) for side in (served, expected))
    nearest = (own @ wanted.T).max(dim=1)
    is_right = bool((1 - nearest.values).max() <= tolerance)
    return is_right and float(gaps(served, expected).max()) > tolerance


def find_truncation(served: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> str | None:
    """The cause where vectors are the beginning of the model's."""
    size, full = served[0].shape[-1], expected[0].shape[-1]
    if size >= full or gaps(list(served), [wanted[..., :size] for wanted in expected]).max() > tolerance:
        return None
    lengths = torch.cat([vector.norm(dim=-1).reshape(-1) for vector in served])
    is_unit = bool((lengths - 1).abs().max() < 0.01)
    again = "" if is_unit else ", and not normalised again: they have lengths of " + describe_lengths(lengths)
    return f"truncation: the server cuts vectors to {size} of {full} dimensions{again}; ask for all (dimensions)"


def describe_lengths(lengths: torch.Tensor) -> str:
    """The range of some lengths, in words."""
    return f"{float(lengths.min()):.3g} to {float(lengths.max()):.3g}"


def find_normalisation(served: Vectors, expected: Vectors) -> str | None:
    """The cause where lengths are neither 1 nor those of the model."""
    own, wanted = (torch.cat([vector.norm(dim=-1).reshape(-1) for vector in side]) for side in (served, expected))
    if len(own) != len(wanted) or (own - 1).abs().max() < 0.01 or ((own / wanted) - 1).abs().max() < 0.01:
        return None
    return (
        f"normalisation: the server's vectors have lengths of {describe_lengths(own)}, and the model's of "
        f"{describe_lengths(wanted)}; serve with the Normalize module, or normalise in the client"
    )


def find_lost_head(model: HostModel, served: Vectors, expected: Vectors) -> str | None:
    """The cause where the scores of a reranker hardly differ: its head is not the trained one."""
    if not isinstance(model, CrossEncoder):
        return None
    own, wanted = torch.cat(served), torch.cat(expected)
    near_half = bool((own - 0.5).abs().max() < 0.1)
    if near_half or own.std() < 0.05 * wanted.std():
        return (
            f"head: the scores lie between {float(own.min()):.3g} and {float(own.max()):.3g}, as of a head that was "
            "never trained: the Dense layer or row that scores is lost; serve what export_model writes"
        )
    return None


def suspect(
    model: HostModel, query_gap: float, document_gap: float, tolerance: float, *, reads_pages: bool
) -> list[str]:
    """What is left where no known fault explains what a server computes, by what is off."""
    worst = max(query_gap, document_gap)
    other = (
        "weights: no known fault explains it, so the server holds other weights: adapters that are not merged, a lost "
        "Dense head, or another checkpoint"
    )
    if worst <= 10 * tolerance:
        return [f"dtype: all is {worst:.2g} off, a little more than bfloat16 makes; serve in another precision", other]
    if isinstance(model, (CrossEncoder, MultiVectorEncoder)) or query_gap > tolerance:
        return [other]
    what = "pixel limit: only documents differ; compare the sizes in processor_config.json with the model's"
    return [what if reads_pages else "prompt: only documents differ; compare their prompt and the longest text", other]
