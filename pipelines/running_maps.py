"""What AnoFPDM takes from the predictions of its forward process, step by step."""

from __future__ import annotations

import torch


# B slices, M compared modalities, S steps, H x W pixels.


class RunningMaps:
    """
    What AnoFPDM keeps of the forward process of B slices: the sum of the squared errors so far, a snapshot of their mean at the step
    with the largest gap so far, and three numbers per step and modality. Images of single steps are not kept.

    Args:
        original (`torch.Tensor` of shape `(B, M, H, W)`): The slices' compared modalities.
        num_steps (`int`): S.

    Attributes:
        maps (`torch.Tensor` of shape `(B, M, H, W)`):
            Mean squared error of the guided predictions over the steps below the one with the largest gap; of the first step if that
            is the one.
        best_step (`torch.Tensor` of shape `(B, M)`): Number of the step with the largest gap, the first of equals.
        guided_error, unguided_error, gap (`torch.Tensor` of shape `(B, S, M)`):
            Means over pixels of (G_t - x_0)^2, (U_t - x_0)^2 and (G_t - U_t)^2.
    """

    def __init__(self, original: torch.Tensor, num_steps: int):
        self.original = original
        self.total = torch.zeros_like(original)
        self.maps = torch.zeros_like(original)
        self.best_gap = original.new_full(original.shape[:2], -torch.inf)
        self.best_step = torch.zeros_like(self.best_gap, dtype=torch.int64)
        shape = len(original), num_steps, original.shape[1]
        self.guided_error, self.unguided_error, self.gap = (original.new_zeros(shape) for _ in range(3))

    def update(self, step: int, guided: torch.Tensor, unguided: torch.Tensor) -> None:
        """Takes in the predictions G_t and U_t of step number `step`, `(B, M, H, W)` each; steps come in turn."""
        error = (guided - self.original).square()
        gap = (guided - unguided).square().mean((2, 3))
        self.guided_error[:, step] = error.mean((2, 3))
        self.unguided_error[:, step] = (unguided - self.original).square().mean((2, 3))
        self.gap[:, step] = gap
        better = gap > self.best_gap
        # The step itself does not count (t < t_e). The first one has none below it: the original divides 0 by 0 there.
        mean_below = error if step == 0 else self.total / step
        self.maps = torch.where(better[..., None, None], mean_below, self.maps)
        self.best_gap = torch.where(better, gap, self.best_gap)
        self.best_step = torch.where(better, step, self.best_step)
        self.total += error

    def similarity(self) -> torch.Tensor:
        """Cosine similarity of the curves of the two errors, `(B,)`: high where guidance changes little, in healthy slices."""
        guided, unguided = (curve.double().mean(2) for curve in (self.guided_error, self.unguided_error))
        return torch.nn.functional.cosine_similarity(guided, unguided, dim=1, eps=1e-6).float()
