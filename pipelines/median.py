"""Median of windows in two or three dimensions, exact, on the device of the maps.

No library has it. scipy selects window by window on one core. OpenCV takes float32 in two dimensions alone, of 3 or 5
pixels; scikit-image's ranks take whole numbers of 16 bits at most; CuPy needs CUDA; kornia and MONAI copy every window
(125 times the volume for 5 x 5 x 5) and sort the copies.

Here windows are sorted by a network of minima and maxima of shifted volumes (after Adams, "Fast median filters using
separable sorting networks", SIGGRAPH 2021): columns of voxels first, which windows share, then columns are merged to
planes and planes to windows, without what cannot be the median. 5 x 5 x 5 takes about 500 operations per voxel, none
of them with a branch, on whole volumes at once.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from ..checks import check_choice, check_integer
from ..schedulers.devices import send


BORDERS = ("reflect", "mirror")
DIMENSIONS = (2, 3)

# Padded voxels that are filtered together, for windows of up to 125. On a CPU the arrays should nearly fit the cache;
# elsewhere 2^21 take 0.8 GB.
VOXELS_PER_CHUNK_CPU = 2**17
VOXELS_PER_CHUNK = 2**21

# Legend: N slices of H x W pixels. A list of tensors is one sorted list for every voxel: tensor i holds the i-th
# smallest values. Volumes are flat, so that moving them by a voxel, a row or a slice drops their first values.


def median_filter(
    maps: torch.Tensor, size: int, dimensions: int, *, border: str = "reflect", inside: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Filters the maps of one volume by the median of a window.

    Args:
        maps (`torch.Tensor` of shape `(N, H, W)`): Anomaly maps, float32. A window with a NaN gives NaN.
        size, dimensions, border: As of [`~pipelines.postprocessing.median_filter`].
        inside (`torch.Tensor` of shape `(N, H, W)`, bool, *optional*):
            Where the result is wanted; it is 0 elsewhere. By default everywhere.

    Returns:
        `torch.Tensor` of shape `(N, H, W)`, on the device of the maps.
    """
    check_integer("size", size, 1)
    check_choice("border", border, BORDERS)
    check_choice("dimensions", dimensions, DIMENSIONS)
    filtered = torch.zeros_like(maps)
    if inside is None:
        inside = torch.ones_like(maps, dtype=torch.bool)
    # Rows and columns of every slice that are not empty: the device is waited for once.
    rows, columns = inside.any(2).cpu(), inside.any(1).cpu()
    slices = _extent(rows.any(1))
    height, width = (len(range(*_extent(axis.any(0)))) + size for axis in (rows, columns))
    voxels = VOXELS_PER_CHUNK_CPU if maps.device.type == "cpu" else VOXELS_PER_CHUNK
    step = max(1, voxels * 125 // max(125, size**dimensions) // (height * width))
    for first in range(*slices, step):
        chunk = slice(first, min(first + step, slices[1]))
        box = chunk, slice(*_extent(rows[chunk].any(0))), slice(*_extent(columns[chunk].any(0)))
        filtered[box] = torch.where(inside[box], _filter_box(maps, box, size, dimensions, border), 0)
    return filtered


def _extent(found: torch.Tensor) -> tuple[int, int]:
    """Returns where the true values begin and end; (0, 0) without any."""
    places = found.nonzero().flatten().tolist()
    return (places[0], places[-1] + 1) if places else (0, 0)


def _filter_box(
    maps: torch.Tensor, box: tuple[slice, slice, slice], size: int, dimensions: int, border: str
) -> torch.Tensor:
    """Computes the medians of a box. Windows of the rows 2 j and 2 j + 1 share all their rows but one each, so even
    and odd rows are kept apart, `(2, ...)`, until then."""
    counts = [part.stop - part.start for part in box]
    before, after = size // 2, size - 1 - size // 2
    reach = ((before, after) if dimensions == 3 else (0, 0), (before, after + counts[1] % 2), (before, after))
    indices = [
        send(_continue(part.start - low, part.stop + high, length, border), maps.device)
        for part, (low, high), length in zip(box, reach, maps.shape, strict=True)
    ]
    if len(indices[1]) % 2:  # one more row, which is not used
        indices[1] = torch.cat([indices[1], indices[1][-1:]])
    halves = indices[1].unflatten(0, (-1, 2)).T[:, None]  # (2, 1, rows)
    rows = indices[0][:, None] * maps.shape[1] + halves  # (2, slices, rows) of the flat maps
    padded = maps.reshape(-1, maps.shape[2]).index_select(0, rows.flatten()).index_select(1, indices[2])
    shape, columns = rows.shape, padded.shape[1]
    values = [padded.view(2, -1)]
    if dimensions == 3:
        plane = shape[2] * columns
        values = _sort_windows(values, _moved(values, plane), 2 * plane, size)
    values = _sort_windows(values, _moved(values, 1), 2, size)

    # Of the rows that two windows share, what may be the median of either: at most `middle` values of a window are
    # smaller, and at most `total - 1 - middle` larger.
    total, shared = size * len(values), (size - 1) * len(values)
    middle = total // 2
    lowest, highest = max(0, shared - total + middle), min(shared - 1, middle)
    even, odd = ([half[parity] for half in values] for parity in (0, 1))
    core = []
    if size > 1:
        core = _sort_windows(odd, _moved(even, columns), columns, size - 1, range(lowest, highest + 1))
    rest = even, _moved((even, odd)[size % 2], size // 2 * columns)
    medians = padded.new_empty(2, counts[0] * shape[2] * columns)
    for row, own in zip(medians, rest, strict=True):
        [median] = _merge(core, own, range(middle - lowest, middle - lowest + 1))
        row[: len(median)] = median[: len(row)]
    medians = medians.unflatten(1, (counts[0], shape[2], columns)).permute(1, 2, 0, 3).flatten(1, 2)
    return medians[:, : counts[1], : counts[2]]


def _continue(start: int, stop: int, length: int, border: str) -> torch.Tensor:
    """Returns the indices that the positions from `start` to `stop` - 1 have on an axis that continues beyond its
    borders, however far."""
    edge = 1 if border == "reflect" else 0  # the last value is repeated, or not
    period = max(2 * (length - 1 + edge), 1)
    index = torch.arange(start, stop) % period
    return torch.minimum(index, period - edge - index)


def _moved(values: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [value[..., count:] for value in values]


def _sort_windows(
    first: list[torch.Tensor], second: list[torch.Tensor], step: int, size: int, ranks: range | None = None
) -> list[torch.Tensor]:
    """Merges `size` lists: `first`, `second`, then both moved by `step`, by 2 `step` and so on. Of the result the
    `ranks`, by default all."""
    if size == 1:
        return first if ranks is None else first[ranks.start : ranks.stop]
    if size == 2:
        return _merge(first, second, ranks)
    pair = merged = _merge(first, second)
    others = [_moved(pair, number * step) for number in range(1, size // 2)]
    if size % 2:
        others.append(_moved(first, size // 2 * step))
    for other in others[:-1]:
        merged = _merge(merged, other)
    return _merge(merged, others[-1], ranks)


def _merge(first: list[torch.Tensor], second: list[torch.Tensor], ranks: range | None = None) -> list[torch.Tensor]:
    """Merges two sorted lists, whose volumes may end at different places. Of the result the `ranks`, by default
    all."""
    length = min(value.shape[-1] for value in (*first[:1], *second[:1]))
    first, second = ([value[..., :length] for value in values] for values in (first, second))
    ranks = range(len(first) + len(second)) if ranks is None else ranks
    merged = _merge_odd_even(first, second, set(ranks))
    return [merged[rank] for rank in ranks]


def _merge_odd_even(first: list[torch.Tensor], second: list[torch.Tensor], ranks: Set[int]) -> dict[int, torch.Tensor]:
    """Batcher's merge: values at even places are merged, and those at odd places; of the two results, `odd[i]` and
    `even[i + 1]` are in order but for each other. Computes nothing that the `ranks` do not need."""
    if not (first and second):
        return {rank: (first or second)[rank] for rank in ranks}
    if len(first) == len(second) == 1:
        return {rank: (torch.maximum if rank else torch.minimum)(first[0], second[0]) for rank in ranks}
    odd_count = len(first) // 2 + len(second) // 2
    even_count = len(first) + len(second) - odd_count
    places = {(rank - 1) // 2 for rank in ranks}
    odd = _merge_odd_even(first[1::2], second[1::2], {place for place in places if 0 <= place < odd_count})
    even = _merge_odd_even(first[::2], second[::2], {place + 1 for place in places if place + 1 < even_count})
    merged = {}
    for rank in ranks:
        place = (rank - 1) // 2
        if place not in odd or place + 1 not in even:
            merged[rank] = odd[place] if place in odd else even[place + 1]
        else:
            merged[rank] = (torch.minimum if rank % 2 else torch.maximum)(odd[place], even[place + 1])
    return merged
