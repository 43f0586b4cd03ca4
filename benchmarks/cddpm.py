"""cDDPM's and SADM's pipelines beside one timestep at a time, and where their time goes.

    python benchmarks/cddpm.py                       # three rounds of each, in turn; Markdown tables
    python benchmarks/cddpm.py --slices 50 --batch 150 --device cuda    # one volume of the authors

Time: the bare UNet for the same evaluations, a loop over timesteps as in the authors' program (the slices of a volume
are one batch, or several of `--batch`), and the pipeline. Then milliseconds per slice of every part of cDDPM and of
SADM, each measured alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetForImageClassification

from anodiff import (
    AnoDDPMScheduler,
    CDDPMPipeline,
    ConditionedUNet2DModel,
    SADMPipeline,
    SiameseUNet2DModel,
    VolumeProcessor,
)
from anodiff.pipelines.one_step import difference_maps, encode_slices
from anodiff.schedulers.draws import make_keys


def make_pipelines(options) -> tuple[CDDPMPipeline, SADMPipeline]:
    """The networks of configs/cddpm.yaml and configs/sadm_draem.yaml, narrower by the factor `--width`."""
    torch.manual_seed(0)
    divide = options.width
    unet = ConditionedUNet2DModel(
        sample_size=options.size,
        block_out_channels=(128 // divide, 256 // divide, 256 // divide),
        attention_head_dim=64 // divide,
        norm_num_groups=32 // divide,
        attn_norm_num_groups=32 // divide,
        condition_dim=512 // divide,
    )
    for parameter in unet.parameters():  # fresh residual branches are zero
        torch.nn.init.normal_(parameter, std=0.02)
    config = ResNetConfig(
        num_channels=1,
        num_labels=512 // divide,
        embedding_size=64 // divide,
        hidden_sizes=[width // divide for width in (256, 512, 1024, 2048)],
    )
    segmentation_network = SiameseUNet2DModel(1, tuple(width // divide for width in (64, 128, 256, 512)))
    processor = VolumeProcessor(size=(options.size,) * 2, intensity="given", brain_mask="none", value_range=(0.0, 1.0))
    parts = {
        "unet": unet.eval(),
        "scheduler": AnoDDPMScheduler(beta_schedule="cosine", z=None),
        "processor": processor,
        "encoder": ResNetForImageClassification(config).eval(),
    }
    pipelines = CDDPMPipeline(**parts), SADMPipeline(**parts, segmentation_network=segmentation_network.eval())
    for pipe in pipelines:
        pipe.to(options.device)
        pipe.set_progress_bar_config(disable=True)
    return pipelines


def bare(pipe: CDDPMPipeline, slices: torch.Tensor, options) -> None:
    total = len(slices) * len(pipe.config.timesteps)
    codes = torch.zeros(len(slices), pipe.unet.config.condition_dim, device=slices.device)
    for start in range(0, total, options.batch):
        rows = torch.arange(start, min(start + options.batch, total), device=slices.device) % len(slices)
        pipe.unet(slices[rows], torch.full((len(rows),), 499, device=slices.device), codes[rows])


def one_timestep_at_a_time(pipe: CDDPMPipeline, slices: torch.Tensor, options) -> None:
    settings = {**pipe.default_settings(), "batch_size": min(options.batch, len(slices))}
    parts = [
        pipe.compute_maps(slices, range(len(slices)), **{**settings, "timesteps": [t]}).reconstruction
        for t in pipe.config.timesteps
    ]
    pipe.postprocessing.filter(
        difference_maps(slices, torch.stack(parts).mean(0), pipe.config.map_type).cpu().numpy(),
        (slices[:, 0] >= 0).cpu().numpy(),
    )


def pipeline(pipe: CDDPMPipeline, slices: torch.Tensor, options) -> None:
    pipe(slices, batch_size=options.batch)


WAYS = {"bare UNet": bare, "one timestep at a time": one_timestep_at_a_time, "pipeline": pipeline}


def parts_of(pipe: CDDPMPipeline, slices: torch.Tensor, options) -> dict[str, Callable]:
    """What a call of a pipeline is made of."""
    shown = {
        "encoder": lambda: encode_slices(pipe, slices, options.batch),
        "UNet": lambda: bare(pipe, slices, options),
        "noise": lambda: [
            pipe.scheduler.draw_noise(make_keys(0, range(len(slices)), draw, slices.device), slices.shape[1:])
            for draw in range(len(pipe.config.timesteps))
        ],
    }
    if isinstance(pipe, SADMPipeline):

        def segment():
            for _ in pipe.config.timesteps:
                for part in slices.split(options.batch):
                    pipe.segment(part, part)

        shown["segmentation"] = segment
    maps, brain = slices[:, 0].cpu().numpy(), (slices[:, 0] >= 0).cpu().numpy()
    other = slices.flip(0)
    shown[f"map ({pipe.config.map_type})"] = lambda: difference_maps(slices, other, pipe.config.map_type)
    shown["post-processing"] = lambda: pipe.postprocessing.filter(maps, brain)
    shown["whole call"] = lambda: pipeline(pipe, slices, options)
    return shown


def timed(function: Callable, device: str) -> float:
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
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--slices", type=int, default=6)
    parser.add_argument("--batch", type=int, default=18)
    parser.add_argument("--width", type=int, default=1, help="divides all channels, 1 to 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cddpm, sadm = make_pipelines(options)
    generator = torch.Generator().manual_seed(0)
    slices = torch.rand(options.slices, 1, options.size, options.size, generator=generator).to(options.device)
    with FlopCounterMode(display=False) as counter:
        cddpm.unet(slices[:1], 0, torch.zeros(1, cddpm.unet.config.condition_dim, device=slices.device))
    print(
        f"{options.device}, {options.threads} threads, {counter.get_total_flops() / 1e9:.1f} GFLOP per evaluation, {options.slices} slices of"
        f" {options.size} x {options.size}, {len(cddpm.config.timesteps)} timesteps, batch {options.batch}"
    )
    times = {name: [] for name in WAYS}
    for way in WAYS.values():
        way(cddpm, slices, options)  # warm
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            times[name].append(timed(lambda way=way: way(cddpm, slices, options), options.device))
    print("\n| cDDPM | seconds | over the bare UNet |\n|---|---|---|")
    for name in WAYS:
        ratio = statistics.median(one / other for one, other in zip(times[name], times["bare UNet"], strict=True))
        print(f"| {name} | {statistics.median(times[name]):.2f} | {ratio:.3f} |")

    for title, pipe in (("cDDPM", cddpm), ("SADM", sadm)):
        measured = {
            name: statistics.median(timed(part, options.device) for _ in range(options.rounds))
            for name, part in parts_of(pipe, slices, options).items()
        }
        print(f"\n| {title} | ms per slice | share |\n|---|---|---|")
        for name, seconds in measured.items():
            print(f"| {name} | {1000 * seconds / len(slices):.2f} | {100 * seconds / measured['whole call']:.1f} % |")


if __name__ == "__main__":
    main()
