"""Torch twins of what precedes the layers: embedding, and where the rows of a pass find keys and values.

Slots are worked out on the host, once per pass. Dimension letters are explained in ``model/config.py``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels.layout import ROW_BLOCK, SHARED_WINDOW, TAIL_LANES, TAIL_WINDOW, TreeShape, shared_end
from kernels.reference.compiled import compiled
from kernels.reference.moments import write_moments

PREFILL_ROWS = 128  # rows of one pass of a long prompt: bounds the memory it takes
TREE_SHAPE = TreeShape(lookup_rounds=4, lookup_width=4, draft_rounds=1, draft_children=6, min_prob=0.2)  # of one CPU


def embed(
    tokens: torch.Tensor,  # int32 [N]
    positions: torch.Tensor,  # int32 [N]
    wte: torch.Tensor,  # [V, C]
    wpe: torch.Tensor,  # [P, C]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """Sum of token and position embeddings -> [N, C]."""
    x = wte.index_select(0, tokens) + wpe.index_select(0, positions)
    if moments is not None:
        write_moments(x, moments)
    return x


@dataclass(frozen=True, eq=False)
class Block:
    """What a few consecutive rows read, as numpy arrays. Their keys stand in C columns: first what their tails hold,
    each slot once, in the order of positions; then, from TAIL_WINDOW on, windows of SHARED_WINDOW consecutive positions
    of each sequence, the last one as long as it is read. A row's lanes are the TAIL_LANES of its own tail, then its
    sequence's windows."""

    rows: slice
    slots: np.ndarray  # int64 [C], of the columns
    columns: np.ndarray  # int64 [N, TAIL_LANES], where each lane of a tail stands
    live: np.ndarray  # bool [N, TAIL_LANES], whether it holds a key
    firsts: np.ndarray  # int64 [N], where the row's windows begin, counted from TAIL_WINDOW on
    ends: np.ndarray  # int64 [N], how many positions of them the row sees
    device: torch.device  # of the pass

    def on_device(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On ``device``: ``slots``, every window whole, ``columns`` and the bias of all lanes, the columns of windows
        standing for theirs, float32 [N, TAIL_LANES + windows], 0 or, for a dead lane, -inf."""
        slots = np.pad(self.slots, (0, -(len(self.slots) - TAIL_WINDOW) % SHARED_WINDOW))
        lanes = np.arange(len(slots) - TAIL_WINDOW) - self.firsts[:, None]
        alive = np.concatenate([self.live, (lanes >= 0) & (lanes < self.ends[:, None])], 1)
        bias = np.where(alive, np.float32(0), np.float32(-np.inf))
        return tuple(torch.from_numpy(array).to(self.device) for array in (slots, self.columns, bias))


class Route(NamedTuple):
    """Where the rows of one pass write and read; the same for every layer."""

    slot_mapping: np.ndarray  # int32 [N], where each row's K/V goes, -1 = nowhere
    blocks: list[Block]
    one_shape: bool
    writes: tuple[torch.Tensor, torch.Tensor] | None  # rows that have a slot, and it, int64 on a GPU; None on a CPU
    parts: list  # how ``tree_attention`` goes about each block, which it finds out in the first layer


def route(
    page_table: torch.Tensor,  # int32 [B, pages per sequence], NULL_PAGE beyond the last page
    page_size: int,
    committed: torch.Tensor,  # int32 [B], positions resolved by the page table, the root's included
    sequences: torch.Tensor,  # int32 [N], the sequence each row belongs to
    positions: torch.Tensor,  # int32 [N]
    paths: torch.Tensor,  # int32 [N, depth + 1], node ids, root first; [N, 1] where all rows are committed
    node_slots: torch.Tensor,  # int32 [nodes], where each node's K/V lies
    slot_mapping: torch.Tensor,  # int32 [N], where each row's K/V goes, -1 = nowhere
) -> Route:
    """Resolve positions and paths to slots, once per pass, for ``layer_norm_qkv`` and ``tree_attention``."""
    device, padded = positions.device, one_shape(positions.device)
    arguments = (page_table, committed, sequences, positions, paths, node_slots, slot_mapping)
    page_table, committed, sequences, positions, paths, node_slots, slot_mapping = _on_host(*arguments)
    ends = shared_end(positions)
    tails = _path_slots(page_table, page_size, committed, sequences, positions, ends, paths, node_slots)
    blocks, start = [], 0
    while start < len(positions):
        count, fits = min(ROW_BLOCK, len(positions) - start), False
        while not fits:  # one row always does
            rows = slice(start, start + count)
            *arrays, fits = _columns(tails[rows], ends[rows], sequences[rows], page_table, page_size)
            count = count if fits else -(-count // 2)
        if padded:  # rows of padding see the null page, so that none is NaN
            padding = ((0, ROW_BLOCK - count), (0, 0))
            arrays[1:] = [np.pad(array, padding[: array.ndim]) for array in arrays[1:]]
            arrays[1][count:], arrays[2][count:] = TAIL_WINDOW - 1, True
        blocks.append(Block(rows, *arrays, device))
        start += count
    writes = None
    if padded:
        rows = np.flatnonzero(slot_mapping >= 0)
        writes = tuple(torch.from_numpy(some.astype(np.int64)).to(device) for some in (rows, slot_mapping[rows]))
    return Route(slot_mapping, blocks, padded, writes, [])


def path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots) -> torch.Tensor:
    """Slot of each tail lane: int32 [N, TAIL_LANES]; dead lanes point into the null page. Arguments as ``route``.

    Lane j of a row at position p stands for position shared_end(p) + j. Committed positions are found through the page
    table, later ones through the row's path: position ``committed - 1 + d`` is its ancestor at depth d.
    """
    device, arguments = positions.device, (page_table, committed, sequences, positions, paths, node_slots)
    page_table, committed, sequences, positions, paths, node_slots = _on_host(*arguments)
    ends = shared_end(positions)
    slots = _path_slots(page_table, page_size, committed, sequences, positions, ends, paths, node_slots)
    return torch.from_numpy(slots).to(device)


@compiled
def _path_slots(page_table, page_size, committed, sequences, positions, ends, paths, node_slots):
    slots = np.zeros((len(positions), TAIL_LANES), np.int32)  # the null page
    for row in range(len(positions)):
        sequence = sequences[row]
        num_committed = committed[sequence]
        for position in range(ends[row], positions[row] + 1):
            if position < num_committed:
                slot = page_table[sequence, position // page_size] * page_size + position % page_size
            else:
                depth = position - num_committed + 1
                node = paths[row, depth] if depth < paths.shape[1] else -1
                slot = node_slots[node] if node >= 0 else 0
            slots[row, position - ends[row]] = max(slot, 0)
    return slots


@compiled
def _columns(tails, ends, sequences, page_table, page_size):
    """The arrays of a ``Block`` from ``slots`` on; whether the tails hold fewer than TAIL_WINDOW slots together.

    A row's first lane is position ``ends[row]``. The last column of the tails is the null page's; columns of windows
    that no row sees read it, too.
    """
    num_rows, num_lanes = tails.shape
    num_sequences = len(page_table)
    seen = np.zeros(num_sequences, np.int64)  # positions of each sequence in windows
    for row in range(num_rows):
        seen[sequences[row]] = max(seen[sequences[row]], ends[row])
    widths = -(-seen // SHARED_WINDOW) * SHARED_WINDOW
    widths[-1] = seen[-1]
    slots = np.zeros(TAIL_WINDOW + widths.sum(), np.int64)
    columns, live = np.empty(tails.shape, np.int64), np.empty(tails.shape, np.bool_)
    firsts, counts = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    place = np.full(tails.max() + 1, -1, np.int64)
    place[0] = TAIL_WINDOW - 1
    count = 0
    for position in range(ends.min(), ends.max() + num_lanes):
        for row in range(num_rows):
            lane = position - ends[row]
            if 0 <= lane < num_lanes:
                slot = tails[row, lane]
                if place[slot] < 0:
                    if count == TAIL_WINDOW - 1:
                        return slots, columns, live, firsts, counts, False
                    place[slot], slots[count] = count, slot
                    count += 1
                columns[row, lane], live[row, lane] = place[slot], slot >= page_size
    first = 0
    for sequence in range(num_sequences):
        for row in range(num_rows):
            if sequences[row] == sequence:
                firsts[row], counts[row] = first, ends[row]
        for position in range(seen[sequence]):  # of a padding row, any
            page = page_table[sequence, min(position // page_size, page_table.shape[1] - 1)]
            slots[TAIL_WINDOW + first + position] = page * page_size + position % page_size
        first += widths[sequence]
    return slots, columns, live, firsts, counts, True


def one_shape(device: torch.device) -> bool:
    """Whether every block is padded to ROW_BLOCK rows, and all is done by torch: on a GPU, where nobody finds out which
    shapes agree."""
    return device.type != "cpu"


def _on_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.numpy(force=True) for tensor in tensors]
