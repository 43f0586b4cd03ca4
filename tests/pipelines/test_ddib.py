"""Properties of `DDIBPipeline`."""

import pytest
import torch

from ..tiny import SIZE, make_pipeline, make_volume


def test_evaluations_and_classes():
    pipe = make_pipeline("DDIBPipeline")
    seen = []
    forward = pipe.unet.forward

    def recording(sample, timesteps, labels):
        seen.append((timesteps.tolist(), labels.tolist()))
        return forward(sample, timesteps, labels)

    pipe.unet.forward = recording
    pipe(torch.rand(2, 1, SIZE, SIZE) * 2 - 1)
    up, down = seen[:6], seen[6:]
    assert up == [([t] * 2, [2, 2]) for t in range(6)]
    assert down == [([t] * 4, [0, 0, 2, 2]) for t in range(5, -1, -1)]


def test_without_guidance_to_a_class_the_way_back_nearly_undoes_the_way_there():
    # With w = -1 the way down would be unconditional, too; here all classes are one.
    pipe = make_pipeline("DDIBPipeline")
    torch.nn.init.zeros_(pipe.unet.class_embedding.weight)
    slices = torch.rand(2, 1, SIZE, SIZE) - 0.5
    result = pipe(slices, guidance_scale=3.0)
    guided = make_pipeline("DDIBPipeline")(slices, guidance_scale=3.0)
    assert result.anomaly_map.mean() < 0.1 * guided.anomaly_map.mean()


def test_map_is_the_mean_of_the_chosen_modalities():
    pipe = make_pipeline("DDIBPipeline", ("flair", "t1", "t2"))
    slices = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    result = pipe(slices, modalities=("t2", "flair"))
    expected = (slices - result.reconstruction).square()[:, [0, 2]].mean(1)
    torch.testing.assert_close(result.anomaly_map, expected)
    assert (pipe(slices).anomaly_map - result.anomaly_map).abs().max() > 0
    assert result.settings["modalities"] == ("t2", "flair")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_steps": 0}, "`forward_steps` must be an integer between 1 and 50, got 0"),
        ({"forward_steps": 51}, "`forward_steps` must be an integer between 1 and 50, got 51"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number and at least 0, got -1.0"),
        ({"modalities": ("t1",)}, "`modalities` must be different ones of image, got"),
        ({"modalities": "image"}, "`modalities` must be different ones of image, got 'image'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline("DDIBPipeline")(make_volume(), **arguments)


def test_the_range_of_the_network():
    with pytest.raises(ValueError, match=r"`value_range` \(-1, 1\)"):
        make_pipeline("DDIBPipeline", processor_settings={"value_range": (0.0, 1.0)})
