"""Sounds, clips and mixed corpora: what is decoded, what is refused, and what models are given."""

import io
import json
import re
import sys
import time
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from comparing import assert_same_weights, weights, without_weights
from mmtune import (
    ConfigError,
    ConflictFreeBatchSampler,
    DatasetError,
    ImageDecodeError,
    MediaDecodeError,
    MissingExtraError,
    RetrievalDataset,
    as_mteb_task,
    build_evaluator,
    build_reranker,
    build_reranking_evaluator,
    compose_router,
    evaluate_pipeline,
    finetune,
    finetune_reranker,
    load_model,
    mine_hard_negatives,
)
from mmtune.arguments import MediaLimits
from mmtune.data.arrow import with_encoded_images
from mmtune.data.clips import Clip
from mmtune.data.documents import kinds_of_documents
from mmtune.data.media import load_decoder
from mmtune.data.rows import view_of
from mmtune.data.sounds import Sound
from mmtune.inference.preprocessing import reading_pages
from mmtune.models.recordings import media_limits_of
from mmtune.testing import (
    generated_audio,
    generated_clips,
    generated_pages,
    tiny_ast,
    tiny_clap,
    tiny_siglip,
    tiny_text_encoder,
    tiny_videomae,
    tiny_whisper,
)
from mmtune.training.inputs import training_sets

soundfile = pytest.importorskip("soundfile")
av = pytest.importorskip("av")


def tone(seconds: float = 1.0, rate: int = 16_000, channels: int = 1, kind: str = "WAV", hertz: float = 440.0) -> bytes:
    time_s = np.arange(round(seconds * rate)) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([0.5 * np.sin(2 * np.pi * hertz * time_s)] * channels, axis=1), rate, format=kind)
    return buffer.getvalue()


def loudest_hertz(samples: np.ndarray, rate: int) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


def of(content: bytes | None = None, path: str | None = None, kind: type = Sound):
    return kind({"bytes": content, "path": path}, "d'ö/1")


def dataset(name: str, files: list[bytes], **more: list) -> RetrievalDataset:
    ids = [f"d{at}" for at in range(len(files))]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, name: files, **more}),
        Dataset.from_dict({"query_id": ids, "text": [f"sound {at}" for at in range(len(files))]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * len(ids)}),
    )


def own_rows(rows: Dataset, *columns: str) -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(rows.select_columns(["id", "query", *columns]))


def mixed_rows(n: int) -> Dataset:
    """Pages, sounds and passages, as many of each."""
    pages = with_encoded_images(generated_pages(n).select_columns(["id", "query", "image"]), "image")
    sounds = generated_audio(n).select_columns(["id", "query", "audio"])
    texts = {"id": [f"t{at}" for at in range(n)], "query": [f"what is {at}" for at in range(n)]}
    passages = Dataset.from_dict({**texts, "text": [f"{at} is a number" for at in range(n)]})
    return concatenate_datasets([pages, sounds, passages])


# What is decoded


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_a_sound_becomes_one_channel_at_the_rate_of_the_model(kind, rate, channels):
    if kind == "OGG" and rate > 48_000:
        pytest.skip("Vorbis in libsndfile has no such rate")
    found = of(tone(1.0, rate, channels, kind)).decode(MediaLimits(sampling_rate=16_000))
    assert found["sampling_rate"] == 16_000
    assert found["array"].dtype == np.float32
    assert abs(len(found["array"]) - 16_000) <= 16_000 * 0.01
    assert loudest_hertz(found["array"], 16_000) == pytest.approx(440, abs=2)


def test_both_channels_count():
    left = np.zeros((16_000, 2))
    left[:, 0] = 0.5
    buffer = io.BytesIO()
    soundfile.write(buffer, left, 16_000, format="WAV")
    assert of(buffer.getvalue()).decode()["array"].mean() == pytest.approx(0.25, abs=1e-3)


def test_silence_is_a_sound():
    assert not of(tone(0.5, hertz=0)).decode()["array"].any()


def test_of_an_hour_what_is_read_is_decoded_alone(tmp_path):
    path = tmp_path / "hour ö.flac"
    soundfile.write(path, np.zeros(3600 * 8_000, dtype=np.int16), 8_000)
    sound, started = of(path=str(path)), time.perf_counter()
    found = sound.decode(MediaLimits(max_seconds=2, sampling_rate=16_000))
    assert len(found["array"]) == 32_000
    assert time.perf_counter() - started < 1
    assert sound.is_cut(MediaLimits(max_seconds=3599))
    assert not sound.is_cut(MediaLimits(max_seconds=3600))


def test_the_frames_of_a_clip_are_those_that_were_drawn():
    rows = generated_clips(2, seed=1)
    kind, (content, other) = rows["query"][0].split(), [each["bytes"] for each in rows["video"]]
    frames = of(content, kind=Clip).decode()["array"]
    assert frames.shape == (8, 64, 64, 3)
    assert frames.dtype == np.uint8
    step = {"creeps": 8, "leaps": 24}[kind[-2]] * {"left": -1, "right": 1}[kind[-1]]
    moving = [np.roll(frames[0], step * at, axis=1) for at in range(8)]
    assert all(np.array_equal(one, other) for one, other in zip(frames, moving, strict=True))
    assert not np.array_equal(frames, of(other, kind=Clip).decode()["array"])


@pytest.mark.parametrize(
    ("limits", "indices"),
    [
        ({"fps": 4}, [0, 2, 4, 6]),
        ({"fps": 100}, [*range(8)]),
        ({"fps": 0.1}, [0, 4]),
        ({"max_frames": 3}, [0, 2, 5]),
        ({"max_seconds": 0.5}, [0, 1, 2, 3]),
        ({"num_frames": 10}, [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]),
        ({"num_frames": 4, "max_seconds": 0.5}, [0, 1, 2, 3]),
    ],
)
def test_frames_are_chosen_evenly_and_say_when_they_were_taken(limits, indices):
    clip = of(generated_clips(1)[0]["video"]["bytes"], kind=Clip)
    every, found = clip.decode()["array"], clip.decode(MediaLimits(**limits))
    assert found["video_metadata"]["frames_indices"] == indices
    assert (found["video_metadata"]["fps"], found["video_metadata"]["total_num_frames"]) == (8.0, 8)
    assert np.array_equal(found["array"], every[indices])
    assert clip.is_cut(MediaLimits(**limits)) == (len(set(indices)) < 8)


def test_frames_far_into_a_clip_are_found_by_seeking(tmp_path):
    path = str(tmp_path / "long.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264rgb", rate=2, options={"qp": "0", "g": "8"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "rgb24"
        for at in range(120):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * at, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = of(path=path, kind=Clip).decode(MediaLimits(max_frames=4))
    assert found["array"][:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    assert of(path=path, kind=Clip).decode(MediaLimits(max_pixels=256))["array"].shape == (120, 16, 16, 3)


# What is refused


@pytest.mark.parametrize("kind", [Sound, Clip])
@pytest.mark.parametrize("content", [b"", b"RIFF", b"no file of any kind" * 9, None])
def test_what_can_not_be_decoded_is_named(kind, content):
    with pytest.raises(MediaDecodeError, match=r"Document \"d'ö/1\" (can't be decoded as|has no)"):
        of(content, kind=kind).decode()
    assert not of(content, kind=kind).is_cut(MediaLimits(max_seconds=1))


def test_a_file_of_another_kind_is_named(tmp_path):
    with pytest.raises(MediaDecodeError, match="can't be decoded as a sound"):
        of(generated_clips(1)[0]["video"]["bytes"]).decode()
    with pytest.raises(MediaDecodeError, match="holds no stream of video"):
        of(tone(), kind=Clip).decode()
    for path, problem in ((tmp_path, "no file, but a folder"), (tmp_path / "gone.wav", "No such file")):
        with pytest.raises(MediaDecodeError, match=problem):
            of(path=str(path)).decode()


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_a_sound_without_enough_samples_is_named(samples):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"\0\1" * samples)
    with pytest.raises(MediaDecodeError, match=rf"has {samples} samples at 16000 Hz.*which are 400"):
        of(buffer.getvalue()).decode()


@pytest.mark.parametrize("name", ["max_seconds", "fps", "max_frames", "max_pixels", "num_frames", "sampling_rate"])
@pytest.mark.parametrize("value", [0, -1, True, "2", float("nan"), float("inf")])
def test_limits_that_can_not_be_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        MediaLimits(**{name: value})


@pytest.mark.parametrize("name", ["max_seconds", "fps", "max_frames"])
def test_limits_of_calls_are_checked_before_anything(name, tmp_path):
    with pytest.raises(ConfigError, match=name):
        dataset("audio", [tone()]).training_rows(0, documents="audio", **{name: -1})


def test_pages_that_are_checked_are_sounds_too():
    data = dataset("audio", [tone(), tone()[:20], tone()])
    with pytest.raises(MediaDecodeError, match="'d1'"):
        data.check_pages(show_progress_bar=False)
    with pytest.raises(MediaDecodeError, match="'d1'"):
        data.training_rows(0, documents="audio")[1]


def test_a_table_from_elsewhere_names_no_sounds_outside_its_folder(tmp_path):
    (tmp_path / "secret.wav").write_bytes(tone())
    (tmp_path / "table").mkdir()
    rows = Dataset.from_dict({"id": ["a"], "query": ["q"], "audio": [str(tmp_path / "secret.wav")]})
    rows.to_parquet(tmp_path / "table" / "rows.parquet")
    with pytest.raises(DatasetError, match="outside the folder"):
        RetrievalDataset.load(tmp_path / "table")
    assert len(RetrievalDataset.load(tmp_path / "table", allow_outside=True)) == 1


@pytest.mark.parametrize(("column", "values"), [("audio", [1, 2]), ("video", [[1], [2]])])
def test_columns_of_other_types_are_named(column, values):
    with pytest.raises(DatasetError, match=rf"Column '{column}' holds .*Expected datasets\.{column.title()}"):
        dataset(column, values)


@pytest.mark.parametrize(("package", "kind"), [("soundfile", Sound), ("soxr", Sound), ("av", Clip)])
def test_a_package_that_is_not_installed_is_named_with_its_install_line(package, kind, monkeypatch):
    content = tone() if kind is Sound else generated_clips(1)[0]["video"]["bytes"]
    monkeypatch.setitem(sys.modules, package, None)
    load_decoder.cache_clear()
    with pytest.raises(
        MissingExtraError, match=rf"need {package}, which is not installed. Run: pip install {package} "
    ):
        of(content, kind=kind).decode(MediaLimits(sampling_rate=8_000))
    load_decoder.cache_clear()


# Tables


def test_the_same_bytes_are_one_document_and_the_rest_are_not():
    data = dataset("audio", [tone(), tone(hertz=300), tone()])
    assert data.relevance.documents == "audio"
    assert data.relevance.page.tolist() == [0, 1, 0]
    assert data.deduplicate().corpus["document_id"][:] == ["d0", "d1"]


def test_of_mixed_documents_each_is_what_it_has():
    data = RetrievalDataset.from_id_rows(mixed_rows(3))
    assert data.relevance.documents == "mixed"
    rows = data.training_rows(0, documents="mixed")
    kinds = [next(iter(each)) if isinstance(each, dict) else type(each) for each in rows[:]["image"]]
    assert (kinds.count("audio"), kinds.count(str), len(kinds)) == (3, 3, 9)
    texts = [f"text {at % 2}" for at in range(3)]
    twice = dataset("audio", [tone(), None, None], text=[None, "a", "a"], image=[None, None, None])
    assert twice.relevance.page.tolist() == [0, 1, 1]
    assert dataset("audio", [tone()] * 3, text=texts, image=[None] * 3).relevance.page.tolist() == [0, 1, 0]
    with pytest.raises(DatasetError, match="'d1' has nothing in any of the columns"):
        dataset("audio", [tone(), None], image=[None, None]).training_rows(0, documents="mixed")[1]


def test_passages_beside_pages_need_no_image_where_documents_are_mixed():
    page = with_encoded_images(generated_pages(1).select([0]), "image")["image"][0]["bytes"]
    data = dataset("image", [page, None, None], text=[None, "a passage", " "]).select_queries(["d0", "d1"])
    data.check_pages(documents="mixed", show_progress_bar=False)
    with pytest.raises(ImageDecodeError, match="'d1' has no image"):
        data.check_pages(show_progress_bar=False)
    with pytest.raises(DatasetError, match="'d2' has nothing in any of the columns"):
        kinds_of_documents(data.corpus, "mixed")


@pytest.mark.parametrize("layout", ["save", "beir", "id_rows", "columns"])
@pytest.mark.parametrize("kind", ["audio", "video", "mixed"])
def test_what_is_written_is_read_back(kind, layout, tmp_path):
    made = {"audio": generated_audio, "video": generated_clips, "mixed": mixed_rows}[kind](4)
    data = RetrievalDataset.from_id_rows(made)
    if kind == "mixed" and layout == "columns":
        with pytest.raises(DatasetError, match="has several kinds"):
            data.export(tmp_path / "out", layout)
        return
    if layout == "save":
        data.save(tmp_path / "out")
    elif layout == "columns":
        with pytest.warns(UserWarning, match="the ids of"):
            data.export(tmp_path / "out", layout, show_progress_bar=False)
    else:
        data.export(tmp_path / "out", layout, show_progress_bar=False)
    found = RetrievalDataset.load(tmp_path / "out")
    names = ["audio", "image"] if kind == "mixed" else [kind]

    def contents(data: RetrievalDataset) -> list:
        columns = [data.corpus[name][:] for name in names]
        return sorted(str([(each or {}).get("bytes") for each in row]) for row in zip(*columns, strict=True))

    assert found.relevance.documents == data.relevance.documents
    if layout == "columns":  # a copy of each negative for each row
        assert set(contents(found)) <= set(contents(data))
    else:
        assert contents(found) == contents(data)


def test_a_split_shares_no_sound():
    data = RetrievalDataset.from_id_rows(generated_audio(24))
    train, evaluation = data.split(6)
    sounds = [{each["bytes"] for each in side.corpus["audio"][:]} for side in (train, evaluation)]
    relevant = set(evaluation.qrels["document_id"][:])
    assert len(relevant) == 6
    assert not relevant & {*train.qrels["document_id"][:]}
    assert sounds[1] - sounds[0]


# Models


def test_clap_is_the_same_after_texts_and_loading(tmp_path):
    model = load_model(tiny_clap(tmp_path / "clap"), device="cpu", max_seconds=0.75)
    sound = {"audio": Sound({"bytes": tone(0.75), "path": None}, "d").decode()}
    before = model.encode_document([sound])
    model.encode_query(["a text " * 50])
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(loaded.encode_document([sound]), before)
    assert media_limits_of(load_model(tmp_path / "saved", device="cpu")[0]).max_seconds == 0.75


@pytest.mark.parametrize("maker", [tiny_ast, tiny_whisper, tiny_clap])
def test_a_model_says_at_what_rate_and_for_how_long_it_listens(maker, tmp_path):
    limits = media_limits_of(load_model(maker(tmp_path / "model"), device="cpu")[0])
    assert limits.sampling_rate == 16_000
    assert limits.max_seconds == pytest.approx(1.0, abs=0.06)


def test_what_a_model_can_not_take_is_refused_by_name_before_weights(tmp_path):
    clap = without_weights(tiny_clap(tmp_path / "whole"), tmp_path / "clap")
    clips, sounds = own_rows(generated_clips(4), "video"), own_rows(generated_audio(4), "audio")
    with pytest.raises(ConfigError, match=r"embeds no videos, only audio, text \(model type clap\)"):
        finetune(clap, clips, documents="video", output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="embeds no images, only audio, text"):
        finetune(clap, RetrievalDataset.from_id_rows(mixed_rows(4)), documents="mixed", output_dir=tmp_path / "run")
    text = without_weights(tiny_text_encoder(tmp_path / "bert"), tmp_path / "text")
    with pytest.raises(ConfigError, match=r"embeds no audios, only text"):
        finetune(text, sounds, documents="audio", output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="given as audio="):
        compose_router(tmp_path / "bert", audio=text)
    with pytest.raises(ConfigError, match="Pass image=, audio= or video="):
        compose_router(tmp_path / "bert")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def listener(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("listener")
    model = compose_router(tiny_text_encoder(folder / "text"), audio=tiny_ast(folder / "ast"), device="cpu")
    model.save_pretrained(str(folder / "router"))
    return str(folder / "router")


def test_a_sound_is_decoded_once_a_use(listener, monkeypatch):
    decoded = []
    decode = Sound.decode
    monkeypatch.setattr(Sound, "decode", lambda self, *args: decoded.append(self.document_id) or decode(self, *args))
    data = own_rows(generated_audio(20), "audio")
    evaluator = build_evaluator(data, documents="audio", batch_size=4, show_progress_bar=False)
    evaluator(load_model(listener, device="cpu"))
    assert sorted(decoded) == sorted(data.corpus["document_id"][:])


def test_sounds_of_any_rate_and_length_are_embedded_alike_in_any_batch(listener):
    files = [tone(1.0), tone(1.0, 48_000, 2), tone(3.0), tone(0.2, 8_000)]
    evaluator = build_evaluator(dataset("audio", files), documents="audio", show_progress_bar=False)
    model = load_model(listener, device="cpu")
    embeddings = evaluator.encode(model).corpus
    assert torch.cosine_similarity(embeddings[0], embeddings[1], dim=0) > 0.999
    alone = torch.cat([evaluator_of_one(file, model) for file in files])
    torch.testing.assert_close(embeddings, alone, atol=1e-5, rtol=0)


def evaluator_of_one(file: bytes, model: SentenceTransformer) -> torch.Tensor:
    return build_evaluator(dataset("audio", [file]), documents="audio", show_progress_bar=False).encode(model).corpus


def test_what_is_cut_is_counted_and_said(listener, tmp_path, caplog):
    data = dataset("audio", [tone(1.0, hertz=300 + 10 * at) for at in range(6)] + [tone(2.0), tone(9.0)])
    result = finetune(
        listener,
        data,
        data,
        documents="audio",
        output_dir=tmp_path / "run",
        allow_overlap=True,
        max_steps=1,
        per_device_train_batch_size=4,
        matryoshka_dims=None,
    )
    settings = json.loads((result.output_dir / "metrics.json").read_text())["settings"]
    assert settings["data"]["read_in_part"] == {"audio": 2}
    assert "2 sounds are read in part" in caplog.text


@pytest.mark.usefixtures("qwen3_vl_path")  # which skips where torchvision is missing
@pytest.mark.parametrize(
    ("kind", "rows", "maker", "limits"),
    [
        ("audio", generated_audio, tiny_ast, {"sampling_rate": 16_000, "max_seconds": 1.055}),
        ("video", generated_clips, tiny_videomae, {}),
    ],
)
def test_weights_equal_those_of_a_plain_host_script(kind, rows, maker, limits, tmp_path):
    data = own_rows(rows(16), kind)

    def args(folder: str) -> SentenceTransformerTrainingArguments:
        return SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=8,
            max_steps=2,
            learning_rate=1e-3,
            batch_sampler=ConflictFreeBatchSampler,
            router_mapping={"query": "query", "image": "document"},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )

    text, other = tiny_text_encoder(tmp_path / "text"), maker(tmp_path / "other")
    made = compose_router(text, device="cpu", **{kind: other})
    ours = finetune(made, data, documents=kind, args=args("ours"), matryoshka_dims=None)
    model = compose_router(text, device="cpu", **{kind: other})
    model.model_card_data.generate_widget_examples = False
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args("theirs"),
        train_dataset=data.training_rows(0, documents=kind, **limits),
        loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=8),
    )
    trainer.train()
    assert_same_weights(weights(ours.model), weights(model))


def test_mining_finds_sounds(listener):
    data = own_rows(generated_audio(12), "audio")
    mined = mine_hard_negatives(
        data,
        load_model(listener, device="cpu"),
        documents="audio",
        num_negatives=2,
        relative_margin=None,
        show_progress_bar=False,
    )
    assert [len(ids) for ids in mined.negatives["document_ids"][:]] == [2] * 12


@pytest.mark.parametrize("documents", ["audio", "text+video"])
def test_rerankers_refuse_sounds_and_clips_before_anything_is_read(documents):
    with pytest.raises(ConfigError, match=rf"documents='{re.escape(documents)}': rerankers read texts, pages"):
        finetune_reranker("no-model-is-read", "no-data-are-read", documents=documents)


@pytest.mark.usefixtures("qwen3_vl_path")
def test_a_reranker_is_given_each_clip_with_its_own_frames_and_times(qwen3_vl_path, tmp_path):
    reranker = build_reranker(qwen3_vl_path, device="cpu")
    data = own_rows(generated_clips(4), "video")
    encoder = next(module for module in reranker.modules() if isinstance(module, Transformer))
    evaluators = {
        direction: build_reranking_evaluator(
            data, direction=direction, documents="video", num_candidates=2, show_progress_bar=False
        )
        for direction in ("text_to_image", "image_to_text")
    }
    for direction, evaluator in evaluators.items():
        assert 0 < evaluator(reranker)["vdr-rerank_ndcg@10"] <= 1, direction
    one_step = {"max_steps": 1, "per_device_train_batch_size": 4, "num_negatives": 1}
    finetune_reranker(qwen3_vl_path, data, documents="video", output_dir=tmp_path / "run", **one_step)
    made = encoder.preprocess
    clip = Clip(data.corpus[0]["video"], "d").decode()
    with reading_pages(reranker):
        both = encoder.preprocess([["a text", {"video": clip}], [{"video": clip}, "a text"]])
    assert both["video_grid_thw"].tolist() == [[4, 4, 4]] * 2
    assert made == encoder.preprocess


# Mixed corpora


def test_routes_get_batches_of_one_kind_that_hold_every_row():
    data = RetrievalDataset.from_id_rows(mixed_rows(8))
    sets = training_sets(data, num_negatives=0, documents="mixed", seed=0, by_kind=True)
    assert sorted(sets.by_name) == ["audio", "image", "text"]
    for kind, part in sets.by_name.items():
        sampler = ConflictFreeBatchSampler(part.rows, batch_size=3, drop_last=False)
        batches = [part.rows[batch]["image"] for batch in sampler]
        assert sum(map(len, batches)) == 8
        expected = {"audio": dict, "image": Image.Image, "text": str}[kind]
        assert all(isinstance(each, expected) for batch in batches for each in batch)
        assert view_of(part.rows) is not None


def test_a_router_trains_on_a_mixed_corpus_and_says_what_each_kind_scores(tmp_path):
    model = compose_router(
        tiny_text_encoder(tmp_path / "text"),
        tiny_siglip(tmp_path / "siglip"),
        audio=tiny_ast(tmp_path / "ast"),
        device="cpu",
    )
    train, evaluation = RetrievalDataset.from_id_rows(mixed_rows(10)).split(12)
    result = finetune(
        model,
        train,
        evaluation,
        documents="mixed",
        output_dir=tmp_path / "run",
        max_steps=3,
        per_device_train_batch_size=4,
        matryoshka_dims=None,
    )
    key = result.primary_metric
    kinds = [name.removeprefix(f"{key}_") for name in result.after if name.startswith(f"{key}_")]
    assert kinds == ["audio", "image", "text"]
    assert 0 <= result.after["vdr_cosine_one-kind@10"] <= 1
    per_query = build_evaluator(evaluation, documents="mixed", show_progress_bar=False)
    again = per_query(SentenceTransformer(str(result.output_dir / "final"), device="cpu"))
    assert again == pytest.approx({name: result.after[name] for name in again}, abs=1e-6)


def test_a_gap_between_kinds_shows():
    data = RetrievalDataset.from_id_rows(mixed_rows(12))
    evaluator = build_evaluator(data, documents="mixed", show_progress_bar=False)

    class Apart:
        """Embeds queries and texts at one end and all else at the other."""

        similarity_fn_name = "cosine"
        model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *args, **options: None)

        def get_embedding_dimension(self):
            return 2

        def encode_query(self, inputs, **options):
            return torch.tensor([[1.0, 0.0]] * len(inputs))

        def encode_document(self, inputs, **options):
            is_text = [isinstance(each, dict) and "text" in each for each in inputs]
            return torch.tensor([[1.0, 0.0] if each else [0.0, 1.0] for each in is_text])

        def similarity(self, one, other):
            return one @ other.T

    metrics = evaluator(Apart())
    assert metrics["vdr_cosine_ndcg@10_text"] > 0.2
    assert metrics["vdr_cosine_ndcg@10_image"] == metrics["vdr_cosine_ndcg@10_audio"] == 0
    assert metrics["vdr_cosine_one-kind@10"] == 1


@pytest.mark.usefixtures("qwen3_vl_path")
def test_a_model_that_reads_messages_gets_mixed_batches(qwen3_vl_path):
    from mmtune.models.loading import takes_mixed

    assert takes_mixed(qwen3_vl_path)
    model = load_model(qwen3_vl_path, device="cpu", max_frames=4)
    rows = generated_clips(3).select_columns(["id", "query", "video"])
    pages = with_encoded_images(generated_pages(3).select_columns(["id", "query", "image"]), "image")
    data = RetrievalDataset.from_id_rows(concatenate_datasets([rows, pages]))
    metrics = build_evaluator(data, documents="mixed", show_progress_bar=False)(model)
    assert {"vdr_cosine_ndcg@10_image", "vdr_cosine_ndcg@10_video"} <= metrics.keys()


@pytest.mark.usefixtures("qwen3_vl_path")
def test_a_clip_encoder_gets_as_many_frames_as_it_takes(tmp_path):
    model = compose_router(
        tiny_text_encoder(tmp_path / "text"), video=tiny_videomae(tmp_path / "videomae"), device="cpu"
    )
    data = own_rows(generated_clips(3), "video")
    evaluator = build_evaluator(data, documents="video", show_progress_bar=False)
    assert evaluator.encode(model).corpus.shape == (3, 64)


# Queries that are images, and what is written of a run


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    sides = tiny_text_encoder(folder / "text"), tiny_siglip(folder / "siglip")
    return compose_router(*sides, audio=tiny_ast(folder / "ast"))


def photos_that_ask(n: int) -> RetrievalDataset:
    ids, sounds = [f"d{at}" for at in range(n)], generated_audio(n)
    photos = with_encoded_images(generated_pages(n).select(range(n)), "image")
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "audio": [each["bytes"] for each in sounds["audio"]]}),
        Dataset.from_dict({"query_id": ids, "image": [each["bytes"] for each in photos["image"]]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * n}),
    )


@pytest.mark.filterwarnings("ignore:layout='columns' has no place")
@pytest.mark.parametrize("layout", ["beir", "id_rows", "columns", "tevatron"])
def test_photos_that_ask_for_sounds_are_exported(tmp_path, layout):
    photos_that_ask(3).export(tmp_path / "out", layout=layout)
    found = RetrievalDataset.load(tmp_path / "out")
    assert (found.corpus.features["audio"].decode, found.queries.features["image"].decode) == (False, False)
    assert found.queries[0]["image"]["bytes"] == photos_that_ask(3).queries[0]["image"]["bytes"]
    assert found.corpus[0]["audio"]["bytes"] == photos_that_ask(3).corpus[0]["audio"]["bytes"]


def test_a_photo_finds_the_sound(router, tmp_path):
    data = photos_that_ask(4)
    row = data.training_rows(documents="audio", queries="image")[0]
    assert isinstance(row["query"], Image.Image)
    assert row["image"].keys() == {"audio"}
    choice = {"documents": "audio", "queries": "image", "num_negatives": 0, "allow_overlap": True, "max_steps": 1}
    result = finetune(router, data, data, output_dir=tmp_path, **choice)
    assert result.settings["data"]["queries"] == "image"
    assert "vdr_cosine_ndcg@10" in result.after
    assert result.settings["evaluation"]["largest_change_by_batch_size"] < 1e-5


@pytest.mark.parametrize("queries", ["audio", "video", "mixed"])
def test_sounds_clips_and_mixed_queries_are_refused_by_name(queries):
    with pytest.raises(ConfigError, match=rf"queries='{queries}' is unknown\. Expected one of 'text', 'image'"):
        photos_that_ask(2).training_rows(documents="audio", queries=queries)


def test_mixed_sets_of_other_kinds_have_a_mean_of_what_both_have(router):
    mixed, sounds = RetrievalDataset.from_id_rows(mixed_rows(3)), own_rows(generated_audio(3, seed=5), "audio")
    found = build_evaluator({"mixed": mixed, "sounds": sounds}, model=router, documents="mixed")(router)
    means = {key for key in found if key.startswith("vdr-mean_")}
    assert {"vdr-mean_cosine_ndcg@10", "vdr-mean_cosine_ndcg@10_audio"} <= means
    assert "vdr-mean_cosine_ndcg@10_image" not in means
    parts = [found[f"vdr-{name}_cosine_ndcg@10_audio"] for name in ("mixed", "sounds")]
    assert found["vdr-mean_cosine_ndcg@10_audio"] == pytest.approx(np.mean(parts))


def test_of_mixed_documents_the_report_shows_what_can_be_shown():
    gallery = pytest.importorskip("mmtune.report.gallery")
    data = RetrievalDataset.from_id_rows(mixed_rows(2))
    shown = gallery.Gallery({"": data}, "mixed", "text_to_image", thumbnails=True)
    ids, first = data.corpus["document_id"][:], {}
    for each, kind in zip(shown.show_documents(ids), kinds_of_documents(data.corpus, "mixed"), strict=True):
        first.setdefault(kind, each)
    page, sound, passage = first["image"], first["audio"], first["text"]
    assert page.picture is not None
    assert (sound.picture, sound.text) == (None, "")
    assert passage.text == "0 is a number"


def test_what_takes_no_sounds_says_so():
    sounds = own_rows(generated_audio(3), "audio")
    pytest.importorskip("mteb")
    with pytest.raises(ConfigError, match=r"documents='audio' is unknown\. Expected one of 'image', 'text'"):
        as_mteb_task(sounds, name="sounds", documents="audio")
    with pytest.raises(ConfigError, match="documents='audio': rerankers read texts"):
        evaluate_pipeline("no-retriever", "no-reranker", sounds, documents="audio")
