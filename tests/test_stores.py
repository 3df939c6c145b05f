"""Damaged files of `EmbeddingStore` and `ScoreStore`: logged, left out, and made again."""

import json
import logging

import numpy as np
import pytest
import torch

from mmtune import ConfigError
from mmtune.inference.store import EmbeddingStore, Pair, ScoreStore

MANIFEST = "mmtune_scores.json"
PAIRS = [Pair("q1", "d1"), Pair("q2", "d2")]


def scored(folder):
    """A store with a file for each pair."""
    store = ScoreStore(folder, "teacher")
    for number, pair in enumerate(PAIRS):
        store.add([pair], [f"content {number}"], [float(number)])
    return store


@pytest.mark.parametrize("kept_bytes", [0, 50])
def test_a_truncated_file_of_scores_is_made_again(tmp_path, caplog, kept_bytes):
    scored(tmp_path)
    damaged = sorted(tmp_path.glob("scores-*.parquet"))[0]
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])
    store = ScoreStore(tmp_path, "teacher")
    assert store.score_by_content == {"content 1": 1.0}
    assert f"{damaged} can't be read" in caplog.text
    store.add([PAIRS[0]], ["content 0"], [0.0])
    assert ScoreStore(tmp_path, "teacher").score_by_content == {"content 0": 0.0, "content 1": 1.0}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"teacher": "teacher"}'])
def test_a_damaged_manifest_is_written_again_where_there_are_no_scores(tmp_path, caplog, damage):
    (tmp_path / MANIFEST).write_text(damage)
    ScoreStore(tmp_path, "teacher")
    assert f"{MANIFEST} can't be read" in caplog.text
    assert json.loads((tmp_path / MANIFEST).read_text())["teacher"] == "teacher"


def test_scores_of_nobody_known_are_not_taken_for_those_of_a_teacher(tmp_path):
    scored(tmp_path)
    (tmp_path / MANIFEST).write_text("")
    with pytest.raises(ConfigError, match="or none that tell their teacher"):
        ScoreStore(tmp_path, "teacher")


def test_a_process_killed_at_the_manifest_leaves_a_folder_that_serves(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(RuntimeError, match="killed"):
            ScoreStore(tmp_path, "teacher")
    assert not (tmp_path / MANIFEST).exists()
    assert scored(tmp_path).score_by_content == {"content 0": 0.0, "content 1": 1.0}


def killed(*_):
    raise RuntimeError("killed")


@pytest.mark.parametrize("is_list", [False, True])
def test_embeddings_of_fewer_items_than_were_kept_are_made_again(tmp_path, caplog, is_list):
    store, values = EmbeddingStore(tmp_path, torch.nn.Linear(2, 2)), torch.arange(12.0).reshape(6, 2)
    store.save("key", list(values.split([1, 2, 3])) if is_list else values)
    assert len(store.load("key")) == (3 if is_list else 6)
    (path,) = tmp_path.rglob("key.npz")
    with np.load(path) as stored:
        arrays = dict(stored)
    short = {"lengths": arrays["lengths"][:-1], "values": values[:3]} if is_list else {"values": values[:5]}
    for damaged in ({**arrays, **short}, {name: arrays[name] for name in ("values", "lengths")}):
        with path.open("wb") as file:
            np.savez(file, **damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert store.load("key") is None
        assert "can't be read" in caplog.text
