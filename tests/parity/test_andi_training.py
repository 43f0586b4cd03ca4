"""ANDi's learning rates and average of the weights against recorded numbers, and the optimizer of the DAE."""

import numpy as np
import pytest
import torch

from anodiff.training.optimization import check_optim, make_ema, make_lr_scheduler, make_optimizer
from anodiff.training.options import EMAOptions, OptimOptions

from .recordings import read


@pytest.fixture(scope="module")
def golden():
    return read("andi/lr_ema.npz")


def test_learning_rates(golden):
    optim = OptimOptions(
        learning_rate=float(golden["sched_target"]),
        start_lr=float(golden["sched_start"]),
        lr_scheduler="cosine",
        warmup_steps=int(golden["warmup_steps"]),
    )
    check_optim(optim, int(golden["total_steps"]))
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], optim)
    schedule = make_lr_scheduler(optimizer, optim, int(golden["total_steps"]))
    rates = []
    for _ in golden["lr"]:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, golden["lr"], rtol=1e-12)

    # A run that goes on after a third of the steps goes on with the same rates.
    again = make_lr_scheduler(make_optimizer([torch.nn.Parameter(torch.zeros(1))], optim), optim, len(rates))
    state = schedule.state_dict() | {"last_epoch": len(rates) // 3}
    again.load_state_dict(state)
    again.optimizer.step()
    again.step()
    assert again.get_last_lr()[0] == pytest.approx(rates[len(rates) // 3 + 1], rel=1e-12)


def test_average_of_the_weights(golden):
    weight = torch.nn.Parameter(torch.zeros(1))
    options = EMAOptions(decay=float(golden["ema_decay"]), warmup=False, start_step=int(golden["ema_start"]))
    ema = make_ema([weight], options)
    first, trace = int(golden["ema_from_step"]), []
    for step in range(first + len(golden["ema_trace"])):
        weight.data.fill_(float(step))
        ema.step([weight])
        trace.append(ema.shadow_params[0].item())
    np.testing.assert_array_equal(trace[:first], np.arange(first))
    np.testing.assert_allclose(trace[first:], golden["ema_trace"], rtol=2e-7)


@pytest.mark.parametrize("start_step", [0, 3])
def test_average_with_warm_up(start_step):
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = make_ema([weight], EMAOptions(decay=0.5, start_step=start_step))
    trace = []
    for step in range(6):
        weight.data.fill_(float(step))
        ema.step([weight])
        trace.append(ema.shadow_params[0].item())
    copies = max(start_step, 1)
    np.testing.assert_array_equal(trace[:copies], np.arange(copies))
    decay = 2 / 11  # (1 + step) / (10 + step) of the first averaged step
    assert trace[copies] == pytest.approx(decay * (copies - 1) + (1 - decay) * copies)


def test_optimizer_of_the_dae():
    optim = OptimOptions(algorithm="adam", amsgrad=True, weight_decay=0.1, learning_rate=0.1)
    weight = torch.nn.Parameter(torch.ones(2))
    expected = torch.nn.Parameter(torch.ones(2))
    own = make_optimizer([weight], optim)
    reference = torch.optim.Adam([expected], lr=0.1, weight_decay=0.1, amsgrad=True)
    for gradient in (1.0, -0.01, 0.02):
        for parameter, optimizer in ((weight, own), (expected, reference)):
            parameter.grad = torch.tensor([gradient, 0.0])
            optimizer.step()
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    decoupled = make_optimizer([weight], OptimOptions(amsgrad=True))
    assert type(decoupled) is torch.optim.AdamW and decoupled.defaults["amsgrad"]


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_schedule_keeps_its_last_rate(name):
    optim = OptimOptions(learning_rate=1e-3, start_lr=1e-5, lr_scheduler=name, warmup_steps=2, lr_total_steps=10)
    check_optim(optim, 30)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], optim)
    schedule, rates = make_lr_scheduler(optimizer, optim, 30), []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-5) and rates[2] == pytest.approx(1e-3)
    assert rates[2:11] == sorted(rates[2:11], reverse=True)
    assert rates[10:] == pytest.approx([1e-5] * 20, rel=0.02)  # a polynomial ends a little above


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "sgd"}, "`optim.algorithm` must be one of adamw, adam, got 'sgd'"),
        ({"lr_scheduler": "steps"}, "`optim.lr_scheduler` must be one of linear, cosine"),
        ({"lr_scheduler": "piecewise_constant"}, "`optim.lr_scheduler` must be one of linear, cosine"),
        ({"lr_scheduler": "constant", "warmup_steps": 5}, "constant has no warm-up .* `optim.warmup_steps` 5"),
        ({"lr_scheduler": "constant", "start_lr": 1e-5}, "constant has no warm-up .* `optim.start_lr` 1e-05"),
        ({"lr_scheduler": "constant_with_warmup", "start_lr": 1e-5}, "has no warm-up with these options"),
        ({"lr_scheduler": "cosine", "lr_total_steps": 19}, "cosine is at 0 after `optim.lr_total_steps` 19"),
        ({"lr_scheduler": "linear", "lr_total_steps": 19}, "up to `train.max_steps` 20 would teach nothing"),
        ({"start_lr": 1.0}, "`optim.start_lr` must be between 0 and `optim.learning_rate` 0.0001, got 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_optim(OptimOptions(**options), 20)
