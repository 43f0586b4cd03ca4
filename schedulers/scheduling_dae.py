from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..checks import check_integer, check_number
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .draws import fold_in, integers, normal


FIELD, SHIFT = 0, 1  # draws of one sample


class DAEScheduler(SchedulerMixin, PlainConfigMixin):
    r"""
    Implements the corruption of the denoising autoencoder (Kascenas et al., MIDL 2022) as the ANDi authors ran it:
    coarse Gaussian noise, added to the foreground once. There are no timesteps; slices are in [0, 1], background 0.

    Args:
        noise_resolution (`int`, defaults to 16): Side of the noise before it is enlarged to the slice.
        noise_std (`float`, defaults to 0.2): Standard deviation before the enlargement, in the slice's range.
        shared_shift (`bool`, defaults to `True`):
            One circular shift for all noise of a batch, as in the original, that of its first slice, or one for each.
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
        check_integer("noise_resolution", noise_resolution, 1)
        check_number("noise_std", noise_std, above=0)

    def foreground(self, images: torch.Tensor) -> torch.Tensor:
        """Finds where slices `(N, C, H, W)` hold anything, `(N, 1, H, W)` bool."""
        return images.sum(1, keepdim=True) > self.config.foreground_level

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Adds noise to slices `(N, C, H, W)` in their foreground."""
        return original_samples + noise * self.foreground(original_samples)

    def draw_noise(self, keys: torch.Tensor, size: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Draws coarse noise `(N, C, H, W)` for keys `(N, 2)` and the size `(C, H, W)` of a sample: one independent
        field per sample and channel, one shift per sample or batch."""
        channels, height, width = size
        side = self.config.noise_resolution
        fields = self.config.noise_std * normal(fold_in(keys, FIELD), (channels, side, side), dtype)
        shift_keys = fold_in(keys[:1] if self.config.shared_shift else keys, SHIFT)
        shifts = torch.stack(
            [integers(fold_in(shift_keys, axis), length) for axis, length in enumerate((height, width))], 1
        )
        return coarse_noise(fields, shifts.expand(len(keys), 2), (height, width))


def coarse_noise(draws: torch.Tensor, shifts: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Enlarges draws `(N, C, h, w)` to `size` (H, W) with their corners on the slice's, then moved circularly by
    `shifts` `(N, 2)` pixels down and to the right: noise `(N, C, H, W)`."""
    noise = torch.nn.functional.interpolate(draws, size=size, mode="bilinear", align_corners=True)
    # One `roll` per sample would need the shifts on the host.
    for axis, length in enumerate(size, start=2):
        source = (torch.arange(length, device=draws.device) - shifts[:, axis - 2, None]) % length  # (N, length)
        source = source[:, None, :, None] if axis == 2 else source[:, None, None]
        noise = noise.gather(axis, source.expand_as(noise))
    return noise
