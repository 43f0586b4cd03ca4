import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from anodiff import VolumeProcessor
from anodiff.volumes.geometry import Geometry, _nearest


SHAPE = (9, 12, 7)
ZOOMS = (0.8, 1.1, 3.0)
RAS = np.eye(4)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def all_affines(degrees=0.0):
    """The 48 permutations and flips of the voxel axes, rotated in the world by `degrees` about an oblique axis."""
    cross = np.cross(np.eye(3), np.array([1.0, 2.0, 2.0]) / 3)
    angle = np.deg2rad(degrees)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for voxel_axis, (world_axis, sign) in enumerate(zip(axes, signs, strict=True)):
                affine[world_axis, voxel_axis] = sign * ZOOMS[voxel_axis]
            affine[:3, :3] = rotation @ affine[:3, :3]
            affine[:3, 3] = (-71.3, 20.1, 5.5)
            yield affine


def make_geometry(shape=SHAPE, affine=RAS, brain=None, **settings):
    brain = np.ones(shape, dtype=bool) if brain is None else brain
    return VolumeProcessor(**({"size": None} | settings)).geometry(shape, np.array(affine), brain)


def marker(shape, voxel):
    array = np.zeros(shape, dtype=np.float32)
    array[voxel] = 1
    return array


def peak(array):
    return tuple(int(index) for index in np.unravel_index(array.argmax(), array.shape))


def zooms(affine):
    return np.linalg.norm(affine[:3, :3], axis=0)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("degrees", [0, 20])
def test_every_orientation_comes_back_and_keeps_its_place_in_the_world(degrees, plane):
    rng = np.random.default_rng(0)
    image = rng.random(SHAPE, dtype=np.float32)
    for affine in all_affines(degrees):
        geometry = make_geometry(affine=affine, plane=plane)
        np.testing.assert_array_equal(geometry.to_input(geometry.to_network(image)), image)
        np.testing.assert_array_equal(geometry.to_input(geometry.to_network(image > 0.5, nearest=True)), image > 0.5)

        voxel = tuple(int(index) for index in rng.integers(0, SHAPE))
        n, h, w = peak(geometry.to_network(marker(SHAPE, voxel)))
        world = affine @ [*voxel, 1]
        np.testing.assert_allclose(geometry.network_affine @ [w, h, n, 1], world, atol=1e-10)
        assert geometry.network_shape == geometry.to_network(image).shape[::-1]


@pytest.mark.parametrize(
    "plane, growing",
    # World directions (RAS+) that grow along W, H and the slices.
    [
        ("axial", (-1, -1, 1)),
        ("coronal", (-1, -1, -1)),
        ("sagittal", (-1, -1, -1)),
    ],
)
def test_pictures_are_in_radiological_convention(plane, growing):
    axes = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}[plane]
    for affine in all_affines(degrees=20):
        columns = make_geometry(affine=affine, plane=plane).network_affine[:3, :3]
        directions = columns / np.linalg.norm(columns, axis=0)
        for column, axis, sign in zip(directions.T, axes, growing, strict=True):
            assert column[axis] * sign > np.cos(np.deg2rad(21))


def test_left_is_right_in_the_picture_and_anterior_is_up():
    # RAS voxels: x to the right, y to anterior, z to superior.
    geometry = make_geometry(shape=(10, 10, 10))
    assert peak(geometry.to_network(marker((10, 10, 10), (1, 8, 2)))) == (2, 1, 8)
    coronal = make_geometry(shape=(10, 10, 10), plane="coronal")
    assert peak(coronal.to_network(marker((10, 10, 10), (1, 8, 2)))) == (1, 7, 8)
    sagittal = make_geometry(shape=(10, 10, 10), plane="sagittal")
    assert peak(sagittal.to_network(marker((10, 10, 10), (1, 8, 2)))) == (8, 7, 1)


@pytest.mark.parametrize(
    "settings", [{"size": (48, 40)}, {"size": (37, 51), "resize": "stretch"}, {"spacing": (0.5,) * 3}]
)
def test_a_marker_comes_back_at_its_voxel_from_finer_slices(settings):
    rng = np.random.default_rng(1)
    for affine in all_affines(degrees=20):
        geometry = make_geometry(affine=affine, **settings)
        assert max(geometry.step[:2]) < 1
        voxel = tuple(int(index) for index in rng.integers(0, SHAPE))
        image = marker(SHAPE, voxel)
        slices = geometry.to_network(image)
        assert peak(geometry.to_input(slices)) == voxel
        np.testing.assert_array_equal(geometry.to_input(geometry.to_network(image, nearest=True), nearest=True), image)
        n, h, w = peak(slices)
        offset = np.linalg.inv(affine) @ geometry.network_affine @ [w, h, n, 1] - [*voxel, 1]
        assert np.abs(offset).max() <= 0.5


@pytest.mark.parametrize(
    "settings", [{"size": (16, 20)}, {"size": (11, 13), "resize": "stretch"}, {"spacing": (2.0, 2.5, 3.0)}]
)
def test_the_centroid_comes_back_within_half_a_network_pixel_from_coarser_slices(settings):
    rng = np.random.default_rng(2)
    shape = (31, 34, 33)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    for affine in itertools.islice(all_affines(degrees=20), 0, None, 5):
        geometry = make_geometry(shape, affine, **settings)
        voxel = rng.integers(8, 23, size=3)
        back = geometry.to_input(geometry.to_network(marker(shape, tuple(voxel))))
        centroid = (grid * (back / back.sum())[..., None]).sum((0, 1, 2))
        distance = np.abs(np.linalg.inv(geometry.network_affine)[:3, :3] @ affine[:3, :3] @ (centroid - voxel))
        assert distance.max() <= 0.5


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(13, 9), (40, 31), (50, 62), (64, 20), (20, 31)])
def test_a_plain_resize_is_torchs(size, antialias):
    height, width = 40, 31
    image = torch.rand(height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # LPS voxels (W, H, slice): nothing is turned.
    geometry = make_geometry((width, height, 1), LPS, size=size, resize="stretch", antialias=antialias)
    slices = geometry.to_network(image.numpy().T[..., None])
    expected = interpolate(image[None, None], size, mode="bilinear", align_corners=False, antialias=antialias)
    torch.testing.assert_close(torch.from_numpy(slices), expected[0], atol=5e-7, rtol=0, check_dtype=False)
    nearest = geometry.to_network(image.numpy().T[..., None], nearest=True)
    torch.testing.assert_close(
        torch.from_numpy(nearest), interpolate(image[None, None], size, mode="nearest-exact")[0]
    )


@pytest.mark.parametrize("shape", [(15, 16, 3), (16, 9, 3), (11, 14, 2)])
def test_padding_without_scaling_changes_no_value(shape):
    image = np.random.default_rng(3).random(shape, dtype=np.float32)
    for settings in ({"size": (max(shape),) * 2}, {"crop": (19, 18)}, {"crop": (18, 19, 6)}):
        geometry = make_geometry(shape, **settings)
        assert geometry.step == (1, 1, 1)
        slices = geometry.to_network(image)
        np.testing.assert_allclose(slices.sum(), image.sum(), rtol=1e-6)
        np.testing.assert_array_equal(geometry.to_input(slices), image)
        np.testing.assert_array_equal(geometry.to_input(geometry.to_network(image, nearest=True), nearest=True), image)


@pytest.mark.parametrize("crop, begin", [((8, 9), (0, 1, 0)), ((5, 4, 3), (3, 3, 2)), ((12, 10, 7), (0, -1, 0))])
def test_crop_is_about_the_centre_and_zero_outside(crop, begin):
    shape = (10, 11, 7)
    image = np.random.default_rng(4).random(shape, dtype=np.float32) + 1
    geometry = make_geometry(shape, LPS, crop=crop)
    slices = geometry.to_network(image)
    height, width, count = (*crop, 7)[:3]
    assert slices.shape == (count, height, width)
    inside = np.zeros(shape, dtype=bool)
    inside[tuple(slice(max(b, 0), b + n) for b, n in zip(begin, (width, height, count), strict=True))] = True
    np.testing.assert_array_equal(geometry.to_input(slices), np.where(inside, image, 0))


@pytest.mark.parametrize("spacing", [None, (0.6, 0.6, 0.6)])
def test_splines_follow_a_smooth_image_on_all_three_axes(spacing):
    shape = (31, 34, 33)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    image = (np.sin(grid[..., 0] / 3) + np.cos(grid[..., 1] / 4) * np.sin(grid[..., 2] / 5)).astype(np.float32)
    geometry = make_geometry(shape, LPS, spacing=spacing, crop=(30, 24, 27), size=(20, 16), resize="torchio")
    assert geometry.network_shape == (16, 20, 18)  # 27 / 1.5 slices
    np.testing.assert_allclose(geometry.step, 1.5 if spacing is None else 0.9)
    x, y, z = (
        start + step * np.arange(n)
        for start, step, n in zip(geometry.start, geometry.step, geometry.network_shape, strict=True)
    )
    expected = np.sin(x / 3)[None, None] + np.cos(y / 4)[None, :, None] * np.sin(z / 5)[:, None, None]
    inner = (slice(3, -3),) * 3  # beyond the influence of the border
    np.testing.assert_allclose(geometry.to_network(image)[inner], expected[inner], atol=0.01)
    back, seen = geometry.to_input(geometry.to_network(image)), slice(9, -9)
    np.testing.assert_allclose(back[seen, seen, seen], image[seen, seen, seen], atol=0.06)
    # torchio cuts the odd voxel at the low end: 7 of 31 columns are 4 and 3, where others cut 3 and 4.
    if spacing is None:
        assert geometry.start[0] == 4 + 0.75 - 0.5


def test_crop_brain_is_the_bounding_box_in_every_orientation():
    brain = np.zeros(SHAPE, dtype=bool)
    brain[2:6, 3:11, 1:5] = True
    for affine in all_affines(degrees=20):
        slices = make_geometry(affine=affine, brain=brain, crop="brain").to_network(brain, nearest=True)
        rows, columns = slices.any((0, 2)), slices.any((0, 1))
        assert rows.all() and columns.all()
        assert slices.sum() == brain.sum()


def test_spacing_is_millimetres_about_the_same_centre():
    for affine in all_affines(degrees=20):
        geometry = make_geometry(affine=affine, spacing=(0.7, 1.3, 2.0))
        np.testing.assert_allclose(zooms(geometry.network_affine), (1.3, 0.7, 2.0), rtol=1e-10)
        centre = geometry.network_affine @ [*((np.array(geometry.network_shape) - 1) / 2), 1]
        np.testing.assert_allclose(centre, affine @ [*((np.array(SHAPE) - 1) / 2), 1], atol=1e-10)


def test_spacing_none_keeps_the_inputs():
    geometry = make_geometry((20, 20, 5), np.diag([-1.0, -2.0, 4.0, 1.0]), spacing=(1.0, None, None))
    np.testing.assert_allclose(zooms(geometry.network_affine), (1.0, 1.0, 4.0))
    assert geometry.network_shape == (20, 40, 5)


def test_one_slice_survives_a_spacing_beyond_its_thickness():
    image = np.random.default_rng(5).random((8, 8, 1), dtype=np.float32)
    geometry = make_geometry((8, 8, 1), spacing=(None, None, 5.0))
    slices = geometry.to_network(image)
    np.testing.assert_array_equal(slices[0], image[::-1, ::-1, 0].T)


def test_fit_keeps_pixels_square_and_stretch_fills():
    affine = np.diag([-0.5, -2.0, 3.0, 1.0])
    fit = make_geometry((40, 30, 4), affine, size=(64, 64))
    np.testing.assert_allclose(zooms(fit.network_affine)[:2], 60 / 64)  # 20 mm wide, 60 mm high
    covered = fit.to_network(np.ones((40, 30, 4), dtype=np.float32))[0] > 0
    assert covered.any(1).all()
    assert abs(covered.any(0).sum() - 64 * 20 / 60) <= 1
    left, right = np.flatnonzero(covered.any(0))[[0, -1]]
    assert abs(left - (63 - right)) <= 1
    stretch = make_geometry((40, 30, 4), affine, size=(64, 64), resize="stretch")
    np.testing.assert_allclose(zooms(stretch.network_affine)[:2], (20 / 64, 60 / 64))
    assert (stretch.to_network(np.ones((40, 30, 4), dtype=np.float32)) > 0).all()


def test_no_pixel_of_a_finer_map_is_lost_on_the_way_back():
    geometry = make_geometry((4, 4, 1), size=(16, 16), antialias=False)
    for h, w in itertools.product(range(16), repeat=2):
        assert geometry.to_input(marker((1, 16, 16), (0, h, w))).max() > 0


@pytest.mark.parametrize("settings", [{}, {"crop": (9, 9, 4)}, {"crop": (9, 9, 10)}, {"spacing": (None, None, 1.0)}])
def test_slice_values_follow_their_slices(settings):
    for affine in all_affines(degrees=20):
        geometry = make_geometry(affine=affine, **settings)
        values = np.arange(1.0, geometry.network_shape[2] + 1)
        maps = np.ones(geometry.network_shape[::-1], dtype=np.float32) * values[:, None, None].astype(np.float32)
        volume = geometry.to_input(maps, nearest=True)
        axis = int(np.abs(np.linalg.inv(affine)[:3, :3] @ geometry.network_affine[:3, 2]).argmax())
        expected = volume.max(tuple(other for other in range(3) if other != axis))
        np.testing.assert_array_equal(geometry.slices_to_input(values), expected)


def test_slice_values_may_have_more_axes():
    values = np.arange(14).reshape(7, 2)
    np.testing.assert_array_equal(make_geometry().slices_to_input(values), values)
    flipped = make_geometry(affine=np.diag([1.0, 1.0, -1.0, 1.0]))
    np.testing.assert_array_equal(flipped.slices_to_input(values), values[::-1])


def test_the_network_affine_shows_the_same_place_to_nibabel():
    # nibabel's own resampling onto the network's affine is the independent witness.
    from nibabel.processing import resample_from_to

    affine = next(itertools.islice(all_affines(degrees=20), 29, None))
    image = np.zeros((24, 26, 22), dtype=np.float32)
    image[8:14, 9:17, 7:12] = np.random.default_rng(6).random((6, 8, 5))
    geometry = make_geometry(image.shape, affine, size=(40, 44), antialias=False)
    witness = resample_from_to(
        nib.Nifti1Image(image, affine), (geometry.network_shape, geometry.network_affine), order=1
    )
    np.testing.assert_allclose(geometry.to_network(image), witness.get_fdata().T, atol=1e-5)


def test_wrong_shapes_are_errors():
    geometry = make_geometry()
    with pytest.raises(ValueError, match=r"`array` must have the input's shape \(9, 12, 7\), got \(9, 12, 8\)"):
        geometry.to_network(np.zeros((9, 12, 8)))
    with pytest.raises(ValueError, match=r"`slices` must have the shape \(7, 12, 9\), got \(7, 9, 12\)"):
        geometry.to_input(np.zeros((7, 9, 12)))


def test_the_nearest_voxel_takes_every_voxel_once_at_half_voxel_offsets():
    labels = np.arange(1, 17).reshape(4, 4, 1)
    geometry = Geometry(labels.shape, LPS, "axial", (-0.5, 0.5, 0.0), (1.0, 1.0, 1.0), (4, 3, 1))
    np.testing.assert_array_equal(geometry.to_network(labels, nearest=True)[0], labels[:, 1:, 0].T)


def test_outside_the_input_is_zero():
    geometry = Geometry((4, 4, 1), LPS, "axial", (-2.0, 0.0, 0.0), (1.0, 1.0, 1.0), (8, 4, 1))
    for nearest in (False, True):
        slices = geometry.to_network(np.ones((4, 4, 1), dtype=np.float32), nearest=nearest)
        np.testing.assert_array_equal(slices[0, 0], [0, 0, 1, 1, 1, 1, 0, 0])


def test_the_nearest_voxel_is_that_of_exact_fractions_and_torchs():
    """All pairs of sizes up to 256, on the way to the network and on the way back.

    In 1,423 of 65,536 pairs torch takes another voxel, the one below: its float32 coordinates turn exact halves down.
    """
    sources = np.arange(1, 257)[:, None]
    pixels = [torch.arange(source, dtype=torch.float32)[None, None] for source in range(1, 257)]
    different = 0
    for target in range(1, 257):
        row = np.arange(target)
        numerator, denominator = (2 * row + 1) * sources, 2 * target
        expected = numerator // denominator
        step = sources / target
        np.testing.assert_array_equal(_nearest(step / 2 - 0.5 + step * row), expected)
        # From a network of `source` pixels to an input of `target`, as `to_input` writes it.
        step = target / sources
        np.testing.assert_array_equal(_nearest(-(step / 2 - 0.5) / step + 1 / step * row), expected)

        found = torch.cat([interpolate(source, target, mode="nearest-exact")[0] for source in pixels])
        below = expected - found.numpy().astype(int)
        assert set(np.unique(below)) <= {0, 1}
        assert not below[numerator % denominator != 0].any()
        different += np.count_nonzero(below.any(1))
    assert different < 2000  # a build of torch may round otherwise


def test_an_exact_half_goes_up():
    # Row 12 of 20 lies at 29.5 of 48.
    labels = np.arange(48, dtype=np.float32).reshape(1, 48, 1)
    rows = make_geometry(labels.shape, LPS, size=(20, 1), resize="stretch").to_network(labels, nearest=True)[0, :, 0]
    assert rows[12] == 30
    expected = interpolate(torch.from_numpy(labels[:, :, 0])[None], 20, mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(rows, expected)
