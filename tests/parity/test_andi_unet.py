"""ANDi's own network with formula weights under its own parameter names against recorded outputs and activations."""

import math

import numpy as np
import pytest
import torch

from anodiff.models.unet_2d_andi import ANDiUNet2DModel

from .recordings import read


OUTPUTS = {"rtol": 0, "atol": 5e-5}
ACTIVATIONS = {"rtol": 1e-5, "atol": 5e-5}  # up to 8, where outputs are of the order of 1


@pytest.fixture(scope="module")
def golden():
    return read("andi/andi_unet.npz")


def formula_weights(golden):
    """The state dict that the recording was made with (README of the fixtures)."""
    state = {}
    for number, (name, shape) in enumerate(zip(golden["param_names"], golden["param_shapes"], strict=True)):
        shape = tuple(map(int, str(shape).split("x")))
        index = np.arange(math.prod(shape), dtype=np.float64)
        values = np.sin(0.7311 * index + 1.3 * number + float(golden["phase"])).reshape(shape)
        if len(shape) > 1:
            values = values * 1.7 / np.sqrt(math.prod(shape[1:]))
        else:
            values = 1 + 0.1 * values if str(name).endswith("weight") else 0.1 * values
        state[str(name)] = torch.from_numpy(values.astype(np.float32))
    return state


def test_outputs_and_activations(golden):
    model = ANDiUNet2DModel(sample_size=golden["x"].shape[-1]).eval()
    model.load_state_dict(model.convert_original_state_dict(formula_weights(golden)))
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        math.prod(map(int, str(shape).split("x"))) for shape in golden["param_shapes"]
    )
    places = {
        "conv_in": model.conv_in,
        "residual_in": model.residual_in,
        "down1": model.down_blocks[0],
        "sa1": model.down_blocks[1].attention,
        "sa3": model.down_blocks[3].attention,
        "bot3": model.mid_out,
        "up4": model.up_blocks[3],
    }
    seen = {}
    for name, module in places.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        output = model(torch.from_numpy(golden["x"]), torch.from_numpy(golden["t"])).sample
    features = model.time_features(torch.from_numpy(golden["t"])).numpy()
    # One ulp of the largest angle, the timestep itself.
    np.testing.assert_allclose(features, golden["time_embedding"], **OUTPUTS)
    np.testing.assert_allclose(seen["sa3"].numpy(), golden["act_sa3"], **ACTIVATIONS)
    np.testing.assert_allclose(seen["up4"][:, 0].numpy(), golden["act_up4_first_channel"], **ACTIVATIONS)
    seen["inc2"] = torch.nn.functional.gelu(seen["conv_in"] + seen["residual_in"])
    for name in ("inc2", "down1", "sa1", "sa3", "bot3", "up4"):
        measured = [seen[name].mean(), seen[name].std(), seen[name].abs().max()]
        np.testing.assert_allclose(measured, golden[f"act_{name}_mean_std_max"], **ACTIVATIONS, err_msg=name)
    np.testing.assert_allclose(output.numpy(), golden["y"], **OUTPUTS)


def test_a_small_one(tmp_path):
    torch.manual_seed(0)
    model = ANDiUNet2DModel(
        sample_size=(8, 16), in_channels=1, out_channels=1, block_out_channels=(4, 8, 8), num_attention_heads=2
    ).eval()
    images = torch.randn(3, 1, 8, 16)
    with torch.no_grad():
        output = model(images, torch.tensor([3, 3, 3])).sample
        assert output.shape == images.shape
        torch.testing.assert_close(model(images, 3, return_dict=False)[0], output)
        torch.testing.assert_close(model(images[1:2], 3).sample, output[1:2], rtol=0, atol=1e-5)
        assert (model(images, 4).sample - output).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(ANDiUNet2DModel.from_pretrained(tmp_path)(images, 3).sample, output)
    with pytest.raises(ValueError, match="sides divisible by 4"):
        model(images[..., :6], 3)
    with pytest.raises(ValueError, match="`num_attention_heads` must divide"):
        ANDiUNet2DModel(block_out_channels=(4, 8, 8), num_attention_heads=3)
