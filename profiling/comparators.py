"""What else does the work of an operation: torch's own calls on the inputs that our kernels get."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from profiling.calls import Call

LINEAR = ("layer_norm_linear", "layer_norm_qkv", "linear_residual", "lm_head")


class Comparator(NamedTuple):
    """One implementation. ``make`` builds timed calls from the arguments of ours, one for each copy of the inputs."""

    name: str
    make: Callable[[list[dict[str, Any]]], list[Callable[[], torch.Tensor]]]
    same_result: bool


def comparators(call: Call) -> list[Comparator]:
    """Implementations to time beside ``call``. None scatters K and V; attention is given them contiguous."""
    if call.function in LINEAR:
        return [
            Comparator("torch, op by op", lambda copies: [torch_linear(arguments) for arguments in copies], True),
            Comparator("F.linear alone", lambda copies: [product_alone(arguments) for arguments in copies], False),
        ]
    if call.function == "tree_attention":
        return [Comparator("SDPA", lambda copies: [sdpa(arguments) for arguments in copies], True)]
    return []


def torch_linear(arguments: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Layer norm, product, activation and residual, one torch call each."""
    x, weight, bias = arguments["x"], arguments["weight"], arguments.get("bias")
    norm_weight, residual = arguments.get("norm_weight"), arguments.get("residual")
    activation = arguments.get("activation")

    def run() -> torch.Tensor:
        y = x
        if norm_weight is not None:
            y = F.layer_norm(y, norm_weight.shape, norm_weight, arguments["norm_bias"], arguments["eps"])
        y = F.linear(y, weight, bias)
        if activation is not None:
            y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        return y if residual is None else y + residual

    return run


def product_alone(arguments: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """The matrix product and its bias, without what our kernels fuse around it: cuBLAS on a GPU."""
    x, weight, bias = arguments["x"], arguments["weight"], arguments.get("bias")
    return lambda: F.linear(x, weight, bias)


def contiguous(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [1, H, N, D], k and v [1, H, T, D] gathered beforehand, mask [N, T]: committed text, then ancestors."""
    route = arguments["route"].arguments
    paths, num_rows = route["paths"].long(), len(route["positions"])
    text = int(route["committed"][0]) - 1  # the root is the last committed token and the first row
    slots = torch.cat([route["page_table"][0, :text], route["node_slots"][:num_rows]]).long()
    ancestors = torch.zeros(num_rows, num_rows + 1, dtype=torch.bool, device=paths.device)
    ancestors.scatter_(1, torch.where(paths < 0, num_rows, paths), True)
    mask = torch.cat([ancestors.new_ones(num_rows, text), ancestors[:, :num_rows]], 1)
    k, v = (arguments[name][slots].transpose(0, 1)[None].contiguous() for name in ("k_cache", "v_cache"))
    return arguments["q"].transpose(0, 1)[None].contiguous(), k, v, mask


def sdpa(arguments: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """torch's scaled_dot_product_attention; one row needs no mask and gets none."""
    q, k, v, mask = contiguous(arguments)
    mask = mask if len(mask) > 1 else None
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=arguments["scale"])


def flex_attention(copies: list[dict[str, Any]]) -> list[Callable[[], torch.Tensor]]:
    """torch's FlexAttention, compiled once, reading the tree mask from memory; all copies have the same tree."""
    from torch.nn.attention import flex_attention as module

    inputs = [contiguous(arguments) for arguments in copies]
    mask, scale = inputs[0][3], copies[0]["scale"]

    def is_ancestor(batch, head, row, key):
        return mask[row, key]

    blocks = module.create_block_mask(is_ancestor, None, None, *mask.shape, device=mask.device)
    compiled = torch.compile(module.flex_attention, dynamic=False)
    return [lambda q=q, k=k, v=v: compiled(q, k, v, block_mask=blocks, scale=scale) for q, k, v, _ in inputs]


# Apart from the others, since it compiles for a while and may fail to.
FLEX = Comparator("FlexAttention", flex_attention, True)


def as_rows(result: torch.Tensor) -> torch.Tensor:
    """A comparator's result as [N, values]; attention's is [1, H, N, D]."""
    return result[0].transpose(0, 1).flatten(1) if result.dim() == 4 else result
