"""Slices with their neighbours as further channels: what a network of `processor.context` > 0 sees (2.5-D)."""

from __future__ import annotations

import numpy as np


# N slices, c neighbours on either side.


def find_neighbours(volumes: np.ndarray, numbers: np.ndarray, context: int) -> np.ndarray:
    """
    Finds the slices that lie next to each slice in its volume. One that is not among them is replaced by the next one
    towards the slice, at last by the slice itself.

    Args:
        volumes (`np.ndarray` of shape `(N,)`): Number >= 0 of the volume that each slice is of.
        numbers (`np.ndarray` of shape `(N,)`): Its number in the volume, which grows by 1 from slice to slice.
        context (`int`): Neighbours on either side, c.

    Returns:
        `np.ndarray` of shape `(N, 2c + 1)`, int64:
            rows of the N slices, in the order of their numbers; the middle one is the slice's own.
    """
    volumes, numbers = np.asarray(volumes, np.int64), np.asarray(numbers, np.int64)
    own = np.arange(len(numbers))
    low, high = numbers.min(initial=0), numbers.max(initial=0)
    # Volumes lie so far apart that the neighbours of one are never slices of the next.
    places = volumes * (high - low + 1 + 2 * context) + numbers - low
    order = np.argsort(places, kind="stable")
    columns = [own]
    for direction in (-1, 1):
        rows = own
        for distance in range(1, context + 1):
            wanted = places + direction * distance
            found = order[np.searchsorted(places[order], wanted).clip(max=max(len(own) - 1, 0))]
            rows = np.where(places[found] == wanted, found, rows)
            columns = [rows, *columns] if direction < 0 else [*columns, rows]
    return np.stack(columns, 1)
