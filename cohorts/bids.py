"""Makes the derivatives of a BIDS data set: the results of participants, and the table and page of a group."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import nibabel as nib
from tqdm.auto import tqdm

from .. import AnomalyPipeline, __version__
from ..files import lock_folder, read_json, write_json
from ..hub import shipped
from ..hub.configuration import plain
from ..pipelines.guarantee import describe_claims
from ..pipelines.output import AnomalyOutput
from ..reports.page import check_replaceable
from ..reports.predictions import write_predictions
from ..volumes.bids import (
    NAMES,
    URI,
    derivative_name,
    find_bids_scans,
    find_modalities,
    find_results,
    pseudohealthy_name,
    read_description,
    read_entry,
    record_of,
    write_description,
)
from ..volumes.results import is_whole, write_result
from ..volumes.scans import Scan, name_modality
from .inputs import why_another
from .measures import measure_saved
from .options import BidsOptions, PredictOptions
from .prediction import NOT_REPLACED, describe_error, find_device, find_revision, load_pipeline, predict_scans
from .tables import COHORT, COHORT_COLUMNS, DONE, FAILED, write_table


# Array of a result to what the file beside its derivative says.
_SIDECARS = {
    "anomaly_map": {
        "Description": "Anomaly score of every voxel, at least 0; comparable between scans of one checkpoint, and no"
        " probability",
        "Units": "arbitrary",
    },
    "pred_mask": {
        "Type": "Lesion",
        "Description": "Voxels whose anomaly score is above Threshold; made by a program, so that no lesion is certain",
    },
    "probability_map": {
        "Type": "Lesion",
        "Description": "Probability of a lesion at the prevalence of the calibration data, 0 outside the brain",
    },
    "healthy_rank_map": {
        "Description": "Share of the healthy voxels of the calibration data with a lower anomaly score, at least; no"
        " probability of a lesion",
        "Units": "arbitrary",
    },
    "brain_mask": {"Type": "Brain", "Description": "Brain that the brain extractor of the checkpoint has found"},
    "reconstruction": {
        "Description": "The scan as the network expects it of a healthy brain, in the units of the scan; no measurement"
    },
}
_COLUMNS = {
    "scan": {"Description": "Entities that the images of the scan share; or what of the data set is no scan"},
    "participant_id": {"Description": "Participant, as in participants.tsv"},
    "session_id": {"Description": "Session, n/a where there is one alone"},
    **{name: about for name, about in COHORT_COLUMNS.items() if name not in ("scan", "atlas")},
    "source": {"Description": "Its images, relative to the data set, separated by |"},
    "status": {
        "Description": "Whether there is a result",
        "Levels": {DONE: "there is one", FAILED: "there is none, for the reason in the next column"},
    },
    "reason": {"Description": "Why there is none"},
}


def run_participants(root: Path, out: Path, options: BidsOptions) -> list[tuple[str, str]]:
    """
    Makes the results of the scans that are chosen.

    Args:
        root (`Path`): The BIDS data set.
        out (`Path`): The data set of the results; other processes may write into it at the same time.
        options ([`~cohorts.options.BidsOptions`]): Which scans, and how.

    Returns:
        what has no result, with the reason.
    """
    read_description(root)
    model, modality, record = choose_model(root, options)
    same = "threshold seed batch_size fast overwrite skip_existing".split()
    settings = PredictOptions(model=model, output=str(out), **{name: getattr(options, name) for name in same})
    pipeline = load_pipeline(model, find_device(options.device), settings)
    pipeline.set_progress_bar_config(leave=False)
    entry = {
        "Name": "anodiff",
        "Version": __version__,
        "Description": "Anomaly maps of diffusion models. Research use, not a medical device.",
        "Checkpoint": record["model"],
        "CheckpointRevision": find_revision(model),
        "Modalities": name_modalities(pipeline, root, record["model"], modality),
        "OptionalModalities": list(pipeline.config.get("optional_modalities") or ()) or None,
        "Plane": pipeline.processor.config.plane,
    }
    entry = {name: value for name, value in entry.items() if value is not None}
    write_description(out, root, entry)
    scans, failed = choose_scans(root, entry, options)
    finished = []
    if options.skip_existing:
        bar = tqdm(scans, desc="earlier results", leave=False, disable=len(scans) < 2)
        reasons = [(scan.name, why_another(record_of(out, scan.name), scan)) for scan in bar]
        failed += [(name, reason) for name, reason in reasons if reason is not None]
        scans = [scan for scan, (_, reason) in zip(scans, reasons, strict=True) if reason is None]
        records = [record_of(out, scan.name) for scan in scans]
        finished = [is_whole(path.parent, (path.stem,)) for path in records]
        scans = [scan for scan, is_there in zip(scans, finished, strict=True) if not is_there]
    predictions = predict_scans(pipeline, scans, settings, record, check_derivatives, partial(write_derivatives, root))
    done, logs = 0, out / "logs"
    logs.mkdir(exist_ok=True)
    for prediction in tqdm(predictions, total=len(scans), desc="scans", disable=len(scans) < 2):
        name, reason = prediction.scan.name, prediction.reason
        if reason is None:
            done += 1
            tqdm.write(f"{name}: {prediction.told}")
        else:
            failed.append((name, reason))
        path = record_of(out, name)
        if reason is None or not is_whole(path.parent, (path.stem,)):
            inputs = {file.removeprefix(f"{root}/"): digest for file, digest in prediction.inputs.items()}
            log = {"reason": reason, "seconds": prediction.seconds, "warnings": prediction.warnings, "inputs": inputs}
            write_json(logs / f"{name}.json", log)
    skipped = f", {sum(finished)} finished before" if options.skip_existing else ""
    print(f"{done} scan(s) done{skipped}, results in {out}")
    return failed


def choose_model(root: Path, options: BidsOptions) -> tuple[str, str | None, dict]:
    """Chooses the checkpoint; returns its folder or name, the modality of the scans, if it is known, and what the
    results record of the choice."""
    modality = name_modality(options.modality) if options.modality else None
    if options.model:
        return options.model, modality, {"model": options.model}
    reason = f"`--modality` says {modality}"
    if modality is None:
        there = find_modalities(root)
        if len(there) != 1:
            raise ValueError(
                f"The images of {root} are of {len(there)} modalities ({', '.join(there) or 'no anat/*_FLAIR.nii.gz'}):"
                " say by `--modality` which are meant, or name a model by `--model`."
            )
        modality = there[0]
        reason = f"all images are {modality}"
    name, fits = shipped.choose_shipped(modality)
    print(f"Model: {name}, as {reason}: {fits}.")
    return str(shipped.SHIPPED / name), modality, {"model": name, "model_chosen": f"{reason}: {fits}"}


def name_modalities(pipeline: AnomalyPipeline, root: Path, model: str, modality: str | None) -> list[str]:
    """Returns the modalities of the images that a checkpoint gets, in its order."""
    if pipeline.task == "segmentation":
        raise ValueError(f"{model} makes segmentations, and this makes anomaly maps: use `anodiff predict` for it.")
    names = list(pipeline.processor.config.modalities)
    if len(names) == 1 and names[0] in shipped.ANY:
        if modality is None:
            there = ", ".join(find_modalities(root))
            raise ValueError(f"{model} takes any contrast: say by `--modality` which images are meant, of {there}.")
        return [modality]
    if modality is not None and [name_modality(name) for name in names] != [modality]:
        raise ValueError(f"`--modality` is {modality}, and {model} is for {', '.join(names)}: leave out one of them.")
    return names


def choose_scans(root: Path, entry: dict, options: BidsOptions) -> tuple[list[Scan], list[tuple[str, str]]]:
    """Returns the scans that the labels choose, and what is none with the reason; `entry` describes the results."""
    labels = {"run": options.run_label, "acq": options.acquisition_label}
    return find_bids_scans(
        root,
        entry["Modalities"],
        optional=entry.get("OptionalModalities", ()),
        participants=options.participant_label,
        sessions=options.session_label,
        labels={entity: chosen for entity, chosen in labels.items() if chosen},
        brain=options.brain,
    )


def check_derivatives(pipeline: AnomalyPipeline, scan: Scan, options: PredictOptions) -> None:
    """Raises a `FileExistsError` if a scan has a result that may not be replaced: also one that another command has
    written since the scans were listed."""
    record = record_of(Path(options.output), scan.name)
    if options.overwrite:
        return
    if record.exists() and not options.skip_existing:
        raise FileExistsError(
            f"{record} is there: `--overwrite` replaces the result, `--skip_existing` leaves it as it is."
        )
    if is_whole(record.parent, (record.stem,)):
        raise FileExistsError(NOT_REPLACED.format(record))


def write_derivatives(
    root: Path, pipeline: AnomalyPipeline, scan: Scan, options: PredictOptions, result: AnomalyOutput, spread: None
) -> str:
    """Writes the result of a scan of the data set `root` into that of the results. Returns how its brain mask came about,
    what a calibrated checkpoint says of it, and the warnings of the result, in words. Other arguments as of
    [`~cohorts.prediction.write_scan`]."""
    images = list(scan.volume.values())
    sources = [f"{URI}{image.relative_to(root).as_posix()}" for image in images]
    common = {"Sources": sources, "SpatialReference": sources[0]}
    arrays = {derivative_name(scan.name, array): (getattr(result, array), _SIDECARS[array]) for array in NAMES}
    mask = derivative_name(scan.name, "pred_mask")
    arrays[mask] = (result.pred_mask, _SIDECARS["pred_mask"] | {"Threshold": result.settings["threshold"]})
    if result.reconstruction is not None:
        about = _SIDECARS["reconstruction"] | {"SkullStripped": result.settings["brain"] != "none"}
        names = list(result.source.arrays)  # those that the scan has, in the order of the checkpoint
        for modality, image in scan.volume.items():
            channel = result.reconstruction[..., names.index(modality)] if len(names) > 1 else result.reconstruction
            arrays[pseudohealthy_name(image)] = (channel, about)
    record = record_of(Path(options.output), scan.name)
    writers = {}
    for name, (array, about) in arrays.items():
        if array is not None:
            writers[f"{name}.nii.gz"] = partial(nib.save, result.source.image(array))
            if name != record.stem:
                writers[f"{name}.json"] = partial(write_json, values=common | about)
    values = common | _SIDECARS["anomaly_map"] | plain(result.record())
    # The record, which marks the scan as done, comes last.
    with lock_folder(record.parent):
        check_derivatives(pipeline, scan, options)  # again: computing took its time
        write_result(record.parent, record.stem, values, writers)
    told = f"brain mask: {result.settings['brain']}"
    if result.guarantee is not None:
        told = f"{told}; {describe_claims(result.guarantee)}"
    return told if result.warnings is None else f"{told}. {' '.join(result.warnings)}"


def run_group(root: Path, out: Path, options: BidsOptions) -> list[tuple[str, str]]:
    """Writes the table and the page of all results, from their files alone; returns what has no result, or is not in
    the page, with the reason. Arguments as of [`run_participants`]."""
    read_description(root)
    entry, page = read_entry(out), out / "report.html"
    check_replaceable(page)
    results, failed = find_results(out, root)
    there = {scan.name for scan, _ in results} | {name for name, _ in failed}
    wanted, reasons = choose_scans(root, entry, options)
    failed += reasons
    for scan in wanted:
        log = out / "logs" / f"{scan.name}.json"
        if scan.name not in there:
            reason = read_json(log)["reason"] if log.exists() else None
            failed.append((scan.name, reason or "was never predicted, or its result was removed."))
    rows = []
    for scan, result in results:
        sources = " | ".join(path.relative_to(root).as_posix() for path in scan.volume.values())
        row = {"scan": scan.name, "source": sources, "status": DONE, "checkpoint": entry["Checkpoint"]}
        log = out / "logs" / f"{scan.name}.json"
        values = read_json(log) if log.exists() else {"seconds": None, "warnings": []}
        row |= {"seconds": values["seconds"], "warnings": " | ".join(values["warnings"])}
        row["revision"] = entry.get("CheckpointRevision")
        try:
            row |= measure_saved(result)[0]
        except (OSError, ValueError) as error:
            failed.append((scan.name, f"its result cannot be measured: {describe_error(error)}"))
            continue
        rows.append(row)
    rows += [{"scan": name, "status": FAILED, "reason": reason} for name, reason in failed]
    for row in rows:
        # Of a session or a file that is no scan, too.
        for name, pattern in (("participant_id", "^(sub-[^_/]+)"), ("session_id", "[_/](ses-[^_/]+)")):
            match = re.search(pattern, row["scan"])
            row[name] = match and match[1]
    write_table(out / COHORT, _COLUMNS, rows)
    if results:
        scans, files = [scan for scan, _ in results], {scan.name: result for scan, result in results}
        described = {"plane": entry["Plane"], "model": entry["Checkpoint"]}
        failed += write_predictions(page, scans, failed, **described, results=files)
        print(f"Report: {page}")
    print(f"{len(results)} scan(s) with results, {out / COHORT}")
    return failed
