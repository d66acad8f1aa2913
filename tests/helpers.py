"""What the tests share: small random GPT-2s, random trees, two ways to run a tree, one tolerance table.

The two ways are the two sides of the bit-exactness contract: ``run_tree`` scores all nodes in one pass, as a stage
does; ``decode_paths`` commits every path token by token, as plain decoding does.
"""

import copy
import dataclasses
import functools
import random
from types import ModuleType
from typing import NamedTuple

import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from kernels import reference
from kernels.layout import DEPTH_LIMIT, Tree
from kernels.reference import new_tree
from model.config import GPT2Config
from model.gpt2 import GPT2, Query
from model.kv_cache import PagedKVCache
from model.weights import GPT2Weights, load

HEAD_DIM = 64
# Sizes of a pass at which a row's bits could change: one row, few rows, around one and four blocks of 16 rows, many.
SIZES = [1, 2, 7, 16, 17, 63, 64, 128]
# Lengths of a text at which they could. Rows of a tree below T tokens lie at positions T to T + DEPTH_LIMIT. The first
# tail border moves at 48, then every 16; windows of 128 keys fill at 160 and 288, smaller ones in between. Each border
# is met from both sides by the root, and crossed inside the trees that start up to 32 positions before it.
LENGTHS = [0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64]
LENGTHS += [127, 128, 129, 143, 144, 159, 160, 161, 175, 176, 287, 288, 289]


class Tolerance(NamedTuple):
    absolute: float
    relative: float


# For comparisons with another implementation; equality contracts use torch.equal instead.
TOLERANCES = {  # of one operation
    torch.float32: Tolerance(1e-6, 1e-5),
    torch.float16: Tolerance(1e-3, 2**-10),
    torch.bfloat16: Tolerance(1e-3, 2**-7),
}
LOGIT_TOLERANCES = {  # through a whole small model, logits within about 20
    torch.float32: Tolerance(2e-4, 0.0),
    torch.float16: Tolerance(5e-2, 0.0),
    torch.bfloat16: Tolerance(5e-1, 0.0),
}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    tolerances: dict[torch.dtype, Tolerance] = TOLERANCES,
) -> None:
    """Assert that ``actual`` is finite and within the tolerance of ``dtype``; say how wrong it is and where."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    tolerance = tolerances[dtype]
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).abs()
    wrong = ~(error <= tolerance.absolute + tolerance.relative * expected.abs())  # NaN is wrong
    if not wrong.any():
        return
    where = [tuple(index) for index in wrong.nonzero()[:5].tolist()]
    values = "\n".join(
        f"  {index}: {actual[index].item():.9g}, expected {expected[index].item():.9g}" for index in where
    )
    raise AssertionError(
        f"{int(wrong.sum())} of {wrong.numel()} values beyond {tolerance}; max error {error.max():.3g}, "
        f"RMS error {error.square().mean().sqrt():.3g}; first:\n{values}"
    )


def load32(source) -> tuple[GPT2Config, GPT2Weights]:
    """Config and float32 weights of a checkpoint directory or a model in memory."""
    return load(source, torch.float32, "cpu")


@functools.cache
def hf_model(n_layer: int = 1, n_head: int = 1, vocab_size: int = 97, **fields) -> GPT2LMHeadModel:
    """A random HF GPT-2 in float32 with weights large enough that attention and logits are far from flat."""
    config = HFConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=HEAD_DIM * n_head,
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        **fields,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(_random_weight(name, tensor.shape))
    return model


def _random_weight(name: str, shape: torch.Size) -> torch.Tensor:
    if name.endswith(".bias"):
        return 0.1 * torch.randn(shape)
    if "ln_" in name:
        return 1 + 0.1 * torch.randn(shape)
    if "wte" in name or "wpe" in name or "lm_head" in name:
        return 2.5 * shape[1] ** -0.5 * torch.randn(shape)  # [V or n_positions, C]
    return 1.5 * shape[0] ** -0.5 * torch.randn(shape)  # [in, out]


@functools.cache
def tiny_gpt2(dtype: torch.dtype = torch.float32, ops: ModuleType = reference, device: str = "cpu", **fields) -> GPT2:
    """Our model with the weights of ``hf_model(**fields)``, on the backend ``ops``."""
    return GPT2(*load(hf_model(**fields), dtype, device), ops)


def random_tokens(count: int, seed: int = 0, vocab_size: int = 97) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=count)


def random_tree(num_nodes: int, seed: int = 0, vocab_size: int = 97, max_depth: int = DEPTH_LIMIT) -> Tree:
    """A tree with random parents, most nodes below one of the last two, so that it is both deep and wide."""
    rng = random.Random(seed)
    parents, depths = [-1], [0]
    while len(parents) < num_nodes:
        n = len(parents)
        parent = rng.randrange(max(0, n - 2), n) if rng.random() < 0.75 else rng.randrange(n)
        if depths[parent] < max_depth:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return tree_of(parents, random_tokens(num_nodes, seed + 1, vocab_size))


def tree_of(parents: list[int], tokens: list[int]) -> Tree:
    """The tree with these parents (-1 for the root, parents before children) and tokens."""
    tree = new_tree(len(parents))
    for node, parent in enumerate(parents):
        tree.parents[node] = parent
        if parent >= 0:
            tree.depths[node] = tree.depths[parent] + 1
            tree.paths[node] = tree.paths[parent]
        tree.paths[node, tree.depths[node]] = node
    tree.tokens[:] = torch.tensor(tokens)
    tree.num_nodes[0] = len(parents)
    return tree


def poisoned_cache(
    model: GPT2, num_pages: int, page_size: int = 1, num_sequences: int = 1, shuffle: int | None = None
) -> PagedKVCache:
    """A cache whose every slot outside the null page holds NaN; pages are handed out in random order if asked."""
    return poison(model.new_cache(num_pages, page_size, num_sequences), shuffle)


def poison(cache: PagedKVCache, shuffle: int | None = None) -> PagedKVCache:
    """An empty ``cache`` made as ``poisoned_cache`` describes."""
    cache.k[:, cache.page_size :] = cache.v[:, cache.page_size :] = float("nan")
    if shuffle is not None:
        slots = cache.reserve(cache.num_free_slots).tolist()
        random.Random(shuffle).shuffle(slots)
        cache.release(slots)
    return cache


class Branch(NamedTuple):
    """A tree below a committed text: sequence ``sequence`` of the cache holds ``text``, then comes the root."""

    text: list[int]
    tree: Tree
    sequence: int = 0


def tree_query(cache: PagedKVCache, branch: Branch, node_slots: torch.Tensor) -> Query:
    """The rows of all nodes: the root is appended, nodes that have no slot yet get one (``node_slots`` is filled)."""
    tree, n = branch.tree, int(branch.tree.num_nodes)
    node_slots[1:n] = cache.reserve(n - 1)
    slots = torch.cat([cache.append(1, branch.sequence), node_slots[1:n]])
    query = Query(
        tokens=tree.tokens[:n],
        positions=len(branch.text) + tree.depths[:n],
        sequences=torch.full((n,), branch.sequence, dtype=torch.int32),
        slot_mapping=slots,
        paths=tree.paths[:n],
        node_slots=node_slots,
    )
    return Query(*(column.to(cache.k.device) for column in query))


def new_slots(branch: Branch) -> torch.Tensor:
    """Slots for ``tree_query`` to fill."""
    return torch.full_like(branch.tree.parents, -1)


def joined(one: Query, two: Query) -> Query:
    """Two queries as one; the second's nodes are numbered after the first's."""
    shifted = two._replace(paths=torch.where(two.paths >= 0, two.paths + len(one.node_slots), -1))
    return Query(*(torch.cat(columns) for columns in zip(one, shifted, strict=True)))


def permuted(query: Query, order: torch.Tensor) -> Query:
    """The same rows in another order; row i of the result is row ``order[i]``."""
    return Query(*(column[order] for column in query[:5]), query.node_slots)


def run_tree(model: GPT2, text: list[int], tree: Tree, cache: PagedKVCache | None = None) -> torch.Tensor:
    """Logits [n, V] of all nodes of ``tree`` below ``text``, the root being the next token, in one pass.

    ``cache``, if given, is empty or holds the beginning of ``text``.
    """
    n = int(tree.num_nodes)
    cache = cache or poisoned_cache(model, len(text) + n)
    model.prefill(text[cache.cached_len[0] :], cache)
    query = tree_query(cache, Branch(text, tree), torch.full((n,), -1, dtype=torch.int32))
    return model.logits(model.forward(query, cache))


def decode_paths(
    model: GPT2, text: list[int], tree: Tree, chunk: int = 128, cache: PagedKVCache | None = None
) -> torch.Tensor:
    """Logits [n, V] of all nodes from plain decoding: every path's tokens are committed one by one, N = 1.

    Paths that begin alike share the work: a node continues on a copy of the cache in which its parent was committed.
    ``cache`` as in ``run_tree``.
    """
    n = int(tree.num_nodes)
    cache = cache or model.new_cache(len(text) + DEPTH_LIMIT + 1)
    model.prefill(text[cache.cached_len[0] :], cache, chunk=chunk)
    logits: dict[int, torch.Tensor] = {}

    def visit(node: int, cache: PagedKVCache) -> None:
        logits[node] = model.logits(model.append([int(tree.tokens[node])], cache))
        children = (tree.parents[:n] == node).nonzero().flatten().tolist()
        for child in children:
            visit(child, cache if child == children[-1] else copy.deepcopy(cache))

    visit(0, cache)
    return torch.cat([logits[node] for node in range(n)])


def prepared(
    model: GPT2, branch: Branch, num_pages: int = 200, cache: PagedKVCache | None = None
) -> tuple[Query, PagedKVCache]:
    """The query of the tree's nodes and the cache, prefilled and with slots for them; ``cache`` as in ``run_tree``."""
    cache = cache or poisoned_cache(model, num_pages)
    model.prefill(branch.text[cache.cached_len[0] :], cache)
    return tree_query(cache, branch, new_slots(branch)), cache


def with_nan_token(model: GPT2) -> GPT2:
    """The model with one more token, whose embedding is NaN, and the old output head."""
    nan = torch.full((1, model.config.n_embd), float("nan"), dtype=model.dtype, device=model.device)
    weights = dataclasses.replace(model.weights, wte=torch.cat([model.weights.wte, nan]))
    return GPT2(model.config, weights, model.ops)


def with_junk(query: Query, num_junk: int, nan_token: int) -> Query:
    """The query and ``num_junk`` rows of NaN that write nowhere and stand at random positions of the pass."""
    first = query.positions[:num_junk]
    return Query(
        tokens=torch.cat([query.tokens, torch.full_like(first, nan_token)]),
        positions=torch.cat([query.positions, first]),
        sequences=torch.cat([query.sequences, torch.zeros_like(first)]),
        slot_mapping=torch.cat([query.slot_mapping, torch.full_like(first, -1)]),
        paths=torch.cat([query.paths, query.paths.new_full((num_junk, query.paths.shape[1]), -1)]),
        node_slots=query.node_slots,
    )


def speculate(model: GPT2, branch: Branch, cache: PagedKVCache, rng: random.Random) -> list[int]:
    """Score a tree, commit the path to a random node, release the rest: the tokens that became text."""
    tree, node_slots = branch.tree, new_slots(branch)
    model.forward(tree_query(cache, branch, node_slots), cache)
    deep = (tree.depths >= tree.depths.max() // 2).nonzero().flatten().tolist()
    path = [node for node in tree.paths[rng.choice(deep)].tolist() if node >= 0]
    cache.commit(node_slots[path[1:]].tolist())
    cache.release([slot for node, slot in enumerate(node_slots.tolist()) if slot >= 0 and node not in path])
    return tree.tokens[path].tolist()


def assert_same_rows(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """torch.equal, with the rows that differ in the message. NaN is never equal."""
    if torch.equal(actual, expected):
        return
    rows = (actual != expected).any(1).nonzero().flatten().tolist()
    error = (actual.double() - expected.double()).abs().max()
    raise AssertionError(f"{len(rows)} of {len(actual)} rows differ, first {rows[:8]}, max error {error:.3g}")


class Hearing:
    """A streamer that keeps the tokens after the prompt."""

    def __init__(self):
        self.tokens, self.ended, self._is_prompt = [], False, True

    def put(self, value):
        if not self._is_prompt:
            self.tokens += value.tolist()
        self._is_prompt = False

    def end(self):
        self.ended = True
