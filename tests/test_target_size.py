"""``finetune(target_size=...)``: the saved model cuts its embeddings, plain Sentence Transformers loads it so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

from mmtune import ConfigError, RetrievalDataset, finetune, finetune_reranker, size_frontier

SHORT: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}


@pytest.fixture(scope="module")
def sides(pages: Dataset) -> tuple[RetrievalDataset, RetrievalDataset]:
    train, evaluation = RetrievalDataset.from_id_rows(pages).split(10)
    return train, evaluation


def saved_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["settings"]["training"]


def test_the_largest_size_of_no_more_dimensions_is_saved(clip_path: str, sides: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"matryoshka_dims": [128, 64, 32], "target_size": np.int64(100), "output_dir": tmp_path}
    result = finetune(clip_path, *sides, **options, **SHORT)
    loaded = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert loaded.truncate_dim == result.model.truncate_dim == 64
    assert loaded.encode_query("revenue").shape == (64,)
    assert SentenceTransformer(str(tmp_path / "final"), truncate_dim=128).encode("revenue").shape == (128,)
    settings = saved_settings(tmp_path)
    assert (settings["target_size"], settings["truncate_dim"]) == (100, 64)
    assert "of at most 100 dimensions" in settings["truncate_dim_because"]
    assert {"vdr_cosine_ndcg@10", "vdr-64d_cosine_ndcg@10", "vdr-32d_cosine_ndcg@10"} <= set(result.after)
    again = finetune(clip_path, *sides, **options, **SHORT, resume="auto")
    assert again.model.truncate_dim == 64
    with pytest.raises(ConfigError, match="target_size: 100 then, 40 now"):
        finetune(clip_path, *sides, **{**options, "target_size": 40}, **SHORT, resume="auto")


def test_a_size_that_fits_whole_is_not_cut(clip_path: str, sides: Any, tmp_path: Path) -> None:
    finetune(clip_path, sides[0], output_dir=tmp_path, target_size=128, **SHORT)
    assert SentenceTransformer(str(tmp_path / "final"), device="cpu").truncate_dim is None
    assert saved_settings(tmp_path)["truncate_dim"] == 128


def test_auto_takes_what_the_frontier_recommends(clip_path: str, sides: Any, tmp_path: Path) -> None:
    dims = [128, 64, 2]
    result = finetune(
        clip_path, *sides, output_dir=tmp_path, matryoshka_dims=dims, target_size="auto", keep="last", **SHORT
    )
    chosen, settings = result.model.truncate_dim, saved_settings(tmp_path)
    result.model.truncate_dim = None
    options: dict[str, Any] = {"dims": dims, "dtypes": ["float32"], "show_progress_bar": False}
    found = size_frontier(result.model, sides[1], **options)
    assert found.num_clusters == 10
    assert settings["truncate_dim"] == (chosen or 128) == found.recommended.dim
    assert settings["truncate_dim_because"] == found.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_size": "small"}, "target_size='small': expected 'auto', None or a whole number"),
        ({"target_size": 0}, "target_size=0: expected"),
        ({"target_size": True}, "target_size=True: expected"),
        ({"target_size": 256.0}, "target_size=256.0: expected"),
        ({"target_size": 31, "matryoshka_dims": [64, 32]}, r"smallest .* 32 dimensions"),
        (
            {"target_size": 3, "matryoshka_dims": [64, 32]},
            r"Pass target_size=32, or train a smaller one with .*=\[64, 3\]\.$",
        ),
        ({"target_size": 63}, r"smallest .* 64 dimensions"),
        ({"target_size": 127, "matryoshka_dims": None}, r"smallest .* 128 dimensions"),
        ({"target_size": "auto"}, "eval_dataset is none"),
    ],
)
def test_bad_input(clip_path: str, sides: Any, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(clip_path, sides[0], output_dir=tmp_path / "run", **arguments, **SHORT)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_auto_needs_one_set(clip_path: str, sides: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several by name"):
        finetune(clip_path, sides[0], {"a": sides[1]}, output_dir=tmp_path, target_size="auto", **SHORT)


def test_what_has_one_size_is_refused(
    text_encoder_path: str, text_reranker_path: str, sides: Any, tmp_path: Path
) -> None:
    late = MultiVectorEncoder(text_encoder_path, device="cpu")
    with pytest.raises(ConfigError, match="late interaction has one vector a token"):
        finetune(late, sides[0], output_dir=tmp_path, target_size=256, **SHORT)
    reranker = CrossEncoder(text_reranker_path, device="cpu")
    with pytest.raises(ConfigError, match="target_size"):
        finetune_reranker(reranker, sides[0], output_dir=tmp_path, target_size=256, **SHORT)
