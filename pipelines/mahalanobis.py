"""Maps in units of the spread that several reconstructions of a slice have (Behrendt et al., "Leveraging the Mahalanobis
Distance to enhance Unsupervised Brain MRI Anomaly Detection", arXiv 2407.12474)."""

from __future__ import annotations

import torch


# N slices, K reconstructions of each, C modalities, H x W pixels, P values that vary together.

MAHALANOBIS = ("mahalanobis", "mahalanobis_pixel")

# Variance that every value has besides that of its reconstructions; the authors' `mh_regu`, for slices in [0, 1].
REGULARIZATION = 1e-2


def mahalanobis_distance(slices: torch.Tensor, reconstructions: torch.Tensor, map_type: str) -> torch.Tensor:
    """
    Computes the distance of every value of a slice to the distribution of its reconstructions: what varies from one
    reconstruction to the next counts less than what none of them does.

    With the mean m and the covariance S of the reconstructions of a slice x, the distance is
    sqrt((x - m) * (S + r I)^-1 (x - m)), value by value, with r the `REGULARIZATION`; where the product is negative it
    is 0.

    Args:
        slices (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1].
        reconstructions (`torch.Tensor` of shape `(K, N, C, H, W)`): In [0, 1], K > 1.
        map_type (`str`):
            `"mahalanobis"`: S is over all pixels and modalities of a slice, as the authors have it. Unlike their
            program this sees whole slices, background included, where nothing varies, and does not scale to [0, 1].
            `"mahalanobis_pixel"`: S is over the modalities of each pixel; with one it is its variance.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`.
    """
    mean = reconstructions.mean(0)
    difference, centred = slices - mean, reconstructions - mean
    count = len(reconstructions)
    if map_type == "mahalanobis":
        # S has a rank below K: (S + r I)^-1 d = (d - X^T (X X^T + r (K - 1) I)^-1 X d) / r needs no P x P matrix.
        values, rows = difference.flatten(1)[..., None], centred.movedim(0, 1).flatten(2)  # d (N, P, 1), X (N, K, P)
        gram = rows @ rows.mT + REGULARIZATION * (count - 1) * torch.eye(count, device=rows.device)
        varying = rows.mT @ torch.linalg.solve(gram, rows @ values)
        solved = ((values - varying) / REGULARIZATION).view_as(slices)
    else:
        covariance = torch.einsum("knchw,kndhw->nhwcd", centred, centred) / (count - 1)
        covariance = covariance + REGULARIZATION * torch.eye(slices.shape[1], device=slices.device)
        solved = torch.linalg.solve(covariance, difference.movedim(1, -1)).movedim(-1, 1)
    return (difference * solved).clamp(min=0).sqrt()
