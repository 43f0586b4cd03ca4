import os
import pickle
import random
import shutil
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.utils.data
import yaml

from anodiff.data import shards
from anodiff.data.layout import COLUMNS, SPLITS
from anodiff.data.phantoms.brains import PHANTOM_SETS, PhantomSubject
from anodiff.data.phantoms.sets import cached_phantom, prepare_phantom
from anodiff.data.prepare import prepare, prepare_recipe, read_recipe
from anodiff.data.prepared import PreparedSplit, load_prepared
from anodiff.data.readers.subjects import Subject, read_volume_folders
from anodiff.data.rules import SliceRule, SplitRule
from anodiff.volumes.processor import VolumeProcessor


SHAPE = (12, 10, 7)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
    return path


def make_subject(root, name, split="train", lesion_slices=(), width=3, masks=1, label=None, seed=0, shape=SHAPE):
    """Brain everywhere but in the first slice; a lesion of `width` x `width` voxels in `lesion_slices`."""
    rng = np.random.default_rng([seed, *name.encode()])
    brain = np.ones(shape, np.uint8)
    brain[..., 0] = 0
    mask = np.zeros(shape, np.uint8)
    mask[5 : 5 + width, 4 : 4 + width, list(lesion_slices)] = 3
    volume = {
        key: save(root / name / f"{key}.nii.gz", rng.uniform(1, 9, shape).astype(np.float32)) for key in ("b", "a")
    }
    return Subject(
        name,
        volume,
        masks=tuple(save(root / name / f"lesion{k}.nii.gz", mask * (k == 0)) for k in range(masks)),
        brain=save(root / name / "brain.nii.gz", brain),
        split=split,
        label=label,
    )


def processor(size=(8, 8), **settings):
    return VolumeProcessor(modalities=("a", "b"), size=size, brain_mask="given", **settings)


def run(subjects, out, **options):
    options = {"recipe": {"license": "mit"}, "progress": False} | options
    return prepare(subjects, options.pop("processor", processor()), out, **options)


def make_set(root, out, **options):
    subjects = [
        make_subject(root, "s1"),
        make_subject(root, "s0", lesion_slices=[2, 3]),
        make_subject(root, "v", split="validation", lesion_slices=[5]),
    ]
    assert run(subjects, out, **options) == {}
    return subjects


def test_rows_are_what_the_processor_makes(tmp_path):
    subjects = make_set(tmp_path / "raw", tmp_path / "set", shard_rows=5)
    assert [file.name for file in sorted((tmp_path / "set" / "data").iterdir())] == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "validation-00000-of-00002.parquet",
        "validation-00001-of-00002.parquet",
    ]
    split = load_prepared(tmp_path / "set", "train")
    assert (len(split), split.subjects, split.modalities) == (12, ["s0", "s1"], ("a", "b"))
    assert split.subject_rows("s1") == range(6, 12)
    for subject in (subjects[1], subjects[0]):
        processed = processor().preprocess(subject.volume, subject.brain)
        found = split.read_subject(subject.name)
        mask = processor().preprocess_mask(subject.masks[0], processed.geometry)
        np.testing.assert_array_equal(found["slice"], [1, 2, 3, 4, 5, 6])
        np.testing.assert_array_equal(found["image"], processed.slices.numpy()[1:])
        np.testing.assert_array_equal(found["brain"], processed.brain.numpy()[1:])
        np.testing.assert_array_equal(found["mask"][:, 0], mask[1:] > 0)
        np.testing.assert_array_equal(found["label"], [0, 1, 1, 0, 0, 0] if subject.name == "s0" else [0] * 6)
        assert {key: value.dtype for key, value in found.items()} == {
            "image": np.float32, "mask": np.uint8, "brain": bool, "label": np.int64, "slice": np.int64
        }  # fmt: skip
    assert split.labels.sum() == 2
    assert split.processor_settings == processor().settings()
    assert split.recipe == {"license": "mit"}
    info = split.subject_info["s0"]
    assert {key: info[key] for key in ("group", "label", "annotations", "rows", "anomalous_rows", "shape", "spacing")} == {
        "group": "s0", "label": 1, "annotations": 1, "rows": 6, "anomalous_rows": 2, "shape": list(SHAPE), "spacing": [1, 1, 2],
    }  # fmt: skip
    assert info["volume_files"] == ["s0/b.nii.gz", "s0/a.nii.gz"]
    geometry = processor().preprocess(subjects[1].volume, subjects[1].brain).geometry
    np.testing.assert_allclose(np.reshape(info["network_affine"], (4, 4)), geometry.network_affine)
    with pytest.raises(ValueError, match=r"one of the 2 of this split \(s0, s1, ...\), got 'v'"):
        split.subject_rows("v")


def test_any_rows_in_any_order(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set", shard_rows=5)
    split = load_prepared(tmp_path / "set", "train")
    everything = split[:]
    chosen = [11, 0, 4, 5, 4, -1]
    for batch in (split[chosen], split.__getitems__(np.array(chosen)), pickle.loads(pickle.dumps(split))[chosen]):
        for key, column in batch.items():
            np.testing.assert_array_equal(column, everything[key][chosen])
        assert batch["image"].flags.writeable
    assert batch["subject"].tolist() == ["s1", "s0", "s0", "s0", "s0", "s1"]
    row = split[7]
    assert row["image"].shape == (2, 8, 8) and (row["subject"], row["slice"]) == ("s1", 2)
    assert split[[]]["mask"].shape == (0, 1, 8, 8)
    with pytest.raises(IndexError, match="12 rows"):
        split[12]
    loader = torch.utils.data.DataLoader(split, batch_size=5, num_workers=2, collate_fn=lambda batch: batch)
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in loader]), everything["image"])


def test_images_come_with_their_neighbours(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set", shard_rows=5)
    alone, split = (load_prepared(tmp_path / "set", "train") for _ in range(2))
    split.add_neighbours(1)
    # s0 and s1 have six slices each, in files of five rows.
    rows = [6, 3, 11, 5]
    batch = pickle.loads(pickle.dumps(split)).read_rows(rows, COLUMNS)
    expected = [
        np.concatenate([alone[row]["image"] for row in near])
        for near in ((6, 6, 7), (2, 3, 4), (10, 11, 11), (4, 5, 5))
    ]
    np.testing.assert_array_equal(batch["image"], expected)
    for name in set(COLUMNS) - {"image"}:
        np.testing.assert_array_equal(batch[name], alone[rows][name])
    # Rows 1 and 2 have lesions: they are no neighbours of healthy slices.
    split.add_neighbours(1, "healthy")
    expected = [np.concatenate([alone[row]["image"] for row in near]) for near in ((0, 0, 0), (3, 3, 4))]
    np.testing.assert_array_equal(split.read_rows([0, 3], ("image",))["image"], expected)


def test_any_name_of_a_folder(tmp_path):
    out = tmp_path / "a [1] *, ü" / "set{1}"
    make_set(tmp_path / "raw", out)
    assert len(load_prepared(out, "train")) > 0
    assert len(list(load_prepared(out, "train", streaming=True))) == len(load_prepared(out, "train"))


def test_load_dataset_finds_the_splits(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set", shard_rows=5)
    found = datasets.load_dataset(str(tmp_path / "set"))
    assert {name: split.num_rows for name, split in found.items()} == {"train": 12, "validation": 6}
    expected = load_prepared(tmp_path / "set", "validation")[:]
    for streamed in (
        datasets.load_dataset(str(tmp_path / "set"), split="validation", streaming=True).with_format("numpy"),
        load_prepared(tmp_path / "set", "validation", streaming=True),
    ):
        rows = list(streamed)
        for key in ("image", "mask", "label", "slice"):
            np.testing.assert_array_equal([row[key] for row in rows], expected[key])


def test_card(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "| train | 2 | 12 | 2 |\n| validation | 1 | 6 | 1 |\n" in card
    make_set(tmp_path / "raw", tmp_path / "other", recipe={})
    assert "license: unknown" in (tmp_path / "other" / "README.md").read_text()


def test_half_precision(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set")
    make_set(tmp_path / "raw", tmp_path / "half", dtype="float16")
    full, half = (load_prepared(tmp_path / name, "train")[:]["image"] for name in ("set", "half"))
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, full.astype(np.float16))
    stored = pq.read_schema(tmp_path / "half" / "data" / "train-00000-of-00001.parquet").field("image").type
    assert stored.value_type == "float16"


def test_several_annotators_and_none(tmp_path):
    raw = tmp_path / "raw"
    subjects = [
        make_subject(raw, "two", lesion_slices=[3], masks=2),
        make_subject(raw, "unknown", masks=0),
        make_subject(raw, "sick", masks=0, label=1),
    ]
    run(subjects, tmp_path / "set")
    split = load_prepared(tmp_path / "set", "train")
    assert split[:]["mask"].shape == (18, 2, 8, 8)
    two = split.read_subject("two")
    assert two["mask"].any((2, 3)).tolist() == [[False, False]] * 2 + [[True, False]] + [[False, False]] * 3
    assert two["label"].tolist() == [0, 0, 1, 0, 0, 0]
    for name, label in (("unknown", -1), ("sick", 1)):
        assert split.read_subject(name)["mask"].shape == (6, 0, 8, 8)
        assert split.read_subject(name)["label"].tolist() == [label] * 6
        assert split.subject_info[name]["label"] == label


def test_subjects_with_different_numbers_of_annotations(tmp_path):
    raw = tmp_path / "raw"
    subjects = [make_subject(raw, f"s{masks}", lesion_slices=[3], masks=masks) for masks in (2, 0, 3, 1)]
    run(subjects, tmp_path / "set", shard_rows=7)
    split = load_prepared(tmp_path / "set", "train")
    assert split[:]["mask"].shape == (24, 3, 8, 8)
    for name in split.subjects:
        assert split.read_subject(name)["mask"].shape == (6, int(name[1]), 8, 8)
        assert split.subject_info[name]["annotations"] == int(name[1])
    # A column that no file has: how many of the masks are there.
    rows = [23, 0, 6, 12, 17]
    batch = split.read_rows(rows, ("mask", "annotations"))
    assert batch["annotations"].tolist() == [3, 0, 1, 2, 2] and batch["mask"].shape == (5, 3, 8, 8)
    assert split.annotations[rows].tolist() == [3, 0, 1, 2, 2]
    assert set(split[3]) == set(COLUMNS)

    streamed = load_prepared(tmp_path / "set", "train", streaming=True)
    columns = ("image", "mask", "annotations")
    seen = list(streamed.shuffled_rows([0], 4, columns))
    assert len(seen) == 24 and all(tuple(row) == columns for row in seen)
    expected = {row["image"].tobytes(): (row["mask"].sum(), split.annotations[i]) for i, row in enumerate(split)}
    for row in seen:
        assert (row["mask"].sum(), row["annotations"]) == expected[row["image"].tobytes()]
    healthy = list(streamed.shuffled_rows([0], 4, columns, "healthy"))
    assert len(healthy) == streamed.count_rows("healthy") == 21
    annotated = list(streamed.shuffled_rows([0], 4, ("image",), "annotated"))
    expected = [split[int(row)]["image"].tobytes() for row in split.rows_of("annotated")]
    assert sorted(row["image"].tobytes() for row in annotated) == sorted(expected)
    assert (
        len(expected)
        == split.count_rows("annotated")
        == streamed.count_rows("annotated")
        == (split.annotations > 0).sum()
        < 24
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"step": 3}, [3, 6]),
        ({"first": 2, "last": 5, "step": 2}, [2, 4]),
        ({"last": 99}, [1, 2, 3, 4, 5, 6]),
        ({"min_brain": 0.6}, [1, 3, 4, 5, 6]),
        ({"min_sum": 0.5}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_slice_rule(tmp_path, rule, expected):
    subject = make_subject(tmp_path / "raw", "s")
    brain = np.asarray(nib.load(subject.brain).dataobj).copy()
    brain[6:, :, 2] = 0  # half of slice 2
    save(subject.brain, brain)
    run([subject], tmp_path / "set", processor=processor(size=None), slices=SliceRule(**rule))
    assert load_prepared(tmp_path / "set", "train").slices.tolist() == expected


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_range_of_bright_slices(tmp_path, flip):
    """The sum is over the input's own pixels, in units of the quantile; dim slices between bright ones stay."""
    volume = np.full((20, 24, 8), 0.0, np.float32)
    volume[2:18, 2:22, 1:7] = 50.0
    volume[2:18, 2:22, [1, 3]] = 0.05  # 320 pixels of 0.001
    volume[2:18, 2:22, 6] = 0.1
    image = nib.Nifti1Image(volume, np.diag([1.0, 1.0, flip, 1.0]))
    nib.save(image, tmp_path / "scan.nii.gz")
    kept = {}
    for limit in (0.0, 0.5, 1.0):
        subject = Subject("s", {"a": tmp_path / "scan.nii.gz"}, split="train")
        rule = SliceRule(min_sum=limit)
        run([subject], tmp_path / str(limit), processor=VolumeProcessor(("a",), size=(8, 8)), slices=rule)
        kept[limit] = load_prepared(tmp_path / str(limit), "train").slices
    order = np.arange(8) if flip > 0 else np.arange(8)[::-1]
    assert sorted(order[kept[0.0]]) == [1, 2, 3, 4, 5, 6]
    assert sorted(order[kept[0.5]]) == [2, 3, 4, 5, 6]
    assert sorted(order[kept[1.0]]) == [2, 3, 4, 5]


def test_masks_by_linear_interpolation(tmp_path):
    volume, mask = np.ones((16, 16, 4), np.float32), np.zeros((16, 16, 4), np.uint8)
    volume[:2] = 0
    mask[4:8, 4:8, 1] = 1
    mask[4, 4, 2] = 1  # a pixel of four of the network
    for name, array in (("scan", volume), ("mask", mask)):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / f"{name}.nii.gz")
    subject = Subject("s", {"a": tmp_path / "scan.nii.gz"}, (tmp_path / "mask.nii.gz",), split="test")
    small = VolumeProcessor(("a",), size=(8, 8), antialias=False)
    run([subject], tmp_path / "set", processor=small, slices=SliceRule(masks="linear"))
    split = load_prepared(tmp_path / "set", "test")
    expected = np.zeros((4, 8, 8), np.uint8)
    expected[1, 2:4, 2:4] = 1
    np.testing.assert_array_equal(split.read_subject("s")["mask"][:, 0], expected)
    assert split.labels.tolist() == [0, 1, 0, 0] and split.subject_info["s"]["label"] == 1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"step": 0}, "`slices.step` must be an integer of at least 1, got 0"),
        ({"first": 3, "last": 2}, "`slices.last` must be an integer of at least 3, got 2"),
        ({"min_brain": 1.5}, "between 0 and 1, got 1.5"),
        ({"train": "healthy"}, "one of all, healthy_by_mask, healthy_by_label, got 'healthy'"),
        ({"masks": "cubic"}, "`slices.masks` must be one of nearest, linear, got 'cubic'"),
        ({"first": 2.0}, "`slices.first` must be an integer of at least 0, got 2.0"),
        ({"step": "2"}, "`slices.step` must be an integer of at least 1, got '2'"),
        ({"min_brain": "1 %"}, "`slices.min_brain` must be a finite number .*, got '1 %'"),
        ({"min_sum": -1.0}, "`slices.min_sum` must be a finite number and at least 0, got -1.0"),
    ],
)
def test_wrong_slice_rule(rule, message):
    with pytest.raises(ValueError, match=message):
        SliceRule(**rule)


def test_what_is_kept_for_training(tmp_path):
    raw = tmp_path / "raw"
    # At 4 x 4 pixels, nearest neighbours miss a lesion of one voxel; the training split must still not see it.
    subjects = [make_subject(raw, "sick", lesion_slices=[2], width=1), make_subject(raw, "well")]
    subjects.append(make_subject(raw, "v", split="validation", lesion_slices=[2], width=1))
    small = processor(size=(4, 4))
    run(subjects, tmp_path / "mask", processor=small, slices=SliceRule(train="healthy_by_mask"))
    train = load_prepared(tmp_path / "mask", "train")
    assert train.read_subject("sick")["slice"].tolist() == [1, 3, 4, 5, 6]
    assert len(train.subject_rows("well")) == 6
    validation = load_prepared(tmp_path / "mask", "validation")
    assert validation.slices.tolist() == [1, 2, 3, 4, 5, 6] and not validation[:]["mask"].any()

    run(subjects, tmp_path / "label", slices=SliceRule(train="healthy_by_label"))
    train = load_prepared(tmp_path / "label", "train")
    assert train.subjects == ["well"]
    assert train.subject_info["sick"]["rows"] == 0
    assert len(load_prepared(tmp_path / "label", "validation")) == 6

    subjects[1] = make_subject(raw, "well", masks=0)
    with pytest.raises(ValueError, match="needs a mask of every training subject, well has none"):
        run(subjects, tmp_path / "set", slices=SliceRule(train="healthy_by_mask"))
    with pytest.raises(ValueError, match="needs a label or a mask of every training subject, well has neither"):
        run(subjects, tmp_path / "set", slices=SliceRule(train="healthy_by_label"))
    with pytest.raises(ValueError, match="keeps no slice of the split train"):
        run(subjects[:1], tmp_path / "set", slices=SliceRule(train="healthy_by_label"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "label", "mask", "raw", "set.partial"]


def test_fractions_keep_groups_together():
    rng = random.Random(0)
    for seed in range(20):
        subjects = [Subject(f"s{i}", Path("x"), group=f"g{rng.randrange(25)}") for i in range(80)]
        rule = SplitRule({"train": 0.6, "validation": 0.1, "test": 0.3}, seed)
        split_of = rule.assign(subjects)
        groups = {name: {s.group for s in subjects if split_of[s.name] == name} for name in SPLITS}
        count = len({s.group for s in subjects})
        assert sum(len(members) for members in groups.values()) == count
        assert abs(len(groups["train"]) - 0.6 * count) <= 1 and abs(len(groups["test"]) - 0.3 * count) <= 1
        assert rule.assign(rng.sample(subjects, len(subjects))) == split_of
        assert SplitRule(rule.fractions, seed + 100).assign(subjects) != split_of


def test_wrong_splits():
    subjects = [Subject("a", Path("x"), split="train", group="g"), Subject("b", Path("x"), split="test", group="g")]
    with pytest.raises(ValueError, match="Group g is in two splits, train and test"):
        SplitRule().assign(subjects)
    with pytest.raises(ValueError, match="Subject c has no split"):
        SplitRule().assign([Subject("c", Path("x"))])
    with pytest.raises(ValueError, match="the data set has splits"):
        SplitRule({"train": 1.0}).assign(subjects)
    with pytest.raises(ValueError, match="leaves no group for validation: there are 1 groups"):
        SplitRule({"train": 0.9, "validation": 0.1}).assign([Subject("c", Path("x"))])
    with pytest.raises(ValueError, match="sum to 1"):
        SplitRule({"train": 0.5})
    with pytest.raises(ValueError, match="must name train, validation, test, got val"):
        SplitRule({"val": 1.0})
    with pytest.raises(ValueError, match="`split.order` must be one of hash, shuffle, got 'sorted'"):
        SplitRule({"train": 1.0}, order="sorted")


def test_broken_subjects_are_left_out(tmp_path):
    raw = tmp_path / "raw"
    subjects = [make_subject(raw, name) for name in ("cut", "good", "grid")]
    path = subjects[0].volume["a"]
    path.write_bytes(path.read_bytes()[:-400])
    save(subjects[2].masks[0], np.zeros((12, 10, 6), np.uint8))
    failures = run(subjects, tmp_path / "set")
    assert list(failures) == ["cut", "grid"]
    assert "truncated" in failures["cut"] and "lesion0.nii.gz must lie on the grid" in failures["grid"]
    assert load_prepared(tmp_path / "set", "train").subjects == ["good"]
    assert "Left out, because they could not be read: cut, grid." in (tmp_path / "set" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"No subject can be read:\ncut: .*\ngrid: "):
        run([subjects[0], subjects[2]], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_whatever_is_wrong_with_one_subject_the_others_are_written(tmp_path, monkeypatch):
    subjects = [make_subject(tmp_path / "raw", name) for name in ("dark", "good", "odd")]
    for path in subjects[0].volume.values():
        save(path, -np.random.default_rng(0).uniform(1, 9, SHAPE).astype(np.float32))
    save(subjects[2].masks[0], np.zeros((*SHAPE, 2), np.uint8))
    rules = {"slices": SliceRule(min_sum=0.5), "processor": processor(intensity="given")}
    failures = run(subjects, tmp_path / "set", **rules)
    assert list(failures) == ["dark", "odd"]
    assert "`slices.min_sum` needs values above 0, and a has none" in failures["dark"]
    assert "lesion0.nii.gz must have one channel, got 2" in failures["odd"]

    def stumble(*arguments):
        raise IndexError("index -1 is out of bounds")

    monkeypatch.setattr("anodiff.data.slicing._kept_slices", stumble)  # what nobody has thought of
    with pytest.raises(ValueError, match="good: IndexError: index -1 is out of bounds"):
        run([subjects[1]], tmp_path / "other")


def test_a_stopped_run_leaves_what_can_be_used(tmp_path):
    subjects = [make_subject(tmp_path / "raw", "a"), make_subject(tmp_path / "raw", "b", shape=(12, 11, 7))]
    with pytest.raises(ValueError, match=r"b has slices \(2, 11, 12\), those before it \(2, 10, 12\): set `size`"):
        run(subjects, tmp_path / "new" / "set", processor=processor(size=None), shard_rows=2)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set.partial"]
    for path in subjects[0].files:  # unreadable, by size and time unchanged: subject a is not done again
        state = path.stat()
        path.write_bytes(b"x" * state.st_size)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run(subjects[:1], tmp_path / "new" / "set", processor=processor(size=None), shard_rows=2) == {}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        run(subjects, tmp_path / "new" / "set")
    with pytest.raises(ValueError, match="different names, twice there are a"):
        run([subjects[0], subjects[0]], tmp_path / "new" / "other")


def test_two_runs_agree_and_name_no_folder_of_this_machine(tmp_path):
    subjects = make_set(tmp_path / "raw", tmp_path / "one" / "set", shard_rows=5)
    run(subjects[::-1], tmp_path / "two" / "set", shard_rows=5)
    shutil.copytree(tmp_path / "raw", tmp_path / "moved")
    moved = [make_subject(tmp_path / "moved", s.name, s.split) for s in subjects]
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        if file.suffix != ".parquet":
            assert str(tmp_path) not in (tmp_path / "one" / file).read_text()
    run(moved, tmp_path / "three" / "set")
    for name in ("one", "three"):
        table = pq.read_table(tmp_path / name / "set" / "subjects.parquet")
        assert str(tmp_path) not in str(table.to_pylist())
        assert table["brain_file"].to_pylist() == ["s0/brain.nii.gz", "s1/brain.nii.gz", "v/brain.nii.gz"]


def test_nothing_stale_is_read(tmp_path):
    def images(folder):
        return load_prepared(folder, "train")[:]["image"]

    for number, name in enumerate(("here", "there")):
        run([make_subject(tmp_path / name / "raw", "s", seed=number)], tmp_path / name / "set")
    here, there = images(tmp_path / "here" / "set"), images(tmp_path / "there" / "set")
    assert not np.array_equal(here, there)
    files = sorted(file.name for file in (tmp_path / "here" / "set").rglob("*"))
    shutil.rmtree(tmp_path / "here" / "set")
    run([make_subject(tmp_path / "there" / "raw", "s", seed=1)], tmp_path / "here" / "set")
    np.testing.assert_array_equal(images(tmp_path / "here" / "set"), there)
    assert sorted(file.name for file in (tmp_path / "here" / "set").rglob("*")) == files


def test_wrong_folders(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set", shard_rows=5)
    with pytest.raises(FileNotFoundError, match="neither a folder .*nowhere, nor a phantom of this name"):
        load_prepared(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="no prepared data set: subjects.parquet, .* is missing, it holds s0, s1, v"):
        load_prepared(tmp_path / "raw", "train")
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        load_prepared(tmp_path / "set", "test")
    (tmp_path / "set" / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="incomplete: the split train has 2 files in data/ instead of 3"):
        load_prepared(tmp_path / "set", "train")
    shutil.copy(tmp_path / "set/data/train-00000-of-00003.parquet", tmp_path / "set/data/train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match="do not agree with its subjects.parquet"):
        load_prepared(tmp_path / "set", "train")
    (tmp_path / "set" / "data" / "validation-00000-of-00002.parquet").unlink()
    (tmp_path / "set" / "data" / "validation-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="the split validation has 0 files in data/ instead of 1"):
        load_prepared(tmp_path / "set", "validation")


def change_subjects(folder, **columns):
    """Replaces values of the first row of `subjects.parquet`."""
    table = pq.read_table(folder / "subjects.parquet")
    rows = table.to_pylist()
    rows[0] |= columns
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "subjects.parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"subject": name}, "The name of a subject in .*parquet must be")
            for name in ("../../x", "/abs/x", "a\0b", "")
        ),
        ({"subject": "s1"}, "lists a subject twice"),
        ({"split": "../x"}, "must name the splits train, validation, test, got '../x'"),
        ({"rows": None}, "`rows of s0 in .*` must be an integer of at least 0, got None"),
        ({"rows": 7}, "do not agree|says 13"),
    ],
)
def test_sets_that_come_from_elsewhere(tmp_path, change, message, streaming):
    """What evaluations write is called after subjects: a set from a stranger must not choose the place."""
    make_set(tmp_path / "raw", tmp_path / "set")
    change_subjects(tmp_path / "set", **change)
    with pytest.raises(ValueError, match=message):
        split = load_prepared(tmp_path / "set", "train", streaming=streaming)
        list(split.shuffled_rows((0,), 8))


def test_rows_of_subjects_that_are_not_listed(tmp_path):
    make_set(tmp_path / "raw", tmp_path / "set")
    change_subjects(tmp_path / "set", subject="other")
    with pytest.raises(ValueError, match="do not agree with its subjects.parquet"):
        load_prepared(tmp_path / "set", "train")
    split = load_prepared(tmp_path / "set", "train", streaming=True)
    for rows in (iter(split), split.shuffled_rows((0,), 8, ("image", "annotations"))):
        with pytest.raises(ValueError, match="hold rows of 's0', whom subjects.parquet does not list"):
            list(rows)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("processor/processor_config.json", b'{"modalities": ["../x"]}', "The name of a modality in .* must be"),
        ("processor/processor_config.json", b"{}", "must hold the settings of a processor with its `modalities`"),
        ("processor/processor_config.json", b"{", "processor_config.json, line 1: the file is no JSON"),
        ("recipe.yaml", b"[", "recipe.yaml, line 1: the file is no YAML"),
        ("recipe.yaml", b"- a", "recipe.yaml must hold `key: value` pairs, got"),
        ("recipe.yaml", b"source: \xe4", "recipe.yaml, line 1: byte 0xe4 is not UTF-8"),
        ("subjects.parquet", b"PAR1", "subjects.parquet cannot be read, it may be truncated or damaged"),
        ("data/train-00000-of-00001.parquet", b"PAR1", "train-00000-of-00001.parquet cannot be read"),
    ],
)
def test_damaged_sets(tmp_path, file, content, message):
    make_set(tmp_path / "raw", tmp_path / "set")
    (tmp_path / "set" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prepared(tmp_path / "set", "train")


def test_rows_are_measured_before_they_are_unpacked(tmp_path, monkeypatch):
    make_set(tmp_path / "raw", tmp_path / "set")
    monkeypatch.setenv("ANODIFF_MAX_VOXELS", "127")
    with pytest.raises(ValueError, match="A row of `image` in .* would have 128 voxels, and 127 are the limit"):
        load_prepared(tmp_path / "set", "train")


HUB = """
import json, sys
from huggingface_hub import HfApi
from anodiff.data.prepared import load_prepared

api, seen = HfApi(), []
api.create_repo("owner/set", repo_type="dataset")
for folder in sys.argv[1:]:
    api.upload_folder(repo_id="owner/set", repo_type="dataset", folder_path=folder)
    split = load_prepared("owner/set", "train")
    streamed = load_prepared("owner/set", "train", streaming=True)
    seen.append([len(split), split.modalities, float(split[3]["image"].sum()), float(list(streamed)[3]["image"].sum())])
try:
    load_prepared("owner/nothing", "train")
except FileNotFoundError as error:
    seen.append(str(error))
print(json.dumps(seen))
"""


def test_from_the_hub(hub_client, tmp_path):
    for number in range(2):
        run([make_subject(tmp_path / "raw", "s", seed=number)], tmp_path / f"set{number}")
    *seen, missing = hub_client(HUB, tmp_path / "set0", tmp_path / "set1")
    for number, found in enumerate(seen):
        total = float(load_prepared(tmp_path / f"set{number}", "train")[3]["image"].sum())
        np.testing.assert_allclose(found[2:], [total, total], rtol=1e-5)
        assert found[:2] == [6, ["a", "b"]]
    assert missing.startswith("There is neither a folder owner/nothing")


def recipe(**changes):
    return {
        "reader": "volume_folders",
        "reader_options": {"modalities": {"a": "a.nii.gz", "b": "b.nii.gz"}, "brain": "brain.nii.gz"},
        "processor": {"modalities": ["a", "b"], "size": [8, 8], "brain_mask": "given"},
        "split": {"fractions": {"train": 1.0}},
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"slice": {}},
            "`recipe` has no key slice; it takes source, license, reader, reader_options, processor, slices",
        ),
        (
            {"slices": {"every": 2}},
            "`slices` has no key every; it takes min_brain, first, last, step, min_sum, masks, train",
        ),
        ({"split": [0.5]}, r"`split` must hold `key: value` pairs, got \[0.5\]"),
        (
            {"reader": "dicom"},
            "`reader` must be one of volume_folders, image_folders, annotated_folders, split_tables, .*, got 'dicom'",
        ),
        ({"reader_options": {}}, "`reader_options` needs the key modalities"),
        ({"reader_options": {"modality": {}}}, "`reader_options` has no key modality; it takes modalities, masks"),
        ({"reader_options": {"modalities": {}, "splits": "/splits"}}, "relative to the root, got /splits"),
        ({"reader_options": {"modalities": {"a": "/a.nii"}, "masks": ["/m"]}}, "relative to the root, got /a.nii, /m"),
        (
            {"split": {"fractions": [0.5, 0.5]}},
            r"`split.fractions` must give splits their shares, .* got \[0.5, 0.5\]",
        ),
        ({"processor": {"shape": 3}}, "`processor` has no key shape; it takes modalities, plane"),
        (
            {"processor": {"context": 1}},
            "`processor.context` must be left out of a recipe, got 1: .* Give it to train",
        ),
        ({"dtype": "int8"}, "`dtype` must be one of float32, float16, got 'int8'"),
    ],
)
def test_wrong_recipes(tmp_path, changes, message):
    make_subject(tmp_path, "s")
    with pytest.raises(ValueError, match=message):
        prepare_recipe(recipe(**changes), tmp_path, tmp_path / "set", progress=False)


def test_columns_of_participants_come_into_the_set(tmp_path):
    """Joined by the name of the subject or of its group, texts and numbers, with what is not known."""
    rows = ["participant_id\tsex\tvolume\tscanner\tnote", "sub-a\tf\t1.5\t3\t-", "b\tn/a\t2\tA\t-", "else\tm\t\t\t-"]
    (tmp_path / "people.tsv").write_text("\n".join(rows))
    for name in "abc":
        make_subject(tmp_path, name)
    participants = {"table": "people.tsv", "columns": ["sex", "volume", "scanner"]}
    with pytest.warns(UserWarning, match="people.tsv has no row of 1 subjects: c"):
        prepare_recipe(recipe(participants=participants), tmp_path, tmp_path / "set", progress=False)
    info = load_prepared(tmp_path / "set", "train").subject_info
    found = {name: tuple(info[name][column] for column in participants["columns"]) for name in "abc"}
    assert found == {"a": ("f", 1.5, "3"), "b": (None, 2.0, "A"), "c": (None, None, None)}
    assert info["a"]["rows"] and info["a"]["age"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["sex", "age"]}, "`columns` of `participants` must not be called like ours, got age"),
        ({"columns": ["height"]}, "people.tsv has no column height; it has participant_id, sex, other"),
        ({"key": "other"}, "people.tsv has no row of a subject; they are a: check `key`, which is other"),
        ({"column": "sex"}, "`participants` has no key column; it takes table, columns, key"),
        ({"table": "twice.tsv"}, "twice.tsv has several rows of a, which differ"),
    ],
)
def test_wrong_participants(tmp_path, changes, message):
    (tmp_path / "people.tsv").write_text("participant_id\tsex\tother\na\tf\tz")
    (tmp_path / "twice.tsv").write_text("participant_id\tsex\nsub-a\tf\na\tm")
    make_subject(tmp_path, "a")
    participants = {"table": "people.tsv", "columns": ["sex"]} | changes
    with pytest.raises(ValueError, match=message):
        prepare_recipe(recipe(participants=participants), tmp_path, tmp_path / "set", progress=False)


def test_recipes_of_the_package(tmp_path):
    folder = Path(__file__).parents[2] / "configs" / "recipes"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    assert names == [
        *["anoddpm_nfbs", "atlas_anofpdm", "atlas_v2", "brain_damage", "brain_tumor_mri", "brats21_andi"],
        *["brats21_anofpdm", "brats21_anofpdm_slices", "brats21_flair", "cddpm_ixi_t1", "cddpm_ixi_t2", "cimd_lidc"],
        *[
            "generic_bids",
            "generic_image_masks",
            "heads",
            "ixi_t1",
            "ixi_t2",
            "lidc_pickle",
            "mslub_flair",
            "phantom_mini",
        ],
        *["phantom_raters", "sadm_atlas", "sadm_brats", "sadm_brats_t2", "sadm_mslub_t2", "sadm_t1", "sadm_t2"],
        *["sadm_wmh", "shifts_andi", "shifts_andi_folders", "shifts_ms", "tcga_lgg_flair", "tcga_lgg_kaggle"],
        *["tcga_lgg_labelled", "wmh_flair"],
    ]
    for name in names:
        # An empty root: everything of the recipe is read, then there is no subject.
        with pytest.raises(
            (ValueError, OSError), match="No (folder|file) in|the classes in .* are none|no table|no file"
        ):
            prepare_recipe(read_recipe(name), tmp_path, tmp_path / "set")
        settings = read_recipe(name)
        VolumeProcessor.from_dict(settings["processor"])
        SliceRule(**settings.get("slices", {}))
        SplitRule(**settings.get("split", {}))
    with pytest.raises(
        FileNotFoundError, match="no recipe nothing. The package comes with anoddpm_nfbs, atlas_anofpdm, atlas_v2"
    ):
        read_recipe("nothing")


def test_a_phantom_is_made_once(tmp_path, monkeypatch):
    # Two subjects instead of 32.
    monkeypatch.setitem(PHANTOM_SETS, "phantom-mini", {"train": ((None, 1),), "test": (("tumour", 1),)})
    prepare_phantom("phantom-mini", tmp_path / "geometric", anatomy="geometric", progress=False)
    split = load_prepared(tmp_path / "geometric", "test")
    assert split.modalities == ("flair", "t1") and split.recipe["source"].startswith("phantom-mini of anodiff")
    assert split[0]["image"].shape == (2, 64, 64)
    train = load_prepared("phantom-mini", "train")
    assert train.subjects == ["healthy_0000"] and not train.labels.any()
    (made,) = (tmp_path / "cache" / "anodiff").iterdir()
    before = made.stat().st_mtime_ns
    assert len(load_prepared("phantom-mini", "test")) > 0
    assert made.stat().st_mtime_ns == before


def test_a_phantom_goes_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setitem(PHANTOM_SETS, "phantom-mini", {"train": ((None, 1),), "test": (("tumour", 1),)})
    options = {"anatomy": "geometric", "raw": tmp_path / "raw", "progress": False}
    save, made = PhantomSubject.save, []

    def interrupt(subject, folder):
        save(subject, folder)
        made.append(subject.name)
        if len(made) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(PhantomSubject, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):  # of the raw volumes: nothing half-made is left
            prepare_phantom("phantom-mini", tmp_path / "set", **options)
        assert not [path for path in (tmp_path / ".raw-raw").iterdir() if path.is_dir()]
        stopped.setattr(PhantomSubject, "save", save)
        stopped.setattr(shards, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # when they are there
            prepare_phantom("phantom-mini", tmp_path / "set", **options)
    assert not (tmp_path / "raw").exists() and not (tmp_path / "set").exists()
    (tmp_path / ".raw-raw" / "of-another-version").mkdir()
    with monkeypatch.context() as stopped:
        stopped.setattr(PhantomSubject, "save", None)  # nothing is made again
        assert prepare_phantom("phantom-mini", tmp_path / "set", **options) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "set"}
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["healthy_0000", "splits", "tumour_0001"]
    with pytest.raises(FileExistsError, match="`raw` .*raw exists"):
        prepare_phantom("phantom-mini", tmp_path / "other", **options)


def test_a_phantom_that_another_process_makes_is_waited_for(tmp_path, monkeypatch):
    waited = []

    def make(name, folder, **_):
        if not waited:
            raise BlockingIOError("in use")
        folder.mkdir(parents=True)

    monkeypatch.setattr("anodiff.data.phantoms.sets.prepare_phantom", make)
    monkeypatch.setattr("anodiff.data.phantoms.sets.time.sleep", waited.append)
    assert cached_phantom("phantom-mini").is_dir() and waited == [1]


def test_real_volumes(tmp_path):
    if "ANODIFF_TEST_DATA" not in os.environ:
        pytest.skip("ANODIFF_TEST_DATA is not set: no real data")
    root = Path(os.environ["ANODIFF_TEST_DATA"]) / "mri" / "tcga_lgg_flair"
    settings = read_recipe("tcga_lgg_flair")
    settings["processor"]["size"] = [32, 32]
    assert prepare_recipe(settings, root, tmp_path / "lgg", progress=False) == {}
    splits = {name: load_prepared(tmp_path / "lgg", name) for name in SPLITS}
    assert {name: len(split.subject_info) for name, split in splits.items()} == {
        "train": 20,
        "validation": 3,
        "test": 10,
    }
    assert not splits["train"].labels.any() and 0.5 < splits["test"].labels.mean() < 1
    subjects = read_volume_folders(root, {"flair": "flair.nii.gz"}, masks=["lesion.nii.gz"])
    slices = {subject.name: nib.load(subject.masks[0]).shape[2] for subject in subjects}
    test = splits["test"]
    assert isinstance(test, PreparedSplit)
    for name in test.subjects:
        found = test.read_subject(name)
        assert len(found["slice"]) == slices[name]
        # A FLAIR lesion is brighter than the brain around it, so the mask lies on the image and is not flipped.
        image, mask = found["image"][:, 0], found["mask"][:, 0] == 1
        assert image[mask].mean() > image[found["brain"] & ~mask].mean()
