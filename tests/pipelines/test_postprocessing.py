import numpy as np
import pytest
import torch
from scipy import ndimage

from anodiff.pipelines import median
from anodiff.pipelines.postprocessing import (
    PostProcessing,
    brightness_weights,
    erode_brain,
    median_filter,
    postprocess_maps,
    remove_small_components,
)


def ball(shape=(7, 20, 18), radius=0.9):
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return sum(g**2 for g in grid) < radius**2


def random_maps(shape=(7, 20, 18), seed=0):
    return np.random.default_rng(seed).gamma(2.0, size=shape).astype(np.float32)


@pytest.mark.parametrize("border, padding", [("reflect", "symmetric"), ("mirror", "reflect")])
@pytest.mark.parametrize("size, dimensions", [(3, 2), (5, 2), (3, 3), (5, 3)])
def test_median_filter_equals_the_median_of_windows(size, dimensions, border, padding):
    maps = random_maps()
    window = (size if dimensions == 3 else 1, size, size)
    padded = np.pad(maps, [(w // 2, w // 2) for w in window], mode=padding)
    expected = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=(3, 4, 5))
    filtered = median_filter(maps, size, dimensions, border=border)
    assert filtered.dtype == np.float32
    np.testing.assert_array_equal(filtered, expected)


def scipy_median(maps, size, dimensions, border="reflect"):
    return ndimage.median_filter(maps, size=(size if dimensions == 3 else 1, size, size), mode=border)


@pytest.mark.parametrize("border", ["reflect", "mirror"])
@pytest.mark.parametrize("size, dimensions", [(1, 3), (2, 2), (2, 3), (3, 3), (4, 2), (4, 3), (5, 2), (5, 3), (7, 2)])
def test_median_filter_equals_scipy_to_the_bit(size, dimensions, border, monkeypatch):
    rng = np.random.default_rng(size)
    monkeypatch.setattr(median, "VOXELS_PER_CHUNK_CPU", 4 * 20 * 20)  # several chunks
    for shape in ((1, 1, 1), (2, 13, 1), (3, 4, 5), (9, 7, 12)):  # most windows are larger than the volume
        distinct, ties = rng.normal(size=shape).astype(np.float32), rng.integers(0, 4, shape).astype(np.float32)
        infinite = np.where(ties == 0, -np.inf, np.where(ties == 3, np.inf, distinct)).astype(np.float32)
        for maps in (distinct, ties, infinite):
            expected = scipy_median(maps, size, dimensions, border)
            filtered = median_filter(maps, size, dimensions, border=border)
            np.testing.assert_array_equal(filtered, expected)
            for inside in (rng.random(shape) < 0.1, np.zeros(shape, bool)):
                some = median.median_filter(
                    torch.from_numpy(maps), size, dimensions, border=border, inside=torch.from_numpy(inside)
                )
                np.testing.assert_array_equal(some, np.where(inside, expected, 0))


def test_maps_may_be_tensors_of_any_type():
    maps, brain = random_maps(), ball()
    for made in (maps, maps.astype(np.float16), maps[:, ::-1], maps.astype(np.float64)):
        expected = scipy_median(made.astype(np.float32), 5, 2)
        np.testing.assert_array_equal(median_filter(made, 5, 2), expected)
        filtered = median_filter(torch.tensor(made.copy()), 5, 2)
        assert filtered.dtype == torch.float32
        np.testing.assert_array_equal(filtered, expected)
    options = PostProcessing(median_size=3, median_dimensions=3, erosion=2)
    filtered = options.filter(torch.from_numpy(maps), torch.from_numpy(brain), torch.from_numpy(maps))
    assert filtered.dtype == torch.float32
    np.testing.assert_array_equal(filtered, options.filter(maps, brain, maps))


def test_a_nan_makes_the_windows_that_hold_it_nan_and_no_others():
    maps = random_maps()
    maps[3, 10, 9] = np.nan
    expected = np.zeros(maps.shape, bool)
    expected[2:5, 9:12, 8:11] = True
    np.testing.assert_array_equal(np.isnan(median_filter(maps, 3, 3)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size, dimensions", [(3, 2), (5, 2), (4, 3), (5, 3)])
def test_a_gpu_filters_to_the_same_bits(size, dimensions):
    maps, brain = random_maps((21, 61, 58)), ball((21, 61, 58))
    options = PostProcessing(median_size=size, median_dimensions=dimensions, erosion=2)
    filtered = options.filter(*(torch.from_numpy(array).cuda() for array in (maps, brain, maps)))
    assert filtered.is_cuda
    np.testing.assert_array_equal(filtered.cpu(), options.filter(maps, brain, maps))


def test_erode_brain_takes_the_four_neighbours_of_each_slice():
    brain = np.zeros((2, 9, 9), dtype=np.uint8)
    brain[0, 1:8, 1:8] = 1
    brain[0, 4, 4] = 0
    brain[1] = 1
    once = erode_brain(brain, 1)
    expected = np.zeros((9, 9), dtype=bool)
    expected[2:7, 2:7] = True
    expected[[3, 4, 4, 4, 5], [4, 3, 4, 5, 4]] = False  # the hole grows to a cross, not to a square
    np.testing.assert_array_equal(once[0], expected)
    # Slice 0 does not erode slice 1; what lies outside of the image does.
    assert once[1].sum() == 7 * 7 and once[1, 1:-1, 1:-1].all()
    np.testing.assert_array_equal(erode_brain(brain, 3), erode_brain(erode_brain(once, 1), 1))
    np.testing.assert_array_equal(erode_brain(torch.from_numpy(brain), 3), erode_brain(brain, 3))
    for narrow in (brain[:, :, :2], brain[:, :1]):
        assert not erode_brain(narrow, 1).any()
    np.testing.assert_array_equal(erode_brain(brain, 0), brain == 1)


def test_remove_small_components():
    mask = np.zeros((2, 10, 10), dtype=bool)
    mask[0, 1:3, 1:3] = True  # 4 pixels
    mask[0, 3, 3] = True  # a fifth across the corner
    mask[1, 2, 2] = True  # a sixth in the next slice
    mask[1, 7:10, 7:10] = True  # 9 pixels
    np.testing.assert_array_equal(remove_small_components(mask, 0, 2), mask)
    np.testing.assert_array_equal(remove_small_components(mask, 6, 3), mask)
    assert remove_small_components(mask, 7, 3).sum() == 9
    kept = remove_small_components(mask, 5, 2)
    assert kept[0].sum() == 5 and kept[1].sum() == 9
    assert remove_small_components(mask, 6, 2).sum() == 9
    assert not remove_small_components(mask, 10, 2).any()
    assert not remove_small_components(np.zeros_like(mask), 3, 3).any()


def test_postprocess_maps_only_masks_by_default():
    maps, brain = random_maps(), ball()
    before = maps.copy()
    processed = postprocess_maps(maps, brain)
    assert processed.dtype == np.float32
    np.testing.assert_array_equal(processed, np.where(brain, maps, 0))
    np.testing.assert_array_equal(postprocess_maps(maps, brain.astype(np.uint8), median_size=1), processed)
    np.testing.assert_array_equal(maps, before)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_postprocess_maps_masks_then_filters_then_masks(dimensions):
    maps, brain = random_maps(), ball()
    maps[~brain] = 1e6
    inner = erode_brain(brain, 2)
    processed = postprocess_maps(maps, brain, median_size=3, median_dimensions=dimensions, erosion=2)
    expected = median_filter(np.where(inner, maps, np.float32(0)), 3, dimensions)
    np.testing.assert_array_equal(processed, np.where(inner, expected, 0))
    assert processed.max() <= maps[inner].max()  # nothing from outside came in
    # A one-pixel hole of the brain stays 0, although the median alone would fill it.
    brain[3, 10, 9] = False
    processed_hole = postprocess_maps(maps, brain, median_size=3, median_dimensions=dimensions)
    filled = median_filter(np.where(brain, maps, np.float32(0)), 3, dimensions)
    assert processed_hole[3, 10, 9] == 0 < filled[3, 10, 9]
    brain[3, 10, 9] = True
    # Scores keep their unit: twice the map gives twice the result.
    again = postprocess_maps(2 * maps, brain, median_size=3, median_dimensions=dimensions, erosion=2)
    np.testing.assert_array_equal(again, 2 * processed)


@pytest.mark.parametrize(
    "sign, intensity, first, second",
    [
        # The medians are 2 and 8; the pixel of 100 is no brain.
        ("both", False, [1, 0, 1, 1], [0, 1, 0, 1]),
        ("brighter", False, [0, 0, 1, 1], [0, 0, 0, 1]),
        ("darker", False, [1, 0, 0, 0], [0, 1, 0, 0]),
        ("both", True, [1, 0, 4, 9], [0, 1, 0, 4]),
        ("brighter", True, [0, 0, 4, 9], [0, 0, 0, 4]),
        ("darker", True, [1, 0, 0, 0], [0, 1, 0, 0]),
    ],
)
def test_weights_are_squared_distances_from_the_median_of_the_slice(sign, intensity, first, second):
    slices = np.array([[1, 2, 2, 4, 5], [100, 7, 8, 10, 8]], np.float32)[:, None, None]
    brain = slices[:, 0] < 100
    weights = brightness_weights(slices, brain, sign, "intensity" if intensity else "none")
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights[:, 0, [0, 1, 3, 4]][0], first)
    np.testing.assert_array_equal(weights[:, 0, :4][1], second)


def test_of_several_modalities_the_largest_distance_counts():
    # Medians 3 and 30.
    slices = np.array([[1, 3, 8], [40, 30, 10]], np.float32)[None, :, None]
    brain = np.ones((1, 1, 3), bool)
    for sign, expected in (("brighter", [100, 0, 25]), ("darker", [4, 0, 400]), ("both", [100, 0, 400])):
        np.testing.assert_array_equal(brightness_weights(slices, brain, sign, "intensity")[0, 0], expected)


def test_without_brain_nothing_has_a_weight():
    with np.errstate(all="raise"):
        weights = brightness_weights(np.ones((2, 1, 4, 4), np.float32), np.zeros((2, 4, 4), bool), "both", "intensity")
    assert weights.shape == (2, 4, 4) and not weights.any()


@pytest.mark.parametrize("name", ["sign", "weighting", "normalization"])
def test_bad_weights_name_the_argument(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got 'dark'"):
        PostProcessing(**{name: "dark"})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, b: median_filter(m, 0, 2), "`size` must be an integer of at least 1"),
        (lambda m, b: median_filter(m, -3, 2), "`size` must be an integer of at least 1"),
        (lambda m, b: median_filter(m, 3, 1), "`dimensions`"),
        (lambda m, b: median_filter(m, 3, 2, border="wrap"), "`border`"),
        (lambda m, b: median_filter(m[0], 3, 2), r"\(N, H, W\)"),
        (lambda m, b: erode_brain(b, -1), "`iterations`"),
        (lambda m, b: erode_brain(b[0], 1), r"\(N, H, W\)"),
        (lambda m, b: remove_small_components(b, -1, 2), "`min_size`"),
        (lambda m, b: remove_small_components(b, 1, 4), "`dimensions`"),
        (lambda m, b: remove_small_components(b[0], 1, 2), r"\(N, H, W\)"),
        (lambda m, b: postprocess_maps(m, b[1:]), "`brain`"),
        (lambda m, b: postprocess_maps(m, b, median_size=-1), "`median_size`"),
        (lambda m, b: postprocess_maps(m, b, median_size=3, median_dimensions=5), "`dimensions`"),
        (lambda m, b: postprocess_maps(m, b, erosion=-1), "`iterations`"),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_maps(), ball())
