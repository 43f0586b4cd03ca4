"""Whether probabilities come true: reliability curve, expected calibration error and Brier score, in numpy."""

from __future__ import annotations

import numpy as np

from .metrics import draw_groups, percentiles


class Reliability:
    """
    Collects probabilities and what came of them: where a map says 70 %, is 70 % lesion, or do 70 % of the raters mark
    the pixel? Array by array; memory does not grow.

    A value between two of the `bins`, equal bins of the probability in [0, 1], belongs to the upper one. With an
    ensemble of few samples even further raters are no diagonal: their share is a noisy estimate of the frequency, so
    that high shares are somewhat too high and low ones too low.
    """

    def __init__(self, bins: int = 10):
        self.bins = bins
        # Of each group, in the order of their first update: pixels, sums of predicted and observed, and of the squares
        # of their difference, in every bin.
        self._groups: dict[str | None, np.ndarray] = {}

    def update(self, predicted: np.ndarray, observed: np.ndarray, group: str | None = None) -> None:
        """Adds pixels, arrays of one shape: their probability in [0, 1], and their label, boolean or 0/1, or the share
        of the annotations that mark them. They may be chosen by `predicted`, but not by `observed`: where an annotation
        marks, nothing is calibrated. `group` names what is drawn as a whole for an interval; several updates may be of
        one."""
        predicted, observed = (np.asarray(values, np.float64).ravel() for values in (predicted, observed))
        if predicted.shape != observed.shape:
            raise ValueError(
                f"`predicted` and `observed` must have the same size, got {predicted.size} and {observed.size}."
            )
        for name, values in (("predicted", predicted), ("observed", observed)):
            if values.size and not (values.min() >= 0 and values.max() <= 1):
                raise ValueError(f"`{name}` must be in [0, 1], got {values.min():g} to {values.max():g}.")
        # A share such as 0.3 must not fall below its bin's edge by a rounding error.
        index = np.clip(np.floor(predicted * self.bins + 1e-6), 0, self.bins - 1).astype(int)
        sums = self._groups.setdefault(group, np.zeros((4, self.bins)))
        for row, weights in zip(sums, (None, predicted, observed, (predicted - observed) ** 2), strict=True):
            row += np.bincount(index, weights, self.bins)

    def curve(self) -> dict[str, np.ndarray]:
        """Returns `pixels`, mean `predicted` and mean `observed` of the bins that hold pixels, and `observed_low` and
        `observed_high`, the ends of the 95 % bootstrap interval over groups: `nan` where there are fewer than two
        groups. A resample without pixels of a bin does not count for it."""
        sums = self._sums()
        filled = sums[0].sum(0) > 0
        pixels, predicted, observed, _ = sums.sum(1)[:, filled]
        curve = {"pixels": pixels.astype(np.int64), "predicted": predicted / pixels, "observed": observed / pixels}
        ends = np.full((2, filled.sum()), np.nan)
        if sums.shape[1] > 1:
            with np.errstate(invalid="ignore"):
                rates = self._resampled(2)[:, filled] / self._resampled(0)[:, filled]
            ends = np.array([percentiles(column) for column in rates.T], np.float64).T
        return {**curve, "observed_low": ends[0], "observed_high": ends[1]}

    def expected_error(self) -> float:
        """Returns the expected calibration error: mean over the pixels of |predicted - observed| of their bins; `nan`
        without pixels. Over whole images the background makes it small, whatever happens in the lesion."""
        pixels, predicted, observed, _ = self._sums().sum(1)
        return float(np.abs(predicted - observed).sum() / pixels.sum()) if pixels.sum() else float("nan")

    def brier_score(self) -> float:
        """Returns the Brier score: mean over the pixels of (predicted - observed)^2, from the values themselves, not
        from bins; `nan` without pixels. 0 is best; a map that says the prevalence p everywhere has p (1 - p)."""
        pixels, _, _, squares = self._sums().sum((1, 2))
        return float(squares / pixels) if pixels else float("nan")

    def intervals(self) -> dict[str, tuple[float | None, float | None]]:
        """Returns the 95 % percentile bootstrap intervals of `expected_calibration_error` and `brier_score` over
        groups; `None` twice where there are fewer than two groups. The error of a resample is on average larger than
        that of all: its bins are noisier."""
        if len(self._groups) < 2:
            return dict.fromkeys(("expected_calibration_error", "brier_score"), (None, None))
        pixels, predicted, observed, squares = map(self._resampled, range(4))
        with np.errstate(invalid="ignore"):
            errors = np.abs(predicted - observed).sum(1) / pixels.sum(1)
            scores = squares.sum(1) / pixels.sum(1)
        return {"expected_calibration_error": percentiles(errors), "brier_score": percentiles(scores)}

    def describe(self) -> tuple[dict, dict]:
        """Returns the metrics `expected_calibration_error` and `brier_score` with the ends of their intervals, as a
        report holds them, and the curve as lists; `None` where undefined."""
        values = {"expected_calibration_error": self.expected_error(), "brier_score": self.brier_score()}
        metrics = {}
        for name, (low, high) in self.intervals().items():
            value = values[name]
            metrics |= {name: None if np.isnan(value) else value, f"{name}_low": low, f"{name}_high": high}
        curve = {
            name: [None if np.isnan(value) else value for value in column.tolist()]
            for name, column in self.curve().items()
        }
        return metrics, curve

    def _sums(self) -> np.ndarray:
        """What was collected, `(4, groups, bins)`."""
        return np.stack(list(self._groups.values()), 1) if self._groups else np.zeros((4, 0, self.bins))

    def _resampled(self, row: int) -> np.ndarray:
        """The sums of one kind in every resample of the groups, `(resamples, bins)`."""
        values = self._sums()[row]
        times = np.stack([np.bincount(drawn, minlength=len(values)) for drawn in draw_groups(len(values))])
        return times @ values
