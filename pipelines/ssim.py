"""Structural similarity of two volumes as a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F


RADIUS = 4  # of the window, in voxels


def ssim_map(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Computes the structural similarity (Wang et al. 2004) of the surroundings of every voxel, in three dimensions:
    Gaussian window of 9 voxels with a sigma of 1, mirrored at the border, k1 = 0.01, k2 = 0.03. SADM takes 1 - SSIM of
    slice and reconstruction as anomaly map.

    Args:
        first, second (`torch.Tensor` of shape `(N, H, W)`):
            The same volume twice, slices in anatomical order. One slice alone is compared in two dimensions.

    Returns:
        `torch.Tensor` of shape `(N, H, W)`, float32 on the CPU, at most 1. The range of values, which the constants
        are relative to, is the larger one of the two volumes.

    Raises:
        ValueError: The shapes differ.
    """
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(
            f"`first` and `second` must have the same shape (N, H, W), got {tuple(first.shape)} and"
            f" {tuple(second.shape)}."
        )
    if first.numel() == 0:
        return torch.zeros(first.shape)
    # On the CPU: a GPU may round products to 10 bits (TF32), which is fatal to variances, differences of squares.
    first, second = first.float().cpu(), second.float().cpu()
    window = torch.exp(-torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float32).square() / 2)
    window = window / window.sum()
    # As one window of three dimensions in float32, like the original: rounding alone can change single voxels by 1e-3.
    window = (window[:, None, None] * window[None, :, None] * window[None, None, :])[None, None]

    padded = _mirror(torch.stack([first, second]))
    moments = torch.stack([*padded, *padded.square(), padded[0] * padded[1]])
    mean_first, mean_second, *squares, product = F.conv3d(moments[:, None], window)[:, 0]
    variance_first = (squares[0] - mean_first.square()).clamp(min=0)
    variance_second = (squares[1] - mean_second.square()).clamp(min=0)
    covariance = product - mean_first * mean_second

    data_range = max(first.max() - first.min(), second.max() - second.min())
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    above = (2 * mean_first * mean_second + c1) * (2 * covariance + c2)
    below = (mean_first.square() + mean_second.square() + c1) * (variance_first + variance_second + c2)
    # Without c1 and c2: two volumes that are constant.
    return torch.where(below > 0, above / below, (first == second).float())


def _mirror(volumes: torch.Tensor) -> torch.Tensor:
    """Pads volumes `(2, N, H, W)` with `RADIUS` mirrored voxels on each side (d c b | a b c d), also where an axis is
    shorter than that."""
    for axis, length in enumerate(volumes.shape[1:], start=1):
        period = max(2 * (length - 1), 1)
        index = torch.arange(-RADIUS, length + RADIUS) % period
        volumes = volumes.index_select(axis, torch.minimum(index, period - index))
    return volumes
