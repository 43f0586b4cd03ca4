"""Holds what the diffusion processes share: tables on their device, q(x_t | x_0), the posterior, and Gaussian
draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from ..checks import check_integer
from .draws import normal


# N samples, C channels, H x W pixels, T timesteps. abar_t is the product of 1 - beta_t.


@dataclass
class StepOutput(BaseOutput):
    """Holds what `step` of a scheduler gives, `(N, C, H, W)` each: the sample at the next lower timestep of the grid,
    and the estimate of x_0 that the step used."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


def linear_betas(steps: int, start: float, end: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Computes `steps` betas that rise evenly from `start` to `end`, both for T = 1000 and multiplied by 1000 / T:
    `(T,)` float64, computed in `dtype`."""
    check_integer("num_train_timesteps", steps, 2)
    if not 0 < start <= end:
        raise ValueError(f"`beta_start` must be above 0 and at most `beta_end`, got {start} and {end}.")
    scale = 1000 / steps
    if not scale * end < 1:
        raise ValueError(
            f"`num_train_timesteps` must be above {1000 * end:g}, got {steps}: betas of a linear schedule must stay below 1."
        )
    return torch.linspace(scale * start, scale * end, steps, dtype=dtype).double()


def cosine_betas(steps: int) -> torch.Tensor:
    """Computes the betas of Nichol and Dhariwal's cosine schedule, at most 0.999: `(T,)` float64."""
    check_integer("num_train_timesteps", steps, 2)
    levels = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    ratios = [1 - after / before for before, after in zip(levels, levels[1:], strict=False)]
    return torch.tensor(ratios, dtype=torch.float64).clamp(max=0.999)


def posterior_tables(
    betas: torch.Tensor, alphas_cumprod: torch.Tensor, variance: torch.Tensor, alphas: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Computes from beta_t, abar_t, 1 - abar_t and 1 - beta_t, all `(T,)` float64, the posterior q(x_{t-1} | x_t, x_0)
    of DDPM eq. 7: its mean is original_weight x_0 + sample_weight x_t. The variance of t = 0 is 0; its logarithm is
    taken to be that of t = 1, since likelihoods need one."""
    # Both of t - 1: one from the other would lose digits.
    previous_level = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    previous_variance = torch.cat([torch.zeros(1, dtype=torch.float64), variance[:-1]])
    posterior = betas * previous_variance / variance
    return {
        "original_weight": betas * previous_level.sqrt() / variance,
        "sample_weight": previous_variance * alphas.sqrt() / variance,
        "posterior_variance": posterior,
        "posterior_log_variance": torch.cat([posterior[1:2], posterior[1:]]).log(),
        "log_beta": betas.log(),
    }


class DiffusionProcess:
    """Holds what the schedulers that diffuse have in common: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. Their
    `__init__` calls `set_tables`; everything they compute reads these with `gather`."""

    def set_tables(
        self,
        betas: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        variance: torch.Tensor | None = None,
        alphas: torch.Tensor | None = None,
        **tables: torch.Tensor,
    ) -> None:
        """Makes the tables that all processes have from beta_t and abar_t, and, where there are more exact ones, from
        1 - abar_t (`variance`) and 1 - beta_t (`alphas`), and keeps further `tables`; all are `(T,)` float64."""
        self.betas, self.alphas_cumprod = betas, alphas_cumprod
        variance = 1.0 - alphas_cumprod if variance is None else variance
        posterior = posterior_tables(betas, alphas_cumprod, variance, 1.0 - betas if alphas is None else alphas)
        self.original_weight, self.sample_weight = posterior["original_weight"], posterior["sample_weight"]
        self.posterior_variance = posterior["posterior_variance"]
        self.posterior_log_variance = posterior["posterior_log_variance"]
        self._tables = {
            "original_scale": alphas_cumprod.sqrt(),
            "noise_scale": variance.sqrt(),
            "inverse_scale": (1.0 / alphas_cumprod).sqrt(),
            "inverse_noise_scale": (1.0 / alphas_cumprod - 1.0).sqrt(),
            **posterior,
            **tables,
        }
        self._device_tables = {}

    def gather(self, name: str, timesteps: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Looks up a table, one value per sample: `(1 or N, 1, 1, 1)`, of the sample's type and on its device. Tables
        are float64, and rounded once, when they go to a device for the first time; later look-ups stay there."""
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (name, sample.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[name].to(dtype).to(sample.device)
        if not isinstance(timesteps, torch.Tensor):
            timesteps = torch.full((1,), timesteps, device=sample.device)  # nothing waits for the host
        timesteps = timesteps.to(sample.device).reshape(-1)
        return self._device_tables[key][timesteps].to(sample.dtype).reshape(-1, 1, 1, 1)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Noises x_0 `(N, C, H, W)` to x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, a new tensor."""
        alpha = self.gather("original_scale", timesteps, original_samples)
        sigma = self.gather("noise_scale", timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def posterior_mean(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, tables: str = ""
    ) -> torch.Tensor:
        """Computes the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7, from x_0 and x_t `(N, C, H, W)`. `tables` is the
        prefix of the names of other tables than those of the whole chain."""
        return (
            self.gather(f"{tables}original_weight", timestep, sample) * original_sample
            + self.gather(f"{tables}sample_weight", timestep, sample) * sample
        )

    def learned_log_variance(
        self, variance_output: torch.Tensor, timestep: int | torch.Tensor, tables: str = ""
    ) -> torch.Tensor:
        """Computes log sigma_t^2 from the second half of a network's 2C outputs (Nichol and Dhariwal, eq. 15): between
        the posterior's (-1) and that of beta_t (1); outputs are not limited. `tables` as of [`posterior_mean`]."""
        fraction = (variance_output + 1.0) / 2.0
        highest = self.gather(f"{tables}log_beta", timestep, variance_output)
        lowest = self.gather(f"{tables}posterior_log_variance", timestep, variance_output)
        return fraction * highest + (1.0 - fraction) * lowest

    def step_noise(
        self,
        variance_noise: torch.Tensor | None,
        keys: torch.Tensor | None,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the noise of a reverse step of x_t `(N, C, H, W)`: what is given, or drawn from keys `(N, 2)`."""
        if (variance_noise is None) == (keys is None):
            raise ValueError("Give either `variance_noise` or `keys`, one key per sample.")
        if variance_noise is not None:
            return variance_noise
        if keys.shape != (len(sample), 2):
            raise ValueError(
                f"`keys` must have the shape ({len(sample)}, 2), one key per sample, got {tuple(keys.shape)}."
            )
        return self.draw_noise(keys, sample.shape[1:], timestep, sample.dtype)

    def draw_noise(
        self,
        keys: torch.Tensor,
        size: Sequence[int],
        timesteps: int | torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Draws the noise of this process, standard normal here: `(N, C, H, W)` for keys `(N, 2)`, one per sample (see
        [`~schedulers.draws.make_keys`]), and the size `(C, H, W)` of a sample. `timesteps`, t, one for all or one per
        sample, is for noise that depends on it."""
        return normal(keys, size, dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
