"""The contract of bit-exactness: verification is bit for bit the computation of plain decoding.

For one device, dtype, backend and thread count, the logits row of a query token depends only on its own path: not on
the number of rows, not on the other rows or their order, not on the tree, not on where its K/V lies, not on how many
of its ancestors are committed. So a tree pass returns, at every node, the bits that decoding the node's path token by
token returns, and text drawn from them is the text of plain decoding. Compared with torch.equal, never a tolerance.

The side under test always starts from a cache whose free slots hold NaN: a read of anything unwritten shows.
"""

import functools
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.layout import DEPTH_LIMIT
from kernels.reference import exponential, gumbel_noise, noise, sampling
from kernels.reference.compiled import compiled
from kernels.reference.epilogue import ACTIVATIONS, elementwise
from model.gpt2 import GPT2, Query
from tests.helpers import (
    LENGTHS,
    SIZES,
    Branch,
    assert_same_rows,
    decode_paths,
    joined,
    new_slots,
    permuted,
    poisoned_cache,
    prepared,
    random_tokens,
    random_tree,
    run_tree,
    speculate,
    tiny_gpt2,
    tree_of,
    tree_query,
    with_junk,
    with_nan_token,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SMALL = {"n_layer": 1, "n_head": 1}
MEDIUM = {"n_layer": 2, "n_head": 3}
LARGE = {"n_layer": 1, "n_head": 20}  # the width of GPT-2 Large: torch threads its operations, K reaches 5120


@functools.cache
def example(dtype: torch.dtype, length: int = 150) -> tuple[GPT2, Branch, torch.Tensor]:
    """A model, a tree of 40 nodes below ``length`` tokens, and its logits from plain decoding, computed once.

    The tree's rows lie on both sides of position 160, where the first shared window fills.
    """
    model = tiny_gpt2(dtype, **MEDIUM)
    branch = Branch(random_tokens(length), random_tree(40, seed=14))
    return model, branch, decode_paths(model, *branch[:2])


@functools.cache
def one_by_one(dtype: torch.dtype, length: int) -> torch.Tensor:
    """Logits of ``random_tokens(length)`` from passes of one row."""
    model = tiny_gpt2(dtype, **MEDIUM)
    return model.logits(model.prefill(random_tokens(length), model.new_cache(length), chunk=1))


@DTYPES
@pytest.mark.parametrize("num_nodes", SIZES)
def test_number_of_rows(dtype, num_nodes):
    """Any number of nodes: two layers, three heads, rows on both sides of the tail borders at 48 and 64."""
    model, text, tree = tiny_gpt2(dtype, **MEDIUM), random_tokens(42), random_tree(num_nodes, seed=3)
    assert_same_rows(run_tree(model, text, tree), decode_paths(model, text, tree))


@DTYPES
@pytest.mark.parametrize("num_nodes", [1, 5, 23])
def test_blocks_of_one_shape(dtype, num_nodes, monkeypatch):
    """As attention runs on a GPU without Triton: every block padded to the same rows, and the same results nearly."""
    model, text, tree = tiny_gpt2(dtype, **MEDIUM), random_tokens(150), random_tree(num_nodes, seed=3)
    usual = run_tree(model, text, tree)
    monkeypatch.setattr(sys.modules["kernels.reference.route"], "one_shape", lambda device: True)
    assert_same_rows(run_tree(model, text, tree), decode_paths(model, text, tree))
    torch.testing.assert_close(run_tree(model, text, tree), usual, rtol=0.05, atol=0.05)


@DTYPES
@pytest.mark.parametrize("length", LENGTHS)
def test_length_of_the_text(dtype, length):
    """Any number of committed tokens; plain decoding prefills them in chunks of another size."""
    model, text, tree = tiny_gpt2(dtype, **SMALL), random_tokens(length), random_tree(40, seed=length)
    assert_same_rows(run_tree(model, text, tree), decode_paths(model, text, tree, chunk=7))


@DTYPES
@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(dtype, seed):
    """Random tree, random number of nodes, random length: what the two tests above do not combine."""
    rng = random.Random(seed)
    text, tree = random_tokens(rng.randrange(300), seed), random_tree(rng.randrange(1, 129), seed)
    model = tiny_gpt2(dtype, **SMALL)
    assert_same_rows(run_tree(model, text, tree), decode_paths(model, text, tree))


@DTYPES
@pytest.mark.parametrize("length", [12, 130])
def test_deepest_chain(dtype, length):
    """A chain down to DEPTH_LIMIT, the deepest there is: the tail of its last row begins at or below the root."""
    chain = tree_of(list(range(-1, DEPTH_LIMIT)), random_tokens(DEPTH_LIMIT + 1, seed=5))
    model, text = tiny_gpt2(dtype, **SMALL), random_tokens(length)
    assert_same_rows(run_tree(model, text, chain), decode_paths(model, text, chain))


@DTYPES
def test_width_of_gpt2_large(dtype):
    """20 heads of 64: products so large that libraries choose other algorithms for other numbers of rows."""
    model, text, tree = tiny_gpt2(dtype, **LARGE), random_tokens(150), random_tree(40, seed=14)
    assert_same_rows(run_tree(model, text, tree), decode_paths(model, text, tree))


@DTYPES
@pytest.mark.parametrize("n_inner", [16, 48, 80, 96, 100, 4096])
def test_width_of_the_mlp(dtype, n_inner):
    """Any n_inner, also where a row ends inside a vector of the activation or one call takes few rows."""
    model, text = tiny_gpt2(dtype, **SMALL, n_inner=n_inner), random_tokens(20)
    tree = random_tree(40, seed=14)
    assert_same_rows(run_tree(model, text, tree), decode_paths(model, text, tree))


@DTYPES
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shuffle", [None, 0], ids=["pages-in-order", "pages-shuffled"])
def test_place_of_keys_and_values(dtype, page_size, shuffle):
    """Neither the page size nor which pages a sequence got changes a bit."""
    model, branch, expected = example(dtype)
    cache = poisoned_cache(model, 200, page_size, shuffle=shuffle)
    assert_same_rows(run_tree(model, branch.text, branch.tree, cache), expected)


@DTYPES
def test_order_of_rows(dtype):
    """Rows in random order, children before parents included."""
    model, branch, expected = example(dtype)
    query, cache = prepared(model, branch)
    order = torch.randperm(40)
    assert_same_rows(model.logits(model.forward(permuted(query, order), cache)), expected[order])


@DTYPES
@pytest.mark.parametrize("num_rows", [1, 15, 16, 33])
def test_other_rows(dtype, num_rows):
    """Any subset of the rows, whose ancestors have their K/V from an earlier pass, has the bits of the whole pass."""
    model, branch, expected = example(dtype)
    query, cache = prepared(model, branch)
    model.forward(query, cache)
    rows = torch.randperm(40)[:num_rows]
    assert_same_rows(model.logits(model.forward(permuted(query, rows), cache)), expected[rows])


@DTYPES
def test_tree_grown_over_passes(dtype):
    """Nodes scored in several passes, each on top of the K/V of those before, as the rounds of a draft do it."""
    model, branch, expected = example(dtype)
    query, cache = prepared(model, branch)
    passes = [permuted(query, rows) for rows in torch.arange(40).split([1, 2, 20, 17])]
    assert_same_rows(torch.cat([model.logits(model.forward(part, cache)) for part in passes]), expected)


@DTYPES
@pytest.mark.parametrize("num_junk", [1, 7, 30])
def test_junk_in_padding_rows(dtype, num_junk):
    """Padding rows (slot -1) full of NaN, anywhere between live rows, reach no live row and no slot.

    Every slot of the cache is in use, the last one too, which is what -1 would index.
    """
    model, branch, expected = example(dtype)
    query, cache = prepared(model, branch, num_pages=190)
    assert cache.num_free_pages == 0
    order = torch.randperm(40 + num_junk)
    padded = permuted(with_junk(query, num_junk, model.config.vocab_size), order)
    model = with_nan_token(model)
    logits = model.logits(model.forward(padded, cache))
    assert logits[order >= 40].isnan().all(), "the junk rows should show that they were junk"
    assert_same_rows(logits[order.argsort()][:40], expected)
    cache.check()


@DTYPES
@pytest.mark.parametrize("lag", [1, 15, 32])
def test_committed_rows_at_the_head(dtype, lag):
    """Committed tokens that the cache has not seen go in front of the tree, as in a stage that lags behind."""
    model, branch, expected = example(dtype)
    cache = poisoned_cache(model, 200)
    model.prefill(branch.text[:-lag], cache)
    start = cache.cached_len[0]
    slots = cache.append(lag)
    head = model.committed_rows(branch.text[-lag:], torch.arange(start, start + lag, dtype=torch.int32), slots)
    tree = tree_query(cache, branch, new_slots(branch))
    head = head._replace(paths=head.paths.expand(-1, tree.paths.shape[1]))
    both = Query(*(torch.cat(columns) for columns in zip(head[:5], tree[:5], strict=True)), tree.node_slots)
    assert_same_rows(model.logits(model.forward(both, cache))[lag:], expected)


@DTYPES
@pytest.mark.parametrize("num_committed", [0, 1, 16, 31])
def test_number_of_committed_ancestors(dtype, num_committed):
    """The same tokens, some committed and the rest nodes of a chain: the border between them leaves no trace."""
    model, text = tiny_gpt2(dtype, **MEDIUM), random_tokens(170)
    chain = tree_of(list(range(-1, 31 - num_committed)), text[138 + num_committed :])
    logits = run_tree(model, text[: 138 + num_committed], chain)
    assert_same_rows(logits, one_by_one(dtype, 170)[138 + num_committed :])


@DTYPES
@pytest.mark.parametrize("page_size", [1, 16])
def test_two_sequences_in_one_pass(dtype, page_size):
    """Rows of two sequences of different length, mixed in one pass, have the bits of each alone."""
    model = tiny_gpt2(dtype, **MEDIUM)
    branches = [Branch(random_tokens(21), random_tree(20, 1), 0), Branch(random_tokens(170, 1), random_tree(25, 2), 1)]
    cache = poisoned_cache(model, 300, page_size, num_sequences=2, shuffle=1)
    for branch in branches:
        model.prefill(branch.text, cache, branch.sequence)
    both = joined(*(tree_query(cache, branch, new_slots(branch)) for branch in branches))
    order = torch.randperm(45)
    expected = torch.cat([decode_paths(model, branch.text, branch.tree) for branch in branches])
    assert_same_rows(model.logits(model.forward(permuted(both, order), cache)), expected[order])


@DTYPES
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_commit_leaves_no_trace(dtype, page_size):
    """After iterations of tree, commit and release the cache goes on like one that has never speculated.

    Hidden states are compared, before the final norm, so that nothing is rounded away.
    """
    model, text = tiny_gpt2(dtype, **MEDIUM), random_tokens(130)
    cache = poisoned_cache(model, 300, page_size, shuffle=2)
    model.prefill(text, cache)
    for seed in range(4):
        branch = Branch(text, random_tree(50, seed))
        text = text + speculate(model, branch, cache, random.Random(seed))
        cache.check()
    later = random_tokens(20, seed=9)
    plain = model.prefill(text + later, model.new_cache(len(text) + 20))
    assert cache.cached_len[0] == len(text)
    assert_same_rows(torch.cat([model.append([token], cache) for token in later]), plain[len(text) :])


@pytest.mark.parametrize(
    ("length", "chunk", "passes"),
    [
        (5, 128, [5]),
        (300, 128, [128, 128, 44]),
        (300, 512, [256, 44]),
        (129, 512, [128, 1]),
        (384, 200, [128, 128, 128]),
        (900, 300, [256, 256, 256, 128, 4]),
    ],
)
def test_passes_of_a_prefill(length, chunk, passes, monkeypatch):
    """More than 128 rows come in multiples of 128, so that on the GPU, where such passes have tiles of their own, the
    tiles of a position follow from its distance to the end."""
    model, sizes = tiny_gpt2(**SMALL), []

    def append(tokens, cache, sequence):
        sizes.append(len(tokens))
        return torch.zeros(len(tokens), model.config.n_embd)

    monkeypatch.setattr(model, "append", append)
    model.prefill(random_tokens(length), None, chunk=chunk)
    assert sizes == passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [16, 48, 64, 80, 96, 100, 256, 4096, 5120])
@pytest.mark.parametrize("name", ["gelu_tanh", "gelu"])
def test_activation_of_a_row(name, width, dtype):
    """The activation of a row, computed as the forward pass does, has the same bits alone and at every place."""
    x = (3 * torch.randn(33, width)).to(dtype)
    alone = [elementwise(ACTIVATIONS[name], row.clone()) for row in x.split(1)]
    assert_same_rows(elementwise(ACTIVATIONS[name], x), torch.cat(alone))


exponential_of = exponential.exp


@compiled
def loop_of_exp(x):
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = exponential_of(x[i])
    return y


@pytest.mark.parametrize(
    "function",
    [
        lambda x: sampling.exp(torch.from_numpy(x)).numpy(),
        loop_of_exp,
        lambda x: noise.keyed_noise(5, 7, np.int64(-x), np.int64(-1e8 * x)),
    ],
    ids=["exp", "loop", "noise"],
)
def test_element_wise_functions(function):
    """exp (top-p, softmax) and the noise of an element do not depend on its place, in a vector's body or tail."""
    x = -20 * np.random.default_rng(0).random(4096, dtype=np.float32)
    whole = function(x)
    for start in range(40):
        for length in (1, 3, 16, 17, 31, 48, 97):
            piece = slice(start, start + length)
            assert (function(x[piece] + 0) == whole[piece]).all(), f"{length} elements from {start}"


def test_noise_of_a_token():
    """Noise of the whole vocabulary, of a few survivors and of one token: the same bits for the same token."""
    positions, ids = torch.arange(5)[:, None], torch.arange(50257)[None]
    everyone = gumbel_noise(7, positions, ids)
    for survivors in (torch.tensor([[50256]]), torch.randperm(50257)[None, :66], torch.randperm(50257)[None, :1001]):
        assert torch.equal(gumbel_noise(7, positions, survivors), everyone[:, survivors[0]])


@DTYPES
def test_layer_norm_of_a_row(dtype):
    """Layer norm of a row has the same bits alone and among others, at the widths of every GPT-2."""
    for width in (64, 192, 768, 1024, 1280, 1600):
        x, weight, bias = torch.randn(33, width).to(dtype), torch.randn(width).to(dtype), torch.randn(width).to(dtype)
        alone = [F.layer_norm(row, (width,), weight, bias) for row in x.split(1)]
        assert_same_rows(F.layer_norm(x, (width,), weight, bias), torch.cat(alone))


def test_a_cache_of_another_dtype_is_refused():
    """K and V are written as bits, so it would hold garbage."""
    model, cache = tiny_gpt2(torch.bfloat16), tiny_gpt2(torch.float32).new_cache(8)
    with pytest.raises(AssertionError, match="a cache in torch.float32 for a model in torch.bfloat16"):
        model.prefill([1, 2, 3], cache)
