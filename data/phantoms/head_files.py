"""Writes data sets of synthetic heads, with their lists of training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm.auto import tqdm

from ...checks import check_choice, check_integer
from ...files import making_folder, write_json, write_text
from ...schedulers.draws import fold_in, integers, make_keys, uniform
from .heads import CONTRASTS, LESIONS, LOOKS, make_slices
from .label_maps import LabelMaps, read_label_maps, split_maps


# Rows and columns of a volume, and the size of its pixels in mm: a head is up to 260 mm long and 190 mm wide.
HEAD_SIZE, HEAD_SPACING = (176, 128), 1.5
# Numbers that keys of subjects are made of with a seed, apart from those of training samples.
_SUBJECT, _CHOICE = 7, 11


def write_heads(
    folder: str | Path,
    label_maps: str | Path,
    *,
    subjects: int,
    contrasts: Sequence[str] = ("flair",),
    skull: bool = False,
    tested: int = 12,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> None:
    """
    Writes a data set of heads: a folder per subject with `CONTRAST.nii.gz` (int16, value x 1000), `brain.nii.gz`,
    `lesion.nii.gz` (uint8) and `head.json`, and the lists `splits/train.csv`, `validation.csv` and `test.csv` (header
    `subject`). Those of the training split are healthy; of the others every fourth is, and the rest have lesions of
    every kind in turn.

    Training, validation and test are made of different maps where there are three or more. The folder appears as a
    whole; it must not exist.

    Args:
        label_maps: Folder of segmentations, see [`read_label_maps`].
        subjects: Of the training split.
        contrasts: Of `CONTRASTS`, one file each.
        skull: Keep the head around the brain.
        tested: Subjects of the validation split, and of the test split.
        seed: From 0 on; another one gives other heads.
    """
    folder = Path(folder)
    check_integer("subjects", subjects, 1)
    check_integer("tested", tested, 0)
    for contrast in contrasts:
        check_choice("contrast", contrast, CONTRASTS)
    if len(set(contrasts)) < len(contrasts):
        raise ValueError(f"`contrasts` must be different, got {', '.join(contrasts)}.")
    if folder.exists():
        raise FileExistsError(f"`folder` {folder} exists: choose another one or delete it first.")
    maps = read_label_maps(label_maps).to(device)
    ranges = split_maps(len(maps))
    kinds = [None, *LESIONS]
    plan = [("train", None)] * subjects + [(s, kinds[i % 4]) for s in ("validation", "test") for i in range(tested)]
    with making_folder(folder) as unfinished:
        names: dict[str, list[str]] = {split: [] for split in ranges}
        for number, (split, lesion) in enumerate(tqdm(plan, desc="heads", unit="subject", disable=not progress)):
            name = f"{lesion or 'healthy'}_{number:05d}"
            keys = make_keys(seed, number, _SUBJECT, device)
            chosen = ranges[split][0] + integers(fold_in(keys, _CHOICE), len(ranges[split]))
            _save_head(unfinished / name, maps, chosen, keys, contrasts, lesion, skull)
            names[split].append(name)
        (unfinished / "splits").mkdir()
        for split, listed in names.items():
            write_text(unfinished / "splits" / f"{split}.csv", "\n".join(["subject", *listed, ""]))


def _save_head(folder: Path, maps: LabelMaps, chosen, keys, contrasts, lesion: str | None, skull: bool) -> None:
    """Writes the volumes of one head, from below the brain to above it."""
    drawn = uniform(fold_in(keys, _CHOICE + 1), (2,))[0].tolist()
    thickness = 3 + 3.5 * drawn[0]
    low, high = (1.25 * float(limit[chosen[0]]) for limit in (maps.low, maps.high))
    positions = torch.arange(low, high, thickness, device=keys.device)[None]
    look = LOOKS[0] if drawn[1] < 0.7 else LOOKS[1 + int((drawn[1] - 0.7) * 10)]
    heads = make_slices(
        maps,
        chosen,
        keys,
        positions,
        contrasts=contrasts,
        size=HEAD_SIZE,
        spacing=HEAD_SPACING,
        thickness=torch.full((1,), thickness),
        lesions=[lesion],
        look=look,
    )
    images = heads.images[0] if skull else heads.images[0] * heads.brain[0]
    volumes = {name: (image * 1000).round().to(torch.int16) for name, image in zip(contrasts, images, strict=True)}
    volumes |= {"brain": heads.brain[0].to(torch.uint8), "lesion": heads.lesion[0].to(torch.uint8)}
    centre = [(HEAD_SIZE[1] - 1) / 2 * HEAD_SPACING, (HEAD_SIZE[0] - 1) / 2 * HEAD_SPACING, float(positions[0, 0])]
    affine = np.diag([-HEAD_SPACING, -HEAD_SPACING, thickness, 1.0])
    affine[:3, 3] = centre
    folder.mkdir(parents=True)
    for name, volume in volumes.items():
        image = nib.Nifti1Image(volume.permute(2, 1, 0).cpu().numpy(), affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / f"{name}.nii.gz")
    record = {"map": maps.names[int(chosen[0])], "thickness": thickness, "lesion": lesion, "look": lesion and look}
    write_json(folder / "head.json", record)
