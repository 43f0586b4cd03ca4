import pytest
import torch

from anodiff.training.augmentation import augment
from anodiff.training.options import AugmentationOptions


def generators(count):
    return [torch.Generator().manual_seed(index) for index in range(count)]


def images(count=6, height=32, width=48):
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(count, 2, 5, 6), (height, width), mode="bicubic")
    return smooth.clamp(0, 1) * 2 - 1


def test_nothing_asked_nothing_done():
    batch = images()
    assert augment({"image": batch}, generators(6), AugmentationOptions(), -1.0)["image"] is batch


def test_flip_alone_is_exact_and_happens_about_half_the_time():
    batch = images(40)
    changed = augment({"image": batch}, generators(40), AugmentationOptions(horizontal_flip=True), -1.0)["image"]
    flipped = [torch.allclose(one, other.flip(-1), atol=1e-5) for one, other in zip(changed, batch, strict=True)]
    kept = [torch.allclose(one, other, atol=1e-5) for one, other in zip(changed, batch, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 10 < sum(flipped) < 30


def test_translation_is_in_pixels_of_each_side_and_fills_with_background():
    batch = torch.full((20, 1, 32, 48), -1.0)
    batch[:, :, 16, 24] = 1.0
    changed = augment({"image": batch}, generators(20), AugmentationOptions(translation=(0.25, 0.125)), -1.0)["image"]
    weight = changed[:, 0] + 1
    rows = (weight.sum(2) * torch.arange(32)).sum(1) / weight.sum((1, 2)) - 16
    columns = (weight.sum(1) * torch.arange(48)).sum(1) / weight.sum((1, 2)) - 24
    assert rows.abs().max() <= 4.01 and rows.abs().max() > 2
    assert columns.abs().max() <= 12.01 and columns.abs().max() > 6
    torch.testing.assert_close(changed.min(), torch.tensor(-1.0))


def test_rotation_and_scale_keep_their_ranges():
    # A point at a known radius stays at it under rotation, also where slices are not square.
    batch = torch.full((30, 1, 33, 65), -1.0)
    batch[:, :, 16, 44] = 1.0
    changed = augment({"image": batch}, generators(30), AugmentationOptions(rotation=40.0), -1.0)["image"]
    weight = (changed[:, 0] + 1).clamp(min=0)
    row = (weight.sum(2) * torch.arange(33)).sum(1) / weight.sum((1, 2)) - 16
    column = (weight.sum(1) * torch.arange(65)).sum(1) / weight.sum((1, 2)) - 32
    torch.testing.assert_close(row.hypot(column), torch.full((30,), 12.0), rtol=0, atol=0.5)
    angle = torch.atan2(row, column).rad2deg()
    assert angle.abs().max() < 42 and angle.abs().max() > 25 and (angle > 0).any() and (angle < 0).any()
    magnified = augment({"image": batch}, generators(30), AugmentationOptions(scale=(1.2, 1.2)), -1.0)["image"]
    weight = magnified[:, 0] + 1
    column = (weight.sum(1) * torch.arange(65)).sum(1) / weight.sum((1, 2)) - 32
    torch.testing.assert_close(column, torch.full((30,), 14.4), rtol=0, atol=0.3)


def test_every_image_has_its_own_draw_and_channels_share_it():
    batch = images(1).expand(4, 2, 32, 48).clone()
    batch[:, 1] = batch[:, 0]
    options = AugmentationOptions(rotation=10.0, translation=(0.1, 0.1), scale=(0.9, 1.1))
    changed = augment({"image": batch}, generators(4), options, -1.0)["image"]
    torch.testing.assert_close(changed[:, 0], changed[:, 1], rtol=0, atol=0)
    assert (changed[0] - changed[1]).abs().max() > 0.05
    alone = augment({"image": batch[2:3]}, [torch.Generator().manual_seed(2)], options, -1.0)["image"]
    torch.testing.assert_close(alone[0], changed[2], rtol=0, atol=1e-6)
    again = augment({"image": batch}, generators(4), options, -1.0)["image"]
    torch.testing.assert_close(again, changed, rtol=0, atol=0)


@pytest.mark.parametrize("value_range_low", [0.0, -1.0])
def test_background_value(value_range_low):
    batch = torch.full((3, 1, 16, 16), 0.5)
    changed = augment({"image": batch}, generators(3), AugmentationOptions(translation=(0.4, 0.4)), value_range_low)[
        "image"
    ]
    assert changed.min().item() == pytest.approx(value_range_low, abs=1e-6)


def test_masks_move_with_the_image_and_stay_masks():
    smooth = images(8, 48, 48)
    mask = (smooth[:, :1] > 0.3).to(torch.uint8)
    options = AugmentationOptions(rotation=20.0, translation=(0.1, 0.1), scale=(0.9, 1.1), horizontal_flip=True)
    batch = {"image": smooth, "mask": mask, "brain": mask[:, 0].bool(), "label": torch.arange(8)}
    changed = augment(batch, generators(8), options, -1.0)
    assert changed["mask"].dtype == torch.uint8 and changed["brain"].dtype == torch.bool
    assert changed["label"] is batch["label"] and set(changed["mask"].unique().tolist()) <= {0, 1}
    assert (changed["mask"][:, 0].bool() == changed["brain"]).all()
    assert (changed["mask"] != mask).float().mean() > 0.05
    # Where the moved image is clearly above or below the level, the moved mask says so.
    clear = (changed["image"][:, :1] - 0.3).abs() > 0.2
    agrees = (changed["image"][:, :1] > 0.3) == changed["mask"].bool()
    assert agrees[clear].float().mean() > 0.99
