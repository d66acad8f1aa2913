"""GPT-2's shapes, and every operation of one of its passes with the bytes and flops it cannot do without.

Timing (``profiling.kernels``) runs the operations on a GPU; ahead-of-time compilation (``profiling.aot``) calls them on
tensors of the device "meta" inside ``kernels.gpu.launch.record`` and compiles what they would have launched.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kernels.layout import DEPTH_LIMIT, MAX_ROWS, MOMENT_PART, TAIL_LANES, VOCAB_TILE
from kernels.reference.moments import write_moments
from model.quantization import quantize_matrix

MAX_DEPTH = 12  # of the trees made here
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """A GPT-2 checkpoint's shape; ``name`` is Hugging Face's."""

    name: str
    layers: int
    width: int  # C = heads * head_dim
    heads: int
    vocab: int = 50257
    positions: int = 1024

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def with_head_dim(self, head_dim: int) -> "Shape":
        """The same widths cut into other heads. Raises ValueError where they cannot be (GPT-2 XL into heads of 128)."""
        if self.width % head_dim:
            raise ValueError(f"width must be a multiple of head_dim, got {self.width} and {head_dim}")
        return replace(self, heads=self.width // head_dim)


SHAPES = {
    "small": Shape("gpt2", 12, 768, 12),
    "medium": Shape("gpt2-medium", 24, 1024, 16),
    "large": Shape("gpt2-large", 36, 1280, 20),
    "xl": Shape("gpt2-xl", 48, 1600, 25),
}
BUNDLED = {
    "oracle": Shape("bundled oracle", 7, 384, 6, vocab=8192),
    "draft": Shape("bundled draft", 2, 128, 2, vocab=8192),
}
# Of ``profiling.grown``: a vocabulary that is the bundled one.
GROWN = (Shape("grown-oracle", 36, 1280, 20, vocab=8192), Shape("grown-draft", 2, 1152, 18, vocab=8192))


class Operation(NamedTuple):
    """One operation of a pass. Bytes and flops are the least that any implementation moves and computes."""

    name: str
    call: Callable[[], Any]  # on tensors made beforehand; the result is allocated by the operation
    repeats: int  # how often a pass runs it
    weight_bytes: int  # parameters read: matrix, bias, norm
    bytes: int  # parameters, activations read and written, keys and values, each once
    flops: int  # of products, two per multiply-add


def operations(
    shape: Shape,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: ModuleType,
    text_length: int = 512,
    tile_maxima: bool = False,
    quantized: bool = False,
) -> list[Operation]:
    """The operations of one layer, and what surrounds the layers, on random weights, in the order of a pass.

    Up to MAX_ROWS rows are a random tree (depth <= MAX_DEPTH, the same for the same ``num_rows``) whose root is the
    last of ``text_length`` committed tokens; more rows are the prefill of a prompt, from position 0. ``ops`` is
    ``kernels.gpu`` or ``kernels.reference``; ``tile_maxima`` asks the output head for them too; ``quantized`` keeps
    matrices in 8 bits. On the device "meta" call this inside ``record``: it routes the rows once. Raises ValueError
    for more positions than the shape has.
    """
    c, vocab, size = shape.width, shape.vocab, dtype.itemsize
    rows = _prefill_rows(shape, num_rows) if num_rows > MAX_ROWS else tree_rows(shape, num_rows, text_length)
    where = {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in rows.items()}
    page_table = torch.zeros(1, shape.positions, dtype=torch.int32, device=device)
    length = max(rows["committed"])
    page_table[0, :length] = torch.arange(1, length + 1, dtype=torch.int32, device=device)

    def rand(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device=device).normal_(std=0.02)

    x, mixed, hidden, q = (rand(num_rows, width) for width in (c, c, 4 * c, c))
    q = q.view(num_rows, shape.heads, shape.head_dim)
    k, v = (rand(1 + shape.positions + MAX_ROWS, shape.heads, shape.head_dim) for _ in range(2))
    wte, wpe, norm = rand(vocab, c), rand(shape.positions, c), (rand(c), rand(c), EPS)
    matrices = rand(3 * c, c), rand(c, c), rand(4 * c, c), rand(c, 4 * c), wte
    attn_w, proj_w, fc_w, mlp_w, head_w = map(quantize_matrix, matrices) if quantized else matrices
    attn_b, proj_b, fc_b = rand(3 * c), rand(c), rand(4 * c)
    moments = torch.empty(num_rows, 2, c // MOMENT_PART, dtype=torch.float32, device=device)
    left = torch.empty_like(moments)
    write_moments(x, moments)  # as if the layer before had left them behind
    picked = torch.arange(num_rows, dtype=torch.int32, device=device)
    tiles = -(-vocab // VOCAB_TILE)
    maxima = torch.empty(num_rows, tiles, dtype=torch.float32, device=device) if tile_maxima else None

    def resolve():
        order = ("committed", "sequences", "positions", "paths", "node_slots", "slot_mapping")
        return ops.route(page_table, 1, *(where[name] for name in order))

    def linear(name: str, call: Callable, m: int, depth: int, repeats: int, normed: bool, values: int) -> Operation:
        matrix = m * depth + 4 * m if quantized else m * depth * size
        parameters = matrix + size * ((m if name != "lm_head" else 0) + (2 * depth if normed else 0))
        return Operation(name, call, repeats, parameters, parameters + size * values, 2 * num_rows * m * depth)

    route, layers, n = resolve(), shape.layers, num_rows
    keys = n if n > MAX_ROWS else text_length - 1 + n
    pairs = sum(position + 1 for position in rows["positions"])
    scale = shape.head_dim**-0.5
    route_bytes = 4 * n * (2 * TAIL_LANES + len(rows["paths"][0]) + 2) if n <= MAX_ROWS else 0
    return [
        Operation("route", resolve, 1, 0, route_bytes, 0),
        Operation(
            "embed",
            lambda: ops.embed(where["tokens"], where["positions"], wte, wpe, left),
            1,
            2 * n * c * size,
            3 * n * c * size,
            0,
        ),
        linear(
            "layer_norm_qkv",
            lambda: ops.layer_norm_qkv(x, *norm, attn_w, attn_b, k, v, route, moments),
            *(3 * c, c, layers, True, n * (c + 3 * c)),
        ),
        Operation(
            "tree_attention" if n <= MAX_ROWS else "prefill_attention",
            lambda: ops.tree_attention(q, k, v, route, scale),
            layers,
            0,
            size * c * (2 * n + 2 * keys),
            4 * c * pairs,
        ),
        linear(
            "attn_proj",
            lambda: ops.linear_residual(mixed, proj_w, proj_b, x, left),
            *(c, c, layers, False, 3 * n * c),
        ),
        linear(
            "mlp_fc_gelu",
            lambda: ops.layer_norm_linear(x, *norm, fc_w, fc_b, "gelu_tanh", moments),
            *(4 * c, c, layers, True, n * (c + 4 * c)),
        ),
        linear(
            "mlp_proj",
            lambda: ops.linear_residual(hidden, mlp_w, proj_b, x, left),
            *(c, 4 * c, layers, False, n * (4 * c + 2 * c)),
        ),
        linear(
            "lm_head",
            lambda: ops.lm_head(x, *norm, head_w, maxima, picked, moments),
            *(vocab, c, 1, True, n * (c + vocab)),
        ),
    ]


def random_tree(num_nodes: int) -> list[list[int]]:
    """Path of each node from the root (node 0) to itself; node i hangs below a random earlier one."""
    draw = random.Random(num_nodes)
    paths = [[0]]
    while len(paths) < num_nodes:
        above = draw.choice([path for path in paths if len(path) <= MAX_DEPTH])
        paths.append([*above, len(paths)])
    return paths


def tree_rows(shape: Shape, num_rows: int, text_length: int) -> dict[str, list]:
    """A tree whose root is the last of ``text_length`` committed tokens; position p lies in slot p + 1."""
    paths = random_tree(num_rows)
    positions = [text_length + len(path) - 2 for path in paths]
    if text_length < 1 or max(positions) >= shape.positions:
        raise ValueError(f"text_length {text_length} and a tree to position {max(positions)} exceed {shape.positions}")
    slots = [text_length + node for node in range(num_rows)]
    padded = [path + [-1] * (DEPTH_LIMIT + 1 - len(path)) for path in paths]
    return _rows(shape, positions, slots, padded, slots, text_length)


def _prefill_rows(shape: Shape, num_rows: int) -> dict[str, list]:
    if num_rows > shape.positions:
        raise ValueError(f"num_rows must be at most {shape.positions}, got {num_rows}")
    positions = list(range(num_rows))
    return _rows(shape, positions, [position + 1 for position in positions], [[0]] * num_rows, [0], num_rows)


def _rows(shape: Shape, positions: list, slots: list, paths: list, node_slots: list, committed: int) -> dict[str, list]:
    draw = random.Random(len(positions))
    return {
        "tokens": [draw.randrange(shape.vocab) for _ in positions],
        "committed": [committed],
        "sequences": [0] * len(positions),
        "positions": positions,
        "paths": paths,
        "node_slots": node_slots,
        "slot_mapping": slots,
    }
