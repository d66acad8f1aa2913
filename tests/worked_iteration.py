"""One iteration worked by hand, the state that the tests of its operations start from, on either backend.

After the text 1 2 7; token, source and edge score beside each node's index:

    0 root 7 ── 1 "10" stage 0 -0.5 ── 3 "30" stage 1 -0.25 ── 5 "50" stage 1 -1.0
             │                      └─ 4 "40" stage 1 -2.0
             └─ 2 "20" stage 0 -1.0 ── 6 "10" stage 0 -0.125

Stages: 0 a table, 1 a draft with cache 0, 2 the oracle with cache 1. The slot of position p is 100 + p in the draft's
cache, 200 + p in the oracle's; that of node i is 120 + i and 220 + i.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from decoding.stages import State
from kernels import gpu, reference
from kernels.layout import DEPTH_LIMIT, Rows
from tests.interpreter import DEVICE

CAPACITY, CONTEXT = 16, 16
TABLE, DRAFT, ORACLE = 0, 1, 2


def key_of(*tokens: int) -> int:
    """The key of a context among what is remembered, its last token last."""
    weighted = ((int(token) + 1) * 0x9E3779B97F4A7C15**back for back, token in enumerate(reversed(tokens)))
    return sum(weighted) % 2**63


def int32(*values, ops: ModuleType = reference) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=home(ops))


def home(ops: ModuleType) -> str:
    return DEVICE if ops is gpu else "cpu"


def moved(part, ops: ModuleType):
    """A copy of a structure where ``ops`` works."""
    return type(part)(*(value.to(home(ops), copy=True) if torch.is_tensor(value) else value for value in part))


def insert(tree, stage: int, node: int, children: dict[int, float]) -> None:
    scores = torch.tensor([list(children.values())])
    reference.insert_children(tree, stage, int32(node), int32(list(children)), scores, DEPTH_LIMIT)


def state(
    ops: ModuleType,
    end: int = 15,
    eos: tuple[int, ...] = (),
    cached_lens: tuple[int, int] = (3, 3),
    draft_has: tuple[int, ...] = (1, 3),
    oracle_has: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    contexts: tuple[int, ...] = (2**30, CONTEXT, CONTEXT),
) -> State:
    """The state of the module docstring; each cache has the K/V of these committed positions and nodes."""
    tree = reference.new_tree(CAPACITY, root=7)
    insert(tree, TABLE, 0, {10: -0.5, 20: -1.0})
    insert(tree, DRAFT, 1, {30: -0.25, 40: -2.0})
    insert(tree, DRAFT, 3, {50: -1.0})
    insert(tree, TABLE, 2, {10: -0.125})
    positions, nodes = torch.arange(CONTEXT, dtype=torch.int32), torch.arange(CAPACITY, dtype=torch.int32)
    chain = reference.new_chain([100 + positions, 200 + positions], [120 + nodes, 220 + nodes], list(cached_lens))
    chain.cached[0, list(draft_has)] = chain.cached[1, list(oracle_has)] = 1
    progress = reference.new_progress([1, 2, 7], end, 8, list(contexts), eos)
    return State(*(moved(part, ops) for part in (tree, progress, chain)))


def live(column: torch.Tensor, tree) -> list:
    return column[: int(tree.num_nodes)].tolist()


def has(chain, cache: int) -> list[int]:
    """The nodes whose K/V a cache has."""
    return chain.cached[cache].nonzero().flatten().tolist()


class Pass(NamedTuple):
    """The live rows of a pass, and where in them the nodes to score are."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    paths: list[list[int]]  # of rows that are nodes
    nodes: list[int]
    row_of: list[int]
    draw_positions: list[int]


def pass_rows(ops, state: State, nodes: list[int], num_head: int = 9, num_rows: int = 8, cache: int = 0) -> Pass:
    """``stage_rows`` for ``nodes``, one of them dead; dead rows and nodes left out, whose values must be harmless."""
    padded = int32(*nodes, -1, ops=ops) if ops is gpu else int32(*nodes)
    tree, progress, chain = state
    given = ops.stage_rows(tree, padded, progress, chain, cache, progress.reach[cache + 1], num_head, num_rows)
    rows = Rows(*(column.cpu() for column in given))
    lives, kept = rows.slot_mapping >= 0, rows.nodes >= 0
    assert ops is reference or len(rows.tokens) == num_head + num_rows
    assert not rows.tokens[~lives].any() and not rows.positions[~lives].any() and not rows.sequences.any()
    assert (rows.row_of >= 0).all() and (rows.row_of < max(1, len(rows.tokens))).all()
    place = lives.cumsum(0) - 1
    paths = [[node for node in path if node >= 0] for path in rows.paths[lives].tolist()]
    num_nodes = sum(slot % 100 >= 20 for slot in rows.slot_mapping[lives].tolist())
    return Pass(
        rows.tokens[lives].tolist(),
        rows.positions[lives].tolist(),
        rows.slot_mapping[lives].tolist(),
        paths[len(paths) - num_nodes :],
        rows.nodes[kept].tolist(),
        place[rows.row_of[kept].long()].tolist(),
        rows.draw_positions[kept].tolist(),
    )
