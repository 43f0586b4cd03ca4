import itertools

import numpy as np
import pytest

from anodiff.evaluation.ensemble_metrics import (
    DIVERSITY_READINGS,
    collective_insight,
    combined_sensitivity,
    diversity_agreement,
    generalized_energy_distance,
    hungarian_iou,
    maximum_dice_matching,
    pairwise_dice,
    pairwise_iou,
    sample_diversity,
    score_ensemble,
)


def random_masks(count, seed, shape=(9, 7)):
    masks = np.random.default_rng(seed).random((count, *shape)) < 0.3
    masks[0] = False  # somebody always marks nothing
    return masks


def iou(a, b):
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


def test_pairs_against_loops():
    pred, gt = random_masks(5, 0), random_masks(3, 1)
    expected = [[iou(a, b) for b in gt] for a in pred]
    np.testing.assert_allclose(pairwise_iou(pred, gt), expected, rtol=1e-12)
    np.testing.assert_allclose(pairwise_dice(pred, gt), 2 * np.array(expected) / (1 + np.array(expected)), rtol=1e-12)
    distance = np.mean([[1 - iou(a, b) for b in gt] for a in pred])
    own = [np.mean([[1 - iou(a, b) for b in masks] for a in masks]) for masks in (pred, gt)]
    assert generalized_energy_distance(pred, gt) == pytest.approx(2 * distance - sum(own), rel=1e-12)
    assert sample_diversity(pred) == pytest.approx(own[0], rel=1e-12)


def test_hungarian_iou_is_the_best_assignment():
    pred, gt = random_masks(4, 2), random_masks(2, 3)
    overlap = pairwise_iou(pred, np.repeat(gt, 2, 0))
    best = max(overlap[range(4), order].mean() for order in itertools.permutations(range(4)))
    assert hungarian_iou(pred, gt) == pytest.approx(best, rel=1e-12)
    # Repeating either set changes nothing, and neither does the order.
    assert hungarian_iou(np.concatenate([pred, pred])[::-1], gt) == pytest.approx(best, rel=1e-12)
    three = random_masks(3, 4)
    assert hungarian_iou(three, gt) == pytest.approx(hungarian_iou(np.repeat(three, 2, 0), np.repeat(gt, 3, 0)))


@pytest.mark.parametrize("reading", DIVERSITY_READINGS)
def test_diversity_agreement_against_loops(reading):
    def variances(masks):
        pairs = itertools.combinations_with_replacement if reading == "pairs_with_self" else itertools.combinations
        for a, b in pairs(masks.astype(float), 2):
            yield abs(a.var() - b.var()) if reading == "variances" else (a - b).var()

    pred, gt = random_masks(4, 5), random_masks(3, 6)
    (low, high), (gt_low, gt_high) = ((min(values), max(values)) for values in map(list, map(variances, (pred, gt))))
    expected = 1 - (abs(gt_high - high) + abs(gt_low - low)) / 2
    assert diversity_agreement(pred, gt, reading) == pytest.approx(expected, rel=1e-12)
    one = diversity_agreement(pred[:1], gt[:1], reading)
    assert one == 1.0  # neither set has any diversity


def test_collective_insight():
    pred, gt = random_masks(4, 7), random_masks(4, 8)
    parts = combined_sensitivity(pred, gt), maximum_dice_matching(pred, gt), diversity_agreement(pred, gt)
    assert collective_insight(pred, gt) == pytest.approx(3 * np.prod(parts) / sum(parts))
    assert collective_insight(gt, gt) == 1.0


def test_empty_masks():
    empty, filled = np.zeros((2, 4, 4), bool), np.ones((3, 4, 4), bool)
    assert generalized_energy_distance(empty, empty) == 0 and hungarian_iou(empty, empty) == 1
    assert generalized_energy_distance(filled, empty) == 2 and hungarian_iou(filled, empty) == 0
    assert combined_sensitivity(filled, empty) == 1 and combined_sensitivity(empty, filled) == 0
    assert maximum_dice_matching(filled, empty) == 0 and maximum_dice_matching(empty, empty) == 1
    assert collective_insight(empty, empty) == 1 and collective_insight(empty, filled) == 0
    scores = score_ensemble(empty, empty)
    assert scores["dice_majority"] == 1 and all(np.isfinite(value) for value in scores.values())


def test_masks_of_any_kind_and_dimension():
    pred, gt = random_masks(4, 9, (6, 5, 4)), random_masks(3, 10, (6, 5, 4))
    scores = score_ensemble(pred, gt)
    for dtype in (np.uint8, np.float32, np.int64):
        assert score_ensemble(pred.astype(dtype), gt.astype(dtype)) == scores
    assert score_ensemble(pred.reshape(4, -1), gt.reshape(3, -1)) == scores


def test_counts_are_exact_beyond_half_precision():
    # 5000 of 70000 pixels: an IoU that float16 or 8-bit sums would miss.
    pred = np.zeros((1, 70000), bool)
    pred[0, :60000] = True
    gt = np.zeros((1, 70000), bool)
    gt[0, 55000:] = True
    assert pairwise_iou(pred, gt)[0, 0] == 5000 / 70000


@pytest.mark.parametrize(
    ("pred", "gt", "message"),
    [
        (np.zeros((2, 4)), np.zeros((2, 5)), "the same size, got"),
        (np.full((2, 4), 0.7), np.zeros((2, 4)), "`masks` must be boolean or hold 0 and 1"),
        (np.full((2, 4), 255), np.zeros((2, 4)), "`masks` must be boolean or hold 0 and 1"),
        (np.zeros((0, 4)), np.zeros((2, 4)), "at least one mask"),
        (np.zeros(4), np.zeros((2, 4)), "at least one mask"),
    ],
)
def test_wrong_masks(pred, gt, message):
    with pytest.raises(ValueError, match=message):
        generalized_energy_distance(pred, gt)


def test_unknown_reading():
    with pytest.raises(ValueError, match="`reading` must be one of pairs, variances, pairs_with_self, got 'paper'"):
        diversity_agreement(np.ones((2, 4)), np.ones((2, 4)), "paper")
