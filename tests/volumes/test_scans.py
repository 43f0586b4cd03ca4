"""What a person names by files and folders becomes a scan, or is listed with the reason."""

import os
import unicodedata
from pathlib import Path

import pytest

from anodiff.volumes import scans as module
from anodiff.volumes.scans import find_modality, find_scans, name_modality


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make("a/b.nii.gz", "c/")` makes empty files and folders below the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = tmp_path / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.touch()

    return make


def find(modalities, *paths, **options):
    """Scans by name: a path, or paths by modality, as text; and what is not taken, with the reasons."""
    found, failed = find_scans(list(paths), modalities.split(), **options)
    volumes = {
        scan.name: {name: str(path) for name, path in scan.volume.items()}
        if isinstance(scan.volume, dict)
        else str(scan.volume)
        for scan in found
    }
    assert len(volumes) == len(found)
    return volumes, dict(failed)


def test_a_file_that_may_not_be_read_hides_no_others(make, monkeypatch):
    make("all/p1_flair.nii.gz", "all/p2_flair.nii.gz", "all/locked")
    access, opened = os.access, open

    def open_none(path, *arguments, **options):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    # Root may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    monkeypatch.setattr("builtins.open", open_none)
    volumes, failed = find("flair", "all")
    assert set(volumes) == {"p1_flair", "p2_flair"} and failed == {"all/locked": "may not be read."}
    assert set(find("flair", "all/locked", "all/p1_flair.nii.gz")[0]) == {"locked", "p1_flair"}  # reading it says so


# --- scans that lack modalities


def test_a_scan_may_lack_what_is_optional(make):
    make("a/flair.nii.gz", "a/t1.nii.gz", "b/b_FLAIR.nii.gz", "c/t1.nii.gz", "d/flair.nii.gz", "d/flair_2.nii.gz")
    make("x_flair.nii.gz", "x_t1.nii.gz", "x.nii.gz")
    paths = ["a", "b", "c", "d", "x_flair.nii.gz", "x_t1.nii.gz", "x.nii.gz"]
    volumes, failed = find("flair t1 t2", *paths, optional=["t1", "t2"])
    assert volumes == {
        "a": {"flair": "a/flair.nii.gz", "t1": "a/t1.nii.gz"},
        "b": {"flair": "b/b_FLAIR.nii.gz"},
        "x_flair": {"flair": "x_flair.nii.gz"},
        # Without FLAIR they can only be all of them, in one file.
        "x_t1": "x_t1.nii.gz",
        "x": "x.nii.gz",
    }
    assert set(failed) == {"c", "d"}
    assert failed["c"] == "has no file for flair; its files are t1.nii.gz."
    assert find("flair t1 t2", *paths)[0].keys() == {"x_flair", "x_t1", "x"}
    # In a folder of folders as well.
    make("all/p1/flair.nii.gz", "all/p2/t2.nii.gz")
    volumes, failed = find("flair t1 t2", "all", optional=["flair", "t1", "t2"])
    assert volumes == {"p1": {"flair": "all/p1/flair.nii.gz"}, "p2": {"t2": "all/p2/t2.nii.gz"}} and not failed


def test_files_of_two_subjects_are_no_scan_that_lacks_some(make):
    make("a/x_t1.nii.gz", "a/y_t2.nii.gz", "b/x_t1.nii.gz", "b/x_t2.nii.gz")
    volumes, failed = find("flair t1 t2", "a", "b", optional=["flair", "t1", "t2"])
    assert volumes == {"b": {"t1": "b/x_t1.nii.gz", "t2": "b/x_t2.nii.gz"}}
    assert failed == {"a": "has no file for flair; its files are x_t1.nii.gz, y_t2.nii.gz."}


# --- names of modalities


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("flair", "flair.nii.gz"),
        ("flair", "FLAIR.nii"),
        ("flair", "patient1_flair.nii.gz"),
        ("flair", "x_FLAIR.nii.gz"),
        ("flair", "x-flair.NII.GZ"),
        ("flair", "x.Flair.mgz"),
        ("flair", "sub-01_ses-1_FLAIR.nii.gz"),
        ("flair", "sub-01_T2-FLAIR.nii.gz"),
        ("flair", "BraTS-GLI-00000-000-t2f.nii.gz"),
        ("flair", "sub-01_space-T1w_FLAIR.nii.gz"),
        ("flair", "FLAIR_to_T1.nii.gz"),
        ("flair", "flair_n4.nii.gz"),
        ("flair", "sub-01_FLAIR_brain.nii.gz"),
        ("FLAIR", "flair.nii.gz"),
        ("t2flair", "x_flair.png"),
        ("t1", "sub-01_T1w.nii.gz"),
        ("T1w", "sub_01_t1.nii.gz"),
        ("t1", "BraTS-GLI-00000-000-t1n.nii.gz"),
        ("t1", "patient_2_t1.nii.gz"),
        ("t1", "sub-01_T1w_space-FLAIR.nii.gz"),
        ("t1ce", "sub-01_ce-gad_T1w.nii.gz"),
        ("t1ce", "x_T1-Gd.nii.gz"),
        ("t1ce", "x_t1_ce.nii.gz"),
        ("t1ce", "BraTS-GLI-00000-000-t1c.nii.gz"),
        ("t2", "sub-01_T2w.nii.gz"),
        ("pd-map", "x_PD_map.nii.gz"),
    ],
)
def test_a_file_is_known_by_its_name(make, modality, name):
    make(f"p/{name}", "p/x_swi.nii.gz")
    assert find(modality, "p")[0] == {"p": {modality: f"p/{name}"}}


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("flair", "sub-01_T1w.nii.gz"),
        ("flair", "sub-01_T2w.nii.gz"),
        ("flair", "flair_mask.nii.gz"),
        ("flair", "sub-01_FLAIR_seg.nii.gz"),
        ("flair", "sub-01_label-lesion_FLAIR.nii.gz"),
        ("flair", "lesion-flair.nii.gz"),
        ("flair", "flair_t1_mean.nii.gz"),
        ("t1", "sub-01_ce-gad_T1w.nii.gz"),
        ("t1", "x_t1ce.nii.gz"),
        ("t1", "FLAIR_to_T1.nii.gz"),
        ("t2", "x_t2_flair.nii.gz"),
        ("t2", "sub-01_T2star.nii.gz"),
    ],
)
def test_another_modality_or_a_mask_never_gets_a_map(make, modality, name):
    """Neither among others, nor alone, nor named by itself, as `scans/*` of a shell does."""
    make(f"flat/a_{modality}.nii.gz", f"flat/b_{modality}.nii.gz", f"flat/{name}", f"p/{name}")
    found, failed = find(modality, "flat")
    assert set(found) == {f"a_{modality}", f"b_{modality}"} and list(failed) == [f"flat/{name}"]
    found, failed = find(modality, "p")
    assert not found and len(failed) == 1
    assert name in " ".join([*failed, *failed.values()])
    found, failed = find(modality, f"p/{name}")
    assert not found and "its name says" in failed[f"p/{name}"]


@pytest.mark.parametrize(
    ("names", "modality"),
    [
        ("a.nii", None),
        ("a_T1w.nii", "t1"),
        ("a_FLAIR.nii b_t2-flair.nii", "flair"),
        ("p/a_FLAIR.nii p/a_seg.nii p/brain.nii p/notes.txt", "flair"),
        ("p/1/T1w.nii p/2/mprage.nii p/2/t1_lesion.nii", "t1"),
        ("p/1/a.nii p/2/b.nii", None),
        ("nowhere_t2.nii", "t2"),
    ],
)
def test_the_modality_that_names_say(make, names, modality):
    make(*[name for name in names.split() if "nowhere" not in name])
    assert find_modality([name for name in names.split() if "/" not in name] or ["p"]) == modality


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("p/flair.nii p/t1.nii", r"flair \(p/flair.nii\) and t1 \(p/t1.nii\)"),
        ("p/1/flair.nii p/2/b.nii", r"unknown \(p/2/b.nii\) and flair \(p/1/flair.nii\)"),
        ("p/t1_t2_a.nii", r"t1 \(p/t1_t2_a.nii\) and t2 \(p/t1_t2_a.nii\)"),
    ],
)
def test_names_of_several_modalities(make, names, message):
    make(*names.split())
    with pytest.raises(ValueError, match=f"of several modalities, by their names: {message}. Say by `--modality`"):
        find_modality(["p"])


def test_spellings_of_a_modality():
    assert [name_modality(spelling) for spelling in ("T1w", "t2-flair", "ce-gad_T1w", "ct")] == [
        *("t1", "flair", "t1ce", "ct"),
    ]
    with pytest.raises(ValueError, match="`modality` must be one of t1, t1ce, t2, flair, .*, got 'x-ray'"):
        name_modality("x-ray")


def test_a_checkpoint_that_names_no_known_modality_takes_all_scans(make):
    make("flat/a_t1.png", "flat/b_flair.png", "flat/c.png", "flat/c_mask.png")
    found, failed = find("image", "flat")
    assert set(found) == {"a_t1", "b_flair", "c"} and list(failed) == ["flat/c_mask.png"]


# --- folders


def test_files_without_modality_are_all_scans_but_for_masks(make):
    make("flat/a.nii.gz", "flat/b.png", "flat/c_seg.nii.gz", "flat/brain.nii.gz", "flat/notes.txt", "flat/.hidden.nii")
    found, failed = find("flair", "flat")
    assert found == {"a": "flat/a.nii.gz", "b": "flat/b.png"}
    assert set(failed) == {"flat/c_seg.nii.gz", "flat/brain.nii.gz"}
    assert all("a mask" in reason for reason in failed.values())


def test_where_names_carry_modalities_the_others_are_listed(make):
    make("flat/a_flair.nii.gz", "flat/a_t1.nii.gz", "flat/b_flair.nii.gz", "flat/c.nii.gz", "flat/a_seg.nii.gz")
    found, failed = find("flair", "flat")
    assert found == {"a_flair": "flat/a_flair.nii.gz", "b_flair": "flat/b_flair.nii.gz"}
    assert "its name says t1, not flair" in failed["flat/a_t1.nii.gz"]
    assert "its name does not say flair" in failed["flat/c.nii.gz"]
    assert "a mask" in failed["flat/a_seg.nii.gz"] and len(failed) == 3


def test_one_scan_and_its_other_files_against_a_subject_without_the_modality(make):
    make("p1/flair.nii.gz", "p1/t1.nii.gz", "p1/seg.nii.gz", "p1/brain.nii.gz", "p1/report.pdf")
    assert find("flair", "p1") == ({"p1": {"flair": "p1/flair.nii.gz"}}, {})
    make("flat/p1_flair.nii.gz", "flat/p1_t1.nii.gz", "flat/p2_t1.nii.gz", "flat/p3.nrrd")
    found, failed = find("flair", "flat")
    assert found == {"flat": {"flair": "flat/p1_flair.nii.gz"}} and set(failed) == {
        "flat/p2_t1.nii.gz",
        "flat/p3.nrrd",
    }


def test_stripped_scans_against_masks_called_brain(make):
    make("a/p1_flair_brain.nii.gz", "a/p2_flair_brain.nii.gz", "b/p1_flair.nii.gz", "b/p1_flair_brain.nii.gz")
    assert set(find("flair", "a")[0]) == {"p1_flair_brain", "p2_flair_brain"}
    assert find("flair", "b") == ({"b": {"flair": "b/p1_flair.nii.gz"}}, {})


def test_subjects_with_a_file_per_modality(make):
    make("raw/p1/p1_FLAIR.nii.gz", "raw/p1/p1_T1w.nii.gz", "raw/p1/p1_T2w.nii.gz", "raw/p1/p1_seg.nii.gz")
    make("raw/p2/flair.nii", "raw/p2/t1.nii", "raw/p2/brain.nii", "raw/splits/train.csv", "raw/.cache/x.nii")
    expected = {
        "p1": {"flair": "raw/p1/p1_FLAIR.nii.gz", "t1": "raw/p1/p1_T1w.nii.gz"},
        "p2": {"flair": "raw/p2/flair.nii", "t1": "raw/p2/t1.nii"},
    }
    assert find("flair t1", "raw") == (expected, {})
    assert find("flair t1", "raw/p1", "raw/p2") == (expected, {})


def test_whatever_keeps_a_subject_out_is_said(make):
    make("raw/good/flair.nii.gz", "raw/good/t1.nii.gz")
    make("raw/p1/flair.nii.gz")
    make("raw/p2/a_flair.nii.gz", "raw/p2/b_flair.nii.gz", "raw/p2/t1.nii.gz")
    make("raw/p3/", "raw/p4/0001.dcm", "raw/p5/IM0001", "raw/p6/anat/flair.nii.gz", "raw/p7/mask.nii.gz")
    make("raw/p8/a.nii.gz", "raw/p8/b.nii.gz", "raw/p9_flair.nii.gz", "raw/p10.dcm")
    os.symlink("nowhere", "raw/p11")
    found, failed = find("flair t1", "raw")
    assert set(found) == {"good"}
    for name, reason in {
        "p1": "has no file for t1; its files are flair.nii.gz.",
        "p2": "has several for flair (a_flair.nii.gz, b_flair.nii.gz)",
        "p3": "is empty",
        "p4": "only what is not read: 0001.dcm",
        "p5": "only what is not read: IM0001",
        "p6": "folders, which are not looked into: anat. Name them",
        "p7": "only masks: mask.nii.gz",
        "p8": "several files, and none is named after flair, t1: a.nii.gz, b.nii.gz",
        "p10.dcm": "is none of .nii",
        "p11": "is a link to nowhere, and there is no such file",
    }.items():
        assert reason in failed.pop(f"raw/{name}"), name
    assert "no file for t1; its files are p9_flair.nii.gz" in failed.pop("raw") and not failed


def test_files_beside_sub_folders(make):
    make("raw/a_flair.nii.gz", "raw/b_flair.nii.gz", "raw/p1/flair.nii.gz", "raw/p2/scan.nii.gz", "raw/p3/t1.nii.gz")
    found, failed = find("flair", "raw")
    assert found == {
        "a_flair": "raw/a_flair.nii.gz",
        "b_flair": "raw/b_flair.nii.gz",
        "p1": {"flair": "raw/p1/flair.nii.gz"},
        "p2": "raw/p2/scan.nii.gz",
    }
    assert list(failed) == ["raw/p3"] and "no file for flair; its files are t1.nii.gz" in failed["raw/p3"]


def test_patients_folders_with_one_unnamed_file(make):
    make("raw/p1/scan.nii.gz", "raw/p1/mask.nii.gz", "raw/p2/scan.nii.gz", "raw/p3/a.nii.gz", "raw/p3/b.nii.gz")
    for modalities in ("flair", "flair t1"):  # of several modalities, files with all of them
        found, failed = find(modalities, "raw")
        assert found == {"p1": "raw/p1/scan.nii.gz", "p2": "raw/p2/scan.nii.gz"} and list(failed) == ["raw/p3"]


def test_one_file_of_each_of_two_subjects_is_no_scan(make):
    make("anat/sub-01_flair.nii.gz", "anat/sub-02_t1.nii.gz", "own/sub-01_flair.nii.gz", "own/sub-01_t1.nii.gz")
    found, failed = find("flair t1", "anat", "own")
    assert list(found) == ["own"]
    assert list(failed) == ["anat"] and failed["anat"].startswith("has files of several subjects, sub-01, sub-02; its")


def test_several_candidates_in_one_folder_of_several_modalities(make):
    make("flat/p1_flair.nii.gz", "flat/p1_t1.nii.gz", "flat/p2_flair.nii.gz", "flat/p2_t1.nii.gz")
    found, failed = find("flair t1", "flat")
    assert not found and "several for flair (p1_flair.nii.gz, p2_flair.nii.gz) and several for t1" in failed["flat"]
    make("p/s1/x_flair.nii.gz", "p/s1/y_FLAIR.nii.gz")
    assert "several for flair (x_flair.nii.gz, y_FLAIR.nii.gz)" in find("flair", "p")[1]["p/s1"]


def test_nothing_found_and_folders_that_may_not_be_read(make, monkeypatch):
    make("empty/", "raw/p1/flair.nii.gz", "raw/p2/flair.nii.gz", "closed/")
    assert "holds no scan: neither flair.nii.gz, nor scans" in find("flair", "empty")[1]["empty"]
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path) in ("raw/p2", "closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, failed = find("flair", "raw", "closed")
    assert set(found) == {"p1"}
    assert failed == dict.fromkeys(("raw/p2", "closed"), "cannot be read: Permission denied.")


def test_links_count_as_what_they_point_to(make):
    make("store/one", "raw/p1/", "elsewhere/flair.nii.gz")
    os.symlink("../../store/one", "raw/p1/flair.nii.gz")
    os.symlink("../elsewhere", "raw/p2")
    os.symlink(".git/annex/objects/never", "raw/a_flair.nii.gz")
    os.symlink(".git/annex/objects/never", "raw/b_flair.nii.gz")
    found, failed = find("flair", "raw")
    # Content that was never fetched does not vanish: reading it says so.
    assert set(found) == {"a_flair", "b_flair", "p1", "p2"} and not failed


# --- brain masks


def test_brain_masks_by_name_in_any_case(make):
    make("raw/p1/flair.nii.gz", "raw/p1/Brain.nii.gz", "raw/p2/flair.nii.gz", "a.nii.gz", "BRAIN.nii.gz")
    scans, failed = find_scans(["raw", "a.nii.gz"], ["flair"], "brain.nii.gz")
    assert [str(scan.brain) for scan in scans] == ["raw/p1/Brain.nii.gz", "raw/p2/brain.nii.gz", "BRAIN.nii.gz"]
    assert not failed and all(scan.brain is None for scan in find_scans(["raw"], ["flair"])[0])
    make("flat/x.nii.gz", "flat/Hirn.nii.gz")
    assert find("flair", "flat", brain="hirn.nii.gz") == ({"x": "flat/x.nii.gz"}, {})


# --- names of results


def test_earlier_results_are_no_scans(make, tmp_path):
    make(
        "raw/a.nii.gz",
        "raw/b.nii.gz",
        "raw/a/anomaly_map.nii.gz",
        "raw/a/overview.png",
        "raw/out/b/anomaly_map.nii.gz",
    )
    (tmp_path / "raw/a/result.json").write_text('{"files": ["anomaly_map.nii.gz", "overview.png"]}')
    assert find("flair", "raw", output="raw/out") == ({"a": "raw/a.nii.gz", "b": "raw/b.nii.gz"}, {})
    (tmp_path / "raw/a/result.json").write_text("{}")  # not ours
    assert "raw/a" in find("flair", "raw", output="raw/out")[1]


@pytest.mark.parametrize("path", [".", "..", "inner", "../inner", "./", "../inner/flair.nii.gz"])
def test_results_stay_below_the_output(make, tmp_path, monkeypatch, path):
    make("inner/flair.nii.gz", "flair.nii.gz", "inner/inner/flair.nii.gz")
    monkeypatch.chdir(tmp_path / "inner")
    found, _ = find("flair", path)
    assert found
    for name in found:
        assert name not in ("", ".", "..") and "/" not in name
        assert (tmp_path / "out" / name).resolve().parent == tmp_path / "out"


def test_odd_names_of_files_and_the_root(make):
    make("dots/...nii.gz", "dots/a.nii.gz", "new\nline.nii.gz", "back\\slash.nii.gz")
    found, failed = find_scans(["dots/...nii.gz", "new\nline.nii.gz", "back\\slash.nii.gz"], ["flair"])
    assert [scan.name for scan in found] == ["dots"]
    assert len(failed) == 2 and all("must be one that a file can have" in reason for _, reason in failed)
    assert module._names([module.Path("/")]) == ["scan"]


def test_names_never_collide(make):
    make("x/scan.nii.gz", "y/SCAN.nii.gz", "y/other.nii.gz", "s1/ses-1/anat/", "s1/ses-2/anat/", "s2/ses-1/anat/")
    found = find("flair", "x/scan.nii.gz", "y/SCAN.nii.gz", "y/other.nii.gz")[0]
    assert set(found) == {"x_scan", "y_SCAN", "other"}
    folders = ("s1/ses-1/anat", "s1/ses-2/anat", "s2/ses-1/anat")
    for folder in folders:
        make(f"{folder}/sub_FLAIR.nii.gz")
    assert set(find("flair", *folders)[0]) == {"s1_ses-1_anat", "ses-2_anat", "s2_ses-1_anat"}
    one, other = (unicodedata.normalize(form, "ü") for form in ("NFC", "NFD"))
    make(f"u/{one}.nii.gz", f"v/{other}.nii.gz")
    assert all(name[1] == "_" for name in find("flair", f"u/{one}.nii.gz", f"v/{other}.nii.gz")[0])
    make("z/a.nii", "z/a.nii.gz")
    with pytest.raises(ValueError, match="Several scans would be written into the same folder: z/a.nii, z/a.nii.gz"):
        find("flair", "z")


def test_a_scan_that_is_named_twice_is_one(make):
    make("raw/a.nii.gz", "raw/b.nii.gz")
    assert find("flair", "raw", "raw/a.nii.gz", "./raw/") == ({"a": "raw/a.nii.gz", "b": "raw/b.nii.gz"}, {})
    make("d/s1/flair.nii.gz", "d/s1/t1.nii.gz", "d/s2/flair.nii.gz", "d/s2/t1.nii.gz")
    for modalities, named in (("flair", "d/s1"), ("flair", "d/s1/flair.nii.gz"), ("flair t1", "d/s1")):
        wanted = {f"s{n}": {name: f"d/s{n}/{name}.nii.gz" for name in modalities.split()} for n in (1, 2)}
        assert find(modalities, "d", named) == (wanted, {})


def test_a_folder_is_read_once_however_many_scans_it_holds(make, monkeypatch):
    make(*(f"flat/{number}_flair.nii.gz" for number in range(300)), "flat/brain.nii.gz")
    reads, stats = [], []
    scandir, is_dir = os.scandir, module.Path.is_dir
    monkeypatch.setattr(os, "scandir", lambda path: reads.append(path) or scandir(path))
    monkeypatch.setattr(module.Path, "is_dir", lambda path: stats.append(path) or is_dir(path))
    assert len(find_scans(["flat"], ["flair"], "brain.nii.gz")[0]) == 300
    assert len(reads) == 1 and len(stats) <= 3 * 300
