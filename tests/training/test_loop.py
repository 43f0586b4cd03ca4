"""The order of samples and the noise of a sample, which exact resume and process counts rest on."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from anodiff import VolumeProcessor
from anodiff.schedulers.draws import DRAWS_VERSION, fold_in, make_keys
from anodiff.training import keys
from anodiff.training.objective_noise import ANDiObjective, NoiseObjective, draw_present
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
    assert streams == ["TRAINING", "VALIDATION", "PREVIEW"] and len(set(draws)) == len(draws) == 11
    drawn = [make_keys(0, range(50), vars(keys)[stream]) for stream in streams]
    drawn += [fold_in(one, draw) for one in drawn for draw in draws]
    assert len(torch.cat(drawn).unique(dim=0)) == 50 * 3 * 12


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


def objective(modalities=("image",), kind=NoiseObjective, context=0, **options):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=len(modalities) * (2 * context + 1),
        out_channels=len(modalities) * (2 * context + 1),
        layers_per_block=1,
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    processor = VolumeProcessor(modalities=modalities, size=(8, 8), context=context)
    return kind(unet, kind.scheduler_class(), processor, **options)


@pytest.mark.parametrize(("loss", "dropout"), [("l2", 0.0), ("l1", 0.0), ("hybrid", 0.0), ("l2", 0.5)])
def test_loss_of_a_sample_does_not_depend_on_the_batch(loss, dropout):
    built = objective(("t1", "t2") if dropout else ("image",), loss=loss, modality_dropout=dropout)
    images = torch.rand(6, built.model.config.in_channels, 8, 8) * 2 - 1
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


def test_a_modality_is_hidden_as_often_as_asked_for_and_never_all():
    drawn = draw_present(make_keys(0, range(4000)), 3, 0.4)
    assert drawn.shape == (4000, 3) and drawn.any(1).all()
    # All three would be hidden in 0.4^3 of the samples: there each stays once in three.
    torch.testing.assert_close(drawn.float().mean(0), torch.full((3,), 0.6 + 0.4**3 / 3), rtol=0, atol=0.03)
    assert torch.equal(drawn[7:9], draw_present(make_keys(0, [7, 8]), 3, 0.4))
    assert draw_present(make_keys(0, range(50)), 3, 0.0).all()


@pytest.mark.parametrize("kind", [NoiseObjective, ANDiObjective])
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_loss_is_that_of_the_modalities_that_are_seen(kind, loss):
    built = objective(("t1", "t2", "flair"), kind, loss=loss, modality_dropout=0.5)
    keys, images = make_keys(0, range(20)), torch.rand(20, 3, 8, 8) * 2 - 1
    present, seen = draw_present(keys, 3, 0.5), []
    built.model.register_forward_hook(lambda _, given, output: seen.append((given[0], output.sample)))
    noise = []
    add_noise = built.scheduler.add_noise
    built.scheduler.add_noise = lambda *given: noise.append(given[1]) or add_noise(*given)
    losses = built.loss(built.model, {"image": images}, keys)
    losses.sum().backward()
    ((sample, output),) = seen
    assert (sample[~present] == -1).all() and (sample[present].std((1, 2)) > 0.1).all()
    error = (output - noise[0]).abs() if loss == "l1" else (output - noise[0]).square()
    expected = torch.stack([error[row][present[row]].mean() for row in range(20)])
    torch.testing.assert_close(losses, expected)
    assert 0 < present.float().mean() < 1 and present.sum(1).unique().tolist() == [1, 2, 3]
    # What a hidden modality shows has no part in it.
    other = torch.where(present[..., None, None], images, torch.rand(20, 3, 8, 8))
    torch.testing.assert_close(built.loss(built.model, {"image": other}, keys), losses)
    assert built.make_pipeline(built.model).may_lack == ["t1", "t2", "flair"]


def test_a_modality_is_hidden_in_neighbouring_slices_too():
    built = objective(("t1", "t2"), context=1, modality_dropout=0.5)
    keys, seen = make_keys(0, range(20)), []
    built.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    built.loss(built.model, {"image": torch.rand(20, 6, 8, 8)}, keys)
    hidden = (seen[0] == -1).all((2, 3)).reshape(20, 3, 2)  # of the three slices
    assert torch.equal(hidden, ~draw_present(keys, 2, 0.5)[:, None].expand(20, 3, 2)) and hidden.any()


def test_without_dropout_no_modality_is_optional():
    built = objective(("t1", "t2"))
    assert built.make_pipeline(built.model).may_lack == []


def test_wrong_arguments():
    for options, message in (
        ({"modality_dropout": 1.0}, "`modality_dropout` must be a finite number and at least 0 and below 1, got 1.0"),
        ({"modality_dropout": 0.2, "loss": "hybrid"}, "`modality_dropout` needs the `loss` l2 or l1, got hybrid"),
        ({"modality_dropout": 0.2, "modalities": ("t1",)}, "must be 0 for data of one modality, t1, got 0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(**{"modalities": ("t1", "t2"), **options})
    with pytest.raises(ValueError, match="`loss` must be one of l2, l1, hybrid"):
        objective(loss="l3")
    with pytest.raises(ValueError, match="`max_timestep` must be an integer between 1 and 1000"):
        objective(max_timestep=0)
