"""Slices of synthetic heads that are drawn as a training asks for them."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from anodiff.data.phantoms.drawn_heads import DrawnHeads
from anodiff.training.samples import draw_batches
from anodiff.volumes.processor import BRAIN_LEVEL, VolumeProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four brains of white matter with a ventricle, which differ in size."""
    folder = tmp_path_factory.mktemp("label_maps")
    places = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 4.0 for n in (44, 54, 46)], indexing="ij"), -1)
    for number, scale in enumerate((0.9, 0.95, 1.0, 1.05)):
        labels = np.zeros(places.shape[:3], np.int16)
        for axes, label in (((74, 94, 78), 24), ((70, 90, 74), 3), ((60, 80, 64), 2), ((14, 30, 16), 4)):
            labels[((places / (np.array(axes) * scale)) ** 2).sum(-1) < 1] = label
        nib.save(nib.Nifti1Image(labels, np.diag([4.0, 4.0, 4.0, 1.0])), folder / f"{number}.nii.gz")
    return folder


def processor(**settings) -> VolumeProcessor:
    return VolumeProcessor(
        **{
            **{"modalities": ("flair", "t1"), "crop": "brain", "size": (24, 20), "intensity": "brain_median"},
            **{"brain_mask": "given", **settings},
        }
    )


def test_a_slice_is_the_same_in_any_batch(folder):
    heads = DrawnHeads(folder, processor(), "train")
    together = heads.draw([0, 7, 3, 12], ("image", "brain", "mask", "label"))
    assert together["image"].shape == (4, 2, 24, 20) and not together["mask"].any() and not together["label"].any()
    for place, number in enumerate((0, 7, 3, 12)):
        alone = heads.draw([number], ("image", "brain"))
        torch.testing.assert_close(alone["image"][0], together["image"][place], atol=1e-4, rtol=0)
        assert torch.equal(alone["brain"][0], together["brain"][place])
    assert not torch.equal(together["image"][0], together["image"][1])
    assert not torch.equal(DrawnHeads(folder, processor(), "train", seed=1).draw([0])["image"], together["image"][:1])


def test_neighbours_are_slices_of_the_same_head_side_by_side(folder):
    alone = DrawnHeads(folder, processor(), "train").draw(range(12), ("image", "brain", "label"))
    wide = DrawnHeads(folder, processor(context=1), "train").draw(range(12), ("image", "brain", "label"))
    assert wide["image"].shape == (12, 6, 24, 20)
    torch.testing.assert_close(wide["image"][:, 2:4], alone["image"], atol=1e-5, rtol=0)
    assert torch.equal(wide["brain"], alone["brain"]) and torch.equal(wide["label"], alone["label"])
    # 1 to 6.5 mm away: another slice of a brain of 140 mm, alike and not the same.
    low, own, high = wide["image"].split(2, 1)
    for near in (low, high):
        difference = (near - own).abs().flatten(1)
        assert (difference.mean(1) > 1e-3).all() and difference.mean() < 0.5 * (own.flip(0) - own).abs().mean()
    # As far apart as slices are thick: the middle of wider ones is that of narrower ones.
    wider = DrawnHeads(folder, processor(context=2), "train").draw(range(12))["image"]
    torch.testing.assert_close(wider[:, 2:8], wide["image"], atol=1e-5, rtol=0)


def test_a_slice_beyond_the_brain_is_no_neighbour(folder):
    """A slice is drawn where there is brain, but 40 slices up or down there is none."""
    far = DrawnHeads(folder, processor(modalities=("flair",), context=60), "train").draw([0], ("image", "brain"))
    image = far["image"][0]
    assert far["brain"].any() and (image > -1).flatten(1).any(1).all()
    assert torch.equal(image[0], image[1]) and torch.equal(image[-1], image[-2])
    assert not torch.equal(image[59], image[60]) and not torch.equal(image[61], image[60])


def test_slices_are_those_of_the_processor(folder):
    """Brightness by the median of the brain, 0 around it, and the widest slices fill the field of view."""
    drawn = DrawnHeads(folder, processor(), "train").draw(range(24), ("image", "brain"))
    images, brain = (drawn["image"] + 1) / 2, drawn["brain"]
    assert images.min() >= 0 and images.max() <= 1 and not images[~brain[:, None].expand_as(images)].any()
    medians = torch.stack([images[n, 0][brain[n]].median() for n in range(24)])
    assert abs(float(medians.median()) - BRAIN_LEVEL) < 0.08
    sides = torch.stack([brain.any(2).sum(1) / 24, brain.any(1).sum(1) / 20], 1).amax(1)
    assert 0.85 < float(sides.max()) <= 1 and float(sides.min()) > 0.3


def test_splits_are_drawn_from_different_maps(folder):
    names = [DrawnHeads(folder, processor(), split).subjects for split in ("train", "validation", "test")]
    assert names == [["0.nii.gz", "1.nii.gz"], ["2.nii.gz"], ["3.nii.gz"]]


def test_batches_that_are_made_together_are_those_that_are_made_alone(folder, monkeypatch):
    heads = DrawnHeads(folder, processor(), "train")
    monkeypatch.setattr("anodiff.training.samples._DRAWN_AT_ONCE", 4)
    heads.device = torch.device("meta")  # as on a GPU, several at once
    monkeypatch.setattr(
        heads, "draw", lambda numbers, columns: {"image": torch.tensor(numbers, dtype=torch.float32)[:, None]}
    )
    batches = list(draw_batches(heads, [[0, 1], [4, 5], [8, 9]], ("image",)))
    assert [batch["position"].tolist() for batch in batches] == [[0, 1], [4, 5], [8, 9]]
    assert [batch["image"][:, 0].tolist() for batch in batches] == [[0, 1], [4, 5], [8, 9]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intensity": "percentile"}, "intensity percentile"),
        ({"crop": None}, "crop None"),
        ({"plane": "coronal"}, "plane coronal"),
        ({"size": None}, "size None"),
        ({"modalities": ("pet",)}, "modalities pet"),
    ],
)
def test_what_cannot_be_drawn_is_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        DrawnHeads(folder, processor(**settings), "train")
