from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)


# N slices of one volume, D levels along the slice axis, H x W pixels.


class HealthyMapsModel(ModelMixin, ConfigMixin):
    r"""
    Holds what the maps of a pipeline show in healthy brains, place by place, and divides maps by it: a method that
    errs at the rim, the ventricles or the cerebellum of everybody says little there.
    [`~evaluation.healthy.measure_healthy_maps`] makes it of healthy slices.

    A place is a pixel of the network's grid, and along the slice axis the relative position between the first and the
    last slice with brain. So it needs a processor that brings brains to the same place, such as one with
    `crop="brain"`. Values are relative: 1 is the mean of all places, so that maps keep their unit.

    Args:
        height, width (`int`): Of the network's grid, in pixels.
        depth (`int`, defaults to 16): Levels along the slice axis.
    """

    @register_to_config
    def __init__(self, height: int, width: int, depth: int = 16):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.ones(depth, height, width), requires_grad=False)

    def forward(self, brain: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Returns what maps are divided by, `(N, H, W)` float32, for the slices of one volume; arguments as of
        [`level_weights`]."""
        weights = level_weights(brain, indices, len(self.levels)).to(self.levels.device)
        return torch.einsum("nd,dhw->nhw", weights, self.levels.float())


def level_weights(brain: torch.Tensor, indices: Sequence[int], depth: int) -> torch.Tensor:
    """
    Returns the weight of every level in every slice, `(N, D)` float32 with the sum 1 in each slice: those of the linear
    interpolation at its relative position. A slice alone is in the middle.

    Args:
        brain (`torch.Tensor` of shape `(N, H, W)`, bool): Brain of the slices of one volume.
        indices (sequence of N `int`): The slices' numbers in it, which say how far they are apart.
        depth (`int`): Number of levels D, at least 2.
    """
    numbers = torch.as_tensor(list(indices), dtype=torch.float32)
    inside = numbers[brain.flatten(1).any(1).cpu()]
    position = torch.full_like(numbers, 0.5)
    if len(inside) and inside.min() < inside.max():
        position = ((numbers - inside.min()) / (inside.max() - inside.min())).clamp(0.0, 1.0)
    distance = (position[:, None] * (depth - 1) - torch.arange(depth)).abs()
    return (1.0 - distance).clamp(min=0.0)
