"""Keyed draws: known answers, independence of everything but key and position, and distributions."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from anodiff.schedulers import draws
from anodiff.schedulers.draws import fold_in, integers, make_keys, normal, philox, uniform, words


KEYS = make_keys(7, range(6), 3)


# The first two and the digits of pi are the known answers of the authors' library Random123.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
@pytest.mark.parametrize("make", [lambda word: torch.tensor([word]), lambda word: np.array([word], np.uint64)])
def test_known_answers(counter, key, expected, make):
    drawn = philox([make(word) for word in counter], [make(word) for word in key])
    assert [int(word[0]) for word in drawn] == expected


def test_words_are_blocks_of_philox():
    zero = torch.zeros(1, 2, dtype=torch.int64)
    assert words(zero, 4)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for position in (4, 9, 70_001):
        block = philox(torch.tensor([[position // 4], [0], [0], [0]]), torch.zeros(2, 1, dtype=torch.int64))
        assert words(zero, position + 1)[0, position] == block[position % 4][0]


def test_keys_are_folded_from_seed_index_and_draw():
    seeds = torch.tensor([[7, 0]])
    for index in range(6):
        torch.testing.assert_close(fold_in(fold_in(seeds, index), 3)[0], KEYS[index], rtol=0, atol=0)
    assert torch.equal(make_keys(7, torch.arange(6), torch.full((6,), 3)), KEYS)
    assert KEYS.min() >= 0 and KEYS.max() < 2**32 and KEYS.dtype == torch.int64
    # Beyond 32 bits nothing is cut off.
    numbers = [0, 1, 2**31, 2**32, 2**32 + 1, 2**40]
    different = torch.cat([make_keys(seed, numbers, draw) for seed in (0, 2**32, 2**63) for draw in (0, 2**33)])
    assert len(different.unique(dim=0)) == 36
    with pytest.raises(ValueError, match=r"`seed` must be at least 0 and below 2\^64, got -1"):
        make_keys(-1, 0)


@pytest.mark.parametrize(
    "draw", [words, lambda keys, count: normal(keys, (count,)), lambda keys, count: uniform(keys, (count,))]
)
def test_a_number_depends_on_key_and_position_alone(draw, monkeypatch):
    together = draw(KEYS, 1001)
    for count in (1, 3, 4, 1000):
        assert torch.equal(draw(KEYS, count), together[:, :count])
    assert torch.equal(torch.cat([draw(key[None], 1001) for key in KEYS]), together)
    assert torch.equal(draw(KEYS.flip(0), 1001), together.flip(0))
    # Chunks are a matter of the cache alone.
    monkeypatch.setattr(draws, "BLOCKS_PER_CHUNK", 7)
    assert torch.equal(draw(KEYS, 1001), together)
    assert draw(KEYS[:0], 5).shape == (0, 5)


def test_tensor_operations_give_the_same_as_numpy():
    """What runs on other devices than the CPU."""
    for store, expected in ((draws._store_words, words(KEYS, 400)), (draws._store_normals, normal(KEYS, (400,)))):
        values = torch.empty(6, 100, 4, dtype=expected.dtype)
        draws._fill(KEYS, values, store)
        assert_close(values.flatten(1), expected, rtol=0, atol=0)
    numbers = torch.tensor([0, 1, 5, 2**32, 2**40, 3])
    assert torch.equal(draws._fold(KEYS, numbers), fold_in(KEYS, numbers))


def test_kernels_are_for_cuda_devices_with_triton(monkeypatch):
    monkeypatch.setattr(draws, "find_spec", lambda name: None)
    assert draws._kernels.__wrapped__("cuda") is None  # Windows: tensor operations
    monkeypatch.setattr(draws, "find_spec", lambda name: pytest.fail("it was looked for"))
    assert draws._kernels.__wrapped__("mps") is None


def test_another_process_draws_the_same():
    script = (
        "import json; from anodiff.schedulers.draws import make_keys, words, normal;"
        "keys = make_keys(7, range(6), 3); print(json.dumps([words(keys, 9).tolist(), normal(keys, (9,)).tolist()]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    drawn = json.loads(done.stdout)
    assert drawn == [words(KEYS, 9).tolist(), normal(KEYS, (9,)).tolist()]


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    normal(make_keys(1, range(3)), (5,))
    assert torch.equal(torch.rand(3), expected)


def test_shapes_and_types():
    assert normal(KEYS, (2, 3, 5)).shape == (6, 2, 3, 5) and normal(KEYS, (2,), torch.float64).dtype == torch.float64
    assert uniform(KEYS).shape == (6,) and integers(KEYS, 5, (4,)).dtype == torch.int64
    assert torch.equal(normal(KEYS, (4, 5)), normal(KEYS, (20,)).view(6, 4, 5))


def test_uniform_numbers_are_uniform():
    values = uniform(make_keys(0, range(64)), (4096,)).double()
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    # Every one of the 32 bits of a word is set half of the time.
    drawn = words(make_keys(1, range(64)), 4096)
    share = torch.stack([(drawn >> bit & 1).double().mean() for bit in range(32)])
    assert_close(share, torch.full((32,), 0.5).double(), rtol=0, atol=5 * 0.5 / drawn.numel() ** 0.5)


def test_integers_are_uniform_and_below_their_limit():
    drawn = integers(make_keys(0, range(1000)), 7, (100,))
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert integers(make_keys(0, range(1000)), 1).max() == 0
    assert integers(make_keys(0, range(1000)), 2**31).max() >= 2**30


def test_normal_numbers_are_normal():
    values = normal(make_keys(0, range(64)), (4096,)).double().flatten()
    count = len(values)
    assert abs(values.mean()) < 5 / count**0.5 and abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((values**3).mean()) < 5 * (15 / count) ** 0.5 and abs((values**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert 4.3 < values.abs().max() < 6.8


@pytest.mark.parametrize("neighbours", ["seeds", "slices", "draws", "folds", "positions"])
def test_neighbours_are_not_correlated(neighbours):
    if neighbours == "positions":
        values = normal(make_keys(0, 5), (64 * 4096,)).view(64, 4096)
    else:
        keys = {
            "seeds": lambda: torch.cat([make_keys(seed, 5, 2) for seed in range(64)]),
            "slices": lambda: make_keys(0, range(64), 2),
            "draws": lambda: make_keys(0, 5, range(64)),
            "folds": lambda: fold_in(make_keys(0, [5] * 64, 2), torch.arange(64)),
        }[neighbours]()
        values = normal(keys, (4096,))
    correlation = torch.corrcoef(values.double()) - torch.eye(64).double()
    # 2016 pairs, each with a standard deviation of 1 / 64.
    assert correlation.abs().max() < 5 / 64
    assert abs(correlation.square().sum() / (64 * 63) - 1 / 4096) < 3e-5


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 6, 4096])
def test_a_gpu_draws_the_same_words_in_one_launch(count):
    keys = make_keys(7, range(count), 3)
    device_keys = make_keys(7, range(count), 3, "cuda")
    numbers = torch.arange(count) * 2**33 + 5
    assert torch.equal(device_keys.cpu(), keys)
    assert torch.equal(fold_in(device_keys, 5).cpu(), fold_in(keys, 5))
    assert torch.equal(fold_in(device_keys, numbers.to("cuda")).cpu(), fold_in(keys, numbers))
    for size in (1, 1001):
        assert torch.equal(words(device_keys, size).cpu(), words(keys, size))
        assert torch.equal(uniform(device_keys, (size,)).cpu(), uniform(keys, (size,)))
    assert words(device_keys[:0], 5).shape == (0, 5)
    assert_close(normal(device_keys, (4, 33, 7)).cpu(), normal(keys, (4, 33, 7)), rtol=0, atol=5e-6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        normal(device_keys, (4, 33, 7))
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels == ["_fill"]
