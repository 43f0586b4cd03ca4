"""Distances between the surfaces of a predicted and a reference mask, by MONAI."""

from __future__ import annotations

import warnings

import numpy as np


TOLERANCE = 2.0  # of the surface Dice, in the unit of the spacing


def surface_distances(pred: np.ndarray, gt: np.ndarray, spacing: list[float]) -> tuple[float, float]:
    """
    Returns the surface Dice and the 95 % Hausdorff distance of one mask, as MONAI's `compute_surface_dice` and
    `compute_hausdorff_distance` of percentile 95: from one computation of the distances, which both share.

    The surface are the voxels of a mask that have a neighbour outside it (6 neighbours, and what lies beyond the image is
    outside). The surface Dice is the share of both surfaces that is at most [`TOLERANCE`] from the other one. The
    Hausdorff distance is the larger of the 95th percentiles of the distances from one surface to the other.

    Args:
        pred, gt (`np.ndarray` of shape `(N, H, W)` or `(H, W)`, bool): Predicted and reference mask.
        spacing (`list[float]`): Size of a voxel along each axis.

    Returns:
        `tuple[float, float]`: Surface Dice, 0 where one mask is empty, `nan` where both are; and the distance in the
        unit of the spacing, `nan` where a mask is empty.
    """
    if not (pred.any() and gt.any()):
        return (0.0 if pred.any() or gt.any() else float("nan")), float("nan")
    import torch
    from monai.metrics.utils import get_edge_surface_distance

    with warnings.catch_warnings():
        # MONAI 1.6 calls a function of its own with an argument that it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        masks = (torch.from_numpy(np.ascontiguousarray(mask)) for mask in (pred, gt))
        _, distances, _ = get_edge_surface_distance(*masks, spacing=spacing, symmetric=True)
    close = sum(int((values <= TOLERANCE).sum()) for values in distances)
    farthest = max(float(torch.quantile(values, 0.95)) for values in distances)
    return close / sum(map(len, distances)), farthest
