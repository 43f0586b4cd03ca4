"""Octaves of OpenSimplex noise.

OpenSimplex is the 2014 function by Kurt Spencer, as in the PyPI package `opensimplex` and in AnoDDPM (Wyatt et al.,
CVPR Workshops 2022). Everything that decides where a point lies is computed in float64: in float32 a point on the
border between two cells may fall on the wrong side.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt

import torch
import torch.nn.functional as F

from ..checks import check_choice, check_integer, check_number
from .devices import send
from .noise import sum_pixels


# Legend: B seeds, P points, U sets of points, D dimensions, K lattice vertices that can reach a point (8 in 3-D, 4 in
# 2-D), V distinct vertices of a plan, H x W pixels.

LCG_MULTIPLIER = 6364136223846793005
LCG_INCREMENT = 1442695040888963407

STRETCH_2D, SQUISH_2D, NORM_2D = -0.211324865405187, 0.366025403784439, 47.0
STRETCH_3D, SQUISH_3D, NORM_3D = -1.0 / 6.0, 1.0 / 3.0, 103.0

# Standard deviation over seeds of one octave of 3-D noise; the octaves are nearly independent, so their variances add.
OCTAVE_STD = 0.314

# First pixel (x, y) of fields with a random offset, in wavelengths. Near (0, 0) all octaves look up the same vertices,
# so that their values add up instead of averaging out.
OFFSET_ORIGIN = (37, 113)

Z_RULES = ("timestep", "timestep_unscaled")
NORMALIZATIONS = ("none", "per_image", "analytic")

# On a CPU the arrays of a chunk should fit the cache; elsewhere few large operations are better.
POINTS_PER_CHUNK_CPU = 2**15
POINTS_PER_CHUNK = 2**21
SEEDS_PER_CHUNK_CPU = 32
SEEDS_PER_CHUNK = 256
CACHED_PLANS = 4


@cache
def _lcg_jumps(steps: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Multipliers and increments, each (steps, 1) int64, from a seed to the state after 1, 2, ... steps."""
    multiplier, increment, rows = 1, 0, []
    for _ in range(steps):
        multiplier = multiplier * LCG_MULTIPLIER % 2**64
        increment = (increment * LCG_MULTIPLIER + LCG_INCREMENT) % 2**64
        # Python integers do not wrap: bring them to the signed 64-bit range by hand.
        rows.append([(value + 2**63) % 2**64 - 2**63 for value in (multiplier, increment)])
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return table[:, :1], table[:, 1:]


def permutation_tables(seeds: torch.Tensor) -> torch.Tensor:
    """Computes the OpenSimplex permutation of 0..255 for every seed: `(B,)` int64 to `(B, 256)`, on the device of the
    seeds and without waiting for it."""
    # Three warm-up steps, then one state for every position from 255 down to 0. int64 products wrap around, as in the
    # original.
    multiplier, increment = _lcg_jumps(3 + 256, seeds.device)
    states = (seeds * multiplier + increment)[3:].flip(0)  # (256, B), row i belongs to position i
    positions = torch.arange(256, device=seeds.device)
    count = (positions + 1)[:, None]
    # state + 31 must not wrap, so both are reduced first.
    chosen = ((states.remainder(count) + 31 % count) % count).T.contiguous()  # (B, 256)

    # The original shuffles turn by turn, i = 255, 254, ..., 0: result i is what lies at chosen[i], and what lies at i
    # is moved there. So it is what was moved there last, at turn j, the least j > i with the same choice. That lay at
    # j: moved there at the least turn k > j that chose j, and so on, back to what was never moved, a position's own
    # number. All chains are followed at once: 40 operations in place of 512.
    by_choice = (chosen * 256 + positions).sort(1).values
    turn = by_choice & 255
    same_choice = (by_choice[:, 1:] >> 8) == (by_choice[:, :-1] >> 8)
    nothing = torch.full_like(chosen, 256)
    moved = nothing.scatter(1, turn[:, :-1], torch.where(same_choice, turn[:, 1:], 256))  # j for every i, or 256
    others = torch.where(chosen == positions, 256, positions)  # who chooses itself moves nothing
    link = nothing.scatter_reduce(1, chosen, others, "amin")  # k for every j, or 256
    link = torch.where(link == 256, positions, link)
    for _ in range(8):  # steps of 1, 2, 4, ... links; a chain has at most 255
        link = link.gather(1, link)
    return torch.where(moved == 256, chosen, link.gather(1, moved.clamp(max=255)))


@cache
def _tables2(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_tables3`, for 6 states and 4 vertices. The gradient number of a hash is (hash >> 1) mod 8."""
    main = [((1, 0), 1), ((0, 1), 1)]
    low, high = [*main, ((0, 0), 0)], [*main, ((1, 1), 2)]
    states = [[*low, ((1, -1), 0)], [*low, ((-1, 1), 0)], [*low, ((1, 1), 2)]]
    states += [[*high, ((2, 0), 2)], [*high, ((0, 2), 2)], [*high, ((0, 0), 0)]]

    offsets = torch.tensor([[offset for offset, _ in state] for state in states]).permute(2, 1, 0)
    multiplicity = torch.tensor([[k for _, k in state] for state in states], dtype=torch.float64).T
    gradients = [(5, 2), (2, 5), (-5, 2), (-2, 5), (5, -2), (2, -5), (-5, -2), (-2, -5)]
    by_hash = torch.tensor(gradients, dtype=torch.float64)[(torch.arange(256) >> 1) & 7].T / NORM_2D
    return offsets.to(device), (offsets + multiplicity * SQUISH_2D).to(device), by_hash.to(device)


@cache
def _tables3(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Builds the constants of the 3-D function from the rules for vertices of OpenSimplex 2014: offsets (3, K, 48)
    int64 of the vertices of every state, their displacements (3, K, 48) float64, which include k times the squish, and
    the gradient (3, 256) float64 of every hash, divided by the norm. A state is a region and a code, see `_vertices3`;
    a code has one bit per axis."""

    def bits(code: int, one: int = 1, zero: int = 0) -> tuple[int, ...]:
        return tuple(one if code >> axis & 1 else zero for axis in range(3))

    def moved(code: int, axis: int, value: int) -> tuple[int, ...]:
        return tuple(value if i == axis else bit for i, bit in enumerate(bits(code)))

    # A vertex is (offset, k). The first 4 or 6 of a state always count, the last two depend on the code.
    low, high, middle = (
        [(bits(c), sum(bits(c))) for c in codes] for codes in ((0, 1, 2, 4), (3, 5, 6, 7), (1, 2, 4, 3, 5, 6))
    )
    states = {}
    for c in (1, 2, 4):
        states[c] = low + [(moved(c, axis, -1), 0) for axis in range(3) if not c >> axis & 1]
        states[8 + c] = high + [(bits(c), 1), (bits(c, one=2), 2)]
        states[16 + c] = middle + [(bits(7), 3), (bits(c, one=2), 2)]
    for c in (3, 5, 6):
        states[c] = low + [(bits(c), 2), (bits(c, zero=-1), 1)]
        states[8 + c] = high + [(moved(c, axis, 2), 3) for axis in range(3) if c >> axis & 1]
        states[16 + c] = middle + [(bits(0), 0), (bits(c, zero=-1), 1)]
        for near in (1, 2, 4):
            states[24 + 8 * (near >> 1) + c] = middle + [(bits(c, zero=-1), 1), (bits(near, one=2), 2)]

    offsets = torch.zeros(3, 8, 48, dtype=torch.int64)
    # Slots without a vertex lie out of reach of every point, so they get weight 0.
    displacements = torch.full((3, 8, 48), 8.0, dtype=torch.float64)
    for state, vertices in states.items():
        for slot, (offset, k) in enumerate(vertices):
            offsets[:, slot, state] = torch.tensor(offset)
            displacements[:, slot, state] = torch.tensor(offset, dtype=torch.float64) + k * SQUISH_3D

    signs = [(-1, 1, 1), (1, 1, 1), (-1, -1, 1), (1, -1, 1), (-1, 1, -1), (1, 1, -1), (-1, -1, -1), (1, -1, -1)]
    lengths = [(11, 4, 4), (4, 11, 4), (4, 4, 11)]
    gradients = [[s * n for s, n in zip(sign, length, strict=True)] for sign in signs for length in lengths]
    by_hash = torch.tensor(gradients, dtype=torch.float64)[torch.arange(256) % 24].T / NORM_3D
    return offsets.to(device), displacements.to(device), by_hash.to(device)


def _weights(
    points: torch.Tensor, base: torch.Tensor, state: torch.Tensor, tables: tuple[torch.Tensor, ...], squish: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields for K vertices, one after the other so that the arrays stay in the cache, lattice coordinates modulo 256
    and weights, both (D, P). A point's value is the sum over the vertices of weights . gradient."""
    offsets, displacements, _ = tables
    base_index, state = base.long(), state.expand_as(base)
    origin = points - (base + sum(base.unbind()) * squish)
    for offset, displacement in zip(offsets.unbind(1), displacements.unbind(1), strict=True):
        distance = origin - displacement.gather(1, state)
        # Products, because a power costs ten times as much.
        attenuation = (2 - sum((distance * distance).unbind())).clamp(min=0)
        attenuation = attenuation * attenuation
        yield (base_index + offset.gather(1, state)) & 255, attenuation * attenuation * distance


def _vertices2(points: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As `_weights`, for points (2, P) in float64."""
    x, y = points
    stretched = points + (x + y) * STRETCH_2D
    base = stretched.floor()
    xi, yi = stretched - base
    total = xi + yi
    high = total > 1
    rest = torch.where(high, 2 - total, 1 - total)
    beside = torch.where(high, (rest < xi) | (rest < yi), (rest > xi) | (rest > yi))
    state = torch.where(beside, torch.where(xi > yi, 0, 1), 2) + 3 * high
    return _weights(points, base, state, _tables2(points.device), SQUISH_2D)


def _vertices3(points: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As `_weights`, for points (3, P) in float64."""
    x, y, z = points
    # The order of the three terms, and which comparisons are strict, decide at integer coordinates.
    stretched = points + (x + y + z) * STRETCH_3D
    base = stretched.floor()
    xi, yi, zi = stretched - base
    total = xi + yi + zi

    # S <= 1, near the vertex (0, 0, 0): the two largest coordinates.
    replace_b = (xi >= yi) & (zi > yi)
    replace_a = (xi < yi) & (zi > xi)
    a_code, a = torch.where(replace_a, 4, 1), torch.where(replace_a, zi, xi)
    b_code, b = torch.where(replace_b, 4, 2), torch.where(replace_b, zi, yi)
    rest = 1 - total
    low = torch.where((rest > a) | (rest > b), torch.where(b > a, b_code, a_code), a_code | b_code)

    # S >= 2, near (1, 1, 1): the two smallest coordinates.
    replace_b = (xi <= yi) & (zi < yi)
    replace_a = (xi > yi) & (zi < xi)
    a_code, a = torch.where(replace_a, 3, 6), torch.where(replace_a, zi, xi)
    b_code, b = torch.where(replace_b, 3, 5), torch.where(replace_b, zi, yi)
    rest = 3 - total
    high = torch.where((rest < a) | (rest < b), torch.where(b < a, b_code, a_code), a_code & b_code)

    # Between: the two nearest faces, each on the far side (codes 3, 5, 6) or the near side (4, 2, 1).
    p1, p2, p3 = xi + yi - 1, xi + zi - 1, yi + zi - 1
    a_far, b_far, q_far = (xi + yi) > 1, (xi + zi) > 1, (yi + zi) > 1
    a, b, q = p1.abs(), p2.abs(), p3.abs()
    replace_a = (a <= b) & (a < q)
    replace_b = (a > b) & (b < q)
    q_code = torch.where(q_far, 6, 1)
    a_code = torch.where(replace_a, q_code, torch.where(a_far, 3, 4))
    b_code = torch.where(replace_b, q_code, torch.where(b_far, 5, 2))
    a_far = torch.where(replace_a, q_far, a_far)
    b_far = torch.where(replace_b, q_far, b_far)
    far_code, near_code = torch.where(a_far, a_code, b_code), torch.where(a_far, b_code, a_code)
    between = torch.where(
        a_far == b_far, 16 + torch.where(a_far, a_code & b_code, a_code | b_code), 24 + 8 * (near_code >> 1) + far_code
    )

    state = torch.where(total <= 1, low, torch.where(total >= 2, 8 + high, between))
    return _weights(points, base, state, _tables3(points.device), SQUISH_3D)


def _evaluate(
    vertices: Callable, by_hash: torch.Tensor, tables: torch.Tensor, points: torch.Tensor, owner: torch.Tensor | None
) -> torch.Tensor:
    """Returns values (B, P) of the noise whose geometry `vertices` gives, for permutations (B, 256). `points` is
    (D, U, P): seed b is evaluated at the set `points[:, owner[b]]`, without `owner` at the set b; the geometry of a
    set is computed once."""
    gradients = by_hash[:, tables]  # (D, B, 256): what the last look-up of a hash chain leads to
    seeds, sets = len(tables), points.shape[1]
    size = (POINTS_PER_CHUNK_CPU if points.device.type == "cpu" else POINTS_PER_CHUNK) // (sets + seeds // 16)
    values = []
    # Only elementwise operations, so that a value does not depend on the other seeds and points, to the last bit.
    for chunk in points.split(max(size, 1), -1):
        value = torch.zeros(seeds, chunk.shape[-1], dtype=torch.float64, device=points.device)
        for lattice, weight in vertices(chunk.flatten(1)):
            lattice, weight = lattice.view(chunk.shape), weight.view(chunk.shape)
            if sets == 1:  # a view instead of B copies
                lattice, weight = lattice.expand(-1, seeds, -1), weight.expand(-1, seeds, -1)
            elif owner is not None:
                lattice, weight = lattice.index_select(1, owner), weight.index_select(1, owner)
            index = lattice[0]
            for coordinate in lattice[1:]:
                index = (tables.gather(1, index) + coordinate) & 255
            for gradient, component in zip(gradients, weight, strict=True):
                value += gradient.gather(1, index) * component
        values.append(value)
    return torch.cat(values, 1)


def _at_points(vertices: Callable, by_hash: torch.Tensor, seeds: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    if points.ndim != 2 or points.shape[1] != len(by_hash):
        raise ValueError(f"`points` must have shape (P, {len(by_hash)}), got {tuple(points.shape)}.")
    return _evaluate(vertices, by_hash, permutation_tables(seeds), points.double().T[:, None], None)


@torch.no_grad()
def opensimplex2(seeds: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Evaluates 2-D OpenSimplex noise, `opensimplex.noise2(x, y)` to rounding, for seeds `(B,)` at points `(P, 2)` in
    cells: `(B, P)` float64, within (-1, 1), zero mean over seeds."""
    return _at_points(_vertices2, _tables2(points.device)[2], seeds, points)


@torch.no_grad()
def opensimplex3(seeds: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Evaluates 3-D OpenSimplex noise, `opensimplex.noise3(x, y, z)` to rounding, as `opensimplex2` does."""
    return _at_points(_vertices3, _tables3(points.device)[2], seeds, points)


@dataclass
class _Plan:
    """What does not depend on the seed: a sparse matrix (H*W, D V) of all octaves, and the vertices of its columns."""

    lattice: torch.Tensor  # (D, V) int64, coordinates modulo 256
    starts: torch.Tensor  # (H*W + 1,) int32, where the entries of each pixel start
    columns: torch.Tensor  # int32, D * vertex + axis
    weights: torch.Tensor


class OctaveSimplexNoise:
    """
    Makes fields of several octaves of OpenSimplex noise: the sum over i < `octaves` of `persistence`^i times the noise
    at pixels / (`wavelength` / 2^i).

    One independent field per seed. Pixels count 0, 1, 2, ... from the top left corner; x runs along the width, y along
    the height. With a fixed `z` the geometry is computed once per image size and kept, so that a field costs a few
    hundred multiply-adds per pixel. A third coordinate that follows the timestep needs the geometry of every distinct
    timestep at every call, which is many times slower. A field depends on its seed, its timestep and the options
    alone: the other members of the batch cannot change a bit of it.

    Three published settings: AnoDDPM (Wyatt et al., CVPR Workshops 2022) is `OctaveSimplexNoise(z="timestep")`,
    brain_damage is `OctaveSimplexNoise(wavelength=32, z="timestep_unscaled", normalize="per_image")`, cDDPM is
    `OctaveSimplexNoise(z=None)`. AnoDDPM's author calls the dependence on t an accident.

    Args:
        octaves (`int`, defaults to 6): Number of octaves.
        persistence (`float`, defaults to 0.8): Amplitude of an octave relative to the one before it.
        wavelength (`float`, defaults to 64):
            Cell size of the first octave in pixels, halved from octave to octave. AnoDDPM calls it "frequency".
        z (`float`, `str` or `None`, defaults to 0):
            Third coordinate: a number in pixels, divided by each octave's wavelength as x and y are; `"timestep"`, the
            timestep taken as such a number; or `"timestep_unscaled"`, the timestep itself in every octave. `None`: the
            function of two coordinates, another one than any plane of the function of three.
        normalize (`str`, defaults to `"none"`):
            `"none"` keeps the sum, whose standard deviation over seeds is about 0.5 with the defaults. `"per_image"`
            gives every field mean 0 and population standard deviation 1. `"analytic"` divides by the expected standard
            deviation, 0.314 sqrt(sum of `persistence`^(2i)); not with `z=None`.
        random_offset (`bool`, defaults to `False`):
            Move every field by a whole number of pixels per axis, uniform below the wavelength and derived from its
            seed, and start far from the origin of the lattice. Without it all fields share their lattice, and the
            standard deviation over seeds depends on the pixel: from 0 to 0.66 with the defaults. With it 0.49 to 0.52
            are left, a slow change, since the lattice repeats only every 6 wavelengths along an axis. The wavelength
            must be a whole number of pixels, so that the offsets cover whole periods of the halved wavelengths too.
            Computes (H + `wavelength` - 1) (W + `wavelength` - 1) pixels per field.
    """

    def __init__(
        self,
        octaves: int = 6,
        persistence: float = 0.8,
        wavelength: float = 64.0,
        z: float | str | None = 0.0,
        normalize: str = "none",
        random_offset: bool = False,
    ):
        check_integer("octaves", octaves, 1)
        check_number("persistence", persistence, above=0)
        check_number("wavelength", wavelength, above=0)
        if z is not None and (z not in Z_RULES if isinstance(z, str) else not isfinite(z)):
            raise ValueError(f"`z` must be a finite number of pixels or one of {(*Z_RULES, None)}, got {z!r}.")
        check_choice("normalize", normalize, NORMALIZATIONS)
        if z is None and normalize == "analytic":
            raise ValueError("`normalize` must be 'none' or 'per_image' with `z=None`, got 'analytic'.")
        if random_offset and wavelength != int(wavelength):
            raise ValueError(
                f"`random_offset` needs a `wavelength` that is a whole number of pixels, got {wavelength!r}: round it or"
                " switch the offset off."
            )
        self.octaves = octaves
        self.persistence = persistence
        self.wavelength = wavelength
        self.z = z
        self.normalize = normalize
        self.random_offset = random_offset
        self._plans: OrderedDict[tuple, _Plan] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self,
        seeds: torch.Tensor,
        timesteps: torch.Tensor | None,
        height: int,
        width: int,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Makes one field per seed, zero mean over seeds: `(...)` int64 seeds, for example `(N, C)`, to `(..., H, W)`,
        on their device. Only rules of `z` that name the timestep use `timesteps`, whole numbers that broadcast to the
        seeds: on the CPU, fields of the same timestep share their geometry; on another device, which none of this
        waits for, each has its own. Coordinates are always float64; sums are float64 for that `dtype`, else float32
        with a fixed `z`."""
        if seeds.dtype != torch.int64:
            raise TypeError(f"`seeds` must be an int64 tensor, got {seeds.dtype}.")
        flat = seeds.reshape(-1)
        if isinstance(self.z, str):
            if timesteps is None:
                raise ValueError(f"`timesteps` must be given, because `z` is {self.z!r}: one per field, or fix `z`.")
            if timesteps.is_floating_point():
                raise TypeError(f"`timesteps` must be a tensor of whole numbers, got {timesteps.dtype}.")
            try:
                timesteps = timesteps.broadcast_to(seeds.shape).reshape(-1)
            except RuntimeError as error:
                raise ValueError(
                    f"`timesteps` must broadcast to the shape of `seeds`, {tuple(seeds.shape)}, "
                    f"got {tuple(timesteps.shape)}."
                ) from error

        value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        margin = int(self.wavelength) - 1 if self.random_offset else 0
        rows, columns = height + margin, width + margin
        fields = torch.empty(len(flat), height * width, dtype=value_dtype, device=seeds.device)
        step = SEEDS_PER_CHUNK_CPU if seeds.device.type == "cpu" else SEEDS_PER_CHUNK
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            if isinstance(self.z, str):
                values = self._from_timesteps(flat[part], timesteps[part], rows, columns)
            else:
                values = self._from_plan(flat[part], rows, columns, value_dtype)
            if self.random_offset:
                values = values.gather(1, self._crops(flat[part], height, width, columns))
            fields[part] = values

        if self.normalize == "per_image":
            fields -= sum_pixels(fields) / fields.shape[1]
            fields /= (sum_pixels(fields * fields) / fields.shape[1]).sqrt() + 1e-8
        elif self.normalize == "analytic":
            fields /= OCTAVE_STD * sqrt(sum(self.persistence ** (2 * octave) for octave in range(self.octaves)))
        return fields.view(*seeds.shape, height, width).to(dtype)

    def _crops(self, seeds: torch.Tensor, height: int, width: int, columns: int) -> torch.Tensor:
        """Indices (B, H*W) into larger fields with `columns` columns, from an offset per seed."""
        # Two steps of the generator after those of the permutation, mixed: its states for neighbouring seeds are
        # evenly spaced, and its low bits have short periods.
        multiplier, increment = _lcg_jumps(3 + 256 + 2, seeds.device)
        states = seeds * multiplier[-2:] + increment[-2:]
        states = (states ^ (states >> 32)) * LCG_MULTIPLIER
        top, left = ((states >> 33) & (2**30 - 1)).remainder(int(self.wavelength))[..., None, None]
        y = torch.arange(height, device=seeds.device)[:, None] + top
        x = torch.arange(width, device=seeds.device) + left
        return (y * columns + x).flatten(1)

    def _pixels(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Coordinates x and y of all pixels, (2, H*W) float64."""
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float64, device=device),
            torch.arange(width, dtype=torch.float64, device=device),
            indexing="ij",
        )
        first_x, first_y = OFFSET_ORIGIN if self.random_offset else (0, 0)
        return torch.stack([x.flatten() + first_x * self.wavelength, y.flatten() + first_y * self.wavelength])

    def _from_timesteps(self, seeds: torch.Tensor, timesteps: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Fields (B, H*W) float64."""
        times, owner = send(timesteps, seeds.device), None
        if timesteps.device.type == "cpu":
            times, owner = (send(found, seeds.device) for found in timesteps.unique(return_inverse=True))
        pixels = self._pixels(height, width, seeds.device)[:, None].expand(-1, len(times), -1)
        times = times.double()[None, :, None].expand(-1, -1, height * width)
        tables, by_hash = permutation_tables(seeds), _tables3(seeds.device)[2]
        fields = torch.zeros(len(seeds), height * width, dtype=torch.float64, device=seeds.device)
        for octave in range(self.octaves):
            wavelength = self.wavelength / 2**octave
            z = times / wavelength if self.z == "timestep" else times
            values = _evaluate(_vertices3, by_hash, tables, torch.cat([pixels / wavelength, z]), owner)
            fields += self.persistence**octave * values
        return fields

    def _from_plan(self, seeds: torch.Tensor, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Fields (B, H*W) at the fixed `z` or without one: a gradient per vertex and seed, then a sparse product."""
        key = (height, width, seeds.device, dtype)
        if key not in self._plans:
            self._plans[key] = self._build_plan(height, width, seeds.device, dtype)
            if len(self._plans) > CACHED_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan = self._plans[key]

        tables = permutation_tables(seeds).T.contiguous()  # (256, B)
        dimensions = len(plan.lattice)
        index = plan.lattice[0][:, None].expand(-1, len(seeds))
        for coordinate in plan.lattice[1:]:
            index = (tables.gather(0, index) + coordinate[:, None]) & 255  # (V, B)
        by_hash = (_tables2 if dimensions == 2 else _tables3)(seeds.device)[2].T.to(dtype)
        gradients = by_hash[tables].transpose(1, 2).contiguous()  # (256, D, B)
        gradients = gradients.gather(0, index[:, None].expand(-1, dimensions, -1)).flatten(0, 1)  # (D V, B)
        # As a sum over bags: every output adds its terms one by one, so that the other columns cannot change it. A
        # sparse matrix product promises no such order.
        return F.embedding_bag(
            plan.columns, gradients, plan.starts, mode="sum", per_sample_weights=plan.weights, include_last_offset=True
        ).T

    def _build_plan(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> _Plan:
        pixels = self._pixels(height, width, device)
        vertices_of = _vertices2
        if self.z is not None:
            vertices_of = _vertices3
            pixels = torch.cat([pixels, torch.full_like(pixels[:1], self.z)])
        dimensions = len(pixels)
        bytes_up = torch.arange(dimensions, device=device) * 8
        keys, weights = [], []
        for octave in range(self.octaves):
            for lattice, weight in vertices_of(pixels / (self.wavelength / 2**octave)):
                keys.append((lattice << bytes_up[:, None]).sum(0))
                weights.append(self.persistence**octave * weight)
        keys, weights = torch.stack(keys, 1), torch.stack(weights, 1).permute(2, 1, 0)  # (H*W, K), (H*W, K, D)

        reached = (weights != 0).any(-1)
        vertices, column = keys[reached].unique(return_inverse=True)
        return _Plan(
            lattice=(vertices >> bytes_up[:, None]) & 255,
            starts=F.pad(dimensions * reached.sum(1).cumsum(0), (1, 0)).int(),
            columns=(dimensions * column[:, None] + torch.arange(dimensions, device=device)).flatten().int(),
            weights=weights[reached].flatten().to(dtype),
        )
