"""Ensembles of calls with different seeds: how much the map of a pipeline depends on the noise that is drawn."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_integer
from .base import AnomalyPipeline, each_volume, resolve_seed
from .output import DispersionOutput


def disperse(
    pipe: AnomalyPipeline,
    volume: Any,
    num_members: int = 8,
    *,
    generator: int | torch.Generator | None = None,
    brain_mask: Any = None,
    **arguments: Any,
) -> Any:
    """
    Calls a pipeline with one seed after the other. Member k is the call with the seed `generator` + k, so that it is
    the same however many members there are, and member 0 is the plain call; ensembles of disjoint draws have seeds at
    least `num_members` apart.

    The deviation says how much a map depends on the noise that was drawn: dispersion, not confidence. What the network
    got wrong it gets wrong in every member.

    Args:
        pipe ([`AnomalyPipeline`]): Any that draws. Members cost what as many calls cost; the volume is prepared once.
        volume:
            What the pipeline takes: a volume, a tensor `(N, C, H, W)`, or several volumes, whose results are a list or
            an iterator as those of the pipeline.
        num_members (`int`, defaults to 8): E, at least 2.
        generator (`int` or `torch.Generator`, *optional*): Seed of member 0; `None` is 0.
        brain_mask (*optional*): As in a call.
        arguments: Of the calls: `threshold`, `batch_size`, `callback`, and the method's own.

    Returns:
        [`DispersionOutput`], or a list or an iterator of them.

    Raises:
        ValueError: The pipeline draws nothing, makes an ensemble by itself, or there are fewer than two members.

    Example:

    ```py
    >>> from anodiff import AnoDDPMPipeline, disperse

    >>> pipe = AnoDDPMPipeline.from_pretrained("owner/anoddpm-t1")
    >>> result = disperse(pipe, "scan_t1.nii.gz", num_members=8)
    >>> result.save("out/")
    ```
    """
    check_dispersion(pipe, num_members)
    several = each_volume(
        volume, brain_mask, lambda item: disperse(pipe, item, num_members, generator=generator, **arguments)
    )
    if several is not None:
        return several
    seed = resolve_seed(generator)
    seeds = list(range(seed, seed + num_members))
    prepared = pipe.prepare_volume(volume, brain_mask)
    first, kept = None, []
    for member_seed in seeds:
        result = pipe(prepared, generator=member_seed, return_dict=True, **arguments)
        first = first or result
        kept.append((result.anomaly_map, result.pred_score, result.volume_score))
    maps, slice_scores, volume_scores = zip(*kept, strict=True)
    members = torch.stack([torch.as_tensor(one) for one in maps])  # (E, ...)
    arrays = {
        "member_maps": members,
        "mean_map": members.mean(0),
        "dispersion": members.std(0, correction=0),
        "pred_score": torch.stack([torch.as_tensor(one) for one in slice_scores]),
        "volume_score": torch.tensor(volume_scores, dtype=torch.float64),
    }
    if first.source is not None:
        arrays = {name: values.numpy() for name, values in arrays.items()}
    return DispersionOutput(**arrays, seeds=seeds, first=first)


def check_dispersion(pipe: AnomalyPipeline, num_members: int) -> None:
    """Raises a `ValueError` for what [`disperse`] cannot do."""
    name = type(pipe).__name__
    if pipe.task == "segmentation":
        raise ValueError(f"{name} makes an ensemble by itself: call it with `num_ensemble`.")
    if pipe.deterministic:
        raise ValueError(
            f"{name} draws nothing, so that all members would be one map: it has no dispersion. Call it once."
        )
    check_integer("num_members", num_members, 2)
