"""`CIMDScheduler`: what is its own beside the contract of all schedulers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from anodiff import CIMDScheduler
from anodiff.schedulers.draws import make_keys


SHAPE = (3, 1, 16, 16)
KEYS = make_keys(0, range(3))
SCHEDULERS = {
    "published": lambda: CIMDScheduler(),
    "cosine": lambda: CIMDScheduler(num_train_timesteps=40, beta_schedule="cosine", clip_range=(0.0, 1.0)),
    "short, free": lambda: CIMDScheduler(num_train_timesteps=25, clip_range=None),
}


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    return SCHEDULERS[request.param]()


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    outputs = torch.randn(SHAPE), torch.rand(SHAPE) * 2 - 1
    return torch.randn(SHAPE).to(dtype), torch.cat(outputs, 1).to(dtype)


def test_grid_accumulates_as_the_original():
    scheduler = CIMDScheduler()
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 666, 333, 0] and scheduler.num_inference_steps == 4
    # The original program.
    different = []
    for steps in range(2, 1001):
        scheduler.set_timesteps(steps)
        grid = scheduler.timesteps.flip(0).numpy()
        assert len(set(grid)) == steps and grid[0] == 0 and grid[-1] == 999
        if (grid != np.linspace(0, 999, steps).round()).any():
            different.append(steps)
    assert len(different) == 278 and {21, 23, 31, 35} <= set(different)
    assert not {10, 15, 20, 25, 50, 100, 200, 250, 500} & set(different)


def test_explicit_timesteps_are_the_grid():
    scheduler = CIMDScheduler()
    scheduler.set_timesteps(20)
    expected = {name: table.clone() for name, table in scheduler.step_tables.items()}
    scheduler.set_timesteps(timesteps=scheduler.timesteps.tolist())
    for name, table in scheduler.step_tables.items():
        assert_close(table, expected[name], rtol=0, atol=0)
    scheduler.set_timesteps(timesteps=[900, 500, 7])
    sample, model_output = tensors()
    # The lowest one leads to x_0, whatever it is, and others are not on the grid.
    last = scheduler.step(model_output, 7, sample, variance_noise=torch.full(SHAPE, 1e3))
    assert_close(last.prev_sample, last.pred_original_sample, rtol=0, atol=0)
    assert scheduler.step(model_output, 6, sample, variance_noise=sample).prev_sample.isnan().all()


@pytest.mark.parametrize("steps", [1000, 20])
def test_step_is_that_of_diffusers(steps):
    ours = CIMDScheduler()
    theirs = DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range",
        clip_sample_range=1.0,
        timestep_spacing="linspace",
    )
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    sample, model_output = tensors()
    for t in ours.timesteps[:: steps // 10].tolist() + [0]:
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
        expected = theirs.step(model_output, t, sample, generator=torch.Generator().manual_seed(t)).prev_sample
        actual = ours.step(model_output, t, sample, variance_noise=noise).prev_sample
        assert_close(actual, expected, rtol=0, atol=6e-5)  # their tables are float32


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_that_of_diffusers(clip):
    ours = CIMDScheduler(clip_range=(-1.0, 1.0) if clip else None)
    theirs = DDIMScheduler(trained_betas=ours.betas.numpy(), clip_sample=clip, set_alpha_to_one=True)
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.set_timesteps(50)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    sample, model_output = tensors(torch.float64)
    for t in (980, 500, 20, 0):
        actual = ours.step(model_output, t, sample, sampler="ddim")
        expected = theirs.step(model_output[:, :1], t, sample, use_clipped_model_output=True)
        assert_close(actual.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)
        assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-9)


def test_training_does_not_depend_on_the_grid():
    scheduler = CIMDScheduler()
    sample, model_output = tensors()
    t = torch.tensor([1, 500, 998])

    def values():
        return (
            scheduler.add_noise(sample, sample, t),
            scheduler.posterior_mean(sample, t, sample),
            scheduler.learned_log_variance(model_output[:, 1:], t),
            scheduler.predict_original_sample(model_output[:, :1], t, sample),
        )

    expected = values()
    scheduler.set_timesteps(10)
    assert all(torch.equal(actual, other) for actual, other in zip(values(), expected, strict=True))


def test_clip_range():
    sample, model_output = tensors()
    for clip_range in ((-1.0, 1.0), (0.0, 1.0)):
        estimate = CIMDScheduler(clip_range=clip_range).step(model_output, 700, sample, keys=KEYS)
        assert (estimate.pred_original_sample.min(), estimate.pred_original_sample.max()) == clip_range
    free = CIMDScheduler(clip_range=None).step(model_output, 700, sample, keys=KEYS)
    assert free.pred_original_sample.abs().max() > 2


def test_wrong_arguments():
    sample, model_output = tensors()
    scheduler = CIMDScheduler(25)
    with pytest.raises(ValueError, match="`sampler` must be one of ddpm, ddim, got 'euler'"):
        scheduler.step(model_output, 3, sample, keys=KEYS, sampler="euler")
    with pytest.raises(ValueError, match=r"`keys` must have the shape \(3, 2\), one key per sample, got \(2, 2\)"):
        scheduler.step(model_output, 3, sample, keys=KEYS[:2])
    with pytest.raises(ValueError, match="`model_output` must have twice as many channels .*: 2, got 1"):
        scheduler.step(sample, 3, sample, keys=KEYS)
    for arguments, message in (
        ({"num_inference_steps": 3, "timesteps": [2, 1, 0]}, "either `num_inference_steps` or `timesteps`"),
        ({"timesteps": [0, 1]}, r"two falling numbers between 0 and 24, got \[0, 1\]"),
        ({"timesteps": [25, 1]}, "two falling numbers between 0 and 24"),
        ({"timesteps": [3]}, "at least two falling numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(ValueError, match=r"`clip_range` must be \(low, high\)"):
        CIMDScheduler(clip_range=(1.0, 0.0))
