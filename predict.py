"""Anomaly maps of new scans, or ensembles of segmentations (CIMD).

python predict.py scan.nii.gz -o out                     # with the checkpoint of this package that fits the scan
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out
python predict.py --model outputs/train/pipeline scans/ -o out --brain brain.nii.gz
python predict.py --model owner/two-modalities patient1/ patient2/ -o out    # flair.nii.gz, t1.nii.gz in each folder
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out --dispersion 8    # also how far eight draws lie apart
accelerate launch predict.py --model owner/anoddpm-flair cohort/ -o out --skip_existing    # many scans on several GPUs
python predict.py --model owner/andi-flair scans/ -o out --fast    # what is fastest on the device, in coarser numbers

Where the model wants a brain mask and none is given, its brain extractor, if it has one, makes it: of a scan that has its
skull. The mask is written beside the maps.

A folder stands for the scans in it: its files, or its sub-folders with one file per modality. What is not predicted is
named with the reason, and the status is then 1. report.html in the output folder shows all results in a browser; it needs
no network, and `--report none` leaves it out.
Research use, not a medical device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Scans that are done keep their results; the same command with `--skip_existing` goes on with the others."


# How a scan's brain mask came about (`pipelines/brain.py`).
_ORIGINS = {
    "given": "brain mask as given",
    "extracted": "brain extracted, its mask is brain_mask.nii.gz",
    "stripped": "left as it is: its skull is off already",
    "nonzero": "brain taken as what is above the background",
    "none": "whole slices, no brain mask",
}


@dataclass
class PredictOptions:
    """Which scans, which model, where to."""

    scans: list[str] = field(default_factory=list)
    model: str = ""
    """Pipeline folder, Hub id, or name of a checkpoint that comes with the package (`anodiff models` lists them); by
    default the one of these that fits the modality."""
    modality: str | None = None
    """What the scans are, flair, t1, t2, ..., where no model is named and their names do not say it."""
    output: str = "outputs/predict"
    """Folder that gets one folder per scan (also -o)."""
    brain: str | None = None
    """Name of the brain mask that lies beside each scan, such as brain.nii.gz."""
    threshold: float | None = None
    """Threshold of the mask instead of the checkpoint's."""
    inference: dict[str, Any] = field(default_factory=dict)
    """Inference values instead of the checkpoint's: noise_level, mode, num_draws, ..."""
    seed: int = 0
    """Seed of the draws."""
    dispersion: int = 0
    """Draws, 2 or more, with this seed and the following ones: their maps, mean and deviation are written too; 0 for
    none."""
    batch_size: int | None = None
    """Slices and draws that share one evaluation of the network; by default 16 on a CPU, and on a GPU as many as fill
    it."""
    fast: bool = False
    """What is fastest on this device: on a GPU bf16 weights and a compiled network, which pays for many scans, on a CPU
    another memory format."""
    mixed_precision: str | None = None
    """no, bf16 or fp16: type of the networks' weights, instead of what `fast` chooses; no is float32."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; a GPU where there is one."""
    overwrite: bool = False
    """Replace results that are already there."""
    skip_existing: bool = False
    """Leave out scans whose results are there and whole, whatever options they were made with."""
    report: str = "html"
    """html for report.html, a page with all scans in a viewer, or none."""


def main(argv: list[str] | None = None) -> int:
    """Makes the maps or members of scans; returns 0, or 1 if a scan failed."""
    shorthands = {"-o": "--output"}
    options = parse_options(
        PredictOptions, argv, prog="predict.py", description=__doc__, positional="scans", shorthands=shorthands
    )
    if options.model and options.modality:
        raise ValueError("`--modality` chooses a model where none is named: leave it out with `--model`.")
    if not options.scans:
        raise ValueError("no scan given: files, or folders of scans.")
    if options.dispersion < 0 or options.dispersion == 1:
        raise ValueError(f"`--dispersion` must be 0, for none, or at least 2, got {options.dispersion}.")
    if options.overwrite and options.skip_existing:
        raise ValueError("`--overwrite` replaces results, and `--skip_existing` keeps them: give one of them.")

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
    from tqdm.auto import tqdm

    from anodiff.checks import check_choice
    from anodiff.pipelines.base import PRECISIONS
    from anodiff.reports.page import check_replaceable

    check_choice("report", options.report, ("html", "none"))
    page = Path(options.output) / "report.html"
    if options.report == "html":
        check_replaceable(page)
    if options.mixed_precision is not None:
        check_choice("mixed_precision", options.mixed_precision, PRECISIONS)
    # Processes that are done wait for the others; by default not for long.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    device = find_device(options.device or (str(accelerator.device) if accelerator.num_processes > 1 else None))
    model, modality, record = (options.model, None, {}) if options.model else choose_model(options)
    if record and accelerator.is_main_process:
        print("Model: {model}, as {model_chosen}.".format(**record))
    pipeline = load_pipeline(model, device, options)
    wanted = list(pipeline.processor.config.modalities) if modality is None else [modality]
    pipeline.set_progress_bar_config(leave=False, disable=not accelerator.is_local_main_process)

    # One process looks for scans: others might see what it has begun to write.
    listed = [list_scans(options, wanted, pipeline.may_lack) if accelerator.is_main_process else None]
    scans, failed, finished = broadcast_object_list(listed)[0]
    own, reasons = scans[accelerator.process_index :: accelerator.num_processes], []
    with tqdm(total=len(own), desc="scans", disable=len(own) < 2 or not accelerator.is_local_main_process) as bar:
        for scan, told, reason in predict_scans(pipeline, own, options, record):
            reasons.append((scan.name, reason))
            if reason is None:
                tqdm.write(f"{scan.name}: {told}")
            bar.update()
    reasons = dict(gather_object(reasons))
    accelerator.end_training()  # takes the process group down
    if not accelerator.is_main_process:
        return 0
    failed += [(str(scan.source), reasons[scan.name]) for scan in scans if reasons[scan.name] is not None]
    done = list(reasons.values()).count(None)
    shown = [*finished, *(scan for scan in scans if reasons[scan.name] is None)]
    if options.report == "html" and shown:
        failed += write_page(pipeline, page, shown, failed, record.get("model") or options.model)
    skipped = f", {len(finished)} finished before" if options.skip_existing else ""
    print(f"{done} scan(s) done{skipped}, results in {options.output}")
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def choose_model(options: PredictOptions) -> tuple[str, str | None, dict]:
    """Chooses the shipped checkpoint for the scans; returns its folder, the modality of the scans, if it is known, and
    what the results record of the choice."""
    from anodiff.hub import shipped
    from anodiff.volumes.scans import find_modality, name_modality

    if options.modality:
        modality = name_modality(options.modality)
        reason = f"`--modality` says {modality}"
    else:
        modality = find_modality(options.scans, options.brain, options.output)
        reason = "no name of a scan says a modality" if modality is None else f"the name of the scan says {modality}"
    name, fits = shipped.choose_shipped(modality)
    reason = f"{reason}: {fits}"
    return str(shipped.SHIPPED / name), modality, {"model": name, "model_chosen": reason}


def find_device(name: str | None):
    """Returns the device of this name, or a GPU where there is one, else the CPU; raises a `ValueError` that lists
    those there are, if it cannot be used."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(
            f"`--device` must be one that this computer has, {', '.join(known)}, got {name!r}."
        ) from error
    return device


def load_pipeline(model: str, device, options: PredictOptions):
    """Loads the pipeline of a checkpoint, and checks that it knows the options; whatever its files or the Hub raise
    becomes one `ValueError`."""
    from anodiff import AnomalyPipeline
    from anodiff.checks import check_keys
    from anodiff.pipelines.dispersion import check_dispersion

    try:
        pipeline = AnomalyPipeline.from_pretrained(model)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{model} cannot be loaded: {text}") from error
    pipeline.to(device)
    if options.fast:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision)
    elif options.mixed_precision is not None:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision, channels_last=False, compile=False)
    if options.dispersion:
        check_dispersion(pipeline, options.dispersion)
    check_keys("inference", options.inference, pipeline.default_settings(), type(pipeline).__name__)
    return pipeline


def list_scans(
    options: PredictOptions, modalities: list[str], optional: list[str]
) -> tuple[list, list[tuple[str, str]], list]:
    """Returns the scans to predict, which may lack `optional` modalities, paths that are no scans with the reason, and
    the scans that are left out, as their results are there."""
    from anodiff.volumes.results import is_whole
    from anodiff.volumes.scans import find_scans

    scans, failed = find_scans(options.scans, modalities, options.brain, options.output, optional)
    if not options.skip_existing:
        return scans, failed, []
    whole = [is_whole(Path(options.output) / scan.name, _records(options)) for scan in scans]
    missing = [scan for scan, is_there in zip(scans, whole, strict=True) if not is_there]
    return missing, failed, [scan for scan, is_there in zip(scans, whole, strict=True) if is_there]


def predict_scans(pipeline, scans: list, options: PredictOptions, record: dict) -> Iterator[tuple]:
    """
    Predicts scans. While the network works on one of them, a thread reads the next one, and another thread writes the
    result of the last one; memory holds no more than these three.

    Args:
        record (`dict`): What goes into the settings of the results.

    Yields:
        each scan when it is done, with what [`write_scan`] says of it, or `None` and why it failed.
    """
    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:

        def read(scan) -> Future | None:
            return None if scan is None else reader.submit(read_scan, pipeline, scan, options)

        def ended(scan, writing: Future) -> tuple:
            error = writing.exception()
            return (scan, writing.result(), None) if error is None else (scan, None, _reason(error))

        ahead, behind = read(next(iter(scans), None)), None
        for scan, following in zip_longest(scans, scans[1:]):
            wait([ahead])
            reading, ahead = ahead, read(following)
            try:
                result, spread = compute_scan(pipeline, reading.result(), options)
                result.settings |= record
            except Exception as error:  # noqa: BLE001 (whatever is wrong with one scan, the others are still wanted)
                reason = _reason(error)
            else:
                reason = None
            if reason is not None:
                yield scan, None, reason
                continue
            if behind is not None:
                yield ended(*behind)
            behind = scan, writer.submit(write_scan, pipeline, scan, options, result, spread)
        if behind is not None:
            yield ended(*behind)


def write_page(pipeline, page: Path, scans: list, failed: list[tuple[str, str]], model: str) -> list[tuple[str, str]]:
    """Writes the report of scans that have results. Returns those that cannot be read any more with the reason, or the
    page, if it cannot be written."""
    from anodiff.reports.predictions import write_predictions

    try:
        unread = write_predictions(page, scans, failed, plane=pipeline.processor.config.plane, model=model)
    except (OSError, ValueError) as error:  # what failed before it has to be said, too
        return [(str(page), _reason(error))]
    print(f"Report: {page}")
    return unread


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _records(options: PredictOptions) -> tuple[str, ...]:
    return ("result", "dispersion") if options.dispersion else ("result",)


def read_scan(pipeline, scan, options: PredictOptions):
    """Returns a scan for the pipeline, if its result may be written: its slices, or its volume if the pipeline has to
    find the brain."""
    from anodiff.volumes.results import (
        CALIBRATED_ARRAYS,
        DISPERSION_ARRAYS,
        ENSEMBLE_ARRAYS,
        MAP_ARRAYS,
        PICTURES,
        check_place,
    )

    folder, records = Path(options.output) / scan.name, _records(options)
    arrays = ENSEMBLE_ARRAYS if pipeline.task == "segmentation" else MAP_ARRAYS
    stems = {*arrays, *(DISPERSION_ARRAYS if options.dispersion else ()), *(PICTURES[record] for record in records)}
    if pipeline.brain_extractor is None:
        stems.discard("brain_mask")
    if pipeline.task != "segmentation" and pipeline.config.calibration is None:
        stems -= {*CALIBRATED_ARRAYS}
    check_place(folder, stems, records)
    if (folder / "result.json").exists() and not (options.overwrite or options.skip_existing):
        raise FileExistsError(
            f"{folder} already holds a result; `--overwrite` replaces it, `--skip_existing` leaves it as it is."
        )
    volume = scan.volume
    if isinstance(volume, dict) and len(pipeline.processor.config.modalities) == 1:
        # A network for any contrast has another name for it.
        volume = dict(zip(pipeline.processor.config.modalities, volume.values(), strict=True))
    if pipeline.brain_extractor is not None and scan.brain is None:
        # Two networks at once might not fit into the memory of a GPU: this one waits for its turn.
        return pipeline.processor.read(volume, pipeline.may_lack)
    return pipeline.prepare_volume(volume, scan.brain)


def compute_scan(pipeline, volume, options: PredictOptions) -> tuple:
    """Returns the result of a scan as [`read_scan`] gives it, and with `--dispersion` that of all its draws, else
    `None`."""
    from anodiff.pipelines.dispersion import disperse

    arguments = dict(
        generator=options.seed,
        batch_size=options.batch_size,
        threshold=options.threshold,
        **options.inference,
    )
    if not options.dispersion:
        return pipeline(volume, **arguments), None
    spread = disperse(pipeline, volume, options.dispersion, **arguments)
    return spread.first, spread


def write_scan(pipeline, scan, options: PredictOptions, result, spread) -> str:
    """Writes the result of a scan, and its pictures, into a folder of its own. Returns how its brain mask came about,
    what a calibrated checkpoint says of it, and the warnings of the result, in words."""
    from anodiff.evaluation.overview import draw_members, draw_overview
    from anodiff.files import lock_folder
    from anodiff.pipelines.guarantee import describe_claims
    from anodiff.pipelines.output import AnomalyOutput
    from anodiff.volumes.results import remove_results

    folder, plane = Path(options.output) / scan.name, pipeline.processor.config.plane
    draw = draw_overview if isinstance(result, AnomalyOutput) else draw_members
    # The record of the result, which marks the scan as done, comes last.
    with lock_folder(folder):
        if spread is not None or (folder / "dispersion.json").exists():
            remove_results(folder)  # of a call with other options, which wrote other files
        if spread is not None:
            spread.save(folder, lambda path: draw_members(spread, path, scan.name, plane=plane))
        result.save(folder, lambda path: draw(result, path, scan.name, plane=plane))
    told = _ORIGINS[result.settings["brain"]]
    if isinstance(result, AnomalyOutput) and result.guarantee is not None:
        told = f"{told}; {describe_claims(result.guarantee)}"
    if isinstance(result, AnomalyOutput) and result.warnings is not None:
        told = f"{told}. {' '.join(result.warnings)}"
    return told


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
