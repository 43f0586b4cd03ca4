"""Counter-based random numbers: each is a function of a key and a position, and of nothing else.

No generator is advanced, so that a number does not depend on what was drawn before, on the batch, the order, the
number of processes or the device: the same scan gives the same map on a laptop, on one GPU or on eight. torch's own
generators promise none of this; on CUDA they depend on the number of multiprocessors.

The function is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
counter of four words of 32 bits and a key of two give four words. Words are equal to the bit everywhere; uniform
numbers are, too; normal numbers go through logarithm, sine and cosine, and agree to about 1e-6.

A key is used for one draw. What needs several makes further keys of it with [`fold_in`].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch

from .devices import send


# B keys, P positions, of which every four share a block: position p is word p % 4 of block p // 4.

# Recorded in results and in the state of a training: another version gives other numbers.
DRAWS_VERSION = "philox4x32-10, 1"

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio, square root of 3 minus 1
ROUNDS = 10
MASK = 0xFFFFFFFF

# Third word of the counter: new keys and drawn values never share a counter.
VALUES, NEW_KEYS = 0, 1

# On a CPU: smaller chunks cost calls, larger ones memory.
BLOCKS_PER_CHUNK = 2**16


def philox(counter: Sequence, key: Sequence) -> list:
    """
    Computes ten rounds of Philox4x32.

    Args:
        counter (four `torch.Tensor` int64 or `np.ndarray` uint64):
            Words in [0, 2^32); those after the first may be numbers.
        key (two of the same kind): Words in [0, 2^32). All of them broadcast.

    Returns:
        `list`: four arrays of the same kind, words in [0, 2^32).
    """
    # A product of two words has 64 bits; int64 keeps them all, its sign included. Only the words that are multiplied
    # next are reduced to 32 bits at once: the bits above them change nothing in the others.
    k0, k1 = key
    nothing = (counter[0] + k0) * 0
    c0, c1, c2, c3 = (word + nothing for word in counter)  # of one shape, so that everything below is done in place
    for _ in range(ROUNDS):
        c0 *= MULTIPLIERS[0]
        c2 *= MULTIPLIERS[1]
        c1 ^= c2 >> 32
        c1 ^= k0
        c1 &= MASK
        c3 ^= c0 >> 32
        c3 ^= k1
        c3 &= MASK
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return [c0, c1 & MASK, c2, c3 & MASK]


def make_keys(
    seed: int,
    index: int | Sequence[int] | torch.Tensor,
    draw: int | Sequence[int] | torch.Tensor = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Makes the keys of numbered draws of numbered items, for example of slices.

    Args:
        seed (`int`): At least 0 and below 2^64.
        index (`int`, sequence or tensor of shape `(B,)`): Numbers of the items, 0 or more.
        draw (`int`, sequence or tensor of shape `(B,)`): Numbers of the draws, 0 or more.
        device (`torch.device`): Where the keys go.

    Returns:
        `torch.Tensor` of shape `(B, 2)`, int64, words of 32 bits: `fold_in(fold_in(seed, index), draw)`.

    Raises:
        ValueError: The seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be at least 0 and below 2^64, got {seed}.")
    # On the CPU, in one go: numbers that are known beforehand need not wait for a device.
    index, draw = torch.broadcast_tensors(
        *(torch.as_tensor(number, device="cpu").reshape(-1) for number in (index, draw))
    )
    seeds = torch.tensor([[seed & MASK, seed >> 32]]).expand(len(index), 2)
    return send(fold_in(fold_in(seeds, index), draw), torch.device(device))


def fold_in(keys: torch.Tensor, number: int | torch.Tensor) -> torch.Tensor:
    """
    Makes new keys from keys and a number each.

    Args:
        keys (`torch.Tensor` of shape `(B, 2)`): From [`make_keys`] or from here.
        number (`int` or `torch.Tensor` of shape `(B,)`): 0 or more.

    Returns:
        `torch.Tensor` of shape `(B, 2)`, int64.
    """
    if not isinstance(number, torch.Tensor):
        number = torch.full((len(keys),), number, device=keys.device)  # nothing waits for the host
    if keys.device.type == "cpu":
        words, numbers = _as_numpy(keys), _as_numpy(number)
        folded = philox((numbers & MASK, numbers >> 32, NEW_KEYS, 0), (words[:, 0], words[:, 1]))
        return torch.from_numpy(np.stack(folded[:2], 1).view(np.int64))
    kernels = _kernels(keys.device.type)
    return _fold(keys, number) if kernels is None else kernels.fold(keys, number, NEW_KEYS)


def words(keys: torch.Tensor, count: int) -> torch.Tensor:
    """
    Draws words of 32 bits.

    Args:
        keys (`torch.Tensor` of shape `(B, 2)`): One per row.
        count (`int`): P, words of each key.

    Returns:
        `torch.Tensor` of shape `(B, P)`, int64 in [0, 2^32). The first words of a key are the same for every P.
    """
    return _draw(keys, count, _store_words, torch.int64)


def uniform(keys: torch.Tensor, shape: Sequence[int] = ()) -> torch.Tensor:
    """Draws numbers in [0, 1), multiples of 2^-24: keys `(B, 2)` to `(B, *shape)`, float32."""
    return (words(keys, math.prod(shape)) >> 8).float().mul_(2.0**-24).reshape(-1, *shape)


def integers(keys: torch.Tensor, high: int, shape: Sequence[int] = ()) -> torch.Tensor:
    """Draws whole numbers from 0 to `high` - 1, `high` at most 2^31: keys `(B, 2)` to `(B, *shape)`, int64. The chance
    of each differs from 1 / `high` by less than 2^-32."""
    return (words(keys, math.prod(shape)) * high >> 32).reshape(-1, *shape)


def normal(keys: torch.Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws standard normal numbers: keys `(B, 2)` to `(B, *shape)`, by the rule of Box and Muller in float32, at most
    6.8 in size."""
    return _draw(keys, math.prod(shape), _store_normals, torch.float32).reshape(-1, *shape).to(dtype)


def _draw(keys: torch.Tensor, count: int, finish: Callable, dtype: torch.dtype) -> torch.Tensor:
    """Draws `(B, count)` values; `finish(words, out)` makes those of a block, `(..., 4)`, of its four words."""
    blocks = -(-count // 4)
    values = torch.empty(len(keys), blocks, 4, dtype=dtype, device=keys.device)
    if keys.device.type != "cpu":
        kernels = _kernels(keys.device.type)
        if kernels is None:
            _fill(keys, values, finish)
        else:
            kernels.fill(keys, values)
        return values.flatten(1)[:, :count]
    # numpy's products and shifts of 64 bits are twice as fast as torch's.
    pair = _as_numpy(keys)[:, :1], _as_numpy(keys)[:, 1:]
    step = max(1, BLOCKS_PER_CHUNK // max(1, len(keys)))
    for start in range(0, blocks, step):
        counter = np.arange(start, min(start + step, blocks), dtype=np.uint64)[None]
        drawn = [torch.from_numpy(word.view(np.int64)) for word in philox((counter, 0, VALUES, 0), pair)]
        finish(drawn, values[:, start : start + step])
    return values.flatten(1)[:, :count]


def _store_words(drawn: list[torch.Tensor], out: torch.Tensor) -> None:
    for position, word in enumerate(drawn):
        out[..., position] = word


def _store_normals(drawn: list[torch.Tensor], out: torch.Tensor) -> None:
    """Box and Muller: of every two words the first gives the radius, the second the angle of two normal numbers."""
    for first in (0, 2):
        radius = drawn[first].float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = drawn[first + 1].float().mul_(math.tau * 2.0**-32)
        torch.mul(radius, angle.cos(), out=out[..., first])
        torch.mul(radius, angle.sin_(), out=out[..., first + 1])


def _fill(keys: torch.Tensor, values: torch.Tensor, finish: Callable) -> None:
    counter = torch.arange(values.shape[1], device=keys.device)[None]
    finish(philox((counter, 0, VALUES, 0), (keys[:, :1], keys[:, 1:])), values)


def _fold(keys: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return torch.stack(philox((number & MASK, number >> 32, NEW_KEYS, 0), keys.unbind(1))[:2], 1)


@cache
def _kernels(device_type: str) -> ModuleType | None:
    """Kernels that draw in one launch what would be a hundred tensor operations: on a CUDA device, where Triton is
    installed, which PyTorch brings along on Linux."""
    if device_type != "cuda" or find_spec("triton") is None:
        return None
    from . import draws_triton

    return draws_triton


def _as_numpy(values: torch.Tensor) -> np.ndarray:
    return values.numpy().astype(np.uint64)
