"""Constants and structures that both backends and the tests agree on. No Triton import.

Attention takes the keys of a query at position p in two parts whose border depends on p alone:

    shared part   positions [0, shared_end(p)), in windows at fixed positions, read through the page table
    tail part     positions [shared_end(p), p], at most TAIL_LANES, gathered per row through its path

A tree never grows deeper than DEPTH_LIMIT, so a shared key is committed in every tree that can contain position p, and
the same key of the same query always falls into the same lane of the same product, whatever the tree looks like.
"""

from typing import NamedTuple

import torch

DEPTH_LIMIT = 32  # deepest node of any tree, the root being at depth 0
TAIL_ALIGNMENT = 16  # shared_end is a multiple of this
TAIL_LANES = DEPTH_LIMIT + TAIL_ALIGNMENT
SHARED_WINDOW = 128  # keys per product of the shared part, torch backend
ROW_BLOCK = 16  # rows per product of the torch backend
MAX_ROWS = 128  # rows of one pass over a tree; a longer pass is a prefill
VOCAB_TILE = 64  # logits whose maximum the output head may keep for the sampler
MAX_PROBES = 16  # buckets that a look-up of a successor table may visit; the builder keeps within it
NULL_PAGE = 0  # never handed out, always zero: what a dead lane reads


def shared_end(positions: torch.Tensor) -> torch.Tensor:
    """First position of the tail of queries at ``positions`` [N]; see the module docstring."""
    return (positions - DEPTH_LIMIT).clamp(min=0).div(TAIL_ALIGNMENT, rounding_mode="floor") * TAIL_ALIGNMENT


class Tree(NamedTuple):
    """A token tree of fixed capacity M. Node 0 is the root; a parent has a lower index than its children.

    ``edge_scores`` are log-probabilities (nats, <= 0) of a node given its parent, from the highest stage that scored
    the parent; ``path_scores`` are their sums from the root. ``sources`` is the index of the cheapest stage that
    proposed the node. ``paths`` holds each node's ancestors, root first, itself last, then -1.
    """

    tokens: torch.Tensor  # int32 [M]
    parents: torch.Tensor  # int32 [M], -1 for the root
    depths: torch.Tensor  # int32 [M]
    edge_scores: torch.Tensor  # float32 [M]
    path_scores: torch.Tensor  # float32 [M]
    sources: torch.Tensor  # int32 [M]
    scored: torch.Tensor  # int32 [M], the highest stage that has scored the node's children, -1 for none
    paths: torch.Tensor  # int32 [M, DEPTH_LIMIT + 1]
    num_nodes: torch.Tensor  # int32 [1]


class SuccessorTable(NamedTuple):
    """Baked successors of token contexts; rows are looked up by an open-addressed hash of the last two tokens."""

    keys: torch.Tensor  # int64 [buckets], previous * vocab_size + last, -1 empty
    rows: torch.Tensor  # int32 [buckets]
    tokens: torch.Tensor  # int32 [rows, m], most probable first, -1 padding
    log_probs: torch.Tensor  # float32 [rows, m], -inf padding
    log_rest: torch.Tensor  # float32 [rows], log of the mass outside the row
    vocab_size: int  # rows [0, vocab_size) are the contexts of one token


class Sampling(NamedTuple):
    """What shapes a draw. Greedy is ``noise=False`` with every filter off."""

    noise: bool
    seed: int  # 64 bits
    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1.0 = off
    min_p: float  # 0.0 = off
