"""Which slices are neighbours."""

import numpy as np
import pytest

from anodiff.volumes.context import find_neighbours


@pytest.mark.parametrize(
    ("volumes", "numbers", "context", "expected"),
    [
        # The outermost slices repeat themselves; further away, the last one that is there does.
        ([0, 0, 0], [4, 5, 6], 1, [[0, 0, 1], [0, 1, 2], [1, 2, 2]]),
        ([0, 0, 0], [4, 5, 6], 2, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 2]]),
        # Volumes share nothing, whether their numbers go on or begin anew.
        ([0, 0, 1, 1], [0, 1, 2, 3], 1, [[0, 0, 1], [0, 1, 1], [2, 2, 3], [2, 3, 3]]),
        ([0, 0, 1, 1], [0, 1, 0, 1], 1, [[0, 0, 1], [0, 1, 1], [2, 2, 3], [2, 3, 3]]),
        # A slice that is missing is no neighbour, and what lies behind it does not move up.
        ([0, 0, 0], [0, 1, 3], 1, [[0, 0, 1], [0, 1, 1], [2, 2, 2]]),
        ([0, 0, 0], [0, 1, 3], 2, [[0, 0, 0, 1, 1], [0, 0, 1, 1, 2], [1, 2, 2, 2, 2]]),
        # The order of the rows does not matter.
        ([3, 1, 3, 1], [7, 7, 6, 8], 1, [[2, 0, 0], [1, 1, 3], [2, 2, 0], [1, 3, 3]]),
        ([0], [12], 1, [[0, 0, 0]]),
        ([0, 0], [1, 2], 0, [[0], [1]]),
    ],
)
def test_neighbours(volumes, numbers, context, expected):
    np.testing.assert_array_equal(find_neighbours(np.array(volumes), np.array(numbers), context), expected)


def test_no_slices_have_no_neighbours():
    assert find_neighbours(np.array([], int), np.array([], int), 2).shape == (0, 5)
