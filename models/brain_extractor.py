from __future__ import annotations

import math
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..checks import check_integer, check_number
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin


# N volumes, X x Y x Z voxels of the network's grid: RAS axes, cubes with an edge of `spacing` mm.


class BrainExtractor(ModelMixin, PlainConfigMixin):
    r"""
    Finds the brain in head scans of any contrast, with or without skull: a small 3-D U-Net on a coarse grid, trained
    on synthetic heads (the idea of SynthStrip, Hoopes et al., NeuroImage 260, 2022). One evaluation per volume,
    deterministic.

    A block consists of convolution 3 x 3 x 3, group normalisation and SiLU, two times; the way down has max pooling,
    the way up trilinear interpolation.

    Args:
        spacing (`float`, defaults to 2.5): Edge of the grid's voxels in mm.
        block_out_channels (`tuple[int, ...]`, defaults to `(8, 16, 32, 48, 48)`):
            Channels of the levels, multiples of `norm_num_groups`.
        norm_num_groups (`int`, defaults to 4): Groups of a normalisation.
    """

    @register_to_config
    def __init__(
        self,
        spacing: float = 2.5,
        block_out_channels: tuple[int, ...] = (8, 16, 32, 48, 48),
        norm_num_groups: int = 4,
    ):
        super().__init__()
        check_number("spacing", spacing, above=0)
        check_integer("norm_num_groups", norm_num_groups, 1)
        if not block_out_channels or any(channels % norm_num_groups for channels in block_out_channels):
            raise ValueError(
                f"`block_out_channels` must be multiples of `norm_num_groups` {norm_num_groups}, got"
                f" {tuple(block_out_channels)}."
            )

        def block(before: int, channels: int) -> nn.Sequential:
            layers = []
            for width in (before, channels):
                layers += [
                    nn.Conv3d(width, channels, 3, padding=1),
                    nn.GroupNorm(norm_num_groups, channels),
                    nn.SiLU(),
                ]
            return nn.Sequential(*layers)

        widths = tuple(block_out_channels)
        self.down_path = nn.ModuleList(map(block, (1, *widths), widths))
        self.up_path = nn.ModuleList(
            block(low + high, high) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.Conv3d(widths[0], 1, 1)

    @property
    def factor(self) -> int:
        """What the sides of volumes must be multiples of."""
        return 2 ** len(self.up_path)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the brain `(N, 1, X, Y, Z)` of volumes of this shape, normalised by
        [`normalize_volumes`]; sides are multiples of `factor`."""
        if any(side % self.factor for side in sample.shape[2:]):
            raise ValueError(f"`sample` must have sides divisible by {self.factor}, got {tuple(sample.shape)}.")
        skips = []
        for level, block in enumerate(self.down_path):
            if level:
                skips.append(sample)
                sample = F.max_pool3d(sample, 2)
            sample = block(sample)
        for block in self.up_path:
            sample = F.interpolate(sample, scale_factor=2.0, mode="trilinear")
            sample = block(torch.cat([sample, skips.pop()], 1))
        return self.last(sample)

    @torch.no_grad()
    def find_brain(self, images: Sequence[np.ndarray], affine: np.ndarray) -> np.ndarray:
        """
        Finds the brain in a scan.

        Args:
            images (sequence of `np.ndarray` of shape `(X, Y, Z)`):
                Brightness in any units, of one or several modalities on one grid, whose logits are averaged.
            affine (`np.ndarray` of shape `(4, 4)`): Voxel indices to RAS millimetres.

        Returns:
            `np.ndarray` of shape `(X, Y, Z)`: bool; one piece without holes, on the scan's own grid.
        """
        orientation = nib.io_orientation(affine)
        inverse = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation)
        to_world = affine @ nib.orientations.inv_ornt_aff(orientation, images[0].shape)
        shape = nib.apply_orientation(images[0], orientation).shape

        # 1. A grid along the world's axes over all of the scan, about its centre.
        spacing = self.config.spacing
        corners = np.array(np.meshgrid(*[(-0.5, size - 0.5) for size in shape], indexing="ij")).reshape(3, -1)
        corners = to_world[:3, :3] @ corners + to_world[:3, 3:]
        low, high = corners.min(1), corners.max(1)
        sides = [
            self.factor * math.ceil((end - start) / spacing / self.factor)
            for start, end in zip(low, high, strict=True)
        ]
        origin = (low + high) / 2 - spacing * (np.array(sides) - 1) / 2

        # 2. The logits of each image on it: the mean over voxels that are smaller than those of the grid, then linearly.
        blocks = np.maximum(np.floor(spacing / np.linalg.norm(to_world[:3, :3], axis=0)), 1).astype(int).tolist()
        blocks = [min(block, size) for block, size in zip(blocks, shape, strict=True)]
        of_block = np.diag([*blocks, 1.0])
        of_block[:3, 3] = (np.array(blocks) - 1) / 2
        grid = np.diag([spacing] * 3 + [1.0])
        grid[:3, 3] = origin
        weight, logits = self.last.weight, torch.zeros(1, 1, *sides)
        for image in images:
            # Beyond the scan is its darkest value.
            volume = nib.apply_orientation(np.asarray(image, np.float32) - np.float32(image.min()), orientation)
            coarse = F.avg_pool3d(torch.from_numpy(np.ascontiguousarray(volume))[None, None], blocks)
            onto = np.linalg.inv(to_world @ of_block) @ grid
            sample = torch.from_numpy(_resample(coarse[0, 0].numpy(), onto, sides, "grid-constant"))
            sample = normalize_volumes(sample[None, None])
            logits += self(sample.to(weight.device, weight.dtype)).float().cpu() / len(images)

        # 3. One piece without holes, then its smooth surface on the scan's grid.
        pieces, count = scipy.ndimage.label(logits[0, 0].numpy() > 0)
        if not count:
            return np.zeros(images[0].shape, bool)
        largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
        surface = logits[0, 0].numpy()
        filled = scipy.ndimage.binary_fill_holes(largest)
        surface = np.where(filled, surface.clip(min=0.1), surface.clip(max=-0.1))
        brain = _resample(surface, np.linalg.inv(grid) @ to_world, shape, "nearest") > 0
        return np.ascontiguousarray(nib.apply_orientation(brain, inverse))


def normalize_volumes(volumes: torch.Tensor) -> torch.Tensor:
    """Brings volumes `(N, 1, X, Y, Z)` in any units to [0, 1], each for itself: their darkest half percent is 0, and
    1 what one percent of the voxels above their mean exceed."""
    flat = volumes.flatten(1).float()
    ordered, count = flat.sort(1).values, flat.shape[1]
    bright = (flat > flat.mean(1, keepdim=True)).sum(1, keepdim=True)
    low = ordered[:, count // 200].view(-1, 1, 1, 1, 1)
    high = ordered.gather(1, (count - 1 - bright // 100).clamp(min=0)).view(-1, 1, 1, 1, 1)
    return ((volumes - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _resample(volume: np.ndarray, to_voxel: np.ndarray, shape: Sequence[int], mode: str) -> np.ndarray:
    """Values of a volume `(X, Y, Z)`, linearly, at the places that `to_voxel` leads the indices of a grid of another
    shape to; `mode` says what is beyond its border, as in scipy."""
    options = {"output_shape": tuple(shape), "order": 1, "mode": mode, "output": np.float32}
    return scipy.ndimage.affine_transform(volume, to_voxel[:3, :3], to_voxel[:3, 3], **options)
