"""Metrics of anomaly maps and masks, in numpy.

Definitions differ between the published programs (empty masks, exchanged names, pooled or per volume), so every
function states its own. Confusion counts: TP, FP, FN, TN are pixels of prediction and ground truth in the usual sense.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage


NUM_RESAMPLES = 2000  # of a bootstrap interval


def dice(pred: np.ndarray, gt: np.ndarray, *, empty: float = 1.0) -> float:
    """Returns the Dice coefficient 2 TP / (2 TP + FP + FN) of one mask, boolean or 0/1, and `empty` where both masks
    are empty: 1 as in AnoDDPM and AnoFPDM; `nan` as in ANDi and SADM, which leaves these masks out of a nan-mean. One
    empty mask beside a filled one is always 0."""
    tp, fp, fn, _ = confusion(pred, gt)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else empty


def iou(pred: np.ndarray, gt: np.ndarray, *, empty: float = 1.0) -> float:
    """Returns the intersection over union TP / (TP + FP + FN) of one mask, and `empty` where both masks are empty: 1
    in AnoFPDM's program, 0 in AnoDDPM's."""
    tp, fp, fn, _ = confusion(pred, gt)
    return tp / (tp + fp + fn) if tp + fp + fn else empty


def precision(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns TP / (TP + FP) of one mask; `nan` where nothing is predicted. The programs of AnoDDPM and AnoFPDM call
    it recall."""
    tp, fp, _, _ = confusion(pred, gt)
    return tp / (tp + fp) if tp + fp else float("nan")


def recall(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns TP / (TP + FN) of one mask; `nan` where the truth is empty. The programs of AnoDDPM and AnoFPDM call it
    precision."""
    tp, _, fn, _ = confusion(pred, gt)
    return tp / (tp + fn) if tp + fn else float("nan")


def false_positive_rate(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns FP / (FP + TN) of one mask; `nan` where the ground truth is full. It depends on how much background is
    included: pass `pred[brain], gt[brain]` for the rate inside the brain. The program of AnoDDPM returns FN / (FN +
    TN) under this name."""
    _, fp, _, tn = confusion(pred, gt)
    return fp / (fp + tn) if fp + tn else float("nan")


def confusion(pred: np.ndarray, gt: np.ndarray) -> tuple[int, int, int, int]:
    """Returns TP, FP, FN and TN of one mask, counts of pixels."""
    pred, gt = _mask_pair(pred, gt)
    tp = int(np.count_nonzero(pred & gt))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(gt)) - tp
    return tp, fp, fn, pred.size - tp - fp - fn


class LesionCounts(NamedTuple):
    """Lesions and predicted components of one volume."""

    found: int
    lesions: int
    wrong: int
    components: int

    def f1(self) -> float:
        """Returns the F1 score of [`lesion_f1`]."""
        if not (self.lesions and self.components):
            return 0.0 if self.lesions or self.components else 1.0
        rates = self.found / self.lesions, (self.components - self.wrong) / self.components
        return 2 * rates[0] * rates[1] / sum(rates) if sum(rates) else 0.0


def lesion_counts(pred: np.ndarray, gt: np.ndarray) -> LesionCounts:
    """Returns how many lesions of a volume or slice are found, of how many, and how many predicted components are
    wrong, of how many. Components are connected with corners (8 neighbours in 2-D, 26 in 3-D). A lesion is found when
    one of its voxels is predicted; a predicted component is wrong when none of its voxels is lesion."""
    pred, gt = _mask_pair(pred, gt)
    counts = []
    for components, other in ((gt, pred), (pred, gt)):
        labels, number = ndimage.label(components, structure=np.ones((3,) * components.ndim))
        touched = np.count_nonzero(np.bincount(labels[other], minlength=number + 1)[1:])
        counts.append((touched, number))
    (found, lesions), (right, components) = counts
    return LesionCounts(found, lesions, components - right, components)


def lesion_f1(pred: np.ndarray, gt: np.ndarray) -> float:
    """Returns the F1 score of the lesions of a volume or slice instead of its voxels, the harmonic mean of (found
    lesions / lesions) and (right components / predicted components), as of [`lesion_counts`]; 1 where both masks are
    empty, 0 where one of them is."""
    return lesion_counts(pred, gt).f1()


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the area under the ROC curve of slice or subject scores, which are higher the more anomalous, compared
    in float64, ties counted one half (as scikit-learn's `roc_auc_score`); `nan` without positives or negatives."""
    return _curve_of_samples(scores, labels).auroc()


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the average precision of scores as of [`auroc`]: the step-wise area under the precision-recall curve
    with ties as one step (as scikit-learn's `average_precision_score`); `nan` without positives, 1 without negatives.
    Its value for chance is the share of positives, so it compares only at equal prevalence."""
    return _curve_of_samples(scores, labels).average_precision()


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray | None = None, sizes: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """
    Returns the 95 % percentile bootstrap interval of a mean, from 2000 draws with replacement of whole groups, so that
    slices or visits of one subject are drawn together; `None` twice where there are fewer than two groups.

    Args:
        values (`np.ndarray` of shape `(N,)`): What the mean is of.
        groups (`np.ndarray` of shape `(N,)`, *optional*): The group of each; by default each is one of its own.
        sizes (`np.ndarray` of shape `(N,)`, *optional*):
            What the sum of the values is divided by the sum of: 1 each by default, which makes it a mean. With twice
            the overlap as value and both areas as size it is the pooled Dice.
    """
    return percentiles(resample_mean(values, groups, sizes))


def resample_mean(values: np.ndarray, groups: np.ndarray | None = None, sizes: np.ndarray | None = None) -> np.ndarray:
    """Returns the mean in each of the resamples of [`bootstrap_interval`], arguments as there: `(NUM_RESAMPLES,)`,
    `nan` where it is undefined, and everywhere if there are fewer than two groups. Means of other values of the same
    groups are of the same resamples."""
    values = np.asarray(values, dtype=np.float64)
    subjects = np.arange(values.size) if groups is None else np.unique(groups, return_inverse=True)[1]
    counts = np.bincount(subjects, weights=sizes)
    if counts.size < 2:
        return np.full(NUM_RESAMPLES, np.nan)
    sums = np.bincount(subjects, weights=values)
    drawn = draw_groups(counts.size)
    with np.errstate(invalid="ignore"):
        return sums[drawn].sum(1) / counts[drawn].sum(1)


def draw_groups(count: int) -> np.ndarray:
    """Returns the numbers of the groups of every resample, `(NUM_RESAMPLES, count)`, always the same ones."""
    return np.random.default_rng(0).integers(0, count, size=(NUM_RESAMPLES, count))


def percentiles(values: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the interval that holds 95 % of the values of the resamples that have one, `None` twice if none has."""
    defined = values[np.isfinite(values)]
    if not defined.size:
        return None, None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


class PooledScores:
    """
    Scores of all voxels of a data set against their labels: average precision, AUROC and Dice, pooled.

    Up to `max_exact` voxels the scores are kept (4 bytes each) and everything is exact, ties as in scikit-learn. Above
    that they become integer counts in 2**20 fixed bins: the upper 20 bits of the float32, in order, so a bin is never
    wider than 2**-11 (0.05 %) of its values, whatever their range, and nothing has to be known about it in advance.
    Scores of one bin then count as tied; [`error_bounds`] gives, from the counts, how far this can be from the exact
    result. The result does not depend on the order of the updates.

    [`intervals`] needs the group of every update, such as the subject: the counts of its bins are kept, too.
    """

    def __init__(self, max_exact: int = 50_000_000):
        self.max_exact = max_exact
        self.num_positives = 0
        self.num_negatives = 0
        # Index 0 negatives, 1 positives. The first array of each list is sorted, the others are new.
        self._samples = ([np.empty(0, np.float32)], [np.empty(0, np.float32)])
        self._counts: np.ndarray | None = None  # (2, 2**20) int64 once `max_exact` is passed
        self._groups: dict[str, int] = {}
        # Index 0 negatives, 1 positives: number of the group, its filled bins and their counts.
        self._group_counts: tuple[list, list] = ([], [])

    @property
    def is_exact(self) -> bool:
        """Whether the scores themselves are still kept."""
        return self._counts is None

    def update(self, scores: np.ndarray, labels: np.ndarray, group: str | None = None) -> None:
        """Adds voxels: finite scores of any unit, used as float32, and boolean or 0/1 labels of the same shape. Index
        both with the brain mask to leave the background out. `group` names what is drawn as a whole for an interval;
        several updates may be of one."""
        scores, labels = _score_pair(scores, labels, np.float32)
        # Adding zero turns -0.0, which equals 0.0, into the bits of 0.0.
        samples = (scores[~labels] + np.float32(0), scores[labels] + np.float32(0))
        self.num_negatives += samples[0].size
        self.num_positives += samples[1].size
        filled = None
        if group is not None:
            number = self._groups.setdefault(group, len(self._groups))
            filled = [_count_filled(sample) for sample in samples]
            for kept, own in zip(self._group_counts, filled, strict=True):
                kept.append((number, *own))
        if self._counts is None:
            for kept, new in zip(self._samples, samples, strict=True):
                kept.append(new)
            if self.num_negatives + self.num_positives > self.max_exact:
                self._counts = np.stack([sum(_count(array) for array in kept) for kept in self._samples])
                for kept in self._samples:
                    kept.clear()
        elif filled is not None:
            for counts, (bins, own) in zip(self._counts, filled, strict=True):
                counts[bins] += own
        else:
            self._counts += np.stack([_count(sample) for sample in samples])

    def average_precision(self) -> float:
        """Returns the step-wise average precision; `nan` without positives, 1 without negatives."""
        return self._curve().average_precision()

    def auroc(self) -> float:
        """Returns the area under the ROC curve, ties one half; `nan` without positives or without negatives."""
        return self._curve().auroc()

    def best_dice(self) -> tuple[float, float]:
        """Returns the highest pooled Dice over all thresholds, and that threshold, for `map > threshold` in float32
        (the highest one with this Dice, halfway to the next lower score); `nan` twice without positives. Above
        `max_exact` voxels the thresholds are the edges of the bins and the Dice is the exact one of the threshold. An
        oracle when the labels are those of the test set."""
        curve = self._curve()
        if not curve.num_positives:
            return float("nan"), float("nan")
        values = curve.dice()
        best = int(values.argmax())
        if self._counts is not None:
            return float(values[best]), _upper_edge(int(curve.scores[best]) - 1)
        score = curve.scores[best]
        lower = [s[0][: np.searchsorted(s[0], score)][-1:] for s in self._samples]
        lower = np.concatenate([*lower, [np.float32(-np.inf)]]).max()
        threshold = np.float32(lower + (np.float64(score) - lower) / 2) if np.isfinite(lower) else lower
        if not np.isfinite(threshold):
            threshold = np.nextafter(score, np.float32(-np.inf))
        return float(values[best]), float(lower if threshold >= score else threshold)

    def error_bounds(self) -> dict[str, float]:
        """Returns the largest possible distance of `average_precision`, `auroc` and `best_dice` from their exact
        values, whatever the order of the scores inside the bins. Needs bins, positives and negatives."""
        c = self._curve()
        tp = c.positives.cumsum()
        fp = c.negatives_above + c.negatives_tied
        # Best order in a bin: its positives, as one tie, before its negatives. Worst: its negatives first, then its
        # positives one by one; their precisions x / (x + fp) are concave in x, so the chord between first and last
        # lies below.
        highest = tp / (tp + c.negatives_above)
        first = tp - c.positives + 1
        lowest = (first / (first + fp) + tp / (tp + fp)) / 2
        middle = tp / (tp + fp)
        above = (c.positives * (highest - middle)).sum()
        below = (c.positives * (middle - lowest)).sum()
        best = 2 * tp / (tp + c.negatives_above + c.num_positives)
        return {
            "average_precision": float(max(above, below) / c.num_positives),
            "auroc": float((c.positives / 2 * c.negatives_tied).sum() / (float(c.num_positives) * c.num_negatives)),
            "best_dice": float(max(0.0, best.max() - c.dice().max())),
        }

    def intervals(self) -> dict[str, tuple[float | None, float | None]]:
        """Returns the 95 % percentile bootstrap intervals of `average_precision` and `auroc`, of the values of
        [`resamples`]; `None` twice where there are fewer than two groups, or nowhere both labels."""
        return {name: percentiles(values) for name, values in self.resamples().items()}

    def resamples(self) -> dict[str, np.ndarray]:
        """Returns `average_precision` and `auroc` in each of the resamples of the groups of [`bootstrap_interval`]:
        `(NUM_RESAMPLES,)` each, `nan` without positives or negatives, and everywhere if there are fewer than two groups.

        The scores of a resample are not sorted anew: they are counts in about 2000 bins, each with at most a thousandth
        of all positives and a thousandth of all negatives (or scores within 0.05 %), and those of one bin count as
        tied. Measured, the ends of the intervals are off by less than 0.001."""
        names = ("average_precision", "auroc")
        if len(self._groups) < 2 or not (self.num_positives and self.num_negatives):
            return {name: np.full(NUM_RESAMPLES, np.nan) for name in names}
        counts = self._count_groups()
        groups = counts.shape[1]
        resamples = []
        # Some at a time: arrays of all resamples and bins are large.
        for drawn in np.array_split(draw_groups(groups), max(1, NUM_RESAMPLES // 100)):
            times = np.stack([np.bincount(row, minlength=groups) for row in drawn]).astype(np.float64)
            negatives, positives = times @ counts
            tp, fp = positives.cumsum(1), negatives.cumsum(1)
            precisions = tp / np.maximum(tp + fp, 1)
            beaten = fp[:, -1:] - fp + negatives / 2
            with np.errstate(invalid="ignore"):
                rows = (positives * precisions).sum(1), (positives * beaten).sum(1) / fp[:, -1]
                resamples.append(np.stack(rows) / tp[:, -1])
        values = np.concatenate(resamples, 1)
        values[:, np.isnan(values).any(0)] = np.nan  # without positives, or without negatives
        return dict(zip(names, values, strict=True))

    def thresholds_exceeded_by(self, shares: np.ndarray) -> np.ndarray:
        """Returns, for each of the rising `shares (T,)`, a threshold that at least this share of the scores exceeds,
        the highest edge of a bin of which this holds: falling, float32 values as float64, without repetitions. Every
        update must have a group."""
        totals = np.zeros(1 << (32 - _BIN_BITS), np.int64)
        for kept in self._group_counts:
            for _, bins, counts in kept:
                totals[bins] += counts
        filled = np.flatnonzero(totals)[::-1]
        above = totals[filled].cumsum()
        if not filled.size:
            return np.empty(0)
        places = np.searchsorted(above, np.ceil(np.asarray(shares) * above[-1]))
        return np.array([_upper_edge(int(index) - 1) for index in dict.fromkeys(filled[places].tolist())])

    def _count_groups(self) -> np.ndarray:
        """Counts of negatives and positives of each group, `(2, groups, bins)` float64, in bins from the highest to the
        lowest score, neighbours of which are put together."""
        totals = np.zeros((2, 1 << (32 - _BIN_BITS)), np.int64)
        for total, kept in zip(totals, self._group_counts, strict=True):
            for _, bins, counts in kept:
                total[bins] += counts
        filled = np.flatnonzero(totals.any(0))[::-1]
        above = totals[:, filled].cumsum(1) - totals[:, filled]
        quantile = above * 1000 // totals.sum(1, keepdims=True)
        place = np.zeros(totals.shape[1], np.int64)
        place[filled[1:]] = (np.diff(quantile) > 0).any(0).cumsum()
        counts = np.zeros((2, len(self._groups), place.max() + 1))
        for result, kept in zip(counts, self._group_counts, strict=True):
            for group, bins, own in kept:
                result[group] += np.bincount(place[bins], own, result.shape[1])
        return counts

    def _curve(self) -> _Curve:
        if self._counts is None:
            for kept in self._samples:
                if len(kept) > 1:
                    kept[:] = [np.concatenate(kept)]
                    kept[0].sort()
            return _curve(self._samples[1][0], self._samples[0][0])
        negatives, positives = self._counts
        filled = np.flatnonzero(positives)[::-1]
        above = self.num_negatives - negatives.cumsum()[filled]
        return _Curve(filled, positives[filled], above, negatives[filled], self.num_positives, self.num_negatives)


_BIN_BITS = 12  # lower bits of a float32 that a bin leaves out: 23 - 12 = 11 bits of the mantissa remain


def _bins(scores: np.ndarray) -> np.ndarray:
    """Bin of each finite float32 (no -0.0): the bits, monotone with negatives flipped, without the lower 12."""
    bits = np.ascontiguousarray(scores).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> _BIN_BITS).astype(np.int64)


def _upper_edge(index: int) -> float:
    """The largest float32 of a bin."""
    ordered = (index << _BIN_BITS) | ((1 << _BIN_BITS) - 1)
    if ordered == (1 << 31) - 1:
        ordered -= 1  # -0.0 would not be below 0.0
    bits = ordered & ~(1 << 31) if ordered >> 31 else ~ordered & 0xFFFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _count(scores: np.ndarray) -> np.ndarray:
    """Histogram of float32 scores, in pieces so that the int64 bins stay small beside the scores."""
    counts = np.zeros(1 << (32 - _BIN_BITS), dtype=np.int64)
    for start in range(0, scores.size, 1 << 22):
        counts += np.bincount(_bins(scores[start : start + (1 << 22)]), minlength=counts.size)
    return counts


def _count_filled(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins that hold scores, int32, and their counts."""
    if scores.size < 1 << 16:
        bins, counts = np.unique(_bins(scores), return_counts=True)
    else:
        counts = _count(scores)
        bins = np.flatnonzero(counts)
        counts = counts[bins]
    return bins.astype(np.int32), counts


class _Curve(NamedTuple):
    """One entry per distinct score (or bin) that holds positives, from the highest to the lowest."""

    scores: np.ndarray
    positives: np.ndarray
    negatives_above: np.ndarray
    negatives_tied: np.ndarray
    num_positives: int
    num_negatives: int

    def average_precision(self) -> float:
        if not self.num_positives:
            return float("nan")
        tp = self.positives.cumsum()
        fp = self.negatives_above + self.negatives_tied
        return float((self.positives * (tp / (tp + fp))).sum() / self.num_positives)

    def auroc(self) -> float:
        if not self.num_positives or not self.num_negatives:
            return float("nan")
        # The share of negatives that each positive beats, ties one half; in floats because the product can pass int64.
        beaten = (self.num_negatives - self.negatives_above - self.negatives_tied / 2) / self.num_negatives
        return float((self.positives * beaten).sum() / self.num_positives)

    def dice(self) -> np.ndarray:
        """Computes the pooled Dice of `score >= self.scores`. Other thresholds only add negatives, so the best one is
        among them."""
        tp = self.positives.cumsum()
        return 2 * tp / (tp + self.negatives_above + self.negatives_tied + self.num_positives)


def _curve(positives: np.ndarray, negatives: np.ndarray) -> _Curve:
    """Curve of two sorted arrays of scores."""
    scores, counts = np.unique(positives, return_counts=True)
    below = np.searchsorted(negatives, scores, side="left")
    not_above = np.searchsorted(negatives, scores, side="right")
    above = negatives.size - not_above
    tied = not_above - below
    return _Curve(scores[::-1], counts[::-1], above[::-1], tied[::-1], positives.size, negatives.size)


def _curve_of_samples(scores: np.ndarray, labels: np.ndarray) -> _Curve:
    scores, labels = _score_pair(scores, labels, np.float64)
    return _curve(scores[labels], np.sort(scores[~labels]))


def as_mask(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of 0 and 1 as bool."""
    array = np.asarray(array)
    if array.dtype == bool:
        return array
    mask = array == 1
    if not (mask | (array == 0)).all():
        raise ValueError(f"`{name}` must be boolean or hold 0 and 1 only; threshold it first.")
    return mask


def _mask_pair(pred: np.ndarray, gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, gt = as_mask("pred", pred), as_mask("gt", gt)
    if pred.shape != gt.shape:
        raise ValueError(f"`pred` and `gt` must have the same shape, got {pred.shape} and {gt.shape}.")
    return pred, gt


def _score_pair(scores: np.ndarray, labels: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=dtype), as_mask("labels", labels)
    if scores.shape != labels.shape:
        raise ValueError(f"`scores` and `labels` must have the same shape, got {scores.shape} and {labels.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError("`scores` must be finite, got nan or infinite values.")
    return scores, labels
