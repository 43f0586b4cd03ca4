"""One evaluation: the cases of every subject, spread over the processes, then the report of the first one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm.auto import tqdm

from ..data.prepared import PreparedSplit, load_prepared
from ..pipelines.base import AnomalyPipeline
from . import ensembles, maps
from .calibration import LabelledSlices
from .candidates import calibrate_checkpoint, choose_protocol, describe_model, load_pipeline, set_threshold
from .cases import slice_numbers
from .options import EvalOptions
from .publishing import check_hub, push_report
from .report import make_report, markdown
from .scoring import sweep_thresholds


# What is computed, stored and drawn, by the task of the pipelines.
KINDS = {"anomaly-detection": maps, "segmentation": ensembles}

SCORED = ("validation", "test")


def evaluate(options: EvalOptions) -> dict:
    """
    Evaluates and writes `report.json`, `report.md` and pictures into `options.output_dir`.

    Subjects are dealt to the processes in turn. Random numbers depend on the seed and on a slice's number ([`slice_numbers`]), so that
    results do not depend on the number of processes. Maps and masks go through files of the output folder, which all processes must see.

    Returns:
        `dict`: The report, on every process.
    """
    # The first process scores while the others wait; NCCL would give up after ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    output_dir = Path(options.output_dir)
    if (output_dir / "report.json").exists():
        raise FileExistsError(f"{output_dir} already holds a report. Choose another `--output_dir`, or move it away.")
    protocol = choose_protocol(options)
    kind = KINDS[protocol.TASK]
    kind.check_options(options)
    if options.push_to_hub:
        check_hub(options, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        splits = {part: load_prepared(options.data, name) for part, name in kind.split_names(options).items()}

    # 1. Cases of the models and of the baselines, a folder for each row.
    cases_dir = output_dir / "maps"
    calibrations = _calibrate(splits, options, accelerator)
    rows = []
    for number, model in enumerate(options.model):
        row = _compute_model(model, cases_dir / f"{number:02d}", splits, kind, protocol, options, accelerator)
        rows.append(row | ({"calibration": calibrations[model]} if model in calibrations else {}))
    folders = [cases_dir / f"{number:02d}" for number in range(len(rows))]
    for row, make in kind.make_baselines(splits, rows[:1], protocol, options) if options.baselines else ():
        folders.append(cases_dir / row["name"].replace(" ", "-"))
        for part, split in _scored(splits):
            for item in _read_own(split, kind, accelerator):
                make(item).save(folders[-1] / part)
        rows.append(row)
    accelerator.wait_for_everyone()

    # 2. Scores and report.
    if accelerator.is_main_process:
        report = _score(rows, folders, splits, kind, protocol, options, accelerator)
        (output_dir / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8")
        for row in rows if options.set_threshold else ():
            if row["kind"] == "pipeline":
                set_threshold(Path(row["model"]), row["metrics"][f"threshold_{options.set_threshold}"])
        if not options.keep_maps:
            shutil.rmtree(cases_dir, ignore_errors=True)
    accelerator.wait_for_everyone()
    report = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
    accelerator.end_training()  # takes the process group down: nothing waits for anybody from here on
    if accelerator.is_main_process and options.push_to_hub:
        print(f"Pushed to {push_report(options, report, splits['test'].recipe, output_dir)}")
    return report


def _calibrate(splits: dict[str, PreparedSplit], options: EvalOptions, accelerator: Accelerator) -> dict[str, dict]:
    """Records of the calibrations, by model, on the first process; the others wait, and then load what was stored."""
    records = {}
    if options.calibrate and accelerator.is_main_process:
        slices = LabelledSlices(splits["validation"], options.calibration_slices)
        for model in options.model:
            records[model] = calibrate_checkpoint(model, slices, splits["validation"], options, accelerator.device)
    accelerator.wait_for_everyone()
    return records


def _compute_model(
    model: str,
    folder: Path,
    splits: dict[str, PreparedSplit],
    kind: ModuleType,
    protocol: ModuleType,
    options: EvalOptions,
    accelerator: Accelerator,
) -> dict:
    """Writes the cases that a model makes of this process's subjects; returns the row of the report, not yet scored."""
    pipeline = load_pipeline(model, options, accelerator.device)
    pipeline.processor.check_equal(splits["test"].processor_settings, f"{model} was trained with")
    seconds, count = 0.0, 0
    for part, split in _scored(splits):
        title = f"{Path(model).name}, {part}"
        for items in _batches(split, kind, options.batch_size, title, accelerator):
            results, duration = _map(pipeline, split, items, protocol, options)
            start = 0
            for item in items:
                rows = slice(start, start + len(item["image"]))
                start = rows.stop
                kind.finish_case(item, results, rows, pipeline, protocol).save(folder / part)
            seconds, count = seconds + duration, count + start
    totals = np.sum(gather_object([(seconds, count)]), 0)
    return {
        **describe_model(model, pipeline, options),
        "settings": kind.make_row_settings(pipeline),
        "seconds_per_slice": float(totals[0] / max(totals[1], 1)),
    }


@torch.no_grad()
def _map(
    pipeline: AnomalyPipeline, split: PreparedSplit, items: list[dict], protocol: ModuleType, options: EvalOptions
) -> tuple:
    """Results of some subjects together, and the seconds that they took: from slices to filtered maps, without reading and writing."""
    images, brain = (torch.from_numpy(np.concatenate([item[key] for item in items])) for key in ("image", "brain"))
    numbers = np.concatenate([slice_numbers(split, item["subject"], item["slice"]) for item in items])
    settings = {key: value for key, value in protocol.NEEDS.settings.items() if key in pipeline.default_settings()}
    device = pipeline._execution_device
    start = time.perf_counter()
    results = pipeline.map_slices(
        images.to(device),
        brain.to(device),
        numbers.tolist(),
        volumes=[len(item["image"]) for item in items],
        batch_size=options.batch_size,
        seed=options.seed,
        **settings,
    )
    return results, time.perf_counter() - start


def _scored(splits: dict[str, PreparedSplit]) -> list[tuple[str, PreparedSplit]]:
    return [(part, splits[part]) for part in SCORED if part in splits]


def _read_own(split: PreparedSplit, kind: ModuleType, accelerator: Accelerator) -> Iterator[dict]:
    """The subjects of this process, read."""
    for subject in kind.choose_subjects(split)[accelerator.process_index :: accelerator.num_processes]:
        yield {"subject": subject, "group": split.subject_info[subject]["group"], **split.read_subject(subject)}


def _batches(
    split: PreparedSplit, kind: ModuleType, batch_size: int, title: str, accelerator: Accelerator
) -> Iterator[list[dict]]:
    """The subjects of this process, those of few slices (pictures) put together, so that batches are full."""
    waiting: list[dict] = []
    mine = len(kind.choose_subjects(split)[accelerator.process_index :: accelerator.num_processes])
    bar = tqdm(total=mine, desc=title, disable=not accelerator.is_local_main_process, unit="subject")
    for item in _read_own(split, kind, accelerator):
        waiting.append(item)
        if sum(len(one["image"]) for one in waiting) >= batch_size:
            yield waiting
            bar.update(len(waiting))
            waiting = []
    if waiting:
        yield waiting
        bar.update(len(waiting))
    bar.close()


def _score(
    rows: list[dict],
    folders: list[Path],
    splits: dict[str, PreparedSplit],
    kind: ModuleType,
    protocol: ModuleType,
    options: EvalOptions,
    accelerator: Accelerator,
) -> dict:
    """Scores rows from their cases, in place, and writes everything of the report but `report.json`; returns the report."""
    output_dir = Path(options.output_dir)
    protocols = list(dict.fromkeys([kind.OWN_PROTOCOL, protocol]))
    thresholds = None if options.sweep is None else sweep_thresholds(options.sweep)
    for row, folder in zip(tqdm(rows, desc="scoring"), folders, strict=True):
        files = {
            part: [folder / part / f"{name}.npz" for name in kind.choose_subjects(split)]
            for part, split in _scored(splits)
        }
        row |= {"metrics": {}, "subjects": []}
        for one in protocols:
            metrics, records, more = one.score(row, files, thresholds, options)
            row["metrics"] |= metrics
            row |= more
            row["subjects"] = [old | new for old, new in zip_longest(row["subjects"], records, fillvalue={})]
    pictured = list(zip(rows, folders, strict=True))
    if options.baselines:
        rows = rows + kind.make_statistics(splits)
    report = make_report(options, kind, protocols, splits["test"], rows, accelerator.device, accelerator.num_processes)
    kind.draw(report, pictured, splits["test"], output_dir)
    columns = {name: title for one in protocols for name, title in one.COLUMNS.items()}
    (output_dir / "report.md").write_text(markdown(report, columns), encoding="utf-8")
    return report
