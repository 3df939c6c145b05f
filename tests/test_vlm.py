"""One VLM backbone, from a fresh checkpoint to a trained and reloaded model; CLIP and SigLIP beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from families import CHAT_TEMPLATE, tiny_idefics3, tiny_llava, tiny_raw_siglip, tiny_siglip2_naflex
from mmtune import ConfigError, FinetuneResult, RetrievalDataset, build_evaluator, finetune, load_model
from mmtune.testing import generated_pages

TEXTS = ["revenue", "the total revenue of the company in the year 2021, by region", "costs", "profit of 2020"]
QUIET = {"disable_tqdm": True, "learning_rate": 1e-3}
MAX_PIXELS = 64 * 64
PROMPTS = {"query": "find the page: ", "document": "a page of a report: "}

VLMS = ["qwen3_vl", "idefics3", "llava"]
ALL = [*VLMS, "clip", "siglip", "siglip2_naflex"]


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


PAGES = images((40, 60), (90, 200), (64, 64), (200, 30))
PAIRS = [{"text": text, "image": page} for text, page in zip(TEXTS, PAGES, strict=True)]


@pytest.fixture(scope="module")
def path_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    builders = {
        "idefics3": tiny_idefics3,
        "llava": tiny_llava,
        "siglip": tiny_raw_siglip,
        "siglip2_naflex": tiny_siglip2_naflex,
    }
    built: dict[str, str] = {}

    def path(family: str) -> str:
        if family not in builders:
            return request.getfixturevalue(f"{family}_path")
        if family not in built:
            built[family] = builders[family](tmp_path_factory.mktemp("models") / family)
        return built[family]

    return path


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    """Pages that also have a text."""
    pages = RetrievalDataset.from_id_rows(generated_pages(16, seed=3))
    texts = [f"leaflet {document_id.replace('-', ' ')}" for document_id in pages.corpus["document_id"]]
    corpus = pages.corpus.add_column("text", texts)
    return RetrievalDataset(corpus, pages.queries, pages.qrels, pages.negatives).split(4)


@contextmanager
def seen_by(model: SentenceTransformer) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The features of each batch that reaches the encoder."""
    seen: list[dict[str, torch.Tensor]] = []

    def watch(module, inputs):
        # in training and evaluation alone: a single sample goes through before, to find what nothing reaches
        if len(next(iter(inputs[0].values()))) > 1:
            seen.append(dict(inputs[0]))

    hook = model[0].register_forward_pre_hook(watch)
    try:
        yield seen
    finally:
        hook.remove()


def inputs_of(model: SentenceTransformer) -> list[list]:
    return [TEXTS, PAGES, *([PAIRS] if model.supports(("image", "text")) else [])]


def largest_change(one: SentenceTransformer, other: SentenceTransformer) -> float:
    return max(abs(one.encode(inputs) - other.encode(inputs)).max() for inputs in inputs_of(one))


# loading and embedding


@pytest.mark.parametrize("family", VLMS)
def test_a_vlm_embeds_text_images_and_both_together(family, path_of):
    model = load_model(path_of(family), device="cpu")
    embeddings = [model.encode(inputs) for inputs in inputs_of(model)]
    assert [embedding.shape for embedding in embeddings] == [(4, 64)] * 3
    for embedding in embeddings:
        assert abs(embedding[0] - embedding[1]).max() > 0.1


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", VLMS)
def test_an_embedding_does_not_depend_on_its_batch(family, padding_side, path_of):
    model = load_model(path_of(family), device="cpu")
    model.tokenizer.padding_side = padding_side
    for inputs in [*inputs_of(model), [TEXTS[1], PAGES[1], PAIRS[0]]]:
        alone = np.concatenate([model.encode([one]) for one in inputs])
        assert abs(model.encode(inputs) - alone).max() <= 1e-5


@pytest.mark.parametrize("family", VLMS)
def test_the_last_token_sees_everything(family, path_of):
    model = load_model(path_of(family), device="cpu")
    revenue, costs = model.encode(["revenue of the long year", "costs of the long year"])
    assert abs(revenue - costs).max() > 0.01


# training and reloading


@pytest.mark.parametrize("family", ALL)
def test_a_trained_model_reloads_in_the_plain_host(family, path_of, data, tmp_path):
    result = finetune(path_of(family), data[0], output_dir=tmp_path, max_steps=2, **QUIET)
    untrained = load_model(path_of(family), device="cpu")
    assert largest_change(result.model, untrained) > 1e-4
    assert largest_change(result.model, SentenceTransformer(str(tmp_path / "final"), device="cpu")) <= 1e-6


@pytest.mark.parametrize("family", ALL)
def test_mini_batches_do_not_change_gradients(family, path_of):
    model = load_model(path_of(family), device="cpu")
    documents = PAIRS if model.supports(("image", "text")) else PAGES

    def gradients(mini_batch_size: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
        loss([model.preprocess(TEXTS), model.preprocess(documents)], None).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    whole, single = gradients(4), gradients(1)
    assert any(gradient.any() for gradient in whole.values())
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-5)


def test_qwen3_vl_trains_with_everything_at_once(qwen3_vl_path, data, tmp_path):
    model = load_model(qwen3_vl_path, max_pixels=MAX_PIXELS, prompts=PROMPTS, device="cpu")
    with seen_by(model) as seen:
        result = finetune(
            model,
            *data,
            output_dir=tmp_path,
            documents="text+image",
            matryoshka_dims=[64, 32],
            mini_batch_size=2,
            num_train_epochs=2,
            **QUIET,
        )
    texts = [model.tokenizer.batch_decode(features["input_ids"]) for features in seen]
    documents = [text for batch in texts for text in batch if "a page of a report" in text]
    assert documents
    assert all("leaflet" in text and "<|image_pad|>" in text for text in documents)
    assert {"vdr_cosine_ndcg@10", "vdr-32d_cosine_ndcg@10"} <= result.after.keys()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert largest_change(model, SentenceTransformer(str(tmp_path / "final"), device="cpu")) <= 1e-6


# pixel limits


def largest_page(features: list[dict[str, torch.Tensor]]) -> int:
    """Pixels of the largest page that reached the encoder, by its patches of 16 by 16."""
    shown = [batch for batch in features if "image_grid_thw" in batch]
    assert shown
    for batch in shown:
        assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(dim=1).sum())
    return max(int(batch["image_grid_thw"].prod(dim=1).max()) for batch in shown) * 16**2


def test_the_pixel_limit_holds_in_training_evaluation_and_after_reloading(qwen3_vl_path, data, tmp_path):
    model = load_model(qwen3_vl_path, max_pixels=MAX_PIXELS, device="cpu")
    evaluator = build_evaluator(data[1], model=model, show_progress_bar=False)
    with seen_by(model) as seen:
        finetune(model, data[0], output_dir=tmp_path, max_steps=1, **QUIET)
    assert largest_page(seen) == MAX_PIXELS
    reloaded = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    unlimited = load_model(qwen3_vl_path, device="cpu")
    for measured, expected in ((model, MAX_PIXELS), (reloaded, MAX_PIXELS), (unlimited, 128 * 128)):
        with seen_by(measured) as seen:
            evaluator(measured)
        assert largest_page(seen) == expected


# prompts


@pytest.fixture(scope="module", params=["qwen3_vl", "clip", "llava"])
def prompted(
    request: pytest.FixtureRequest,
    path_of: Callable[[str], str],
    data: tuple[RetrievalDataset, RetrievalDataset],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FinetuneResult, list[str], Path]:
    """A run on a checkpoint that came with prompts, and the texts that reached its encoder in training."""
    folder = tmp_path_factory.mktemp("prompted")
    load_model(path_of(request.param), prompts=PROMPTS, device="cpu").save_pretrained(str(folder / "checkpoint"))
    model = load_model(folder / "checkpoint", device="cpu")
    with seen_by(model) as seen:
        result = finetune(model, data[0], output_dir=folder / "run", documents="text", max_steps=1, **QUIET)
    return result, decoded(model, seen), folder / "run" / "final"


def decoded(model: SentenceTransformer, seen: list[dict[str, torch.Tensor]]) -> list[str]:
    return [text for batch in seen for text in model.tokenizer.batch_decode(batch["input_ids"])]


def assert_prompted(texts: list[str]) -> None:
    """Each text has the prompt of its kind, and both kinds are there."""
    documents = [text for text in texts if "leaflet" in text]
    queries = [text for text in texts if "leaflet" not in text]
    assert documents
    assert queries
    assert all("a page of a report:" in text for text in documents)
    assert all("find the page:" in text for text in queries)


def test_a_model_that_comes_with_prompts_trains_with_them(prompted):
    result, texts, _ = prompted
    assert_prompted(texts)
    assert result.model.prompts == PROMPTS


def test_evaluation_and_the_saved_model_use_the_same_prompts(prompted, data):
    result, _, final = prompted
    for model in (result.model, SentenceTransformer(str(final), device="cpu")):
        assert {name: model.prompts[name] for name in PROMPTS} == PROMPTS
        with seen_by(model) as seen:
            build_evaluator(data[1], model=model, documents="text", show_progress_bar=False)(model)
        assert_prompted(decoded(model, seen))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3_vl", "<|im_start|> system find the page: <|im_end|> <|im_start|> user revenue"),
        ("llava", "system: find the page: </s> user: revenue"),
        ("clip", "<s> find the page: revenue"),
    ],
)
def test_a_prompt_is_a_system_message_where_there_is_a_chat_template(family, expected, path_of):
    model = load_model(path_of(family), prompts=PROMPTS, device="cpu")
    features = model.preprocess(["revenue"], prompt=PROMPTS["query"])
    assert expected in " ".join(model.tokenizer.decode(features["input_ids"][0]).split())


WITHOUT_SYSTEM = CHAT_TEMPLATE.replace("{%- for message in messages -%}", "{%- for message in messages[-1:] -%}")
NO_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('No system role') }}{%- endif -%}" + CHAT_TEMPLATE
)


def test_a_prompt_that_the_chat_template_leaves_out_warns(tmp_path):
    path = tiny_llava(tmp_path, chat_template=WITHOUT_SYSTEM)
    with pytest.warns(UserWarning, match=r"prompt 'query' \('find the page: '\) has no effect"):
        load_model(path, prompts={"query": PROMPTS["query"], "document": ""}, device="cpu")


def test_a_prompt_that_the_chat_template_refuses_is_an_error(tmp_path):
    path = tiny_llava(tmp_path, chat_template=NO_SYSTEM)
    with pytest.raises(ConfigError, match=r"prompt 'query' .* can't be used: No system role\."):
        load_model(path, prompts=PROMPTS, device="cpu")
    assert load_model(path, device="cpu").encode(["revenue"]).shape == (1, 64)


def test_a_prompt_reaches_pages_too(qwen3_vl_path, data, tmp_path):
    model = load_model(qwen3_vl_path, max_pixels=MAX_PIXELS, prompts=PROMPTS, device="cpu")
    with seen_by(model) as seen:
        finetune(model, data[0], output_dir=tmp_path, max_steps=1, **QUIET)
    pages = [batch for batch in seen if "pixel_values" in batch]
    assert pages
    assert all("a page of a report:" in text for text in decoded(model, pages))


def test_pages_are_not_prompted_where_an_image_has_no_text(clip_path, data, tmp_path):
    """CLIP has nowhere to put one: only its queries are prompted."""
    model = load_model(clip_path, prompts=PROMPTS, device="cpu")
    with seen_by(model) as seen:
        finetune(model, data[0], output_dir=tmp_path, max_steps=1, **QUIET)
    assert all("input_ids" not in batch for batch in seen if "pixel_values" in batch)
    assert all("find the page:" in text for text in decoded(model, [b for b in seen if "input_ids" in b]))
