"""CIMD's ensemble in shared batches beside one member at a time, as its authors' program works.

    python benchmarks/cimd.py                # three rounds of each, in turn; Markdown tables

Time: the bare network for the same evaluations in the same batches, the pipeline with the members of all slices in
batches, and the pipeline with a batch of one. The second over the first is the overhead (aim 1.05), the third over the
second what batches gain. With a GPU also: seconds for one picture of 128 x 128, 16 members of 50 steps, in float32 and
bf16, with the network of configs/cimd_lidc.yaml.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from networks import make_network

from anodiff import CIMDPipeline, CIMDScheduler, VolumeProcessor


# N slices, E members, H x W pixels.


def make_pipeline(size: int, widths: list[int] | None, device: str) -> tuple[CIMDPipeline, float]:
    """The network of configs/cimd_lidc.yaml, with other widths if they are given, and its GFLOP per evaluation (one
    multiply-add = 2)."""
    unet, gflop = make_network("cimd_lidc.yaml", size, 2, **({} if widths is None else {"block_out_channels": widths}))
    with torch.no_grad():
        # A trained network has no branches of zeros, with which members could not differ.
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    processor = VolumeProcessor(
        modalities=["image"], size=(size, size), intensity="given", value_range=(0, 1), brain_mask="none"
    )
    pipe = CIMDPipeline(unet, CIMDScheduler(), processor).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, gflop


def make_slices(count: int, size: int, device: str) -> torch.Tensor:
    return torch.rand((count, 1, size, size), generator=torch.Generator().manual_seed(0)).to(device)


def bare(pipe: CIMDPipeline, slices: torch.Tensor, members: int, steps: int, batch: int) -> None:
    """Every evaluation of the ensemble, and nothing else."""
    total, device = len(slices) * members, slices.device
    for begin in range(0, total, batch):
        count = min(batch, total - begin)
        rows = (begin + torch.arange(count, device=device)) // members
        # Compiled if the pipeline's network is, in the layout that its graph was made for.
        dtype, memory_format = next(pipe.unet.parameters()).dtype, pipe.batches.memory_format
        sample = torch.cat([slices[rows], slices[rows]], 1).to(dtype, memory_format=memory_format)
        for t in range(steps):
            (pipe.batches.compiled or pipe.unet)(sample, torch.full((count,), t, device=device))


def sample(pipe: CIMDPipeline, slices: torch.Tensor, members: int, steps: int, batch: int) -> torch.Tensor:
    return pipe(slices, num_ensemble=members, num_inference_steps=steps, batch_size=batch).member_maps


def timed(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--widths", type=int, nargs=5, help="channels of the five levels; the configuration's if not given"
    )
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, gflop = make_pipeline(options.size, options.widths, options.device)
    slices = make_slices(options.slices, options.size, options.device)
    print(
        f"{options.device}, {options.threads} threads, {gflop:.1f} GFLOP per evaluation, {options.slices} slices of"
        f" {options.size} x {options.size}, {options.members} members of {options.steps} steps, batch {options.batch}"
    )
    amount = (slices, options.members, options.steps)
    together, alone = sample(pipe, *amount, options.batch), sample(pipe, *amount, 1)  # also warms up
    print(f"\nLargest difference between members of a batch and alone: {(together - alone).abs().max():.1e}")
    ways = {
        "bare network": lambda: bare(pipe, *amount, options.batch),
        "members in batches": lambda: sample(pipe, *amount, options.batch),
        "one member at a time": lambda: sample(pipe, *amount, 1),
    }
    times = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            times[name].append(timed(way, options.device))
    print("\n| | seconds | over the bare network |\n|---|---|---|")
    for name in ways:
        ratio = statistics.median(one / other for one, other in zip(times[name], times["bare network"], strict=True))
        print(f"| {name} | {statistics.median(times[name]):.2f} | {ratio:.3f} |")

    if options.device == "cuda":
        pipe, gflop = make_pipeline(128, None, options.device)
        amount = (make_slices(1, 128, options.device), 16, 50)
        print(
            f"\n| 1 picture of 128 x 128, 16 members, 50 steps, {gflop:.0f} GFLOP | s | bare network, s |\n|---|---|---|"
        )
        for fast in (False, True):
            if fast:
                pipe.enable_fast_inference()
            sample(pipe, *amount, 16)
            seconds = timed(lambda: sample(pipe, *amount, 16), options.device)
            bare(pipe, *amount, 16)
            network = timed(lambda: bare(pipe, *amount, 16), options.device)
            print(f"| {'fast' if fast else 'float32'} | {seconds:.2f} | {network:.2f} |")


if __name__ == "__main__":
    main()
