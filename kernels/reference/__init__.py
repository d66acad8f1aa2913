"""The torch specification of every operation, one name and signature per Triton kernel, and the CPU backend."""

from kernels.reference.forward import (
    PREFILL_ROWS,
    embed,
    layer_norm_linear,
    layer_norm_qkv,
    linear_residual,
    lm_head,
    path_slots,
    route,
    tree_attention,
)
from kernels.reference.sampling import draw, gumbel_noise, hash_context, lookup, philox
from kernels.reference.tree import insert_children, new_tree, reroot, select_nodes, verify

__all__ = [
    "PREFILL_ROWS",
    "draw",
    "embed",
    "gumbel_noise",
    "hash_context",
    "insert_children",
    "layer_norm_linear",
    "layer_norm_qkv",
    "linear_residual",
    "lm_head",
    "lookup",
    "new_tree",
    "path_slots",
    "philox",
    "reroot",
    "route",
    "select_nodes",
    "tree_attention",
    "verify",
]
