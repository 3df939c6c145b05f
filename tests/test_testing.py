"""Tiny checkpoints load and embed in the plain host; generated pages keep what their docstring says."""

import socket
from collections import Counter
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PillowImage
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

from mmtune import testing
from mmtune.errors import ConfigError, MissingExtraError
from mmtune.testing import generated_pages, tiny_clip, tiny_qwen3_vl, tiny_siglip, tiny_text_encoder, words

CHECKPOINTS = {
    "clip": (tiny_clip, 128),
    "siglip": (tiny_siglip, 64),
    "text_encoder": (tiny_text_encoder, 64),
    "qwen3_vl": (tiny_qwen3_vl, 64),
}
WITH_IMAGES = ("clip", "siglip", "qwen3_vl")


@pytest.fixture
def path(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_path")


def _load(path: str) -> SentenceTransformer:
    return SentenceTransformer(path, device="cpu")


def _by_id(pages: Dataset) -> dict[str, dict]:
    return {row["id"]: row for row in pages.cast_column("image", Image(decode=False))}


def _attributes(page_id: str) -> set[str]:
    company, topic, *period, _ = page_id.split("-")
    return {company, topic, period[-1]}


def test_exports_are_sorted_and_exist():
    assert testing.__all__ == sorted(testing.__all__)
    assert all(callable(getattr(testing, name)) for name in testing.__all__)


@pytest.mark.parametrize(
    ("path", "dimension"), [(name, dimension) for name, (_, dimension) in CHECKPOINTS.items()], indirect=["path"]
)
def test_a_checkpoint_embeds_text_in_the_plain_host(path: str, dimension: int):
    model = _load(path)
    embeddings = model.encode(["the revenue of Cobalt", "the water of Granit"], convert_to_tensor=True)
    assert embeddings.shape == (2, dimension)
    assert model.get_embedding_dimension() == dimension
    assert torch.isfinite(embeddings).all()
    assert not torch.allclose(embeddings[0], embeddings[1])


@pytest.mark.parametrize("path", WITH_IMAGES, indirect=True)
def test_a_checkpoint_embeds_pages_in_the_plain_host(path: str, pages: Dataset):
    model = _load(path)
    embeddings = model.encode(pages[:3]["image"], convert_to_tensor=True)
    assert embeddings.shape == (3, model.get_embedding_dimension())
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_qwen3_vl_embeds_text_with_a_page(qwen3_vl_path: str, pages: Dataset):
    page = pages[0]["image"]
    both, page_alone = _load(qwen3_vl_path).encode([{"text": "revenue", "image": page}, {"text": "", "image": page}])
    assert (both != page_alone).any()


def test_qwen3_vl_scores_pairs_as_a_reranker(qwen3_vl_path: str, pages: Dataset):
    transformer = Transformer(qwen3_vl_path, transformer_task="any-to-any")
    true_token_id, false_token_id = transformer.tokenizer.convert_tokens_to_ids(["1", "0"])
    head = LogitScore(true_token_id=true_token_id, false_token_id=false_token_id)
    reranker = CrossEncoder(modules=[transformer, head], device="cpu")
    pairs = [("revenue in 2021", pages[0]["image"]), ("revenue in 2021", pages[1]["image"])]
    first, second = reranker.predict(pairs)
    assert first != second


@pytest.mark.parametrize("path", CHECKPOINTS, indirect=True)
def test_the_embedding_of_a_text_does_not_depend_on_its_batch(path: str):
    model = _load(path)
    alone = model.encode(["profit 2020"], convert_to_tensor=True)[0]
    beside = model.encode(["profit 2020", "a much longer text on the profit of Everest"], convert_to_tensor=True)[0]
    torch.testing.assert_close(alone, beside, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", CHECKPOINTS, indirect=True)
def test_every_word_of_a_text_counts(path: str):
    texts = ["water of Granit in 2020", "profit of Granit in 2020", "water of Granit in 2021"]
    embeddings = _load(path).encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    similarities = embeddings @ embeddings.T
    assert similarities.triu(1).max() < 0.9999


@pytest.mark.parametrize("path", CHECKPOINTS, indirect=True)
def test_a_checkpoint_has_no_dropout(path: str):
    model = _load(path).train()
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert not any(dropouts)
    features = model.preprocess(["hiring at Dunmore"])
    first = model(dict(features))["sentence_embedding"]
    assert torch.equal(first, model(dict(features))["sentence_embedding"])


@pytest.mark.parametrize("path", CHECKPOINTS, indirect=True)
@pytest.mark.parametrize("text", ["Ünïcode 漢字 العربية 🙂", "zebra-42 (new!)"])
def test_a_tokenizer_spells_any_text(path: str, text: str):
    tokenizer = _load(path).tokenizer
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(token_ids).strip() == text.lower()


def test_words_of_the_pages_are_one_token_each(clip_path: str):
    tokenizer = _load(clip_path).tokenizer
    for word in (*words.COMPANIES, *words.TOPICS, *words.YEARS, *words.REGIONS):
        assert len(tokenizer.tokenize(word)) == 1


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_seed_decides_the_weights_and_the_callers_random_state_stays(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    expected_path = request.getfixturevalue(f"{name}_path")
    build, _ = CHECKPOINTS[name]
    torch.manual_seed(5)
    expected_state = torch.get_rng_state()
    again, other = build(tmp_path / "again"), build(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), expected_state)
    expected = _files(expected_path)
    assert _files(again) == expected
    assert _files(other)["model.safetensors"] != expected["model.safetensors"]


def _files(folder: str) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


def test_sizes_of_a_clip_can_be_chosen(tmp_path: Path):
    path = tiny_clip(tmp_path / "clip", hidden_size=96, num_layers=1, projection_dim=32, image_size=48, patch_size=8)
    model = _load(path)
    config = model[0].model.config
    assert model.get_embedding_dimension() == 32
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 96
    assert model.preprocess([PillowImage.new("RGB", (200, 100))])["pixel_values"].shape[-2:] == (48, 48)


def test_qwen3_vl_without_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("mmtune.testing.models.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install torchvision .*"\.\[vlm\]"'):
        tiny_qwen3_vl(tmp_path)


def test_pages_have_the_layout_of_id_rows(pages: Dataset):
    assert pages.column_names == ["id", "query", "image", "negatives", "language"]
    assert isinstance(pages.features["image"], Image)
    assert pages.cache_files == []
    assert len(set(pages["id"])) == len(pages)
    assert set(pages["language"]) == {"en"}


@pytest.mark.parametrize(("num_queries", "num_pages"), [(1, 2), (4, 5), (24, 28), (100, 120)])
def test_a_fifth_more_pages_have_no_query(num_queries: int, num_pages: int):
    queries = generated_pages(num_queries, page_size_px=64)["query"]
    assert len(queries) == num_pages
    assert sum(query is not None for query in queries) == num_queries


def test_pages_without_a_query_stand_among_the_others():
    has_query = [query is not None for query in generated_pages(100, page_size_px=64)["query"]]
    assert not all(has_query[:100])
    assert any(has_query[100:])


def test_the_seed_decides_the_bytes(pages: Dataset):
    assert _by_id(generated_pages(24)) == _by_id(pages)
    assert not _by_id(generated_pages(24, seed=1)).keys() & _by_id(pages).keys()


def test_no_two_pages_are_alike():
    pages = generated_pages(420, page_size_px=64)
    assert len({row["image"]["bytes"] for row in _by_id(pages).values()}) == len(pages)
    queries = [query for query in pages["query"] if query]
    assert max(Counter(queries).values()) == 1


def test_pages_are_png_of_the_size_asked_for(pages: Dataset):
    image = PillowImage.open(BytesIO(next(iter(_by_id(pages).values()))["image"]["bytes"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))
    assert generated_pages(1, page_size_px=300)[0]["image"].size == (300, 300)


@pytest.mark.parametrize("num_negatives", [0, 1, 4, 16])
def test_negatives_are_other_pages_that_share_something(num_negatives: int):
    rows = _by_id(generated_pages(40, num_negatives=num_negatives, page_size_px=64))
    for page_id, row in rows.items():
        negatives = row["negatives"]
        assert len(negatives) == len(set(negatives)) == num_negatives
        assert page_id not in negatives
        assert rows.keys() >= set(negatives)
        shared = [len(_attributes(page_id) & _attributes(negative)) for negative in negatives]
        assert shared == sorted(shared, reverse=True)
    assert shared[:1] in ([], [2])


def test_few_pages_have_shorter_lists_of_negatives():
    assert sorted(map(len, generated_pages(2)["negatives"])) == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_queries": 0}, "num_queries is 0, but must be at least 1"),
        ({"num_queries": 2, "num_negatives": -1}, "num_negatives is -1, but must be at least 0"),
        ({"num_queries": 2, "page_size_px": 8}, "page_size_px is 8, but must be at least 64"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        generated_pages(**arguments)


def test_the_network_is_blocked():
    with socket.socket() as client, pytest.raises(AssertionError, match="without a network"):
        client.connect(("192.0.2.1", 80))
