"""The evaluation protocol of ANDi, in columns of its own, so that results can be set beside published ones: all
voxels, background included; maps scaled by the smallest and the largest score of the whole test set; Dice per volume,
averaged, over a grid of thresholds, and at Yen's threshold of each volume after one dilation.

The best value of the grid is an oracle, and the scaling needs all test volumes together. Dice is averaged over the
volumes with a lesion, the same ones at every threshold (in the original over all, `nan` if one has neither lesion nor
prediction). Without a lesion it is 0 or, where nothing is predicted, undefined: a mean with such volumes would rise
where they drop out of it. They count in everything else. Maps are those of the cases, 0 outside the brain, where the
original program keeps what the network made of the background; slices without brain are not among them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from ..baselines import equalised_map
from ..cases import Case, Needs, Scores
from ..metrics import PooledScores, dice
from ..options import EvalOptions
from ..scoring import (
    best_of_curve,
    describe_sweep,
    dice_at,
    dice_curve,
    group_interval,
    mean_curve,
    name_interval,
    sweep_thresholds,
)
from ..thresholds import yen_threshold


EQUALISED = "equalised flair"

TASK = "anomaly-detection"
TEXT = {
    "unit_of_averaging": (
        "; ANDi columns: all voxels of all test volumes for AP, Dice as the mean over volumes with a lesion"
    ),
    "threshold_policy": (
        "; ANDi columns: maps scaled to [0, 1] over the whole test set (equalised FLAIR is not scaled), oracle as "
        "the best of a grid on the test split, Yen per volume with background and one dilation"
    ),
}
COLUMNS = {
    "andi_average_precision": "AP (ANDi)",
    "andi_dice_oracle": "Dice, oracle (ANDi)",
    "andi_dice_yen": "Dice, Yen (ANDi)",
}
SWEEP = (0.01, 0.299, 0.001)  # of maps scaled to [0, 1]
# The authors do not scale the equalised FLAIR, whose lesions lie near 1.
EQUALISED_SWEEP = (0.8, 0.999, 0.001)


def make_baselines(processor: dict) -> dict:
    """Returns the row of the equalised FLAIR, where the data have it."""
    if "flair" not in processor["modalities"]:
        return {}
    channel = processor["modalities"].index("flair")
    return {EQUALISED: partial(equalised_map, channel=channel, value_range=processor["value_range"])}


NEEDS = Needs(baselines=make_baselines)


def scale_to_range(maps: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns scores as float32 with `low` at 0 and `high` at 1; zeros where they are equal."""
    return (np.asarray(maps, np.float32) - np.float32(low)) / np.float32((high - low) or 1.0)


def score(row: dict, files: dict[str, list[Path]], thresholds: np.ndarray | None, options: EvalOptions) -> Scores:
    """Scores one method under ANDi's protocol, with one record per case, and a `sweep`: `thresholds`, of scaled maps,
    and mean `dice`. Cases without a mask only take part in the scaling."""
    equalised = row["name"] == EQUALISED
    if thresholds is None:
        thresholds = sweep_thresholds(EQUALISED_SWEEP if equalised else SWEEP)
    low, high = 0.0, 1.0
    if not equalised:
        extremes = [(case.maps.min(), case.maps.max()) for case in map(Case.load, files["test"])]
        low, high = min(pair[0] for pair in extremes), max(pair[1] for pair in extremes)
    pooled = PooledScores()
    curves, records, groups = [], [], []
    for case in map(Case.load, files["test"]):
        records.append({})
        if case.mask is None:
            continue
        maps = scale_to_range(case.maps, low, high)
        pooled.update(maps, case.mask, case.drawn_with)
        threshold = yen_threshold(maps)
        records[-1]["andi_threshold_yen"] = threshold
        if case.mask.any():
            curves.append(dice_curve(maps, case.mask, thresholds))
            groups.append(case.drawn_with)
            # 6 neighbours, once.
            records[-1]["andi_dice_yen"] = dice(ndimage.binary_dilation(maps > threshold), case.mask)
    curve = mean_curve(curves, len(thresholds))
    yen = [record["andi_dice_yen"] for record in records if "andi_dice_yen" in record]
    best, threshold = best_of_curve(curve, thresholds)
    metrics = {
        "andi_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "andi_dice_oracle": best,
        "andi_threshold_oracle": threshold,
        "andi_dice_yen": float(np.mean(yen)) if yen else None,
        **name_interval("andi_average_precision", pooled.intervals()["average_precision"]),
        **name_interval("andi_dice_oracle", group_interval(dice_at(curves, thresholds, threshold), groups)),
        **name_interval("andi_dice_yen", group_interval(yen, groups)),
    }
    return Scores(metrics, records, {"sweep": describe_sweep(thresholds, curve)})
