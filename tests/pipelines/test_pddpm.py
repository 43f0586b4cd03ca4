"""Properties of `PDDPMPipeline` and its patches."""

import numpy as np
import pytest
import torch

from anodiff import PDDPMPipeline
from anodiff.pipelines.pipeline_pddpm import box_masks, boxes_at, patch_grid, patch_weights

from .. import tiny
from ..tiny import SIZE, assert_same_map, make_conditioned_unet, make_volume


def make_pipeline(modalities=("image",), **settings) -> PDDPMPipeline:
    return tiny.make_pipeline("PDDPMPipeline", modalities, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"patch_size": 10, "overlap": "cut"}, {"timesteps": (20, 80), "patch_size": 7, "overlap": "average"}],
    ids=str,
)
def test_batch_size_does_not_matter_and_the_seed_does(settings):
    pipe = make_pipeline(("flair", "t1"), **settings)
    volume = {"flair": make_volume(seed=1), "t1": make_volume(seed=2)}
    maps = [pipe(volume, batch_size=size).anomaly_map for size in (1, 3, 64)]
    for other in maps[1:]:
        assert_same_map(other, maps[0])
    assert np.abs(pipe(volume, generator=1).anomaly_map - maps[0]).max() > 1e-3


def test_each_patch_is_noised_alone_and_pasted():
    pipe = make_pipeline()
    slices = torch.rand(2, 1, SIZE, SIZE)
    seen, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda sample, *more: (seen.append(sample), forward(sample, *more))[1]
    result = pipe(slices, batch_size=64)
    [samples] = seen
    assert len(samples) == 2 * 4
    clean = (2 * slices - 1).repeat_interleave(4, 0)
    changed = (samples != clean)[:, 0]
    inside = box_masks(patch_grid(SIZE, SIZE, 8), SIZE, SIZE).repeat(2, 1, 1)
    assert not (changed & ~inside).any() and changed.sum() > 0.99 * inside.sum()
    # The patches of a slice are parts of one field: put together, they are the slice noised as a whole.
    together = torch.where(inside[:, None], samples, 0).view(2, 4, 1, SIZE, SIZE).sum(1)
    noise = (together - (2 * slices - 1) * pipe.scheduler.alphas_cumprod[50].sqrt()).float()
    whole = pipe.scheduler.add_noise(
        2 * slices - 1, noise / (1 - pipe.scheduler.alphas_cumprod[50]).sqrt().float(), 50
    )
    torch.testing.assert_close(together, whole)
    with torch.no_grad():
        predictions = (forward(samples, torch.full((8,), 50)).sample + 1) / 2
    pasted = torch.where(inside[:, None], predictions, 0).view(2, 4, 1, SIZE, SIZE).sum(1)
    torch.testing.assert_close(result.reconstruction, pasted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.anomaly_map, (slices - pasted).abs()[:, 0], atol=1e-5, rtol=1e-4)


def test_several_timesteps_are_averaged():
    pipe = make_pipeline()
    slices = torch.rand(3, 1, SIZE, SIZE)
    noise = torch.randn(2, 3, 1, SIZE, SIZE)
    parts = [pipe(slices, timesteps=[t], noise=noise[k : k + 1]).reconstruction for k, t in enumerate((20, 80))]
    whole = pipe(slices, timesteps=[20, 80], noise=noise).reconstruction
    torch.testing.assert_close(whole, sum(parts) / 2, atol=1e-5, rtol=1e-4)
    same = slices[:1].repeat(3, 1, 1, 1)
    shared, own = (pipe(same, shared_noise=value).reconstruction for value in (True, False))
    torch.testing.assert_close(shared[0], shared[2])
    assert (own[0] - own[2]).abs().max() > 1e-3


def test_patches_cover_the_slice():
    assert patch_grid(12, 20, 8, "cut").tolist() == [
        [0, 0, 8, 8], [6, 0, 14, 8], [12, 0, 20, 8], [0, 4, 8, 12], [6, 4, 14, 12], [12, 4, 20, 12]
    ]  # fmt: skip
    inside = box_masks(patch_grid(12, 20, 8, "cut"), 12, 20)
    for overlap in ("cut", "average"):
        weights = patch_weights(inside, overlap)
        torch.testing.assert_close(weights.sum(0), torch.ones(12, 20))
        assert not weights[~inside].any()
    assert patch_weights(inside, "cut").unique().tolist() == [0, 1]
    assert patch_weights(inside, "average")[:, 5, 6].tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0]
    # A box may hang over the border.
    hanging = box_masks(boxes_at(torch.tensor([17]), torch.tensor([10]), 8), 12, 20)[0]
    assert hanging.nonzero().tolist() == [[y, x] for y in (10, 11) for x in (17, 18, 19)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [100]}, "`timesteps` must be a list of different integers from 0 to 99"),
        ({"patch_size": 7}, "`patch_size` must divide the height and width of a slice, 16 and 16, got 7"),
        ({"patch_size": 20}, "`patch_size` must be at most the side of a slice, 16, got 20"),
        ({"patch_size": 0}, "`patch_size` must be an integer of at least 1"),
        ({"overlap": "avg"}, "`overlap` must be one of none, cut, average"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)
    with pytest.raises(ValueError, match=message):
        make_pipeline(**arguments)


def test_a_conditioned_network_is_refused():
    with pytest.raises(ValueError, match="`unet` must have no condition"):
        make_pipeline(unet=make_conditioned_unet())
