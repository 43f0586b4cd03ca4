"""How prepared data sets are written: by several processes, after an interruption, after a change."""

import ast
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import nibabel as nib
import numpy as np
import psutil
import pytest
import yaml
from distributed import LocalCluster
from distributed.comm import CommClosedError
from filelock import FileLock

from anodiff import preprocess
from anodiff.data import shards
from anodiff.data.prepare import prepare_recipe


SCRIPT = Path(__file__).parents[2] / "preprocess.py"
RECIPE = {
    "reader": "volume_folders",
    "reader_options": {"modalities": {"flair": "flair.nii.gz"}, "masks": ["lesion.nii.gz"]},
    "processor": {"modalities": ["flair"], "size": [16, 16]},
    "split": {"fractions": {"train": 0.5, "test": 0.5}, "seed": 1},
}


@pytest.fixture
def raw(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(8):
        folder = tmp_path / "raw" / f"s{index}"
        folder.mkdir(parents=True)
        lesion = np.zeros((19, 21, 12), np.uint8)
        lesion[5:9, 5:9, index:8] = 1
        for name, array in (("flair", rng.uniform(1, 2, lesion.shape).astype(np.float32)), ("lesion", lesion)):
            nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), folder / f"{name}.nii.gz")
    (tmp_path / "raw" / "s3" / "lesion.nii.gz").write_bytes(b"no scan")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return tmp_path / "raw"


def contents(folder):
    # Two folders differ in what they are called.
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(folder.name.encode(), b"") for path in files
    }


def prepared(raw, out, **options):
    return prepare_recipe(RECIPE, raw, out, progress=False, **options)


def spoil(file):
    """Makes a file unreadable without a change of its size and time."""
    state = file.stat()
    file.write_bytes(b"x" * state.st_size)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def pieces_in(partial):
    # While a piece is written it has a dot in its name.
    return [path for path in partial.glob("*") if "." not in path.name]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_number_of_processes_changes_nothing(raw, tmp_path):
    failures = [prepared(raw, tmp_path / f"by-{count}-processes", num_proc=count) for count in (1, 2)]
    assert failures[0] == failures[1] and list(failures[0]) == ["s3"]
    assert contents(tmp_path / "by-1-processes") == contents(tmp_path / "by-2-processes")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "by-1-processes",
        "by-2-processes",
        "raw",
        "recipe.yaml",
    ]
    with pytest.raises(ValueError, match="`num_proc` must be an integer of at least 1, got 0"):
        prepared(raw, tmp_path / "none", num_proc=0)


def cluster(threads):
    """A cluster whose one worker is a thread of this process, reached as one on another computer."""
    settings = {"processes": False, "protocol": "tcp://", "dashboard_address": "127.0.0.1:0"}
    return LocalCluster(n_workers=1, threads_per_worker=threads, **settings)


def test_a_cluster_changes_nothing(raw, tmp_path):
    failures = prepared(raw, tmp_path / "by-none")
    with cluster(threads=1) as workers:
        assert prepared(raw, tmp_path / "by-dask", scheduler=workers.scheduler_address) == failures
    assert contents(tmp_path / "by-none") == contents(tmp_path / "by-dask")
    with pytest.raises(ValueError, match="`num_proc` is of this computer, and `scheduler` of a cluster"):
        prepared(raw, tmp_path / "none", num_proc=2, scheduler="tcp://127.0.0.1:1")


def test_workers_that_do_not_fit_are_refused(raw, tmp_path, monkeypatch):
    with cluster(threads=2) as workers:
        with pytest.raises(ValueError, match="must have one thread each, .* got one with 2: start them with"):
            prepared(raw, tmp_path / "set", scheduler=workers.scheduler_address)
    versions = itertools.count()
    monkeypatch.setattr(shards, "code_digest", lambda: str(next(versions)))
    with cluster(threads=1) as workers:
        with pytest.raises(ValueError, match="Workers must have the same version of anodiff"):
            prepared(raw, tmp_path / "set", scheduler=workers.scheduler_address)
    assert not (tmp_path / "set").exists()


def lose_connection(_):
    raise CommClosedError("in <TCP (closed)>: Connection reset by peer")


def test_a_connection_that_is_lost_is_said():
    with cluster(threads=1) as workers:
        with pytest.raises(
            ConnectionError, match="The connection to the cluster tcp://.* is lost. What is done is kept"
        ):
            list(shards.run_tasks(lose_connection, [(0,)], scheduler=workers.scheduler_address))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "no://such", "nowhere"])
def test_a_cluster_that_does_not_answer_is_one_line(raw, tmp_path, monkeypatch, capsys, address):
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", "recipe.yaml", "--root", "raw", "--out", "set", "--scheduler", address]
    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        assert preprocess.run_script(lambda: preprocess.main(arguments)) == 1
    *bar, line = filter(None, capsys.readouterr().err.splitlines())
    assert all(one.startswith("prepare:") for one in bar) and line.startswith(
        f"error: `scheduler` must be the address of a Dask scheduler, got {address}: "
    )
    assert not Path("set").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked at in /proc")
def test_a_killed_run_goes_on(raw, tmp_path, monkeypatch, request):
    # Some smoothing of every subject, so that a run can be killed in the middle.
    sitk = pytest.importorskip("SimpleITK", reason="the extra `preprocess` is missing")
    monkeypatch.setenv("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    request.addfinalizer(lambda: sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads))
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    recipe = {**RECIPE, "processor": {**RECIPE["processor"], "curvature_flow": 400}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    prepare_recipe(recipe, raw, tmp_path / "whole", progress=False)
    command = [sys.executable, SCRIPT, "--recipe", "recipe.yaml", "--root", raw, "--out", "resumed", "--num_proc", "2"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([*map(str, command)], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    partial, deadline = tmp_path / "resumed.partial", time.monotonic() + 300
    while len(pieces_in(partial)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    while any(map(alive, workers)):  # nobody is left behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "resumed").exists()

    # What was done is not done again: it could not be.
    done = {shards.read_piece(piece)["subject"][0].as_py() for piece in pieces_in(partial)}
    assert 2 <= len(done) < 7
    for name in done:
        spoil(raw / name / "flair.nii.gz")
    assert list(prepare_recipe(recipe, raw, tmp_path / "resumed", progress=False)) == ["s3"]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert not partial.exists()


def test_an_interrupted_run_goes_on_with_what_has_not_changed(raw, tmp_path, monkeypatch):
    prepared(raw, tmp_path / "whole")
    written = []

    def write_piece(path, table, row):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        return original(path, table, row)

    original = shards.write_piece
    with monkeypatch.context() as stopped:
        stopped.setattr(shards, "write_piece", write_piece)
        with pytest.raises(KeyboardInterrupt):
            prepared(raw, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    assert sorted(pieces_in(tmp_path / "resumed.partial")) == sorted(written)

    # Another time of a file, another setting: made again. Otherwise not.
    changed = raw / "s0" / "flair.nii.gz"
    os.utime(changed, ns=(0, 0))
    redone = []

    def count(path, table, row):
        redone.append(path)
        return original(path, table, row)

    monkeypatch.setattr(shards, "write_piece", count)
    prepared(raw, tmp_path / "resumed")
    assert 3 <= len(redone) <= 4  # the three that were left, and s0 if it was among the first
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    redone.clear()
    (tmp_path / "resumed").rename(tmp_path / "first")
    recipe = {**RECIPE, "dtype": "float16"}
    assert list(prepare_recipe(recipe, raw, tmp_path / "resumed", progress=False)) == ["s3"]
    assert len(redone) == 7


def test_what_is_not_ours_is_not_touched(raw, tmp_path):
    (tmp_path / "resumed.partial").mkdir()
    (tmp_path / "resumed.partial" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="resumed.partial exists, and is no interrupted run"):
        prepared(raw, tmp_path / "resumed")
    assert (tmp_path / "resumed.partial" / "diary.txt").read_text() == "mine"


def test_one_run_at_a_time(raw, tmp_path):
    holding = FileLock(tmp_path / "set.partial" / ".run.lock")
    (tmp_path / "set.partial").mkdir()
    holding.acquire()
    record = {"process": 7, "host": "here", "since": "2020-01-01 00:00:00"}
    (tmp_path / "set.partial" / ".run.json").write_text(json.dumps(record))
    with pytest.raises(BlockingIOError, match="set.partial is in use by process 7 on here, since 2020"):
        prepared(raw, tmp_path / "set")
    holding.release()
    assert list(prepared(raw, tmp_path / "set")) == ["s3"]


def test_what_killed_runs_left_is_removed(raw, tmp_path, monkeypatch):
    """A result that was being written, a piece that was, and a temporary folder of an earlier version."""
    with monkeypatch.context() as stopped:
        stopped.setattr(shards, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepared(raw, tmp_path / "set")
    partial = tmp_path / "set.partial"
    (partial / "tmp1234" / "set").mkdir(parents=True)
    (partial / f".0123abcd.partial.{pieces_in(partial)[0].name}").write_bytes(b"half")
    seen = []

    def look(*arguments):
        seen.extend(sorted(path.name for path in partial.iterdir() if path.suffix or path.is_dir()))
        return original(*arguments)

    original = shards.read_piece
    monkeypatch.setattr(shards, "read_piece", look)
    prepared(raw, tmp_path / "set")
    assert set(seen) == {".run.json", ".run.lock", "UNFINISHED.txt", "unfinished"}
    assert not partial.exists() and "train-00000-of-00001.parquet" in os.listdir(tmp_path / "set" / "data")


def test_a_result_that_appeared_meanwhile_stays(raw, tmp_path, monkeypatch):
    original = shards.check_partial
    monkeypatch.setattr(shards, "check_partial", lambda partial: (tmp_path / "set").mkdir() or original(partial))
    with pytest.raises(FileExistsError, match="`out` .*set exists"):
        prepared(raw, tmp_path / "set")
    assert not os.listdir(tmp_path / "set")


STOPPED = "stopped by {}: what is finished is kept, nothing is half-written. The same command goes on from here."


def test_a_signal_ends_a_run_with_one_line(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original, written = shards.write_piece, []

    def write_piece(path, table, row):
        original(path, table, row)
        written.append(path)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(shards, "write_piece", write_piece)
    arguments = ["--recipe", "recipe.yaml", "--root", "raw", "--out", "set"]
    assert preprocess.run_script(lambda: preprocess.main(arguments), preprocess.GO_ON) == 143
    assert capsys.readouterr().err.splitlines()[-1] == STOPPED.format("SIGTERM")
    assert not Path("set").exists() and sorted(pieces_in(Path("set.partial"))) == sorted(map(Path, written))
    assert preprocess.main(arguments) == 1 and len(written) == 7  # s3 cannot be read
    assert Path("set").is_dir() and not Path("set.partial").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked at in /proc")
def test_ctrl_c_ends_the_workers_as_well(tmp_path):
    """As a terminal sends it: to all processes."""
    for index in range(200):
        folder = tmp_path / "raw" / f"s{index:03d}"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(1 + np.eye(9, dtype=np.float32)[..., None], np.eye(4)), folder / "flair.nii.gz")
    recipe = {**RECIPE, "reader_options": {"modalities": {"flair": "flair.nii.gz"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, SCRIPT, "--recipe", "recipe.yaml", "--root", "raw", "--out", "set", "--num_proc", "2"]
    options = {"cwd": tmp_path, "env": {**os.environ, "HF_HOME": str(tmp_path / "home")}, "start_new_session": True}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([*map(str, command)], stderr=said, **options)
    while not pieces_in(tmp_path / "set.partial"):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130 and workers
    while any(map(alive, workers)):  # among them Python's own helper, which follows its parent
        time.sleep(0.01)
    lines = re.split(r"[\r\n]+", (tmp_path / "said").read_text().strip())
    assert lines[-1] == STOPPED.format("SIGINT") and all(line.startswith("prepare:") for line in lines[:-1])
    assert 1 <= len(pieces_in(tmp_path / "set.partial")) < 200 and not (tmp_path / "set").exists()


UNGUARDED = """
import sys
import yaml
from anodiff.data.prepare import prepare_recipe

prepare_recipe(yaml.safe_load(open("recipe.yaml")), "raw", "set", num_proc=2, progress=False)
"""


def test_a_script_without_guard_is_told_so(raw, tmp_path):
    (tmp_path / "mine.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ChildProcessError: The worker processes could not start. Each of them reads the script again that called this:"
        ' with `num_proc` above 1 the call must stand below `if __name__ == "__main__":`.'
    )
    assert "want of memory" not in done.stderr and "bootstrapping" not in done.stderr


def die(number):
    os._exit(number)


def test_a_worker_that_dies_is_explained():
    with pytest.raises(
        ChildProcessError, match="A worker process was stopped from outside, perhaps for want of memory"
    ):
        list(shards.run_tasks(die, [(9,)], 2))


def test_pieces_keep_every_bit(tmp_path):
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16"):
        arrays = {
            "image": rng.normal(size=(5, 2, 4, 6)),
            "mask": rng.integers(0, 2, (5, 3, 4, 6)).astype(np.uint8),
            "brain": rng.integers(0, 2, (5, 4, 6)).astype(np.uint8),
            "label": np.array([0, 1, -1, 0, 1], np.int8),
            "slice": np.arange(5, dtype=np.int32),
        }
        table = shards.make_table(arrays, "a/b", dtype)
        row = {"affine": [0.1 + 0.2, 1e-17, -3.0], "label": -1}
        shards.write_piece(tmp_path / "piece", table, row)
        assert [path.name for path in tmp_path.iterdir()] == ["piece"]
        assert shards.read_piece(tmp_path / "piece").equals(table, check_metadata=True)
        assert shards.read_piece_row(tmp_path / "piece") == row


PACKAGE = Path(shards.__file__).parents[1]


def imported_modules(start):
    """The modules of the package that a module needs, itself included, as paths from the root."""
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (PACKAGE / module).parents[node.level - 1] / (node.module or "").replace(".", "/")
                names = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                waiting += [name.relative_to(PACKAGE).as_posix() for name in names if name.is_file()]
    return found


def test_every_module_that_produces_data_is_part_of_the_digest():
    needed = imported_modules("data/phantoms/sets.py")
    # Words about data, messages about bad values, files as such, and what makes the processor a component of
    # checkpoints.
    no_data = {"data/card.py", "checks.py", "files.py", "hub/configuration.py", "hub/registration.py", "__init__.py"}
    assert needed - no_data == set(shards.PRODUCERS)
    assert len(shards.PRODUCERS) == len(set(shards.PRODUCERS))
    assert not {"data/leaks.py", "data/prepared.py", "data/card.py"} & set(shards.PRODUCERS)


def test_the_digest_changes_with_what_produces_data_and_nothing_else(tmp_path, monkeypatch):
    for folder in ("data", "volumes", "schedulers"):
        shutil.copytree(PACKAGE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    here = shards.code_digest()
    monkeypatch.setattr(shards, "__file__", str(tmp_path / "data" / "shards.py"))
    assert shards.code_digest() == here
    for module in ("card.py", "leaks.py", "prepared.py"):
        with open(tmp_path / "data" / module, "a") as file:
            file.write("# a comment\n")
    assert shards.code_digest() == here
    digests = {here}
    for module in shards.PRODUCERS:
        with open(tmp_path / module, "a") as file:
            file.write("# a comment\n")
        digests.add(shards.code_digest())
    assert len(digests) == 1 + len(shards.PRODUCERS)
