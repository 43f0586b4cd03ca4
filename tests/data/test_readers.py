import csv
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from anodiff.data.prepare import prepare
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.files import read_file_patterns
from anodiff.data.readers.subjects import (
    Subject,
    read_annotated_folders,
    read_image_folders,
    read_split_tables,
    read_volume_folders,
)
from anodiff.data.shards import piece_name
from anodiff.volumes.processor import VolumeProcessor
from anodiff.volumes.volume import read_volume

from ..dicom_series import make_slices
from ..dicom_series import write as write_slices


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def volume_tree(root):
    for name in ("c", "a", "b[1]"):
        touch(
            root, f"{name}/{name}_t1.nii.gz", f"{name}/anat/{name}_flair.nii", f"{name}/les1.nii", f"{name}/les2.nii"
        )
    touch(root, "notes.txt", "empty/readme.txt", ".hidden/x_t1.nii.gz")
    write_csv(root / "splits" / "train.csv", [["age", "subject"], [3, "a"], [4, "c"]])
    write_csv(root / "splits" / "val.csv", [["patient"], ["b[1]"]])
    return {"modalities": {"t1": "{subject}_t1.nii.gz", "flair": "anat/*_flair.nii*"}}


def test_volume_folders(tmp_path):
    options = volume_tree(tmp_path)
    subjects = read_volume_folders(tmp_path, **options, masks=["les1.nii", "les2.nii"], brain="*_t1*", splits="splits")
    assert [subject.name for subject in subjects] == ["a", "b[1]", "c"]
    assert [subject.split for subject in subjects] == ["train", "validation", "train"]
    assert subjects[1] == Subject(
        "b[1]",
        {"t1": tmp_path / "b[1]" / "b[1]_t1.nii.gz", "flair": tmp_path / "b[1]" / "anat" / "b[1]_flair.nii"},
        masks=(tmp_path / "b[1]" / "les1.nii", tmp_path / "b[1]" / "les2.nii"),
        brain=tmp_path / "b[1]" / "b[1]_t1.nii.gz",
        split="validation",
        group="b[1]",
    )
    assert read_volume_folders(str(tmp_path), **options)[0].split is None


def test_volume_folders_name_what_is_missing_or_ambiguous(tmp_path):
    options = volume_tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"Subject a: the pattern 'les\*' must match one file, it matches les1.nii, les2"
    ):
        read_volume_folders(tmp_path, **options, masks=["les*"])
    (tmp_path / "c" / "c_t1.nii.gz").unlink()
    missing = read_volume_folders(tmp_path, **options)[-1].volume["t1"]
    assert missing.reason.startswith(
        "Subject c: the pattern '{subject}_t1.nii.gz' must match one file, it matches none; "
    )
    with pytest.raises(ValueError, match="holds anat, les1"):
        missing.read()
    with pytest.raises(ValueError, match="No folder in .* t2.nii; there are .hidden, a, b"):
        read_volume_folders(tmp_path, {"t2": "t2.nii"})
    with pytest.raises(NotADirectoryError, match="nowhere"):
        read_volume_folders(tmp_path / "nowhere", {"t2": "t2.nii"})
    with pytest.raises(ValueError, match="`masks` must be a list, got 'lesion.nii'"):
        read_volume_folders(tmp_path, {"t2": "t2.nii"}, masks="lesion.nii")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("test.csv", [["subject"], ["a"]], "Subject a is in two splits: test and train"),
        ("test.csv", [["subject"], ["zoe"]], "test.csv lists the subject 'zoe'"),
        ("fold0.csv", [["subject"]], "must be named after a split: train, validation, test, val"),
        ("val.csv", [["subject"]], r"No file in .* lists b\[1\] \(1 of 3 subjects\)"),
    ],
)
def test_wrong_splits(tmp_path, name, rows, message):
    options = volume_tree(tmp_path)
    write_csv(tmp_path / "splits" / name, rows)
    with pytest.raises(ValueError, match=message):
        read_volume_folders(tmp_path, **options, splits="splits")


def test_image_folders_with_splits_and_groups(tmp_path):
    touch(tmp_path, "train/healthy/x.png", "train/healthy/y.JPG", "val/healthy/x.png", "val/tumour/x.jpeg")
    touch(tmp_path, "train/healthy/Thumbs.db", "manifest.csv")
    files = ["train/healthy/x.png", "train/healthy/y.JPG", "val/healthy/x.png", "val/tumour/x.jpeg", "test/more.png"]
    write_csv(tmp_path / "manifest.csv", [["file", "g"], *([file, f"g{i // 2}"] for i, file in enumerate(files))])
    subjects = read_image_folders(tmp_path, ["healthy"], groups="manifest.csv", group_column="g")
    assert [(s.name, s.split, s.label, s.group) for s in subjects] == [
        ("train/healthy/x", "train", 0, "g0"),
        ("train/healthy/y", "train", 0, "g0"),
        ("val/healthy/x", "validation", 0, "g1"),
        ("val/tumour/x", "validation", 1, "g1"),
    ]
    assert subjects[1].volume == tmp_path / "train/healthy/y.JPG"
    with pytest.raises(ValueError, match="has no column group; it has file, g"):
        read_image_folders(tmp_path, ["healthy"], groups="manifest.csv")
    touch(tmp_path, "train/healthy/z.png")
    with pytest.raises(ValueError, match="does not list train/healthy/z.png"):
        read_image_folders(tmp_path, ["healthy"], groups="manifest.csv", group_column="g")


def test_image_folders_without_splits(tmp_path):
    touch(tmp_path, "no/1.png", "yes/1.png")
    assert [(s.name, s.split, s.label, s.group) for s in read_image_folders(tmp_path, ["no"])] == [
        ("no/1", None, 0, "no/1"),
        ("yes/1", None, 1, "yes/1"),
    ]
    with pytest.raises(ValueError, match="`healthy` names normal; the classes in .* are no, yes"):
        read_image_folders(tmp_path, ["normal"])
    touch(tmp_path, "no/1.jpg")
    with pytest.raises(ValueError, match="Two pictures have the name no/1"):
        read_image_folders(tmp_path, ["no"])
    touch(tmp_path, "train/no/1.png")
    with pytest.raises(ValueError, match="mixes splits with other folders: no, yes"):
        read_image_folders(tmp_path, ["no"])


IMAGE = {"image": "image_*"}


def test_annotated_folders_in_the_layout_of_cimd(tmp_path):
    touch(tmp_path, *(f"training/3/{file}" for file in ("image_4.jpg", "label0_.jpg", "label1_.jpg", "label2_.jpg")))
    touch(tmp_path, *(f"testing/deep/er/12/{file}" for file in ("image_13.jpg", "label3_.jpg", "label1_.jpg")))
    touch(tmp_path, "testing/5/image_6.jpg", "testing/6/label0_.jpg", "training/.3/image_1.jpg", "notes.txt")
    subjects = read_annotated_folders(tmp_path, IMAGE, ["label*"])
    assert [subject.name for subject in subjects] == ["testing/5", "testing/deep/er/12", "training/3"]
    assert [subject.split for subject in subjects] == ["test", "test", "train"]
    assert [[path.name for path in subject.masks] for subject in subjects] == [
        [],  # nobody looked at it
        ["label1_.jpg", "label3_.jpg"],
        ["label0_.jpg", "label1_.jpg", "label2_.jpg"],
    ]
    assert subjects[2] == Subject(
        "training/3",
        {"image": tmp_path / "training/3/image_4.jpg"},
        masks=tuple(tmp_path / f"training/3/label{k}_.jpg" for k in range(3)),
        split="train",
        mask_max=255.0,
        group="training/3",
        mask_above=127.5,
    )
    everything = read_annotated_folders(tmp_path, IMAGE, ["label0*", "label?_*"], label_threshold=0.0)
    assert [len(subject.masks) for subject in everything] == [0, 2, 3] and everything[0].mask_above == 0


def test_annotated_folders_of_patients(tmp_path):
    touch(tmp_path, *(f"{split}/{k}/{file}" for split in ("train", "test") for k in "12" for file in ("image_", "l0")))
    rows = [["case", "patient"], ["train/1", "a"], ["train/2", "b"], ["test/1", "a"], ["test/2", "c"]]
    write_csv(tmp_path / "patients.csv", rows)
    options = {"annotations": ["l*"], "groups": "patients.csv", "group_column": "patient"}
    subjects = read_annotated_folders(tmp_path, IMAGE, split_folders=False, **options)
    assert [(s.name, s.split, s.group) for s in subjects] == [
        ("test/1", None, "a"),
        ("test/2", None, "c"),
        ("train/1", None, "a"),
        ("train/2", None, "b"),
    ]
    assert [s.split for s in read_annotated_folders(tmp_path, IMAGE, **options)] == ["test", "test", "train", "train"]
    with pytest.raises(ValueError, match="has no column group; it has case, patient"):
        read_annotated_folders(tmp_path, IMAGE, ["l*"], groups="patients.csv")
    write_csv(tmp_path / "patients.csv", rows[:-1])
    with pytest.raises(ValueError, match="does not list test/2 in its column `case`"):
        read_annotated_folders(tmp_path, IMAGE, **options)


def test_wrong_annotated_folders(tmp_path):
    touch(tmp_path, "a/image_1.png", "a/l0.png", "b/image_1.png")
    with pytest.raises(ValueError, match=r"No folder in .* holds a file photo\*; there are a, b"):
        read_annotated_folders(tmp_path, {"image": "photo*"}, ["l*"])
    with pytest.raises(ValueError, match=r"`annotations`: no case in .* holds a file label\*"):
        read_annotated_folders(tmp_path, IMAGE, ["label*"])
    with pytest.raises(ValueError, match=r"`annotations` must be a list, got 'l\*'"):
        read_annotated_folders(tmp_path, IMAGE, "l*")
    with pytest.raises(ValueError, match="`modalities` must name at least one modality"):
        read_annotated_folders(tmp_path, {}, ["l*"])
    for name, value in (("label_threshold", 1.0), ("label_threshold", -0.1), ("label_max", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            read_annotated_folders(tmp_path, IMAGE, ["l*"], **{name: value})
    touch(tmp_path, "deep/b/image_1.png", "deep/b/image_2.png", "deep/b/._image_3.png")
    _, _, ambiguous = read_annotated_folders(tmp_path, IMAGE, ["l*"])  # the others are read
    message = "the pattern 'image_\\*' must match one file, it matches image_1.png, image_2.png."
    with pytest.raises(ValueError, match=f"Subject deep/b: {message}"):
        ambiguous.volume["image"].read()
    with pytest.raises(ValueError, match=f"Subject b: {message}"):
        read_annotated_folders(tmp_path / "deep", IMAGE, ["l*"])
    touch(tmp_path, "train/1/image_1.png")
    with pytest.raises(ValueError, match="mixes splits with other folders: a, b, deep"):
        read_annotated_folders(tmp_path, IMAGE, ["l*"])


def save_picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def test_annotations_survive_preparation(tmp_path, monkeypatch):
    """Several channels, pictures of any size, any number of annotations, JPEG ringing, an empty annotation."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    boxes = {
        "one": [(4, 12, 3, 9)],
        "two": [(4, 12, 3, 9), (0, 0, 0, 0)],
        "three": [(2, 8, 2, 8), (2, 9, 2, 8), (8, 9, 4, 9)],
    }
    for (name, marked), factor in zip(boxes.items(), (1, 2, 3), strict=True):
        folder, shape = tmp_path / "raw" / name, (16 * factor, 12 * factor)
        for channel in "ab":
            save_picture(folder / f"image_{channel}.png", rng.integers(0, 255, shape).astype(np.uint8))
        for number, box in enumerate(marked):
            mask = np.zeros(shape, np.uint8)
            top, bottom, left, right = (factor * edge for edge in box)
            mask[top:bottom, left:right] = 255
            save_picture(folder / f"label{number}.jpg", mask)
    channels = {"b": "image_b*", "a": "image_a*"}
    processor = VolumeProcessor(("b", "a"), size=(16, 12), intensity="given", value_range=(0, 1), brain_mask="none")
    areas = {}
    for threshold in (0.5, 0.0):
        subjects = read_annotated_folders(tmp_path / "raw", channels, ["label*"], label_threshold=threshold)
        subjects = [Subject(**{**vars(subject), "split": "train"}) for subject in subjects]
        assert prepare(subjects, processor, tmp_path / f"set{threshold}", recipe={}, progress=False) == {}
        split = load_prepared(tmp_path / f"set{threshold}", "train")
        assert split[:]["image"].shape == (3, 2, 16, 12) and split[:]["mask"].shape == (3, 3, 16, 12)
        areas[threshold] = split[:]["mask"].sum()
        if threshold:
            for name, marked in boxes.items():
                found = split.read_subject(name)["mask"][0]
                assert len(found) == len(marked) and split.subject_info[name]["annotations"] == len(marked)
                for mask, (top, bottom, left, right) in zip(found, marked, strict=True):
                    expected = np.zeros((16, 12), np.uint8)
                    expected[top:bottom, left:right] = 1
                    np.testing.assert_array_equal(mask, expected)
            with PIL.Image.open(tmp_path / "raw/one/image_b.png") as picture:
                np.testing.assert_allclose(split.read_subject("one")["image"][0, 0] * 255, picture, atol=1e-3)
    assert areas[0.0] > 1.2 * areas[0.5]

    # Files of 0 and 1, or of 0 and 4, would count as empty.
    for highest in (1, 4):
        save_picture(tmp_path / f"of{highest}/c/image_a.png", rng.integers(0, 255, (16, 12)).astype(np.uint8))
        save_picture(tmp_path / f"of{highest}/c/label.png", highest * np.eye(16, 12, dtype=np.uint8))
    processor = VolumeProcessor(("a",), size=(16, 12), intensity="given", brain_mask="none")
    for highest, label_max in ((1, 255), (4, 255), (1, 1), (4, 4)):
        raw = tmp_path / f"of{highest}"
        (subject,) = read_annotated_folders(raw, {"a": "image*"}, ["label*"], label_max=label_max)
        subject = Subject(**{**vars(subject), "split": "train"})
        if label_max == 255:
            message = f"holds values up to {highest}, and those above 127.5 are marked: set `label_max`"
            with pytest.raises(ValueError, match=message):
                prepare([subject], processor, tmp_path / "wrong", recipe={}, progress=False)
        else:
            prepare([subject], processor, tmp_path / f"set-of-{highest}", recipe={}, progress=False)
            assert load_prepared(tmp_path / f"set-of-{highest}", "train")[0]["mask"].sum() == 12


@pytest.mark.parametrize(
    ("place", "reader", "options"),
    [
        ("{name}", read_volume_folders, {"modalities": {"flair": "."}}),
        ("{name}/FLAIR", read_volume_folders, {"modalities": {"flair": "FLAIR"}}),
        ("{name}/FLAIR", read_file_patterns, {"modalities": {"flair": "{subject}/FLAIR"}}),
    ],
)
def test_a_series_of_dicom_is_prepared_and_a_slice_that_changes_is_read_again(tmp_path, place, reader, options):
    series = {"p1": make_slices("oblique", (6, 8, 3), seed=1), "p2": make_slices("sagittal", (6, 8, 3), seed=2)}
    for name, slices in series.items():
        write_slices(tmp_path / "raw" / place.format(name=name), slices)
    write_slices(tmp_path / "raw" / place.format(name="p3"), make_slices("axial", (6, 8, 3))[::2])
    subjects = reader(tmp_path / "raw", **options)
    subjects = [Subject(**{**vars(subject), "split": "train"}) for subject in subjects]
    processor = VolumeProcessor(("flair",), size=(8, 8), brain_mask="none", intensity="given", input_range=(0, 9000))
    assert prepare(subjects, processor, tmp_path / "set", recipe={}, progress=False) == {}
    split = load_prepared(tmp_path / "set", "train")
    assert sorted(split.subject_info) == ["p1", "p2", "p3"]
    names = [piece_name([], subject, True) for subject in subjects]
    changed = tmp_path / "raw" / place.format(name="p2") / "IM0001"
    os.utime(changed, (0, 0))
    again = [piece_name([], subject, True) for subject in subjects]
    assert [one == other for one, other in zip(names, again, strict=True)] == [True, False, True]
    volume = read_volume(subjects[1].volume)
    np.testing.assert_allclose(split.subject_info["p2"]["affine"], volume.affine.ravel(), atol=1e-5)


COLUMNS = ["", "img_name", "age", "label", "img_path", "mask_path", "seg_path"]


def healthy_row(name, label="0"):
    return [
        0,
        f"{name}_t1.nii.gz",
        30.5,
        label,
        f"/Train/ixi/t1/{name}_t1.nii.gz",
        f"/Train/ixi/mask/{name}_mask.nii.gz",
        "",
    ]


def ill_row(name):
    files = [f"/Test/Brats21/{kind}/{name}_{kind}.nii.gz" for kind in ("t1", "mask", "seg")]
    return [0, f"{name}_t1.nii.gz", "", 1, *files]


def split_tables(root):
    """`t1` and `seg` in the root's name, which broke the authors' T2 mode and their smoothing."""
    tables = {
        "IXI_train_fold0": map(healthy_row, ["IXI1-HH-1", "IXI2-HH-2", "IXI1-HH-1", "IXI3-HH-3"]),
        "IXI_val_fold0": map(healthy_row, ["IXI4-HH-4"]),
        "IXI_test": map(healthy_row, ["IXI3-HH-3", "IXI5-HH-5"]),
        "Brats21_val": [ill_row(f"BraTS_{number}") for number in range(4)],
    }
    for name, rows in tables.items():
        write_csv(root / "splits" / f"{name}.csv", [COLUMNS, *rows])
    write_csv(root / "splits" / "avail_t2.csv", [["", "0"], *([0, f"IXI{n}-HH-{n}_t2.nii.gz"] for n in (1, 3, 5))])
    return root


IXI = {"train": ["IXI_train_fold0"], "validation": ["IXI_val_fold0.csv"], "test": ["IXI_test"]}


@pytest.mark.parametrize("level", ["", "Data"])
def test_split_tables(tmp_path, level):
    root = split_tables(tmp_path / "raw_t1" / "seg_t1" / level)
    with pytest.warns(UserWarning) as warned:
        subjects = read_split_tables(tmp_path / "raw_t1" / "seg_t1", "t1", IXI)
    assert [(subject.name, subject.split) for subject in subjects] == [
        ("IXI1-HH-1", "train"),
        ("IXI2-HH-2", "train"),
        ("IXI3-HH-3", "test"),
        ("IXI4-HH-4", "validation"),
        ("IXI5-HH-5", "test"),
    ]
    assert [str(warning.message) for warning in warned] == [
        "1 scans are listed more than once, and taken once: IXI1-HH-1.",
        "1 scans are in several splits, and taken for the last of train, validation and test only: IXI3-HH-3.",
    ]
    assert subjects[0] == Subject(
        "IXI1-HH-1",
        {"t1": root / "Train" / "ixi" / "t1" / "IXI1-HH-1_t1.nii.gz"},
        brain=root / "Train" / "ixi" / "mask" / "IXI1-HH-1_mask.nii.gz",
        label=0,
        split="train",
    )


def test_split_tables_in_another_modality(tmp_path):
    root = split_tables(tmp_path / "raw_t1" / "t1")
    with pytest.warns(UserWarning):
        subjects = read_split_tables(root, "t2", {**IXI, "validation": ["Brats21_val"]}, available="avail_t2")
    # Those of IXI without a T2 are left out; other tables are not asked.
    assert [subject.name for subject in subjects] == [
        *["BraTS_0", "BraTS_1", "BraTS_2", "BraTS_3"],
        *["IXI1-HH-1", "IXI3-HH-3", "IXI5-HH-5"],
    ]
    assert subjects[-1].volume == {"t2": root / "Train" / "ixi" / "t2" / "IXI5-HH-5_t2.nii.gz"}
    assert subjects[-1].brain == root / "Train" / "ixi" / "mask" / "IXI5-HH-5_mask.nii.gz"
    brats = subjects[0]
    assert brats.volume == {"t2": root / "Test" / "Brats21" / "t2" / "BraTS_0_t2.nii.gz"}
    assert brats.masks == (root / "Test" / "Brats21" / "seg" / "BraTS_0_seg.nii.gz",) and brats.label == 1


def test_rows_of_split_tables(tmp_path, recwarn):
    split_tables(tmp_path)
    subjects = read_split_tables(tmp_path, "t1", {"train": ["Brats21_val[3:]"], "test": ["Brats21_val.csv[:3]"]})
    assert [subject.split for subject in subjects] == ["test", "test", "test", "train"] and not recwarn.list


def test_split_tables_are_prepared(tmp_path, monkeypatch):
    import nibabel as nib

    root = split_tables(tmp_path / "raw_t1")
    rng = np.random.default_rng(0)
    subjects = read_split_tables(root, "t2", {"train": ["IXI_val_fold0"], "test": ["Brats21_val[:1]"]})
    for subject in subjects:
        mask = np.zeros((14, 16, 10), np.uint8)
        mask[2:12, 3:14, 1:9] = 1
        scan = mask * rng.uniform(50, 150, mask.shape)
        lesion = 2 * mask * (np.arange(10) < 5).astype(np.uint8)
        for path, array in (
            (subject.volume["t2"], scan),
            (subject.brain, mask),
            *((p, lesion) for p in subject.masks),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    processor = VolumeProcessor(
        ("t2",), crop=(16, 16, 8), size=(8, 8), resize="torchio", intensity="brain_percentiles", brain_mask="given"
    )
    assert prepare(subjects, processor, tmp_path / "out", recipe={}, root=root, progress=False) == {}
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    train, test = load_prepared(tmp_path / "out", "train"), load_prepared(tmp_path / "out", "test")
    assert train.labels.tolist() == [0, 0, 0, 0] and test.labels.tolist() == [1, 1, 0, 0]
    rows = test.read_rows([0, 1, 2, 3], ("image", "mask"))
    assert rows["image"].shape == (4, 1, 8, 8) and set(np.unique(rows["mask"])) == {0, 1}


@pytest.mark.parametrize(
    ("splits", "change", "error", "message"),
    [
        ({"training": ["IXI_test"]}, None, ValueError, "`splits` must name train, validation, test, got training"),
        ({}, None, ValueError, "`splits` must name train, validation, test, got none"),
        ({"test": "IXI_test"}, None, ValueError, "`splits` must hold lists of tables"),
        (
            {"test": ["IXI_tests"]},
            None,
            FileNotFoundError,
            "There is no table .*IXI_tests.csv: Brats21_val.csv, IXI_test",
        ),
        ({"test": ["Brats21_val[9:]"]}, None, ValueError, "list no subject"),
        (
            {"test": ["IXI_test"]},
            [COLUMNS[:4]],
            ValueError,
            "has no column img_path, mask_path; it has , img_name, age",
        ),
        (
            {"test": ["IXI_test"]},
            [COLUMNS, healthy_row("a", "2")],
            ValueError,
            "IXI_test must have labels 0 or 1, got '2' of a_t1",
        ),
    ],
)
def test_wrong_split_tables(tmp_path, splits, change, error, message):
    split_tables(tmp_path)
    if change:
        write_csv(tmp_path / "splits" / "IXI_test.csv", change)
    with pytest.raises(error, match=message):
        read_split_tables(tmp_path, "t1", splits)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        (tmp_path / "empty").mkdir()
        read_split_tables(tmp_path / "empty", "t1", IXI)


def test_subjects_are_checked():
    with pytest.raises(ValueError, match="`label` must be 0, 1 or None, got 2"):
        Subject("a", Path("a.png"), label=2)
    with pytest.raises(ValueError, match="`split` must be one of train, validation, test, got 'val'"):
        Subject("a", Path("a.png"), split="val")


@pytest.fixture
def test_data():
    if "ANODIFF_TEST_DATA" not in os.environ:
        pytest.skip("ANODIFF_TEST_DATA is not set: no real data")
    return Path(os.environ["ANODIFF_TEST_DATA"])


def test_real_volumes(test_data):
    root = test_data / "mri" / "tcga_lgg_flair"
    subjects = read_volume_folders(root, {"flair": "flair.nii.gz"}, masks=["lesion.nii.gz"], brain="brain.nii.gz")
    assert len(subjects) == 33
    assert all(subject.masks and subject.brain for subject in subjects)
    # Four of them have a T1; the others are to be listed, not to stop the reading.
    both = read_volume_folders(root, {"flair": "flair.nii.gz", "t1": "t1.nii.gz"})
    missing = [subject.volume["t1"] for subject in both if not isinstance(subject.volume["t1"], Path)]
    assert len(both) == 33 and len(missing) == 29 and all("'t1.nii.gz'" in file.reason for file in missing)


def test_real_pictures(test_data):
    subjects = read_image_folders(test_data / "brain_tumor_mri", ["healthy"], "manifest.csv", "slice_group")
    labels = np.array([[subject.split == "train", subject.label] for subject in subjects], dtype=int)
    assert len(subjects) == 1183
    assert labels.sum(axis=0).tolist() == [943, 120]
    assert {s.group for s in subjects if s.split == "train"}.isdisjoint(
        s.group for s in subjects if s.split != "train"
    )
    assert PIL.Image.open(subjects[0].volume).size == (128, 128)


def test_real_annotations(test_data):
    subjects = read_annotated_folders(test_data / "lidc_sample", IMAGE, ["label*"])
    assert [subject.split for subject in subjects].count("train") == 13
    assert len(subjects) == 18 and all(len(subject.masks) == 4 for subject in subjects)
