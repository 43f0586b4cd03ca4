"""Properties of `DDIBPipeline`."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import AnoFPDMScheduler, AnomalyPipeline, DDIBPipeline, VolumeProcessor


SIZE = 16


def make_pipeline(names=("image",), **settings) -> DDIBPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=len(names),
        out_channels=len(names),
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    processor = VolumeProcessor(modalities=names, size=(SIZE, SIZE))
    values = {"forward_steps": 6, "median_size": 0, "min_component_size": 0, **settings}
    pipe = DDIBPipeline(unet, AnoFPDMScheduler(50), processor, **values)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_volume(shape=(18, 20, 5), seed=0) -> np.ndarray:
    volume = np.random.default_rng(seed).random(shape).astype(np.float32) + 0.1
    volume[:3] = 0
    return volume


def assert_same_map(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_batch_size_and_seed_do_not_matter():
    pipe = make_pipeline(("flair", "t1"))
    volume = {"flair": make_volume(seed=1), "t1": make_volume(seed=2)}
    maps = [pipe(volume, batch_size=size, generator=size).anomaly_map for size in (1, 2, 16)]
    assert maps[0].max() > 0
    for other in maps[1:]:
        assert_same_map(other, maps[0])


def test_evaluations_and_classes():
    pipe = make_pipeline()
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
    pipe = make_pipeline()
    torch.nn.init.zeros_(pipe.unet.class_embedding.weight)
    slices = torch.rand(2, 1, SIZE, SIZE) - 0.5
    result = pipe(slices, guidance_scale=3.0)
    guided = make_pipeline()(slices, guidance_scale=3.0)
    assert result.anomaly_map.mean() < 0.1 * guided.anomaly_map.mean()


def test_map_is_the_mean_of_the_chosen_modalities():
    pipe = make_pipeline(("flair", "t1", "t2"))
    slices = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    result = pipe(slices, modalities=("t2", "flair"))
    expected = (slices - result.reconstruction).square()[:, [0, 2]].mean(1)
    torch.testing.assert_close(result.anomaly_map, expected)
    assert (pipe(slices).anomaly_map - result.anomaly_map).abs().max() > 0
    assert result.settings["modalities"] == ("t2", "flair")


def test_save_and_load_gives_the_same_map(tmp_path):
    pipe = make_pipeline(("flair", "t1"), threshold=0.3, median_size=3, guidance_scale=2.0, modalities=("t1",))
    volume = {"flair": make_volume(seed=1), "t1": make_volume(seed=2)}
    expected = pipe(volume)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["anodiff", "AnoFPDMScheduler"] and index["unet"] == ["diffusers", "UNet2DModel"]
    for loaded in (DDIBPipeline.from_pretrained(tmp_path), AnomalyPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is DDIBPipeline
        loaded.set_progress_bar_config(disable=True)
        assert_same_map(loaded(volume).anomaly_map, expected.anomaly_map)
        assert loaded.config.guidance_scale == 2.0 and list(loaded.config.modalities) == ["t1"]


def test_every_kind_of_volume_gives_the_same_map(tmp_path):
    pipe = make_pipeline()
    array = make_volume()
    image = nib.Nifti1Image(array, np.eye(4))
    nib.save(image, tmp_path / "scan.nii.gz")
    expected = pipe(array).anomaly_map
    assert expected.shape == array.shape and expected.dtype == np.float32 and expected.max() > 0
    for volume in (image, tmp_path / "scan.nii.gz", {"image": image}):
        np.testing.assert_allclose(pipe(volume).anomaly_map, expected, rtol=0, atol=1e-6 * expected.max())
    np.testing.assert_array_equal(pipe([array, image])[1].anomaly_map, expected)
    assert isinstance(pipe(array, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_steps": 0}, "`forward_steps` must be an integer between 1 and 50, got 0"),
        ({"forward_steps": 51}, "`forward_steps` must be an integer between 1 and 50, got 51"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number and at least 0, got -1.0"),
        ({"modalities": ("t1",)}, "`modalities` must be different ones of image, got"),
        ({"modalities": "image"}, "`modalities` must be different ones of image, got 'image'"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_the_range_of_the_network():
    with pytest.raises(ValueError, match=r"`value_range` \(-1, 1\)"):
        pipe = make_pipeline()
        DDIBPipeline(pipe.unet, pipe.scheduler, VolumeProcessor(value_range=(0.0, 1.0)), forward_steps=6)
