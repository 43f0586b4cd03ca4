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
        `torch.Tensor` of shape `(N, H, W)`, float32, at most 1, on the device of the volumes. The range of values,
        which the constants are relative to, is the larger one of the two volumes. On a CUDA device sums are float64;
        the float32 of the CPU, like the original's, can be off by 1e-3 in single voxels.

    Raises:
        ValueError: The shapes differ.
    """
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(
            f"`first` and `second` must have the same shape (N, H, W), got {tuple(first.shape)} and"
            f" {tuple(second.shape)}."
        )
    device, on_cuda = first.device, first.is_cuda
    if first.numel() == 0:
        return torch.zeros(first.shape, device=device)
    if on_cuda:
        # A convolution there may round products to 10 bits (TF32), which is fatal to variances, differences of
        # squares; elementwise operations never do, and float64 costs them little.
        first, second = first.double(), second.double()
    else:
        first, second = first.float().cpu(), second.float().cpu()
    padded = _mirror(torch.stack([first, second]))
    moments = torch.stack([*padded, *padded.square(), padded[0] * padded[1]])
    mean_first, mean_second, *squares, product = _smooth_by_axis(moments) if on_cuda else _smooth(moments)
    variance_first = (squares[0] - mean_first.square()).clamp(min=0)
    variance_second = (squares[1] - mean_second.square()).clamp(min=0)
    covariance = product - mean_first * mean_second

    data_range = max(first.max() - first.min(), second.max() - second.min())
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    above = (2 * mean_first * mean_second + c1) * (2 * covariance + c2)
    below = (mean_first.square() + mean_second.square() + c1) * (variance_first + variance_second + c2)
    # Without c1 and c2: two volumes that are constant.
    return torch.where(data_range > 0, above / below, (first == second).to(below)).float().to(device)


def _window(dtype: torch.dtype) -> torch.Tensor:
    window = torch.exp(-torch.arange(-RADIUS, RADIUS + 1, dtype=dtype).square() / 2)
    return window / window.sum()


def _smooth(moments: torch.Tensor) -> torch.Tensor:
    """Averages padded volumes `(M, N, H, W)` in the window, as one of three dimensions in float32, like the original:
    rounding alone can change single voxels of the result by 1e-3."""
    window = _window(moments.dtype)
    window = window[:, None, None] * window[None, :, None] * window[None, None, :]
    return F.conv3d(moments[:, None], window[None, None])[:, 0]


def _smooth_by_axis(moments: torch.Tensor) -> torch.Tensor:
    """Averages padded volumes `(M, N, H, W)` in the window, axis by axis, by elementwise operations alone."""
    weights = _window(moments.dtype).tolist()
    for axis in (1, 2, 3):
        length = moments.shape[axis] - 2 * RADIUS
        moments = sum(weight * moments.narrow(axis, start, length) for start, weight in enumerate(weights))
    return moments


def _mirror(volumes: torch.Tensor) -> torch.Tensor:
    """Pads volumes `(2, N, H, W)` with `RADIUS` mirrored voxels on each side (d c b | a b c d), also where an axis is
    shorter than that."""
    for axis, length in enumerate(volumes.shape[1:], start=1):
        period = max(2 * (length - 1), 1)
        index = torch.arange(-RADIUS, length + RADIUS, device=volumes.device) % period
        volumes = volumes.index_select(axis, torch.minimum(index, period - index))
    return volumes
