"""What AnoFPDM takes from the predictions of its forward process, step by step, and where it cuts: quantiles of maps,
and the threshold of the similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import mse_loss


# N slices, B of them in a batch, M compared modalities, S steps, H x W pixels.


class RunningMaps:
    """
    Keeps what AnoFPDM needs of the forward process of N slices: the sum of the squared errors so far, a snapshot of
    their mean at the step with the largest gap so far, and three numbers per step and modality. Images of single steps
    are not kept.

    Args:
        original (`torch.Tensor` of shape `(N, M, H, W)`): The slices' compared modalities.
        num_steps (`int`): S.

    Attributes:
        total (`torch.Tensor` of shape `(N, M, H, W)`): Sum of the squared errors of the guided predictions.
        total_below (`torch.Tensor` of shape `(N, M, H, W)`):
            That sum before the step with the largest gap; after the first step if that is the one.
        best_step (`torch.Tensor` of shape `(N, M)`): Number of the step with the largest gap, the first of equals.
        best_gap (`torch.Tensor` of shape `(N, M)`): The largest gap.
        guided_error, unguided_error, gap (`torch.Tensor` of shape `(N, S, M)`):
            Means over pixels of (G_t - x_0)^2, (U_t - x_0)^2 and (G_t - U_t)^2.
    """

    def __init__(self, original: torch.Tensor, num_steps: int):
        self.original = original
        self.total, self.total_below = torch.zeros_like(original), torch.zeros_like(original)
        self.best_gap = original.new_full(original.shape[:2], -torch.inf)
        self.best_step = torch.zeros_like(self.best_gap, dtype=torch.int64)
        shape = len(original), num_steps, original.shape[1]
        self.guided_error, self.unguided_error, self.gap = (original.new_zeros(shape) for _ in range(3))

    def update(self, rows: slice, step: int, guided: torch.Tensor, unguided: torch.Tensor) -> None:
        """Takes in the predictions G_t and U_t of a batch of slices at step number `step`, `(B, M, H, W)` each; steps
        come in turn."""
        original, total, below = self.original[rows], self.total[rows], self.total_below[rows]
        best_gap, best_step = self.best_gap[rows], self.best_step[rows]
        # Squares of differences in one kernel, and in place what can be: a step has hardly any other work.
        error = mse_loss(guided, original, reduction="none")
        gap = mse_loss(guided, unguided, reduction="none").mean((2, 3))
        self.guided_error[rows, step] = error.mean((2, 3))
        self.unguided_error[rows, step] = mse_loss(unguided, original, reduction="none").mean((2, 3))
        self.gap[rows, step] = gap
        better = gap > best_gap
        # The step itself does not count (t < t_e). The first one has none below it: the original divides 0 by 0 there.
        torch.where(better[..., None, None], error if step == 0 else total, below, out=below)
        torch.where(better, gap, best_gap, out=best_gap)
        best_step.masked_fill_(better, step)
        total += error

    @property
    def maps(self) -> torch.Tensor:
        """Mean squared error of the guided predictions over the steps below the one with the largest gap, `(N, M, H,
        W)`; of the first step if that is the one."""
        return self.total_below / self.best_step.clamp(min=1)[..., None, None]

    def similarity(self) -> torch.Tensor:
        """Computes the cosine similarity of the curves of the two errors, `(N,)`: high where guidance changes little,
        in healthy slices."""
        guided, unguided = (curve.double().mean(2) for curve in (self.guided_error, self.unguided_error))
        return torch.nn.functional.cosine_similarity(guided, unguided, dim=1, eps=1e-6).float()


def quantile_levels(gap: torch.Tensor, gap_scale: Sequence[float], quantile_range: Sequence[float]) -> torch.Tensor:
    """Returns the level of the quantile that a map is cut at, `(N, M)`: the lowest of `quantile_range` for the largest
    gaps `(N, M)` that reach `gap_scale`, the highest for none."""
    # A table of 101 levels and an index that is truncated after float32 rounding, both as in the original: ratios of
    # 0.53 and 0.59 get the levels of 0.52 and 0.58.
    ratio = (gap / torch.tensor(gap_scale, dtype=gap.dtype, device=gap.device)).clamp(0.0, 1.0)
    position = (ratio.round(decimals=2) * 100).long()
    return torch.linspace(*quantile_range, 101).flip(0).to(gap.device)[position]


def map_quantiles(maps: torch.Tensor, levels: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Computes the quantiles `(N, M)` of maps `(N, M, H, W)` with linear interpolation, each at its own level
    `(N, M)`, over the pixels `inside` `(N, H, W)`, bool."""
    # Pixels outside are sorted to the end.
    pixels = maps.flatten(2).masked_fill(~inside.flatten(1)[:, None], torch.inf)
    rank = (levels * (inside.sum((1, 2))[:, None] - 1)).clamp(min=0)
    below = rank.floor().long()
    neighbours = torch.stack([below, (below + 1).clamp(max=pixels.shape[2] - 1)], 2)
    low, high = pixels.sort(2).values.gather(2, neighbours).unbind(2)
    # The upper neighbour of the last pixel inside may be infinite.
    return torch.where(rank == below, low, torch.lerp(low, high, rank - below))


def similarity_threshold(similarity: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """
    Chooses AnoFPDM's threshold of the similarity, below which a slice is unhealthy: of 100 low quantiles (0.5 to
    9.5 %) of the healthy slices the first with the fewest wrong labels, as in the authors' program.

    Args:
        similarity (`torch.Tensor` of shape `(N,)`): Of every slice, float32.
        labels (`torch.Tensor` of shape `(N,)`): 0 healthy, 1 unhealthy; at least one slice of each.

    Returns:
        `tuple[float, int]`: the threshold, and how many slices are on the wrong side of it.

    Raises:
        ValueError: A class is missing.
    """
    healthy, unhealthy = similarity[labels == 0], similarity[labels == 1]
    if not len(healthy) or not len(unhealthy):
        raise ValueError(
            "`labels` must hold healthy (0) and unhealthy (1) slices, got"
            f" {len(healthy)} and {len(unhealthy)}: choose other validation data, or the policy healthy, yen or otsu."
        )
    levels = torch.linspace(0.005, 0.095, 100, dtype=healthy.dtype, device=healthy.device)
    candidates = torch.quantile(healthy, levels)[:, None]
    wrong = (unhealthy > candidates).sum(1) + (healthy < candidates).sum(1)
    # The first of equals; `argmin` of torch does not promise it.
    best = int(np.argmin(wrong.cpu().numpy()))
    return float(candidates[best]), int(wrong[best])
