import copy

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from anodiff.schedulers import simplex
from anodiff.schedulers.draws import make_keys
from anodiff.schedulers.noise import draw_pyramid, draw_seeds, pyramid_noise, pyramid_sizes
from anodiff.schedulers.simplex import (
    NORMALIZATIONS,
    OFFSET_ORIGIN,
    OctaveSimplexNoise,
    opensimplex2,
    opensimplex3,
    permutation_tables,
)


# The two rules of the papers, a fixed plane, and everything that is done to a field afterwards.
VARIANTS = [
    {"z": 0.0},
    {"z": 13.7, "normalize": "per_image"},
    {"z": "timestep", "normalize": "analytic"},
    {"z": "timestep_unscaled", "wavelength": 32, "normalize": "per_image"},
    {"z": None, "normalize": "per_image"},
    {"z": 5, "wavelength": 8, "random_offset": True},
    {"z": "timestep", "wavelength": 8, "random_offset": True},
]


def bits(fields):
    return fields.view(torch.int64 if fields.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_field_does_not_depend_on_its_batch(variant, dtype):
    noise = OctaveSimplexNoise(**variant)
    # 67 is more than one chunk of seeds, and neither size divides the vector width of a processor.
    seeds = torch.arange(67) * 7919 - 100
    timesteps = torch.arange(67) % 5 * 50
    together = noise(seeds, timesteps, 13, 19, dtype=dtype)
    assert together.shape == (67, 13, 19) and together.dtype == dtype
    for size in (1, 2, 3, 16, 33):
        parts = [
            noise(s, t, 13, 19, dtype=dtype) for s, t in zip(seeds.split(size), timesteps.split(size), strict=True)
        ]
        assert torch.equal(bits(torch.cat(parts)), bits(together))
    order = torch.arange(67).flip(0)
    assert torch.equal(bits(noise(seeds[order], timesteps[order], 13, 19, dtype=dtype)), bits(together[order]))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("wavelength", [64.0, 10.5, 0.7])
def test_plan_equals_the_direct_version(wavelength, normalize):
    seeds = torch.tensor([0, 5, -3])
    direct = OctaveSimplexNoise(5, 0.7, wavelength, z="timestep", normalize=normalize)
    planned = OctaveSimplexNoise(5, 0.7, wavelength, z=77, normalize=normalize)
    expected = direct(seeds, torch.tensor(77), 20, 33, dtype=torch.float64)
    assert_close(planned(seeds, None, 20, 33, dtype=torch.float64), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_float32_is_close_to_float64(variant):
    noise = OctaveSimplexNoise(**variant)
    seeds, timesteps = torch.arange(4), torch.tensor([0, 3, 3, 250])
    expected = noise(seeds, timesteps, 32, 24, dtype=torch.float64)
    assert_close(noise(seeds, timesteps, 32, 24).double(), expected, rtol=0, atol=1e-5)
    assert noise(seeds, timesteps, 32, 24, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_octaves_are_points_of_the_noise():
    seeds = torch.tensor([3, 4])
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    points = torch.stack([x, y, torch.full_like(x, 40.0)], -1).reshape(-1, 3).double()
    expected = opensimplex3(seeds, points / 16) + 0.5 * opensimplex3(seeds, points / 8)
    noise = OctaveSimplexNoise(2, 0.5, 16, z=40)
    assert_close(noise(seeds, None, 5, 6, dtype=torch.float64).flatten(1), expected, rtol=0, atol=1e-12)


def test_octaves_of_two_coordinates():
    seeds = torch.tensor([3, 4])
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    points = torch.stack([x, y], -1).reshape(-1, 2).double()
    expected = opensimplex2(seeds, points / 16) + 0.5 * opensimplex2(seeds, points / 8)
    noise = OctaveSimplexNoise(2, 0.5, 16, z=None)
    assert_close(noise(seeds, None, 5, 6, dtype=torch.float64).flatten(1), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="`normalize` must be 'none' or 'per_image' with `z=None`"):
        OctaveSimplexNoise(z=None, normalize="analytic")


def test_unscaled_timestep_is_the_same_in_every_octave():
    seeds = torch.tensor([3])
    points = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0, 0.0, 9.0]], dtype=torch.float64)
    expected = opensimplex3(seeds, points / 16 + z) + 0.8 * opensimplex3(seeds, points / 8 + z)
    noise = OctaveSimplexNoise(2, 0.8, 16, z="timestep_unscaled")
    assert_close(noise(seeds, torch.tensor([9]), 1, 2, torch.float64)[..., 1], expected, rtol=0, atol=1e-12)


def test_permutation_tables_are_permutations():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    tables = permutation_tables(seeds)
    assert torch.equal(tables.sort(1).values, torch.arange(256).expand(5, -1))
    assert len(tables.unique(dim=0)) == 5
    assert torch.equal(torch.cat([permutation_tables(seed) for seed in seeds.split(1)]), tables)


def test_permutation_table_follows_the_written_rule():
    def step(state):
        return (state * 6364136223846793005 + 1442695040888963407 + 2**63) % 2**64 - 2**63

    # The last seed makes state + 31 exceed 64 bits at some step in practice; Python integers do not wrap.
    for seed in (0, 987654321, -(2**63)):
        state, source, expected = step(step(step(seed))), list(range(256)), [0] * 256
        for i in reversed(range(256)):
            state = step(state)
            r = (state + 31) % (i + 1)
            expected[i], source[r] = source[r], source[i]
        assert permutation_tables(torch.tensor([seed]))[0].tolist() == expected


def test_permutation_tables_follow_any_chain_of_moves(monkeypatch):
    # As many links as there can be, none at all, and one position that everybody chooses: states that no seed gives.
    positions = torch.arange(256)
    for chosen in ((positions - 1).clamp(min=0), positions, torch.zeros_like(positions)):
        source, expected = list(range(256)), [0] * 256
        for i in reversed(range(256)):
            expected[i], source[chosen[i]] = source[chosen[i]], source[i]
        # state + 31 modulo (i + 1) is the choice; three states come before.
        states = torch.cat([torch.zeros(3, dtype=torch.int64), (chosen - 31).remainder(positions + 1).flip(0)])
        jumps = torch.zeros(259, 1, dtype=torch.int64), states[:, None]
        monkeypatch.setattr(simplex, "_lcg_jumps", lambda steps, device, jumps=jumps: jumps)
        assert permutation_tables(torch.zeros(2, dtype=torch.int64)).tolist() == [expected] * 2


@pytest.mark.parametrize("z", ["timestep", "timestep_unscaled"])
def test_shared_geometry_and_a_field_s_own_give_the_same_bits(z):
    noise, seeds, timesteps = OctaveSimplexNoise(3, z=z), torch.arange(7), torch.tensor([5, 0, 5, 9, 9, 5, 1])
    together = noise(seeds, timesteps, 12, 17)
    tables, by_hash = permutation_tables(seeds), simplex._tables3(seeds.device)[2]
    points = torch.rand(3, 7, 50, dtype=torch.float64)
    points[:, [2, 5]], points[:, 4] = points[:, :1], points[:, 3]
    owner = torch.tensor([0, 1, 0, 3, 3, 0, 6])
    own = simplex._evaluate(simplex._vertices3, by_hash, tables, points, None)
    assert torch.equal(bits(simplex._evaluate(simplex._vertices3, by_hash, tables, points, owner)), bits(own))
    for seed, timestep, field in zip(seeds, timesteps, together, strict=True):
        assert torch.equal(bits(noise(seed[None], timestep, 12, 17)[0]), bits(field))


def test_seeds_keep_their_shape_and_give_independent_fields():
    noise = OctaveSimplexNoise(wavelength=4, z="timestep")
    seeds = draw_seeds(make_keys(0, range(2)), 3)
    fields = noise(seeds, torch.tensor([[10], [20]]), 40, 50)
    assert fields.shape == (2, 3, 40, 50)
    correlation = torch.corrcoef(fields.reshape(6, -1)) - torch.eye(6)
    assert_close(correlation, torch.zeros(6, 6), rtol=0, atol=0.15)
    # The same seed gives another field at another timestep, and the same one at the same.
    same = noise(torch.tensor([1, 1, 1]), torch.tensor([10, 10, 11]), 8, 8)
    assert torch.equal(same[0], same[1]) and not torch.allclose(same[0], same[2])
    assert noise(torch.tensor(1), torch.tensor(10), 8, 8).shape == (8, 8)


def test_statistics_of_the_normalisations():
    seeds = torch.arange(200)
    raw = OctaveSimplexNoise(wavelength=16)(seeds, None, 48, 48)
    per_image = OctaveSimplexNoise(wavelength=16, normalize="per_image")(seeds, None, 48, 48)
    analytic = OctaveSimplexNoise(wavelength=16, normalize="analytic")(seeds, None, 48, 48)

    # 0.505 with wavelengths above 1 pixel, less here: the last octaves see only lattice points of their plane.
    assert_close(raw.std(), torch.tensor(0.5), rtol=0, atol=0.02)
    assert_close(analytic, raw / 0.505, rtol=2e-3, atol=0)
    assert_close(per_image.mean((1, 2)), torch.zeros(200), rtol=0, atol=1e-5)
    assert_close(per_image.std((1, 2), correction=0), torch.ones(200), rtol=0, atol=1e-5)
    expected = (raw - raw.mean((1, 2), keepdim=True)) / raw.std((1, 2), keepdim=True, correction=0)
    assert_close(per_image, expected, rtol=0, atol=1e-5)


def test_random_offset_makes_the_standard_deviation_uniform():
    def spread(random_offset):
        noise = OctaveSimplexNoise(4, wavelength=8, random_offset=random_offset)
        per_pixel = noise(torch.arange(4000), None, 16, 16).std(0)
        return ((per_pixel.max() - per_pixel.min()) / per_pixel.mean()).item()

    # 0.05 with infinitely many fields (the lattice), 0.08 with these. The first pixel without offset is always 0.
    assert spread(True) < 0.15
    assert spread(False) > 0.9


def test_random_offset_moves_a_field_by_whole_pixels():
    seeds = torch.arange(24)
    noise = OctaveSimplexNoise(2, 0.5, 4, z=3, random_offset=True)
    fields = noise(seeds, None, 5, 6, dtype=torch.float64)

    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    points = torch.stack([x + 4 * OFFSET_ORIGIN[0], y + 4 * OFFSET_ORIGIN[1], torch.full_like(x, 3)], -1)
    points = points.reshape(-1, 3).double()
    whole = (opensimplex3(seeds, points / 4) + 0.5 * opensimplex3(seeds, points / 2)).view(24, 8, 9)
    found = []
    for field, large in zip(fields, whole, strict=True):
        offsets = [(top, left) for top in range(4) for left in range(4)]
        found += [(i, j) for i, j in offsets if torch.allclose(large[i : i + 5, j : j + 6], field, rtol=0, atol=1e-12)]
    assert len(found) == 24
    assert {i for i, _ in found} == {j for _, j in found} == {0, 1, 2, 3}


def test_a_plan_is_kept_and_a_copy_works():
    noise = OctaveSimplexNoise(2, wavelength=8)
    first = noise(torch.tensor([1]), None, 8, 9)
    plan = noise._plans[8, 9, torch.device("cpu"), torch.float32]
    assert torch.equal(noise(torch.tensor([1]), None, 8, 9), first)
    assert noise._plans[8, 9, torch.device("cpu"), torch.float32] is plan
    for size in range(1, 9):
        noise(torch.tensor([1]), None, size, size)
    assert len(noise._plans) == 4
    assert torch.equal(copy.deepcopy(noise)(torch.tensor([1]), None, 8, 9), first)


def test_a_single_pixel_at_the_origin_is_zero():
    noise = OctaveSimplexNoise()
    assert torch.equal(noise(torch.arange(3), None, 1, 1), torch.zeros(3, 1, 1))


def test_seeds_depend_on_their_key_alone():
    keys = make_keys(0, [3, 4, 5])
    seeds = draw_seeds(keys, 4)
    assert seeds.shape == (3, 4) and seeds.dtype == torch.int64
    assert torch.equal(seeds[1:2], draw_seeds(keys[1:2], 4))
    many = draw_seeds(make_keys(0, range(1000)), 4)
    assert 0 <= many.min() and 2**61 < many.max() < 2**62 and len(many.unique()) == 4000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"octaves": 0}, "`octaves` must be an integer of at least 1, got 0"),
        ({"octaves": 2.5}, "`octaves` must be an integer of at least 1, got 2.5"),
        ({"persistence": 0}, "`persistence` must be a finite number and above 0, got 0"),
        ({"wavelength": -1}, "`wavelength` must be a finite number and above 0, got -1"),
        ({"wavelength": float("inf")}, "`wavelength` must be a finite number and above 0, got inf"),
        ({"z": "t"}, "`z` must be a finite number of pixels or one of"),
        ({"z": float("nan")}, "`z` must be a finite number of pixels or one of"),
        ({"normalize": "image"}, "`normalize` must be one of .*per_image.*got 'image'"),
        ({"wavelength": 10.5, "random_offset": True}, "`random_offset` needs a `wavelength` that is a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        OctaveSimplexNoise(**options)


def test_bad_calls():
    noise, seeds = OctaveSimplexNoise(z="timestep"), torch.arange(3)
    with pytest.raises(ValueError, match="`timesteps` must be given, because `z` is 'timestep'"):
        noise(seeds, None, 8, 8)
    with pytest.raises(ValueError, match=r"`timesteps` must broadcast to the shape of `seeds`, \(3,\), got \(2,\)"):
        noise(seeds, torch.arange(2), 8, 8)
    with pytest.raises(TypeError, match="`timesteps` must be a tensor of whole numbers, got torch.float32"):
        noise(seeds, torch.rand(3), 8, 8)
    with pytest.raises(TypeError, match="`seeds` must be an int64 tensor, got torch.float32"):
        noise(torch.rand(3), torch.arange(3), 8, 8)
    with pytest.raises(ValueError, match=r"`points` must have shape \(P, 3\), got \(4, 2\)"):
        opensimplex3(seeds, torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"`points` must have shape \(P, 2\), got \(4, 3\)"):
        opensimplex2(seeds, torch.rand(4, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_an_accelerator_gives_the_same_fields(variant):
    noise = OctaveSimplexNoise(**variant)
    seeds, timesteps = torch.arange(40), torch.arange(40) % 3
    expected = noise(seeds, timesteps, 24, 40, dtype=torch.float64)
    device_seeds = seeds.to("cuda")
    assert torch.equal(permutation_tables(device_seeds).cpu(), permutation_tables(seeds))
    together = noise(device_seeds, timesteps.to("cuda"), 24, 40, dtype=torch.float64)
    assert_close(together.cpu(), expected, rtol=0, atol=1e-11)
    alone = noise(device_seeds[7:8], timesteps[7:8].to("cuda"), 24, 40, dtype=torch.float64)
    assert torch.equal(bits(alone), bits(together[7:8]))
    # Timesteps on the CPU share their geometry; nothing waits for those on the device.
    assert torch.equal(bits(noise(device_seeds, timesteps, 24, 40, dtype=torch.float64)), bits(together))
    on_device = timesteps.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise(device_seeds, on_device, 24, 40, dtype=torch.float64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", [(24, 24), (33, 33), (40, 12), (7, 5), (1, 9)])
def test_pyramid_noise_does_not_depend_on_its_batch(size):
    def draw(*seeds):
        return draw_pyramid(make_keys(0, seeds), (3, *size))

    together = draw(*range(20))
    assert together.shape == (20, 3, *size)
    assert torch.equal(bits(torch.cat([draw(seed) for seed in range(20)])), bits(together))
    assert torch.equal(bits(torch.cat([draw(*range(start, start + 4)) for start in range(0, 20, 4)])), bits(together))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(draw(*order.tolist())), bits(together[order]))
    assert_close(together.flatten(1).std(1), torch.ones(20), rtol=0, atol=1e-5)


def statistics(noise: torch.Tensor) -> torch.Tensor:
    """Of every image `(N, H, W)` mean, logarithm of the standard deviation, and mean product of neighbours along both axes: `(4, N)`."""
    products = (noise[:, :, 1:] * noise[:, :, :-1]).mean((1, 2)), (noise[:, 1:] * noise[:, :-1]).mean((1, 2))
    return torch.stack([noise.mean((1, 2)), noise.std((1, 2)).log(), *products])


def assert_same_distributions(first: torch.Tensor, second: torch.Tensor):
    for one, other in zip(statistics(first), statistics(second), strict=True):
        assert stats.ks_2samp(one.numpy(), other.numpy()).pvalue > 1e-3


def test_keyed_pyramid_noise_has_the_statistics_of_any_normal_draws():
    torch.manual_seed(0)
    largest = [(32, 32), (16, 16), (4, 4), (1, 1)]
    base, *levels = (torch.randn(400, 1, *size) for size in (largest[0], *largest))
    expected = pyramid_noise(base, levels, pyramid_sizes(32, 32, 2 + 2 * torch.rand(400, 4)), 0.8, per_image=True)
    assert_same_distributions(draw_pyramid(make_keys(0, range(400)), (1, 32, 32))[:, 0], expected[:, 0])


def test_keyed_simplex_noise_has_the_statistics_of_any_seeds():
    noise = OctaveSimplexNoise(wavelength=16, z=27.0)
    seeds = torch.randint(2**62, (400,), generator=torch.Generator().manual_seed(0))
    keyed = noise(draw_seeds(make_keys(0, range(400)), 1)[:, 0], None, 32, 32)
    assert_same_distributions(keyed, noise(seeds, None, 32, 32))


def test_pyramid_noise_is_a_sum_of_resized_levels():
    torch.manual_seed(0)
    rates = torch.tensor([[2.3, 3.1, 2.5, 3.9], [2.0, 2.0, 2.1, 2.2]])
    sizes = pyramid_sizes(30, 20, rates)
    # Each level divides the one before it; one pixel is the last.
    assert sizes.tolist() == [
        [[30, 20], [9, 6], [1, 1], [0, 0]],
        [[30, 20], [15, 10], [3, 2], [1, 1]],
    ]
    base = torch.randn(2, 3, 30, 20)
    levels = [torch.randn(2, 3, *size) for size in ((30, 20), (15, 10), (4, 3), (2, 1))]
    for image in range(2):
        expected = base[image]
        for level, (rows, columns) in enumerate(sizes[image].tolist()):
            if rows:
                part = levels[level][image : image + 1, :, :rows, :columns]
                expected = expected + 0.7**level * torch.nn.functional.interpolate(
                    part, size=(30, 20), mode="bilinear", align_corners=False
                ).squeeze(0)
        noise = pyramid_noise(base, levels, sizes, 0.7, per_image=True)
        assert_close(noise[image], expected / expected.std(), rtol=0, atol=3e-6)
    # One size for all, one standard deviation for all.
    shared = pyramid_noise(base, levels, sizes[1], 0.7, per_image=False)
    assert_close(shared.std(), torch.tensor(1.0), rtol=0, atol=1e-6)
    own = pyramid_noise(base, levels, sizes[1:].expand(2, -1, -1), 0.7, per_image=True)
    ratio = shared / own
    assert_close(ratio[1], ratio[1, 0, 0, 0].expand(3, 30, 20), rtol=1e-4, atol=0)
    assert (ratio[0] - ratio[1]).abs().min() > 1e-4


def test_pyramid_noise_sizes_of_the_authors():
    # At 128 pixels there are 4 levels, 32 to 63 pixels in the second, 2 to 15 in the third, then 1.
    rates = 2 + 2 * torch.rand(300, 5, generator=torch.Generator().manual_seed(0))
    sizes = pyramid_sizes(128, 128, rates)
    assert (sizes[..., 0] == sizes[..., 1]).all() and (sizes[:, 0] == 128).all()
    assert 32 <= sizes[:, 1].min() and sizes[:, 1].max() <= 63
    assert 2 <= sizes[:, 2].min() and sizes[:, 2].max() <= 15
    assert (sizes[:, 3] == 1).all() and (sizes[:, 4] == 0).all()


@pytest.mark.gpu
def test_pyramid_noise_on_an_accelerator():
    keys = make_keys(0, range(9), device="cuda")
    alone = [draw_pyramid(key, (2, 33, 40)) for key in keys.split(1)]
    draw_pyramid(keys, (2, 33, 40))  # compiles, which may wait for the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = draw_pyramid(keys, (2, 33, 40))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(bits(torch.cat(alone)), bits(together))
    assert_close(together.flatten(1).std(1).cpu(), torch.ones(9), rtol=0, atol=1e-5)
