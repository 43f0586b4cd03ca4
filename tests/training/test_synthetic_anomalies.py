"""Properties of synthetic anomalies; the augmenters against Pillow, which imgaug calls for most of them."""

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import torch

from anodiff.schedulers.draws import make_keys
from anodiff.training.synthetic_anomalies import (
    AUGMENTERS,
    _autocontrast,
    _equalize,
    _invert,
    _posterize,
    _sharpness,
    _solarize,
    augment_texture,
    draw_anomalies,
    rotate,
)


def keys(numbers):
    return make_keys(0, numbers)


def test_a_slice_depends_on_its_own_key_only():
    images = torch.rand(6, 2, 40, 24, generator=torch.manual_seed(0))
    changed, masks = draw_anomalies(images, keys(range(6)))
    assert changed.shape == images.shape and masks.shape == (6, 1, 40, 24)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    outside = (masks == 0).expand_as(images)
    torch.testing.assert_close(changed[outside], images[outside], rtol=0, atol=0)
    assert (changed != images).any() and changed.min() >= 0 and changed.max() <= 1
    order = [4, 0, 2]
    again, again_masks = draw_anomalies(images[order], keys(order))
    torch.testing.assert_close(again_masks, masks[order], rtol=0, atol=0)
    torch.testing.assert_close(again, changed[order], rtol=0, atol=1e-6)


def test_opacity_and_texture_are_the_same_in_all_modalities():
    images = torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)], 1).expand(8, -1, -1, -1)
    images = images.reshape(8, 2, 64, 64)
    changed, masks = draw_anomalies(images, keys(range(8)))
    inside = masks[:, 0] > 0
    for number in range(8):
        # beta texture and beta texture + 1 - beta: their difference is 1 - beta everywhere.
        difference = (changed[number, 1] - changed[number, 0])[inside[number]]
        assert difference.numel() == 0 or (difference.std(correction=0) < 1e-6 and 0 <= difference[0] <= 0.8)


def test_augmenters_are_those_of_pillow():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 20, 17), dtype=np.uint8)
    pictures[1] = pictures[1] // 4 + 30
    pictures[2, :, 4:] = 255
    grey = torch.from_numpy(pictures).float()
    zero = torch.zeros(3, 1, 1)

    def check(actual, operation, atol=0):
        expected = np.stack([np.asarray(operation(PIL.Image.fromarray(picture))) for picture in pictures])
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=atol)

    check(_invert(grey, zero, zero, zero), PIL.ImageOps.invert)
    check(_equalize(grey, zero, zero, zero), PIL.ImageOps.equalize)
    for bits in range(1, 9):
        check(
            _posterize(grey, zero + (bits - 0.5) / 8, zero, zero), lambda p, bits=bits: PIL.ImageOps.posterize(p, bits)
        )
    for cutoff in (0, 1, 13):
        u = zero + (cutoff + 0.5) / 20
        # Pillow truncates products that are a rounding error below a whole number.
        actual = _autocontrast(grey, u, zero, zero)
        check(actual, lambda p, cutoff=cutoff: PIL.ImageOps.autocontrast(p, cutoff), atol=1)
    check(_solarize(grey, zero + 0.5, zero, zero), lambda p: PIL.ImageOps.solarize(p, 80))
    check(_solarize(grey, zero + 0.5, zero + 0.5, zero), lambda p: p)
    for factor in (0.0, 0.5, 1.0, 2.5):
        # Pillow truncates the blend where we round it.
        actual = _sharpness(grey, zero + factor / 3, zero, zero)
        check(actual, lambda p, factor=factor: PIL.ImageEnhance.Sharpness(p).enhance(factor), atol=1)


def test_augmenters_stay_in_the_range_and_are_chosen_by_number():
    grey = torch.randint(0, 256, (12, 16, 16), generator=torch.manual_seed(0)).float()
    uniform = torch.rand(12, 1, 3, generator=torch.manual_seed(1))
    for number, augmenter in enumerate(AUGMENTERS):
        u, v, w = (uniform[:, 0, i, None, None] for i in range(3))
        expected = augmenter(grey, u, v, w)
        assert expected.shape == grey.shape and expected.min() >= 0 and expected.max() <= 255
        torch.testing.assert_close(expected, expected.round(), rtol=0, atol=0)
        chosen = torch.full((12, 1), number)
        torch.testing.assert_close(augment_texture(grey, chosen, uniform), expected, rtol=0, atol=0)


def test_rotation_of_a_slice_that_is_not_square():
    image = torch.zeros(1, 9, 15)
    image[0, 4, 7:11] = 1.0
    turned = rotate(image, torch.tensor([90.0]))[0]
    assert turned[:, 7].sum() == pytest.approx(4, abs=1e-4) and turned.sum() == pytest.approx(4, abs=1e-4)
    torch.testing.assert_close(rotate(image, torch.zeros(1)), image, rtol=0, atol=1e-6)
