"""The torch specification and CPU backend: every operation that models and the loop call, and parts of them that tests
and hosts use alone (noise, hashes, the walk of verification), which the Triton backend has inside its kernels."""

from kernels.reference.attention import tree_attention
from kernels.reference.contexts import hash_context
from kernels.reference.linear import (
    cheap_rows,
    layer_norm_linear,
    layer_norm_qkv,
    linear_residual,
    lm_head,
    new_tile_maxima,
    pad_rows,
)
from kernels.reference.lookup import extend_tree, lookup, lookup_nodes
from kernels.reference.matrices import packed
from kernels.reference.moments import new_moments
from kernels.reference.noise import gumbel_noise, philox, seed_number
from kernels.reference.recent import learn, learn_text, new_recent
from kernels.reference.route import PREFILL_ROWS, TREE_SHAPE, embed, path_slots, route
from kernels.reference.rows import stage_rows
from kernels.reference.sampling import draw
from kernels.reference.state import capturable, new_chain, new_progress, new_seed, state_device
from kernels.reference.tree import insert_children, new_tree, reroot, select_nodes
from kernels.reference.verify import verify, verify_and_commit

__all__ = [
    "PREFILL_ROWS",
    "TREE_SHAPE",
    "capturable",
    "cheap_rows",
    "draw",
    "embed",
    "extend_tree",
    "gumbel_noise",
    "hash_context",
    "insert_children",
    "layer_norm_linear",
    "layer_norm_qkv",
    "learn",
    "learn_text",
    "linear_residual",
    "lm_head",
    "lookup",
    "lookup_nodes",
    "new_chain",
    "new_moments",
    "new_progress",
    "new_recent",
    "new_seed",
    "new_tile_maxima",
    "new_tree",
    "packed",
    "pad_rows",
    "path_slots",
    "philox",
    "reroot",
    "seed_number",
    "route",
    "select_nodes",
    "stage_rows",
    "state_device",
    "tree_attention",
    "verify",
    "verify_and_commit",
]
