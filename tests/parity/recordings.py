"""The recorded arrays: where they lie, how they are read, and the small networks that the original programs were run with."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ModelMixin, UNet2DModel


GOLDEN = Path(os.environ.get("ANODIFF_GOLDEN", Path(__file__).parents[1] / "golden"))


def recordings(pattern: str) -> list[Path]:
    """Returns the files of a pattern such as `andi/schedule*.npz`, sorted; there must be one at least."""
    found = sorted(GOLDEN.glob(pattern))
    assert found, f"no file {pattern} in {GOLDEN}"
    return found


def over(*patterns: str):
    """Runs a test once for each file of the patterns, which it gets as `path`."""
    found = [path for pattern in patterns for path in recordings(pattern)]
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def read(path: Path | str) -> dict[str, np.ndarray]:
    """Reads the arrays of a file, absolute or relative to the recordings."""
    with np.load(GOLDEN / path, allow_pickle=False) as arrays:
        return dict(arrays)


def load(path: Path | str) -> dict[str, torch.Tensor]:
    """Reads the arrays of a file as tensors; text stays as it is."""
    return {name: a if a.dtype.kind == "U" else torch.from_numpy(np.array(a)) for name, a in read(path).items()}


class ToyUNet(UNet2DModel):
    """
    The network of the recordings: scale * tanh(conv2d(x, W, padding=1) + t / T * b + E[label]), with the scale 1 where none is recorded,
    and without E for the label behind the last class, or without labels.

    Args:
        arrays (`dict[str, torch.Tensor]`): A recording, with `W`, `b` and perhaps `T`, `scale` and `E` behind the prefix.
        steps (`int`, *optional*): T, where the recording has it elsewhere.
        prefix (`str`, defaults to `"toy_"`): Of the names of the arrays.
    """

    def __init__(self, arrays: dict[str, torch.Tensor], steps: int | None = None, prefix: str = "toy_"):
        ModelMixin.__init__(self)  # without the layers of a `UNet2DModel`, which pipelines ask for
        channels = arrays[f"{prefix}W"].shape
        self.register_to_config(in_channels=channels[1], out_channels=channels[0])
        self.weight = torch.nn.Parameter(arrays[f"{prefix}W"].clone())
        self.bias = torch.nn.Parameter(arrays[f"{prefix}b"].clone())
        self.steps = float(arrays[f"{prefix}T"] if steps is None else steps)
        self.scale = float(arrays.get(f"{prefix}scale", 1.0))
        classes = arrays.get(f"{prefix}E", torch.zeros(0, len(self.bias)))
        self.classes = torch.cat([classes, torch.zeros_like(self.bias.detach())[None]])

    def forward(self, sample, timesteps, class_labels=None):
        shift = (timesteps / self.steps).reshape(-1, 1) * self.bias
        if class_labels is not None:
            shift = shift + self.classes[class_labels]
        hidden = torch.nn.functional.conv2d(sample, self.weight, padding=1) + shift[..., None, None]
        return SimpleNamespace(sample=self.scale * torch.tanh(hidden))


class ToySegmentationUNet(ToyUNet):
    """CIMD's: x is the image four times and the mask, of which the input `(N, 2, H, W)` has the image once."""

    def __init__(self, arrays: dict[str, torch.Tensor], steps: int):
        super().__init__(arrays, steps, prefix="")
        self.register_to_config(in_channels=2)

    def forward(self, sample, timesteps):
        image, mask = sample.float().split(1, dim=1)
        return super().forward(torch.cat([image.repeat(1, 4, 1, 1), mask], 1), timesteps)


def network_sizes(state: dict[str, torch.Tensor], levels: int) -> tuple[dict, list[bool]]:
    """
    Reads the sizes of a guided-diffusion UNet, or of the classifier that is its downward half, from its state dict.

    Returns:
        `tuple[dict, list[bool]]`: `in_channels`, `block_out_channels` and `layers_per_block`; whether each level has attention.
    """
    # On the way down: the first convolution, then of each level its layers and, but for the last, a block that halves the resolution.
    blocks = max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks."))
    layers = (blocks + 1) // levels - 1
    first = [f"input_blocks.{1 + level * (layers + 1)}" for level in range(levels)]
    sizes = {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": tuple(len(state[f"{block}.0.in_layers.2.weight"]) for block in first),
        "layers_per_block": layers,
    }
    return sizes, [f"{block}.1.norm.weight" in state for block in first]


def unet_levels(state: dict[str, torch.Tensor]) -> int:
    """Returns the levels of a UNet whose resolution is halved by convolutions."""
    return 1 + sum(name.endswith(".0.op.weight") for name in state)
