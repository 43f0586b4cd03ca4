"""Dice of the brain extractor's masks on heads of held-back label maps and on real scans, and its time and memory.

    python benchmarks/brain_extraction.py --model outputs/brain_extractor/pipeline --maps label_maps [--mri mri]

`--mri` is a folder of scans by data set and subject; where `brain.nii.gz` lies beside one, its Dice is told, else the
volume found. `--pictures` is a folder that gets three planes of each, the mask's edge in red.
"""

import argparse
import resource
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from anodiff import BrainExtractor
from anodiff.data.phantoms.heads import CONTRASTS, make_slices
from anodiff.data.phantoms.label_maps import read_label_maps, split_maps
from anodiff.pipelines.brain import find_brain
from anodiff.schedulers.draws import make_keys
from anodiff.training.head_volumes import find_brains
from anodiff.volumes.volume import read_volume


SPACING, SIZE = 2.0, (96, 120, 100)  # of the heads: mm; X, Y, Z
LOWEST = -110.0  # mm below the brain's centre


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def make_head(maps, chosen: int, contrast: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A head with skull and neck `(X, Y, Z)`, its brain, and its affine."""
    positions = LOWEST + SPACING * torch.arange(SIZE[2])[None]
    size, thickness = (SIZE[1], SIZE[0]), torch.full((1,), SPACING)
    keys = make_keys(1000 + CONTRASTS.index(contrast), [chosen], 0)
    arguments = dict(contrasts=(contrast,), size=size, spacing=SPACING, thickness=thickness)
    heads = make_slices(maps, torch.tensor([chosen]), keys, positions, **arguments)
    image, tissues = (volume.permute(2, 1, 0) for volume in (heads.images[0, 0], heads.tissues[0]))
    # First voxels are right and anterior.
    return image.numpy(), find_brains(tissues[None], SPACING)[0].numpy(), np.diag([-SPACING, -SPACING, SPACING, 1.0])


def save_picture(path: Path, image: np.ndarray, brain: np.ndarray, affine: np.ndarray) -> None:
    image, brain = (
        nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.float32), affine)).get_fdata()
        for array in (image, brain)
    )
    middle, planes = np.argwhere(brain > 0).mean(0).astype(int), []
    top = np.quantile(image, 0.995) or 1.0
    for axis in range(3):
        grey, mask = (np.take(array, middle[axis], axis).T[::-1] for array in (image, brain > 0))
        edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
        colour = np.repeat((grey / top).clip(0, 1)[..., None], 3, 2)
        colour[edge] = 1, 0, 0
        plane = np.zeros((max(image.shape), max(image.shape), 3))
        plane[: colour.shape[0], : colour.shape[1]] = colour
        planes.append(plane)
    Image.fromarray((np.concatenate(planes, 1) * 255).astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a brain extractor")
    parser.add_argument("--maps", required=True, help="folder of label maps, of which the last fifth was held back")
    parser.add_argument("--mri", help="folder of scans, DATA_SET/SUBJECT/NAME.nii.gz")
    parser.add_argument("--pictures", help="folder for pictures")
    options = parser.parse_args()
    extractor = BrainExtractor.from_pretrained(options.model).eval()
    pictures = options.pictures and Path(options.pictures)
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    print(f"{torch.get_num_threads()} thread(s), {sum(p.numel() for p in extractor.parameters())} parameters\n")

    maps = read_label_maps(options.maps)
    parts = split_maps(len(maps))
    print("| heads of held-back maps | Dice, mean | least |\n|---|---|---|")
    for contrast in CONTRASTS:
        values = []
        for chosen in (*parts["validation"], *parts["test"]):
            image, brain, affine = make_head(maps, chosen, contrast)
            found = extractor.find_brain([image], affine)
            values.append(dice(found, brain))
            if pictures:
                save_picture(pictures / f"{contrast}_{chosen}.png", image, found, affine)
        print(f"| {contrast} | {np.mean(values):.4f} | {min(values):.4f} |", flush=True)

    if options.mri:
        print("\n| scan | Dice with brain.nii.gz | ml found | what `find_brain` says |\n|---|---|---|---|")
        for path in sorted(Path(options.mri).glob("*/*/*.nii.gz")):
            if path.name.removesuffix(".nii.gz") not in CONTRASTS:
                continue
            volume = read_volume(path)
            image = next(iter(volume.arrays.values()))
            found = extractor.find_brain([image], volume.affine)
            mask = path.with_name("brain.nii.gz")
            score = f"{dice(found, nib.load(mask).get_fdata() > 0):.4f}" if mask.is_file() else ""
            millilitres = found.sum() * abs(np.linalg.det(volume.affine)) / 1000
            said = find_brain(extractor, volume)[1] if found.any() else "no brain"
            print(f"| {'/'.join(path.parts[-3:])} | {score} | {millilitres:.0f} | {said} |", flush=True)
            if pictures:
                save_picture(
                    pictures / ("_".join(path.parts[-3:-1]) + f"_{path.stem}.png"), image, found, volume.affine
                )

    image, _, affine = make_head(maps, parts["test"][0], "flair")
    zoom = np.divide((240, 240, 155), image.shape)
    index = np.ix_(
        *[(np.arange(count) / factor).astype(int) for count, factor in zip((240, 240, 155), zoom, strict=True)]
    )
    image = image[index]
    start = time.perf_counter()
    extractor.find_brain([image], affine @ np.diag([*(1 / zoom), 1.0]))
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n240 x 240 x 155 voxels: {seconds:.1f} s; this process held at most {memory:.2f} GiB, label maps included"
    )


if __name__ == "__main__":
    main()
