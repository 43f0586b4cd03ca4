import gzip
import os
import struct
import tracemalloc
import warnings
import zlib

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff.volumes import volume as module
from anodiff.volumes.volume import check_voxels, open_picture, read_volume


AFFINE = np.array([[0, 0, 3.0, -40], [-0.9, 0.2, 0, 30], [0.2, 0.9, 0, 10], [0, 0, 0, 1]])


def random_image(shape=(5, 6, 4)):
    return np.random.default_rng(0).integers(0, 200, shape).astype(np.float32)


def only(volume):
    (array,) = volume.arrays.values()
    return array


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz", ".mgh", ".NII.GZ"])
def test_files_and_nibabel_images(tmp_path, suffix):
    image = random_image()
    kind = nib.MGHImage if suffix.startswith(".mg") else nib.Nifti1Image
    nib.save(kind(image, AFFINE), tmp_path / f"scan{suffix}")
    for source in (tmp_path / f"scan{suffix}", str(tmp_path / f"scan{suffix}"), nib.load(tmp_path / f"scan{suffix}")):
        volume = read_volume(source)
        np.testing.assert_array_equal(only(volume), image)
        assert only(volume).dtype == np.float32
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
        assert (volume.shape, volume.ndim, volume.is_picture) == ((5, 6, 4), 3, False)
        assert "scan" in volume.name


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "uint16", "int64", "float32", "float64"])
def test_data_types(tmp_path, kind, dtype):
    image = random_image()
    nib.save(kind(image.astype(dtype), AFFINE, dtype=np.dtype(dtype)), tmp_path / "scan.nii")
    np.testing.assert_array_equal(only(read_volume(tmp_path / "scan.nii")), image)


def test_scale_factors_of_the_header_count(tmp_path):
    image = nib.Nifti1Image(random_image().astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "scan.nii")
    stored = np.asarray(nib.load(tmp_path / "scan.nii").dataobj.get_unscaled())
    np.testing.assert_allclose(only(read_volume(tmp_path / "scan.nii")), stored * 0.5 - 3)


def test_arrays_and_tensors():
    image = random_image()
    for source in (image, image.astype(np.int16), torch.from_numpy(image), torch.from_numpy(image).requires_grad_()):
        volume = read_volume(source)
        np.testing.assert_array_equal(only(volume), image)
        np.testing.assert_array_equal(volume.affine, np.eye(4))
    mask = image > 100
    np.testing.assert_array_equal(only(read_volume(mask)), mask)
    flat = read_volume(image[..., 0])
    assert (flat.shape, flat.ndim) == ((5, 6, 1), 2)
    np.testing.assert_array_equal(flat.as_given(only(flat)), image[..., 0])
    assert read_volume(flat) is flat


def test_the_caller_keeps_the_array():
    image = random_image()
    only(read_volume(image))[:] = 0
    assert image.any()


def test_a_colour_shaped_array_is_a_volume():
    assert read_volume(random_image((5, 6, 3))).shape == (5, 6, 3)


def test_a_4d_file_holds_modalities():
    image = random_image((5, 6, 4, 3))
    volume = read_volume(nib.Nifti1Image(image, AFFINE))
    assert list(volume.arrays) == ["0", "1", "2"]
    np.testing.assert_array_equal(volume.arrays["2"], image[..., 2])
    assert volume.shape == (5, 6, 4)


def test_a_dict_holds_modalities(tmp_path):
    nib.save(nib.Nifti1Image(random_image(), AFFINE), tmp_path / "t1.nii.gz")
    flair = nib.Nifti1Image(random_image() + 1, AFFINE)
    volume = read_volume({"t1": tmp_path / "t1.nii.gz", "flair": flair})
    assert list(volume.arrays) == ["t1", "flair"]
    np.testing.assert_array_equal(volume.arrays["flair"], volume.arrays["t1"] + 1)
    one_channel = nib.Nifti1Image(random_image((5, 6, 4, 1)), AFFINE)
    assert list(read_volume({"t1": tmp_path / "t1.nii.gz", "flair": one_channel}).arrays) == ["t1", "flair"]


# --- pictures


@pytest.mark.parametrize(
    "mode, suffix",
    [(mode, suffix) for mode in ("L", "RGB", "RGBA", "LA", "P") for suffix in (".png", None)]
    + [(mode, suffix) for mode in ("L", "RGB") for suffix in (".jpg", ".jpeg", ".JPG")],
)
def test_grey_pictures_however_stored(tmp_path, mode, suffix):
    rows = np.repeat(np.arange(0, 192, 32, dtype=np.uint8)[:, None], 9, axis=1)
    grey = PIL.Image.fromarray(rows)
    picture = grey.convert("RGB").convert("RGBA") if mode == "RGBA" else grey.convert(mode)
    source = picture
    if suffix is not None:
        source = tmp_path / f"slice{suffix}"
        picture.save(source)
    volume = read_volume(source)
    assert (volume.shape, volume.is_picture) == ((9, 6, 1), True)
    # Columns grow to the patient's left, rows to posterior.
    np.testing.assert_array_equal(volume.affine, np.diag([-1, -1, 1, 1]))
    np.testing.assert_allclose(volume.as_given(only(volume)), rows, atol=0 if suffix in (".png", None) else 6)


def test_16_bit_and_binary_pictures(tmp_path):
    levels = (np.arange(20).reshape(4, 5) * 3000).astype(np.uint16)
    PIL.Image.fromarray(levels).save(tmp_path / "deep.png")
    volume = read_volume(tmp_path / "deep.png")
    np.testing.assert_array_equal(volume.as_given(only(volume)), levels)
    PIL.Image.fromarray(levels > 9000).save(tmp_path / "binary.png")
    volume = read_volume(tmp_path / "binary.png")
    np.testing.assert_array_equal(volume.as_given(only(volume)), levels > 9000)


def test_colour_and_decimal_pictures_are_refused(tmp_path):
    colours = np.zeros((4, 5, 3), dtype=np.uint8)
    colours[1, 2] = (200, 190, 200)
    PIL.Image.fromarray(colours).save(tmp_path / "colour.png")
    for source in (tmp_path / "colour.png", PIL.Image.fromarray(colours)):
        with pytest.raises(ValueError, match=r"is a colour picture \(mode RGB\).*convert\('L'\)"):
            read_volume(source)
    with pytest.raises(ValueError, match="holds decimal numbers"):
        read_volume(PIL.Image.fromarray(random_image()[..., 0]))


# --- what cannot be used


def nan_image():
    image = random_image()
    image[1, 2, 3] = np.nan
    return image


RGB = np.zeros((5, 6, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    "source, error, message",
    [
        (None, TypeError, "got NoneType"),
        ([random_image()], TypeError, "got list"),
        ({}, ValueError, "dict of modalities is empty"),
        ({"t1": 3}, TypeError, "got int"),
        (np.zeros(5), ValueError, r"must have the shape \(X, Y\) or \(X, Y, Z\), got \(5,\)"),
        (np.zeros((2, 3, 4, 5)), ValueError, r"got \(2, 3, 4, 5\)"),
        (torch.zeros(7, 1, 8, 8), ValueError, r"tensor \(N, C, H, W\), go to the pipeline"),
        (np.zeros((5, 6, 0)), ValueError, r"holds no voxels, got shape \(5, 6, 0\)"),
        (np.zeros((5, 6), dtype=complex), TypeError, "real numbers, got data type complex128"),
        (np.array([["a", "b"]]), TypeError, "real numbers"),
        (nan_image(), ValueError, "the array holds 1 voxels that are NaN or infinite"),
        (np.full((3, 3), np.inf), ValueError, "9 voxels that are NaN or infinite"),
        (nib.Nifti1Image(nan_image(), AFFINE), ValueError, "holds 1 voxels that are NaN"),
        (nib.Nifti1Image(np.zeros((5, 6, 0)), AFFINE), ValueError, "holds no voxels"),
        (nib.Nifti1Image(np.zeros(5), AFFINE), ValueError, "2, 3 or 4 dimensions.*got shape"),
        (nib.Nifti1Image(np.zeros((2, 3, 4, 5, 2)), AFFINE), ValueError, r"got shape \(2, 3, 4, 5, 2\)"),
        (nib.Nifti1Image(np.zeros((5, 6, 4), dtype=np.complex64), AFFINE), ValueError, "one real number per voxel"),
        (nib.Nifti1Image(RGB, AFFINE), ValueError, "one real number per voxel"),
        ({"a": random_image(), "b": random_image((5, 6, 3))}, ValueError, "`a` and `b` lie on different grids"),
        ({"a": random_image(), "b": nib.Nifti1Image(random_image(), AFFINE)}, ValueError, "different grids"),
        ({"a": nib.Nifti1Image(random_image((5, 6, 4, 2)), AFFINE)}, ValueError, "`a` has 2 channels"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(source, error, message):
    with pytest.raises(error, match=message):
        read_volume(source)


def test_paths_that_are_no_volumes(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*scan.nii"):
        read_volume(tmp_path / "scan.nii")
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(FileNotFoundError, match="folder.nii.gz is a folder"):
        read_volume(tmp_path / "folder.nii.gz")
    (tmp_path / "scan.dcm").write_bytes(b"DICM")
    with pytest.raises(ValueError, match=r"scan.dcm holds no scan: of 1 files, 0 begin as those of DICOM"):
        read_volume(tmp_path / "scan.dcm")
    (tmp_path / "scan.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match=r"scan.mat must end in one of .nii, .nii.gz, .mgz, .mgh, .png"):
        read_volume(tmp_path / "scan.mat")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz", ".png", ".jpg"])
@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, part):
    image = random_image((30, 30, 10))
    whole = tmp_path / f"whole{suffix}"
    if suffix in (".png", ".jpg"):
        PIL.Image.fromarray(image[..., 0].astype(np.uint8)).save(whole)
    else:
        nib.save((nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image)(image, AFFINE), whole)
    read_volume(whole)
    content = whole.read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=f"cut{suffix} cannot be read, it may be truncated or damaged"):
        read_volume(tmp_path / f"cut{suffix}")


def test_damaged_files(tmp_path):
    nib.save(nib.Nifti1Image(random_image((30, 30, 10)), AFFINE), tmp_path / "scan.nii.gz")
    packed = bytearray((tmp_path / "scan.nii.gz").read_bytes())
    content = bytearray(gzip.decompress(packed))
    packed[len(packed) // 2] ^= 0xFF
    content[70] = 99  # no such data type
    for name, data in {
        "bits.nii.gz": packed,
        "header.nii": content,
        "text.nii": b"hello",
        "text.png": b"hello",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be read, it may be truncated or damaged"):
            read_volume(tmp_path / name)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz", ".NII.GZ", ".img.gz", ".nii.bz2"])
@pytest.mark.parametrize("damage", ["checksum", "no end"])
def test_voxels_that_do_not_match_their_checksum_are_refused(tmp_path, suffix, damage):
    kind = {".mgz": nib.MGHImage, ".img.gz": nib.Nifti1Pair}.get(suffix, nib.Nifti1Image)
    path = tmp_path / f"scan{suffix}"
    nib.save(kind(random_image((30, 30, 10)), AFFINE), path)
    content = bytearray(path.read_bytes())
    end = 4 if suffix == ".nii.bz2" else 8  # the checksum, and in gzip the length
    content[-end] ^= 1  # as if a voxel were another one
    path.write_bytes(content if damage == "checksum" else content[:-end])
    by_path = [path] if suffix not in (".img.gz", ".nii.bz2") else []
    for source in [*by_path, nib.load(path)]:
        with pytest.raises(ValueError, match=f"scan{suffix} cannot be read, it may be truncated or damaged"):
            read_volume(source)


def test_a_nibabel_image_of_a_truncated_file(tmp_path):
    nib.save(nib.Nifti1Image(random_image(), AFFINE), tmp_path / "scan.nii.gz")
    (tmp_path / "scan.nii").write_bytes(gzip.decompress((tmp_path / "scan.nii.gz").read_bytes())[:-100])
    with pytest.raises(ValueError, match="scan.nii cannot be read"):
        read_volume(nib.load(tmp_path / "scan.nii"))


def without_codes(image):
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    return image


def with_sform(matrix):
    image = nib.Nifti1Image(random_image(), None)
    image.header.set_zooms((2, 3, 4))
    image.header["sform_code"] = 1
    for row, values in zip(("srow_x", "srow_y", "srow_z"), matrix, strict=False):
        image.header[row] = values
    return nib.Nifti1Image.from_bytes(image.to_bytes())


@pytest.mark.parametrize(
    "make, zooms",
    [
        (lambda: without_codes(nib.Nifti1Image(random_image(), np.diag([2.0, 3, 4, 1]))), (2, 3, 4)),
        (lambda: with_sform(np.zeros((3, 4))), (2, 3, 4)),
        (lambda: with_sform(np.full((3, 4), np.nan)), (2, 3, 4)),
        (lambda: with_sform([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]), (2, 3, 4)),
        (lambda: nib.Nifti1Image(random_image(), None), (1, 1, 1)),
    ],
    ids=["no codes", "zero", "nan", "singular", "none"],
)
def test_a_header_without_usable_affine_is_a_warning(make, zooms):
    with pytest.warns(UserWarning, match="has no usable affine: left and right cannot be told apart"):
        volume = read_volume(make())
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), zooms)
    assert np.isfinite(volume.affine).all()


def test_small_voxels_are_a_usable_affine():
    affine = AFFINE * [[1e-4], [1e-4], [1e-4], [1]]
    np.testing.assert_allclose(read_volume(nib.Nifti1Image(random_image(), affine)).affine, affine)


# --- headers that mean something else


def edited(change, image=None):
    """A NIfTI image whose header is changed after all of nibabel's care for it, as from a file."""
    image = nib.Nifti1Image(random_image(), AFFINE) if image is None else image
    content = bytearray(image.to_bytes())
    for offset, form, value in change:
        struct.pack_into(form, content, offset, value)
    return content


def with_header(tmp_path, change, image=None):
    (tmp_path / "scan.nii").write_bytes(edited(change, image))
    return tmp_path / "scan.nii"


UNITS, INTENT, SLICE_CODE = 123, 68, 122


@pytest.mark.parametrize(("code", "millimetres"), [(0, 1), (1, 1000), (2, 1), (3, 1e-3), (2 | 8, 1), (3 | 16, 1e-3)])
def test_units_of_space_become_millimetres(tmp_path, code, millimetres):
    for affine in (AFFINE, np.zeros((4, 4))):
        image = nib.Nifti1Image(random_image(), AFFINE)
        image.set_sform(affine, code=1)
        image.set_qform(None, code=0)
        image.header.set_zooms((2, 3, 4))
        path = with_header(tmp_path, [(UNITS, "<B", code)], image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = read_volume(path)
        expected = AFFINE if affine.any() else np.diag([2, 3, 4, 1])
        np.testing.assert_allclose(volume.affine[:3], expected[:3] * millimetres, rtol=1e-6)
        result = volume.image(only(volume))
        assert int(result.header["xyzt_units"]) == code  # in its unit, which it says
        saved = nib.Nifti1Image.from_bytes(result.to_bytes())
        np.testing.assert_allclose(saved.affine, expected, rtol=1e-6)
        np.testing.assert_allclose(read_volume_quietly(saved).affine, volume.affine, rtol=1e-6)


def read_volume_quietly(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_volume(source)


def test_an_unknown_unit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scan.nii has an unknown unit of space in its header, code 5"):
        read_volume(with_header(tmp_path, [(UNITS, "<B", 5)]))


@pytest.mark.parametrize(
    ("code", "kind"),
    [(3, "t test"), (22, "p value"), (1005, "symmetric matrix"), (1006, "displacement vector"), (1007, "vector")]
    + [
        (2001, "time series"),
        (2003, "rgb vector"),
        (2006, "fnirt disp field"),
        (3006, "ConnDenseScalar"),
        (77, "unknown"),
    ],
)
def test_voxels_that_are_no_intensities_are_refused(tmp_path, code, kind):
    path = with_header(tmp_path, [(INTENT, "<h", code)])
    with pytest.raises(ValueError, match=f"the kind '{kind}' .intent code {code}.|must hold an image on a grid"):
        read_volume(path)


@pytest.mark.parametrize("code", [1002, 1003])
def test_labels_are_masks_and_no_scans(tmp_path, code):
    path = with_header(tmp_path, [(INTENT, "<h", code)])
    assert read_volume(path).shape == (5, 6, 4)
    for source in (path, {"a": path}, nib.load(path)):
        with pytest.raises(ValueError, match="is no image: its header says that the voxels are of the kind"):
            read_volume(source, labels=False)
    for other in (0, 1001, 1011):
        read_volume(with_header(tmp_path, [(INTENT, "<h", other)]), labels=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(UNITS, "<B", 2 | 8), (92, "<f", 2.5)], "fourth dimension is time, in steps of 2.5"),
        ([(UNITS, "<B", 2 | 16), (92, "<f", 800.0)], "fourth dimension is time, in steps of 800"),
        ([(SLICE_CODE, "<B", 1)], "fourth dimension is time"),
        ([(132, "<f", 0.05)], "fourth dimension is time"),
        ([(UNITS, "<B", 2 | 40)], "fourth dimension is a spectrum .unit code 40."),
        ([(INTENT, "<h", 2001)], "'time series'"),
    ],
)
def test_a_fourth_dimension_that_is_no_list_of_modalities_is_refused(tmp_path, changes, message):
    series = nib.Nifti1Image(random_image((5, 6, 4, 3)), AFFINE)
    with pytest.raises(ValueError, match=message):
        read_volume(with_header(tmp_path, changes, series))
    if "series" not in message:
        one = nib.Nifti1Image(random_image((5, 6, 4, 1)), AFFINE)
        assert read_volume(with_header(tmp_path, changes, one)).shape == (5, 6, 4)
    # ITK writes seconds and a step of 1 whatever the dimension is.
    assert len(read_volume(with_header(tmp_path, [(UNITS, "<B", 10), (92, "<f", 1.0)], series)).arrays) == 3


def test_a_time_series_of_freesurfer_is_refused(tmp_path):
    image = nib.MGHImage(random_image((5, 6, 4, 3)), AFFINE)
    nib.save(image, tmp_path / "scan.mgz")
    assert len(read_volume(tmp_path / "scan.mgz").arrays) == 3
    image.header["tr"] = 2000
    nib.save(image, tmp_path / "scan.mgz")
    with pytest.raises(ValueError, match="fourth dimension is time, with a repetition time of 2000 ms"):
        read_volume(tmp_path / "scan.mgz")


def test_mgh_without_a_place_is_a_warning(tmp_path):
    nib.save(nib.MGHImage(random_image(), AFFINE), tmp_path / "scan.mgh")
    content = bytearray((tmp_path / "scan.mgh").read_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "scan.mgh").write_bytes(content)
    with pytest.warns(UserWarning, match="scan.mgh has no usable affine"):
        assert read_volume(tmp_path / "scan.mgh").shape == (5, 6, 4)


@pytest.mark.parametrize(("slope", "inter"), [(0, 7), (np.nan, 7), (1, 0), (-2, 3), (np.inf, 0), (1, np.nan)])
def test_scale_factors_that_are_none(tmp_path, slope, inter):
    image = nib.Nifti1Image(random_image().astype(np.int16), AFFINE)
    path = with_header(tmp_path, [(112, "<f", slope), (116, "<f", inter)], image)
    if slope == 1 and np.isnan(inter):
        with pytest.raises(ValueError, match="cannot be read.*intercept"):
            read_volume(path)
        return
    expected = random_image() * slope + inter if slope in (1, -2) else random_image()
    np.testing.assert_array_equal(only(read_volume(path)), expected)


@pytest.mark.parametrize(
    "affine",
    [np.diag([-1.0, 1, 1, 1]), np.diag([1.0, -1, 1, 1]), np.diag([1, 2.0, -3, 1]), AFFINE, AFFINE[[1, 0, 2, 3]]],
)
def test_either_hand_is_read_as_it_is(affine):
    np.testing.assert_array_equal(read_volume(nib.Nifti1Image(random_image(), affine)).affine, affine)


@pytest.mark.parametrize(("shear", "refused"), [(0.5, True), (0.1, True), (-0.3, True), (0.01, False)])
def test_sheared_axes_are_refused(tmp_path, shear, refused):
    affine = np.diag([1.0, 1, 3, 1])
    affine[1, 2] = 3 * shear
    nib.save(nib.Nifti1Image(random_image(), affine), tmp_path / "scan.nii.gz")
    if refused:
        with pytest.raises(ValueError, match="scan.nii.gz has an affine whose axes are not perpendicular"):
            read_volume(tmp_path / "scan.nii.gz")
    else:
        read_volume(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize(
    ("qform", "codes", "message"),
    [
        (np.diag([-1.0, 2, 3, 1]), (1, 1), "sform that its axes run RAS, and by its qform LAS"),
        (np.diag([-1.0, 2, 3, 1]), (4, 1), "sform that its axes run RAS, and by its qform LAS"),
        (np.array([[0, 1.0, 0, 0], [2, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]), (2, 1), "axes run"),
        (np.diag([1.0, 2, 4, 1]), (2, 1), "has voxels of .1.0, 2.0, 3.0. by its sform, and of .1.0, 2.0, 4.0."),
        (np.diag([1.0, 2, 4, 1]), (4, 1), None),  # a template's sizes
        (np.diag([1.0, 2, 3, 1]) + np.eye(4, k=3) * 40, (1, 1), None),  # elsewhere: no slice changes
        (np.diag([-1.0, 2, 3, 1]), (1, 0), None),  # does not count
    ],
)
def test_two_forms_that_contradict_each_other_are_refused(tmp_path, qform, codes, message):
    image = nib.Nifti1Image(random_image(), np.diag([1.0, 2, 3, 1]))
    image.set_qform(qform, code=codes[1])
    image.set_sform(np.diag([1.0, 2, 3, 1]), code=codes[0])
    nib.save(image, tmp_path / "scan.nii")
    if message is None:
        np.testing.assert_allclose(read_volume(tmp_path / "scan.nii").affine, np.diag([1.0, 2, 3, 1]))
    else:
        with pytest.raises(ValueError, match=message):
            read_volume(tmp_path / "scan.nii")


@pytest.mark.parametrize("size", [0.0, np.nan, np.inf])
def test_voxel_sizes_that_are_none_are_refused(tmp_path, size):
    image = nib.Nifti1Image(random_image(), None)
    image.header.set_zooms((2, 3, 4))
    image.set_qform(np.diag([2.0, 3, 4, 1]), code=1)
    image.set_sform(None, code=0)
    with pytest.raises(ValueError, match="scan.nii cannot be read.*`pixdim` must hold the sizes"):
        read_volume(with_header(tmp_path, [(84, "<f", size)], image))
    # A negative one is a size with a sign that means nothing; with an sform none of them counts.
    np.testing.assert_allclose(
        read_volume(with_header(tmp_path, [(84, "<f", -3.0)], image)).affine, np.diag([2, 3, 4, 1])
    )
    image.set_sform(np.diag([2.0, 3, 4, 1]), code=1)
    image.set_qform(None, code=0)
    np.testing.assert_allclose(
        read_volume(with_header(tmp_path, [(84, "<f", size)], image)).affine, np.diag([2, 3, 4, 1])
    )


# --- sizes


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setenv("ANODIFF_MAX_VOXELS", "1000")


def test_the_limit_has_a_name(monkeypatch):
    check_voxels(module.MAX_VOXELS, "it")
    with pytest.raises(
        ValueError, match="A file would have 1728000000 voxels, and 536870912 are the limit.*ANODIFF_MAX"
    ):
        check_voxels(1200**3, "A file")
    monkeypatch.setenv("ANODIFF_MAX_VOXELS", str(1200**3))
    check_voxels(1200**3, "A file")
    for wrong in ("", "many", "-1", "1e9"):
        monkeypatch.setenv("ANODIFF_MAX_VOXELS", wrong)
        with pytest.raises(ValueError, match="`ANODIFF_MAX_VOXELS` must be a whole number"):
            check_voxels(1, "A file")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz", ".png"])
def test_files_above_the_limit_are_refused(tmp_path, small_limit, suffix):
    path = tmp_path / f"scan{suffix}"
    if suffix == ".png":
        PIL.Image.fromarray(np.zeros((50, 40), np.uint8)).save(path)
    else:
        nib.save((nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image)(random_image((20, 20, 5)), AFFINE), path)
    for source in [path] + ([nib.load(path)] if suffix != ".png" else []):
        with pytest.raises(ValueError, match=f"scan{suffix} .*would have 2000 voxels, and 1000 are the limit"):
            read_volume(source)


def claims(shape, suffix):
    """The header of a file that claims many voxels of 8 bytes, and nothing behind it."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float64)
    header["dim"][: len(shape) + 1] = len(shape), *shape
    header["vox_offset"], header["sform_code"], header["magic"] = 352, 1, b"n+1"
    for row, line in zip(("srow_x", "srow_y", "srow_z"), np.eye(4), strict=False):
        header[row] = line
    content = header.binaryblock + b"\0" * 4
    return gzip.compress(content) if suffix == ".nii.gz" else content


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_a_header_claims_is_checked_before_memory_is_taken(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    for shape, message in (
        ((1200, 1200, 1200), "would have 1728000000 voxels"),
        ((32767, 32767, 32767), "would have 35181150961663 voxels"),
        ((700, 700, 700), "cannot be read.*its header claims 2744000000 bytes of voxels, the file has"),
    ):
        path.write_bytes(claims(shape, suffix))
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 5e7
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**30, -(2**30), 8 << 20, 0, 4])
def test_an_extension_of_the_header_is_read_no_further_than_the_header(tmp_path, size):
    # Zeros pack a thousand times: 64 MB of them are a file of 64 kB.
    content = bytearray(claims((5, 6, 4), ".nii"))
    content[108:112], content[348] = struct.pack("<f", 384), 1
    content += struct.pack("<ii", size, 6) + bytes(64 << 20)
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="scan.nii.gz cannot be read.*an extension of its header claims"):
        read_volume(tmp_path / "scan.nii.gz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_header_with_extensions_is_read(tmp_path):
    image = nib.Nifti1Image(random_image(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a" * 100))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"b" * 10))
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        nib.save(kind(image.dataobj, AFFINE, image.header), tmp_path / "scan.nii.gz")
        np.testing.assert_array_equal(only(read_volume(tmp_path / "scan.nii.gz")), random_image())


def test_a_picture_that_claims_many_pixels(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb.png \(100000 x 100000 pixels\) would have 10000000000 voxels"):
        read_volume(tmp_path / "bomb.png")
    assert PIL.Image.MAX_IMAGE_PIXELS is not None  # PIL's own limit is back


# --- pictures that were taken on their side


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(tmp_path, orientation):
    upright = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 8, 0), 8, 1)
    stored = {  # what the camera stored, by the meaning of the tag
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[274] = orientation
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"slice{suffix}"
        PIL.Image.fromarray(np.ascontiguousarray(stored)).save(
            path, exif=exif, **({"quality": 100} if suffix == ".jpg" else {})
        )
        with PIL.Image.open(path) as opened:
            for source in (path, opened, open_picture(path)):
                volume = read_volume(source)
                np.testing.assert_allclose(volume.as_given(only(volume)), upright, atol=3)


@pytest.mark.parametrize(("suffix", "form"), [(".png", "PNG"), (".tif", "TIFF"), (".gif", "GIF")])
def test_a_file_of_several_pictures_is_refused(tmp_path, suffix, form):
    pictures = [PIL.Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 200)]
    pictures[0].save(tmp_path / f"one{suffix}", form)
    assert open_picture(tmp_path / f"one{suffix}").size == (8, 8)
    pictures[0].save(tmp_path / f"two{suffix}", form, save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match=f"two{suffix} holds several pictures"):
        open_picture(tmp_path / f"two{suffix}")


# --- content that is elsewhere


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            ".git/annex/objects/ab/cd/MD5E-s10--f.nii.gz/MD5E-s10--f.nii.gz",
            "never fetched: run `datalad get` or `git annex",
        ),
        ("nowhere.nii.gz", "is a link to nowhere.nii.gz, and there is no such file"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".png"])
def test_links_to_nothing_say_what_is_missing(tmp_path, target, message, suffix):
    os.symlink(target, tmp_path / f"scan{suffix}")
    with pytest.raises(FileNotFoundError, match=message):
        read_volume(tmp_path / f"scan{suffix}")


@pytest.mark.parametrize(
    ("content", "command"),
    [
        ("/annex/objects/MD5E-s6148--a.nii.gz\n", "`datalad get` or `git annex get`"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "`git lfs pull`"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mgz", ".png"])
def test_pointers_say_how_to_get_the_content(tmp_path, content, command, suffix):
    (tmp_path / f"scan{suffix}").write_text(content)
    with pytest.raises(FileNotFoundError, match=f"scan{suffix} was never fetched: run {command}"):
        read_volume(tmp_path / f"scan{suffix}")


def test_a_link_counts_as_what_it_points_to(tmp_path):
    nib.save(nib.Nifti1Image(random_image(), AFFINE), tmp_path / "there.nii.gz")
    os.symlink("there.nii.gz", tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(only(read_volume(tmp_path / "scan.nii.gz")), random_image())
