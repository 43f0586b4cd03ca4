"""Our own protocol: voxels of the brain, pooled over the test split, under every threshold policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from ...pipelines.postprocessing import remove_small_components
from ..cases import Case, Needs, Scores, Tally
from ..froc import SHARES, count_detections, free_response
from ..metrics import LesionCounts, PooledScores, auroc, average_precision, dice, lesion_counts, percentiles
from ..options import EvalOptions
from ..scoring import (
    group_interval,
    group_resamples,
    healthy_scores,
    healthy_threshold,
    masked_cases,
    name_interval,
    score_resamples,
)
from ..surfaces import surface_distances
from ..thresholds import threshold_for_dice, yen_threshold


TASK = "anomaly-detection"
TEXT = {
    "unit_of_averaging": (
        "pooled brain voxels; volume_dice, lesion_f1 and surfaces: mean over subjects with lesion; lesion recall: all"
        " lesions; false positives: components per volume; slices and subjects for AUROC"
    ),
    "threshold_policy": (
        "oracle: best pooled Dice on the test split; validation: best pooled Dice on the validation split; healthy:"
        " {healthy_fpr:g} of the voxels of healthy validation slices; yen: label-free, per subject; all chosen "
        "before small components are removed; own: the method's own masks of the slices that it calls anomalous"
    ),
}
COLUMNS = {
    "voxel_average_precision": "AP (voxels)",
    "voxel_auroc": "AUROC (voxels)",
    "dice_oracle": "Dice, oracle",
    "dice_validation": "Dice, validation",
    "dice_healthy": "Dice, healthy only",
    "dice_yen": "Dice, label-free",
    "volume_dice_validation": "Dice per volume, validation",
    "slice_auroc": "AUROC (slices)",
    "subject_auroc": "AUROC (subjects)",
    "dice_own": "Dice, own masks",
}
SWEEP = None
NEEDS = Needs()


def score(row: dict, files: dict[str, list[Path]], thresholds: None, options: EvalOptions) -> Scores:
    """Scores one method under every threshold policy, with one record per subject, the free-response curve `froc`, and
    `distance_unit` of the distances between surfaces. The policy "own" is there for methods that make masks themselves.
    Where there are too many voxels to be exact, `error_bounds` are those of [`PooledScores`]."""
    test, validation = files["test"], files.get("validation", [])
    pooled = PooledScores()
    slice_scores, slice_labels, records, groups = [], [], [], []
    has_own, in_mm, volumes = False, True, 0
    for case in map(Case.load, test):
        if case.mask is not None:
            pooled.update(case.maps[case.brain], case.mask[case.brain], case.drawn_with)
            in_mm &= case.spacing is not None
        has_own |= case.own_mask is not None
        volumes += case.mask is not None or case.label == 0
        slice_scores.append(case.slice_scores)
        slice_labels.append(case.labels)
        records.append({"subject": case.subject, "label": case.label, "score": case.volume_score})
        groups.append(case.drawn_with)

    inside = [(case.maps[case.brain], case.mask[case.brain]) for case in masked_cases(validation)]
    has_lesion = any(mask.any() for _, mask in inside)
    found = {
        "oracle": pooled.best_dice()[1] if pooled.num_positives else None,
        "validation": threshold_for_dice(*zip(*inside, strict=True)) if has_lesion else None,
        "healthy": healthy_threshold(healthy_scores(validation), options.healthy_fpr),
    }
    metrics = {
        "voxel_average_precision": pooled.average_precision() if pooled.num_positives else None,
        "voxel_auroc": pooled.auroc() if pooled.num_positives and pooled.num_negatives else None,
    }
    drawn = pooled.resamples()
    for name, values in drawn.items():
        metrics |= name_interval(f"voxel_{name}", percentiles(values))
    resamples = {"voxel_average_precision": drawn["average_precision"]}
    masks = _Masks((*found, "yen", *(["own"] if has_own else [])), found, row["settings"]["min_component_size"], in_mm)
    curve = pooled.thresholds_exceeded_by(SHARES)
    for case, record in zip(map(Case.load, test), records, strict=True):
        if case.mask is not None or case.label == 0:
            masks.add(case, record, curve, volumes)
    metrics |= masks.score_overlaps(resamples)
    metrics |= _mean_over_subjects(("volume_dice", "lesion_f1"), masks.policies, records, groups)
    metrics |= {f"threshold_{policy}": value for policy, value in found.items()}
    metrics |= _score_labels(slice_scores, slice_labels, records, groups, resamples)
    metrics |= masks.score_lesions()
    metrics |= _mean_over_subjects(("surface_dice", "hausdorff_95"), masks.policies, records, groups)
    metrics |= {
        f"hausdorff_95_undefined_{policy}": sum(record.get(f"hausdorff_95_{policy}", 0) is None for record in records)
        for policy in masks.overlaps
    }
    detection, froc = free_response(*masks.detections(len(curve)), curve)
    metrics |= detection
    bounded = not pooled.is_exact and pooled.num_positives and pooled.num_negatives
    more = {"error_bounds": pooled.error_bounds()} if bounded else {}
    more |= {"froc": froc, "distance_unit": "mm" if in_mm else "voxels"}
    labelled = {group for group, labels in zip(groups, slice_labels, strict=True) if (labels >= 0).any()}
    return Scores(metrics, records, more, masks.tally(resamples, len(labelled)))


def score_statistic(
    test: tuple[np.ndarray, np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> dict:
    """Returns the AUROC over slices of a statistic, scores, labels and names of groups `(N,)` each, in the direction
    that is better on the validation split (without one, high values are anomalous), and its interval. Slices of unknown
    label (-1) do not count."""
    direction = None if validation is None else _if_two_classes(auroc, *validation[:2])
    sign = -1.0 if direction is not None and direction < 0.5 else 1.0
    scores, labels, groups = sign * test[0], *test[1:]
    interval = name_interval("slice_auroc", percentiles(score_resamples(scores, labels, groups)["auroc"]))
    return {"slice_auroc": _if_two_classes(auroc, scores, labels), **interval, "direction": sign}


class _Masks:
    """The masks of one method under each policy, case by case: of those with a mask, and of healthy ones, whose
    components are false."""

    def __init__(self, policies: tuple[str, ...], found: dict[str, float | None], smallest: int, in_mm: bool):
        self.policies, self.found, self.smallest, self.in_mm = policies, found, smallest, in_mm
        defined = [policy for policy in policies if found.get(policy, 0.0) is not None]
        self.overlaps: dict[str, list] = {policy: [] for policy in defined}
        self.lesions: dict[str, list[LesionCounts]] = {policy: [] for policy in defined}
        self.subjects: list[str] = []
        self.groups: list[str] = []
        self.masked: list[bool] = []
        self._detections: list[np.ndarray] = []
        self._lesions: list[int] = []

    def add(self, case: Case, record: dict, curve: np.ndarray, volumes: int) -> None:
        """Adds a case, and its scores under each policy to the record of a subject with lesion. `curve` are the
        thresholds of the free-response curve, `volumes` is how many are added."""
        self.subjects.append(case.subject)
        self.groups.append(case.drawn_with)
        self.masked.append(case.mask is not None)
        # Nothing outside the brain counts, and labels of components take their time by the voxel.
        box = next(iter(ndimage.find_objects(case.brain.astype(np.uint8))), (slice(0, 1),) * 3)
        brain, maps = case.brain[box], case.maps[box]
        reference = np.zeros_like(brain) if case.mask is None else case.mask[box] & brain
        has_lesion = reference.any()
        for policy, overlaps in self.overlaps.items():
            if policy == "own":
                predicted = (case.own_mask & (case.own_labels == 1)[:, None, None])[box]
            else:
                predicted = maps > (yen_threshold(maps[brain]) if policy == "yen" else self.found[policy])
            predicted = remove_small_components(predicted & brain, self.smallest, 3)
            overlaps.append([(predicted & reference).sum(), predicted.sum() + reference.sum()])
            self.lesions[policy].append(lesion_counts(predicted, reference))
            if has_lesion:
                record[f"dice_{policy}"] = dice(predicted, reference)
                record[f"lesion_f1_{policy}"] = self.lesions[policy][-1].f1()
                spacing = case.spacing.tolist() if self.in_mm else [1.0, 1.0, 1.0]
                if len(case.brain) == 1:  # a picture has no surface across slices
                    surface, distance = surface_distances(predicted[0], reference[0], spacing[1:])
                else:
                    surface, distance = surface_distances(predicted, reference, spacing)
                record[f"surface_dice_{policy}"] = surface
                record[f"hausdorff_95_{policy}"] = None if np.isnan(distance) else distance
        self._detections.append(count_detections(maps, reference, brain, curve, self.smallest, volumes))
        self._lesions.append(ndimage.label(reference, structure=np.ones((3, 3, 3)))[1])

    def score_overlaps(self, resamples: dict[str, np.ndarray]) -> dict[str, float | None]:
        """Returns the pooled Dice of each policy, over the cases with a mask; `None` without a threshold, and if no
        subject has a lesion. Adds its resamples."""
        groups = [group for group, masked in zip(self.groups, self.masked, strict=True) if masked]
        metrics: dict[str, float | None] = {}
        for policy in self.policies:
            counts = np.zeros((0, 2))
            if policy in self.overlaps and any(self._lesions):
                counts = np.reshape(self.overlaps[policy], (-1, 2))[np.array(self.masked)].astype(float)
            overlap, size = counts.sum(0)
            metrics[f"dice_{policy}"] = float(2 * overlap / size) if size else None
            drawn = group_resamples(2 * counts[:, 0], groups[: len(counts)], counts[:, 1])
            metrics |= name_interval(f"dice_{policy}", percentiles(drawn))
            resamples[f"dice_{policy}"] = drawn
        return metrics

    def score_lesions(self) -> dict[str, float | None]:
        """Returns the recall of all lesions, and the false positive components a volume, of each policy."""
        metrics: dict[str, float | None] = {}
        for policy in self.policies:
            counts = np.reshape(self.lesions.get(policy, []), (-1, 4)).astype(float)
            found, lesions, wrong, _ = counts.T
            groups = self.groups[: len(counts)]
            metrics[f"lesion_recall_{policy}"] = float(found.sum() / lesions.sum()) if lesions.any() else None
            metrics |= name_interval(f"lesion_recall_{policy}", group_interval(found, groups, lesions))
            metrics[f"false_positives_{policy}"] = float(wrong.mean()) if len(wrong) else None
            metrics |= name_interval(f"false_positives_{policy}", group_interval(wrong, groups))
        return metrics

    def detections(self, thresholds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns counts, lesions and groups as of [`free_response`]."""
        numbers = {group: number for number, group in enumerate(dict.fromkeys(self.groups))}
        groups = np.array([numbers[group] for group in self.groups], np.int64)
        return np.reshape(self._detections, (len(groups), thresholds, 2)), np.array(self._lesions, np.int64), groups

    def tally(self, resamples: dict[str, np.ndarray], labelled: int) -> Tally:
        """Returns what is kept of them; `labelled` is how many groups have a slice of known label."""
        overlaps = {policy: np.reshape(counts, (-1, 2)) for policy, counts in self.overlaps.items()}
        lesions = {policy: np.reshape(counts, (-1, 4)) for policy, counts in self.lesions.items()}
        with_mask = {group for group, masked in zip(self.groups, self.masked, strict=True) if masked}
        num_groups = dict.fromkeys(resamples, len(with_mask)) | {"slice_auroc": labelled}
        return Tally(self.subjects, self.groups, self.masked, overlaps, lesions, resamples, num_groups)


def _mean_over_subjects(
    names: tuple[str, ...], policies: tuple[str, ...], records: list[dict], groups: list[str]
) -> dict[str, float | None]:
    """The means of values of the subjects' records over those that have one, with their intervals."""
    metrics: dict[str, float | None] = {}
    for name in names:
        for policy in policies:
            key = f"{name}_{policy}".removeprefix("volume_")
            some = [
                (record[key], group)
                for record, group in zip(records, groups, strict=True)
                if record.get(key) is not None
            ]
            values, owners = np.array([value for value, _ in some]), [group for _, group in some]
            metrics[f"{name}_{policy}"] = float(values.mean()) if some else None
            metrics |= name_interval(f"{name}_{policy}", group_interval(values, owners))
    return metrics


def _score_labels(
    slice_scores: list[np.ndarray],
    slice_labels: list[np.ndarray],
    records: list[dict],
    groups: list[str],
    resamples: dict[str, np.ndarray],
) -> dict[str, float | None]:
    """The metrics of the scores of slices and subjects. Adds the resamples of the slices' AUROC."""
    scores, labels = np.concatenate(slice_scores), np.concatenate(slice_labels)
    metrics = {
        "slice_auroc": _if_two_classes(auroc, scores, labels),
        "slice_average_precision": _if_two_classes(average_precision, scores, labels),
    }
    owners = np.repeat(groups, [len(one) for one in slice_labels])
    drawn = score_resamples(scores, labels, owners)
    resamples["slice_auroc"] = drawn["auroc"]
    for name, values in drawn.items():
        metrics |= name_interval(f"slice_{name}", percentiles(values))
    subjects = [np.array([record[name] for record in records]) for name in ("score", "label")]
    metrics["subject_auroc"] = _if_two_classes(auroc, *subjects)
    drawn = score_resamples(*subjects, np.array(groups))["auroc"]
    return metrics | name_interval("subject_auroc", percentiles(drawn))


def _if_two_classes(metric: Callable, scores: np.ndarray, labels: np.ndarray) -> float | None:
    known = labels >= 0
    scores, labels = scores[known], labels[known]
    return float(metric(scores, labels == 1)) if len(np.unique(labels)) == 2 else None
