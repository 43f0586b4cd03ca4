"""Overhead ratio of the pipeline: time of `pipe(slices)` over time of the bare network for the same evaluations.

    python benchmarks/overhead.py            # two runs of each, in turn; Markdown table

The network has at least 5 GFLOP per evaluation and a slice at least 50 evaluations; slices are prepared. The aim is
1.05. One-shot maps are reported in milliseconds per slice with the share of each stage.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from anodiff import AnoDDPMPipeline, AnoDDPMScheduler, VolumeProcessor
from anodiff.schedulers.draws import make_keys


def make_pipeline(size: int, device: str) -> tuple[AnoDDPMPipeline, float]:
    """A pipeline of one modality and the network's GFLOP per evaluation (one multiply-add = 2)."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(40, 80, 120),
        norm_num_groups=20,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 1, size, size), torch.zeros(1))
    processor = VolumeProcessor(size=(size, size), intensity="given", brain_mask="none")
    pipe = AnoDDPMPipeline(unet, AnoDDPMScheduler(), processor).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, counter.get_total_flops() / 1e9


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
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--level", type=int, default=50, help="noise level, evaluations per slice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pipe, gflop = make_pipeline(options.size, options.device)
    slices = torch.rand(options.slices, 1, options.size, options.size) * 2 - 1
    sample = slices.to(options.device)
    batch = options.slices

    def bare(evaluations: int):
        for t in range(evaluations):
            pipe.unet(sample, torch.full((batch,), t, device=options.device))

    print(
        f"{options.device}, {torch.get_num_threads()} threads, {gflop:.1f} GFLOP per evaluation, {batch} slices in a batch"
    )
    print("\n| noise | pipeline, s | bare network, s | overhead ratio |\n|---|---|---|---|")
    for noise_type in ("simplex", "gaussian"):
        pipe.scheduler = AnoDDPMScheduler(noise_type=noise_type)
        whole, network = [], []
        pipe(slices, noise_level=2, batch_size=batch)  # builds the noise plan
        bare(2)
        for _ in range(options.rounds):
            whole.append(timed(lambda: pipe(slices, noise_level=options.level, batch_size=batch), options.device))
            network.append(timed(lambda: bare(options.level), options.device))
        ratio = statistics.median(one / other for one, other in zip(whole, network, strict=True))
        print(f"| {noise_type} | {statistics.median(whole):.2f} | {statistics.median(network):.2f} | {ratio:.3f} |")

    print("\n| one-shot, stage | ms per slice | share |\n|---|---|---|")
    pipe.scheduler = AnoDDPMScheduler()
    keys = make_keys(0, range(batch), device=options.device)
    t = torch.full((batch,), 200, device=options.device)
    noise = pipe.scheduler.draw_noise(keys, sample.shape[1:], t)
    stages = {
        "whole call": lambda: pipe(slices, noise_level=201, mode="one_shot", batch_size=batch),
        "noise": lambda: pipe.scheduler.draw_noise(keys, sample.shape[1:], t),
        "network": lambda: pipe.unet(sample, t),
        "add noise and estimate": lambda: pipe.scheduler.predict_original_sample(
            noise, t, pipe.scheduler.add_noise(sample, noise, t)
        ),
    }
    times = {name: statistics.median(timed(stage, options.device) for _ in range(7)) for name, stage in stages.items()}
    for name, seconds in times.items():
        print(f"| {name} | {seconds / batch * 1e3:.2f} | {seconds / times['whole call']:.0%} |")


if __name__ == "__main__":
    main()
