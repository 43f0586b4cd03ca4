"""Properties of `ClassifierGuidedPipeline`."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import AnoFPDMScheduler, AnomalyPipeline, ClassifierGuidedPipeline, NoisyClassifierModel, VolumeProcessor


SIZE = 16


def make_pipeline(names=("image",), learned_variance=True, **settings) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    channels = len(names)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=2 * channels if learned_variance else channels,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    classifier = NoisyClassifierModel(
        SIZE,
        channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        attention_levels=(),
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    for parameter in classifier.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    processor = VolumeProcessor(modalities=names, size=(SIZE, SIZE))
    values = {"noise_level": 5, "guidance_scale": 1.0, "median_size": 0, "min_component_size": 0, **settings}
    pipe = ClassifierGuidedPipeline(unet, classifier, AnoFPDMScheduler(50), processor, **values)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_volume(shape=(18, 20, 5), seed=0) -> np.ndarray:
    volume = np.random.default_rng(seed).random(shape).astype(np.float32) + 0.1
    volume[:3] = 0
    return volume


def assert_same_map(actual, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_batch_size_does_not_matter_and_the_seed_does():
    pipe = make_pipeline(("flair", "t1"))
    volume = {"flair": make_volume(seed=1), "t1": make_volume(seed=2)}
    maps = [pipe(volume, batch_size=size).anomaly_map for size in (1, 2, 16)]
    assert maps[0].max() > 0
    for other in maps[1:]:
        assert_same_map(other, maps[0])
    other = pipe(volume, generator=1).anomaly_map
    assert np.abs(other - maps[0]).max() > 0.01 * maps[0].max()


def test_noise_replaces_the_draws_of_the_slices():
    pipe = make_pipeline()
    slices, noise = torch.rand(3, 1, SIZE, SIZE) * 2 - 1, torch.randn(1, 3, 1, SIZE, SIZE)
    brain = torch.ones(3, SIZE, SIZE, dtype=torch.bool)
    brain[1] = False  # slices keep their numbers
    expected = pipe(slices, noise=noise).anomaly_map
    assert_same_map(pipe(slices, noise=noise, brain_mask=brain).anomaly_map[2], expected[2])


def test_guidance_makes_slices_healthier():
    pipe = make_pipeline()
    slices = torch.rand(3, 1, SIZE, SIZE) * 2 - 1
    t = torch.zeros(3, dtype=torch.long)
    scores = []
    for scale in (0.0, 20.0, 200.0):
        with torch.no_grad():
            reconstruction = pipe(slices, guidance_scale=scale).reconstruction
            scores.append(pipe.classifier(reconstruction, t).logits.log_softmax(1)[:, 0].mean().item())
    assert scores[0] < scores[1] < scores[2]


def test_gradient_is_that_of_the_healthy_class():
    pipe = make_pipeline()
    sample, t = torch.rand(1, 1, SIZE, SIZE), torch.tensor([7])
    gradient = pipe.classifier_gradient(sample, t)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        values = [pipe.classifier(sample + sign * step * direction, t).logits.log_softmax(1)[0, 0] for sign in (-1, 1)]
    torch.testing.assert_close((values[1] - values[0]) / (2 * step), gradient.norm(), rtol=1e-2, atol=1e-5)
    assert all(parameter.grad is None for parameter in pipe.classifier.parameters())


def test_a_variance_that_was_not_learned():
    pipe = make_pipeline(learned_variance=False)
    assert pipe(make_volume()).anomaly_map.max() > 0


def test_map_is_the_mean_of_the_chosen_modalities():
    pipe = make_pipeline(("flair", "t1", "t2"))
    slices = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    result = pipe(slices, modalities=("t2", "flair"))
    expected = (slices - result.reconstruction).square()[:, [0, 2]].mean(1)
    torch.testing.assert_close(result.anomaly_map, expected)


def test_save_and_load_gives_the_same_map(tmp_path):
    pipe = make_pipeline(threshold=0.3, median_size=3, guidance_scale=3.0)
    expected = pipe(make_volume())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["classifier"] == ["anodiff", "NoisyClassifierModel"]
    for loaded in (ClassifierGuidedPipeline.from_pretrained(tmp_path), AnomalyPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is ClassifierGuidedPipeline
        loaded.set_progress_bar_config(disable=True)
        assert_same_map(loaded(make_volume()).anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": 51}, "`noise_level` must be an integer between 1 and 50, got 51"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number and at least 0, got -1.0"),
        ({"clip_after_guidance": 1}, "`clip_after_guidance` must be one of False, True, got 1"),
        ({"modalities": ("t1",)}, "`modalities` must be different ones of image, got"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"noise": torch.zeros(1, 5, 1, SIZE, SIZE), "generator": 1}, "either `noise` or `generator`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_components_must_fit():
    pipe = make_pipeline()
    components = {name: pipe.components[name] for name in ("unet", "classifier", "scheduler")} | {"noise_level": 5}
    with pytest.raises(ValueError, match=r"`processor` must have the `value_range` \(-1, 1\)"):
        ClassifierGuidedPipeline(**components, processor=VolumeProcessor(value_range=(0.0, 1.0)))
    other = make_pipeline(("flair", "t1"))
    with pytest.raises(ValueError, match="`classifier` must have 2 `in_channels`, one for each modality, got 1"):
        ClassifierGuidedPipeline(**{**components, "unet": other.unet}, processor=other.processor)
    with pytest.raises(TypeError, match="`classifier` must be a NoisyClassifierModel, got UNet2DModel"):
        ClassifierGuidedPipeline(**{**components, "classifier": pipe.unet}, processor=pipe.processor)
