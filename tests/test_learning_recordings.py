"""Models of random weights must learn to find sounds and clips that they have not heard or seen. ``make slow``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from mmtune import FinetuneResult, RetrievalDataset, compose_router, finetune, load_model
from mmtune.data.clips import Clip
from mmtune.testing import generated_audio, generated_clips, tiny_ast, tiny_clap, tiny_text_encoder, tiny_videomae

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
