"""The training objectives of cDDPM, DDPM_2D and pDDPM."""

import pytest
import torch
from transformers import AutoBackbone, AutoModelForImageClassification, ResNetConfig

from anodiff import CDDPMPipeline, PDDPMPipeline, VolumeProcessor
from anodiff.pipelines.pipeline_pddpm import box_masks, patch_grid
from anodiff.schedulers.draws import make_keys
from anodiff.training.objective_cddpm import (
    CDDPMObjective,
    DDPM2DObjective,
    PDDPMObjective,
    draw_boxes,
    load_encoder,
    reconstruction_loss,
)
from anodiff.training.options import TrainOptions


SIZE = 16
OBJECTIVES = (DDPM2DObjective, CDDPMObjective, PDDPMObjective)
ENCODER = {"embedding_size": 4, "hidden_sizes": [8, 8], "depths": [1, 1]}


def build(cls=DDPM2DObjective, unet=None, inference=None, **objective):
    torch.manual_seed(0)
    processor = VolumeProcessor(modalities=("flair", "t1"), size=(SIZE, SIZE))
    network = {
        "_class_name": "ConditionedUNet2DModel",
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "condition_dim": 6 if cls is CDDPMObjective else None,
        **(unet or {}),
    }
    if cls is CDDPMObjective and "encoder_path" not in objective:
        objective.setdefault("encoder", ENCODER)
    inference = {"timesteps": [30, 60], **({"patch_size": 8} if cls is PDDPMObjective else {}), **(inference or {})}
    scheduler = {"num_train_timesteps": 100, "beta_schedule": "cosine", "wavelength": 8.0, "octaves": 3, "z": None}
    options = TrainOptions(unet=network, scheduler=scheduler, inference=inference, objective=objective)
    return cls.from_options(options, processor)


def losses(built, images, positions, model=None):
    with torch.no_grad():
        return built.loss(model or built.model, {"image": images}, make_keys(0, positions))


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_loss_of_a_sample_does_not_depend_on_the_batch(cls):
    built = build(cls)
    for parameter in built.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    built.model.eval()  # batch normalisation couples the samples in training
    images = torch.rand(6, 2, SIZE, SIZE) * 2 - 1
    together = losses(built, images, range(6))
    alone = torch.cat([losses(built, images[i : i + 1], [i]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.unique().numel() == 6


def test_shared_noise_is_that_of_the_first_slice():
    built = build(shared_noise=True)
    images = torch.rand(1, 2, SIZE, SIZE).repeat(3, 1, 1, 1) * 2 - 1
    seen = []

    def recording(sample, timesteps):
        seen.append((sample, timesteps))
        return type("Output", (), {"sample": torch.zeros_like(sample)})

    losses(built, images, range(3), recording)
    [(sample, timesteps)] = seen
    assert timesteps.unique().numel() > 1
    abar = built.scheduler.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
    noise = (sample - abar.sqrt() * images) / (1 - abar).sqrt()
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), atol=1e-4, rtol=1e-4)
    seen.clear()
    losses(build(), images, range(3), recording)
    torch.testing.assert_close(seen[0][0][0], sample[0])
    assert (seen[0][0][1] - sample[1]).abs().max() > 1e-2


def test_weights_of_the_timesteps():
    built, weighted = build(), build(p2_gamma=1.5)
    images = torch.rand(8, 2, SIZE, SIZE) * 2 - 1
    seen = []

    def recording(sample, timesteps):
        seen.append(timesteps)
        return type("Output", (), {"sample": torch.zeros_like(sample)})

    plain, result = (losses(one, images, range(8), recording) for one in (built, weighted))
    torch.testing.assert_close(plain, images.abs().mean((1, 2, 3)))
    expected = (1 - built.scheduler.alphas_cumprod[seen[0]]).float() ** 1.5
    torch.testing.assert_close(result / plain, expected)


def test_the_encoder_sees_the_clean_slice_and_learns():
    built = build(CDDPMObjective)
    images = torch.rand(4, 2, SIZE, SIZE) * 2 - 1
    seen = []
    built.model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    # The branches of a fresh network end with zeros: nothing reaches the encoder in the first step.
    optimizer = torch.optim.Adam(built.model.parameters(), lr=1e-2)
    before = built.model.encoder.resnet.embedder.embedder.convolution.weight.clone()
    history = []
    for step in range(20):
        keys = make_keys(0, range(4 * step, 4 * step + 4))
        loss = built.loss(built.model, {"image": images}, keys).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    torch.testing.assert_close(seen[0], (images + 1) / 2)
    assert history[-1] < 0.7 * history[0]
    assert (built.model.encoder.resnet.embedder.embedder.convolution.weight - before).abs().max() > 1e-3


def test_patches_of_the_training():
    built = build(PDDPMObjective)
    target = torch.rand(40, 2, SIZE, SIZE) * 2 - 1
    timesteps = torch.full((40,), 60)
    sample, region = built.corrupt(target, timesteps, make_keys(0, range(40)))
    grid = box_masks(patch_grid(SIZE, SIZE, 8), SIZE, SIZE)
    chosen = [(grid == one).all((1, 2)).nonzero().item() for one in region[:, 0]]
    assert set(chosen) == {0, 1, 2, 3}
    assert sample[~region.expand_as(sample)].equal(target[~region.expand_as(sample)])
    assert (sample != target).float().mean().item() == pytest.approx(1 / 4, abs=0.01)
    # What is outside counts 0, but is divided by.
    loss = reconstruction_loss(target, target + 0.5, "l1", region)
    torch.testing.assert_close(loss, torch.full((40,), 0.5 / 4))
    torch.testing.assert_close(reconstruction_loss(target, target + 0.5, "l2"), torch.full((40,), 0.25))

    draws = torch.rand(500, 2)
    boxes = draw_boxes(draws, 12, 20, 6, "random")
    assert (boxes[:, 2:] - boxes[:, :2]).eq(6).all()
    assert boxes[:, 0].unique().numel() == 20 and boxes[:, 1].unique().numel() == 12
    assert draw_boxes(torch.ones(1, 2), 12, 20, 6, "random").tolist() == [[19, 11, 25, 17]]
    assert draw_boxes(torch.ones(1, 2), 12, 12, 6, "grid").tolist() == [[6, 6, 12, 12]]


@pytest.mark.parametrize("cls", OBJECTIVES)
def test_preview_and_export(cls, tmp_path):
    built = build(cls)
    for parameter in built.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    built.model.eval()
    images = torch.rand(3, 2, SIZE, SIZE) * 2 - 1
    rows = built.preview(built.model, {"image": images}, make_keys(0, range(3), 2))
    assert list(rows)[1:3] == ["noised, t = 60", "reconstruction, t = 30, 60"]
    assert len(rows) == 4 and all(row.shape == images.shape for row in rows.values())
    pipe = built.export(built.model, tmp_path)
    kind = PDDPMPipeline if cls is PDDPMObjective else CDDPMPipeline
    loaded = kind.from_pretrained(tmp_path)
    assert type(pipe) is kind and (getattr(loaded, "encoder", None) is not None) == (cls is CDDPMObjective)
    for pipeline in (pipe, loaded):
        pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(images).anomaly_map, pipe(images).anomaly_map)


def test_a_pretrained_encoder_is_the_start(tmp_path, caplog):
    torch.manual_seed(1)
    config = ResNetConfig(num_channels=2, **ENCODER)
    pretrained = AutoBackbone.from_config(config)
    pretrained.save_pretrained(tmp_path / "encoder")
    built = build(CDDPMObjective, encoder_path=str(tmp_path))
    weights = built.model.encoder.resnet.state_dict()
    assert weights.keys() == pretrained.state_dict().keys()
    for name, values in pretrained.state_dict().items():
        torch.testing.assert_close(weights[name], values, rtol=0, atol=0)
    assert built.model.encoder.config.num_labels == 6

    # That of a finished cDDPM comes with its last layer.
    built.export(built.model, tmp_path / "pipeline")
    again = load_encoder(tmp_path / "pipeline", 2, 6)
    torch.testing.assert_close(again.classifier[1].weight, built.model.encoder.classifier[1].weight, rtol=0, atol=0)

    with pytest.raises(ValueError, match="is for 2 modalities, the data has 1"):
        load_encoder(tmp_path, 1, 6)
    with pytest.raises(ValueError, match="makes codes of 6 values, and `unet.condition_dim` is 7: make them equal"):
        load_encoder(tmp_path / "pipeline", 2, 7)
    with pytest.raises(OSError, match="`objective.encoder_path`: .*pipeline/encoder is neither"):
        load_encoder(tmp_path / "pipeline" / "encoder", 2, 6)
    with pytest.raises(OSError, match="`objective.encoder_path`: .*nothing is neither a folder nor a repository"):
        build(CDDPMObjective, encoder_path=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "encoder",
    [
        {"model_type": "convnext", "hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_size": 2},
        {"model_type": "regnet", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "groups_width": 4},
    ],
)
def test_classifiers_of_transformers_can_be_the_encoder(encoder):
    built = build(CDDPMObjective, encoder=encoder)
    assert type(built.model.encoder) is type(AutoModelForImageClassification.from_config(built.model.encoder.config))
    assert losses(built, torch.rand(2, 2, SIZE, SIZE) * 2 - 1, range(2)).shape == (2,)


@pytest.mark.parametrize(
    ("cls", "blocks", "message"),
    [
        (DDPM2DObjective, {"loss": "huber"}, "`loss` must be one of l1, l2"),
        (DDPM2DObjective, {"p2_gamma": -1.0}, "`p2_gamma` must be a finite number and at least 0"),
        (DDPM2DObjective, {"unet": {"condition_dim": 6}}, "`encoder` must give as many values"),
        (DDPM2DObjective, {"unet": {"in_channels": 1}}, "`unet.in_channels` must be 2"),
        (DDPM2DObjective, {"inference": {"timesteps": [100]}}, "`timesteps` must be a list"),
        (CDDPMObjective, {"encoder": {"model_type": "vit"}}, "ViTForImageClassification, does not take slices of 2 x"),
        (CDDPMObjective, {"encoder": {"model_type": "rt_detr_resnet"}}, "no image classifier of rt_detr_resnet"),
        (CDDPMObjective, {"unet": {"condition_dim": None}}, "without a condition the method is ddpm_2d"),
        (CDDPMObjective, {"encoder": {}, "encoder_path": "x"}, "not both"),
        (PDDPMObjective, {"boxes": "all"}, "`boxes` must be one of grid, random"),
        (PDDPMObjective, {"inference": {"patch_size": 7}}, "`patch_size` must divide"),
    ],
)
def test_wrong_options(cls, blocks, message):
    with pytest.raises(ValueError, match=message):
        build(cls, **blocks)
