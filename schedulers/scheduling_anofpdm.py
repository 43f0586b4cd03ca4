from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..checks import check_integer
from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from ..hub.configuration import PlainConfigMixin
from .process import DiffusionProcess, StepOutput, linear_betas


class AnoFPDMScheduler(DiffusionProcess, SchedulerMixin, PlainConfigMixin):
    r"""
    Implements the diffusion process of AnoFPDM (Che et al., arXiv 2404.15683) and of the DDIB and classifier-guided
    baselines of its authors: Gaussian noise, linear betas, a network that predicts the noise, and deterministic DDIM
    steps in both directions, with an estimate of x_0 that is limited to [-1, 1] and a noise that is derived from it
    again.

    Timesteps are 0-based: t = 0, ..., T - 1, x_0 of the grid already holds one step of noise. The grid begins at 0:
    0, k, 2k, ... with a stride k. Below it lies the image (abar = 1), above T - 1 pure noise (abar = 0).

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_start, beta_end (`float`, default to 1e-4 and 0.02): Of the linear betas, both multiplied by 1000 / T.
        clip_sample (`bool`, defaults to `True`): Limit the x_0 estimate of a step to [-1, 1].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
    ):
        betas = linear_betas(num_train_timesteps, beta_start, beta_end)
        alphas_cumprod = torch.cumprod(1.0 - betas, 0)
        # abar of the timesteps -1, 0, ..., T.
        ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
        levels = torch.cat([ends[:1], alphas_cumprod, ends[1:]])
        self.set_tables(betas, alphas_cumprod, level_scale=levels.sqrt(), level_noise_scale=(1.0 - levels).sqrt())
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        stride: int = 1,
    ):
        """Sets the grid: the multiples of `stride`, 1 to S, below the noise level S = `num_inference_steps`, by
        default T, highest first. `step` walks it as it is, `encode_step` from its end."""
        level = self.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
        check_integer("num_inference_steps", level, 1, self.config.num_train_timesteps)
        check_integer("stride", stride, 1, level)
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
    ) -> StepOutput | tuple:
        """Walks one reverse step of DDIM without noise (eta = 0) from x_t `(N, C, H, W)`, given the predicted noise,
        to t - k with the stride k of the grid, or to the image. `timestep` t is 0-based, one for all or one per
        sample; `clip_sample` replaces the configuration's: after guidance the authors do not limit x_0 again."""
        # Notation: sample -> x_t, model_output -> eps_theta(x_t, t), prev_sample -> x_{t-k},
        # pred_original_sample -> x_0 estimate (DDIM eq. 12).
        prev_sample, pred_original_sample = self._move(model_output, timestep, sample, -self.stride, clip_sample)
        if not return_dict:
            return prev_sample, pred_original_sample
        return StepOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def encode_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        clip_sample: bool | None = None,
    ) -> torch.Tensor:
        """Walks one step of DDIM's forward process, from x_t to x_{t+k} with the stride k of the grid; arguments as
        for `step`. Above T - 1 there is noise only."""
        return self._move(model_output, timestep, sample, self.stride, clip_sample)[0]

    def predict_original_sample(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        clip_sample: bool | None = None,
    ) -> torch.Tensor:
        """Computes the one-shot estimate of x_0: x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps, limited to [-1, 1] if
        the configuration or `clip_sample` says so."""
        inverse_scale = self.gather("inverse_scale", timestep, sample)
        estimate = inverse_scale * sample - self.gather("inverse_noise_scale", timestep, sample) * model_output
        clip_sample = self.config.clip_sample if clip_sample is None else clip_sample
        return estimate.clamp(-1.0, 1.0) if clip_sample else estimate

    def predict_epsilon(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Computes the noise that leads from an (estimated) x_0 to x_t:
        (x_t / sqrt(abar_t) - x_0) / sqrt(1 / abar_t - 1)."""
        inverse_scale = self.gather("inverse_scale", timestep, sample)
        return (inverse_scale * sample - original_sample) / self.gather("inverse_noise_scale", timestep, sample)

    def _move(self, model_output, timestep, sample, offset: int, clip_sample) -> tuple[torch.Tensor, torch.Tensor]:
        # 1. Estimate of x_0 (DDPM eq. 15), limited.
        pred_original_sample = self.predict_original_sample(model_output, timestep, sample, clip_sample)
        # 2. The noise that fits it: where x_0 was limited it is not the network's.
        epsilon = self.predict_epsilon(pred_original_sample, timestep, sample)
        # 3. Both mixed anew at the other timestep (DDIM eq. 12 with sigma = 0). The tables of levels begin at t = -1.
        level = torch.as_tensor(timestep, device=sample.device) + offset
        level = level.clamp(-1, self.config.num_train_timesteps) + 1
        moved = (
            self.gather("level_scale", level, sample) * pred_original_sample
            + self.gather("level_noise_scale", level, sample) * epsilon
        )
        return moved, pred_original_sample
