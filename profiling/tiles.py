"""Which tile configurations of a linear layer are worth compiling: those that fit, likely ones first."""

from itertools import product, zip_longest

import torch

from kernels.gpu.config import LinearTiles
from kernels.layout import MOMENT_PART, VOCAB_TILE
from profiling.cost import MACHINES, Machine

KIB = 1024
ROWS, OUTPUTS, WARPS, STAGES = (16, 32, 64), (16, 32, 64, 128), (4, 8), (2, 3, 4, 5, 6, 8)
LEFT_OPERAND = 64  # least rows of it that a warp group multiplies
MAX_SPLITS = 16
MAX_WASTE = 1.1  # depth that is computed, relative to the depth there is


def machine(arch: str) -> Machine:
    """What a configuration must fit; an unknown GPU is taken to be narrow."""
    return MACHINES.get(arch, MACHINES["sm_89"])


def shared_bytes(tiles: LinearTiles, dtype: torch.dtype) -> int:
    """Shared memory of the software pipeline: weight and activation tiles of every stage but the one in registers."""
    return max(1, tiles.num_stages - 1) * (tiles.rows + tiles.outputs) * tiles.depth * dtype.itemsize


def candidates(
    arch: str, num_outputs: int, depth: int, dtype: torch.dtype, name: str, limit: int = 40
) -> list[LinearTiles]:
    """At most ``limit`` configurations for a weight [num_outputs, depth] of the operation ``name``, likely ones first.

    The output head keeps maxima of tiles of VOCAB_TILE, a tile of the joint projection must lie in the queries, the
    keys or the values, and one that leaves moments holds whole parts. An equal share is kept of each row tile, with the
    weights as right and, where a GPU multiplies by warp groups, as left operand: no guess says which of them wins.
    """
    outputs_allowed = [VOCAB_TILE] if name == "lm_head" else list(OUTPUTS)
    if name in ("attn_proj", "mlp_proj"):
        outputs_allowed = [outputs for outputs in OUTPUTS if outputs % MOMENT_PART == 0]
    if name == "layer_norm_qkv":
        outputs_allowed = [outputs for outputs in OUTPUTS if num_outputs // 3 % outputs == 0]
    depths = (32, 64) if dtype == torch.float32 else (64, 128, 256)
    groups = [(rows, False) for rows in ROWS]
    if arch == "sm_90" and dtype != torch.float32:
        groups += [(rows, True) for rows in ROWS[:2]]
    kept: list[list[LinearTiles]] = []
    for rows, swapped in groups:
        fitting = []
        for outputs, step, warps, stages in product(outputs_allowed, depths, WARPS, STAGES):
            for splits in _splits(depth, step):
                tiles = LinearTiles(rows, outputs, step, splits, warps, stages, swapped=swapped)
                if fits(tiles, arch, num_outputs, depth, dtype):
                    fitting.append((-_promise(tiles, arch, num_outputs, depth, dtype), len(fitting), tiles))
        kept.append([tiles for *_, tiles in sorted(fitting)[: -(-limit // len(groups))]])
    in_turn = [tiles for group in zip_longest(*kept) for tiles in group if tiles is not None]
    return in_turn[:limit]


def _splits(depth: int, step: int) -> list[int]:
    """Cuts of the steps, even ones or few, that leave each at least two steps and none without work."""
    steps = -(-depth // step)
    return [
        n
        for n in range(1, MAX_SPLITS + 1)
        if (steps % n == 0 or n <= 4) and -(-steps // n) * (n - 1) < steps and (n == 1 or steps >= 2 * n)
    ]


def fits(tiles: LinearTiles, arch: str, num_outputs: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether a configuration can run and is not plainly bad: idle multiprocessors, or warps without a product."""
    limits, steps = machine(arch), -(-depth // tiles.depth)
    programs = -(-num_outputs // tiles.outputs) * tiles.splits
    return (
        shared_bytes(tiles, dtype) <= limits.program_shared
        and steps * tiles.depth <= MAX_WASTE * depth
        and tiles.num_stages <= max(2, -(-steps // tiles.splits) + 1)
        and (not tiles.swapped or tiles.outputs >= LEFT_OPERAND * tiles.num_warps // 4)
        and (tiles.swapped or (tiles.rows // 16) * (tiles.outputs // 8) >= tiles.num_warps)
        and programs >= limits.multiprocessors // 6
        and (tiles.splits == 1 or programs <= 6 * limits.multiprocessors)
    )


def _promise(tiles: LinearTiles, arch: str, num_outputs: int, depth: int, dtype: torch.dtype) -> float:
    """A guess at how well the memory is kept busy: bytes in flight, even waves, little else read or written."""
    limits, size = machine(arch), dtype.itemsize
    programs = -(-num_outputs // tiles.outputs) * tiles.splits
    resident = max(1, min(limits.program_shared // shared_bytes(tiles, dtype), 64 // tiles.num_warps // 2))
    waves = programs / (resident * limits.multiprocessors)
    in_flight = min(resident, programs / limits.multiprocessors) * (tiles.num_stages - 1) * tiles.outputs * tiles.depth
    filled = min(1.0, in_flight * size / (48 * KIB))
    even = waves / -(-waves // 1) if waves > 1 else min(1.0, programs / limits.multiprocessors)
    weights = num_outputs * depth * size
    partial = 8 * tiles.rows * num_outputs * tiles.splits if tiles.splits > 1 else 0
    activations = 0.25 * programs * 64 * depth * size / tiles.splits  # from the L2 cache, which is faster
    return filled * even * weights / (weights + partial + activations)
