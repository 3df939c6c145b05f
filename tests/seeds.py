"""The seeds of the tests that learn: one by default; `make slow SEEDS="0 1 2"` runs more."""

import os

SEEDS = [int(seed) for seed in os.environ.get("MMTUNE_TEST_SEEDS", "0").split()]
