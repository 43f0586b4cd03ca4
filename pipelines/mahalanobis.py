"""Maps in units of the spread that several reconstructions of a slice have (Behrendt et al., "Leveraging the Mahalanobis
Distance to enhance Unsupervised Brain MRI Anomaly Detection", arXiv 2407.12474)."""

from __future__ import annotations

import torch


# N slices, K reconstructions of each, C modalities, H x W pixels, P = C H W values of a slice.

# Variance that every value has besides that of its reconstructions; the authors' `mh_regu`, for slices in [0, 1].
REGULARIZATION = 1e-2


def mahalanobis_distance(slices: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Computes the distance of every value of a slice to the distribution of its reconstructions: what varies together
    from one reconstruction to the next counts less than what none of them does.

    With the mean m and the covariance S of the reconstructions of a slice x, over all its pixels and modalities, the
    distance is sqrt((x - m) * (S + r I)^-1 (x - m)), value by value, with r the `REGULARIZATION`; where the product is
    negative it is 0. S has a rank below K, so that a system of K equations takes the place of the inverse of a P x P
    matrix. Unlike the authors' program this sees whole slices, background included, where nothing varies; and nothing
    is scaled to [0, 1].

    Args:
        slices (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1].
        reconstructions (`torch.Tensor` of shape `(K, N, C, H, W)`): In [0, 1], K > 1.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`.
    """
    mean = reconstructions.mean(0)
    difference = (slices - mean).flatten(1)[..., None]  # (N, P, 1)
    centred = (reconstructions - mean).movedim(0, 1).flatten(2)  # X, (N, K, P)
    # (S + r I)^-1 d = (d - X^T (X X^T + r (K - 1) I)^-1 X d) / r
    gram = centred @ centred.mT
    gram = gram + REGULARIZATION * (len(reconstructions) - 1) * torch.eye(len(reconstructions), device=gram.device)
    varying = centred.mT @ torch.linalg.solve(gram, centred @ difference)
    products = difference * (difference - varying) / REGULARIZATION
    return products.view_as(slices).clamp(min=0).sqrt()
