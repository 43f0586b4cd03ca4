"""CIMD, its network for LIDC."""

from __future__ import annotations

from typing import Any

import torch

from ..models.unet_2d_heads import UNet2DHeadsModel
from ..pipelines.pipeline_cimd import CIMDPipeline
from ..schedulers.scheduling_cimd import CIMDScheduler
from .parts import add_network, make_network, read_config, read_processor


def convert(state: dict[str, torch.Tensor], unet: dict[str, Any]) -> tuple[CIMDPipeline, dict]:
    """Returns the pipeline with the weights of the original's `UNetModel`, whose first convolution sees 5 channels,
    and its configuration; `unet` holds arguments that differ from the authors'. No kernel is transposed: slices are
    pictures, whose rows and columns the original did not exchange."""
    first = state.get("input_blocks.0.0.weight")
    if first is None or first.shape[1] != 5:
        channels = "none" if first is None else first.shape[1]
        raise RuntimeError(
            f"the first convolution must have 5 channels, four equal images and the mask; there are {channels}."
        )
    config, processor = read_config("cimd_lidc"), read_processor("cimd_lidc")
    model = make_network(UNet2DHeadsModel, unet, config["unet"], processor, in_channels=2, out_channels=2)
    model.load_state_dict(model.convert_original_state_dict(fold_image_channels(state)))
    pipeline = CIMDPipeline(model, CIMDScheduler(**config["scheduler"]), processor, **config["inference"])
    return pipeline, add_network(config, model)


def fold_image_channels(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds up the weights of the four image channels, which all see the same image, to those of one: the first
    convolution sees nothing but their sum."""
    name = "input_blocks.0.0.weight"
    image, mask = state[name].split((4, 1), dim=1)
    return {**state, name: torch.cat([image.sum(1, keepdim=True), mask], dim=1)}
