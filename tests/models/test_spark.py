import copy

import pytest
import torch
from transformers import AutoBackbone

from anodiff.models.spark import SparKModel, resize_cells, spark_loss
from anodiff.training.objective_spark import backbone_config


WIDTHS = {"hidden_sizes": [8, 16], "depths": [1, 1]}
ENCODERS = {
    "resnet": {**WIDTHS, "embedding_size": 4},  # maps of 1/4 and 1/8
    "resnet, basic": {**WIDTHS, "embedding_size": 4, "layer_type": "basic"},
    "convnext": {
        **WIDTHS,
        "model_type": "convnext",
        "num_stages": 2,
    },  # normalises every position over channels, and has linear layers
}


def make_model(encoder="resnet", size=24, channels=2, **settings) -> SparKModel:
    """Normalisations, biases and running statistics at random: nothing is 0 that a hidden cell could write."""
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(backbone_config(ENCODERS[encoder], channels))
    model = SparKModel(backbone, size, channels, **{"decoder_width": 32, **settings})
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor += 0.2 * (torch.rand_like(tensor) if name.endswith("var") else torch.randn_like(tensor))
    return model


def maps_of(model: SparKModel, images, visible) -> list[torch.Tensor]:
    """Feature maps, 0 in the hidden cells."""
    maps = []
    hook = model.encoder.register_forward_hook(lambda module, inputs, output: maps.extend(output.feature_maps))
    model(images, visible)
    hook.remove()
    return [map_ * resize_cells(visible, map_.shape[2:]) for map_ in maps]


def inputs(model: SparKModel, count=3, size=(24, 24), channels=2):
    generator = torch.Generator().manual_seed(1)
    cells = model.mask_grid[0] * model.mask_grid[1]
    return torch.rand(count, channels, *size, generator=generator), model.choose_cells(
        torch.rand(count, cells, generator=generator)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("grid", [None, 6])
def test_nothing_of_a_hidden_cell_reaches_a_visible_one(name, grid, training):
    model = make_model(name, mask_grid=grid).train(training)
    images, visible = inputs(model)
    untouched, spoilt = copy.deepcopy(model), copy.deepcopy(model)
    before = maps_of(untouched, images, visible)

    # Whatever is written into hidden cells, at the entry and behind every convolution.
    for module in spoilt.encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output: torch.where(
                    resize_cells(visible, output.shape[2:]), output, 9 * torch.randn_like(output)
                )
            )
    hidden = ~resize_cells(visible, images.shape[2:])
    after = maps_of(spoilt, torch.where(hidden, 7.0, images), visible)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(untouched.buffers(), spoilt.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # And a visible pixel does.
    changed = maps_of(copy.deepcopy(model), torch.where(hidden, images, 1 - images), visible)
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(before, changed, strict=True))


def test_running_statistics_are_those_of_the_visible_positions():
    model = make_model().train()
    images, visible = inputs(model)
    convolution, norm = model.encoder.embedder.embedder.convolution, model.encoder.embedder.embedder.normalization
    before = norm.running_mean.clone()
    model(images, visible)
    hidden = convolution(images * resize_cells(visible, images.shape[2:]))  # the hooks rest
    values = hidden.permute(0, 2, 3, 1)[resize_cells(visible, hidden.shape[2:])[:, 0]]
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * values.mean(0))


def test_called_by_others_the_encoder_is_an_ordinary_network():
    model = make_model().eval()
    images, visible = inputs(model)
    model(images, visible)
    torch.manual_seed(0)
    plain = AutoBackbone.from_config(backbone_config(ENCODERS["resnet"], 2)).eval()
    plain.load_state_dict(model.encoder.state_dict())
    for one, other in zip(model.encoder(images).feature_maps, plain(images).feature_maps, strict=True):
        torch.testing.assert_close(one, other)
    # The trial of the constructor leaves no trace.
    assert make_model().encoder.embedder.embedder.normalization.num_batches_tracked == 0


def test_a_failed_call_leaves_the_hooks_at_rest():
    model = make_model().eval()
    images, visible = inputs(model)
    expected = model.encoder(images).feature_maps[0]
    with pytest.raises(ValueError, match="channel dimension"):
        model(images[:, :1], visible)
    torch.testing.assert_close(model.encoder(images).feature_maps[0], expected)


def test_a_copy_has_a_mask_of_its_own():
    model = make_model().eval()
    other = copy.deepcopy(model)
    images, visible = inputs(model)
    expected = model(images, visible)
    torch.testing.assert_close(other(images, ~visible), model(images, ~visible))
    torch.testing.assert_close(model(images, visible), expected)
    assert (model(images, ~visible) - expected).abs().max() > 1e-3


def test_cells():
    model = make_model(mask_ratio=0.65)
    assert model.mask_grid == (3, 3) and model.visible_cells == 3
    visible = model.choose_cells(torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7, 0.6, 0.5, 0.4, 0.3]]))
    assert visible.dtype == torch.bool and visible.flatten().nonzero().flatten().tolist() == [1, 3, 8]
    tall = make_model(size=(32, 16), mask_grid=(2, 4), mask_ratio=0.25)
    images, visible = inputs(tall, size=(32, 16))
    assert visible.shape == (3, 1, 2, 4) and visible.sum((1, 2, 3)).tolist() == [6, 6, 6]
    assert tall(images, visible).shape == images.shape
    # A position of a coarser map is visible where any of its cells is.
    visible = torch.tensor([[[[True, False, False, False], [False, True, False, False]]]])
    assert resize_cells(visible, (1, 2)).tolist() == [[[[True, False]]]]
    assert (
        resize_cells(visible, (4, 4))[0, 0].tolist()
        == [[True, False, False, False]] * 2 + [[False, True, False, False]] * 2
    )


def test_loss():
    torch.manual_seed(0)
    images, reconstruction = torch.rand(2, 3, 8, 12), torch.rand(2, 3, 8, 12)
    visible = torch.tensor(
        [[[[True, False, True], [False, False, True]]], [[[False, True, True], [True, False, False]]]]
    )
    error = (images - reconstruction).square()
    hidden = ~visible.repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(images)
    expected = torch.stack([values[mask].mean() for values, mask in zip(error, hidden, strict=True)])
    torch.testing.assert_close(spark_loss(images, reconstruction, visible), expected)
    everywhere = spark_loss(images, reconstruction, visible, loss="l1", region="all")
    torch.testing.assert_close(everywhere, (images - reconstruction).abs().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.99}, "`mask_ratio` must leave 1 to 8 of 9 cells visible, got 0.99"),
        ({"mask_ratio": 0.0}, "`mask_ratio` must leave"),
        ({"mask_grid": 5}, "`mask_grid` must divide the size 24 x 24 of the images, got 5"),
        ({"decoder_width": 36}, "`decoder_width` must be a multiple of 8, got 36"),
        ({"size": 20}, "`sample_size` must be a multiple of its stride, got maps of"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(**settings)


def test_an_encoder_that_mixes_positions_in_another_way():
    encoder = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.GroupNorm(2, 8))
    with pytest.raises(ValueError, match="`encoder` has layers GroupNorm, which are not known to be sparse"):
        SparKModel(encoder, 24)
