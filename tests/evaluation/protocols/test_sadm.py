"""The protocol of cDDPM and SADM: what the recorded arrays do not hold."""

import numpy as np
import pytest
from skimage.metrics import hausdorff_distance as hausdorff_of_scikit_image

from anodiff.evaluation.cases import Case
from anodiff.evaluation.options import EvalOptions
from anodiff.evaluation.protocols.sadm import choose_thresholds, find_best_val, hausdorff_distance, score


SHAPE = (4, 12, 12)


def save(folder, name, lesion_voxels, *, masked=True, error=False, seed=0):
    """A volume whose lesion, if any, fills its first voxels with 2; the rest is uniform below 1."""
    maps = np.random.default_rng(seed).random(SHAPE).astype(np.float32)
    mask = np.zeros(SHAPE, bool)
    mask.ravel()[:lesion_voxels] = True
    maps[mask] = 2
    brain = np.ones(SHAPE, bool)
    brain[:, :, -1] = False
    maps[~brain & ~mask] = 0
    labels = mask.any((1, 2)).astype(int) if masked else np.full(len(mask), -1)
    Case(
        name,
        maps,
        brain,
        mask if masked else None,
        labels,
        np.zeros(len(maps)),
        0.0,
        error=np.where(mask, 0.4, 0.1).astype(np.float32) if error else None,
    ).save(folder)
    return folder / f"{name}.npz"


def score_cases(test, validation, min_component_size=0):
    row, files = {"settings": {"min_component_size": min_component_size}}, {"test": test, "validation": validation}
    metrics, records, more, _ = score(row, files, None, EvalOptions())
    return metrics, records, more["lesion_sizes"]


def test_thresholds_rates_and_sizes(tmp_path):
    validation = [save(tmp_path, "v0", 30), save(tmp_path, "v1", 0, seed=1), save(tmp_path, "v2", 0, masked=False)]
    thresholds = choose_thresholds(validation)
    assert 1 < thresholds["search"] < 2 and 0.9 < thresholds["exact"] < 2
    assert thresholds["fpr1"] > thresholds["fpr5"] > thresholds["fpr10"] > 0.85
    test = [
        save(tmp_path, f"t{number}", count, error=True, seed=2 + number)
        for number, count in enumerate((50, 0, 9, 20, 40))
    ]
    test.append(save(tmp_path, "unknown", 0, masked=False))
    metrics, records, sizes = score_cases(test, validation)
    assert metrics["sadm_dice_search"] == metrics["sadm_auroc"] == metrics["sadm_best_dice"] == 1
    assert metrics["sadm_hausdorff_search"] == 0 and metrics["sadm_specificity_search"] == 1
    for name, share in (("fpr1", 0.01), ("fpr5", 0.05), ("fpr10", 0.1)):
        assert metrics[f"sadm_healthy_fpr_{name}"] == pytest.approx(share, rel=0.5)
        assert metrics[f"sadm_dice_{name}"] < 1
    assert metrics["sadm_l1_lesion"] == pytest.approx(0.4) and metrics["sadm_l1_ratio"] == pytest.approx(4)
    # The healthy volume has no Dice at the threshold that leaves it empty, and none of its own; it has one where it has a false positive.
    assert "sadm_dice_search" not in records[1] and records[1]["sadm_dice_fpr10"] == 0
    assert records[5] == {}
    assert [(size["volumes"], size["voxels"]) for size in sizes] == [(2, [9, 20]), (1, [40, 40]), (1, [50, 50])]
    assert sizes[0]["dice_fpr10"] < sizes[2]["dice_fpr10"] < 1 and metrics["sadm_dice_small"] == 1

    without, _, sizes = score_cases(test, [])
    assert without["sadm_threshold_search"] is None and without["sadm_healthy_fpr_fpr1"] is None
    assert without["sadm_dice_small"] is None and "sadm_dice_search" not in without
    assert without["sadm_auroc"] == 1 and sizes[0]["volumes"] == 2


def test_small_components_are_removed(tmp_path):
    validation, test = [save(tmp_path, "v", 30)], [save(tmp_path, "t", 9)]
    for smallest, expected in ((9, 1.0), (10, 0.0)):
        metrics, _, _ = score_cases(test, validation, smallest)
        assert metrics["sadm_dice_search"] == expected


def test_search_without_lesion():
    assert np.isnan(find_best_val([np.ones(3)], [np.zeros(3, bool)])).all()
    assert find_best_val([np.zeros(4)], [np.array([1, 0, 0, 0], bool)]) == (0.0, 0.0)


def test_hausdorff_distance():
    rng = np.random.default_rng(0)
    for _ in range(5):
        first, second = rng.random((2, 5, 9, 9)) > 0.9
        assert hausdorff_distance(first, second) == pytest.approx(hausdorff_of_scikit_image(first, second))
    assert np.isnan(hausdorff_distance(first, np.zeros_like(first)))
    # Between surfaces: a full cube and its hollow shell are the same.
    cube = np.pad(np.ones((7, 7, 7), bool), 2)
    shell = cube.copy()
    shell[3:-3, 3:-3, 3:-3] = False
    assert hausdorff_distance(cube, shell) == 0
