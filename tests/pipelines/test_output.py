import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff import AnomalyOutput
from anodiff.pipelines.output import remove_results
from anodiff.volumes.volume import read_volume


COS, SIN = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
ROTATION = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]])
OBLIQUE = nib.affines.from_matvec(ROTATION @ np.diag([-0.9, 1.1, 4.0]), (-71.3, 20.1, 5.5))
SHAPE = (6, 7, 4)


def scan(affine=OBLIQUE, kind=nib.Nifti1Image, shape=SHAPE):
    return kind(np.random.default_rng(0).integers(0, 500, shape).astype(np.int16), affine)


def save(source, folder, channels=1, **results):
    """Results of the input's form, with scores that a reader can recognise."""
    volume = read_volume(source)
    rng = np.random.default_rng(1)
    form = volume.as_given(next(iter(volume.arrays.values()))).shape
    anomaly_map = rng.random(form, dtype=np.float32) / 7
    output = AnomalyOutput(
        **{
            "anomaly_map": anomaly_map,
            "pred_score": np.arange(4) / 8,
            "volume_score": 0.25,
            "pred_mask": (anomaly_map > 0.05).astype(np.uint8),
            "reconstruction": rng.random((*form, channels) if channels > 1 else form, dtype=np.float32) * 240,
            "settings": {"pipeline": "test", "noise_level": 250},
            "source": volume,
        }
        | results
    )
    output.save(folder)
    return output


def saved(folder, name, output):
    image = nib.load(folder / f"{name}.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), output[name])
    assert image.get_data_dtype() == (np.uint8 if name == "pred_mask" else np.float32)
    assert image.header.get_slope_inter() in ((None, None), (1.0, 0.0))
    return image


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("units", ["mm", "micron", "unknown"])
def test_files_lie_on_the_grid_of_the_input(tmp_path, units, kind):
    source = scan(kind=kind)
    source.set_sform(OBLIQUE, code="talairach")
    source.set_qform(OBLIQUE, code="scanner")
    source.header.set_xyzt_units(units, "sec")
    nib.save(source, tmp_path / "scan.nii.gz")
    source = nib.load(tmp_path / "scan.nii.gz")
    output = save(tmp_path / "scan.nii.gz", tmp_path / "new" / "out")
    for name in ("anomaly_map", "pred_mask", "reconstruction"):
        image = saved(tmp_path / "new" / "out", name, output)
        assert type(image) is kind
        assert image.shape == SHAPE
        np.testing.assert_array_equal(image.affine, source.affine)
        assert image.header.get_sform(coded=True)[1] == 3 and image.header.get_qform(coded=True)[1] == 1
        np.testing.assert_array_equal(image.header.get_qform(), source.header.get_qform())
        assert image.header.get_xyzt_units() == (units, "sec")
        np.testing.assert_allclose(image.header.get_zooms(), source.header.get_zooms())
    record = json.loads((tmp_path / "new" / "out" / "result.json").read_text())
    assert record == {
        "volume_score": 0.25,
        "pred_score": [0, 0.125, 0.25, 0.375],
        "settings": {"pipeline": "test", "noise_level": 250},
    }


@pytest.mark.parametrize("codes", [(2, 0), (0, 4), (0, 1), (4, 1)])
def test_form_codes_stay_as_they_are(tmp_path, codes):
    source = scan()
    source.set_sform(OBLIQUE, code=codes[0])
    source.set_qform(OBLIQUE, code=codes[1])
    nib.save(source, tmp_path / "scan.nii")
    image = saved(tmp_path, "anomaly_map", save(tmp_path / "scan.nii", tmp_path))
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == codes
    np.testing.assert_array_equal(image.affine, nib.load(tmp_path / "scan.nii").affine)


def test_two_forms_that_differ_both_stay(tmp_path):
    source = scan()
    source.set_sform(OBLIQUE, code=4)
    source.set_qform(np.diag([-0.9, 1.1, 4.0, 1]), code=1)
    nib.save(source, tmp_path / "scan.nii")
    image = saved(tmp_path, "anomaly_map", save(tmp_path / "scan.nii", tmp_path))
    np.testing.assert_allclose(image.header.get_sform(), OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(image.header.get_qform(), np.diag([-0.9, 1.1, 4.0, 1]), atol=1e-5)
    np.testing.assert_array_equal(image.affine, nib.load(tmp_path / "scan.nii").affine)


def test_without_codes_no_place_is_invented(tmp_path):
    source = scan()
    source.set_sform(None, code=0)
    source.set_qform(None, code=0)
    nib.save(source, tmp_path / "scan.nii")
    with pytest.warns(UserWarning, match="no usable affine"):
        output = save(tmp_path / "scan.nii", tmp_path)
    image = saved(tmp_path, "anomaly_map", output)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 0
    np.testing.assert_array_equal(image.affine, nib.load(tmp_path / "scan.nii").affine)


def test_a_singular_affine_is_replaced_by_the_one_in_use(tmp_path):
    source = scan()
    source.header["srow_x"] = 0
    source.header["sform_code"] = 1
    source = nib.Nifti1Image.from_bytes(nib.Nifti1Image(source.dataobj, None, source.header).to_bytes())
    with pytest.warns(UserWarning, match="no usable affine"):
        output = save(source, tmp_path)
    np.testing.assert_allclose(saved(tmp_path, "anomaly_map", output).affine, np.diag([0.9, 1.1, 4.0, 1]), rtol=1e-6)


def test_mgz_gives_nifti_in_the_same_place(tmp_path):
    nib.save(scan(kind=nib.MGHImage), tmp_path / "scan.mgz")
    image = saved(tmp_path, "anomaly_map", save(tmp_path / "scan.mgz", tmp_path))
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_arrays_give_nifti_with_the_identity(tmp_path):
    image = saved(tmp_path, "pred_mask", save(scan().get_fdata(), tmp_path))
    np.testing.assert_array_equal(image.affine, np.eye(4))


@pytest.mark.parametrize("form", ["nibabel", "array"])
def test_2d_volumes_stay_2d(tmp_path, form):
    flat = scan(shape=(6, 7))
    source = flat if form == "nibabel" else flat.get_fdata()
    output = save({"a": source, "b": source}, tmp_path, channels=2)
    assert saved(tmp_path, "anomaly_map", output).shape == (6, 7)
    image = nib.load(tmp_path / "reconstruction.nii.gz")
    assert image.shape == (6, 7, 1, 2)
    np.testing.assert_array_equal(image.get_fdata()[:, :, 0], output.reconstruction)
    np.testing.assert_allclose(image.affine, OBLIQUE if form == "nibabel" else np.eye(4), atol=1e-5)


def test_modalities_are_the_fourth_axis(tmp_path):
    output = save({"flair": scan(), "t1": scan()}, tmp_path, channels=2)
    image = saved(tmp_path, "reconstruction", output)
    assert image.shape == (*SHAPE, 2)
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)


def test_without_threshold_and_reconstruction(tmp_path):
    save(scan(), tmp_path, pred_mask=None, reconstruction=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anomaly_map.nii.gz", "result.json"]


@pytest.mark.parametrize("levels", [np.uint8, np.uint16])
def test_pictures_give_pictures(tmp_path, levels):
    rows = np.random.default_rng(0).integers(0, 256, (9, 5)).astype(levels) * levels(200 if levels is np.uint16 else 1)
    PIL.Image.fromarray(rows).save(tmp_path / "slice.png")
    reconstruction = rows.astype(np.float32) + 0.3
    reconstruction[0, :2] = -4, 7e4
    output = save(tmp_path / "slice.png", tmp_path / "out", reconstruction=reconstruction)

    grey = np.asarray(PIL.Image.open(tmp_path / "out" / "anomaly_map.png"))
    per_level = json.loads((tmp_path / "out" / "result.json").read_text())["anomaly_map_per_grey_level"]
    assert grey.dtype == np.uint16 and grey.max() == 65535
    np.testing.assert_allclose(grey * per_level, output.anomaly_map, atol=per_level)
    mask = np.asarray(PIL.Image.open(tmp_path / "out" / "pred_mask.png"))
    np.testing.assert_array_equal(mask, output.pred_mask * 255)
    assert mask.dtype == np.uint8
    back = np.asarray(PIL.Image.open(tmp_path / "out" / "reconstruction.png"))
    assert back.dtype == levels
    np.testing.assert_array_equal(back[1:], rows[1:])
    np.testing.assert_array_equal(back[0, :2], (0, np.iinfo(levels).max))


def test_a_map_of_zeros_is_a_black_picture(tmp_path):
    picture = PIL.Image.fromarray(np.eye(4, dtype=np.uint8))
    save(picture, tmp_path, anomaly_map=np.zeros((4, 4), np.float32))
    assert not np.asarray(PIL.Image.open(tmp_path / "anomaly_map.png")).any()
    assert json.loads((tmp_path / "result.json").read_text())["anomaly_map_per_grey_level"] == 1


def test_several_pictures_give_a_reconstruction_each(tmp_path):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 5)).astype(np.uint8))
    output = save({"t1": picture, "t2": picture}, tmp_path, channels=2)
    for channel, name in enumerate(("t1", "t2")):
        grey = np.asarray(PIL.Image.open(tmp_path / f"reconstruction_{name}.png"))
        np.testing.assert_array_equal(grey, np.rint(output.reconstruction[..., channel]))


def test_a_result_of_a_tensor_refuses_to_be_saved(tmp_path):
    output = AnomalyOutput(anomaly_map=torch.zeros(2, 4, 4), pred_score=torch.zeros(2), volume_score=0.0)
    with pytest.raises(ValueError, match="A result of a tensor has no grid"):
        output.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_call_wrote_is_removed_and_nothing_else(tmp_path):
    written = (
        "dispersion.png",
        "dispersion.json",
        "member_maps.nii.gz",
        "member_masks_03.png",
        "reconstruction_t1.png",
        "result.json",
    )
    own = ("dispersion_plot.png", "member_masks_of_mine.png", "result.csv", "reconstruction.txt")
    for name in (*written, *own):
        (tmp_path / name).touch()
    remove_results(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(own)
