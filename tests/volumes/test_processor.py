import itertools
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff import VolumeProcessor
from anodiff.volumes.processor import INTENSITY_RULES
from anodiff.volumes.volume import read_volume


LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE = np.array([[0, 0, 3.0, -40], [-0.9, 0.2, 0, 30], [0.2, 0.9, 0, 10], [0, 0, 0, 1]])


def random_scan(shape=(8, 10, 3), seed=0):
    """A head in front of a background that is exactly 0."""
    image = np.random.default_rng(seed).uniform(20, 300, shape).astype(np.float32)
    image[0], image[-1], image[:, :2], image[:, -1] = 0, 0, 0, 0
    return image


def nifti(array, affine=LPS):
    return nib.Nifti1Image(array, affine)


def plain(**settings):
    """A processor that leaves the grid alone."""
    return VolumeProcessor(**({"size": None, "value_range": (0.0, 1.0), "clip": False} | settings))


def on_lps_grid(slices):
    """`(N, H, W)` as `(X, Y, Z)` of an LPS grid."""
    return slices.permute(2, 1, 0).numpy()


# --- intensities


def test_percentile():
    scan = random_scan()
    slices = plain(intensity="percentile", quantile=0.9).preprocess(nifti(scan)).slices
    np.testing.assert_allclose(on_lps_grid(slices[:, 0]), scan / np.quantile(scan[scan > 0], 0.9), rtol=1e-6)
    assert slices.max() > 1
    assert slices.dtype == torch.float32


def test_slice_minmax():
    scan = random_scan()
    scan[..., 1] = 7 + scan[..., 1] / 1000
    slices = plain(intensity="slice_minmax").preprocess(nifti(scan)).slices
    scaled = scan / np.quantile(scan[scan > 0], 0.99)
    low, high = scaled.min((0, 1)), scaled.max((0, 1))
    np.testing.assert_allclose(on_lps_grid(slices[:, 0]), (scaled - low) / (high - low + 1e-5), atol=1e-4)
    # The size of the input's units must not matter.
    tiny = plain(intensity="slice_minmax").preprocess(nifti(scan / 2**20)).slices
    torch.testing.assert_close(tiny, slices)


def test_brain_percentiles_are_of_the_brain_that_the_crop_leaves():
    scan = random_scan((8, 10, 7))
    mask = np.zeros(scan.shape, np.uint8)
    mask[2:6, 3:8] = 1
    processor = plain(intensity="brain_percentiles", quantile=0.9, crop=(10, 8, 4), brain_mask="given")
    slices = processor.preprocess(nifti(scan), nifti(mask)).slices
    left = scan[..., 1:5]
    low, high = np.quantile(left[mask[..., 1:5] > 0], (0.1, 0.9))
    np.testing.assert_allclose(on_lps_grid(slices[:, 0]), np.clip((left - low) / (high - low), 0, 1), atol=1e-6)
    # What is padded is 0 in the input's units, which is not always the darkest value.
    dark = nifti(scan - 100), nifti(np.ones_like(mask))
    padded = plain(intensity="brain_percentiles", crop=(12, 8)).preprocess(*dark).slices
    low, high = np.quantile(scan - 100, (0.01, 0.99))
    np.testing.assert_allclose(padded[:, :, 0], -low / (high - low), rtol=1e-5)


def test_brain_percentiles_need_a_brain_that_is_left_and_not_constant():
    scan, processor = random_scan((8, 10, 7)), plain(intensity="brain_percentiles", crop=(10, 8, 3))
    mask = np.zeros(scan.shape, np.uint8)
    mask[4, 5, 0] = 1
    with pytest.raises(ValueError, match="no voxel of the brain is left in the slices"):
        processor.preprocess(nifti(scan), nifti(mask))
    mask[4, 5, :] = 1
    scan[4, 5, :] = 7
    with pytest.raises(ValueError, match="modality `image` is constant .7. in the brain mask"):
        processor.preprocess(nifti(scan), nifti(mask))


def test_brain_median_is_of_the_positive_voxels_of_the_brain_mask_of_each_modality():
    flair = np.array([[4, 8, 16, 0, -2, 500]], np.float32)[..., None]
    t1 = np.array([[30, 30, 10, 10, 10, 1]], np.float32)[..., None]
    mask = np.array([[1, 1, 1, 1, 1, 0]], np.uint8)[..., None]
    processor = plain(modalities=("flair", "t1"), intensity="brain_median", brain_mask="given")
    slices = processor.preprocess({"flair": nifti(flair), "t1": nifti(t1), "brain": nifti(mask)}).slices
    # The median of 4, 8 and 16 is 8, and 8 becomes 0.5; that of the brain of T1 is 10.
    np.testing.assert_allclose(slices[0, 0, :, 0], [0.25, 0.5, 1.0, 0, -0.125, 31.25], rtol=1e-6)
    np.testing.assert_allclose(slices[0, 1, :, 0], [1.5, 1.5, 0.5, 0.5, 0.5, 0.05], rtol=1e-6)


def test_a_large_bright_lesion_hardly_moves_the_brains_median():
    healthy = np.random.default_rng(0).normal(100, 10, (20, 20, 10)).astype(np.float32)
    sick = healthy.copy()
    sick[:8, :10, 2:7] *= 3  # a tenth of the brain
    scales = {}
    for rule in ("percentile", "brain_median"):
        processor = plain(intensity=rule, brain_mask="none")
        scales[rule] = [processor.preprocess(nifti(scan)).units_scale[0, 0] for scan in (healthy, sick)]
    # From 123 to 329, the lesion's own brightness; from the normal distribution's quantile 0.5 to 0.5 / 0.9.
    assert scales["percentile"][1] / scales["percentile"][0] > 2.5
    assert 1 < scales["brain_median"][1] / scales["brain_median"][0] < 1.02
    np.testing.assert_allclose(scales["brain_median"][0], 2 * np.median(healthy), rtol=1e-6)


def test_curvature_flow_is_done_at_the_resolution_of_the_input(monkeypatch):
    pytest.importorskip("SimpleITK", reason="the extra `preprocess` is missing")
    scan = random_scan((8, 10, 7))
    smooth = plain(intensity="given", curvature_flow=3)
    values = on_lps_grid(smooth.preprocess(nifti(scan)).slices[:, 0]) * 255
    assert 1 < np.abs(values - scan).max() < 300 and values.std() < scan.std()
    # The voxel size counts, the axes do not.
    wide = on_lps_grid(smooth.preprocess(nifti(scan, np.diag([-1.0, -1.0, 4.0, 1.0]))).slices[:, 0]) * 255
    assert np.abs(wide - values).max() > 1
    turned = smooth.preprocess(nifti(scan.transpose(2, 0, 1), LPS[:, [2, 0, 1, 3]])).slices
    np.testing.assert_allclose(on_lps_grid(turned[:, 0]) * 255, values, atol=1e-2)


def test_curvature_flow_without_simpleitk_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r"needs SimpleITK: `pip install anodiff\[preprocess\]`"):
        plain(curvature_flow=3).preprocess(nifti(random_scan()))


@pytest.mark.parametrize("rule, offset", [("mean_std", 1), ("mean_std_no_offset", 0)])
def test_mean_std(rule, offset):
    scan = random_scan() ** 2
    mean, std = scan.mean(dtype=np.float64), scan.std(dtype=np.float64)
    expected = (np.clip(scan, mean - std, mean + 2 * std) - offset * (mean - std)) / (3 * std)
    slices = plain(intensity=rule).preprocess(nifti(scan)).slices
    np.testing.assert_allclose(on_lps_grid(slices[:, 0]), expected, atol=1e-6)


def test_given_range():
    slices = plain(intensity="given", input_range=(-100.0, 300.0)).preprocess(nifti(random_scan())).slices
    np.testing.assert_allclose(on_lps_grid(slices[:, 0]), (random_scan() + 100) / 400, rtol=1e-6)


def test_channels_are_scaled_one_by_one():
    processor = plain(modalities=("a", "b"))
    first = processor.preprocess({"a": nifti(random_scan()), "b": nifti(random_scan(seed=1))}).slices
    second = processor.preprocess({"a": nifti(random_scan()), "b": nifti(random_scan(seed=1) * 64)}).slices
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
def test_value_range_and_clipping(value_range):
    low, high = value_range
    unit = plain(quantile=0.5).preprocess(nifti(random_scan())).slices
    free = plain(quantile=0.5, value_range=value_range).preprocess(nifti(random_scan())).slices
    torch.testing.assert_close(free, unit * (high - low) + low)
    clipped = plain(quantile=0.5, value_range=value_range, clip=True).preprocess(nifti(random_scan())).slices
    torch.testing.assert_close(clipped, free.clamp(low, high))
    assert (clipped != free).any()


@pytest.mark.parametrize("rule", INTENSITY_RULES)
def test_an_image_comes_back_in_the_units_of_the_input(rule):
    scan = {"a": nifti(random_scan(), AFFINE), "b": nifti(random_scan(seed=1) * 5, AFFINE)}
    processor = VolumeProcessor(
        ("a", "b"), size=None, intensity=rule, clip=False, input_range=(-10.0, 50.0), value_range=(-1.0, 2.0)
    )
    processed = processor.preprocess(scan)
    back = processor.postprocess_image(processed.slices, processed)
    assert (back.dtype, back.shape) == (np.float32, (2, 8, 10, 3))
    head = scan["a"].get_fdata() > 0
    for channel, name in zip(back, "ab", strict=True):
        image = scan[name].get_fdata()
        if rule == "brain_percentiles":
            image = np.clip(image, *np.quantile(image[head], (0.01, 0.99)))
        if rule.startswith("mean_std"):
            image = np.clip(image, image.mean() - image.std(), image.mean() + 2 * image.std())
        np.testing.assert_allclose(channel, image, atol=1e-3)


@pytest.mark.parametrize("rule", INTENSITY_RULES)
def test_padding_is_background(rule):
    processor = plain(crop=(14, 12), intensity=rule)
    slices = processor.preprocess(nifti(random_scan())).slices
    background = slices[0, 0, 3, 6]  # inside the scan, outside the head
    torch.testing.assert_close(slices[:, :, :2], background.expand(3, 1, 2, 12))
    torch.testing.assert_close(slices[..., -2:], background.expand(3, 1, 14, 2))


# --- what comes in


def test_every_kind_of_input_gives_the_same_slices(tmp_path):
    scan = np.rint(random_scan((8, 10, 1)) / 2)
    nib.save(nifti(scan.astype(np.int16)), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti2Image(scan.astype(np.int16), LPS), tmp_path / "scan2.nii")
    nib.save(nib.MGHImage(scan, LPS), tmp_path / "scan.mgz")
    picture = PIL.Image.fromarray(scan[..., 0].T.astype(np.uint8))
    picture.save(tmp_path / "scan.png")
    picture.convert("RGB").save(tmp_path / "grey.png")
    processor = VolumeProcessor(size=(16, 12))
    expected = processor.preprocess(nifti(scan)).slices
    files = [tmp_path / name for name in ("scan.nii.gz", "scan2.nii", "scan.mgz", "scan.png", "grey.png")]
    for source in (*files, picture, {"image": files[0]}, read_volume(files[1])):
        torch.testing.assert_close(processor.preprocess(source).slices, expected, rtol=0, atol=0)
    # An array has the identity as its affine: x grows to the patient's right, y to anterior.
    turned = scan[::-1, ::-1, 0]
    for source in (turned, turned[..., None], torch.from_numpy(turned.copy()), {"image": turned}):
        torch.testing.assert_close(processor.preprocess(source).slices, expected, rtol=0, atol=0)


def test_a_dict_is_read_by_name_and_a_4d_file_by_position():
    processor = plain(modalities=("a", "b", "c"))
    scans = [random_scan(seed=seed) for seed in range(3)]
    a, b, c = (nifti(scan) for scan in scans)
    expected = processor.preprocess({"a": a, "b": b, "c": c}).slices
    assert expected.shape == (3, 3, 10, 8)
    torch.testing.assert_close(processor.preprocess({"c": c, "b": b, "a": a}).slices, expected, rtol=0, atol=0)
    torch.testing.assert_close(processor.preprocess(nifti(np.stack(scans, -1))).slices, expected, rtol=0, atol=0)


def test_the_network_sees_the_plane_that_was_asked_for():
    shapes = {"axial": (3, 10, 8), "coronal": (10, 3, 8), "sagittal": (8, 3, 10)}
    for plane, shape in shapes.items():
        processed = plain(plane=plane).preprocess(nifti(random_scan()))
        assert processed.slices[:, 0].shape == processed.brain.shape == shape


PICTURE = PIL.Image.fromarray(random_scan()[..., 0].T.astype(np.uint8))
TURNED = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # axes ASR


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
@pytest.mark.parametrize(
    "source", [PICTURE, random_scan()[..., 0], random_scan()[..., :1], nifti(random_scan()[..., :1])]
)
def test_one_slice_of_another_plane_is_refused(source, plane):
    plain().preprocess(source)
    message = rf"cannot be cut into {plane} slices .* its shape is \(8, 10, 1\), axial by its affine"
    with pytest.raises(ValueError, match=message):
        plain(plane=plane).preprocess(source)


def test_one_slice_is_read_in_its_plane():
    """However its axes run, and as an array of the shape that the message says."""
    slices = random_scan()[:, :, 0]
    for plane, shape in {"axial": (8, 10, 1), "coronal": (8, 1, 10), "sagittal": (1, 8, 10)}.items():
        assert plain(plane=plane).preprocess(slices.reshape(shape)).slices.shape[0] == 1
    turned = nifti(random_scan()[..., :1], TURNED)
    assert plain(plane="sagittal").preprocess(turned).slices.shape[0] == 1
    with pytest.raises(ValueError, match=r"axial slices .*, sagittal by its affine"):
        plain(plane="axial").preprocess(turned)


def constant(value):
    return np.full((4, 5, 2), value, dtype=np.float32)


@pytest.mark.parametrize(
    "settings, volume, message",
    [
        ({"modalities": ["a", "b"]}, {"a": random_scan()}, "needs the modalities a, b; missing: b, unknown: none"),
        ({}, {"t1": random_scan()}, "missing: image, unknown: t1"),
        ({"modalities": ["a"]}, {"a": random_scan(), "b": random_scan()}, "missing: none, unknown: b"),
        ({"modalities": ["a", "b"]}, random_scan(), r"has 1 channel\(s\), this checkpoint needs 2: a, b. Give a dict"),
        ({}, nifti(np.stack([random_scan()] * 3, -1)), r"has 3 channel\(s\), this checkpoint needs 1: image"),
        ({}, constant(3), r"modality `image` is constant \(3\).*Leave it out"),
        ({"modalities": ["a", "b"]}, {"a": random_scan((4, 5, 2)), "b": constant(0)}, "modality `b` is constant"),
        ({"background": 1000.0}, random_scan(), "the brain mask is empty"),
        ({"brain_mask": "none"}, -random_scan(), "modality `image` has no value above 0. Add a constant"),
        ({"brain_mask": "none", "intensity": "brain_median"}, -random_scan(), "no value above 0 in the brain mask"),
        ({"brain_mask": "given"}, random_scan(), "needs a brain mask"),
        ({}, {"brain": random_scan()}, "dict of modalities is empty"),
    ],
)
def test_bad_volumes_are_one_clear_error(settings, volume, message):
    with pytest.raises(ValueError, match=message):
        VolumeProcessor(**settings).preprocess(volume)


# --- brain


def test_brain_is_what_is_above_the_background_in_any_modality():
    first, second = random_scan(), random_scan(seed=1)
    first[3:5, 4:6, 1] = 0  # a hole, filled in its slice
    first[1] = second[2] = 0
    expected = np.zeros(first.shape, dtype=bool)
    expected[1:-1, 2:-1] = True
    processed = plain(modalities=("a", "b")).preprocess({"a": nifti(first), "b": nifti(second)})
    np.testing.assert_array_equal(on_lps_grid(processed.brain), expected)
    assert processed.brain.dtype == torch.bool
    cut = plain(modalities=("a", "b"), background=400.0).preprocess({"a": nifti(first), "b": nifti(second * 3)})
    assert 0 < cut.brain.sum() < processed.brain.sum()


def test_holes_are_filled_in_the_slice_plane():
    scan = random_scan((9, 9, 9))
    scan[4, 5, :] = 0  # a tunnel along z: closed in axial slices only
    assert plain(plane="axial").preprocess(nifti(scan)).brain.sum() == (scan > 0).sum() + 9
    assert plain(plane="coronal").preprocess(nifti(scan)).brain.sum() == (scan > 0).sum()


def test_no_brain_rule_counts_everything():
    assert plain(brain_mask="none").preprocess(nifti(random_scan())).brain.all()


@pytest.mark.parametrize("rule", ["nonzero", "given", "none"])
def test_a_given_mask_wins(tmp_path, rule):
    mask = np.zeros((8, 10, 3), dtype=np.uint8)
    mask[2:4, 3:7, 1:] = 5
    nib.save(nifti(mask), tmp_path / "mask.nii.gz")
    processor = plain(brain_mask=rule)
    scan = nifti(random_scan())
    for given in (tmp_path / "mask.nii.gz", nifti(mask), mask, mask > 0, torch.from_numpy(mask)):
        np.testing.assert_array_equal(on_lps_grid(processor.preprocess(scan, given).brain), mask > 0)
        processed = processor.preprocess({"image": scan, "brain": given})
        np.testing.assert_array_equal(on_lps_grid(processed.brain), mask > 0)


def test_a_pictures_mask_is_a_picture_or_rows_and_columns(tmp_path):
    rows = random_scan((9, 9))[..., None].astype(np.uint8)[..., 0]
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[2, 3:6] = 255
    PIL.Image.fromarray(rows).save(tmp_path / "slice.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    for given in (tmp_path / "mask.png", PIL.Image.fromarray(mask), mask, torch.from_numpy(mask)):
        brain = plain().preprocess(tmp_path / "slice.png", given).brain
        np.testing.assert_array_equal(brain[0], mask > 0)


@pytest.mark.parametrize(
    "mask, message",
    [
        (nifti(np.ones((8, 10, 4))), r"must lie on the grid of .*shape \(8, 10, 3\), got \(8, 10, 4\)"),
        (nifti(np.ones((8, 10, 3)), AFFINE), "must lie on the grid of .*Resample it first"),
        (nifti(np.ones((8, 10, 3, 2))), "be one image, got 2 channels"),
        (nifti(np.zeros((8, 10, 3))), "the brain mask is empty"),
        (np.full((8, 10, 3), np.nan), "NaN"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        plain().preprocess(nifti(random_scan()), mask)


def test_two_masks_and_a_brain_that_is_cut_off():
    mask = np.zeros((8, 10, 3), dtype=np.uint8)
    mask[1, 2] = 1
    with pytest.raises(ValueError, match="brain mask is given twice.*Leave one out"):
        plain().preprocess({"image": nifti(random_scan()), "brain": mask}, mask)
    with pytest.raises(
        ValueError, match="no voxel of the brain is left in the slices. Check the brain mask, and `crop`"
    ):
        plain(crop=(2, 2)).preprocess(nifti(random_scan()), mask)


# --- there and back


ROTATED = np.array([[0.94, -0.34, 0, 5], [0.34, 0.94, 0, -9], [0, 0, 1, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (64, 64)},
        {"size": (48, 64), "resize": "stretch", "antialias": False},
        {"size": (64, 64), "crop": "brain"},
        {"size": (80, 64), "spacing": (0.5, 0.5, None)},
        {"size": None, "crop": (13, 11), "plane": "coronal"},
    ],
)
@pytest.mark.parametrize("zooms", [(1, 1, 1), (0.9, 1.2, 4)])
@pytest.mark.parametrize("turn", ["straight", "oblique"])
def test_a_marker_comes_back_at_its_voxel(turn, zooms, settings):
    rng = np.random.default_rng(0)
    for number, (axes, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    ):
        axis_matrix = np.zeros((4, 4))
        axis_matrix[3, 3] = 1
        for voxel_axis, world_axis in enumerate(axes):
            axis_matrix[world_axis, voxel_axis] = signs[voxel_axis] * zooms[voxel_axis]
        affine = (ROTATED if turn == "oblique" else np.eye(4)) @ axis_matrix
        scan = rng.uniform(1, 2, (9, 11, 10)).astype(np.float32)
        voxel = tuple(int(index) for index in rng.integers(2, 7, size=3))
        scan[voxel] = 9
        kind = nib.Nifti2Image if number % 2 else nib.Nifti1Image
        processor = VolumeProcessor(quantile=1.0, **settings)
        processed = processor.preprocess(kind(scan, affine))
        volume = processor.postprocess(processed.slices[:, 0] + 1, processed)
        assert (volume.shape, volume.dtype) == (scan.shape, np.float32)
        assert np.unravel_index(volume.argmax(), volume.shape) == voxel


def test_masks_keep_their_labels():
    labels = np.zeros((8, 10, 3), dtype=np.int16)
    labels[2:4, 3:7, 1], labels[5, 5:8, 2] = 1, 4
    processor = VolumeProcessor(size=(40, 40))
    geometry = processor.preprocess(nifti(random_scan(), AFFINE)).geometry
    for given in (nifti(labels, AFFINE), labels):
        mask = processor.preprocess_mask(given, geometry)
        assert mask.shape == (10, 40, 40)  # the second axis of AFFINE is the one towards superior
        assert set(np.unique(mask)) == {0, 1, 4}
        np.testing.assert_array_equal(geometry.to_input(mask, nearest=True), labels)
    with pytest.raises(
        ValueError, match=r"`mask` must lie on the volume's grid: shape \(8, 10, 3\), got \(8, 10, 2\)"
    ):
        processor.preprocess_mask(labels[..., :2], geometry)
    with pytest.raises(ValueError, match="`mask` must lie on the volume's grid: affine"):
        processor.preprocess_mask(nifti(labels, LPS), geometry)


# --- settings


SETTINGS = {
    "modalities": ["flair", "t1"],
    "plane": "coronal",
    "spacing": [1.0, None, 2.0],
    "crop": [20, 30, 5],
    "size": [64, 32],
    "resize": "stretch",
    "antialias": False,
    "intensity": "given",
    "quantile": 0.95,
    "input_range": [-100.0, 400.0],
    "value_range": [0.0, 1.0],
    "clip": False,
    "brain_mask": "none",
    "background": 3.0,
    "curvature_flow": 0,
    "strip": True,
}


def test_settings_survive_saving(tmp_path):
    for settings in (SETTINGS, {}):
        processor = VolumeProcessor.from_dict(settings)
        processor.save_pretrained(tmp_path)
        loaded = VolumeProcessor.from_pretrained(tmp_path)
        assert loaded.settings() == processor.settings()
        assert loaded.settings().items() >= settings.items()
        assert list(loaded.settings()) == list(SETTINGS)
    assert VolumeProcessor(**SETTINGS).settings() == VolumeProcessor.from_dict(SETTINGS).settings()


def test_the_context_is_saved_and_no_matter_of_the_slices(tmp_path):
    one = VolumeProcessor(modalities=("flair", "t1"), size=(8, 8))
    wide = VolumeProcessor(modalities=("flair", "t1"), size=(8, 8), context=2)
    wide.save_pretrained(tmp_path)
    assert VolumeProcessor.from_pretrained(tmp_path).config.context == 2
    assert (one.channels, wide.channels) == (2, 10) and one.settings() == wide.settings()
    wide.check_equal(one.settings(), "a network")
    images = torch.arange(10.0)[:, None, None].expand(3, 10, 8, 8)
    assert wide.middle(images)[0, :, 0, 0].tolist() == [4.0, 5.0]
    assert torch.equal(one.middle(images[:, :2]), images[:, :2])


def test_settings_of_numpy_are_plain_when_saved(tmp_path):
    numpy = VolumeProcessor(
        modalities=np.array(["a", "b"]),
        spacing=(np.float32(1.5), None, np.int64(2)),
        crop=np.array([20, 16, 4]),
        size=(np.int64(10), np.uint8(8)),
        quantile=np.float64(0.75),
        input_range=(np.float32(0), np.int16(100)),
        clip=np.bool_(False),
        curvature_flow=np.int64(0),
    )
    numpy.save_pretrained(tmp_path)
    plain = {"modalities": ["a", "b"], "spacing": [1.5, None, 2], "crop": [20, 16, 4], "size": [10, 8]}
    plain |= {"quantile": 0.75, "input_range": [0.0, 100], "clip": False, "curvature_flow": 0}
    for processor in (numpy, VolumeProcessor.from_pretrained(tmp_path)):
        assert plain.items() <= processor.settings().items()
    assert numpy.geometry((9, 9, 3), np.eye(4), None).network_shape == (8, 10, 4)


@pytest.mark.parametrize(
    ("zooms", "settings"),
    [
        ((1e6, 1e6, 1e6), {"spacing": (1.0, 1.0, 1.0), "size": None}),
        ((1, 1, 1e9), {"spacing": (None, None, 1.0), "size": (16, 16)}),
        ((1, 1, 1), {"size": (1_000_000, 1_000_000)}),
        ((1, 1, 1), {"crop": (100_000, 100_000, 100), "size": None}),
        ((1e-6, 1e-6, 1e-6), {"spacing": (1.0,) * 3, "crop": (16, 16, 4), "size": (8, 8), "resize": "torchio"}),
    ],
)
def test_the_grid_of_the_network_is_bounded_before_memory_is_taken(zooms, settings):
    scan = nifti(random_scan(), np.diag([*zooms, 1.0]))
    with pytest.raises(ValueError, match="A volume of shape .8, 10, 3.*the limit.*ANODIFF_MAX_VOXELS"):
        VolumeProcessor(**settings).preprocess(scan)


def test_labels_are_no_scan_and_may_be_a_mask():
    scan, labels = nifti(random_scan()), nifti((random_scan() > 0).astype(np.uint8))
    labels.header["intent_code"] = 1002
    assert plain().preprocess(scan, labels).brain.any()
    with pytest.raises(ValueError, match="is no image: its header says that the voxels are of the kind 'label'"):
        plain().preprocess(labels)


def test_an_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="`processor` has no key sizes; it takes modalities, plane, spacing"):
        VolumeProcessor.from_dict({"sizes": [4, 4]})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"plane": "oblique"}, "`plane` must be one of axial, coronal, sagittal, got 'oblique'"),
        ({"resize": "crop"}, "`resize` must be one of fit, stretch"),
        ({"intensity": "zscore"}, "`intensity` must be one of percentile, slice_minmax"),
        ({"brain_mask": "otsu"}, "`brain_mask` must be one of nonzero, given, none"),
        ({"modalities": "flair"}, "`modalities` must be a list"),
        ({"modalities": []}, "`modalities` must be a list"),
        ({"modalities": ["a", "a"]}, "`modalities` must be a list of different names"),
        ({"modalities": ["a", "brain"]}, "must not contain 'brain'"),
        ({"modalities": ["../x"]}, "The name of a modality must be one that a file can have, got '../x'"),
        ({"modalities": ["/x"]}, "The name of a modality must"),
        ({"modalities": ["a/b"]}, "must not hold a slash, got 'a/b'"),
        ({"modalities": [""]}, "The name of a modality must"),
        ({"modalities": [3]}, "The name of a modality must"),
        ({"spacing": [1.0, 1.0]}, "`spacing` must be three numbers"),
        ({"spacing": 1.0}, "`spacing` must be three numbers"),
        ({"spacing": [1.0, 0.0, None]}, "`spacing` must be a finite number and above 0"),
        ({"spacing": [1.0, "a", None]}, "`spacing` must be a finite number and above 0"),
        ({"background": "dark"}, "`background` must be a finite number"),
        ({"value_range": ["a", "b"]}, "`value_range` must be a finite number"),
        ({"resize": "torchio", "size": [8, 8]}, "`resize` torchio needs `crop` .H, W, N."),
        ({"resize": "torchio", "crop": [16, 16, 4], "size": [8, 4]}, "got .16, 16, 4. and .8, 4."),
        (
            {"intensity": "brain_percentiles", "quantile": 0.5},
            "`quantile` must be .* above 0.5 and at most 1, got 0.5",
        ),
        ({"curvature_flow": 0.5}, "`curvature_flow` must be an integer of at least 0, got 0.5"),
        ({"context": -1}, "`context` must be an integer of at least 0, got -1"),
        ({"context": True}, "`context` must be an integer of at least 0, got True"),
        ({"crop": "head"}, "`crop` must be 'brain'"),
        ({"crop": [10]}, "`crop` must be 'brain'"),
        ({"crop": [10, 0]}, "`crop` must be 'brain'"),
        ({"size": 128}, "`size` must be two integers > 0"),
        ({"size": [128, 127.5]}, "`size` must be two integers > 0"),
        ({"quantile": 0.0}, "`quantile` must be .* above 0 and at most 1, got 0.0"),
        ({"input_range": [5.0, 5.0]}, "`input_range` must be"),
        ({"value_range": [1.0, -1.0]}, "`value_range` must be"),
        ({"value_range": 1.0}, "`value_range` must be"),
    ],
)
def test_wrong_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        VolumeProcessor(**settings)


# --- real scans


def real_cases():
    root = os.environ.get("ANODIFF_TEST_DATA")
    if root is None:
        return [
            pytest.param(None, None, None, marks=pytest.mark.skip(reason="ANODIFF_TEST_DATA names no data"), id="none")
        ]
    mri = Path(root) / "mri"
    cases = [(folder, ("flair",), "lesion") for folder in sorted((mri / "tcga_lgg_flair").glob("TCGA*"))]
    cases += [(mri / "ms_lesjak_mni" / "patient26", ("flair", "t1", "t2"), "lesion")]
    cases += [(mri / "tcga_lgg_sri24" / "TCGA-DU-7294", ("flair", "t1", "t2"), "lesion_manual")]
    cases += [(mri / "healthy_ixi" / "IXI012-HH-1211", ("t1",), None)]
    return [pytest.param(*case, id=case[0].name) for case in cases]


@pytest.mark.parametrize("folder, modalities, lesion", real_cases())
def test_real_scans(folder, modalities, lesion):
    processor = VolumeProcessor(modalities, size=(256, 256))
    files = {name: folder / f"{name}.nii.gz" for name in modalities}
    if (folder / "brain.nii.gz").exists():
        files["brain"] = folder / "brain.nii.gz"
    processed = processor.preprocess(files)
    scan = nib.load(files[modalities[0]])
    count, channels, height, width = processed.slices.shape
    assert (channels, height, width) == (len(modalities), 256, 256)
    superior = nib.io_orientation(scan.affine)[:, 0].tolist().index(2)
    assert count == scan.shape[superior]
    assert processed.slices.min() == -1 and processed.slices.max() == 1

    if lesion is None:
        mask = np.zeros(scan.shape, dtype=np.uint8)
        mask[tuple(slice(size // 3, size // 2) for size in scan.shape)] = 1
    else:
        mask = np.asarray(nib.load(folder / f"{lesion}.nii.gz").dataobj)
    there = processor.preprocess_mask(mask, processed.geometry)
    # Slices are larger than these scans: every voxel comes back.
    np.testing.assert_array_equal(processed.geometry.to_input(there, nearest=True), mask)
    # The mask of the linear map, cut at one half, is the mask but for half-pixel steps at its edge.
    back = processor.postprocess(torch.from_numpy(there), processed) > 0.5
    assert 2 * (back & (mask > 0)).sum() / (back.sum() + (mask > 0).sum()) > 0.98
    image = processor.postprocess_image(processed.slices, processed)[0]
    reference = scan.get_fdata()
    dark = reference < np.quantile(reference[reference > 0], 0.95)
    assert np.corrcoef(image[dark], reference[dark])[0, 1] > 0.98


def test_a_scan_with_a_skull_looks_like_a_stripped_one():
    volume = np.random.default_rng(0).uniform(1, 9, (20, 24, 6)).astype(np.float32)
    brain = np.zeros(volume.shape, bool)
    brain[4:16, 5:20, 1:5] = True
    settings = {"size": (16, 16), "crop": "brain", "intensity": "brain_median", "brain_mask": "given"}
    stripped = VolumeProcessor(**settings).preprocess(volume * brain, brain)
    assert torch.equal(VolumeProcessor(**settings, strip=True).preprocess(volume, brain).slices, stripped.slices)
    assert not torch.equal(VolumeProcessor(**settings).preprocess(volume, brain).slices, stripped.slices)
