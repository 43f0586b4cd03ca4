"""Thresholds of anomaly maps. Each function stands for one threshold policy: validation data with lesion masks,
validation data of healthy subjects only, or no labels at all. A threshold is used as `map > threshold`, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..checks import check_number
from .metrics import PooledScores


def threshold_for_dice(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Returns the threshold with the highest Dice over the pooled voxels of validation volumes: post-processed maps
    and lesion masks of the same shapes, boolean or 0/1, volume by volume.

    The search is over all distinct scores, the threshold halfway between two of them, and exact up to 50 million
    voxels (see [`PooledScores`]). The published programs search a grid (AnoFPDM, ANDi) or halve an interval (SADM),
    which can miss the optimum. The pooled optimum weighs a volume by its lesion size; it is not that of the mean Dice
    over volumes."""
    pooled = PooledScores()
    for scores, mask in zip(maps, masks, strict=True):
        pooled.update(scores, mask)
    if not pooled.num_positives:
        raise ValueError(
            "`masks` must hold at least one lesion voxel; for healthy validation data use `threshold_for_fpr`."
        )
    return pooled.best_dice()[1]


def threshold_for_fpr(healthy: np.ndarray, fpr: float) -> float:
    """Returns the lowest of the scores of healthy brain voxels that at most a share `fpr` of them exceeds; at `fpr=0`
    the largest one.

    It is an order statistic, so exact whatever ties there are. (The program of SADM reads it off scikit-learn's
    thinned ROC curve, which returns the smallest score at every rate.)"""
    check_number("fpr", fpr, least=0, below=1)
    values = _finite("healthy", np.asarray(healthy, np.float32).ravel())
    rank = values.size - 1 - math.floor(fpr * values.size)
    return float(np.partition(values, rank)[rank])


def yen_threshold(values: np.ndarray) -> float:
    """Returns the label-free threshold of one map by Yen's maximum correlation criterion (Yen, Chang, Chang 1995), on
    a histogram of 256 bins over the range of the values, as scikit-image's `threshold_yen`: the centre of a bin, or
    the value itself for a constant map, so that the mask is empty.

    ANDi applies it per volume, background included. It does not change when the map is scaled, so it needs no
    normalisation, but it always finds something: a healthy volume gets a mask as well."""
    counts, edges = _histogram(values)
    if len(counts) == 1:
        return float(edges[-1])
    share = counts / counts.sum()
    # p: share of values up to a bin; square_low and square_high: sum of squared shares up to it and beyond it.
    p = share.cumsum()[:-1]
    square_low = (share**2).cumsum()[:-1]
    square_high = (share**2)[::-1].cumsum()[::-1][1:]
    best = int((2 * np.log(p * (1 - p)) - np.log(square_low * square_high)).argmax())
    return float((edges[best] + edges[best + 1]) / 2)


def otsu_threshold(values: np.ndarray) -> float:
    """Returns the label-free threshold of one map with the largest variance between the two classes (Otsu 1979), as
    scikit-image's `threshold_otsu`; otherwise as [`yen_threshold`]."""
    counts, edges = _histogram(values)
    if len(counts) == 1:
        return float(edges[-1])
    centres = (edges[:-1] + edges[1:]) / 2
    # Number and mean of the values up to a bin and beyond it. The first and the last bin are never empty.
    below, above = counts.cumsum()[:-1], counts[::-1].cumsum()[::-1][1:]
    mean_below = (counts * centres).cumsum()[:-1] / below
    mean_above = (counts * centres)[::-1].cumsum()[::-1][1:] / above
    return float(centres[(below * above * (mean_below - mean_above) ** 2.0).argmax()])


def _histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of 256 bins; one bin that ends at the largest value where 256 have no room between them."""
    values = _finite("values", np.asarray(values).ravel())
    low, high = values.min(), values.max()
    if high - low <= 256 * np.spacing(max(abs(high), abs(low))):
        return np.array([values.size]), np.array([low, high])
    return np.histogram(values, bins=256)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not values.size:
        raise ValueError(f"`{name}` must hold at least one voxel, got none.")
    if not np.isfinite(values).all():
        raise ValueError(f"`{name}` must be finite, got nan or infinite values.")
    return values
