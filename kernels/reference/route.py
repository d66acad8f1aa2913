"""Torch twins of what precedes the layers: embedding, and where the rows of a pass find keys and values.

Slots are worked out in numpy on the host, once per pass. Dimension letters are explained in ``model/config.py``.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.layout import NULL_PAGE, ROW_BLOCK, ROW_MULTIPLE, SHARED_WINDOW, TAIL_LANES, TAIL_WINDOW, shared_end
from kernels.reference.moments import with_moments

PREFILL_ROWS = 128  # rows of one pass of a long prompt: bounds the memory it takes
DRAFT_ROUNDS = 1  # passes of a draft that pay before one of the oracle, as measured on a CPU
DRAFT_MIN_PROB = 0.2  # of a node that is worth a row of a draft's pass, as tried by hand on one CPU


def embed(
    tokens: torch.Tensor,  # int32 [N]
    positions: torch.Tensor,  # int32 [N]
    wte: torch.Tensor,  # [V, C]
    wpe: torch.Tensor,  # [P, C]
    moments: torch.Tensor | None = None,  # float32 [N, 2, P], of the result, written
) -> torch.Tensor:
    """Sum of token and position embeddings -> [N, C]."""
    return with_moments(wte.index_select(0, tokens) + wpe.index_select(0, positions), moments)


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, C] with the rows that every product of a pass wants below, so that none pads it again."""
    return F.pad(x, (0, 0, 0, -len(x) % ROW_MULTIPLE))


@dataclass
class Block:
    """What a few rows read. Their keys stand in C columns: first what their tails hold, each slot once, in the order of
    positions; then, from TAIL_WINDOW on, W windows of SHARED_WINDOW consecutive positions. A row's lanes are those of
    its own tail, then those of the windows."""

    rows: slice  # ROW_BLOCK of them at most
    slots: torch.Tensor  # int64 [C], of the columns
    columns: torch.Tensor  # int64 [N, TAIL_LANES + W * SHARED_WINDOW], where each lane stands; on a GPU ROW_BLOCK rows
    bias: torch.Tensor  # float32 [N, TAIL_LANES + W * SHARED_WINDOW], 0 or, for a dead lane, -inf
    _by_heads: dict[int, torch.Tensor] = field(default_factory=dict)

    def head_rows(self, heads: int) -> torch.Tensor:
        """The columns' rows in a cache seen as [slots * H, D]: int64 [H * C]. The same for every layer, so worked out
        once."""
        if heads not in self._by_heads:
            head = torch.arange(heads, device=self.slots.device)[:, None]
            self._by_heads[heads] = (self.slots * heads + head).flatten()
        return self._by_heads[heads]


class Route(NamedTuple):
    """Where the rows of one pass write and read; the same for every layer."""

    write_rows: torch.Tensor | None  # int64 [n], None = all rows
    write_slots: torch.Tensor  # int64 [n]
    blocks: list[Block]


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
    device = positions.device

    def put(array: np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

    arguments = (page_table, committed, sequences, positions, paths, node_slots, slot_mapping)
    page_table, committed, sequences, positions, paths, node_slots, slot_mapping = map(_on_host, arguments)
    tails = _path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots)
    ends, blocks, start = shared_end(positions), [], 0
    while start < len(positions):
        count, tail_slots, columns = _fitting(tails[start : start + ROW_BLOCK], ends[start : start + ROW_BLOCK])
        rows = slice(start, start + count)
        slots, alive = _windows(page_table, page_size, sequences[rows], ends[rows])
        alive = np.concatenate([tails[rows] >= page_size, alive], 1)
        shared = np.broadcast_to(np.arange(TAIL_WINDOW, TAIL_WINDOW + len(slots)), (count, len(slots)))
        columns = np.concatenate([columns, shared], 1)
        if one_shape(device):  # rows of padding are all alive, so that none is NaN
            missing = [(0, ROW_BLOCK - count), (0, 0)]
            columns, alive = np.pad(columns, missing), np.pad(alive, missing, constant_values=True)
        bias = np.where(alive, np.float32(0), np.float32(-np.inf))
        start += count
        if start == len(positions):
            rows = slice(rows.start, rows.start + ROW_BLOCK)  # with what the pass is padded with
        blocks.append(
            Block(
                rows, put(np.concatenate([tail_slots, slots]), np.int64), put(columns, np.int64), put(bias, np.float32)
            )
        )
    write_rows = np.flatnonzero(slot_mapping >= 0)
    every = None if len(write_rows) == len(slot_mapping) else put(write_rows, np.int64)
    return Route(every, put(slot_mapping[write_rows], np.int64), blocks)


def path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots) -> torch.Tensor:
    """Slot of each tail lane: int32 [N, TAIL_LANES]; dead lanes point into the null page. Arguments as ``route``.

    Lane j of a row at position p stands for position shared_end(p) + j. Committed positions are found through the page
    table, later ones through the row's path: position ``committed - 1 + d`` is its ancestor at depth d.
    """
    later = map(_on_host, (committed, sequences, positions, paths, node_slots))
    slots = _path_slots(_on_host(page_table), page_size, *later)
    return torch.from_numpy(slots.astype(np.int32)).to(positions.device)


def _path_slots(page_table, page_size, committed, sequences, positions, paths, node_slots) -> np.ndarray:
    lanes = shared_end(positions)[:, None] + np.arange(TAIL_LANES, dtype=np.int32)  # [N, TAIL_LANES]
    num_committed = committed[sequences][:, None]
    in_table = np.minimum(lanes, num_committed - 1)
    table = page_table[sequences[:, None], in_table // page_size] * page_size + in_table % page_size
    depth = (lanes - num_committed + 1).clip(0, paths.shape[1] - 1)
    nodes = np.take_along_axis(paths, depth, 1).clip(0)
    slots = np.where(lanes < num_committed, table, node_slots[nodes])
    return np.where((lanes <= positions[:, None]) & (slots >= 0), slots, NULL_PAGE)


def _windows(page_table, page_size, sequences, ends) -> tuple[np.ndarray, np.ndarray]:
    """Slots [W * SHARED_WINDOW] of the windows that a block's rows share, and which lanes are alive for each row:
    [N, W * SHARED_WINDOW]. Lanes dead for all rows read the null page."""
    slots, alive = [], []
    for sequence in range(len(page_table)):
        mine = ends * (sequences == sequence)
        end = mine.max()
        lanes = np.arange(-(-end // SHARED_WINDOW) * SHARED_WINDOW, dtype=np.int32)
        pages = (lanes // page_size).clip(0, page_table.shape[1] - 1)
        found = page_table[sequence, pages] * page_size + lanes % page_size
        slots.append(np.where(lanes < end, found, NULL_PAGE))
        alive.append(lanes < mine[:, None])
    return np.concatenate(slots), np.concatenate(alive, 1)


def _fitting(tails: np.ndarray, ends: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How many of the first rows have tails [N, TAIL_LANES] that hold fewer than TAIL_WINDOW slots together; these in
    the order of positions, then the null page: [TAIL_WINDOW]; and where each lane's stands: [rows, TAIL_LANES].

    Row i's first lane is position ``ends[i]``. A single row always fits.
    """
    place = np.full(tails.max() + 1, -1)
    place[tails] = ends[:, None] + np.arange(TAIL_LANES)
    place[NULL_PAGE] = -1
    held = np.flatnonzero(place >= 0)
    if len(held) >= TAIL_WINDOW:
        half = -(-len(tails) // 2)
        return _fitting(tails[:half], ends[:half])
    slots = np.full(TAIL_WINDOW, NULL_PAGE)
    slots[: len(held)] = held[np.argsort(place[held], kind="stable")]
    place[slots] = np.arange(TAIL_WINDOW)
    return len(tails), slots, place[tails]


def one_shape(device: torch.device) -> bool:
    """Whether every block is padded to ROW_BLOCK rows: on a GPU, where nobody finds out which shapes agree."""
    return device.type != "cpu"


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
