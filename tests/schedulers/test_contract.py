"""What every scheduler keeps, and what every process that is walked step by step keeps."""

from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from anodiff import ANDiScheduler, AnoDDPMScheduler, AnoFPDMScheduler, CIMDScheduler, DAEScheduler
from anodiff.schedulers.draws import fold_in, make_keys
from anodiff.schedulers.noise import draw_pyramid


STEPS = 25
SHAPE = (3, 2, 16, 16)
KEYS = make_keys(0, range(3))


class Walked(NamedTuple):
    """A process with a `step`: how to make it, the channels of a network's output for one of the sample, whether its steps draw, and
    its grid of five steps."""

    make: type
    settings: dict
    outputs: int = 1
    draws: bool = True
    grid: tuple = (4, 3, 2, 1, 0)


WALKED = {
    "simplex": Walked(AnoDDPMScheduler, {}),
    "simplex, timestep": Walked(AnoDDPMScheduler, {"z": "timestep"}),
    "gaussian, cosine": Walked(AnoDDPMScheduler, {"beta_schedule": "cosine", "noise_type": "gaussian"}),
    "cDDPM": Walked(AnoDDPMScheduler, {"beta_schedule": "cosine", "z": None}),
    "ANDi authors": Walked(
        AnoDDPMScheduler,
        {"beta_schedule": "linear_float32", "noise_type": "gaussian", "variance_type": "fixed_small"},
    ),
    "brain_damage": Walked(
        AnoDDPMScheduler, {"beta_schedule": "cosine_clipped", "wavelength": 32, "normalize": "per_image"}
    ),
    "AnoFPDM": Walked(AnoFPDMScheduler, {}, draws=False),
    "CIMD": Walked(CIMDScheduler, {}, outputs=2, grid=(24, 18, 12, 6, 0)),
    "CIMD, cosine": Walked(CIMDScheduler, {"beta_schedule": "cosine"}, outputs=2, grid=(24, 18, 12, 6, 0)),
}
# Never walked: a slice is noised once.
NOISING = {
    "ANDi": (ANDiScheduler, {"normalize": "per_image"}),
    "ANDi, gaussian": (ANDiScheduler, {"noise_type": "gaussian"}),
    "UAD-IMAG": (
        ANDiScheduler,
        {"beta_schedule": "shifted_cosine", "prediction_type": "v_prediction", "normalize": "per_image"},
    ),
}
PROCESSES = {name: (walked.make, walked.settings) for name, walked in WALKED.items()} | NOISING
ALL = PROCESSES | {"DAE": (DAEScheduler, {"shared_shift": False})}


def made(kind: type, settings: dict):
    return kind(**settings) if kind is DAEScheduler else kind(num_train_timesteps=STEPS, **settings)


@pytest.fixture(params=ALL, ids=str)
def scheduler(request):
    return made(*ALL[request.param])


@pytest.fixture(params=PROCESSES, ids=str)
def process(request):
    return made(*PROCESSES[request.param])


@pytest.fixture(params=WALKED, ids=str)
def walked(request):
    return WALKED[request.param]


def tensors(outputs=1, dtype=torch.float32):
    torch.manual_seed(0)
    sample = torch.randn(SHAPE)
    return sample.to(dtype), torch.randn(3, outputs * 2, 16, 16).to(dtype)


def drawing(walked: Walked, keys) -> dict:
    """The arguments of a step that draws, if this one does."""
    return {"keys": keys} if walked.draws else {}


def walk(walked: Walked, scheduler, keys, rows=slice(None)):
    sample, model_output = (tensor[rows] for tensor in tensors(walked.outputs))
    scheduler.set_timesteps(4)
    for step, t in enumerate(scheduler.timesteps):
        arguments = model_output, t, sample
        sample = scheduler.step(*arguments, **drawing(walked, fold_in(keys, step))).prev_sample
    return sample


def at(scheduler, timesteps) -> dict:
    """The argument `timesteps`, of processes that have any."""
    return {} if isinstance(scheduler, DAEScheduler) else {"timesteps": timesteps}


def noised(scheduler, sample, noise):
    return scheduler.add_noise(sample, noise, **at(scheduler, torch.tensor([0, 5, 24])))


def test_saved_loaded_and_rebuilt_it_does_the_same(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    sample, _ = tensors()
    expected = scheduler.draw_noise(KEYS, SHAPE[1:], **at(scheduler, 5))
    for other in (type(scheduler).from_pretrained(tmp_path), type(scheduler).from_config(scheduler.config)):
        for key, value in scheduler.config.items():
            if not key.startswith("_"):
                found = other.config[key]
                assert (tuple(found) if isinstance(found, list) else found) == value
        assert_close(other.draw_noise(KEYS, SHAPE[1:], **at(other, 5)), expected, rtol=0, atol=0)
        assert_close(noised(other, sample, sample), noised(scheduler, sample, sample), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_keeps_shape_and_type_and_nothing_is_changed_in_place(scheduler, dtype):
    sample, _ = tensors(dtype=dtype)
    before = sample.clone()
    noise = scheduler.draw_noise(KEYS, SHAPE[1:], dtype=dtype, **at(scheduler, torch.tensor([0, 5, 24])))
    result = noised(scheduler, sample, noise)
    for tensor in (noise, result):
        assert tensor.shape == SHAPE and tensor.dtype == dtype and tensor.device == KEYS.device
    assert torch.equal(sample, before) and result.data_ptr() != sample.data_ptr()


def test_a_sample_has_the_noise_of_its_key_alone(scheduler):
    together = scheduler.draw_noise(KEYS, SHAPE[1:], **at(scheduler, 5))
    assert torch.equal(scheduler.draw_noise(KEYS, SHAPE[1:], **at(scheduler, 5)), together)
    alone = [scheduler.draw_noise(key[None], SHAPE[1:], **at(scheduler, 5)) for key in KEYS]
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0, 0], together[0, 1])


def test_noise_is_added_by_the_products_of_the_chain(process):
    original, noise = tensors()
    t = torch.tensor([0, 7, 15])
    abar = process.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    expected = (abar.sqrt() * original + (1 - abar).sqrt() * noise).float()
    assert_close(process.add_noise(original, noise, t), expected, rtol=1e-6, atol=1e-6)
    assert len(process) == STEPS


def test_the_posterior_is_a_conditional_gaussian(process):
    """x_{t-1} and x_t are jointly Gaussian given x_0: regression of one on the other."""
    for t in (1, 7, 24):
        beta, abar, previous = process.betas[t], process.alphas_cumprod[t], process.alphas_cumprod[t - 1]
        slope = (1 - beta).sqrt() * (1 - previous) / (1 - abar)
        x0, x_t = torch.tensor(0.3).double().reshape(1, 1, 1, 1), torch.tensor(-1.2).double().reshape(1, 1, 1, 1)
        mean = previous.sqrt() * x0 + slope * (x_t - abar.sqrt() * x0)
        # Products of the float32 schedule are rounded, so that they are none of its betas.
        assert_close(process.posterior_mean(x0, t, x_t), mean, rtol=1e-6, atol=1e-7)
        variance = 1 - previous - slope * (1 - beta).sqrt() * (1 - previous)
        assert_close(process.posterior_variance[t], variance, rtol=1e-6, atol=1e-7)


def test_learned_variance_lies_between_the_two_fixed_ones(process):
    t = torch.tensor([0, 1, STEPS - 1])
    for value, expected in ((-1.0, process.posterior_log_variance), (1.0, process.betas.log())):
        found = process.learned_log_variance(torch.full((3, 1, 1, 1), value), t)
        assert_close(found.flatten().double(), expected[t], rtol=1e-6, atol=1e-6)
    # The variance of t = 0 is 0, and likelihoods take its logarithm.
    assert process.posterior_log_variance[0] == process.posterior_log_variance[1]


def test_the_one_shot_estimate_inverts_the_noise(walked):
    scheduler = made(walked.make, walked.settings)
    original, noise = tensors()
    t = torch.tensor([0, 7, 15])
    # AnoFPDM's estimate is limited to [-1, 1] where the step's is.
    original = original.clamp(-1.0, 1.0)
    recovered = scheduler.predict_original_sample(noise, t, scheduler.add_noise(original, noise, t))
    assert_close(recovered, original, rtol=1e-4, atol=1e-4)


def test_a_walk_depends_on_its_keys_alone(walked, tmp_path):
    scheduler = made(walked.make, walked.settings)
    together = walk(walked, scheduler, KEYS)
    assert torch.equal(walk(walked, scheduler, KEYS), together)
    assert torch.equal(walk(walked, scheduler, KEYS.flip(0)), together) == (not walked.draws)
    alone = [walk(walked, scheduler, KEYS[row : row + 1], slice(row, row + 1)) for row in range(3)]
    assert torch.equal(torch.cat(alone), together)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(walk(walked, walked.make.from_pretrained(tmp_path), KEYS), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_keeps_shape_and_type_and_is_a_tuple_too(walked, dtype):
    scheduler = made(walked.make, walked.settings)
    sample, model_output = tensors(walked.outputs, dtype)
    arguments = model_output, 3, sample
    output = scheduler.step(*arguments, **drawing(walked, KEYS))
    pair = scheduler.step(*arguments, **drawing(walked, KEYS), return_dict=False)
    for tensor, other in zip((output.prev_sample, output.pred_original_sample), pair, strict=True):
        assert tensor.shape == SHAPE and tensor.dtype == dtype
        assert_close(other, tensor, rtol=0, atol=0)


def test_the_grid_is_zero_based(walked):
    scheduler = made(walked.make, walked.settings)
    scheduler.set_timesteps(5)
    assert tuple(scheduler.timesteps.tolist()) == walked.grid
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == list(range(STEPS - 1, -1, -1))
    for steps in (0, STEPS + 1):
        with pytest.raises(
            ValueError, match=f"`num_inference_steps` must be an integer between [12] and 25, got {steps}"
        ):
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize("name", [name for name, walked in WALKED.items() if walked.draws])
def test_the_last_step_adds_no_noise(name):
    walked = WALKED[name]
    scheduler = made(walked.make, walked.settings)
    sample, model_output = tensors(walked.outputs)
    for timestep, equal in ((0, True), (5, False)):
        arguments = model_output, timestep, sample
        noisy = scheduler.step(*arguments, variance_noise=torch.full(SHAPE, 1e3)).prev_sample
        quiet = scheduler.step(*arguments, variance_noise=torch.zeros(SHAPE)).prev_sample
        assert torch.equal(noisy, quiet) == equal


def test_a_step_that_draws_wants_noise_or_keys():
    for walked in (WALKED["simplex"], WALKED["CIMD"]):
        scheduler = made(walked.make, walked.settings)
        sample, model_output = tensors(walked.outputs)
        for arguments in ({}, {"variance_noise": sample, "keys": KEYS}):
            with pytest.raises(ValueError, match="either `variance_noise` or `keys`"):
                scheduler.step(model_output, 3, sample, **arguments)


@pytest.mark.parametrize("name", ["simplex", "gaussian, cosine", "brain_damage"])
def test_clipping_of_one_step_wins_over_the_configuration(name):
    scheduler = made(*ALL[name])
    sample, model_output = tensors()
    clipped, free = (
        scheduler.step(model_output, 20, sample, variance_noise=torch.zeros(SHAPE), clip_sample=clip)
        for clip in (True, False)
    )
    assert clipped.pred_original_sample.abs().max() == 1 and free.pred_original_sample.abs().max() > 1
    # Both forms of the mean are the same where nothing is limited.
    expected = scheduler.posterior_mean(free.pred_original_sample, 20, sample)
    assert_close(free.prev_sample, expected, rtol=1e-4, atol=1e-4)


def test_pyramid_noise_of_the_authors_shares_sizes_and_deviation():
    noise = ANDiScheduler().draw_noise(KEYS, (4, 24, 24))
    assert_close(noise, draw_pyramid(KEYS, (4, 24, 24), per_image=False), rtol=0, atol=0)
    assert_close(noise.std(), torch.tensor(1.0), rtol=0, atol=1e-5)
    named = ANDiScheduler().draw_noise(KEYS, (4, 24, 24), normalize="per_image")
    assert_close(named.flatten(1).std(1), torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AnoDDPMScheduler, {"num_train_timesteps": 10}, "`num_train_timesteps` must be above 20, got 10"),
        (AnoFPDMScheduler, {"num_train_timesteps": 10}, "`num_train_timesteps` must be above 20, got 10"),
        (CIMDScheduler, {"num_train_timesteps": 20}, "`num_train_timesteps` must be above 20, got 20"),
        (CIMDScheduler, {"num_train_timesteps": 1}, "`num_train_timesteps` must be an integer of at least 2, got 1"),
        (AnoDDPMScheduler, {"beta_schedule": "sigmoid"}, "`beta_schedule` must be one of linear, cosine"),
        (CIMDScheduler, {"beta_schedule": "sigmoid"}, "`beta_schedule` must be one of linear, cosine, got 'sigmoid'"),
        (AnoDDPMScheduler, {"variance_type": "learned"}, "`variance_type` must be one of fixed_large, fixed_small"),
        (AnoDDPMScheduler, {"noise_type": "perlin"}, "`noise_type` must be one of gaussian, simplex"),
        (AnoFPDMScheduler, {"beta_start": 0.03}, "`beta_start` must be above 0 and at most `beta_end`"),
        (AnoDDPMScheduler, {"beta_start": 0.03}, "`beta_start` must be above 0 and at most `beta_end`"),
        (DAEScheduler, {"noise_resolution": 0}, "`noise_resolution` must be an integer of at least 1, got 0"),
        (DAEScheduler, {"noise_std": 0}, "`noise_std` must be a finite number and above 0, got 0"),
    ],
)
def test_wrong_settings(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
