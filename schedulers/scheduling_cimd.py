from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..checks import check_choice, check_integer
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .process import DiffusionProcess, StepOutput, cosine_betas, linear_betas, posterior_tables


BETA_SCHEDULES = ("linear", "cosine")
SAMPLERS = ("ddpm", "ddim")


class CIMDScheduler(DiffusionProcess, SchedulerMixin, PlainConfigMixin):
    r"""
    Implements the diffusion process of CIMD (Rahman et al., CVPR 2023, arXiv 2304.04745): Gaussian noise on masks,
    linear betas, a network that predicts the noise and, in as many further channels, where the variance of the reverse
    step lies between its two bounds (Nichol and Dhariwal 2021, eq. 15). Image channels are no concern of the
    scheduler: `sample` is the mask alone.

    Timesteps are 0-based: t = 0, ..., T - 1, x_t holds the noise of t + 1 steps. The grid of K steps is
    `round(i (T - 1) / (K - 1))`, from T - 1 down to 0, with the products accumulated in floating point as in the
    original: for 278 of the 999 numbers of steps that differs from `linspace` by one. Betas and variances of a step
    are those of the jump to the next timestep of the grid; the lowest one leads to x_0, without noise. Where the lower
    bound of the variance is 0, at the lowest timestep, it is that of the second lowest: a likelihood takes its
    logarithm.

    It is diffusers' `DDPMScheduler` with `variance_type="learned_range"`, but for float64 tables (float32 ones move a
    chain of 1000 steps by up to 1.3e-3), that grid, and the variance of t = 0, there exp(-46) instead of exp(-9.8).

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`: from `beta_start` to `beta_end`, both times 1000 / T. `"cosine"`: Nichol and Dhariwal's.
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): Of the linear schedule, for T = 1000.
        clip_range (`tuple[float, float]`, *optional*, defaults to `(-1.0, 1.0)`):
            Range that the x_0 estimate of a step is limited to. Masks lie in [0, 1]; the original limits to [-1, 1].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_range: tuple[float, float] | None = (-1.0, 1.0),
    ):
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        if clip_range is not None and not (len(clip_range) == 2 and clip_range[0] < clip_range[1]):
            raise ValueError(f"`clip_range` must be (low, high) with low < high, or None, got {clip_range!r}.")
        if beta_schedule == "linear":
            betas = linear_betas(num_train_timesteps, beta_start, beta_end)
        else:
            betas = cosine_betas(num_train_timesteps)
        self.set_tables(betas, torch.cumprod(1.0 - betas, 0))
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[int] | None = None,
    ):
        """Sets the grid that `step` walks, and its tables: that of K = `num_inference_steps`, 2 to T, by default the
        whole chain, or the falling `timesteps` themselves. Training does not depend on it."""
        steps = self.config.num_train_timesteps
        if timesteps is not None and num_inference_steps is not None:
            raise ValueError("Give either `num_inference_steps` or `timesteps`, not both.")
        if timesteps is None:
            count = steps if num_inference_steps is None else num_inference_steps
            check_integer("num_inference_steps", count, 2, steps)
            stride, position, rising = (steps - 1) / (count - 1), 0.0, []
            for _ in range(count):
                rising.append(round(position))
                position += stride
        else:
            rising = [int(t) for t in reversed(timesteps)]
            falls = all(low < high for low, high in zip(rising, rising[1:], strict=False))
            if len(rising) < 2 or not falls or rising[0] < 0 or rising[-1] >= steps:
                raise ValueError(
                    f"`timesteps` must be at least two falling numbers between 0 and {steps - 1}, got {list(timesteps)}."
                )
        grid = torch.tensor(rising)
        levels = self.alphas_cumprod[grid]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
        betas = self.betas if len(grid) == steps else 1.0 - levels / previous
        # Looked up by the timestep of the chain; NaN where the grid has none, so that a wrong timestep cannot pass for
        # a right one.
        self.step_tables = {
            "beta": betas,
            **posterior_tables(betas, levels, 1.0 - levels, 1.0 - betas),
            "previous_scale": previous.sqrt(),
            "previous_noise_scale": (1.0 - previous).sqrt(),
            "noisy": (torch.arange(len(levels)) > 0).double(),
        }
        for name, table in self.step_tables.items():
            self._tables[f"grid_{name}"] = torch.full((steps,), math.nan, dtype=torch.float64).index_put(
                (grid,), table
            )
        self._device_tables = {key: table for key, table in self._device_tables.items() if key[0][:5] != "grid_"}
        self.timesteps = grid.flip(0).to(device)
        self.num_inference_steps = len(grid)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        variance_noise: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        sampler: str = "ddpm",
        return_dict: bool = True,
    ) -> StepOutput | tuple:
        """
        Walks one reverse step, from t to the next lower timestep of the grid, or from the lowest one to x_0.

        Args:
            model_output (`torch.Tensor` of shape `(N, 2C, H, W)`): Predicted noise, and what the variance is made of.
            timestep (`int` or `torch.Tensor`): t, of the grid (NaN otherwise), one for all or one per sample.
            sample (`torch.Tensor` of shape `(N, C, H, W)`): x_t, the mask without the image.
            variance_noise, keys (`torch.Tensor`, *optional*):
                Noise of the step, or keys `(N, 2)` that it is drawn from.
            sampler (`str`): `"ddpm"`, with the learned variance, or `"ddim"`, which takes and adds no noise (eta = 0).
        """
        # Notation: sample -> x_t, model_output -> eps_theta(x_t, t) and v, prev_sample -> x_{t-1},
        # pred_original_sample -> x_0 estimate.
        check_choice("sampler", sampler, SAMPLERS)
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"`model_output` must have twice as many channels as `sample`, noise and variance: {2 * sample.shape[1]}, got"
                f" {model_output.shape[1]}."
            )
        epsilon, variance_output = model_output.chunk(2, dim=1)

        # 1. Estimate of x_0 (DDPM eq. 15), limited.
        pred_original_sample = self.predict_original_sample(epsilon, timestep, sample)
        if self.config.clip_range is not None:
            pred_original_sample = pred_original_sample.clamp(*self.config.clip_range)

        if sampler == "ddim":
            # 2. The noise that fits the limited estimate, and both mixed anew (DDIM eq. 12 with sigma = 0).
            inverse_scale = self.gather("inverse_scale", timestep, sample)
            epsilon = inverse_scale * sample - pred_original_sample
            epsilon = epsilon / self.gather("inverse_noise_scale", timestep, sample)
            prev_sample = (
                self.gather("grid_previous_scale", timestep, sample) * pred_original_sample
                + self.gather("grid_previous_noise_scale", timestep, sample) * epsilon
            )
        else:
            # 2. Noise of the step. Drawn at the lowest timestep too: the number of draws does not depend on t.
            variance_noise = self.step_noise(variance_noise, keys, timestep, sample)
            # 3. Mean of the posterior of the jump (DDPM eq. 7), and sigma_t z above the lowest timestep.
            mean = self.posterior_mean(pred_original_sample, timestep, sample, "grid_")
            sigma = (0.5 * self.learned_log_variance(variance_output, timestep, "grid_")).exp()
            prev_sample = mean + self.gather("grid_noisy", timestep, sample) * sigma * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return StepOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the one-shot estimate of x_0 from predicted noise `(N, C, H, W)`, not limited:
        x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps."""
        inverse_scale = self.gather("inverse_scale", timestep, sample)
        return inverse_scale * sample - self.gather("inverse_noise_scale", timestep, sample) * model_output
