import numpy as np
import pytest
from skimage.filters import threshold_otsu, threshold_yen

from anodiff.evaluation.metrics import dice, false_positive_rate
from anodiff.evaluation.thresholds import otsu_threshold, threshold_for_dice, threshold_for_fpr, yen_threshold


def volumes(seed=0):
    """Two volumes of different shapes with a bright lesion each."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for shape in ((4, 16, 16), (3, 20, 12)):
        mask = np.zeros(shape, dtype=bool)
        mask[1:3, 4:9, 3:8] = True
        maps.append((rng.gamma(2.0, size=shape) + 3 * mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def test_threshold_for_dice_is_the_pooled_optimum():
    maps, masks = volumes()
    threshold = threshold_for_dice(maps, masks)
    scores, labels = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    best = max(dice(scores > t, labels) for t in np.unique(scores))
    assert dice(scores > threshold, labels) == best
    assert isinstance(threshold, float)


def test_threshold_for_dice_needs_lesions():
    maps, masks = volumes()
    with pytest.raises(ValueError, match="threshold_for_fpr"):
        threshold_for_dice(maps, [np.zeros_like(m) for m in masks])


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("levels", [None, 4])
def test_threshold_for_fpr_is_the_lowest_that_holds(fpr, levels):
    maps, _ = volumes()
    if levels is not None:
        maps = [np.round(m * levels) / levels for m in maps]
    inside = np.concatenate([m.ravel() for m in maps])
    threshold = threshold_for_fpr(inside, fpr)
    healthy = np.zeros(inside.size, dtype=bool)
    assert false_positive_rate(inside > threshold, healthy) <= fpr
    lower = inside[inside < threshold].max()
    assert false_positive_rate(inside > lower, healthy) > fpr


def test_threshold_for_fpr_without_ties_is_a_quantile():
    scores = np.arange(1000, dtype=np.float32)
    assert threshold_for_fpr(scores, 0.05) == 949  # 950 ... 999 exceed it
    assert threshold_for_fpr(scores[:500], 0.0) == 499


def test_threshold_for_fpr_refuses_bad_input():
    maps, _ = volumes()
    with pytest.raises(ValueError, match="`fpr`"):
        threshold_for_fpr(maps[0], 5)
    with pytest.raises(ValueError, match="at least one voxel"):
        threshold_for_fpr(maps[0][:0], 0.05)
    with pytest.raises(ValueError, match="finite"):
        threshold_for_fpr(maps[0] * np.nan, 0.05)


def test_yen_threshold_equals_scikit_image():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = rng.gamma(rng.uniform(0.5, 4), size=(6, 24, 24)).astype(np.float32)
        values[2:4, 8:14, 8:14] += rng.uniform(0, 10)
        values[rng.random(values.shape) < 0.3] = 0
        np.testing.assert_allclose(yen_threshold(values), threshold_yen(values), rtol=1e-6)


def test_yen_threshold_ignores_scaling_and_empties_constant_maps():
    values = np.random.default_rng(0).gamma(1.0, size=4000)
    scaled = (values - values.min()) / (values.max() - values.min())
    assert ((values > yen_threshold(values)) == (scaled > yen_threshold(scaled))).all()
    constant = np.full((4, 4), 0.3, dtype=np.float32)
    assert not (constant > yen_threshold(constant)).any()
    with pytest.raises(ValueError, match="at least one voxel"):
        yen_threshold(np.empty(0))
    with pytest.raises(ValueError, match="finite"):
        yen_threshold(np.array([0.0, np.inf]))


@pytest.mark.parametrize("seed", [0, 1])
def test_otsu_is_that_of_scikit_image(seed):
    random = np.random.default_rng(seed)
    values = np.concatenate([random.gamma(2.0, size=4000), random.normal(9, 1, 500)])
    assert otsu_threshold(values) == pytest.approx(threshold_otsu(values), rel=1e-6)
    assert otsu_threshold(3 * values) == pytest.approx(3 * otsu_threshold(values))
    assert otsu_threshold(np.full(10, 0.3)) == 0.3
