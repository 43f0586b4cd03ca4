"""Conformal calibration on healthy scans, calibrated probabilities of a lesion, and how often the promises were kept.

Split conformal prediction for scans, conformal risk control (Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024) for the
share of slices and voxels: of subjects that are exchangeable, n for the calibration and a new one, at most a share
alpha on average is marked. Subjects (groups, patients) are drawn, never voxels or slices of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import binomtest

from ..checks import check_number
from ..data.prepared import PreparedSplit
from ..pipelines.guarantee import UNITS, lesion_probability
from .cases import Case
from .metrics import bootstrap_interval
from .reliability import Reliability


NUM_KNOTS = 200  # of a stored table
HEALTHY, PATIENTS = "healthy subjects", "healthy slices of patients"

# Different scores, rising, and how often each occurs.
Counted = tuple[np.ndarray, np.ndarray]


def risk_steps(units: Sequence[Counted]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different scores of all subjects, rising, and (n R(t) + 1) / (n + 1) of each as threshold t, R the mean
    over the n subjects of the share of their scores above t: never rising, 1 / (n + 1) at the end."""
    values = np.concatenate([scores for scores, _ in units])
    shares = np.concatenate([counts / counts.sum() for _, counts in units])
    scores, place = np.unique(values, return_inverse=True)
    above = np.append(np.bincount(place, shares)[::-1].cumsum()[-2::-1], 0.0)
    # Thirds that are added make no whole.
    return scores, (np.round(above, 9) + 1.0) / (len(units) + 1)


def check_alpha(alpha: float, subjects: int, population: str = HEALTHY) -> None:
    """Raises a `ValueError` if no threshold can promise `alpha` from so few subjects."""
    check_number("alpha", alpha, above=0, below=1)
    if alpha * (subjects + 1) < 1 - 1e-9:
        raise ValueError(
            f"`alpha` must be at least 1/(n+1) = {1 / (subjects + 1):.3g} with n = {subjects} ({population}), got {alpha:g}."
        )


def check_split(split: PreparedSplit, alpha: float) -> None:
    """Raises a `ValueError` if a split has too few subjects with healthy slices and without unknown labels for `alpha`:
    before anything is computed."""
    groups = set()
    for subject in split.subjects:
        rows = split.subject_rows(subject)
        labels = split.labels[rows.start : rows.stop]
        if (labels >= 0).all() and (labels == 0).any():
            groups.add(split.subject_info[subject]["group"])
    check_alpha(alpha, len(groups), "subjects with healthy slices")


def conformal_threshold(units: Sequence[np.ndarray], alpha: float) -> float:
    """
    Returns the smallest of the scores that keeps the promise: of a new healthy subject, exchangeable with these, a share
    of at most `alpha` is above it, in expectation over all draws of calibration and new subject.

    With one score for each of n subjects it is the ceil((n + 1)(1 - alpha))-th smallest, and the promise is that the
    probability of a score above it is at most `alpha`; with several, (n R(t) + 1) / (n + 1) <= alpha, where R is the
    mean over the subjects of the share of their scores above t. Ties are allowed.

    Args:
        units (sequence of n `np.ndarray`): The scores of one healthy subject each.
        alpha (`float`): At least 1 / (n + 1), below 1.

    Raises:
        ValueError: `alpha` is too small for n.
    """
    check_alpha(alpha, len(units))
    scores, risks = risk_steps([np.unique(scores, return_counts=True) for scores in units])
    return float(scores[_first_within(risks, alpha)])


def calibrate_conformal(cases: Iterable[Case], alpha: float) -> dict:
    """
    Calibrates a method from the cases of a split that it was not trained on.

    A subject with a slice of unknown label does not count. Scans are those of subjects without anomalous slices; where
    too few of these are there for `alpha`, slices and voxels are the healthy ones of all subjects, which are like those
    of healthy subjects by assumption only: `population` says so.

    Args:
        cases (iterable of [`Case`]): Of all subjects of the split.
        alpha (`float`): What is promised at most, above 0 and below 1.

    Returns:
        `dict`: `alpha`, `guarantees` (of each unit `n`, `population`, `threshold`, and the table of
        [`~pipelines.guarantee.p_values`]), `left_out` (units that `alpha` does not allow, with the reason) and
        `probability` ([`fit_probability`]).

    Raises:
        ValueError: There are too few healthy subjects for `alpha` whatever the unit.
    """
    check_number("alpha", alpha, above=0, below=1)
    groups, binned = _Groups(), []
    for case in cases:
        groups.add(case)
        mask = known_mask(case)
        if mask is not None:
            scores = _round_up(case.maps[case.brain])
            lesion = np.unique(scores[mask[case.brain]], return_counts=True)
            binned.append((case.drawn_with, np.unique(scores, return_counts=True), lesion))
    guarantees, left_out = {}, {}
    for unit in UNITS:
        population, units = groups.choose(unit, alpha)
        try:
            check_alpha(alpha, len(units), population)
        except ValueError as error:
            left_out[unit] = str(error)
            continue
        scores, risks = risk_steps(list(units.values()))
        first = _first_within(risks, alpha)
        guarantees[unit] = {
            "n": len(units),
            "population": population,
            "threshold": float(scores[first]),
            **_thin(scores, risks, first),
        }
    if not guarantees:
        raise ValueError(left_out["voxel"])
    return {"alpha": alpha, "guarantees": guarantees, "left_out": left_out, "probability": fit_probability(binned)}


def fit_probability(binned: Sequence[tuple[str, Counted, Counted]]) -> dict | None:
    """
    Fits P(lesion | score) of brain voxels by isotonic regression on binned scores: it never falls with the score, and its
    mean is the share of lesion voxels (`prevalence`) of this split, which it holds for. The bins hold about as many
    lesion and other voxels each, both counted as shares.

    Args:
        binned (sequence): Of each case with a mask the group, its scores, and those of its lesion voxels.

    Returns:
        `dict`, *optional*: `prevalence`, `subjects` (number of groups), rising `scores` and their `probabilities`;
        `None` unless there are lesion voxels and others.
    """
    if not binned:
        return None
    scores = np.unique(np.concatenate([counted[0] for _, counted, _ in binned]))
    totals, lesions = np.zeros(len(scores)), np.zeros(len(scores))
    for _, (values, counts), (lesion_values, lesion_counts) in binned:
        totals[np.searchsorted(scores, values)] += counts
        lesions[np.searchsorted(scores, lesion_values)] += lesion_counts
    others = totals - lesions
    if not lesions.sum() or not others.sum():
        return None
    mass = (lesions / lesions.sum() + others / others.sum()).cumsum() / 2
    bins = np.unique(np.minimum((mass * NUM_KNOTS).astype(np.int64), NUM_KNOTS - 1), return_inverse=True)[1]
    total, lesion, summed = (np.bincount(bins, values) for values in (totals, lesions, totals * scores))
    probabilities = np.clip(isotonic_regression(lesion / total, weights=total).x, 0.0, 1.0)
    # Between equal neighbours a knot says nothing.
    ends = np.ones(len(probabilities), bool)
    ends[1:-1] = (np.diff(probabilities)[1:] > 0) | (np.diff(probabilities)[:-1] > 0)
    return {
        "prevalence": float(lesions.sum() / totals.sum()),
        "subjects": len({group for group, _, _ in binned}),
        "scores": (summed / total)[ends].tolist(),
        "probabilities": probabilities[ends].tolist(),
    }


def known_mask(case: Case) -> np.ndarray | None:
    """Returns the reference mask of a case; an empty one where all slices are healthy; `None` where it is not known."""
    return np.zeros(case.brain.shape, bool) if case.mask is None and case.label == 0 else case.mask


def measure_promises(record: Mapping, cases: Iterable[Case]) -> tuple[dict, dict]:
    """
    Measures on other cases how often the promises of a calibration were kept, and the reliability of its probability.

    Args:
        record (`dict`): As [`calibrate_conformal`] returns it.
        cases (iterable of [`Case`]): Such as those of the test split.

    Returns:
        `tuple[dict, dict]`: Metrics, `conformal_UNIT_rate` with `_low` and `_high`, and those of the probability
        ([`~evaluation.reliability.Reliability`]) as `probability_...`; and for the report the same beside what was promised:
        of each unit `promised` (alpha), `n`, `population`, `threshold`, `rate`, `low`, `high`, `interval` (what it is), and
        `tested`, the number of subjects, with `left_out` and the curve `reliability`. The population is that of the
        calibration; there is no rate (`None`) without such subjects. The interval of scans is the exact one of a binomial
        share (Clopper and Pearson), others are bootstrap intervals over subjects.
    """
    groups, reliability = _Groups(), Reliability()
    for case in cases:
        groups.add(case)
        mask = known_mask(case)
        if mask is not None and record["probability"] is not None:
            predicted = lesion_probability(record["probability"], case.maps[case.brain])
            reliability.update(predicted, mask[case.brain], case.drawn_with)
    metrics, told = {}, {"alpha": record["alpha"], "left_out": dict(record["left_out"])}
    for unit, guarantee in record["guarantees"].items():
        units = groups.of(unit, only_healthy=guarantee["population"] == HEALTHY)
        shares = np.array(
            [counts[scores > guarantee["threshold"]].sum() / counts.sum() for scores, counts in units.values()]
        )
        kind = "95 % bootstrap over subjects"
        if unit == "scan" and len(units) and all(counts.sum() == 1 for _, counts in units.values()):
            kind = "95 % exact (Clopper-Pearson)"
            exact = binomtest(int(shares.sum()), len(shares)).proportion_ci(method="exact")
            low, high = float(exact.low), float(exact.high)
        else:
            low, high = bootstrap_interval(shares)
        rate = float(shares.mean()) if len(shares) else None
        metrics |= {
            f"conformal_{unit}_{name}": value
            for name, value in (("rate", rate), ("rate_low", low), ("rate_high", high))
        }
        told[unit] = {
            "promised": record["alpha"],
            **{name: guarantee[name] for name in ("n", "population", "threshold")},
            **{"rate": rate, "low": low, "high": high, "interval": kind, "tested": len(units)},
        }
    if record["probability"] is not None:
        values, curve = reliability.describe()
        metrics |= {f"probability_{name}": value for name, value in values.items()}
        told["probability"] = {
            **{name: record["probability"][name] for name in ("prevalence", "subjects")},
            "reliability": curve,
        }
    return metrics, told


class _Groups:
    """The scores of healthy scans, slices and voxels of every group (patient), case by case."""

    def __init__(self):
        self.labels: dict[str, int] = {}
        self._scores: dict[str, dict[str, list[Counted]]] = {unit: {} for unit in UNITS}

    def add(self, case: Case) -> None:
        """Adds a case, unless a label is unknown."""
        if (case.labels < 0).any():
            return
        group = case.drawn_with
        self.labels[group] = max(self.labels.get(group, 0), case.label)
        healthy = (case.labels == 0) & case.brain.any((1, 2))
        if not healthy.any():
            return
        voxels = _round_up(case.maps[healthy][case.brain[healthy]])
        for unit, scores in (("scan", [case.volume_score]), ("slice", case.slice_scores[healthy]), ("voxel", voxels)):
            self._scores[unit].setdefault(group, []).append(np.unique(scores, return_counts=True))

    def of(self, unit: str, *, only_healthy: bool) -> dict[str, Counted]:
        """Returns the scores of every group with healthy slices, or of those without an anomalous one."""
        return {
            group: tuple(np.concatenate(part) for part in zip(*parts, strict=True))
            for group, parts in self._scores[unit].items()
            if not only_healthy or self.labels[group] == 0
        }

    def choose(self, unit: str, alpha: float) -> tuple[str, dict[str, Counted]]:
        """Returns the population that is calibrated on, and the scores of its groups."""
        healthy, everybody = self.of(unit, only_healthy=True), self.of(unit, only_healthy=False)
        if unit == "scan" or alpha * (len(healthy) + 1) >= 1 - 1e-9 or len(everybody) == len(healthy):
            return HEALTHY, healthy
        return f"{HEALTHY} and {PATIENTS}" if healthy else PATIENTS, everybody


def _first_within(risks: np.ndarray, alpha: float) -> int:
    return int(np.argmax(risks <= alpha + 1e-12))


def _round_up(scores: np.ndarray) -> np.ndarray:
    """Rounds scores >= 0 up by at most 0.05 %, to the ends of bins of float32: what exceeds the end of a bin does so
    before and after, and there are few different ones."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
    return (bits | np.uint32(0xFFF)).view(np.float32)


def _thin(scores: np.ndarray, risks: np.ndarray, first: int) -> dict[str, list]:
    """The table of p-values with at most about `NUM_KNOTS` steps, the threshold among them; where it has more, a step
    says at most too much."""
    chosen = np.arange(len(scores))
    if len(scores) > NUM_KNOTS:
        levels = np.geomspace(risks[-1], 1.0, NUM_KNOTS)
        chosen = np.unique([*np.searchsorted(-risks, -levels, side="left"), first, len(scores) - 1])
        chosen = chosen[chosen < len(scores)]
    return {"scores": scores[chosen].astype(np.float64).tolist(), "p_values": risks[chosen].tolist()}
