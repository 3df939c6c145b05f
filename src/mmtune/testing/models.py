"""Checkpoints with random weights, small enough to be built and loaded in a test.

Each has the real configuration class, processor and file layout of its family, no dropout, and a tokenizer built in
memory that spells any text in any language. They load in plain ``SentenceTransformer(path)``.

Example:
    >>> with TemporaryDirectory() as folder:
    ...     SentenceTransformer(tiny_clip(folder), device="cpu").encode("revenue in 2021").shape
    (128,)
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BertConfig,
    BertModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VideoMAEConfig,
    VideoMAEModel,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmtune.errors import MissingExtraError
from mmtune.models.checkpoints import how_to_install
from mmtune.models.fresh import seeded
from mmtune.testing import words

Model = TypeVar("Model", bound=PreTrainedModel)

HEAD_SIZE = 32
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == "image" -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == "video" -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif item.type == "text" -%}
{{ item.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


LLAVA_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message.role | upper }}: {% for item in message.content -%}
{%- if item.type == "image" -%}<image>{%- elif item.type == "text" -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT: {%- endif -%}
"""


def tiny_clip(
    folder: str | Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    projection_dim: int = 128,
    image_size: int = 64,
    patch_size: int = 16,
    seed: int = 0,
) -> str:
    """Save a random CLIP for text and images and return its path.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width of the text and the image encoder, a multiple of 32.
        num_layers: Depth of each of the two encoders.
        projection_dim: Dimension of the embeddings.
        image_size: Height and width in pixels to which an image is resized.
        patch_size: Height and width of a patch in pixels; divides ``image_size``.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    tokenizer = _tokenizer(max_length=64, bos="<s>", eos="</s>")
    text = _encoder(hidden_size, num_layers) | _text(tokenizer) | {"projection_dim": projection_dim}
    vision = _encoder(hidden_size, num_layers) | {"image_size": image_size, "patch_size": patch_size}
    vision["projection_dim"] = projection_dim
    square = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessorPil(size=square, crop_size=square)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)
    return _save(folder, _draw(CLIPModel, config, seed), CLIPProcessor(image_processor, tokenizer))


def tiny_siglip(
    folder: str | Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    image_size: int = 64,
    patch_size: int = 16,
    seed: int = 0,
) -> str:
    """Save a random SigLIP for text and images, which pads texts to one length, and return its path.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width of both encoders, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of each of the two encoders.
        image_size: Height and width in pixels to which an image is resized.
        patch_size: Height and width of a patch in pixels; divides ``image_size``.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    tokenizer = _tokenizer(max_length=64, eos="</s>")
    text = _encoder(hidden_size, num_layers) | _text(tokenizer)
    vision = _encoder(hidden_size, num_layers) | {"image_size": image_size, "patch_size": patch_size}
    image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    model = _draw(SiglipModel, SiglipConfig(text_config=text, vision_config=vision), seed)
    with TemporaryDirectory() as plain_folder:
        _save(plain_folder, model, SiglipProcessor(image_processor, tokenizer))
        # SigLIP pools the last token, padding or not: without a fixed length a text's embedding depends on its batch.
        # With a mask, the host's cached losses would cut the padding off each mini-batch (sentence-transformers 6.2).
        text = {"padding": "max_length", "return_attention_mask": False}
        module = Transformer(plain_folder, processing_kwargs={"text": text})
        SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def tiny_text_encoder(folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, seed: int = 0) -> str:
    """Save a random BERT, which the host pools by the mean of its tokens, and return its path.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of the encoder.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    tokenizer = _tokenizer(max_length=128, bos="<s>", eos="</s>")
    config = BertConfig.from_dict(_encoder(hidden_size, num_layers) | _text(tokenizer) | _NO_DROPOUT)
    return _save(folder, _draw(BertModel, config, seed), tokenizer)


def tiny_clap(
    folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, projection_dim: int = 64, seed: int = 0
) -> str:
    """Save a random CLAP for text and sounds of a second at 16 kHz and return its path.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width of the text encoder, a multiple of 32; that of sounds has half of it.
        num_layers: Depth of the text encoder.
        projection_dim: Dimension of the embeddings.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    tokenizer = _tokenizer(max_length=64, bos="<s>", eos="</s>")
    text = _encoder(hidden_size, num_layers) | _text(tokenizer) | _NO_DROPOUT | {"projection_dim": projection_dim}
    text["max_position_embeddings"] = tokenizer.model_max_length + 2  # positions begin after that of the padding
    audio = {
        "spec_size": 64,
        "num_mel_bins": 32,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": hidden_size // 4,
        "depths": [2, 2],
        "num_attention_heads": [2, 2],
        "hidden_size": hidden_size // 2,
        "projection_dim": projection_dim,
        "drop_path_rate": 0.0,
        **_NO_DROPOUT,
    }
    extractor = ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=16_000,
        hop_length=160,
        fft_window_size=512,
        max_length_s=1,
        frequency_max=8_000,
        truncation="rand_trunc",
    )
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=projection_dim)
    return _save(folder, _draw(ClapModel, config, seed), ClapProcessor(extractor, tokenizer))


def tiny_ast(folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, seed: int = 0) -> str:
    """Save a random AST, an encoder of sounds of a second at 16 kHz, and return its path.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of the encoder.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    sizes = {"num_mel_bins": 32, "max_length": 104}
    strides = {"patch_size": 16, "time_stride": 8, "frequency_stride": 8}
    config = ASTConfig.from_dict(_encoder(hidden_size, num_layers) | sizes | strides | _NO_DROPOUT)
    return _save(folder, _draw(ASTModel, config, seed), ASTFeatureExtractor(**sizes))


def tiny_whisper(folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, seed: int = 0) -> str:
    """Save the encoder of a random Whisper, for sounds of a second, and return its path.

    The host can't load that of a whole Whisper (sentence-transformers 6.2): its weights have other names.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of the encoder.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    heads = hidden_size // HEAD_SIZE
    config = WhisperConfig(
        num_mel_bins=32,
        max_source_positions=50,
        d_model=hidden_size,
        encoder_layers=num_layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=2 * hidden_size,
        decoder_layers=1,
        decoder_attention_heads=heads,
        decoder_ffn_dim=hidden_size,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _save(folder, _draw(WhisperEncoder, config, seed), WhisperFeatureExtractor(feature_size=32, chunk_length=1))


def tiny_videomae(folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, seed: int = 0) -> str:
    """Save a random VideoMAE, an encoder of clips of 8 frames, and return its path.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of the encoder.
        seed: Seed of the weights. The caller's random state is left as it was.

    Raises:
        MissingExtraError: torchvision, which its processor needs, is not installed.
    """
    _require_torchvision("tiny_videomae")
    # this class is a stub that raises where torchvision is missing
    from transformers import VideoMAEVideoProcessor

    processor = VideoMAEVideoProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    sizes = {"image_size": 64, "patch_size": 16, "num_frames": 8, "tubelet_size": 2}
    config = VideoMAEConfig.from_dict(_encoder(hidden_size, num_layers) | sizes | _NO_DROPOUT)
    return _save(folder, _draw(VideoMAEModel, config, seed), processor)


def tiny_qwen3_vl(
    folder: str | Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_pixels: int = 128 * 128,
    seed: int = 0,
) -> str:
    """Save a random Qwen3-VL with a chat template that takes any role and return its path.

    Loads in ``SentenceTransformer(path)`` for text, images, clips and ``{"text", "image"}`` pairs, and as the
    ``any-to-any`` module of a reranker: ``0`` and ``1`` are tokens, and the template takes the roles ``query`` and
    ``document``.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width of both encoders, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of each of the two encoders.
        max_pixels: Largest area of an image in pixels; every 32 by 32 pixels become one token. Of a clip twice that is
            the largest area of all frames together.
        seed: Seed of the weights. The caller's random state is left as it was.

    Raises:
        MissingExtraError: torchvision, which the processor of this family needs, is not installed.
    """
    _require_torchvision("tiny_qwen3_vl")
    # this class is a stub that raises where torchvision is missing
    from transformers import Qwen3VLVideoProcessor

    tokenizer = _tokenizer(max_length=2048, eos="<|im_end|>", special=QWEN_TOKENS, append=False)
    image_processor = Qwen2VLImageProcessorPil(patch_size=16, size=_area(max_pixels))
    # an area over all frames: eight of 64 by 64 pixels
    video_processor = Qwen3VLVideoProcessor(patch_size=16, size=_area(2 * max_pixels))
    config = _qwen3_vl_config(tokenizer, hidden_size, num_layers)
    model = _draw(Qwen3VLForConditionalGeneration, config, seed)
    processor = Qwen3VLProcessor(image_processor, tokenizer, video_processor, chat_template=QWEN_CHAT_TEMPLATE)
    return _save(folder, model, processor)


def tiny_llava(
    folder: str | Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    image_size: int = 64,
    patch_size: int = 16,
    padding_side: str = "left",
    chat_template: str | None = LLAVA_CHAT_TEMPLATE,
    seed: int = 0,
) -> str:
    """Save a random LLaVA, a VLM whose processor needs no torchvision, and return its path.

    Loads in ``SentenceTransformer(path)`` for text, images and ``{"text", "image"}`` pairs, and as the ``any-to-any``
    module of a reranker, as ``tiny_qwen3_vl`` does.

    Args:
        folder: Where the checkpoint goes; made if it does not exist.
        hidden_size: Width of both encoders, a multiple of 32, and dimension of the embeddings.
        num_layers: Depth of each of the two encoders.
        image_size: Height and width in pixels to which an image is resized.
        patch_size: Height and width of a patch in pixels, which is one token; divides ``image_size``.
        padding_side: Where the tokenizer pads, ``"left"`` or ``"right"``.
        chat_template: How messages become a text; ``None`` saves none.
        seed: Seed of the weights. The caller's random state is left as it was.
    """
    tokenizer = _tokenizer(max_length=512, eos="</s>", bos="<s>", special=("<image>",), append=False)
    tokenizer.padding_side = padding_side
    encoder = _encoder(hidden_size, num_layers)
    text = {"model_type": "llama", **encoder, **_text(tokenizer), "num_key_value_heads": 1}
    vision = {"model_type": "clip_vision_model", **encoder, "image_size": image_size, "patch_size": patch_size}
    image_token = tokenizer.get_vocab()["<image>"]
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_token)
    model = _draw(LlavaForConditionalGeneration, config, seed)
    square = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    return _save(folder, model, processor)


def _require_torchvision(name: str) -> None:
    if find_spec("torchvision") is None:
        raise MissingExtraError(
            f"{name} needs torchvision, which is not installed: its video processor imports it. "
            f"{how_to_install('torchvision')}. Or test with tiny_clip, which needs Pillow only."
        )


def _qwen3_vl_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> Qwen3VLConfig:
    num_heads = hidden_size // HEAD_SIZE
    text = _encoder(hidden_size, num_layers) | _text(tokenizer) | {"num_key_value_heads": 1, "head_dim": HEAD_SIZE}
    # the three sections (time, height, width) share the rotary half of a head
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [8, 4, 4],
        "mrope_interleaved": True,
    }
    vision = {
        "depth": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_heads": num_heads,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    start, end, image, video = (tokenizer.get_vocab()[token] for token in QWEN_TOKENS[2:])
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )


def _area(max_pixels: int) -> dict[str, int]:
    # the names are the family's own: both values are areas in pixels
    return {"shortest_edge": 32 * 32, "longest_edge": max_pixels}


def _encoder(hidden_size: int, num_layers: int) -> dict[str, object]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
    }


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _tokenizer(
    *, max_length: int, eos: str, bos: str | None = None, special: tuple[str, ...] = (), append: bool = True
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE in lower case, to which the words of the generated pages are one token each."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # the end must not get id 2: CLIP takes that for an old configuration and pools the largest id instead of the end
    named = ["<pad>", *dict.fromkeys(token for token in (eos, bos, *special) if token)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=named,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words.sentences(), trainer)
    if append:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}" if bos else f"$A {eos}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=list(special),
    )


def _draw(model_class: Callable[..., Model], config: PreTrainedConfig, seed: int) -> Model:
    """A model with random weights, on the CPU."""
    with seeded(seed), torch.device("cpu"):
        return model_class(config)


def _save(folder: str | Path, model: PreTrainedModel, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
