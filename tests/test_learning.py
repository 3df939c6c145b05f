"""The runs that must learn. Minutes each; ``make slow`` runs them."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from seeds import SEEDS

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_demo_learns_to_find_unseen_pages(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path), "--seed", str(seed)])
    started = time.process_time()
    demo.main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    with capsys.disabled():
        before, after = (metrics[when]["vdr_cosine_ndcg@10"] for when in ("before", "after"))
        sys.stdout.write(
            f"\nseed {seed}: ndcg@10 {before:.4f} -> {after:.4f}, {time.process_time() - started:.0f} s of CPU time\n"
        )
    assert before <= 0.2
    assert after >= 0.85
    assert metrics["after"]["vdr-64d_cosine_ndcg@10"] >= 0.8
    assert time.process_time() - started <= 600
