"""Torch twin of the moments that rows carry to the next layer norm. The twins of layer norms take their own."""

import torch


def new_moments(num_rows: int, width: int, device: torch.device) -> torch.Tensor | None:
    """What ``embed`` and ``linear_residual`` are to fill for the next layer norm: None, the twin makes no use of it."""
    return None


def write_moments(y: torch.Tensor, moments: torch.Tensor) -> None:
    """``moments`` [N, 2, P] receives mean and squared deviations of P parts of each row of ``y`` [N, C]."""
    parts = y.unflatten(1, (moments.shape[2], -1)).to(moments.dtype)
    mean = parts.mean(2)
    moments.copy_(torch.stack([mean, (parts - mean[..., None]).square().sum(2)], 1))
