"""Overhead of a training step: time of `train.py`'s steps over time of a bare loop on tensors in the device's memory.

    python benchmarks/training.py --train.max_steps 20                     # the demonstration
    python benchmarks/training.py --train.max_steps 300 --train.batch_size 128 --train.mixed_precision bf16
    python benchmarks/training.py --config anoddpm_heads.yaml --data heads:builtin --train.max_steps 300

All options are those of `train.py`, for the methods `anoddpm` and `andi`. The first third of the steps warms up. The
bare loop draws noise with torch's generator, and has neither average, augmentation nor schedule; it runs before and
after, and the mean counts. The aim is 1.05.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from anodiff.configs import parse_options
from anodiff.training.loop import fit
from anodiff.training.objective import Objective
from anodiff.training.objective_noise import ANDiObjective, NoiseObjective
from anodiff.training.options import TrainOptions


OBJECTIVES = {"anoddpm": NoiseObjective, "andi": ANDiObjective}


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()  # of all threads; what else runs on the machine disturbs it less
    torch.cuda.synchronize()
    return time.perf_counter()


def time_training(options: TrainOptions, first: int) -> tuple[float, Objective, tuple[int, ...]]:
    """Seconds of a step from `first` on, the objective, and the shape of a batch."""
    begun: dict = {}

    class Timed(OBJECTIVES[options.method]):
        def loss(self, model, batch, keys):
            step = begun["step"] = begun.get("step", 0) + 1
            if step in (first, options.train.max_steps):
                begun[step] = now(batch["image"].device)
            begun["objective"], begun["shape"] = self, tuple(batch["image"].shape)
            return super().loss(model, batch, keys)

    fit(options, Timed)
    last = options.train.max_steps
    return (begun[last] - begun[first]) / (last - first), begun["objective"], begun["shape"]


def time_bare_loop(options: TrainOptions, objective: Objective, shape: tuple[int, ...], first: int) -> float:
    """Seconds of a step from `first` on."""
    device = next(objective.model.parameters()).device
    network = type(objective.model).from_config(objective.model.config).to(device)  # as accelerate has not wrapped it
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=device.type == "cuda")
    model = torch.compile(network) if options.train.compile else network
    images = torch.rand(8, *shape, device=device) * 2 - 1
    scale = objective.scheduler.alphas_cumprod.float().to(device) if options.method == "anoddpm" else None
    precision = AcceleratorState().mixed_precision
    for step in itertools.count(1):
        if step == first:
            begun = now(device)
        if step == options.train.max_steps:
            return (now(device) - begun) / (step - first)
        noise = torch.randn(shape, device=device)
        timesteps = torch.randint(len(objective.scheduler), shape[:1], device=device)
        share = 0.5 if scale is None else scale[timesteps][:, None, None, None]
        sample = images[step % 8] * share**0.5 + noise * (1 - share) ** 0.5
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            predicted = model(sample, timesteps).sample
        F.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    shorthands = {"--data": "--data.path"}
    options = parse_options(
        TrainOptions,
        None,
        prog="training.py",
        description=__doc__,
        shorthands=shorthands,
        default_config="anoddpm_phantom.yaml",
    )
    quiet = {"validate_every": 0, "checkpoint_every": 0, "report_to": "none", "resume": None, "push_to_hub": None}
    with tempfile.TemporaryDirectory() as folder:
        loop = dataclasses.replace(options.train, output_dir=folder, **quiet)
        options = dataclasses.replace(options, train=loop)
        first = options.train.max_steps // 3 + 1
        training, objective, shape = time_training(options, first)
        before = time_bare_loop(options, objective, shape, first)
        again, _, _ = time_training(
            dataclasses.replace(options, train=dataclasses.replace(loop, output_dir=f"{folder}/again")), first
        )
        after = time_bare_loop(options, objective, shape, first)
    device = next(objective.model.parameters()).device
    bare, whole = (before + after) / 2, (training + again) / 2
    print(
        f"{device}, {torch.get_num_threads()} threads, batches of {' x '.join(map(str, shape))},"
        f" {AcceleratorState().mixed_precision}, {options.train.max_steps - first} steps\n\n"
        "| `train.py`, ms | bare loop, ms | ratio |\n|---|---|---|\n"
        f"| {1e3 * whole:.1f} | {1e3 * bare:.1f} | {whole / bare:.3f} |"
    )


if __name__ == "__main__":
    main()
