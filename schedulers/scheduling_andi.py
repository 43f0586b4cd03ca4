from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..checks import check_choice, check_integer, check_number
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .noise import draw_pyramid
from .process import DiffusionProcess


BETA_SCHEDULES = ("linear", "shifted_cosine")
NOISE_TYPES = ("pyramid", "gaussian")
NORMALIZATIONS = ("per_batch", "per_image")
PREDICTION_TYPES = ("epsilon", "v_prediction")


class ANDiScheduler(DiffusionProcess, SchedulerMixin, PlainConfigMixin):
    r"""
    Implements the diffusion process of ANDi (Frotscher et al., arXiv 2312.01904) and of its single-modality successor
    in UAD-IMAG (arXiv 2512.01534). It is never walked: a slice is noised once for each timestep, and the mean of the
    reverse transition that the network predicts is compared with the true one. So there is no `step`.

    Timesteps are 0-based: t = 0, ..., T - 1. The reverse transition leads from t to t - 1: ANDi evaluates t >= 1 only.

    UAD-IMAG: `num_train_timesteps=1001, beta_schedule="shifted_cosine", discount=0.9, prediction_type="v_prediction",
    clip_sample=True`; its time in [0, 1] is t / (T - 1).

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`: from `beta_start` to `beta_end`, in float32 as the original. `"shifted_cosine"`: the logarithm
            of the signal-to-noise ratio is -2 log tan of an angle even in t, plus 2 log `resolution_ratio`.
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): Of the linear schedule.
        log_snr_min, log_snr_max (`float`, default to -15 and 15):
            Ends of the shifted cosine before the shift, at t = T - 1 and t = 0.
        resolution_ratio (`float`, defaults to 0.25): Of the shifted cosine; UAD-IMAG has 56 / 224. 1 does not shift.
        noise_type (`str`, defaults to `"pyramid"`): `"pyramid"` or `"gaussian"`, what `draw_noise` draws for training.
        discount (`float`, defaults to 0.8): Weight of a level of the pyramid relative to the one before it.
        normalize (`str`, defaults to `"per_batch"`):
            `"per_batch"`: the authors' rule for training, the batch shares one standard deviation and the sizes of its
            pyramid. `"per_image"`: every image depends on its own key alone.
        prediction_type (`str`, defaults to `"epsilon"`): Output of the network, `"epsilon"` or `"v_prediction"`.
        clip_sample (`bool`, defaults to `False`): Limit the x_0 estimate of a deviation to [-1, 1].
        log_floor (`float`, defaults to 1e-10):
            Smallest deviation: under a geometric mean one exact zero would erase its pixel. The original's is 0.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        log_snr_min: float = -15.0,
        log_snr_max: float = 15.0,
        resolution_ratio: float = 0.25,
        noise_type: str = "pyramid",
        discount: float = 0.8,
        normalize: str = "per_batch",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        log_floor: float = 1e-10,
    ):
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_choice("noise_type", noise_type, NOISE_TYPES)
        check_choice("normalize", normalize, NORMALIZATIONS)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_integer("num_train_timesteps", num_train_timesteps, 2)
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"`beta_start` and `beta_end` must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}."
            )
        if not log_snr_min < log_snr_max:
            raise ValueError(f"`log_snr_min` must be below `log_snr_max`, got {log_snr_min} and {log_snr_max}.")
        check_number("resolution_ratio", resolution_ratio, above=0)
        check_number("discount", discount, above=0)
        check_number("log_floor", log_floor, least=0)

        # All tables are float64. Notation: abar_t is the product of 1 - beta_t, s = t - 1, variance = 1 - abar_t.
        if beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32).double()
            alphas_cumprod = torch.cumprod(1.0 - betas, 0)
            variance = 1.0 - alphas_cumprod
        else:
            time = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
            first, last = torch.tensor([-log_snr_max / 2, -log_snr_min / 2], dtype=torch.float64).exp().atan()
            shift = torch.tensor(resolution_ratio, dtype=torch.float64).log()
            log_snr = 2.0 * (shift - torch.tan(first + time * (last - first)).log())
            alphas_cumprod = torch.sigmoid(log_snr)
            variance = torch.sigmoid(-log_snr)
            # 1 - abar_t / abar_s, without the difference of two numbers near 1.
            previous = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), log_snr[:-1]])
            betas = -torch.expm1(log_snr - previous) * variance
        # The means of two noises at one x_t differ by noise_weight times the difference of the noises; its square is
        # the factor between a deviation and the squared error of the noise.
        noise_weight = betas / ((1.0 - betas) * variance).sqrt()
        self.deviation_weight = noise_weight.square()
        self.set_tables(betas, alphas_cumprod, variance, noise_weight=noise_weight, beta=betas)
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        start: int = 1,
        stop: int | None = None,
    ):
        """Sets the timesteps that are aggregated: `stop` - 1, ..., `start`, by default all but t = 0, or
        `num_inference_steps` of them, evenly spread: each the middle of its share of the range."""
        stop = self.config.num_train_timesteps if stop is None else stop
        if not 1 <= start < stop <= self.config.num_train_timesteps:
            raise ValueError(
                f"`start` and `stop` must satisfy 1 <= start < stop <= {self.config.num_train_timesteps}, got {start} and"
                f" {stop}. t = 0 has no reverse transition."
            )
        count = stop - start if num_inference_steps is None else num_inference_steps
        if not 1 <= count <= stop - start:
            raise ValueError(
                f"The number of timesteps must be between 1 and `stop` - `start` = {stop - start}, got {count}."
            )
        self.num_inference_steps = count
        shares = torch.arange(count - 1, -1, -1)
        self.timesteps = (start + (2 * shares + 1) * (stop - start) // (2 * count)).to(device)

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the one-shot estimate of x_0, not limited: (x_t - sigma eps) / alpha, or alpha x_t - sigma v."""
        alpha = self.gather("original_scale", timestep, sample)
        sigma = self.gather("noise_scale", timestep, sample)
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * model_output
        return (sample - sigma * model_output) / alpha

    def predict_epsilon(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the noise that the network sees in x_t: its output, or sigma x_t + alpha v."""
        if self.config.prediction_type == "epsilon":
            return model_output
        alpha = self.gather("original_scale", timestep, sample)
        sigma = self.gather("noise_scale", timestep, sample)
        return sigma * sample + alpha * model_output

    def predicted_mean(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the mean of the network's transition to x_{t-1}: the posterior mean with its estimate of x_0,
        limited if the scheduler clips."""
        return self.posterior_mean(self._estimate(model_output, timestep, sample), timestep, sample)

    def mean_error(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        original_sample: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes `posterior_mean` minus `predicted_mean`, mu_q - mu_theta, without the difference of two means of
        size 1, which in float32 is exactly 0 for up to a few pixels in a hundred. Both means share x_t, so what is
        left is a table value times the difference of two noises: the network's and `noise`, that of x_t. Without it,
        or if the scheduler clips, it is the difference of two x_0."""
        if noise is None or self.config.clip_sample:
            estimate = self._estimate(model_output, timestep, sample)
            return self.gather("original_weight", timestep, sample) * (original_sample - estimate)
        epsilon = self.predict_epsilon(model_output, timestep, sample)
        return self.gather("noise_weight", timestep, sample) * (epsilon - noise)

    def carry_error(self, mean_error: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """Computes what a difference between two x_t adds to the difference of their posterior means at t - 1."""
        return self.gather("sample_weight", timestep, mean_error) * mean_error

    def deviation(self, mean_error: torch.Tensor) -> torch.Tensor:
        """Computes d_t = (mu_q - mu_theta)^2, at least `log_floor`."""
        return mean_error.square().clamp(min=self.config.log_floor)

    def surprise(self, deviation: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """Computes -log of UAD-IMAG's probability of a deviation: d_t / (2 beta_t)."""
        return deviation / (2.0 * self.gather("beta", timestep, deviation))

    def draw_noise(
        self,
        keys: torch.Tensor,
        size: Sequence[int],
        timesteps: int | torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        noise_type: str | None = None,
        normalize: str | None = None,
    ) -> torch.Tensor:
        """Draws noise, the same for all t; arguments as of [`DiffusionProcess.draw_noise`]. `noise_type` and
        `normalize` are used instead of the configuration's, which are those of training."""
        if (noise_type or self.config.noise_type) == "gaussian":
            return super().draw_noise(keys, size, timesteps, dtype)
        per_image = (normalize or self.config.normalize) == "per_image"
        return draw_pyramid(keys, size, dtype, discount=self.config.discount, per_image=per_image)

    def _estimate(self, model_output, timestep, sample) -> torch.Tensor:
        estimate = self.predict_original_sample(model_output, timestep, sample)
        return estimate.clamp(-1.0, 1.0) if self.config.clip_sample else estimate
