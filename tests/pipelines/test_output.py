import json
import os

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from anodiff import AnomalyOutput
from anodiff.volumes.results import remove_results
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
        "files": ["anomaly_map.nii.gz", "pred_mask.nii.gz", "reconstruction.nii.gz"],
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


# --- files are never lost


FILES = {"anomaly_map.nii.gz", "pred_mask.nii.gz", "reconstruction.nii.gz", "result.json"}
OWN = ("dispersion_plot.png", "mean_map.nii.gz", "member_masks_03.png", "result.csv", "scan.nii.gz")


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def touch(folder, *names):
    for name in names:
        (folder / name).write_text(f"the user's {name}")


def test_what_the_record_names_is_removed_and_nothing_else(tmp_path):
    touch(tmp_path, *OWN)
    save(scan(), tmp_path, pred_mask=None)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["files"] == ["anomaly_map.nii.gz", "reconstruction.nii.gz"]
    touch(tmp_path, "pred_mask.nii.gz")  # a segmentation of the user's, say
    remove_results(tmp_path)
    assert names_in(tmp_path) == {*OWN, "pred_mask.nii.gz"}
    remove_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("record", "values", "removed"),
    [
        ("result", {"pred_score": [1]}, {"anomaly_map.nii.gz", "reconstruction_t1.png", "overview.png"}),
        ("result", {"num_members": 4}, {"mean_map.nii.gz", "member_masks_03.png", "overview.png"}),
        ("dispersion", {"pred_score": [[1]]}, {"mean_map.nii.gz", "dispersion.png"}),
        (
            "result",
            {"pred_score": [1], "settings": None},
            {"anomaly_map.nii.gz", "reconstruction_t1.png", "overview.png"},
        ),
        ("result", {"name": "mine"}, set()),
        ("result", [1, 2], set()),
        ("result", None, set()),
    ],
)
def test_results_of_older_versions_are_known_by_their_record(tmp_path, record, values, removed):
    every = {"anomaly_map.nii.gz", "reconstruction_t1.png", "overview.png", "dispersion.png", *OWN}
    touch(tmp_path, *every, f"{record}.json")
    if values is not None:
        ours = {"settings": {}, **values} if {"pred_score", "num_members"} & set(values) else values
        (tmp_path / f"{record}.json").write_text(json.dumps(ours))
    remove_results(tmp_path)
    assert names_in(tmp_path) == (every | {f"{record}.json"}) - (removed | {f"{record}.json"} if removed else set())


def test_a_record_cannot_name_what_is_no_result(tmp_path):
    (tmp_path / "in").mkdir()
    touch(tmp_path, "overview.png")
    touch(tmp_path / "in", "scan.nii.gz", "notes.png")
    hostile = ["../overview.png", str(tmp_path / "overview.png"), "scan.nii.gz", "notes.png", 3, "."]
    (tmp_path / "in" / "result.json").write_text(json.dumps({"files": hostile}))
    remove_results(tmp_path / "in")
    assert names_in(tmp_path) == {"overview.png", "in"} and names_in(tmp_path / "in") == {"scan.nii.gz", "notes.png"}


@pytest.mark.parametrize("name", ["anomaly_map.nii.gz", "result.json", "overview.png"])
def test_a_file_of_the_user_is_in_the_way_and_stays(tmp_path, name):
    touch(tmp_path, name)
    with pytest.raises(FileExistsError, match=f"holds {name}, which no earlier result wrote"):
        read_and_save(tmp_path)
    assert names_in(tmp_path) == {name} and (tmp_path / name).read_text() == f"the user's {name}"


def read_and_save(folder, draw=lambda path: path.write_text("a picture"), **results):
    volume = read_volume(scan())
    values = {
        "anomaly_map": np.ones(SHAPE, np.float32),
        "pred_score": np.ones(4),
        "volume_score": 1.0,
        "settings": {},
        "source": volume,
    }
    AnomalyOutput(**values | results).save(folder, draw)


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    settings = {
        "threshold": np.float32(0.5),
        "noise_level": [np.int64(3), 4],
        "scale": (np.float64(0.25),),
        "gap": np.arange(2),
        "flag": np.bool_(True),
        "nested": {"k": torch.tensor([1.5])},
    }
    read_and_save(
        tmp_path, settings=settings, volume_score=np.float32(0.5), slice_details={"label": np.array([1, np.nan])}
    )
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["settings"] == {
        "threshold": 0.5,
        "noise_level": [3, 4],
        "scale": [0.25],
        "gap": [0, 1],
        "flag": True,
        "nested": {"k": [1.5]},
    }
    assert (record["volume_score"], record["label"]) == (0.5, [1, None])


@pytest.mark.parametrize("wrong", [{"settings": {"model": object()}}, {"volume_score": float("nan")}])
def test_what_json_has_not_is_refused_before_anything_is_written(tmp_path, wrong):
    read_and_save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match="must be values that JSON has.*Nothing was written"):
            read_and_save(folder, anomaly_map=np.zeros(SHAPE, np.float32), **wrong)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_earlier_result(tmp_path, stop):
    read_and_save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def draw(path):
        path.write_text("half a pict")
        raise stop

    with pytest.raises(type(stop)):
        read_and_save(tmp_path, draw, anomaly_map=np.zeros(SHAPE, np.float32))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(type(stop)):
        read_and_save(tmp_path / "new", draw)
    assert names_in(tmp_path / "new") == set()


def test_a_save_that_is_killed_while_files_change_leaves_no_record_and_can_be_repeated(tmp_path, monkeypatch):
    """Whatever the file that takes its place last: `os.replace` stands for the moment of the kill."""
    before, replace, steps = {}, os.replace, []

    def count(*paths):
        replace(*paths)
        steps.append(paths[1].name)

    monkeypatch.setattr(os, "replace", count)
    save(scan(), tmp_path / "all", volume_score=1.0)
    save(scan(), tmp_path / "all", volume_score=2.0, pred_mask=None)
    assert steps[-1] == "result.json" and set(steps) >= FILES
    last = len(steps) // 2
    for kill in range(last + 1):
        folder, steps[:] = tmp_path / str(kill), []
        monkeypatch.setattr(os, "replace", replace)
        save(scan(), folder, volume_score=1.0)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def stop(*paths, kill=kill):
            if len(steps) == kill:
                raise KeyboardInterrupt
            count(*paths)

        monkeypatch.setattr(os, "replace", stop)
        try:
            save(scan(), folder, volume_score=2.0, pred_mask=None)
        except KeyboardInterrupt:
            left = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert left == before or "result.json" not in left
        monkeypatch.setattr(os, "replace", replace)
        save(scan(), folder, volume_score=3.0, pred_mask=None)
        assert names_in(folder) == FILES - {"pred_mask.nii.gz"}
        assert json.loads((folder / "result.json").read_text())["volume_score"] == 3
