"""What the tests of the Triton backend share: where and in which dtypes they run, and every operation on random inputs.

The same tests run in Triton's interpreter and, where there is one, on a CUDA device. The expected value of an operation
is its torch twin on the same inputs in float64 (``in_float64``), so tolerances measure the kernel's own rounding.
"""

import functools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from kernels import reference
from kernels.layout import MOMENT_PART, VOCAB_TILE
from kernels.reference import path_slots
from model.gpt2 import Query
from model.kv_cache import PagedKVCache
from tests.helpers import Branch, Tolerance, assert_close, joined, new_slots, permuted, poison, random_tree, tree_query
from tests.interpreter import DEVICE, INTERPRETING, reversed_programs

EPS = 1e-5
# Triton's interpreter computes bfloat16 wrongly; float16 covers half precision there.
HALVES = [pytest.param(torch.float16, id="float16")]
HALVES += [] if INTERPRETING else [pytest.param(torch.bfloat16, id="bfloat16")]
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), *HALVES])
# Of a value, against float64, in units of the result's root mean square: inputs and intermediate results are rounded to
# the dtype, sums are float32.
GPU_TOLERANCES = {
    torch.float32: Tolerance(2e-5, 2e-5),
    torch.float16: Tolerance(2**-9, 2**-9),
    torch.bfloat16: Tolerance(2**-6, 2**-6),
}
# Marks a test, or one of its cases, on a real shape: too much for the interpreter, so ``conftest`` skips it there.
REAL_SHAPE = pytest.mark.gpu


def poison_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch allocates without a value, floats with NaN and integers with -1: a read of it shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_fill(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(-1)
            return tensor

        return allocate_and_fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


class Shape(NamedTuple):
    heads: int
    dim: int
    inner: int
    vocab: int


class Inputs(NamedTuple):
    """What the operations of one pass take. ``k_cache``, ``v_cache`` hold NaN wherever no row of the pass may read."""

    query: Query
    page_table: torch.Tensor
    page_size: int
    committed: torch.Tensor
    k_cache: torch.Tensor  # [slots, H, D]
    v_cache: torch.Tensor  # [slots, H, D]
    q: torch.Tensor  # [N, H, D]
    x: torch.Tensor  # [N, C]
    hidden: torch.Tensor  # [N, inner]
    norm_weight: torch.Tensor  # [C]
    norm_bias: torch.Tensor  # [C]
    wte: torch.Tensor  # [V, C]
    wpe: torch.Tensor  # [P, C]
    qkv_weight: torch.Tensor  # [3 C, C]
    qkv_bias: torch.Tensor  # [3 C]
    fc_weight: torch.Tensor  # [inner, C]
    fc_bias: torch.Tensor  # [inner]
    proj_weight: torch.Tensor  # [C, inner]
    proj_bias: torch.Tensor  # [C]
    moments: torch.Tensor  # float32 [N, 2, P], NaN, to be written

    def rows(self, rows: torch.Tensor) -> "Inputs":
        """The same pass with these rows alone, in this order."""
        query = permuted(self.query, rows)
        columns = ("q", "x", "hidden", "moments")
        return self._replace(query=query, **{name: getattr(self, name)[rows] for name in columns})


def in_float64(inputs: Inputs) -> Inputs:
    """The same values on the host, floats in float64."""
    query = Query(*(column.cpu() for column in inputs.query))
    return Inputs(query, *(_in_float64(value) for value in inputs[1:]))


def _in_float64(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def tree_pass(
    shape: Shape, dtype: torch.dtype, lengths: list[int], num_nodes: int, page_size: int, num_nowhere: int = 5
) -> Inputs:
    """A pass over a tree of ``num_nodes`` nodes below each of several texts, rows in random order.

    ``num_nowhere`` of the rows write their K/V nowhere (slot -1), as padding rows do.
    """
    num_slots = sum(length + num_nodes + 2 * page_size for length in lengths)
    cache = _cache(shape, dtype, num_slots, page_size, len(lengths))
    query = None
    for sequence, length in enumerate(lengths):
        cache.append(length, sequence)
        branch = Branch([0] * length, random_tree(num_nodes, sequence, shape.vocab), sequence)
        one = tree_query(cache, branch, new_slots(branch))
        query = one if query is None else joined(query, one)
    query = permuted(query, torch.randperm(len(query.tokens)))
    slot_mapping = query.slot_mapping.clone()
    slot_mapping[:num_nowhere] = -1
    return _inputs(shape, dtype, cache, query, query.slot_mapping)._replace(
        query=query._replace(slot_mapping=slot_mapping)
    )


def prefill_pass(shape: Shape, dtype: torch.dtype, start: int, num_rows: int, page_size: int) -> Inputs:
    """A pass of committed rows from position ``start``, of the second of two sequences."""
    cache = _cache(shape, dtype, start + num_rows + 100, page_size, 2)
    cache.append(40, 0)
    cache.append(start, 1)
    query = Query(
        tokens=torch.randint(shape.vocab, (num_rows,), dtype=torch.int32),
        positions=torch.arange(start, start + num_rows, dtype=torch.int32),
        sequences=torch.ones(num_rows, dtype=torch.int32),
        slot_mapping=cache.append(num_rows, 1),
        paths=torch.zeros(num_rows, 1, dtype=torch.int32),
        node_slots=torch.zeros(1, dtype=torch.int32),
    )
    return _inputs(shape, dtype, cache, Query(*(column.to(DEVICE) for column in query)), query.slot_mapping)


def _cache(shape: Shape, dtype: torch.dtype, num_slots: int, page_size: int, num_sequences: int) -> PagedKVCache:
    num_pages = -(-num_slots // page_size)
    return poison(
        PagedKVCache(1, shape.heads, shape.dim, 1024, num_pages, page_size, num_sequences, dtype, DEVICE), shuffle=0
    )


def _inputs(shape: Shape, dtype: torch.dtype, cache: PagedKVCache, query: Query, node_slots: torch.Tensor) -> Inputs:
    """Random inputs for ``query``; K/V of committed positions and of ``node_slots`` are filled in."""
    n, width = len(query.tokens), shape.heads * shape.dim

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(size)).to(DEVICE, dtype)  # drawn on the host: the same values on every device

    committed = [cache.slots(0, length, sequence) for sequence, length in enumerate(cache.cached_len)]
    written = torch.cat([*committed, node_slots.cpu()]).unique().to(DEVICE)
    k_cache, v_cache = cache.k[0], cache.v[0]
    k_cache[written] = normal(len(written), shape.heads, shape.dim)
    v_cache[written] = normal(len(written), shape.heads, shape.dim)
    return Inputs(
        query=query,
        page_table=cache.page_table,
        page_size=cache.page_size,
        committed=torch.tensor(cache.cached_len, dtype=torch.int32, device=DEVICE),
        k_cache=k_cache,
        v_cache=v_cache,
        q=normal(n, shape.heads, shape.dim),
        x=normal(n, width),
        hidden=normal(n, shape.inner),
        norm_weight=1 + normal(width, scale=0.1),
        norm_bias=normal(width, scale=0.1),
        wte=normal(shape.vocab, width, scale=width**-0.5),
        wpe=normal(1024, width),
        qkv_weight=normal(3 * width, width, scale=width**-0.5),
        qkv_bias=normal(3 * width),
        fc_weight=normal(shape.inner, width, scale=width**-0.5),
        fc_bias=normal(shape.inner),
        proj_weight=normal(width, shape.inner, scale=shape.inner**-0.5),
        proj_bias=normal(width),
        moments=torch.full((n, 2, -(-width // MOMENT_PART)), float("nan"), device=DEVICE),
    )


def _route(ops: ModuleType, i: Inputs) -> Any:
    return ops.route(**ARGUMENTS["route"](ops, i))


# Arguments of each operation, by name.
ARGUMENTS: dict[str, Callable[[ModuleType, Inputs], dict[str, Any]]] = {
    "embed": lambda ops, i: {
        "tokens": i.query.tokens,
        "positions": i.query.positions,
        "wte": i.wte,
        "wpe": i.wpe,
        "moments": i.moments.clone(),
    },
    "route": lambda ops, i: {
        "page_table": i.page_table,
        "page_size": i.page_size,
        "committed": i.committed,
        "sequences": i.query.sequences,
        "positions": i.query.positions,
        "paths": i.query.paths,
        "node_slots": i.query.node_slots,
        "slot_mapping": i.query.slot_mapping,
    },
    "layer_norm_linear": lambda ops, i: {
        **_norm(i),
        "weight": i.fc_weight,
        "bias": i.fc_bias,
        "activation": "gelu_tanh",
    },
    "layer_norm_qkv": lambda ops, i: {
        **_norm(i),
        "weight": i.qkv_weight,
        "bias": i.qkv_bias,
        "k_cache": i.k_cache.clone(),
        "v_cache": i.v_cache.clone(),
        "route": _route(ops, i),
    },
    "tree_attention": lambda ops, i: {
        "q": i.q,
        "k_cache": i.k_cache,
        "v_cache": i.v_cache,
        "route": _route(ops, i),
        "scale": i.q.shape[-1] ** -0.5,
    },
    "linear_residual": lambda ops, i: {
        "x": i.hidden,
        "weight": i.proj_weight,
        "bias": i.proj_bias,
        "residual": i.x,
        "moments": i.moments.clone(),
    },
    "lm_head": lambda ops, i: {
        **_norm(i),
        "weight": i.wte,
        "tile_maxima": torch.empty(len(i.x), -(-len(i.wte) // VOCAB_TILE), dtype=torch.float32, device=i.x.device),
    },
}
_WRITTEN = {
    "embed": ("moments",),
    "layer_norm_qkv": ("k_cache", "v_cache"),
    "linear_residual": ("moments",),
    "lm_head": ("tile_maxima",),
}


def _norm(i: Inputs) -> dict[str, Any]:
    return {"x": i.x, "norm_weight": i.norm_weight, "norm_bias": i.norm_bias, "eps": EPS}


def run(ops: ModuleType, name: str, i: Inputs, **changed) -> tuple[torch.Tensor, ...]:
    """What operation ``name`` returns and what else it writes; of ``route``, the slots of the tails."""
    arguments = ARGUMENTS[name](ops, i) | changed
    if name == "route" and ops is reference:
        del arguments["slot_mapping"]
        return (path_slots(**arguments),)
    result = getattr(ops, name)(**arguments)
    return (result.tail_slots if name == "route" else result, *(arguments[field] for field in _WRITTEN.get(name, ())))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """``actual`` is within the tolerance of ``dtype`` of ``expected``, NaN exactly where it is; integers are equal."""
    actual, expected = actual.cpu(), expected.cpu()
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN at other places than expected"
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    scale = expected[expected != 0].square().mean().sqrt()
    assert_close(actual / scale, expected / scale, dtype, GPU_TOLERANCES)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def random_rows(num_rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Choices of rows that must not matter: all in another order, the first, the last, an odd few of any."""
    rng = random.Random(seed)
    order = rng.sample(range(num_rows), num_rows)
    return [torch.tensor(rows) for rows in (order, [0], [num_rows - 1], order[: num_rows // 2 + 1])]


# Both sides of the first tail borders (48, 64) and of the borders at which windows of 16 to 128 keys fill.
LENGTHS = [0, 1, 31, 32, 46, 47, 48, 63, 64, 127, 144, 159, 160, 176, 287, 288, 320]
SMALL = Shape(heads=1, dim=64, inner=100, vocab=97)
MEDIUM = Shape(heads=3, dim=64, inner=256, vocab=130)
WIDE_HEADS = Shape(heads=2, dim=128, inner=100, vocab=64)
LARGE = Shape(heads=20, dim=64, inner=5120, vocab=50257)  # GPT-2 Large
PASSES = {
    "1 head": lambda dtype: tree_pass(SMALL, dtype, LENGTHS, 5, page_size=1),
    "3 heads": lambda dtype: tree_pass(MEDIUM, dtype, [47, 320, 20], 9, page_size=16),
    "heads of 128": lambda dtype: tree_pass(WIDE_HEADS, dtype, [0, 170], 7, page_size=1),
    "1 row": lambda dtype: tree_pass(SMALL, dtype, [161], 1, page_size=16, num_nowhere=0),
    "prefill": lambda dtype: prefill_pass(SMALL, dtype, 30, 140, page_size=16),
    "large": lambda dtype: tree_pass(LARGE, dtype, [700, 301], 32, page_size=1),
    "large prefill": lambda dtype: prefill_pass(LARGE, dtype, 100, 512, page_size=1),
}


@functools.cache
def inputs(of: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    return PASSES[of](dtype)


@functools.cache
def expected(op: str, of: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return run(reference, op, in_float64(inputs(of, dtype)))


def another_order() -> AbstractContextManager:
    """Programs last to first in the interpreter; on a GPU they come as they come."""
    return reversed_programs() if INTERPRETING else nullcontext()


def normal(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size).to(DEVICE, dtype)
