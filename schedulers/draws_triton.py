"""The draws of `draws.py` on a CUDA device: kernels of Triton, whose Philox4x32-10 gives the same words, so that a batch
of draws is one launch. Imported where there is such a device and Triton, never elsewhere."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


# Blocks of four words of a program. One wave of programs fills the chip with a few million numbers.
BLOCKS = 256

ANGLE, HALF_WORD = tl.constexpr(math.tau * 2.0**-32), tl.constexpr(2.0**-32)


def fill(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Draws words, or normal numbers if the values are float32: keys `(B, 2)`, values `(B, blocks, 4)`, contiguous."""
    total = values.numel() // 4
    with torch.cuda.device(keys.device):
        _fill[(triton.cdiv(total, BLOCKS),)](
            keys.contiguous(), values, values.shape[1], total, values.dtype == torch.float32, BLOCKS
        )


def fold(keys: torch.Tensor, number: torch.Tensor, purpose: int) -> torch.Tensor:
    """Makes keys `(B, 2)` of keys and a number each, `(B,)`, with the third word of the counter."""
    folded = torch.empty_like(keys, memory_format=torch.contiguous_format)
    with torch.cuda.device(keys.device):
        _fold[(triton.cdiv(len(keys), BLOCKS),)](
            keys.contiguous(), number.contiguous(), folded, len(keys), purpose, BLOCKS
        )
    return folded


@triton.jit
def _words(keys, row, low, high, purpose, inside):
    """The four words of a counter, `(low, high, purpose, 0)`, and of a row's key, whose words are the halves of Triton's
    seed."""
    first = tl.load(keys + 2 * row, inside, 0)
    second = tl.load(keys + 2 * row + 1, inside, 0)
    nothing = low * 0
    return tl.philox(first | (second << 32), low, high, nothing + purpose, nothing)


@triton.jit
def _normal_pair(first, second):
    """Box and Muller, as `draws.py` computes it."""
    radius = tl.sqrt_rn(tl.log((first.to(tl.float32) + 0.5) * HALF_WORD) * -2.0)
    angle = second.to(tl.float32) * ANGLE
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _fill(keys, values, blocks, total, normal: tl.constexpr, size: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    index = start + tl.arange(0, size)
    counter = (index % blocks).to(tl.uint32)
    w0, w1, w2, w3 = _words(keys, index // blocks, counter, counter * 0, 0, index < total)
    if normal:
        w0, w1 = _normal_pair(w0, w1)
        w2, w3 = _normal_pair(w2, w3)
    # In the order of the memory: w0, w1, w2, w3 of each block.
    drawn = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    place = tl.arange(0, 4 * size)
    tl.store(values + 4 * start + place, drawn.to(values.dtype.element_ty), 4 * start + place < 4 * total)


@triton.jit
def _fold(keys, numbers, folded, total, purpose, size: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = row < total
    number = tl.load(numbers + row, inside, 0)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    first, second, _, _ = _words(keys, row, low, high, purpose, inside)
    tl.store(folded + 2 * row, first.to(tl.int64), inside)
    tl.store(folded + 2 * row + 1, second.to(tl.int64), inside)
