import csv
import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from anodiff.data.phantoms.nodules import RATER_SETS, make_case, write_rater_phantom
from anodiff.data.phantoms.sets import is_phantom, prepare_phantom
from anodiff.data.prepare import prepare, prepare_recipe
from anodiff.data.prepared import load_prepared
from anodiff.data.raters import RaterRule
from anodiff.data.readers.subjects import Subject
from anodiff.volumes.processor import VolumeProcessor


@pytest.fixture
def disc():
    """Two discs, of radius 12 and 4."""
    rows, columns = np.indices((64, 72))
    return (np.hypot(rows - 25, columns - 30) < 12) | (np.hypot(rows - 52, columns - 60) < 4)


STILL = {"radius": 0.0, "warp": 0.0, "drop": 0.0}


def test_raters_who_do_nothing_copy_the_mask(disc):
    for mask, spacing in ((disc, (1, 1)), (disc[..., None], (0.7, 0.7, 3)), (np.stack([disc] * 3, 2), (1, 2, 4))):
        drawn = RaterRule(number=3, **STILL).annotate(mask, spacing, "s")
        assert drawn.dtype == bool and drawn.shape == (3, *mask.shape)
        np.testing.assert_array_equal(drawn, np.stack([mask] * 3))


def test_erosion_and_dilation(disc):
    large = disc & (np.indices(disc.shape)[0] < 40)
    drawn = RaterRule(number=60, **{**STILL, "radius": 2.0}).annotate(large, (1, 1), "s")
    # Concentric: of any two raters one mask holds the other.
    areas = drawn.sum((1, 2))
    for smaller, larger in zip(drawn[np.argsort(areas)], drawn[np.argsort(areas)][1:], strict=False):
        assert not (smaller & ~larger).any()
    wider = np.sqrt(areas / np.pi) - 12
    assert abs(wider.mean()) < 0.8 and 1.4 < wider.std() < 2.6
    # In mm: half the voxel, twice as many of them.
    fine = RaterRule(number=60, **{**STILL, "radius": 2.0}).annotate(large.repeat(2, 0).repeat(2, 1), (0.5, 0.5), "s")
    np.testing.assert_allclose(np.sqrt(fine.sum((1, 2)) / 4 / np.pi) - 12, wider, atol=0.8)  # steps of a voxel


def test_warps_move_the_boundary_smoothly(disc):
    drawn = RaterRule(number=40, **{**STILL, "warp": 1.5}).annotate(disc, (1, 1), "s")
    large = disc & (np.indices(disc.shape)[0] < 40)
    areas = drawn[:, :40].sum((1, 2)) / large.sum()
    assert 0.9 < areas.mean() < 1.1 and areas.std() > 0.02
    changed = (drawn[:, :40] != large[:40]).mean(0) > 0
    depth = np.abs(np.hypot(*(np.indices(disc.shape)[:, :40] - np.array([25, 30])[:, None, None])) - 12)
    assert 1 < depth[changed].max() < 7  # no farther than 4 standard deviations and a pixel
    from scipy import ndimage

    assert all(ndimage.label(mask)[1] == 1 for mask in drawn[:, :40])  # no crumbs


def test_dropped_components(disc):
    drawn = RaterRule(number=200, **{**STILL, "drop": 0.3}).annotate(disc, (1, 1), "s")
    upper, lower = drawn[:, 25, 30], drawn[:, 52, 60]
    for seen in (upper, lower):
        assert 0.6 < seen.mean() < 0.8
    assert (upper & ~lower).any() and (lower & ~upper).any() and (~upper & ~lower).any()
    whole = RaterRule(number=4, **{**STILL, "drop": 1.0}).annotate(disc, (1, 1), "s")
    assert not whole.any()


def test_draws_depend_on_seed_subject_and_rater_alone(disc):
    first = RaterRule(number=2).annotate(disc, (1, 1), "s")
    more = RaterRule(number=5).annotate(disc, (1, 1), "s")
    np.testing.assert_array_equal(more[:2], first)
    assert len({mask.tobytes() for mask in more}) == 5
    for other in (RaterRule(seed=1).annotate(disc, (1, 1), "s"), RaterRule().annotate(disc, (1, 1), "t")):
        assert not np.array_equal(other[:2], first)


def test_masks_without_boundary():
    assert not RaterRule().annotate(np.zeros((9, 9)), (1, 1), "s").any()
    rule = RaterRule(drop=0.0)
    assert rule.annotate(np.ones((9, 9)), (1, 1), "s").all()
    corner = np.zeros((9, 9, 1))
    corner[0, 0] = 1
    assert rule.annotate(corner, (1, 1, 1), "s").shape == (4, 9, 9, 1)
    with pytest.raises(ValueError, match=r"`spacing` must have a number for each axis of \(9, 9, 1\), got \(1, 1\)"):
        rule.annotate(corner, (1, 1), "s")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 0}, "`raters.number` must be an integer of at least 1, got 0"),
        ({"number": 2.5}, "`raters.number` must be an integer"),
        ({"radius": -1.0}, "`raters.radius` must be a finite number and at least 0, got -1.0"),
        ({"warp": -1.0}, "`raters.warp` must be a finite number and at least 0"),
        ({"warp_scale": 0.0}, "`raters.warp_scale` must be a finite number and above 0, got 0.0"),
        ({"drop": 1.5}, "`raters.drop` must be .* between 0 and 1, got 1.5"),
        ({"seed": -1}, "`raters.seed` must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_rules(settings, message):
    with pytest.raises(ValueError, match=message):
        RaterRule(**settings)


def volume_set(root):
    """Two subjects, one with a lesion in slices 2 to 4, at 2 x 2 x 3 mm."""
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    rng = np.random.default_rng(0)
    for name in ("ill", "well"):
        mask = np.zeros((20, 18, 7), np.uint8)
        mask[6:13, 5:13, 2:5] = name == "ill"
        image = rng.uniform(1, 2, mask.shape).astype(np.float32)
        (root / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(image, affine), root / name / "flair.nii.gz")
        nib.save(nib.Nifti1Image(mask, affine), root / name / "mask.nii.gz")


def test_raters_in_a_recipe(tmp_path):
    volume_set(tmp_path / "raw")
    recipe = {
        "reader": "volume_folders",
        "reader_options": {"modalities": {"flair": "flair.nii.gz"}, "masks": ["mask.nii.gz"]},
        "processor": {"modalities": ["flair"], "size": None},
        "split": {"fractions": {"train": 1.0}},
        "raters": {"number": 3, "radius": 2.0, "seed": 5, "drop": 0.0},
    }
    assert prepare_recipe(recipe, tmp_path / "raw", tmp_path / "set", progress=False) == {}
    split = load_prepared(tmp_path / "set", "train")
    assert split[:]["mask"].shape == (14, 3, 18, 20) and split.annotations.tolist() == [3] * 14
    ill, well = (split.read_subject(name)["mask"] for name in ("ill", "well"))
    assert not well.any() and split.subject_info["well"]["label"] == 0
    mask = np.asarray(nib.load(tmp_path / "raw/ill/mask.nii.gz").dataobj)
    drawn = RaterRule(number=3, radius=2.0, seed=5, drop=0.0).annotate(mask, (2, 2, 3), "ill")
    # The network's rows and columns are the file's axes here.
    np.testing.assert_array_equal(ill, drawn.transpose(3, 0, 2, 1))
    assert len({ill[:, rater].tobytes() for rater in range(3)}) == 3
    touched = ill.any((1, 2, 3)) | mask.any((0, 1))
    assert split.read_subject("ill")["label"].tolist() == touched.astype(int).tolist()

    # The lesion is there, though no rater sees it: its slices are not healthy.
    recipe["raters"]["drop"] = 1.0
    recipe["slices"] = {"train": "healthy_by_mask"}
    assert prepare_recipe(recipe, tmp_path / "raw", tmp_path / "dropped", progress=False) == {}
    split = load_prepared(tmp_path / "dropped", "train")
    assert split.read_subject("ill")["slice"].tolist() == [0, 1, 5, 6]
    assert split.subject_info["ill"]["label"] == 1 and len(split.read_subject("well")["slice"]) == 7

    recipe["raters"]["count"] = 3
    with pytest.raises(ValueError, match="`raters` has no key count; it takes number, radius, warp, warp_scale, drop"):
        prepare_recipe(recipe, tmp_path / "raw", tmp_path / "other", progress=False)
    masks = (tmp_path / "raw/ill/mask.nii.gz",) * 2
    twice = Subject("ill", {"flair": tmp_path / "raw/ill/flair.nii.gz"}, masks=masks, split="train")
    with pytest.raises(ValueError, match="`raters` makes annotations of one mask, and subject ill has several"):
        prepare([twice], VolumeProcessor(("flair",)), tmp_path / "other", recipe={}, raters=RaterRule())


def test_a_case():
    case = make_case(3, 1, num_raters=6)
    assert (case.name, case.patient) == ("patient_0003_1", "patient_0003")
    assert case.image.shape == (64, 64) and case.image.dtype == np.uint8 and case.image.std() > 5
    assert case.masks.shape == (6, 64, 64) and set(np.unique(case.masks)) <= {0, 1}
    same = make_case(3, 1, num_raters=2)
    np.testing.assert_array_equal(same.image, case.image)
    np.testing.assert_array_equal(same.masks, case.masks[:2])
    for other in (make_case(3, 0), make_case(4, 1), make_case(3, 1, seed=1)):
        assert not np.array_equal(other.image, case.image)
    for arguments, message in (
        ({"patient": -1}, "`patient` must be an integer of at least 0, got -1"),
        ({"patient": 0, "num_raters": 0}, "`num_raters` must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_case(**arguments)


def test_frequencies_of_the_phantom_are_those_it_states():
    found = {"overlooked": [], "with_halo": [], "with_satellite": []}
    for patient in range(24):
        case = make_case(patient, num_raters=100)
        nodule = case.parameters
        empty = ~case.masks.any((1, 2))
        found["overlooked"].append((empty.mean(), nodule["overlooked"]))

        def marked(distance, angle, masks=case.masks[~empty], nodule=nodule):
            """Share of the raters who see the nodule that mark this place."""
            row = round(nodule["row"] + distance * np.sin(angle))
            column = round(nodule["column"] + distance * np.cos(angle))
            return masks[:, row, column].mean() if 0 <= row < 64 and 0 <= column < 64 else None

        if nodule["halo"] > 4:
            angle = nodule["halo_angle"]
            waves = sum(a * np.cos(k * (angle - phase)) for k, (a, phase) in enumerate(nodule["harmonics"], 2))
            middle = nodule["radius"] * (1 + waves) + nodule["halo"] / 2
            found["with_halo"].append((marked(middle, angle), nodule["with_halo"]))
        if nodule["satellite"] and not nodule["halo"]:  # which could lie over it
            centre = marked(nodule["satellite_distance"], nodule["satellite_angle"])
            found["with_satellite"].append((centre, nodule["with_satellite"]))
    for name, pairs in found.items():
        measured, stated = np.array([pair for pair in pairs if pair[0] is not None]).T
        assert len(measured) >= 3, name
        np.testing.assert_allclose(measured, stated, rtol=0, atol=0.2, err_msg=name)
        np.testing.assert_allclose(measured.mean(), stated.mean(), rtol=0, atol=0.06, err_msg=name)
    assert np.ptp([stated for _, stated in found["overlooked"]]) > 0.3


def test_the_nodule_can_be_seen():
    for patient in range(12):
        case = make_case(patient, num_raters=20)
        inside = case.masks.mean(0) > 0.5 * (case.masks.any((1, 2)).mean())
        if case.masks.any():
            contrast = case.image[inside].mean() - case.image[~case.masks.any(0)].mean()
            assert contrast > 255 * 0.5 * case.parameters["contrast"]


def test_a_phantom_with_several_raters(tmp_path, monkeypatch):
    monkeypatch.setitem(RATER_SETS, "phantom-raters", (10, 2))
    write_rater_phantom(tmp_path / "raw", progress=False)
    case = make_case(7, 1)
    folder = tmp_path / "raw" / "patient_0007_1"
    assert json.loads((folder / "phantom.json").read_text())["overlooked"] == case.parameters["overlooked"]
    for number, mask in enumerate(case.masks):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(folder / f"label{number}.png")), mask * 255)
    with open(tmp_path / "raw" / "patients.csv") as file:
        assert len(list(csv.DictReader(file))) == 20
    with pytest.raises(FileExistsError, match="exists: choose another one"):
        write_rater_phantom(tmp_path / "raw")
    with pytest.raises(ValueError, match="`name` must be one of phantom-raters, got 'raters'"):
        write_rater_phantom(tmp_path / "other", "raters")

    assert prepare_phantom("phantom-raters", tmp_path / "set", progress=False) == {}
    splits = {name: load_prepared(tmp_path / "set", name) for name in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 2, "test": 2}
    groups = [{info["group"] for info in split.subject_info.values()} for split in splits.values()]
    assert sum(map(len, groups)) == 10 == len(set.union(*groups))  # both pictures of a patient are in one split
    (split,) = (split for split in splits.values() if case.name in split.subjects)
    found = split.read_subject(case.name)
    np.testing.assert_allclose(found["image"][0, 0] * 255, case.image, atol=1e-3)
    np.testing.assert_array_equal(found["mask"][0], case.masks)
    assert is_phantom(split.recipe) and split.recipe["source"] == "phantom-raters of anodiff, seed 11"
    made = load_prepared("phantom-raters", "test")
    np.testing.assert_array_equal(made[:]["mask"], splits["test"][:]["mask"])


@pytest.mark.parametrize(
    ("source", "phantom"),
    [
        ("phantom-mini of anodiff, anatomy mni152, seed 11", True),
        # As recipes said it while module paths stood in them.
        ("phantom-mini of anodiff.data.phantom, anatomy mni152, seed 11", True),
        ("phantom-raters of anodiff.data.raters, seed 11", True),
        ("phantom-raters of anodiff.data.phantoms.nodules, seed 11", True),
        ("ISLES 2022, prepared by anodiff", False),
        ("compared with phantom-mini of anodiff", False),
        ("phantom-mini of anodiffusion", False),
    ],
)
def test_phantoms_are_known_by_their_source(source, phantom):
    assert is_phantom({"source": source}) is phantom
    assert not is_phantom({})
