"""Building a reranker from a language model that reads pages: one score for a query and a document together."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig

from mmtune.arguments import nearest_name, require_mapping
from mmtune.errors import ConfigError
from mmtune.models.chat import Answers, answer_arguments, find_answers, opens_answer, own_template, pair_template
from mmtune.models.checkpoints import CheckpointFiles, Encoder, first_line, read_encoders
from mmtune.models.loading import apply_limits, load_host_model
from mmtune.models.opening import LoadOptions, build, check_host_kwargs, check_limits, open_checkpoint
from mmtune.models.precision import score_in_float32

HEADS = ("logit_score", "dense")
DIRECTIONS = {
    "text_to_image": "Judge whether the page, which is the document, answers the query.",
    "image_to_text": "Judge whether the page, which is the query, answers the text, which is the document.",
}
"""What a pair is, from its query to its document, and the beginning of that direction's prompt."""

LM_HEAD = "lm_head.weight"


def build_reranker(
    name_or_path: str | Path,
    *,
    head: str = "logit_score",
    true_token: str = "1",
    false_token: str = "0",
    prompts: Mapping[str, str] | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    max_seconds: float | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    device: str | torch.device | None = None,
    **host_kwargs: Any,
) -> CrossEncoder:
    """A host reranker that scores pairs of texts and pages, in both directions.

    The language model is asked whether query and document belong together. The score is the log-odds of its answer,
    ``logit(true_token) - logit(false_token)`` where the answer begins; both heads start there. ``predict`` gives it as
    it is, since a sigmoid makes all large scores the same 1.0; ``activation_fn=torch.nn.Sigmoid()``, here or in
    ``predict``, gives probabilities. It is computed in float32 whatever the dtype of the weights: in bfloat16 many
    candidates tie. The plain host, which loads the saved model, computes it in the dtype of the weights.

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
        max_seconds: As in ``load_model``.
        fps: As in ``load_model``.
        max_frames: As in ``load_model``.
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
    options = LoadOptions(max_pixels, min_pixels, dtype, attention, device, host_kwargs, max_seconds, fps, max_frames)
    _check_arguments(head, options, prompts)
    files = open_checkpoint(name_or_path, options)
    if is_reranker(files):
        given = {"head": (head, "logit_score"), "true_token": (true_token, "1"), "false_token": (false_token, "0")}
        unused = [f"{name}={value!r}" for name, (value, default) in given.items() if value != default]
        return _load_ready(files, options, prompts, unused)

    # whatever can be checked without weights
    encoder = _read_language_model(files, options)
    answers = find_answers(_tokenizer(encoder), true_token, false_token, name=files.name)
    chat_template = pair_template(encoder.processor, files.name)
    if not opens_answer(encoder.processor, chat_template):
        warnings.warn(
            f"The chat template of {files.name!r} opens no answer (add_generation_prompt does nothing): the score is "
            f"read after the last message. Pass a template that opens one, unless this one always does.",
            UserWarning,
            stacklevel=2,
        )
    _check_directions(prompts or {})
    reply = f"Reply {answers.true_token} if so, else {answers.false_token}."
    all_prompts = {name: f"{beginning} {reply}" for name, beginning in DIRECTIONS.items()} | dict(prompts or {})
    default_prompt = host_kwargs.get("default_prompt_name", next(iter(DIRECTIONS)))
    if default_prompt is not None and default_prompt not in all_prompts:
        raise ConfigError(
            f"default_prompt_name={default_prompt!r} is no direction. Expected {' or '.join(map(repr, all_prompts))}. "
            f"Pass one of them, or None for a prompt only where it is named."
        )

    if head == "logit_score":
        transformer = _transformer("any-to-any", files, encoder, chat_template, options)
        modules = [transformer, LogitScore(answers.true_id, answers.false_id)]
    else:
        rows = None if _is_tied(encoder.config) else _saved_rows(files, answers)
        transformer = _transformer("feature-extraction", files, encoder, chat_template, options)
        modules = [transformer, *_dense_head(transformer, answers, rows)]
    consumed = {"model_kwargs", "processor_kwargs", "config_kwargs", "num_labels", "max_length", "default_prompt_name"}
    model = build(
        lambda _, **given: CrossEncoder(modules=modules, **given),
        files.name,
        device=options.device,
        prompts=all_prompts,
        default_prompt_name=default_prompt,
        **{
            "activation_fn": nn.Identity(),
            **{name: value for name, value in host_kwargs.items() if name not in consumed},
        },
    )
    score_in_float32(model)
    if Path(files.name).is_dir():
        model.model_card_data.local_files_only = True
    model.model_card_data.set_base_model(files.name, revision=host_kwargs.get("revision"))
    return apply_limits(model, options)


def is_reranker(files: CheckpointFiles) -> bool:
    """Whether a checkpoint is a ready reranker: the host's ``CrossEncoder``, or one for sequence classification."""
    return files.saved_type == "CrossEncoder" or files.classifies


def _check_arguments(head: str, options: LoadOptions, prompts: Mapping[str, str] | None) -> None:
    check_host_kwargs(CrossEncoder, options.host_kwargs)
    if head not in HEADS:
        raise ConfigError(f"head={head!r} is no head. Expected {' or '.join(map(repr, HEADS))}. Pass one of them.")
    if options.host_kwargs.get("num_labels") not in (None, 1):
        raise ConfigError(
            f"num_labels={options.host_kwargs['num_labels']!r} does not rank: a reranker gives one score per pair. "
            f"Leave num_labels out."
        )
    if prompts is not None:
        expected = f"a prompt by direction, {' or '.join(map(repr, DIRECTIONS))}; an empty one is no prompt"
        require_mapping("prompts", prompts, of=str, expected=expected)


def _check_directions(prompts: Mapping[str, str]) -> None:
    for name in prompts.keys() - DIRECTIONS.keys():
        raise ConfigError(
            f"prompts has {name!r}, which is no direction. Expected {' or '.join(map(repr, DIRECTIONS))}. The nearest "
            f"is {nearest_name(name, DIRECTIONS, cutoff=0)!r}: rename it."
        )


def _load_ready(
    files: CheckpointFiles, options: LoadOptions, prompts: Mapping[str, str] | None, unused: Sequence[str]
) -> CrossEncoder:
    scores = getattr(files.config(""), "num_labels", 1) if files.modules is None else 1
    if scores != 1:
        raise ConfigError(
            f"{files.name!r} gives {scores} scores per pair. Expected one, to rank by. Pass a reranker, or build "
            f"one on a language model."
        )
    if unused:
        message = f"{' and '.join(unused)} is not applied: the checkpoint is a ready reranker and keeps its head."
        warnings.warn(f"{message} Leave it out, or build on a language model.", UserWarning, stacklevel=3)
    if prompts:
        options = replace(options, host_kwargs={**options.host_kwargs, "prompts": dict(prompts)})
    model = load_host_model(CrossEncoder, files.name, options, modality="text")
    score_in_float32(model)
    if DIRECTIONS.keys() & model.prompts.keys():  # another model's prompts have names of their own
        _check_directions(prompts or {})
    return model


def _read_language_model(files: CheckpointFiles, options: LoadOptions) -> Encoder:
    """The one encoder of a checkpoint that reads texts and images together, has an LM head and keeps the options."""
    if options.host_kwargs.get("backend", "torch") != "torch":
        raise ConfigError(
            f"backend={options.host_kwargs['backend']!r} can't be built on: a new head is trained in torch. Leave "
            f"backend out, and export the trained model."
        )
    encoders = read_encoders(files, "text", model_class=CrossEncoder)
    encoder, config = encoders[0], encoders[0].config
    expected = "Expected a language model that reads images, such as Qwen3-VL, or a ready reranker. Pass one."
    if config is None or len(encoders) > 1 or (files.modules or [{"path": ""}])[0]["path"]:
        raise ConfigError(f"{files.name!r} is a Router, an adapter or another composition. {expected}")
    kind = f"{files.name!r} (model type {config.model_type})"
    with_head = _class_names(MODEL_FOR_MULTIMODAL_LM_MAPPING, config)
    if not with_head:
        raise ConfigError(f"{kind} has no LM head over texts and images, so it can't judge a pair. {expected}")
    if "image" not in (encoder.modalities or ()) or _tokenizer(encoder) is None:
        raise ConfigError(f"{kind} reads no texts and images together. {expected}")
    saved_as = set(config.architectures or ())
    if saved_as & (_class_names(MODEL_MAPPING, config) - with_head) and not _is_tied(config):
        raise ConfigError(
            f"{kind} was saved without its LM head ({', '.join(config.architectures or ())}), which is not tied to the "
            f"input embeddings, so nothing answers. Pass the checkpoint that it was trained from."
        )
    check_limits(encoders, options.limits)
    return encoder


def _class_names(mapping: Any, config: PreTrainedConfig) -> set[str]:
    classes = mapping.get(type(config), ())
    return {model_class.__name__ for model_class in (classes if isinstance(classes, tuple) else (classes,))}


def _is_tied(config: PreTrainedConfig | None) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _tokenizer(encoder: Encoder) -> Any:
    return getattr(encoder.processor, "tokenizer", None)


def _transformer(
    task: str, files: CheckpointFiles, encoder: Encoder, chat_template: str, options: LoadOptions
) -> Transformer:
    arguments = options.for_host([encoder])
    processor_kwargs = dict(arguments["processor_kwargs"])
    if chat_template != own_template(encoder.processor):
        processor_kwargs["chat_template"] = chat_template
    if options.host_kwargs.get("max_length") is not None:
        processor_kwargs["model_max_length"] = options.host_kwargs["max_length"]

    # what the host applies on every call and saves with the model
    processing_kwargs: dict[str, Any] = {"chat_template": answer_arguments(encoder.processor, chat_template)}
    if encoder.image_arguments:
        processing_kwargs["image"] = dict(encoder.image_arguments)
    ids, ids_alone = (_tokenizer(encoder).encode("page", add_special_tokens=special) for special in (True, False))
    if ids[-1] != ids_alone[-1]:
        # transformers adds the special token to the rendered chat, too: behind the place where the answer begins
        processing_kwargs["text"] = {"add_special_tokens": False}

    hub = {**files.hub, "trust_remote_code": options.host_kwargs.get("trust_remote_code", False)}
    return build(
        Transformer,
        files.name,
        transformer_task=task,
        processing_kwargs=processing_kwargs,
        model_kwargs={**hub, **arguments["model_kwargs"]},
        processor_kwargs={**hub, **processor_kwargs},
        config_kwargs={**hub, **(options.host_kwargs.get("config_kwargs") or {})},
    )


def _dense_head(transformer: Transformer, answers: Answers, rows: Sequence[torch.Tensor] | None) -> list[nn.Module]:
    """The last token's features, and the difference of two rows of the LM head in its place."""
    embeddings: torch.Tensor = transformer.model.get_input_embeddings().get_parameter("weight")
    true_row, false_row = rows or [embeddings[row] for row in (answers.true_id, answers.false_id)]
    weight = (true_row - false_row).detach().to(embeddings).unsqueeze(0)
    size = weight.shape[1]
    score = Dense(size, 1, bias=False, activation_function=None, init_weight=weight, module_output_name="scores")
    return [Pooling(size, "lasttoken"), score]


def _saved_rows(files: CheckpointFiles, answers: Answers) -> list[torch.Tensor]:
    """Two rows of an untied LM head, read from the checkpoint: the host's base model leaves the LM head there.

    The rows of the input embeddings would start another function than ``LogitScore`` computes.
    """
    failure: Exception | None = None
    try:
        for path in files.weight_files():
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    if name.endswith(LM_HEAD):
                        head = tensors.get_slice(name)
                        return [head[row : row + 1][0] for row in (answers.true_id, answers.false_id)]
    except (OSError, SafetensorError) as error:
        failure = error
    reason = first_line(failure) if failure else "It is in none of its files."
    raise ConfigError(
        f"The LM head of {files.name!r}, whose rows start the dense head, can't be read: {reason} Expected {LM_HEAD!r} "
        f"in its safetensors files. Save the checkpoint as safetensors, or pass head='logit_score'."
    ) from failure
