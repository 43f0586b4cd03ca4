"""The UNet on patches of pixels: the arithmetic of a plain one, and what its checkpoints hold."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch.testing import assert_close

from anodiff import AnomalyPipeline, UNet2DPatchesModel

from ..tiny import make_pipeline, make_slices, make_unet


SIZES = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def make(patch_size: int = 2, channels: int = 3, **settings) -> UNet2DPatchesModel:
    torch.manual_seed(0)
    sizes = {"in_channels": channels, "out_channels": channels, **SIZES, **settings}
    return UNet2DPatchesModel(patch_size=patch_size, **sizes).eval()


@torch.no_grad()
@pytest.mark.parametrize(("patch_size", "size"), [(1, (6, 10)), (2, (12, 8)), (3, (12, 18))])
def test_it_is_a_plain_network_of_patches(patch_size, size):
    model = make(patch_size)
    plain = UNet2DModel(in_channels=3 * patch_size**2, out_channels=3 * patch_size**2, **SIZES).eval()
    names = {"conv_in.1.": "conv_in.", "conv_out.0.": "conv_out."}
    weights = model.state_dict()
    for name in list(weights):
        for own, theirs in names.items():
            if name.startswith(own):
                weights[name.replace(own, theirs)] = weights.pop(name)
    plain.load_state_dict(weights)
    sample, timesteps = torch.randn(2, 3, *size), torch.tensor([3, 700])
    patches = plain(F.pixel_unshuffle(sample, patch_size), timesteps).sample
    output = model(sample, timesteps).sample
    assert output.shape == sample.shape
    assert_close(output, F.pixel_shuffle(patches, patch_size), rtol=0, atol=0)
    assert torch.equal(model(sample, timesteps, return_dict=False)[0], output)


def test_a_checkpoint_holds_it(tmp_path):
    model = make(channels=1, sample_size=16)
    assert (model.config.patch_size, model.config.in_channels, model.config.sample_size) == (2, 1, 16)
    pipe = make_pipeline("ANDiPipeline")
    pipe = type(pipe)(**{**pipe.components, "unet": model}, start=75, stop=79)
    pipe.save_pretrained(tmp_path)
    loaded = AnomalyPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is UNet2DPatchesModel
    assert (loaded.unet.config.patch_size, loaded.unet.config.in_channels) == (2, 1)
    slices = make_slices()
    assert torch.equal(loaded(slices, generator=3).anomaly_map, pipe(slices, generator=3).anomaly_map)


def test_every_block_learns():
    model = make().train()
    model.enable_gradient_checkpointing()
    model(torch.randn(2, 3, 8, 8), 5).sample.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.numel() > 1)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="`sample` must have sides divisible by 4"):
        make()(torch.zeros(1, 3, 8, 10), 0)
    with pytest.raises(ValueError, match="`patch_size` must be"):
        make(0)
    # Weights of a plain network do not fit.
    with pytest.raises(RuntimeError, match="conv_in"):
        make().load_state_dict(make_unet().state_dict())
