"""Whole passes of a model over the nodes of a tree: their inputs, ready to be timed, and the points of a roofline.

A pass is ``GPT2.forward`` with the output head, as decoding runs it, on the first rows of one tree, which are a tree
too. Weights are a model's own or random, and K/V of every layer random, so on a GPU they stream from memory. A point's
bytes are the least that such a pass moves (weights once, K/V of the text), its operations those of its rows. On a CPU
small models stay in the cache from one pass to the next, so a point may lie above the line of the memory's copy rate.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kernels.layout import MAX_ROWS
from model import weights
from model.config import GPT2Config
from model.gpt2 import GPT2, Query
from model.kv_cache import PagedKVCache
from profiling.calls import make_calls
from profiling.shapes import Operation, Shape, tree_rows
from profiling.timing import measure

ROWS = (1, 2, 4, 8, 16, 32, 64)


class Pass(NamedTuple):
    """A model, the text in its cache, and the rows of a tree whose root is the text's last token."""

    shape: Shape
    model: GPT2
    cache: PagedKVCache
    query: Query
    text_length: int


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device, ops: ModuleType) -> GPT2:
    """A model of ``shape`` with random weights."""
    sizes = {"n_layer": shape.layers, "n_embd": shape.width, "n_head": shape.heads}
    sizes |= {"vocab_size": shape.vocab, "n_positions": shape.positions}
    config = GPT2Config.from_hf({"model_type": "gpt2", **sizes})
    expected = weights.expected_shapes(config).items()
    state = {name: torch.empty(size, dtype=dtype, device=device).normal_(std=0.02) for name, size in expected}
    return GPT2(config, weights.from_state_dict(config, state, dtype, device), ops)


def pass_of(model: GPT2, name: str, num_rows: int, text_length: int) -> Pass:
    """A pass of ``num_rows`` rows over a tree below ``text_length`` committed tokens, which have random K/V."""
    config = model.config
    shape = Shape(name, config.n_layer, config.n_embd, config.n_head, config.vocab_size, config.n_positions)
    rows = tree_rows(shape, num_rows, text_length)
    cache = model.new_cache(shape.positions + MAX_ROWS)
    cache.append(text_length)
    for kept in (cache.k, cache.v):
        kept[:, 1:].normal_(std=0.02)  # all but the null page
    put = {name: torch.tensor(rows[name], dtype=torch.int32, device=model.device) for name in Query._fields}
    return Pass(shape, model, cache, Query(**put), text_length)


def first_rows(whole: Pass, num_rows: int) -> Pass:
    """The pass over the first ``num_rows`` nodes; copies, since kernels ask for aligned rows."""
    few = {name: value[:num_rows].clone() for name, value in whole.query._asdict().items() if name != "node_slots"}
    return whole._replace(query=whole.query._replace(**few))


def forward(whole: Pass) -> Callable[[], torch.Tensor]:
    """The pass, ready to be timed: returns the logits [N, V]."""
    model, query, cache, device = whole.model, whole.query, whole.cache, whole.model.device
    committed = torch.tensor([whole.text_length], dtype=torch.int32, device=device)  # a graph cannot send it
    num_rows, picked = len(query.tokens), torch.arange(len(query.tokens), dtype=torch.int32, device=device)
    maxima = model.ops.new_tile_maxima(num_rows, whole.shape.vocab, device)
    moments = model.ops.new_moments(num_rows, whole.shape.width, device)

    def run() -> torch.Tensor:
        hidden = model.forward(query, cache, committed=committed, moments=moments)
        return model.logits(hidden, maxima, picked, moments)

    return run


def same_root(whole: Pass) -> bool:
    """Whether the root's logits have the same bits in the whole pass and alone, and are finite."""
    together, alone = forward(whole)()[:1], forward(first_rows(whole, 1))()
    return torch.equal(together, alone) and bool(torch.isfinite(alone).all())


def num_launches(whole: Pass) -> int:
    """Kernel launches of the pass on the Triton backend, counted by recording it."""
    from kernels.gpu.launch import record

    run = forward(whole)
    with record("sm_90") as launches:
        run()
    return len(launches)


def least(whole: Pass) -> list[Operation]:
    """The operations of the pass, with the least bytes and operations of each."""
    found, _ = make_calls(whole.shape, len(whole.query.tokens), whole.model.dtype, "meta", whole.text_length)
    return list(found.values())


@torch.no_grad()
def points(model: GPT2, name: str, all_rows: tuple[int, ...] = ROWS, samples: int = 20) -> list[dict[str, Any]]:
    """One row per number of rows: seconds, least bytes, operations. The same root in every pass is checked first."""
    whole = pass_of(model, name, max(all_rows), min(256, model.config.n_positions // 2))
    if not same_root(whole):
        raise ValueError(f"{name}: the root's logits differ between passes of 1 and {max(all_rows)} rows")
    found = []
    for num_rows in all_rows:
        few = first_rows(whole, num_rows)
        timing = measure([forward(few)], model.device, samples, launches=1)
        parts = least(few)
        counted = {of: sum(getattr(part, of) * part.repeats for part in parts) for of in ("bytes", "flops")}
        found.append({"model": name, "rows": num_rows, "seconds": timing.median, **counted})
    return found
