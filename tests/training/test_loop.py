"""The order of samples and the noise of a sample, which exact resume and process counts rest on."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import AnoDDPMScheduler, VolumeProcessor
from anodiff.schedulers.draws import DRAWS_VERSION, fold_in, make_keys
from anodiff.training import keys
from anodiff.training.objective_noise import NoiseObjective
from anodiff.training.samples import PositionBatches, SampleStream
from anodiff.training.state import Progress


class Numbers:
    """A split whose image is its row number."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def rows_of(self, population):
        assert population == "all"
        return np.arange(self.length)

    def read_rows(self, rows, columns):
        assert columns == ("image",)
        return {"image": np.array(rows, dtype=np.float32)}


def order(stream, batches):
    return [int(row) for batch in batches for row in stream.__getitems__(batch)["image"]]


def test_every_epoch_is_a_permutation_of_its_own():
    stream = SampleStream(Numbers(7), seed=3)
    rows = order(stream, PositionBatches(0, 3, 7, 1, 1, 0))
    epochs = [rows[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(SampleStream(Numbers(7), seed=4), PositionBatches(0, 1, 7, 1, 1, 0)) != epochs[0]


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(12, 1, 1), (3, 4, 1), (3, 2, 2), (2, 2, 3)])
def test_a_step_sees_the_same_samples_however_it_is_divided(batch_size, accumulation, processes):
    steps = []
    for process in range(processes):
        batches = list(PositionBatches(0, 5, batch_size, accumulation, processes, process))
        assert len(batches) == len(PositionBatches(0, 5, batch_size, accumulation, processes, process))
        steps += [(step, sum(batches[step * accumulation : (step + 1) * accumulation], [])) for step in range(5)]
    for step in range(5):
        positions = sum((mine for number, mine in steps if number == step), [])
        assert sorted(positions) == list(range(step * 12, (step + 1) * 12))


def test_going_on_is_as_if_nothing_had_happened():
    whole = list(PositionBatches(0, 6, 4, 2, 1, 0))
    assert list(PositionBatches(0, 2, 4, 2, 1, 0)) + list(PositionBatches(2, 6, 4, 2, 1, 0)) == whole
    stream, again = SampleStream(Numbers(5), seed=0), SampleStream(Numbers(5), seed=0)
    assert order(stream, whole)[16:] == order(again, whole[4:])


def test_several_updates_of_a_batch_see_its_samples():
    once = list(PositionBatches(0, 2, 3, 2, 1, 0))
    twice = list(PositionBatches(0, 4, 3, 2, 1, 0, updates_per_batch=2))
    assert twice == once[:2] * 2 + once[2:] * 2
    # Going on in the middle of a batch is as if nothing had happened.
    assert list(PositionBatches(3, 4, 3, 2, 1, 0, updates_per_batch=2)) == twice[6:]


def test_every_draw_has_keys_of_its_own():
    names = [name for name in vars(keys) if name.isupper()]
    streams, draws = names[:3], [vars(keys)[name] for name in names[3:]]
    assert streams == ["TRAINING", "VALIDATION", "PREVIEW"] and len(set(draws)) == len(draws) == 10
    drawn = [make_keys(0, range(50), vars(keys)[stream]) for stream in streams]
    drawn += [fold_in(one, draw) for one in drawn for draw in draws]
    assert len(torch.cat(drawn).unique(dim=0)) == 50 * 3 * 11


def test_only_the_same_training_goes_on():
    state = {**Progress(16, 1).state_dict(), "step": 7}
    again = Progress(16, 1)
    again.load_state_dict(state)
    assert again.step == 7
    for change, message in (
        ({"samples_per_step": 8}, "trained with 8 samples per step, this run has 16"),
        ({"updates_per_batch": 2}, "trained with 2 updates per batch, this run has 1"),
        (
            {"draws_version": "philox, 0"},
            f"trained with version philox, 0 of the random numbers, this run has {DRAWS_VERSION}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Progress(16, 1).load_state_dict({**state, **change})
    del state["draws_version"]  # that of an earlier program
    with pytest.raises(ValueError, match="trained with version none of the random numbers"):
        Progress(16, 1).load_state_dict(state)


def objective(**options):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    return NoiseObjective(unet, AnoDDPMScheduler(), VolumeProcessor(size=(8, 8)), **options)


@pytest.mark.parametrize("loss", ["l2", "l1", "hybrid"])
def test_loss_of_a_sample_does_not_depend_on_the_batch(loss):
    built = objective(loss=loss)
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        together = built.loss(built.model, {"image": images}, make_keys(0, range(6)))
        alone = torch.cat([built.loss(built.model, {"image": images[i : i + 1]}, make_keys(0, [i])) for i in range(6)])
        other_seed = built.loss(built.model, {"image": images}, make_keys(1, range(6)))
        validation = built.loss(built.model, {"image": images}, make_keys(0, range(6), 1))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert (together - other_seed).abs().min() > 1e-6 and (together - validation).abs().min() > 1e-6


def test_timesteps_are_uniform_below_the_limit():
    built = objective(max_timestep=5)
    seen = []
    add_noise = built.scheduler.add_noise

    def recording(images, noise, timesteps):
        seen.extend(timesteps.tolist())
        return add_noise(images, noise, timesteps)

    built.scheduler.add_noise = recording
    with torch.no_grad():
        built.loss(
            built.model,
            {"image": torch.zeros(1000, 1, 8, 8)},
            make_keys(0, range(1000)),
        )
    counts = Counter(seen)
    assert sorted(counts) == [0, 1, 2, 3, 4] and min(counts.values()) > 150


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`loss` must be one of l2, l1, hybrid"):
        objective(loss="l3")
    with pytest.raises(ValueError, match="`max_timestep` must be an integer between 1 and 1000"):
        objective(max_timestep=0)
