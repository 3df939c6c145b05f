"""What a language model is asked with and answers with: a chat template that tells a query from a document, two tokens.

Templates are proved by rendering them.

The host turns a pair into two messages with the roles ``query`` and ``document``, and a prompt into a ``system``
message before them. A template made for chats knows neither role: it raises, or leaves the messages out, and then every
pair scores the same. Such a template gets a few lines in front that put both into one message of the user, in the words
of the Qwen rerankers:

.. code-block:: text

    <Query>: total revenue of 2021
    <Document>: (the page)

The lines are part of the template, so they are saved with the model and hold in the plain host.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmtune.errors import ConfigError
from mmtune.models.checkpoints import SAMPLES

PAIR_ROLES = ("query", "document")
LABELS = {"query": "<Query>: ", "document": "<Document>: "}
LABELS_WITH_PROMPT = {"system": "<Instruct>: ", **LABELS}
"""For templates without system messages: the prompt goes into the message of the user, too."""

FOLDING = """\
{%- if messages | selectattr("role", "in", ["query", "document"]) | list -%}
{%- set folded = namespace(messages=[], content=[]) -%}
{%- for message in messages -%}
{%- if message.role in labels -%}
{%- set label = ("\\n" if folded.content else "") + labels[message.role] -%}
{%- set content = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
{%- set folded.content = folded.content + [{"type": "text", "text": label}] + content -%}
{%- else -%}
{%- set folded.messages = folded.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = folded.messages + [{"role": "user", "content": folded.content}] -%}
{%- endif %}"""
"""Goes in front of a template. It ends in a tag, so the template's own first line stands unchanged."""

PAGE = {"type": "image", "image": SAMPLES["image"]}
NO_TEXT = {"type": "text", "text": ""}
FIRST, SECOND, PROMPT = ({"type": "text", "text": word} for word in ("kestrel", "obsidian", "marigold"))
NO_THINKING = {"enable_thinking": False}
"""As the Qwen and GLM templates call it."""

SUGGESTIONS = (("1", "0"), ("yes", "no"), ("Yes", "No"), ("true", "false"), ("True", "False"))
"""True and false tokens to try where the given ones do not fit."""

logger = logging.getLogger(__name__)


def pair_template(processor: Any, name: str) -> str:
    """A chat template that carries a prompt, a query and a document: the checkpoint's own, or that with lines in front.

    Raises:
        ConfigError: There is no template, or none of these carries all three.
    """
    own = own_template(processor)
    if own is None:
        raise ConfigError(
            f"{name!r} has no chat template, which gives a query and a document their places in one text. Expected a "
            f"checkpoint made for chats about images, such as Qwen3-VL. Pass one, or a template as "
            f'processor_kwargs={{"chat_template": ...}}.'
        )
    reason = role_failure(processor, own)
    if reason is None:
        return own
    for labels in (LABELS, LABELS_WITH_PROMPT):
        folding = f"{{%- set labels = {json.dumps(labels)} -%}}\n{FOLDING}{own}"
        failure = role_failure(processor, folding)
        if failure is None:
            logger.warning("The chat template of %r: %s. Both go into one message of the user now.", name, reason)
            return folding
    raise ConfigError(
        f"The chat template of {name!r} can't carry a query and a document: {reason}. Both in one message of the user "
        f"did not help: {failure}. Expected a template that renders the roles 'query' and 'document', or at least the "
        f'texts and images of a user. Pass one as processor_kwargs={{"chat_template": ...}}, or another checkpoint.'
    )


def own_template(processor: Any) -> str | None:
    """The template that a processor applies where none is named, or ``None`` where it has none."""
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def role_failure(processor: Any, template: str) -> str | None:
    """Why a template does not carry a prompt and a pair, as the end of a sentence, or ``None`` where it does.

    Rendered are pairs of texts, and of a text and an image in both directions.
    """
    try:
        texts = _rendered(processor, template, FIRST, SECOND)
        swapped = _rendered(processor, template, FIRST, SECOND, roles=PAIR_ROLES[::-1])
        pages = {
            "document": [_rendered(processor, template, FIRST, content) for content in (PAGE, NO_TEXT)],
            "query": [_rendered(processor, template, content, SECOND) for content in (PAGE, NO_TEXT)],
        }
    except Exception as error:  # templates raise what they like
        return f"it fails with {type(error).__name__}: {error}".rstrip(".")
    if "'type'" in texts:
        return "it renders texts alone, not parts of texts and images"
    missing = [role for role, content in zip(PAIR_ROLES, (FIRST, SECOND), strict=True) if content["text"] not in texts]
    missing += [f"page as the {role}" for role, (page, nothing) in pages.items() if page == nothing]
    if not missing and FIRST["text"] not in pages["document"][0]:
        missing = ["query of a page"]
    if not missing and SECOND["text"] not in pages["query"][0]:
        missing = ["document to a page"]
    if missing:
        return f"it leaves out the {' and the '.join(missing)}"
    if texts == swapped:
        return "it renders a query and a document alike"
    return None if PROMPT["text"] in texts else "it leaves out the prompt, which is a system message"


def answer_arguments(processor: Any, template: str) -> dict[str, bool]:
    """Arguments of ``apply_chat_template`` after which the answer comes next, and not a thought about it first."""
    # a tokenizer passes on arguments that a template does not know; a processor takes them for its own, and warns
    default, direct = (_rendered(processor.tokenizer, template, FIRST, SECOND, given) for given in ({}, NO_THINKING))
    return {"add_generation_prompt": True, **(NO_THINKING if default != direct else {})}


def opens_answer(processor: Any, template: str) -> bool:
    """Whether a template opens the answer when asked to, so that the last token is where the answer comes next."""
    closed, opened = (
        _rendered(processor, template, FIRST, PAGE, {"add_generation_prompt": wanted}) for wanted in (False, True)
    )
    return closed != opened


def _rendered(
    processor: Any,
    template: str,
    first: Any,
    second: Any,
    arguments: Mapping[str, bool] | None = None,
    *,
    roles: tuple[str, ...] = PAIR_ROLES,
) -> str:
    contents = zip(("system", *roles), (PROMPT, first, second), strict=True)
    conversation = [{"role": role, "content": [content]} for role, content in contents]
    arguments = {"add_generation_prompt": True, **(arguments or {})}
    return processor.apply_chat_template(conversation, chat_template=template, tokenize=False, **arguments)


@dataclass(frozen=True)
class Answers:
    """Two tokens and their ids in a tokenizer's vocabulary."""

    true_token: str
    false_token: str
    true_id: int
    false_id: int


def find_answers(tokenizer: Any, true_token: str, false_token: str, name: str) -> Answers:
    """The ids of two tokens, each exactly one.

    Args:
        tokenizer: Of a checkpoint.
        true_token: What a relevant pair is answered with: an entry of the vocabulary, or a text that becomes one.
        false_token: What any other pair is answered with.
        name: Of the checkpoint, for messages.

    Raises:
        ConfigError: One is unknown or splits, or both are the same; the message suggests two that are not.
    """
    ids = []
    for argument, token in (("true_token", true_token), ("false_token", false_token)):
        if not isinstance(token, str) or not token:
            raise ConfigError(f"{argument}={token!r} is no token. {_expected(tokenizer, name)}")
        token_id = _only_id(tokenizer, token)
        if token_id is None:
            parts = tokenizer.encode(token, add_special_tokens=False)
            problem = f"is {len(parts)} tokens ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(parts)))})"
            if not parts or tokenizer.unk_token_id in parts:
                problem = "is not in the vocabulary"
            raise ConfigError(f"{argument}={token!r} {problem}. {_expected(tokenizer, name)}")
        ids.append(token_id)
    if ids[0] == ids[1]:
        raise ConfigError(
            f"true_token={true_token!r} and false_token={false_token!r} are the same token: every score would be 0. "
            f"{_expected(tokenizer, name)}"
        )
    return Answers(true_token, false_token, *ids)


def _only_id(tokenizer: Any, token: str) -> int | None:
    # an unknown token gets None or the id of the unknown token, and the host's LogitScore takes either
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _expected(tokenizer: Any, name: str) -> str:
    fitting = []
    for true, false in SUGGESTIONS:
        ids = {_only_id(tokenizer, true), _only_id(tokenizer, false)}
        if None not in ids and len(ids) == 2:
            fitting.append(f"true_token={true!r}, false_token={false!r}")
    remedy = f"Pass {' or '.join(fitting[:2])}." if fitting else "Pass two entries of its vocabulary."
    return f"Expected two different tokens that are one id each in {name!r}, since the score compares them. {remedy}"
