from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .noise import draw_gaussian


class DAEScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The corruption of the denoising autoencoder (Kascenas et al., MIDL 2022) as the ANDi authors ran it: coarse Gaussian noise,
    added to the foreground once. There are no timesteps; slices are in [0, 1], background 0.

    Args:
        noise_resolution (`int`, defaults to 16): Side of the noise before it is enlarged to the slice.
        noise_std (`float`, defaults to 0.2): Standard deviation before the enlargement, in the slice's range.
        shared_shift (`bool`, defaults to `True`):
            One circular shift for all noise of a batch, as in the original, that of its first slice; `False`: one for each slice.
        foreground_level (`float`, defaults to 0.01): Foreground is where the sum over modalities exceeds it.
    """

    @register_to_config
    def __init__(
        self,
        noise_resolution: int = 16,
        noise_std: float = 0.2,
        shared_shift: bool = True,
        foreground_level: float = 0.01,
    ):
        if not isinstance(noise_resolution, int) or noise_resolution < 1:
            raise ValueError(f"`noise_resolution` must be an integer of at least 1, got {noise_resolution!r}.")
        if not noise_std > 0:
            raise ValueError(f"`noise_std` must be above 0, got {noise_std}.")

    def foreground(self, images: torch.Tensor) -> torch.Tensor:
        """Where slices `(N, C, H, W)` hold anything, `(N, 1, H, W)` bool."""
        return images.sum(1, keepdim=True) > self.config.foreground_level

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Slices `(N, C, H, W)` with noise in their foreground."""
        return original_samples + noise * self.foreground(original_samples)

    def draw_noise(
        self,
        shape: tuple[int, int, int, int],
        generator: list[torch.Generator],
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """
        Coarse noise: one independent field per sample and channel, one shift per sample or batch.

        Args:
            shape (`tuple` `(N, C, H, W)`): Shape of the noise.
            generator (`list[torch.Generator]`): One per sample; field and shift are drawn from it.
        """
        count, channels, height, width = shape
        if len(generator) != count:
            raise ValueError(f"`generator` must have one entry per sample ({count}), got {len(generator)}.")
        side = self.config.noise_resolution
        draws = self.config.noise_std * draw_gaussian((channels, side, side), generator, torch.device(device), dtype)
        shifts = [
            torch.cat([torch.randint(limit, (1,), generator=g, device=g.device) for limit in (height, width)])
            for g in generator
        ]
        shifts = torch.stack(shifts).to(device)
        if self.config.shared_shift:
            shifts = shifts[:1].expand(count, -1)
        return coarse_noise(draws, shifts, (height, width))


def coarse_noise(draws: torch.Tensor, shifts: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Draws `(N, C, h, w)`, enlarged to `size` (H, W) with their corners on the slice's, then moved circularly by `shifts` `(N, 2)`
    pixels down and to the right: noise `(N, C, H, W)`."""
    noise = torch.nn.functional.interpolate(draws, size=size, mode="bilinear", align_corners=True)
    # One `roll` per sample would need the shifts on the host.
    for axis, length in enumerate(size, start=2):
        source = (torch.arange(length, device=draws.device) - shifts[:, axis - 2, None]) % length  # (N, length)
        source = source[:, None, :, None] if axis == 2 else source[:, None, None]
        noise = noise.gather(axis, source.expand_as(noise))
    return noise
