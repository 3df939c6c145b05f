"""Checkpoints of further families with random weights: what the files of a fresh model on the Hub look like.

None of them has a ``modules.json``.
"""

from functools import partial
from pathlib import Path

from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessorPil,
    GitConfig,
    GitModel,
    GitProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    ModernVBertConfig,
    ModernVBertModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessorPil,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VJEPA2Config,
    VJEPA2Model,
    WhisperFeatureExtractor,
)

from mmtune import testing
from mmtune.testing.models import LLAVA_CHAT_TEMPLATE as CHAT_TEMPLATE
from mmtune.testing.models import _draw, _encoder, _save, _text, _tokenizer

SIZE = 64
"""Width of every encoder."""
IMAGE_SIZE = 32
"""Height and width of an image in pixels, in 4 patches."""
PATCH_SIZE = 16
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
VISION = {**_encoder(SIZE, 2), "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}


def _vlm_tokenizer(padding_side: str, special: tuple[str, ...] = ("<image>",)) -> PreTrainedTokenizerFast:
    tokenizer = _tokenizer(max_length=512, eos="</s>", bos="<s>", special=special, append=False)
    tokenizer.padding_side = padding_side
    return tokenizer


def _causal(tokenizer: PreTrainedTokenizerFast, model_type: str = "llama") -> dict[str, object]:
    return {"model_type": model_type, **_encoder(SIZE, 2), **_text(tokenizer), "num_key_value_heads": 1}


tiny_llava = partial(testing.tiny_llava, image_size=IMAGE_SIZE)


def _idefics3_processor(padding_side: str) -> tuple[Idefics3Processor, PreTrainedTokenizerFast]:
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tokenizer = _vlm_tokenizer(padding_side, special)
    edge = {"longest_edge": IMAGE_SIZE}
    image_processor = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=1, chat_template=CHAT_TEMPLATE), tokenizer


def tiny_idefics3(folder: Path, *, padding_side: str = "left") -> str:
    processor, tokenizer = _idefics3_processor(padding_side)
    config = Idefics3Config(
        text_config=_causal(tokenizer),
        vision_config={"model_type": "idefics3_vision", **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = _draw(Idefics3ForConditionalGeneration, config, 0)
    return _save(folder, model, processor)


def tiny_modernvbert(folder: Path) -> str:
    """A VLM whose text encoder looks both ways."""
    processor, tokenizer = _idefics3_processor("right")
    text = {**_encoder(SIZE, 2), **_text(tokenizer), "cls_token_id": 0, "sep_token_id": 0}
    config = ModernVBertConfig(
        text_config={"model_type": "modernbert", **text},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pixel_shuffle_factor=2,
    )
    model = _draw(ModernVBertModel, config, 0)
    return _save(folder, model, processor)


def tiny_paligemma(folder: Path) -> str:
    """A family that takes text and image together only."""
    tokenizer = _vlm_tokenizer("left")
    image_processor = SiglipImageProcessorPil(size=SQUARE)
    image_processor.image_seq_length = (IMAGE_SIZE // PATCH_SIZE) ** 2
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    text = _causal(tokenizer, "gemma") | {"head_dim": 32, "vocab_size": len(tokenizer)}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "projection_dim": SIZE, **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=SIZE,
        hidden_size=SIZE,
    )
    model = _draw(PaliGemmaForConditionalGeneration, config, 0)
    return _save(folder, model, processor)


def tiny_git(folder: Path) -> str:
    """A family that takes text alone, and images only with text."""
    tokenizer = _tokenizer(max_length=64, bos="<s>", eos="</s>")
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = _draw(GitModel, GitConfig(**_encoder(SIZE, 2), **_text(tokenizer), **no_dropout, vision_config=VISION), 0)
    return _save(folder, model, GitProcessor(CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tokenizer))


def tiny_chinese_clip(folder: Path) -> str:
    """A dual encoder whose text side is a BERT: it looks both ways, heeds its mask and pools the first token."""
    tokenizer = _tokenizer(max_length=64, bos="<s>", eos="</s>")
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ChineseCLIPConfig(
        text_config=_encoder(SIZE, 2) | _text(tokenizer) | no_dropout, vision_config=VISION, projection_dim=SIZE
    )
    model = _draw(ChineseCLIPModel, config, 0)
    image_processor = ChineseCLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    return _save(folder, model, ChineseCLIPProcessor(image_processor, tokenizer))


def tiny_raw_siglip(folder: Path, *, model_max_length: int | None = None) -> str:
    """SigLIP as it lies on the Hub: nothing says that its texts must be padded."""
    tokenizer = _tokenizer(max_length=64, eos="</s>")
    text = _encoder(SIZE, 2) | _text(tokenizer)
    model = _draw(SiglipModel, SiglipConfig(text_config=text, vision_config=VISION), 0)
    tokenizer.model_max_length = model_max_length or tokenizer.model_max_length
    return _save(folder, model, SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer))


def tiny_siglip2_naflex(folder: Path) -> str:
    """SigLIP 2 with images of any aspect, counted in patches."""
    tokenizer = _tokenizer(max_length=64, eos="<eos>", bos="<bos>", special=("<unk>", "<mask>"))
    text = _encoder(SIZE, 2) | _text(tokenizer)
    vision = {**_encoder(SIZE, 2), "patch_size": PATCH_SIZE, "num_patches": 16}
    model = _draw(Siglip2Model, Siglip2Config(text_config=text, vision_config=vision), 0)
    image_processor = Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=16)
    return _save(folder, model, Siglip2Processor(image_processor, tokenizer))


def tiny_vjepa2(folder: Path) -> str:
    """An encoder of clips that takes any number of frames, and a predictor that nobody reads."""
    from transformers import VJEPA2VideoProcessor  # needs torchvision

    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0}
    predictor = {"pred_hidden_size": SIZE, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    config = VJEPA2Config(crop_size=IMAGE_SIZE, patch_size=PATCH_SIZE, frames_per_clip=8, **sizes, **predictor)
    processor = VJEPA2VideoProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)
    return _save(folder, _draw(VJEPA2Model, config, 0), processor)


OMNI_TOKENS = {
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}
OMNI_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}{%- else -%}
{%- for item in message.content -%}
{%- if item.type == "audio" -%}<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif item.type == "image" -%}<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif item.type == "video" -%}<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif item.type == "text" -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
LISTENING = {
    "d_model": SIZE,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 2 * SIZE,
    "num_mel_bins": 32,
    "max_source_positions": 50,
}
"""An encoder of sounds of a second."""


def _listening_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<|im_start|>", "<|im_end|>", *OMNI_TOKENS.values())
    tokenizer = _tokenizer(max_length=1024, eos="<|im_end|>", special=special, append=False)
    tokenizer.padding_side = "left"
    # the processor asks the tokenizer for these, by name
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=1024,
        padding_side="left",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=OMNI_TOKENS,
    )


def tiny_qwen2_audio(folder: Path) -> str:
    """A language model that reads texts and sounds."""
    tokenizer = _listening_tokenizer()
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **LISTENING},
        text_config=_causal(tokenizer, "qwen2"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=32, chunk_length=1), tokenizer, chat_template=OMNI_CHAT_TEMPLATE
    )
    return _save(folder, _draw(Qwen2AudioForConditionalGeneration, config, 0), processor)


def tiny_omni(folder: Path) -> str:
    """The Thinker of a Qwen2.5-Omni: a language model that reads texts, images, sounds and clips."""
    from transformers import Qwen2_5OmniProcessor, Qwen2VLVideoProcessor  # need torchvision

    tokenizer = _listening_tokenizer()
    index = {name: tokenizer.convert_tokens_to_ids(token) for name, token in OMNI_TOKENS.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    vision = {"depth": 2, "hidden_size": SIZE, "intermediate_size": SIZE, "num_heads": 2, "out_hidden_size": SIZE}
    config = Qwen2_5OmniThinkerConfig(
        audio_config={**LISTENING, "output_dim": SIZE, "n_window": 25},
        text_config={**_causal(tokenizer, "qwen2_5_omni_text"), "rope_parameters": rope},
        vision_config={**vision, "patch_size": PATCH_SIZE, "fullatt_block_indexes": [1]},
        audio_token_index=index["audio_token"],
        image_token_index=index["image_token"],
        video_token_index=index["video_token"],
        audio_start_token_id=index["audio_bos_token"],
        audio_end_token_id=index["audio_eos_token"],
        vision_start_token_id=index["vision_bos_token"],
        vision_end_token_id=index["vision_eos_token"],
    )
    area = {"shortest_edge": 32 * 32, "longest_edge": 8 * 64 * 64}
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessorPil(patch_size=PATCH_SIZE, size=area),
        Qwen2VLVideoProcessor(patch_size=PATCH_SIZE, size=area),
        WhisperFeatureExtractor(feature_size=32, chunk_length=1),
        tokenizer,
        chat_template=OMNI_CHAT_TEMPLATE,
    )
    return _save(folder, _draw(Qwen2_5OmniThinkerForConditionalGeneration, config, 0), processor)
