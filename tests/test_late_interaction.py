"""Late interaction: models with a vector a token, made from a backbone or loaded, and the evaluator for them."""

import io
import json
import math
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
)
from sentence_transformers.base.modules import Dense, Normalize, Router
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn
from transformers import AutoTokenizer, ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comparing import without_weights
from mmtune import ConfigError, ImageDecodeError, RetrievalDataset, build_evaluator
from mmtune.data.documents import as_host_input
from mmtune.evaluation import late_interaction
from mmtune.models.fresh import fresh_layers, guess_fresh_layers, is_even
from mmtune.models.late_interaction import build_late_interaction, is_late_interaction

PAGE = Image.new("RGB", (300, 400), "white")
QUESTIONS = ["total revenue", "growth of Cobalt in Asia in 2021"]


def embed(model: MultiVectorEncoder) -> torch.Tensor:
    """All vectors of two queries and a page."""
    return torch.cat([*model.encode_query(QUESTIONS), *model.encode_document([PAGE])])


@pytest.fixture(scope="module")
def colqwen(qwen3_vl_path: str) -> MultiVectorEncoder:
    """A tiny Qwen3-VL with a projection; for tests that leave it as it is."""
    return build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")


@pytest.fixture(scope="module")
def colqwen_path(colqwen: MultiVectorEncoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "colqwen"
    colqwen.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def pooled_path(qwen3_vl_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same backbone as an embedding model, with pooling, normalisation and prompts."""
    model = SentenceTransformer(qwen3_vl_path, device="cpu", prompts={"query": "Find: "})
    model.append(Normalize())
    folder = tmp_path_factory.mktemp("models") / "pooled"
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def native_path(qwen3_vl_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ColQwen2 as transformers has it, without any file of the host."""
    tokenizer = AutoTokenizer.from_pretrained(qwen3_vl_path)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_vocab() if token.startswith("<|")}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    backbone = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    folder = tmp_path_factory.mktemp("models") / "native"
    ColQwen2ForRetrieval(ColQwen2Config(vlm_config=backbone.to_dict(), embedding_dim=32)).save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    ColQwen2Processor(Qwen2VLImageProcessorPil(patch_size=14, size=size), tokenizer).save_pretrained(folder)
    return str(folder)


# what is built


def test_a_backbone_gets_what_the_host_adds(qwen3_vl_path: str, colqwen: MultiVectorEncoder) -> None:
    host = MultiVectorEncoder(qwen3_vl_path, device="cpu")
    assert [type(module) for module in colqwen] == [type(module) for module in host]
    projection = colqwen[1]
    assert isinstance(projection, Dense)
    assert projection.get_config_dict() == host[1].get_config_dict()
    assert (colqwen.prompts, colqwen[0].query_expansion, colqwen[2].skiplist_words) == (host.prompts, None, [])
    assert embed(colqwen).norm(dim=1) == pytest.approx(1.0, abs=1e-5)
    assert not colqwen.training


def test_only_the_projection_is_drawn_and_from_the_seed_alone(qwen3_vl_path: str, colqwen: MultiVectorEncoder) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    again = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    other = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(embed(again), embed(colqwen))
    differing = [
        name for name, weight in other.state_dict().items() if not torch.equal(weight, again.state_dict()[name])
    ]
    assert differing == ["1.linear.weight"]


def test_dimension_and_dtype_of_the_projection(qwen3_vl_path: str) -> None:
    model = build_late_interaction(qwen3_vl_path, dimension=32, dtype="bfloat16", device="cpu")
    assert model.get_embedding_dimension() == 32
    assert model[1].linear.weight.dtype == torch.bfloat16
    assert list(fresh_layers(model)) == ["1"]


def test_an_embedding_model_loses_its_pooling_and_keeps_its_prompts(pooled_path: str) -> None:
    model = build_late_interaction(pooled_path, dimension=48, device="cpu")
    assert [type(module) for module in model][1:] == [Dense, MultiVectorMask, Normalize]
    assert model.similarity_fn_name == "maxsim"
    assert model.prompts["query"] == "Find: "
    assert embed(model).shape[1] == 48
    assert list(fresh_layers(model)) == ["1"]


def test_a_trained_projection_of_an_embedding_model_goes_on_with_the_tokens(pooled_path: str, tmp_path: Path) -> None:
    model = SentenceTransformer(pooled_path, device="cpu")
    model.append(Dense(64, 24, bias=False))
    nn.init.normal_(model[-1].linear.weight)  # as torch would not draw it
    model.save_pretrained(str(tmp_path / "dense"))
    late = build_late_interaction(tmp_path / "dense", device="cpu")
    (projection,) = [module for module in late if isinstance(module, Dense)]
    assert torch.equal(projection.linear.weight, model[-1].linear.weight)
    assert embed(late).shape[1] == 24
    assert not fresh_layers(late)
    with pytest.raises(ConfigError, match=r"dimension=128 was asked for, and .* has a projection to 24"):
        build_late_interaction(without_weights(str(tmp_path / "dense"), tmp_path / "broken"), dimension=128)


def test_saved_and_loaded_by_the_host_gives_the_same_vectors(colqwen: MultiVectorEncoder, colqwen_path: str) -> None:
    assert (embed(MultiVectorEncoder(colqwen_path, device="cpu")) - embed(colqwen)).abs().max() < 1e-6
    assert (embed(build_late_interaction(colqwen_path, device="cpu")) - embed(colqwen)).abs().max() < 1e-6


def test_a_retriever_of_transformers_is_loaded_as_it_is(native_path: str, tmp_path: Path) -> None:
    model = build_late_interaction(native_path, max_pixels=56 * 56, device="cpu")
    assert [type(module) for module in model][1:] == [MultiVectorMask]
    assert embed(model).shape[1] == 32
    assert not fresh_layers(model)
    with pytest.raises(ConfigError, match=r"dimension=128 was asked for, and .* has a projection to 32"):
        build_late_interaction(without_weights(native_path, tmp_path / "broken"), dimension=128)


def test_the_pixel_limit_says_how_many_vectors_a_page_has(qwen3_vl_path: str, colqwen_path: str) -> None:
    def vectors(model: MultiVectorEncoder) -> int:
        return len(model.encode_document([Image.new("RGB", (512, 512))])[0])

    large = build_late_interaction(qwen3_vl_path, max_pixels=128 * 128, device="cpu")
    small = MultiVectorEncoder(colqwen_path, device="cpu")
    # a patch is 32 by 32 pixels; the rest of the template is the same
    assert vectors(large) - vectors(small) == 16 - 4


# what is refused


@pytest.mark.parametrize("fixture", ["clip_path", "siglip_path"])
def test_a_dual_encoder_is_refused_before_its_weights_are_read(fixture, request, tmp_path: Path) -> None:
    checkpoint = without_weights(request.getfixturevalue(fixture), tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"dual encoder.*needs token embeddings.*Pass a model that has them"):
        build_late_interaction(checkpoint)


def test_a_router_is_refused_before_its_weights_are_read(
    text_encoder_path: str, clip_path: str, tmp_path: Path
) -> None:
    routes = {
        "text": list(SentenceTransformer(text_encoder_path, device="cpu")),
        "image": list(SentenceTransformer(clip_path, device="cpu")),
    }
    model = SentenceTransformer(modules=[Router(routes, route_mappings={(None, "text"): "text"})])
    model.save_pretrained(str(tmp_path / "router"))
    with pytest.raises(ConfigError, match=r"starts with a Router.*needs token embeddings"):
        build_late_interaction(without_weights(str(tmp_path / "router"), tmp_path / "broken"))


def test_an_encoder_that_shows_only_when_built_that_it_pools(
    qwen3_vl_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.models.late_interaction.TOKENS", "other_embeddings")
    with pytest.raises(ConfigError, match=r"pools by itself.*needs token embeddings"):
        build_late_interaction(qwen3_vl_path, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "dimension=0 is no size"),
        ({"dimension": True}, "dimension=True is no size"),
        ({"dimension": 64.0}, "dimension=64.0 is no size"),
        ({"max_pixels": -1}, "max_pixels=-1 is no pixel limit"),
        ({"dtype": "float7"}, "dtype='float7' is no dtype"),
        ({"similarity_function": "cosine"}, "The nearest is 'similarity_fn_name'"),
    ],
)
def test_wrong_arguments(qwen3_vl_path: str, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_late_interaction(without_weights(qwen3_vl_path, tmp_path / "broken"), **arguments)


def test_another_dimension_than_the_saved_one(colqwen_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dimension=64 was asked for, and .* has a projection to 128"):
        build_late_interaction(without_weights(colqwen_path, tmp_path / "broken"), dimension=64)


def test_no_checkpoint_and_no_images(text_encoder_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        build_late_interaction(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="embeds no images, only text"):
        build_late_interaction(text_encoder_path)


# what can be told apart


def test_which_checkpoints_are_of_late_interaction(
    colqwen_path: str, native_path: str, pooled_path: str, qwen3_vl_path: str, clip_path: str, tmp_path: Path
) -> None:
    assert is_late_interaction(without_weights(colqwen_path, tmp_path / "broken"))
    assert is_late_interaction(Path(native_path))
    assert not any(map(is_late_interaction, (pooled_path, qwen3_vl_path, clip_path)))
    with pytest.raises(ConfigError, match="does not exist"):
        is_late_interaction(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content_by_name", "expected"),
    [
        ({"config.json": {"architectures": ["ColPaliForRetrieval"]}}, True),
        ({"config.json": {"architectures": ["HF_ColBERT"]}}, True),
        ({"config.json": {"architectures": ["Qwen3VLForConditionalGeneration"]}}, False),
        ({"config.json": {}, "modules.json": []}, False),
        ({"modules.json": [], "config_sentence_transformers.json": {"model_type": "ColBERT"}}, True),
        ({"modules.json": [], "config_sentence_transformers.json": {"model_type": "CrossEncoder"}}, False),
        ({"modules.json": [], "config_sentence_transformers.json": {}}, False),
    ],
)
def test_small_files_say_it(content_by_name: dict[str, object], expected: bool, tmp_path: Path) -> None:
    for name, content in content_by_name.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert is_late_interaction(tmp_path) is expected


def test_a_projection_that_the_host_added_is_found_also_after_saving(
    qwen3_vl_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = MultiVectorEncoder(qwen3_vl_path, device="cpu")
    assert not fresh_layers(host)
    assert guess_fresh_layers(host) == ("1",)
    assert list(fresh_layers(host)) == ["1"]
    assert "The layer '1' is taken for fresh: its weights are even, as torch draws them." in caplog.text
    assert guess_fresh_layers(host) == (), "what is marked is not guessed"
    host.save_pretrained(str(tmp_path / "untrained"))
    assert guess_fresh_layers(build_late_interaction(tmp_path / "untrained", device="cpu")) == ("1",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(64, 16), (64, 128), (1536, 128)])
def test_a_layer_is_even_until_it_is_trained(dtype: torch.dtype, size: tuple[int, int]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(*size).to(dtype) for _ in range(20)]
        inputs = torch.randn(4, size[0], dtype=dtype)
    assert all(map(is_even, layers))
    for layer in layers:
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        for _ in range(5):
            layer(inputs).square().sum().backward()
            optimizer.step()
    assert not any(map(is_even, layers))


def test_other_starts_are_not_taken_for_a_fresh_one() -> None:
    layer = nn.Linear(64, 128)
    for start in (nn.init.zeros_, nn.init.orthogonal_, nn.init.xavier_uniform_, nn.init.eye_):
        start(layer.weight)
        assert not is_even(layer), start
    nn.init.trunc_normal_(layer.weight, std=1 / 8, a=-1 / 8, b=1 / 8)
    assert not is_even(layer)


# training with the host


def rows_of(pages: Dataset) -> Dataset:
    return RetrievalDataset.from_id_rows(pages).training_rows(1)


def test_the_cached_loss_has_the_same_gradients_whatever_the_mini_batch(qwen3_vl_path: str, pages: Dataset) -> None:
    columns = rows_of(pages)[:8]
    gradients = []
    for mini_batch_size in (1, 4):
        model = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
        features = [
            model.preprocess([as_host_input(value) for value in values], task="document" if column else "query")
            for column, values in enumerate(columns.values())
        ]
        CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)(features).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() >= {"1.linear.weight"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_the_hosts_trainer_trains_it_on_training_rows(qwen3_vl_path: str, pages: Dataset, tmp_path: Path) -> None:
    model = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    # the host would look for examples in columns that only the untransformed rows have
    model.model_card_data.ir_model = False
    start = model[1].linear.weight.detach().clone()
    MultiVectorEncoderTrainer(
        model=model,
        args=MultiVectorEncoderTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            learning_rate_mapping={r"^(model\.)?1\.linear": 1e-3},
            max_grad_norm=30.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows_of(pages),
        loss=CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=4),
    ).train()
    assert 5e-4 < (model[1].linear.weight - start).abs().max() < 3e-3
    assert guess_fresh_layers(model) == ()
    assert not fresh_layers(model), "it was trained since"
    model.save_pretrained(str(tmp_path / "final"))
    loaded = MultiVectorEncoder(str(tmp_path / "final"), device="cpu")
    assert (embed(loaded) - embed(model.eval())).abs().max() < 1e-6


# evaluation


def hand_built(rows: Dataset) -> MultiVectorInformationRetrievalEvaluator:
    asking = rows.filter(lambda row: row["query"] is not None)
    return MultiVectorInformationRetrievalEvaluator(
        queries=dict(zip(asking["id"], asking["query"], strict=True)),
        corpus=dict(zip(rows["id"], rows["image"], strict=True)),
        relevant_docs={query_id: {query_id} for query_id in asking["id"]},
        batch_size=16,
        name="vdr",
    )


def with_judgements(pages: Dataset, judgements: dict[str, dict[str, int]], *, prefix: str = "") -> RetrievalDataset:
    """The pages as documents ``"0", "1", ...``, with queries and scores that are given."""
    qrels = [
        (query, prefix + document, score) for query, found in judgements.items() for document, score in found.items()
    ]
    query_ids, document_ids, scores = (list(column) for column in zip(*qrels, strict=True))
    return RetrievalDataset(
        pages.select_columns(["image"]).add_column("document_id", [f"{prefix}{i}" for i in range(len(pages))]),
        Dataset.from_dict({"query_id": list(judgements), "text": [f"report {query}" for query in judgements]}),
        Dataset.from_dict({"query_id": query_ids, "document_id": document_ids, "score": scores}),
    )


def test_equals_the_hand_built_evaluator(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    evaluator = build_evaluator(pages, model=colqwen, show_progress_bar=False)
    assert isinstance(evaluator, MultiVectorInformationRetrievalEvaluator)
    ours, theirs = evaluator(colqwen), hand_built(pages)(colqwen)
    assert ours.keys() == theirs.keys() >= {"vdr_maxsim_ndcg@10"}
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


def test_the_metric_that_counts_has_the_hosts_name(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    evaluator = build_evaluator(pages, model=colqwen, ndcg_at_k=(3, 5), show_progress_bar=False)
    metrics = evaluator(colqwen)
    assert evaluator.metric_name(colqwen) == evaluator.primary_metric == "vdr_maxsim_ndcg@5"
    assert set(evaluator.per_query) == {"vdr_maxsim_ndcg@3", "vdr_maxsim_ndcg@5"}
    for key, values in evaluator.per_query.items():
        assert set(values) == set(evaluator.queries_ids)
        assert metrics[key] == pytest.approx(np.mean(list(values.values())), abs=1e-12)


def test_scores_are_graded(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    few = pages.select(range(4))
    similarity = colqwen.similarity(colqwen.encode_query(["report q"]), colqwen.encode_document(list(few["image"])))
    first, second = similarity[0].argsort(descending=True)[:2].tolist()
    data = with_judgements(few, {"q": {str(first): 1, str(second): 3}})
    metrics = build_evaluator(data, model=colqwen, show_progress_bar=False)(colqwen)
    discount = 1 / math.log2(3)
    assert metrics["vdr_maxsim_ndcg@10"] == pytest.approx((1 + 3 * discount) / (3 + discount))
    assert metrics["vdr_maxsim_accuracy@1"] == 1.0


@pytest.mark.parametrize(("portion_documents", "most_held"), [(1, 6), (9, 20), (1000, 28)])
def test_only_the_portion_that_is_scored_is_held(
    pages: Dataset,
    colqwen: MultiVectorEncoder,
    monkeypatch: pytest.MonkeyPatch,
    portion_documents: int,
    most_held: int,
) -> None:
    """Not the corpus: the host lets go of a portion, of one batch at least, when the next one is there."""
    document_bytes = colqwen.encode_document(pages[0]["image"]).nbytes
    monkeypatch.setattr(late_interaction, "_PORTION_BYTES", portion_documents * document_bytes)
    made: list[weakref.ref] = []
    held: list[int] = []
    encode_document = colqwen.encode_document

    def watched(documents: list, **arguments) -> list[torch.Tensor]:
        embeddings = encode_document(documents, **arguments)
        made.extend(map(weakref.ref, embeddings))
        held.append(sum(reference() is not None for reference in made))
        return embeddings

    monkeypatch.setattr(colqwen, "encode_document", watched)
    build_evaluator(pages, model=colqwen, batch_size=3, show_progress_bar=False)(colqwen)
    assert len(made) == len(pages)
    assert most_held / 2 < max(held) <= most_held
    assert not any(reference() is not None for reference in made)


def test_portions_do_not_change_the_scores(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    metrics = [
        build_evaluator(pages, model=colqwen, batch_size=size, show_progress_bar=False)(colqwen) for size in (1, 7, 100)
    ]
    assert metrics[0] == pytest.approx(metrics[2], abs=1e-9)
    assert metrics[1] == pytest.approx(metrics[2], abs=1e-9)


def test_ties_do_not_depend_on_how_ids_are_spelled(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    """Every page stands three times in the corpus as text, so that all are tied."""
    texts = [f"page {i}" for i in range(8)] * 3

    def scores(prefix: str) -> dict[str, float]:
        ids = [f"{prefix}{i}" for i in range(len(texts))]
        data = RetrievalDataset(
            Dataset.from_dict({"document_id": ids, "text": texts}),
            Dataset.from_dict({"query_id": ["a", "b"], "text": QUESTIONS}),
            Dataset.from_dict({"query_id": ["a", "b"], "document_id": [ids[3], ids[20]], "score": [1, 1]}),
        )
        return build_evaluator(data, model=colqwen, documents="text", batch_size=5, show_progress_bar=False)(colqwen)

    assert scores("") == scores("zz") == scores("0")


def test_a_copy_of_the_relevant_page_costs_nothing(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    once = with_judgements(pages, {"q": {"3": 1}, "r": {"5": 2}})
    copies = once.corpus.remove_columns("document_id").add_column(
        "document_id", [f"copy-{i}" for i in range(len(pages))]
    )
    twice = RetrievalDataset(concatenate_datasets([copies, once.corpus]), once.queries, once.qrels)
    before = build_evaluator(once, model=colqwen, show_progress_bar=False)
    evaluator = build_evaluator(twice, model=colqwen, show_progress_bar=False)
    assert len(evaluator.corpus_ids) == len(pages)
    assert evaluator(colqwen) == pytest.approx(before(colqwen), abs=1e-9)


def test_several_datasets_have_a_mean(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    parts = {"front": pages.select(range(12)), "back": pages.select(range(12, 24))}
    parts = {name: part.remove_columns("negatives") for name, part in parts.items()}
    evaluator = build_evaluator(parts, model=colqwen, show_progress_bar=False)
    metrics = evaluator(colqwen)
    each = [metrics[f"vdr-{name}_maxsim_ndcg@10"] for name in parts]
    assert metrics[evaluator.metric_name(colqwen)] == metrics["vdr-mean_maxsim_ndcg@10"] == pytest.approx(np.mean(each))


def test_a_query_that_looks_like_an_image_is_a_text(colqwen: MultiVectorEncoder, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    PAGE.save(path)
    buffer = io.BytesIO()
    PAGE.save(buffer, "PNG")
    page = {"bytes": buffer.getvalue(), "path": None}
    rows = Dataset.from_dict(
        {"id": ["a", "b"], "query": [str(path), "https://example.org/page.png"], "image": [page] * 2}
    )
    evaluator = build_evaluator(rows, model=colqwen, show_progress_bar=False)
    evaluator(colqwen)
    ours = evaluator.embed_inputs(colqwen, evaluator.queries, encode_fn_name="query")
    texts = colqwen.encode_query([{"text": text} for text in rows["query"]])
    assert [len(text) for text in texts] == [int(query.abs().sum(dim=1).gt(0).sum()) for query in ours]


def test_a_damaged_page_is_named_and_the_evaluator_stays_usable(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    broken = {"bytes": b"no image", "path": None}
    rows = Dataset.from_dict({"id": ["bad"], "query": ["one"], "image": [broken]})
    evaluator = build_evaluator(rows, model=colqwen, show_progress_bar=False)
    for _ in range(2):
        with pytest.raises(ImageDecodeError, match="'bad'"):
            evaluator(colqwen)
    assert pickle.loads(pickle.dumps(evaluator)).queries == ["one"]


def test_truncation_is_refused(pages: Dataset, colqwen: MultiVectorEncoder) -> None:
    with pytest.raises(ConfigError, match=r"truncate_dims=\[64\].*not trained to be truncated"):
        build_evaluator(pages, model=colqwen, truncate_dims=[64])


def test_the_wrong_kind_of_model_is_refused(pages: Dataset, colqwen: MultiVectorEncoder, clip_path: str) -> None:
    clip = SentenceTransformer(clip_path, device="cpu")
    with pytest.raises(ConfigError, match="scores a SentenceTransformer, and the model is a MultiVectorEncoder"):
        build_evaluator(pages, show_progress_bar=False)(colqwen)
    with pytest.raises(ConfigError, match="scores a MultiVectorEncoder, and the model is a SentenceTransformer"):
        build_evaluator(pages, model=colqwen, show_progress_bar=False)(clip)
