"""The training objective of CIMD and its configuration."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel

from anodiff import AnomalyPipeline, CIMDPipeline, CIMDScheduler, UNet2DHeadsModel, VolumeProcessor
from anodiff.data.prepare import read_recipe
from anodiff.models.gaussian_encoder import GaussianEncoder
from anodiff.schedulers.draws import make_keys
from anodiff.training.objective_cimd import CIMDObjective, UNetWithEncoders, cimd_loss_terms, draw_annotation
from anodiff.training.options import TrainOptions


CONFIG = Path(__file__).parents[2] / "configs" / "cimd_lidc.yaml"
UNET = {
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
READINGS = {
    "default": {},
    "release": {"kl_weight": 1e-3},
    "trained": {"kl_weight": 1e-3, "train_encoders": True},
}


def processor(**settings) -> VolumeProcessor:
    return VolumeProcessor(**{"modalities": ("t1", "t2"), "size": (8, 8), "value_range": (0.0, 1.0), **settings})


def make(reading: str = "default", unet: dict | None = None) -> CIMDObjective:
    torch.manual_seed(0)
    options = TrainOptions(
        unet=UNET if unet is None else unet,
        inference={"num_ensemble": 2, "num_inference_steps": 3},
        objective=READINGS[reading],
    )
    return CIMDObjective.from_options(options, processor())


@pytest.fixture(params=READINGS)
def objective(request):
    return make(request.param)


def batch(count: int = 6, annotations: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 2, 8, 8, generator=generator)
    masks = (torch.rand(count, annotations, 8, 8, generator=generator) > 0.6).to(torch.uint8)
    masks[0, 0] = 0  # an annotation that marks nothing is one
    return {"image": images, "mask": masks, "annotations": torch.full((count,), annotations)}


def keys(positions, seed: int = 0) -> torch.Tensor:
    return make_keys(seed, positions)


def test_loss_of_a_sample_does_not_depend_on_the_batch(objective):
    data = batch()
    untouched = {name: values.clone() for name, values in data.items()}
    model = objective.model.eval()
    with torch.no_grad():
        together = objective.loss(model, data, keys(range(6)))
        alone = [
            objective.loss(model, {key: value[i : i + 1] for key, value in data.items()}, keys([i])) for i in range(6)
        ]
        other_seed = objective.loss(model, data, keys(range(6), seed=1))
    assert together.shape == (6,)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (together - other_seed).abs().min() > 1e-5
    assert all(torch.equal(values, untouched[name]) for name, values in data.items())


def test_a_few_steps_lower_the_loss(objective):
    data = batch(8)
    encoders = [p.clone() for name, p in objective.model.named_parameters() if "encoder" in name]
    assert bool(encoders) == isinstance(objective.model, UNetWithEncoders)
    groups = {"unet": [], "encoder": []}
    for name, parameter in objective.model.named_parameters():
        groups["encoder" if "encoder" in name else "unet"].append(parameter)
    optimizer = torch.optim.Adam([{"params": groups["unet"]}, {"params": groups["encoder"], "lr": 1e-4}], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = objective.loss(objective.model, data, keys(range(8))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = [not torch.equal(old, new) for old, new in zip(encoders, groups["encoder"], strict=True)]
    assert all(changed) if any(p.requires_grad for p in groups["encoder"]) else not any(changed)


def test_the_readings_differ_by_the_divergence():
    data = batch()
    losses = {}
    for reading in READINGS:
        built = make(reading)
        unet = make().model
        if isinstance(built.model, UNetWithEncoders):
            built.model.unet = unet
            built.model.label_encoder.load_state_dict(make("release").model.label_encoder.state_dict())
            built.model.output_encoder.load_state_dict(make("release").model.output_encoder.state_dict())
        losses[reading] = built.loss(built.model, data, keys(range(6)))
    assert (losses["release"] > losses["default"]).all()
    torch.testing.assert_close(losses["release"], losses["trained"])
    # The frozen term still teaches the predicted noise.
    built = make("release")
    terms = cimd_loss_terms(
        built.model,
        built.scheduler,
        data["image"],
        data["mask"][:, :1].float(),
        torch.randn(6, 1, 8, 8),
        torch.tensor([0, 1, 10, 100, 500, 999]),
        with_kl=True,
    )
    weight, bias = built.model.unet.conv_out.parameters()
    for name, taught in (("kl", (True, False)), ("vb", (False, True)), ("mse", (True, False))):
        (gradient,) = torch.autograd.grad(terms[name].sum(), bias, retain_graph=True)
        assert tuple((gradient != 0).tolist()) == taught, name


def test_one_annotation_per_visit():
    # Annotation a marks the first a + 1 rows.
    masks = torch.stack([torch.arange(8)[:, None].expand(8, 8) <= number for number in range(4)])
    masks = masks.expand(400, 4, 8, 8).to(torch.uint8)
    annotations = torch.tensor([4, 4, 4, 2]).repeat(100)
    drawn = draw_annotation(masks, annotations, keys(range(400)))
    assert drawn.shape == (400, 1, 8, 8)
    number = drawn[:, 0, :, 0].sum(1) - 1
    # What a slice has not got is never drawn, what it has equally often (5 standard deviations).
    for count in (2, 4):
        shares = number[annotations == count].bincount(minlength=4) / (annotations == count).sum()
        assert (shares[count:] == 0).all()
        assert (shares[:count] - 1 / count).abs().max() < 5 * (0.25 / (annotations == count).sum()) ** 0.5
    # Another visit, another one; the same visit, the same.
    again = draw_annotation(masks, annotations, keys(range(400)))
    other = draw_annotation(masks, annotations, keys(range(400, 800)))
    assert torch.equal(again, drawn) and not torch.equal(other, drawn)
    with pytest.raises(ValueError, match=r"`annotations` must be at least 1 for every slice, got \[3, 0\]"):
        data = batch(2)
        data["annotations"][1] = 0
        built = make()
        built.loss(built.model, data, keys(range(2)))


def test_updates_of_a_batch_share_their_annotation():
    built, data = make(), batch(60)
    seen = []
    add_noise = built.scheduler.add_noise

    def recording(target, noise, timesteps):
        seen.append((target, noise, timesteps))
        return add_noise(target, noise, timesteps)

    built.scheduler.add_noise = recording
    with torch.no_grad():
        losses = [built.loss(built.model, data, keys(range(60)), update) for update in (0, 1, 1)]
        plain = built.loss(built.model, data, keys(range(60)))
    torch.testing.assert_close(losses[0], plain, rtol=0, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=0, atol=0)
    (target, noise, t), (other_target, other_noise, other_t), *_ = seen
    assert torch.equal(target, other_target)
    assert (noise - other_noise).abs().amax((1, 2, 3)).min() > 0.1 and (t != other_t).float().mean() > 0.9


def test_network_sees_image_and_noised_mask():
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, sample, timesteps):
            seen.append((sample, timesteps))
            return type("Output", (), {"sample": torch.zeros_like(sample[:, :2])})

    data = batch(50, annotations=1)
    built = make()
    built.loss(Recorder(), data, keys(range(50)))
    ((sample, timesteps),) = seen
    assert sample.shape == (50, 3, 8, 8) and torch.equal(sample[:, :2], data["image"])
    assert 0 <= timesteps.min() < 150 and 850 < timesteps.max() < 1000
    # Masks are 0 and 1, not -1 and 1.
    alpha = built.scheduler.alphas_cumprod[timesteps].float().sqrt()[:, None, None]
    noise = (sample[:, 2] - alpha * data["mask"][:, 0]) / (1 - alpha**2).sqrt()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_preview_and_export(objective, tmp_path):
    data = batch(3)
    data["annotations"][1] = 1
    data["mask"][1, 1:] = 0
    model = objective.model.eval()
    rows = objective.preview(model, data, keys(range(3)))
    assert all(row.shape == (3, 1, 8, 8) and torch.isfinite(row).all() for row in rows.values())
    mean = rows["mean of the annotations"]
    torch.testing.assert_close(mean[0, 0], data["mask"][0].float().mean(0))
    torch.testing.assert_close(mean[1, 0], data["mask"][1, 0].float())
    titles = [title for title in rows if title.startswith("member")]
    assert len(titles) == 2 and (rows[titles[0]] - rows[titles[1]]).abs().max() > 0.05
    # Neither sampling changes what is trained.
    with torch.no_grad():
        loss = objective.loss(model, data, keys(range(3)))
        objective.scheduler.set_timesteps()
        torch.testing.assert_close(objective.loss(model, data, keys(range(3))), loss, rtol=0, atol=0)

    exported = objective.export(model, tmp_path)
    loaded = AnomalyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(exported) is CIMDPipeline
    assert not list(tmp_path.rglob("*encoder*"))
    for pipe in (exported, loaded):
        pipe.set_progress_bar_config(disable=True)
    expected = exported(data["image"])
    torch.testing.assert_close(loaded(data["image"]).member_maps, expected.member_maps, rtol=0, atol=1e-4)
    assert len(expected.member_maps) == 2


def test_from_options():
    built = make()
    assert type(built.model) is UNet2DModel and built.columns == ("image", "mask", "annotations")
    assert built.model.config.in_channels == 3 and built.model.config.out_channels == 2
    assert built.model.config.sample_size == 8 and built.vb_weight == 1 and built.kl_weight == 0
    assert built.trains_on == built.validates_on == "annotated"
    heads = make(unet={**UNET, "_class_name": "UNet2DHeadsModel", "num_attention_heads": 1})
    assert type(heads.model) is UNet2DHeadsModel and (heads.model.conv_out.weight == 0).all()
    for wrong, message in (
        ({"unet": {"in_channels": 2}}, "`unet.in_channels` must be 3, the modalities and the mask, got 2"),
        ({"unet": {"out_channels": 1}}, "`unet.out_channels` must be 2, noise and variance of the mask, got 1"),
        ({"inference": {"num_ensemble": 0}}, "`num_ensemble` must be an integer of at least 1, got 0"),
        ({"objective": {"vb_weight": -1}}, "`vb_weight` must be a finite number and at least 0, got -1"),
        ({"objective": {"kl_weight": -1}}, "`kl_weight` must be a finite number and at least 0, got -1"),
        ({"objective": {"updates_per_batch": 0}}, "`updates_per_batch` must be an integer of at least 1, got 0"),
        ({"objective": {"train_encoders": True}}, "`train_encoders` needs a `kl_weight` above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CIMDObjective.from_options(TrainOptions(**{"unet": UNET, **wrong}), processor())


def test_encoders_begin_as_the_authors():
    torch.manual_seed(0)
    encoder = GaussianEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 1_368_108
    first, last = encoder.layers[0], encoder.layers[-2]
    assert abs(first.weight.std() / (2 / (2 * 9)) ** 0.5 - 1) < 0.1  # Kaiming, fan in
    assert abs(last.weight.std() / (2 / (192 * 9)) ** 0.5 - 1) < 0.02
    assert 0 < first.bias.abs().max() <= 0.002 and encoder.head.bias.abs().max() > 0.5
    # Odd sizes: the pools keep what is left over.
    for size in ((13, 18), (8, 8), (1, 3)):
        mean, log_std = encoder(torch.rand(2, 1, *size), torch.rand(2, 1, *size))
        assert mean.shape == log_std.shape == (2, 6)


def test_configuration():
    from accelerate import init_empty_weights

    config = yaml.safe_load(CONFIG.read_text())
    given = VolumeProcessor.from_dict(read_recipe("cimd_lidc")["processor"])
    assert config["method"] == "cimd" and given.config.value_range == (0, 1)
    blocks = {name: config[name] for name in ("unet", "scheduler", "inference", "objective")}
    with init_empty_weights():
        built = CIMDObjective.from_options(TrainOptions(**blocks), given)
    # The card's number is that of four image channels.
    assert sum(p.numel() for p in built.model.parameters()) + 3 * 9 * 128 == 85_603_842
    for name, value in CIMDScheduler().config.items():
        assert name.startswith("_") or built.scheduler.config[name] == (list(value) if name == "clip_range" else value)
    assert built.inference["threshold"] == 0.5 and built.kl_weight == 0
