"""The chat template of a reranker as a server fills it: two texts, no prompt and no arguments beside them."""

import json
from typing import Any

from sentence_transformers import CrossEncoder

from mmtune.errors import ConfigError
from mmtune.models.chat import own_template

TEMPLATE_FILE = "reranker.jinja"

FRAME = """\
{{%- set asked = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}}
{{%- set prompt = instruction | default(asked | default({prompt}, true), true) -%}}
{arguments}
{{%- set filled = namespace(messages=[]) -%}}
{{%- if prompt -%}}
{{%- set filled.messages = [{{"role": "system", "content": [{{"type": "text", "text": prompt}}]}}] -%}}
{{%- endif -%}}
{{%- for message in messages if message.role in ["query", "document"] -%}}
{{%- set parts = [{{"type": "text", "text": message.content}}] if message.content is string else message.content -%}}
{{%- set filled.messages = filled.messages + [{{"role": message.role, "content": parts}}] -%}}
{{%- endfor -%}}
{{%- set messages = filled.messages %}}"""
"""Goes in front of a template, as the lines that fold roles do. A page comes as the tokens that stand for it."""


def reranker_template(model: CrossEncoder) -> str:
    """The model's template with its prompt and arguments in it; ``instruction`` replaces the prompt.

    Raises:
        ConfigError: The model has no template.
    """
    encoder: Any = model[0]
    template = own_template(encoder.processor)
    if template is None:
        raise ConfigError(
            "The reranker has no chat template, so a server can't tell a query from a document. Build it with "
            "build_reranker, which proves that there is one."
        )
    arguments = encoder.processing_kwargs.get("chat_template", {})
    lines = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in arguments.items()]
    return (
        FRAME.format(prompt=json.dumps(default_prompt(model), ensure_ascii=False), arguments="\n".join(lines))
        + template
    )


def default_prompt(model: CrossEncoder) -> str:
    """What the model is asked where no prompt is named."""
    return (model.prompts or {}).get(model.default_prompt_name or "") or ""
