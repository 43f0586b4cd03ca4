"""Noise fields for the schedulers: octaves of OpenSimplex noise, and draws with one generator per image.

OpenSimplex is the 2014 function by Kurt Spencer, as in the PyPI package `opensimplex` and in AnoDDPM (Wyatt et al., CVPR Workshops 2022). Everything
that decides where a point lies is computed in float64: in float32 a point on the border between two cells may fall on the wrong side.
"""

from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from math import ceil, sqrt

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor


# Legend: B seeds, P points, K lattice vertices that can reach a point (8 in 3-D, 4 in 2-D), V distinct vertices of a plan, H x W pixels.

LCG_MULTIPLIER = 6364136223846793005
LCG_INCREMENT = 1442695040888963407

STRETCH_2D, SQUISH_2D, NORM_2D = -0.211324865405187, 0.366025403784439, 47.0
STRETCH_3D, SQUISH_3D, NORM_3D = -1.0 / 6.0, 1.0 / 3.0, 103.0

# Standard deviation over seeds of one octave of 3-D noise; the octaves are nearly independent, so their variances add.
OCTAVE_STD = 0.314

Z_RULES = ("timestep", "timestep_unscaled")
NORMALIZATIONS = ("none", "per_image", "analytic")

POINTS_PER_CHUNK = 2**14
SEEDS_PER_CHUNK = 32
CACHED_PLANS = 4


@cache
def _lcg_jumps(steps: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` rows (multiplier, increment), each (steps, 1) int64: state after 1, 2, ... steps of the generator from the seed."""
    multiplier, increment, rows = 1, 0, []
    for _ in range(steps):
        multiplier = multiplier * LCG_MULTIPLIER % 2**64
        increment = (increment * LCG_MULTIPLIER + LCG_INCREMENT) % 2**64
        # Python integers do not wrap: bring them to the signed 64-bit range by hand.
        rows.append([(value + 2**63) % 2**64 - 2**63 for value in (multiplier, increment)])
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return table[:, :1], table[:, 1:]


def permutation_tables(seeds: torch.Tensor) -> torch.Tensor:
    """
    OpenSimplex permutation of 0..255 for every seed, on the device of the seeds and without waiting for it.

    Args:
        seeds (`torch.Tensor` of shape `(B,)`):
            Any int64 values.

    Returns:
        `torch.Tensor` of shape `(B, 256)`, int64.
    """
    # Three warm-up steps, then one state for every position from 255 down to 0. int64 products wrap around, as in the original.
    multiplier, increment = _lcg_jumps(3 + 256, seeds.device)
    states = (seeds * multiplier + increment)[3:].flip(0)  # (256, B), row i belongs to position i
    positions = torch.arange(256, device=seeds.device)[:, None]
    count = positions + 1
    # state + 31 must not wrap, so both are reduced first.
    chosen = (states.remainder(count) + 31 % count) % count

    # Fisher-Yates in place: position i is never chosen again after its turn, so it can hold the result.
    pairs = torch.stack([chosen, positions.expand_as(chosen)], -1)
    table = positions.T.repeat(len(seeds), 1)
    for source, target in zip(reversed(pairs.unbind()), reversed(pairs.flip(-1).unbind()), strict=True):
        table.scatter_(1, target, table.gather(1, source))
    return table


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
    """
    Constants of the 3-D function, from the rules for vertices: AnoDDPM method card 4.1 lists them, OpenSimplex 2014 defines them.

    Returns:
        Offsets (3, K, 48) int64 of the vertices of every state, their displacements (3, K, 48) float64, which include k times the squish, and
        the gradient (3, 256) float64 of every hash, divided by the norm. A state is a region and a code, see `_vertices3`; a code has one bit per axis.
    """

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
    """For K vertices, one after the other so that the arrays stay in the cache: lattice coordinates modulo 256 and weights, both (D, P).

    A point's value is the sum over the vertices of weights . gradient.
    """
    offsets, displacements, _ = tables
    base_index, state = base.long(), state.expand_as(base)
    origin = points - (base + sum(base.unbind()) * squish)
    for offset, displacement in zip(offsets.unbind(1), displacements.unbind(1), strict=True):
        distance = origin - displacement.gather(1, state)
        # Products, because a power costs ten times as much.
        attenuation = (2 - sum((distance * distance).unbind())).clamp(min=0)
        attenuation = attenuation * attenuation
        yield (base_index + offset.gather(1, state)) & 255, attenuation * attenuation * distance


def _vertices2(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lattice coordinates and weights, (2, 4, P), of points (2, P) in float64."""
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


def _vertices3(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lattice coordinates and weights, (3, 8, P), of points (3, P) in float64."""
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


def _opensimplex(vertices, by_hash: torch.Tensor, seeds: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Values (B, P) of the function whose geometry `vertices` computes, at points (D, P)."""
    tables = permutation_tables(seeds)
    gradients = by_hash[:, tables]  # (D, B, 256): the gradient that ends the chain of look-ups
    values = []
    # Only elementwise operations: a value does not depend on the other seeds or points, to the last bit.
    for chunk in points.split(max(1, POINTS_PER_CHUNK * 16 // (16 + len(seeds))), 1):
        value = torch.zeros(len(seeds), chunk.shape[1], dtype=torch.float64, device=points.device)
        for lattice, weight in vertices(chunk):
            index = lattice[0].expand(len(seeds), -1)
            for coordinate in lattice[1:]:
                index = (tables.gather(1, index) + coordinate) & 255
            for gradient, component in zip(gradients, weight, strict=True):
                value += gradient.gather(1, index) * component
        values.append(value)
    return torch.cat(values, 1)
