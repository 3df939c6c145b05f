"""Queries that are sounds: how they are read, which are the same, and what models make of them."""

import io
import json

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Normalize

from comparing import without_weights
from mmtune import (
    ConfigError,
    DatasetError,
    MediaDecodeError,
    RetrievalDataset,
    build_evaluator,
    build_reranking_evaluator,
    compose_router,
    evaluate_pipeline,
    finetune,
    finetune_reranker,
    load_model,
    mine_hard_negatives,
)
from mmtune.arguments import MediaLimits
from mmtune.data.sounds import Sound
from mmtune.models.recordings import media_limits_of
from mmtune.models.routes import check_routes, encoder_for
from mmtune.testing import generated_audio, tiny_ast, tiny_clap, tiny_siglip, tiny_text_encoder

soundfile = pytest.importorskip("soundfile")


def hum(content: bytes, seed: int = 0, *, seconds: float = 0.5, noise: float = 0.02) -> bytes:
    """The beginning of a sound with noise over it, in another container."""
    samples = Sound({"bytes": content, "path": None}, "d").decode(MediaLimits(max_seconds=seconds))["array"]
    noisy = samples + noise * np.random.default_rng(seed).standard_normal(len(samples))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(noisy, -1, 1), 16_000, format="FLAC")
    return buffer.getvalue()


def asking_rows(n: int = 6) -> Dataset:
    """Sounds, each with a hum of it that asks."""
    rows = generated_audio(n).select_columns(["id", "audio"])
    return rows.add_column("query_audio", [hum(each["bytes"], at) for at, each in enumerate(rows["audio"])])


@pytest.fixture(scope="module")
def hums() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(asking_rows())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["clap", "router"])
def listener(request, folder) -> SentenceTransformer:
    if request.param == "clap":
        return load_model(tiny_clap(folder / "clap"), device="cpu")
    return compose_router(tiny_text_encoder(folder / "text"), audio=tiny_ast(folder / "ast"), device="cpu")


def three_tables(queries: dict) -> RetrievalDataset:
    ids, sounds = ["a", "b"], generated_audio(2)["audio"]
    corpus = Dataset.from_dict({"document_id": ids, "audio": [each["bytes"] for each in sounds]})
    qrels = Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1, 1]})
    return RetrievalDataset.from_beir(corpus, Dataset.from_dict({"query_id": ids, **queries}), qrels)


# How they are read


@pytest.mark.parametrize("column", ["audio", "query_audio"])
def test_three_tables_have_them_alone_or_beside_texts(column):
    content = asking_rows(2)["query_audio"][:]
    alone = three_tables({column: content})
    assert [each["bytes"] for each in alone.queries["audio"]] == content
    assert alone.queries["text"][:] == [None, None]
    assert "queries    2 (audio)" in repr(alone)
    beside = three_tables({column: [content[0], None], "query": [None, "a bell"]})
    assert beside.audit(queries="audio")["incomplete_queries"].count == 1
    assert len(beside.without(beside.audit(queries="audio", num_examples=None)["incomplete_queries"])) == 1


def test_a_query_column_of_sounds_asks_and_one_of_bytes_is_of_images():
    rows = asking_rows(2).rename_column("query_audio", "query")
    found = RetrievalDataset.from_id_rows(rows.cast_column("query", Audio(decode=False)))
    assert found.queries.column_names == ["query_id", "text", "audio"]
    named = RetrievalDataset.from_id_rows(rows, query_audio_column="query")
    assert named.queries[0]["audio"]["bytes"] == rows[0]["query"]
    assert "image" in RetrievalDataset.from_id_rows(rows).queries.column_names
    rows = rows.remove_columns("id").cast_column("query", Audio(decode=False))
    assert RetrievalDataset.from_columns(rows).queries.column_names == ["query_id", "text", "audio"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"query_audio_column": "nothing"}, "has no column 'nothing'"),
        ({"query_audio_column": "path"}, None),
        ({"query_audio_column": "x", "query_image_column": "x"}, "are both 'x'"),
        ({"query_audio_column": None, "query_image_column": None}, "has no column 'query'"),
    ],
)
def test_columns_that_can_not_ask_are_named(options, problem):
    rows = asking_rows(2).add_column("path", ["a.wav", "b.wav"])
    if problem is None:  # texts are paths
        with pytest.raises(MediaDecodeError, match=r"Query '.*'.*No such file"):
            RetrievalDataset.from_id_rows(rows, **options).check_pages(show_progress_bar=False)
        return
    with pytest.raises((DatasetError, ConfigError), match=problem):
        RetrievalDataset.from_id_rows(rows, **options)


@pytest.mark.parametrize("layout", ["save", "beir", "tevatron", "id_rows", "columns"])
@pytest.mark.filterwarnings("ignore:layout='columns' has no place")
def test_they_are_written_and_read_back(hums, layout, tmp_path):
    if layout == "save":
        hums.save(tmp_path / "out")
    else:
        hums.export(tmp_path / "out", layout, show_progress_bar=False)
    found = RetrievalDataset.load(tmp_path / "out")
    assert [each["bytes"] for each in found.queries["audio"]] == [each["bytes"] for each in hums.queries["audio"]]
    assert [each["bytes"] for each in found.corpus["audio"]] == [each["bytes"] for each in hums.corpus["audio"]]


def test_a_row_holds_the_sound_that_asks_at_the_rate_that_is_asked_for(hums):
    row = hums.training_rows(0, documents="audio", queries="audio", sampling_rate=8_000, max_seconds=0.25)[0]
    for part in (row["query"]["audio"], row["image"]["audio"]):
        assert (len(part["array"]), part["sampling_rate"]) == (2_000, 8_000)
    joined = three_tables({"audio": asking_rows(2)["query_audio"][:], "text": ["faster", "slower"]})
    both = joined.training_rows(0, documents="audio", queries="text+audio")[0]["query"]
    assert (list(both), both["text"]) == (["text", "audio"], "faster")
    assert joined.training_rows(0, documents="audio")[0]["query"] == "faster"
    assert joined.labeled_pairs(0, documents="audio", queries="audio")[0]["query"].keys() == {"audio"}


def test_a_damaged_one_is_named_with_its_query(hums):
    content = [hums.queries[0]["audio"]["bytes"], b"no sound at all"]
    data = three_tables({"audio": content})
    with pytest.raises(MediaDecodeError, match="Query 'b' can't be decoded as a sound"):
        data.check_pages(show_progress_bar=False)
    with pytest.raises(MediaDecodeError, match="Query 'b' can't be decoded as a sound"):
        data.training_rows(0, documents="audio", queries="audio")[:]


def test_two_are_the_same_where_their_bytes_are(hums):
    one, other = (hums.queries[at]["audio"]["bytes"] for at in range(2))
    twice = three_tables({"audio": [one, one], "text": ["faster", "slower"]})
    assert twice.relevance_of("audio", "audio").text.tolist() == [0, 0]
    assert twice.relevance_of("audio", "text+audio").text.tolist() == [0, 1]
    assert three_tables({"audio": [one, other]}).relevance_of("audio", "audio").text.tolist() == [0, 1]
    row = twice.training_rows(1, documents="audio", queries="audio", on_short="random")
    assert {*row.with_format(None)["relevance_group"][:]} == {0}
    with pytest.raises(DatasetError, match="audio of query 'a'"):
        twice.split(1, queries="audio")


# What models make of them


def test_a_sound_that_asks_for_itself_is_found_at_its_first_rank(hums, listener):
    own = RetrievalDataset(
        hums.corpus,
        hums.corpus.rename_column("document_id", "query_id"),
        hums.qrels,
    )
    metrics = build_evaluator(own, documents="audio", queries="audio", show_progress_bar=False)(listener)
    assert metrics["vdr_cosine_accuracy@1"] == 1
    mined = mine_hard_negatives(
        own,
        listener,
        documents="audio",
        queries="audio",
        num_negatives=2,
        relative_margin=None,
        show_progress_bar=False,
    )
    assert [len(ids) for ids in mined.negatives["document_ids"]] == [2] * len(own)


def test_a_prompt_that_stands_before_no_sound_is_said(hums, listener, monkeypatch, caplog):
    monkeypatch.setitem(listener.prompts, "query", "Find the sound: ")
    build_evaluator(hums, documents="audio", queries="audio", show_progress_bar=False)(listener)
    assert "prompt for queries has no effect with queries='audio'" in caplog.text


def test_mining_with_a_reranker_refuses_sounds_before_anything_is_embedded(hums, listener, monkeypatch):
    monkeypatch.setattr("mmtune.inference.mining.require_reranker", lambda *args: None)
    monkeypatch.setattr(listener, "encode_query", None)
    for kinds in ({"documents": "audio"}, {"documents": "text", "queries": "audio"}):
        with pytest.raises(ConfigError, match="rerankers read"):
            mine_hard_negatives(hums, listener, reranker=object(), **kinds)


def test_training_says_what_asked_and_what_was_read_in_part(hums, listener, tmp_path, caplog):
    queries = hums.queries.remove_columns("audio")
    longer = [hum(each["bytes"], seconds=1.0) for each in hums.corpus["audio"]]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(48_000), 16_000, format="WAV")
    data = RetrievalDataset(hums.corpus, queries.add_column("audio", [buffer.getvalue(), *longer[1:]]), hums.qrels)
    kinds = {"documents": "audio", "queries": "audio", "num_negatives": 0, "allow_overlap": True}
    steps = {"max_steps": 1, "per_device_train_batch_size": 4, "matryoshka_dims": None}
    result = finetune(listener, data, data, output_dir=tmp_path / "run", **kinds, **steps)
    settings = json.loads((result.output_dir / "metrics.json").read_text())["settings"]
    assert settings["data"]["queries"] == "audio"
    assert settings["data"]["queries_read_in_part"] == {"audio": 1}
    assert "1 sounds that ask are read in part" in caplog.text
    assert '"audio": {"array": samples' in (result.output_dir / "final" / "README.md").read_text().split("query = ")[1]
    loaded = SentenceTransformer(str(result.output_dir / "final"), device="cpu")
    again = build_evaluator(data, documents="audio", queries="audio", show_progress_bar=False)(loaded)
    assert again == pytest.approx({name: result.after[name] for name in again}, abs=1e-6)


def test_each_side_is_decoded_at_the_rate_of_its_own_route(folder, hums):
    path = tiny_ast(folder / "slow")
    config = folder / "slow" / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sampling_rate": 8_000}))
    sides = [
        compose_router(tiny_text_encoder(folder / "words"), audio=each) for each in (path, tiny_ast(folder / "fast"))
    ]
    routes = [next(iter(side.children())).sub_modules["audio"] for side in sides]
    router = Router.for_query_document(query_modules=list(routes[0]), document_modules=list(routes[1]))
    model = SentenceTransformer(modules=[router, Normalize()], device="cpu")
    rates = [
        media_limits_of(encoder_for(model, "audio", "audio", task), "audio").sampling_rate
        for task in ("query", "document")
    ]
    assert rates == [8_000, 16_000]
    check_routes(model, "audio", "audio")
    found = build_evaluator(hums, documents="audio", queries="audio", show_progress_bar=False).encode(model)
    sound = Sound(hums.queries[0]["audio"], "q").decode(MediaLimits(sampling_rate=8_000, max_seconds=1.0))
    expected = model.encode_query([{"audio": sound}], convert_to_tensor=True)
    torch.testing.assert_close(found.queries[:1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("maker", "documents", "queries", "problem"),
    [
        (tiny_text_encoder, "text", "audio", "embeds no .*, only text"),
        (tiny_siglip, "image", "audio", "embeds no sounds, only image, text"),
        (tiny_clap, "audio", "text+audio", r"can't embed text\+audio"),
    ],
)
def test_a_model_that_takes_none_is_refused_by_name_before_weights(maker, documents, queries, problem, hums, tmp_path):
    model = without_weights(maker(tmp_path / "whole"), tmp_path / "model")
    with pytest.raises(ConfigError, match=problem):
        finetune(model, hums, documents=documents, queries=queries, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("queries", ["audio", "text+audio"])
def test_rerankers_refuse_them_before_anything_is_read(queries):
    problem = "queries='.*audio': rerankers read no sounds"
    with pytest.raises(ConfigError, match=problem):
        finetune_reranker("no-model-is-read", "no-data-are-read", queries=queries)
    with pytest.raises(ConfigError, match=problem):
        evaluate_pipeline("no-model", "no-model", "no-data-are-read", queries=queries)
    with pytest.raises(ConfigError, match=problem):
        build_reranking_evaluator("no-data-are-read", queries=queries)


@pytest.mark.parametrize("queries", ["video", "mixed", "audio+text", "sound", "", None, 5, ["audio"]])
def test_other_kinds_of_queries_are_refused_by_name(hums, queries):
    with pytest.raises(ConfigError, match="queries="):
        hums.training_rows(0, documents="audio", queries=queries)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_router_learns_to_find_the_sound_like_a_hum_it_has_not_heard(tmp_path):
    """The first 0.6 s under noise ask; 256 combinations of pitch, timbre and others are trained, and 64 asked for."""
    rows = generated_audio(320).select_columns(["id", "audio"])
    noisy = [hum(each["bytes"], at, seconds=0.6, noise=0.1) for at, each in enumerate(rows["audio"])]
    rows = rows.add_column("query_audio", noisy)
    train, unseen = (RetrievalDataset.from_id_rows(rows.select(part)) for part in (range(256), range(256, 320)))
    result = finetune(
        compose_router(tiny_text_encoder(tmp_path / "text"), audio=tiny_ast(tmp_path / "ast"), device="cpu"),
        train,
        unseen,
        documents="audio",
        queries="audio",
        output_dir=tmp_path / "run",
        max_steps=100,
        learning_rate=2e-3,
        per_device_train_batch_size=64,
        warmup_steps=10,
        num_negatives=0,
        matryoshka_dims=None,
        load_best_model_at_end=False,
        eval_strategy="no",
        save_strategy="no",
    )
    before, after = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    assert before < 0.2
    assert after >= 0.6


def test_sounds_that_ask_for_texts_keep_their_length_in_what_is_saved(folder, tmp_path):
    asking = [each["bytes"] for each in generated_audio(4)["audio"]]
    ids = [f"q{at}" for at in range(4)]
    data = RetrievalDataset.from_beir(
        Dataset.from_dict({"document_id": ids, "text": [f"passage {at}" for at in range(4)]}),
        Dataset.from_dict({"query_id": ids, "audio": asking}).cast_column("audio", Audio(decode=False)),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * 4}),
    )
    model = SentenceTransformer(tiny_clap(folder / "plain"), device="cpu")  # which load_model has not mended
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "output_dir": tmp_path}
    tuned = finetune(model, data, documents="text", queries="audio", **options).model
    loaded = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    sound = {"audio": Sound(data.queries[0]["audio"], "a query").decode(MediaLimits(sampling_rate=16_000))}
    assert np.array_equal(loaded.encode([sound]), tuned.encode([sound]))
