"""AnoFPDM's calibration against arrays recorded from its program: from curves, and from slices with the recordings' noise model.

Left out: `diff_min`, which the original computes and never uses.
"""

import numpy as np
import pytest
import torch

from anodiff import AnoFPDMPipeline, AnoFPDMScheduler, VolumeProcessor
from anodiff.pipelines.running_maps import similarity_threshold

from .recordings import ToyUNet, load, over


CONSTANTS = {"rtol": 0, "atol": 1e-5}


def pipeline(arrays: dict, channels: int, modality: torch.Tensor, steps, forward_steps, scale, prefix="", **settings):
    names = tuple(f"m{number}" for number in range(channels))
    pipe = AnoFPDMPipeline(
        ToyUNet(arrays, prefix=f"{prefix}toy_"),
        AnoFPDMScheduler(steps.item()),
        VolumeProcessor(modalities=names),
        forward_steps=forward_steps.item(),
        guidance_scale=scale.item(),
        modalities=tuple(names[channel] for channel in modality),
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@over("anofpdm/fpdm_calibration*.npz")
def test_threshold_of_curves(path):
    arrays = load(path)
    curves = (arrays["mse"].mean(2), arrays["mse_null"].mean(2))
    similarity = torch.nn.functional.cosine_similarity(*curves, dim=1, eps=1e-6)
    torch.testing.assert_close(similarity, arrays["cos_sim"], **CONSTANTS)
    threshold, wrong = similarity_threshold(similarity, arrays["lab"])
    assert threshold == pytest.approx(arrays["thr_01"].item(), abs=1e-5)
    assert wrong == arrays["n_min"].item()
    largest = arrays["diff"].amax(1)[arrays["lab"] == 1].amax(0)
    torch.testing.assert_close(largest, arrays["diff_max"], **CONSTANTS)


@over("anofpdm/fpdm_calibration*.npz")
@pytest.mark.parametrize("batch_size", [3, 16])
def test_calibrate(path, batch_size):
    arrays = load(path)
    images, labels = arrays["e2e_x"], arrays["e2e_lab"]
    settings = [arrays[f"e2e_{name}"] for name in ("modality", "T", "forward_steps", "w")]
    pipe = pipeline(arrays, images.shape[2], *settings, prefix="e2e_", threshold=0.5)
    # A recorded batch stands for a subject; slices are numbered through, so that each finds its noise.
    numbers = torch.arange(labels.numel()).reshape(labels.shape)
    slices = [
        {"image": image, "brain": image[:, 0] > -2, "label": label.numpy(), "slice": number.tolist()}
        for image, label, number in zip(images, labels, numbers, strict=True)
    ]
    noise = arrays["e2e_noise_t0"].flatten(0, 1)[None]
    record = pipe.calibrate(slices, noise=noise, batch_size=batch_size)
    assert pipe.config.similarity_threshold == pytest.approx(arrays["e2e_thr_01"].item(), abs=1e-5)
    np.testing.assert_allclose(pipe.config.gap_scale, arrays["e2e_diff_max"], **CONSTANTS)
    assert pipe.config.threshold is None, "a threshold would be used instead of the method's own masks"
    (candidate,) = record["candidates"]
    assert candidate["wrong_labels"] == arrays["e2e_n_min"].item()
    assert record["image_accuracy"] == pytest.approx(1 - arrays["e2e_n_min"].item() / labels.numel())


@over("anofpdm/fpdm_end_to_end*.npz")
def test_recorded_constants_in_the_configuration(path):
    arrays = load(path)
    """Constants that were calibrated on other slices decide labels and masks, whole chain."""
    settings = [arrays[name] for name in ("modality", "T", "forward_steps", "w")]
    pipe = pipeline(arrays, arrays["x0"].shape[1], *settings)
    pipe.register_to_config(similarity_threshold=arrays["thr_01"].item(), gap_scale=arrays["diff_max"].tolist())

    values = {**pipe.default_settings(), "gate_by_label": False}
    result = pipe.compute_maps(
        arrays["x0"], list(range(len(arrays["x0"]))), seed=0, batch_size=4, noise=arrays["noise_t0"][None], **values
    )
    torch.testing.assert_close(result.details["label"], arrays["pred_lab"], rtol=0, atol=0)
    expected = arrays["unhealthy_mask"][:, 0].bool()
    torch.testing.assert_close(result.masks[arrays["lab"] == 1], expected, rtol=0, atol=0)
    gated = result.masks & result.details["label"].bool()[:, None, None]
    torch.testing.assert_close(gated, arrays["mixed_mask"][:, 0].bool(), rtol=0, atol=0)
