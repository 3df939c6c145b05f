"""What writes and judges queries: a callable, or a model behind a server; what is asked of it, and what it replied."""

import base64
import importlib.util
import io
import json
import math
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from PIL import Image

from mmtune.arguments import require_number, require_whole, shown
from mmtune.errors import ConfigError, MissingExtraError, MmtuneError
from mmtune.models.checkpoints import how_to_install

Generator: TypeAlias = Callable[[Image.Image | None, str | None, str], str]
"""Takes the image of a page, its text, and an instruction; either of the first two may be ``None``. Gives a text."""


class OpenAICompatible:
    """A model behind a server that speaks the chat-completions API of OpenAI: vLLM, Ollama, or a hosted one.

    It writes queries and judges them. A page is sent as a JPEG of at most ``max_pixels``, with its text where there is
    one. Answers of 429 (when the server says), 500 and time-outs are asked for again by the client of OpenAI.

    Args:
        base_url: Where the API is, e.g. ``"http://localhost:8000/v1"``.
        model: The name of the model there.
        api_key_env: The environment variable that holds the key; ``None`` sends none. The key is written nowhere.
        timeout_s: Seconds until a call counts as lost.
        max_retries: How often a failed call is made again.
        max_pixels: Width times height of the image that is sent, at most.

    Attributes:
        tokens_spent: Tokens of all calls so far, as the server counts them.

    Raises:
        ConfigError: An argument has a value it can't have, or the environment variable is not set.
        MissingExtraError: The package ``openai`` is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        max_pixels: int = 1_500_000,
    ) -> None:
        if not isinstance(base_url, str) or not re.match(r"https?://[^/\s]", base_url):
            raise ConfigError(f"base_url={shown(base_url)}: expected a URL such as 'http://localhost:8000/v1'.")
        if not isinstance(model, str) or not model.strip():
            raise ConfigError(f"model={shown(model)}: expected the name that the model has at {base_url}.")
        timeout = require_number("timeout_s", timeout_s)
        if timeout <= 0:
            raise ConfigError(f"timeout_s={timeout_s!r}: expected seconds, more than 0. Pass e.g. timeout_s=60.")
        retries = require_whole("max_retries", max_retries, at_least=0)
        self.base_url, self.model, self.tokens_spent = base_url, model, 0
        self._max_pixels = require_whole("max_pixels", max_pixels)
        if importlib.util.find_spec("openai") is None:
            raise MissingExtraError(
                f"OpenAICompatible needs openai, which is not installed. {how_to_install('openai')}"
            )
        import openai

        # A key of another service that lies in the environment must not go to this server.
        key = "none" if api_key_env is None else _read_key(api_key_env)
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries)
        self._lock = threading.Lock()

    def __call__(self, image: Image.Image | None, text: str | None, instruction: str) -> str:
        """What the model replies to an instruction about a page.

        Raises:
            ConfigError: The server refuses every call: the key, the model or the address is wrong.
            MmtuneError: This call failed, after all retries.
        """
        import openai

        content: list[Any] = []
        if image is not None:
            content.append({"type": "image_url", "image_url": {"url": _data_url(image, self._max_pixels)}})
        if text:
            content.append({"type": "text", "text": f"The text of the page:\n{text}"})
        content.append({"type": "text", "text": instruction})
        where = f"{self.model!r} at {self.base_url}"
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}]
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConfigError(
                f"{where} can't be used: {error}. Check base_url (most servers want /v1 at its end), model and the key."
            ) from error
        except (openai.OpenAIError, ValueError) as error:  # a ValueError where the server sends damaged JSON
            cause = f": {error.__cause__}" if isinstance(error, openai.APIConnectionError) and error.__cause__ else ""
            raise MmtuneError(f"{where} gave no reply: {type(error).__name__}: {error}{cause}") from error
        return self._read(completion, where)

    def _read(self, completion: Any, where: str) -> str:
        # The client passes on whatever comes with status 200, such as the HTML of a proxy as a text.
        if isinstance(completion, str) or not getattr(completion, "choices", None):
            raise MmtuneError(f"{where} replied with something else than a completion: {str(completion)[:80]!r}")
        tokens = getattr(getattr(completion, "usage", None), "total_tokens", None)
        with self._lock:
            self.tokens_spent += tokens if isinstance(tokens, int) else 0
        choice = completion.choices[0]
        reply = getattr(getattr(choice, "message", None), "content", None)
        if not isinstance(reply, str) or not reply.strip():
            raise MmtuneError(f"{where} replied with no text")
        if getattr(choice, "finish_reason", None) == "length":
            raise MmtuneError(f"{where} replied with a text that was cut off: {reply[-40:]!r}")
        return reply

    def __repr__(self) -> str:
        return f"OpenAICompatible({self.base_url!r}, {self.model!r})"


def _read_key(api_key_env: object) -> str:
    if not isinstance(api_key_env, str) or not api_key_env:
        raise ConfigError(
            f"api_key_env={shown(api_key_env)}: expected the name of an environment variable, e.g. 'OPENAI_API_KEY'."
        )
    key = os.environ.get(api_key_env, "")
    if not key.strip():
        # A key that was passed in place of a name must not end up in a log.
        name = api_key_env if re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]{0,63}", api_key_env) else "..."
        raise ConfigError(
            f"api_key_env={name!r}: that environment variable is not set. Set it to the key before Python starts, or "
            "leave api_key_env out for a server that wants none."
        )
    return key


def _data_url(image: Image.Image, max_pixels: int) -> str:
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def require_generator(name: str, value: object) -> None:
    """Make sure that ``value`` can be asked about pages.

    Raises:
        ConfigError: It is nothing that can be called, or a model of the host, which takes other arguments.
    """
    if not callable(value) or isinstance(value, (torch.nn.Module, type)):
        raise ConfigError(
            f"{name}={shown(value)} writes no text. Expected OpenAICompatible(base_url, model), or a function of a "
            "page's image, its text and an instruction that returns a text."
        )


def generator_name(generator: object) -> str | None:
    """What tells a generator from others: its ``name`` or ``model``, else the qualified name of a function or a class.

    ``None`` for a lambda and a ``functools.partial``, which all have one name, and for what is defined inside a
    function: each call of that makes another one of the same name.
    """
    for attribute in ("name", "model"):
        given = getattr(generator, attribute, None)
        if isinstance(given, str) and given:
            return given
    named = generator if hasattr(generator, "__qualname__") else type(generator)
    name = f"{named.__module__}.{named.__qualname__}"  # type: ignore[attr-defined] - a function, a method or a class
    return None if "<lambda>" in name or "<locals>" in name or name == "functools.partial" else name


_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_YES = re.compile(r"\W*(?:yes(?! and no)|true)\b", re.IGNORECASE)
_NO = re.compile(
    r"\W*(?:no(?! (?:doubt|question|problem))|false|not (?:at all|answer\w*|relevant|given|stated|found|mentioned))\b",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\W*(?:i(?:'m| am)? |it(?:'s| is) )?(?:yes and no|no|not|partly|partially|unsure|unclear|uncertain|maybe|perhaps"
    r"|possibly|can(?:no|'| no)t (?:tell|say|judge|determine|be)|(?:don't|do not) know|hard to (?:say|tell))\b",
    re.IGNORECASE,
)
_VERDICT_KEYS = frozenset(
    [
        "answers",
        "answer",
        "answered",
        "answerable",
        "isanswered",
        "isanswerable",
        "answersquestion",
        "verdict",
        "result",
    ]
).union(["relevant", "isrelevant", "relevance", "judgement", "judgment", "decision", "label", "score"])
"""What judges call their verdict who do not keep to ``answers``: in small letters, without what is between words."""


def read_json(reply: str) -> Any:
    """The JSON in a reply, also between other words or in a fence; ``None`` where there is none."""
    text = _THOUGHTS.sub("", reply)
    starts = [at for at in (text.find("{"), text.find("[")) if at >= 0]
    for candidate in (text.strip(), text[min(starts) :] if starts else ""):
        try:
            return json.JSONDecoder().raw_decode(candidate)[0]
        except (ValueError, RecursionError):
            continue
    return None


def read_queries(reply: str) -> list[tuple[str, str | None]]:
    """The queries of a reply with their answers; a reply that is not the JSON asked for is a query itself."""
    found = read_json(reply)
    several = found.get("queries") if isinstance(found, dict) else None
    parts = several if isinstance(several, list) else found if isinstance(found, list) else [found]
    queries = [_read_query({"query": part} if isinstance(part, str) and parts is several else part) for part in parts]
    if not queries or None in queries:
        return [(_THOUGHTS.sub("", reply).strip(), None)]
    return [query for query in queries if query is not None]


def _read_query(part: Any) -> tuple[str, str | None] | None:
    if not isinstance(part, dict) or not isinstance(part.get("query"), str):
        return None
    answer = part.get("answer")
    return part["query"].strip(), None if answer is None else str(answer).strip()


def read_verdict(reply: str) -> float | None:
    """What a judge says, from 0 (no) to 1 (yes); ``None`` where the reply says neither.

    Hedges ("not sure") are 0.5, and so is JSON under no key that is known to hold a verdict.
    """
    found = read_json(reply)
    if not isinstance(found, dict):
        said = [found, _THOUGHTS.sub("", reply).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")]
    elif _read_score(found.get("answers")) is not None:
        said = [found["answers"]]
    else:
        said = [value for key, value in found.items() if re.sub(r"[\W_]", "", key).lower() in _VERDICT_KEYS]
        if found and not said:
            return 0.5
        # A yes or no is a verdict; a text may be the answer itself, and a number how sure the judge is.
        said.sort(key=lambda value: (not isinstance(value, bool), not isinstance(value, str)))
    return next((score for score in map(_read_score, said) if score is not None), None)


def _read_score(said: Any) -> float | None:
    if isinstance(said, (bool, int, float)):
        return float(said) if 0 <= said <= 1 else None
    by_words = ((_YES, 1.0), (_NO, 0.0), (_HEDGE, 0.5))
    return next((score for words, score in by_words if isinstance(said, str) and words.match(said)), None)
