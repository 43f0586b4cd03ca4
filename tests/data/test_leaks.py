import csv

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from anodiff.data.leaks import find_leaks, hash_pictures, write_leaks
from anodiff.data.prepare import prepare
from anodiff.data.readers.subjects import Subject
from anodiff.volumes.processor import VolumeProcessor


def brain_of(seed, shape=(48, 56, 6)):
    """A smooth random texture in an ellipse, 0 outside: different people share the outline and nothing else."""
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (4, 4, 1))
    x, y = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    inside = (x**2 + y**2 < 0.7)[..., None]
    return (np.clip(1 + texture / texture.std() / 4, 0.1, None) * inside).astype(np.float32)


def subject(root, name, array, split, **options):
    (root / name).mkdir(parents=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), root / name / "a.nii.gz")
    return Subject(name, {"a": root / name / "a.nii.gz"}, split=split, **options)


def prepared(out, subjects, size=(48, 48)):
    prepare(subjects, VolumeProcessor(("a",), size=size), out, recipe={}, progress=False)
    return out


def test_copies_are_found_and_other_people_are_not(tmp_path):
    raw, copied = tmp_path / "raw", brain_of(0)
    # As copies come: moved, brighter, a little noise and another size; only slices 2 to 4.
    copy = brain_of(9)
    moved = np.roll(copied, (3, -2), (0, 1)) * 1.7
    moved += np.where(moved > 0, np.random.default_rng(5).normal(0, 0.02, moved.shape), 0)
    copy[..., 2:5] = moved[..., 2:5]
    subjects = [subject(raw, f"train{index}", brain_of(index), "train") for index in range(4)]
    subjects += [subject(raw, f"test{index}", brain_of(20 + index), "test") for index in range(4)]
    clean = prepared(tmp_path / "clean", subjects)
    assert find_leaks([clean]) == []
    leaky = prepared(tmp_path / "leaky", [*subjects, subject(raw, "copy", copy.astype(np.float32), "test")])
    (leak,) = find_leaks([leaky])
    assert (leak.kind, leak.split_a, leak.subject_a, leak.split_b, leak.subject_b) == (
        "slices", "train", "train0", "test", "copy",
    )  # fmt: skip
    assert leak.slices == 3 and leak.slice_a == leak.slice_b in (2, 3, 4)
    assert leak.correlation > 0.97 and leak.distance <= 10
    assert "3 slices of train0 in train" in str(leak)
    # Within one split copies are no leak.
    inside = [*subjects, subject(raw, "again", copied, "train")]
    assert find_leaks([prepared(tmp_path / "inside", inside)]) == []


def test_groups_and_two_data_sets(tmp_path):
    # A reader that names one patient twice, in two data sets: training on one and testing on the other.
    train = prepared(
        tmp_path / "one", [subject(tmp_path / "a", f"s{i}", brain_of(i), "train", group=f"p{i}") for i in range(3)]
    )
    others = [subject(tmp_path / "b", f"t{i}", brain_of(10 + i), "test", group=f"q{i}") for i in range(2)]
    others.append(subject(tmp_path / "b", "scan2", brain_of(30), "test", group="p1"))
    others.append(subject(tmp_path / "b", "scan3", brain_of(2), "test", group="q9"))
    test = prepared(tmp_path / "two", others, size=(32, 32))
    leaks = find_leaks([train, test])
    assert [(leak.kind, leak.subject_a, leak.subject_b) for leak in leaks] == [
        ("group", "p1", "p1"),
        ("slices", "s2", "scan3"),
    ]
    assert leaks[1].slices == 6
    assert str(leaks[0]) == f"group p1 is in train of {train} and in test of {test}"
    write_leaks(leaks, tmp_path / "leaks.csv")
    with open(tmp_path / "leaks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["group", "slices"] and rows[1]["slices"] == "6"
    with pytest.raises(
        ValueError, match="There is nothing to compare: two different splits are needed, .* only train of"
    ):
        find_leaks([train])
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        find_leaks([tmp_path / "nothing"])


def test_hashes():
    pictures = np.stack([brain_of(seed, (32, 32, 1))[..., 0] for seed in range(12)])
    hashes = hash_pictures(pictures)
    assert hashes.shape == (12, 64) and hashes.dtype == bool
    np.testing.assert_array_equal(hash_pictures(pictures * 3 + 1)[:, 1:], hashes[:, 1:])
    apart = (hashes[:, None] != hashes).sum(2)[np.triu_indices(12, 1)]
    assert np.median(apart) > 20 and (apart <= 10).mean() < 0.05
