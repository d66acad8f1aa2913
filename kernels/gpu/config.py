"""Tiles of every kernel: fixed per architecture, weight shape and dtype, never a function of the number of rows.

A shape that the table ``tuned.json`` knows takes its row; any other takes the default rule below. Neither looks at N,
so one pass of 64 rows and 64 passes of one row run the same binary with the same tiles: hazard 1 of bit-exactness.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kernels.layout import TreeShape

TABLE = Path(__file__).with_name("tuned.json")
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
MAX_SPLITS = 8  # each costs its sum once more
PREFILL_ROWS = 1024  # rows of one pass of a long prompt, a multiple of MAX_ROWS
# On an H200 the fastest of seven with the bundled chain of then at the paper's sizes, a draft of four layers, three
# prompts, greedy and sampled, by 4 % over the next: a second pass of the draft cost more than it brought
# (profiling/results/h200/shapes-dfab1a0.txt).
TREE_SHAPE = TreeShape(lookup_rounds=4, lookup_width=6, draft_rounds=1, draft_children=4, min_prob=0.0)


@dataclass(frozen=True)
class LinearTiles:
    """One program computes [rows, outputs] over a ``splits``-th of the depth, ``depth`` at a time."""

    rows: int
    outputs: int
    depth: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    all_registers: bool = False  # rather than a few spilled to fit one more program
    swapped: bool = False  # weights are the left operand: [outputs, depth] @ [depth, rows]

    def __str__(self) -> str:
        cut = f"{self.rows}x{self.outputs}x{self.depth} /{self.splits} w{self.num_warps} s{self.num_stages}"
        return f"{cut} swapped" if self.swapped else cut


@dataclass(frozen=True)
class AttentionTiles:
    """A row block of ``rows`` queries reads ``window`` positions at a time, window w in program w modulo ``parts``;
    tails have one program per ``tail_rows`` rows, ``tail_step`` lanes at a time."""

    rows: int = 16
    window: int = 128
    parts: int = 4
    tail_rows: int = 1
    tail_step: int = 64  # all of a tail at once
    num_warps: int = 4
    num_stages: int = 2
    all_registers: bool = False


def linear_tiles(arch: str, num_outputs: int, depth: int, dtype: torch.dtype, quantized: bool = False) -> LinearTiles:
    """Tiles of a decoding pass through a weight [num_outputs, depth], of ``dtype`` or ``quantized``: never tuned."""
    row = None if quantized else _table().get(arch, {}).get(key(num_outputs, depth, dtype))
    return LinearTiles(**row["tiles"]) if row else default_linear_tiles(arch, num_outputs, depth, dtype, quantized)


def key(num_outputs: int, depth: int, dtype: torch.dtype) -> str:
    """Name of a weight's row in the table."""
    return f"{num_outputs}x{depth} {str(dtype).removeprefix('torch.')}"


@functools.cache
def default_linear_tiles(
    arch: str, num_outputs: int, depth: int, dtype: torch.dtype, quantized: bool = False
) -> LinearTiles:
    """The rule for shapes that were never tuned: one or two programs per multiprocessor, a deep pipeline in each."""
    if arch == "interpreter":  # large tiles, since a step costs milliseconds; three splits show the order of their sum
        step = 64 if depth < 512 else 256
        steps = -(-depth // step)
        return LinearTiles(16, 64, step, next(n for n in (3, 2, 1) if -(-steps // n) * (n - 1) < steps))

    def cut(tile: int, step: int, per_multiprocessor: int = 1, least: int = 3) -> int:
        # one step more for 8 bits, whose 16-bit form takes registers beside it
        programs = per_multiprocessor * MULTIPROCESSORS.get(arch, 128)
        return _splits(-(-num_outputs // tile), -(-depth // step), programs, least + quantized)

    if dtype == torch.float32 and quantized:
        return _quantized_float32_tiles(arch, cut(64, 64))
    if dtype == torch.float32:  # products on the vector units: 16 rows, or dead rows would cost more than the weights
        return LinearTiles(16, 32, 32, cut(32, 32), 4 if arch.startswith("gfx") else 8, 3)
    if arch.startswith("gfx"):
        return LinearTiles(64, 64, 64, cut(64, 64), 4, 2)
    # 16 rows, since what is done to x costs by the row. On an H200 within a fifth of the best, where it was tried
    # (profiling/results/h200/tiles.jsonl); other GPUs are assumed to be alike. Within 99 KiB of shared memory.
    swapped = arch == "sm_90" and not quantized
    return LinearTiles(16, 64, 64, cut(64, 64, per_multiprocessor=2, least=4), 4, 5, swapped=swapped)


def _splits(num_tiles: int, num_steps: int, num_programs: int, least: int) -> int:
    """Finest cut of the depth into at most ``num_programs`` programs that gives each ``least`` steps and none no work.

    A loop of two steps is unrolled whole, and with a layer norm in it runs out of registers.
    """
    fitting = [
        n
        for n in range(2, MAX_SPLITS + 1)
        if num_tiles * n <= num_programs and -(-num_steps // n) >= least and -(-num_steps // n) * (n - 1) < num_steps
    ]
    return max(fitting, default=1)


def _quantized_float32_tiles(arch: str, splits: int) -> LinearTiles:
    """4 KiB of weights a step: 16 bytes for each of 256 threads."""
    return LinearTiles(16, 64, 64, splits, 4 if arch.startswith("gfx") else 8, 3)


def prefill_tiles(arch: str, dtype: torch.dtype, quantized: bool = False) -> LinearTiles:
    """Tiles of a pass with more than MAX_ROWS rows, which is bound by arithmetic."""
    if arch == "interpreter":
        return LinearTiles(64, 128, 128)
    if dtype == torch.float32:
        return _quantized_float32_tiles(arch, 1) if quantized else LinearTiles(32, 64, 32, 1, 8, 3, all_registers=True)
    if arch.startswith("gfx"):  # 8 waves would load less than 16 bytes a thread of 64 outputs
        return LinearTiles(128, 128, 32, 1, 4, 2)
    return LinearTiles(128, 128, 32 if quantized else 64, 1, 8, 3, all_registers=True)


def attention_tiles(arch: str, head_dim: int, dtype: torch.dtype) -> AttentionTiles:
    """Tiles of tree attention, sized so that a window of keys and values and its scores stay in registers."""
    if arch == "interpreter":
        return AttentionTiles(parts=2, tail_rows=16, tail_step=16)
    scarce = (head_dim // 64) * (8 if dtype == torch.float32 else 1)
    return AttentionTiles(window=max(16, 128 // scarce), tail_step=64 * 64 // head_dim, all_registers=scarce > 1)


def prefill_attention_tiles(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries of one program of prefill attention, and the positions that it reads at a time."""
    return (16, 16) if dtype == torch.float32 else (64, 64 * 64 // head_dim)


@functools.cache
def _table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def write_table(table: dict) -> None:
    """Replace the table; rows are ``{"tiles": {...}, ...provenance}`` by architecture and ``key``."""
    unfinished = TABLE.with_suffix(".tmp")
    unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(TABLE)
    _table.cache_clear()


def row(tiles: LinearTiles, **provenance) -> dict:
    """One row of the table."""
    return {"tiles": asdict(tiles), **provenance}
