"""What every scheduler that iterates keeps."""

import pytest
import torch

from anodiff import AnoDDPMScheduler, AnoFPDMScheduler


SHAPE = (3, 2, 16, 16)
SCHEDULERS = {
    "simplex": lambda: AnoDDPMScheduler(num_train_timesteps=25),
    "simplex, timestep": lambda: AnoDDPMScheduler(num_train_timesteps=25, z="timestep"),
    "gaussian, cosine": lambda: AnoDDPMScheduler(
        num_train_timesteps=25, beta_schedule="cosine", noise_type="gaussian"
    ),
    "cDDPM": lambda: AnoDDPMScheduler(num_train_timesteps=25, beta_schedule="cosine", z=None),
    "ANDi authors": lambda: AnoDDPMScheduler(
        num_train_timesteps=25, beta_schedule="linear_float32", noise_type="gaussian", variance_type="fixed_small"
    ),
    "brain_damage": lambda: AnoDDPMScheduler(
        num_train_timesteps=25, beta_schedule="cosine_clipped", wavelength=32, normalize="per_image"
    ),
}
# Their steps draw nothing.
DETERMINISTIC = {"AnoFPDM": lambda: AnoFPDMScheduler(num_train_timesteps=25)}


@pytest.fixture(params=SCHEDULERS | DETERMINISTIC, ids=str)
def scheduler(request):
    return (SCHEDULERS | DETERMINISTIC)[request.param]()


@pytest.fixture(params=SCHEDULERS, ids=str)
def noisy_scheduler(request):
    return SCHEDULERS[request.param]()


def generators(count=3, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def tensors():
    torch.manual_seed(0)
    return torch.randn(SHAPE), torch.randn(SHAPE)


def draws(scheduler, generator) -> dict:
    """The arguments of a step that draws, if this one does."""
    return {} if isinstance(scheduler, AnoFPDMScheduler) else {"generator": generator}


def walk(scheduler, generator, steps=4):
    sample, model_output = tensors()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        sample = scheduler.step(model_output, t, sample, **draws(scheduler, generator)).prev_sample
    return sample


def test_save_load_and_from_config(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    for key, value in scheduler.config.items():
        assert key.startswith("_") or loaded.config[key] == value
    expected = walk(scheduler, generators())
    torch.testing.assert_close(walk(loaded, generators()), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        walk(type(scheduler).from_config(scheduler.config), generators()), expected, rtol=0, atol=0
    )


def test_tuple_equals_output(scheduler):
    sample, model_output = tensors()
    output = scheduler.step(model_output, 3, sample, **draws(scheduler, generators()))
    pair = scheduler.step(model_output, 3, sample, **draws(scheduler, generators()), return_dict=False)
    torch.testing.assert_close(pair[0], output.prev_sample, rtol=0, atol=0)
    torch.testing.assert_close(pair[1], output.pred_original_sample, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_kept(scheduler, dtype):
    sample, model_output = (tensor.to(dtype) for tensor in tensors())
    output = scheduler.step(model_output, 3, sample, **draws(scheduler, generators()))
    noised = scheduler.add_noise(sample, model_output, torch.tensor([0, 5, 24]))
    for tensor in (output.prev_sample, output.pred_original_sample, noised):
        assert tensor.shape == SHAPE and tensor.dtype == dtype


def test_generators_are_reproducible_and_independent_of_the_batch(scheduler):
    together = walk(scheduler, generators())
    torch.testing.assert_close(walk(scheduler, generators()), together, rtol=0, atol=0)
    assert torch.equal(walk(scheduler, generators(first=7)), together) == (draws(scheduler, None) == {})
    # One by one, each sample with its own generator.
    sample, model_output = tensors()
    for index in range(SHAPE[0]):
        single = sample[index : index + 1]
        generator = generators(1, first=index)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            arguments = model_output[index : index + 1], t, single
            single = scheduler.step(*arguments, **draws(scheduler, generator)).prev_sample
        torch.testing.assert_close(single[0], together[index], rtol=0, atol=0)


def test_grid_is_leading_and_zero_based(scheduler):
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [4, 3, 2, 1, 0]
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == list(range(24, -1, -1))
    assert len(scheduler) == 25


def test_last_step_adds_no_noise(noisy_scheduler):
    scheduler = noisy_scheduler
    sample, model_output = tensors()
    noisy = scheduler.step(model_output, 0, sample, variance_noise=torch.full(SHAPE, 1e3)).prev_sample
    quiet = scheduler.step(model_output, 0, sample, variance_noise=torch.zeros(SHAPE)).prev_sample
    torch.testing.assert_close(noisy, quiet, rtol=0, atol=0)


def test_clipping_of_one_step_wins_over_the_configuration(noisy_scheduler):
    scheduler = noisy_scheduler
    sample, model_output = tensors()
    clipped, free = (
        scheduler.step(model_output, 20, sample, variance_noise=torch.zeros(SHAPE), clip_sample=clip)
        for clip in (True, False)
    )
    assert clipped.pred_original_sample.abs().max() == 1 and free.pred_original_sample.abs().max() > 1
    # Both forms of the mean are the same where nothing is limited.
    expected = scheduler.posterior_mean(free.pred_original_sample, 20, sample)
    torch.testing.assert_close(free.prev_sample, expected, rtol=1e-4, atol=1e-4)


def test_one_shot_inverts_add_noise(scheduler):
    original, noise = tensors()
    t = torch.tensor([0, 7, 15])
    # AnoFPDM's estimate is limited to [-1, 1] where the step's is.
    original = original.clamp(-1.0, 1.0)
    recovered = scheduler.predict_original_sample(noise, t, scheduler.add_noise(original, noise, t))
    torch.testing.assert_close(recovered, original, rtol=1e-4, atol=1e-4)


def test_wrong_arguments():
    sample, model_output = tensors()
    scheduler = AnoDDPMScheduler(num_train_timesteps=25)
    with pytest.raises(ValueError, match="either `variance_noise` or `generator`"):
        scheduler.step(model_output, 3, sample, variance_noise=sample, generator=generators())
    with pytest.raises(ValueError, match="needs a `generator`"):
        scheduler.step(model_output, 3, sample)
    with pytest.raises(ValueError, match="one entry per sample"):
        scheduler.step(model_output, 3, sample, generator=generators(2))
    with pytest.raises(ValueError, match="between 1 and 25, got 26"):
        scheduler.set_timesteps(26)
    with pytest.raises(ValueError, match="must be above 20 for the schedule 'linear'"):
        AnoDDPMScheduler(num_train_timesteps=10)
    with pytest.raises(ValueError, match="`beta_schedule` must be one of linear, cosine"):
        AnoDDPMScheduler(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match="`variance_type` must be one of fixed_large, fixed_small"):
        AnoDDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="`beta_start` must be above 0 and at most `beta_end`"):
        AnoDDPMScheduler(beta_start=0.03)
    with pytest.raises(ValueError, match="`noise_type` must be one of gaussian, simplex"):
        AnoDDPMScheduler(noise_type="perlin")
