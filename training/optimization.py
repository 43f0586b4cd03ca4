"""Optimizer, learning rate and average of the weights, from their options."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from ..checks import check_choice, check_number
from .options import ENDLESS, EMAOptions, OptimOptions


# Of those of diffusers, `piecewise_constant` has rules that no option gives.
_SCHEDULES = [schedule.value for schedule in SchedulerType if schedule != SchedulerType.PIECEWISE_CONSTANT]


def check_optim(optim: OptimOptions, max_steps: int) -> None:
    """Raises a `ValueError` for options that no optimizer or schedule of a run of `max_steps` can be made of, or that it
    would not follow."""
    check_choice("optim.algorithm", optim.algorithm, ("adamw", "adam"))
    check_choice("optim.lr_scheduler", optim.lr_scheduler, _SCHEDULES)
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        check_number(f"optim.{name}", vars(optim)[name], least=0)
    if not 0 <= optim.start_lr <= optim.learning_rate:
        raise ValueError(
            f"`optim.start_lr` must be between 0 and `optim.learning_rate` {optim.learning_rate:g}, got"
            f" {optim.start_lr:g}."
        )
    if optim.lr_scheduler in ENDLESS and not _warms_up(optim) and (optim.warmup_steps or optim.start_lr):
        raise ValueError(
            f"`optim.lr_scheduler` {optim.lr_scheduler} has no warm-up with these options, got `optim.warmup_steps`"
            f" {optim.warmup_steps} and `optim.start_lr` {optim.start_lr:g}: it must be constant_with_warmup with"
            " `optim.warmup_steps` above 0, or both must be 0."
        )
    total = optim.lr_total_steps or max_steps
    if total < max_steps and optim.lr_scheduler not in ENDLESS and not optim.start_lr:
        raise ValueError(
            f"`optim.lr_scheduler` {optim.lr_scheduler} is at 0 after `optim.lr_total_steps` {total}, so that the steps"
            f" up to `train.max_steps` {max_steps} would teach nothing. Set `train.max_steps` to {total}, or give a new"
            " run `optim.lr_total_steps` for all its steps; with `optim.start_lr` above 0 a run goes on at that rate."
        )


def _warms_up(optim: OptimOptions) -> bool:
    return optim.lr_scheduler != "constant" and optim.warmup_steps > 0


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], optim: OptimOptions, fused: bool = False
) -> torch.optim.Optimizer:
    """Makes AdamW, or Adam, whose weight decay is part of the gradient; `fused` is one launch for all parameters, which
    rounds otherwise."""
    algorithm = torch.optim.AdamW if optim.algorithm == "adamw" else torch.optim.Adam
    settings = {"betas": tuple(optim.betas), "weight_decay": optim.weight_decay, "amsgrad": optim.amsgrad}
    # `False` would also switch off what torch takes by itself.
    return algorithm(parameters, lr=optim.learning_rate, fused=fused or None, **settings)


def make_lr_scheduler(optimizer: torch.optim.Optimizer, optim: OptimOptions, max_steps: int) -> LambdaLR:
    """Makes a schedule of diffusers between `start_lr` and `learning_rate`: the share s of the peak that it gives, 0
    to 1, becomes `start_lr + s (learning_rate - start_lr)`. `cosine` is then ANDi's rule: a linear warm-up and a half
    cosine back down. A schedule that ends keeps its last rate: diffusers' cosine would go up again."""
    total = optim.lr_total_steps or max_steps
    steps = {"num_warmup_steps": optim.warmup_steps, "num_training_steps": total}
    schedule = get_scheduler(optim.lr_scheduler, optimizer, **steps)
    share_of_peak, last = schedule.lr_lambdas[0], math.inf if optim.lr_scheduler in ENDLESS else total
    lowest = optim.start_lr / optim.learning_rate if optim.learning_rate else 0.0
    return LambdaLR(optimizer, lambda step: lowest + (1 - lowest) * share_of_peak(min(step, last)))


def make_ema(parameters: Iterable[torch.nn.Parameter], ema: EMAOptions, fused: bool = False) -> EMAModel:
    """Makes diffusers' average of the weights: a plain copy of them in the first `start_step` steps, then with
    `decay`; `fused` is one launch for all parameters, which rounds otherwise."""
    # The average has its own warm-up, (1 + step) / (10 + step), whose first step copies; a fixed decay needs
    # `min_decay`, and averages from step `update_after_step + 2` on.
    settings = {"decay": ema.decay, "foreach": fused}
    if ema.warmup:
        return EMAModel(parameters, update_after_step=max(ema.start_step - 1, 0), **settings)
    return EMAModel(parameters, min_decay=ema.decay, update_after_step=ema.start_step - 1, **settings)
