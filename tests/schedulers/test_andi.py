import pytest
import torch
from torch.testing import assert_close

from anodiff import ANDiScheduler


SHAPE = (3, 2, 16, 16)
SCHEDULERS = {
    "ANDi": lambda: ANDiScheduler(),
    "ANDi, v": lambda: ANDiScheduler(prediction_type="v_prediction"),
    "ANDi, clipped": lambda: ANDiScheduler(clip_sample=True),
    "UAD-IMAG": lambda: ANDiScheduler(
        num_train_timesteps=1001, beta_schedule="shifted_cosine", prediction_type="v_prediction", clip_sample=True
    ),
}


@pytest.fixture(params=SCHEDULERS, ids=str)
def scheduler(request):
    return SCHEDULERS[request.param]()


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    x0, noise, model_output = torch.rand(SHAPE) * 1.6 - 0.8, torch.randn(SHAPE), torch.randn(SHAPE)
    return x0.to(dtype), noise.to(dtype), model_output.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_kept(scheduler, dtype):
    x0, noise, model_output = tensors(dtype)
    t = torch.tensor([1, 75, 199])
    x_t = scheduler.add_noise(x0, noise, t)
    error = scheduler.mean_error(model_output, t, x_t, x0, noise)
    for tensor in (
        x_t,
        error,
        scheduler.deviation(error),
        scheduler.surprise(error, t),
        scheduler.predict_original_sample(model_output, t, x_t),
        scheduler.predict_epsilon(model_output, t, x_t),
        scheduler.predicted_mean(model_output, t, x_t),
    ):
        assert tensor.shape == SHAPE and tensor.dtype == dtype


def test_mean_error_is_the_difference_of_the_means(scheduler):
    # In float64, where the difference itself has the digits.
    x0, noise, model_output = tensors(torch.float64)
    for t in (torch.tensor([1, 75, 199]), torch.tensor([500, 800, 999])):
        x_t = scheduler.add_noise(x0, noise, t)
        expected = scheduler.posterior_mean(x0, t, x_t) - scheduler.predicted_mean(model_output, t, x_t)
        assert expected.abs().max() > 1e-4
        for known in (noise, None):
            actual = scheduler.mean_error(model_output, t, x_t, x0, known)
            assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_posterior_is_a_conditional_gaussian(scheduler):
    # Regression of x_{t-1} on x_t given x_0, from the forward process alone: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z.
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in (1, 75, 500, 999):
        abar, previous = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1]
        beta = 1 - abar / previous
        slope = (1 - beta).sqrt() * (1 - previous) / (1 - abar)
        assert_close(scheduler.betas[t], beta, rtol=1e-8, atol=0)
        assert_close(scheduler.posterior_mean(zero, t, one).squeeze(), slope, rtol=1e-8, atol=0)
        assert_close(
            scheduler.posterior_mean(one, t, zero).squeeze(), previous.sqrt() - slope * abar.sqrt(), rtol=1e-7, atol=0
        )
        assert_close(scheduler.posterior_variance[t], beta * (1 - previous) / (1 - abar), rtol=1e-8, atol=0)


def test_a_perfect_network_deviates_nowhere(scheduler):
    x0, noise, _ = tensors(torch.float64)
    t = torch.tensor([1, 75, 199])
    x_t = scheduler.add_noise(x0, noise, t)
    output = noise
    if scheduler.config.prediction_type == "v_prediction":
        abar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        output = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    assert_close(scheduler.predict_original_sample(output, t, x_t), x0, rtol=0, atol=1e-12)
    assert_close(scheduler.predict_epsilon(output, t, x_t), noise, rtol=0, atol=1e-12)
    error = scheduler.mean_error(output, t, x_t, x0, noise)
    assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-12)


def test_no_pixel_is_lost_to_cancellation():
    torch.manual_seed(0)
    shape = (64, 1, 64, 64)
    x0, noise = torch.rand(shape) * 2 - 1, torch.randn(shape)
    model_output = noise + 0.01 * torch.randn(shape)
    scheduler = ANDiScheduler(log_floor=0.0)
    t = torch.full((64,), 75)
    x_t = scheduler.add_noise(x0, noise, t)
    direct = scheduler.posterior_mean(x0, t, x_t) - scheduler.predicted_mean(model_output, t, x_t)
    found = scheduler.mean_error(model_output, t, x_t, x0, noise)
    # The card's 0.03 % per timestep, up to 3 % of the pixels over a whole range.
    assert (direct == 0).float().mean() > 1e-4
    assert (found == 0).sum() == (model_output == noise).sum()
    exact = scheduler.mean_error(model_output.double(), t, x_t.double(), x0.double(), noise.double())
    assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_log_floor():
    error = torch.tensor([0.0, 1e-6, -1e-3]).reshape(1, 1, 1, 3)
    floor = ANDiScheduler().config.log_floor
    assert_close(ANDiScheduler().deviation(error).flatten(), torch.tensor([floor, floor, 1e-6]))
    assert_close(ANDiScheduler(log_floor=0.0).deviation(error).flatten(), torch.tensor([0.0, 1e-12, 1e-6]))


def test_grid_of_timesteps():
    scheduler = ANDiScheduler(num_train_timesteps=30)
    assert scheduler.timesteps.tolist() == list(range(29, 0, -1))
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == list(range(29, 0, -1))
    scheduler.set_timesteps(start=5, stop=9)
    assert scheduler.timesteps.tolist() == [8, 7, 6, 5]
    scheduler.set_timesteps(2, start=5, stop=9)
    assert scheduler.timesteps.tolist() == [8, 6]
    scheduler.set_timesteps(1, start=5, stop=10)
    assert scheduler.timesteps.tolist() == [7] and scheduler.num_inference_steps == 1
    for count in range(1, 26):
        scheduler.set_timesteps(count, start=4, stop=29)
        steps = -scheduler.timesteps.diff()
        assert len(scheduler.timesteps) == count and 4 <= scheduler.timesteps[-1] and scheduler.timesteps[0] < 29
        assert count == 1 or 1 <= steps.min() and steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_timesteps": 1}, "`num_train_timesteps` must be an integer of at least 2, got 1"),
        ({"beta_schedule": "cosine"}, "`beta_schedule` must be one of linear, shifted_cosine, got 'cosine'"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "`beta_start` and `beta_end` must satisfy"),
        ({"log_snr_min": 3, "log_snr_max": 3}, "`log_snr_min` must be below `log_snr_max`"),
        ({"resolution_ratio": 0}, "`resolution_ratio` must be a finite number and above 0, got 0"),
        ({"noise_type": "simplex"}, "`noise_type` must be one of pyramid, gaussian, got 'simplex'"),
        ({"discount": -1}, "`discount` must be a finite number and above 0, got -1"),
        ({"normalize": "none"}, "`normalize` must be one of per_batch, per_image, got 'none'"),
        ({"prediction_type": "sample"}, "`prediction_type` must be one of epsilon, v_prediction, got 'sample'"),
        ({"log_floor": -1e-9}, "`log_floor` must be a finite number and at least 0, got -1e-09"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ANDiScheduler(**options)


def test_wrong_calls():
    scheduler = ANDiScheduler()
    with pytest.raises(ValueError, match="1 <= start < stop <= 1000, got 0 and 10. t = 0 has no reverse transition"):
        scheduler.set_timesteps(start=0, stop=10)
    with pytest.raises(ValueError, match="1 <= start < stop <= 1000, got 5 and 1001"):
        scheduler.set_timesteps(start=5, stop=1001)
    with pytest.raises(ValueError, match="between 1 and `stop` - `start` = 5, got 6"):
        scheduler.set_timesteps(6, start=5, stop=10)
