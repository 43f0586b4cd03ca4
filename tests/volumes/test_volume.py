import gzip
import warnings

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff.volumes.volume import read_volume


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
    with pytest.raises(ValueError, match=r"scan.dcm must end in one of .nii, .nii.gz, .mgz, .mgh, .png"):
        read_volume(tmp_path / "scan.dcm")


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
