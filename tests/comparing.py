"""What several tests compare or break: the weights of models, and checkpoints without any."""

import shutil
from pathlib import Path

import torch


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights of a model, which training does not change."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(
    one: torch.nn.Module | dict[str, torch.Tensor], other: torch.nn.Module | dict[str, torch.Tensor]
) -> None:
    """Both have the same weights, to the last bit."""
    first, second = (dict(each.state_dict()) if isinstance(each, torch.nn.Module) else each for each in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_weights(checkpoint: str, folder: Path) -> str:
    """A copy whose weights are no weights: reading them fails."""
    shutil.copytree(checkpoint, folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    return str(folder)
