"""What samplers of few steps cost CIMD in quality, on pictures with several annotations.

    python benchmarks/cimd_steps.py --model outputs/cimd_phantom_raters/pipeline --data prepared/phantom-raters

The first row is the reference: ancestral steps, as many as `--reference` says, by default the whole chain. The other
rows are the pipeline's own samplers, ancestral ("ddpm") and "ddim", and solvers of diffusers over the same betas, with
the x_0 estimate limited as CIMD limits it. The pipeline's samplers share their starts, and so do the solvers. GED
depends on the number of samples, so every row has as many. Prints a Markdown table, a row as soon as it is there; in brackets 95 % intervals over groups of
subjects, of the last two columns those of the paired difference to the first row.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from anodiff import CIMDPipeline
from anodiff.data.prepared import load_prepared
from anodiff.evaluation.ensemble_metrics import score_ensemble
from anodiff.evaluation.metrics import bootstrap_interval


# N images, E members, H x W pixels.

SOLVERS = {
    "DPM-Solver++ (2M)": partial(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++"),
    "SDE-DPM-Solver++ (2M)": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "UniPC": UniPCMultistepScheduler,
}
COLUMNS = (
    "sampler, steps",
    "samples",
    "GED",
    "HM-IoU",
    "CI",
    "diversity of samples",
    "seconds per image",
    "GED less that of the first row",
    "HM-IoU less that of the first row",
)


def sample_own(pipe: CIMDPipeline, images: torch.Tensor, options, sampler: str, steps: int | None) -> torch.Tensor:
    """Members `(N, E, H, W)` by a sampler of the pipeline."""
    settings = {"num_ensemble": options.members, "num_inference_steps": steps, "sampler": sampler}
    results = pipe.compute_maps(images, list(range(len(images))), median_size=0, batch_size=options.batch, **settings)
    return results.maps


def sample_solver(pipe: CIMDPipeline, images: torch.Tensor, options, solver: str, steps: int) -> torch.Tensor:
    """Members `(N, E, H, W)` by a solver of diffusers."""
    # Dynamic thresholding with the ratio 1 and the largest value 1 is the limit [-1, 1].
    limit = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
    betas = pipe.scheduler.betas.numpy()
    items = images.repeat_interleave(options.members, 0)
    # One channel for each draw: the start and the noise of each step, from the seed alone.
    draws = torch.randn(len(items), 1 + steps, *images.shape[2:], generator=torch.Generator().manual_seed(0)).to(items)
    members = []
    for some, noise in zip(items.split(options.batch), draws.split(options.batch), strict=True):
        scheduler = SOLVERS[solver](trained_betas=betas, timestep_spacing="linspace", **limit)
        scheduler.set_timesteps(steps, device=items.device)
        sample = noise[:, :1]
        for step, t in enumerate(scheduler.timesteps, start=1):
            epsilon = pipe.predict_noise(torch.cat([some, sample], 1), t.repeat(len(some)))[:, :1]
            drawn = {"variance_noise": noise[:, step, None]} if solver.startswith("SDE") else {}
            sample = scheduler.step(epsilon, t, sample, **drawn).prev_sample
        members.append(sample[:, 0])
    return torch.cat(members).unflatten(0, (len(images), options.members))


def with_interval(values: np.ndarray, groups: np.ndarray) -> str:
    low, high = bootstrap_interval(values, groups)
    return f"{values.mean():.3f}" if low is None else f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=64, help="images with annotations, evenly spread")
    parser.add_argument("--members", type=int, default=8, help="samples of an image, in every row")
    parser.add_argument("--reference", type=int, help="steps of the first row; the whole chain by default")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pipe = CIMDPipeline.from_pretrained(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    limit = pipe.scheduler.config.clip_range
    if limit is None or tuple(limit) != (-1.0, 1.0):
        raise SystemExit(f"error: `--model` must limit x_0 to [-1, 1] (`clip_range`), as the solvers do, got {limit}.")
    split = load_prepared(options.data, options.split)
    annotated = np.flatnonzero(split.annotations)
    rows = annotated[np.unique(np.linspace(0, len(annotated) - 1, options.images).round().astype(int))]
    item = split.read_rows(rows, ("image", "mask", "subject"))
    images = torch.as_tensor(item["image"]).to(options.device)
    annotations = [mask[:count] > 0 for mask, count in zip(item["mask"], split.annotations[rows], strict=True)]
    groups = np.array([split.subject_info[subject]["group"] for subject in item["subject"]])
    print(f"{len(rows)} images, {len(set(groups))} groups\n\n| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)

    ways = [("ddpm", options.reference)]
    ways += [("ddpm", steps) for steps in (100, 50, 25, 10) if steps != options.reference]
    ways += [(solver, steps) for steps in (25, 10) for solver in SOLVERS] + [("ddim", steps) for steps in (25, 10)]
    reference = None
    for name, steps in ways:
        start = time.perf_counter()
        draw = sample_solver if name in SOLVERS else sample_own
        members = draw(pipe, images, options, name, steps)
        seconds = (time.perf_counter() - start) / len(images)
        masks = (members > pipe.config.threshold).cpu().numpy()
        scores = [score_ensemble(mask, gt) for mask, gt in zip(masks, annotations, strict=True)]
        scores = {key: np.array([score[key] for score in scores]) for key in scores[0]}
        reference = reference or scores
        cells = [f"{name}, {steps or len(pipe.scheduler)}", str(options.members)]
        cells += [with_interval(scores[key], groups) for key in ("ged", "hm_iou", "collective_insight")]
        cells += [f"{scores['sample_diversity'].mean():.3f}", f"{seconds:.2f}"]
        if scores is reference:
            cells += ["", ""]
        else:
            cells += [with_interval(scores[key] - reference[key], groups) for key in ("ged", "hm_iou")]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
