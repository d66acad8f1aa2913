"""A whole pass of a shape as one CUDA graph: every layer has weights of its own, so they stream from memory.

The same straight line as ``model/gpt2.py``, on buffers made beforehand: ``GPT2.forward`` sends the length of the text
from the host, which a graph cannot hold.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from profiling.calls import LAYER, Call, make_calls, resolved, take_rows
from profiling.shapes import Operation, Shape


class Pass(NamedTuple):
    """Inputs and weights of a pass over the nodes of one tree; the first n nodes are a tree too."""

    shape: Shape
    operations: dict[str, Operation]
    around: dict[str, Call]  # route, embed, lm_head
    layers: list[dict[str, Call]]


def random_pass(shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device, text_length: int) -> Pass:
    """A pass of ``num_rows`` rows with random weights, K/V of every layer included."""
    layers = []
    for _ in range(shape.layers):
        operations, calls = make_calls(shape, num_rows, dtype, device, text_length)
        layers.append({name: calls[name] for name in LAYER})
    return Pass(shape, operations, {name: calls[name] for name in ("route", "embed", "lm_head")}, layers)


def first_rows(whole: Pass, num_rows: int) -> Pass:
    """The pass over the first ``num_rows`` nodes, on the same weights."""
    rows = slice(0, num_rows)
    around = {name: take_rows(call, rows) for name, call in whole.around.items()}
    layers = [{name: take_rows(call, rows) for name, call in layer.items()} for layer in whole.layers]
    return whole._replace(around=around, layers=layers)


def forward(whole: Pass, ops: ModuleType) -> Callable[[], torch.Tensor]:
    """The pass, ready to be timed: returns the logits [N, V]."""
    route_arguments = resolved(whole.around["route"], ops)
    embed_arguments = resolved(whole.around["embed"], ops)
    head_arguments = dict(whole.around["lm_head"].arguments)
    layers = [{name: dict(call.arguments) for name, call in layer.items()} for layer in whole.layers]

    def run() -> torch.Tensor:
        route = ops.route(**route_arguments)
        moments = embed_arguments["moments"]  # one buffer, as in a pass of GPT-2
        x = ops.embed(**embed_arguments)
        for layer in layers:
            q = ops.layer_norm_qkv(**{**layer["layer_norm_qkv"], "x": x, "route": route, "moments": moments})
            mixed = ops.tree_attention(**{**layer["tree_attention"], "q": q, "route": route})
            x = ops.linear_residual(**{**layer["attn_proj"], "x": mixed, "residual": x, "moments": moments})
            hidden = ops.layer_norm_linear(**{**layer["mlp_fc_gelu"], "x": x, "moments": moments})
            x = ops.linear_residual(**{**layer["mlp_proj"], "x": hidden, "residual": x, "moments": moments})
        return ops.lm_head(**{**head_arguments, "x": x})

    return run


def same_root(whole: Pass, ops: ModuleType) -> bool:
    """Whether the root's logits have the same bits in the whole pass and alone, and are finite."""
    together, alone = forward(whole, ops)()[:1], forward(first_rows(whole, 1), ops)()
    return torch.equal(together, alone) and bool(torch.isfinite(alone).all())


def num_launches(shape: Shape, dtype: torch.dtype, text_length: int) -> int:
    """Kernel launches of one pass of the Triton backend, counted by recording it."""
    from kernels import gpu
    from kernels.gpu.launch import record

    with record("sm_90") as launches:
        run = forward(random_pass(shape, 1, dtype, torch.device("meta"), text_length), gpu)
        launches.clear()
        run()
    return len(launches)


def weight_bytes(whole: Pass) -> int:
    """Bytes of parameters that one pass reads."""
    return sum(operation.weight_bytes * operation.repeats for operation in whole.operations.values())
