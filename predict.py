"""Anomaly maps of new scans, or ensembles of segmentations (CIMD).

python predict.py --model owner/anoddpm-flair scan.nii.gz -o out
python predict.py --model outputs/train/pipeline scans/ -o out --brain brain.nii.gz
python predict.py --model owner/two-modalities patient1/ patient2/ -o out    # flair.nii.gz, t1.nii.gz in each folder
python predict.py --model owner/anoddpm-flair scan.nii.gz -o out --dispersion 8    # also how far eight draws lie apart

A folder stands for the scans in it: its files, or its sub-folders with one file per modality.
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


@dataclass
class PredictOptions:
    """Which scans, which model, where to."""

    scans: list[str] = field(default_factory=list)
    model: str = ""
    """Pipeline folder or Hub id."""
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
    batch_size: int = 16
    """Slices and draws that share one evaluation of the network."""
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
    if not options.model:
        raise SystemExit("error: `--model` is missing: a pipeline folder or a Hub id.")
    if not options.scans:
        raise SystemExit("error: no scan given: files, or folders of scans.")
    if options.dispersion < 0 or options.dispersion == 1:
        raise SystemExit(f"error: `--dispersion` must be 0, for none, or at least 2, got {options.dispersion}.")

    import torch
    from tqdm.auto import tqdm

    from anodiff import AnomalyPipeline
    from anodiff.checks import check_keys
    from anodiff.pipelines.dispersion import check_dispersion
    from anodiff.volumes.scans import find_scans

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipeline = AnomalyPipeline.from_pretrained(options.model).to(device)
        if options.dispersion:
            check_dispersion(pipeline, options.dispersion)
        check_keys("inference", options.inference, pipeline.default_settings(), type(pipeline).__name__)
        scans, failed = find_scans(options.scans, list(pipeline.processor.config.modalities), options.brain)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    pipeline.set_progress_bar_config(leave=False)
    for scan in tqdm(scans, desc="scans", disable=len(scans) < 2):
        try:
            predict_scan(pipeline, scan, options)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one scan, the others are still wanted)
            failed.append((str(scan.source), f"{type(error).__name__}: {error}"))
    failures = dict(failed)
    print(f"{sum(str(scan.source) not in failures for scan in scans)} scan(s) done, results in {options.output}")
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def predict_scan(pipeline, scan, options: PredictOptions) -> None:
    """Writes the result of one scan, and its pictures, into a folder of its own."""
    from anodiff.evaluation.overview import draw_members, draw_overview
    from anodiff.pipelines.dispersion import disperse
    from anodiff.pipelines.output import AnomalyOutput, remove_results

    folder = Path(options.output) / scan.name
    if (folder / "result.json").exists() and not options.overwrite:
        raise FileExistsError(f"{folder} already holds a result; `--overwrite` replaces it.")
    arguments = dict(
        brain_mask=scan.brain,
        generator=options.seed,
        batch_size=options.batch_size,
        threshold=options.threshold,
        **options.inference,
    )
    plane = pipeline.processor.config.plane
    spread = disperse(pipeline, scan.volume, options.dispersion, **arguments) if options.dispersion else None
    result = pipeline(scan.volume, **arguments) if spread is None else spread.first
    if folder.is_dir():
        remove_results(folder)  # of a call with other options, which wrote other files
    if spread is not None:
        spread.save(folder)
        draw_members(spread, folder / "dispersion.png", scan.name, plane=plane)
    result.save(folder)
    draw = draw_overview if isinstance(result, AnomalyOutput) else draw_members
    draw(result, folder / "overview.png", scan.name, plane=plane)


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
