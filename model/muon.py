"""Muon: momentum whose direction is made orthogonal, for the matrices of a network's hidden layers.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the step size of Moonlight (Liu et al. 2025,
arXiv 2502.16982), which lets it share AdamW's learning rate. ``torch.optim.Muon`` computes the same one matrix at a
time and always in bfloat16; here matrices of one shape go together, in the dtype that the device multiplies fast. On a
CPU without bfloat16 instructions that is the difference between a step and five.
"""

import math
from collections import defaultdict

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan's quintic: steepest at zero, ends within about [0.7, 1.2]


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V' of each matrix U S V' [n, rows, columns], by Newton-Schulz iteration in the dtype of ``matrices``."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, gram, x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; only for parameters of two dimensions, all of which have gradients."""

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, dtype: torch.dtype = torch.bfloat16
    ):
        """``dtype``: of the orthogonalisation; momentum and weights keep their own. ValueError for other shapes."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, group, 0.2 * math.sqrt(max(shape)))

    def _update(self, parameters: list[torch.Tensor], group: dict, scale: float) -> None:
        """``scale``: root mean square of AdamW's updates over that of an orthogonal matrix."""
        gradients = [parameter.grad for parameter in parameters]
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momenta.append(state["momentum"])
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        directions = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).to(self.dtype)
        updates = orthogonal(directions).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)
