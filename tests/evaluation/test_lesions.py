"""Lesions found and false, the free-response curve and distances between surfaces, of masks drawn by hand."""

import numpy as np
import pytest

from anodiff.evaluation.cases import Case
from anodiff.evaluation.froc import RATES, SHARES, count_detections, free_response
from anodiff.evaluation.metrics import PooledScores, lesion_counts, lesion_f1
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols import pooled
from anodiff.evaluation.surfaces import surface_distances


def test_lesions_are_found_and_components_wrong():
    gt, pred = np.zeros((2, 9, 9), bool), np.zeros((2, 9, 9), bool)
    gt[0, 1:3, 1:3] = gt[0, 6:8, 6:8] = True
    pred[1, 3, 3] = True  # touches the first lesion across a corner of the next slice, and shares no voxel
    pred[0, 7, 7] = True  # one voxel of the second
    pred[0, 0, 8] = True  # nowhere
    assert lesion_counts(pred, gt) == (1, 2, 2, 3)
    # 1 of 2 lesions, 1 of 3 components.
    assert lesion_counts(pred, gt).f1() == lesion_f1(pred, gt) == pytest.approx(2 * (1 / 2) * (1 / 3) / (5 / 6))
    empty = np.zeros_like(gt)
    assert lesion_counts(pred, empty) == (0, 0, 3, 3) and lesion_counts(empty, gt) == (0, 2, 0, 0)


def test_detections_at_thresholds():
    brain = np.ones((1, 1, 12), bool)
    brain[..., 11] = False
    reference = np.zeros_like(brain)
    reference[0, 0, 1:3] = reference[0, 0, 6] = True
    # Scores:               two lesions at 1-2 and 6
    maps = np.array([[[0, 5, 0, 0, 9, 0, 7, 2, 2, 0, 8, 99]]], np.float32)
    thresholds = np.array([8.5, 7.5, 6.0, 4.0, 1.0])
    # 9 alone; and 8, not 99 outside the brain; 7 finds the second lesion; 5 the first; 2 hangs on to 7.
    expected = [[0, 1], [0, 2], [1, 2], [2, 2], [2, 2]]
    assert count_detections(maps, reference, brain, thresholds, 0, 9).tolist() == expected
    # Of two voxels and more there is only 7 with 2 and 2.
    assert count_detections(maps, reference, brain, thresholds, 2, 9).tolist() == [[0, 0]] * 4 + [[1, 0]]


def test_a_volume_of_too_many_components_is_not_gone_on_with():
    maps = np.zeros((1, 1, 40), np.float32)
    maps[..., ::2] = np.arange(20, 0, -1)
    nothing, thresholds = np.zeros(maps.shape, bool), np.arange(19.5, 0, -1)
    counts = count_detections(maps, nothing, ~nothing, thresholds, 0, 1)[:, 1]
    # One more at each threshold; with more than 8 of the only volume nothing is read off any more.
    assert counts.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] + [9] * 12
    _, curve = free_response(np.stack([np.zeros(20, int), counts], 1)[None], np.array([0]), np.array([0]), thresholds)
    assert curve["false_positives"] == [1, 2, 3, 4, 5, 6, 7, 8, 9] and len(curve["thresholds"]) == 9


def test_free_response():
    # Two volumes with 2 and 2 lesions, one healthy; found and wrong at four thresholds.
    counts = np.array(
        [[[0, 0], [1, 0], [2, 1], [2, 0]], [[1, 0], [1, 0], [1, 2], [2, 0]], [[0, 0], [0, 0], [0, 3], [0, 1]]]
    )
    metrics, curve = free_response(counts, np.array([2, 2, 0]), np.array([0, 1, 2]), np.array([4.0, 3.0, 2.0, 1.0]))
    assert curve["recall"] == [1 / 4, 2 / 4, 3 / 4, 1] and curve["false_positives"] == [0, 0, 2, 1 / 3]
    assert (curve["lesions"], curve["volumes"], curve["rates"]) == (4, 3, [0.125, 0.25, 0.5, 1, 2, 4, 8])
    # Below 2 false positives a volume two lesions are found: that fewer are left when components have flown together,
    # 1/3 at the last threshold, is no merit. From 2 on all are.
    expected = [0.5, 0.5, 0.5, 0.5, 1, 1, 1]
    assert [metrics[f"froc_recall_{rate:g}"] for rate in RATES] == expected
    assert metrics["froc_score"] == pytest.approx(5 / 7)
    assert metrics["froc_score_low"] <= metrics["froc_score"] <= metrics["froc_score_high"]


def test_intervals_of_the_free_response():
    # Two groups, one finds its lesion, one does not: a quarter of the resamples is of either alone.
    counts, thresholds = np.array([[[1, 0]], [[0, 0]]]), np.array([1.0])
    metrics, _ = free_response(counts, np.array([1, 1]), np.array([0, 1]), thresholds)
    assert [metrics[f"froc_score{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]
    metrics, _ = free_response(counts, np.array([1, 1]), np.array([0, 0]), thresholds)
    assert [metrics[f"froc_score{end}"] for end in ("", "_low", "_high")] == [0.5, None, None]
    metrics, curve = free_response(counts * 0, np.array([0, 0]), np.array([0, 1]), thresholds)
    assert set(metrics.values()) == {None} and curve["recall"] is None
    assert free_response(np.zeros((0, 0, 2)), np.zeros(0), np.zeros(0, int), np.zeros(0))[1]["volumes"] == 0


def test_thresholds_that_a_share_exceeds():
    scores = np.arange(1, 1001, dtype=np.float32)
    voxels = PooledScores()
    for part in np.array_split(np.random.default_rng(0).permutation(scores), 3):
        voxels.update(part, part > 500, "one")
    for share in (0.001, 0.01, 0.1):
        (threshold,) = voxels.thresholds_exceeded_by(np.array([share]))
        # Scores within 0.05 % share a bin.
        assert share * 1000 <= np.count_nonzero(scores > np.float32(threshold)) <= share * 1000 + 1
    thresholds = voxels.thresholds_exceeded_by(SHARES)
    assert (np.diff(thresholds) < 0).all() and len(thresholds) < len(SHARES)  # of 1000 scores, without repetitions
    assert PooledScores().thresholds_exceeded_by(SHARES).size == 0


def test_distances_between_surfaces():
    gt, pred = np.zeros((1, 30), bool), np.zeros((1, 30), bool)
    gt[0, 2:5], pred[0, 6:8] = True, True
    # All voxels are surface. From 6 and 7 to 4: 2 and 3; from 2, 3, 4 to 6: 4, 3, 2. Two of five within 2.
    assert surface_distances(pred, gt, [1.0, 1.0]) == (pytest.approx(2 / 5), pytest.approx(3.9))
    # 95th percentile of 2, 3, 4: 3.9; in halves of a millimetre all five are within 2 mm.
    assert surface_distances(pred, gt, [1.0, 0.5]) == (1.0, pytest.approx(1.95))
    empty = np.zeros_like(gt)
    for masks in ((empty, gt), (pred, empty)):
        surface, distance = surface_distances(*masks, [1.0, 1.0])
        assert surface == 0 and np.isnan(distance)
    assert np.isnan(surface_distances(empty, empty, [1.0, 1.0])).all()


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
@pytest.mark.parametrize("spacing", [[1.0, 1.0, 1.0], [3.0, 0.5, 0.8]])
def test_distances_are_those_of_monai(spacing):
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    rng = np.random.default_rng(0)
    gt = np.zeros((6, 14, 14), bool)
    gt[2:5, 3:9, 4:10] = True
    pred = np.roll(gt, (1, 2), (0, 1)) ^ (rng.random(gt.shape) < 0.02)
    masks = [torch.from_numpy(mask)[None, None] for mask in (pred, gt)]
    surface, distance = surface_distances(pred, gt, spacing)
    (expected,) = compute_surface_dice(*masks, [2.0], include_background=True, spacing=spacing).flatten().tolist()
    assert surface == pytest.approx(expected, rel=1e-6) and 0 < surface < 1
    distances = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing)
    assert distance == pytest.approx(distances.item(), rel=1e-6)


def make_case(folder, name, maps, mask, spacing):
    brain = np.ones(maps.shape, bool)
    labels = np.zeros(len(maps), int) if mask is None else mask.any((1, 2)).astype(int)
    case = Case(name, maps, brain, mask, labels, maps.max((1, 2)), float(maps.max()), name, spacing)
    case.save(folder)
    return folder / f"{name}.npz"


@pytest.mark.parametrize(
    ("spacing", "unit", "distance"), [(np.array([5.0, 2.0, 2.0]), "mm", 4.0), (None, "voxels", 2.0)]
)
def test_a_method_on_two_subjects(tmp_path, spacing, unit, distance):
    """One subject with two lesions, one that is healthy by its label and has no mask."""
    mask, maps = np.zeros((1, 1, 20), bool), np.zeros((1, 1, 20), np.float32)
    mask[..., [2, 8]] = True
    maps[..., [4, 8, 15]] = 3.0, 9.0, 1.0  # by 2 too far, found, weak
    healthy = np.zeros_like(maps)
    healthy[..., [0, 5]] = 3.0, 9.0
    files = [make_case(tmp_path, "ill", maps, mask, spacing), make_case(tmp_path, "well", healthy, None, spacing)]
    row = {"name": "any", "settings": {"min_component_size": 0}}
    metrics, records, more, tally = pooled.score(row, {"test": files}, None, EvalOptions())
    # The best threshold marks 9.0 alone: Dice 2/3 of 1 of 2 voxels.
    assert metrics["dice_oracle"] == pytest.approx(2 / 3) and more["distance_unit"] == unit
    assert (
        metrics["lesion_recall_oracle"] == 0.5 and metrics["false_positives_oracle"] == 0.5
    )  # one in the healthy one
    assert (more["froc"]["lesions"], more["froc"]["volumes"]) == (2, 2)
    # Surfaces of 8 against 2 and 8: 6 voxels from 2 to 8.
    assert records[0]["surface_dice_oracle"] == pytest.approx(2 / 3) and "surface_dice_oracle" not in records[1]
    assert metrics["hausdorff_95_oracle"] == pytest.approx(0.95 * 6 * (distance / 2))
    assert metrics["hausdorff_95_undefined_oracle"] == 0
    assert metrics["lesion_recall_validation"] is None and metrics["false_positives_validation"] is None
    assert tally.subjects == ["ill", "well"] and tally.masked == [True, False]


def test_an_empty_mask_has_no_distance_and_is_counted(tmp_path):
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 1, 1] = True
    seen = [np.where(mask, strength, 0).astype(np.float32) for strength in (2.0, 1.0)]
    files = {
        "test": [make_case(tmp_path, f"s{number}", maps, mask, None) for number, maps in enumerate(seen)],
        # The best threshold of the validation split is 1.5: the second subject has an empty mask.
        "validation": [make_case(tmp_path, "v", seen[0] + np.where(mask, 0, 1).astype(np.float32), mask, None)],
    }
    row = {"name": "any", "settings": {"min_component_size": 0}}
    metrics, records, *_ = pooled.score(row, files, None, EvalOptions())
    assert metrics["threshold_validation"] == 1.5 and metrics["hausdorff_95_undefined_validation"] == 1
    assert [record["hausdorff_95_validation"] for record in records] == [0.0, None]
    assert metrics["hausdorff_95_validation"] == 0.0 and metrics["surface_dice_validation"] == 0.5


def test_pooled_dice_and_that_of_volumes(tmp_path):
    first, second = np.zeros((1, 1, 8), bool), np.zeros((1, 1, 8), bool)
    first[..., 0] = second[..., :3] = True
    maps = np.zeros((2, 1, 1, 8), np.float32)
    maps[0, ..., 0] = maps[1, ..., [0, 6, 7]] = 2.0  # all of the first; of the second 1 of 3 voxels, and 2 wrong ones
    files = {
        "test": [make_case(tmp_path, "a", maps[0], first, None), make_case(tmp_path, "b", maps[1], second, None)],
        "validation": [make_case(tmp_path, "v", maps[0], first, None)],
    }
    row = {"name": "any", "settings": {"min_component_size": 0}}
    metrics, records, *_ = pooled.score(row, files, None, EvalOptions())
    # 2 TP / (2 TP + FP + FN) = 2 / 2 and 2 / 6; together 4 / 8.
    assert [record["dice_validation"] for record in records] == pytest.approx([1, 1 / 3])
    assert metrics["volume_dice_validation"] == pytest.approx(2 / 3) and metrics["dice_validation"] == 1 / 2
    # There is no healthy validation slice.
    assert metrics["threshold_healthy"] is None and metrics["dice_healthy"] is None
