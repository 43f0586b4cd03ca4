import pytest
import torch

from anodiff.schedulers.draws import make_keys
from anodiff.training.augmentation import GHOSTS, augment, augment_intensity
from anodiff.training.options import AugmentationOptions


def keys(count):
    return make_keys(0, range(count))


def images(count=6, height=32, width=48):
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(count, 2, 5, 6), (height, width), mode="bicubic")
    return smooth.clamp(0, 1) * 2 - 1


def test_nothing_asked_nothing_done():
    batch = images()
    assert augment({"image": batch}, keys(6), AugmentationOptions(), -1.0)["image"] is batch


def test_flip_alone_is_exact_and_happens_about_half_the_time():
    batch = images(40)
    changed = augment({"image": batch}, keys(40), AugmentationOptions(horizontal_flip=True), -1.0)["image"]
    flipped = [torch.allclose(one, other.flip(-1), atol=1e-5) for one, other in zip(changed, batch, strict=True)]
    kept = [torch.allclose(one, other, atol=1e-5) for one, other in zip(changed, batch, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 10 < sum(flipped) < 30


def test_translation_is_in_pixels_of_each_side_and_fills_with_background():
    batch = torch.full((20, 1, 32, 48), -1.0)
    batch[:, :, 16, 24] = 1.0
    changed = augment({"image": batch}, keys(20), AugmentationOptions(translation=(0.25, 0.125)), -1.0)["image"]
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
    changed = augment({"image": batch}, keys(30), AugmentationOptions(rotation=40.0), -1.0)["image"]
    weight = (changed[:, 0] + 1).clamp(min=0)
    row = (weight.sum(2) * torch.arange(33)).sum(1) / weight.sum((1, 2)) - 16
    column = (weight.sum(1) * torch.arange(65)).sum(1) / weight.sum((1, 2)) - 32
    torch.testing.assert_close(row.hypot(column), torch.full((30,), 12.0), rtol=0, atol=0.5)
    angle = torch.atan2(row, column).rad2deg()
    assert angle.abs().max() < 42 and angle.abs().max() > 25 and (angle > 0).any() and (angle < 0).any()
    magnified = augment({"image": batch}, keys(30), AugmentationOptions(scale=(1.2, 1.2)), -1.0)["image"]
    weight = magnified[:, 0] + 1
    column = (weight.sum(1) * torch.arange(65)).sum(1) / weight.sum((1, 2)) - 32
    torch.testing.assert_close(column, torch.full((30,), 14.4), rtol=0, atol=0.3)


def test_every_image_has_its_own_draw_and_channels_share_it():
    batch = images(1).expand(4, 2, 32, 48).clone()
    batch[:, 1] = batch[:, 0]
    options = AugmentationOptions(rotation=10.0, translation=(0.1, 0.1), scale=(0.9, 1.1))
    changed = augment({"image": batch}, keys(4), options, -1.0)["image"]
    torch.testing.assert_close(changed[:, 0], changed[:, 1], rtol=0, atol=0)
    assert (changed[0] - changed[1]).abs().max() > 0.05
    alone = augment({"image": batch[2:3]}, make_keys(0, [2]), options, -1.0)["image"]
    torch.testing.assert_close(alone[0], changed[2], rtol=0, atol=1e-6)
    again = augment({"image": batch}, keys(4), options, -1.0)["image"]
    torch.testing.assert_close(again, changed, rtol=0, atol=0)


@pytest.mark.parametrize("value_range_low", [0.0, -1.0])
def test_background_value(value_range_low):
    batch = torch.full((3, 1, 16, 16), 0.5)
    changed = augment({"image": batch}, keys(3), AugmentationOptions(translation=(0.4, 0.4)), value_range_low)["image"]
    assert changed.min().item() == pytest.approx(value_range_low, abs=1e-6)


def test_masks_move_with_the_image_and_stay_masks():
    smooth = images(8, 48, 48)
    mask = (smooth[:, :1] > 0.3).to(torch.uint8)
    options = AugmentationOptions(rotation=20.0, translation=(0.1, 0.1), scale=(0.9, 1.1), horizontal_flip=True)
    batch = {"image": smooth, "mask": mask, "brain": mask[:, 0].bool(), "label": torch.arange(8)}
    changed = augment(batch, keys(8), options, -1.0)
    assert changed["mask"].dtype == torch.uint8 and changed["brain"].dtype == torch.bool
    assert changed["label"] is batch["label"] and set(changed["mask"].unique().tolist()) <= {0, 1}
    assert (changed["mask"][:, 0].bool() == changed["brain"]).all()
    assert (changed["mask"] != mask).float().mean() > 0.05
    # Where the moved image is clearly above or below the level, the moved mask says so.
    clear = (changed["image"][:, :1] - 0.3).abs() > 0.2
    agrees = (changed["image"][:, :1] > 0.3) == changed["mask"].bool()
    assert agrees[clear].float().mean() > 0.99


INTENSITY = {
    "gamma": AugmentationOptions(gamma=1.0),
    "bias_field": AugmentationOptions(bias_field=1.0),
    "blur": AugmentationOptions(blur=1.0),
    "ghosting": AugmentationOptions(ghosting=1.0),
}


@pytest.mark.parametrize("name", INTENSITY)
def test_intensities_change_with_the_slices_own_draw_and_alike_in_all_channels(name):
    batch = images(1).expand(5, 2, 32, 48).clone()
    batch[:, 1] = batch[:, 0]
    changed = augment_intensity(batch, keys(5), INTENSITY[name], (-1.0, 1.0))
    assert changed.dtype == batch.dtype and (changed - batch).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(changed[:, 0], changed[:, 1])
    assert (changed[0] - changed[1]).abs().max() > 1e-3
    alone = augment_intensity(batch[2:3], make_keys(0, [2]), INTENSITY[name], (-1.0, 1.0))
    torch.testing.assert_close(alone[0], changed[2], rtol=0, atol=1e-5)
    # The range of the processor does not matter.
    unit = augment_intensity((batch + 1) / 2, keys(5), INTENSITY[name], (0.0, 1.0))
    torch.testing.assert_close(unit * 2 - 1, changed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", INTENSITY)
def test_probabilities_are_those_asked_for(name):
    batch = images(1).expand(200, 2, 32, 48)
    changed = augment_intensity(batch, keys(200), AugmentationOptions(**{name: 0.25}), (-1.0, 1.0))
    share = ((changed - batch).abs().amax((1, 2, 3)) > 1e-5).float().mean()
    assert 0.15 < share < 0.35


def test_intensities_are_left_alone_without_a_request():
    batch = images()
    assert augment_intensity(batch, keys(6), AugmentationOptions(rotation=9.0), (-1.0, 1.0)) is batch
    assert augment({"image": batch}, keys(6), AugmentationOptions(gamma=1.0), -1.0)["image"] is batch


def test_gamma_keeps_order_black_and_white():
    levels = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).expand(100, 1, 8, 8)
    changed = augment_intensity(levels, keys(100), INTENSITY["gamma"], (0.0, 1.0)).flatten(1)
    torch.testing.assert_close(changed[:, 0], torch.zeros(100))
    torch.testing.assert_close(changed[:, -1], torch.ones(100))
    assert (changed.diff(dim=1) > 0).all()
    exponents = changed[:, 32].log() / levels[0, 0, 4, 0].log()
    assert exponents.log().abs().max() <= 0.3001 and exponents.log().min() < -0.25 and exponents.log().max() > 0.25


def test_the_bias_field_is_a_smooth_positive_factor():
    batch = torch.rand(50, 1, 32, 48) + 0.1
    field = (augment_intensity(batch, keys(50), INTENSITY["bias_field"], (0.0, 1.0)) / batch).log()[:, 0]
    # A polynomial of degree three has no fourth difference, and the ten coefficients are at most 0.5.
    torch.testing.assert_close(field.diff(n=4, dim=2), torch.zeros(50, 32, 44), rtol=0, atol=1e-5)
    torch.testing.assert_close(field.diff(n=4, dim=1), torch.zeros(50, 28, 48), rtol=0, atol=1e-5)
    assert field.abs().max() < 10 * 0.5 and 0.2 < field.std() < 0.6


def test_blur_keeps_the_mean_and_spreads_a_point_by_up_to_one_pixel():
    batch = torch.zeros(60, 1, 33, 33)
    batch[:, :, 16, 16] = 1.0
    changed = augment_intensity(batch, keys(60), INTENSITY["blur"], (0.0, 1.0))[:, 0]
    torch.testing.assert_close(changed.sum((1, 2)), torch.ones(60))
    squares = (torch.arange(33.0) - 16) ** 2
    for axis in (1, 2):
        deviation = (changed.sum(axis) * squares).sum(1).sqrt()
        assert deviation.max() < 1.001 and deviation.max() > 0.9 and deviation.min() < 0.3
    torch.testing.assert_close(
        augment_intensity(torch.ones(3, 1, 8, 8), keys(3), INTENSITY["blur"], (0.0, 1.0)), torch.ones(3, 1, 8, 8)
    )


def test_ghosts_are_a_weakened_comb_of_k_space_along_one_axis():
    size = 96
    batch = torch.zeros(60, 1, size, size)
    batch[:, :, 48, 48] = 1.0  # a point has the same spectrum everywhere
    changed = augment_intensity(batch, keys(60), INTENSITY["ghosting"], (0.0, 1.0))[:, 0]
    kept = torch.fft.fftshift(torch.fft.fft2(changed).abs(), dim=(1, 2))
    lines = torch.arange(size)
    mirrored = (size - lines) % size  # an image without imaginary part has a symmetric spectrum

    def comb(number: int) -> torch.Tensor:
        weakened = (lines % number == 0) & (lines != 47) & (lines != 48)  # 2 % of the lines are restored
        return weakened | weakened[mirrored]

    axes, numbers, strengths = [], [], []
    for one in kept:
        profiles = one.mean(1), one.mean(0)
        [axis] = [axis for axis, profile in enumerate(profiles) if (profile.max() - profile.min()) > 1e-3]
        torch.testing.assert_close(one.std(1 - axis), torch.zeros(size), rtol=0, atol=1e-5)
        weakened = profiles[axis] < 1 - 1e-3
        [number] = [number for number in range(GHOSTS[0], GHOSTS[1] + 1) if torch.equal(comb(number), weakened)]
        axes.append(axis)
        numbers.append(number)
        strengths.append(1 - profiles[axis][0].item())  # line 0 is its own mirror image
    assert 15 < sum(axes) < 45 and set(numbers) == set(range(GHOSTS[0], GHOSTS[1] + 1))
    assert 0.5 <= min(strengths) < 0.6 and 0.9 < max(strengths) <= 1.0
    torch.testing.assert_close(changed.mean((1, 2)), batch[:, 0].mean((1, 2)))  # the zero frequency is restored
