"""Simplex noise of AnoDDPM and brain_damage against recorded arrays; sizes, seeds, parameters come from the files."""

import re

import numpy as np
import pytest
import torch

from anodiff.schedulers.simplex import OctaveSimplexNoise, opensimplex2, opensimplex3, permutation_tables

from .recordings import read, recordings


EXACT = {"rtol": 0, "atol": 1e-12}
STANDARDISED = {"rtol": 0, "atol": 1e-5}  # the original accumulates and standardises in float32


@pytest.fixture(params=recordings("anoddpm/simplex_points*.npz"), ids=lambda path: path.stem)
def points(request):
    return read(request.param)


@pytest.fixture(params=recordings("anoddpm/octave_fields*.npz"), ids=lambda path: path.stem)
def fields(request):
    return read(request.param)


@pytest.fixture(params=recordings("anoddpm/brain_damage_noise*.npz"), ids=lambda path: path.stem)
def brain_damage(request):
    return read(request.param)


def options(fields):
    return {
        "octaves": int(fields["octaves"]),
        "persistence": float(fields["persistence"]),
        "wavelength": float(fields["wavelength"]),
    }


def named(fields, pattern):
    """The array whose name matches, with the numbers in its name."""
    matches = [(re.fullmatch(pattern, name), array) for name, array in fields.items()]
    [(match, array)] = [(match, array) for match, array in matches if match]
    return match.groups(), array


def test_permutation_tables(points):
    tables = permutation_tables(torch.from_numpy(points["seeds"])).numpy()
    np.testing.assert_array_equal(tables, points["perm"])
    np.testing.assert_array_equal(tables % 24 * 3, points["perm_grad_index3"])


def test_noise_at_points(points):
    seeds, where = torch.from_numpy(points["seeds"]), torch.from_numpy(points["points"])
    np.testing.assert_allclose(opensimplex3(seeds, where).numpy(), points["noise3"], **EXACT)
    np.testing.assert_allclose(opensimplex2(seeds, where[:, :2]).numpy(), points["noise2"], **EXACT)


def test_fields_follow_the_timestep(fields):
    golden = fields["field3"]
    seeds, timesteps = torch.from_numpy(fields["seeds"]), torch.from_numpy(fields["t"])
    noise = OctaveSimplexNoise(**options(fields), z="timestep")
    result = noise(seeds[:, None].expand(golden.shape[:2]), timesteps, *golden.shape[2:], dtype=torch.float64)
    np.testing.assert_allclose(result.numpy(), golden, **EXACT)


def test_plan_at_every_timestep(fields):
    golden = fields["field3"]
    for i, t in enumerate(fields["t"]):
        noise = OctaveSimplexNoise(**options(fields), z=float(t))
        result = noise(torch.from_numpy(fields["seeds"]), None, *golden.shape[2:], dtype=torch.float64)
        np.testing.assert_allclose(result.numpy(), golden[:, i], **EXACT)


def test_default_field(fields):
    (t,), golden = named(fields, r"field_default_t(\d+)")
    seed = torch.from_numpy(fields["seeds"])[0]
    for noise in (OctaveSimplexNoise(z="timestep"), OctaveSimplexNoise(z=float(t))):
        result = noise(seed, torch.tensor(int(t)), *golden.shape, dtype=torch.float64)
        np.testing.assert_allclose(result.numpy(), golden, **EXACT)


def test_parameter_grid(fields):
    (t, height, width), golden = named(fields, r"param_fields_t(\d+)_(\d+)x(\d+)")
    seed = torch.from_numpy(fields["seeds"])[0]
    assert len(golden) == len(fields["param_grid"])
    for (octaves, persistence, wavelength), expected in zip(fields["param_grid"], golden, strict=True):
        for z in (float(t), "timestep"):
            noise = OctaveSimplexNoise(int(octaves), float(persistence), float(wavelength), z=z)
            result = noise(seed, torch.tensor(int(t)), int(height), int(width), dtype=torch.float64)
            np.testing.assert_allclose(result.numpy(), expected, **EXACT)


def test_volume(fields):
    (octaves, persistence, wavelength), golden = named(fields, r"volume_o(\d+)_p(\d+)_w(\d+)")
    # Recorded names write 0.5 as p05. A volume is its slices: the third coordinate scales like the other two.
    noise = OctaveSimplexNoise(
        int(octaves), float(f"{persistence[0]}.{persistence[1:]}"), float(wavelength), z="timestep"
    )
    seeds = torch.from_numpy(fields["seeds"])[:1].expand(len(golden))
    result = noise(seeds, torch.arange(len(golden)), *golden.shape[1:], dtype=torch.float64)
    np.testing.assert_allclose(result.numpy(), golden, **EXACT)


def test_square_field_of_the_2d_function(fields):
    golden = fields["field2_square"]
    grid = torch.from_numpy(np.indices(golden.shape[1:])).double().flip(0).flatten(1).T  # (H*W, 2) as (x, y)
    result = torch.zeros(len(golden), grid.shape[0], dtype=torch.float64)
    for octave in range(int(fields["octaves"])):
        values = opensimplex2(torch.from_numpy(fields["seeds"]), grid / (float(fields["wavelength"]) / 2**octave))
        result += float(fields["persistence"]) ** octave * values
    np.testing.assert_allclose(result.view(golden.shape).numpy(), golden, **EXACT)


def test_brain_damage(brain_damage):
    golden, raw = brain_damage["noise"], brain_damage["raw_float64"]
    seeds, timesteps = torch.from_numpy(brain_damage["seeds"]), torch.from_numpy(brain_damage["t"])

    noise = OctaveSimplexNoise(wavelength=32, z="timestep_unscaled")
    result = noise(seeds, timesteps, *raw.shape[1:], dtype=torch.float64)
    np.testing.assert_allclose(result.numpy(), raw, **EXACT)

    noise = OctaveSimplexNoise(wavelength=32, z="timestep_unscaled", normalize="per_image")
    result = noise(seeds[:, None], timesteps[:, None], *golden.shape[2:])
    np.testing.assert_allclose(result.numpy(), golden, **STANDARDISED)


def test_brain_damage_with_one_timestep(brain_damage):
    golden = brain_damage["scalar_noise"]
    noise = OctaveSimplexNoise(
        octaves=int(brain_damage["scalar_octaves"]),
        persistence=float(brain_damage["scalar_decay"]),
        wavelength=1 / float(brain_damage["scalar_base_frequency"]),
        z="timestep_unscaled",
        normalize="per_image",
    )
    seed = torch.from_numpy(brain_damage["scalar_seed"]).view(1, 1)
    result = noise(seed, torch.from_numpy(brain_damage["scalar_t"]), *golden.shape[2:])
    np.testing.assert_allclose(result.numpy(), golden, **STANDARDISED)


def test_seeds_come_from_the_recorded_generator(brain_damage):
    """The recording is what it says it is: the originals draw their seeds from numpy's global legacy generator."""
    draws = np.random.RandomState(int(brain_damage["np_random_seed"])).randint(0, 1000000, len(brain_damage["seeds"]))
    np.testing.assert_array_equal(draws, brain_damage["seeds"])
    draw = np.random.RandomState(int(brain_damage["scalar_np_random_seed"])).randint(0, 1000000)
    assert draw == brain_damage["scalar_seed"]
