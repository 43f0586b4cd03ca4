from __future__ import annotations

import torch


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the CPU to a device. A CUDA device copies it when it gets there, from memory that is kept
    until then: plain `to` would make the host wait until the device has done all work before."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)
