"""The Triton backend: the names and signatures of ``kernels.reference``, on the GPU or in Triton's interpreter."""

from kernels.gpu.config import PREFILL_ROWS
from kernels.gpu.forward import layer_norm_linear, layer_norm_qkv, linear_residual, lm_head, tree_attention
from kernels.gpu.launch import interpreting
from kernels.gpu.route import embed, route
from kernels.gpu.sampling import draw
from kernels.reference import (
    insert_children,
    lookup_nodes,
    new_chain,
    new_progress,
    new_tree,
    select_nodes,
    stage_rows,
    state_device,
    verify_and_commit,
)

__all__ = [
    "PREFILL_ROWS",
    "draw",
    "embed",
    "insert_children",
    "interpreting",
    "layer_norm_linear",
    "layer_norm_qkv",
    "linear_residual",
    "lm_head",
    "lookup_nodes",
    "new_chain",
    "new_progress",
    "new_tree",
    "route",
    "select_nodes",
    "stage_rows",
    "state_device",
    "tree_attention",
    "verify_and_commit",
]
