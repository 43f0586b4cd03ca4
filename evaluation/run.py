"""One evaluation: the cases of every subject, spread over the processes, then the report of the first one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm.auto import tqdm

from ..checks import check_choice
from ..data.prepared import PreparedSplit, load_prepared
from ..files import check_name, lock_folder, read_json, write_json, write_text
from ..hub.shipped import add_samples
from ..pipelines.base import AnomalyPipeline
from ..pipelines.batches import choose_batch_size
from ..pipelines.guarantee import COUNTED, describe_scoring, find_changes
from ..pipelines.slices import SliceResults
from . import conformal, ensembles, maps
from .calibration import LabelledSlices, calibrate
from .candidates import choose_protocol, describe_model, load_pipeline, store_values
from .cases import Case, Tally, slice_numbers, slice_spacing
from .comparisons import compare
from .options import EvalOptions
from .page import write_page
from .publishing import FORMER_CARD, check_hub, push_report
from .report import data_name, make_report, markdown
from .scoring import sweep_thresholds
from .strata import check_strata, divide, score_strata


# What is computed, stored and drawn, by the task of the pipelines.
KINDS = {"anomaly-detection": maps, "segmentation": ensembles}


# Of an evaluation under way: the cases, and what of the output folder is its own, so that the next one may go over it
# if this one is killed.
CASES, RECORD = ".cases", ".evaluation.json"
# What a row says of its model, and not of its scores.
DESCRIBES = ("name", "kind", "model", "commit", "training_population", "settings", "fast", "seconds_per_slice")
# What an evaluation leaves beside `report.json` and the maps; pages where they are wanted, the last two where it is
# pushed.
PAGES = ("report.html", "report_scans")
PRODUCTS = ("cases.png", "reliability.png", "report.md", *PAGES, "card", FORMER_CARD)


def evaluate(options: EvalOptions) -> dict:
    """Evaluates and writes `report.json`, `report.md` and pictures into `options.output_dir`; returns the report, on
    every process.

    Subjects are dealt to the processes in turn. Random numbers depend on the seed and on a slice's number
    ([`slice_numbers`]), so that results do not depend on the number of processes. Maps and masks go through files of
    the output folder, which all processes must see. `report.json` is written last and whole: an evaluation that was
    stopped before it begins anew, and goes over what it had written.

    Raises:
        FileExistsError: The folder holds a report already, or something that would be replaced.
        BlockingIOError: Another evaluation is writing into the folder.
    """
    # The first process scores while the others wait; NCCL would give up after ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    output_dir = Path(options.output_dir)
    _list_own(output_dir, options)
    evaluation = _Evaluation(options, accelerator)
    with lock_folder(output_dir) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            # Another evaluation may have ended since.
            for name in _list_own(output_dir, options):
                _remove(output_dir / name)
            write_json(output_dir / RECORD, [CASES, *_products(options)])
            evaluation.calibrate()
        accelerator.wait_for_everyone()
        evaluation.compute_models()
        # Scored again, beside the others.
        evaluation.rows += [row for row, _ in evaluation.merged]
        evaluation.folders += [folder for _, folder in evaluation.merged]
        evaluation.compute_baselines()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            evaluation.finish()
        accelerator.wait_for_everyone()
        report = read_json(output_dir / "report.json")
        accelerator.end_training()  # takes the process group down: nothing waits for anybody from here on
        if accelerator.is_main_process and options.push_to_hub:
            print(f"Pushed to {push_report(options, report, evaluation.splits['test'].recipe, output_dir)}")
    return report


def _products(options: EvalOptions) -> list[str]:
    unwanted = [*(PAGES if options.report == "none" else ()), *(() if options.push_to_hub else ("card", FORMER_CARD))]
    return [name for name in PRODUCTS if name not in unwanted]


def _list_own(output_dir: Path, options: EvalOptions) -> list[str]:
    """The names of what a killed evaluation has left in the output folder. Raises a `FileExistsError` if there is a
    report, or something that is not left by one and that this evaluation would replace."""
    report = output_dir / "report.json"
    if report.exists():
        try:
            read_json(report)
        except ValueError:
            raise FileExistsError(
                f"{report} is no whole report: the evaluation that wrote it was stopped. Remove it, or choose another"
                " `--output_dir`."
            ) from None
        raise FileExistsError(f"{output_dir} already holds a report. Choose another `--output_dir`, or move it away.")
    recorded = read_json(output_dir / RECORD) if (output_dir / RECORD).exists() else []
    own = [name for name in (CASES, "maps", *PRODUCTS) if name in recorded]
    made = [CASES, *_products(options), *(["maps"] if options.keep_maps else [])]
    taken = [name for name in made if name not in own and os.path.lexists(output_dir / name)]
    if taken:
        raise FileExistsError(
            f"{output_dir} holds {', '.join(taken)} already, which this evaluation would replace. Choose another"
            " `--output_dir`, or move that away."
        )
    return own


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Evaluation:
    """The state of one evaluation: options, data, and the rows of the report, each with the folder of its cases."""

    def __init__(self, options: EvalOptions, accelerator: Accelerator):
        self.options, self.accelerator = options, accelerator
        check_choice("report", options.report, ("html", "none"))
        self.protocol = choose_protocol(options)
        self.kind = KINDS[self.protocol.TASK]
        self.kind.check_options(options)
        if not options.model and not options.merge and not options.baselines:
            raise ValueError("There is nothing to evaluate: give `--model`, or leave `baselines` on.")
        if options.push_to_hub:
            check_hub(options, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        with accelerator.main_process_first():
            names = self.kind.name_splits(options)
            self.splits = {part: load_prepared(options.data, name) for part, name in names.items()}
        check_strata(options.strata, self.splits["test"])
        if options.calibrate == "conformal":
            conformal.check_split(self.splits["validation"], options.alpha)
        self.folder = Path(options.output_dir) / CASES
        self.rows: list[dict] = []
        self.folders: list[Path] = []
        self.calibrations: list[dict] = []
        # Of each model: what its scores depend on, and the record of its checkpoint.
        self.scorings: list[dict] = []
        self.records: list[dict | None] = []
        # Before the work, which what does not fit must not end.
        self.merged = self._read_merged()

    def calibrate(self) -> None:
        """Calibrates the checkpoints, if that is wanted, and stores the values in their folders, which other processes
        load; keeps the records, one per model."""
        options = self.options
        if options.calibrate and options.calibrate != "conformal":
            slices = LabelledSlices(self.splits["validation"], options.calibration_slices)
            for model in options.model:
                pipeline = load_pipeline(model, options, self.accelerator.device, self.splits["validation"])
                if options.calibration_slices is not None and pipeline.processor.config.context:
                    raise ValueError(
                        f"`calibration_slices` must not be given for {model}, which sees the neighbours of a slice:"
                        " they would be left out. Leave `calibration_slices` out."
                    )
                record = calibrate(
                    pipeline,
                    slices,
                    options.calibrate,
                    guidance_scales=options.guidance_scales,
                    healthy_fpr=options.healthy_fpr,
                    seed=options.seed,
                    batch_size=options.batch_size,
                )
                store_values(Path(model), record["values"])
                self.calibrations.append(record)

    def compute_models(self) -> None:
        """Writes the cases that the models make of this process's subjects, and adds their rows."""
        for number, model in enumerate(self.options.model):
            pipeline = load_pipeline(model, self.options, self.accelerator.device, self.splits["test"])
            # Before the work: a Hub that does not answer must not end it.
            row = describe_model(model, pipeline, self.options)
            # Two models of one name must not share a folder.
            self.folders.append(self.folder / f"{number:02d}")
            if self.options.calibrate == "conformal" and self._settings(pipeline) != pipeline.default_settings():
                raise ValueError(
                    f"`calibrate conformal` needs a protocol that takes the settings of {model} as they are: leave"
                    f" `protocol` {self.options.protocol} out."
                )
            self.records.append(pipeline.config.get("calibration"))
            self.scorings.append(describe_scoring(pipeline, self._settings(pipeline), self.options.seed))
            times = []
            for part, split in self.splits.items():
                title = f"{Path(model).name}, {part}"
                for items in self._batches(split, title):
                    try:
                        results, seconds = self._map(pipeline, split, items)
                    except ValueError as error:
                        names = ", ".join(item["subject"] for item in items)
                        raise ValueError(f"{title}, subject(s) {names}: {error}") from error
                    start = 0
                    for item in items:
                        rows = slice(start, start := start + len(item["image"]))
                        case = self.kind.make_case_of(item, results, rows, pipeline, self.protocol)
                        case.save(self.folders[-1] / part)
                    times.append((seconds, start))
            seconds, slices = np.sum(gather_object(times), 0)
            settings = self.kind.describe_settings(pipeline)
            fast = {} if pipeline.fast is None else {"fast": pipeline.fast}
            self.rows.append({**row, "settings": settings, **fast, "seconds_per_slice": float(seconds / slices)})

    def compute_baselines(self) -> None:
        """Writes the cases that the baselines make of this process's subjects, and adds their rows."""
        if not self.options.baselines:
            return
        for row, make in self.kind.make_baselines(self.splits, self.rows[:1], self.protocol, self.options):
            self.rows.append(row)
            name = row["name"].replace(" ", "-")
            check_name(f"a row of {self.options.data}", name)  # it holds the name of a modality
            self.folders.append(self.folder / name)
            for part, split in self.splits.items():
                for item in self._read_own(split):
                    make(item).save(self.folders[-1] / part)

    def finish(self) -> None:
        """Scores, stores thresholds where that is wanted, and writes the report, which ends the evaluation."""
        options, output_dir = self.options, Path(self.options.output_dir)
        # The rows of the models come first.
        for row, record in zip(self.rows, self.calibrations, strict=False):
            row["calibration"] = record
        report = self.score()
        if options.calibrate == "conformal":
            for model, row in zip(options.model, self.rows, strict=False):
                store_values(Path(model), {"calibration": row["calibration"]})
        undefined = []
        for model, row in zip(options.model, self.rows, strict=False) if options.set_threshold else ():
            threshold = row["metrics"][f"threshold_{options.set_threshold}"]
            if threshold is None:
                undefined.append(row["name"])
            else:
                store_values(Path(model), {"threshold": threshold})
        if options.keep_maps:
            if os.path.lexists(output_dir / "maps"):
                raise FileExistsError(f"{output_dir / 'maps'} was made meanwhile: move it away, and evaluate again.")
            write_json(output_dir / RECORD, [CASES, "maps", *_products(options)])
            os.rename(self.folder, output_dir / "maps")
        write_json(output_dir / "report.json", report)
        _remove(self.folder)
        _remove(output_dir / RECORD)
        if undefined:
            raise ValueError(
                f"`set_threshold`: the validation split does not allow the policy {options.set_threshold}; none was"
                f" stored for {', '.join(undefined)}. The report is in {output_dir}."
            )

    def score(self) -> dict:
        """Scores the rows from their cases, draws, and writes `report.md`; returns the report."""
        options, kind, output_dir = self.options, self.kind, Path(self.options.output_dir)
        protocols = list(dict.fromkeys([kind.OWN_PROTOCOL, self.protocol]))
        thresholds = None if options.sweep is None else sweep_thresholds(options.sweep)
        divided = divide(self.splits["test"], options.strata)
        tallies: list[Tally] = []
        for row, folder in zip(tqdm(self.rows, desc="scoring"), self.folders, strict=True):
            files = {
                part: [folder / part / f"{name}.npz" for name in kind.choose_subjects(split)]
                for part, split in self.splits.items()
            }
            row |= {"metrics": {}, "subjects": []}
            for protocol in protocols:
                metrics, records, more, tally = protocol.score(row, files, thresholds, options)
                row["metrics"] |= metrics
                row |= more
                if tally is not None:
                    tallies.append(tally)
                    row |= {"strata": score_strata(tally, files["test"], divided)} if divided else {}
                row["subjects"] = [old | new for old, new in zip_longest(row["subjects"], records, fillvalue={})]
        for number in range(len(options.model)):
            self._score_promises(number)
        statistics = kind.make_statistics(self.splits) if options.baselines else []
        report = make_report(options, kind, protocols, self.splits["test"], self.rows + statistics, self.accelerator)
        if tallies:
            # Rows without maps come last.
            groups = {metric: number for tally in tallies for metric, number in tally.num_groups.items()}
            report["comparisons"] = compare(self.rows, [tally.resamples for tally in tallies], groups)
        kind.draw(report, list(zip(self.rows, self.folders, strict=True)), self.splits["test"], output_dir)
        columns = {
            name: add_samples(name, title, self.rows)
            for protocol in protocols
            for name, title in protocol.COLUMNS.items()
        }
        write_text(output_dir / "report.md", markdown(report, columns))
        if options.report == "html":
            write_page(report, columns, self.splits["test"], self.folders, output_dir / PAGES[0])
        return report

    def _score_promises(self, number: int) -> None:
        """Calibrates a model on the cases of the validation split, if that is wanted, and measures on those of the test
        split how the promises of its calibration were kept."""
        options, row, folder = self.options, self.rows[number], self.folders[number]
        record, scoring = self.records[number], self.scorings[number]

        def read(part: str) -> Iterator[Case]:
            return (Case.load(folder / part / f"{name}.npz") for name in self.kind.choose_subjects(self.splits[part]))

        rules = {
            part: {name: split.recipe.get("slices", {}).get(name, value) for name, value in COUNTED.items()}
            for part, split in self.splits.items()
        }
        if options.calibrate == "conformal":
            data = Path(options.data).resolve().name if Path(options.data).exists() else options.data
            record = row["calibration"] = {
                **conformal.calibrate_conformal(read("validation"), options.alpha),
                **{"data": data, "split": options.validation_split},
                **{"settings": scoring, "slices": rules["validation"]},
            }
        if record is None:
            return
        changes = find_changes(record, scoring) + ["slices"] * (dict(record["slices"]) != rules["test"])
        row["guarantee"] = {"holds": not changes}
        if changes:
            row["guarantee"]["reason"] = f"calibrated with other values of {', '.join(changes)}"
            return
        metrics, told = conformal.measure_promises(record, read("test"))
        row["metrics"] |= metrics
        row["guarantee"] |= told

    def _read_merged(self) -> list[tuple[dict, Path]]:
        """The rows of the models of earlier evaluations, with the folders where their cases lie. Raises an error if one
        is not of these data and this protocol."""
        merged = []
        for folder in map(Path, self.options.merge):
            report = read_json(folder / "report.json")
            own = {"seed": self.options.seed, "name": data_name(self.options.data), "split": self.options.split}
            given = {"seed": report["seed"], "name": report["data"]["name"], "split": report["data"]["split"]}
            given |= {key: report[key] for key in ("task",) if key in report}
            if given != own | self.kind.HEAD:
                raise ValueError(f"`merge`: {folder} is of {given}, this evaluation of {own | self.kind.HEAD}.")
            rows = [row for row in report["results"] if row["kind"] == "pipeline"]
            self._check_protocol(folder, rows)
            for number, row in enumerate(rows):
                maps = folder / "maps" / f"{number:02d}"
                self._check_cases(maps)
                merged.append(({key: row[key] for key in DESCRIBES if key in row}, maps))
        return merged

    def _check_protocol(self, folder: Path, rows: list[dict]) -> None:
        """Raises a `ValueError` if earlier rows were computed without what the protocol needs of them."""
        name = self.protocol.__name__.rpartition(".")[2]
        needs = self.protocol.NEEDS.settings or self.protocol.NEEDS.details
        # The metrics of a protocol begin with its name.
        if needs and not all(any(key.startswith(f"{name}_") for key in row["metrics"]) for row in rows):
            raise ValueError(
                f"`merge`: {folder} was evaluated without `--protocol {name}`: evaluate it again with it."
            )

    def _check_cases(self, maps: Path) -> None:
        """Raises an error if there is not a case of every subject, or one (of those of this process) is of another
        subject of its name."""
        lacks = [
            f"{part}/{subject}"
            for part, split in self.splits.items()
            for subject in self.kind.choose_subjects(split)
            if not (maps / part / f"{subject}.npz").is_file()
        ]
        if lacks:
            raise FileNotFoundError(
                f"`merge`: {maps} has no maps of {', '.join(lacks[:3])}{' ...' if len(lacks) > 3 else ''}:"
                " evaluate there with --keep_maps, of the same splits."
            )
        for part, split in self.splits.items():
            for item in self._read_own(split):
                case = self.kind.CASE.load(maps / part / f"{item['subject']}.npz")
                differing = case.find_differences(item)
                if differing:
                    raise ValueError(
                        f"`merge`: in {maps} {', '.join(differing)} of the subject {item['subject']} ({part}) differ from"
                        f" those of {self.options.data}, which was prepared otherwise: evaluate the models anew."
                    )

    def _settings(self, pipeline: AnomalyPipeline) -> dict:
        """The settings of the checkpoint, with those that the protocol needs in their place."""
        own, needed = pipeline.default_settings(), self.protocol.NEEDS.settings
        return own | {key: value for key, value in needed.items() if key in own}

    @torch.no_grad()
    def _map(self, pipeline: AnomalyPipeline, split: PreparedSplit, items: list[dict]) -> tuple[SliceResults, float]:
        """Results of some subjects together, and the seconds from slices to filtered maps, without reading and
        writing."""
        images, brain = (torch.from_numpy(np.concatenate([item[key] for item in items])) for key in ("image", "brain"))
        numbers = np.concatenate([slice_numbers(split, item["subject"], item["slice"]) for item in items])
        start = time.perf_counter()
        results = pipeline.map_slices(
            images.to(self.accelerator.device),
            brain.to(self.accelerator.device),
            numbers.tolist(),
            volumes=[len(item["image"]) for item in items],
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            **self._settings(pipeline),
        )
        return results, time.perf_counter() - start

    def _read_own(self, split: PreparedSplit) -> Iterator[dict]:
        """The subjects of this process, read."""
        first, step = self.accelerator.process_index, self.accelerator.num_processes
        for subject in self.kind.choose_subjects(split)[first::step]:
            item = split.read_subject(subject)
            spacing = slice_spacing(split, subject, item["slice"])
            yield {"subject": subject, "group": split.subject_info[subject]["group"], "spacing": spacing, **item}

    def _batches(self, split: PreparedSplit, title: str) -> Iterator[list[dict]]:
        """The subjects of this process, those of few slices (pictures) put together, so that batches are full."""
        waiting: list[dict] = []
        quiet = not self.accelerator.is_local_main_process
        for item in tqdm(self._read_own(split), desc=title, disable=quiet, unit=" subjects"):
            waiting.append(item)
            enough = self.options.batch_size or choose_batch_size(item["image"].shape[1:], self.accelerator.device)
            if sum(len(one["image"]) for one in waiting) >= enough:
                yield waiting
                waiting = []
        if waiting:
            yield waiting
