"""The operations of an iteration that belong to no model: tree, rows, look-ups, verification; on a state of work."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from kernels import gpu, reference
from kernels.layout import DEPTH_LIMIT, Chain, Progress, Sampling, SuccessorTable, Tree

CAPACITY = 128  # nodes that a tree may hold
NODES = 64  # that it holds, the deepest at DEPTH
DEPTH = 12
ACCEPTED = 4  # by the verification
WIDTH = 16  # nodes that a stage scores at a time
CHILDREN = 8
ROUNDS = 4, 6  # of draft2, and nodes of one
STAGES = 3
POSITIONS = 1024
PROMPT = 16
RECENT_BUCKETS, RECENT_WIDTH = 65536, 8
TABLE_BUCKETS, TABLE_ROWS, TABLE_WIDTH = 1 << 17, 1 << 16, 16


class Iteration(NamedTuple):
    """Calls by name; those that change the state begin with ``restore``, which is one copy."""

    calls: dict[str, Callable]
    restore: Callable
    restored: frozenset[str]  # names of the calls that begin with it
    state: torch.Tensor  # int32, all of tree, progress and chain


def working_tree() -> Tree:
    """A chain of nodes 0 to DEPTH, each holding its index as its token; their other children follow, unscored."""
    tree = reference.new_tree(CAPACITY, root=0)

    def give(node: int, *tokens: int) -> None:
        children = torch.tensor([tokens], dtype=torch.int32)
        at, scores = torch.tensor([node], dtype=torch.int32), torch.full(children.shape, -0.5)
        reference.insert_children(tree, 1, at, children, scores, DEPTH_LIMIT)

    for node in range(DEPTH):
        give(node, node + 1)
    for node in range(DEPTH):
        give(node, node + 1, *range(DEPTH + 1 + node, NODES, DEPTH))
    return tree


def packed(groups: tuple, device: torch.device | str) -> tuple[torch.Tensor, tuple]:
    """The groups' 32-bit columns as views of one buffer int32, so that one copy restores them all."""
    columns = [column for group in groups for column in group]
    sizes = [-(-column.numel() // 4) * 4 for column in columns]  # each starts at a multiple of 16 bytes
    buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    views = []
    for column, part in zip(columns, buffer.split(sizes), strict=True):
        view = part[: column.numel()].view(column.dtype).view(column.shape)
        views.append(view.copy_(column))
    rest = iter(views)
    return buffer, tuple(type(group)(*(next(rest) for _ in group)) for group in groups)


def state(vocab: int) -> tuple[Tree, Progress, Chain]:
    """Before the verification of a generation's first iteration, on the host; lower stages have run the chain."""
    tree = working_tree()
    progress = reference.new_progress([0] * PROMPT, POSITIONS, DEPTH_LIMIT, [POSITIONS] * STAGES, (vocab - 1,))
    leased = torch.arange(POSITIONS, dtype=torch.int32), torch.arange(CAPACITY, dtype=torch.int32)
    chain = reference.new_chain([leased[0]] * 2, [POSITIONS + leased[1]] * 2, [PROMPT, PROMPT - 1])
    chain.cached[0, 1:NODES] = tree.scored[1:NODES] >= 0
    return tree, progress, chain


def iteration(vocab: int, device: torch.device | str, ops: ModuleType = gpu, width: int = WIDTH) -> Iteration:
    """The calls on ``device``, each on ``width`` nodes; on "meta" make them inside ``record``."""
    live, (tree, progress, chain) = packed(state(vocab), device)
    saved = live.clone()
    recent = ops.new_recent(RECENT_BUCKETS, RECENT_WIDTH, device)
    leaves = torch.arange(NODES - width, NODES, dtype=torch.int32).to(device)
    rows = torch.arange(width, dtype=torch.int32).to(device)
    wanted = [i + 1 if i < ACCEPTED else NODES for i in range(width)]  # along the chain, then what no node holds
    drawn = torch.tensor(wanted, dtype=torch.int32).to(device)
    children = (NODES + 1 + torch.arange(width * CHILDREN, dtype=torch.int32)).view(width, CHILDREN).to(device)
    scores = torch.full((width, CHILDREN), -0.5).to(device)
    reach, levels = progress.reach[1], torch.zeros(width, dtype=torch.int32).to(device)
    table = SuccessorTable(
        keys=torch.zeros(TABLE_BUCKETS, dtype=torch.int64, device=device),
        rows=torch.zeros(TABLE_BUCKETS, dtype=torch.int32, device=device),
        tokens=torch.zeros(TABLE_ROWS, TABLE_WIDTH, dtype=torch.int32, device=device),
        log_probs=torch.zeros(TABLE_ROWS, TABLE_WIDTH, device=device),
        log_rest=torch.zeros(TABLE_ROWS, device=device),
        vocab_size=vocab,
    )
    seed = ops.new_seed(7, device)
    greedy, sampled = Sampling(False, seed, 1.0, 0, 1.0, 0.0), Sampling(True, seed, 1.0, 50, 1.0, 0.0)

    def restore() -> torch.Tensor:
        return live.copy_(saved)

    def restored(call: Callable) -> Callable:
        return lambda: (restore(), call())[1]

    changing = {
        "stage_rows": lambda: ops.stage_rows(tree, leaves, progress, chain, 0, reach, width, width),
        "extend_tree": lambda: (
            ops.extend_tree(table, tree, progress, sampled, *ROUNDS, 4, 0.85, recent),
            tree.num_nodes,
        )[1],
        "insert_children": lambda: ops.insert_children(tree, 1, leaves, children, scores, reach, levels),
        "verify_and_commit": lambda: (ops.verify_and_commit(tree, rows, drawn, progress, chain), progress.record)[1],
    }
    calls = {
        "select_nodes": lambda: ops.select_nodes(tree, 1, width, reach),
        "lookup_nodes, greedy": lambda: ops.lookup_nodes(table, tree, leaves, progress, greedy, CHILDREN, 1.0),
        "lookup_nodes, sampled": lambda: ops.lookup_nodes(
            table, tree, leaves, progress, sampled, CHILDREN, 0.85, recent
        ),
        "learn": lambda: ops.learn(recent, tree, leaves, progress, children, scores),
    }
    calls |= {name: restored(call) for name, call in changing.items()}
    return Iteration(calls, restore, frozenset(changing), live)
