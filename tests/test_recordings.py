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
from transformers import AutoModel, AutoVideoProcessor

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
    build_late_interaction,
    build_reranker,
    build_reranking_evaluator,
    compose_router,
    evaluate_pipeline,
    finetune,
    finetune_reranker,
    generate_queries,
    judge_negatives,
    load_model,
    mine_hard_negatives,
)
from mmtune.arguments import MODALITIES, MediaLimits
from mmtune.data.arrow import with_encoded_images
from mmtune.data.clips import Clip
from mmtune.data.documents import kinds_of_documents
from mmtune.data.findings import LOOKED_FOR
from mmtune.data.identity import match_documents
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


def clip_of(num_frames: int, path, *, seconds_of_sound: float = 0) -> bytes:
    """A clip of frames that brighten, each a key frame, its header first; beside a silence where one is asked for."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0", "g": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "rgb24"
        if seconds_of_sound:
            audio = container.add_stream("pcm_s16le", rate=8_000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, int(8_000 * seconds_of_sound)), np.int16), layout="mono")
            silence.sample_rate = 8_000
            container.mux([*audio.encode(silence), *audio.encode()])
        noise = np.random.default_rng(0).integers(0, 2, (num_frames, 64, 64, 3), dtype=np.uint8)
        for at in range(num_frames):
            frame = av.VideoFrame.from_ndarray(noise[at] + np.uint8(2 * at), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("limits", [{}, {"max_frames": 4}, {"num_frames": 16}])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_clip_that_is_cut_off_is_named_with_what_is_there(kind, limits, tmp_path):
    whole = clip_of(60, tmp_path / f"clip.{kind}")
    assert of(whole, kind=Clip).decode(MediaLimits(**limits))["video_metadata"]["total_num_frames"] == 60
    problem = r"(is cut off: its header promises 60 frames in 7.5 s, and there is none at|can't be decoded)"
    for share in (0.3, 0.6):
        with pytest.raises(MediaDecodeError, match=rf"Document \"d'ö/1\" {problem}"):
            of(whole[: int(share * len(whole))], kind=Clip).decode(MediaLimits(**limits))
        with pytest.raises(MediaDecodeError, match=problem):
            of(whole[: int(share * len(whole))], kind=Clip).check()


@pytest.mark.parametrize("kind", ["mkv", "mov"])
@pytest.mark.parametrize("seconds", [4, 60])
def test_a_clip_beside_a_longer_sound_is_read_evenly_and_in_full(seconds, kind, tmp_path):
    clip = of(clip_of(8, tmp_path / f"clip.{kind}", seconds_of_sound=seconds), kind=Clip)
    clip.check()
    found = clip.decode(MediaLimits(max_frames=4))
    assert [int(frame.min()) // 2 for frame in found["array"]] == [0, 2, 4, 6]
    assert found["video_metadata"]["total_num_frames"] == 8
    assert clip.decode()["array"].shape[0] == 8


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


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16", "int32"])
def test_samples_beside_their_rate_are_sounds_of_the_same_numbers(dtype):
    wave_form = np.sin(np.arange(4_000) / 10) * (20_000 if dtype.startswith("int") else 1)
    samples = wave_form.astype(dtype)
    rows = [{"array": samples, "sampling_rate": 8_000}, None, {"array": samples[::-1], "sampling_rate": 8_000.0}]
    table = Dataset.from_dict(
        {"id": ["a", "b", "c"], "query": ["one", None, "two"], "audio": rows, "text": [None, "b", None]}
    )
    shuffled = table.select([2, 0])
    data = RetrievalDataset.from_id_rows(shuffled, negatives_column=None)
    found = data.training_rows(0, documents="audio")[0]["image"]["audio"]
    scale = np.iinfo(dtype).max + 1 if dtype.startswith("int") else 1
    assert found["sampling_rate"] == 8_000
    assert np.array_equal(found["array"], (samples[::-1] / scale).astype(np.float32))
    twice = RetrievalDataset.from_columns(table.select([0, 0]).remove_columns(["id", "text"]))
    assert twice.relevance.page.tolist() == [0, 0]
    asking = (
        table.select([0, 2]).remove_columns("query").rename_column("audio", "query").add_column("image", [b"x", b"y"])
    )
    assert RetrievalDataset.from_id_rows(asking, negatives_column=None).queries[1]["audio"]["bytes"][:4] == b".snd"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([[0.1, 0.2]], "Samples stand beside their rate"),
        ([{"array": [[0.1], [0.2]], "sampling_rate": 8_000}], "holds arrays of list.*mean of the channels"),
        ([{"array": [1, 2], "sampling_rate": 8_000}], "holds arrays of int64"),
        ([{"array": ["a"], "sampling_rate": 8_000}], "holds arrays of string"),
        *(
            ([{"array": [0.1], "sampling_rate": rate}], f"sampling_rate={rate!r}")
            for rate in (0, -1, None, "8", 0.5, 1e9)
        ),
        ([{"array": [0.1], "sampling_rate": float("nan")}], "sampling_rate=nan"),
        ([{"array": [0.1, -20_000.0], "sampling_rate": 8_000}], "samples of up to 20000, expected floats from -1 to 1"),
    ],
)
def test_samples_that_are_no_sound_are_named(values, problem):
    with pytest.raises(DatasetError, match=rf"Column 'audio' .*{problem}"):
        dataset("audio", values)


def test_arrays_without_samples_and_with_nan_are_named_where_they_are_read():
    for array, problem in (
        ([], "'d0' has 0 samples"),
        ([float("nan")] * 800, "'d0' holds samples that are not finite"),
    ):
        data = dataset("audio", [{"array": np.array(array, np.float32), "sampling_rate": 8_000}])
        with pytest.raises(MediaDecodeError, match=problem):
            data.check_pages(show_progress_bar=False)


def test_frames_in_a_table_are_refused_with_what_to_do():
    frames = {"array": np.zeros((2, 4, 4, 3), np.uint8), "video_metadata": {"fps": 2.0}}
    for values in ([frames], [[b"a", b"b"]]):
        with pytest.raises(DatasetError, match=r"Column 'video' .*Frames that are decoded are not read: encode them"):
            dataset("video", values)


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


def test_sounds_and_passages_may_share_a_table():
    rows = mixed_rows(3).remove_columns("image").filter(lambda row: row["audio"] or row["text"])
    data = RetrievalDataset.from_id_rows(rows)
    data.check_pages(documents="mixed", show_progress_bar=False)
    assert kinds_of_documents(data.corpus, "mixed") == ["audio"] * 3 + ["text"] * 3
    with pytest.raises(MediaDecodeError, match="'t0' has no audio"):
        data.check_pages(documents="audio", show_progress_bar=False)
    report = data.audit(content=True, against=data.select_queries(["t0"]), show_progress_bar=False)
    assert not {"damaged_recordings", "unread_answers"} & {each.key for each in report.findings if each.count}
    blank = rows.map(lambda row: {"text": None if row["id"] == "t1" else row["text"]})
    with pytest.raises(DatasetError, match=r"1 rows have no audio.*'t1'"):
        RetrievalDataset.from_id_rows(blank)
    pages = mixed_rows(2).remove_columns("audio").filter(lambda row: row["image"] or row["text"])
    with pytest.raises(DatasetError, match=r"2 rows have no image.*by RetrievalDataset\.concatenate"):
        RetrievalDataset.from_id_rows(pages)


@pytest.mark.parametrize("layout", ["beir", "id_rows", "columns"])
def test_a_column_that_would_be_read_back_as_negatives_is_not_written(layout, tmp_path):
    data = RetrievalDataset.from_id_rows(generated_audio(4), negatives_column=None)
    with pytest.raises(DatasetError, match=r"no negatives, and a column 'negatives' that load\(\) would take for them"):
        data.export(tmp_path / "out", layout)


@pytest.mark.parametrize("ask", [generate_queries, judge_negatives])
def test_a_generator_is_asked_about_no_sound(ask):
    asked = []
    with pytest.raises(DatasetError, match=r"12 documents are sounds or clips alone, e\.g\. 'falling-"):
        ask(RetrievalDataset.from_id_rows(generated_audio(12)), lambda *given: asked.append(given) or "a query")
    assert not asked


def test_an_empty_kind_is_no_kind():
    with pytest.raises(ConfigError, match="documents=''"):
        RetrievalDataset.from_id_rows(generated_audio(4)).split(1, documents="")


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


def as_flac(content: bytes) -> bytes:
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC")
    return buffer.getvalue()


def remuxed(content: bytes) -> bytes:
    """The same packets of a clip in Matroska."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(buffer, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return buffer.getvalue()


def test_an_audit_hears_silence_damage_and_the_same_samples_in_another_file():
    sounds = [tone(), tone(hertz=300), tone(0.5, hertz=0), as_flac(tone()), tone()[:20], tone(0.01), tone(0.5), tone()]
    data = dataset("audio", [*sounds])
    report = data.audit(content=True, show_progress_bar=False)
    named = {
        key: [each.document_ids for each in report[key].examples] for key in ("damaged_recordings", "silent_sounds")
    }
    assert named == {"damaged_recordings": [("d4",), ("d5",)], "silent_sounds": [("d2",)]}
    assert [each.document_ids for each in report["same_recordings"].examples] == [("d0", "d3", "d7")]
    assert (report["same_recordings"].count, report["still_clips"].count, report["damaged_pages"].count) == (2, 0, 0)
    kept = data.without([report[key] for key in ("damaged_recordings", "silent_sounds", "same_recordings")])
    assert kept.corpus["document_id"][:] == ["d0", "d1", "d6"]
    assert {*kept.qrels["document_id"]} == {"d0", "d1", "d6"}


def test_an_audit_sees_clips_that_stand_still_and_the_same_frames_in_another_file(tmp_path):
    moving = generated_clips(2)["video"]
    still = clip_of(1, tmp_path / "still.mp4")
    clips = [moving[0]["bytes"], still, remuxed(moving[0]["bytes"]), moving[1]["bytes"], b"none"]
    report = dataset("video", clips).audit(content=True, show_progress_bar=False)
    found = {
        key: [each.document_ids for each in report[key].examples]
        for key in LOOKED_FOR["content=True"]
        if report[key].count
    }
    assert found.pop("short_queries")
    assert found == {"damaged_recordings": [("d4",)], "still_clips": [("d1",)], "same_recordings": [("d0", "d2")]}


def test_what_else_a_document_has_keeps_it_from_being_the_same():
    texts = ["one", "another", "one"]
    data = dataset("audio", [tone(), as_flac(tone()), as_flac(tone())], text=texts)
    assert data.audit(content=True, show_progress_bar=False)["same_recordings"].count == 0
    once = dataset("audio", [tone(), as_flac(tone())], text=texts[::2])
    assert once.audit(content=True, show_progress_bar=False)["same_recordings"].count == 1
    words = " ".join(f"word{at}" for at in range(30))
    spoken = dataset(
        "audio", [tone(), tone(hertz=300), None, None], text=[words, words, words + " more", words + " more"]
    )
    copies = spoken.audit(content=True, show_progress_bar=False)["near_copies"]
    assert [each.document_ids for each in copies.examples] == [("d2", "d3")]


def test_leaks_are_found_by_samples_and_of_passages_by_their_text():
    corpus = {"text": [None, None, "a passage", "a passage that is elsewhere"]}
    train = dataset("audio", [tone(), tone(hertz=300), None, None], **corpus)
    corpus = {"text": ["a passage", None, "another", None], "image": [None, None, None, b"no page"]}
    evaluation = dataset("audio", [None, as_flac(tone()), None, None], **corpus)
    report = train.audit(content=True, against=evaluation, show_progress_bar=False)
    pairs = {
        key: [each.document_ids for each in report[key].examples] for key in ("leaked_documents", "leaked_near_copies")
    }
    assert pairs == {"leaked_documents": [("d2", "d0")], "leaked_near_copies": [("d0", "d1")]}
    assert [each.document_ids for each in report["unread_answers"].examples] == [("d3",)]
    assert report["damaged_pages"].count == 0
    everything = np.arange(4)
    assert match_documents(train.corpus, evaluation.corpus, everything, everything) == [(2, 0)]


@pytest.mark.parametrize("kind", ["audio", "video", "mixed"])
def test_a_split_keeps_equal_documents_on_one_side(kind):
    made = {"audio": generated_audio, "video": generated_clips, "mixed": mixed_rows}[kind](4)
    rows = concatenate_datasets([made, made.select(range(len(made)))])
    ids = [f"r{at}" for at in range(len(rows))]
    names = [name for name in ("audio", "video", "image", "text") if name in made.column_names]
    rows = rows.select_columns(names).add_column("id", ids).add_column("query", [f"query {each}" for each in ids])
    data = RetrievalDataset.from_id_rows(rows)
    half = len(made)
    page = data.relevance_of(kind).page
    assert page[half:].tolist() == [*range(half)]
    for train, evaluation in (data.split(2), data.split(2, documents=kind)):
        sides = [{page[ids.index(each)] for each in side.qrels["document_id"]} for side in (train, evaluation)]
        assert not sides[0] & sides[1]
    assert len(data.deduplicate(documents=kind).corpus) == half


def test_equal_passages_beside_sounds_are_one_where_that_is_said():
    data = dataset("audio", [tone(), tone(hertz=300), None, None], text=[None, None, "same", "same"])
    assert data.relevance_of("mixed").page.tolist() == [0, 1, 2, 2]
    for seed in range(6):
        train, evaluation = data.split(1, documents="mixed", seed=seed)
        assert not ({"d2", "d3"} & {*train.qrels["document_id"]} and {"d2", "d3"} & {*evaluation.qrels["document_id"]})


def test_texts_of_mixed_corpora_that_are_cut_are_said(listener, caplog):
    data = dataset("audio", [tone(), None], text=[None, "a very long passage " * 200])
    build_evaluator(data, documents="mixed", show_progress_bar=False)(load_model(listener, device="cpu"))
    assert "1 of 1 documents have more tokens than" in caplog.text


# Models


def test_clap_is_the_same_after_texts_and_loading(tmp_path):
    model = load_model(tiny_clap(tmp_path / "clap"), device="cpu", max_seconds=0.75)
    sound = {"audio": Sound({"bytes": tone(0.75), "path": None}, "d").decode()}
    before = model.encode_document([sound])
    model.encode_query(["a text " * 50])
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(loaded.encode_document([sound]), before)
    assert media_limits_of(load_model(tmp_path / "saved", device="cpu")[0], "audio").max_seconds == 0.75


@pytest.mark.parametrize("maker", [tiny_ast, tiny_whisper, tiny_clap])
def test_a_model_says_at_what_rate_and_for_how_long_it_listens(maker, tmp_path):
    limits = media_limits_of(load_model(maker(tmp_path / "model"), device="cpu")[0], "audio")
    assert limits.sampling_rate == 16_000
    assert limits.max_seconds == pytest.approx(1.0, abs=0.06)


def test_what_a_model_can_not_take_is_refused_by_name_before_weights(tmp_path):
    clap = without_weights(tiny_clap(tmp_path / "whole"), tmp_path / "clap")
    clips, sounds = own_rows(generated_clips(4), "video"), own_rows(generated_audio(4), "audio")
    with pytest.raises(ConfigError, match=r"embeds no clips, only audio, text \(model type clap\)"):
        finetune(clap, clips, documents="video", output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="embeds no images, only audio, text"):
        finetune(clap, RetrievalDataset.from_id_rows(mixed_rows(4)), documents="mixed", output_dir=tmp_path / "run")
    text = without_weights(tiny_text_encoder(tmp_path / "bert"), tmp_path / "text")
    with pytest.raises(ConfigError, match=r"embeds no sounds, only text"):
        finetune(text, sounds, documents="audio", output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="given as audio="):
        compose_router(tmp_path / "bert", audio=text)
    with pytest.raises(ConfigError, match="Pass image=, audio= or video="):
        compose_router(tmp_path / "bert")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("qwen3_vl_path")  # torchvision
def test_an_encoder_of_clips_that_lies_beside_an_image_processor_is_told_what_to_save(tmp_path):
    folder = tiny_videomae(tmp_path / "videomae")
    for file in (tmp_path / "videomae").glob("*processor*.json"):
        file.unlink()
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    config = {"image_processor_type": "VideoMAEImageProcessor", **sizes}
    (tmp_path / "videomae" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"embeds no clips, only image .*the one that AutoVideoProcessor makes"):
        compose_router(tiny_text_encoder(tmp_path / "text"), video=folder)
    for of_folder in (AutoModel, AutoVideoProcessor):
        of_folder.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert compose_router(tmp_path / "text", video=tmp_path / "saved", device="cpu").supports("video")


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


def test_a_run_goes_on_with_the_limits_that_it_was_begun_with(listener, tmp_path):
    def run(max_seconds: float, **options: bool):
        model = load_model(listener, device="cpu", max_seconds=max_seconds)
        steps = {"max_steps": 1, "per_device_train_batch_size": 4, "matryoshka_dims": None}
        data = own_rows(generated_audio(4), "audio")
        return finetune(model, data, documents="audio", output_dir=tmp_path, **steps, **options)

    assert run(0.5).settings["model"]["media_limits"] == {"audio": {"max_seconds": 0.5, "sampling_rate": 16_000}}
    with pytest.raises(ConfigError, match=r"begun with other settings: limits of the model.*0\.5.*then.*0\.25.*now"):
        run(0.25, resume=True)
    assert run(0.5, resume=True).trainer.state.global_step == 1


def test_a_run_goes_on_with_rows_that_are_read_as_they_were(listener, tmp_path):
    steps = {"max_steps": 1, "per_device_train_batch_size": 4, "matryoshka_dims": None, "output_dir": tmp_path}
    data, model = own_rows(generated_audio(4), "audio"), load_model(listener, device="cpu")
    finetune(model, data.training_rows(0, documents="audio", max_seconds=0.5), documents="audio", **steps)
    rows = data.training_rows(0, documents="audio", max_seconds=0.25)
    with pytest.raises(ConfigError, match=r"other settings: training data.*'max_seconds': 0\.5.*then.*0\.25.*now"):
        finetune(model, rows, documents="audio", resume=True, **steps)


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
        for direction in ("text_to_image", "image_to_text", "text_to_video", "video_to_text")
    }
    scores = {direction: evaluator(reranker) for direction, evaluator in evaluators.items()}
    assert 0 < scores["text_to_image"]["vdr-rerank_ndcg@10"] <= 1
    assert scores["text_to_image"] == scores["text_to_video"] != scores["image_to_text"] == scores["video_to_text"]
    choice = {"documents": "video", "directions": ("text_to_video", "video_to_text"), "allow_overlap": True}
    one_step = {"max_steps": 1, "per_device_train_batch_size": 4, "num_negatives": 1}
    prompts = {"video_to_text": "Does the text say what moves?"}
    result = finetune_reranker(
        qwen3_vl_path, data, data, output_dir=tmp_path / "run", prompts=prompts, **choice, **one_step
    )
    assert {f"vdr-rerank-{each}_ndcg@10" for each in ("text-to-video", "video-to-text", "mean")} <= result.after.keys()
    assert result.model.prompts["image_to_text"] == prompts["video_to_text"]
    made = encoder.preprocess
    clip = Clip(data.corpus[0]["video"], "d").decode()
    with reading_pages(reranker):
        both = encoder.preprocess([["a text", {"video": clip}], [{"video": clip}, "a text"]])
    assert both["video_grid_thw"].tolist() == [[4, 4, 4]] * 2
    assert made == encoder.preprocess


# Mixed corpora


def test_routes_get_batches_of_one_kind_that_hold_every_row():
    data = RetrievalDataset.from_id_rows(mixed_rows(8))
    sets = training_sets(data, num_negatives=0, documents="mixed", seed=0, apart=MODALITIES)
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
@pytest.mark.parametrize("build", [build_reranker, build_late_interaction])
def test_limits_go_into_every_kind_of_model(build, qwen3_vl_path, tmp_path):
    model = build(qwen3_vl_path, device="cpu", max_frames=2, fps=1)
    model.save_pretrained(str(tmp_path / "saved"))
    saved = build(tmp_path / "saved", device="cpu")
    assert media_limits_of(saved[0], "video").given() == {"max_frames": 2, "fps": 1, "max_pixels": 128 * 128}
    assert saved[0].processing_kwargs["video"]["do_sample_frames"] is False
    with pytest.raises(ConfigError, match="max_frames='2': expected None or a whole number"):
        build(qwen3_vl_path, max_frames="2")


@pytest.mark.usefixtures("qwen3_vl_path")
def test_a_limit_of_pixels_bounds_the_frames_of_a_language_model(qwen3_vl_path, tmp_path):
    clip = of(generated_clips(1)[0]["video"]["bytes"], kind=Clip)

    def grid(model: SentenceTransformer) -> list[list[int]]:
        encoder = next(module for module in model.modules() if isinstance(module, Transformer))
        with reading_pages(model):
            return encoder.preprocess([{"video": clip}])["video_grid_thw"].tolist()

    limited = load_model(qwen3_vl_path, device="cpu", max_pixels=32 * 32)
    assert grid(limited) == [[4, 2, 2]]
    limited.save_pretrained(str(tmp_path / "saved"))
    assert grid(load_model(tmp_path / "saved", device="cpu")) == [[4, 2, 2]]
    whole = load_model(qwen3_vl_path, device="cpu")
    assert grid(whole) == [[4, 4, 4]]
    data = own_rows(generated_clips(4), "video")
    steps = {"max_steps": 1, "per_device_train_batch_size": 2, "num_negatives": 0, "matryoshka_dims": None}
    result = finetune(whole, data, documents="video", output_dir=tmp_path / "run", max_pixels=32 * 32, **steps)
    assert grid(result.model) == [[4, 2, 2]]
    with pytest.warns(UserWarning, match="max_pixels=1024 is not applied"):
        fixed = load_model(tiny_videomae(tmp_path / "videomae"), device="cpu", max_pixels=32 * 32)
    assert media_limits_of(fixed[0], "video").max_pixels is None


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


@pytest.mark.parametrize("queries", ["video", "mixed"])
def test_clips_and_mixed_queries_are_refused_by_name(queries):
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
