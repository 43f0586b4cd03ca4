"""The network that finds the brain, from a scan to a mask on its own grid."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff import BrainExtractor
from anodiff.models.brain_extractor import normalize_volumes

from ..tiny import make_extractor, make_raw_scan


def dice(first, second) -> float:
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_the_brain_of_a_scan_on_its_own_grid():
    image, brain, affine = make_raw_scan()
    found = make_extractor().find_brain([image], affine)
    assert found.dtype == bool and found.shape == image.shape
    assert dice(found, brain) > 0.95


@pytest.mark.parametrize("axes", ["LPS", "IRA", "ASL"])
def test_how_a_file_is_laid_out_does_not_matter(axes):
    image, _, affine = make_raw_scan()
    extractor, source = make_extractor(), nib.Nifti1Image(image, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    turned = source.as_reoriented(turn)
    found = extractor.find_brain([np.asarray(turned.dataobj)], turned.affine)
    back = nib.as_closest_canonical(nib.Nifti1Image(found.astype(np.uint8), turned.affine))
    np.testing.assert_array_equal(np.asarray(back.dataobj) > 0, extractor.find_brain([image], affine))


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (3.0, 3.0, 9.0), (12.0, 3.0, 3.0)], ids=str)
def test_how_large_the_voxels_are_hardly_matters(spacing):
    image, brain, affine = make_raw_scan(spacing)
    assert dice(make_extractor().find_brain([image], affine), brain) > 0.93


def test_a_turned_field_of_view():
    image, brain, affine = make_raw_scan()
    angle = np.radians(30)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert dice(make_extractor().find_brain([image], turn @ affine), brain) > 0.9


def test_units_do_not_matter():
    image, _, affine = make_raw_scan()
    extractor = make_extractor()
    expected = extractor.find_brain([image], affine)
    np.testing.assert_array_equal(extractor.find_brain([image / 1000 - 3], affine), expected)


def test_a_mask_is_one_piece_without_holes():
    image, brain, affine = make_raw_scan()
    changed = image.copy()
    changed[2:5, 2:5, 2:4] = 1000.0
    centre = np.argwhere(brain).mean(0).astype(int)
    changed[tuple(slice(c - 1, c + 2) for c in centre)] = 0.0
    found = make_extractor().find_brain([changed], affine)
    assert not found[:6, :6, :5].any() and found[tuple(centre)]
    assert dice(found, brain) > 0.95


def test_modalities_are_averaged():
    image, brain, affine = make_raw_scan()
    extractor = make_extractor()
    np.testing.assert_array_equal(extractor.find_brain([image, image], affine), extractor.find_brain([image], affine))
    # Where the second sees a larger brain, both together see one between.
    both = extractor.find_brain([image, np.where(image > 100, 1000, image).astype(np.float32)], affine)
    assert brain.sum() < both.sum()


def test_without_a_brain_the_mask_is_empty():
    extractor = make_extractor()
    torch.nn.init.constant_(extractor.last.bias, -100.0)
    image, _, affine = make_raw_scan()
    assert not extractor.find_brain([image], affine).any()


def test_it_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    extractor = BrainExtractor(3.0, block_out_channels=(4, 8)).eval()
    extractor.half().save_pretrained(tmp_path)
    loaded = BrainExtractor.from_pretrained(tmp_path)
    volume = torch.rand(2, 1, 4, 6, 8)
    assert loaded.config.spacing == 3.0 and loaded.dtype == torch.float32
    logits = loaded(volume)
    assert logits.shape == volume.shape
    torch.testing.assert_close(logits, extractor.float()(volume), rtol=0, atol=1e-6)


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="`spacing`"):
        BrainExtractor(0.0)
    with pytest.raises(ValueError, match="`block_out_channels` must be multiples"):
        BrainExtractor(block_out_channels=(6, 8))
    with pytest.raises(ValueError, match=r"`sample` must have sides divisible by 2, got \(1, 1, 4, 5, 4\)"):
        BrainExtractor(block_out_channels=(4, 4))(torch.zeros(1, 1, 4, 5, 4))


def test_brightness_is_normalised_for_each_volume():
    volumes = torch.rand(2, 1, 10, 10, 10, generator=torch.Generator().manual_seed(0))
    normalised = normalize_volumes(volumes)
    assert normalised.min() == 0 and normalised.max() == 1
    torch.testing.assert_close(normalize_volumes(volumes[1:] * 700 + 5), normalised[1:], rtol=0, atol=1e-5)
