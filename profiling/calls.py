"""The operations of ``profiling.shapes`` taken apart into functions and named arguments.

So the same inputs can go to a kernel, to its torch twin in float64, to a comparator, and row by row.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kernels import reference
from profiling.shapes import Operation, Shape, operations

ROW_ARGUMENTS = {"tokens", "positions", "sequences", "paths", "slot_mapping"}
ROW_ARGUMENTS |= {"x", "q", "residual", "tile_maxima", "moments", "rows"}
# ‖result - reference‖ / ‖reference‖ against the twin in float64
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Call(NamedTuple):
    """A call that has not been made; an argument may be a call too (the route)."""

    function: str  # name in ``kernels.gpu`` and ``kernels.reference``
    arguments: dict[str, Any]


class _Deferred:
    """Stands for a module of operations and returns calls instead of making them."""

    def __getattr__(self, function: str) -> Callable[..., Call]:
        signature = inspect.signature(getattr(reference, function))
        return lambda *args, **kwargs: Call(function, dict(signature.bind(*args, **kwargs).arguments))


def make_calls(
    shape: Shape, num_rows: int, dtype: torch.dtype, device: torch.device | str, text_length: int
) -> tuple[dict[str, Operation], dict[str, Call]]:
    """One set of inputs: the operations of ``profiling.shapes`` and their calls, by the operation's name.

    The output head keeps its maxima, as a pass that is sampled from does.
    """
    made = operations(shape, num_rows, dtype, device, _Deferred(), text_length, tile_maxima=True)
    return {operation.name: operation for operation in made}, {operation.name: operation.call() for operation in made}


def bind(call: Call, ops: ModuleType) -> Callable[[], Any]:
    """The call on ``ops``, ready to be timed: what it depends on is computed here."""
    function, arguments = getattr(ops, call.function), resolved(call, ops)
    return lambda: function(**arguments)


def resolved(call: Call, ops: ModuleType) -> dict[str, Any]:
    """Arguments of ``call`` with inner calls made."""
    found = call.arguments.items()
    return {name: bind(value, ops)() if isinstance(value, Call) else value for name, value in found}


def run(call: Call, ops: ModuleType) -> torch.Tensor:
    """Make the call; everything it writes, by rows: [N, ...]."""
    arguments = resolved(call, ops)
    result = getattr(ops, call.function)(**arguments)
    if call.function == "route":  # the specification of tail_slots has a name of its own
        twin = {name: value for name, value in arguments.items() if name != "slot_mapping"}
        return reference.path_slots(**twin) if ops is reference else result.tail_slots
    if call.function == "lm_head":
        return torch.cat([result, arguments["tile_maxima"].to(result.dtype)], 1)
    if call.function != "layer_norm_qkv":
        return result
    slots = call.arguments["route"].arguments["slot_mapping"].long()
    return torch.stack([result, arguments["k_cache"][slots], arguments["v_cache"][slots]], 1)


def take_rows(call: Call, rows: slice) -> Call:
    """The call on some of its rows only; copies, since kernels ask for aligned rows."""
    names = ROW_ARGUMENTS - {"x", "moments"} if "rows" in call.arguments else ROW_ARGUMENTS  # it picks some of those

    def part(name: str, value: Any) -> Any:
        if isinstance(value, Call):
            return take_rows(value, rows)
        return value[rows].clone() if name in names and value is not None else value

    return Call(call.function, {name: part(name, value) for name, value in call.arguments.items()})


def in_double(call: Call) -> Call:
    """The call on copies of its tensors on the CPU, in float64: what errors are measured against."""

    def cast(value: Any) -> Any:
        if isinstance(value, Call):
            return in_double(value)
        if not isinstance(value, torch.Tensor):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    return Call(call.function, {name: cast(value) for name, value in call.arguments.items()})


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; infinite where anything is not finite."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def check(call: Call, ops: ModuleType, dtype: torch.dtype, rows: list[int]) -> dict[str, Any]:
    """Whether the call is right: error against the twin in float64, and bits of ``rows`` alone and among all rows."""
    poison = torch.full_like(run(call, ops).double(), float("nan")).to(run(call, ops).dtype)
    del poison  # most likely where the next result goes: what is not written shows
    out = run(call, ops)
    expected = run(in_double(call), reference)
    if call.function == "route":
        equal = bool(torch.equal(out.cpu(), expected))
        return {"ok": equal, "error": 0.0 if equal else float("inf"), "different_rows": []}
    error = relative_error(out, expected)
    different = [row for row in rows if not torch.equal(run(take_rows(call, slice(row, row + 1)), ops)[0], out[row])]
    return {"ok": error <= TOLERANCES[dtype] and not different, "error": error, "different_rows": different}
