"""What a pass starts from, worked by hand and run on both backends: the state before the first iteration, and the rows
that a stage runs from then on. The tree and the caches are those of ``worked_iteration``."""

import pytest
import torch

from kernels import reference
from kernels.layout import EOS_CAPACITY, RECORD, RUNNING
from tests.worked_iteration import CONTEXT, DRAFT, Pass, has, home, int32, pass_rows, state

pytestmark = pytest.mark.usefixtures("hostile_scratch")


def test_new_progress(ops):
    progress = ops.new_progress([5, 6, 7], 9, 4, [2**30, 5, 20], (3, 8), home(ops))
    assert progress.text.tolist() == [5, 6, 7] + [0] * 18
    assert progress.length.tolist() == [3] and progress.end.tolist() == [9]
    assert progress.reach[:, 0].tolist() == [3, 2, 4], "a node's child is one deeper; 5 positions end 2 below the root"
    assert progress.contexts.tolist() == [2**30, 5, 20] and progress.max_depth.tolist() == [4]
    assert progress.eos.tolist() == [3, 8] + [-1] * (EOS_CAPACITY - 2) and progress.state.tolist() == [RUNNING]
    assert progress.record.tolist() == [0] * RECORD
    assert {column.dtype for column in progress} == {torch.int32}


@pytest.mark.parametrize(
    ("end", "contexts", "reach"),
    [
        (4, [99, 99, 99], [-1, -1, 0]),  # one token to draw: the oracle scores the root, nobody proposes
        (6, [99, 99, 99], [1, 1, 2]),
        (30, [99, 3, 99], [7, 0, 8]),  # the draft can be fed the root alone
        (30, [99, 2, 99], [7, -1, 8]),  # the text has outgrown the draft
    ],
)
def test_reach_at_the_start(end, contexts, reach):
    assert reference.new_progress([5, 6, 7], end, 8, contexts, ()).reach[:, 0].tolist() == reach


def test_no_eos_is_no_token():
    assert reference.new_progress([5], 9, 4, [9], ()).eos.tolist() == [-1] * EOS_CAPACITY


def test_shapes_do_not_depend_on_the_generation():
    """What a captured iteration is to find in place: one shape for every prompt, length and usual number of eos ids."""
    states = [
        reference.new_progress(prompt, end, 8, [99, 50], eos)
        for prompt, end, eos in (([1], 2, ()), ([5] * 50, 51, (3,)), ([5, 6], 40, tuple(range(EOS_CAPACITY))))
    ]
    assert len({tuple(column.shape for column in state) for state in states}) == 1


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, 2**32, 2**63 + 11, 2**64 - 1])
def test_seed_words(seed, ops):
    words = ops.new_seed(seed, home(ops))
    assert words.dtype == torch.int32 and words.shape == (2,)
    assert reference.seed_number(words) == seed


def test_prompt_that_fills_the_context():
    """The last token of the context has no position after it: the text holds one more token than positions."""
    progress = reference.new_progress([5] * 8, 9, 4, [8], ())
    assert len(progress.text) == 9 and progress.reach[:, 0].tolist() == [0]


def test_new_chain(ops):
    """Tables of different lengths, padded to rows of 16 numbers; no node is cached."""
    tables, slots = [int32(*range(1, 18)), int32(4, 5, 6)], [int32(18, 19), int32(7, 8)]
    chain = ops.new_chain(tables, slots, [2, 3], home(ops))
    assert chain.page_tables.tolist() == [[*range(1, 18)] + [0] * 15, [4, 5, 6] + [0] * 29]
    assert chain.node_slots.tolist() == [[18, 19], [7, 8]] and chain.cached.tolist() == [[0, 0], [0, 0]]
    assert chain.cached_len.tolist() == [2, 3]
    assert all(column.dtype == torch.int32 and column.device.type == home(ops) for column in chain)


def test_rows_that_catch_up(ops):
    """The draft has seen position 0: two committed tokens, the root the last of them, then the nodes."""
    given = state(ops, cached_lens=(1, 3), draft_has=())
    assert pass_rows(ops, given, [0, 1, 2]) == Pass(
        tokens=[2, 7, 10, 20],
        positions=[1, 2, 3, 3],
        slots=[101, 102, 121, 122],
        paths=[[0, 1], [0, 2]],
        nodes=[0, 1, 2],
        row_of=[1, 2, 3],
        draw_positions=[3, 4, 4],
    )
    assert has(given.chain, 0) == [1, 2] and given.chain.cached_len.tolist() == [3, 3]


def test_rows_below_a_cached_root(ops):
    """No head. Node 2 is an ancestor that only a higher stage has run: it gets a row and no draw."""
    given = state(ops, draft_has=(1,))
    assert pass_rows(ops, given, [3, 6], num_head=0) == Pass(
        tokens=[20, 30, 10],
        positions=[3, 4, 4],
        slots=[122, 123, 126],
        paths=[[0, 2], [0, 1, 3], [0, 2, 6]],
        nodes=[3, 6],
        row_of=[1, 2],
        draw_positions=[5, 5],
    )
    assert has(given.chain, 0) == [1, 2, 3, 6]
    assert has(given.chain, 1) == [1, 2, 3, 4, 5, 6], "the other cache is left alone"


def test_rows_of_nodes_already_run(ops):
    """Everything on the path has its K/V: only the deepest node has a row."""
    given = state(ops, draft_has=(1, 3))
    assert pass_rows(ops, given, [5], num_head=0) == Pass([50], [5], [125], [[0, 1, 3, 5]], [5], [0], [6])


def test_rows_without_room(ops):
    """Nodes 3, 4, 6 need five rows, there are three: 4 and 6 are dropped, the ancestor 2 has come in before them."""
    given = state(ops, draft_has=())
    assert pass_rows(ops, given, [3, 4, 6], num_head=0, num_rows=3) == Pass(
        tokens=[10, 20, 30],
        positions=[3, 3, 4],
        slots=[121, 122, 123],
        paths=[[0, 1], [0, 2], [0, 1, 3]],
        nodes=[3],
        row_of=[2],
        draw_positions=[5],
    )
    assert has(given.chain, 0) == [1, 2, 3]


@pytest.mark.parametrize("nodes", [[], [0, 1, 3]])
def test_rows_of_a_stage_out_of_reach(nodes, ops):
    """A negative reach: no row, no node, and the cache stays where it is."""
    given = state(ops, contexts=(2**30, 2, CONTEXT), cached_lens=(1, 3))
    assert given.progress.reach[DRAFT, 0] == -1
    assert pass_rows(ops, given, nodes) == Pass([], [], [], [], [], [], [])
    assert given.chain.cached_len.tolist() == [1, 3] and has(given.chain, 0) == [1, 3]


def test_rows_without_nodes(ops):
    """Nothing to score: the committed tokens are still caught up with."""
    given = state(ops, cached_lens=(2, 3))
    assert pass_rows(ops, given, []) == Pass([7], [2], [102], [], [], [], [])
    assert given.chain.cached_len.tolist() == [3, 3]


def test_rows_of_the_other_cache(ops):
    given = state(ops, cached_lens=(3, 2), oracle_has=())
    assert pass_rows(ops, given, [0, 2], num_head=1, cache=1).slots == [202, 222]
    assert has(given.chain, 1) == [2] and has(given.chain, 0) == [1, 3]


def test_more_to_catch_up_with_than_room():
    given = state(reference, cached_lens=(0, 3))
    with pytest.raises(AssertionError, match="3 committed tokens to catch up with, room for 2"):
        pass_rows(reference, given, [0], num_head=2)


@pytest.mark.parametrize("node", [0, 3], ids=["root", "node"])
def test_a_node_that_has_its_keys_and_values_already(node):
    """It has no row, so it cannot be scored again; whoever asks for it has lost count."""
    with pytest.raises(AssertionError, match="whose K/V the cache has already"):
        pass_rows(reference, state(reference), [node])


def test_none_among_the_nodes_is_left_out():
    """The twins need no -1 for padding, and take none for a node."""
    assert pass_rows(reference, state(reference), [2, -1]) == pass_rows(reference, state(reference), [2])
