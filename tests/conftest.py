"""What every test shares: no network, one thread, and tiny checkpoints that are built once."""

import os

# the host and its libraries read these when they are imported
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "OMP_NUM_THREADS": "1",
}
# tiny models are quicker on the CPU, and exact; set the variable to test on a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import shutil
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)


# torchvision lies in a folder of its own: its wheel would break the host in the environment of the demo
if folder := os.environ.get("MMTUNE_TEST_TORCHVISION"):
    sys.path.append(folder)


def _torchvision_works() -> bool:
    """Import torchvision, also where its wheel was built for another torch than the one installed."""
    if find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError):
        return _torchvision_works_without_operators()
    return True


def _torchvision_works_without_operators() -> bool:
    # the wheel on PyPI is built for CUDA: beside a CPU torch its operators do not load, and the import fails for want
    # of these two schemas; the processors only use its Python transforms
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError):
        return False
    return True


# before the host is imported: transformers imports torchvision wherever it is installed
TORCHVISION_WORKS = _torchvision_works()

from datasets import Dataset  # noqa: E402
from transformers import BertForSequenceClassification  # noqa: E402

from mmtune.testing import (  # noqa: E402
    generated_pages,
    tiny_clip,
    tiny_qwen3_vl,
    tiny_siglip,
    tiny_text_encoder,
)


class NetworkBlockedError(AssertionError):
    """A test tried to reach another machine."""


def _blocked(connect: Callable[..., object]) -> Callable[..., object]:
    def checked_connect(self: socket.socket, address: tuple | str | bytes) -> object:
        is_local = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
        if not is_local:
            raise NetworkBlockedError(f"A test connects to {address!r}; tests run without a network.")
        return connect(self, address)

    return checked_connect


socket.socket.connect = _blocked(socket.socket.connect)
socket.socket.connect_ex = _blocked(socket.socket.connect_ex)


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def siglip_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_siglip(tmp_path_factory.mktemp("models") / "siglip")


@pytest.fixture(scope="session")
def text_encoder_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_text_encoder(tmp_path_factory.mktemp("models") / "text_encoder")


@pytest.fixture(scope="session")
def text_reranker_path(text_encoder_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cross-encoder for texts alone: enough where nothing depends on pages, and quick."""
    folder = tmp_path_factory.mktemp("models") / "text_reranker"
    shutil.copytree(text_encoder_path, folder)
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(text_encoder_path, num_labels=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def qwen3_vl_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not TORCHVISION_WORKS:
        pytest.skip("Qwen3-VL needs torchvision, which is not installed")
    return tiny_qwen3_vl(tmp_path_factory.mktemp("models") / "qwen3_vl")


@pytest.fixture(scope="session")
def pages() -> Dataset:
    return generated_pages(24)
