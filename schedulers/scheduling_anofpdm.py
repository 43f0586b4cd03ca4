from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .noise import draw_gaussian


@dataclass
class AnoFPDMSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of shape `(N, C, H, W)`): The sample at the next lower timestep of the grid.
        pred_original_sample (`torch.Tensor` of shape `(N, C, H, W)`): The estimate of x_0 that the step used.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class AnoFPDMScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The diffusion process of AnoFPDM (Che et al., arXiv 2404.15683) and of the DDIB and classifier-guided baselines of its authors:
    Gaussian noise, linear betas, a network that predicts the noise, and deterministic DDIM steps in both directions, with an
    estimate of x_0 that is limited to [-1, 1] and a noise that is derived from it again.

    Timesteps are 0-based: t = 0, ..., T - 1, x_0 of the grid already holds one step of noise. The grid begins at 0: 0, k, 2k, ...
    with a stride k. Below it lies the image (abar = 1), above T - 1 pure noise (abar = 0).

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_start (`float`, defaults to 1e-4), beta_end (`float`, defaults to 0.02): Of the linear betas, for T = 1000; both are
            multiplied by 1000 / T.
        clip_sample (`bool`, defaults to `True`): Limit the x_0 estimate of a step to [-1, 1].
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
    ):
        if not num_train_timesteps >= 2:
            raise ValueError(f"`num_train_timesteps` must be at least 2, got {num_train_timesteps}.")
        if not 0 < beta_start <= beta_end:
            raise ValueError(f"`beta_start` must be above 0 and at most `beta_end`, got {beta_start} and {beta_end}.")
        scale = 1000 / num_train_timesteps
        if not scale * beta_end < 1:
            raise ValueError(
                f"`num_train_timesteps` must be above {1000 * beta_end:g}, got {num_train_timesteps}: betas must stay below 1."
            )
        # All tables are float64. Notation: abar_t is the product of 1 - beta_t.
        self.betas = torch.linspace(scale * beta_start, scale * beta_end, num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, 0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        # DDPM eq. 7: the posterior q(x_{t-1} | x_t, x_0) has the mean original_weight * x_0 + sample_weight * x_t.
        self.original_weight = self.betas * previous.sqrt() / (1.0 - self.alphas_cumprod)
        self.sample_weight = (1.0 - previous) * (1.0 - self.betas).sqrt() / (1.0 - self.alphas_cumprod)
        self.posterior_variance = self.betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)
        # The posterior variance of t = 0 is 0; its logarithm is taken to be that of t = 1.
        self.posterior_log_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()
        # abar of the timesteps -1, 0, ..., T.
        levels = torch.cat([previous[:1], self.alphas_cumprod, torch.zeros(1, dtype=torch.float64)])
        self._tables = {
            "level_scale": levels.sqrt(),
            "level_noise_scale": (1.0 - levels).sqrt(),
            "original_scale": self.alphas_cumprod.sqrt(),
            "noise_scale": (1.0 - self.alphas_cumprod).sqrt(),
            "inverse_scale": (1.0 / self.alphas_cumprod).sqrt(),
            "inverse_noise_scale": (1.0 / self.alphas_cumprod - 1.0).sqrt(),
            "original_weight": self.original_weight,
            "sample_weight": self.sample_weight,
            "log_beta": self.betas.log(),
            "posterior_log_variance": self.posterior_log_variance,
        }
        self._device_tables = {}
        self.stride = 1
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: the network of this process sees x_t itself."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        stride: int = 1,
    ):
        """
        Sets the grid: the multiples of `stride` below S, highest first. `step` walks it as it is, `encode_step` from its end.

        Args:
            num_inference_steps (`int`, *optional*): The noise level S, 1 to T. Defaults to the whole chain.
            device (`torch.device`, *optional*): Where the timesteps are kept.
            stride (`int`, defaults to 1): Distance of two timesteps, 1 to S.
        """
        level = self.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        if not 1 <= level <= self.config.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must be between 1 and {self.config.num_train_timesteps}, got {num_inference_steps}."
            )
        if not 1 <= stride <= level:
            raise ValueError(f"`stride` must be between 1 and {level}, got {stride}.")
        self.stride = stride
        self.timesteps = torch.arange(0, level, stride, device=device).flip(0)
        self.num_inference_steps = len(self.timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        clip_sample: bool | None = None,
        return_dict: bool = True,
    ) -> AnoFPDMSchedulerOutput | tuple:
        """
        One reverse step of DDIM without noise (eta = 0), from t to t - k with the stride k of the grid, or to the image.

        Args:
            model_output (`torch.Tensor` of shape `(N, C, H, W)`): Predicted noise.
            timestep (`int` or `torch.Tensor`): t, 0-based, one for all or one per sample.
            sample (`torch.Tensor` of shape `(N, C, H, W)`): x_t.
            clip_sample (`bool`, *optional*):
                Instead of the configuration's. After classifier guidance the authors do not limit x_0 again.
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnoFPDMSchedulerOutput`] or a tuple.
        """
        # Notation: sample -> x_t, model_output -> eps_theta(x_t, t), prev_sample -> x_{t-k},
        # pred_original_sample -> x_0 estimate (DDIM eq. 12).
        prev_sample, pred_original_sample = self._move(model_output, timestep, sample, -self.stride, clip_sample)
        if not return_dict:
            return prev_sample, pred_original_sample
        return AnoFPDMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def encode_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        clip_sample: bool | None = None,
    ) -> torch.Tensor:
        """One step of DDIM's forward process: from x_t to x_{t+k} with the stride k of the grid; arguments as for `step`. Above T - 1
        there is noise only."""
        return self._move(model_output, timestep, sample, self.stride, clip_sample)[0]

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: int | torch.Tensor,
    ) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, (N, C, H, W)."""
        alpha = self._gather("original_scale", timesteps, original_samples)
        sigma = self._gather("noise_scale", timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def predict_original_sample(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        clip_sample: bool | None = None,
    ) -> torch.Tensor:
        """The one-shot estimate of x_0: x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps, limited to [-1, 1] if the configuration or
        `clip_sample` says so."""
        inverse_scale = self._gather("inverse_scale", timestep, sample)
        estimate = inverse_scale * sample - self._gather("inverse_noise_scale", timestep, sample) * model_output
        clip_sample = self.config.clip_sample if clip_sample is None else clip_sample
        return estimate.clamp(-1.0, 1.0) if clip_sample else estimate

    def predict_epsilon(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The noise that leads from an (estimated) x_0 to x_t: (x_t / sqrt(abar_t) - x_0) / sqrt(1 / abar_t - 1)."""
        inverse_scale = self._gather("inverse_scale", timestep, sample)
        return (inverse_scale * sample - original_sample) / self._gather("inverse_noise_scale", timestep, sample)

    def posterior_mean(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7; `posterior_log_variance` holds the logarithm of its variance for every t."""
        return (
            self._gather("original_weight", timestep, sample) * original_sample
            + self._gather("sample_weight", timestep, sample) * sample
        )

    def learned_log_variance(self, variance_output: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """
        log sigma_t^2 of a network with 2C outputs (Nichol and Dhariwal, eq. 15): between the posterior's (-1) and that of beta_t (1).

        Args:
            variance_output (`torch.Tensor` of shape `(N, C, H, W)`): The second half of the network's outputs.
            timestep (`int` or `torch.Tensor`): t, one for all or one per sample.
        """
        fraction = (variance_output + 1.0) / 2.0
        lowest = self._gather("posterior_log_variance", timestep, variance_output)
        return fraction * self._gather("log_beta", timestep, variance_output) + (1.0 - fraction) * lowest

    def draw_noise(
        self,
        shape: tuple[int, int, int, int],
        timesteps: int | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """
        Draws Gaussian noise, one draw of fixed size per sample.

        Args:
            shape (`tuple` `(N, C, H, W)`): Shape of the noise.
            timesteps (`int` or `torch.Tensor`): Not used: this noise is the same for all t.
            generator (`torch.Generator` or a list of N): One generator is drawn from N times in turn. Required.
        """
        count = shape[0]
        if generator is None:
            raise ValueError("Noise needs a `generator` (one, or a list of one per sample), got None.")
        if isinstance(generator, torch.Generator):
            generator = [generator] * count
        if len(generator) != count:
            raise ValueError(f"`generator` must have one entry per sample ({count}), got {len(generator)}.")
        return draw_gaussian(tuple(shape[1:]), generator, torch.device(device), dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _move(self, model_output, timestep, sample, offset: int, clip_sample) -> tuple[torch.Tensor, torch.Tensor]:
        # 1. Estimate of x_0 (DDPM eq. 15), limited.
        pred_original_sample = self.predict_original_sample(model_output, timestep, sample, clip_sample)
        # 2. The noise that fits it: where x_0 was limited it is not the network's.
        epsilon = self.predict_epsilon(pred_original_sample, timestep, sample)
        # 3. Both mixed anew at the other timestep (DDIM eq. 12 with sigma = 0). The tables of levels begin at t = -1.
        level = torch.as_tensor(timestep, device=sample.device) + offset
        level = level.clamp(-1, self.config.num_train_timesteps) + 1
        moved = (
            self._gather("level_scale", level, sample) * pred_original_sample
            + self._gather("level_noise_scale", level, sample) * epsilon
        )
        return moved, pred_original_sample

    def _gather(self, name: str, timesteps: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        # One table value per sample, (1 or N, 1, 1, 1). Tables are float64, rounded once when they go to a device for the
        # first time; later look-ups stay on the device.
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (name, sample.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[name].to(dtype).to(sample.device)
        timesteps = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self._device_tables[key][timesteps].to(sample.dtype).reshape(-1, 1, 1, 1)
