"""Tree attention of one small tree against a mask that was drawn by hand and plain softmax attention in float64."""

from types import ModuleType

import pytest
import torch

from kernels import gpu, reference
from kernels.layout import TAIL_LANES, shared_end
from kernels.reference import path_slots
from tests.gpu_helpers import DTYPES
from tests.helpers import TOLERANCES, assert_close, tree_of
from tests.interpreter import DEVICE

#        0             the root
#       / \
#      1   2           its children
#     / \   \
#    3   4   5
#        |
#        6
PARENTS = [-1, 0, 0, 1, 1, 2, 4]
# Row: the node that attends. Column: the node it may see, its ancestors and itself.
ANCESTORS = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 0, 0],
    [1, 1, 0, 1, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 0],
    [1, 0, 1, 0, 0, 1, 0],
    [1, 1, 0, 0, 1, 0, 1],
]
DEPTHS = [0, 1, 1, 2, 2, 2, 3]
HEADS, DIM = 2, 64
# All in the tail; a tail that begins behind the start; a shared part of less, and of more, than one window.
LENGTHS = [0, 1, 60, 100, 300]


def test_the_picture_is_the_tree():
    """The literal matrix and depths say the same as the tree's own paths."""
    tree = tree_of(PARENTS, [0] * 7)
    assert tree.depths.tolist() == DEPTHS
    for node, row in enumerate(ANCESTORS):
        assert [i for i in tree.paths[node].tolist() if i >= 0] == [i for i, seen in enumerate(row) if seen]


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Textbook attention in float64: q [N, H, D], k and v [keys, H, D], seen [N, keys] -> [N, H * D]."""
    scores = torch.einsum("nhd,khd->hnk", q.double(), k.double()) / DIM**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hnk,khd->nhd", weights, v.double()).flatten(1)


def paged_inputs(length: int, page_size: int, dtype: torch.dtype):
    """Random q, k, v, the caches that hold them in shuffled pages, the page table and the slots of the nodes.

    The text and the root fill positions 0 to ``length``; the other six nodes have a page each. Everything else is NaN,
    the null page zero.
    """
    pages_of_text = -(-(length + 1) // page_size)
    pages = 1 + torch.randperm(pages_of_text + 8).int()
    table = pages[None, :pages_of_text]
    positions = torch.arange(length + 1)
    text_slots = table[0, positions // page_size] * page_size + positions % page_size
    node_slots = torch.cat([torch.tensor([-1]), pages[pages_of_text:][:6] * page_size]).int()
    q = torch.randn(7, HEADS, DIM).to(dtype)
    k, v = torch.randn(2, length + 7, HEADS, DIM).to(dtype)
    caches = torch.full((2, (pages_of_text + 9) * page_size, HEADS, DIM), float("nan"), dtype=dtype)
    caches[:, :page_size] = 0
    caches[:, torch.cat([text_slots, node_slots[1:]])] = torch.stack([k, v])
    return q, k, v, caches, table, node_slots


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_tree_attention(length, page_size, dtype):
    """Every node sees the whole text and, of the tree, exactly the ones of its row in the matrix above."""
    attends_as_drawn(reference, "cpu", length, page_size, dtype)


@DTYPES
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_tree_attention_in_triton(length, page_size, dtype):
    """The same of the Triton kernel."""
    attends_as_drawn(gpu, DEVICE, length, page_size, dtype)


def attends_as_drawn(ops: ModuleType, device: str, length: int, page_size: int, dtype: torch.dtype) -> None:
    q, k, v, (k_cache, v_cache), table, node_slots = paged_inputs(length, page_size, dtype)
    sequences = torch.zeros(7, dtype=torch.int32)
    positions = length + torch.tensor(DEPTHS, dtype=torch.int32)
    committed = torch.tensor([length + 1], dtype=torch.int32)
    paths = tree_of(PARENTS, [0] * 7).paths
    nowhere = torch.full((7,), -1, dtype=torch.int32)
    where = ops.route(
        table.to(device),
        page_size,
        *(column.to(device) for column in (committed, sequences, positions, paths, node_slots, nowhere)),
    )
    out = ops.tree_attention(q.to(device), k_cache.to(device), v_cache.to(device), where, DIM**-0.5)

    seen = torch.cat([torch.ones(7, length), torch.tensor(ANCESTORS)], dim=1).bool()
    assert_close(out.cpu(), dense_attention(q, k, v, seen), dtype)


def test_tail_slots_by_hand():
    """The lanes of node 6 below 40 tokens, written out: text and root through the table, then nodes 1, 4 and 6."""
    table = torch.arange(1, 42, dtype=torch.int32)[None]  # page size 1: position i lies in slot i + 1
    node_slots = torch.tensor([-1, 51, 52, 53, 54, 55, 56], dtype=torch.int32)
    tail = path_slots(
        table,
        1,
        committed=torch.tensor([41], dtype=torch.int32),
        sequences=torch.zeros(1, dtype=torch.int32),
        positions=torch.tensor([43], dtype=torch.int32),
        paths=tree_of(PARENTS, [0] * 7).paths[6:],
        node_slots=node_slots,
    )
    dead = TAIL_LANES - 44
    assert tail.tolist() == [[*range(1, 42), 51, 54, 56, *[0] * dead]]


@pytest.mark.parametrize(
    ("position", "end"), [(0, 0), (31, 0), (32, 0), (47, 0), (48, 16), (63, 16), (64, 32), (159, 112), (160, 128)]
)
def test_shared_end_by_hand(position, end):
    """Where the tail of a query begins: the last multiple of 16 at least 32 positions before it."""
    assert int(shared_end(torch.tensor([position]))) == end
