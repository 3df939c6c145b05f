"""Routers of encoders that have never met must learn to. A minute each; ``make slow`` runs them."""

import sys
import time
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from mmtune import RetrievalDataset, compose_router, finetune
from mmtune.testing import generated_pages, tiny_siglip, tiny_text_encoder
from seeds import SEEDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LEAST_NDCG = {(): 0.8, ("text",): 0.8, ("image",): 0.6}
"""By what is frozen: nDCG@10 on unseen pages."""


def unaligned_router(folder: Path, *, freeze: tuple[str, ...], seed: int) -> SentenceTransformer:
    # Patches of 32 pixels take half the time of those of 16, and pooled over fewer of them a frozen encoder of random
    # weights says no less about the page. By the dimension both sides get a projection, which can take out the large
    # mean that the embeddings of random weights have in common.
    return compose_router(
        tiny_text_encoder(folder / "text", hidden_size=256, num_layers=2, seed=seed),
        tiny_siglip(folder / "image", hidden_size=256, num_layers=2, image_size=128, patch_size=32, seed=seed),
        dimension=128,
        freeze=freeze,
        device="cpu",
    )


def encoder_weights(model: SentenceTransformer, side: str) -> dict[str, torch.Tensor]:
    """A copy of the weights of one side, without those of its projection."""
    encoder = model[0].sub_modules[side][0]
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}


def is_unchanged(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    assert before
    assert before.keys() == after.keys()
    return all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("freeze", list(LEAST_NDCG), ids=lambda sides: "-".join(sides) or "nothing")
def test_a_router_learns_to_find_unseen_pages(
    freeze: tuple[str, ...], seed: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    started = time.process_time()
    train, evaluation = RetrievalDataset.from_id_rows(generated_pages(400, seed=seed)).split(80, seed=seed)
    model = unaligned_router(tmp_path, freeze=freeze, seed=seed)
    weights = {side: encoder_weights(model, side) for side in ("text", "image")}
    result = finetune(
        model,
        train,
        evaluation,
        output_dir=tmp_path / "run",
        num_train_epochs=20,
        per_device_train_batch_size=32,
        learning_rate=5e-4,  # from random weights; the projections learn at ten times this rate
        num_negatives=0,
        matryoshka_dims=None,
        eval_strategy="no",
        save_strategy="no",
        seed=seed,
    )
    before, after = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    cpu_seconds = time.process_time() - started
    with capsys.disabled():
        frozen = " and ".join(freeze) or "nothing"
        sys.stdout.write(
            f"\nfrozen: {frozen}, seed {seed}: ndcg@10 {before:.4f} -> {after:.4f}, {cpu_seconds:.0f} s of CPU time\n"
        )
    assert result.primary_metric.endswith("ndcg@10")
    assert before <= 0.2
    assert after >= LEAST_NDCG[freeze]
    for side, those_before in weights.items():
        assert is_unchanged(those_before, encoder_weights(result.model, side)) == (side in freeze)
    assert cpu_seconds <= 300
