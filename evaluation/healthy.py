"""What the maps of a pipeline show in healthy brains, place by place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from scipy import ndimage

from ..checks import check_integer, check_number
from ..models.healthy_maps import HealthyMapsModel, level_weights
from ..pipelines.base import AnomalyPipeline


# N slices of one volume, D levels along the slice axis, H x W pixels.


@torch.no_grad()
def measure_healthy_maps(
    pipeline: AnomalyPipeline,
    slices: Iterable[dict],
    *,
    depth: int = 16,
    smoothing: float = 2.0,
    floor: float = 0.25,
    seed: int = 0,
    batch_size: int | None = None,
    noise: torch.Tensor | Callable | None = None,
) -> HealthyMapsModel:
    """
    Measures the mean map of healthy slices at every place, and puts it into the pipeline as its component
    `healthy_maps`, which is saved with it. Maps are divided by it once `normalization` is `"healthy_maps"`; a threshold
    must then be chosen anew.

    Args:
        slices (iterable of `dict`): As of [`~evaluation.calibration.LabelledSlices`]: `image`, `brain`, `label` and
            `slice`, volume by volume. Only slices of label 0 count.
        depth (`int`, defaults to 16): Levels along the slice axis.
        smoothing (`float`, defaults to 2.0): Standard deviation of a Gaussian in the plane, in pixels; along the slice
            axis it is one level.
        floor (`float`, defaults to 0.25): Least value, as a share of the mean: where healthy brains show hardly
            anything, noise must not be blown up.
        seed, batch_size, noise: As of the pipeline's call.

    Returns:
        [`HealthyMapsModel`]: The component.

    Raises:
        ValueError: The maps are divided already, there is no healthy slice with brain, or its maps are 0.
    """
    check_integer("depth", depth, 2)
    check_number("smoothing", smoothing, least=0)
    check_number("floor", floor, above=0, most=1)
    if pipeline.config.normalization != "none":
        raise ValueError("`normalization` of the pipeline must be none while its healthy maps are measured.")
    total, count = 0.0, 0.0
    for item in slices:
        brain = torch.as_tensor(item["brain"], dtype=torch.bool)
        images = torch.as_tensor(item["image"], device=pipeline._execution_device)
        numbers = item["slice"].tolist()
        maps = pipeline.map_slices(
            images, brain.to(images.device), numbers, seed=seed, batch_size=batch_size, noise=noise
        ).maps
        weights = level_weights(brain, numbers, depth) * torch.as_tensor(item["label"] == 0)[:, None]
        total = total + torch.einsum("nd,nhw->dhw", weights, maps * brain)
        count = count + torch.einsum("nd,nhw->dhw", weights, brain.float())
    if not torch.is_tensor(total) or not total.sum() > 0:
        raise ValueError("`slices` must hold healthy slices (label 0) with brain, whose maps are not 0.")
    mean = float(total.sum() / count.sum())
    sigma = (1.0, smoothing, smoothing)
    total, count = (torch.from_numpy(ndimage.gaussian_filter(values.numpy(), sigma)) for values in (total, count))
    # Where few slices have brain the mean of all places counts, as if one more slice had shown it.
    relative = (total / mean + 1.0) / (count + 1.0)
    component = HealthyMapsModel(*relative.shape[1:], depth=depth)
    component.levels.copy_(relative.clamp(min=floor))
    pipeline.register_modules(healthy_maps=component.to(pipeline._execution_device))
    return component
