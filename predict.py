"""Anomaly maps of new scans, or ensembles of segmentations (CIMD).

python predict.py scan.nii.gz -o out                     # with the checkpoint of this package that fits the scan
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out
python predict.py --model outputs/train/pipeline scans/ -o out --brain brain.nii.gz
python predict.py --model owner/two-modalities patient1/ patient2/ -o out    # flair.nii.gz, t1.nii.gz in each folder
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out --dispersion 8    # also how far eight draws lie apart
python predict.py --model owner/andi-flair scans/ -o out --fast    # what is fastest on the device, in coarser numbers

Where the model wants a brain mask and none is given, its brain extractor, if it has one, makes it: of a scan that has its
skull. The mask is written beside the maps.

A folder stands for the scans in it: its files, or its sub-folders with one file per modality. What is not predicted is
named with the reason, and the status is then 1.
Research use, not a medical device.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Scans that are done keep their results; name the others again."


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

    from tqdm.auto import tqdm

    from anodiff.checks import check_choice, check_keys
    from anodiff.pipelines.base import PRECISIONS
    from anodiff.pipelines.dispersion import check_dispersion
    from anodiff.volumes.scans import find_scans

    if options.mixed_precision is not None:
        check_choice("mixed_precision", options.mixed_precision, PRECISIONS)
    device = find_device(options.device)
    model, modality, record = (options.model, None, {}) if options.model else choose_model(options)
    pipeline = load_pipeline(model).to(device)
    if options.fast:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision)
    elif options.mixed_precision is not None:
        pipeline.enable_fast_inference(mixed_precision=options.mixed_precision, channels_last=False, compile=False)
    if options.dispersion:
        check_dispersion(pipeline, options.dispersion)
    check_keys("inference", options.inference, pipeline.default_settings(), type(pipeline).__name__)
    modalities = list(pipeline.processor.config.modalities)
    wanted = modalities if modality is None else [modality]
    scans, failed = find_scans(options.scans, wanted, options.brain, options.output)
    pipeline.set_progress_bar_config(leave=False)
    done = 0
    for scan in tqdm(scans, desc="scans", disable=len(scans) < 2):
        try:
            origin = predict_scan(pipeline, scan, options, record)
            done += 1
            tqdm.write(f"{scan.name}: {_ORIGINS[origin]}")
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one scan, the others are still wanted)
            failed.append((str(scan.source), f"{type(error).__name__}: {error}"))
    print(f"{done} scan(s) done, results in {options.output}")
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def choose_model(options: PredictOptions) -> tuple[str, str | None, dict]:
    """Chooses the shipped checkpoint for the scans, and says so; returns its folder, the modality of the scans, if it
    is known, and what the results record of the choice."""
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
    print(f"Model: {name}, as {reason}.")
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


def load_pipeline(model: str):
    """Loads the pipeline of a checkpoint; whatever its files or the Hub raise becomes one `ValueError`."""
    from anodiff import AnomalyPipeline

    try:
        return AnomalyPipeline.from_pretrained(model)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{model} cannot be loaded: {text}") from error


def predict_scan(pipeline, scan, options: PredictOptions, record: dict) -> str:
    """Writes the result of one scan, and its pictures, into a folder of its own; `record` goes into its settings. Returns
    how its brain mask came about."""
    from anodiff.evaluation.overview import draw_members, draw_overview
    from anodiff.files import lock_folder
    from anodiff.pipelines.dispersion import disperse
    from anodiff.pipelines.output import AnomalyOutput
    from anodiff.volumes.results import (
        DISPERSION_ARRAYS,
        ENSEMBLE_ARRAYS,
        MAP_ARRAYS,
        PICTURES,
        check_place,
        remove_results,
    )

    folder = Path(options.output) / scan.name
    arrays = ENSEMBLE_ARRAYS if pipeline.task == "segmentation" else MAP_ARRAYS
    records = ("result", "dispersion") if options.dispersion else ("result",)
    stems = {*arrays, *(DISPERSION_ARRAYS if options.dispersion else ()), *(PICTURES[record] for record in records)}
    if pipeline.brain_extractor is None:
        stems.discard("brain_mask")
    check_place(folder, stems, records)
    if (folder / "result.json").exists() and not options.overwrite:
        raise FileExistsError(f"{folder} already holds a result; `--overwrite` replaces it.")
    arguments = dict(
        brain_mask=scan.brain,
        generator=options.seed,
        batch_size=options.batch_size,
        threshold=options.threshold,
        **options.inference,
    )
    plane, volume = pipeline.processor.config.plane, scan.volume
    if isinstance(volume, dict):
        # A network for any contrast has another name for it.
        volume = dict(zip(pipeline.processor.config.modalities, volume.values(), strict=True))
    spread = disperse(pipeline, volume, options.dispersion, **arguments) if options.dispersion else None
    result = pipeline(volume, **arguments) if spread is None else spread.first
    result.settings |= record
    draw = draw_overview if isinstance(result, AnomalyOutput) else draw_members
    # The record of the result, which marks the scan as done, comes last.
    with lock_folder(folder):
        if spread is not None or (folder / "dispersion.json").exists():
            remove_results(folder)  # of a call with other options, which wrote other files
        if spread is not None:
            spread.save(folder, lambda path: draw_members(spread, path, scan.name, plane=plane))
        result.save(folder, lambda path: draw(result, path, scan.name, plane=plane))
    return result.settings["brain"]


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
