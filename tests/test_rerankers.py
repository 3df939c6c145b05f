"""build_reranker: both heads, prompts and roles that reach the model, and what is refused before reading weights."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import Tokenizer, processors
from transformers import AutoProcessor, BertForSequenceClassification, LlavaForConditionalGeneration

from comparing import without_weights
from families import tiny_llava, tiny_paligemma
from mmtune.errors import ConfigError
from mmtune.models import load_model
from mmtune.models.chat import find_answers, pair_template, role_failure
from mmtune.models.fresh import seeded
from mmtune.models.precision import scoring_in_float32
from mmtune.models.rerankers import HEADS, build_reranker

SIZES = [(64, 64), (96, 64), (128, 128), (300, 500)]
PAGES = [Image.new("RGB", size, color) for size, color in zip(SIZES, ["red", "blue", "green", "white"], strict=True)]
TEXTS = [{"text": "total revenue of 2021"}, {"text": "how profits of the paper division developed over years " * 3}]
TEXT_TO_IMAGE = [(text, page) for text in TEXTS for page in PAGES]
IMAGE_TO_TEXT = [(page, text) for text, page in TEXT_TO_IMAGE]

CONTENT = """\
{% if message.content is string -%}{{ message.content }}{%- else -%}
{%- for item in message.content -%}
{%- if item.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif "text" in item -%}{{ item.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}"""
ANSWER = "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
SYSTEM_REFUSED = """\
{%- if messages[0].role == "system" -%}{{ raise_exception("System role not supported") }}{%- endif -%}
"""
# which roles the template of a chat model takes, and what it does with the others
DROPPING = (
    """\
{%- if messages[0].role == "system" -%}<|im_start|>system
{% for item in messages[0].content %}{{ item.text }}{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role in ["user", "assistant"] -%}
<|im_start|>{{ message.role }}
"""
    + CONTENT
    + """<|im_end|>
{% endif -%}
{%- endfor -%}
"""
    + ANSWER
)
RAISING = (
    """\
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant"] -%}
{{ raise_exception("Unexpected message role.") }}
{%- endif -%}
<|im_start|>{{ message.role }}
"""
    + CONTENT
    + """<|im_end|>
{% endfor -%}
"""
    + ANSWER
)
ALIKE = (
    """\
{%- for message in messages -%}
<|im_start|>{{ "assistant" if message.role == "assistant" else "user" }}
"""
    + CONTENT
    + "<|im_end|>\n{% endfor -%}"
    + ANSWER
)
TEXTS_ONLY = (
    """\
{%- for message in messages -%}
{{ message.role }}: {% for item in message.content %}{{ item.text }}{% endfor %}
{% endfor -%}"""
    + ANSWER
)
ONE_PART = (
    """\
{%- for message in messages -%}
{%- if message.role != "query" or messages[-1].content[0].type == "text" -%}
{{ message.role }}: """
    + CONTENT
    + "\n{%- endif -%}{% endfor -%}"
    + ANSWER
)
STRINGS_ONLY = "{%- for message in messages -%}{{ message.role }}: {{ message.content }}\n{% endfor -%}" + ANSWER


def with_template(checkpoint: str, folder: Path, template: str) -> str:
    """A copy with another chat template."""
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def many_pairs() -> list[tuple]:
    sizes = [(64 + 8 * k, 64) for k in range(16)]
    pages = [Image.new("RGB", size, (15 * k, 250 - 15 * k, 100)) for k, size in enumerate(sizes)]
    return [(f"revenue of 20{k:02}", page) for k in range(3) for page in pages]


def rendered(model: CrossEncoder, pair: tuple, **prompt: str) -> str:
    """What a pair looks like to the model, as text, with each page as one placeholder."""
    text = model.tokenizer.decode(model.preprocess([pair], **prompt)["input_ids"][0])
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.fixture(scope="module", params=HEADS)
def reranker(request, qwen3_vl_path: str) -> CrossEncoder:
    return build_reranker(qwen3_vl_path, head=request.param, device="cpu")


@pytest.fixture(scope="module")
def llava_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its LM head is not tied to the input embeddings."""
    return tiny_llava(tmp_path_factory.mktemp("models") / "llava")


# the score


@pytest.mark.parametrize("fixture", ["qwen3_vl_path", "llava_path"])
def test_both_heads_start_at_the_same_scores(fixture, request):
    path = request.getfixturevalue(fixture)
    log_odds, dense = (build_reranker(path, head=head, device="cpu") for head in HEADS)
    for pairs, direction in ((TEXT_TO_IMAGE, "text_to_image"), (IMAGE_TO_TEXT, "image_to_text")):
        scores = log_odds.predict(pairs, prompt_name=direction)
        assert np.ptp(scores) > 1e-3
        assert dense.predict(pairs, prompt_name=direction) == pytest.approx(scores, abs=1e-5)


def test_the_score_is_the_log_odds_of_the_two_tokens(qwen3_vl_path):
    model = build_reranker(qwen3_vl_path, device="cpu")
    features = model.preprocess(TEXT_TO_IMAGE[:1], prompt=model.prompts["text_to_image"])
    with torch.inference_mode():
        logits = model[0](features)["causal_logits"][0, -1]
    one, zero = model.tokenizer.convert_tokens_to_ids(["1", "0"])
    assert model.predict(TEXT_TO_IMAGE[:1])[0] == pytest.approx(float(logits[one] - logits[zero]), abs=1e-6)


def test_other_tokens_give_other_scores(qwen3_vl_path):
    ours = build_reranker(qwen3_vl_path, true_token="0", false_token="1", device="cpu")
    swapped = build_reranker(qwen3_vl_path, device="cpu", prompts=ours.prompts)
    assert ours.predict(TEXT_TO_IMAGE) == pytest.approx(-swapped.predict(TEXT_TO_IMAGE), abs=1e-6)
    assert "Reply 0 if so, else 1." in ours.prompts["text_to_image"]


def test_scores_do_not_depend_on_the_batch(reranker):
    for pairs, direction in ((TEXT_TO_IMAGE, "text_to_image"), (IMAGE_TO_TEXT, "image_to_text")):
        together = reranker.predict(pairs, prompt_name=direction)
        alone = [reranker.predict(pair, prompt_name=direction) for pair in pairs]
        assert together == pytest.approx(np.array(alone), abs=1e-5)


def test_scores_are_the_same_after_reloading_in_the_plain_host(reranker, tmp_path):
    reranker.save_pretrained(str(tmp_path))
    reloaded = CrossEncoder(str(tmp_path), device="cpu")
    assert reloaded.predict(TEXT_TO_IMAGE) == pytest.approx(reranker.predict(TEXT_TO_IMAGE), abs=1e-5)
    assert reloaded.prompts == reranker.prompts
    assert isinstance(reloaded.activation_fn, torch.nn.Identity)
    assert reloaded.num_labels == 1


def test_each_half_of_a_pair_reaches_the_score(reranker):
    scores = reranker.predict(TEXT_TO_IMAGE).reshape(len(TEXTS), len(PAGES))
    assert (abs(np.diff(scores, axis=0)) > 1e-5).all()
    assert (abs(np.diff(scores, axis=1)) > 1e-5).all()


def test_a_sigmoid_is_by_request(qwen3_vl_path):
    scores = build_reranker(qwen3_vl_path, device="cpu").predict(TEXT_TO_IMAGE)
    model = build_reranker(qwen3_vl_path, activation_fn=torch.nn.Sigmoid(), device="cpu")
    assert model.predict(TEXT_TO_IMAGE) == pytest.approx(1 / (1 + np.exp(-scores)), abs=1e-6)


def test_trains_with_a_host_loss(reranker):
    loss = BinaryCrossEntropyLoss(reranker)
    columns = [list(column) for column in zip(*TEXT_TO_IMAGE, strict=True)]
    value = loss(columns, torch.tensor([1, 0] * 4), prompt=reranker.prompts["text_to_image"])
    scores = torch.tensor(reranker.predict(TEXT_TO_IMAGE))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([1.0, 0.0] * 4))
    assert float(value.detach()) == pytest.approx(float(expected), abs=1e-5)
    value.backward()
    assert all(parameter.grad is not None for parameter in reranker[-1].parameters())
    reranker.zero_grad()


def test_a_text_that_looks_like_an_image_file_is_a_text(reranker, tmp_path):
    file = tmp_path / "page.png"
    PAGES[0].save(file)
    assert str(file) in rendered(reranker, ({"text": str(file)}, PAGES[1]))


# prompts


def test_each_direction_has_its_prompt_and_saying_nothing_is_text_to_image(reranker):
    prompts = reranker.prompts
    assert set(prompts) == {"text_to_image", "image_to_text"}
    assert all("Reply 1 if so, else 0." in prompt for prompt in prompts.values())
    plain, named, other = (
        reranker.predict(TEXT_TO_IMAGE, **name)
        for name in ({}, {"prompt_name": "text_to_image"}, {"prompt_name": "image_to_text"})
    )
    assert plain == pytest.approx(named, abs=1e-6)
    assert abs(plain - other).min() > 1e-6


def test_the_prompt_is_a_system_message_and_the_answer_begins_at_the_end(reranker):
    text = rendered(reranker, (TEXTS[0], PAGES[0]), prompt="total revenue")
    system, query, document, answer = (part.strip() for part in text.split("<|im_end|>"))
    assert system == "<|im_start|> system\ntotal revenue"
    assert query == "<|im_start|> query\ntotal revenue of 2021"
    assert document == "<|im_start|> document\n<|vision_start|><|image_pad|><|vision_end|>"
    assert answer == "<|im_start|> assistant"


def test_prompts_of_ones_own_replace_the_defaults(qwen3_vl_path):
    model = build_reranker(qwen3_vl_path, prompts={"image_to_text": "Same?"}, device="cpu")
    assert model.prompts["image_to_text"] == "Same?"
    assert "Reply 1" in model.prompts["text_to_image"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"text_to_imgae": "Same?"}, r"prompts has 'text_to_imgae', which is no direction.*'text_to_image': rename it"),
        ({"text_to_image": 1}, r"prompts=.'text_to_image': 1. is no mapping of texts"),
        ("Same?", r"prompts='Same\?' is no mapping"),
    ],
)
def test_prompts_that_are_none_are_refused(prompts, message, qwen3_vl_path, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build_reranker(without_weights(qwen3_vl_path, tmp_path / "model"), prompts=prompts)


# tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"true_token": "relevant"}, r"true_token='relevant' is \d+ tokens \(.*'1', false_token='0'"),
        ({"false_token": ""}, r"false_token='' is no token"),
        ({"true_token": 1}, r"true_token=1 is no token"),
        ({"true_token": "0"}, r"'0' and false_token='0' are the same token"),
    ],
)
def test_tokens_that_are_not_one_id_are_refused_before_reading_weights(tokens, message, qwen3_vl_path, tmp_path):
    path = without_weights(qwen3_vl_path, tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        build_reranker(path, **tokens)


def test_an_unknown_token_is_refused_and_others_are_suggested():
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "yes": 1, "no": 2, "page": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer.convert_tokens_to_ids("1") == tokenizer.unk_token_id
    with pytest.raises(ConfigError, match=r"true_token='1' is not in the vocabulary.*true_token='yes', false_to") as e:
        find_answers(tokenizer, "1", "0", "words")
    assert "'1', false" not in str(e.value)
    assert find_answers(tokenizer, "yes", "no", "words").false_id == 2


# roles


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (DROPPING, "it leaves out the query and the document and the page as the document and the page as the query"),
        (RAISING, "it fails with TemplateError: Unexpected message role"),
        (ALIKE, "it renders a query and a document alike"),
        (TEXTS_ONLY, "it leaves out the page as the document and the page as the query"),
        (ONE_PART, "it leaves out the query of a page"),
        (STRINGS_ONLY, "it renders texts alone, not parts of texts and images"),
    ],
)
def test_why_a_template_carries_no_pair(template, reason, qwen3_vl_path):
    assert role_failure(AutoProcessor.from_pretrained(qwen3_vl_path), template) == reason


@pytest.mark.parametrize("template", [DROPPING, RAISING, ALIKE], ids=["dropping", "raising", "alike"])
def test_a_template_without_roles_gets_lines_that_keep_them(template, qwen3_vl_path, tmp_path, caplog):
    path = with_template(qwen3_vl_path, tmp_path / "model", template)
    with caplog.at_level(logging.WARNING, logger="mmtune"):
        model = build_reranker(path, device="cpu")
    assert "Both go into one message of the user now" in caplog.text
    model.save_pretrained(str(tmp_path / "saved"))
    for loaded in (model, CrossEncoder(str(tmp_path / "saved"), device="cpu")):
        system, user, answer = rendered(loaded, (TEXTS[0], PAGES[0]), prompt="revenue").split("<|im_end|>")
        assert system.split() == ["<|im_start|>", "user" if template == ALIKE else "system", "revenue"]
        pair = "<query>: total revenue of 2021\n<document>: <|vision_start|><|image_pad|><|vision_end|>"
        assert user.strip() == f"<|im_start|> user\n{pair}"
        assert answer.strip() == "<|im_start|> assistant"
    assert loaded.predict(TEXT_TO_IMAGE) == pytest.approx(model.predict(TEXT_TO_IMAGE), abs=1e-5)


def test_a_template_without_system_messages_takes_the_prompt_with_the_pair(qwen3_vl_path, tmp_path):
    path = with_template(qwen3_vl_path, tmp_path / "model", SYSTEM_REFUSED + DROPPING)
    text = rendered(build_reranker(path, device="cpu"), (PAGES[0], TEXTS[0]), prompt="revenue")
    user = (
        "<instruct>: revenue\n<query>: <|vision_start|><|image_pad|><|vision_end|>\n<document>: total revenue of 2021"
    )
    assert text.split("<|im_end|>")[0].strip() == f"<|im_start|> user\n{user}"


def test_lines_in_front_leave_other_chats_as_they_were(qwen3_vl_path):
    processor = AutoProcessor.from_pretrained(qwen3_vl_path)
    processor.chat_template = DROPPING
    chat = [{"role": "user", "content": "revenue"}, {"role": "assistant", "content": [{"type": "text", "text": "10"}]}]
    ours = processor.apply_chat_template(chat, chat_template=pair_template(processor, "model"))
    assert ours == processor.apply_chat_template(chat)


@pytest.mark.parametrize("template", [TEXTS_ONLY, STRINGS_ONLY], ids=["texts", "strings"])
@pytest.mark.parametrize("head", HEADS)
def test_a_template_that_reads_no_images_is_refused_before_reading_weights(head, template, qwen3_vl_path, tmp_path):
    path = with_template(without_weights(qwen3_vl_path, tmp_path / "weightless"), tmp_path / "model", template)
    with pytest.raises(
        ConfigError, match=r"can't carry a query and a document.*Both in one message of the user did not"
    ):
        build_reranker(path, head=head)


def test_a_model_without_a_template_is_refused_before_reading_weights(llava_path, tmp_path):
    path = without_weights(llava_path, tmp_path / "model")
    Path(path, "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        build_reranker(path)
    with pytest.raises(ConfigError, match="has no chat template"):
        build_reranker(without_weights(tiny_paligemma(tmp_path / "paligemma"), tmp_path / "paligemma-weightless"))


def test_a_template_given_by_the_user_is_used(qwen3_vl_path, tmp_path):
    path = with_template(qwen3_vl_path, tmp_path / "model", TEXTS_ONLY)
    given = AutoProcessor.from_pretrained(qwen3_vl_path).chat_template
    model = build_reranker(path, processor_kwargs={"chat_template": given}, device="cpu")
    assert rendered(model, TEXT_TO_IMAGE[0]).count("<|im_start|>") == 3


def test_a_template_that_opens_no_answer_warns(qwen3_vl_path, tmp_path):
    own = AutoProcessor.from_pretrained(qwen3_vl_path).chat_template
    path = with_template(qwen3_vl_path, tmp_path / "model", own.partition("{%- if add_generation_prompt")[0])
    with pytest.warns(UserWarning, match="opens no answer"):
        build_reranker(path, device="cpu")


def test_a_model_that_thinks_first_is_asked_to_answer(qwen3_vl_path, tmp_path):
    thinking = "{%- if enable_thinking is not defined or enable_thinking -%}<think>{%- endif -%}"
    path = with_template(
        qwen3_vl_path, tmp_path / "model", DROPPING + "{%- if add_generation_prompt -%}" + thinking + "{%- endif -%}"
    )
    model = build_reranker(path, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    for loaded in (model, CrossEncoder(str(tmp_path / "saved"), device="cpu")):
        assert rendered(loaded, TEXT_TO_IMAGE[0]).strip().endswith("assistant")


@pytest.mark.parametrize("head", HEADS)
def test_no_special_token_follows_the_opened_answer(head, qwen3_vl_path, tmp_path):
    shutil.copytree(qwen3_vl_path, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    end = ("<|im_end|>", tokenizer.token_to_id("<|im_end|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[end])
    tokenizer.save(str(file))
    model, plain = (build_reranker(path, head=head, device="cpu") for path in (str(tmp_path / "model"), qwen3_vl_path))
    assert model.predict(TEXT_TO_IMAGE) == pytest.approx(plain.predict(TEXT_TO_IMAGE), abs=1e-6)


# what is built on


@pytest.mark.parametrize("head", HEADS)
def test_an_embedding_model_can_be_built_on(head, qwen3_vl_path, tmp_path):
    SentenceTransformer(qwen3_vl_path, device="cpu").save_pretrained(str(tmp_path))
    scores = build_reranker(str(tmp_path), head=head, device="cpu").predict(TEXT_TO_IMAGE)
    expected = build_reranker(qwen3_vl_path, head=head, device="cpu").predict(TEXT_TO_IMAGE)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_pixel_limits_of_an_embedding_model_are_kept(qwen3_vl_path, tmp_path):
    load_model(qwen3_vl_path, max_pixels=64 * 64, device="cpu").save_pretrained(str(tmp_path))
    model = build_reranker(str(tmp_path), device="cpu")
    assert model.preprocess([(TEXTS[0], PAGES[3])])["image_grid_thw"].prod() * 16 * 16 <= 64 * 64


def test_the_rows_of_an_untied_lm_head_are_found_in_shards(llava_path, tmp_path):
    LlavaForConditionalGeneration.from_pretrained(llava_path).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    AutoProcessor.from_pretrained(llava_path).save_pretrained(tmp_path)
    whole, sharded = (build_reranker(path, head="dense", device="cpu") for path in (llava_path, str(tmp_path)))
    assert sharded.predict(TEXT_TO_IMAGE) == pytest.approx(whole.predict(TEXT_TO_IMAGE), abs=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_base_model_without_its_lm_head_is_refused(head, llava_path, tmp_path):
    SentenceTransformer(llava_path, device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"saved without its LM head \(LlavaModel\)"):
        build_reranker(str(tmp_path), head=head)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fixture", ["clip_path", "siglip_path", "text_encoder_path"])
def test_models_that_are_no_language_models_are_refused_before_reading_weights(head, fixture, request, tmp_path):
    path = without_weights(request.getfixturevalue(fixture), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"has no LM head over texts and images.*such as Qwen3-VL"):
        build_reranker(path, head=head)


@pytest.mark.parametrize("head", HEADS)
def test_pixel_limits_and_dtype_hold_after_reloading(head, qwen3_vl_path, tmp_path):
    model = build_reranker(qwen3_vl_path, head=head, max_pixels=64 * 64, dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(str(tmp_path))
    for loaded in (model, CrossEncoder(str(tmp_path), device="cpu")):
        patches = loaded.preprocess([(TEXTS[0], PAGES[3])])["image_grid_thw"].prod()
        assert int(patches) * 16 * 16 <= 64 * 64
    assert np.isfinite(loaded.predict(TEXT_TO_IMAGE)).all()


def test_host_arguments_are_passed_on(qwen3_vl_path):
    model = build_reranker(
        qwen3_vl_path,
        attention="eager",
        device="cpu",
        max_length=512,
        num_labels=1,
        default_prompt_name="image_to_text",
        local_files_only=True,
    )
    assert model.config._attn_implementation == "eager"
    assert model.max_seq_length == 512
    assert model.default_prompt_name == "image_to_text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "densed"}, "head='densed' is no head. Expected 'logit_score' or 'dense'"),
        ({"backend": "onnx"}, "backend='onnx' can't be built on"),
        ({"default_prompt_name": "query"}, "default_prompt_name='query' is no direction"),
        ({"num_labels": 3}, "num_labels=3 does not rank"),
        ({"max_pixles": 9}, "no argument 'max_pixles'. The nearest is 'max_pixels'"),
        ({"max_pixels": 1}, "max_pixels=1 is below one patch"),
        ({"dtype": "float7"}, "dtype='float7' is no dtype"),
    ],
)
def test_wrong_arguments_are_refused_before_reading_weights(arguments, message, qwen3_vl_path, tmp_path):
    path = without_weights(qwen3_vl_path, tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        build_reranker(path, **arguments)


def test_broken_weights_are_named(qwen3_vl_path, llava_path, tmp_path):
    with pytest.raises(ConfigError, match=r"weights of .* can't be loaded"):
        build_reranker(without_weights(qwen3_vl_path, tmp_path / "tied"))
    with pytest.raises(ConfigError, match=r"The LM head of .* can't be read"):
        build_reranker(without_weights(llava_path, tmp_path / "untied"), head="dense")


# ready rerankers


def test_a_ready_reranker_keeps_its_head_and_prompts(reranker, tmp_path):
    reranker.save_pretrained(str(tmp_path))
    loaded = build_reranker(str(tmp_path), device="cpu", max_pixels=64 * 64)
    assert [type(module) for module in loaded] == [type(module) for module in reranker]
    assert loaded.prompts == reranker.prompts
    assert loaded.predict(TEXT_TO_IMAGE[:1]) == pytest.approx(reranker.predict(TEXT_TO_IMAGE[:1]), abs=1e-5)
    assert loaded.preprocess([(TEXTS[0], PAGES[3])])["image_grid_thw"].prod() * 16 * 16 <= 64 * 64


def test_prompts_of_a_ready_reranker_can_be_replaced(reranker, tmp_path):
    reranker.save_pretrained(str(tmp_path))
    loaded = build_reranker(str(tmp_path), prompts={"text_to_image": "Same?"}, device="cpu")
    assert loaded.prompts == {**reranker.prompts, "text_to_image": "Same?"}
    with pytest.raises(ConfigError, match=r"'text_to_imag', which is no direction.*The nearest is 'text_to_image'"):
        build_reranker(str(tmp_path), prompts={"text_to_imag": "x"}, device="cpu")


def test_what_a_ready_reranker_does_not_take_warns(qwen3_vl_path, tmp_path):
    build_reranker(qwen3_vl_path, device="cpu").save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="head='dense' and true_token='yes' is not applied"):
        loaded = build_reranker(str(tmp_path), head="dense", true_token="yes", device="cpu")
    assert isinstance(loaded[-1], LogitScore)


def test_a_sequence_classification_model_loads_as_it_is(text_reranker_path):
    pairs = [("total revenue", "revenue by year"), ("total revenue", "a chart of profits")]
    loaded = build_reranker(text_reranker_path, device="cpu")
    assert loaded.predict(pairs) == pytest.approx(CrossEncoder(text_reranker_path, device="cpu").predict(pairs))


def test_a_classifier_of_several_classes_is_refused(text_reranker_path, tmp_path):
    model = BertForSequenceClassification.from_pretrained(
        text_reranker_path, num_labels=3, ignore_mismatched_sizes=True
    )
    shutil.copytree(text_reranker_path, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="gives 3 scores per pair"):
        build_reranker(str(tmp_path / "model"), device="cpu")


# scores in float32


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_do_not_tie_candidates(
    llava_path: str, head: str, dtype: str, tmp_path: Path
) -> None:
    pairs = many_pairs()
    reranker = build_reranker(llava_path, head=head, dtype=dtype, device="cpu")
    scores = reranker.predict(pairs)
    assert len(set(scores.tolist())) == len(pairs)
    exact = build_reranker(llava_path, head=head, dtype="float32", device="cpu").predict(pairs)
    assert np.corrcoef(scores, exact)[0, 1] > 0.99
    reranker.save_pretrained(str(tmp_path))
    assert (build_reranker(tmp_path, dtype=dtype, device="cpu").predict(pairs) == scores).all()


@pytest.mark.parametrize("head", HEADS)
def test_the_plain_host_scores_in_the_precision_of_the_weights(llava_path: str, head: str, tmp_path: Path) -> None:
    pairs = many_pairs()
    build_reranker(llava_path, head=head, dtype="bfloat16", device="cpu").save_pretrained(str(tmp_path))
    plain = CrossEncoder(str(tmp_path), device="cpu", model_kwargs={"dtype": "bfloat16"})
    tied = plain.predict(pairs)
    assert len(set(tied.tolist())) < len(pairs)
    with scoring_in_float32(plain):
        assert len(set(plain.predict(pairs).tolist())) == len(pairs)
    assert (plain.predict(pairs) == tied).all(), "the caller's model is as it was"


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_in_float32_in_training_too(llava_path: str, head: str) -> None:
    reranker = build_reranker(llava_path, head=head, dtype="bfloat16", device="cpu").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reranker(dict(reranker.preprocess(many_pairs()[:4])))["scores"]
    assert scores.dtype == torch.float32
    scores.sum().backward()
    layer = reranker[0].model.get_output_embeddings() if head == "logit_score" else reranker[-1].linear
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.any())


@pytest.mark.parametrize("head", HEADS)
def test_scores_in_float32_anyway_stay_as_they_are(llava_path: str, head: str, tmp_path: Path) -> None:
    reranker = build_reranker(llava_path, head=head, device="cpu")
    reranker.save_pretrained(str(tmp_path))
    assert (CrossEncoder(str(tmp_path), device="cpu").predict(many_pairs()) == reranker.predict(many_pairs())).all()


def test_a_classifier_of_one_score_does_not_tie_either(text_encoder_path: str, tmp_path: Path) -> None:
    with seeded(0):
        CrossEncoder(text_encoder_path, num_labels=1, device="cpu").save_pretrained(str(tmp_path))
    pairs = [(f"revenue of 20{k:02}", f"page {k * k} of {k}") for k in range(60)]
    half = CrossEncoder(str(tmp_path), device="cpu", model_kwargs={"dtype": "bfloat16"})
    ready = build_reranker(tmp_path, dtype="bfloat16", device="cpu")
    tied, told_apart = (len(set(reranker.predict(pairs).tolist())) for reranker in (half, ready))
    assert tied < 40 < 50 < told_apart
