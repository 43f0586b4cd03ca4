"""Carries a plan out: trainings within a budget, an evaluation of every model, and one of all together."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import yaml
from huggingface_hub import ModelCard

from ..data.prepared import PreparedSplit, load_prepared
from ..evaluation.options import EvalOptions
from ..evaluation.page import HELP, with_interval, write_page
from ..evaluation.protocols import pooled
from ..evaluation.publishing import push_report
from ..files import lock_folder, read_json, read_text, write_json, write_text
from ..hub.model_card import add_evaluation
from ..hub.publishing import write_card
from ..reports import Column, Section, Table
from ..reports.page import check_replaceable
from .plan import METHODS, Entry, Facts, make_configuration
from .table import ALSO, RANKED_BY, describe_next, describe_training, markdown, rank


# First steps of a measurement, which are slower, on a GPU and elsewhere; twice as many are measured after them.
_FIRST_STEPS = {True: 10, False: 1}
# Seconds that the processes of a run have to end, once they are told to.
_PATIENCE = 60
# What a benchmark leaves beside `benchmark.json`.
_PRODUCTS = ("report.json", "report.md", "report.html", "report_scans", "trainings", "evaluations")
_PRODUCTS += ("evaluation", "evaluation.json", "evaluation.log")
_USED_UP = "the budget is used up: raise `--budget`"
ONE_PROCESS = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


class Launcher:
    """Runs the scripts of the package by `accelerate launch`, their words in a file.

    Args:
        arguments (`str`): Of `accelerate launch`.
    """

    def __init__(self, arguments: str):
        self.command = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(arguments)]

    def run(self, script: str, arguments: Sequence[str], log: Path) -> str | None:
        """Runs `anodiff.SCRIPT`; returns `None`, or why it failed: its last line. Where this process is stopped, so is
        what it started."""
        log.parent.mkdir(parents=True, exist_ok=True)
        # accelerate gives a process on a CPU one thread unless it is told otherwise.
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ}
        command = [*self.command, "-m", f"anodiff.{script}", *arguments]
        with open(log, "ab") as file:
            file.write(f"\n{shlex.join(['accelerate', 'launch', *command[3:]])}\n".encode())
            file.flush()
            begun = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            with _ending(begun):
                status = begun.wait()
        return None if status == 0 else _last_message(log, status)


@contextmanager
def _ending(begun: subprocess.Popen):
    try:
        yield
    except BaseException:
        processes = []
        try:
            launcher = psutil.Process(begun.pid)
            processes = [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            pass
        for process in reversed(processes):
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        for process in psutil.wait_procs(processes, timeout=_PATIENCE)[1]:
            process.kill()
        begun.wait()
        raise


def _last_message(log: Path, status: int) -> str:
    """The line of an error in a log; the last one if none says so."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"status {status}: {lines[-1][:300]}"


class Trainings:
    """The trainings of a benchmark in a folder: of each its configuration NAME.yaml, its state NAME.json, what it said
    NAME.log, and its own output folder NAME.

    A state is `{"state": "training", "steps", "seconds_per_step", "measuring"}`, `"trained"` with `seconds` beside
    that, or `"failed"` with `reason`.

    Args:
        folder ([`~pathlib.Path`]): Theirs.
        facts ([`Facts`]): Of the data.
        data (`str`): What `train.py` reads them by.
        budget (`float`): Seconds of optimizer steps that they share.
    """

    def __init__(self, folder: Path, facts: Facts, data: str, budget: float, launcher: Launcher):
        self.folder, self.facts, self.data, self.budget, self.launcher = folder, facts, data, budget, launcher

    def state(self, name: str) -> dict:
        """Returns the state of a training."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else {"state": "planned"}

    def pipeline(self, name: str) -> Path:
        """Returns the folder that a training writes its pipeline to."""
        return self.folder / name / "pipeline"

    def used(self, names: Sequence[str]) -> float:
        """Returns the seconds of steps that trainings have taken, those of measurements among them, or are still to take
        where they were stopped or failed."""
        return sum(map(self._taken, names))

    def run(self, entries: Sequence[Entry]) -> None:
        """Trains what is not trained yet, in turn; what fails is written down, and the others go on. The time that is
        left is shared equally among the trainings that have no number of steps yet."""
        names = [entry.name for entry in entries]
        for name in names:
            if self._is_trained(name):
                print(f"{name}: trained already.", flush=True)
                continue
            with lock_folder(self.folder / name):
                pass  # a run that was cut off from its benchmark may still be there: that is an error
            part = METHODS[name].part
            if part is not None and self.state(part[0])["state"] != "trained":
                reason = f"it needs {part[0]}, which failed"
            else:
                reason = self._train(name, names)
            if reason is None:
                self._set(name, state="trained", seconds=round(self._seconds(name), 1))
                print(f"{name}: trained, {self.state(name)['steps']} steps.", flush=True)
            else:
                self._set(name, state="failed", reason=reason)
                print(f"FAILED {name}: {reason}", file=sys.stderr, flush=True)

    def _set(self, name: str, **values) -> None:
        state = {key: value for key, value in self.state(name).items() if key != "reason"}
        write_json(self.folder / f"{name}.json", state | values)

    def _is_trained(self, name: str) -> bool:
        return self.state(name)["state"] == "trained" and self.pipeline(name).is_dir()

    def _taken(self, name: str) -> float:
        state, seconds = self.state(name), self._seconds(name)
        if not self._is_trained(name):
            seconds = max(seconds, state.get("steps", 0) * state.get("seconds_per_step", 0.0))
        return seconds + state.get("measuring", 0.0)

    def _share(self, names: Sequence[str]) -> float:
        """The seconds for each of the trainings that have no number of steps yet. Those that failed keep theirs: later
        ones must not take what the next try needs."""
        planned = [name for name in names if self._is_trained(name) or (self.folder / f"{name}.yaml").exists()]
        return (self.budget - self.used(planned)) / (len(names) - len(planned))

    def _train(self, name: str, names: Sequence[str]) -> str | None:
        path, log = self.folder / f"{name}.yaml", self.folder / f"{name}.log"
        if not path.exists():
            share = self._share(names)
            if share <= 0:
                return _USED_UP
            config = make_configuration(
                name, self.facts, self.data, {part: str(self.pipeline(part)) for part in METHODS}
            )
            print(f"{name}: measuring the time of a step ...", flush=True)
            first_steps = _FIRST_STEPS[torch.cuda.is_available()]
            seconds = self._measure(name, config, first_steps)
            if isinstance(seconds, str):
                return seconds
            measuring = 3 * first_steps * seconds
            steps = int((share - measuring) / seconds)
            if steps < 1:
                return f"{_USED_UP} (of its {share:.3g} s, measuring the time of a step took {measuring:.3g} s)"
            self._set(name, state="training", steps=steps, seconds_per_step=seconds, measuring=measuring)
            write_text(
                path, yaml.safe_dump(self._plan_steps(name, config, steps), sort_keys=False, allow_unicode=True)
            )
        else:
            self._set(name, state="training")  # it was stopped or failed, and goes on where its checkpoints end
        state = self.state(name)
        print(f"{name}: {state['steps']} steps of {state['seconds_per_step']:.3g} s ...", flush=True)
        resume = ["--train.resume", "latest"] if self._records(name) else []
        return self.launcher.run("train", ["--config", str(path), *resume], log)

    def _plan_steps(self, name: str, config: dict, steps: int) -> dict:
        """The configuration with its number of steps, and what is counted in steps."""
        validated = self.facts.splits.get("validation")
        healthy = validated is not None and validated.healthy + validated.unknown > 0
        labelled = validated is not None and validated.healthy + validated.anomalous > 0
        validates = healthy if METHODS[name].learns_from == "healthy" else healthy and labelled
        config["optim"]["warmup_steps"] = min(config["optim"]["warmup_steps"], steps // 10)
        config["train"] |= {
            "output_dir": str(self.folder / name),
            "max_steps": steps,
            "validate_every": -(-steps // 4) if validates else 0,
            "checkpoint_every": -(-steps // 10),
            "log_every": max(1, min(50, steps // 20)),
        }
        return config

    def _measure(self, name: str, config: dict, first_steps: int) -> float | str:
        """Seconds per step, of a short training that is thrown away; or why it failed."""
        folder, path = self.folder / f"{name}.measured", self.folder / f"{name}.measured.yaml"
        shutil.rmtree(folder, ignore_errors=True)
        short = {
            **{"output_dir": str(folder), "max_steps": 3 * first_steps, "checkpoint_every": first_steps},
            **{"checkpoint_limit": 3, "validate_every": 0, "report_to": "none"},
        }
        optim = config["optim"] | {"warmup_steps": 0}
        write_text(path, yaml.safe_dump({**config, "optim": optim, "train": config["train"] | short}))
        reason = self.launcher.run("train", ["--config", str(path)], self.folder / f"{name}.log")
        if reason is None:
            first, _, last = (record["seconds"] for record in _read_records(folder))
        shutil.rmtree(folder, ignore_errors=True)
        path.unlink()
        return reason if reason is not None else max(last - first, 1e-3) / (2 * first_steps)

    def _records(self, name: str) -> list[dict]:
        return _read_records(self.folder / name)

    def _seconds(self, name: str) -> float:
        records = self._records(name)
        return records[-1]["seconds"] if records else 0.0


def _read_records(folder: Path) -> list[dict]:
    """The records of the checkpoints of a run, by rising step."""
    return [read_json(path) for path in sorted(folder.glob("checkpoints/step-*/training.json"))]


class Evaluations:
    """The evaluations of a benchmark in a folder: one of every model, NAME, with its maps, what it said NAME.log and,
    where it failed, NAME.json; and one of all.

    Args:
        folder ([`~pathlib.Path`]): Theirs.
        arguments (list of `str`): Of `eval.py`, those of the data among them, the same for all.
    """

    def __init__(self, folder: Path, arguments: list[str], launcher: Launcher):
        self.folder, self.arguments, self.launcher = folder, arguments, launcher

    def failure(self, name: str) -> str | None:
        """Returns why the evaluation of a model failed, or `None`."""
        path = self.folder / f"{name}.json"
        return read_json(path)["reason"] if path.exists() else None

    def run(self, models: dict[str, str]) -> list[str]:
        """Evaluates what is not evaluated yet, of models by the names of their rows; returns the names of those that are
        evaluated."""
        done = []
        for name, model in models.items():
            folder = self.folder / name
            if not (folder / "report.json").exists():
                print(f"{name}: evaluating ...", flush=True)
                of_one = ["--model", model, "--baselines", "false", "--keep_maps", "true"]
                where = ["--output_dir", str(folder)]
                reason = self.launcher.run("eval", [*of_one, *where, *self.arguments], self.folder / f"{name}.log")
                if reason is not None:
                    write_json(self.folder / f"{name}.json", {"reason": reason})
                    print(f"FAILED {name}: {reason}", file=sys.stderr, flush=True)
                    continue
                (self.folder / f"{name}.json").unlink(missing_ok=True)
            done.append(name)
        return done

    def compare(self, names: Sequence[str], target: Path) -> None:
        """Scores the maps of models and the baselines together into a folder. One of other models that lies there is
        kept under another name."""
        record = target.with_suffix(".json")
        if (target / "report.json").exists():
            if record.exists() and read_json(record) == list(names):
                return
            number = next(number for number in itertools.count(1) if not Path(f"{target}-{number}").exists())
            target.rename(f"{target}-{number}")
        print("scoring all ...", flush=True)
        write_json(record, list(names))
        merged = [argument for name in names for argument in ("--merge", str(self.folder / name))]
        log = target.with_suffix(".log")
        reason = self.launcher.run("eval", [*merged, "--output_dir", str(target), *self.arguments], log)
        if reason is not None:
            raise ValueError(f"The evaluation of all failed: {reason} All that it said is in {log}.")


def run_benchmark(options, budget: float, facts: Facts, entries: Sequence[Entry]) -> int:
    """
    Trains, evaluates, ranks, and writes `report.json`, `report.md` and `report.html`.

    Args:
        options: Of `benchmark.py`.
        budget (`float`): Seconds of optimizer steps.
        facts, entries: Of the data, and the plan.

    Returns:
        `int`: 0, or 1 if a method failed or a model of the user cannot be evaluated.

    Raises:
        FileExistsError: The folder holds something that is no benchmark's and that would be replaced.
    """
    output, launcher = Path(options.output_dir), Launcher(options.launch or ONE_PROCESS)
    with lock_folder(output):
        check_replaceable(output / "report.html")
        _check_record(
            output / "benchmark.json", {"data": options.data, "split": options.split, "facts": asdict(facts)}
        )
        trainings = Trainings(output / "trainings", facts, options.data, budget, launcher)
        planned = [entry for entry in entries if entry.kind in ("training", "part") and not entry.reason]
        trainings.run(planned)
        states = {entry.name: trainings.state(entry.name) for entry in planned}
        models = {
            entry.name: str(trainings.pipeline(entry.name)) if entry.kind == "training" else entry.source
            for entry in entries
            if not entry.reason
            and entry.kind != "part"
            and (entry.kind != "training" or states[entry.name]["state"] == "trained")
        }
        validation = "validation" if "validation" in facts.splits else "none"
        arguments = ["--data", options.data, "--split", options.split, "--validation_split", validation]
        arguments += ["--report", "none", "--fast", str(options.fast).lower()]
        evaluations = Evaluations(output / "evaluations", arguments, launcher)
        names = evaluations.run(models)
        for name in models:
            if name not in names:
                states[name] = {**states.get(name, {}), "reason": f"evaluation: {evaluations.failure(name)}"}
        evaluations.compare(names, output / "evaluation")
        report = read_json(output / "evaluation" / "report.json")
        ranking = rank(report, names, entries, states)
        folders = [evaluations.folder / name / "maps" / "00" for name in names]
        split = load_prepared(options.data, options.split)
        _write(output, {**report, "ranking": ranking}, folders, split)
        publish(report, names, trainings, output, split.recipe, options.push_to_hub)
    failed = [name for name, state in states.items() if state.get("reason")]
    failed += [entry.name for entry in entries if entry.kind == "given" and entry.reason]
    if failed:
        print(f"Not ranked: {', '.join(failed)}. The reasons are in {output / 'report.md'}.", file=sys.stderr)
    print(f"The ranking is in {output / 'report.html'}.")
    return 1 if failed else 0


def _check_record(path: Path, record: dict) -> None:
    """Writes what a benchmark is of into its folder; raises a `ValueError` if there was another one, and a
    `FileExistsError` if something is there that is of none."""
    if not path.exists():
        taken = [name for name in _PRODUCTS if os.path.lexists(path.parent / name)]
        if taken:
            raise FileExistsError(
                f"{path.parent} holds {', '.join(taken)} already, and no benchmark, which would replace that. Choose"
                " another `--output_dir`, or move that away."
            )
        write_json(path, record)
        return
    earlier = read_json(path)
    differing = [f"`{key}`" for key in record if record[key] != earlier.get(key)]
    if differing:
        raise ValueError(
            f"{path.parent} holds a benchmark of other data: {' and '.join(differing)} differ. Choose another"
            " `--output_dir`."
        )


def _write(output: Path, report: dict, folders: Sequence[Path], split: PreparedSplit) -> None:
    """Writes report, text and page."""
    ranking, results = report["ranking"], report["results"]
    metric = ranking["metric"]
    write_json(output / "report.json", report)
    head = read_text(output / "evaluation" / "report.md")
    write_text(output / "report.md", markdown(report, ranking, head))
    columns = [
        Column("rank", ""),
        Column("name", "Row"),
        Column("value", RANKED_BY[metric], HELP[metric], "higher"),
        Column("next", "Less the next", "Difference from the row below on the same subjects, with its corrected p"),
        *(Column(key, title, HELP[key], "higher") for key, title in ALSO.items() if key != metric),
        Column("origin", "Origin"),
        Column("training", "Training", "Time of the optimizer steps, here"),
        Column("seconds", "s per slice", HELP["seconds_per_slice"], "lower"),
        Column("trained_on", "Trained on"),
    ]
    rows = [
        {
            "rank": row["rank"],
            "name": row["name"],
            "value": with_interval(results[row["result"]], metric),
            "next": describe_next(row["next"]),
            **{key: with_interval(results[row["result"]], key) for key in ALSO},
            "origin": row["origin"],
            "training": describe_training(row),
            "seconds": row["seconds_per_slice"],
            "trained_on": row["trained_on"],
        }
        for row in ranking["rows"]
    ]
    caption = f"Times: {report['device']}. Small print: {report['intervals']}."
    blocks: list = [Table("Ranking", columns, rows, caption)]
    if ranking["absent"]:
        absent = [{"name": name, "reason": reason} for name, reason in ranking["absent"].items()]
        blocks.append(Table("Not ranked", [Column("name", "Row"), Column("reason", "Reason")], absent))
    data = report["data"]
    write_page(
        report,
        pooled.COLUMNS,
        split,
        folders,
        output / "report.html",
        title=f"Benchmark on {data['name']}, {data['split']}",
        sections=[Section("Ranking", blocks, above=True)],
    )


def publish(
    report: dict, names: Sequence[str], trainings: Trainings, output: Path, recipe: dict, push_to_hub: str | None
) -> None:
    """
    Puts its results, beside the baselines, into the card of every pipeline that was trained here, and pushes it.

    Args:
        report (`dict`): As `report.json` holds it; its first rows are those of `names`.
        names (sequence of `str`): Entries of the plan.
        trainings ([`Trainings`]): Where their pipelines are.
        output ([`~pathlib.Path`]): Of the benchmark.
        recipe (`dict`): Of the data.
        push_to_hub (`str`, *optional*): User or organisation; nothing is pushed without one.
    """
    short = report["data"]["name"].split("/")[-1]
    for name, row in zip(names, report["results"], strict=False):
        folder = trainings.pipeline(name)
        if name not in METHODS or not folder.is_dir():
            continue
        results = [row, *(other for other in report["results"] if other["kind"] != "pipeline")]
        own = {**report, "results": results, "comparisons": []}
        card = ModelCard(read_text(folder / "README.md"))
        write_card(folder, str(add_evaluation(card, own)))
        if push_to_hub:
            pushed = EvalOptions(model=[str(folder)], push_to_hub=f"{push_to_hub}/{name}-{short}")
            print(f"Pushed to {push_report(pushed, own, recipe, output / 'evaluation')}", flush=True)
