"""The tables of a cohort, which several processes write."""

import json
import os
import threading

import pandas
import pytest

from anodiff.cohorts.options import PredictOptions
from anodiff.cohorts.record import begin_record, check_record, end_record, record_path, update_record
from anodiff.cohorts.tables import (
    COHORT_COLUMNS,
    REGION_COLUMNS,
    cell,
    check_tables,
    hold_tables,
    read_rows,
    write_rows,
)


def done(scan, **values):
    return {"scan": scan, "source": f"raw/{scan}.nii", "status": "done", "checkpoint": "m"} | values


def put(folder, *entries):
    with hold_tables(folder):
        write_rows(folder, entries)


def finish(folder, scan):
    """Makes the folder of a whole result."""
    (folder / scan).mkdir(parents=True, exist_ok=True)
    (folder / scan / "result.json").write_text('{"files": []}')


def test_rows_are_replaced_by_those_of_the_same_scan_and_sorted(tmp_path):
    put(tmp_path, (done("b", marked_ml=1.25), [{"region": 0, "components": 1}, {"region": 3, "components": 2}]))
    put(tmp_path, (done("a", volume_score=0.1), [{"region": 1}]), ({"source": "raw/x", "status": "failed"}, None))
    put(tmp_path, (done("b", marked_ml=2.5), [{"region": 7}]))
    frame = pandas.read_csv(tmp_path / "cohort.tsv", sep="\t")
    assert list(frame.columns) == list(COHORT_COLUMNS)
    assert frame["scan"].tolist()[:2] == ["a", "b"] and frame["scan"].isna().tolist() == [False, False, True]
    assert frame["marked_ml"][1] == 2.5 and frame["volume_score"][0] == 0.1 and frame["source"][2] == "raw/x"
    assert b"\t\t" not in (tmp_path / "cohort.tsv").read_bytes()  # n/a, never nothing
    regions = pandas.read_csv(tmp_path / "regions.tsv", sep="\t")
    assert list(regions.columns) == list(REGION_COLUMNS)
    assert list(zip(regions["scan"], regions["region"], strict=True)) == [("a", 1), ("b", 7)]
    for name, columns in (("cohort", COHORT_COLUMNS), ("regions", REGION_COLUMNS)):
        assert json.loads((tmp_path / f"{name}.json").read_text()).keys() == columns.keys()
    put(tmp_path, (done("a"), [{"region": 2}, {"region": 10}]))  # in the order of scans, and of their regions
    regions = pandas.read_csv(tmp_path / "regions.tsv", sep="\t")
    assert list(zip(regions["scan"], regions["region"], strict=True)) == [("a", 2), ("a", 10), ("b", 7)]
    # What was no scan has become one, and what a row says is one line of plain cells.
    text = 'it\tsaid "no"\n twice'
    put(tmp_path, ({"scan": "x", "source": "raw/x", "status": "failed", "reason": text}, None))
    frame = pandas.read_csv(tmp_path / "cohort.tsv", sep="\t")
    assert frame["scan"].tolist() == ["a", "b", "x"] and frame["reason"][2] == "it said 'no' twice"


@pytest.mark.parametrize("name", ["sub 1  flair", 'the "first"', "plain"])
def test_a_name_of_any_characters_has_one_row(tmp_path, name):
    finish(tmp_path, name)
    put(tmp_path, (done(name, marked_ml=1.5), [{"region": 1}]))
    put(tmp_path, ({"scan": name, "source": "raw", "status": "skipped"}, None))
    put(tmp_path, ({"scan": name, "source": "raw", "status": "failed", "reason": "why"}, None))
    assert {row["marked_ml"] for row in read_rows(tmp_path).values()} == {"1.5"}
    put(tmp_path, (done(name), [{"region": 2}]))
    assert [*read_rows(tmp_path)] == [cell(name)] and len((tmp_path / "regions.tsv").read_text().splitlines()) == 2


def test_a_path_that_is_not_utf8_does_not_keep_the_others_from_the_table(tmp_path):
    source = os.fsdecode(b"raw/\xff.nii.gz")
    put(tmp_path, ({"source": source, "status": "failed", "reason": f"{source} is none"}, None), (done("a"), None))
    assert "raw/\\udcff.nii.gz" in (tmp_path / "cohort.tsv").read_text(encoding="utf-8")


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_values_of_a_result_stay_as_long_as_it_is_there(tmp_path, status):
    finish(tmp_path, "a")
    put(
        tmp_path, (done("a", marked_ml=1.5, seconds=3.0), [{"region": 1}]), (done("b", marked_ml=1.5), [{"region": 1}])
    )
    for scan in "ab":
        put(tmp_path, ({"scan": scan, "source": f"raw/{scan}.nii", "status": status, "reason": "why"}, None))
    rows = read_rows(tmp_path)
    assert {scan: row["marked_ml"] for scan, row in rows.items()} == {"a": "1.5", "b": None}
    for row in rows.values():
        assert (row["status"], row["reason"]) == (status, "why")
    assert rows["a"]["seconds"] == "3" and (tmp_path / "regions.tsv").read_text().count("\n") == 2


def test_a_failure_from_another_source_takes_no_values(tmp_path):
    finish(tmp_path, "a")
    put(tmp_path, (done("a", marked_ml=1.5), None))
    put(tmp_path, ({"scan": "a", "source": "other/a.nii", "status": "failed", "reason": "why"}, None))
    row = read_rows(tmp_path)["a"]
    assert (row["source"], row["status"], row["marked_ml"]) == ("raw/a.nii", "done", "1.5")
    (failure,) = [line for line in (tmp_path / "cohort.tsv").read_text().splitlines() if "other/a.nii" in line]
    assert failure.startswith("n/a\tother/a.nii\tfailed\twhy\tn/a")
    # One that is skipped is the same scan by another path.
    put(tmp_path, ({"scan": "a", "source": "moved/a.nii", "status": "skipped"}, None))
    row = read_rows(tmp_path)["a"]
    assert (row["source"], row["status"], row["marked_ml"]) == ("moved/a.nii", "skipped", "1.5")


def test_no_row_is_lost_however_many_write_at_once(tmp_path):
    def write(first):
        for number in range(first, 40, 4):
            put(tmp_path, (done(f"p{number:02}"), [{"region": number}]))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(read_rows(tmp_path)) == [f"p{number:02}" for number in range(40)]
    assert sorted(pandas.read_csv(tmp_path / "regions.tsv", sep="\t")["region"]) == list(range(40))


def test_tables_that_windows_has_saved_stay_tables(tmp_path):
    put(tmp_path, (done("a", marked_ml=1.5), [{"region": 1, "components": 2}]))
    for name in ("cohort.tsv", "regions.tsv"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    check_tables(tmp_path)
    assert read_rows(tmp_path)["a"]["marked_ml"] == "1.5" and "\r" not in str(read_rows(tmp_path))
    put(tmp_path, (done("b"), [{"region": 3}]))
    assert [*read_rows(tmp_path)] == ["a", "b"]
    assert all(b"\r" not in (tmp_path / name).read_bytes() for name in ("cohort.tsv", "regions.tsv"))


@pytest.mark.parametrize("name", ["cohort.tsv", "cohort.json", "regions.tsv", "regions.json"])
def test_a_file_of_the_user_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("subject\tflair\ns1\ta.nii\n")
    with pytest.raises(FileExistsError, match=f"{name} is .*nothing is replaced. Move it away"):
        check_tables(tmp_path)
    (tmp_path / name).unlink()
    put(tmp_path, (done("a"), [{"region": 1}]))
    check_tables(tmp_path)


def test_records_of_commands_in_one_folder_do_not_mix(tmp_path):
    options = PredictOptions(scans=["raw"], output=str(tmp_path))
    path, counts = record_path(options), {"named": 2, "done": 0, "skipped": 0, "failed": 0}
    first = begin_record(path, ["raw", "-o", "out"], options, {"checkpoint": "m"}, {}, {}, dict(counts))
    second = begin_record(path, ["raw"], options, {"checkpoint": "m"}, {}, {}, dict(counts))
    update_record(path, first, 1, 0, {"a": {"raw/a.nii": "0"}})
    update_record(path, second, 0, 1, {})
    end_record(path, first, 0)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[0] == "run.json" and len(names) == 2
    newer, older = (json.loads((tmp_path / name).read_text()) for name in names)
    assert older["command"] == ["anodiff", "predict", "raw", "-o", "out"]
    assert older["status"] == 0 and older["ended"] > older["started"] and older["inputs"] == {"a": {"raw/a.nii": "0"}}
    assert (older["scans"]["done"], newer["scans"]["failed"]) == (1, 1)
    assert newer["ended"] is None and newer["versions"].keys() >= {"python", "torch", "diffusers"}
    # A part has one of its own; a file of the user stays.
    assert record_path(PredictOptions(shard="2/8", output="out")).as_posix() == "out/run_2-of-8.json"
    path.write_text('{"command": "mine"}')
    with pytest.raises(FileExistsError, match="run.json is no record of this command"):
        check_record(path)
