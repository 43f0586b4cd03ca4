"""What several protocols share: grids of thresholds, Dice over them, and the scores of healthy validation slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .cases import Case
from .metrics import PooledScores, percentiles, resample_mean
from .thresholds import threshold_for_fpr


def sweep_thresholds(sweep: tuple[float, float, float]) -> np.ndarray:
    """Returns the thresholds of a sweep (first, last, step), both ends included, float64."""
    first, last, step = sweep
    if not (step > 0 and last > first):
        raise ValueError(f"`sweep` must be (first, last, step) with first < last and step > 0, got {tuple(sweep)}.")
    # A step that does not divide the range ends before `last`.
    return first + step * np.arange(math.floor((last - first) / step + 1e-6) + 1)


def dice_curve(maps: np.ndarray, mask: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Returns the Dice of one volume at each of the increasing `thresholds (T,)`, for `map > threshold` in float32:
    `(T,)`, float64, `nan` where mask and prediction are both empty."""
    mask = np.asarray(mask, dtype=bool).ravel()
    edges = np.asarray(thresholds, np.float32)

    def count_above(scores: np.ndarray) -> np.ndarray:
        # From one histogram whose edges are the thresholds. "left": number of thresholds below a score.
        passed = np.searchsorted(edges, np.asarray(scores, np.float32), side="left")
        return np.bincount(passed, minlength=len(edges) + 1)[::-1].cumsum()[::-1][1:]

    scores = np.asarray(maps).ravel()
    above, overlap = count_above(scores), count_above(scores[mask])
    total = above + np.count_nonzero(mask)
    return np.divide(2 * overlap, total, out=np.full(len(total), np.nan), where=total > 0)


def mean_curve(curves: list[np.ndarray], number: int) -> np.ndarray:
    """Returns the mean of curves of `number` values over volumes, `nan` without any."""
    return np.mean(curves, axis=0) if curves else np.full(number, np.nan)


def best_of_curve(curve: np.ndarray, thresholds: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the highest value of a curve and its threshold, `None` twice where nothing is defined."""
    if np.isnan(curve).all():
        return None, None
    best = int(np.nanargmax(curve))
    return float(curve[best]), float(thresholds[best])


def dice_at(curves: list[np.ndarray], thresholds: np.ndarray, threshold: float | None) -> list[float]:
    """Returns the values of the curves of volumes at one of the thresholds; there are none where that is `None`."""
    return [float(curve[thresholds == threshold][0]) for curve in curves]


def describe_sweep(thresholds: np.ndarray, curve: np.ndarray) -> dict[str, list]:
    """Returns `thresholds` and `dice` of a sweep as a report holds them."""
    return {
        "thresholds": [float(value) for value in thresholds],
        "dice": [None if np.isnan(value) else float(value) for value in curve],
    }


def name_interval(name: str, interval: tuple[float | None, float | None]) -> dict[str, float | None]:
    """Returns the ends of the interval of the metric `name` as metrics."""
    return dict(zip((f"{name}_low", f"{name}_high"), interval, strict=True))


def group_interval(
    values: Sequence[float], groups: Sequence[str], sizes: Sequence[float] | None = None
) -> tuple[float | None, float | None]:
    """Returns [`bootstrap_interval`] of the mean of values of the named groups, which are drawn in the order of their
    first value."""
    return percentiles(group_resamples(values, groups, sizes))


def group_resamples(
    values: Sequence[float], groups: Sequence[str], sizes: Sequence[float] | None = None
) -> np.ndarray:
    """Returns [`resample_mean`] of values of the named groups, which are drawn in the order of their first value."""
    first: dict[str, int] = {}
    numbers = [first.setdefault(group, len(first)) for group in groups]
    return resample_mean(values, np.array(numbers, np.int64), sizes)


def score_resamples(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    """Returns [`PooledScores.resamples`] of the scores of slices or subjects, all `(N,)`; those of unknown label (-1)
    do not count."""
    pooled = PooledScores()
    for group in dict.fromkeys(groups.tolist()):
        own = (groups == group) & (labels >= 0)
        pooled.update(scores[own], labels[own] == 1, group)
    return pooled.resamples()


def masked_cases(files: list[Path]) -> Iterator[Case]:
    """Yields the cases that have a reference mask."""
    return (case for case in map(Case.load, files) if case.mask is not None)


def healthy_scores(cases: list[Path]) -> np.ndarray:
    """Returns the scores of the brain voxels of all healthy slices, `(V,)` float32. A slice of unknown label is not
    healthy."""
    scores = [case.maps[(case.labels == 0)[:, None, None] & case.brain] for case in map(Case.load, cases)]
    return np.concatenate(scores) if scores else np.empty(0, np.float32)


def healthy_threshold(scores: np.ndarray, fpr: float) -> float | None:
    """Returns [`threshold_for_fpr`] of the result of [`healthy_scores`], `None` without a healthy voxel."""
    return threshold_for_fpr(scores, fpr) if scores.size else None
