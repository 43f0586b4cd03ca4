"""What is particular to `AnoFPDMScheduler`; what it shares with others is in test_contract.py."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from anodiff import AnoFPDMScheduler


SHAPE = (3, 2, 16, 16)


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)


@pytest.mark.parametrize("stride", [1, 3])
def test_encoding_inverts_decoding(stride):
    # With one noise for both directions, and nothing limited.
    sample, model_output = tensors(torch.float64)
    scheduler = AnoFPDMScheduler(100)
    scheduler.set_timesteps(40, stride=stride)
    t = torch.tensor([12, 3, 30])
    encoded = scheduler.encode_step(model_output, t, sample, clip_sample=False)
    decoded = scheduler.step(model_output, t + stride, encoded, clip_sample=False)
    assert_close(decoded.prev_sample, sample, rtol=1e-10, atol=1e-10)
    assert (encoded - sample).abs().max() > 0.01


def test_grid_with_a_stride_begins_at_zero():
    scheduler = AnoFPDMScheduler(100)
    scheduler.set_timesteps(10, stride=4)
    assert scheduler.timesteps.tolist() == [8, 4, 0] and scheduler.num_inference_steps == 3
    scheduler.set_timesteps(9, stride=4)
    assert scheduler.timesteps.tolist() == [8, 4, 0]
    scheduler.set_timesteps(8, stride=4)
    assert scheduler.timesteps.tolist() == [4, 0]
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == list(range(7, -1, -1)) and scheduler.stride == 1


@pytest.mark.parametrize("stride", [1, 3])
def test_ends_of_the_grid_are_image_and_noise(stride):
    sample, model_output = tensors()
    scheduler = AnoFPDMScheduler(100)
    scheduler.set_timesteps(stride=stride)
    last = scheduler.step(model_output, 0, sample)
    assert_close(last.prev_sample, last.pred_original_sample, rtol=0, atol=0)
    encoded = scheduler.encode_step(model_output, 99, sample)
    original = scheduler.predict_original_sample(model_output, 99, sample)
    assert_close(encoded, scheduler.predict_epsilon(original, 99, sample), rtol=0, atol=0)


@pytest.mark.parametrize("clip", [True, False])
def test_step_is_that_of_diffusers(clip):
    sample, model_output = tensors(torch.float64)
    ours = AnoFPDMScheduler(clip_sample=clip)
    theirs = DDIMScheduler(trained_betas=ours.betas.numpy(), clip_sample=clip, set_alpha_to_one=True)
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.set_timesteps(50)
    ours.set_timesteps(stride=20)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for t in (980, 500, 20, 0):
        actual = ours.step(model_output, t, sample)
        expected = theirs.step(model_output, t, sample, use_clipped_model_output=True)
        assert_close(actual.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)
        assert_close(actual.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-9)


def test_noise_fits_the_limited_estimate():
    sample, model_output = tensors(torch.float64)
    scheduler = AnoFPDMScheduler()
    original = scheduler.predict_original_sample(model_output, 300, sample)
    assert original.abs().max() == 1
    epsilon = scheduler.predict_epsilon(original, 300, sample)
    assert_close(scheduler.add_noise(original, epsilon, 300), sample, rtol=1e-10, atol=1e-10)
    assert (epsilon - model_output).abs().max() > 0.1
    free = scheduler.predict_original_sample(model_output, 300, sample, clip_sample=False)
    assert_close(scheduler.predict_epsilon(free, 300, sample), model_output, rtol=1e-9, atol=1e-9)


def test_wrong_arguments():
    scheduler = AnoFPDMScheduler(100)
    with pytest.raises(ValueError, match="`stride` must be an integer between 1 and 10, got 11"):
        scheduler.set_timesteps(10, stride=11)
