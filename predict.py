"""Anomaly maps of new scans, or ensembles of segmentations (CIMD).

python predict.py scan.nii.gz -o out                     # with the checkpoint of this package that fits the scan
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out
python predict.py --model outputs/train/pipeline scans/ -o out --brain brain.nii.gz
python predict.py --model owner/two-modalities patient1/ patient2/ -o out    # flair.nii.gz, t1.nii.gz in each folder
python predict.py --model owner/anoddpm-flair "data/*/anat/*_FLAIR.nii.gz" -o out    # a pattern, in quotes
python predict.py --model owner/two-modalities subjects.tsv -o out    # a table with the columns subject, flair, t1
find data -name "*_FLAIR.nii.gz" | python predict.py --model owner/anoddpm-flair - -o out    # a list, one per line
python predict.py --model owner/anoddpm-flair "export.zip#4" -o out    # a series of DICOM: a folder, or one of several
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out --dispersion 8    # also how far eight draws lie apart
python predict.py --model owner/anoddpm-flair scans/ -o out --atlas aparc.nii.gz    # also by region, regions.tsv
accelerate launch predict.py --model owner/anoddpm-flair cohort/ -o out --skip_existing    # many scans on several GPUs
python predict.py --model owner/anoddpm-flair cohort/ -o out --shard 2/8    # the second of eight parts, for job arrays
python predict.py --model owner/andi-flair scans/ -o out --fast    # what is fastest on the device, in coarser numbers

Where the model wants a brain mask and none is given, its brain extractor, if it has one, makes it: of a scan that has its
skull. The mask is written beside the maps.

A folder stands for the scans in it: its files, or its sub-folders with one file per modality. What is not predicted is
named with the reason, and the status is then 1. In the output folder cohort.tsv has a row for each scan, and run.json
says how it came about; report.html shows all results in a browser; it needs no network, and `--report none` leaves it out.
Research use, not a medical device.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

from anodiff.cohorts.options import PredictOptions
from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Scans that are done keep their results; the same command with `--skip_existing` goes on with the others."


def main(argv: list[str] | None = None) -> int:
    """Makes the maps or members of scans; returns 0, or 1 if a scan failed."""
    shorthands = {"-o": "--output"}
    options = parse_options(
        PredictOptions, argv, prog="predict.py", description=__doc__, positional="scans", shorthands=shorthands
    )
    options.check()

    from anodiff.checks import check_choice
    from anodiff.cohorts.record import check_record, record_path
    from anodiff.cohorts.tables import check_tables
    from anodiff.pipelines.base import PRECISIONS
    from anodiff.reports.page import check_replaceable

    if page_of(options) is not None:
        check_replaceable(page_of(options))
    check_tables(options.output)
    check_record(record_path(options))
    if options.mixed_precision is not None:
        check_choice("mixed_precision", options.mixed_precision, PRECISIONS)
    failed = predict_cohort(options, sys.argv[1:] if argv is None else argv)
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def predict_cohort(options: PredictOptions, arguments: list[str]) -> list[tuple[str, str]]:
    """Predicts the scans of a command, whose arguments are recorded; returns what has no result with the reason, in the
    first of several processes."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
    from tqdm.auto import tqdm

    from anodiff.cohorts.inputs import list_scans, read_inputs
    from anodiff.cohorts.measures import read_region_names
    from anodiff.cohorts.prediction import (
        check_free,
        choose_model,
        find_device,
        load_pipeline,
        predict_scans,
        wanted_records,
        write_scan,
    )
    from anodiff.cohorts.run import CohortRun

    region_names = None if options.atlas_names is None else read_region_names(options.atlas_names)
    # Processes that are done wait for the others; by default not for long.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    is_first = accelerator.is_main_process
    device = find_device(options.device or (str(accelerator.device) if accelerator.num_processes > 1 else None))
    # One process looks for scans: others might see what it has begun to write, or take lines of standard input.
    (inputs,) = broadcast_object_list([read_inputs(options.scans) if is_first else None])
    model, modality, record = (options.model, None, {}) if options.model else choose_model(options, inputs)
    if record and is_first:
        print("Model: {model}, as {model_chosen}.".format(**record))
    pipeline = load_pipeline(model, device, options)
    wanted = list(pipeline.processor.config.modalities) if modality is None else [modality]
    pipeline.set_progress_bar_config(leave=False, disable=not accelerator.is_local_main_process)

    cohort, listed = CohortRun(options, pipeline, model, record.get("model") or options.model, region_names), None
    if is_first:
        listed = list_scans(inputs, options, wanted, wanted_records(options), pipeline.may_lack)
        listed[1].extend(cohort.begin(arguments, *listed, accelerator.num_processes))
    (scans, failed, finished), cohort.started = broadcast_object_list([listed, cohort.started])
    own, reasons = scans[accelerator.process_index :: accelerator.num_processes], []
    with tqdm(total=len(own), desc="scans", disable=len(own) < 2 or not accelerator.is_local_main_process) as bar:
        for prediction in predict_scans(pipeline, own, options, record, check_free, write_scan, region_names):
            cohort.add(prediction)
            reasons.append((prediction.scan.name, prediction.reason))
            if prediction.reason is None:
                tqdm.write(f"{prediction.scan.name}: {prediction.told}")
            bar.update()
    reasons = dict(gather_object(reasons))
    accelerator.end_training()  # takes the process group down
    if not is_first:
        return []
    failed += [(str(scan.source), reasons[scan.name]) for scan in scans if reasons[scan.name] is not None]
    shown = [*finished, *(scan for scan in scans if reasons[scan.name] is None)]
    if page_of(options) is not None and shown:
        failed += write_page(pipeline, page_of(options), shown, failed, record.get("model") or options.model)
    cohort.end(1 if failed else 0)
    skipped = f", {len(finished)} finished before" if options.skip_existing else ""
    print(f"{list(reasons.values()).count(None)} scan(s) done{skipped}, results in {options.output}")
    return failed


def page_of(options: PredictOptions) -> Path | None:
    """Returns where the report goes; `None` without one, as of a part, whose page would replace those of the others."""
    return Path(options.output) / "report.html" if options.report == "html" and options.shard is None else None


def write_page(pipeline, page: Path, scans: list, failed: list[tuple[str, str]], model: str) -> list[tuple[str, str]]:
    """Writes the report of scans that have results. Returns those that cannot be read any more with the reason, or the
    page, if it cannot be written."""
    from anodiff.cohorts.prediction import describe_error
    from anodiff.reports.predictions import write_predictions

    try:
        unread = write_predictions(page, scans, failed, plane=pipeline.processor.config.plane, model=model)
    except (OSError, ValueError) as error:  # what failed before it has to be said, too
        return [(str(page), describe_error(error))]
    print(f"Report: {page}")
    return unread


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
