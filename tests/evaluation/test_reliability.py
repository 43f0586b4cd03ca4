"""Whether probabilities come true, on a few pixels each."""

import numpy as np
import pytest

from anodiff.evaluation.reliability import Reliability


def test_calibrated_frequencies():
    rng = np.random.default_rng(0)
    members = 8
    share = rng.integers(0, members + 1, 40000) / members
    raters = (rng.random((4, share.size)) < share).mean(0)
    calibration = Reliability()
    for part in np.array_split(np.arange(share.size), 3):  # image by image
        calibration.update(share[part].reshape(1, -1), raters[part].reshape(1, -1))
    curve = calibration.curve()
    assert curve["pixels"].sum() == share.size and len(curve["pixels"]) == members + 1
    np.testing.assert_allclose(curve["predicted"], np.arange(members + 1) / members, atol=1e-12)
    np.testing.assert_allclose(curve["observed"], curve["predicted"], atol=0.02)
    assert calibration.expected_error() < 0.01


def test_miscalibrated_frequencies():
    calibration = Reliability(5)
    predicted, observed = np.array([0.0, 0.0, 0.3, 0.35, 0.9, 1.0]), np.array([0.0, 0.5, 0.0, 0.25, 1.0, 0.0])
    calibration.update(predicted, observed)
    curve = calibration.curve()
    assert curve["pixels"].tolist() == [2, 2, 2]
    np.testing.assert_allclose(curve["predicted"], [0, 0.325, 0.95])
    np.testing.assert_allclose(curve["observed"], [0.25, 0.125, 0.5])
    assert calibration.expected_error() == pytest.approx((0.25 + 0.2 + 0.45) / 3)


def test_shares_at_the_edge_of_a_bin():
    # 0.1 * 3 is above 0.3 in floating point and 1 - 0.9 below 0.1; each share is its own bin.
    calibration = Reliability(10)
    shares = np.concatenate([np.arange(10) / 10, 0.1 * np.arange(10), 1 - 0.1 * np.arange(1, 11)])
    calibration.update(shares, shares)
    assert calibration.curve()["pixels"].tolist() == [3] * 10


def test_no_frequencies():
    calibration = Reliability()
    calibration.update(np.zeros(0), np.zeros(0))
    assert np.isnan(calibration.expected_error())
    assert np.isnan(calibration.brier_score()) and not calibration.curve()["pixels"].size
    metrics, curve = Reliability().describe()
    assert set(metrics.values()) == {None} and curve["observed"] == []


def test_brier_score_is_of_the_values_not_of_the_bins():
    calibration = Reliability(1)
    calibration.update(np.array([0.1, 0.8, 0.6]), np.array([False, True, False]))
    assert calibration.brier_score() == pytest.approx((0.01 + 0.04 + 0.36) / 3)
    assert calibration.expected_error() == pytest.approx(abs(1.5 - 1) / 3)


def test_intervals_are_over_groups():
    # Three groups of pixels at 0.5: of the first all are marked, of the others none. A resample of three groups holds
    # the first one 0 to 3 times (8, 12, 6 and 1 of 27): the observed rate is 0, 1/3, 2/3 or 1.
    calibration = Reliability()
    for name, marked in (("a", 1), ("b", 0), ("c", 0)):
        for _ in range(2):  # two updates of one group are one group
            calibration.update(np.full(5, 0.5), np.full(5, marked), name)
    metrics, curve = calibration.describe()
    assert curve["pixels"] == [30] and curve["observed"] == pytest.approx([1 / 3])
    assert (curve["observed_low"], curve["observed_high"]) == ([0.0], [1.0])
    assert metrics["brier_score"] == metrics["brier_score_low"] == metrics["brier_score_high"] == 0.25
    assert metrics["expected_calibration_error"] == pytest.approx(1 / 6)
    assert metrics["expected_calibration_error_low"] == pytest.approx(1 / 6)
    assert metrics["expected_calibration_error_high"] == 0.5

    alone = Reliability()
    alone.update(np.array([0.5]), np.array([1]), "a")
    metrics, curve = alone.describe()
    assert metrics["brier_score_low"] is None and curve["observed_low"] == [None]


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="`predicted` must be in .0, 1., got 0 to 1.5"):
        Reliability().update(np.array([0, 1.5]), np.zeros(2))
    with pytest.raises(ValueError, match="`predicted` must be in .0, 1., got nan to nan"):
        Reliability().update(np.array([0, np.nan]), np.zeros(2))
    with pytest.raises(ValueError, match="`predicted` and `observed` must have the same size, got 2 and 3"):
        Reliability().update(np.zeros(2), np.zeros(3))
