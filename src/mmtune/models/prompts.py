"""Prompts that a chat template swallows: a model would train and be used as if it had none."""

import warnings

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import first_line

SAMPLE = "total revenue"


def check_prompts(model: SentenceTransformer) -> None:
    """Make sure that a model's prompts reach its tokens, where they go into a chat template as a system message.

    Raises:
        ConfigError: The template takes no system message.

    Warns:
        UserWarning: The template leaves system messages out.
    """
    if not isinstance(model[0], Transformer) or not {"message", "text"} <= set(model.modalities):
        return
    plain = model.preprocess([SAMPLE])["input_ids"]
    for name, prompt in model.prompts.items():
        if prompt and torch.equal(_prompted(model, name, prompt), plain):
            warnings.warn(
                f"The prompt {name!r} ({prompt!r}) has no effect: the model's chat template leaves out system "
                f"messages, which the host makes of prompts. Pass processor_kwargs={{'chat_template': ...}} with one "
                f"that renders them, or remove the prompt.",
                UserWarning,
                stacklevel=4,
            )


def _prompted(model: SentenceTransformer, name: str, prompt: str) -> torch.Tensor:
    try:
        return model.preprocess([SAMPLE], prompt=prompt)["input_ids"]
    except Exception as error:  # a template raises what it likes, under jinja2's name
        raise ConfigError(
            f"The prompt {name!r} ({prompt!r}) can't be used: {first_line(error)} The host makes a system message of "
            f"it, and the model's chat template takes none. Pass processor_kwargs={{'chat_template': ...}} with one "
            f"that does, or remove the prompt."
        ) from error
