"""What a checkpoint needs to become an embedding model, found out by trying it: pooling, padding, prompts that arrive.

A checkpoint without ``modules.json`` was not made for embeddings, and the host guesses (sentence-transformers 6.2): the
mean over all tokens unless the architecture is called ``...ForCausalLM``, and texts padded to the longest of a batch.
"""

import logging
import warnings
from typing import Any, TypeGuard

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.transformer import ProcessingKwargs
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device
from torch import nn

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import SAMPLES, first_line

PADDING_MATTERS = 0.05
"""Relative change of an embedding, well above the rounding of bfloat16 and far below what SigLIP shows."""

logger = logging.getLogger(__name__)


def fit_pooling(model: SentenceTransformer) -> None:
    """Give a model that the host made from a checkpoint for another use the pooling that its encoder needs.

    Where the encoder is causal, the last token is the only one that has seen the whole page: it becomes the embedding
    in place of the mean. It is saved with the model.

    Args:
        model: As the host makes it from a checkpoint without ``modules.json``, or from a saved reranker; changed in
            place. What was changed is logged, and ``describe_model`` tells it.
    """
    encoder, *others = model
    if not _embeds_texts(encoder):
        return
    for pooling in others:
        if isinstance(pooling, Pooling) and pooling.pooling_mode == "mean" and is_causal(encoder, model.device):
            pooling.pooling_mode = "lasttoken"
            name = encoder.config.name_or_path
            logger.warning("%r is causal: its embedding is the last token, and not the mean.", name)


def fit_padding(model: nn.Module, device: torch.device) -> None:
    """Pad every text to one length in the encoders where padding changes the embedding of a text, as in SigLIP.

    SigLIP pools the last token, padding or not, and was trained on texts of one length: else the embedding of a text
    depends on the batch it is in. The padding is saved with the model. What a checkpoint says about padding stands.

    Args:
        model: Any module, with all encoders in it; changed in place. What was changed is logged, and
            ``describe_model`` tells it.
        device: Where it is.
    """
    for encoder in model.modules():
        if not _embeds_texts(encoder) or encoder.module_output_name != "sentence_embedding":
            continue
        # the host looks for the number of positions in the config of one tower only
        positions = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
        if positions and (encoder.max_seq_length or positions) >= positions:
            encoder.max_seq_length = positions
        if padding_matters(encoder, device):
            # Without a mask, as in the training of SigLIP. With one, the host's cached losses would cut the padding off
            # each mini-batch, and train other embeddings than those in use (sentence-transformers 6.2).
            fixed = {"padding": "max_length", "return_attention_mask": False}
            kwargs = encoder.processing_kwargs
            encoder.processing_kwargs = {**kwargs, "text": {**kwargs.get("text", {}), **fixed}}
            name = encoder.config.name_or_path
            logger.warning("%r feels padding: every text is padded to %d tokens.", name, encoder.max_seq_length)


def _embeds_texts(module: nn.Module) -> TypeGuard[Transformer]:
    return isinstance(module, Transformer) and module.backend == "torch" and "text" in module.modalities


def is_causal(encoder: Transformer, device: torch.device) -> bool:
    """Whether an encoder's tokens see only those before them.

    By definition and not by name: the gradient of the first token's embedding with respect to the last token is exactly
    zero then. A config's ``is_causal`` is absent, or overruled by a bidirectional mask, in several families.
    """
    seen: list[torch.Tensor] = []

    def watch(_layer: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        # some families add to it in place, which a leaf forbids
        return seen[-1].clone()

    hook = encoder.model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            tokens = _embed_text(encoder, device)["token_embeddings"]
    finally:
        hook.remove()
    if not seen or not tokens.requires_grad:  # an encoder of its own kind: the host's choice stands
        return False
    # not the plain sum: over the outputs of a layer norm it is a constant
    score = (tokens[0, 0].float() * torch.linspace(-1, 1, tokens.shape[-1], device=tokens.device)).sum()
    (gradient,) = torch.autograd.grad(score, seen[:1], allow_unused=True)
    return gradient is not None and not bool(gradient[0, -1].any())


def padding_matters(encoder: Transformer, device: torch.device) -> bool:
    """Whether an encoder that pools by itself embeds a text differently when it is padded to the full length."""
    if encoder.processing_kwargs.get("text", {}).get("padding"):
        return False
    with torch.no_grad():
        alone = _embed_text(encoder, device)["sentence_embedding"].float()
        padded = _embed_text(encoder, device, {"text": {"padding": "max_length"}})["sentence_embedding"].float()
    return bool((alone - padded).norm() > PADDING_MATTERS * alone.norm())


def _embed_text(encoder: Transformer, device: torch.device, kwargs: ProcessingKwargs | None = None) -> dict[str, Any]:
    """What an encoder makes of a short text.

    Raises:
        ConfigError: It can't.
    """
    try:
        features = encoder.preprocess([SAMPLES["text"]], processing_kwargs=kwargs)
        return encoder(batch_to_device(features, device))
    except Exception as error:  # processors and encoders refuse in every way
        raise ConfigError(
            f"{encoder.config.name_or_path!r} can't embed a text: {type(error).__name__}: {first_line(error)} Expected "
            f"the tokenizer that belongs to the weights, and an attention that runs on this device. Check both."
        ) from error


def check_prompts(model: SentenceTransformer) -> None:
    """Make sure that a model's prompts reach its tokens, where they go into a chat template as a system message.

    Raises:
        ConfigError: The template takes no system message.

    Warns:
        UserWarning: The template leaves system messages out.
    """
    if not isinstance(model[0], Transformer) or not {"message", "text"} <= set(model.modalities):
        return
    plain = model.preprocess([SAMPLES["text"]])["input_ids"]
    for name, prompt in model.prompts.items():
        if not prompt:
            continue
        try:
            prompted = model.preprocess([SAMPLES["text"]], prompt=prompt)["input_ids"]
        except Exception as error:  # a template raises what it likes, under jinja2's name
            raise ConfigError(
                f"The prompt {name!r} ({prompt!r}) can't be used: {first_line(error)} It becomes a system message, and "
                f"the model's chat template takes none. Pass processor_kwargs={{'chat_template': ...}} with one that "
                f"does, or remove the prompt."
            ) from error
        if torch.equal(prompted, plain):
            warnings.warn(
                f"The prompt {name!r} ({prompt!r}) has no effect: the model's chat template leaves out system "
                f"messages, which prompts become. Pass processor_kwargs={{'chat_template': ...}} with one "
                f"that renders them, or remove the prompt.",
                UserWarning,
                stacklevel=4,
            )
