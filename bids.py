"""Anomaly maps of a BIDS data set, as a BIDS App: derivatives in a data set of their own.

anodiff bids data out participant                               # scans of the one modality that the data set has
anodiff bids data out participant --modality flair              # with the checkpoint of this package for FLAIR
anodiff bids data out participant --participant_label 01 02 --model owner/two-modalities
anodiff bids data out participant --brain data/derivatives/masks --skip_existing
anodiff bids data out group                                     # cohort.tsv and report.html of what was made

Several of these may run at once on different participants or sessions with one folder of results. What is not predicted
is named with the reason, and the status is then 1.
Research use, not a medical device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Scans that are done keep their results; the same command with `--skip_existing` goes on with the others."


@dataclass
class BidsOptions:
    """Which data set, where to, which scans, which model."""

    places: list[str] = field(default_factory=list)
    participant_label: list[str] = field(default_factory=list)
    """Participants, with or without sub-; all by default."""
    session_label: list[str] = field(default_factory=list)
    """Sessions, with or without ses-; all by default."""
    run_label: list[str] = field(default_factory=list)
    """Runs, of images that have a run."""
    acquisition_label: list[str] = field(default_factory=list)
    """Acquisitions (acq), of images that have one."""
    model: str = ""
    """Pipeline folder, Hub id, or name of a checkpoint that comes with the package (`anodiff models` lists them); by
    default the one of these that fits the modality."""
    modality: str | None = None
    """Which images are meant, flair, t1, t2, ..., where no model says it and the data set has several."""
    brain: str | None = None
    """Data set of derivatives with the brain mask of each scan on its grid, NAME_desc-brain_mask.nii.gz."""
    threshold: float | None = None
    """Threshold of the mask instead of the checkpoint's."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int | None = None
    """Slices and draws that share one evaluation of the network; by default 16 on a CPU, and on a GPU as many as fill
    it."""
    fast: bool = False
    """What is fastest on this device: on a GPU bf16 weights and a compiled network, which pays for many scans, on a CPU
    another memory format."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; a GPU where there is one."""
    overwrite: bool = False
    """Replace results that are already there."""
    skip_existing: bool = False
    """Leave out scans whose results are there and whole, whatever options they were made with."""


def main(argv: list[str] | None = None) -> int:
    """Makes the maps of participants, or the table of a group; returns 0, or 1 if a scan has none."""
    options = parse_options(
        BidsOptions,
        argv,
        prog="bids.py",
        description=__doc__,
        positional="places",
        lists=("participant_label", "session_label", "run_label", "acquisition_label"),
    )
    from anodiff.checks import check_choice

    if len(options.places) != 3:
        given = " ".join(options.places) or "nothing"
        raise ValueError(f"BIDS_DIR, OUT, and participant or group are needed, in this order and first, got {given}.")
    root, out, level = options.places
    check_choice("level", level, ("participant", "group"))
    if options.overwrite and options.skip_existing:
        raise ValueError("`--overwrite` replaces results, and `--skip_existing` keeps them: give one of them.")
    failed = (run_participants if level == "participant" else run_group)(Path(root), Path(out), options)
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def run_participants(root: Path, out: Path, options: BidsOptions) -> list[tuple[str, str]]:
    """Makes the results of the scans that are chosen; returns those that have none with the reason."""
    from tqdm.auto import tqdm

    from anodiff import __version__
    from anodiff.files import write_json
    from anodiff.predict import PredictOptions, find_device, load_pipeline, predict_scans
    from anodiff.volumes.bids import read_description, record_of, write_description
    from anodiff.volumes.results import is_whole

    read_description(root)
    model, modality, record = choose_model(root, options)
    common = {
        name: getattr(options, name) for name in "threshold seed batch_size fast overwrite skip_existing".split()
    }
    settings = PredictOptions(model=model, output=str(out), **common)
    pipeline = load_pipeline(model, find_device(options.device), settings)
    pipeline.set_progress_bar_config(leave=False)
    modalities = name_modalities(pipeline, root, record["model"], modality)
    entry = {
        "Name": "anodiff",
        "Version": __version__,
        "Description": "Anomaly maps of diffusion models. Research use, not a medical device.",
        "Checkpoint": record["model"],
        "Modalities": modalities,
        "Plane": pipeline.processor.config.plane,
    }
    write_description(out, root, entry)
    scans, failed = choose_scans(root, modalities, options)
    finished = []
    if options.skip_existing:
        records = [record_of(out, scan.name) for scan in scans]
        finished = [is_whole(record.parent, (record.stem,)) for record in records]
        scans = [scan for scan, is_there in zip(scans, finished, strict=True) if not is_there]
    done, logs = 0, out / "logs"
    logs.mkdir(exist_ok=True)
    write = partial(write_derivatives, root)
    for scan, told, reason in tqdm(
        predict_scans(pipeline, scans, settings, record, check_derivatives, write),
        total=len(scans),
        desc="scans",
        disable=len(scans) < 2,
    ):
        if reason is None:
            done += 1
            (logs / f"{scan.name}.json").unlink(missing_ok=True)
            tqdm.write(f"{scan.name}: {told}")
        else:
            failed.append((scan.name, reason))
            write_json(logs / f"{scan.name}.json", {"reason": reason})
    skipped = f", {sum(finished)} finished before" if options.skip_existing else ""
    print(f"{done} scan(s) done{skipped}, results in {out}")
    return failed


def choose_model(root: Path, options: BidsOptions) -> tuple[str, str | None, dict]:
    """Chooses the checkpoint; returns its folder or name, the modality of the scans, if it is known, and what the results
    record of the choice."""
    from anodiff.hub import shipped
    from anodiff.volumes.bids import find_modalities
    from anodiff.volumes.scans import name_modality

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


def name_modalities(pipeline, root: Path, model: str, modality: str | None) -> list[str]:
    """Returns the modalities of the images that a checkpoint gets, in its order."""
    from anodiff.hub.shipped import ANY
    from anodiff.volumes.bids import find_modalities
    from anodiff.volumes.scans import name_modality

    if pipeline.task == "segmentation":
        raise ValueError(f"{model} makes segmentations, and this makes anomaly maps: use `anodiff predict` for it.")
    names = list(pipeline.processor.config.modalities)
    if len(names) == 1 and names[0] in ANY:
        if modality is None:
            there = ", ".join(find_modalities(root))
            raise ValueError(f"{model} takes any contrast: say by `--modality` which images are meant, of {there}.")
        return [modality]
    if modality is not None and [name_modality(name) for name in names] != [modality]:
        raise ValueError(f"`--modality` is {modality}, and {model} is for {', '.join(names)}: leave out one of them.")
    return names


def choose_scans(root: Path, modalities: list[str], options: BidsOptions) -> tuple[list, list[tuple[str, str]]]:
    """Returns the scans that the labels choose, and what is none with the reason."""
    from anodiff.volumes.bids import find_bids_scans

    labels = {"run": options.run_label, "acq": options.acquisition_label}
    return find_bids_scans(
        root,
        modalities,
        participants=options.participant_label,
        sessions=options.session_label,
        labels={entity: chosen for entity, chosen in labels.items() if chosen},
        brain=options.brain,
    )


def check_derivatives(pipeline, scan, options) -> None:
    """Raises a `FileExistsError` if a scan has a result that may not be replaced."""
    from anodiff.volumes.bids import record_of

    record = record_of(Path(options.output), scan.name)
    if record.exists() and not (options.overwrite or options.skip_existing):
        raise FileExistsError(
            f"{record} is there: `--overwrite` replaces the result, `--skip_existing` leaves it as it is."
        )


def write_derivatives(root: Path, pipeline, scan, options, result, spread) -> str:
    """Writes the result of a scan into the data set of results. Returns how its brain mask came about, and what a
    calibrated checkpoint says of it, in words."""
    import nibabel as nib

    from anodiff.files import lock_folder, write_json
    from anodiff.hub.configuration import plain
    from anodiff.pipelines.guarantee import describe_claims
    from anodiff.volumes.bids import NAMES, URI, derivative_name, pseudohealthy_name, record_of
    from anodiff.volumes.results import write_result

    images = list(scan.volume.values())
    sources = [f"{URI}{image.relative_to(root).as_posix()}" for image in images]
    common = {"Sources": sources, "SpatialReference": sources[0]}
    threshold = {"Threshold": result.settings["threshold"]}
    arrays = {derivative_name(scan.name, array): (getattr(result, array), _SIDECARS[array]) for array in NAMES}
    record = record_of(Path(options.output), scan.name)
    mask = derivative_name(scan.name, "pred_mask")
    arrays[mask] = (arrays[mask][0], arrays[mask][1] | threshold)
    if result.reconstruction is not None:
        stripped = {"SkullStripped": result.settings["brain"] != "none"}
        several = len(images) > 1
        for index, image in enumerate(images):
            channel = result.reconstruction[..., index] if several else result.reconstruction
            arrays[pseudohealthy_name(image)] = (channel, _SIDECARS["reconstruction"] | stripped)
    writers = {}
    for name, (array, sidecar) in arrays.items():
        if array is None:
            continue
        writers[f"{name}.nii.gz"] = partial(nib.save, result.source.image(array))
        if name != record.stem:
            writers[f"{name}.json"] = partial(write_json, values=common | sidecar)
    # The record, which marks the scan as done, comes last.
    with lock_folder(record.parent):
        write_result(record.parent, record.stem, common | _SIDECARS["anomaly_map"] | plain(result.record()), writers)
    told = f"brain mask: {result.settings['brain']}"
    return told if result.guarantee is None else f"{told}; {describe_claims(result.guarantee)}"


_SIDECARS = {
    "anomaly_map": {
        "Description": "Anomaly score of every voxel, at least 0; comparable between scans of one checkpoint, and no"
        " probability.",
        "Units": "arbitrary",
    },
    "pred_mask": {
        "Type": "Lesion",
        "Description": "Voxels whose anomaly score is above Threshold. Made by a program: no lesion is certain.",
    },
    "probability_map": {
        "Type": "Lesion",
        "Description": "Probability of a lesion at the prevalence of the calibration data, 0 outside the brain.",
    },
    "healthy_rank_map": {
        "Description": "Share of healthy voxels of the calibration data with a lower anomaly score, at least; no"
        " probability of a lesion.",
        "Units": "arbitrary",
    },
    "brain_mask": {"Type": "Brain", "Description": "Brain that the brain extractor of the checkpoint has found."},
    "reconstruction": {
        "Description": "The scan as the network expects it of a healthy brain, in the units of the scan. No measurement."
    },
}


def run_group(root: Path, out: Path, options: BidsOptions) -> list[tuple[str, str]]:
    """Writes the table and the page of all results; returns what is not in them, or has no result, with the reason."""
    from anodiff.files import read_json
    from anodiff.reports.page import check_replaceable
    from anodiff.reports.predictions import write_predictions
    from anodiff.volumes.bids import find_results, read_description, read_entry

    read_description(root)
    entry, page = read_entry(out), out / "report.html"
    check_replaceable(page)
    results, failed = find_results(out, root)
    wanted, reasons = choose_scans(root, entry["Modalities"], options)
    there = {scan.name for scan, _ in results} | {name for name, _ in failed}
    failed += reasons
    for scan in wanted:
        log = out / "logs" / f"{scan.name}.json"
        if scan.name not in there:
            failed.append((scan.name, read_json(log)["reason"] if log.exists() else "was never predicted."))
    if results:
        scans = [scan for scan, _ in results]
        failed += write_predictions(
            page,
            scans,
            failed,
            plane=entry["Plane"],
            model=entry["Checkpoint"],
            results={scan.name: result for scan, result in results},
        )
        print(f"Report: {page}")
    print(f"{len(results)} scan(s) with results in {out}")
    return failed


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
