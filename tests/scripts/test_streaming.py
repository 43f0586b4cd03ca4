"""`train.py --data.streaming true` over real HTTP: nothing of the training slices is kept, and the run is what it always is."""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest


UPLOAD = """
import subprocess, sys
subprocess.run([sys.argv[1], "upload", "owner/set", sys.argv[2], "--repo-type", "dataset"], check=True, capture_output=True)
print("true")
"""


@pytest.fixture
def stream(hub, hub_client, workplace, tmp_path):
    """`stream(run, *options)` trains from owner/set, which is the workplace's prepared data set, with an empty cache."""
    hub_client(UPLOAD, Path(sys.executable).with_name("hf"), workplace.folder / "prepared", home="uploader")
    hub.requests.clear()

    def run(output: str, *options, home: str = "home", **how):
        return workplace.run(
            "train",
            *["--config", "tiny.yaml", "--data", "owner/set", "--data.streaming", "true", "--train.report_to", "none"],
            # Less than the whole split.
            *["--data.shuffle_buffer", 5, "--train.output_dir", tmp_path / output, *options],
            environment=hub.environment(tmp_path / home),
            **how,
        )

    return run


def losses(folder: Path, name: str = "loss") -> dict[int, float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def test_training_slices_stay_on_the_hub(hub, workplace, stream, tmp_path):
    slices = pq.read_table(workplace.folder / "prepared" / "subjects.parquet").to_pylist()
    length = sum(row["rows"] for row in slices if row["split"] == "train")
    steps = length // 4 + 2
    stream("one", "--train.max_steps", steps, "--train.checkpoint_every", 0, "--data.num_workers", 1)
    assert sorted(losses(tmp_path / "one")) == list(range(1, steps + 1))
    assert np.isfinite(
        [*losses(tmp_path / "one").values(), *losses(tmp_path / "one", "validation_loss").values()]
    ).all()

    # The side files and the validation split are downloaded, nothing else of the size of a shard is kept anywhere.
    (snapshot,) = (tmp_path / "home" / "hub").glob("datasets--owner--set/snapshots/*")
    kept = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert kept == {
        "data/validation-00000-of-00001.parquet",
        "processor/processor_config.json",
        "recipe.yaml",
        "subjects.parquet",
    }
    content = hub.files("owner/set", "dataset")
    shard = content["data/train-00000-of-00001.parquet"]
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and not path.is_symlink()]
    assert all(path.read_bytes() != shard for path in files)
    assert not any("train" in path.name for path in files if path.suffix == ".arrow")
    # One pass and the start of a second one; a download would ask for the head first.
    reads = [request for request in hub.requests if request.endswith("data/train-00000-of-00001.parquet")]
    assert len(reads) > 2 and {request.split()[0] for request in reads} == {"GET"}
    assert not any("test-" in request for request in hub.requests)


def test_resume_and_two_processes(stream, tmp_path):
    stream("one")
    stream("part", "--train.max_steps", 2, "--optim.lr_total_steps", 4, home="another")
    stream("part", "--train.resume", "latest", home="a third")
    assert losses(tmp_path / "part") == losses(tmp_path / "one")

    stream("two", "--train.batch_size", 2, processes=2, home="a fourth")
    for name in ("loss", "validation_loss"):
        one, two = losses(tmp_path / "one", name), losses(tmp_path / "two", name)
        assert one.keys() == two.keys()
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)


def test_a_stream_that_breaks_off(hub, stream, tmp_path):
    checkpoints = tmp_path / "broken" / "checkpoints"
    options = ["--optim.lr_total_steps", 1000, "--train.checkpoint_every", 50, "--train.validate_every", 0]

    def take_away():
        while not list(checkpoints.glob("step-*[0-9]")):
            time.sleep(0.1)
        hub.fail("GET", "/data/train-", status=404)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    done = stream("broken", "--train.max_steps", 1000, *options, check=False)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "A stream broke off: HfHubHTTPError" in last and "404" in last
    assert "Checkpoints are unharmed: `--train.resume latest` goes on from the last one" in last

    hub.failures.clear()
    reached = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*[0-9]"))
    stream("broken", "--train.resume", "latest", "--train.max_steps", reached + 1, *options)
    assert sorted(losses(tmp_path / "broken")) == list(range(1, reached + 2))
