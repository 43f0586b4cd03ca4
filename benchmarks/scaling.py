"""What a scan of a cohort costs as more processes share it: `accelerate launch predict.py` by 1, 2, 4 and 8 processes.

    python benchmarks/scaling.py                               # 1,000 small scans; a Markdown table
    python benchmarks/scaling.py --scans 24 --processes 1 2    # a try

Processes have a folder in common and nothing else, the table of the cohort and its lock included. Network and scans
are tiny, so that what they share shows most. Where every process has a device of its own, a cohort takes as long as its
share if a scan costs no more of the processor with eight processes than with one, and none waits for another. The start
of the processes is measured by the same command with `--skip_existing`, and taken off. With more processes than cores,
seconds of the clock are those of the cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from diffusers import UNet2DModel

from anodiff import AnoDDPMPipeline, AnoDDPMScheduler, VolumeProcessor


SIZE, SLICES = 32, 8


def make_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    unet = UNet2DModel(SIZE, 1, 1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, **blocks)
    processor = VolumeProcessor(size=(SIZE, SIZE), intensity="given", brain_mask="none")
    AnoDDPMPipeline(unet, AnoDDPMScheduler(), processor, noise_level=2, threshold=0.5).save_pretrained(folder)


def make_scans(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        voxels = np.random.default_rng(number).uniform(-1, 1, (SIZE, SIZE, SLICES)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"scan{number:04d}.nii.gz")


def launch(folder: Path, processes: int, *options: str) -> tuple[float, float]:
    """Seconds of the clock and of the processor that `predict.py` takes with a number of processes."""
    kind = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes)]
    command += ["-m", "anodiff.predict", "--model", "model", "scans", "-o", "maps", "--report", "none", *options]
    settings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    before, begun = used(), time.perf_counter()
    subprocess.run(command, cwd=folder, env=settings, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun, used() - before


def used() -> float:
    """Seconds of the processor of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=1000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    print(f"{options.scans} scans, {os.cpu_count()} cores.\n")
    print(
        "| processes | start, s | processor, ms a scan | over one process | clock, ms a scan |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder, first = Path(name), None
        make_checkpoint(folder / "model")
        make_scans(folder / "scans", options.scans)
        for processes in options.processes:
            clock, processor = launch(folder, processes)
            made = len(list((folder / "maps").glob("*/result.json")))
            assert made == options.scans, f"{made} of {options.scans} scans have results"
            start, start_processor = launch(folder, processes, "--skip_existing")
            shutil.rmtree(folder / "maps")
            cost, wait = (1e3 * value / options.scans for value in (processor - start_processor, clock - start))
            first = first or cost
            print(f"| {processes} | {start:.1f} | {cost:.1f} | {cost / first:.3f} | {wait:.1f} |", flush=True)


if __name__ == "__main__":
    main()
