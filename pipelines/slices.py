"""Slices of a volume, the noise that they get, and what a method makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from ..schedulers.draws import fold_in, make_keys
from ..volumes.processor import ProcessedVolume


# N slices of one volume, C modalities, H x W pixels, B items of a batch, K draws of a slice.


@dataclass(frozen=True)
class PreparedSlices:
    """Slices of one volume on the pipeline's device: `slices` (N, C, H, W), `brain` (N, H, W) bool, where they came
    from (`None` for a tensor), how the brain mask came about (of `brain.BRAIN_ORIGINS`), and the mask `(X, Y, Z)` where
    the pipeline made it."""

    slices: torch.Tensor
    brain: torch.Tensor
    processed: ProcessedVolume | None
    brain_origin: str
    made_mask: np.ndarray | None = None


class SliceResults(NamedTuple):
    """
    What a method makes of N slices on the network's grid.

    Args:
        maps (`torch.Tensor` of shape `(N, H, W)`): Scores >= 0. CIMD: the maps of E members, `(N, E, H, W)`.
        reconstruction (`torch.Tensor` of shape `(N, C, H, W)`, *optional*):
            Pseudo-healthy slices, if the method makes any.
        masks (`torch.Tensor` of shape `(N, H, W)`, bool, *optional*):
            The method's own segmentation, if it chooses its thresholds itself.
        details (`dict[str, torch.Tensor]`): What else it says of each slice, `(N, ...)`.
        added (`torch.Tensor` of shape `(N, H, W)`, *optional*):
            Scores >= 0 that are added to the maps once these are filtered.
    """

    maps: torch.Tensor
    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    details: dict[str, torch.Tensor] = MappingProxyType({})
    added: torch.Tensor | None = None


class Noise:
    """
    Gives the noise of the items of one batch: drawn by key, or as the caller of the pipeline gave it.

    Draw k of slice i has the key `make_keys(seed, i, k)`, whatever else is in the batch; those after the first of a
    chain are folded from it. Given noise has one form for all pipelines: a tensor `(K, N, C, H, W)`, whose entry
    `[k, i]` is draw k of slice i, or a callable `noise(draws, indices, shape)` with a list of numbers below K, a list
    of slice numbers as long, and the shape `(B, C, H, W)` that it must return, C the channels that the network sees.
    Each pipeline says what its draws are.

    Args:
        seed (`int`): Of the call.
        given (`torch.Tensor` or callable, *optional*): The argument `noise` of the call.
        indices (`torch.Tensor` of shape `(B,)`, int64, on the CPU): Numbers of the items' slices in their volume.
        draws (`torch.Tensor` of shape `(B,)`, int64, on the CPU): Number of each item's (first) draw.
        device (`torch.device`): Of the noise.
    """

    def __init__(self, seed: int, given, indices: torch.Tensor, draws: torch.Tensor | int, device: torch.device):
        self.given, self.device = given, device
        self.indices, self.draws = torch.broadcast_tensors(indices, torch.as_tensor(draws))
        self.keys = make_keys(seed, self.indices, self.draws, device) if given is None else None

    def __call__(
        self, make: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, step: int = 0
    ) -> torch.Tensor:
        """
        Gives the noise of one draw of all items.

        Args:
            make (callable):
                Keys `(B, 2)` to noise `(B, C, H, W)`: the scheduler's `draw_noise`, with everything else bound.
            like (`torch.Tensor` of shape `(B, C, H, W)`): For type and shape.
            step (`int`): Number of the draw after the first one, for methods that walk a chain.
        """
        if self.given is None:
            return make(self.keys if step == 0 else fold_in(self.keys, step)).to(like.dtype)
        draws, indices = (self.draws + step).tolist(), self.indices.tolist()
        if callable(self.given):
            drawn = self.given(draws, indices, tuple(like.shape))
            shape, wanted = tuple(drawn.shape), tuple(like.shape)
        else:
            least = max(draws) + 1, max(indices) + 1
            shape = tuple(self.given.shape)
            enough = len(shape) == 5 and shape[0] >= least[0] and shape[1] >= least[1]
            wanted = (f"at least {least[0]}", f"at least {least[1]}", *like.shape[1:])
            if enough and shape[2:] == wanted[2:]:
                drawn = self.given[draws, indices]
                shape = wanted
        if shape != wanted:
            raise ValueError(f"`noise` must have the shape ({', '.join(map(str, wanted))}), got {shape}.")
        return drawn.to(self.device, like.dtype)
