"""Smooth random fields of heads: splines on knots in millimetres."""

from __future__ import annotations

import torch


# B heads, P planes, H x W pixels, C fields, I x J x K knots.

# Half of the field of view that displacements and shadings are drawn for, in mm.
_REACH = 130.0


class Places:
    """Holds planes `z (B, P)`, rows `y (B, H)` and columns `x (B, W)`, in mm, and the weights of splines there."""

    def __init__(self, z: torch.Tensor, y: torch.Tensor, x: torch.Tensor):
        self.z, self.y, self.x = z, y, x
        self._weights: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def weights(self, counts: tuple[int, int, int]) -> list[torch.Tensor]:
        """Returns the weights `(B, P, I)`, `(B, H, J)`, `(B, W, K)` of as many knots from -_REACH to _REACH."""
        if counts not in self._weights:
            axes = self.z, self.y, self.x
            # All axes in one go, with the most knots that one has.
            last = torch.cat([torch.full_like(axis, count - 1) for axis, count in zip(axes, counts, strict=True)], 1)
            position = (torch.cat(axes, 1) / (2 * _REACH) + 0.5).clamp(0, 1) * last
            distance = (position[..., None] - torch.arange(max(counts), device=position.device)).abs()
            near = 2 / 3 - distance**2 + distance**3 / 2
            far = (2 - distance).clamp(min=0) ** 3 / 6
            parts = torch.where(distance < 1, near, far).split([axis.shape[1] for axis in axes], 1)
            parts = [part[..., :count] for part, count in zip(parts, counts, strict=True)]
            self._weights[counts] = [part / part.square().sum(-1, keepdim=True).sqrt() for part in parts]
        return self._weights[counts]


def spline(knots: torch.Tensor, places: Places) -> torch.Tensor:
    """Returns fields `(B, C, P, H, W)` of cubic B-splines with the coefficients `(B, C, I, J, K)` at places; their
    deviation is about that of the coefficients."""
    return torch.einsum("bcijk,bpi,bhj,bwk->bcphw", knots, *places.weights(tuple(knots.shape[2:])))
