"""The Triton backend: the operations that models and the loop call, under the names and signatures that they have in
``kernels.reference``, on the GPU or in Triton's interpreter."""

import torch

from kernels.gpu import interpreter
from kernels.gpu.config import PREFILL_ROWS, TREE_SHAPE
from kernels.gpu.extend import extend_tree
from kernels.gpu.forward import (
    layer_norm_linear,
    layer_norm_qkv,
    linear_residual,
    lm_head,
    new_tile_maxima,
    tree_attention,
)
from kernels.gpu.launch import interpreting
from kernels.gpu.learn import learn
from kernels.gpu.lookup import lookup_nodes
from kernels.gpu.moments import new_moments
from kernels.gpu.route import embed, route
from kernels.gpu.rows import stage_rows
from kernels.gpu.sampling import draw
from kernels.gpu.tree import insert_children, select_nodes
from kernels.gpu.verify import verify_and_commit
from kernels.layout import Quantized
from kernels.reference import learn_text, new_chain, new_progress, new_recent, new_seed, new_tree

if interpreting():
    interpreter.install()


def state_device(device: torch.device) -> torch.device:
    """Where trees, progress and chains live for a model on ``device``: beside it."""
    return device


def capturable(device: torch.device) -> bool:
    """Whether an iteration on ``device`` can be captured in a CUDA graph: shapes are fixed, the host reads nothing."""
    return device.type == "cuda"


def cheap_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows that a pass takes for little more than one: a block of a product; 16 took 1.12 times one on an H200."""
    return 16


def packed(weight: torch.Tensor | Quantized) -> torch.Tensor | Quantized:
    """``weight`` as the linear layers read it fastest: as it is."""
    return weight


def pad_rows(x: torch.Tensor, weight: torch.Tensor | Quantized) -> torch.Tensor:
    """``x`` [N, C] with the rows that every product of a pass wants: as it is, tiles are padded on the chip."""
    return x


__all__ = [
    "PREFILL_ROWS",
    "TREE_SHAPE",
    "capturable",
    "cheap_rows",
    "draw",
    "embed",
    "extend_tree",
    "insert_children",
    "interpreting",
    "layer_norm_linear",
    "layer_norm_qkv",
    "learn",
    "learn_text",
    "linear_residual",
    "lm_head",
    "lookup_nodes",
    "new_moments",
    "new_chain",
    "new_progress",
    "new_recent",
    "new_seed",
    "new_tile_maxima",
    "new_tree",
    "packed",
    "pad_rows",
    "route",
    "select_nodes",
    "stage_rows",
    "state_device",
    "tree_attention",
    "verify_and_commit",
]
