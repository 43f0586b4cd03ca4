"""Finds NaN and infinite values in what is trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Tells whether all values of all tensors are finite numbers."""
    found = [torch.isfinite(tensor).all() for tensor in tensors]
    return not found or all(torch.stack([each.to(found[0].device) for each in found]).tolist())


def check_part(module: torch.nn.Module, option: str, path) -> None:
    """Raises a `ValueError` if a part that was trained before, which `option` names, has weights that are not
    finite."""
    if not are_finite(module.state_dict().values()):
        raise ValueError(
            f"`{option}`: the {type(module).__name__} of {path} holds NaN or infinite weights: its training diverged,"
            " or the file is damaged. Train it again, or name another."
        )
