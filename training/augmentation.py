from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .options import AugmentationOptions


def augment(
    images: torch.Tensor, generators: list[torch.Generator], options: AugmentationOptions, background: float
) -> torch.Tensor:
    """
    Random affine change of every image of a batch, bilinear, one draw per image from its own generator.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): Slices.
        generators (`list[torch.Generator]`): One per slice, on the device of `images`.
        options ([`AugmentationOptions`]): Ranges.
        background (`float`): Value of what comes in from outside.
    """
    if options == AugmentationOptions():
        return images
    # Five uniform numbers per image in a fixed order: rotation, shift along W, shift along H, scale, flip.
    uniform = torch.stack([torch.rand(5, generator=generator, device=images.device) for generator in generators])
    signed = 2 * uniform - 1
    angle = signed[:, 0] * math.radians(options.rotation)
    low, high = options.scale
    zoom = 1.0 / (low + uniform[:, 3] * (high - low))
    flip = torch.where(uniform[:, 4] < 0.5, -1.0, 1.0) if options.horizontal_flip else torch.ones_like(zoom)
    # affine_grid's coordinates run from -1 to 1 along either side: rotations of a slice that is not square need its aspect.
    height, width = images.shape[2:]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        [
            torch.stack([flip * cos, -sin * height / width, -2 * signed[:, 1] * options.translation[0]], 1),
            torch.stack([flip * sin * width / height, cos, -2 * signed[:, 2] * options.translation[1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background
