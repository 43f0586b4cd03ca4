"""`benchmark.py` as a person runs it: trainings through `accelerate launch`, stopped and gone on with."""

import json
import re
import signal
import time

import psutil
import pytest

from anodiff.benchmark import main
from anodiff.ranking.run import Launcher


def state(folder, name):
    path = folder / "trainings" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "planned"}


@pytest.mark.timeout(900)
def test_a_benchmark_is_stopped_and_gone_on_with(workplace, monkeypatch, capsys):
    """Two trainings, each with its measurement, two evaluations and one of all, in processes of their own. Those before
    the stop are started by `accelerate launch`, the others as forks."""
    folder = workplace.folder / "ranked"
    arguments = ["--data", "prepared", "--methods", "anoddpm", "--budget", "8s", "--output_dir", "ranked"]
    begun = workplace.start("benchmark", *arguments)
    end = time.monotonic() + 400
    while state(folder, "dae")["state"] != "trained":
        assert begun.poll() is None and time.monotonic() < end, begun.communicate()
        time.sleep(0.1)
    children = psutil.Process(begun.pid).children(recursive=True)
    begun.send_signal(signal.SIGTERM)
    out, error = begun.communicate(timeout=120)
    assert begun.returncode == 143 and "stopped by SIGTERM" in error and "The same command goes on." in error
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert re.search("^dae +train and evaluate +dae_64.yaml$", out, re.M) and "2 trainings share 8 s" in out
    weights = folder / "trainings" / "dae" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns, weights.read_bytes(), state(folder, "dae")

    def run(launcher, script, arguments, log):
        done = workplace.run(script, *arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)

    monkeypatch.setattr(Launcher, "run", run)
    monkeypatch.chdir(workplace.folder)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "dae: trained already." in said and "anoddpm: trained, " in said
    assert (weights.stat().st_mtime_ns, weights.read_bytes(), state(folder, "dae")) == before
    report = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in report["results"][:2]] == ["DAE (dae)", "AnoDDPM (anoddpm)"]
    rows = report["ranking"]["rows"]
    values = [report["results"][row["result"]]["metrics"]["voxel_average_precision"] for row in rows]
    assert values == sorted(values, reverse=True) and len(values) == 2 + 3 * 2  # three baselines of two modalities
    own = {row["name"]: row for row in rows if row["origin"] == "trained here"}
    assert own["DAE (dae)"]["steps"] == before[2]["steps"] and own["DAE (dae)"]["training_seconds"] > 0
    assert all("healthy training subjects" in row["trained_on"] for row in own.values())
    assert "mean intensity" in report["ranking"]["absent"]
    text = (folder / "report.md").read_text()
    assert text.startswith("# Ranking on prepared, test") and "## Trained on" in text and "## Protocol" in text
    assert "<title>Benchmark on prepared, test" in (page := (folder / "report.html").read_text())
    assert str(workplace.folder) not in page and str(workplace.folder) not in (folder / "report.json").read_text()
    assert "prepared, test" in (folder / "trainings" / "anoddpm" / "pipeline" / "README.md").read_text()

    # All is there: nothing is launched.
    logs = {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")} == logs
    with pytest.raises(ValueError, match="ranked holds a benchmark of other data: `split` differ"):
        main([*arguments, "--split", "validation"])
