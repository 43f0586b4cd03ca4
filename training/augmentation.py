from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .options import AugmentationOptions


def augment(
    batch: dict[str, torch.Tensor],
    generators: list[torch.Generator],
    options: AugmentationOptions,
    background: float,
) -> dict[str, torch.Tensor]:
    """
    Random affine change of every slice of a batch, one draw per slice from its own generator: its image bilinearly, its masks
    alike with the nearest pixel.

    Args:
        batch (`dict[str, torch.Tensor]`): `image (N, C, H, W)`, perhaps `mask (N, A, H, W)` and `brain (N, H, W)`; the rest stays.
        generators (`list[torch.Generator]`): One per slice, on the device of the images.
        options ([`AugmentationOptions`]): Ranges.
        background (`float`): Value of what comes into an image from outside; into a mask comes 0.
    """
    if options == AugmentationOptions():
        return batch
    images = batch["image"]
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
    changed = {"image": F.grid_sample(images - background, grid, align_corners=False) + background}
    for name in {"mask", "brain"} & set(batch):
        planes = batch[name] if name == "mask" else batch[name][:, None]
        moved = F.grid_sample(planes.to(images.dtype), grid, mode="nearest", align_corners=False).to(planes.dtype)
        changed[name] = moved if name == "mask" else moved[:, 0]
    return {**batch, **changed}
