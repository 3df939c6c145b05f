"""Building a reranker from a language model that reads pages: one score for a query and a document together."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig

from mmtune.errors import ConfigError
from mmtune.models.answers import Answers, find_answers
from mmtune.models.chat_roles import answer_arguments, opens_answer, own_template, pair_template
from mmtune.models.checkpoints import CheckpointFiles, Encoder, first_line, read_encoders
from mmtune.models.loading import load_host_model
from mmtune.models.opening import build, check_host_kwargs, check_limits, checked_name, checkpoint_files
from mmtune.models.options import LoadOptions
from mmtune.models.pixels import apply_pixel_limits

HEADS = ("logit_score", "dense")
DIRECTIONS = {
    "text_to_image": "Judge whether the page, which is the document, answers the query.",
    "image_to_text": "Judge whether the page, which is the query, answers the text, which is the document.",
}
"""What a pair is, from its query to its document, and the beginning of that direction's prompt."""

LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Foundation:
    """What a new reranker is built on, known before weights are read.

    Attributes:
        files: The checkpoint.
        encoder: Its processor and what it reads.
        config: Of its language model.
        answers: The two tokens that the score compares.
        chat_template: One that carries prompt, query and document.
        options: How the checkpoint is loaded.
    """

    files: CheckpointFiles
    encoder: Encoder
    config: PreTrainedConfig
    answers: Answers
    chat_template: str
    options: LoadOptions


def build_reranker(
    name_or_path: str | Path,
    *,
    head: str = "logit_score",
    true_token: str = "1",
    false_token: str = "0",
    prompts: Mapping[str, str] | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    device: str | torch.device | None = None,
    **host_kwargs: Any,
) -> CrossEncoder:
    """A host reranker that scores pairs of texts and pages, in both directions.

    The language model is asked whether query and document belong together. The score is the log-odds of its answer,
    ``logit(true_token) - logit(false_token)`` where the answer begins; both heads start there. ``predict`` gives it as
    it is, since a sigmoid makes all large scores the same 1.0; ``activation_fn=torch.nn.Sigmoid()``, here or in
    ``predict``, gives probabilities.

    Whatever can be checked without weights is checked first: the tokens, and, by rendering the chat template, that
    prompt, query and document reach the model. A template without these roles gets lines in front that keep them.

    Args:
        name_or_path: The folder of a checkpoint or its name on the Hub: a language model that reads images, such as
            Qwen3-VL, or a ready reranker. A ready one (saved by the host as a ``CrossEncoder``, or for sequence
            classification) keeps its head, tokens, prompts and activation.
        head: ``"logit_score"`` keeps the LM head and trains it with the rest. ``"dense"`` takes the last token's
            features and one row in place of the LM head, which saves the logits of the whole vocabulary. Where the LM
            head is tied to the input embeddings, ``"logit_score"`` trains these, too.
        true_token: What a relevant pair is answered with, one token of the vocabulary.
        false_token: What any other pair is answered with.
        prompts: By direction, ``"text_to_image"`` and ``"image_to_text"``: what the model is asked. A direction that is
            left out, and ``None``, get a default that names both tokens. They are saved with the model, and the host
            applies the one for ``prompt_name="image_to_text"``; without a name it is ``"text_to_image"``.
        max_pixels: As in ``load_model``.
        min_pixels: As in ``load_model``.
        dtype: As in ``load_model``.
        attention: As in ``load_model``.
        device: As in ``load_model``.
        **host_kwargs: Further arguments of ``CrossEncoder``.

    Returns:
        A new model with one score per pair, in evaluation mode.

    Raises:
        ConfigError: There is no checkpoint, or none that reads texts and images together and has what the head needs;
            a token is not exactly one id; the chat template can't carry a pair; or an argument does not fit.
        MissingExtraError: A package that the checkpoint needs is not installed.

    Warns:
        UserWarning: A pixel limit, or a head or token for a ready reranker, is not applied.

    Example:
        >>> reranker = build_reranker("Qwen/Qwen3-VL-2B-Instruct", max_pixels=600 * 600)  # doctest: +SKIP
        >>> reranker.predict([("total revenue", page)])  # doctest: +SKIP
    """
    options = LoadOptions(max_pixels, min_pixels, dtype, attention, device, host_kwargs)
    _check_arguments(head, options, prompts)
    name = checked_name(name_or_path)
    files = checkpoint_files(name, {**host_kwargs, "processor_kwargs": options.processor_kwargs})
    if is_reranker(files):
        _check_one_score(files)
        _warn_unused(head, true_token, false_token)
        return _ready_reranker(name, options, prompts)
    foundation = _foundation(files, options, (true_token, false_token))
    all_prompts = _all_prompts(foundation.answers, prompts)
    _check_default_prompt(all_prompts, options)
    modules = _log_odds_modules(foundation) if head == "logit_score" else _dense_modules(foundation)
    return _assembled(foundation, modules, all_prompts)


def is_reranker(files: CheckpointFiles) -> bool:
    """Whether a checkpoint is a ready reranker: the host's ``CrossEncoder``, or one for sequence classification."""
    modules = files.read_json("modules.json")
    if modules is not None:
        saved = files.read_json("config_sentence_transformers.json") or {}
        return saved.get("model_type") == "CrossEncoder"
    architectures = (files.read_json("config.json") or {}).get("architectures") or []
    return any(architecture.endswith("ForSequenceClassification") for architecture in architectures)


def _check_arguments(head: str, options: LoadOptions, prompts: Mapping[str, str] | None) -> None:
    check_host_kwargs(CrossEncoder, options.host_kwargs)
    if head not in HEADS:
        raise ConfigError(f"head={head!r} is no head. Expected {' or '.join(map(repr, HEADS))}. Pass one of them.")
    if options.host_kwargs.get("num_labels") not in (None, 1):
        raise ConfigError(
            f"num_labels={options.host_kwargs['num_labels']!r} does not rank: a reranker gives one score per pair. "
            f"Leave num_labels out."
        )
    if prompts is not None and not isinstance(prompts, Mapping):
        raise ConfigError(
            f"prompts={prompts!r} is no mapping. Expected a prompt by direction. Pass "
            f'prompts={{"text_to_image": ..., "image_to_text": ...}}.'
        )
    for direction, prompt in (prompts or {}).items():
        if not isinstance(prompt, str):
            raise ConfigError(
                f"prompts[{direction!r}]={prompt!r} is no text. Pass a string; an empty one is no prompt."
            )


def _warn_unused(head: str, true_token: str, false_token: str) -> None:
    given = {"head": (head, "logit_score"), "true_token": (true_token, "1"), "false_token": (false_token, "0")}
    unused = [f"{name}={value!r}" for name, (value, default) in given.items() if value != default]
    if unused:
        message = f"{' and '.join(unused)} is not applied: the checkpoint is a ready reranker and keeps its head."
        warnings.warn(f"{message} Leave it out, or build on a language model.", UserWarning, stacklevel=3)


def _check_one_score(files: CheckpointFiles) -> None:
    config = files.config("")
    scores = getattr(config, "num_labels", 1) if files.read_json("modules.json") is None else 1
    if scores != 1:
        raise ConfigError(
            f"{files.name!r} gives {scores} scores per pair. Expected one, to rank by. Pass a reranker, or build "
            f"one on a language model."
        )


def _ready_reranker(name: str, options: LoadOptions, prompts: Mapping[str, str] | None) -> CrossEncoder:
    host_kwargs = {**options.host_kwargs, **({"prompts": dict(prompts)} if prompts else {})}
    model = load_host_model(CrossEncoder, name, replace(options, host_kwargs=host_kwargs), modality="text")
    if DIRECTIONS.keys() & model.prompts.keys():  # another model's prompts have names of their own
        _check_directions(prompts or {})
    return model


def _foundation(files: CheckpointFiles, options: LoadOptions, tokens: tuple[str, str]) -> Foundation:
    if options.host_kwargs.get("backend", "torch") != "torch":
        raise ConfigError(
            f"backend={options.host_kwargs['backend']!r} can't be built on: a new head is trained in torch. Leave "
            f"backend out, and export the trained model."
        )
    encoders = read_encoders(files, "text", model_class=CrossEncoder)
    config = _language_model(files, encoders)
    check_limits(encoders, options.limits)
    processor = encoders[0].processor
    answers = find_answers(_tokenizer(processor), *tokens, name=files.name)
    chat_template = pair_template(processor, files.name)
    if not opens_answer(processor, chat_template):
        warnings.warn(
            f"The chat template of {files.name!r} opens no answer (add_generation_prompt does nothing): the score is "
            f"read after the last message. Pass a template that opens one, unless this one always does.",
            UserWarning,
            stacklevel=3,
        )
    return Foundation(files, encoders[0], config, answers, chat_template, options)


def _language_model(files: CheckpointFiles, encoders: Sequence[Encoder]) -> PreTrainedConfig:
    """The config of a checkpoint, after checking that it reads texts and images together and has an LM head."""
    encoder, config = encoders[0], encoders[0].config
    expected = "Expected a language model that reads images, such as Qwen3-VL, or a ready reranker. Pass one."
    if config is None or len(encoders) > 1 or (files.read_json("modules.json") or [{"path": ""}])[0]["path"]:
        raise ConfigError(f"{files.name!r} is a Router, an adapter or another composition. {expected}")
    kind = f"{files.name!r} (model type {config.model_type})"
    if not _class_names(MODEL_FOR_MULTIMODAL_LM_MAPPING, config):
        raise ConfigError(f"{kind} has no LM head over texts and images, so it can't judge a pair. {expected}")
    if "image" not in (encoder.modalities or ()) or _tokenizer(encoder.processor) is None:
        raise ConfigError(f"{kind} reads no texts and images together. {expected}")
    if _lacks_lm_head(config):
        raise ConfigError(
            f"{kind} was saved without its LM head ({', '.join(config.architectures or ())}), which is not tied to the "
            f"input embeddings, so nothing answers. Pass the checkpoint that it was trained from."
        )
    return config


def _lacks_lm_head(config: PreTrainedConfig) -> bool:
    without = _class_names(MODEL_MAPPING, config) - _class_names(MODEL_FOR_MULTIMODAL_LM_MAPPING, config)
    return not without.isdisjoint(config.architectures or ()) and not _tied(config)


def _class_names(mapping: Any, config: PreTrainedConfig) -> set[str]:
    classes = mapping.get(type(config), ())
    return {model_class.__name__ for model_class in (classes if isinstance(classes, tuple) else (classes,))}


def _tied(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", None)


def _all_prompts(answers: Answers, prompts: Mapping[str, str] | None) -> dict[str, str]:
    given = prompts or {}
    _check_directions(given)
    reply = f"Reply {answers.true_token} if so, else {answers.false_token}."
    return {direction: f"{beginning} {reply}" for direction, beginning in DIRECTIONS.items()} | dict(given)


def _check_directions(prompts: Mapping[str, str]) -> None:
    for name in prompts.keys() - DIRECTIONS.keys():
        nearest = difflib.get_close_matches(str(name), DIRECTIONS, n=1, cutoff=0)[0]
        raise ConfigError(
            f"prompts has {name!r}, which is no direction. Expected {' or '.join(map(repr, DIRECTIONS))}. The nearest "
            f"is {nearest!r}: rename it."
        )


def _check_default_prompt(prompts: Mapping[str, str], options: LoadOptions) -> None:
    name = options.host_kwargs.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise ConfigError(
            f"default_prompt_name={name!r} is no direction. Expected {' or '.join(map(repr, prompts))}. Pass one of "
            f"them, or None for a prompt only where it is named."
        )


def _log_odds_modules(foundation: Foundation) -> list[nn.Module]:
    answers = foundation.answers
    return [_transformer(foundation, "any-to-any"), LogitScore(answers.true_id, answers.false_id)]


def _dense_modules(foundation: Foundation) -> list[nn.Module]:
    saved_rows = None if _tied(foundation.config) else _saved_rows(foundation)
    transformer = _transformer(foundation, "feature-extraction")
    embeddings: torch.Tensor = transformer.model.get_input_embeddings().get_parameter("weight")
    true_row, false_row = saved_rows or [embeddings[row] for row in _rows(foundation)]
    weight = (true_row - false_row).detach().to(embeddings).unsqueeze(0)
    size = weight.shape[1]
    score = Dense(size, 1, bias=False, activation_function=None, init_weight=weight, module_output_name="scores")
    return [transformer, Pooling(size, "lasttoken"), score]


def _rows(foundation: Foundation) -> tuple[int, int]:
    return foundation.answers.true_id, foundation.answers.false_id


def _saved_rows(foundation: Foundation) -> list[torch.Tensor]:
    """Two rows of an untied LM head, read from the checkpoint: the host's base model leaves the LM head there.

    The rows of the input embeddings would start another function than ``LogitScore`` computes.
    """
    files = foundation.files
    index = files.read_json("model.safetensors.index.json") or {}
    places = {name: file for name, file in index.get("weight_map", {}).items() if name.endswith(LM_HEAD)}
    try:
        file = next(iter(places.values()), "model.safetensors")
        with safe_open(_local_path(files, file), framework="pt") as tensors:
            name = next(name for name in tensors.keys() if name.endswith(LM_HEAD))  # noqa: SIM118
            head = tensors.get_slice(name)
            return [head[row : row + 1][0] for row in _rows(foundation)]
    except (OSError, SafetensorError, StopIteration) as error:
        raise ConfigError(
            f"The LM head of {files.name!r}, whose rows start the dense head, can't be read: {first_line(error)} "
            f"Expected {LM_HEAD!r} in its safetensors files. Save the checkpoint as safetensors, or pass "
            f'head="logit_score".'
        ) from error


def _local_path(files: CheckpointFiles, filename: str) -> str:
    path = Path(files.name, filename)
    return str(path) if Path(files.name).is_dir() else hf_hub_download(files.name, filename, **files.hub)


def _transformer(foundation: Foundation, task: str) -> Transformer:
    files, options = foundation.files, foundation.options
    arguments = options.for_host([foundation.encoder])
    hub = {**files.hub, "trust_remote_code": options.host_kwargs.get("trust_remote_code", False)}
    processor_kwargs = dict(arguments["processor_kwargs"])
    if foundation.chat_template != own_template(foundation.encoder.processor):
        processor_kwargs["chat_template"] = foundation.chat_template
    if options.host_kwargs.get("max_length") is not None:
        processor_kwargs["model_max_length"] = options.host_kwargs["max_length"]
    kinds = {
        "model_kwargs": arguments["model_kwargs"],
        "processor_kwargs": processor_kwargs,
        "config_kwargs": options.host_kwargs.get("config_kwargs") or {},
    }
    return build(
        Transformer,
        files.name,
        transformer_task=task,
        processing_kwargs=_processing_kwargs(foundation),
        **{kind: {**hub, **given} for kind, given in kinds.items()},
    )


def _processing_kwargs(foundation: Foundation) -> dict[str, Any]:
    """What the host applies on every call and saves with the model."""
    processor = foundation.encoder.processor
    processing_kwargs: dict[str, Any] = {"chat_template": answer_arguments(processor, foundation.chat_template)}
    if foundation.encoder.image_arguments:
        processing_kwargs["image"] = dict(foundation.encoder.image_arguments)
    if _ends_in_special_token(_tokenizer(processor)):
        # transformers adds it to the rendered chat, too: behind the place where the answer begins
        processing_kwargs["text"] = {"add_special_tokens": False}
    return processing_kwargs


def _ends_in_special_token(tokenizer: Any) -> bool:
    with_special, without = (tokenizer.encode("page", add_special_tokens=special) for special in (True, False))
    return with_special[-1] != without[-1]


def _assembled(foundation: Foundation, modules: list[nn.Module], prompts: Mapping[str, str]) -> CrossEncoder:
    options, name = foundation.options, foundation.files.name
    consumed = {"model_kwargs", "processor_kwargs", "config_kwargs", "num_labels", "max_length"}
    host_kwargs = {key: value for key, value in options.host_kwargs.items() if key not in consumed}
    model = CrossEncoder(
        modules=modules,
        device=options.device,
        prompts=dict(prompts),
        **{"default_prompt_name": next(iter(DIRECTIONS)), "activation_fn": nn.Identity(), **host_kwargs},
    )
    if Path(name).is_dir():
        model.model_card_data.local_files_only = True
    model.model_card_data.set_base_model(name, revision=options.host_kwargs.get("revision"))
    return apply_pixel_limits(model, options.limits)
