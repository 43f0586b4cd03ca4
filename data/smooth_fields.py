"""Smooth random fields: what phantoms are bent, shaded and textured by, and what a rater's hand is unsteady by."""

from functools import lru_cache

import numpy as np
from scipy import sparse


@lru_cache(maxsize=64)
def _spline_matrix(n, spacing, n_knots, knot_spacing):
    position = np.arange(n) * spacing / knot_spacing
    first = np.floor(position).astype(int)
    u = position - first
    weights = np.stack([(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3], axis=1)
    weights /= np.sqrt((weights**2).sum(axis=1, keepdims=True))  # unit variance at every voxel, not only on average
    columns = first[:, None] + np.arange(4)
    return sparse.csr_array(
        (weights.astype(np.float32).ravel(), columns.ravel(), 4 * np.arange(n + 1)), shape=(n, n_knots)
    )


def smooth_field(rng, shape, spacing, extent, knot_spacing):
    """Draws a Gaussian field `shape`, float32, of mean 0 and standard deviation 1: cubic B-splines with independent
    normal coefficients from the generator `rng`. `spacing` and `extent` (voxel size and length of every axis) have the
    unit of `knot_spacing`, the length over which the field changes.

    Sparse products, one per axis: exact at any spacing, much faster than a cubic zoom, and (unlike BLAS) bit for bit
    the same whatever the number of threads.
    """
    n_knots = [int(length // knot_spacing) + 4 for length in extent]
    field = rng.standard_normal(n_knots, dtype=np.float32)
    for n, step, knots in zip(shape, spacing, n_knots, strict=True):
        matrix = _spline_matrix(n, step, knots, knot_spacing)
        # Each product takes the first axis and appends its result as the last: in the end the order is `shape`'s.
        field = np.moveaxis((matrix @ field.reshape(knots, -1)).reshape(n, *field.shape[1:]), 0, -1)
    return field
