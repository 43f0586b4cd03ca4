"""Networks of configurations, for benchmarks."""

from __future__ import annotations

import torch
import yaml
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

import anodiff
from anodiff.configs import packaged_config


# As many operations as the network of andi_brats21.yaml, at half the resolution.
PATCHES = {
    "_class_name": "UNet2DPatchesModel",
    "block_out_channels": [64, 128, 128, 256],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}


def make_network(
    config: str, size: int, inputs: int, outputs: int | None = None, **changes
) -> tuple[torch.nn.Module, float]:
    """Makes the network of a packaged configuration for slices of `size` x `size`, its weights drawn with seed 0, and
    counts its GFLOP per evaluation (one multiply-add = 2). `changes` go before what the configuration says."""
    settings = {**yaml.safe_load(packaged_config(config).read_text(encoding="utf-8"))["unet"], **changes}
    network_class = getattr(anodiff, settings.pop("_class_name", ""), UNet2DModel)
    torch.manual_seed(0)
    unet = network_class(**settings, sample_size=size, in_channels=inputs, out_channels=outputs or inputs).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, inputs, size, size), torch.zeros(1))
    return unet, counter.get_total_flops() / 1e9
