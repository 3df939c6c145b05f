"""Models of random weights must learn to find sounds and clips that they have not heard or seen. ``make slow``."""

import sys
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer

from mmtune import FinetuneResult, RetrievalDataset, compose_router, finetune, load_model
from mmtune.data.arrow import with_encoded_images
from mmtune.data.clips import Clip
from mmtune.testing import (
    generated_audio,
    generated_clips,
    generated_pages,
    tiny_ast,
    tiny_clap,
    tiny_siglip,
    tiny_text_encoder,
    tiny_videomae,
)

pytest.importorskip("soundfile")
pytest.importorskip("av")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BARE = {"warmup_steps": 10, "matryoshka_dims": None, "eval_strategy": "no", "save_strategy": "no", "num_negatives": 0}
NUM_CLIPS, CLIPS_A_KIND, KINDS = 32 * 24, 24, 32


def learn_sounds(model: SentenceTransformer, folder: Path, *, steps: int, rate: float) -> FinetuneResult:
    """256 combinations of contour, pitch, timbre and beats are trained, two sounds each; 64 others are asked for."""
    rows = generated_audio(576)
    train = RetrievalDataset.from_id_rows(rows.select([*range(256), *range(320, 576)]), negatives_column=None)
    unseen = RetrievalDataset.from_id_rows(rows.select(range(256, 320)), negatives_column=None)
    return finetune(
        model,
        train,
        unseen,
        documents="audio",
        output_dir=folder / "run",
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=64,
        load_best_model_at_end=False,
        **BARE,
    )


def test_a_router_learns_to_find_sounds_it_has_not_heard(tmp_path):
    model = compose_router(tiny_text_encoder(tmp_path / "text"), audio=tiny_ast(tmp_path / "ast"), device="cpu")
    result = learn_sounds(model, tmp_path, steps=128, rate=2e-3)
    before, after = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    assert before < 0.2
    assert after >= 0.8


def test_clap_learns_to_find_sounds_it_has_not_heard(tmp_path):
    result = learn_sounds(load_model(tiny_clap(tmp_path / "clap"), device="cpu"), tmp_path, steps=300, rate=1e-3)
    after = result.after[result.primary_metric]
    assert after >= 0.7
    loaded = SentenceTransformer(str(result.output_dir / "final"), device="cpu")
    sound = {"audio": {"array": np.sin(np.arange(16_000) / 10).astype(np.float32), "sampling_rate": 16_000}}
    assert np.array_equal(loaded.encode_document([sound]), result.model.encode_document([sound]))


def test_motion_is_learned_and_no_single_frame_tells_it(tmp_path):
    rows = generated_clips(NUM_CLIPS + 4 * KINDS)
    model = compose_router(
        tiny_text_encoder(tmp_path / "text"), video=tiny_videomae(tmp_path / "videomae"), device="cpu"
    )
    finetune(
        model,
        RetrievalDataset.from_id_rows(rows.select(range(NUM_CLIPS)), negatives_column=None),
        documents="video",
        output_dir=tmp_path / "run",
        max_steps=240,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        **BARE,
    )
    unseen = rows.select(range(NUM_CLIPS, len(rows)))
    clips = [Clip(each, "a clip").decode() for each in unseen["video"][:]]
    generator = np.random.default_rng(0)
    shuffled = [{**clip, "array": generator.permutation(clip["array"])} for clip in clips]
    still = [{**clip, "array": np.repeat(clip["array"][:1], 8, axis=0)} for clip in clips]
    right = {
        name: share_of_right_motions(model, given, unseen["query"][:])
        for name, given in {"as they are": clips, "shuffled": shuffled, "one frame": still}.items()
    }
    assert right["as they are"] >= 0.8
    assert right["shuffled"] <= 0.4
    assert right["one frame"] <= 0.4


def share_of_right_motions(model: SentenceTransformer, clips: list[dict], queries: list[str]) -> float:
    """How often the text that is nearest to a clip says its motion; a quarter by chance."""
    texts = sorted(set(queries))
    found = model.encode_document([{"video": clip} for clip in clips], convert_to_tensor=True)
    nearest = torch.argmax(found @ model.encode_query(texts, convert_to_tensor=True).T, dim=1).tolist()
    pairs = zip((texts[at] for at in nearest), queries, strict=True)
    return float(np.mean([said.split()[-2:] == query.split()[-2:] for said, query in pairs]))


def generated_passages(n: int) -> Dataset:
    """Sentences and questions that have three words in common, of 288 combinations."""
    animals = product(
        ("quiet", "brave", "clever", "hungry", "sleepy", "golden", "silver", "wooden"),
        ("fox", "owl", "bear", "heron", "otter", "lynx"),
        ("harbour", "castle", "orchard", "station", "library", "meadow"),
    )
    chosen = Random(0).sample([*animals], n)
    return Dataset.from_dict(
        {
            "id": ["-".join(each) for each in chosen],
            "query": [f"Who saw the {look} {animal} at the {place}?" for look, animal, place in chosen],
            "text": [f"At the {place} lives a {animal}, and it is {look}." for look, animal, place in chosen],
        }
    )


def mixed_corpora() -> tuple[RetrievalDataset, RetrievalDataset]:
    """Passages, pages, sounds and clips that are trained, and others to be asked for in one corpus.

    As many of each kind as it takes to learn it: a kind has its share of the batches by its rows.
    """
    pages = with_encoded_images(generated_pages(432).select_columns(["id", "query", "image"]), "image")
    pages = pages.filter(lambda query: query is not None, input_columns="query")
    sounds = generated_audio(576).select_columns(["id", "query", "audio"])
    sounds = sounds.select([*range(256), *range(320, 576), *range(256, 304)])  # the last combinations are heard once
    clips = generated_clips(512 + 32).select_columns(["id", "query", "video"])
    files = [each["bytes"] for each in clips["video"][:]]
    clips = clips.select([at for at, file in enumerate(files) if at < 512 or file not in files[:512]])
    trained = {"text": 128, "image": 384, "audio": 512, "video": 512}
    rows = dict(zip(trained, (generated_passages(128 + 48), pages, sounds, clips), strict=True))
    train = concatenate_datasets([rows[kind].select(range(count)) for kind, count in trained.items()])
    unseen = concatenate_datasets([rows[kind].select(range(count, len(rows[kind]))) for kind, count in trained.items()])
    return tuple(RetrievalDataset.from_id_rows(each) for each in (train, unseen))


@pytest.mark.filterwarnings("ignore:Training has seen a part of the evaluation:UserWarning")  # clips have 32 queries
def test_four_routes_learn_a_mixed_corpus(tmp_path, capsys):
    train, unseen = mixed_corpora()
    model = compose_router(
        tiny_text_encoder(tmp_path / "text", hidden_size=128),
        tiny_siglip(tmp_path / "siglip", hidden_size=256, image_size=128, patch_size=32),
        audio=tiny_ast(tmp_path / "ast"),
        video=tiny_videomae(tmp_path / "videomae"),
        dimension=128,
        device="cpu",
    )
    result = finetune(
        model,
        train,
        unseen,
        documents="mixed",
        output_dir=tmp_path / "run",
        max_steps=576,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        load_best_model_at_end=False,
        **BARE,
    )
    by_kind = {kind: f"{result.primary_metric}_{kind}" for kind in ("text", "image", "audio", "video")}
    learned = {kind: (round(result.before[key], 3), round(result.after[key], 3)) for kind, key in by_kind.items()}
    with capsys.disabled():
        sys.stdout.write(f"\nnDCG@10 before and after: {learned}\n")
    assert min(after for _, after in learned.values()) >= 0.6
    assert max(before for kind, (before, _) in learned.items() if kind != "text") <= 0.2
    loaded = SentenceTransformer(str(result.output_dir / "final"), device="cpu")
    row_of_each = unseen.training_rows(0, documents="mixed", sampling_rate=16_000)[:]
    inputs_by_kind: dict[object, list] = {}
    for each in row_of_each["image"]:
        inputs_by_kind.setdefault(next(iter(each)) if isinstance(each, dict) else type(each), []).append(each)
    assert len(inputs_by_kind) == 4
    for inputs in inputs_by_kind.values():
        assert np.array_equal(loaded.encode_document(inputs), result.model.encode_document(inputs))
    assert np.array_equal(loaded.encode_query(row_of_each["query"]), result.model.encode_query(row_of_each["query"]))
