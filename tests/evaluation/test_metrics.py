import numpy as np
import pytest
from sklearn import metrics as oracle

from anodiff.evaluation import metrics
from anodiff.evaluation.metrics import (
    PooledScores,
    auroc,
    average_precision,
    bootstrap_interval,
    dice,
    false_positive_rate,
    iou,
    lesion_f1,
    precision,
    recall,
)


def scores_and_labels(seed, size=3000, levels=None, prevalence=0.2, low=0.0):
    """Random float32 scores that carry some information; `levels` makes ties, `low` shifts them below zero."""
    rng = np.random.default_rng(seed)
    labels = rng.random(size) < prevalence
    scores = rng.gamma(2.0, size=size) * np.where(labels, 1.5, 1.0) + low
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return scores.astype(np.float32), labels


def filled(scores, labels, **kwargs):
    pooled = PooledScores(**kwargs)
    pooled.update(scores, labels)
    return pooled


def brute_force_dice(scores, labels):
    candidates = np.concatenate([np.unique(scores), [np.float32(-np.inf)]])
    return max(dice(scores > t, labels) for t in candidates)


def test_mask_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    pred, gt = rng.random((4, 20, 30)) < 0.3, rng.random((4, 20, 30)) < 0.2
    p, g = pred.ravel(), gt.ravel()
    np.testing.assert_allclose(dice(pred, gt), oracle.f1_score(g, p), rtol=1e-12)
    np.testing.assert_allclose(iou(pred, gt), oracle.jaccard_score(g, p), rtol=1e-12)
    np.testing.assert_allclose(precision(pred, gt), oracle.precision_score(g, p), rtol=1e-12)
    np.testing.assert_allclose(recall(pred, gt), oracle.recall_score(g, p), rtol=1e-12)
    np.testing.assert_allclose(false_positive_rate(pred, gt), 1 - oracle.recall_score(~g, ~p), rtol=1e-12)
    assert dice(pred.astype(np.uint8), gt.astype(np.float32)) == dice(pred, gt)


def test_mask_metrics_of_empty_masks():
    empty, full = np.zeros((3, 3), dtype=bool), np.ones((3, 3), dtype=bool)
    assert dice(empty, empty) == iou(empty, empty) == 1
    assert np.isnan(dice(empty, empty, empty=np.nan))
    assert dice(full, empty, empty=np.nan) == dice(empty, full) == iou(full, empty) == 0
    assert np.isnan(precision(empty, full)) and precision(full, empty) == 0
    assert np.isnan(recall(full, empty)) and recall(empty, full) == 0
    assert np.isnan(false_positive_rate(empty, full)) and false_positive_rate(full, empty) == 1


def test_mask_metrics_refuse_maps_and_other_shapes():
    with pytest.raises(ValueError, match="`pred`.*0 and 1"):
        dice(np.array([0.2, 1.0]), np.array([0, 1]))
    with pytest.raises(ValueError, match="same shape"):
        iou(np.zeros((2, 3)), np.zeros((3, 2)))


def test_lesion_f1():
    gt, pred = np.zeros((2, 12, 12), dtype=bool), np.zeros((2, 12, 12), dtype=bool)
    gt[0, 1:3, 1:3] = True  # found by one corner of four voxels
    gt[0, 6:8, 6:8] = True  # missed
    gt[1, 8, 8] = True  # touches the second lesion only across a corner of the next slice: the same lesion
    gt[1, 1:3, 9:11] = True  # found completely
    pred[0, 2:4, 2:4] = True
    pred[1, 1:3, 9:11] = True
    pred[1, 11, 0] = True  # wrong
    np.testing.assert_allclose(lesion_f1(pred, gt), 2 / 3)  # 2 of 3 lesions, 2 of 3 components
    empty = np.zeros_like(gt)
    assert lesion_f1(empty, empty) == 1
    assert lesion_f1(pred, empty) == lesion_f1(empty, gt) == lesion_f1(~gt, gt) == 0


def test_average_precision_and_auroc_by_hand():
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    # Precision 1 at the first positive and 2/3 at the second, each with half of the recall. Of the four pairs the first
    # positive wins two, the second one.
    assert average_precision(scores, labels) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert auroc(scores, labels) == 3 / 4
    # All equal: one step of precision 1/2, and every pair counts one half.
    assert average_precision(np.ones(4), labels) == auroc(np.ones(4), labels) == 1 / 2


@pytest.mark.parametrize("levels", [None, 10, 1])
@pytest.mark.parametrize("low", [0.0, -2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_curve_equals_scikit_learn(seed, levels, low):
    scores, labels = scores_and_labels(seed, levels=levels, low=low)
    pooled = filled(scores, labels)
    assert pooled.is_exact
    expected = oracle.average_precision_score(labels, scores)
    np.testing.assert_allclose(pooled.average_precision(), expected, rtol=1e-12)
    np.testing.assert_allclose(average_precision(scores, labels), expected, rtol=1e-12)
    expected = oracle.roc_auc_score(labels, scores)
    np.testing.assert_allclose(pooled.auroc(), expected, rtol=1e-12)
    np.testing.assert_allclose(auroc(scores, labels), expected, rtol=1e-12)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("low", [0.0, -2.0])
def test_best_dice_is_the_best_and_its_threshold_gives_it(levels, low):
    for seed in range(5):
        scores, labels = scores_and_labels(seed, size=300, levels=levels, low=low)
        pooled = filled(scores, labels)
        best, threshold = pooled.best_dice()
        np.testing.assert_allclose(best, brute_force_dice(scores, labels), rtol=1e-12)
        assert dice(scores > threshold, labels) == best


def test_best_threshold_lies_halfway_between_scores():
    pooled = filled([0.0, 1.0, 3.0], [False, False, True])
    assert pooled.best_dice() == (1.0, 2.0)
    # Neighbouring floats have nothing between them, and a map that is best predicted whole still gets a threshold
    # below it.
    neighbours = np.arange(3, dtype=np.float32) * np.finfo(np.float32).eps + np.float32(1)
    for lower, upper in zip(neighbours[:-1], neighbours[1:], strict=True):
        assert filled([lower, upper], [False, True]).best_dice() == (1.0, lower)
    for scores in ([0.0, 0.0], [-0.0, 0.0], [3e-45, 1e38]):
        best, threshold = filled(scores, [True, True]).best_dice()
        assert best == 1 and (np.array(scores, np.float32) > threshold).all()


@pytest.mark.parametrize("max_exact", [10**6, 1000])
def test_the_order_of_the_volumes_does_not_matter(max_exact):
    scores, labels = scores_and_labels(3, levels=100)
    whole = filled(scores, labels, max_exact=max_exact)
    assert whole.is_exact == (max_exact > scores.size)
    parts = np.split(np.random.default_rng(0).permutation(scores.size), [100, 150, 900, 2800])
    for order in ([0, 1, 2, 3, 4], [3, 4, 0, 2, 1]):
        pooled = PooledScores(max_exact)
        for number in order:
            pooled.update(scores[parts[number]], labels[parts[number]])
            if pooled.num_positives:
                pooled.average_precision()  # looking at a result in between changes nothing
        assert pooled.is_exact == whole.is_exact
        assert pooled.average_precision() == whole.average_precision() and pooled.auroc() == whole.auroc()
        assert pooled.best_dice() == whole.best_dice()
        assert pooled.is_exact or pooled.error_bounds() == whole.error_bounds()


@pytest.mark.parametrize("low", [0.0, -2.0])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_histogram_stays_within_its_bounds(scale, low):
    for seed in range(3):
        # Scores of one narrow band crowd into few bins: the bounds must be large enough to be tested at all.
        scores, labels = scores_and_labels(seed, size=20000, low=low)
        scores = (np.float32(1.0 if low == 0 else -1.0) + 0.002 * scores).astype(np.float32) * np.float32(scale)
        exact, binned = filled(scores, labels), filled(scores, labels, max_exact=0)
        assert exact.is_exact and not binned.is_exact
        bounds = binned.error_bounds()
        assert abs(binned.average_precision() - exact.average_precision()) <= bounds["average_precision"]
        assert abs(binned.auroc() - exact.auroc()) <= bounds["auroc"] + 1e-12
        best, threshold = binned.best_dice()
        assert 0 <= exact.best_dice()[0] - best <= bounds["best_dice"]
        assert 1e-4 < bounds["average_precision"] < 0.2 and 1e-4 < bounds["auroc"] < 0.2
        # Dice at the returned threshold is exact although it comes from the histogram.
        assert dice(scores > threshold, labels) == best


@pytest.mark.parametrize("num_positives", [50, 180])
def test_histogram_bounds_are_reached_by_the_worst_order_in_a_bin(num_positives):
    # All scores in one bin, 1.0 to 1.0 + 2**-11: the histogram sees one tie, the scores are perfectly ordered, or the
    # reverse.
    scores = np.linspace(1.0, 1.0004, 200, dtype=np.float32)
    perfect = np.arange(200) >= 200 - num_positives
    for labels in (perfect, perfect[::-1]):
        exact, binned = filled(scores, labels), filled(scores, labels, max_exact=0)
        bounds = binned.error_bounds()
        np.testing.assert_allclose(abs(binned.auroc() - exact.auroc()), bounds["auroc"], rtol=1e-12)
        assert abs(binned.average_precision() - exact.average_precision()) <= bounds["average_precision"] + 1e-12
    exact, binned = filled(scores, perfect), filled(scores, perfect, max_exact=0)
    bounds = binned.error_bounds()
    if num_positives == 50:  # with many positives the reverse order is the worst one
        np.testing.assert_allclose(exact.average_precision() - binned.average_precision(), bounds["average_precision"])
    np.testing.assert_allclose(exact.best_dice()[0] - binned.best_dice()[0], bounds["best_dice"])


def test_histogram_resolution_and_sign():
    # Bins keep 11 bits of the mantissa, so numbers of few bits keep their order and their ties exactly, zeros of both
    # signs equal.
    scores = np.array([-3.5, -3.0, -1e-20, -0.0, 0.0, 0.0, 1e-20, 0.75, 1.0, 1.0, 7e20], dtype=np.float32)
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1], dtype=bool)
    exact, binned = filled(scores, labels), filled(scores, labels, max_exact=0)
    np.testing.assert_allclose(binned.average_precision(), exact.average_precision(), rtol=1e-12)
    np.testing.assert_allclose(binned.auroc(), exact.auroc(), rtol=1e-12)
    for mask in (labels, scores >= 0, scores >= -1e-20):
        best, threshold = filled(scores, mask, max_exact=0).best_dice()
        assert best == filled(scores, mask).best_dice()[0] == dice(scores > threshold, mask)


@pytest.mark.parametrize("max_exact", [100, 0])
def test_degenerate_labels_give_nan(max_exact):
    scores = np.array([0.0, 1.0, 1.0], dtype=np.float32)
    nothing = PooledScores(max_exact)
    healthy = filled(scores, np.zeros(3, dtype=bool), max_exact=max_exact)
    for pooled in (nothing, healthy):
        assert np.isnan([pooled.average_precision(), pooled.auroc(), *pooled.best_dice()]).all()
    lesion = filled(scores, np.ones(3, dtype=bool), max_exact=max_exact)
    assert np.isnan(lesion.auroc()) and lesion.average_precision() == 1 and lesion.best_dice()[0] == 1
    assert np.isnan(auroc(scores, np.zeros(3))) and np.isnan(auroc(scores, np.ones(3)))
    assert np.isnan(average_precision(scores, np.zeros(3))) and average_precision(scores, np.ones(3)) == 1


def test_pooled_scores_refuse_bad_input():
    pooled = PooledScores()
    with pytest.raises(ValueError, match="finite"):
        pooled.update([0.0, np.nan], [0, 1])
    with pytest.raises(ValueError, match="`labels`"):
        pooled.update([0.0, 1.0], [0, 2])
    with pytest.raises(ValueError, match="same shape"):
        pooled.update(np.zeros((2, 3)), np.zeros((3, 2)))
    assert pooled.num_negatives == pooled.num_positives == 0


def test_bootstrap_interval_covers_the_mean():
    # A t-interval of normal values covers 95 %; the bootstrap of 40 values comes close to it.
    rng = np.random.default_rng(0)
    samples = rng.normal(0.5, 0.2, size=(300, 40))
    intervals = np.array([bootstrap_interval(values) for values in samples])
    covered = ((intervals[:, 0] <= 0.5) & (0.5 <= intervals[:, 1])).mean()
    assert 0.90 <= covered <= 0.98
    np.testing.assert_allclose((intervals[:, 1] - intervals[:, 0]).mean(), 2 * 1.96 * 0.2 / np.sqrt(40), rtol=0.1)


def test_bootstrap_interval_draws_whole_subjects():
    values = np.repeat([0.1, 0.4, 0.6, 0.9], 25)
    subjects = np.repeat(["a", "b", "c", "d"], 25)
    expected = bootstrap_interval([0.1, 0.4, 0.6, 0.9])
    np.testing.assert_allclose(bootstrap_interval(values, subjects), expected, rtol=1e-12)
    low, high = bootstrap_interval(values, subjects)
    narrow_low, narrow_high = bootstrap_interval(values)
    assert low < narrow_low < 0.5 < narrow_high < high
    assert bootstrap_interval(values) == bootstrap_interval(values)


def grouped(*groups):
    """Pooled scores of groups of scores and labels, named by their numbers."""
    pooled = PooledScores()
    for number, (scores, labels) in enumerate(groups):
        pooled.update(np.asarray(scores, np.float32), labels, str(number))
    return pooled


def test_intervals_of_two_subjects():
    # Of the resamples a quarter is the first subject alone, a quarter the second one alone: these are the ends.
    right, wrong = ([2.0, 1.0], [1, 0]), ([1.0, 2.0], [1, 0])
    assert grouped(right, wrong).intervals() == {"average_precision": (0.5, 1.0), "auroc": (0.0, 1.0)}
    assert bootstrap_interval([1.0, 0.0]) == (0.0, 1.0)
    # A pooled Dice of overlaps and areas: 2 of 2 and 0 of 6.
    assert bootstrap_interval([2.0, 0.0], sizes=[2.0, 6.0]) == (0.0, 1.0)
    assert bootstrap_interval([2.0, 0.0], [7, 7], [2.0, 6.0]) == (None, None)


def test_one_subject_has_no_interval():
    nothing = {"average_precision": (None, None), "auroc": (None, None)}
    assert grouped(([2.0, 1.0], [1, 0])).intervals() == nothing and PooledScores().intervals() == nothing
    several = PooledScores()
    for scores in ([2.0, 1.0], [4.0, 3.0]):  # two visits of one
        several.update(np.array(scores, np.float32), [1, 0], "one")
    assert several.intervals() == nothing
    assert grouped(([2.0, 1.0], [0, 0]), ([2.0, 1.0], [0, 0])).intervals() == nothing  # no lesion anywhere
    assert bootstrap_interval([0.4]) == bootstrap_interval([]) == (None, None)
    assert bootstrap_interval([0.4, 0.6], ["one", "one"]) == (None, None)


def sampled_anew(groups, draws):
    """Average precision and AUROC of every resample, each computed from its own scores."""
    values = []
    for drawn in draws:
        scores, labels = (np.concatenate([groups[number][part] for number in drawn]) for part in (0, 1))
        values.append((average_precision(scores, labels), auroc(scores, labels)))
    return np.array(values)


@pytest.mark.parametrize("max_exact", [50_000_000, 0])
def test_intervals_are_those_of_resamples_that_are_scored_anew(max_exact):
    rng = np.random.default_rng(3)
    groups = []
    for size in (30, 4, 50, 12, 20):
        labels = rng.random(size) < 0.3
        groups.append((np.round(rng.normal(0.6 * labels), 1).astype(np.float32), labels))
    groups[1][1][:] = False  # a healthy subject
    pooled = PooledScores(max_exact)
    for number, (scores, labels) in enumerate(groups):
        for part in (slice(None, 3), slice(3, None)):  # several updates of one subject are drawn together
            pooled.update(scores[part], labels[part], str(number))
    values = sampled_anew(groups, np.random.default_rng(0).integers(0, 5, size=(2000, 5)))
    values = values[np.isfinite(values).all(1)]
    found = pooled.intervals()
    for name, column in zip(("average_precision", "auroc"), values.T, strict=True):
        np.testing.assert_allclose(found[name], np.quantile(column, [0.025, 0.975]), rtol=0, atol=1e-12)
    assert found["average_precision"][0] < pooled.average_precision() < found["average_precision"][1]


def test_intervals_of_many_voxels_are_close_to_the_exact_ones(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 100)
    rng = np.random.default_rng(1)
    groups = []
    for strength in (1.0, 3.0, 2.0, 0.5):
        labels = rng.random(20_000) < 0.03
        groups.append(((rng.gamma(1.5, 1e-3, 20_000) * np.where(labels, 1 + strength, 1)).astype(np.float32), labels))
    pooled = grouped(*groups)
    found, fewest = pooled.intervals(), pooled._count_groups().shape[2]
    assert 1000 <= fewest <= 2001  # bins, of 80,000 scores
    values = sampled_anew(groups, np.random.default_rng(0).integers(0, 4, size=(100, 4)))
    for name, column in zip(("average_precision", "auroc"), values.T, strict=True):
        np.testing.assert_allclose(found[name], np.quantile(column, [0.025, 0.975]), rtol=0, atol=1e-3)
