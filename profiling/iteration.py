"""The operations of an iteration that belong to no model: tree, rows, look-ups, verification; on empty states."""

from collections.abc import Callable
from types import ModuleType

import torch

from kernels import gpu
from kernels.layout import DEPTH_LIMIT, Sampling, SuccessorTable

CAPACITY = 128  # nodes
WIDTH = 16  # nodes that a stage scores at a time
CHILDREN = 8
STAGES = 3
POSITIONS = 1024
RECENT_BUCKETS, RECENT_WIDTH = 4096, 8
TABLE_BUCKETS, TABLE_ROWS, TABLE_WIDTH = 1 << 17, 1 << 16, 16


def iteration(vocab: int, device: torch.device | str, ops: ModuleType = gpu) -> dict[str, Callable]:
    """Calls by name, on states of fixed capacity as a generation has them; on "meta" call them inside ``record``."""
    tree = ops.new_tree(CAPACITY, device, root=0)
    progress = ops.new_progress([0] * 16, POSITIONS, DEPTH_LIMIT, [POSITIONS] * STAGES, (vocab - 1,), device)
    leased = [torch.zeros(size, dtype=torch.int32) for size in (POSITIONS, CAPACITY)]
    chain = ops.new_chain([leased[0]] * 2, [leased[1]] * 2, [0, 0], device)
    recent = ops.new_recent(RECENT_BUCKETS, RECENT_WIDTH, vocab, device)
    nodes = torch.zeros(WIDTH, dtype=torch.int32, device=device)
    children = torch.zeros(WIDTH, CHILDREN, dtype=torch.int32, device=device)
    scores = torch.zeros(WIDTH, CHILDREN, device=device)
    reach = progress.reach[1]
    table = SuccessorTable(
        keys=torch.zeros(TABLE_BUCKETS, dtype=torch.int64, device=device),
        rows=torch.zeros(TABLE_BUCKETS, dtype=torch.int32, device=device),
        tokens=torch.zeros(TABLE_ROWS, TABLE_WIDTH, dtype=torch.int32, device=device),
        log_probs=torch.zeros(TABLE_ROWS, TABLE_WIDTH, device=device),
        log_rest=torch.zeros(TABLE_ROWS, device=device),
        vocab_size=vocab,
    )
    greedy, sampled = Sampling(False, 0, 1.0, 0, 1.0, 0.0), Sampling(True, 7, 1.0, 50, 1.0, 0.0)
    return {
        "select_nodes": lambda: ops.select_nodes(tree, 1, WIDTH, reach),
        "stage_rows": lambda: ops.stage_rows(tree, nodes, progress, chain, 0, reach, WIDTH, WIDTH),
        "lookup_nodes, greedy": lambda: ops.lookup_nodes(table, tree, nodes, progress, greedy, CHILDREN, 1.0),
        "lookup_nodes, sampled": lambda: ops.lookup_nodes(
            table, tree, nodes, progress, sampled, CHILDREN, 0.85, recent
        ),
        "learn": lambda: ops.learn(recent, tree, nodes, progress, children, scores),
        "insert_children": lambda: ops.insert_children(tree, 1, nodes, children, scores, reach),
        "verify_and_commit": lambda: ops.verify_and_commit(tree, nodes, nodes, progress, chain),
    }
