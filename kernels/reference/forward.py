"""Torch twins of the forward kernels, bit-exact in the number of rows.

Row r of every result depends on row r of the inputs alone, not on how many rows there are nor on what the others hold.
By construction: every matrix product runs on exactly ROW_BLOCK rows (the last block padded with zeros), every reduction
has a fixed width and order, and element-wise functions whose vector tails differ from their vector bodies (GELU) run on
pieces without tails. Dimension letters are explained in ``model/config.py``.
"""

import torch
import torch.nn.functional as F

from kernels.layout import NULL_PAGE, ROW_BLOCK, SHARED_WINDOW, TAIL_LANES, shared_end

# Below this many elements torch runs an element-wise call on one thread, without a tail at a thread's border.
_SERIAL_ELEMENTS = 32768
_TAIL_ROWS = 4  # the tail's batched products run on a multiple of this many rows, so never on a batch of one
_DEAD = float("-inf")
_ACTIVATIONS = {
    None: None,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def embed(tokens: torch.Tensor, positions: torch.Tensor, wte: torch.Tensor, wpe: torch.Tensor) -> torch.Tensor:
    """Sum of token and position embeddings: tokens, positions int32 [N], wte [V, C], wpe [P, C] -> [N, C]."""
    return wte[tokens] + wpe[positions]


def layer_norm_linear(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: torch.Tensor,  # [M, C]
    bias: torch.Tensor | None,  # [M]
    activation: str | None = None,  # None, "gelu_tanh", "gelu"
) -> torch.Tensor:
    """activation(layer_norm(x) @ weight.T + bias) -> [N, M]."""
    y = _linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias)
    return y if activation is None else _elementwise(_ACTIVATIONS[activation], y)


def layer_norm_qkv(
    x: torch.Tensor,  # [N, C]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    eps: float,
    weight: torch.Tensor,  # [3 C, C], rows ordered query, key, value
    bias: torch.Tensor,  # [3 C]
    k_cache: torch.Tensor,  # [slots, H, D], written
    v_cache: torch.Tensor,  # [slots, H, D], written
    slot_mapping: torch.Tensor,  # int32 [N], -1 = do not write this row
) -> torch.Tensor:
    """Project layer_norm(x); scatter keys and values into their slots; return queries [N, H, D]."""
    qkv = layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias)
    q, k, v = qkv.view(x.shape[0], 3, *k_cache.shape[1:]).unbind(1)
    live = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[live]
    k_cache[slots] = k[live]
    v_cache[slots] = v[live]
    return q


def path_slots(
    page_table: torch.Tensor,  # int32 [B, pages per sequence]
    page_size: int,
    committed: torch.Tensor,  # int32 [B], positions resolved by the page table, the root's included
    sequences: torch.Tensor,  # int32 [N], the sequence each row belongs to
    positions: torch.Tensor,  # int32 [N]
    paths: torch.Tensor,  # int32 [N, DEPTH_LIMIT + 1], node ids, root first
    node_slots: torch.Tensor,  # int32 [nodes], where each node's K/V lies
) -> torch.Tensor:
    """Slot of each tail lane: int32 [N, TAIL_LANES]; dead lanes point into the null page.

    Lane j of a row at position p stands for position shared_end(p) + j. Committed positions are found through the page
    table, later ones through the row's path: position ``committed - 1 + d`` is its ancestor at depth d.
    """
    lanes = shared_end(positions)[:, None] + _arange(TAIL_LANES, positions)  # [N, TAIL_LANES]
    num_committed = committed[sequences][:, None]
    in_table = torch.minimum(lanes, num_committed - 1)
    table = page_table[sequences[:, None], in_table // page_size] * page_size + in_table % page_size
    depth = (lanes - num_committed + 1).clamp(0, paths.shape[1] - 1)
    nodes = paths.gather(1, depth.long()).clamp(min=0)
    slots = torch.where(lanes < num_committed, table, node_slots[nodes])
    return torch.where(lanes <= positions[:, None], slots, NULL_PAGE)


def tree_attention(
    q: torch.Tensor,  # [N, H, D]
    k_cache: torch.Tensor,  # [slots, H, D]
    v_cache: torch.Tensor,  # [slots, H, D]
    page_table: torch.Tensor,  # int32 [B, pages per sequence], NULL_PAGE beyond the last page
    page_size: int,
    sequences: torch.Tensor,  # int32 [N]
    positions: torch.Tensor,  # int32 [N]
    tail_slots: torch.Tensor,  # int32 [N, TAIL_LANES], see path_slots
    scale: float,
) -> torch.Tensor:
    """Each row attends to its own path: softmax(q k / sqrt(D)) v -> [N, H * D], sums in float32.

    Work is cut into blocks of ROW_BLOCK rows. The maximum over all keys is exact in any order; the weighted sums are
    taken window by window in position order, then the tail. A dead lane has weight zero and reads finite values.
    """
    num_rows, heads, dim = q.shape
    out = q.new_empty(num_rows, heads * dim)
    for start in range(0, num_rows, ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, num_rows))
        block = _attention_block(
            q[rows], k_cache, v_cache, page_table, page_size, sequences[rows], positions[rows], tail_slots[rows], scale
        )
        out[rows] = block.flatten(1)
    return out


def _attention_block(q, k_cache, v_cache, page_table, page_size, sequences, positions, tail_slots, scale):
    """At most ROW_BLOCK rows: [n, H, D] in q's dtype."""
    live, heads, dim = q.shape
    rows = -(-live // _TAIL_ROWS) * _TAIL_ROWS
    queries = F.pad(q.float() * scale, (0, 0, 0, 0, 0, rows - live))  # [rows, H, D]
    slots = F.pad(tail_slots, (0, 0, 0, rows - live), value=NULL_PAGE)
    keys = k_cache[slots].float().transpose(1, 2)  # [rows, H, TAIL_LANES, D]
    tail = torch.bmm(queries.view(-1, 1, dim), keys.flatten(0, 1).transpose(1, 2)).view(rows, heads, -1)
    tail.masked_fill_((slots < page_size)[:, None], _DEAD)
    maximum = tail.amax(-1)  # [rows, H]

    windows = []  # scores [H, ROW_BLOCK, keys] and slots [keys], in position order
    ends = shared_end(positions)
    if int(ends.max()) > 0:
        padding = ROW_BLOCK - live
        by_head = F.pad(queries[:live], (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous()  # [H, ROW_BLOCK, D]
        windows = list(_shared_scores(by_head, k_cache, page_table, page_size, F.pad(sequences, (0, padding)), ends))
        for scores, _ in windows:
            maximum = torch.maximum(maximum, scores.amax(-1).t()[:rows])
    total = torch.zeros_like(maximum)
    mixed = torch.zeros_like(queries)
    for scores, window_slots in windows:
        weights = F.pad(maximum, (0, 0, 0, ROW_BLOCK - rows)).t()[..., None]
        weights = torch.exp(scores - weights)  # [H, ROW_BLOCK, keys]
        total += weights.sum(-1).t()[:rows]
        values = v_cache[window_slots].float().transpose(0, 1)
        mixed += torch.bmm(weights, values).transpose(0, 1)[:rows]
    weights = torch.exp(tail - maximum[..., None])
    total += weights.sum(-1)
    values = v_cache[slots].float().transpose(1, 2)
    mixed += torch.bmm(weights.view(-1, 1, TAIL_LANES), values.flatten(0, 1)).view_as(mixed)
    return (mixed / total[..., None])[:live].to(q.dtype)


def _shared_scores(by_head, k_cache, page_table, page_size, sequences, ends):
    """Scores of every window of every sequence, dead lanes masked; lanes dead for all rows read the null page."""
    live = len(ends)
    ends = F.pad(ends, (0, ROW_BLOCK - live))
    for sequence in range(page_table.shape[0]):
        mine = ends * (sequences == sequence)
        for first in range(0, int(mine.max()), SHARED_WINDOW):
            lanes = first + _arange(SHARED_WINDOW, ends)
            dead = lanes >= mine[:, None]  # [ROW_BLOCK, keys]
            pages = (lanes // page_size).clamp(max=page_table.shape[1] - 1)
            slots = page_table[sequence, pages] * page_size + lanes % page_size
            slots = torch.where(lanes < mine.max(), slots, NULL_PAGE)
            keys = k_cache[slots].float().permute(1, 2, 0)  # [H, D, keys]
            yield torch.bmm(by_head, keys).masked_fill_(dead, _DEAD), slots


def _arange(end: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(end, dtype=torch.int32, device=like.device)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual [N, M] + x [N, K] @ weight [M, K].T + bias [M] -> [N, M]."""
    return residual + _linear(x, weight, bias)


def lm_head(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """Final layer norm and projection to the vocabulary: x [N, C], weight [V, C] -> logits [N, V] in x's dtype."""
    return layer_norm_linear(x, norm_weight, norm_bias, eps, weight, None)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows = x.shape[0]
    padding = -num_rows % ROW_BLOCK
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    if x.shape[0] == ROW_BLOCK:
        return F.linear(x, weight, bias)[:num_rows]
    return torch.cat([F.linear(block, weight, bias) for block in x.split(ROW_BLOCK)])[:num_rows]


def _elementwise(function, x: torch.Tensor) -> torch.Tensor:
    """Apply ``function`` to pieces that torch runs on one thread and that hold no partial vector inside a row."""
    # torch takes two vectors at a time, 64 values of 16 bits with AVX-512, and the rest one by one
    rows = max(1, _SERIAL_ELEMENTS // x.shape[1]) if x.shape[1] % 64 == 0 else 1
    return torch.cat([function(piece) for piece in x.split(rows)]) if x.shape[0] > rows else function(x)
