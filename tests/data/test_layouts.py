"""Public data sets as they come from the download: trees with their real names, of small phantoms, through the packaged recipes."""

import base64
import csv
import os
import pickle
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from anodiff.data.phantoms.brains import make_subject
from anodiff.data.prepare import prepare_recipe, read_recipe
from anodiff.data.prepared import load_prepared
from anodiff.data.readers.arrays import read_array_stacks, read_crop_pickles, read_picture_stacks
from anodiff.data.readers.files import read_bids, read_file_patterns
from anodiff.data.readers.listing import Missing
from anodiff.data.readers.subjects import read_volume_folders


@pytest.fixture(scope="module")
def brain():
    """One phantom: 24 x 29 x 23 voxels of 8 mm."""
    return make_subject(3, lesion="tumour", anatomy="geometric", spacing=8.0)


def save(path, array, affine, orientation="RAS"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    there = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
    nib.save(image.as_reoriented(there), path)


def write_brain(brain, files, orientation="RAS", lesion=True):
    """`files`: what to what file; `lesion=False` leaves the mask empty."""
    for what, path in files.items():
        if what == "lesion":
            array = brain.lesion if lesion else np.zeros_like(brain.lesion)
        else:
            array = brain.brain if what == "brain" else 400 * brain.images[what]
        save(path, array, brain.affine, orientation)


def prepare(name, root, out, size=(32, 32), **changes):
    recipe = read_recipe(name)
    if size and recipe["processor"].get("resize") != "torchio":
        recipe["processor"]["size"] = list(size)
    recipe |= changes
    failures = prepare_recipe(recipe, root, out, progress=False)
    splits = [split for split in ("train", "validation", "test") if list((out / "data").glob(f"{split}-*"))]
    return failures, {split: load_prepared(out, split) for split in splits}


def rows_of(splits):
    """All subjects of all splits: name to row of `subjects.parquet`."""
    return {name: row for split in splits.values() for name, row in split.subject_info.items()}


FEW = {"fractions": {"train": 0.5, "validation": 0.25, "test": 0.25}}


# --- patterns


def test_atlas_v2(brain, tmp_path):
    """Odd orientations, an empty mask, a missing mask, one subject twice."""
    names = {"r001s001": "RAS", "r001s002": "LPS", "r009s003": "PSR", "r009s004": "SRA", "r009s005": "RAS"}
    for name, orientation in names.items():
        for session in ("ses-1", "ses-2") if name == "r001s002" else ("ses-1",):
            stem = f"sub-{name}_{session}_space-MNI152NLin2009aSym_"
            folder = tmp_path / "raw" / "Training" / name[:4].upper() / f"sub-{name}" / session / "anat"
            files = {"t1": folder / f"{stem}T1w.nii.gz", "lesion": folder / f"{stem}label-L_desc-T1lesion_mask.nii.gz"}
            write_brain(brain, files, orientation, lesion=name != "r009s003")
    files["lesion"].unlink()
    (folder / f"._{stem}T1w.nii.gz").touch()  # what a Mac leaves in archives
    failures, splits = prepare("atlas_v2", tmp_path / "raw", tmp_path / "set", split=FEW)
    assert list(failures) == ["sub-r009s005_ses-1"]
    assert failures["sub-r009s005_ses-1"].startswith("Subject sub-r009s005_ses-1: there is no file ")
    assert "label-L_desc-T1lesion_mask.nii.gz." in failures["sub-r009s005_ses-1"]
    rows = rows_of(splits)
    assert len(rows) == 5 and {row["site"] for row in rows.values()} == {"R001", "R009"}
    assert {name: row["label"] for name, row in rows.items() if row["label"] != 1} == {"sub-r009s003_ses-1": 0}
    twice = [rows[f"sub-r001s002_ses-{number}"] for number in (1, 2)]
    assert twice[0]["group"] == twice[1]["group"] == "sub-r001s002" and twice[0]["split"] == twice[1]["split"]
    # The same brain in every orientation: the network sees the same slices.
    found = {name: split.read_subject(name) for split in splits.values() for name in split.subjects}
    first = found.pop("sub-r001s001_ses-1")
    assert first["mask"].any()
    for name, other in found.items():
        np.testing.assert_allclose(other["image"], first["image"], atol=1e-5)
        if "r009s003" not in name:
            np.testing.assert_array_equal(other["mask"], first["mask"])


# Two people of IXI.xls, one of them twice, one without age: what `xlwt` writes for these rows.
SHEET = (
    r"c-rk)O=uHA6#i!OADT29Q?V6FC|LWGODm`c(^xTv94z$*3?kITMv%r-f)~A5tvL#UCx0%5Uc6Mj_=5_1^B_d@AP7REM^B=Hhc@e*x4Sj1K^oBF&w"
    r"OFNdGqGIotK?Av$Ol6qR-FV>8N4_hTuTW@WEZD6I6V5BLwO<3@O^Rmx`hASHb6{iFCX0F!0<X=TOdf6&h|kpArM_s2ss5j7%2u(KW;_jv*^#3~^$"
    r"C8>9)MoudjfA7fs}e2Xm~G4Eu}CFVHU&WppSBu4tSTUngZy0|Y0dEI;L^M*A8Xu~s^#pf;y)7FLI(ur*0&+O=QwqO=CZ>fASU&<Ed5upj3#TO$Ae"
    r"70BWlc>_KtzLliUzh7W4fIzuCol!$C?|Ls0aP5a$AyF0Tp_=Je#o}NT$kxgdMv$L2M#1NBt&}#;wNL#!T9lBG8j%J{c?Ne<s4eJoCBQZEyUw!Wm)"
    r"HB57CCbaP#BKy}8lE7;C0@3pY3VO)@qZI4?cOIS4Z{SON91M?dogzUoGnJD4M6Np<&Vn<ea-W}A!L+fCzaVZ2Igu9JI6E`Qi}zq9;4(M$4Ns(Lmu"
    r"_c}3yE_(2clfV2;BPL?v+Es}M3A+~7rtp@z{f7<0tA(uC4eM#vibeQY)S1neygOp4rCIk%dW#j_kFkMuI$PTOX`A$t_F4mbjco>*-OSf_*!GSF_K"
    r"u&}J2}33`!MTtY+bS!7}CPHD~F|R@jLubP*6}%P*6}%_%9*&5NRIioz?+g9vnT^cb!ElHT9X~pT&Mm((g3Am?lxAx`Z=L<<EM!gnccsN+0`sp~N8"
    r"?y@UzmIF5;?^Os)wME(C+wPWblEum(|uQe0rZyx^}@RZFA"
)
SHEET_ROWS = [["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"], [2, 2, 35.8], [12, 1, 38.78], [12, 1, 38.78], [13, 1, ""]]


@pytest.mark.parametrize("table", ["IXI.xls", "IXI.csv"])
@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_ixi(brain, tmp_path, modality, table):
    if table == "IXI.xls":
        pytest.importorskip("xlrd", reason="the extra `preprocess` is not installed")
    root, word = tmp_path / "raw", modality.upper()
    for name in ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI012-HH-1300", "IXI013-IOP-1212", "IXI014-HH-1236"):
        write_brain(brain, {modality: root / f"IXI-{word}" / f"{name}-{word}.nii.gz"}, "PSR")
    if table == "IXI.xls":
        (root / table).write_bytes(zlib.decompress(base64.b85decode(SHEET)))
    else:
        with open(root / table, "w", newline="") as file:
            csv.writer(file).writerows(SHEET_ROWS)
    options = read_recipe(f"ixi_{modality}")["reader_options"] | {"ages": table}
    failures, splits = prepare(f"ixi_{modality}", root, tmp_path / "set", split=FEW, reader_options=options)
    assert failures == {}
    rows = rows_of(splits)
    assert {name: (row["age"], row["site"], row["group"]) for name, row in rows.items()} == {
        "IXI002-Guys-0828": (35.8, "Guys", "IXI002"),
        "IXI012-HH-1211": (38.78, "HH", "IXI012"),
        "IXI012-HH-1300": (38.78, "HH", "IXI012"),
        "IXI013-IOP-1212": (None, "IOP", "IXI013"),
        "IXI014-HH-1236": (None, "HH", "IXI014"),
    }
    assert all(not split.labels.any() for split in splits.values()) and len(splits["train"]) > 0
    image = splits["train"][:]["image"]
    assert image.shape[1:] == (1, 32, 32) and image.max() == 1


def test_mslub(brain, tmp_path):
    for number in range(1, 5):
        folder, prefix = tmp_path / "raw" / f"patient{number:02d}", f"patient{number:02d}_" if number > 1 else ""
        kinds = {"flair": "FLAIR", "t1": "T1W", "t2": "T2W", "lesion": "consensus_gt", "brain": "brainmask"}
        write_brain(brain, {what: folder / f"{prefix}{kind}.nii.gz" for what, kind in kinds.items()}, "LAS")
    failures, splits = prepare("mslub_flair", tmp_path / "raw", tmp_path / "set")
    assert failures == {} and {name: len(split.subjects) for name, split in splits.items()} == {
        "validation": 1,
        "test": 3,
    }
    rows = splits["test"].read_subject(splits["test"].subjects[0])
    assert rows["mask"].any() and (rows["image"][~rows["brain"][:, None]] <= 1).all()


def test_wmh(brain, tmp_path):
    other = np.where(np.arange(brain.lesion.shape[0])[:, None, None] % 2, 2 * (brain.lesion > 0), brain.lesion > 0)
    brain = replace(brain, lesion=other.astype(np.uint8))  # 2 is other pathology
    scans = (
        "training/Utrecht/0",
        "training/Amsterdam/GE3T/100",
        "test/Singapore/51",
        "test/Amsterdam/Philips_VU .PETMR_01./160",
    )
    for scan in scans:
        folder = tmp_path / "raw" / scan
        write_brain(brain, {"flair": folder / "pre" / "FLAIR.nii.gz", "lesion": folder / "wmh.nii.gz"}, "RAS")
        write_brain(brain, {"flair": folder / "orig" / "FLAIR.nii.gz"})
    save(
        tmp_path / "raw/additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz",
        brain.lesion,
        brain.affine,
    )
    failures, splits = prepare("wmh_flair", tmp_path / "raw", tmp_path / "set")
    assert failures == {}
    assert splits["validation"].subjects == ["GE3T_100", "Utrecht_0"]
    assert splits["test"].subjects == ["Philips_VU .PETMR_01._160", "Singapore_51"]
    assert splits["test"].subject_info["Singapore_51"]["site"] == "Singapore"
    rows = splits["test"].read_subject("Singapore_51")
    assert rows["mask"].sum() > 0 and rows["label"].any() and not rows["label"].all()


def write_shifts(brain, root, modalities=("flair",)):
    parts = ("shifts_ms_pt1/msseg", "shifts_ms_pt2/best", "shifts_ms_pt1/ljubljana")
    for part, splits in zip(
        parts, (("train", "dev_in", "unsupervised"), ("train", "eval_in"), ("dev_out",)), strict=True
    ):
        for split in splits:
            folder = root / part / split
            files = {name: folder / name / f"1_{name.upper()}_isovox.nii.gz" for name in modalities}
            if split != "unsupervised":
                files |= {"lesion": folder / "gt" / "1_gt_isovox.nii.gz"}
                files |= {"brain": folder / "fg_mask" / "1_isovox_fg_mask.nii.gz"}
            write_brain(brain, files)


def test_shifts(brain, tmp_path):
    write_shifts(brain, tmp_path / "raw")
    failures, splits = prepare("shifts_ms", tmp_path / "raw", tmp_path / "set")
    assert failures == {}
    assert {name: split.subjects for name, split in splits.items()} == {
        "train": ["best_train_1", "msseg_train_1"],
        "validation": ["msseg_dev_in_1"],
        "test": ["best_eval_in_1", "ljubljana_dev_out_1"],
    }
    assert splits["test"].subject_info["ljubljana_dev_out_1"]["site"] == "ljubljana"
    assert not splits["train"].labels.any() and splits["test"].labels.any()


def test_shifts_as_andi_prepares_it(brain, tmp_path):
    """Registration and histograms: the correction itself has tests of its own."""
    pytest.importorskip("SimpleITK", reason="the extra `preprocess` is not installed")
    t1ce = replace(brain, images={**brain.images, "t1ce": 1.2 * brain.images["t1"]})
    write_shifts(t1ce, tmp_path / "raw", ("flair", "t1", "t1ce", "t2"))
    moved = brain.affine.copy()
    moved[:3, 3] += (6, -5, 4)
    save(tmp_path / "T1_brain.nii", brain.images["t1"], moved)
    for name, image in t1ce.images.items():
        save(tmp_path / "BraTS2021_00000" / f"BraTS2021_00000_{name}.nii.gz", 3 * image, brain.affine)
    save(tmp_path / "BraTS2021_00000" / "notes.nii.gz", brain.lesion, brain.affine)
    recipe = read_recipe("shifts_andi")
    recipe["processor"]["size"] = [32, 32]
    recipe["reader_options"]["splits"] = {"dev_in": "validation", "dev_out": "test"}
    files = {"template": tmp_path / "T1_brain.nii", "reference": tmp_path / "BraTS2021_00000"}
    assert prepare_recipe(recipe, tmp_path / "raw", tmp_path / "set", progress=False, **files) == {}
    test = load_prepared(tmp_path / "set", "test")
    row = test.subject_info["ljubljana_dev_out_1"]
    np.testing.assert_allclose(np.reshape(row["affine"], (4, 4)), moved, atol=1e-3)
    assert test[:]["image"].shape[1:] == (4, 32, 32) and test[:]["mask"].any()


def test_ixi_as_the_authors_of_cddpm_prepare_it(brain, tmp_path):
    pytest.importorskip("SimpleITK", reason="the extra `preprocess` is not installed")
    for number in (1, 2):
        write_brain(brain, {"t2": tmp_path / "raw" / "IXI-T2" / f"IXI00{number}-HH-0828-T2.nii.gz"}, "LPS")
    (tmp_path / "raw" / "IXI.csv").write_text("IXI_ID,AGE\n1,20.5\n")
    save(tmp_path / "T1_brain.nii", brain.images["t1"], brain.affine)
    recipe = read_recipe("cddpm_ixi_t2")
    assert recipe["correction"].pop("skull_strip") == "hd-bet"  # a program of its own
    recipe["correction"]["n4"] = 2
    recipe["reader_options"]["ages"] = "IXI.csv"
    # The phantom has voxels of 8 mm and no mask of the brain.
    recipe["processor"] |= {"crop": [24, 24, 12], "size": [12, 12], "brain_mask": "nonzero"}
    recipe["split"] = {"fractions": {"train": 1.0}}
    template = tmp_path / "T1_brain.nii"
    assert prepare_recipe(recipe, tmp_path / "raw", tmp_path / "set", template=template, progress=False) == {}
    train = load_prepared(tmp_path / "set", "train")
    assert train[:]["image"].shape[1:] == (1, 12, 12) and not train.labels.any()


def test_nfbs_and_the_reduced_tree_of_atlas(brain, tmp_path):
    """AnoDDPM's and AnoFPDM's: one recipe with crop and slice numbers of 256 x 256 x 192 voxels, one with the authors' names."""
    for name in ("A00028185", "A00028352", "A00032875"):
        stem = tmp_path / "NFBS" / name / f"sub-{name}_ses-NFB3_T1w"
        write_brain(brain, {"t1": Path(f"{stem}.nii.gz"), "brain": Path(f"{stem}_brainmask.nii.gz")}, "PIR")
        save(Path(f"{stem}_brain.nii.gz"), brain.images["t1"], brain.affine, "PIR")
        folder = tmp_path / "ATLAS" / f"r001{name}"
        files = {"t1": folder / f"r001{name}_T1w.nii.gz", "lesion": folder / f"r001{name}_mask.nii.gz"}
        write_brain(brain, files, "SRA")
    third = {"fractions": {"train": 0.34, "validation": 0.33, "test": 0.33}}
    small = read_recipe("anoddpm_nfbs")["processor"] | {"crop": [26, 26]}
    failures, splits = prepare(
        "anoddpm_nfbs", tmp_path / "NFBS", tmp_path / "a", split=third, processor=small, slices={}
    )
    assert failures == {} and [len(split.subjects) for split in splits.values()] == [1, 1, 1]
    assert len(splits["train"]) == 23 and splits["train"].subject_info.keys() < {"A00028185", "A00028352", "A00032875"}
    failures, splits = prepare("atlas_anofpdm", tmp_path / "ATLAS", tmp_path / "b", split=third)
    assert failures == {} and all(split.labels.any() for split in splits.values())


def pattern_tree(root):
    for file in (
        "a/1_t1.nii",
        "a/1_t2.nii",
        "b/1_t1.nii",
        "b/2_t1.nii",
        "b/2_t2.nii",
        "b/2_t2_again.nii",
        "c/3_t2.nii",
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return {"t1": "{site}/{subject}_t1.nii", "t2": "{site}/{subject}_t2*.nii"}


def test_what_patterns_do_not_find_is_told_when_it_is_read(tmp_path):
    subjects = read_file_patterns(tmp_path, pattern_tree(tmp_path), name="{site}-{subject}")
    assert [subject.name for subject in subjects] == ["a-1", "b-1", "b-2", "c-3"]
    assert subjects[0].volume == {"t1": tmp_path / "a/1_t1.nii", "t2": tmp_path / "a/1_t2.nii"}
    reasons = [file.reason for subject in subjects for file in subject.volume.values() if isinstance(file, Missing)]
    assert reasons == [
        f"Subject b-1: there is no file {tmp_path}/b/1_t2*.nii.",
        "Subject b-2: one file must be b/2_t2*.nii, there are b/2_t2.nii, b/2_t2_again.nii.",
        f"Subject c-3: there is no file {tmp_path}/c/3_t1.nii.",
    ]
    with pytest.raises(ValueError, match="Subject b-1: there is no file"):
        subjects[1].volume["t2"].read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Two subjects are called 1: .* Put more fields into `name` \\(site, subject\\)"),
        ({"masks": ["{site}/{scan}.nii"]}, "`masks` has the field scan; the fields of `modalities` are site, subject"),
        ({"name": "{who}"}, "`name` has the field who"),
        ({"healthy": ["a"]}, "`healthy` needs the field {class}"),
        ({"splits": {"a": "train"}}, "`splits` needs the field {split}"),
        ({"missing_masks": "no"}, "`missing_masks` must be one of error, healthy, unknown, got 'no'"),
        ({"modalities": {"t1": "{site}/{subject}.nii", "t2": "{subject}.nii"}}, "must all have the same fields"),
        ({"modalities": {"t1": "{subject}.mgz"}}, r"No file in .* is \{subject\}.mgz; there are a, ages.csv, b, c"),
        ({"modalities": {"t1": "{split}/{subject}_t1.nii"}}, "The split 'a' in .* say in `splits` what it is"),
        (
            {"modalities": {"t1": "{split}/{subject}_t1.nii"}, "splits": {"z": "test"}},
            "names none of the splits .* a, b",
        ),
        ({"modalities": {"t1": "{split}/{subject}_t1.nii"}, "splits": {"a": "try"}}, "must lead to train, .* got try"),
        ({"name": "{site}{subject}", "ages": "ages.csv"}, "has no column age; it has subject, years"),
    ],
)
def test_wrong_patterns(tmp_path, options, message):
    options = {"modalities": pattern_tree(tmp_path), **options}
    (tmp_path / "ages.csv").write_text("subject,years\n1,2\n")
    with pytest.raises(ValueError, match=message):
        read_file_patterns(tmp_path, **options)


def test_a_missing_table_and_one_that_contradicts_itself(tmp_path):
    options = {"modalities": pattern_tree(tmp_path), "name": "{site}-{subject}", "ages": "ages.tsv"}
    with pytest.raises(FileNotFoundError, match="`ages`: there is no file .*ages.tsv"):
        read_file_patterns(tmp_path, **options)
    (tmp_path / "ages.tsv").write_text("subject\tage\n01\t31\n1\t32\n2\t40.5\n")
    with pytest.warns(UserWarning, match="different ages, which are left out, of 1"):
        subjects = read_file_patterns(tmp_path, **options)
    assert [subject.age for subject in subjects] == [None, None, 40.5, None]
    (tmp_path / "ages.xls").write_text("no spreadsheet")
    pytest.importorskip("xlrd", reason="the extra `preprocess` is not installed")
    with pytest.raises(ValueError, match="ages.xls cannot be read as a spreadsheet"):
        read_file_patterns(tmp_path, **{**options, "ages": "ages.xls"})


def test_classes_of_pictures(tmp_path):
    """The layout of MVTec: healthy pictures have no mask."""
    for file in ("train/good/000.png", "test/good/000.png", "test/crack/000.png", "truth/crack/000_mask.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / file)
    subjects = read_file_patterns(
        tmp_path,
        {"image": "{split}/{class}/{subject}.png"},
        masks=["truth/{class}/{subject}_mask.png"],
        name="{split}-{class}-{subject}",
        splits={"train": "train", "test": "test"},
        healthy=["good"],
        missing_masks="healthy",
    )
    assert [(subject.name, subject.split, subject.label, len(subject.masks)) for subject in subjects] == [
        ("test-crack-000", "test", 1, 1),
        ("test-good-000", "test", 0, 0),
        ("train-good-000", "train", 0, 0),
    ]


def test_pictures_with_masks(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "raw" / "masks").mkdir(parents=True)
    (tmp_path / "raw" / "images").mkdir()
    for index in range(8):
        name = f"scan{index}.png"
        PIL.Image.fromarray(rng.integers(0, 255, (20, 16), dtype=np.uint8)).save(tmp_path / "raw" / "images" / name)
        if index % 2:
            mask = np.zeros((20, 16), np.uint8)
            mask[2:8, 3:7] = 255 * (index != 7)  # one of them empty
            PIL.Image.fromarray(mask).save(tmp_path / "raw" / "masks" / name)
    failures, splits = prepare("generic_image_masks", tmp_path / "raw", tmp_path / "set", size=(20, 16), split=FEW)
    assert failures == {}
    rows = rows_of(splits)
    assert {name: row["label"] for name, row in rows.items()} == {f"scan{k}": int(k in (1, 3, 5)) for k in range(8)}
    assert {name for name, row in rows.items() if row["annotations"]} == {f"scan{k}" for k in (1, 3, 5, 7)}
    assert not splits["train"].labels.any()
    marked = next(name for name in rows if rows[name]["label"] and rows[name]["rows"])
    mask = splits[rows[marked]["split"]].read_subject(marked)["mask"][0, 0]
    assert mask.sum() == 24 and mask[2:8, 3:7].all()


# --- BIDS


def write_bids(brain, root):
    root.mkdir()
    rows = [
        "participant_id\tage\tsite\tgroup",
        "sub-01\t31\tA\tcontrol",
        "sub-02\t52.5\tB\tpatient",
        "sub-03\tn/a\tB\tn/a",
    ]
    (root / "participants.tsv").write_text("\n".join([*rows, "04\t40\tA\tcontrol", "sub-05\t41\tA\tcontrol"]))
    sessions = ("sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1", "sub-03", "sub-04", "sub-05/ses-1")
    for session in sessions:
        stem = session.replace("/", "_")
        for pipeline in ("lesions", "masks"):
            folder = root / "derivatives" / pipeline / session / "anat"
            if pipeline == "masks":
                write_brain(brain, {"brain": folder / f"{stem}_desc-brain_mask.nii.gz"}, "LPI")
            elif session == "sub-02/ses-1":
                write_brain(brain, {"lesion": folder / f"{stem}_label-lesion_mask.nii.gz"}, "LPI")
        write_brain(brain, {"t1": root / session / "anat" / f"{stem}_T1w.nii.gz"}, "LPI")
    write_brain(brain, {"flair": root / "sub-05/ses-2/anat/sub-05_ses-2_FLAIR.nii.gz"})  # no T1: not a subject
    write_brain(brain, {"t1": root / "sub-04/anat/sub-04_run-2_T1w.nii.gz"})  # two: which one?


def test_bids(brain, tmp_path):
    root = tmp_path / "raw"
    write_bids(brain, root)
    failures, splits = prepare("generic_bids", root, tmp_path / "set", split={**FEW, "seed": 9})
    place = "sub-04/anat/"
    assert failures == {
        "sub-04": f"Subject sub-04: one file must be {place}*_T1w.nii.gz, there are {place}sub-04_T1w.nii.gz,"
        f" {place}sub-04_run-2_T1w.nii.gz."
    }
    rows = rows_of(splits)
    assert {
        name: (row["age"], row["site"], row["label"], row["annotations"], row["group"]) for name, row in rows.items()
    } == {
        "sub-01_ses-1": (31, "A", 0, 0, "sub-01"),
        "sub-01_ses-2": (31, "A", 0, 0, "sub-01"),
        "sub-02_ses-1": (52.5, "B", 1, 1, "sub-02"),
        "sub-03": (None, "B", -1, 0, "sub-03"),
        "sub-05_ses-1": (41, "A", 0, 0, "sub-05"),
    }
    assert rows["sub-01_ses-1"]["split"] == rows["sub-01_ses-2"]["split"]
    assert splits["test"].read_subject("sub-02_ses-1")["mask"].any()


def test_wrong_bids(brain, tmp_path):
    root = tmp_path / "raw"
    write_bids(brain, root)
    modalities = {"t1": "anat/*_T1w.nii.gz"}
    with pytest.raises(ValueError, match="has no column diagnosis; it has participant_id, age, site, group"):
        read_bids(root, modalities, label_column="diagnosis", healthy=["control"])
    with pytest.raises(ValueError, match="`label_column` and `healthy` belong together"):
        read_bids(root, modalities, label_column="group")
    with pytest.raises(
        ValueError, match="holds a file anat/.*_PD.nii.gz; there are derivatives, participants.tsv, sub-01"
    ):
        read_bids(root, {"pd": "anat/*_PD.nii.gz"})
    (root / "participants.tsv").write_text("participant_id\tgroup\nsub-01\tcontrol\n")
    with pytest.raises(ValueError, match="participants.tsv does not list sub-02"):
        read_bids(root, modalities, label_column="group", healthy=["control"])
    (root / "participants.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="there is no file .*participants.tsv"):
        read_bids(root, modalities, label_column="group", healthy=["control"])
    assert {subject.label for subject in read_bids(root, modalities)} == {None}


# --- slices in files of their own


def write_kaggle(root, name, count=7, pre=True, size=(24, 20), tumour=True):
    rng = np.random.default_rng(len(name))
    (root / name).mkdir(parents=True)
    for number in range(1, count + 1):
        picture = rng.integers(40, 200, (*size, 3), dtype=np.uint8)
        picture[:4] = 0
        picture[10, 5] = (0, 10 * number, 0)  # tells slices apart
        if not pre:
            picture[..., 0] = picture[..., 1]
        mask = np.zeros(size, np.uint8)
        if tumour and number > 4:
            mask[8:14, 3:9] = 255
        PIL.Image.fromarray(picture).save(root / name / f"{name}_{number}.tif")
        PIL.Image.fromarray(mask).save(root / name / f"{name}_{number}_mask.tif")


def test_tcga_lgg_of_kaggle(tmp_path):
    root = tmp_path / "kaggle_3m"
    names = ["TCGA_CS_4941_19960909", "TCGA_CS_4942_19970222", "TCGA_DU_5849_19950405", "TCGA_DU_5851_19950428"]
    for name in names:
        write_kaggle(root, name, count=12, pre="5849" not in name, tumour="5851" not in name)
    (root / "data.csv").write_text("Patient\n")
    write_kaggle(root, "TCGA_HT_7473_19970826")
    (root / "TCGA_HT_7473_19970826" / "TCGA_HT_7473_19970826_3.tif").unlink()
    failures, splits = prepare(
        "tcga_lgg_kaggle", root, tmp_path / "set", size=(24, 20), split={"fractions": {"test": 1.0}}
    )
    assert failures == {
        "TCGA_HT_7473_19970826": "Subject TCGA_HT_7473_19970826 has no slices 3 ({subject}_{slice}.tif)."
    }
    rows = splits["test"].read_subject(names[0])
    assert rows["slice"].tolist() == list(range(12)) and rows["label"].tolist() == [0] * 4 + [1] * 8
    with PIL.Image.open(root / names[0] / f"{names[0]}_10.tif") as picture:
        flair = np.asarray(picture)[..., 1].astype(float)
    # Slice 10 is the tenth and not the second, rows are rows and columns are columns.
    np.testing.assert_allclose(np.corrcoef(rows["image"][9, 0][5:].ravel(), flair[5:].ravel())[0, 1], 1, atol=0.02)
    assert rows["mask"][9, 0, 8:14, 3:9].all() and rows["mask"][9].sum() == 36
    assert splits["test"].subject_info[names[3]]["label"] == 0

    options = {"modalities": {"t1": 0}, "filler": 1}
    changes = {"processor": {"modalities": ["t1"], "size": [24, 20]}, "reader_options": options}
    failures, splits = prepare("tcga_lgg_kaggle", root, tmp_path / "t1", split={"fractions": {"test": 1.0}}, **changes)
    assert set(failures) == {names[2], "TCGA_HT_7473_19970826"}
    assert "`t1` was not taken, its channel 0 is a copy of 1." in failures[names[2]]


def test_wrong_picture_stacks(tmp_path):
    write_kaggle(tmp_path, "TCGA_A", count=2)
    (subject,) = read_picture_stacks(tmp_path, {"flair": 3})
    with pytest.raises(ValueError, match="has the channels 0 to 2, and `modalities` ask for {'flair': 3}"):
        subject.volume.read()
    PIL.Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "TCGA_A" / "TCGA_A_2.tif")
    (subject,) = read_picture_stacks(tmp_path, {"flair": 1})
    with pytest.raises(ValueError, match=r"TCGA_A_2.tif must have the shape \(24, 20, 3\)"):
        subject.volume.read()
    (tmp_path / "TCGA_A" / "TCGA_A_2.tif").write_bytes(b"II*")
    with pytest.raises(ValueError, match="TCGA_A_2.tif cannot be read, it may be truncated"):
        subject.volume.read()
    (tmp_path / "TCGA_A" / "TCGA_A_2_mask.tif").unlink()
    (subject,) = read_picture_stacks(tmp_path, {"flair": 1})
    with pytest.raises(ValueError, match=r"has no mask {subject}_{slice}_mask.tif of the slices \[2\]"):
        subject.masks[0].read()
    assert read_picture_stacks(tmp_path, {"flair": 1}, masks=None)[0].masks == ()
    with pytest.raises(ValueError, match="No folder in .* holds slices"):
        read_picture_stacks(tmp_path, {"flair": 1}, pictures="{slice}.png")
    with pytest.raises(ValueError, match="must hold the field {slice}"):
        read_picture_stacks(tmp_path, {"flair": 1}, pictures="*.png")


def test_slices_of_anofpdm_are_those_of_its_recipe(tmp_path):
    """The authors' own files of a patient and the volumes they were made of come to the same rows."""
    rng = np.random.default_rng(0)
    names = [f"BraTS2021_0000{number}" for number in range(4)]
    for name in names:
        volume = np.zeros((4, 16, 16, 9), np.float32)
        volume[:, 2:14, 3:15, 2:8] = rng.uniform(50, 900, (4, 12, 12, 6))
        seg = np.zeros((16, 16, 9), np.uint8)
        seg[5:9, 4:7, 4] = 4
        for channel, kind in enumerate(("flair", "t1", "t1ce", "t2")):
            save(tmp_path / "raw" / name / f"{name}_{kind}.nii.gz", volume[channel], np.diag([-1.0, -1, 1, 1]), "LPS")
        save(tmp_path / "raw" / name / f"{name}_seg.nii.gz", seg, np.diag([-1.0, -1, 1, 1]), "LPS")
        folder = tmp_path / "npy_train" / f"patient_{name}"
        folder.mkdir(parents=True)
        scaled = np.stack([array / np.quantile(array[array > 0], 0.99) for array in volume])
        for z in range(2, 8):
            np.savez(
                folder / f"slice_{z}.npz", x=scaled[None, ..., z], y=(seg[None, None, ..., z] > 0).astype(np.float32)
            )
    _, volumes = prepare("brats21_anofpdm", tmp_path / "raw", tmp_path / "a", size=(16, 16), split=FEW)
    failures, slices = prepare(
        "brats21_anofpdm_slices", tmp_path / "npy_train", tmp_path / "b", size=(16, 16), split=FEW
    )
    assert failures == {} and {f"patient_{name}" for name in rows_of(volumes)} == rows_of(slices).keys()
    for name in names:
        split = rows_of(volumes)[name]["split"]
        first, other = volumes[split].read_subject(name), None
        for found in slices.values():
            if f"patient_{name}" in found.subjects:
                other = found.read_subject(f"patient_{name}")
        np.testing.assert_allclose(other["image"], first["image"], atol=2e-4)
        np.testing.assert_array_equal(other["mask"], first["mask"])
        np.testing.assert_array_equal(other["label"], [0, 0, 1, 0, 0, 0])
    affine = np.reshape(rows_of(slices)["patient_BraTS2021_00000"]["affine"], (4, 4))
    np.testing.assert_array_equal(affine, [[-1.875, 0, 0, 0], [0, -1.875, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])


def test_wrong_array_stacks(tmp_path):
    (tmp_path / "p").mkdir()
    np.savez(tmp_path / "p" / "slice_1.npz", x=np.ones((1, 2, 4, 4)), y=np.array([{}], dtype=object))
    (subject,) = read_array_stacks(tmp_path, {"flair": 0, "t1": 1})
    assert subject.volume.read().shape == (4, 4, 1)
    with pytest.raises(ValueError, match="slice_1.npz cannot be read.*allow_pickle"):
        subject.masks[0].read()
    with pytest.raises(ValueError, match="holds no array `z`"):
        read_array_stacks(tmp_path, {"flair": 0}, image="z")[0].volume.read()
    with pytest.raises(ValueError, match="`x` has 2 channels, and {'flair': 2} is asked for"):
        read_array_stacks(tmp_path, {"flair": 2})[0].volume.read()
    with pytest.raises(ValueError, match="`orientation` must be three of L or R, A or P, S or I, got 'LLS'"):
        read_array_stacks(tmp_path, {"flair": 0}, orientation="LLS")


def test_folders_that_andi_writes(brain, tmp_path):
    """Masks of fractions, a list with the column Subject_ID, which is not the first."""
    root, names = (
        tmp_path / "patients",
        {"train": ["msseg_train_1", "best_train_1"], "val": ["msseg_dev_in_1"], "test": ["best_eval_in_1"]},
    )
    (root / "splits").mkdir(parents=True)
    for split, listed in names.items():
        (root / "splits" / f"scans_{split}.csv").write_text(
            "\n".join(["age,Subject_ID", *(f"3,{name}" for name in listed)])
        )
        for name in listed:
            for kind, what in {"FLAIR": "flair", "T1": "t1", "T1CE": "t1", "T2": "t2"}.items():
                save(root / name / f"1_{kind}_isovox.nii.gz", 300 * brain.images[what], brain.affine)
            save(root / name / "1_gt_isovox.nii.gz", brain.soft_lesion, brain.affine)
    failures, splits = prepare("shifts_andi_folders", root, tmp_path / "set")
    assert failures == {} and splits["train"].subjects == sorted(names["train"])
    lesion = brain.soft_lesion > 0.5
    assert 0 < lesion.sum() < (brain.soft_lesion > 0).sum()
    kept = splits["train"].read_subject("best_train_1")["slice"]
    assert not lesion[:, :, kept].any() and (brain.soft_lesion > 0)[:, :, kept].any()


def test_tables_of_wmh(brain, tmp_path):
    (tmp_path / "raw" / "splits").mkdir(parents=True)
    for table, names in {"WMH_val": "ab", "WMH_test": "c"}.items():
        rows = [",img_name,age,label,img_path,mask_path,seg_path"]
        for name in names:
            files = {kind: f"/Test/WMH/{kind}/{name}_{kind}.nii.gz" for kind in ("t1", "mask", "seg")}
            rows.append(f"0,{name}_t1.nii.gz,,1,{files['t1']},{files['mask']},{files['seg']}")
            there = {"t1": files["t1"], "brain": files["mask"], "lesion": files["seg"]}
            write_brain(brain, {what: tmp_path / "raw" / file.lstrip("/") for what, file in there.items()})
        (tmp_path / "raw" / "splits" / f"{table}.csv").write_text("\n".join(rows))
    processor = read_recipe("sadm_wmh")["processor"] | {"crop": [24, 24, 12], "size": [12, 12], "curvature_flow": 0}
    failures, splits = prepare("sadm_wmh", tmp_path / "raw", tmp_path / "set", processor=processor)
    assert failures == {} and splits["validation"].subjects == ["a", "b"] and splits["test"].subjects == ["c"]


# --- pickles


def crops(count=12, dtype=float):
    rng = np.random.default_rng(0)
    made = {}
    for index in range(count):
        masks = [np.zeros((16, 16), dtype) for _ in range(4)]
        masks[1][3:9, 2:6] = masks[2][4:9, 2:6] = 1  # two of the readers marked nothing
        made[f"crop_{index}"] = {
            "image": rng.uniform(0, 1, (16, 16)),
            "masks": masks,
            "series_uid": f"1.3.{index // 3}",
        }
    return made


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_of_lidc(tmp_path, protocol):
    (tmp_path / "raw").mkdir()
    made = crops()
    (tmp_path / "raw" / "data_lidc.pickle").write_bytes(pickle.dumps(made, protocol))
    failures, splits = prepare("lidc_pickle", tmp_path / "raw", tmp_path / "set", size=(16, 16), split=FEW)
    assert failures == {} and sum(len(split) for split in splits.values()) == 12
    rows = rows_of(splits)
    for number in range(4):
        assert len({row["split"] for row in rows.values() if row["group"] == f"1.3.{number}"}) == 1
    found = splits[rows["crop_5"]["split"]].read_subject("crop_5")
    np.testing.assert_allclose(found["image"][0, 0], made["crop_5"]["image"], atol=1e-6)
    np.testing.assert_array_equal(found["mask"][0], made["crop_5"]["masks"])
    assert rows["crop_5"]["annotations"] == 4 and rows["crop_5"]["volume_files"] == ["data_lidc.pickle"]


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda file: Runs(os.mkdir, file), "mkdir"),
        (lambda file: Runs(eval, f"open({file!r}, 'w')"), "eval"),
        (lambda file: Runs(getattr, np.ndarray, "tofile"), "getattr"),
        (lambda file: Runs(np.save, file, 1), "save"),
        (lambda file: np.array([Runs(os.mkdir, file)], dtype=object), "mkdir"),
        (lambda file: Path(file), "Path"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_runs_nothing(tmp_path, harm, named, protocol):
    harmed = tmp_path / "harmed"
    content = {**crops(1), "bad": harm(str(harmed))}
    (tmp_path / "data_lidc.pickle").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=f"data_lidc.pickle cannot be read: it holds .*{named}.*, and only arrays"):
        read_crop_pickles(tmp_path)
    assert not harmed.exists()


def test_a_pickle_may_not_use_codecs(tmp_path):
    # Bytes in protocol 2 are text through a codec; others than latin1 could unpack what they like.
    (tmp_path / "a.pickle").write_bytes(b"c_codecs\nencode\n(Vabc\nVzip\ntR.")
    with pytest.raises(ValueError, match="it asks for the codec 'zip'"):
        read_crop_pickles(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dict of crops, got list"),
        ({"a": {"image": np.ones((2, 2))}}, "the crop a must be a dict with image, masks and series_uid"),
        ({"a": {"image": np.ones((2, 2)), "masks": [np.ones(3)], "series_uid": "1"}}, "arrays of two dimensions"),
    ],
)
def test_wrong_pickles(tmp_path, content, message):
    with pytest.raises(ValueError, match="No file in .* is \\*.pickle; there are no files"):
        read_crop_pickles(tmp_path)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_crop_pickles(tmp_path)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(crops(1))[:500])
    with pytest.raises(ValueError, match="a.pickle cannot be read: pickle data was truncated"):
        read_crop_pickles(tmp_path)


# --- real data


@pytest.fixture
def test_data():
    if "ANODIFF_TEST_DATA" not in os.environ:
        pytest.skip("ANODIFF_TEST_DATA is not set: no real data")
    return Path(os.environ["ANODIFF_TEST_DATA"])


@pytest.mark.parametrize(
    ("folder", "modalities", "mask"),
    [
        ("ms_lesjak_mni", ("flair", "t1", "t2"), "lesion"),
        ("tcga_lgg_sri24", ("flair", "t1", "t2"), "lesion_manual"),
        ("tcga_lgg_sri24", ("flair",), "lesion_auto"),
    ],
)
def test_real_volumes_with_masks(test_data, tmp_path, folder, modalities, mask):
    recipe = {
        "reader": "volume_folders",
        "reader_options": {
            "modalities": {name: f"{name}.nii.gz" for name in modalities},
            "masks": [f"{mask}.nii.gz"],
            "brain": "brain.nii.gz",
        },
        "processor": {"modalities": list(modalities), "size": [48, 48], "brain_mask": "given"},
        "slices": {"step": 8},
        "split": {"fractions": {"test": 1.0}},
    }
    assert prepare_recipe(recipe, test_data / "mri" / folder, tmp_path / "set", progress=False) == {}
    test = load_prepared(tmp_path / "set", "test")
    (name,) = test.subjects
    rows = test.read_subject(name)
    assert 0 < rows["label"].mean() < 1
    # A lesion is brighter on FLAIR than the brain around it, so the mask lies on the image and is not flipped.
    flair, marked = rows["image"][:, 0], rows["mask"][:, 0] == 1
    assert flair[marked].mean() > flair[rows["brain"] & ~marked].mean()


def test_a_real_scan_of_ixi(test_data, tmp_path):
    """The subject's folder links to a flat tree of the download's names."""
    scan = test_data / "mri" / "healthy_ixi" / "IXI012-HH-1211" / "t1.nii.gz"
    assert read_volume_folders(test_data / "mri" / "healthy_ixi", {"t1": "t1.nii.gz"})[0].name == "IXI012-HH-1211"
    flat = tmp_path / "raw" / "IXI-T1"
    flat.mkdir(parents=True)
    (flat / "IXI012-HH-1211-T1.nii.gz").symlink_to(scan)
    (tmp_path / "raw" / "IXI.csv").write_text("IXI_ID,AGE\n12,38.78\n")
    options = read_recipe("ixi_t1")["reader_options"] | {"ages": "IXI.csv"}
    failures, splits = prepare(
        "ixi_t1", tmp_path / "raw", tmp_path / "set", reader_options=options, split={"fractions": {"train": 1.0}}
    )
    assert failures == {}
    row = splits["train"].subject_info["IXI012-HH-1211"]
    assert row["age"] == 38.78 and row["site"] == "HH" and row["label"] == 0
    assert row["rows"] == row["network_shape"][2] == 120 and row["shape"] == [120, 120, 90]


def test_real_stacks_as_kaggle_has_them(test_data, tmp_path):
    """A patient of the NIfTI set, written as the pictures it was made of, comes to the same rows."""
    source = test_data / "mri" / "tcga_lgg_flair" / "TCGA_CS_4943_20000902"
    volume, lesion = (np.asarray(nib.load(source / f"{name}.nii.gz").dataobj) for name in ("flair", "lesion"))
    name = source.name
    (tmp_path / "raw" / name).mkdir(parents=True)
    for index in range(volume.shape[2]):
        picture = np.stack([np.zeros_like(volume[..., index].T), volume[..., index].T, volume[..., index].T], axis=-1)
        stem = tmp_path / "raw" / name / f"{name}_{index + 5}"
        PIL.Image.fromarray(picture).save(f"{stem}.tif")
        PIL.Image.fromarray(255 * lesion[..., index].T).save(f"{stem}_mask.tif")
    changes = {"split": {"fractions": {"test": 1.0}}}
    failures, kaggle = prepare("tcga_lgg_kaggle", tmp_path / "raw", tmp_path / "a", slices={}, **changes)
    assert failures == {}
    recipe = {**read_recipe("tcga_lgg_kaggle"), **changes, "slices": {}, "reader": "volume_folders"}
    recipe["reader_options"] = {"modalities": {"flair": "flair.nii.gz"}, "masks": ["lesion.nii.gz"]}
    recipe["processor"]["size"] = [32, 32]
    (tmp_path / "nifti").mkdir()
    (tmp_path / "nifti" / name).symlink_to(source, target_is_directory=True)
    assert prepare_recipe(recipe, tmp_path / "nifti", tmp_path / "b", progress=False) == {}
    first, other = kaggle["test"][:], load_prepared(tmp_path / "b", "test")[:]
    for column in ("image", "mask", "brain", "label", "slice"):
        np.testing.assert_array_equal(first[column], other[column])


def test_real_annotations(test_data, tmp_path):
    failures, splits = prepare("cimd_lidc", test_data / "lidc_sample", tmp_path / "lidc")
    assert failures == {} and {name: len(split) for name, split in splits.items()} == {"train": 13, "test": 5}
    assert set(splits["train"].annotations) == {4}


def test_bids_beside_sessions_and_files_of_macos(tmp_path):
    for name in (
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz",
        "sub-1/anat/._sub-1_T1w.nii.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subjects = read_bids(tmp_path, {"t1": "anat/*_T1w.nii.gz"})
    assert [(subject.name, subject.group) for subject in subjects] == [("sub-1", "sub-1"), ("sub-1_ses-2", "sub-1")]
    assert subjects[0].volume == {"t1": tmp_path / "sub-1/anat/sub-1_T1w.nii.gz"}
