"""The protocol of ensembles of segmentations: several masks of an image against several annotations of it. An image is
a slice with annotations; every metric is the mean over images, with an interval over groups of subjects. All but the
diversity of the annotations depend on the number of samples, `num_samples`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cases import EnsembleCase, Needs, Scores, Tally
from ..ensemble_metrics import score_ensemble
from ..metrics import percentiles, resample_mean
from ..options import EvalOptions
from ..reliability import Reliability


TASK = "segmentation"
TEXT = {
    "unit_of_averaging": (
        "mean over images (slices with annotations); intervals: 95 %, bootstrap over groups of subjects (patients);"
        " calibration: pixels of all images together, `marked`: those that a sample marks"
    ),
    "threshold_policy": (
        "samples are masks at the checkpoint's own threshold; nothing is tuned on these data. mean annotation rate:"
        " level sets of the training set's rate, without the image; random training annotation: one per sample"
    ),
}
COLUMNS = {
    "num_samples": "samples",
    "ged": "GED",
    "hm_iou": "HM-IoU",
    "collective_insight": "CI",
    "combined_sensitivity": "Sc",
    "maximum_dice": "Dmax",
    "diversity_agreement": "Da",
    "collective_insight_variances": "CI, Da of variances",
    "collective_insight_pairs_with_self": "CI, Da of pairs with self",
    "sample_diversity": "diversity of samples",
    "annotation_diversity": "diversity of raters",
    "dice_majority": "Dice of majorities",
    "expected_calibration_error": "ECE",
    "expected_calibration_error_marked": "ECE, marked",
    "brier_score": "Brier",
}
SWEEP = None
NEEDS = Needs()

# What models are compared by, in pairs.
COMPARED = ("ged", "hm_iou", "collective_insight", "dice_majority")


def score(row: dict, files: dict[str, list[Path]], thresholds: None, options: EvalOptions) -> Scores:
    """Scores one method against the annotations, with a record per image, and `reliability`: the curves of all pixels
    and of those that a sample marks."""
    calibrations = {"all": Reliability(), "marked": Reliability()}
    records = []
    for case in map(EnsembleCase.load, files["test"]):
        for number, pred, gt in zip(case.slices.tolist(), case.masks, case.annotations, strict=True):
            records.append({"subject": case.subject, "slice": number, "group": case.group, **score_ensemble(pred, gt)})
            predicted, observed = pred.mean(0), gt.mean(0)
            # Not where an annotation marks: pixels that are chosen by the outcome are never calibrated.
            marked = predicted > 0
            calibrations["all"].update(predicted, observed, case.group)
            calibrations["marked"].update(predicted[marked], observed[marked], case.group)
    metrics: dict[str, float | None] = {"num_samples": case.masks.shape[1]}
    resamples: dict[str, np.ndarray] = {}
    groups = np.unique([record["group"] for record in records], return_inverse=True)[1]
    for name in records[0]:
        if name not in ("subject", "slice", "group"):
            values = np.array([record[name] for record in records])
            metrics[name] = float(values.mean())
            resampled = resample_mean(values, groups)
            metrics[f"{name}_low"], metrics[f"{name}_high"] = percentiles(resampled)
            if name in COMPARED:
                resamples[name] = resampled
    reliability = {}
    for region, ending in (("all", ""), ("marked", "_marked")):
        values, reliability[region] = calibrations[region].describe()
        for name in ("expected_calibration_error", "brier_score"):
            metrics |= {f"{name}{ending}{end}": values[f"{name}{end}"] for end in ("", "_low", "_high")}
    subjects, drawn = ([record[name] for record in records] for name in ("subject", "group"))
    num_groups = dict.fromkeys(resamples, len(set(drawn)))
    tally = Tally(subjects, drawn, masked=[], overlaps={}, lesions={}, resamples=resamples, num_groups=num_groups)
    return Scores(metrics, records, {"reliability": reliability}, tally)
