"""The evaluation protocol of the benchmark UAD-IMAG, in columns of its own: scores in their own units; mean Dice over
volumes with a lesion at the best threshold of a grid on the test set (oracle) and at the best one of the validation
set; false positive rate in the brain there; a threshold for a wanted rate. Maps are those of the cases, 0 outside the
brain; slices without brain are not among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...checks import check_number
from ..cases import Case, Needs, Scores
from ..metrics import PooledScores
from ..options import EvalOptions
from ..scoring import (
    best_of_curve,
    describe_sweep,
    dice_at,
    dice_curve,
    group_interval,
    healthy_scores,
    masked_cases,
    mean_curve,
    name_interval,
)


TASK = "anomaly-detection"
TEXT = {
    "unit_of_averaging": (
        "; UAD-IMAG columns: all voxels of all test volumes for AP, Dice as the mean over volumes with a lesion, "
        "FPR over the brain voxels of the test split that are no lesion"
    ),
    "threshold_policy": (
        "; UAD-IMAG columns: absolute thresholds, oracle as the best of a grid on the test split, validation as the"
        " best of the grid on the validation split, healthy as the last threshold of the ROC curve of healthy "
        "validation slices with a lower FPR than `healthy_fpr`"
    ),
}
COLUMNS = {
    "uad_imag_average_precision": "AP (UAD-IMAG)",
    "uad_imag_dice_oracle": "Dice, oracle (UAD-IMAG)",
    "uad_imag_dice_validation": "Dice, validation (UAD-IMAG)",
    "uad_imag_fpr_validation": "FPR, validation (UAD-IMAG)",
    "uad_imag_dice_healthy": "Dice, healthy only (UAD-IMAG)",
    "uad_imag_fpr_healthy": "FPR, healthy only (UAD-IMAG)",
}
SWEEP = ()
NEEDS = Needs()


def threshold_below_fpr(healthy: np.ndarray, fpr: float, *, thinned: bool = False) -> float:
    """Returns the last threshold of the ROC curve of scores of healthy brain voxels whose false positive rate is below
    `fpr`, in [0, 1), where scores equal to the threshold count as positive; the largest score where no rate is. (Used
    as `map > threshold`, as all thresholds here, the rate is lower still.)

    `thinned` takes only those thresholds that scikit-learn's `roc_curve` keeps, as UAD-IMAG's program does. Without
    positives it keeps hardly more than the scores that several voxels share, so that the rate is often far below
    `fpr`.
    """
    check_number("fpr", fpr, least=0, below=1)
    values, counts = np.unique(np.asarray(healthy), return_counts=True)
    if not values.size:
        raise ValueError("`healthy` must hold at least one voxel, got none.")
    values, counts = values[::-1], counts[::-1]
    candidates = counts.cumsum() / counts.sum() < fpr
    if thinned:
        # A threshold stays where the slope of the curve changes.
        candidates[1:-1] &= counts[2:] != counts[1:-1]
    return float(values[np.flatnonzero(candidates)[-1]] if candidates.any() else values[0])


def volume_curves(files: list[Path], thresholds: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """Returns the Dice of each volume with a lesion at each threshold, `(T,)`, and what the volumes are drawn with."""
    masked = ((case, case.drawn_with) for case in masked_cases(files) if case.mask.any())
    found = [(dice_curve(case.maps, case.mask, thresholds), group) for case, group in masked]
    return [curve for curve, _ in found], [group for _, group in found]


def mean_dice(files: list[Path], thresholds: np.ndarray) -> np.ndarray:
    """Returns the mean Dice over the volumes with a lesion at each threshold, `(T,)`, `nan` without any."""
    return mean_curve(volume_curves(files, thresholds)[0], len(thresholds))


def evaluate_threshold(test: list[Path], threshold: float) -> tuple[float | None, float | None, tuple]:
    """Returns the mean Dice over the volumes with a lesion, the share of all brain voxels without lesion that lie above
    the threshold, in volumes with a mask, and the interval of the first; `None` where undefined."""
    num_healthy, false_positives = 0, 0
    for case in masked_cases(test):
        healthy = case.maps[case.brain & ~case.mask]
        num_healthy += healthy.size
        false_positives += np.count_nonzero(healthy > np.float32(threshold))
    curves, groups = volume_curves(test, np.array([threshold]))
    mean, _ = best_of_curve(mean_curve(curves, 1), np.array([threshold]))
    rate = false_positives / num_healthy if num_healthy else None
    return mean, rate, group_interval([float(curve[0]) for curve in curves], groups)


def score(row: dict, files: dict[str, list[Path]], thresholds: np.ndarray | None, options: EvalOptions) -> Scores:
    """Scores one method under UAD-IMAG's protocol, without records; its `sweep` holds `thresholds` and mean `dice` on
    the test split. The grid is in the units of the maps, another one for each method of the benchmark; by default 100
    scores that 50 % to 0.01 % of the brain voxels of the validation split (without one: of the test split) exceed.
    `healthy_fpr` of the options is the target of the threshold for a false positive rate."""
    test, validation = files["test"], files.get("validation", [])
    if thresholds is None:
        brain = np.concatenate([case.maps[case.brain] for case in map(Case.load, validation or test)])
        thresholds = np.unique(np.quantile(brain, 1 - np.geomspace(0.5, 1e-4, 100)).astype(np.float32))
    pooled = PooledScores()
    for case in masked_cases(test):
        pooled.update(case.maps, case.mask, case.drawn_with)
    curves, groups = volume_curves(test, thresholds)
    curve = mean_curve(curves, len(thresholds))
    best, threshold = best_of_curve(curve, thresholds)
    metrics = {
        "uad_imag_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "uad_imag_dice_oracle": best,
        "uad_imag_threshold_oracle": threshold,
        **name_interval("uad_imag_average_precision", pooled.intervals()["average_precision"]),
        **name_interval("uad_imag_dice_oracle", group_interval(dice_at(curves, thresholds, threshold), groups)),
    }
    healthy = healthy_scores(validation)
    fixed = {
        "validation": best_of_curve(mean_dice(validation, thresholds), thresholds)[1],
        "healthy": threshold_below_fpr(healthy, options.healthy_fpr) if healthy.size else None,
    }
    for policy, value in fixed.items():
        nothing = None, None, (None, None)
        *values, interval = nothing if value is None else evaluate_threshold(test, value)
        for name, number in zip(("threshold", "dice", "fpr"), (value, *values), strict=True):
            metrics[f"uad_imag_{name}_{policy}"] = number
        metrics |= name_interval(f"uad_imag_dice_{policy}", interval)
    return Scores(metrics, [], {"sweep": describe_sweep(thresholds, curve)})
