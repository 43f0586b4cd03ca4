"""The variational bound of one diffusion step, in bits per dimension (DDPM eq. 5; Nichol and Dhariwal 2021)."""

from __future__ import annotations

import math

import torch

from ..schedulers.process import DiffusionProcess
from ..schedulers.scheduling_anoddpm import AnoDDPMScheduler


# Images x_0, noised samples x_t and outputs are (N, C, H, W), timesteps, from 0, and bounds (N,).


def variational_bound(
    scheduler: AnoDDPMScheduler,
    original: torch.Tensor,
    sample: torch.Tensor,
    model_output: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Computes the bound of a network that predicts the noise, with the variance of the scheduler."""
    estimate = scheduler.predict_original_sample(model_output, timesteps, sample)
    if scheduler.config.clip_sample:
        estimate = estimate.clamp(-1.0, 1.0)
    mean = scheduler.posterior_mean(estimate, timesteps, sample)
    log_variance = scheduler.variance.log().float().to(sample.device)[timesteps].reshape(-1, 1, 1, 1)
    return _step_bound(scheduler, original, sample, mean, log_variance, timesteps)


def variance_bound(
    scheduler: DiffusionProcess,
    original: torch.Tensor,
    estimate: torch.Tensor,
    sample: torch.Tensor,
    variance_output: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Computes the bound that teaches a network its variance, and has gradients for that only: from its `estimate` of
    x_0, not limited, and its `variance_output`, -1 for the posterior's variance, 1 for beta_t."""
    mean = scheduler.posterior_mean(estimate.detach(), timesteps, sample)
    log_variance = scheduler.learned_log_variance(variance_output, timesteps)
    return _step_bound(scheduler, original, sample, mean, log_variance, timesteps)


def _step_bound(
    scheduler: DiffusionProcess,
    original: torch.Tensor,
    sample: torch.Tensor,
    mean: torch.Tensor,
    log: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """A Kullback-Leibler divergence for t > 0, for t = 0 the likelihood of 8-bit images in [-1, 1] (DDPM eq. 5 and
    13). CIMD's masks of 0 and 1 are taken for such images, as in the original: the bin of 1 is open above, that of 0
    is 2 / 255 wide."""
    # mean, log -> p_theta(x_{t-1} | x_t); true_mean, true_log -> q(x_{t-1} | x_t, x_0), at t = 0 the variance of t =
    # 1.
    true_mean = scheduler.posterior_mean(original, timesteps, sample)
    true_log = scheduler.gather("posterior_log_variance", timesteps, log)
    divergence = 0.5 * (-1.0 + log - true_log + (true_log - log).exp() + (true_mean - mean).square() * (-log).exp())

    def cumulative(value: torch.Tensor) -> torch.Tensor:
        # The original's approximation of the normal distribution function.
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    # Probability of the grey level's bin, 2 / 255 wide; the outermost bins are open.
    deviation = (-0.5 * log).exp()
    upper = cumulative((original - mean + 1.0 / 255) * deviation)
    lower = cumulative((original - mean - 1.0 / 255) * deviation)
    inner = torch.where(original > 0.999, 1.0 - lower, upper - lower)
    probability = torch.where(original < -0.999, upper, inner).clamp(min=1e-12)
    bound = torch.where((timesteps == 0).reshape(-1, 1, 1, 1), -probability.log(), divergence)
    return bound.mean((1, 2, 3)) / math.log(2.0)
