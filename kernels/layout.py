"""Constants and structures that both backends and the tests agree on. No Triton import.

Attention takes the keys of a query at position p in two parts whose border depends on p alone:

    shared part   positions [0, shared_end(p)), in windows at fixed positions, read through the page table
    tail part     positions [shared_end(p), p], at most TAIL_LANES, gathered per row through its path

A tree never grows deeper than DEPTH_LIMIT, so a shared key is committed in every tree that can contain position p, and
the same key of the same query always falls into the same lane of the same product, whatever the tree looks like.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

DEPTH_LIMIT = 32  # deepest node of any tree, the root being at depth 0
TAIL_ALIGNMENT = 16  # shared_end is a multiple of this
TAIL_LANES = DEPTH_LIMIT + TAIL_ALIGNMENT
SHARED_WINDOW = 128  # keys per product of the shared part, torch backend; the last one may have fewer
TAIL_WINDOW = 64  # keys per product of what the tails of a few rows hold, torch backend
ROW_BLOCK = 16  # rows per product of the torch backend; more or fewer where such products were found to agree
ROW_MULTIPLE = 4  # of this, where fewer rows than ROW_BLOCK agree bit for bit but not any number of them
MAX_ROWS = 128  # rows of one pass over a tree; a longer pass is a prefill
MOMENT_PART = 32  # values of a row whose moments are kept together; tiles that leave moments are a multiple of it
VOCAB_TILE = 64  # logits whose maximum the output head may keep for the sampler
MAX_CHILDREN = 64  # that a stage ranks for a node
LONGEST_CONTEXT = 8  # tokens after which draft2 remembers what was drawn; a power of two
NUM_CONTEXTS = LONGEST_CONTEXT.bit_length() - 1  # 2, 4, ..., LONGEST_CONTEXT tokens
MAX_PROBES = 16  # buckets that a look-up of a successor table may visit; the builder keeps within it
LEAST_REST = 1e-6  # mass outside a remembered row, where rounding leaves none
NULL_PAGE = 0  # never handed out, always zero: what a dead lane reads
ALIGNMENT = 16  # bytes; a less aligned pointer would select another binary, with other vector loads


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy where it does not start at a multiple of ALIGNMENT, as views of files may not."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


@dataclass(frozen=True)
class Quantized:
    """A matrix [M, K] in 8 bits: element (m, k) is ``values[m, k] * scales[m]``.

    A product sums x times the integers in float32 and multiplies the sum by the row's scale, then adds the bias.
    """

    values: Any  # int8 [M, K], or the same integers as a backend reads them fastest
    scales: torch.Tensor  # float32 [M]
    ndim = 2

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def numel(self) -> int:
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Of the integers in 8 bits, whichever way they are kept, and the scales."""
        return self.numel() + self.scales.nbytes


def shared_end(positions: Any) -> Any:
    """First position of the tail of queries at ``positions`` [N], a tensor or an array; see the module docstring."""
    end = (positions - DEPTH_LIMIT) // TAIL_ALIGNMENT * TAIL_ALIGNMENT
    return end * (end > 0)


class TreeShape(NamedTuple):
    """What of a default tree depends on how long a backend takes for its parts."""

    lookup_rounds: int  # of draft2, before a pass of the draft
    lookup_width: int  # nodes of a round
    draft_rounds: int  # passes of the topmost draft that are worth one of the oracle
    draft_children: int  # of a node
    min_prob: float  # of a node that is worth a row of a draft's pass


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
    scored: torch.Tensor  # int32 [M], the highest stage that has scored the node, or whose scoring was replaced, or -1
    paths: torch.Tensor  # int32 [M, DEPTH_LIMIT + 1]
    num_nodes: torch.Tensor  # int32 [1]
    failed: torch.Tensor  # int32 [1], 1 + the stage that gave NaN, 0 = none


class Progress(NamedTuple):
    """How far one generation is. ``reach`` row i holds, in column 0, the deepest node that stage i may score in the
    next iteration, negative for none; its last row is the oracle's, and no node of the tree may be deeper than that."""

    text: torch.Tensor  # int32 [context + 1], committed tokens; the last one is the tree's root
    length: torch.Tensor  # int32 [1], committed tokens
    end: torch.Tensor  # int32 [1], the length at which the generation ends
    reach: torch.Tensor  # int32 [stages, 4]
    contexts: torch.Tensor  # int32 [stages], positions that each stage can be fed
    max_depth: torch.Tensor  # int32 [1], deepest node that the configuration allows
    eos: torch.Tensor  # int32 [EOS_CAPACITY or more], tokens that end the text, then -1
    state: torch.Tensor  # int32 [1], RUNNING, EOS, LENGTH, or -1 - the stage that gave NaN
    record: torch.Tensor  # int32 [RECORD], what the last iteration did; see ``Record``


RUNNING, EOS, LENGTH = 0, 1, 2
EOS_CAPACITY = 8  # so that generations with few end-of-text tokens have state of one shape
MAX_STAGES = 8
RUN = 48  # places for the tokens of one iteration, DEPTH_LIMIT + 1 of them used


class Record:
    """Where the fields of a record begin: the host reads nothing else of an iteration."""

    EMITTED = 0  # number of tokens emitted
    STATE = 1  # state after the iteration
    PROPOSED = 2  # [MAX_STAGES], nodes of the oracle's pass by their source
    TOKENS = 16  # [RUN], the tokens emitted
    SOURCES = 16 + RUN  # [RUN], the cheapest stage that had proposed each, the oracle's index for its own
    TRIED = 16 + 2 * RUN  # [RUN], bit i: stage i had proposed a child where that token was drawn


RECORD = 16 + 3 * RUN


class Chain(NamedTuple):
    """The caches of one generation, one row per stage that has one. Slots of a stage in ``page_tables`` beyond its
    committed positions and in ``node_slots`` are spare; together they always hold each of its slots exactly once, so
    that committing a node is an exchange of two numbers."""

    page_tables: torch.Tensor  # int32 [C, positions], slot of each position
    node_slots: torch.Tensor  # int32 [C, M], slot of each node of the tree
    cached: torch.Tensor  # int32 [C, M], 1 where the stage has the node's K/V
    cached_len: torch.Tensor  # int32 [C], committed positions whose K/V the stage has


class Rows(NamedTuple):
    """The rows of one stage's pass: committed tokens that it has not seen, then nodes. Slot -1 marks a dead row."""

    tokens: torch.Tensor  # int32 [R]
    positions: torch.Tensor  # int32 [R]
    sequences: torch.Tensor  # int32 [R], the page table of each row: 0, as long as there is one
    slot_mapping: torch.Tensor  # int32 [R]
    paths: torch.Tensor  # int32 [R, DEPTH_LIMIT + 1]
    nodes: torch.Tensor  # int32 [W], the nodes to score, -1 = none
    row_of: torch.Tensor  # int32 [W], their rows
    draw_positions: torch.Tensor  # int32 [W], absolute positions of the tokens to draw there


class SuccessorTable(NamedTuple):
    """Baked successors of token contexts; rows are looked up by an open-addressed hash of the last two tokens."""

    keys: torch.Tensor  # int64 [buckets], previous * vocab_size + last, -1 empty
    rows: torch.Tensor  # int32 [buckets]
    tokens: torch.Tensor  # int32 [rows, m], most probable first, -1 padding
    log_probs: torch.Tensor  # float32 [rows, m], -inf padding
    log_rest: torch.Tensor  # float32 [rows], log of the mass outside the row
    vocab_size: int  # rows [0, vocab_size) are the contexts of one token


class RecentTable(NamedTuple):
    """What higher stages drew in this generation after the last 2, 4, ..., LONGEST_CONTEXT tokens, before that what
    follows two tokens in the prompt; a newer row replaces an older one, and a longer context goes before a shorter one.

    One bucket a context, ``hash_context`` of its key (``kernels.reference.context_keys``); log-probabilities are those
    at the generation's temperature, of the prompt's rows at temperature 1. The level of a row is the stage whose
    scoring it replaces, the one below the stage that drew it, 0 of the prompt's; of two rows for one context the one of
    the higher level stays.
    """

    keys: torch.Tensor  # int64 [buckets], a power of two; -1 empty
    tokens: torch.Tensor  # int32 [buckets, m]
    log_probs: torch.Tensor  # float32 [buckets, m], -inf padding
    log_rest: torch.Tensor  # float32 [buckets]
    levels: torch.Tensor  # int32 [buckets]


class Sampling(NamedTuple):
    """What shapes a draw. Greedy is ``noise=False`` with every filter off."""

    noise: bool
    seed: torch.Tensor  # int32 [2], a 64-bit seed, low word first; read by the draws, so that a capture outlives it
    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1.0 = off
    min_p: float  # 0.0 = off

    def to(self, device: torch.device | str) -> "Sampling":
        """The same rule, its seed on ``device``."""
        seed = self.seed.to(device)
        return self if seed is self.seed else self._replace(seed=seed)
