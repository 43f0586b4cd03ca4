"""The evaluation protocols of ANDi and of the benchmark UAD-IMAG, beside our own in `scoring.py`: columns of their own, so that
results can be set beside published ones.

ANDi (method card 7.1): all voxels, background included; maps scaled by the smallest and the largest score of the whole test
set; Dice per volume, averaged, over a grid of thresholds, and at Yen's threshold of each volume after one dilation. The best
value of the grid is an oracle, and the scaling needs all test volumes together.

UAD-IMAG (method card C3): scores in their own units; mean Dice over volumes at the best threshold of a grid on the test set (oracle)
and at the best one of the validation set; false positive rate in the brain there; a threshold for a wanted rate.

Dice is averaged over the volumes with a lesion, the same ones at every threshold. Without a lesion it is 0 or, where nothing is
predicted, undefined: a mean with such volumes would rise where they drop out of it. They count in everything else.

Maps are those of the cases, 0 outside the brain, where the original programs keep what the network made of the background;
slices without brain are not among them. Volumes are read one after the other.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy import ndimage

from ..calibration import yen_threshold
from ..metrics import PooledScores, dice
from ..scoring import Case


PROTOCOLS = ("pooled", "andi", "uad_imag", "anofpdm", "sadm")

# First and last threshold and step: of ANDi's maps, scaled to [0, 1], and of its equalised FLAIR.
ANDI_SWEEP = (0.01, 0.299, 0.001)
EQUALISED_SWEEP = (0.8, 0.999, 0.001)

# What a report says of the extra columns, by protocol field.
PROTOCOL_TEXT = {
    "pooled": {},
    "andi": {
        "unit_of_averaging": "; ANDi columns: all voxels of all test volumes for AP, Dice as the mean over volumes with a lesion",
        "threshold_policy": "; ANDi columns: maps scaled to [0, 1] over the whole test set (equalised FLAIR is not scaled), oracle as"
        " the best of a grid on the test split, Yen per volume with background and one dilation",
    },
    "uad_imag": {
        "unit_of_averaging": "; UAD-IMAG columns: all voxels of all test volumes for AP, Dice as the mean over volumes with a lesion, FPR"
        " over the brain voxels of the test split that are no lesion",
        "threshold_policy": "; UAD-IMAG columns: absolute thresholds, oracle as the best of a grid on the test split, validation as"
        " the best of the grid on the validation split, healthy as the last threshold of the ROC curve of healthy validation"
        " slices with a lower FPR than `healthy_fpr`",
    },
    "anofpdm": {
        "unit_of_averaging": "; AnoFPDM columns: Dice and IoU as means over slices, 1 where mask and prediction are both empty, of all"
        " slices (mixed) or those with lesion (unhealthy); precision and recall over their pixels together; AP and AUROC over the"
        " pixels brighter than -0.95 on [-1, 1]; image labels: slices",
        "threshold_policy": "; AnoFPDM columns: own as above (unhealthy: whatever the method calls the slice), validation as the best mean"
        " Dice of a grid on the validation split, healthy without masks; components of 40 pixels and fewer of a slice are removed",
    },
    "sadm": {
        "unit_of_averaging": "; SADM columns: means over volumes, all their voxels with background, Dice of a mask that was rightly left"
        " empty and distances to nothing left out; Hausdorff distance in voxels; FPR of healthy slices: their brain voxels pooled",
        "threshold_policy": "; SADM columns: search as cDDPM's interval search and exact as the best of all scores, both for the pooled Dice"
        " of the validation volumes with lesions; fpr1, fpr5, fpr10: 1, 5, 10 % of the brain voxels of healthy validation slices; best"
        " Dice: oracle per volume",
    },
}


def check_protocol(protocol: str, sweep: tuple[float, float, float] | None) -> None:
    """Raises a `ValueError` for an unknown protocol, or a sweep that makes no thresholds or belongs to none."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, or ensemble, got {protocol!r}.")
    if sweep is not None:
        sweep_thresholds(sweep)
        if protocol in ("pooled", "sadm"):
            raise ValueError(
                "`sweep` needs `protocol` andi, uad_imag or anofpdm; the others have no grid of thresholds."
            )


def sweep_thresholds(sweep: tuple[float, float, float]) -> np.ndarray:
    """The thresholds of a sweep (first, last, step), both ends included, float64."""
    first, last, step = sweep
    if not (step > 0 and last > first):
        raise ValueError(f"`sweep` must be (first, last, step) with first < last and step > 0, got {tuple(sweep)}.")
    # A step that does not divide the range ends before `last`.
    return first + step * np.arange(math.floor((last - first) / step + 1e-6) + 1)


def dice_curve(maps: np.ndarray, mask: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """
    Dice of one volume at many thresholds, from one histogram whose edges are the thresholds.

    Args:
        maps, mask (`np.ndarray`, the same shape): Scores, used as float32, and lesion mask of one volume.
        thresholds (`np.ndarray` of shape `(T,)`): Increasing; `map > threshold` is compared in float32.

    Returns:
        `np.ndarray` of shape `(T,)`: float64, `nan` where mask and prediction are both empty.
    """
    mask = np.asarray(mask, dtype=bool).ravel()
    above = _counts_above(maps, thresholds)
    overlap = _counts_above(np.asarray(maps).ravel()[mask], thresholds)
    total = above + np.count_nonzero(mask)
    return np.divide(2 * overlap, total, out=np.full(len(total), np.nan), where=total > 0)


def scale_to_range(maps: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scores as float32 with `low` at 0 and `high` at 1; zeros where they are equal."""
    return (np.asarray(maps, np.float32) - np.float32(low)) / np.float32((high - low) or 1.0)


def threshold_below_fpr(healthy: np.ndarray, fpr: float, *, thinned: bool = False) -> float:
    """
    The last threshold of the ROC curve whose false positive rate is below a target, where scores equal to the threshold count as
    positive. (Used as `map > threshold`, as all thresholds here, the rate is lower still.)

    Args:
        healthy (`np.ndarray`): Scores of healthy brain voxels.
        fpr (`float`): Target in [0, 1), for example 0.01.
        thinned (`bool`, *optional*, defaults to `False`):
            Take only those thresholds that scikit-learn's `roc_curve` keeps, as UAD-IMAG's program does. Without positives
            these are hardly more than the ties, so that the rate is often far below the target.

    Returns:
        `float`: the threshold, the largest score where no rate is below the target.
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"`fpr` must be at least 0 and below 1, got {fpr}.")
    values, counts = np.unique(np.asarray(healthy), return_counts=True)
    if not values.size:
        raise ValueError("`healthy` must hold at least one voxel, got none.")
    values, counts = values[::-1], counts[::-1]
    candidates = counts.cumsum() / counts.sum() < fpr
    if thinned:
        # A threshold stays where the slope of the curve changes.
        candidates[1:-1] &= counts[2:] != counts[1:-1]
    return float(values[np.flatnonzero(candidates)[-1]] if candidates.any() else values[0])


def score_andi(
    test: list[Path], thresholds: np.ndarray, *, scale: bool = True
) -> tuple[dict[str, float | None], dict[str, list], list[dict]]:
    """
    Metrics of one method under ANDi's protocol.

    Args:
        test (`list[Path]`): Files that [`Case.save`] wrote; those without a mask only take part in the scaling.
        thresholds (`np.ndarray` of shape `(T,)`): Grid of the oracle, of scaled maps.
        scale (`bool`, *optional*, defaults to `True`):
            Scale maps to [0, 1] over the test set; the authors do not for the equalised FLAIR.

    Returns:
        `tuple[dict, dict, list[dict]]`: Metrics, `None` where undefined; the sweep, lists `thresholds` and `dice` (mean over the
        volumes with a lesion; in the original, over all, `nan` if one has neither lesion nor prediction); one record per case.
    """
    low, high = 0.0, 1.0
    if scale:
        extremes = [(case.maps.min(), case.maps.max()) for case in map(Case.load, test)]
        low, high = min(pair[0] for pair in extremes), max(pair[1] for pair in extremes)
    pooled = PooledScores()
    curves, records = [], []
    for case in map(Case.load, test):
        records.append({})
        if case.mask is None:
            continue
        maps = scale_to_range(case.maps, low, high)
        pooled.update(maps, case.mask)
        threshold = yen_threshold(maps)
        records[-1]["andi_threshold_yen"] = threshold
        if case.mask.any():
            curves.append(dice_curve(maps, case.mask, thresholds))
            # 6 neighbours, once.
            predicted = ndimage.binary_dilation(maps > threshold)
            records[-1]["andi_dice_yen"] = dice(predicted, case.mask)
    curve = _mean(curves, len(thresholds))
    yen = [record["andi_dice_yen"] for record in records if "andi_dice_yen" in record]
    best, threshold = _best(curve, thresholds)
    metrics = {
        "andi_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "andi_dice_oracle": best,
        "andi_threshold_oracle": threshold,
        "andi_dice_yen": float(np.mean(yen)) if yen else None,
    }
    return metrics, _sweep(thresholds, curve), records


def score_uad_imag(
    test: list[Path], validation: list[Path], thresholds: np.ndarray | None = None, *, healthy_fpr: float = 0.01
) -> tuple[dict[str, float | None], dict[str, list]]:
    """
    Metrics of one method under UAD-IMAG's protocol.

    Args:
        test, validation (`list[Path]`): Files that [`Case.save`] wrote.
        thresholds (`np.ndarray` of shape `(T,)`, *optional*):
            Grid in the units of the maps, different for each method of the benchmark. By default 100 scores that 50 % to 0.01 % of
            the brain voxels of the validation split (without one: of the test split) exceed.
        healthy_fpr (`float`, *optional*, defaults to 0.01): Target of the threshold for a false positive rate.

    Returns:
        `tuple[dict, dict]`: Metrics, `None` where undefined; the sweep on the test split, lists `thresholds` and `dice`.
    """
    if thresholds is None:
        brain = np.concatenate([case.maps[case.brain] for case in map(Case.load, validation or test)])
        thresholds = np.unique(np.quantile(brain, 1 - np.geomspace(0.5, 1e-4, 100)).astype(np.float32))
    pooled = PooledScores()
    curves = []
    for case in map(Case.load, test):
        if case.mask is None:
            continue
        pooled.update(case.maps, case.mask)
        if case.mask.any():
            curves.append(dice_curve(case.maps, case.mask, thresholds))
    curve = _mean(curves, len(thresholds))
    best, threshold = _best(curve, thresholds)
    metrics = {
        "uad_imag_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "uad_imag_dice_oracle": best,
        "uad_imag_threshold_oracle": threshold,
    }
    curves, healthy = [], []
    for case in map(Case.load, validation):
        if case.mask is not None and case.mask.any():
            curves.append(dice_curve(case.maps, case.mask, thresholds))
        known_healthy = case.labels == 0
        healthy.append(case.maps[known_healthy][case.brain[known_healthy]])
    has_healthy = any(scores.size for scores in healthy)
    fixed = {
        "validation": _best(_mean(curves, len(thresholds)), thresholds)[1],
        "healthy": threshold_below_fpr(np.concatenate(healthy), healthy_fpr) if has_healthy else None,
    }
    for policy, value in fixed.items():
        values = None if value is None else evaluate_threshold(test, value)
        metrics |= {
            f"uad_imag_threshold_{policy}": value,
            f"uad_imag_dice_{policy}": None if values is None else values[0],
            f"uad_imag_fpr_{policy}": None if values is None else values[1],
        }
    return metrics, _sweep(thresholds, curve)


def evaluate_threshold(test: list[Path], threshold: float) -> tuple[float | None, float | None]:
    """Returns the mean Dice over the volumes with a lesion, and the share of all brain voxels without lesion that lie above the threshold,
    in volumes with a mask; `None` where undefined."""
    curves, num_healthy, false_positives = [], 0, 0
    for case in map(Case.load, test):
        if case.mask is None:
            continue
        if case.mask.any():
            curves.append(dice_curve(case.maps, case.mask, np.array([threshold])))
        healthy = case.maps[case.brain & ~case.mask]
        num_healthy += healthy.size
        false_positives += np.count_nonzero(healthy > np.float32(threshold))
    mean = _mean(curves, 1)[0]
    return None if np.isnan(mean) else float(mean), false_positives / num_healthy if num_healthy else None


def _counts_above(maps: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many scores lie above each threshold, `(T,)` int64."""
    # "left": number of thresholds below a score.
    passed = np.searchsorted(np.asarray(thresholds, np.float32), np.asarray(maps, np.float32).ravel(), side="left")
    return np.bincount(passed, minlength=len(thresholds) + 1)[::-1].cumsum()[::-1][1:]


def _mean(curves: list[np.ndarray], number: int) -> np.ndarray:
    """Returns the mean over volumes, `(T,)`; `nan` without any."""
    return np.mean(curves, axis=0) if curves else np.full(number, np.nan)


def _best(curve: np.ndarray, thresholds: np.ndarray) -> tuple[float | None, float | None]:
    if np.isnan(curve).all():
        return None, None
    best = int(np.nanargmax(curve))
    return float(curve[best]), float(thresholds[best])


def _sweep(thresholds: np.ndarray, curve: np.ndarray) -> dict[str, list]:
    return {
        "thresholds": [float(value) for value in thresholds],
        "dice": [None if np.isnan(value) else float(value) for value in curve],
    }
