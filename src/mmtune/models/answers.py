"""The two tokens that a language model answers with: relevant or not."""

from dataclasses import dataclass
from typing import Any

from mmtune.errors import ConfigError

SUGGESTIONS = (("1", "0"), ("yes", "no"), ("Yes", "No"), ("true", "false"), ("True", "False"))


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
    true_id, false_id = (
        _checked_id(tokenizer, token, argument, name)
        for argument, token in (("true_token", true_token), ("false_token", false_token))
    )
    if true_id == false_id:
        raise ConfigError(
            f"true_token={true_token!r} and false_token={false_token!r} are the same token: every score would be 0. "
            f"{_expected(tokenizer, name)}"
        )
    return Answers(true_token, false_token, true_id, false_id)


def _checked_id(tokenizer: Any, token: str, argument: str, name: str) -> int:
    if not isinstance(token, str) or not token:
        raise ConfigError(f"{argument}={token!r} is no token. {_expected(tokenizer, name)}")
    token_id = _only_id(tokenizer, token)
    if token_id is None:
        raise ConfigError(f"{argument}={token!r} {_problem(tokenizer, token)}. {_expected(tokenizer, name)}")
    return token_id


def _only_id(tokenizer: Any, token: str) -> int | None:
    # an unknown token gets None or the id of the unknown token, and the host's LogitScore takes either
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _problem(tokenizer: Any, token: str) -> str:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if not ids or tokenizer.unk_token_id in ids:
        return "is not in the vocabulary"
    return f"is {len(ids)} tokens ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))})"


def _expected(tokenizer: Any, name: str) -> str:
    pairs = [(_only_id(tokenizer, true), _only_id(tokenizer, false)) for true, false in SUGGESTIONS]
    fitting = [
        f"true_token={true!r}, false_token={false!r}"
        for (true, false), (true_id, false_id) in zip(SUGGESTIONS, pairs, strict=True)
        if None not in (true_id, false_id) and true_id != false_id
    ]
    remedy = f"Pass {' or '.join(fitting[:2])}." if fitting else "Pass two entries of its vocabulary."
    return f"Expected two different tokens that are one id each in {name!r}, since the score compares them. {remedy}"
