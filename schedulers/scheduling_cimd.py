from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .noise import draw_gaussian


BETA_SCHEDULES = ("linear", "cosine")
SAMPLERS = ("ddpm", "ddim")


@dataclass
class CIMDSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of shape `(N, C, H, W)`): The sample at the next lower timestep of the grid.
        pred_original_sample (`torch.Tensor` of shape `(N, C, H, W)`): The estimate of x_0 that the step used.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class CIMDScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The diffusion process of CIMD (Rahman et al., CVPR 2023, arXiv 2304.04745): Gaussian noise on masks, linear betas, a network that
    predicts the noise and, in as many further channels, where the variance of the reverse step lies between its two bounds
    (Nichol and Dhariwal 2021, eq. 15). Image channels are no concern of the scheduler: `sample` is the mask alone.

    Timesteps are 0-based: t = 0, ..., T - 1, x_t holds the noise of t + 1 steps. The grid of K steps is `round(i (T - 1) / (K - 1))`,
    from T - 1 down to 0, with the products accumulated in floating point as in the original: for 278 of the 999 numbers of steps that
    differs from `linspace` by one. Betas and variances of a step are those of the jump to the next timestep of the grid; the lowest one
    leads to x_0, without noise. Where the lower bound of the variance is 0, at the lowest timestep, it is that of the second lowest: a
    likelihood takes its logarithm.

    It is diffusers' `DDPMScheduler` with `variance_type="learned_range"`, but for float64 tables (float32 ones move a chain of 1000
    steps by up to 1.3e-3), that grid, and the variance of t = 0, which is there exp(-46) instead of exp(-9.8).

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`: `beta_start` to `beta_end`, both times 1000 / T. `"cosine"`: Nichol and Dhariwal, betas at most 0.999.
        beta_start (`float`, defaults to 1e-4), beta_end (`float`, defaults to 0.02): Of the linear schedule, for T = 1000.
        clip_range (`tuple[float, float]`, *optional*, defaults to `(-1.0, 1.0)`):
            Range that the x_0 estimate of a step is limited to, `None` for none. Masks lie in [0, 1]; the original limits to [-1, 1].
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_range: tuple[float, float] | None = (-1.0, 1.0),
    ):
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"`beta_schedule` must be one of {', '.join(BETA_SCHEDULES)}, got {beta_schedule!r}.")
        if not num_train_timesteps >= 2:
            raise ValueError(f"`num_train_timesteps` must be at least 2, got {num_train_timesteps}.")
        if not 0 < beta_start <= beta_end:
            raise ValueError(f"`beta_start` must be above 0 and at most `beta_end`, got {beta_start} and {beta_end}.")
        if clip_range is not None and not (len(clip_range) == 2 and clip_range[0] < clip_range[1]):
            raise ValueError(f"`clip_range` must be (low, high) with low < high, or None, got {clip_range!r}.")
        if beta_schedule == "linear":
            scale = 1000 / num_train_timesteps
            if not scale * beta_end < 1:
                raise ValueError(
                    f"`num_train_timesteps` must be above {1000 * beta_end:g} for the schedule 'linear', got {num_train_timesteps}:"
                    " betas must stay below 1."
                )
            betas = torch.linspace(scale * beta_start, scale * beta_end, num_train_timesteps, dtype=torch.float64)
        else:
            levels = [
                math.cos((step / num_train_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
                for step in range(num_train_timesteps + 1)
            ]
            ratios = [1 - after / before for before, after in zip(levels, levels[1:], strict=False)]
            betas = torch.tensor(ratios, dtype=torch.float64).clamp(max=0.999)
        # All tables are float64. Notation: abar_t is the product of 1 - beta_t.
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1.0 - betas, 0)
        self._tables = {
            "original_scale": self.alphas_cumprod.sqrt(),
            "noise_scale": (1.0 - self.alphas_cumprod).sqrt(),
            "inverse_scale": (1.0 / self.alphas_cumprod).sqrt(),
            "inverse_noise_scale": (1.0 / self.alphas_cumprod - 1.0).sqrt(),
            **_step_tables(betas, self.alphas_cumprod),
        }
        self._device_tables = {}
        self.init_noise_sigma = 1.0
        self.set_timesteps()

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: the network of this process sees x_t itself."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[int] | None = None,
    ):
        """
        Sets the grid that `step` walks, and its tables. Training does not depend on it.

        Args:
            num_inference_steps (`int`, *optional*): Steps K, 2 to T. Defaults to the whole chain.
            device (`torch.device`, *optional*): Where the timesteps are kept.
            timesteps (`Sequence[int]`, *optional*): The grid itself, falling, instead of `num_inference_steps`.
        """
        steps = self.config.num_train_timesteps
        if timesteps is not None and num_inference_steps is not None:
            raise ValueError("Give either `num_inference_steps` or `timesteps`, not both.")
        if timesteps is None:
            count = steps if num_inference_steps is None else num_inference_steps
            if not 2 <= count <= steps:
                raise ValueError(f"`num_inference_steps` must be between 2 and {steps}, got {num_inference_steps}.")
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
        # Looked up by the timestep of the chain; NaN where the grid has none, so that a wrong timestep cannot pass for a right one.
        self.step_tables = _step_tables(betas, levels)
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        sampler: str = "ddpm",
        return_dict: bool = True,
    ) -> CIMDSchedulerOutput | tuple:
        """
        One reverse step, from t to the next lower timestep of the grid, or from the lowest one to x_0.

        Args:
            model_output (`torch.Tensor` of shape `(N, 2C, H, W)`): Predicted noise, and what the variance is made of.
            timestep (`int` or `torch.Tensor`): t, of the grid (NaN otherwise), one for all or one per sample.
            sample (`torch.Tensor` of shape `(N, C, H, W)`): x_t, the mask without the image.
            variance_noise (`torch.Tensor`, *optional*): Noise of the step, instead of a generator.
            generator (`torch.Generator` or a list of one per sample, *optional*): Where the noise is drawn from.
            sampler (`str`, defaults to `"ddpm"`):
                `"ddpm"`, with the learned variance, or `"ddim"`, which adds no noise (eta = 0) and takes none.
            return_dict (`bool`, defaults to `True`): Whether to return a [`CIMDSchedulerOutput`] or a tuple.
        """
        # Notation: sample -> x_t, model_output -> eps_theta(x_t, t) and v, prev_sample -> x_{t-1}, pred_original_sample -> x_0 estimate.
        if sampler not in SAMPLERS:
            raise ValueError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
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
            inverse_scale = self._gather("inverse_scale", timestep, sample)
            epsilon = inverse_scale * sample - pred_original_sample
            epsilon = epsilon / self._gather("inverse_noise_scale", timestep, sample)
            prev_sample = (
                self._gather("grid_previous_scale", timestep, sample) * pred_original_sample
                + self._gather("grid_previous_noise_scale", timestep, sample) * epsilon
            )
        else:
            # 2. Noise of the step. Drawn at the lowest timestep as well, so that the number of draws does not depend on t.
            if variance_noise is None:
                variance_noise = self.draw_noise(sample.shape, timestep, generator, sample.device, sample.dtype)
            elif generator is not None:
                raise ValueError("Give either `variance_noise` or `generator`, not both.")
            # 3. Mean of the posterior of the jump (DDPM eq. 7), and sigma_t z above the lowest timestep.
            mean = self._posterior_mean("grid_", pred_original_sample, timestep, sample)
            sigma = (0.5 * self._log_variance("grid_", variance_output, timestep)).exp()
            prev_sample = mean + self._gather("grid_noisy", timestep, sample) * sigma * variance_noise
        if not return_dict:
            return prev_sample, pred_original_sample
        return CIMDSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: int | torch.Tensor,
    ) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, (N, C, H, W), a new tensor."""
        alpha = self._gather("original_scale", timesteps, original_samples)
        sigma = self._gather("noise_scale", timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The one-shot estimate of x_0 from predicted noise `(N, C, H, W)`, not limited: x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps."""
        inverse_scale = self._gather("inverse_scale", timestep, sample)
        return inverse_scale * sample - self._gather("inverse_noise_scale", timestep, sample) * model_output

    def posterior_mean(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) of the whole chain, DDPM eq. 7."""
        return self._posterior_mean("", original_sample, timestep, sample)

    def learned_log_variance(self, variance_output: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """
        log sigma_t^2 of the whole chain: between that of the posterior (-1) and log beta_t (1); the values are not limited.

        Args:
            variance_output (`torch.Tensor` of shape `(N, C, H, W)`): The second half of the network's outputs.
            timestep (`int` or `torch.Tensor`): t, one for all or one per sample.
        """
        return self._log_variance("", variance_output, timestep)

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

    def _posterior_mean(self, process: str, original_sample, timestep, sample) -> torch.Tensor:
        # `process`: "" for the chain, "grid_" for the grid.
        return (
            self._gather(f"{process}original_weight", timestep, sample) * original_sample
            + self._gather(f"{process}sample_weight", timestep, sample) * sample
        )

    def _log_variance(self, process: str, variance_output, timestep) -> torch.Tensor:
        fraction = (variance_output + 1.0) / 2.0
        highest = self._gather(f"{process}log_beta", timestep, variance_output)
        lowest = self._gather(f"{process}posterior_log_variance", timestep, variance_output)
        return fraction * highest + (1.0 - fraction) * lowest

    def _gather(self, name: str, timesteps: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        # One table value per sample, (1 or N, 1, 1, 1). Tables are float64, rounded once when they go to a device for the
        # first time; later look-ups stay on the device.
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (name, sample.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[name].to(dtype).to(sample.device)
        timesteps = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self._device_tables[key][timesteps].to(sample.dtype).reshape(-1, 1, 1, 1)


def _step_tables(betas: torch.Tensor, levels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the steps of a process need, from its betas and abar by rising timestep, `(K,)` float64 each."""
    previous = torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
    posterior_variance = betas * (1.0 - previous) / (1.0 - levels)
    return {
        "beta": betas,
        "log_beta": betas.log(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        # DDPM eq. 7: the posterior q(x_{t-1} | x_t, x_0) has the mean original_weight * x_0 + sample_weight * x_t.
        "original_weight": betas * previous.sqrt() / (1.0 - levels),
        "sample_weight": (1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - levels),
        "previous_scale": previous.sqrt(),
        "previous_noise_scale": (1.0 - previous).sqrt(),
        "noisy": (torch.arange(len(levels)) > 0).double(),
    }
