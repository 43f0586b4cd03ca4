"""Slices per second into a training loop: from a prepared data set, from `.npy` files of one slice each, and from
NIfTI.

    python benchmarks/prepared.py                             # 8 subjects of 120 x 120 x 77, four modalities; a table
    python benchmarks/prepared.py --subjects 2 --size 32      # a try

Every way gives shuffled batches of 32 images (C, H, W) as a torch tensor, by one process without workers. NIfTI twice:
a volume is read and processed for every slice that is drawn from it, as a plain map-style data set does, or once for
all its slices (then a batch holds slices of one subject). Files were just written, so the system's cache holds them:
this is the work of reading, not of a disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import torch

from anodiff.data.prepare import prepare
from anodiff.data.prepared import PreparedSplit, load_prepared
from anodiff.data.readers.subjects import read_volume_folders
from anodiff.volumes.processor import VolumeProcessor


# N images, C modalities, H x W pixels.

BATCH = 32
MODALITIES = ("flair", "t1", "t1ce", "t2")


def write_raw(folder: Path, subjects: int, shape: tuple[int, int, int]) -> None:
    """Blocks of noise in an empty head room, int16, gzipped: what a BraTS volume costs to unpack."""
    for index in range(subjects):
        rng = np.random.default_rng(index)
        for name in MODALITIES:
            array = np.zeros(shape, np.int16)
            inner = tuple(slice(size // 6, -(size // 6)) for size in shape)
            array[inner] = rng.integers(100, 1000, array[inner].shape)
            path = folder / f"s{index:02d}" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([-2.0, -2.0, 2.0, 1.0])), path)


def from_prepared(split: PreparedSplit) -> Iterator[torch.Tensor]:
    order = np.random.default_rng(0).permutation(len(split))
    for start in range(0, len(order), BATCH):
        yield torch.from_numpy(split.read_rows(order[start : start + BATCH], ("image",))["image"])


def from_arrays(files: list[Path]) -> Iterator[torch.Tensor]:
    order = np.random.default_rng(0).permutation(len(files))
    for start in range(0, len(order), BATCH):
        yield torch.from_numpy(np.stack([np.load(files[index]) for index in order[start : start + BATCH]]))


def from_volumes(split: PreparedSplit, raw: Path, processor: VolumeProcessor, count: int) -> Iterator[torch.Tensor]:
    """`count` slices of a shuffled order, each with its whole volume."""
    rows = split.read_rows(np.random.default_rng(0).permutation(len(split))[:count], ("subject", "slice"))
    pending = []
    for subject, number in zip(rows["subject"], rows["slice"], strict=True):
        volume = {name: raw / subject / f"{name}.nii.gz" for name in MODALITIES}
        pending.append(processor.preprocess(volume).slices[number])
        if len(pending) == BATCH:
            yield torch.stack(pending)
            pending = []
    if pending:
        yield torch.stack(pending)


def from_whole_volumes(split: PreparedSplit, raw: Path, processor: VolumeProcessor) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng(0)
    for subject in rng.permutation(split.subjects):
        processed = processor.preprocess({name: raw / subject / f"{name}.nii.gz" for name in MODALITIES})
        kept = split.slices[split.subject_rows(subject)]
        yield from processed.slices[torch.from_numpy(rng.permutation(kept))].split(BATCH)


def speed(make_batches) -> float:
    start, count = time.perf_counter(), 0
    for batch in make_batches():
        count += len(batch)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=(120, 120, 77))
    parser.add_argument("--size", type=int, default=64, help="of a slice")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        write_raw(folder / "raw", arguments.subjects, tuple(arguments.shape))
        processor = VolumeProcessor(MODALITIES, size=(arguments.size, arguments.size))
        subjects = read_volume_folders(folder / "raw", {name: f"{name}.nii.gz" for name in MODALITIES})
        subjects = [type(subject)(subject.name, subject.volume, split="train") for subject in subjects]
        start = time.perf_counter()
        prepare(subjects, processor, folder / "prepared", recipe={}, progress=False)
        seconds = time.perf_counter() - start
        split = load_prepared(folder / "prepared", "train")
        (folder / "npy").mkdir()
        files = [folder / "npy" / f"{index:06d}.npy" for index in range(len(split))]
        for index, file in enumerate(files):
            np.save(file, split[index]["image"])
        ways = {
            "prepared set": lambda: from_prepared(split),
            "`.npy` per slice": lambda: from_arrays(files),
            "NIfTI, a volume for all its slices": lambda: from_whole_volumes(split, folder / "raw", processor),
            "NIfTI, a volume for every slice": lambda: from_volumes(split, folder / "raw", processor, 2 * BATCH),
        }
        # In turn, so that what else the machine does meets all of them.
        found = [{name: speed(way) for name, way in ways.items()} for _ in range(arguments.rounds)]
        written = sum(path.stat().st_size for path in (folder / "prepared" / "data").iterdir()) / 2**20
        plain = sum(path.stat().st_size for path in files) / 2**20

    print(
        f"{len(split)} slices of {len(MODALITIES)} x {arguments.size} x {arguments.size} of {arguments.subjects} subjects of"
        f" {' x '.join(map(str, arguments.shape))}, prepared in {seconds:.1f} s; {written:.0f} MiB prepared, {plain:.0f} MiB as"
        f" `.npy`; {torch.get_num_threads()} threads, median of {arguments.rounds} rounds.\n"
    )
    print("| from | slices per second | of the prepared set |\n|---|---|---|")
    medians = {name: statistics.median(row[name] for row in found) for name in ways}
    for name, value in medians.items():
        print(f"| {name} | {value:,.1f} | {value / medians['prepared set']:.4f} |")


if __name__ == "__main__":
    main()
