"""AnoFPDM's networks with formula weights under their own parameter names against recorded outputs, and its training losses.

Of `training_loss` everything is compared. The sizes of the networks follow from the names and shapes of the parameters, except for the
number of heads, which the README of the fixtures states.
"""

import math

import numpy as np
import pytest
import torch

from anodiff import AnoFPDMScheduler, AnoFPDMUNet2DModel, NoisyClassifierModel, UNet2DHeadsModel
from anodiff.training.objective_guided import drop_labels, learned_sigma_loss
from anodiff.training.optimization import make_ema
from anodiff.training.options import EMAOptions

from .recordings import ToyUNet, load, network_sizes, read, unet_levels


HEADS, HEAD_DIM = 4, 16  # README: 4 heads in the UNets, heads of 16 channels in the classifier


OUTPUTS = {"rtol": 0, "atol": 1e-4}


def tensors(golden: dict, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(golden[name])) for name in names]


def formula_weights(golden: dict) -> dict[str, torch.Tensor]:
    """The state dict that the recording was made with (README of the fixtures)."""
    state = {}
    for number, (name, text) in enumerate(zip(map(str, golden["param_names"]), golden["param_shapes"], strict=True)):
        shape = tuple(map(int, str(text).split(",")))
        index = np.arange(math.prod(shape), dtype=np.float64)
        values = np.sin(0.37 * index * (1 + 0.01 * (number % 17)) + 1.7 * number).reshape(shape)
        if len(shape) > 1:
            gain = 3 if name.startswith(("label_emb", "class_emb", "time_embed")) else 1
            values = values * gain / np.sqrt(math.prod(shape[1:]))
        else:
            values = 0.1 * values + (1 if name.endswith("weight") else 0)
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def make_unet_v2() -> tuple[dict, AnoFPDMUNet2DModel]:
    golden = read("anofpdm/unet_v2.npz")
    state = formula_weights(golden)
    sizes, attention = network_sizes(state, unet_levels(state))
    model = AnoFPDMUNet2DModel(
        sample_size=golden["x"].shape[-1],
        **sizes,
        out_channels=len(state["out.2.weight"]),
        num_classes=len(state["label_emb.weight"]),
        attention_levels=tuple(level for level, attends in enumerate(attention) if attends),
        num_attention_heads=HEADS,
    ).eval()
    model.load_state_dict(model.convert_original_state_dict(state))
    assert sum(parameter.numel() for parameter in model.parameters()) == int(golden["n_params"])
    return golden, model


def test_unet_v2():
    golden, model = make_unet_v2()
    x, t = tensors(golden, "x", "t")
    np.testing.assert_allclose(model.time_features(t).numpy(), golden["temb"], **OUTPUTS)
    classes = model.config.num_classes
    every = torch.full((len(x),), 1)
    with torch.no_grad():
        for name, labels in (
            ("out_null", classes * every),
            ("out_y0", 0 * every),
            ("out_y1", every),
            ("out_y01", torch.arange(len(x)) % classes),
        ):
            output = model(x, t, labels).sample
            np.testing.assert_allclose(output.numpy(), golden[name], **OUTPUTS, err_msg=name)
        vector = model.class_projection(model.class_embedding(torch.arange(classes)))
    np.testing.assert_allclose(vector.numpy(), golden["cemb"], **OUTPUTS)
    # The label matters in the recording.
    assert np.abs(golden["out_y0"] - golden["out_null"]).max() > 2 * OUTPUTS["atol"]


def test_unet_v1():
    golden = read("anofpdm/unet_v1.npz")
    state = formula_weights(golden)
    sizes, attention = network_sizes(state, unet_levels(state))
    model = UNet2DHeadsModel(
        sample_size=golden["x"].shape[-1],
        **sizes,
        out_channels=len(state["out.2.weight"]),
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        downsample_type="conv",
        upsample_type="conv",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        flip_sin_to_cos=True,
        num_attention_heads=HEADS,
    ).eval()
    model.load_state_dict(model.convert_original_state_dict(state))
    assert sum(parameter.numel() for parameter in model.parameters()) == int(golden["n_params"])
    # A label embedding that the network does not use is left out.
    unused = {**state, "label_emb.weight": torch.zeros(2, len(state["time_embed.2.bias"]))}
    assert model.convert_original_state_dict(unused).keys() == model.state_dict().keys()
    x, t = tensors(golden, "x", "t")
    with torch.no_grad():
        output = model(x, t).sample
        np.testing.assert_allclose(model.time_proj(t).numpy(), golden["temb"], **OUTPUTS)
    np.testing.assert_allclose(output.numpy(), golden["out"], **OUTPUTS)


def test_classifier():
    golden = read("anofpdm/classifier_net.npz")
    state = formula_weights(golden)
    # The pool has a parameter per position, and one for their mean.
    positions = state["out.2.positional_embedding"].shape[1] - 1
    levels = 1 + round(math.log(golden["x"][0, 0].size / positions, 4))
    sizes, attention = network_sizes(state, levels)
    model = NoisyClassifierModel(
        sample_size=golden["x"].shape[-1],
        **sizes,
        num_classes=len(state["out.2.c_proj.weight"]),
        attention_levels=tuple(level for level, attends in enumerate(attention) if attends),
        attention_head_dim=HEAD_DIM,
    ).eval()
    model.load_state_dict(model.convert_original_state_dict(state))
    x, t, y = tensors(golden, "x", "t", "y")
    x.requires_grad_()
    logits = model(x, t).logits
    np.testing.assert_allclose(logits.detach().numpy(), golden["logits"], **OUTPUTS)
    entropy = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    np.testing.assert_allclose(entropy.detach().numpy(), golden["cross_entropy"], **OUTPUTS)
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), x)
    np.testing.assert_allclose(gradient.numpy(), golden["grad_logp_y0"], **OUTPUTS)


def test_label_dropout():
    golden, model = make_unet_v2()
    x, t, draws = tensors(golden, "x", "t", "train_rand")
    repeats = len(draws) // len(x)
    labels = drop_labels(torch.arange(len(draws)) % 2, draws, float(golden["train_threshold"]))
    assert 0 < (labels == 2).sum() < len(labels)
    with torch.no_grad():
        output = model(x.repeat(repeats, 1, 1, 1), t.repeat(repeats), labels).sample
    np.testing.assert_allclose(output.numpy(), golden["out_train_drop"], **OUTPUTS)


def test_learned_sigma_loss():
    golden = read("anofpdm/training_loss.npz")
    x0, noise, t = tensors(golden, "x0", "noise", "t")
    unet = ToyUNet(load("anofpdm/training_loss.npz"), prefix="toyls_")
    error, bound = learned_sigma_loss(unet, AnoFPDMScheduler(int(unet.steps)), x0, noise, t)
    np.testing.assert_allclose(error.detach().numpy(), golden["ls_mse"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(bound.detach().numpy(), golden["ls_vb"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((error + bound).detach().numpy(), golden["ls_loss"], rtol=1e-5)
    # The bound teaches the second half of the outputs only.
    (gradient,) = torch.autograd.grad(bound.sum(), unet.bias)
    channels = x0.shape[1]
    assert (gradient[:channels] == 0).all() and (gradient[channels:] != 0).all()


def test_noise_loss():
    golden = read("anofpdm/training_loss.npz")
    x0, noise, t = tensors(golden, "x0", "noise", "t")
    unet = ToyUNet(load("anofpdm/training_loss.npz"))
    with torch.no_grad():
        output = unet(AnoFPDMScheduler(int(unet.steps)).add_noise(x0, noise, t), t).sample
    for name in ("mse", "loss"):
        np.testing.assert_allclose((output - noise).square().mean((1, 2, 3)).numpy(), golden[name], rtol=0, atol=1e-5)


def test_average_of_the_weights():
    golden = read("anofpdm/training_loss.npz")
    before, source = tensors(golden, "ema_target_before", "ema_source")
    weight = torch.nn.Parameter(before.clone())
    # The rate is stated in the README.
    ema = make_ema([weight], EMAOptions(decay=0.9999, warmup=False))
    weight.data.copy_(source)
    for _ in range(3):
        ema.step([weight])
    np.testing.assert_allclose(ema.shadow_params[0].numpy(), golden["ema_target_after3"], rtol=0, atol=1e-6)


def test_a_small_one_of_each(tmp_path):
    torch.manual_seed(0)
    small = {"in_channels": 1, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4}
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    unet = AnoFPDMUNet2DModel(sample_size=8, out_channels=1, attention_levels=(1,), **small).eval()
    classifier = NoisyClassifierModel(sample_size=8, attention_levels=(), attention_head_dim=4, **small).eval()
    for model in (unet, classifier):
        for parameter in model.parameters():  # branches that begin with zero would hide everything behind them
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        for number, (model, more) in enumerate(((unet, labels), (classifier, None))):
            given = [] if more is None else [more]
            (output,) = model(images, torch.tensor([3, 3, 3]), *given, return_dict=False)
            torch.testing.assert_close(model(images, 3, *given, return_dict=False)[0], output)
            one = model(images[1:2], 3, *[item[1:2] for item in given], return_dict=False)[0]
            torch.testing.assert_close(one, output[1:2], rtol=1e-5, atol=1e-5)
            assert (model(images, 400, *given, return_dict=False)[0] - output).abs().max() > 1e-4
            model.save_pretrained(tmp_path / str(number))
            loaded = type(model).from_pretrained(tmp_path / str(number))
            torch.testing.assert_close(loaded(images, 3, *given, return_dict=False)[0], output)
        # Each class gives another output, none of them included.
        outputs = [unet(images[:1], 3, labels[index : index + 1]).sample for index in range(3)]
        assert min((outputs[i] - outputs[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4
    for wrong, message in (
        (lambda: unet(images[..., :7], 3, labels), "sides divisible by 2"),
        (lambda: classifier(images[..., :4], 3), "`sample` must have the size 8"),
        (
            lambda: AnoFPDMUNet2DModel(**small, attention_levels=(2,)),
            "`attention_levels` must be an integer between 0 and 1",
        ),
        (
            lambda: AnoFPDMUNet2DModel(**small, attention_levels=(1,), num_attention_heads=3),
            "`num_attention_heads` must",
        ),
        (lambda: NoisyClassifierModel(sample_size=9, **small), "`sample_size` must have sides divisible by 2"),
        (lambda: NoisyClassifierModel(8, **small, attention_levels=(1,)), "`attention_head_dim` must divide"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
