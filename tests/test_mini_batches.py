"""How many rows go through a model at once, and what happens when they are too many."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from comparing import assert_same_weights
from mmtune import ConfigError, RetrievalDataset, finetune, load_model
from mmtune.testing import generated_pages
from mmtune.training import mini_batches
from mmtune.training.inputs import training_sets
from mmtune.training.losses import in_batch_loss
from mmtune.training.mini_batches import MiniBatches, choose_mini_batches, largest_documents, largest_that_fits
from mmtune.training.trainers import EMBEDDING

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(generated_pages(12, num_negatives=1, seed=1))


@pytest.mark.parametrize(
    ("limit", "most", "found"), [(0, 8, 0), (1, 8, 1), (5, 8, 4), (8, 8, 8), (100, 12, 12), (11, 12, 8), (9, 1, 1)]
)
def test_the_largest_is_found_by_doubling(limit: int, most: int, found: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert largest_that_fits(fits, most) == found
    assert tried == sorted(set(tried)), "nothing is tried twice"
    assert max(tried) <= most


def choose(model: Any, data: RetrievalDataset, limit: int, began: Any = None, **options: Any) -> Any:
    """On a GPU on which ``limit`` documents fit."""
    args = SimpleNamespace(per_device_train_batch_size=4, bf16=False)
    train = training_sets(data, num_negatives=1, documents="image", seed=1)
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    return choose_mini_batches(on_gpu if began is None else model, args, train, began)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "size", "is_cached"), [(0, 1, True), (1, 1, True), (3, 2, True), (7, 4, True), (8, 4, False)]
)
def test_a_batch_that_fits_with_all_its_documents_is_not_cached(limit, size, is_cached, data, monkeypatch) -> None:
    monkeypatch.setattr(mini_batches, "_fits", lambda model, args, pages, count: count <= limit)
    found = choose(None, data, limit)
    assert (found.size, found.is_cached) == (size, is_cached)
    assert found.reason


def test_a_run_that_goes_on_keeps_what_it_began_with(data, clip_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_batches, "_fits", lambda *_: pytest.fail("nothing is tried again"))
    found = choose(load_model(clip_path), data, 0, began={"size": 2, "is_cached": False})
    assert (found.size, found.is_cached) == (2, False)


def test_the_largest_page_is_the_one_that_is_tried(data) -> None:
    rows = generated_pages(3, num_negatives=1, seed=2)
    rows = rows.map(
        lambda row, at: {"image": row["image"].resize((300, 200) if at == 1 else (50, 60))}, with_indices=True
    )
    large = RetrievalDataset.from_id_rows(rows)
    found = largest_documents(training_sets(large, num_negatives=1, documents="image", seed=1), 3)
    assert [page.size for page in found] == [(300, 200)] * 3


@pytest.mark.parametrize("fits", [8, 2])
def test_the_loss_of_a_run_is_as_it_was_found_also_when_it_goes_on(
    fits, data, clip_path, tmp_path, monkeypatch
) -> None:
    found = MiniBatches(4 if fits == 8 else fits, fits != 8, "found")
    monkeypatch.setattr("mmtune.training.embedding.choose_mini_batches", lambda *_: found)
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 2}
    result = finetune(clip_path, data, output_dir=tmp_path / "run", **options)
    loss = result.trainer.loss
    assert isinstance(loss, MatryoshkaLoss)
    assert isinstance(loss.loss, CachedMultipleNegativesRankingLoss if fits == 2 else MultipleNegativesRankingLoss)
    assert ("Cached" in result.settings["training"]["loss"]) == (fits == 2)
    monkeypatch.undo()
    began = []
    monkeypatch.setattr(
        "mmtune.training.embedding.choose_mini_batches", lambda model, args, train, was: began.append(was) or found
    )
    (tmp_path / "run" / "final" / "modules.json").unlink()
    again = finetune(clip_path, data, output_dir=tmp_path / "run", resume=True, **options)
    assert began == [{"size": found.size, "is_cached": found.is_cached}]
    assert_same_weights(again.model, result.model)


def test_cached_and_uncached_gradients_agree(data, clip_path: str) -> None:
    norms = []
    row = data.training_rows(1)[:6]
    for mini_batch in (MiniBatches(2, True, ""), MiniBatches(6, False, "")):
        model = load_model(clip_path, device="cpu")
        loss = in_batch_loss(model, EMBEDDING, matryoshka_dims="auto", mini_batches=mini_batch)
        texts = [{"text": text} for text in row["query"]]
        features = [model.preprocess(part) for part in (texts, row["image"], row["negative_0"])]
        loss(features, None).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]))
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)


class RunsOut(CachedMultipleNegativesRankingLoss):
    """Has room for mini-batches of 2."""

    def forward(self, features: Any, labels: Any) -> Any:
        """The loss, after some gradients, or none for want of memory."""
        loss = super().forward(features, labels)
        if self.mini_batch_size > 2:
            loss.backward()  # what is half done leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


def test_a_step_that_runs_out_of_memory_is_done_again_in_halves(data, clip_path: str, tmp_path: Path) -> None:
    def run(name: str, size: int) -> Any:
        loss = lambda model: RunsOut(model, mini_batch_size=size)  # noqa: E731
        return finetune(clip_path, data, output_dir=tmp_path / name, loss=loss, **OPTIONS)

    expected = run("small", 2)
    with pytest.warns(UserWarning, match=r"Step 1 ran out of memory and is done again, with mini-batches of (4|2)"):
        found = run("large", 8)
    assert found.trainer.loss.mini_batch_size == 2
    assert_same_weights(found.model, expected.model)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {}], ids=["accumulated", "plain loss"])
def test_where_it_can_not_be_done_again_the_error_says_what_helps(
    options, data, clip_path: str, tmp_path: Path
) -> None:
    class NoRoom(MultipleNegativesRankingLoss):
        def forward(self, *args: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loss = (lambda model: RunsOut(model, mini_batch_size=4)) if options else NoRoom
    with pytest.raises(
        ConfigError, match=r"Step 1 ran out of memory with mini-batches of .*Pass a smaller mini_batch_size"
    ):
        finetune(clip_path, data, output_dir=tmp_path / "run", loss=loss, **OPTIONS, **options)
