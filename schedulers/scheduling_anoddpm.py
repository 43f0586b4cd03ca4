from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..checks import check_choice, check_integer
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .noise import draw_seeds
from .process import DiffusionProcess, StepOutput, cosine_betas, linear_betas
from .simplex import OctaveSimplexNoise


BETA_SCHEDULES = ("linear", "cosine", "cosine_clipped", "linear_float32")
NOISE_TYPES = ("gaussian", "simplex")
VARIANCE_TYPES = ("fixed_large", "fixed_small")


class AnoDDPMScheduler(DiffusionProcess, SchedulerMixin, PlainConfigMixin):
    r"""
    Implements the diffusion process of AnoDDPM (Wyatt et al., CVPRW 2022, pp. 650-656) and of brain_damage: an
    ordinary DDPM chain whose noise may be multi-octave simplex noise, walked from a part of the chain only.

    Timesteps are 0-based: t = 0, ..., T - 1, x_t holds the noise of t + 1 steps. A noise level of L noises to
    t = L - 1 and walks L - 1, ..., 0.

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`: `beta_start` to `beta_end`, both times 1000 / T. `"linear_float32"`: the same with betas and
            abar in float32, in which 1 - abar has few right digits at small t, as in diffusers and in the ANDi
            authors' program. Neither of them scales: betas of theirs for another T are given times T / 1000.
            `"cosine"`: Nichol and Dhariwal's. `"cosine_clipped"`: brain_damage's, float32, within [1e-4, 0.999].
        noise_type (`str`, defaults to `"simplex"`): `"simplex"` or `"gaussian"`.
        octaves, persistence, wavelength, normalize, random_offset: As of [`OctaveSimplexNoise`].
        z (`float`, `str` or `None`, defaults to 27.0):
            As of [`OctaveSimplexNoise`]: a number (27 pixels meet no lattice plane in any of the first six octaves) or
            `None` (cDDPM) lets one sparse matrix make all fields; `"timestep"` is AnoDDPM's rule,
            `"timestep_unscaled"` brain_damage's.
        clip_sample (`bool`, defaults to `True`): Limit the x_0 estimate of `step` to [-1, 1].
        variance_type (`str`, defaults to `"fixed_large"`):
            sigma_t^2 of `step`: `"fixed_large"`, beta_t (AnoDDPM), or `"fixed_small"`, that of q(x_{t-1} | x_t, x_0)
            (the ANDi authors, in AnoDDPM and AutoDDPM alike).
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): Of the linear schedules, for T = 1000.
    """

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
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_choice("noise_type", noise_type, NOISE_TYPES)
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        betas = _betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        alphas = 1.0 - betas
        if beta_schedule == "linear_float32":
            alphas = alphas.float()
        alphas_cumprod, alphas = torch.cumprod(alphas, 0).double(), alphas.double()
        self.set_tables(
            betas,
            alphas_cumprod,
            alphas=alphas,
            step_scale=alphas.sqrt(),
            step_noise_scale=betas.sqrt(),
            model_output_weight=(1.0 - alphas) / (1.0 - alphas_cumprod).sqrt(),
        )
        # At t = 0 that of t = 1: no noise is added there, but the variational bound takes its logarithm.
        variance = betas if variance_type == "fixed_large" else self.posterior_variance
        self.variance = torch.cat([self.posterior_variance[1:2], variance[1:]])
        self._tables["sigma"] = self.variance.sqrt()
        self.simplex_noise = OctaveSimplexNoise(octaves, persistence, wavelength, z, normalize, random_offset)
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None):
        """Sets the timesteps of partial diffusion, L - 1, ..., 0, for the noise level L = `num_inference_steps`, by
        default T."""
        level = self.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        check_integer("num_inference_steps", level, 1, self.config.num_train_timesteps)
        self.num_inference_steps = level
        self.timesteps = torch.arange(level - 1, -1, -1, device=device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        variance_noise: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        clip_sample: bool | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:
        """
        Walks one reverse step of DDPM with this process's own variance and noise.

        Args:
            model_output (`torch.Tensor` of shape `(N, C, H, W)`): Predicted noise.
            timestep (`int` or `torch.Tensor`): t, 0-based, one for all or one per sample.
            sample (`torch.Tensor` of shape `(N, C, H, W)`): x_t.
            variance_noise, keys (`torch.Tensor`, *optional*):
                Noise of the step, or keys `(N, 2)` that it is drawn from.
            clip_sample (`bool`, *optional*): Instead of the configuration's (AutoDDPM clips in one of its two chains).
        """
        # Notation: sample -> x_t, model_output -> eps_theta(x_t, t), prev_sample -> x_{t-1},
        # pred_original_sample -> x_0 estimate, variance -> sigma_t^2 (DDPM section 3.2).
        timestep = torch.as_tensor(timestep, device=sample.device)

        # 1. Noise of the step. Drawn at t = 0 as well, so that the number of draws does not depend on t.
        variance_noise = self.step_noise(variance_noise, keys, timestep, sample)

        # 2. Estimate of x_0 (DDPM eq. 15).
        pred_original_sample = self.predict_original_sample(model_output, timestep, sample)
        # 3. Posterior mean (DDPM eq. 7), without limits that of x_t and eps (eq. 11), not divided by sqrt(abar_t).
        if self.config.clip_sample if clip_sample is None else clip_sample:
            pred_original_sample = pred_original_sample.clamp(-1.0, 1.0)
            mean = self.posterior_mean(pred_original_sample, timestep, sample)
        else:
            mean = self.predicted_mean(model_output, timestep, sample)

        # 4. sigma_t z for t > 0.
        sigma = self.gather("sigma", timestep, sample) * (timestep > 0).to(sample.dtype).reshape(-1, 1, 1, 1)
        prev_sample = mean + sigma * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return StepOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise_step(self, sample: torch.Tensor, noise: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """Walks one step of the forward chain, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise."""
        return (
            self.gather("step_scale", timestep, sample) * sample
            + self.gather("step_noise_scale", timestep, sample) * noise
        )

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the one-shot estimate of x_0, not limited: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        alpha = self.gather("original_scale", timestep, sample)
        sigma = self.gather("noise_scale", timestep, sample)
        return (sample - sigma * model_output) / alpha

    def predicted_mean(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the mean of p_theta(x_{t-1} | x_t), nothing limited (DDPM eq. 11):
        (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t)."""
        weight = self.gather("model_output_weight", timestep, sample)
        return (sample - weight * model_output) / self.gather("step_scale", timestep, sample)

    def draw_noise(
        self,
        keys: torch.Tensor,
        size: Sequence[int],
        timesteps: int | torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Draws one independent field per sample and channel, arguments as of [`DiffusionProcess.draw_noise`]. Only
        the rules of `z` that name the timestep use `timesteps`, and need them."""
        if self.config.noise_type == "gaussian":
            return super().draw_noise(keys, size, timesteps, dtype)
        channels, height, width = size
        if isinstance(self.config.z, str):
            timesteps = torch.as_tensor(timesteps).reshape(-1, 1).expand(len(keys), channels)
        return self.simplex_noise(draw_seeds(keys, channels), timesteps, height, width, dtype)


def _betas(schedule: str, steps: int, start: float, end: float) -> torch.Tensor:
    """Betas, `(steps,)` float64."""
    if schedule == "cosine":
        return cosine_betas(steps)
    if schedule != "cosine_clipped":
        return linear_betas(steps, start, end, torch.float64 if schedule == "linear" else torch.float32)
    check_integer("num_train_timesteps", steps, 2)
    u = torch.linspace(0, steps, steps + 1)
    alphas_cumprod = torch.cos((u / steps + 0.008) / 1.008 * torch.pi * 0.5) ** 2
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    # Only the betas are float32: 1 - abar of a float32 table has no more than three right digits at small t.
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(1e-4, 0.999).double()
