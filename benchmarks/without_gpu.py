"""To be imported before the host: one thread, no network, and torchvision beside a CPU torch, as the tests have it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: F401
