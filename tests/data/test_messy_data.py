"""Data sets as people have them: other words than the recipe's, contents that were never fetched, masks that fit
nothing, tables of spreadsheet programs. Nothing of that is silently wrong, and nothing vanishes."""

import pickle
import re
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import yaml

from anodiff.data.prepare import prepare_recipe, read_recipe
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.arrays import read_array_stacks, read_crop_pickles, read_picture_stacks
from anodiff.data.readers.files import read_bids, read_file_patterns
from anodiff.data.readers.listing import LeftOut, Missing, as_text, as_texts, read_table
from anodiff.data.readers.subjects import (
    Subject,
    read_annotated_folders,
    read_image_folders,
    read_split_tables,
    read_volume_folders,
)
from anodiff.data.rules import SplitRule


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def save_picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.asarray(array, np.uint8)).save(path)


def save_volume(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), np.diag([-1.0, -1.0, 1.0, 1.0])), path)


def labels(subjects):
    return {subject.name: subject.label for subject in subjects}


def left_out(warned):
    return [str(warning.message) for warning in warned if issubclass(warning.category, LeftOut)]


# --- values of YAML against words of a data set


@pytest.mark.parametrize(("value", "text"), [("no", "no"), (0, "0"), (7.5, "7.5"), (np.int64(3), "3")])
def test_values_of_yaml_are_text(value, text):
    assert as_text("healthy", value) == text


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[no]", '`healthy` must be text, got false, which YAML makes of unquoted .* in quotes .* "no"'),
        ("[on]", "got true, which YAML makes of unquoted"),
        ("[~]", "must be text, got None"),
        ("[[a]]", r"must be text, got \['a'\]"),
        ("good", "`healthy` must be a list, got 'good'"),
    ],
)
def test_what_yaml_has_made_of_words(written, message):
    with pytest.raises(ValueError, match=message):
        as_texts("healthy", yaml.safe_load(written))


def bids_tree(root, *groups):
    for number, _ in enumerate(groups, 1):
        touch(root, f"sub-{number}/anat/sub-{number}_T1w.nii.gz")
    rows = [f"sub-{number}\t{group}" for number, group in enumerate(groups, 1)]
    write(root / "participants.tsv", "\n".join(["participant_id\tgroup", *rows]))
    return {"modalities": {"t1": "anat/*_T1w.nii.gz"}, "label_column": "group"}


@pytest.mark.parametrize(
    ("groups", "healthy", "found"),
    [
        (["0", "1"], [0], [0, 1]),
        (["no", "yes"], ["no"], [0, 1]),
        (["control ", "patient"], ["control"], [0, 1]),  # a blank that nobody sees
        (["control", "n/a", ""], ["control"], [0, None, None]),
        (["Control", "control", "ms"], ["Control", "control"], [0, 0, 1]),
    ],
)
def test_healthy_groups_of_bids(tmp_path, groups, healthy, found):
    options = bids_tree(tmp_path, *groups)
    assert list(labels(read_bids(tmp_path, **options, healthy=healthy)).values()) == found


@pytest.mark.parametrize(
    ("groups", "healthy", "message"),
    [
        (["control", "ms"], ["Control"], "`healthy` names Control; the values of `group` in .*tsv are control, ms"),
        (["0", "1"], ["no"], "`healthy` names no; .* are 0, 1"),
        (["0", "1"], [False], "in quotes"),
        (["0", "0.0", "1.0"], [0], "`healthy` names 0, and .* are 0, 0.0, 1.0: 0.0 is written otherwise"),
        (["control", "Control", "ms"], ["control"], "Control is written otherwise. Name both"),
        (["control", "N/A"], ["control"], "`group` holds N/A: write n/a where it is not known"),
        (["control", "NaN"], ["control"], "`group` holds NaN"),
    ],
)
def test_healthy_groups_that_fit_nothing(tmp_path, groups, healthy, message):
    options = bids_tree(tmp_path, *groups)
    with pytest.raises(ValueError, match=message):
        read_bids(tmp_path, **options, healthy=healthy)


def test_healthy_classes(tmp_path):
    touch(tmp_path, "0/a.png", "1/b.png")
    assert labels(read_image_folders(tmp_path, [0])) == {"0/a": 0, "1/b": 1}
    patterns = {"image": "{class}/{subject}.png"}
    assert labels(read_file_patterns(tmp_path, patterns, name="{class}{subject}", healthy=[0])) == {"0a": 0, "1b": 1}
    for read in (
        lambda healthy: read_image_folders(tmp_path, healthy),
        lambda healthy: read_file_patterns(tmp_path, patterns, healthy=healthy),
    ):
        with pytest.raises(ValueError, match="`healthy` names good; the classes in .* are 0, 1"):
            read(["good"])
        with pytest.raises(ValueError, match="in quotes"):
            read([False])


def test_names_of_splits(tmp_path):
    touch(tmp_path, "0/a.png", "1/b.png", "2/c.png")
    patterns = {"image": "{split}/{subject}.png"}
    with pytest.warns(UserWarning, match="1 subjects are left out, whose splits `splits` does not name: 2"):
        subjects = read_file_patterns(tmp_path, patterns, splits={0: "train", 1: "test"})
    assert [(subject.name, subject.split) for subject in subjects] == [("a", "train"), ("b", "test")]
    with pytest.raises(ValueError, match="`splits` names one; the splits in .* are 0, 1, 2"):
        read_file_patterns(tmp_path, patterns, splits={0: "train", "one": "test"})
    with pytest.raises(ValueError, match="`splits` must be text, got false"):
        read_file_patterns(tmp_path, patterns, splits={False: "train"})
    with pytest.raises(ValueError, match="`split.fractions` must name train, validation, test, got False"):
        SplitRule({False: 1.0})
    with pytest.raises(ValueError, match="`split.fractions.train` must be a finite number, got '1'"):
        SplitRule({"train": "1"})


def test_columns_called_by_numbers(tmp_path):
    touch(tmp_path, "7.png", "8.png")
    write(tmp_path / "ages.csv", "1,2\n7,30\n8,31\n")
    subjects = read_file_patterns(tmp_path, {"image": "{subject}.png"}, ages="ages.csv", ages_columns=[1, 2])
    assert [subject.age for subject in subjects] == [30, 31]
    touch(tmp_path, "raw/a/7.png")
    write(tmp_path / "raw" / "groups.csv", "file,1\na/7.png,g\n")
    (subject,) = read_image_folders(tmp_path / "raw", ["a"], "groups.csv", 1)
    assert subject.group == "g"


# --- contents that were never fetched, and links


def annexed(path):
    path.unlink(missing_ok=True)
    path.symlink_to(f"../.git/annex/objects/x/y/SHA256E-s3--abc/SHA256E-s3--abc{path.suffix}")


def unlocked(path):
    path.write_text("/annex/objects/SHA256E-s3--abc.nii.gz\n")


def of_lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")


def dead(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/nowhere/else.nii.gz")


UNFETCHED = {
    annexed: "never fetched.*`datalad get` or `git annex get`",
    unlocked: "never fetched.*`datalad get` or `git annex get`",
    of_lfs: "never fetched.*`git lfs pull`",
    dead: "is a link to /nowhere/else.nii.gz",
}


def volumes_of(root, name, mask="lesion.nii.gz", scan="flair.nii.gz"):
    save_volume(root / name / scan, np.random.default_rng(0).uniform(1, 2, (8, 8, 3)))
    save_volume(root / name / mask, np.eye(8)[..., None] * np.ones(3))


# Reader, its options, the file of a scan and that of a mask of {} (the subject's folder).
BY_FILES = [
    (
        "volume_folders",
        {"modalities": {"flair": "flair.nii.gz"}, "masks": ["lesion.nii.gz"]},
        "{}/flair.nii.gz",
        "{}/lesion.nii.gz",
    ),
    (
        "file_patterns",
        {
            "modalities": {"flair": "{subject}/flair.nii.gz"},
            "masks": ["{subject}/les*.nii.gz"],
            "missing_masks": "healthy",
        },
        "{}/flair.nii.gz",
        "{}/lesion.nii.gz",
    ),
    (
        "bids",
        {"modalities": {"flair": "flair.nii.gz"}, "masks": ["lesion.nii.gz"], "missing_masks": "healthy"},
        "{}/flair.nii.gz",
        "{}/lesion.nii.gz",
    ),
    (
        "annotated_folders",
        {"modalities": {"flair": "flair*"}, "annotations": ["les*"], "label_max": 1},
        "{}/flair.nii.gz",
        "{}/lesion.nii.gz",
    ),
]


@pytest.mark.parametrize("unfetched", UNFETCHED)
@pytest.mark.parametrize(
    ("reader", "options", "scan", "mask"), BY_FILES, ids=lambda case: case if isinstance(case, str) else ""
)
def test_a_content_that_is_not_there_is_listed(tmp_path, reader, options, scan, mask, unfetched):
    """A mask that was not fetched makes nobody healthy, and a scan does not vanish."""
    for name in ("sub-1", "sub-2", "sub-3"):
        volumes_of(tmp_path / "raw", name)
    unfetched(tmp_path / "raw" / mask.format("sub-1"))
    unfetched(tmp_path / "raw" / scan.format("sub-2"))
    recipe = {"reader": reader, "reader_options": options, "split": {"fractions": {"test": 1.0}}}
    recipe["processor"] = {"modalities": ["flair"], "size": [8, 8]}
    failures = prepare_recipe(recipe, tmp_path / "raw", tmp_path / "set", progress=False)
    assert list(failures) == ["sub-1", "sub-2"]
    assert all(re.search(UNFETCHED[unfetched], reason) for reason in failures.values())
    assert load_prepared(tmp_path / "set", "test").subjects == ["sub-3"]


@pytest.mark.parametrize("unfetched", UNFETCHED)
def test_slices_pictures_and_tables_that_are_not_there(tmp_path, unfetched):
    message = UNFETCHED[unfetched]
    # Pictures of classes.
    touch(tmp_path, "classes/good/a.png", "classes/ill/b.png")
    unfetched(tmp_path / "classes/ill/b.png")
    assert labels(read_image_folders(tmp_path / "classes", ["good"])) == {"good/a": 0, "ill/b": 1}
    # Slices: a mask of one, and an array of one.
    for number in (1, 2):
        save_picture(tmp_path / f"kaggle/p/p_{number}.tif", np.ones((4, 4)))
        save_picture(tmp_path / f"kaggle/p/p_{number}_mask.tif", np.ones((4, 4)))
        (tmp_path / "arrays/p").mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / f"arrays/p/slice_{number}.npz", x=np.ones((1, 1, 4, 4)), y=np.ones((1, 1, 4, 4)))
    unfetched(tmp_path / "kaggle/p/p_2_mask.tif")
    unfetched(tmp_path / "arrays/p/slice_2.npz")
    (subject,) = read_picture_stacks(tmp_path / "kaggle", {"image": 0})
    assert subject.volume.read().shape == (4, 4, 2)
    with pytest.raises(FileNotFoundError, match=message):
        subject.masks[0].read()
    (subject,) = read_array_stacks(tmp_path / "arrays", {"image": 0})
    for stack in (subject.volume, *subject.masks):
        with pytest.raises(FileNotFoundError, match=message):
            stack.read()
    # A pickle, and tables, which no reader may take for absent.
    touch(tmp_path, "pickles/a.pickle")
    unfetched(tmp_path / "pickles/a.pickle")
    with pytest.raises(FileNotFoundError, match=message):
        read_crop_pickles(tmp_path / "pickles")
    options = bids_tree(tmp_path / "bids", "a")
    unfetched(tmp_path / "bids/participants.tsv")
    for label in ({"label_column": None}, {"healthy": ["a"]}):
        with pytest.raises(FileNotFoundError, match=message):
            read_bids(tmp_path / "bids", **options | label)


def test_links_count_as_what_they_point_to(tmp_path):
    store, root = tmp_path / "store", tmp_path / "raw"
    volumes_of(store, "one")
    root.mkdir()
    write(store / "train.csv", "subject\none\n")
    (root / "one").symlink_to(store / "one", target_is_directory=True)
    (root / "splits").mkdir()
    (root / "splits" / "train.csv").symlink_to(store / "train.csv")
    (root / "README.md").symlink_to(".git/annex/objects/x/y.md")  # no folder that could be a subject
    options = {"modalities": {"flair": "flair.nii.gz"}, "masks": ["lesion.nii.gz"]}
    (subject,) = read_volume_folders(root, **options, splits="splits")
    assert (subject.name, subject.split, subject.volume) == ("one", "train", {"flair": root / "one/flair.nii.gz"})
    # At every depth, and without end if a folder leads back.
    (root / "deep").mkdir()
    (root / "deep" / "site").symlink_to(store, target_is_directory=True)
    (store / "back").symlink_to(store, target_is_directory=True)
    patterns = {"flair": "deep/**/{subject}/flair.nii.gz"}
    (subject,) = read_file_patterns(root, patterns)
    assert subject.volume == {"flair": root / "deep/site/one/flair.nii.gz"}
    assert [one.name for one in read_annotated_folders(root, {"flair": "flair*"}, ["les*"])] == [
        "deep/site/one",
        "one",
    ]
    (root / "two").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError, match="two is a link to .*unmounted, and there is no such file"):
        read_volume_folders(root, **options)


# --- masks that fit nothing


def test_patterns_of_masks_that_match_nothing(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png", "masks/a_mask.png", "masks/c_mask.png")
    images, options = {"image": "images/{subject}.png"}, {"missing_masks": "healthy"}
    with pytest.raises(ValueError, match=r"No file in .* is the mask masks/\{subject\}.tif of a subject"):
        read_file_patterns(tmp_path, images, masks=["masks/{subject}.tif"], **options)
    with pytest.raises(ValueError, match="of a subject; masks/a_mask.png, masks/c_mask.png belong to none"):
        read_file_patterns(tmp_path, images, masks=["masks/{subject}.png"], **options)
    with pytest.warns(UserWarning) as warned:
        subjects = read_file_patterns(tmp_path, images, masks=["masks/{subject}_mask.png"], **options)
    assert labels(subjects) == {"a": None, "b": 0}
    said = [str(warning.message) for warning in warned]
    assert "There is no mask of 1 subjects (`missing_masks: healthy`): b." in said
    assert left_out(warned) == ["Left out 1 masks: there is no image of the same fields: masks/c_mask.png."]

    bids_tree(tmp_path / "bids", "a", "b")
    touch(tmp_path / "bids", "derivatives/x/sub-1/anat/sub-1_mask.nii.gz")
    modalities = {"t1": "anat/*_T1w.nii.gz"}
    with pytest.raises(ValueError, match=r"No session in .* holds the mask anat/\*_lesion.nii.gz"):
        read_bids(tmp_path / "bids", modalities, masks=["anat/*_lesion.nii.gz"], **options)
    with pytest.warns(UserWarning, match="There is no mask of 1 subjects .*: sub-2"):
        subjects = read_bids(tmp_path / "bids", modalities, masks=["anat/*_mask.nii.gz"], **options)
    assert labels(subjects) == {"sub-1": None, "sub-2": 0}

    touch(tmp_path, "cases/1/image.png", "cases/1/l0.png", "cases/2/image.png")
    with pytest.raises(ValueError, match=r"`annotations`: no case in .* holds a file m\*"):
        read_annotated_folders(tmp_path / "cases", {"image": "image*"}, ["l*", "m*"])
    with pytest.warns(UserWarning, match="There is no annotation of 1 cases: 2"):
        read_annotated_folders(tmp_path / "cases", {"image": "image*"}, ["l*"])


@pytest.mark.parametrize("values", [(1,), (2,), (100,), (1, 2, 4)])
@pytest.mark.parametrize("suffix", [".png", ".nii.gz"])
def test_masks_whose_values_all_stay_below_what_counts(tmp_path, values, suffix):
    """0 and 2 where only what exceeds 127.5 is marked: an error of this mask, whose hint names an option there is."""
    mask = np.zeros((8, 8))
    mask[:4, :4] = np.resize(values, (4, 4))
    for name in ("a", "b"):
        if suffix == ".png":
            save_picture(tmp_path / f"raw/{name}/image.png", np.arange(64).reshape(8, 8))
            save_picture(tmp_path / f"raw/{name}/mask.png", mask if name == "a" else np.where(mask, 255, 0))
        else:
            save_volume(tmp_path / f"raw/{name}/image.nii.gz", np.arange(64).reshape(8, 8, 1))
            save_volume(
                tmp_path / f"raw/{name}/mask.nii.gz", (mask if name == "a" else np.where(mask, 255, 0))[..., None]
            )
    one, pattern = f"image{suffix}", f"mask{suffix}"
    readers = {
        "volume_folders": {"modalities": {"image": one}, "masks": [pattern], "mask_above": 127.5},
        "file_patterns": {
            **{"modalities": {"image": f"{{subject}}/{one}"}, "masks": [f"{{subject}}/{pattern}"]},
            **{"missing_masks": "healthy", "mask_above": 127.5},
        },
        "annotated_folders": {"modalities": {"image": one}, "annotations": [pattern]},
    }
    for reader, options in readers.items():
        recipe = {"reader": reader, "reader_options": options, "split": {"fractions": {"test": 1.0}}}
        recipe["processor"] = {"modalities": ["image"], "size": [8, 8], "intensity": "given", "brain_mask": "none"}
        failures = prepare_recipe(recipe, tmp_path / "raw", tmp_path / reader, progress=False)
        hint = "`label_max` to the value of a marked voxel" if "annotations" in options else "a smaller `mask_above`"
        assert list(failures) == ["a"] and failures["a"].endswith(
            f"holds values up to {max(values)}, and those above 127.5 are marked: set {hint}."
        )
        assert load_prepared(tmp_path / reader, "test").read_subject("b")["mask"].sum() == 16


# --- tables


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"subject,age\nM\xfcller,3\n", r"a.csv, line 2: byte 0xfc is not UTF-8"),
        ("a.csv", b"subject;age\na;3\n", r"a.csv is divided by semicolons, and must be by commas"),
        ("a.csv", b"subject\tage\na\t3\n", r"a.csv is divided by tabs, and must be by commas"),
        ("a.tsv", b"subject,age\na,3\n", r"a.tsv is divided by commas, and must be by tabs"),
        ("a.csv", b"subject,age,age\na,3,4\n", r"a.csv has several columns age: rename or delete"),
        ("a.csv", b"subject,age\na,3,5\n", r"a.csv, row 1 below the header, has 3 cells, and the table 2 columns"),
        ("a.csv", b'subject,age\n"' + b"a" * 200_000 + b'",3\n', r"a.csv cannot be read as a table: field larger"),
        ("a.xlsx", b"PK", r"a.xlsx is a spreadsheet, which is not read: save it as CSV"),
        ("a.csv", b"", "has no column subject, age; it has none"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, ["subject", "age"], "ages")


@pytest.mark.parametrize("text", ["\ufeffsubject,age\r\nÄ, 3 \r\n\r\n", 'subject,age,note\n"Ä",3\n'])
def test_tables_that_can_be_read(tmp_path, text):
    write(tmp_path / "a.csv", text)
    (row,) = read_table(tmp_path / "a.csv", ["subject", "age"], "ages")
    assert (row["subject"], row["age"]) == ("Ä", "3")


def test_rows_that_contradict_each_other(tmp_path):
    options = {**bids_tree(tmp_path / "bids", "a", "b"), "healthy": ["a"]}
    table = tmp_path / "bids" / "participants.tsv"
    table.write_text(table.read_text() + "\nsub-1\ta")
    assert labels(read_bids(tmp_path / "bids", **options)) == {"sub-1": 0, "sub-2": 1}
    table.write_text(table.read_text() + "\n1\tb")
    with pytest.raises(ValueError, match="several rows of sub-1, which differ"):
        read_bids(tmp_path / "bids", **options)
    touch(tmp_path, "raw/a/1.png")
    write(tmp_path / "raw/groups.csv", "file,group\na/1.png,x\na/1.png,y\n")
    with pytest.raises(ValueError, match="lists a/1.png in two groups: x and y"):
        read_image_folders(tmp_path / "raw", ["a"], "groups.csv")
    write(tmp_path / "raw/groups.csv", "file,group\na/1.png,\n")
    with pytest.raises(ValueError, match="gives a/1.png no group in its column `group`"):
        read_image_folders(tmp_path / "raw", ["a"], "groups.csv")


def test_ages_that_are_no_numbers(tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png")
    write(tmp_path / "ages.csv", "subject,age\n1,89+\n2,31.5\n")
    with pytest.warns(UserWarning) as warned:
        subjects = read_file_patterns(tmp_path, {"image": "{subject}.png"}, ages="ages.csv")
    assert [subject.age for subject in subjects] == [None, 31.5, None]
    said = " ".join(str(warning.message) for warning in warned)
    assert "ages that are no numbers are left out: 89+ (1)" in said and "gives no age of 2 subjects: 1, 3" in said
    write(tmp_path / "bids/participants.tsv", "participant_id\tage\tsite\nsub-1\t45y\tn/a\n")
    touch(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii.gz")
    with pytest.warns(UserWarning, match=r"left out: 45y \(sub-1\)"):
        (subject,) = read_bids(tmp_path / "bids", {"t1": "anat/*_T1w.nii.gz"})
    assert subject.age is None and subject.site is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "reader: bids\n\treader_options: {}\n",
            "my.yaml, line 2: the file is no YAML: YAML is indented by spaces, and there is a tab",
        ),
        ("reader: [\n", "my.yaml, line 2: the file is no YAML"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, message):
    write(tmp_path / "my.yaml", text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "my.yaml")
    (tmp_path / "my.yaml").write_bytes(b"# \n# Universit\xe4t\nreader: bids\n")
    with pytest.raises(ValueError, match="my.yaml, line 2: byte 0xe4 is not UTF-8"):
        read_recipe(tmp_path / "my.yaml")


# --- everything is dealt with, or listed


def test_what_is_in_no_subject_is_listed(tmp_path):
    volumes_of(tmp_path / "raw", "a")
    touch(tmp_path / "raw", "b_flair.nii.gz", "c/T2.nii.gz", "docs/notes.txt")
    (tmp_path / "raw" / "d").mkdir()
    recipe = {"reader": "volume_folders", "reader_options": {"modalities": {"flair": "flair.nii.gz"}}}
    recipe |= {"processor": {"modalities": ["flair"], "size": [8, 8]}, "split": {"fractions": {"test": 1.0}}}
    with pytest.warns(
        UserWarning, match=r"2 folders .* hold no file flair.nii.gz, and are no subjects: c, d \(empty\)"
    ):
        failures = prepare_recipe(recipe, tmp_path / "raw", tmp_path / "set", progress=False)
    assert failures == {"1 files": "an image must be in the folder of its subject: b_flair.nii.gz."}
    assert "b_flair" not in (tmp_path / "set" / "README.md").read_text()

    touch(tmp_path, "classes/good/a.png", "classes/good/b.tif", "classes/good/deep/c.png", "classes/d.png")
    write(tmp_path / "classes/groups.csv", "file,group\ngood/a.png,g\ngood/gone.png,g\n")
    with pytest.warns(LeftOut) as warned:
        read_image_folders(tmp_path / "classes", ["good"], "groups.csv")
    folder = "a picture (.png, .jpg, .jpeg) must be in the folder of its class"
    assert left_out(warned) == [
        f"Left out 3 files: {folder}: d.png, b.tif, c.png.",
        f"Left out 1 rows: {tmp_path}/classes/groups.csv lists them, and they are not in {tmp_path}/classes: good/gone.png.",
    ]

    bids_tree(tmp_path / "bids", "a", "b")
    (tmp_path / "bids/sub-2/anat/sub-2_T1w.nii.gz").rename(tmp_path / "bids/sub-2/anat/sub-2_T2w.nii.gz")
    write(tmp_path / "bids/participants.tsv", "participant_id\nsub-1\nsub-2\nsub-3\n")
    with pytest.warns(UserWarning) as warned:
        read_bids(tmp_path / "bids", {"t1": "anat/*_T1w.nii.gz"})
    assert "1 sessions hold no file anat/*_T1w.nii.gz, and are no subjects: sub-2." in str(warned[0].message)
    assert left_out(warned)[0].endswith("has no folder of them: sub-3.")


def test_slices_that_do_not_belong_together(tmp_path):
    for name in ("a", "b"):
        for number in (1, 2):
            touch(tmp_path, f"{name}/{name}_{number}.tif", f"{name}/{name}_{number}_mask.tif")
    touch(tmp_path, "a/a_3_mask.tif", "b/b_02.tif", "other/x.txt")
    with pytest.warns(UserWarning, match="1 folders in .* hold no slices .* and are no subjects: other"):
        one, other = read_picture_stacks(tmp_path, {"flair": 0})
    with pytest.raises(ValueError, match=r"Subject a has no picture .* of the masks \[3\]"):
        one.masks[0].read()
    with pytest.raises(ValueError, match="Subject b has slice 2 twice: b_02.tif and b_2.tif"):
        other.volume.read()
    touch(tmp_path, "c/c_1.tif", "c/c_123456789012345.tif")
    stack = read_picture_stacks(tmp_path, {"flair": 0}, masks=None)[-1].volume
    assert isinstance(stack, Missing) and stack.reason.startswith(
        "Subject c has no slices 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and"
    )
    with pytest.raises(ValueError, match="`modalities.flair` must be an integer of at least 0, got '1'"):
        read_picture_stacks(tmp_path, {"flair": "1"})


def test_names_that_mean_something_in_patterns(tmp_path):
    touch(tmp_path, "{x}*/{x}*_1.tif", "{x}*/{x}*_2.tif", "b/b_1.tif")
    assert [subject.name for subject in read_picture_stacks(tmp_path, {"a": 0}, masks=None)] == ["b", "{x}*"]
    touch(tmp_path, "s/{subject}/7.png")
    (subject,) = read_file_patterns(tmp_path, {"i": "s/{site}/{subject}.png"}, name="{site}-{subject}")
    assert subject.name == "{subject}-7"


# --- names are no paths


@pytest.mark.parametrize("name", ["../../x", "/abs/x", "a/../b", "", ".", "a\0b", "a\nb", "a\\b", "a" * 300, "\udcff"])
def test_names_of_subjects(tmp_path, name):
    with pytest.raises(ValueError, match="[Tt]he name of a subject must be"):
        Subject(name, Path("a.png"))
    crop = {"image": np.ones((2, 2)), "masks": [], "series_uid": "1"}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({name: crop}))
    with pytest.raises(ValueError, match="[Tt]he name of a subject must be"):
        read_crop_pickles(tmp_path)


@pytest.mark.parametrize("path", ["/../x.nii.gz", "../x.nii.gz", "/Train/../../x.nii.gz", ""])
@pytest.mark.parametrize("column", ["img_path", "mask_path", "seg_path"])
def test_rows_of_tables_that_lead_out_of_the_root(tmp_path, path, column):
    row = {"img_name": "a_t1.nii.gz", "img_path": "/a.nii.gz", "mask_path": "/m.nii.gz", "seg_path": "", column: path}
    write(tmp_path / "raw/splits/t.csv", ",".join(row) + "\n" + ",".join(row.values()) + "\n")
    if column == "seg_path" and not path:
        assert read_split_tables(tmp_path / "raw", "t1", {"test": ["t"]})[0].masks == ()
        return
    with pytest.raises(ValueError, match=f"The name of a file in `{column}` of the table t, row a_t1.nii.gz, must be"):
        read_split_tables(tmp_path / "raw", "t1", {"test": ["t"]})


def test_tables_that_lead_out_of_the_root(tmp_path):
    write(tmp_path / "t.csv", "img_name,img_path,mask_path\na,a,a\n")
    (tmp_path / "raw/splits").mkdir(parents=True)
    with pytest.raises(ValueError, match="The name of a table in `splits` must be"):
        read_split_tables(tmp_path / "raw", "t1", {"test": ["../../t"]})
    rows = "img_name,img_path,mask_path,label\na,a,a,0\na,a,a,1\n"
    write(tmp_path / "raw/splits/t.csv", rows)
    with pytest.raises(ValueError, match="The table t gives a another label than an earlier row"):
        read_split_tables(tmp_path / "raw", "t1", {"test": ["t"]})


def test_names_of_modalities_and_of_pictures(tmp_path):
    for name in ("a--b", "a/b"):
        volumes_of(tmp_path / "raw", name)
    recipe = {
        "reader": "file_patterns",
        "reader_options": {"modalities": {"../x": "**/flair.nii.gz"}},
        "processor": {"modalities": ["../x"], "size": [8, 8]},
    }
    with pytest.raises(ValueError, match="The name of a modality must be"):
        prepare_recipe(
            recipe | {"reader_options": {"modalities": {"../x": "{subject}/flair.nii.gz"}}},
            tmp_path / "raw",
            tmp_path / "o",
        )
    recipe["processor"] = {"modalities": ["flair"], "size": [8, 8]}
    recipe |= {"reader": "annotated_folders", "split": {"fractions": {"test": 1.0}}}
    recipe["reader_options"] = {"modalities": {"flair": "flair*"}, "annotations": ["les*"]}
    with pytest.raises(ValueError, match="must differ in more than / and --, which a--b, a/b do not"):
        prepare_recipe(recipe, tmp_path / "raw", tmp_path / "o", progress=False)


# --- sizes are checked before memory is taken


def write_array(path, shape, content=b"", dtype="<f4", key="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"{'descr': '%s', 'fortran_order': False, 'shape': %s, }" % (dtype.encode(), repr(shape).encode())
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        ((1, 1, 10**6, 10**6), b"", "would have 1000000000000 voxels, and"),
        ((1, 1, 2, 2), b"", r"truncated or damaged: `x` has the shape \(1, 1, 2, 2\), and 0 bytes"),
        ((1, 1, 2, 2), bytes(17), r"truncated or damaged: `x` has the shape \(1, 1, 2, 2\), and 17 bytes"),
    ],
)
def test_arrays_that_claim_what_they_do_not_hold(tmp_path, shape, content, message):
    write_array(tmp_path / "p/slice_1.npz", shape, content)
    (subject,) = read_array_stacks(tmp_path, {"flair": 0}, mask=None)
    with pytest.raises(ValueError, match=message):
        subject.volume.read()


def test_arrays_and_pictures_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("ANODIFF_MAX_VOXELS", "31")
    for number in (1, 2):
        write_array(tmp_path / f"arrays/p/slice_{number}.npz", (1, 1, 4, 4), bytes(64))  # little as a file
        save_picture(tmp_path / f"pictures/p/p_{number}.tif", np.ones((4, 4)))
    (arrays,) = read_array_stacks(tmp_path / "arrays", {"flair": 0}, mask=None)
    (pictures,) = read_picture_stacks(tmp_path / "pictures", {"flair": 0}, masks=None)
    for stack in (arrays.volume, pictures.volume):
        with pytest.raises(ValueError, match="and the slices beside it would have 32 voxels, and 31 are the limit"):
            stack.read()
    monkeypatch.setenv("ANODIFF_MAX_VOXELS", "32")
    assert arrays.volume.read().shape == pictures.volume.read().shape == (4, 4, 2)


class Made:
    """Becomes what `call` returns when the pickle is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "array",
    [
        Made(np.ndarray, (10**6, 10**6), np.dtype("u1"), b"x", 0, (0, 0)),
        Made(np.empty(1).__reduce__()[0], np.ndarray, (10**5, 10**5), b"b"),
    ],
)
def test_pickles_that_claim_what_they_do_not_hold(tmp_path, array):
    crop = {"image": array, "masks": [], "series_uid": "1"}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"a": crop}))
    with pytest.raises(
        ValueError, match="claims arrays that are larger than the file|must be arrays of two dimensions"
    ):
        read_crop_pickles(tmp_path)


def test_a_pickle_may_use_one_array_for_many_masks(tmp_path):
    empty = np.zeros((64, 64))
    crop = {"image": np.ones((64, 64)), "masks": [empty] * 100, "series_uid": 1}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"a": crop}))
    (subject,) = read_crop_pickles(tmp_path)
    assert len({id(mask.array) for mask in subject.masks}) == 1 and len(subject.masks) == 100
    crop["image"] = np.array([["a"]])
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"a": crop}))
    with pytest.raises(ValueError, match="arrays of two dimensions, of numbers"):
        read_crop_pickles(tmp_path)


def test_slices_with_an_orientation_are_read_upright(tmp_path):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "p").mkdir()
    PIL.Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "p/p_1.png", exif=exif)
    (subject,) = read_picture_stacks(tmp_path, {"image": 0}, pictures="{subject}_{slice}.png", masks=None)
    np.testing.assert_array_equal(subject.volume.read().arrays["image"][..., 0].T, upright)
