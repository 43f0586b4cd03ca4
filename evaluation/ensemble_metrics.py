"""How well several predicted masks of one image match several annotations of it, in numpy.

All functions take `pred (n, ...)` and `gt (m, ...)`: n samples S and m annotations Y of one image or volume, boolean
or 0/1. What is reported is the mean over images. Sources: CIMD (Rahman et al., CVPR 2023; its program has no code for
these metrics), and where it is silent the public programs that agree with each other. Two empty masks have the IoU and
Dice 1, an empty and a filled one 0."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..checks import check_choice
from .metrics import as_mask


DIVERSITY_READINGS = ("pairs", "variances", "pairs_with_self")


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of every mask of `a (n, ...)` with every one of `b (m, ...)`: `(n, m)`."""
    _, areas, shared = _counts(a, b)
    union = areas[0][:, None] + areas[1][None] - shared
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def pairwise_dice(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the Dice of every mask of `a (n, ...)` with every one of `b (m, ...)`: `(n, m)`."""
    _, areas, shared = _counts(a, b)
    total = areas[0][:, None] + areas[1][None]
    return np.where(total > 0, 2 * shared / np.maximum(total, 1), 1.0)


def sample_diversity(masks: np.ndarray) -> float:
    """Returns E[1 - IoU] over all ordered pairs of masks `(n, ...)`, each with itself included, as in
    [`generalized_energy_distance`]."""
    return float(1 - pairwise_iou(masks, masks).mean())


def generalized_energy_distance(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns the generalised energy distance (squared) 2 E[d(S, Y)] - E[d(S, S')] - E[d(Y, Y')] with d = 1 - IoU; 0
    is best. The expectations are over all ordered pairs, each mask with itself included (V-statistic): so it falls
    with the number of samples, which must be stated."""
    distance = 1 - pairwise_iou(pred, gt).mean()
    return float(2 * distance - sample_diversity(pred) - sample_diversity(gt))


def hungarian_iou(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns the Hungarian-matched IoU (HM-IoU): both sets are repeated to the least common multiple of their sizes,
    and each sample is assigned to one annotation so that the mean IoU is the largest. 1 is best."""
    overlap = pairwise_iou(pred, gt)
    size = math.lcm(*overlap.shape)
    overlap = overlap.repeat(size // overlap.shape[0], 0).repeat(size // overlap.shape[1], 1)
    return float(overlap[linear_sum_assignment(overlap, maximize=True)].mean())


def combined_sensitivity(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns the sensitivity TP / (TP + FN) of the union of the samples against the union of the annotations; 1 where
    all annotations are empty."""
    pred, gt = _masks(pred).any(0), _masks(gt).any(0)
    return float((pred & gt).sum() / gt.sum()) if gt.any() else 1.0


def maximum_dice_matching(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns the mean over the annotations of the Dice of the sample that fits best."""
    return float(pairwise_dice(pred, gt).max(0).mean())


def diversity_agreement(pred: np.ndarray, gt: np.ndarray, reading: str = "pairs") -> float:
    """Returns the diversity agreement 1 - (|max V(Y) - max V(S)| + |min V(Y) - min V(S)|) / 2, where V is the
    "variance" of two masks; 1 is best. A set of one mask has the V 0. Close to 1 for small lesions, because the
    background dilutes it.

    The paper leaves open which variance. `reading` `"pairs"`: V is the variance over pixels of the difference of two
    masks, over all pairs of different masks; `"pairs_with_self"`: the same, each mask with itself included, so that
    the smallest V is 0; `"variances"`: V is the absolute difference of the two masks' own variances, over all pairs of
    different masks."""
    check_choice("reading", reading, DIVERSITY_READINGS)
    extremes = []
    for masks in (pred, gt):
        pixels, (areas, _), shared = _counts(masks, masks)
        share = areas / pixels
        if reading == "variances":
            own = share * (1 - share)
            variances = np.abs(own[:, None] - own[None])
        else:
            # Of d in {-1, 0, 1}: mean of the squares less square of the mean.
            different = (areas[:, None] + areas[None] - 2 * shared) / pixels
            variances = different - (share[:, None] - share[None]) ** 2
        pairs = np.triu_indices(len(areas), 0 if reading == "pairs_with_self" else 1)
        values = variances[pairs] if len(pairs[0]) else np.zeros(1)
        extremes.append((values.max(), values.min()))
    (pred_max, pred_min), (gt_max, gt_min) = extremes
    return float(1 - (abs(gt_max - pred_max) + abs(gt_min - pred_min)) / 2)


def collective_insight(pred: np.ndarray, gt: np.ndarray, reading: str = "pairs") -> float:
    """Returns CIMD's Collective Insight 3 Sc Dmax Da / (Sc + Dmax + Da) of [`combined_sensitivity`],
    [`maximum_dice_matching`] and [`diversity_agreement`] in one of its readings; 0 where all three are 0. In [0, 1], 1
    is best. The paper calls it a harmonic mean, which it is not: that would have products of pairs below."""
    parts = combined_sensitivity(pred, gt), maximum_dice_matching(pred, gt), diversity_agreement(pred, gt, reading)
    return 3 * math.prod(parts) / sum(parts) if sum(parts) else 0.0


def score_ensemble(pred: np.ndarray, gt: np.ndarray) -> dict[str, float]:
    """Returns every metric of one image: those of this module, `diversity_agreement` and `collective_insight` with
    `_variances` and `_pairs_with_self` for the other readings, and `dice_majority`, the Dice of what more than half of
    the samples and more than half of the annotations mark."""
    pred, gt = _masks(pred), _masks(gt)
    scores = {
        "ged": generalized_energy_distance(pred, gt),
        "hm_iou": hungarian_iou(pred, gt),
        "combined_sensitivity": combined_sensitivity(pred, gt),
        "maximum_dice": maximum_dice_matching(pred, gt),
        "sample_diversity": sample_diversity(pred),
        "annotation_diversity": sample_diversity(gt),
        "dice_majority": float(pairwise_dice(pred.mean(0)[None] > 0.5, gt.mean(0)[None] > 0.5)[0, 0]),
    }
    for reading in DIVERSITY_READINGS:
        ending = "" if reading == "pairs" else f"_{reading}"
        scores[f"diversity_agreement{ending}"] = diversity_agreement(pred, gt, reading)
        scores[f"collective_insight{ending}"] = collective_insight(pred, gt, reading)
    return scores


def _masks(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim < 2 or not len(masks) or not masks[0].size:
        raise ValueError(f"Masks must have the shape (n, ...) with at least one mask and pixel, got {masks.shape}.")
    return as_mask("masks", masks)


def _counts(a: np.ndarray, b: np.ndarray) -> tuple[int, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Pixels of a mask, areas of both sets, and the pixels that each pair shares, `(n, m)`; exact."""
    a, b = _masks(a), _masks(b)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"Samples and annotations must have the same size, got {a.shape[1:]} and {b.shape[1:]}.")
    # Products of floats go through BLAS, those of integers do not; float32 counts exactly to 2^24.
    dtype = np.float32 if a[0].size < 2**24 else np.float64
    first, second = (masks.reshape(len(masks), -1).astype(dtype) for masks in (a, b))
    areas = tuple(masks.reshape(len(masks), -1).sum(1).astype(np.float64) for masks in (a, b))
    return a[0].size, areas, (first @ second.T).astype(np.float64)
