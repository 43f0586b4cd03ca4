"""CIMD's encoders, the terms of its loss with their gradients, and its updates against arrays recorded from the original program."""

import torch

from anodiff import CIMDScheduler
from anodiff.models.gaussian_encoder import GaussianEncoder, gaussian_divergence
from anodiff.training.objective_cimd import UNetWithEncoders, cimd_loss_terms
from anodiff.training.optimization import make_ema, make_optimizer
from anodiff.training.options import EMAOptions, OptimOptions

from .recordings import ToySegmentationUNet, load, over


KL_WEIGHT = 1e-3  # the original divides by 1000


def make_encoder(arrays: dict, prefix: str) -> GaussianEncoder:
    encoder = GaussianEncoder(
        block_out_channels=tuple(arrays["num_filters"].tolist()),
        layers_per_block=int(arrays["no_convs_per_block"]),
        latent_dim=int(arrays["latent_dim"]),
    ).double()
    names = {"encoder.layers.": "layers.", "conv_layer.": "head."}
    state = {}
    for name, values in arrays.items():
        for old, new in names.items():
            if name.startswith(f"{prefix}.{old}"):
                state[new + name.removeprefix(f"{prefix}.{old}")] = values
    encoder.load_state_dict(state)
    return encoder


def make_model(arrays: dict) -> UNetWithEncoders:
    model = UNetWithEncoders(ToySegmentationUNet(arrays, int(arrays["T"])))
    model.label_encoder = make_encoder(arrays, "posterior").requires_grad_(False)
    model.output_encoder = make_encoder(arrays, "prior").requires_grad_(False)
    return model


def loss_terms(model: UNetWithEncoders, arrays: dict, noise: torch.Tensor, t: torch.Tensor) -> dict:
    terms = cimd_loss_terms(
        model,
        CIMDScheduler(int(arrays["T"])),
        arrays["image"],
        arrays["binary"].double(),
        noise,
        t,
        label=arrays["label"],
        with_kl=True,
    )
    terms["kl"] = KL_WEIGHT * terms["kl"]
    return terms | {"loss": terms["mse"] + terms["vb"] + terms["kl"]}


@over("cimd/encoder_kl*.npz")
def test_encoders(path):
    arrays = load(path)
    moments = {}
    for prefix, other in (("posterior", "mask"), ("prior", "eps_pred")):
        mean, log_std = moments[prefix] = make_encoder(arrays, prefix)(arrays["image"], arrays[other])
        torch.testing.assert_close(mean, arrays[f"{prefix}_mu"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_std.exp(), arrays[f"{prefix}_sigma"], rtol=1e-12, atol=1e-12)
    divergence = gaussian_divergence(*moments["posterior"], *moments["prior"])
    torch.testing.assert_close(divergence, arrays["kl"], rtol=1e-12, atol=1e-12)


@over("cimd/training_loss*.npz")
def test_loss_and_gradients(path):
    arrays = load(path)
    assert arrays["t"][0] == 0  # the term of the likelihood
    assert torch.equal(arrays["label"] > 0, arrays["binary"].bool())
    untouched = arrays["label"].clone(), arrays["binary"].clone()
    model = make_model(arrays)
    image, t = arrays["image"], arrays["t"]
    sample = CIMDScheduler(int(arrays["T"])).add_noise(arrays["binary"].double(), arrays["noise"], t)
    torch.testing.assert_close(sample, arrays["x_t"], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model.unet(torch.cat([image, sample], 1), t).sample[:, :1], arrays["eps_pred"], rtol=0, atol=1e-6
    )
    for encoder, prefix, other in (
        (model.label_encoder, "posterior", "label"),
        (model.output_encoder, "prior", "eps_pred"),
    ):
        mean, log_std = encoder(image, arrays[other])
        torch.testing.assert_close(mean, arrays[f"{prefix}_mu"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_std.exp(), arrays[f"{prefix}_sigma"], rtol=1e-10, atol=1e-10)

    terms = loss_terms(model, arrays, arrays["noise"], t)
    tolerances = {"mse": (0, 1e-6), "vb": (3e-6, 1e-6), "kl": (0, 1e-9), "loss": (1e-6, 3e-6)}
    for name, (rtol, atol) in tolerances.items():
        torch.testing.assert_close(terms[name].double(), arrays[name], rtol=rtol, atol=atol)
        gradients = torch.autograd.grad(terms[name].mean(), [model.unet.weight, model.unet.bias], retain_graph=True)
        for actual, which in zip(gradients, "Wb", strict=True):
            torch.testing.assert_close(actual, arrays[f"grad_{name}_{which}"], rtol=1e-5, atol=1e-6)
            # The bound teaches the variance alone, the divergence the noise alone.
            silent = {"vb": actual[0], "kl": actual[1]}.get(name, torch.zeros(1))
            assert (silent == 0).all()
        small = {"kl": 1e-10, "vb": 1e-9}.get(name, 1e-6)
        torch.testing.assert_close(gradients[1], arrays[f"grad_{name}_b"], rtol=1e-4, atol=small)
    # Nothing was written into what came.
    assert torch.equal(arrays["label"], untouched[0]) and torch.equal(arrays["binary"], untouched[1])


@over("cimd/train_steps*.npz")
def test_updates(path):
    arrays = load(path)
    # They go on from the batch, the network and the encoders of the recording of the loss. All updates are on this one batch and its
    # labels, with timesteps and noise of their own: what `updates_per_batch` repeats.
    start = load(path.with_name(path.name.replace("train_steps", "training_loss")))
    model = make_model(start)
    encoders = [
        parameter.clone() for parameter in (*model.label_encoder.parameters(), *model.output_encoder.parameters())
    ]
    optim = OptimOptions(learning_rate=float(arrays["lr"]), weight_decay=float(arrays["weight_decay"]))
    optimizer = make_optimizer(model.parameters(), optim)
    ema = make_ema(model.parameters(), EMAOptions(decay=float(arrays["ema_rate"]), warmup=False))
    for step, (t, noise) in enumerate(zip(arrays["t"], arrays["noise"], strict=True)):
        loss = loss_terms(model, start, noise, t)["loss"].mean()
        torch.testing.assert_close(loss.double(), arrays[f"step{step}.loss"], rtol=0, atol=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.step(model.parameters())
        for (name, parameter), averaged in zip(model.named_parameters(), ema.shadow_params, strict=True):
            if name.startswith("unet."):
                which = {"unet.weight": "W", "unet.bias": "b"}[name]
                torch.testing.assert_close(parameter.detach(), arrays[f"step{step}.{which}"], rtol=0, atol=1e-6)
                torch.testing.assert_close(averaged, arrays[f"step{step}.ema_{which}"], rtol=0, atol=1e-6)
    after = (*model.label_encoder.parameters(), *model.output_encoder.parameters())
    assert all(torch.equal(old, new) for old, new in zip(encoders, after, strict=True))
