import csv
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from anodiff.data.readers import Subject, read_image_folders, read_volume_folders


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
    with pytest.raises(
        ValueError, match="Subject c: the pattern '{subject}_t1.nii.gz' .* none; the folder holds anat, les1"
    ):
        read_volume_folders(tmp_path, **options)
    with pytest.raises(ValueError, match="No folder in .* t2.nii; there are .hidden, a, b"):
        read_volume_folders(tmp_path, {"t2": "t2.nii"})
    with pytest.raises(NotADirectoryError, match="nowhere"):
        read_volume_folders(tmp_path / "nowhere", {"t2": "t2.nii"})


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("test.csv", [["subject"], ["a"]], "Subject a is in two splits: test and train"),
        ("test.csv", [["subject"], ["zoe"]], "test.csv lists the subject 'zoe'"),
        ("fold0.csv", [["subject"]], "must be named after a split: train, validation, val, test"),
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
    with pytest.raises(ValueError, match="t1.nii.gz"):
        read_volume_folders(root, {"flair": "flair.nii.gz", "t1": "t1.nii.gz"})


def test_real_pictures(test_data):
    subjects = read_image_folders(test_data / "brain_tumor_mri", ["healthy"], "manifest.csv", "slice_group")
    labels = np.array([[subject.split == "train", subject.label] for subject in subjects], dtype=int)
    assert len(subjects) == 1183
    assert labels.sum(axis=0).tolist() == [943, 120]
    assert {s.group for s in subjects if s.split == "train"}.isdisjoint(
        s.group for s in subjects if s.split != "train"
    )
    assert PIL.Image.open(subjects[0].volume).size == (128, 128)
