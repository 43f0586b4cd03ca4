"""What several networks ask of their arguments and inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def check_sides(name: str, sample: torch.Tensor, factor: int) -> None:
    """Raises a `ValueError` unless `factor` divides height and width of slices `(N, C, H, W)`."""
    if sample.shape[-2] % factor or sample.shape[-1] % factor:
        raise ValueError(f"`{name}` must have sides divisible by {factor}, got {tuple(sample.shape)}.")


def check_heads(name: str, value: int, channels: Iterable[int]) -> None:
    """Raises a `ValueError` unless `value`, a number of heads or the channels of one, divides the channels of every
    attention layer."""
    channels = sorted(set(channels))
    if any(width % value for width in channels):
        widths = ", ".join(map(str, channels))
        raise ValueError(f"`{name}` must divide the channels of every attention layer, {widths}, got {value}.")
