"""The training objective of the denoising autoencoder."""

import pytest
import torch

from anodiff import DAEPipeline, DAEScheduler, DAEUNet2DModel, VolumeProcessor
from anodiff.schedulers.draws import make_keys
from anodiff.training.objective_dae import DAEObjective
from anodiff.training.options import TrainOptions


def processor(**settings) -> VolumeProcessor:
    return VolumeProcessor(modalities=("flair", "t1"), size=(8, 8), **{"value_range": (0.0, 1.0), **settings})


def objective(**scheduler) -> DAEObjective:
    torch.manual_seed(0)
    unet = DAEUNet2DModel(2, 2, (4, 8))
    return DAEObjective(unet, DAEScheduler(noise_resolution=4, **scheduler), processor())


def test_loss_of_a_sample_does_not_depend_on_the_batch():
    built = objective(shared_shift=False)
    images = torch.rand(6, 2, 8, 8)
    with torch.no_grad():
        together = built.loss(built.model, {"image": images}, make_keys(0, range(6)))
        alone = torch.cat([built.loss(built.model, {"image": images[i : i + 1]}, make_keys(0, [i])) for i in range(6)])
        other_seed = built.loss(built.model, {"image": images}, make_keys(1, range(6)))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert (together - other_seed).abs().min() > 1e-6


def test_background_counts_nothing_but_is_divided_by():
    built = objective()
    images = torch.zeros(2, 2, 8, 8)
    images[1, :, :4] = 0.5
    seen = []

    class Zero(torch.nn.Module):
        def forward(self, sample):
            seen.append(sample)
            return type("Output", (), {"sample": torch.full_like(sample, 0.1)})

    loss = built.loss(Zero(), {"image": images}, make_keys(0, range(2)))
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.4**2 / 2]))
    assert (seen[0][1, :, 4:] == 0).all() and (seen[0][1, :, :4] != 0.5).all() and (seen[0][0] == 0).all()


def test_a_few_steps_lower_the_loss():
    built = objective()
    images = torch.rand(4, 2, 8, 8) * 0.2 + 0.4
    optimizer = torch.optim.Adam(built.model.parameters(), lr=1e-2)
    losses = []
    for step in range(15):
        loss = built.loss(built.model, {"image": images}, make_keys(0, range(step, step + 4))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_preview_and_export(tmp_path):
    built = objective()
    images = torch.rand(3, 2, 8, 8)
    rows = built.preview(built.model, {"image": images}, make_keys(0, range(3), 2))
    assert len(rows) == 4 and all(row.shape == images.shape for row in rows.values())
    built.model.eval()
    pipe = built.export(built.model, tmp_path)
    loaded = DAEPipeline.from_pretrained(tmp_path)
    for pipeline in (pipe, loaded):
        pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(images).anomaly_map, pipe(images).anomaly_map)


def test_from_options():
    unet = {"block_out_channels": [4, 8]}
    options = TrainOptions(unet=unet, scheduler={"noise_resolution": 4}, inference={"rim_window": 3})
    built = DAEObjective.from_options(options, processor())
    assert built.model.config.in_channels == 2 and built.scheduler.config.noise_resolution == 4
    assert built.inference == {"rim_window": 3}
    for wrong, message in (
        (TrainOptions(unet={"in_channels": 4}), "`unet.in_channels` must be 2, the number of modalities, got 4"),
        (TrainOptions(unet=unet, inference={"rim_window": 2}), "`rim_window` must be odd, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            DAEObjective.from_options(wrong, processor())
    images = torch.rand(2, 2, 8, 8, generator=torch.manual_seed(0))
    losses = []
    for given, batch in ((processor(), images), (processor(value_range=(-1.0, 1.0)), images * 2 - 1)):
        torch.manual_seed(0)
        built = DAEObjective.from_options(TrainOptions(unet=unet, scheduler={"noise_resolution": 4}), given)
        losses.append(built.loss(built.model, {"image": batch}, make_keys(0, range(2))).detach())
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
