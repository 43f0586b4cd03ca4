"""Patterns, tables, lists in standard input, and the parts of a cohort."""

import io
import os
import sys

import pytest

from anodiff.cohorts.inputs import find_input_modality, list_scans, read_inputs
from anodiff.cohorts.options import PredictOptions


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make("a/b.nii.gz")` makes empty files below the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return make


def table(path, *rows):
    """Writes rows, words between spaces, as a table."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(row.split()) + "\n" for row in rows), encoding="utf-8")


def find(*arguments, modalities="flair", optional=(), **options):
    """Names of the scans to their volumes as text, what is not taken, and the names of finished scans."""
    options = PredictOptions(scans=list(arguments), **options)
    options.check()
    scans, failed, finished = list_scans(
        read_inputs(options.scans), options, modalities.split(), ("result",), optional
    )
    volumes = {
        scan.name: " ".join(map(str, scan.volume.values() if isinstance(scan.volume, dict) else [scan.volume]))
        for scan in scans
    }
    assert len(volumes) == len(scans)
    return volumes, dict(failed), [scan.name for scan in finished]


def test_a_pattern_stands_for_the_files_that_it_matches(make):
    make("data/p1/flair.nii.gz", "data/p2/flair.nii.gz", "data/p2/t1.nii.gz", "data/p3/x/flair.nii.gz", "a[1].nii")
    scans, failed, _ = find("data/*/flair.nii.gz")
    assert scans == {"p1_flair": "data/p1/flair.nii.gz", "p2_flair": "data/p2/flair.nii.gz"} and not failed
    assert set(find("data/**/flair.nii.gz")[0]) == {"p1_flair", "p2_flair", "x_flair"}
    # A name with such characters is that of the file, if there is one.
    assert find("a[1].nii")[0] == {"a[1]": "a[1].nii"}
    scans, failed, _ = find("data/*/flair.nii.gz", "nowhere/*.nii.gz")
    assert len(scans) == 2 and failed == {"nowhere/*.nii.gz": "no file or folder has a name of this pattern."}
    # What matches and is of another modality is listed, as ever.
    assert list(find("data/p2/*.nii.gz")[1]) == ["data/p2/t1.nii.gz"]


def test_standard_input_is_a_list_of_paths_as_they_stand(make, monkeypatch):
    make("p1.nii.gz", "my scan [2].nii.gz", "p3/flair.nii.gz")
    content = "p1.nii.gz\nmy scan [2].nii.gz\r\n\np3\nnone_*.nii.gz\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    scans, failed, _ = find("-")
    wanted = {"p1": "p1.nii.gz", "my scan [2]": "my scan [2].nii.gz", "p3": "p3/flair.nii.gz"}
    assert scans == wanted | {"none_*": "none_*.nii.gz"} and not failed  # what is missing fails when it is read
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "standard input holds no path" in find("-")[1]["-"]
    with pytest.raises(ValueError, match="`-`, the list in standard input, can be named once"):
        read_inputs(["-", "-"])


def test_what_earlier_results_wrote_is_no_scan(make, tmp_path):
    """A pattern and a list that also match the results of the last call do not predict these."""
    make("data/p1_flair.nii.gz", "data/out/p1_flair/anomaly_map.nii.gz", "data/out/p1_flair/mine.nii.gz")
    (tmp_path / "data/out/p1_flair/result.json").write_text('{"files": ["anomaly_map.nii.gz"]}')
    scans, failed, _ = find("data/**/*.nii.gz", output="data/out")
    assert set(scans) == {"p1_flair", "mine"} and not failed
    scans, failed, _ = find("data/p1_flair.nii.gz", "data/out/p1_flair/anomaly_map.nii.gz")
    assert set(scans) == {"p1_flair"} and [*failed] == ["data/out/p1_flair/anomaly_map.nii.gz"]


def test_a_table_has_a_row_per_subject_and_a_column_per_modality(make, tmp_path):
    make(*(f"in/{name}/{image}.nii.gz" for name in "abc" for image in ("x", "y", "mask")))
    table(
        tmp_path / "in" / "cohort.tsv",
        "subject FLAIR T1w t2 brain",
        "sub-a a/x.nii.gz a/y.nii.gz n/a a/mask.nii.gz",
        "sub-b b/x.nii.gz n/a n/a n/a",
        "sub-c c/x.nii.gz c/no.nii.gz n/a n/a",
    )
    scans, failed, _ = find("in/cohort.tsv", modalities="t1 flair")
    assert scans == {"sub-a": "in/a/y.nii.gz in/a/x.nii.gz"}
    assert failed == {
        "in/cohort.tsv, line 3": "sub-b has no file for T1w.",
        "in/cohort.tsv, line 4": "sub-c: there is no file in/c/no.nii.gz.",
    }
    assert set(find("in/cohort.tsv")[0]) == {"sub-a", "sub-b", "sub-c"}
    # What the checkpoint does without may have no file, or no column.
    scans, failed, _ = find("in/cohort.tsv", modalities="t1 flair pd", optional=["t1", "pd"])
    assert scans == {"sub-a": "in/a/y.nii.gz in/a/x.nii.gz", "sub-b": "in/b/x.nii.gz"}
    assert failed == {"in/cohort.tsv, line 4": "sub-c: there is no file in/c/no.nii.gz."}
    assert set(find("in/cohort.tsv", modalities="t2", optional=["t2"])[1]) == {
        f"in/cohort.tsv, line {number}" for number in (2, 3, 4)
    }
    options = PredictOptions(scans=["in/cohort.tsv"])
    scans = list_scans(read_inputs(options.scans), options, ["flair"], ("result",))[0]
    assert [scan.brain and str(scan.brain) for scan in scans] == ["in/a/mask.nii.gz", None, None]
    assert str(scans[0].source) == "in/cohort.tsv, line 2"
    # Without the column the mask lies beside the scan.
    table(tmp_path / "in" / "short.tsv", "subject flair", "sub-a a/x.nii.gz")
    options = PredictOptions(scans=["in/short.tsv"], brain="mask.nii.gz", atlas="y.nii.gz")
    (scan,) = list_scans(read_inputs(options.scans), options, ["flair"], ("result",))[0]
    assert (str(scan.brain), str(scan.atlas)) == ("in/a/mask.nii.gz", "in/a/y.nii.gz")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["flair t1", "a.nii b.nii"], "t.tsv, line 1: a table of scans must have the column `subject`"),
        (
            ["subject flair age", "s1 a.nii 50"],
            "t.tsv, line 1: the table has unknown columns, age. Its columns must be",
        ),
        (["subject t1", "s1 a.nii"], "t.tsv, line 1: the table has no column for flair. Its columns must be"),
        (["subject flair FLAIR", "s1 a.nii a.nii"], "t.tsv, line 1: the columns flair, FLAIR mean the same"),
        (["subject flair", "s1 a.nii", "", "s2"], "t.tsv, line 4: it has 1 cells, and the first line 2"),
        (["subject flair", "s1 a.nii", "S1 a.nii"], "t.tsv, line 3: the subject S1 is in line 2 already"),
        (
            ["subject flair", "../s1 a.nii"],
            "The name of the subject in t.tsv, line 2, must be one that a file can have",
        ),
        (["subject flair", "n/a a.nii"], "The name of the subject in t.tsv, line 2, must be one that a file can have"),
        (["subject flair"], "t.tsv has no row below its first line"),
    ],
)
def test_a_wrong_table_is_an_error_that_names_the_line(make, tmp_path, rows, message):
    make("a.nii")
    table(tmp_path / "t.tsv", *rows)
    with pytest.raises(ValueError) as error:
        find("t.tsv")
    assert str(error.value).startswith(message)


def test_a_table_that_is_not_there(make):
    make()
    with pytest.raises(FileNotFoundError, match="There is no file nowhere.tsv"):
        find("nowhere.tsv")


def test_two_scans_of_one_name_are_an_error(make, tmp_path):
    make("p1.nii", "q.nii")
    table(tmp_path / "t.tsv", "subject flair", "P1 q.nii")
    with pytest.raises(ValueError, match="p1.nii and t.tsv, line 2 would be written into the same folder, P1"):
        find("p1.nii", "t.tsv")


@pytest.mark.parametrize(
    ("header", "paths", "modality"),
    [
        ("subject T1w", [], "t1"),
        ("subject image", [], None),
        ("subject flair brain", ["b_flair.nii"], "flair"),
    ],
)
def test_the_modality_that_a_table_says(make, tmp_path, header, paths, modality):
    make("a.nii", *paths)
    table(tmp_path / "t.tsv", header, "s1 a.nii n/a" if "brain" in header else "s1 a.nii")
    assert find_input_modality(read_inputs(["t.tsv", *paths]), PredictOptions()) == modality


def test_a_table_of_several_modalities_needs_a_choice(make, tmp_path):
    table(tmp_path / "t.tsv", "subject T1w flair", "s1 a.nii b.nii")
    with pytest.raises(
        ValueError, match=r"several modalities: t1 \(.*t.tsv, column T1w\) and flair .* by `--modality`"
    ):
        find_input_modality(read_inputs([str(tmp_path / "t.tsv")]), PredictOptions())


def test_a_column_of_any_modality_is_for_a_checkpoint_of_any_contrast(make, tmp_path):
    make("a.nii")
    table(tmp_path / "t.tsv", "subject t1", "s1 a.nii")
    assert find("t.tsv", modalities="image")[0] == {"s1": "a.nii"}


# --- parts


def test_parts_are_disjoint_and_whole_in_any_order(make):
    names = [f"raw/p{number}.nii.gz" for number in range(7)]
    make(*names, "raw/p1_seg.nii.gz")
    parts = [find("raw", shard=f"{number}/3") for number in (1, 2, 3)]
    assert [sorted(scans) for scans, _, _ in parts] == [["p0", "p3", "p6"], ["p1", "p4"], ["p2", "p5"]]
    # What is no scan is said once.
    assert [list(failed) for _, failed, _ in parts] == [["raw/p1_seg.nii.gz"], [], []]
    assert find(*reversed(names), shard="2/3")[0] == parts[1][0]
    assert find("raw", shard="1/1")[0] == find("raw")[0]
    assert find("raw/p0.nii.gz", shard="2/3") == ({}, {}, [])


def test_finished_scans_do_not_move_others_into_another_part(make):
    make(*(f"raw/p{number}.nii.gz" for number in range(4)), "out/p0/result.json")
    with open("out/p0/result.json", "w") as record:
        record.write('{"files": []}')
    scans, _, finished = find("raw", shard="1/2", output="out", skip_existing=True)
    assert set(scans) == {"p2"} and finished == ["p0"]
    assert set(find("raw", shard="2/2", output="out", skip_existing=True)[0]) == {"p1", "p3"}


def test_names_of_a_part_are_those_of_the_whole(make):
    make("a/flair.nii.gz", "b/flair.nii.gz")
    paths = ["a/flair.nii.gz", "b/flair.nii.gz"]
    assert set(find(*paths, shard="1/2")[0] | find(*paths, shard="2/2")[0]) == {"a_flair", "b_flair"}


@pytest.mark.parametrize("shard", ["", "0/3", "4/3", "1/0", "1", "1/3/3", "a/b", "-1/3", "1 / 3", "1/٣"])
def test_a_wrong_part_is_an_error(shard):
    with pytest.raises(ValueError, match="`--shard` must be NUMBER/COUNT, from 1/COUNT to COUNT/COUNT, got"):
        PredictOptions(scans=["x"], shard=shard).check()


# --- atlas


def test_an_atlas_beside_each_scan_is_no_scan(make):
    make("raw/p1/flair.nii.gz", "raw/p1/AAL.nii.gz", "flat/a.nii.gz", "flat/aal.nii.gz", "one/all.nii.gz")
    options = PredictOptions(scans=["raw", "flat"], atlas="aal.nii.gz")
    scans, failed, _ = list_scans(read_inputs(options.scans), options, ["flair"], ("result",))
    assert {scan.name: str(scan.atlas) for scan in scans} == {"p1": "raw/p1/AAL.nii.gz", "a": "flat/aal.nii.gz"}
    assert not failed
    # With a folder in front it is one for all.
    options = PredictOptions(scans=["raw", "flat/a.nii.gz"], atlas=os.path.join("one", "all.nii.gz"))
    scans, _, _ = list_scans(read_inputs(options.scans), options, ["flair"], ("result",))
    assert {str(scan.atlas) for scan in scans} == {"one/all.nii.gz"}
