import csv
import json
import os
import stat
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from anodiff.data.correction import Correction
from anodiff.data.phantoms.brains import make_subject
from anodiff.data.prepare import prepare_recipe
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.volumes.processor import VolumeProcessor


sitk = pytest.importorskip("SimpleITK", reason="the extra `preprocess` is missing")


@pytest.fixture(scope="module")
def phantom():
    """Brain of 4 mm with a tumour, (X, Y, Z) float32, its brain and lesion, and the affine."""
    return make_subject(1, lesion="tumour", spacing=4.0, anatomy="geometric")


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), affine), path)
    return path


def write(folder, phantom, motion=None, orientation="RAS"):
    """The phantom's files as a scanner would write them whose patient was moved, in another orientation of the axes."""
    motion = np.eye(4) if motion is None else motion
    files = {}
    for name, array in (*phantom.images.items(), ("brain", phantom.brain), ("lesion", phantom.lesion * 3)):
        image = nib.Nifti1Image(np.asarray(array, np.float32), motion @ phantom.affine)
        ornt = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
        image = image.as_reoriented(ornt)
        files[name] = save(folder / f"{name}.nii.gz", image.get_fdata(), image.affine)
    return files


def subject(files, **options):
    volume = {"t1": files["t1"], "flair": files["flair"]}
    return Subject("s", volume, masks=(files["lesion"],), brain=files["brain"], split="train", **options)


def turned(degrees, shift, scale=1.0):
    angle = np.radians(degrees)
    motion = np.eye(4)
    motion[:3, :3] = scale * np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    motion[:3, 3] = shift
    return motion


def correct(tmp_path, files, **rules):
    correction = Correction(**rules, modalities=("t1", "flair"))
    correction.check()
    return correction.apply(subject(files), tmp_path / "quality.png")


@pytest.mark.parametrize(
    ("kind", "motion", "orientation"),
    [("rigid", turned(9, (14, -10, 6)), "LPS"), ("affine", turned(-7, (5, 8, -4), 1.1), "SRP")],
)
def test_registration_undoes_a_known_motion(tmp_path, phantom, kind, motion, orientation):
    template = save(tmp_path / "template.nii.gz", phantom.images["t1"], phantom.affine)
    files = write(tmp_path / "raw", phantom, motion, orientation)
    found, row = correct(tmp_path, files, register=kind, template=template)
    # World of the template to that of the subject: at the brain's border, half a voxel at most.
    points = nib.affines.apply_affine(phantom.affine, np.argwhere(phantom.brain)[::50])
    expected, moved = (
        nib.affines.apply_affine(matrix, points) for matrix in (motion, np.reshape(row["matrix"], (4, 4)))
    )
    assert np.linalg.norm(moved - expected, axis=1).max() < 2.0
    np.testing.assert_allclose(found.volume.affine, phantom.affine, atol=1e-6)
    for name in ("t1", "flair"):
        inside = phantom.brain > 0
        assert np.corrcoef(found.volume.arrays[name][inside], phantom.images[name][inside])[0, 1] > 0.95
    (mask,) = (mask.arrays[""] for mask in found.masks)
    assert set(np.unique(mask)) == {0.0, 3.0, 6.0} if phantom.lesion.max() == 2 else {0.0, 3.0}
    overlap = 2 * ((mask > 0) & (phantom.lesion > 0)).sum() / ((mask > 0).sum() + (phantom.lesion > 0).sum())
    assert overlap > 0.8
    assert row["overlap_with_template"] > 0.95 and row["metric"] < -0.3
    assert abs(row["rotation_degrees"] - (9 if kind == "rigid" else 7)) < 1.5
    # Twice the same bits.
    again, _ = correct(tmp_path, files, register=kind, template=template)
    np.testing.assert_array_equal(again.volume.arrays["t1"], found.volume.arrays["t1"])


def test_cut_and_spacing_keep_the_world(tmp_path, phantom):
    files = write(tmp_path, phantom, turned(20, (3, -40, 11)), "PIR")
    source = nib.load(files["flair"])
    found, row = correct(tmp_path, files, cut=True)
    brain = found.brain.arrays[""] > 0
    for axis in range(3):
        other = tuple(index for index in range(3) if index != axis)
        assert brain.any(axis=other)[[0, -1]].all()  # nothing but the brain, and all of it
    assert brain.sum() == phantom.brain.sum() and row["brain_ml"] == pytest.approx(phantom.brain.sum() * 0.064)
    assert row["lesion_ml"] == row["lesion_ml_after"] == [pytest.approx((phantom.lesion > 0).sum() * 0.064)]
    # Every voxel is where it was.
    index = np.argwhere(brain)[::37]
    there = nib.affines.apply_affine(np.linalg.inv(source.affine) @ found.volume.affine, index)
    np.testing.assert_allclose(there, there.round(), atol=1e-4)
    there = tuple(there.round().astype(int).T)
    np.testing.assert_allclose(found.volume.arrays["flair"][tuple(index.T)], source.get_fdata()[there], rtol=1e-6)

    finer, _ = correct(tmp_path, files, spacing=(2.0, 4.0, 4.0))
    assert finer.volume.shape == (2 * source.shape[0], *source.shape[1:])
    np.testing.assert_allclose(np.linalg.norm(finer.volume.affine[:3, :3], axis=0), (2, 4, 4))
    centres = [
        nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
        for affine, shape in ((source.affine, source.shape), (finer.volume.affine, finer.volume.shape))
    ]
    np.testing.assert_allclose(*centres, atol=1e-4)


def test_modalities_on_different_grids_meet(tmp_path, phantom):
    files = write(tmp_path / "a", phantom)
    files["flair"] = write(tmp_path / "b", phantom, orientation="LSA")["flair"]
    found, _ = correct(tmp_path, files, spacing=(4.0, 4.0, 4.0))
    np.testing.assert_allclose(found.volume.arrays["flair"], phantom.images["flair"], atol=1e-4)
    with pytest.raises(ValueError, match="lie on different grids"):
        correct(tmp_path, files, cut=True)


def test_bias_field(tmp_path, phantom):
    ramp = np.linspace(0.6, 1.5, phantom.brain.shape[1], dtype=np.float32)[None, :, None]
    inside = (phantom.brain > 0) & (phantom.lesion == 0)
    files = write(tmp_path, phantom)
    save(files["t1"], phantom.images["t1"] * ramp, phantom.affine)
    found, row = correct(tmp_path, files, n4=50)

    def slope(image):
        """Of the field that is left over the true image, along the ramp."""
        ratio = image[inside] / phantom.images["t1"][inside]
        return abs(np.polyfit(np.argwhere(inside)[:, 1] / len(ramp.ravel()), ratio / ratio.mean(), 1)[0])

    assert slope(found.volume.arrays["t1"]) < 0.35 * slope(phantom.images["t1"] * ramp)
    low, high = row["n4_field"][0]
    assert high / low > 1.4


def test_histogram_matching(tmp_path, phantom):
    files = write(tmp_path, phantom)
    for name in ("t1", "flair"):
        save(tmp_path / "reference" / f"BraTS_00000_{name}.nii.gz", 700 * phantom.images[name] ** 1.5, phantom.affine)
    found, row = correct(tmp_path, files, match_histogram=True, reference=tmp_path / "reference")
    assert row["matched_to"] == ["BraTS_00000_t1.nii.gz", "BraTS_00000_flair.nii.gz"]
    image, reference = (
        sitk.GetImageFromArray(np.ascontiguousarray(array.T.astype(np.float32)))
        for array in (phantom.images["flair"], 700 * phantom.images["flair"] ** 1.5)
    )
    expected = sitk.GetArrayFromImage(sitk.HistogramMatching(image, reference, 256, 1, True)).T
    seen = phantom.images["flair"] > 0
    np.testing.assert_allclose(found.volume.arrays["flair"][seen], expected[seen], rtol=1e-4)
    assert not found.volume.arrays["flair"][phantom.images["flair"] == 0].any()


STAND_IN = """#!{python}
# Stands in for {name}: takes its arguments, and finds the brain above a threshold.
import json, sys
from pathlib import Path
import nibabel as nib
arguments = sys.argv[1:]
Path({log!r}).write_text(json.dumps(arguments))
source = Path(arguments[arguments.index("strip" if "strip" in arguments else "-i") + 1])
target = Path(arguments[arguments.index("-o") + 1])
image = nib.load(source)
if image.get_fdata().max() > 5000:
    sys.exit("cuda error, or so")
mask = Path(arguments[arguments.index("-m") + 1]) if "-m" in arguments else target.with_name(target.name[:-7] + "_bet.nii.gz")
if "strip" in arguments:
    mask = target / "scan_brain_mask.nii.gz"
if {{"-m", "--save_bet_mask", "strip"}} & set(arguments):
    nib.save(nib.Nifti1Image((image.get_fdata() > 0.2).astype("uint8"), image.affine), mask)
"""


@pytest.mark.parametrize(
    ("tool", "program"), [("anodiff", "anodiff"), ("hd-bet", "hd-bet"), ("synthstrip", "mri_synthstrip")]
)
def test_skull_stripping_calls_the_program(tmp_path, phantom, monkeypatch, tool, program):
    with monkeypatch.context() as nothing:
        nothing.setenv("PATH", str(tmp_path))
        with pytest.raises(
            ImportError, match=f"needs the program `{program}`, which is not installed .*Installed are none"
        ):
            Correction(skull_strip=tool).check()
    path = tmp_path / "bin" / program
    path.parent.mkdir()
    path.write_text(STAND_IN.format(python=sys.executable, name=program, log=str(tmp_path / "log.json")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    files = write(tmp_path / "raw", phantom, orientation="LPS")
    with_skull = {
        **files,
        "t1": save(tmp_path / "t1.nii.gz", nib.load(files["t1"]).get_fdata() + 0.1, nib.load(files["t1"]).affine),
    }
    found, row = correct(tmp_path, with_skull, skull_strip=tool)
    head = nib.load(with_skull["t1"]).get_fdata()
    np.testing.assert_array_equal(found.brain.arrays[""] > 0, head > 0.2)
    np.testing.assert_array_equal(found.volume.arrays["t1"] > 0, head > 0.2)
    assert not found.volume.arrays["flair"][head <= 0.2].any() and row["skull_strip"] == tool
    arguments = json.loads((tmp_path / "log.json").read_text())
    assert ("--save_bet_mask" in arguments) == (tool == "hd-bet") and ("-m" in arguments) == (tool == "synthstrip")
    save(with_skull["t1"], head * 1e5, nib.load(files["t1"]).affine)
    with pytest.raises(ValueError, match=f"`{program}` made no brain mask .exit status 1.: cuda error, or so"):
        correct(tmp_path, with_skull, skull_strip=tool)


def test_a_mask_is_not_lost_without_a_word(tmp_path, phantom):
    files = write(tmp_path, phantom)
    with pytest.raises(ValueError, match="Nothing of the .* ml that .*lesion.nii.gz marks is left on the new grid"):
        correct(tmp_path, files, spacing=(60, 60, 60))
    save(files["lesion"], phantom.lesion, np.eye(4))
    with pytest.raises(ValueError, match="lesion.nii.gz must lie on the grid of one of t1, flair: shape and affine"):
        correct(tmp_path, files, cut=True)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"register": "elastic"}, "`correction.register` must be one of None, rigid, affine, got 'elastic'"),
        (
            {"skull_strip": "bet"},
            "`correction.skull_strip` must be one of None, anodiff, hd-bet, synthstrip, got 'bet'",
        ),
        ({"by": "t2"}, "`correction.by` must be one of None, t1, flair, got 't2'"),
        ({"spacing": (1, 1)}, r"three numbers > 0 in mm, got \(1, 1\)"),
        ({"n4": -1}, "`correction.n4` must be an integer of at least 0, got -1"),
        ({"register": "rigid"}, "`correction.register` needs a template: give `--template FILE`"),
        ({"match_histogram": True}, "`correction.match_histogram` needs a reference: give `--reference FILE`"),
        ({"template": "t.nii"}, "`--template` is given, but the recipe does not set `correction.register`"),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        Correction(**rules, modalities=("t1", "flair")).check()


RECIPE = {
    "reader": "volume_folders",
    "reader_options": {
        "modalities": {"t1": "t1.nii.gz", "flair": "flair.nii.gz"},
        "masks": ["lesion.nii.gz"],
        "brain": "brain.nii.gz",
    },
    "correction": {"register": "rigid", "cut": True},
    "processor": {"modalities": ["t1", "flair"], "size": [24, 24], "brain_mask": "given"},
    "split": {"fractions": {"train": 0.5, "test": 0.5}},
    "license": "cc-by-4.0",
}


def test_a_recipe_with_correction(tmp_path, phantom):
    template = save(tmp_path / "template.nii.gz", phantom.images["t1"], phantom.affine)
    motions = {"a": turned(5, (9, 0, 0)), "b": turned(-5, (0, 9, 4)), "shear": np.eye(4)}
    for name, motion in motions.items():
        write(tmp_path / "raw" / name, phantom, motion, "LPS")
    sheared = nib.load(tmp_path / "raw" / "shear" / "t1.nii.gz")
    affine = sheared.affine @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for file in (tmp_path / "raw" / "shear").iterdir():
        image = nib.Nifti1Image(nib.load(file).get_fdata().astype(np.float32), affine)
        image.set_qform(None)
        nib.save(image, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failures = prepare_recipe(RECIPE, tmp_path / "raw", tmp_path / "set", template=template, progress=False)
    assert list(failures) == ["shear"] and "axes are not perpendicular" in failures["shear"]

    with open(tmp_path / "set" / "corrections.csv", newline="") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == ["a", "b"] and all(row["register"] == "rigid" for row in rows.values())
    for name in rows:
        np.testing.assert_allclose(
            np.reshape(json.loads(rows[name]["matrix"]), (4, 4))[:3, :3], motions[name][:3, :3], atol=0.03
        )
        picture = np.asarray(PIL.Image.open(tmp_path / "set" / "quality" / f"{name}.png").convert("RGB")).astype(int)
        red = (picture[..., 0] > 200) & (picture[..., 1:].max(2) < 80)
        cyan = (picture[..., 0] < 80) & (picture[..., 1:].min(2) > 120)
        assert red.sum() > 100 and cyan.sum() > 500
    splits = {name: load_prepared(tmp_path / "set", name) for name in ("train", "test")}
    for split in splits.values():
        (name,) = split.subjects
        info, read = split.subject_info[name], split.read_subject(name)
        # The corrected grid is the subject's grid: its affine is a whole-voxel shift of the template's.
        shift = np.linalg.inv(phantom.affine) @ np.reshape(info["affine"], (4, 4))
        np.testing.assert_allclose(shift[:3, :3], np.eye(3), atol=1e-6)
        np.testing.assert_allclose(shift[:3, 3], shift[:3, 3].round(), atol=1e-5)
        assert info["shape"] == json.loads(rows[name]["output_shape"])
        assert info["volume_files"] == [f"{name}/t1.nii.gz", f"{name}/flair.nii.gz"]
        assert read["mask"].any() and 0.3 < read["brain"].mean() < 1
    card = (tmp_path / "set" / "README.md").read_text()
    assert "Corrected before: register: rigid, cut: True, template: template.nii.gz (SHA-256" in card
    assert str(tmp_path) not in card + (tmp_path / "set" / "recipe.yaml").read_text()
    VolumeProcessor.from_pretrained(tmp_path / "set" / "processor")

    changed = {**RECIPE, "correction": {"registration": "rigid"}}
    with pytest.raises(ValueError, match="`correction` has no key registration; it takes skull_strip, register, by"):
        prepare_recipe(changed, tmp_path / "raw", tmp_path / "other", template=template)


def test_real_scans_meet_in_one_space(tmp_path):
    if "ANODIFF_TEST_DATA" not in os.environ:
        pytest.skip("ANODIFF_TEST_DATA is not set: no real data")
    root = Path(os.environ["ANODIFF_TEST_DATA"]) / "mri"

    def halved(folder, name, mask=None):
        """Every third voxel, for speed."""
        image = nib.load(root / folder / name)
        array = image.get_fdata() * (1 if mask is None else nib.load(root / folder / mask).get_fdata() > 0)
        affine = image.affine @ np.diag([3, 3, 3, 1])
        return save(tmp_path / folder / name, array[::3, ::3, ::3], affine)

    template = halved("tcga_lgg_sri24/TCGA-DU-7294", "t1.nii.gz", "brain.nii.gz")
    for name in ("t1", "flair"):
        halved("tcga_lgg_sri24/TCGA-DU-7294", f"{name}.nii.gz", "brain.nii.gz")
    files = {name: halved("ms_lesjak_mni/patient26", f"{name}.nii.gz") for name in ("t1", "flair", "brain", "lesion")}
    files_of_rules = {"template": template, "reference": tmp_path / "tcga_lgg_sri24" / "TCGA-DU-7294"}
    rules = {
        "register": "affine",
        "cut": True,
        "n4": 50,
        "match_histogram": True,
    }  # each works on what the one before leaves
    found, row = correct(tmp_path, files, **rules, **files_of_rules)
    assert row["n4_field"] and row["matched_to"] == ["t1.nii.gz", "flair.nii.gz"]
    assert row["overlap_with_template"] > 0.9 and 5 < row["rotation_degrees"] < 25
    flair, lesion = found.volume.arrays["flair"], found.masks[0].arrays[""] > 0
    inside = found.brain.arrays[""] > 0
    assert flair[lesion].mean() > 1.2 * flair[inside & ~lesion].mean()
