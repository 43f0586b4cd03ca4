"""Properties of `ClassifierGuidedPipeline`."""

import pytest
import torch

from ..tiny import SIZE, make_classifier, make_pipeline, make_unet, make_volume


def test_guidance_makes_slices_healthier():
    pipe = make_pipeline("ClassifierGuidedPipeline")
    slices = torch.rand(3, 1, SIZE, SIZE) * 2 - 1
    t = torch.zeros(3, dtype=torch.long)
    scores = []
    for scale in (0.0, 20.0, 200.0):
        with torch.no_grad():
            reconstruction = pipe(slices, guidance_scale=scale).reconstruction
            scores.append(pipe.classifier(reconstruction, t).logits.log_softmax(1)[:, 0].mean().item())
    assert scores[0] < scores[1] < scores[2]


def test_gradient_is_that_of_the_healthy_class():
    pipe = make_pipeline("ClassifierGuidedPipeline")
    sample, t = torch.rand(1, 1, SIZE, SIZE), torch.tensor([7])
    gradient = pipe.classifier_gradient(sample, t)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        values = [pipe.classifier(sample + sign * step * direction, t).logits.log_softmax(1)[0, 0] for sign in (-1, 1)]
    torch.testing.assert_close((values[1] - values[0]) / (2 * step), gradient.norm(), rtol=1e-2, atol=1e-5)
    assert all(parameter.grad is None for parameter in pipe.classifier.parameters())


def test_a_variance_that_was_not_learned():
    pipe = make_pipeline("ClassifierGuidedPipeline", unet=make_unet())
    assert pipe(make_volume()).anomaly_map.max() > 0


def test_map_is_the_mean_of_the_chosen_modalities():
    pipe = make_pipeline("ClassifierGuidedPipeline", ("flair", "t1", "t2"))
    slices = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    result = pipe(slices, modalities=("t2", "flair"))
    expected = (slices - result.reconstruction).square()[:, [0, 2]].mean(1)
    torch.testing.assert_close(result.anomaly_map, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": 51}, "`noise_level` must be an integer between 1 and 50, got 51"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number and at least 0, got -1.0"),
        ({"clip_after_guidance": 1}, "`clip_after_guidance` must be one of False, True, got 1"),
        ({"modalities": ("t1",)}, "`modalities` must be different ones of image, got"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline("ClassifierGuidedPipeline")(make_volume(), **arguments)


def test_components_must_fit():
    with pytest.raises(ValueError, match=r"`processor` must have the `value_range` \(-1, 1\)"):
        make_pipeline("ClassifierGuidedPipeline", processor_settings={"value_range": (0.0, 1.0)})
    with pytest.raises(ValueError, match="`classifier` must have 2 `in_channels`, one for each modality, got 1"):
        make_pipeline("ClassifierGuidedPipeline", ("flair", "t1"), classifier=make_classifier(1))
    with pytest.raises(TypeError, match="`classifier` must be a NoisyClassifierModel, got UNet2DModel"):
        make_pipeline("ClassifierGuidedPipeline", classifier=make_unet())
