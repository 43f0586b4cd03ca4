import copy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoBackbone, AutoModelForImageClassification, ResNetForImageClassification, ResNetModel

from anodiff import VolumeProcessor
from anodiff.schedulers.draws import make_keys
from anodiff.training.objective_cddpm import load_encoder
from anodiff.training.objective_spark import SparKObjective, backbone_config
from anodiff.training.options import TrainOptions


ENCODER = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 4}


def make(value_range=(-1.0, 1.0), modalities=("t1", "t2"), size=(24, 24), **objective) -> SparKObjective:
    torch.manual_seed(0)
    processor = VolumeProcessor(modalities=modalities, size=size, value_range=value_range)
    objective = {"encoder": ENCODER, "decoder_width": 32, **objective}
    return SparKObjective.from_options(TrainOptions(method="spark", objective=objective), processor)


def keys(count=4):
    return make_keys(0, range(count))


def slices(count=4, channels=2):
    return torch.rand(count, channels, 24, 24, generator=torch.Generator().manual_seed(5))


def test_the_loss_learns_and_depends_on_the_slices_own_key():
    objective = make()
    batch = {"image": 2 * slices() - 1}
    model = copy.deepcopy(objective.model).eval()
    losses = objective.loss(model, batch, keys())
    assert losses.shape == (4,)
    alone = objective.loss(model, {"image": batch["image"][2:3]}, keys()[2:3])
    torch.testing.assert_close(alone, losses[2:3])
    assert not torch.allclose(objective.loss(model, batch, keys().flip(0)), losses)

    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=3e-3)
    objective.model.train()
    history = []
    for _ in range(30):
        loss = objective.loss(objective.model, batch, keys()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]
    assert all(parameter.grad is not None for parameter in objective.model.parameters())


def test_the_value_range_does_not_matter():
    losses = [
        make(value_range=(low, high)).loss(
            make(value_range=(low, high)).model.eval(), {"image": slices() * (high - low) + low}, keys()
        )
        for low, high in ((0.0, 1.0), (-1.0, 1.0))
    ]
    torch.testing.assert_close(*losses)


def test_settings_reach_the_loss_and_the_model():
    objective = make(loss="l1", region="all", normalize=True, mask_ratio=0.5, mask_grid=[6, 6])
    assert objective.settings == {"loss": "l1", "region": "all", "normalize": True}
    assert objective.model.mask_grid == (6, 6) and objective.model.visible_cells == 18


def test_preview():
    objective = make()
    images = 2 * slices() - 1
    rows = objective.preview(objective.model.eval(), {"image": images}, keys())
    slice_, visible, prediction, both = rows.values()
    torch.testing.assert_close(slice_, images)
    hidden = (visible == -1).all(1)
    assert hidden.float().mean().item() == pytest.approx(6 / 9, abs=0.01)
    torch.testing.assert_close(visible.movedim(1, -1)[~hidden], images.movedim(1, -1)[~hidden])
    torch.testing.assert_close(both.movedim(1, -1)[hidden], prediction.movedim(1, -1)[hidden])
    torch.testing.assert_close(both.movedim(1, -1)[~hidden], images.movedim(1, -1)[~hidden])


def test_the_export_is_a_folder_of_transformers(tmp_path):
    objective = make()
    model = objective.model.train()
    objective.loss(model, {"image": slices()}, keys())  # moves the running statistics
    assert objective.export(model.eval(), tmp_path) is None
    images = slices()
    expected = model.encoder(images).feature_maps[-1]

    # The part that cDDPM trains on, with a new last layer.
    for encoder in (
        ResNetForImageClassification.from_pretrained(str(tmp_path / "encoder"), num_labels=5),
        AutoModelForImageClassification.from_pretrained(str(tmp_path), subfolder="encoder", num_labels=5),
        load_encoder(tmp_path, channels=2, outputs=5),
    ):
        torch.testing.assert_close(encoder.eval().resnet(images).last_hidden_state, expected)
        assert encoder(images).logits.shape == (4, 5)
    torch.testing.assert_close(
        ResNetModel.from_pretrained(str(tmp_path / "encoder")).eval()(images).last_hidden_state, expected
    )
    again = type(model.encoder).from_pretrained(str(tmp_path / "encoder")).eval()
    torch.testing.assert_close(again(images).feature_maps[-1], expected)
    assert (
        VolumeProcessor.from_pretrained(tmp_path, subfolder="processor").settings() == objective.processor.settings()
    )


def test_another_backbone():
    convnext = {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    objective = make(encoder=convnext)
    assert type(objective.model.encoder).__name__ == "ConvNextBackbone"
    assert objective.loss(objective.model, {"image": slices()}, keys()).isfinite().all()


def test_the_packaged_configuration_is_the_authors_network():
    path = Path(__file__).parents[2] / "configs" / "spark_2d_pretrain.yaml"
    config = yaml.safe_load(path.read_text())
    with torch.device("meta"):
        encoder = AutoBackbone.from_config(backbone_config(config["objective"]["encoder"], 1))
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(23.5, abs=0.05)
    assert config["method"] == "spark" and config["processor"]["size"] == [96, 96]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"encoder": {"num_channels": 3}},
            "`objective.encoder.num_channels` must be 2, the number of modalities, got 3",
        ),
        ({"loss": "l3"}, "`loss` must be one of l2, l1, got 'l3'"),
        ({"region": "seen"}, "`region` must be one of masked, all, got 'seen'"),
        ({"size": None}, "`processor.size` must be given"),
    ],
)
def test_wrong_settings_are_found_before_the_training(objective, message):
    with pytest.raises(ValueError, match=message):
        make(**objective)
