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
    """What up to ROW_BLOCK rows read: each row's own tail, then W windows of SHARED_WINDOW consecutive positions."""

    rows: slice  # ROW_BLOCK of them, though a pass may end before
    tail_slots: torch.Tensor  # int64 [N, TAIL_LANES], on a GPU [ROW_BLOCK, TAIL_LANES]
    common_slots: torch.Tensor  # int64 [T, TAIL_WINDOW], each slot of all tails once
    tail_columns: torch.Tensor  # int64 [N, TAIL_LANES], where each slot of a tail stands in them
    window_slots: torch.Tensor  # int64 [W, SHARED_WINDOW], in position order
    bias: torch.Tensor  # float32 [ROW_BLOCK, TAIL_LANES + W * SHARED_WINDOW], 0 or, for a dead lane, -inf
    _by_heads: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def head_rows(self, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows of tails, of what they have in common, and of windows in a cache seen as [slots * H, D]: int64
        [H * N * TAIL_LANES], [T * H * TAIL_WINDOW], [W * H * SHARED_WINDOW]. The same for every layer, so worked out
        once."""
        if heads not in self._by_heads:
            head = torch.arange(heads, device=self.bias.device)[:, None]
            tails = self.tail_slots.view(1, 1, -1)
            several = (tails, self.common_slots[:, None], self.window_slots[:, None])
            self._by_heads[heads] = tuple((slots * heads + head).flatten() for slots in several)
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
    ends, blocks = shared_end(positions), []
    for start in range(0, len(positions), ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        slots, alive = _windows(page_table, page_size, sequences[rows], ends[rows])
        tail, bias = tails[rows], _bias(tails[rows] >= page_size, alive)
        if one_shape(device):
            tail = np.concatenate([tail, np.full((ROW_BLOCK - len(tail), TAIL_LANES), NULL_PAGE)])
        indices = [put(part, np.int64) for part in (tail, *_once(tail), slots)]
        blocks.append(Block(rows, *indices, put(bias, np.float32)))
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
    """Slots [W, SHARED_WINDOW] of the windows that a block's rows share, and which lanes are alive for each row:
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
    return np.concatenate(slots).reshape(-1, SHARED_WINDOW), np.concatenate(alive, 1)


def _once(tails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows [T, TAIL_WINDOW] that hold every slot of ``tails`` [N, TAIL_LANES] once, and where each stands."""
    column = np.zeros(tails.max() + 1, dtype=np.int64)
    column[tails] = 1
    slots = np.flatnonzero(column)
    column[slots] = np.arange(len(slots))
    windows = np.full((-(-len(slots) // TAIL_WINDOW), TAIL_WINDOW), NULL_PAGE)
    windows.reshape(-1)[: len(slots)] = slots
    return windows, column[tails]


def _bias(*alive: np.ndarray) -> np.ndarray:
    """0 for a lane that is alive, -inf for a dead one; rows of padding are all alive, so that none is NaN."""
    lanes = np.concatenate(alive, 1)
    bias = np.zeros((ROW_BLOCK, lanes.shape[1]), dtype=np.float32)
    bias[: len(lanes)][~lanes] = -np.inf
    return bias


def one_shape(device: torch.device) -> bool:
    """Whether every block is padded to ROW_BLOCK rows: on a GPU, where nobody finds out which shapes agree."""
    return device.type != "cpu"


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
