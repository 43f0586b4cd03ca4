"""How the trainings of a benchmark share their time, and what becomes of those that fail."""

import json
import re
import types
from pathlib import Path

import pytest
import yaml

from anodiff import VolumeProcessor
from anodiff.files import lock_folder
from anodiff.ranking.plan import METHODS, Counts, Entry, Facts
from anodiff.ranking.run import Evaluations, Trainings, publish, run_benchmark
from anodiff.reports import page
from tests.hub.test_model_card import evaluation
from tests.tiny import make_pipeline


COUNTS = Counts(healthy=30, anomalous=10, annotations=1)
SECONDS = 0.5  # of a step


class Machine:
    """Stands for `accelerate launch train.py`: a step takes half a second, and the trainings in `broken` fail."""

    def __init__(self, broken=()):
        self.broken, self.calls = set(broken), []

    def run(self, script, arguments, log: Path) -> str | None:
        config = yaml.safe_load(Path(arguments[1]).read_text())
        train = config["train"]
        folder = Path(train["output_dir"])
        self.calls.append((folder.name, train["max_steps"], "--train.resume" in arguments))
        if folder.name in self.broken:
            return "The loss is nan at step 3."
        for step in range(train["checkpoint_every"], train["max_steps"] + 1, train["checkpoint_every"]):
            checkpoint = folder / "checkpoints" / f"step-{step:07d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "training.json").write_text(json.dumps({"step": step, "seconds": step * SECONDS}))
        (folder / "pipeline").mkdir(parents=True)
        return None


def make_trainings(folder, machine, budget=100.0) -> Trainings:
    settings = VolumeProcessor(modalities=("flair",), size=(64, 64)).settings()
    facts = Facts(settings, {"train": COUNTS, "validation": COUNTS, "test": COUNTS})
    return Trainings(folder, facts, "prepared/x", budget, machine)


def entries(*names) -> list[Entry]:
    return [Entry(name, "training" if METHODS[name].pipeline else "part", METHODS[name].config) for name in names]


def test_the_budget_is_shared_equally(tmp_path):
    machine = Machine()
    trainings = make_trainings(tmp_path, machine)
    trainings.run(entries("dae", "spark", "cddpm", "sadm"))
    steps = [count for name, count, _ in machine.calls if not name.endswith(".measured")]
    # 25 s each; its three steps of measurement are in them. Checkpoints are every tenth of it, so that the last one may
    # lie before the last step, and what is left over goes to the next.
    assert steps[0] == 47 and all(count >= 47 for count in steps) and sum(steps) * SECONDS <= 100
    assert trainings.state("dae")["state"] == "trained" and trainings.state("dae")["measuring"] == 1.5
    assert trainings.used(["dae", "spark", "cddpm", "sadm"]) <= 100
    config = yaml.safe_load((tmp_path / "cddpm.yaml").read_text())
    assert config["objective"]["encoder_path"] == str(tmp_path / "spark" / "pipeline")
    assert config["optim"]["warmup_steps"] == config["train"]["max_steps"] // 10
    assert config["train"]["validate_every"] > 0 and not list(tmp_path.glob("*.measured*"))
    # Once more: nothing is left to do.
    machine.calls.clear()
    trainings.run(entries("dae", "spark", "cddpm", "sadm"))
    assert machine.calls == []


def count_steps(machine) -> dict[str, int]:
    return {name: count for name, count, _ in machine.calls if not name.endswith(".measured")}


def test_what_fails_is_written_down_and_the_others_go_on(tmp_path, capsys):
    machine = Machine(broken=["spark"])
    trainings = make_trainings(tmp_path, machine)
    names = "spark", "cddpm", "sadm", "anoddpm"
    trainings.run(entries(*names))
    states = {name: trainings.state(name) for name in names}
    assert [one["state"] for one in states.values()] == ["failed", "failed", "failed", "trained"]
    assert states["spark"]["reason"] == "The loss is nan at step 3."
    assert (states["cddpm"]["reason"], states["sadm"]["reason"]) == (
        "it needs spark, which failed",
        "it needs cddpm, which failed",
    )
    assert "FAILED spark: The loss is nan at step 3." in capsys.readouterr().err
    # 25 s each: what failed, and what needs it, keeps its share.
    assert count_steps(machine) == {"spark": 47, "anoddpm": 47}
    # What was wrong is mended: the plan of steps stays, and what needs it is trained, too.
    machine.broken.clear()
    planned = (tmp_path / "spark.yaml").read_text()
    trainings.run(entries(*names))
    assert all(trainings.state(name)["state"] == "trained" for name in names)
    assert (tmp_path / "spark.yaml").read_text() == planned and "reason" not in trainings.state("spark")
    assert all(47 <= count <= 55 for count in count_steps(machine).values()) and trainings.used(names) <= 100


def test_a_training_whose_step_could_not_be_measured_keeps_its_share(tmp_path):
    machine = Machine(broken=["dae.measured"])
    trainings = make_trainings(tmp_path, machine)
    trainings.run(entries("dae", "andi"))
    assert count_steps(machine) == {"andi": 97}
    machine.broken.clear()
    trainings.run(entries("dae", "andi"))
    assert 97 <= count_steps(machine)["dae"] <= 107 and trainings.used(["dae", "andi"]) <= 100


def test_a_training_that_was_stopped_keeps_its_share(tmp_path):
    """Of its seconds those that it has still to take, too."""
    machine = Machine(broken=["andi"])
    trainings = make_trainings(tmp_path, machine)
    trainings.run(entries("dae", "andi"))
    left = 120 - trainings.used(["dae", "andi"])
    machine.broken.clear()
    trainings = make_trainings(tmp_path, machine, budget=120.0)
    trainings.run(entries("dae", "anoddpm", "andi"))
    assert 20 <= left <= 25 and count_steps(machine)["anoddpm"] == int((left - 1.5) / SECONDS)
    assert trainings.used(["dae", "anoddpm", "andi"]) <= 120


def test_a_method_that_is_added_gets_what_the_budget_was_raised_by(tmp_path):
    machine, names = Machine(), ("dae", "andi", "autoddpm", "pddpm")
    make_trainings(tmp_path, machine).run(entries(*names))
    left = 125 - make_trainings(tmp_path, machine).used(names)
    # Whether it stands before the others or behind them.
    make_trainings(tmp_path, machine, budget=125.0).run(entries("anoddpm", *names))
    assert left >= 25 and count_steps(machine)["anoddpm"] == int((left - 1.5) / SECONDS)


@pytest.mark.parametrize(
    ("budget", "reason", "measured"),
    [
        (20.0, "the budget is used up: raise `--budget`", []),
        (1.9, "the budget is used up: raise `--budget` (of its 1.9 s, measuring the time of a step took 1.5 s)", [1]),
    ],
)
def test_a_training_without_time_fails(tmp_path, budget, reason, measured):
    machine = Machine()
    others = ["dae"] * (not measured)
    make_trainings(tmp_path, machine).run(entries(*others))
    make_trainings(tmp_path, machine, budget).run(entries(*others, "anoddpm"))
    assert make_trainings(tmp_path, machine).state("anoddpm") == {"state": "failed", "reason": reason}
    assert len([name for name, *_ in machine.calls if name == "anoddpm.measured"]) == len(measured)
    # With a larger budget it is trained.
    make_trainings(tmp_path, machine, budget=200.0).run(entries(*others, "anoddpm"))
    assert count_steps(machine)["anoddpm"] > 150


def test_a_training_that_was_stopped_goes_on_at_its_checkpoint(tmp_path):
    machine = Machine(broken=["dae"])
    trainings = make_trainings(tmp_path, machine)
    trainings.run(entries("dae"))
    checkpoint = tmp_path / "dae" / "checkpoints" / "step-0000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training.json").write_text('{"step": 20, "seconds": 10.0}')
    trainings.run(entries("dae"))
    assert machine.calls[-1] == ("dae", machine.calls[-2][1], True) and not machine.calls[-2][2]


def test_a_run_that_is_still_there_is_no_failure(tmp_path):
    trainings = make_trainings(tmp_path, Machine())
    with lock_folder(tmp_path / "dae"), pytest.raises(BlockingIOError, match="is in use by process"):
        trainings.run(entries("dae"))
    assert trainings.state("dae") == {"state": "planned"}


class Scorer:
    """Stands for `accelerate launch eval.py`: leaves a report, or the first model's folder of maps alone."""

    def __init__(self, broken=()):
        self.broken, self.calls = set(broken), []

    def run(self, script, arguments, log: Path) -> str | None:
        self.calls.append(arguments)
        folder = Path(arguments[arguments.index("--output_dir") + 1])
        if folder.name in self.broken:
            return "out of memory"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text("{}")
        return None


def test_evaluations_are_kept_and_failures_are_tried_again(tmp_path):
    scorer = Scorer(broken=["b"])
    evaluations = Evaluations(tmp_path / "evaluations", ["--data", "x"], scorer)
    assert evaluations.run({"a": "one", "b": "two"}) == ["a"] and evaluations.failure("b") == "out of memory"
    evaluations.compare(["a"], tmp_path / "evaluation")
    scorer.broken.clear()
    assert evaluations.run({"a": "one", "b": "two"}) == ["a", "b"] and evaluations.failure("b") is None
    (tmp_path / "evaluation" / "report.json").write_text('"of one"')
    evaluations.compare(["a", "b"], tmp_path / "evaluation")
    evaluations.compare(["a", "b"], tmp_path / "evaluation")
    # The comparison of one is kept beside that of two, which is not made again.
    assert (tmp_path / "evaluation-1" / "report.json").read_text() == '"of one"'
    assert [len(arguments) for arguments in scorer.calls] == [10, 10, 6, 10, 8]


def contents(folder) -> dict:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


@pytest.mark.parametrize(
    "name",
    ["report.json", "report.md", "report.html", "report_scans", "trainings", "evaluations", "evaluation"]
    + ["evaluation.json", "evaluation.log"],
)
def test_what_is_of_no_benchmark_is_not_replaced(tmp_path, name):
    """Such as an evaluation in the folder; nothing is started and written."""
    if "." in name:
        (tmp_path / name).write_text(page.MARK)  # of the library, which alone is no reason
    else:
        (tmp_path / name).mkdir()
    before = contents(tmp_path)
    options = types.SimpleNamespace(output_dir=str(tmp_path), launch="", data="x", split="test")
    with pytest.raises(FileExistsError, match=f"holds {re.escape(name)} already, .*another `--output_dir`"):
        run_benchmark(options, 100.0, Facts({}, {"test": COUNTS}), [])
    assert contents(tmp_path) == before


def test_a_page_of_the_users_own_is_refused_before_the_work(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "benchmark.json").write_text("{}")
    options = types.SimpleNamespace(output_dir=str(tmp_path), launch="", data="x", split="test")
    with pytest.raises(FileExistsError, match="report.html is no report of this library"):
        run_benchmark(options, 100.0, Facts({}, {"test": COUNTS}), [])
    assert contents(tmp_path) == {"report.html": "mine", "benchmark.json": "{}"}


def test_what_was_trained_is_pushed_with_its_results_and_the_baselines(near_hub, tmp_path):
    trainings = make_trainings(tmp_path / "trainings", Machine())
    folder = trainings.pipeline("dae")
    make_pipeline("DAEPipeline").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    report = evaluation()
    given, baseline = report["results"]
    trained = {**given, "name": "DAE", "metrics": {"voxel_average_precision": 0.72}}
    report |= {"results": [trained, given, baseline], "comparisons": [{"rows": [0, 1]}]}
    output = tmp_path / "out"
    (output / "evaluation").mkdir(parents=True)
    publish(report, ["dae", "outputs/pipeline"], trainings, output, {}, push_to_hub="me")
    assert set(near_hub.repositories) == {("model", "me/dae-lesions")}
    card = near_hub.files("me/dae-lesions")["README.md"].decode()
    assert card == (folder / "README.md").read_text()
    assert "0.720" in card and "0.660" in card and "0.610" not in card and "value: 0.72" in card
