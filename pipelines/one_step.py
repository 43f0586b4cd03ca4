"""What cDDPM, pDDPM and SADM share: slices are noised once to each of a few timesteps, and restored at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from diffusers import UNet2DModel
from transformers import PreTrainedModel

from ..checks import check_choice
from ..schedulers.devices import send
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from .base import AnomalyPipeline, read_logits
from .mahalanobis import MAHALANOBIS, mahalanobis_distance
from .slices import Noise
from .ssim import ssim_map


MAP_TYPES = ("residual", "ssim", *MAHALANOBIS)


# N slices, C modalities, H x W pixels, K timesteps, E values of a code, B items (a timestep of a slice) of a batch.


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> None:
    """Raises a `ValueError` unless `timesteps` are different numbers from 0 to `num_train_timesteps` - 1."""
    last = num_train_timesteps - 1
    steps = list(timesteps) if isinstance(timesteps, (list, tuple)) else []
    if not steps or len(set(steps)) != len(steps) or any(type(t) is not int or not 0 <= t <= last for t in steps):
        raise ValueError(f"`timesteps` must be a list of different integers from 0 to {last}, got {timesteps!r}.")


def check_map_type(map_type: str, timesteps: Sequence[int]) -> None:
    """Raises a `ValueError` unless `map_type` is one of `MAP_TYPES`, and can be computed from these timesteps."""
    check_choice("map_type", map_type, MAP_TYPES)
    if map_type in MAHALANOBIS and len(timesteps) < 2:
        raise ValueError(f"`map_type` {map_type} needs several `timesteps`, got {list(timesteps)}.")


def check_encoder(unet: UNet2DModel, encoder: PreTrainedModel | None) -> None:
    """Raises a `ValueError` unless the encoder gives as many values as the UNet takes; without an encoder, none."""
    wanted, given = unet.config.get("condition_dim"), None if encoder is None else encoder.config.num_labels
    if wanted != given:
        raise ValueError(
            f"`encoder` must give as many values as `unet.condition_dim` says, {wanted or 'none'}; it gives"
            f" {given or 'none'}."
        )


def iterate_reconstructions(
    pipeline: AnomalyPipeline,
    slices: torch.Tensor,
    indices: Sequence[int],
    timesteps: Sequence[int],
    shared_noise: bool,
    seed: int,
    batch_size: int,
    noise: torch.Tensor | Callable | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    Reconstructs each slice from each timestep, in full batches: all slices from the first timestep, then all from the
    second one, and so on. The encoder sees each slice once, before.

    Args:
        pipeline ([`AnomalyPipeline`]): Has `unet`, `scheduler` and `encoder`, which may be `None`.
        slices (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1].
        indices (sequence of N `int`): Numbers of the slices, which their noise depends on.
        timesteps (sequence of K `int`): 0-based.
        shared_noise (`bool`): Whether all slices have the noise of slice 0.
        seed, batch_size, noise: As of the call.

    Yields:
        `tuple`: numbers of the timesteps, below K, and rows of the slices, below N, `(B,)` each; their reconstructions
        `(B, C, H, W)`, about [0, 1], not limited.
    """
    device = slices.device
    numbers, grid = torch.tensor([0] * len(indices) if shared_noise else indices), torch.tensor(timesteps)
    items = torch.cartesian_prod(torch.arange(len(timesteps)), torch.arange(len(slices)))
    batches = [batch.T for batch in items.split(batch_size) if len(batch)]
    with pipeline.progress_bar(total=len(batches)) as progress:
        codes = encode_slices(pipeline, slices, batch_size)
        for draws, rows in batches:
            fields = draw_fields(pipeline.scheduler, seed, noise, numbers[rows], draws, grid, slices)
            rows, draws, steps = (send(values, device) for values in (rows, draws, grid[draws]))

            # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n with x_0 in [-1, 1], (B, C, H, W)
            sample = pipeline.scheduler.add_noise(2.0 * slices[rows] - 1.0, fields, steps)

            # This network predicts x_0.
            prediction = pipeline.predict_noise(sample, steps, None if codes is None else codes[rows])
            progress.update()
            yield draws, rows, (prediction + 1.0) / 2.0


def encode_slices(pipeline: AnomalyPipeline, slices: torch.Tensor, batch_size: int) -> torch.Tensor | None:
    """Computes the codes `(N, E)` of slices `(N, C, H, W)` in [0, 1]; `None` without an encoder."""
    encoder = pipeline.encoder
    if encoder is None:
        return None
    parts = slices.to(encoder.dtype).split(batch_size)
    return torch.cat([pipeline.batches.evaluate(encoder, read_logits, part) for part in parts]).to(pipeline.unet.dtype)


def draw_fields(
    scheduler: AnoDDPMScheduler,
    seed: int,
    noise: torch.Tensor | Callable | None,
    numbers: torch.Tensor,
    draws: torch.Tensor,
    timesteps: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:
    """
    Draws the noise of the items of a batch; items of the same slice and timestep share a field, which is drawn once.

    Args:
        scheduler ([`AnoDDPMScheduler`]): Draws.
        seed, noise: As of the call.
        numbers, draws (`torch.Tensor` of shape `(B,)`, int64, on the CPU): Slice number and draw number of each item.
        timesteps (`torch.Tensor` of shape `(K,)`, on the CPU): Those of the draws.
        like (`torch.Tensor` of shape `(N, C, H, W)`): Slices, for size, type and device.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    # On the CPU, where no device has to be waited for.
    (numbers, draws), places = torch.stack([numbers, draws]).unique(dim=1, return_inverse=True)
    make = partial(scheduler.draw_noise, size=like.shape[1:], timesteps=timesteps[draws])
    fields = Noise(seed, noise, numbers, draws, like.device)(make, like[:1].expand(len(draws), -1, -1, -1))
    return fields[send(places, like.device)]


def difference_maps(
    slices: torch.Tensor, reconstruction: torch.Tensor, map_type: str, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes maps `(N, H, W)`, unfiltered, from slices and mean reconstructions `(N, C, H, W)`, both in [0, 1]: by
    `map_type` the mean absolute difference of the modalities, 1 - their mean structural similarity, or their mean
    Mahalanobis distance, which the single reconstructions `kept`, `(K, N, C, H, W)`, are for."""
    if map_type == "residual":
        return (slices - reconstruction).abs().mean(1)
    if map_type in MAHALANOBIS:
        return mahalanobis_distance(slices, kept, map_type).mean(1)
    similarity = torch.stack([ssim_map(slices[:, c], reconstruction[:, c]) for c in range(slices.shape[1])])
    # At most 1 but for rounding.
    return (1.0 - similarity).mean(0).clamp(min=0.0).to(slices)
