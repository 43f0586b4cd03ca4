"""Properties of `CIMDPipeline` with real, tiny components."""

import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from scipy import ndimage

from anodiff import CIMDPipeline, CIMDScheduler, VolumeProcessor
from anodiff.pipelines.base import NOT_FINITE
from anodiff.schedulers.draws import DRAWS_VERSION

from .. import tiny
from ..tiny import SIZE, make_slices, make_volume


MAPS = ("mean_map", "std_map", "probability_map", "agreement", "majority_mask")
FEW = {"num_ensemble": 3, "num_inference_steps": 4}


def make_pipeline(modalities=("image",), brain_mask="nonzero", **settings) -> CIMDPipeline:
    return tiny.make_pipeline("CIMDPipeline", modalities, processor_settings={"brain_mask": brain_mask}, **settings)


def assert_same(actual, expected):
    """Maps to 1e-4 (the first step multiplies what is rounded by 157), masks wherever no value sits on the threshold
    (an interpolated one, half way from 0 to 1, may)."""
    for name in ("member_maps", "mean_map", "std_map"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-4)
    near = np.abs(np.asarray(expected.member_maps) - expected.settings["threshold"]) < 1e-4
    same = np.asarray(actual.member_masks) == np.asarray(expected.member_masks)
    assert same[~near].all() and near.mean() < 0.2


def evaluated_batches(pipe) -> list[torch.Tensor]:
    """The timesteps of every evaluation from now on."""
    batches, forward = [], pipe.unet.forward

    def counting(sample, timesteps, *args, **kwargs):
        assert len(sample) == len(timesteps)
        batches.append(timesteps.clone())
        return forward(sample, timesteps, *args, **kwargs)

    pipe.unet.forward = counting
    return batches


def test_published_defaults():
    pipe = CIMDPipeline(make_pipeline().unet, CIMDScheduler(), VolumeProcessor())
    assert pipe.default_settings() == {
        "num_ensemble": 16,
        "num_inference_steps": None,
        "sampler": "ddpm",
        "median_size": 0,
    }
    assert pipe.config.threshold == 0.5 and tuple(pipe.scheduler.config.clip_range) == (-1.0, 1.0)


def test_batch_size_does_not_matter_without_noise_in_the_steps():
    pipe = make_pipeline(sampler="ddim")
    results = [pipe(make_volume(), batch_size=size) for size in (1, 4, 16, 100)]
    for other in results[1:]:
        assert_same(other, results[0])


def sample_members(pipe, slices, indices, **settings) -> torch.Tensor:
    return pipe.compute_maps(slices, indices, **{**pipe.default_settings(), **settings}).maps


def test_a_member_does_not_depend_on_the_others():
    pipe = make_pipeline()
    slices = make_slices(5, value_range=(0.0, 1.0))
    members = sample_members(pipe, slices, [0, 1, 2, 3, 4], num_ensemble=7)
    assert members.shape == (5, 7, SIZE, SIZE) and members.min() >= 0 and members.max() <= 1
    fewer = sample_members(pipe, slices, [0, 1, 2, 3, 4], num_ensemble=2, batch_size=3)
    torch.testing.assert_close(fewer, members[:, :2], rtol=0, atol=1e-4)
    alone = sample_members(pipe, slices[3:4], [3], num_ensemble=7)
    torch.testing.assert_close(alone[0], members[3], rtol=0, atol=1e-4)
    # No two are alike, nor are those of two slices with the same image.
    same = sample_members(pipe, slices[:1].expand(2, -1, -1, -1), [0, 1], num_ensemble=3).flatten(0, 1)
    distances = (same[:, None] - same).abs().amax((2, 3))
    assert (distances[~torch.eye(6, dtype=torch.bool)] > 0.05).all()


def test_draws_are_bit_identical_for_any_batch_size():
    drawn = {}
    for batch_size in (1, 4, 100):
        pipe = make_pipeline()
        seen, original = {}, pipe.scheduler.draw_noise

        def recording(keys, size, seen=seen, original=original):
            noise = original(keys, size)
            for key, image in zip(keys, noise, strict=True):
                assert tuple(key.tolist()) not in seen
                seen[tuple(key.tolist())] = image.numpy().tobytes()
            return noise

        pipe.scheduler.draw_noise = recording
        pipe(make_slices(2, value_range=(0.0, 1.0)), batch_size=batch_size)
        drawn[batch_size] = seen
    # Every member of every slice draws the start and each of the steps, no two alike.
    assert len(drawn[1]) == len(set(drawn[1].values())) == 2 * 3 * (1 + 4)
    assert drawn[1] == drawn[4] == drawn[100]


def test_batches_are_full_across_slices_and_members():
    pipe = make_pipeline()
    batches = evaluated_batches(pipe)
    volume = make_volume()
    volume[..., 2] = 0  # no brain: not computed
    result = pipe(volume, batch_size=8)
    assert [len(batch) for batch in batches] == [8] * 4 + [4] * 4
    assert [batch.unique().item() for batch in batches] == [999, 666, 333, 0] * 2
    assert (result.member_maps[..., 2] == 0).all() and (result.member_maps[..., [0, 1, 3, 4]] > 0).any()


def test_members_are_chains_of_the_scheduler():
    pipe = make_pipeline(("t1", "t2"), scheduler=CIMDScheduler(clip_range=(0.0, 1.0)))
    slices, noise = make_slices(2, 2, (0.0, 1.0)), torch.randn(3 * 5, 2, 1, SIZE, SIZE)
    for sampler in ("ddpm", "ddim"):
        result = pipe(slices, noise=noise, batch_size=4, sampler=sampler)
        for member in range(3):
            sample, *drawn = noise[5 * member : 5 * (member + 1)]
            for step, t in enumerate((999, 666, 333, 0)):
                with torch.no_grad():
                    model_output = pipe.unet(torch.cat([slices, sample], 1), torch.full((2,), t)).sample
                given = drawn[step] if sampler == "ddpm" else None
                output = pipe.scheduler.step(model_output, t, sample, variance_noise=given, sampler=sampler)
                sample = output.prev_sample
            torch.testing.assert_close(result.member_maps[member], sample[:, 0], rtol=0, atol=1e-4)


def test_summary_of_the_members():
    pipe = make_pipeline(num_ensemble=4)
    result = pipe(make_slices(3, value_range=(0.0, 1.0)), threshold=0.4)
    maps = result.member_maps
    assert maps.shape == (4, 3, SIZE, SIZE) and maps.dtype == torch.float32
    masks = maps > 0.4
    assert torch.equal(result.member_masks, masks.to(torch.uint8))
    torch.testing.assert_close(result.mean_map, maps.mean(0))
    torch.testing.assert_close(result.std_map, ((maps - maps.mean(0)) ** 2).mean(0).sqrt(), rtol=0, atol=1e-6)
    share = masks.float().mean(0)
    torch.testing.assert_close(result.probability_map, share)
    assert set(share.unique().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    torch.testing.assert_close(result.agreement, torch.where(share > 0.5, share, 1 - share))
    assert torch.equal(result.majority_mask, (share > 0.5).to(torch.uint8))  # strict: half is no majority
    assert result.settings == {
        **FEW,
        "num_ensemble": 4,
        "sampler": "ddpm",
        "median_size": 0,
        "threshold": 0.4,
        "seed": 0,
        "draws": DRAWS_VERSION,
        "brain": "none",
    }


def test_median_of_the_members():
    slices = make_slices(3, value_range=(0.0, 1.0))
    raw = make_pipeline()(slices).member_maps
    filtered = make_pipeline(median_size=3)(slices).member_maps
    expected = ndimage.median_filter(raw.numpy(), size=(1, 1, 3, 3), mode="reflect")
    np.testing.assert_allclose(filtered, expected, rtol=0, atol=1e-6)
    assert (filtered - raw).abs().max() > 0.1


def test_volumes_on_their_own_grid():
    pipe = make_pipeline()
    volume = make_volume((30, 26, 4))
    affine = np.diag([-0.5, 0.5, 3.0, 1.0])
    result = pipe(nib.Nifti1Image(volume, affine))
    assert result.member_maps.shape == (3, 30, 26, 4) and result.member_masks.dtype == np.uint8
    for name in MAPS:
        assert getattr(result, name).shape == (30, 26, 4)
    np.testing.assert_array_equal(result.member_masks, result.member_maps > 0.5)
    np.testing.assert_allclose(result.mean_map, result.member_maps.mean(0), rtol=0, atol=1e-6)
    # Slice by slice: the slice at the same place of the network's grid.
    processed = pipe.processor.preprocess(nib.Nifti1Image(volume, affine))
    members = sample_members(pipe, processed.slices, list(range(4)))
    expected = pipe.processor.postprocess(members[:, 1] * processed.brain, processed)
    np.testing.assert_allclose(result.member_maps[1], expected, rtol=0, atol=1e-4)


def test_nothing_is_marked_outside_the_brain():
    brain = np.zeros((18, 20, 5), np.uint8)
    brain[4:9, 5:12, 1:3] = 1
    result = make_pipeline(brain_mask="given", threshold=0.0)(make_volume(), brain_mask=brain)
    far = ~ndimage.binary_dilation(
        brain, np.ones((5, 5, 1))
    )  # what is interpolated reaches a pixel of the network further
    assert result.member_masks[:, brain > 0].any() and not result.member_masks[:, far].any()


def test_results_are_saved(tmp_path):
    pipe = make_pipeline(brain_mask="none")
    volume = make_volume()
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    result = pipe(nib.Nifti1Image(volume, affine))
    result.save(tmp_path / "volume")
    names = sorted(path.name for path in (tmp_path / "volume").iterdir())
    arrays = ("member_masks", "member_maps", *MAPS)
    assert names == sorted([*(f"{name}.nii.gz" for name in arrays), "result.json"])
    for name in arrays:
        saved = nib.load(tmp_path / "volume" / f"{name}.nii.gz")
        expected = getattr(result, name)
        expected = np.moveaxis(expected, 0, -1) if name.startswith("member") else expected
        np.testing.assert_array_equal(saved.get_fdata(dtype=np.float32), expected)
        np.testing.assert_allclose(saved.affine, affine)
        assert saved.get_data_dtype() == expected.dtype
    record = json.loads((tmp_path / "volume" / "result.json").read_text())
    assert record["num_members"] == 3 and record["settings"] == result.settings

    # One slice of a plane as a NIfTI file, and as a picture.
    plane = pipe(nib.Nifti1Image(volume[..., 1], affine))
    plane.save(tmp_path / "plane")
    assert nib.load(tmp_path / "plane" / "member_maps.nii.gz").shape == (18, 20, 1, 3)
    picture = PIL.Image.fromarray((volume[..., 0] * 200).astype(np.uint8))
    result = pipe(picture)
    result.save(tmp_path / "picture")
    names = sorted(path.name for path in (tmp_path / "picture").iterdir())
    members = [f"{name}_{number:02d}.png" for name in ("member_masks", "member_maps") for number in range(3)]
    assert names == sorted([*members, *(f"{name}.png" for name in MAPS), "result.json"])
    for name, expected in (
        ("member_masks_01", result.member_masks[1] * 255.0),
        ("member_maps_02", result.member_maps[2] * 65535.0),
        ("agreement", result.agreement * 65535.0),
    ):
        saved = np.asarray(PIL.Image.open(tmp_path / "picture" / f"{name}.png"))
        assert saved.shape == picture.size[::-1]
        np.testing.assert_allclose(saved, expected, rtol=0, atol=0.5)
    # Two members in place of three: the third does not stay, what is not ours does.
    own = ["notes.txt", "mean_map_of_mine.png", "result_table.json"]
    for name in own:
        (tmp_path / "picture" / name).write_text("mine")
    pipe(picture, num_ensemble=2).save(tmp_path / "picture")
    left = [name for name in names if "_02" not in name]
    assert sorted(path.name for path in (tmp_path / "picture").iterdir()) == sorted([*left, *own])
    with pytest.raises(ValueError, match="has no grid to be written on"):
        pipe(make_slices(1, value_range=(0.0, 1.0))).save(tmp_path / "tensor")


def test_save_and_load_gives_the_same(tmp_path):
    scheduler = CIMDScheduler(clip_range=(0.0, 1.0))
    pipe = make_pipeline(scheduler=scheduler, threshold=0.3, median_size=3, sampler="ddim", num_ensemble=2)
    expected = pipe(make_volume())
    pipe.save_pretrained(tmp_path)
    loaded = CIMDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(loaded(make_volume()), expected)
    assert loaded.default_settings() == pipe.default_settings() and loaded.config.threshold == 0.3


def test_speed_options_change_little():
    pipe = make_pipeline(sampler="ddim")
    expected = pipe(make_volume())
    pipe.enable_fast_inference(channels_last=True)
    assert_same(pipe(make_volume()), expected)
    pipe.enable_fast_inference(mixed_precision="bf16")
    coarse = pipe(make_volume()).mean_map
    assert coarse.dtype == np.float32 and 0 < np.abs(coarse - expected.mean_map).mean() < 0.05


def test_a_damaged_network_is_told():
    pipe = make_pipeline()
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError) as raised:
        pipe(make_volume())
    assert str(raised.value) == NOT_FINITE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ensemble": 0}, "`num_ensemble` must be an integer of at least 1, got 0"),
        ({"num_ensemble": 2.0}, "`num_ensemble` must be an integer of at least 1, got 2.0"),
        ({"num_inference_steps": 1}, "`num_inference_steps` must be an integer between 2 and 1000, got 1"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` must be an integer between 2 and 1000, got 1001"),
        ({"sampler": "euler"}, "`sampler` must be one of ddpm, ddim, got 'euler'"),
        ({"median_size": 4}, "`median_size` must be odd, or 0 for no filter, got 4"),
        ({"median_size": -1}, "`median_size` must be an integer of at least 0, got -1"),
        ({"threshold": 1.0}, "`threshold` must be a finite number and at least 0 and below 1, got 1.0"),
        ({"threshold": -0.1}, "`threshold` must be a finite number and at least 0 and below 1, got -0.1"),
        ({"noise": torch.zeros(15, 5, 2, SIZE, SIZE)}, r"must have the shape \(at least 11, at least 5, 1, 16, 16\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(make_volume(), **arguments)


def test_wrong_settings():
    with pytest.raises(ValueError, match="`threshold` must be"):
        make_pipeline(threshold=2)
    with pytest.raises(ValueError, match="`threshold` must be"):
        make_pipeline(threshold=None)
    with pytest.raises(ValueError, match="between 2 and 100, got 200"):
        make_pipeline(scheduler=CIMDScheduler(100), num_inference_steps=200)
