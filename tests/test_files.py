"""Files are whole, text is UTF-8, names are no paths, and a folder belongs to one run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from anodiff.files import check_name, lock_folder, read_json, read_text, remove_unfinished, replacing, write_json
from anodiff.files import write_text as write


def test_text_is_utf8_whatever_the_locale(tmp_path):
    script = (
        "from anodiff.files import *; import locale; assert locale.getpreferredencoding(False) != 'UTF-8';"
        "write_text('text', read_text('given') + '\\u4e2d'); write_json('json', {'\\xfc': 1}); read_json('json')"
    )
    (tmp_path / "given").write_bytes("\ufeffgr\xfc\xdfe\n".encode())  # with a byte order mark, as Windows writes it
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "text").read_bytes() == "gr\xfc\xdfe\n\u4e2d".encode()
    assert json.loads((tmp_path / "json").read_bytes()) == {"\xfc": 1}


def test_other_encodings_and_damaged_json_name_the_line(tmp_path):
    (tmp_path / "table.csv").write_bytes("id\nm\xfcller\n".encode("latin1"))
    with pytest.raises(ValueError, match="table.csv, line 2: byte 0xfc is not UTF-8"):
        read_text(tmp_path / "table.csv")
    (tmp_path / "report.json").write_text('{\n"a": 1,\n"b')
    with pytest.raises(ValueError, match="report.json, line 3: the file is no JSON, it may be truncated"):
        read_json(tmp_path / "report.json")


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path):
    target = tmp_path / "one.nii.gz"
    write(target, "old")
    os.chmod(target, 0o640)
    with pytest.raises(RuntimeError), replacing(target) as unfinished:
        assert unfinished.name.endswith(".nii.gz") and unfinished.parent == tmp_path
        unfinished.write_text("half")
        assert target.read_text() == "old"
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["one.nii.gz"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"score": float("nan")})
    assert target.read_text() == "old"
    write(target, "new")
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["one.nii.gz"]
    assert target.stat().st_mode & 0o777 == 0o640  # who may read it is the user's business


def _write_and_die(path):
    with replacing(path) as unfinished:
        unfinished.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path):
    write(tmp_path / "log", "old")
    child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path / "log",))
    child.start()
    child.join()
    assert (tmp_path / "log").read_text() == "old" and len(os.listdir(tmp_path)) == 2
    own = [".0.partial.log", ".mine.partial.log", "a.partial.log", ".partial"]
    for name in own:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["log", *own])


@pytest.mark.parametrize("name", ["sub-01", "a/b", "Mueller, 3", "\u4e2d", "..a", "a..", "-x", "x" * 200])
def test_names_that_files_can_have(name):
    check_name("a subject", name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "../x",
        "a/../../x",
        "a/./b",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\udc80",
        "x" * 201,
        "\xfc" * 101,
        3,
        None,
    ],
)
def test_names_that_are_paths_or_none(name):
    with pytest.raises(ValueError, match="The name of a subject must be one that a file can have, got "):
        check_name("a subject", name)


HOLD = "import sys; from anodiff.files import lock_folder; lock = lock_folder('run'); lock.__enter__(); print(1, flush=1); input()"


def test_a_folder_belongs_to_one_run_until_that_ends_or_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=tmp_path, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    said = rf"run is in use by process {holder.pid} on \S+, since 20\d\d-.* \(UTC\)\. Wait until that run ends"
    with pytest.raises(BlockingIOError, match=said), lock_folder(tmp_path / "run"):
        pass
    # Whoever waits outside takes nothing away from the holder.
    assert json.loads((tmp_path / "run" / ".run.json").read_text())["process"] == holder.pid
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path / "run"), pytest.raises(BlockingIOError, match=f"process {os.getpid()} "):
        with lock_folder(tmp_path / "run"):
            pass
    with lock_folder(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == [".run.lock"]
