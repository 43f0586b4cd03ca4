"""Keys of a training's random numbers (`schedulers/draws.py`): one per sample, and a number for everything that is
drawn for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..schedulers.draws import make_keys


# Streams: samples of the training, slices of the validation, and slices of its picture.
TRAINING, VALIDATION, PREVIEW = range(3)

# Draws of one sample: `fold_in(keys, NUMBER)` are the keys of that draw alone. `UPDATE` starts anew for every update
# on a batch.
AFFINE, INTENSITY, ANOMALY, ANNOTATION, UPDATE, TIMESTEP, NOISE, LABEL, BOX, CELLS = range(10)


def sample_keys(seed: int, stream: int, positions: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    Makes the keys that everything random about samples depends on.

    Args:
        seed (`int`): `train.seed`.
        stream (`int`): `TRAINING`, `VALIDATION` or `PREVIEW`.
        positions (sequence or tensor of shape `(N,)`): Numbers of the samples in the stream.
        device (`torch.device`): Where the keys go.

    Returns:
        `torch.Tensor` of shape `(N, 2)`, int64.
    """
    return make_keys(seed, positions, stream, device)
