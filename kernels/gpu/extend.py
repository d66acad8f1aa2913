"""draft² in one launch: a tree grows by several rounds of selection, look-up and insertion.

A round is a dozen dependent trips to the cache and next to no work, so what it costs is launches. One program does all
rounds with the bodies of the three kernels that other stages launch one by one; a barrier stands where they end.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.early import wait_for_previous
from kernels.gpu.launch import launch
from kernels.gpu.lookup import answer, prepare
from kernels.gpu.tree import choose, insert, insert_constants, tree_pointers
from kernels.layout import Progress, RecentTable, Sampling, SuccessorTable, Tree

NUM_WARPS = 8  # 42 us for four rounds on an H200, 44 with 4, 60 with 1


@triton.jit(do_not_specialize=["rounds", "temperature", "tau", "num_buckets", "num_recent"])
def _extend_kernel(
    tree_tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
    depths_ptr,  # int32 [M]
    edges_ptr,  # float32 [M]
    path_scores_ptr,  # float32 [M]
    sources_ptr,  # int32 [M]
    scored_ptr,  # int32 [M]
    paths_ptr,  # int32 [M, PATH]
    num_nodes_ptr,  # int32 [1]
    failed_ptr,  # int32 [1]
    reach_ptr,  # int32 [any], the first one counts: the deepest node to look up
    max_depth_ptr,  # int32 [any], the first one counts
    text_ptr,  # int32 [any]
    length_ptr,  # int32 [1]
    seed_ptr,  # int32 [2]
    keys_ptr,  # of the tables, as in ``_lookup_kernel``
    rows_ptr,
    tokens_ptr,
    log_probs_ptr,
    log_rest_ptr,
    recent_keys_ptr,
    recent_tokens_ptr,
    recent_log_probs_ptr,
    recent_log_rest_ptr,
    recent_levels_ptr,
    nodes_ptr,  # int32 [W], scratch, as all below
    children_ptr,  # int32 [W, CHILDREN]
    scores_ptr,  # float32 [W, CHILDREN]
    levels_ptr,  # int32 [W]
    rounds,
    temperature,
    tau,
    num_buckets,
    num_recent,
    LONGEST: tl.constexpr,
    BLOCK_CONTEXTS: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    RECENT_WIDTH: tl.constexpr,
    CHILDREN: tl.constexpr,
    NOISE: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_PATH: tl.constexpr,
):
    """Grid (1,): rounds of selection, look-up and insertion, of which each reads what the one before has stored."""
    wait_for_previous()
    for _ in range(rounds):
        choose(
            path_scores_ptr,
            depths_ptr,
            scored_ptr,
            num_nodes_ptr,
            reach_ptr,
            nodes_ptr,
            0,
            float("-inf"),
            W,
            BLOCK_M,
            BLOCK_W,
        )
        tl.debug_barrier()
        w = tl.arange(0, BLOCK_W)
        answer(
            w,
            w < W,
            nodes_ptr,
            tree_tokens_ptr,
            paths_ptr,
            depths_ptr,
            text_ptr,
            length_ptr,
            seed_ptr,
            keys_ptr,
            rows_ptr,
            tokens_ptr,
            log_probs_ptr,
            log_rest_ptr,
            recent_keys_ptr,
            recent_tokens_ptr,
            recent_log_probs_ptr,
            recent_log_rest_ptr,
            recent_levels_ptr,
            children_ptr,
            scores_ptr,
            levels_ptr,
            temperature,
            tau,
            num_buckets,
            num_recent,
            PATH,
            LONGEST,
            BLOCK_CONTEXTS,
            V,
            WIDTH,
            RECENT_WIDTH,
            CHILDREN,
            NOISE,
            PROBES,
            BLOCK,
        )
        tl.debug_barrier()
        insert(
            tree_tokens_ptr,
            parents_ptr,
            depths_ptr,
            edges_ptr,
            path_scores_ptr,
            sources_ptr,
            scored_ptr,
            paths_ptr,
            num_nodes_ptr,
            failed_ptr,
            nodes_ptr,
            children_ptr,
            scores_ptr,
            levels_ptr,
            max_depth_ptr,
            0,
            M,
            W,
            CHILDREN,
            PATH,
            BLOCK_M,
            CHUNK,
            BLOCK_ENTRIES,
            BLOCK_PATH,
        )
        tl.debug_barrier()


def extend_tree(
    table: SuccessorTable,
    tree: Tree,
    progress: Progress,
    sampling: Sampling,
    rounds: int,
    width: int,
    num_children: int,
    tau: float,
    recent: RecentTable | None = None,
) -> int:
    """``select_nodes``, ``lookup_nodes``, ``insert_children`` as stage 0, ``rounds`` times; how many nodes at most it
    looked up. One launch."""
    answers, arguments, constants = prepare(table, tree, progress, sampling, width, num_children, tau, recent)
    arguments |= tree_pointers(tree)
    arguments |= {"tree_tokens_ptr": tree.tokens, "tokens_ptr": table.tokens}  # either has a column of that name
    arguments |= {
        "reach_ptr": progress.reach[0],
        "max_depth_ptr": progress.reach[-1],
        "nodes_ptr": torch.empty(width, dtype=torch.int32, device=tree.tokens.device),
        "rounds": rounds,
    }
    constants |= insert_constants(tree, answers[0]) | {"BLOCK": constants["BLOCK"]}
    constants |= {"BLOCK_W": triton.next_power_of_2(width), "BLOCK_M": triton.next_power_of_2(len(tree.tokens))}
    launch(_extend_kernel, (1,), arguments, constants, num_warps=NUM_WARPS, all_registers=True)
    return rounds * width
