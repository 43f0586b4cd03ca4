"""Takes the skull off scans: writes the brain, and its mask.

python strip.py scan.nii.gz                  # scan_brain.nii.gz and scan_brain_mask.nii.gz beside it
python strip.py scans/ -o stripped           # all scans in a folder

Any contrast of MRI, any orientation and resolution; modalities in one file share one mask. A scan whose skull is off
already is left as it is. What is not stripped is named with the reason, and the status is then 1.
Research use, not a medical device.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from anodiff.configs import parse_options
from anodiff.running import run_script


# What a user does after a stop.
GO_ON = "Scans that are done keep their results; name the others again."


@dataclass
class StripOptions:
    """Which scans, where to."""

    scans: list[str] = field(default_factory=list)
    output: str | None = None
    """Folder for the results (also -o); beside each scan by default."""
    model: str = "brain-extractor"
    """Folder, Hub id or name (of one that comes with the package) of the brain extractor."""
    overwrite: bool = False
    """Replace files that are already there."""


def main(argv: list[str] | None = None) -> int:
    """Strips scans; returns 0, or 1 if one failed."""
    shorthands = {"-o": "--output"}
    options = parse_options(
        StripOptions, argv, prog="strip.py", description=__doc__, positional="scans", shorthands=shorthands
    )
    if not options.scans:
        raise ValueError("no scan given: files, or folders of scans.")

    import torch
    from tqdm.auto import tqdm

    from anodiff import BrainExtractor
    from anodiff.hub.shipped import locate
    from anodiff.volumes.scans import find_scans

    scans, failed = find_scans(options.scans, ["image"], None, options.output)
    try:
        extractor = BrainExtractor.from_pretrained(locate(options.model))
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{options.model} cannot be loaded: {text}") from error
    extractor.to("cuda" if torch.cuda.is_available() else "cpu")
    done = 0
    for scan in tqdm(scans, desc="scans", disable=len(scans) < 2):
        try:
            tqdm.write(strip_scan(extractor, scan, options))
            done += 1
        except Exception as error:  # noqa: BLE001 (whatever is wrong with one scan, the others are still wanted)
            failed.append((str(scan.source), f"{type(error).__name__}: {error}"))
    print(f"{done} scan(s) done.")
    for name, reason in failed:
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def strip_scan(extractor, scan, options: StripOptions) -> str:
    """Writes the brain of one scan and its mask; returns what was done, a line."""
    from contextlib import ExitStack

    import nibabel as nib
    import numpy as np

    from anodiff.files import replacing
    from anodiff.pipelines.brain import find_brain
    from anodiff.volumes.dicom import split_choice
    from anodiff.volumes.volume import read_volume

    source = scan.volume["image"] if isinstance(scan.volume, dict) else scan.volume
    path, choice = split_choice(str(source))
    if not path.name.strip("."):  # the folder that one is in, or the one above
        path = Path(os.path.abspath(path))
    end = path.name.lower().rfind(".nii" if ".nii" in path.name.lower() else ".")
    # A folder of DICOM has no suffix, though its name may hold dots; of several series each has files of its own.
    folder, name = path.parent, path.name if path.is_dir() or end <= 0 else path.name[:end]
    name = name if choice is None else f"{name}_{choice}"
    if options.output is not None:
        folder, name = Path(options.output), scan.name
    targets = [folder / f"{name}_brain.nii.gz", folder / f"{name}_brain_mask.nii.gz"]
    check_free(targets, options)
    volume = read_volume(source, labels=False)
    brain, origin = find_brain(extractor, volume)
    kept = list(volume.arrays.values())
    if origin != "stripped":
        kept = [np.where(brain, image, np.float32(0)) for image in kept]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for target, array in zip(
            targets, (kept[0] if len(kept) == 1 else np.stack(kept, -1), brain.astype(np.uint8)), strict=True
        ):
            nib.save(volume.image(array), stack.enter_context(replacing(target)))
        check_free(targets, options)  # again, before they take their places: another command may have been faster
    millilitres = brain.sum() * abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    said = "left as it is, its skull is off already" if origin == "stripped" else "brain extracted"
    return f"{source}: {said}, {millilitres:.0f} ml, {targets[0]}"


def check_free(targets: list[Path], options: StripOptions) -> None:
    """Raises a `FileExistsError` if one of the files is there and may not be replaced."""
    there = [str(target) for target in targets if target.exists()]
    if there and not options.overwrite:
        raise FileExistsError(f"{', '.join(there)} exists; `--overwrite` replaces it.")


if __name__ == "__main__":
    sys.exit(run_script(main, GO_ON))
