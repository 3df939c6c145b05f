"""The limits of size: dense batches, large tables, and evaluation whose memory does not grow with the corpus.

The benchmarks measure these at full size; here they are small enough to run every time, or nearly.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(("num_negatives", "batch_size", "num_processes"), [(1, 64, 1), (1, 32, 2), (4, 8, 8)])
def test_dense_batches_are_free_of_conflicts_on_every_process(benchmark, num_negatives, batch_size, num_processes):
    batches = benchmark("batches")
    dataset = batches.dense_dataset()
    rows = dataset.training_rows(num_negatives, documents="text")
    epoch = batches.draw_epoch(dataset, rows, batch_size, num_processes)
    assert epoch.conflicts == 0
    assert epoch.used > batches.LEAST_USED
    assert epoch.num_rows - epoch.num_used < batch_size * num_processes
    assert epoch.ms_a_row < batches.MOST_MS_A_ROW
    assert len(set(epoch.batches_by_rank)) == 1
    assert epoch.lost == 0


def test_the_dense_dataset_has_what_it_promises(benchmark):
    dataset = benchmark("batches").dense_dataset(400, 120)
    texts = dataset.queries["text"][:]
    assert 0.05 * len(texts) < len(texts) - len(set(texts)) < 0.2 * len(texts)
    rows = dataset.training_rows(1, documents="text")
    assert rows.format["format_kwargs"]["transform"].chosen["refused"] > 40


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_a_fifth_of_the_limits(benchmark):
    scale = benchmark("scale")
    for step, found in scale.measure(100_000, 16).items():
        if step in ("from_id_rows", "training_rows", "split"):
            assert found["cpu_seconds"] < scale.MOST_SECONDS / 5, step
            assert found["peak_mb"] < scale.MOST_MB / 5, step


@pytest.mark.slow
def test_evaluation_of_five_times_the_pages_takes_little_more_memory(benchmark):
    evaluation_memory = benchmark("evaluation_memory")
    few, many = (evaluation_memory.measure("mmtune", pages, None) for pages in (30, 150))
    # the host keeps every page decoded, 5 MB each
    assert many["peak_mb"] - few["peak_mb"] < 200


@pytest.mark.slow
def test_mining_among_forty_thousand_documents_takes_a_fifth_of_the_limits(benchmark):
    mining = benchmark("mining")
    size = ("--queries", 10_000, "--documents", 40_000, "--dimension", 256, "--threads", 1)
    found = benchmark("measure").in_fresh_process(mining.__file__, *size)
    assert found["cpu_seconds"] < mining.MOST_SECONDS / 5
    assert found["peak_mb"] < mining.MOST_MB / 5


@pytest.mark.slow
def test_training_on_mined_negatives_beats_training_on_random_ones(benchmark):
    found = benchmark("mining").train_on_both(0)
    assert found["mined steps"] == found["random steps"]
    assert found["mined"] > found["random"] + 0.03
