"""What cDDPM and pDDPM share: slices that are noised once, to each of a few timesteps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler
from .base import slice_generator


def check_timesteps(timesteps: list[int] | tuple[int, ...], num_train_timesteps: int) -> None:
    """Raises a `ValueError` unless `timesteps` are different numbers from 0 to `num_train_timesteps` - 1."""
    last = num_train_timesteps - 1
    steps = list(timesteps) if isinstance(timesteps, (list, tuple)) else []
    if not steps or len(set(steps)) != len(steps) or any(type(t) is not int or not 0 <= t <= last for t in steps):
        raise ValueError(f"`timesteps` must be a list of different integers from 0 to {last}, got {timesteps!r}.")


def draw_fields(
    scheduler: AnoDDPMScheduler,
    keys: list[tuple[int, int]],
    timesteps: list[int],
    seed: int,
    like: torch.Tensor,
    shared_noise: bool,
    noise: torch.Tensor | Callable | None = None,
) -> torch.Tensor:
    """
    One field of noise for each item of a batch; items with equal keys have the same one.

    Args:
        scheduler ([`AnoDDPMScheduler`]): Draws.
        keys (`list[tuple[int, int]]`): Of each item the slice's number in its volume, and the number of the timestep, below K.
        timesteps (`list[int]`): The K timesteps.
        seed (`int`): Of the call; slice and timestep have generators of their own.
        like (`torch.Tensor` of shape `(B, C, H, W)`): The slices of the items, for shape, type and device.
        shared_noise (`bool`): All slices have the field of slice 0.
        noise (`torch.Tensor` or callable, *optional*): As of the call, `(K, N, C, H, W)` or `noise(draws, items, shape)`.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    if noise is not None:
        wanted = (len(timesteps), *like.shape[1:])
        if not callable(noise) and (noise.shape[0], *noise.shape[2:]) != wanted:
            raise ValueError(
                f"`noise` must have the shape (timesteps, N, C, H, W), for each slice {wanted}, got {tuple(noise.shape)}."
            )
        chosen = [number for _, number in keys], [index for index, _ in keys]
        return (noise(*chosen, tuple(like.shape)) if callable(noise) else noise[chosen]).to(like)
    if shared_noise:
        keys = [(0, number) for _, number in keys]
    position = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    steps = [timesteps[number] for _, number in position]
    generators = [slice_generator(seed, index, t, like.device) for (index, _), t in zip(position, steps, strict=True)]
    fields = scheduler.draw_noise(
        (len(position), *like.shape[1:]), torch.tensor(steps, device=like.device), generators, like.device
    )
    return fields[[position[key] for key in keys]]
