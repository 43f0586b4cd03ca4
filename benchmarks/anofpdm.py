"""AnoFPDM's pipeline beside the order of evaluations of its authors' program.

    python benchmarks/anofpdm.py             # three rounds of each, in turn; Markdown table

The original evaluates four times a step: the encoding, null and healthy of the guided prediction, and healthy once
more for the unguided one. The pipeline uses the third for the fourth, and with `index_mode="aligned"` the second for
the first. Every way evaluates the same network on batches of the same slices; a bare network for three evaluations a
step is the yardstick of the overhead. Memory: the peak of a process of its own, for two numbers of steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from anodiff import AnoFPDMPipeline, AnoFPDMScheduler, VolumeProcessor


def make_pipeline(size: int, device: str) -> tuple[AnoFPDMPipeline, float]:
    """A pipeline of one modality and the network's GFLOP per evaluation (one multiply-add = 2)."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(40, 80, 120),
        norm_num_groups=20,
        num_class_embeds=3,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 1, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    processor = VolumeProcessor(size=(size, size), intensity="given", brain_mask="none")
    pipe = AnoFPDMPipeline(unet, AnoFPDMScheduler(), processor, median_size=0).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, counter.get_total_flops() / 1e9


def evaluate(pipe: AnoFPDMPipeline, slices: torch.Tensor, label: int) -> torch.Tensor:
    labels = torch.full((len(slices),), label, device=slices.device)
    return pipe.unet(slices, torch.full((len(slices),), 10, device=slices.device), labels).sample


def bare(pipe: AnoFPDMPipeline, slices: torch.Tensor, steps: int) -> None:
    for step in range(steps):
        if step:
            evaluate(pipe, slices, 2)
        pair = torch.cat([slices, slices])
        evaluate(pipe, pair, 0)


def original(pipe: AnoFPDMPipeline, slices: torch.Tensor, steps: int) -> torch.Tensor:
    """Four evaluations a step, each of its own, and all predictions kept until the end."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps, slices.device)
    sample, guided, unguided = scheduler.add_noise(slices, torch.randn_like(slices), 0), [], []
    for t in range(steps):
        if t:
            sample = scheduler.encode_step(evaluate(pipe, sample, 2), t, sample)
        null, healthy = evaluate(pipe, sample, 2), evaluate(pipe, sample, 0)
        guided.append(scheduler.predict_original_sample(3 * healthy - 2 * null, t, sample))
        unguided.append(scheduler.predict_original_sample(evaluate(pipe, sample, 0), t, sample))
    guided, unguided = torch.stack(guided, 1), torch.stack(unguided, 1)
    best = (guided - unguided).square().mean((2, 3, 4)).argmax(1)
    errors = (guided - slices[:, None]).square()
    return torch.stack([error[: int(end) or 1].mean(0) for error, end in zip(errors, best, strict=True)])


def pipeline(pipe: AnoFPDMPipeline, slices: torch.Tensor, steps: int) -> None:
    pipe(slices, forward_steps=steps, batch_size=len(slices))


def aligned(pipe: AnoFPDMPipeline, slices: torch.Tensor, steps: int) -> None:
    pipe(slices, forward_steps=steps, index_mode="aligned", batch_size=len(slices))


WAYS = {"bare network, 3 a step": bare, "order of the original": original, "pipeline": pipeline, "aligned": aligned}


def timed(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def peak(name: str, options, answers) -> None:
    """Puts MiB above the process with a network that has seen one batch."""
    torch.set_num_threads(options.threads)
    pipe, _ = make_pipeline(options.size, "cpu")
    slices = torch.rand(options.slices, 1, options.size, options.size) * 2 - 1
    evaluate(pipe, torch.cat([slices, slices]), 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    WAYS[name](pipe, slices, options.steps)
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, gflop = make_pipeline(options.size, options.device)
    slices = (torch.rand(options.slices, 1, options.size, options.size) * 2 - 1).to(options.device)
    print(
        f"{options.device}, {options.threads} threads, {gflop:.1f} GFLOP per evaluation, {options.slices} slices in a batch,"
        f" {options.steps} steps"
    )
    times = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            times[name].append(timed(lambda way=way: way(pipe, slices, options.steps), options.device))
    print("\n| | seconds | over the bare network | of the original's time |\n|---|---|---|---|")
    for name in WAYS:
        over = [
            statistics.median(one / other for one, other in zip(times[name], times[yardstick], strict=True))
            for yardstick in ("bare network, 3 a step", "order of the original")
        ]
        print(f"| {name} | {statistics.median(times[name]):.2f} | {over[0]:.3f} | {over[1]:.3f} |")

    context = multiprocessing.get_context("spawn")
    print("\n| steps | order of the original, MiB | pipeline, MiB |\n|---|---|---|")
    for steps in (options.steps, 4 * options.steps):
        values = []
        for name in ("order of the original", "pipeline"):
            answers = context.Queue()
            asked = argparse.Namespace(**{**vars(options), "steps": steps})
            process = context.Process(target=peak, args=(name, asked, answers))
            process.start()
            values.append(answers.get())
            process.join()
        print(f"| {steps} | {values[0]:.0f} | {values[1]:.0f} |")


if __name__ == "__main__":
    main()
