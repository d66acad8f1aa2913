"""The contract of tests/test_bit_exact.py on the Triton backend: a tree pass has, at every node, the bits of decoding
the node's path token by token.

Small models in the interpreter, the same tests on GPT-2 Large's width where there is a GPU. What could break the
contract on a GPU, and the test that would show it, here, in test_gpu_kernels (K) or in test_gpu_repeatable (R):

 1  another matrix instruction for more rows            number_of_rows: 1 to 128 rows in tiles of one size
 2  a binary specialised on the number of rows          number_of_rows (1, 2, 7, 16, ... select other ones)
 3  tiles chosen by timing                              R: another_process; tiles come from a table
 4  tiles, warps or stages that follow the rows         number_of_rows, sizes_of_passes
 5  split sums in the order of arrival                  R: reversed_programs, K: order_of_programs, linear_tiles
 6  attention cut by length or number of nodes          length_of_the_text, committed_ancestors, two_sequences
 7  dead lanes that are not exactly zero                every test: free slots and scratch hold NaN; junk_rows
 8  a path's keys in other lanes than after commit      place_of_keys_and_values, commit_leaves_no_trace
 9  another grouping of the same sum                    length_of_the_text, committed_ancestors: all borders
10  neighbours in a tile                                order_of_rows, other_rows, junk_rows
11  a key that changes from tail to window              length_of_the_text: rows from both sides of every border
12  reductions that follow warps and widths             fixed tiles; K: linear_tiles, attention_tiles
13  contraction that differs between kernels            one kernel for one row and for many: number_of_rows
14  tf32                                                K: operation_is_its_twin, in float32
15  the same launch twice, other bits                   K: repeated_launches, R: repeated_passes
16  reads before a neighbour's stores are visible       R: repeated_passes, K: repeated_launches
17  a library's product on one path only                every test: whole passes, output head included
18  ties                                                tests of the sampler
19  another generation of GPU                           not claimed; no golden bits are stored
20  prefill against decoding                            sizes_of_passes, prefill_of_more_rows
"""

import functools
import random

import pytest
import torch

from kernels.layout import DEPTH_LIMIT, MAX_ROWS
from model.gpt2 import Query
from tests.bit_exact_models import NUM_SLOTS, example, holding, model_of, prepared_example, shapes
from tests.gpu_helpers import HALVES
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
    random_tokens,
    random_tree,
    run_tree,
    speculate,
    tree_of,
    tree_query,
    with_junk,
    with_nan_token,
)
from tests.interpreter import INTERPRETING

pytestmark = pytest.mark.usefixtures("hostile_scratch")
# In the interpreter one will do: what a row meets is the same in each, and operations are tested in both.
WHOLE = [] if INTERPRETING else [pytest.param(torch.float32, id="float32")]
DTYPES = pytest.mark.parametrize("dtype", [*WHOLE, *HALVES])


def same_as_decoding(shape: str, dtype: torch.dtype, length: int, tree) -> None:
    """Assert the contract for ``tree`` below ``random_tokens(length)``."""
    model, text = model_of(shape, dtype), random_tokens(length)
    expected = decode_paths(model, text, tree, cache=holding(shape, dtype, length))
    assert_same_rows(run_tree(model, text, tree, holding(shape, dtype, length)), expected)


@functools.cache
def tree_of_128(shape: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits of 128 nodes below 42 tokens from plain decoding; the first n of them are a tree of their own."""
    return decode_paths(
        model_of(shape, dtype), random_tokens(42), random_tree(128, seed=3), cache=holding(shape, dtype, 42)
    )


@DTYPES
@shapes("small")
@pytest.mark.parametrize("num_nodes", SIZES)
def test_number_of_rows(num_nodes, shape, dtype):
    """Any number of nodes, with rows on both sides of the tail borders at 48 and 64."""
    logits = run_tree(
        model_of(shape, dtype), random_tokens(42), random_tree(num_nodes, seed=3), holding(shape, dtype, 42)
    )
    assert_same_rows(logits, tree_of_128(shape, dtype)[:num_nodes])


@DTYPES
@shapes("small")
@pytest.mark.parametrize("length", LENGTHS)
def test_length_of_the_text(length, shape, dtype):
    """Any number of committed tokens; plain decoding reaches them in passes of another size."""
    same_as_decoding(shape, dtype, length, random_tree(5, seed=length))


@DTYPES
@shapes("small")
@pytest.mark.parametrize("seed", range(2))
def test_random_shapes(seed, shape, dtype):
    """Random tree, random number of nodes, random length."""
    rng = random.Random(seed)
    num_nodes = rng.randrange(1, 129 if shape == "large" else 16)
    same_as_decoding(shape, dtype, rng.randrange(300), random_tree(num_nodes, seed))


@DTYPES
@shapes("small")
@pytest.mark.parametrize("num_committed", [0, 1, 16, 31])
def test_committed_ancestors(num_committed, shape, dtype):
    """The same tokens, the first committed and the rest nodes of a chain down to DEPTH_LIMIT: the border between them
    leaves no trace."""
    text = random_tokens(131 + DEPTH_LIMIT)
    length = 130 + num_committed
    chain = tree_of(list(range(-1, DEPTH_LIMIT - num_committed)), text[length:])
    logits = run_tree(model_of(shape, dtype), text[:length], chain, holding(shape, dtype, 130))
    assert_same_rows(logits, one_by_one(shape, dtype)[num_committed:])


@functools.cache
def one_by_one(shape: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the DEPTH_LIMIT + 1 tokens after the first 130 from passes of one row."""
    model, cache = model_of(shape, dtype), holding(shape, dtype, 130)
    return torch.cat([model.logits(model.append([t], cache)) for t in random_tokens(131 + DEPTH_LIMIT)[130:]])


@DTYPES
@shapes("small")
@pytest.mark.parametrize(
    ("page_size", "shuffle"), [(1, None), (16, None), (16, 0)], ids=["in-order-1", "in-order-16", "shuffled-16"]
)
def test_place_of_keys_and_values(page_size, shuffle, shape, dtype):
    """Neither the page size nor which pages a sequence got changes a bit; elsewhere here, pages of 1 are shuffled."""
    model, branch, expected = example(shape, dtype)
    cache = poisoned_cache(model, NUM_SLOTS // page_size, page_size, shuffle=shuffle)
    assert_same_rows(run_tree(model, branch.text, branch.tree, cache), expected)


@DTYPES
@shapes("two layers")
def test_order_of_rows(shape, dtype):
    """Rows in random order, children before parents included."""
    model, _, expected = example(shape, dtype)
    query, cache = prepared_example(shape, dtype)
    order = torch.randperm(17)
    assert_same_rows(model.logits(model.forward(permuted(query, order), cache)), expected[order])


@DTYPES
@shapes("two layers")
@pytest.mark.parametrize("num_rows", [1, 15])
def test_other_rows(num_rows, shape, dtype):
    """Any subset of the rows, whose ancestors have their K/V from an earlier pass, has the bits of the whole pass."""
    model, _, expected = example(shape, dtype)
    query, cache = prepared_example(shape, dtype)
    model.forward(query, cache)
    rows = torch.randperm(17)[:num_rows]
    assert_same_rows(model.logits(model.forward(permuted(query, rows), cache)), expected[rows])


@DTYPES
@shapes("two layers")
def test_tree_grown_over_passes(shape, dtype):
    """Nodes scored in several passes, each on top of the K/V of those before, as the rounds of a draft do it."""
    model, _, expected = example(shape, dtype)
    query, cache = prepared_example(shape, dtype)
    passes = [permuted(query, rows) for rows in torch.arange(17).split([1, 2, 14])]
    assert_same_rows(torch.cat([model.logits(model.forward(part, cache)) for part in passes]), expected)


@DTYPES
@shapes("two layers")
@pytest.mark.parametrize("num_junk", [1, 7])
def test_junk_rows(num_junk, shape, dtype):
    """Rows full of NaN that write nowhere (slot -1), anywhere between live rows, reach no live row and no slot."""
    model, _, expected = example(shape, dtype)
    query, cache = prepared_example(shape, dtype)
    order = torch.randperm(17 + num_junk)
    padded = permuted(with_junk(query, num_junk, model.config.vocab_size), order)
    model = with_nan_token(model)
    logits = model.logits(model.forward(padded, cache))
    assert logits[order >= 17].isnan().all(), "the junk rows should show that they were junk"
    assert_same_rows(logits[order.argsort()][:17], expected)
    cache.check()


@DTYPES
@shapes("two layers")
@pytest.mark.parametrize("lag", [1, 32])
def test_committed_rows_at_the_head(lag, shape, dtype):
    """Committed tokens that the cache has not seen go in front of the tree, as in a stage that lags behind."""
    model, branch, expected = example(shape, dtype)
    cache = holding(shape, dtype, 150 - lag)
    slots = cache.append(lag)
    head = model.committed_rows(branch.text[-lag:], torch.arange(150 - lag, 150, dtype=torch.int32), slots)
    tree = tree_query(cache, branch, new_slots(branch))
    head = head._replace(paths=head.paths.expand(-1, tree.paths.shape[1]))
    both = Query(*(torch.cat(columns) for columns in zip(head[:5], tree[:5], strict=True)), tree.node_slots)
    assert_same_rows(model.logits(model.forward(both, cache))[lag:], expected)


@DTYPES
@shapes("small")
@pytest.mark.parametrize("page_size", [1, 16])
def test_two_sequences_in_one_pass(page_size, shape, dtype):
    """Rows of two sequences of different length, mixed in one pass, have the bits of each alone."""
    model = model_of(shape, dtype)
    branches = [Branch(random_tokens(21), random_tree(7, 1), 0), Branch(random_tokens(170), random_tree(11, 2), 1)]
    cache = poisoned_cache(model, NUM_SLOTS // page_size, page_size, num_sequences=2, shuffle=1)
    for branch in branches:
        model.prefill(branch.text, cache, branch.sequence)
    both = joined(*(tree_query(cache, branch, new_slots(branch)) for branch in branches))
    order = torch.randperm(18)
    expected = torch.cat(
        [decode_paths(model, b.text, b.tree, cache=holding(shape, dtype, len(b.text))) for b in branches]
    )
    assert_same_rows(model.logits(model.forward(permuted(both, order), cache)), expected[order])


@DTYPES
@shapes("small")
@pytest.mark.parametrize("page_size", [1, 16])
def test_commit_leaves_no_trace(page_size, shape, dtype):
    """After iterations of tree, commit and release the cache goes on like one that has never speculated.

    Hidden states are compared, before the final norm, so that nothing is rounded away.
    """
    model, text = model_of(shape, dtype), random_tokens(150)
    cache = poisoned_cache(model, NUM_SLOTS // page_size, page_size, shuffle=2)
    model.prefill(text, cache)
    for seed in range(3):
        branch = Branch(text, random_tree(17, seed))
        text = text + speculate(model, branch, cache, random.Random(seed))
        cache.check()
    assert cache.cached_len[0] == len(text) > 160
    later = random_tokens(4, seed=9)
    plain = model.prefill(text[150:] + later, holding(shape, dtype, 150))
    assert_same_rows(torch.cat([model.append([token], cache) for token in later]), plain[-4:])


@DTYPES
@shapes("two layers")
def test_sizes_of_passes(shape, dtype):
    """A text committed in passes of any size up to 128 rows leaves the same hidden states, keys and values."""
    model, text, start = model_of(shape, dtype), random_tokens(52), 33
    whole = holding(shape, dtype, start)
    expected = model.prefill(text[start:], whole, chunk=MAX_ROWS)
    for chunk in (1, 7):
        cache = holding(shape, dtype, start)
        assert_same_rows(model.prefill(text[start:], cache, chunk=chunk), expected)
        assert torch.equal(cache.k[:, cache.slots(0, 52)], whole.k[:, whole.slots(0, 52)])
        assert torch.equal(cache.v[:, cache.slots(0, 52)], whole.v[:, whole.slots(0, 52)])


@DTYPES
@shapes("small")
def test_prefill_of_more_rows(shape, dtype):
    """A pass of 384 rows begins with the bits of a pass of 256: prompts may share what they have in common."""
    model, tokens = model_of(shape, dtype), random_tokens(384)
    long, short = (model.prefill(tokens[:n], poisoned_cache(model, n)) for n in (384, 256))
    assert_same_rows(long[:256], short)
