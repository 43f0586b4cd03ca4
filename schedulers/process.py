"""What the diffusion processes of all methods share: tables on their device, q(x_t | x_0), the posterior, and Gaussian draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .draws import normal


# N samples, C channels, H x W pixels, T timesteps. abar_t is the product of 1 - beta_t.


def posterior_tables(
    betas: torch.Tensor, variance: torch.Tensor, alphas: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """
    Computes the posterior q(x_{t-1} | x_t, x_0) of DDPM eq. 7, whose mean is original_weight x_0 + sample_weight x_t.

    Args:
        betas (`torch.Tensor` of shape `(T,)`): float64.
        variance (`torch.Tensor` of shape `(T,)`): 1 - abar_t, float64.
        alphas (`torch.Tensor` of shape `(T,)`, *optional*): 1 - beta_t, where the original rounds it.

    Returns:
        `dict`: `original_weight`, `sample_weight` and `posterior_variance`, `(T,)` float64; the variance of t = 0 is 0.
    """
    alphas = 1.0 - betas if alphas is None else alphas
    previous = torch.cat([torch.zeros(1, dtype=torch.float64), variance[:-1]])
    return {
        "original_weight": betas * (1.0 - previous).sqrt() / variance,
        "sample_weight": previous * alphas.sqrt() / variance,
        "posterior_variance": betas * previous / variance,
    }


def first_replaced(values: torch.Tensor) -> torch.Tensor:
    """Puts the value of t = 1 at t = 0 as well: a posterior variance is 0 there, and its logarithm is taken."""
    return torch.cat([values[1:2], values[1:]])


class DiffusionProcess:
    """
    Base of the schedulers of this library that diffuse: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

    `__init__` of a scheduler calls `set_tables`; everything it computes reads them with `gather`.
    """

    order = 1
    init_noise_sigma = 1.0

    def set_tables(
        self,
        betas: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        variance: torch.Tensor | None = None,
        alphas: torch.Tensor | None = None,
        **tables: torch.Tensor,
    ) -> None:
        """
        Makes the tables that all processes have, and keeps further ones.

        Args:
            betas, alphas_cumprod (`torch.Tensor` of shape `(T,)`): beta_t and abar_t, float64.
            variance, alphas (`torch.Tensor` of shape `(T,)`, *optional*): 1 - abar_t and 1 - beta_t, where there are more exact ones.
            tables (`torch.Tensor`): Those of the scheduler alone, float64.
        """
        self.betas, self.alphas_cumprod = betas, alphas_cumprod
        variance = 1.0 - alphas_cumprod if variance is None else variance
        posterior = posterior_tables(betas, variance, alphas)
        self.posterior_variance = posterior["posterior_variance"]
        self._tables = {"original_scale": alphas_cumprod.sqrt(), "noise_scale": variance.sqrt(), **posterior, **tables}
        self._device_tables = {}

    def gather(self, name: str, timesteps: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """
        Looks up a table, one value per sample: `(1 or N, 1, 1, 1)`, of the sample's type and on its device.

        Tables are float64. They are rounded once, when they go to a device for the first time; later look-ups stay on the device.
        """
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (name, sample.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[name].to(dtype).to(sample.device)
        timesteps = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self._device_tables[key][timesteps].to(sample.dtype).reshape(-1, 1, 1, 1)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample as it is: the networks of these processes see x_t itself."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Noises x_0 `(N, C, H, W)` to x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, a new tensor."""
        alpha = self.gather("original_scale", timesteps, original_samples)
        sigma = self.gather("noise_scale", timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def posterior_mean(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7, from x_0 and x_t `(N, C, H, W)`."""
        return (
            self.gather("original_weight", timestep, sample) * original_sample
            + self.gather("sample_weight", timestep, sample) * sample
        )

    def draw_noise(
        self,
        keys: torch.Tensor,
        size: Sequence[int],
        timesteps: int | torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """
        Draws the noise of this process, standard normal here.

        Args:
            keys (`torch.Tensor` of shape `(N, 2)`): One per sample, see [`~schedulers.draws.make_keys`].
            size (`tuple` `(C, H, W)`): Of one sample.
            timesteps (`int` or `torch.Tensor` of shape `(N,)`, *optional*): t, for noise that depends on it.
            dtype (`torch.dtype`): Of the result.

        Returns:
            `torch.Tensor` of shape `(N, C, H, W)`, on the device of the keys.
        """
        return normal(keys, size, dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
