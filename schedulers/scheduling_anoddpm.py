from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .noise import draw_gaussian, draw_seeds
from .simplex import OctaveSimplexNoise


BETA_SCHEDULES = ("linear", "cosine", "cosine_clipped", "linear_float32")
NOISE_TYPES = ("gaussian", "simplex")
VARIANCE_TYPES = ("fixed_large", "fixed_small")


@dataclass
class AnoDDPMSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of shape `(N, C, H, W)`): x_{t-1}.
        pred_original_sample (`torch.Tensor` of shape `(N, C, H, W)`): The estimate of x_0 that the step used.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class AnoDDPMScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The diffusion process of AnoDDPM (Wyatt et al., CVPRW 2022, pp. 650-656) and of brain_damage: an ordinary
    DDPM chain whose noise may be multi-octave simplex noise, walked from a part of the chain only.

    Timesteps are 0-based: t = 0, ..., T - 1, x_t holds the noise of t + 1 steps. A noise level of L noises to t = L - 1 and
    walks L - 1, ..., 0.

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`: `beta_start` to `beta_end`, both times 1000 / T. `"linear_float32"`: the same with betas and abar in float32,
            as in the ANDi authors' program (and diffusers): 1 - abar has few right digits at small t. `"cosine"`: Nichol and Dhariwal, betas at most 0.999.
            `"cosine_clipped"`: brain_damage's, in float32, betas limited to [1e-4, 0.999].
        noise_type (`str`, defaults to `"simplex"`): `"simplex"` or `"gaussian"`.
        octaves (`int`, defaults to 6), persistence (`float`, defaults to 0.8), wavelength (`float`, defaults to 64.0):
            Octave i has the amplitude persistence^i and the wavelength wavelength / 2^i in pixels.
        z (`float`, `str` or `None`, defaults to 27.0):
            Third coordinate of the noise. A number (in pixels; 27 meets no lattice plane in any of the first six octaves) lets one
            sparse matrix make all fields; `"timestep"` is AnoDDPM's rule, `"timestep_unscaled"` brain_damage's. `None` is the function
            of two coordinates (cDDPM), as fast as a number.
        normalize (`str`, defaults to `"none"`):
            `"none"` (AnoDDPM: standard deviation about 0.5), `"per_image"` (brain_damage: mean 0, standard deviation 1), `"analytic"`.
        random_offset (`bool`, defaults to `False`): Shift every field by a random offset, which makes the noise stationary.
        clip_sample (`bool`, defaults to `True`): Limit the x_0 estimate of `step` to [-1, 1].
        variance_type (`str`, defaults to `"fixed_large"`):
            sigma_t^2 of `step`: `"fixed_large"`, beta_t (AnoDDPM), or `"fixed_small"`, the variance of q(x_{t-1} | x_t, x_0) (the
            ANDi authors, in AnoDDPM and AutoDDPM alike).
        beta_start (`float`, defaults to 1e-4), beta_end (`float`, defaults to 0.02): Of the linear schedules, for T = 1000.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        noise_type: str = "simplex",
        octaves: int = 6,
        persistence: float = 0.8,
        wavelength: float = 64.0,
        z: float | str | None = 27.0,
        normalize: str = "none",
        random_offset: bool = False,
        clip_sample: bool = True,
        variance_type: str = "fixed_large",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ):
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"`noise_type` must be one of {', '.join(NOISE_TYPES)}, got {noise_type!r}.")
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"`variance_type` must be one of {', '.join(VARIANCE_TYPES)}, got {variance_type!r}.")
        if not 0 < beta_start <= beta_end:
            raise ValueError(f"`beta_start` must be above 0 and at most `beta_end`, got {beta_start} and {beta_end}.")
        if not num_train_timesteps >= 2:
            raise ValueError(f"`num_train_timesteps` must be at least 2, got {num_train_timesteps}.")
        self.betas = _betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if not self.betas.max() < 1:
            raise ValueError(
                f"`num_train_timesteps` must be above {1000 * beta_end:g} for the schedule {beta_schedule!r}, whose betas reach"
                f" {self.betas.max():g} with {num_train_timesteps}; they must stay below 1."
            )
        alphas = 1.0 - self.betas
        if beta_schedule == "linear_float32":
            alphas = alphas.float()
        self.alphas_cumprod, alphas = torch.cumprod(alphas, 0).double(), alphas.double()
        previous = torch.cat([torch.ones(1, dtype=self.betas.dtype), self.alphas_cumprod[:-1]])
        # DDPM eq. 7: the posterior q(x_{t-1} | x_t, x_0) has the mean original_weight * x_0 + sample_weight * x_t.
        self.original_weight = self.betas * previous.sqrt() / (1.0 - self.alphas_cumprod)
        self.sample_weight = (1.0 - previous) * alphas.sqrt() / (1.0 - self.alphas_cumprod)
        self.posterior_variance = self.betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)
        # The posterior variance of t = 1 at t = 0 as well: no noise is added there, but the variational bound takes its logarithm.
        variance = self.betas if variance_type == "fixed_large" else self.posterior_variance
        self.variance = torch.cat([self.posterior_variance[1:2], variance[1:]])
        self._tables = {
            "original_scale": self.alphas_cumprod.sqrt(),
            "noise_scale": (1.0 - self.alphas_cumprod).sqrt(),
            "step_scale": alphas.sqrt(),
            "step_noise_scale": self.betas.sqrt(),
            "original_weight": self.original_weight,
            "sample_weight": self.sample_weight,
            "model_output_weight": (1.0 - alphas) / (1.0 - self.alphas_cumprod).sqrt(),
            "sigma": self.variance.sqrt(),
        }
        self._device_tables = {}
        self.simplex_noise = OctaveSimplexNoise(
            octaves=octaves,
            persistence=persistence,
            wavelength=wavelength,
            z=z,
            normalize=normalize,
            random_offset=random_offset,
        )
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: the network of this process sees x_t itself."""
        return sample

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None):
        """
        Sets the timesteps of partial diffusion: L - 1, ..., 0.

        Args:
            num_inference_steps (`int`, *optional*): The noise level L, 1 to T. Defaults to the whole chain.
            device (`torch.device`, *optional*): Where the timesteps are kept.
        """
        level = self.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        if not 1 <= level <= self.config.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must be between 1 and {self.config.num_train_timesteps}, got {num_inference_steps}."
            )
        self.num_inference_steps = level
        self.timesteps = torch.arange(level - 1, -1, -1, device=device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        variance_noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        clip_sample: bool | None = None,
        return_dict: bool = True,
    ) -> AnoDDPMSchedulerOutput | tuple:
        """
        One reverse step of DDPM with this process's own variance and noise.

        Args:
            model_output (`torch.Tensor` of shape `(N, C, H, W)`): Predicted noise.
            timestep (`int` or `torch.Tensor`): t, 0-based, one for all or one per sample.
            sample (`torch.Tensor` of shape `(N, C, H, W)`): x_t.
            variance_noise (`torch.Tensor`, *optional*): Noise of the step, instead of a generator.
            generator (`torch.Generator` or a list of one per sample, *optional*): Where the noise is drawn from.
            clip_sample (`bool`, *optional*): Instead of the configuration's (AutoDDPM clips in one of its two chains only).
            return_dict (`bool`, defaults to `True`): Whether to return an [`AnoDDPMSchedulerOutput`] or a tuple.
        """
        # Notation: sample -> x_t, model_output -> eps_theta(x_t, t), prev_sample -> x_{t-1},
        # pred_original_sample -> x_0 estimate, variance -> sigma_t^2 (DDPM section 3.2).
        timestep = torch.as_tensor(timestep, device=sample.device)

        # 1. Noise of the step. Drawn at t = 0 as well, so that the number of draws does not depend on t.
        if variance_noise is None:
            variance_noise = self.draw_noise(sample.shape, timestep, generator, sample.device, sample.dtype)
        elif generator is not None:
            raise ValueError("Give either `variance_noise` or `generator`, not both.")

        # 2. Estimate of x_0 (DDPM eq. 15).
        pred_original_sample = self.predict_original_sample(model_output, timestep, sample)
        # 3. Posterior mean (DDPM eq. 7); without limits it is one of x_t and eps (eq. 11), which does not divide by sqrt(abar_t).
        if self.config.clip_sample if clip_sample is None else clip_sample:
            pred_original_sample = pred_original_sample.clamp(-1.0, 1.0)
            mean = self.posterior_mean(pred_original_sample, timestep, sample)
        else:
            mean = self.predicted_mean(model_output, timestep, sample)

        # 4. sigma_t z for t > 0.
        sigma = self._gather("sigma", timestep, sample) * (timestep > 0).to(sample.dtype).reshape(-1, 1, 1, 1)
        prev_sample = mean + sigma * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return AnoDDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: int | torch.Tensor,
    ) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, (N, C, H, W); `draw_noise` makes this process's own noise."""
        alpha = self._gather("original_scale", timesteps, original_samples)
        sigma = self._gather("noise_scale", timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def add_noise_step(self, sample: torch.Tensor, noise: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """One step of the forward chain, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise (AnoDDPM's variant "whole")."""
        return (
            self._gather("step_scale", timestep, sample) * sample
            + self._gather("step_noise_scale", timestep, sample) * noise
        )

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The one-shot estimate of x_0, not limited: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        alpha = self._gather("original_scale", timestep, sample)
        sigma = self._gather("noise_scale", timestep, sample)
        return (sample - sigma * model_output) / alpha

    def posterior_mean(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        return (
            self._gather("original_weight", timestep, sample) * original_sample
            + self._gather("sample_weight", timestep, sample) * sample
        )

    def predicted_mean(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Mean of p_theta(x_{t-1} | x_t), nothing limited: (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t), DDPM eq. 11."""
        weight = self._gather("model_output_weight", timestep, sample)
        return (sample - weight * model_output) / self._gather("step_scale", timestep, sample)

    def draw_noise(
        self,
        shape: tuple[int, int, int, int],
        timesteps: int | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """
        Draws this process's kind of noise: one independent field per sample and channel.

        Args:
            shape (`tuple` `(N, C, H, W)`): Shape of the noise.
            timesteps (`int` or `torch.Tensor`): t of all samples or of each; only the `z` rules that name it use it.
            generator (`torch.Generator` or a list of N): One generator is drawn from N times in turn. Required.
        """
        count, channels, height, width = shape
        if generator is None:
            raise ValueError("Noise needs a `generator` (one, or a list of one per sample), got None.")
        if isinstance(generator, torch.Generator):
            generator = [generator] * count
        if len(generator) != count:
            raise ValueError(f"`generator` must have one entry per sample ({count}), got {len(generator)}.")
        if self.config.noise_type == "gaussian":
            return draw_gaussian((channels, height, width), generator, torch.device(device), dtype)
        seeds = draw_seeds(channels, generator, torch.device(device))
        if isinstance(self.config.z, str):
            timesteps = torch.as_tensor(timesteps, device=device).reshape(-1, 1).expand(count, channels)
        else:
            timesteps = None
        return self.simplex_noise(seeds, timesteps, height, width, dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _gather(self, name: str, timesteps: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        # One table value per sample, (1 or N, 1, 1, 1). Tables are float64, rounded once when they go to a device for the
        # first time; later look-ups stay on the device.
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (name, sample.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[name].to(dtype).to(sample.device)
        timesteps = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self._device_tables[key][timesteps].to(sample.dtype).reshape(-1, 1, 1, 1)


def _betas(schedule: str, steps: int, start: float, end: float) -> torch.Tensor:
    """Betas, `(steps,)` float64."""
    if schedule in ("linear", "linear_float32"):
        scale = 1000 / steps
        dtype = torch.float64 if schedule == "linear" else torch.float32
        return torch.linspace(scale * start, scale * end, steps, dtype=dtype).double()
    if schedule == "cosine":

        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
        return torch.tensor(betas, dtype=torch.float64)
    if schedule == "cosine_clipped":
        u = torch.linspace(0, steps, steps + 1)
        alphas_cumprod = torch.cos((u / steps + 0.008) / 1.008 * torch.pi * 0.5) ** 2
        alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
        # Only the betas are float32: 1 - abar of a float32 table has no more than three right digits at small t.
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(1e-4, 0.999).double()
    raise ValueError(f"`beta_schedule` must be one of {', '.join(BETA_SCHEDULES)}, got {schedule!r}.")
