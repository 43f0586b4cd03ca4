"""ANDi's pipeline beside the way its authors' program works: one timestep after the other, all deviations kept.

    python benchmarks/andi.py                # three rounds of each, in turn; Markdown tables

Time: the bare network for the same evaluations, a loop over timesteps that stacks the deviations (all slices in one
batch), and the pipeline. Memory: the peak of a process of its own for each, above that of the network with its first
batch. With a GPU also: seconds for one volume of 155 slices of 4 x 128 x 128 with 125 timesteps, in float32 and bf16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time

import torch
from networks import make_network

from anodiff import ANDiPipeline, ANDiScheduler, VolumeProcessor


def make_pipeline(channels: int, size: int, device: str, **changes) -> tuple[ANDiPipeline, float]:
    """ANDi with the network of configs/andi_brats21.yaml, but for `changes`, and the GFLOP of its evaluation."""
    unet, gflop = make_network("andi_brats21.yaml", size, channels, **changes)
    names = [f"m{number}" for number in range(channels)]
    processor = VolumeProcessor(modalities=names, size=(size, size), intensity="given", brain_mask="none")
    pipe = ANDiPipeline(unet, ANDiScheduler(), processor, median_size=0).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, gflop


def make_slices(options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (options.slices, options.channels, options.size, options.size)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(options.device)


def bare(pipe: ANDiPipeline, slices: torch.Tensor, options) -> None:
    total = options.slices * options.timesteps
    for start in range(0, total, options.batch):
        count = min(options.batch, total - start)
        rows = torch.arange(start, start + count, device=slices.device) % options.slices
        evaluate(pipe, slices[rows], torch.full((count,), 100, device=slices.device))


def evaluate(pipe: ANDiPipeline, sample: torch.Tensor, timesteps: torch.Tensor) -> None:
    """Evaluates the network alone, compiled if the pipeline's is, in the layout that its graph was made for."""
    dtype, memory_format = next(pipe.unet.parameters()).dtype, pipe.batches.memory_format
    (pipe.batches.compiled or pipe.unet)(sample.to(dtype, memory_format=memory_format), timesteps)


def sequential(pipe: ANDiPipeline, slices: torch.Tensor, options) -> torch.Tensor:
    """As the original: timestep by timestep, direct difference of the two means, a stack of all deviations."""
    scheduler = pipe.scheduler
    deviations = []
    for t in range(75 + options.timesteps - 1, 74, -1):
        noise = torch.randn_like(slices)
        sample = scheduler.add_noise(slices, noise, t)
        model_output = pipe.unet(sample, torch.full((len(slices),), t, device=slices.device)).sample
        true = scheduler.predicted_mean(noise, t, sample)
        deviations.append((true - scheduler.predicted_mean(model_output, t, sample)).square())
    return torch.stack(deviations, 1).log().mean(1).exp().amax(1)


def pipeline(pipe: ANDiPipeline, slices: torch.Tensor, options) -> None:
    pipe(slices, start=75, stop=75 + options.timesteps, batch_size=options.batch)


WAYS = {"bare network": bare, "loop over timesteps": sequential, "pipeline": pipeline}


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
    pipe, _ = make_pipeline(options.channels, options.size, options.device)
    slices = make_slices(options)
    pipe.unet(slices[: options.batch], torch.zeros(len(slices[: options.batch]), device=slices.device))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        WAYS[name](pipe, slices, options)
        answers.put(torch.cuda.max_memory_allocated() / 2**20 - before)
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    WAYS[name](pipe, slices, options)
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def peak_of(name: str, options) -> float:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=peak, args=(name, options, answers))
    process.start()
    value = answers.get()
    process.join()
    return value


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--timesteps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, gflop = make_pipeline(options.channels, options.size, options.device)
    slices = make_slices(options)
    print(
        f"{options.device}, {options.threads} threads, {gflop:.1f} GFLOP per evaluation, {options.slices} slices of"
        f" {options.channels} x {options.size} x {options.size}, {options.timesteps} timesteps, batch {options.batch}"
    )
    times = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            times[name].append(timed(lambda way=way: way(pipe, slices, options), options.device))
    print("\n| | seconds | over the bare network |\n|---|---|---|")
    for name in WAYS:
        ratio = statistics.median(one / other for one, other in zip(times[name], times["bare network"], strict=True))
        print(f"| {name} | {statistics.median(times[name]):.2f} | {ratio:.3f} |")

    print("\n| timesteps | loop, MiB | pipeline, MiB |\n|---|---|---|")
    for timesteps in (options.timesteps, 4 * options.timesteps):
        asked = argparse.Namespace(**{**vars(options), "timesteps": timesteps})
        values = [peak_of(name, asked) for name in ("loop over timesteps", "pipeline")]
        print(f"| {timesteps} | {values[0]:.0f} | {values[1]:.0f} |")

    if options.device == "cuda":
        whole = argparse.Namespace(**{**vars(options), "slices": 155, "timesteps": 125, "batch": 256})
        volume = make_slices(whole)
        print("\n| 155 slices, 125 timesteps | pipeline, s | bare network, s |\n|---|---|---|")
        for fast in (False, True):
            if fast:
                pipe.enable_fast_inference()
            pipeline(pipe, volume, whole)
            seconds = timed(lambda: pipeline(pipe, volume, whole), options.device)
            bare(pipe, volume, whole)
            network = timed(lambda: bare(pipe, volume, whole), options.device)
            print(f"| {'fast' if fast else 'float32'} | {seconds:.2f} | {network:.2f} |")


if __name__ == "__main__":
    main()
