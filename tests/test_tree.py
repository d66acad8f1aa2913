"""The tree operations: cases worked by hand.

The tree of most cases below, token and edge score beside each node's index:

    0 root 7 ── 1 "10" -0.5 ── 3 "30" -0.25 ── 5 "50" -1.0
             │              └─ 4 "40" -2.0
             └─ 2 "20" -1.0 ── 6 "10" -0.125
"""

import math

import pytest
import torch

from kernels.layout import DEPTH_LIMIT
from kernels.reference import insert_children, new_tree, reroot, select_nodes, verify
from tests.test_tree_invariants import check_invariants, path_of

NO_EOS = ()
NEVER = -math.inf


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def insert(tree, stage: int, children: dict[int, dict[int, float]], max_depth: int = 8) -> None:
    """``insert_children`` from {node: {token: edge score}}; shorter rows are padded with score -inf."""
    width = max(map(len, children.values()))
    tokens = [[*row, *[0] * (width - len(row))] for row in children.values()]
    scores = [[*row.values(), *[NEVER] * (width - len(row))] for row in children.values()]
    insert_children(tree, stage, int32(*children), int32(*tokens), torch.tensor(scores), max_depth)


def rooted(capacity: int = 16, root: int = 7):
    tree = new_tree(capacity)
    reroot(tree, -1, root)
    return tree


@pytest.fixture
def tree():
    """The tree of the module docstring, all of it proposed by stage 0."""
    tree = rooted()
    insert(tree, 0, {0: {10: -0.5, 20: -1.0}})
    insert(tree, 0, {1: {30: -0.25, 40: -2.0}})
    insert(tree, 0, {3: {50: -1.0}, 2: {10: -0.125}})
    return tree


def live(column: torch.Tensor, tree) -> list:
    return column[: int(tree.num_nodes)].tolist()


# --- building


def test_fresh_tree_is_a_root_alone():
    tree = rooted(root=7)
    assert live(tree.tokens, tree) == [7]
    assert live(tree.parents, tree) == [-1]
    assert live(tree.depths, tree) == live(tree.path_scores, tree) == [0]
    assert live(tree.scored, tree) == [-1]
    assert path_of(tree, 0) == [0]


def test_inserted_children_are_numbered_in_order(tree):
    """Every column of the hand-drawn tree."""
    assert live(tree.tokens, tree) == [7, 10, 20, 30, 40, 50, 10]
    assert live(tree.parents, tree) == [-1, 0, 0, 1, 1, 3, 2]
    assert live(tree.depths, tree) == [0, 1, 1, 2, 2, 3, 2]
    assert live(tree.edge_scores, tree) == [0, -0.5, -1.0, -0.25, -2.0, -1.0, -0.125]
    assert live(tree.path_scores, tree) == [0, -0.5, -1.0, -0.75, -2.5, -1.75, -1.125]
    assert live(tree.scored, tree) == [0, 0, 0, 0, -1, -1, -1]
    assert [path_of(tree, node) for node in range(7)] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 3],
        [0, 1, 4],
        [0, 1, 3, 5],
        [0, 2, 6],
    ]


def test_higher_stage_rescores_its_guesses_and_their_paths(tree):
    """Stage 1 ranks 20 above 10 and adds 60: indices stay, the subtrees' path scores follow, sources stay cheapest."""
    insert(tree, 1, {0: {20: -0.25, 10: -2.0, 60: -3.0}})
    assert live(tree.tokens, tree) == [7, 10, 20, 30, 40, 50, 10, 60]
    assert live(tree.edge_scores, tree) == [0, -2.0, -0.25, -0.25, -2.0, -1.0, -0.125, -3.0]
    assert live(tree.path_scores, tree) == [0, -2.0, -0.25, -2.25, -4.0, -3.25, -0.375, -3.0]
    assert live(tree.sources, tree) == [0, 0, 0, 0, 0, 0, 0, 1]
    assert live(tree.scored, tree) == [1, 0, 0, 0, -1, -1, -1, -1]


def test_guess_that_the_stage_does_not_rank_is_rejected_with_its_subtree(tree):
    insert(tree, 1, {0: {20: -0.25}})
    assert live(tree.path_scores, tree) == [0, NEVER, -0.25, NEVER, NEVER, NEVER, -0.375]
    assert live(tree.edge_scores, tree)[3:6] == [-0.25, -2.0, -1.0], "edges below a rejected one are kept"
    assert select_nodes(tree, 2, 16, 8).tolist() == [0, 2, 6]


def test_rejection_by_a_filter_is_rejection(tree):
    """A child ranked with score -inf (filtered) neither keeps a guess alive nor becomes a node."""
    insert(tree, 1, {0: {20: -0.25, 10: NEVER, 60: NEVER}})
    assert int(tree.num_nodes) == 7
    assert live(tree.path_scores, tree)[1] == NEVER


def test_parent_and_child_can_be_scored_in_one_call(tree):
    """Nodes 0 and 1 together: each gets its own children, though 0's ranking rejects 1."""
    insert(tree, 1, {0: {20: -0.25}, 1: {40: -0.125, 70: -4.0}})
    assert live(tree.edge_scores, tree)[3:5] == [NEVER, -0.125]
    assert live(tree.tokens, tree)[7:] == [70] and live(tree.parents, tree)[7:] == [1]
    assert live(tree.path_scores, tree)[7:] == [NEVER]


def test_full_tree_drops_children_but_still_merges(tree):
    """With one place left, of three newcomers the first one stays; a guess further down the row is re-scored."""
    full = rooted(capacity=4)
    insert(full, 0, {0: {10: -0.5, 20: -1.0}})
    insert(full, 1, {0: {60: -0.25, 70: -0.5, 20: -0.75, 80: -1.0}})
    assert live(full.tokens, full) == [7, 10, 20, 60]
    assert live(full.edge_scores, full) == [0, NEVER, -0.75, -0.25]
    insert(full, 0, {3: {1: -1.0}})
    assert int(full.num_nodes) == 4


def test_nothing_grows_below_max_depth(tree):
    """Node 3 is at depth 2: with max_depth 2 it gets no child, node 2 at depth 1 still does."""
    insert(tree, 1, {3: {90: -0.5}, 2: {90: -0.5}}, max_depth=2)
    assert live(tree.parents, tree)[7:] == [2]


def test_deepest_chain_can_be_built_and_continued():
    """DEPTH_LIMIT levels fit into ``paths``; after walking 20 of them, 20 more fit again."""
    tree = rooted(capacity=64)
    for node in range(DEPTH_LIMIT + 3):
        insert(tree, 0, {min(node, DEPTH_LIMIT): {node + 1: -0.5}}, max_depth=DEPTH_LIMIT)
    assert int(tree.num_nodes) == DEPTH_LIMIT + 1 and path_of(tree, DEPTH_LIMIT) == list(range(DEPTH_LIMIT + 1))
    assert reroot(tree, 19, 20).tolist() == list(range(20, DEPTH_LIMIT + 1))
    insert(tree, 0, {DEPTH_LIMIT - 20: {99: -0.5}}, max_depth=DEPTH_LIMIT)
    check_invariants(tree)
    assert path_of(tree, DEPTH_LIMIT - 19) == list(range(DEPTH_LIMIT - 18))


def test_the_cheapest_stage_that_proposes_a_child_is_its_source():
    tree = new_tree(8, root=7)
    for stage in (1, 0, 2):
        insert_children(tree, stage, int32(0), int32(5)[None], torch.tensor([[-1.0]]), 8)
    assert tree.sources[1] == 0 and tree.num_nodes == 2


def test_no_child_below_the_deepest_a_path_can_hold():
    tree = new_tree(DEPTH_LIMIT + 3, root=7)
    for node in range(DEPTH_LIMIT + 1):
        insert_children(tree, 0, int32(node), int32(5)[None], torch.tensor([[-1.0]]), DEPTH_LIMIT + 8)
    assert tree.num_nodes == DEPTH_LIMIT + 1 and tree.depths.max() == DEPTH_LIMIT


# --- select_nodes


@pytest.mark.parametrize(
    "width, expected",
    [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 6]), (99, list(range(7)))],
    ids=lambda value: str(value),
)
def test_select_takes_the_best_path_scores_and_returns_rising_indices(tree, width, expected):
    """Path scores 0, -0.5, -1, -0.75, -2.5, -1.75, -1.125."""
    chosen = select_nodes(tree, 1, width, 8)
    assert chosen.tolist() == expected and chosen.dtype == torch.int32


def test_select_breaks_ties_by_lowest_index_and_never_drops_a_parent_first():
    """A chain of certain edges ties with its own ancestors: the cut falls below them."""
    tree = rooted()
    insert(tree, 0, {0: {1: 0.0, 2: 0.0}})
    insert(tree, 0, {1: {3: 0.0}, 2: {4: 0.0}})
    for width in range(1, 6):
        assert select_nodes(tree, 1, width, 8).tolist() == list(range(width))


def test_select_skips_what_the_stage_has_scored(tree):
    assert select_nodes(tree, 0, 99, 8).tolist() == [4, 5, 6]
    insert(tree, 1, {0: {10: -0.5, 20: -1.0}})
    assert select_nodes(tree, 0, 99, 8).tolist() == [4, 5, 6], "what a higher stage scored, a lower one leaves alone"
    assert select_nodes(tree, 1, 99, 8).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("max_depth, expected", [(0, [0]), (1, [0, 1, 2]), (2, [0, 1, 2, 3, 4, 6])])
def test_select_stops_at_max_depth(tree, max_depth, expected):
    assert select_nodes(tree, 1, 99, max_depth).tolist() == expected


@pytest.mark.parametrize("min_score, expected", [(-1.0, [0, 1, 3]), (-1.25, [0, 1, 2, 3, 6]), (0.0, [])])
def test_select_leaves_out_what_is_not_above_a_score(tree, min_score, expected):
    """Node 2 has just -1."""
    assert select_nodes(tree, 1, 99, 8, min_score).tolist() == expected


# --- verify


@pytest.mark.parametrize(
    "drawn, expected",
    [
        ({0: 99}, ([], 99, False)),  # nothing accepted
        ({0: 10, 1: 99}, ([1], 99, False)),  # part of a path
        ({0: 20, 2: 5}, ([2], 5, False)),  # the sibling of the best child
        ({0: 20, 2: 10, 6: 8}, ([2, 6], 8, False)),  # token 10 again, below another parent
        ({0: 10, 1: 40, 4: 1}, ([1, 4], 1, False)),
        ({0: 10, 1: 30, 3: 50, 5: 60}, ([1, 3, 5], 60, False)),  # a whole path and the token after it
    ],
    ids=["nothing", "part", "sibling", "same-token", "second-child", "all"],
)
def test_verify_walks_along_the_drawn_tokens(tree, drawn, expected):
    """Nodes off the walk draw tokens that have children as well: they must not be followed."""
    everywhere = int32(*(drawn.get(node, 30) for node in range(7)))
    accepted, next_token, ended = verify(tree, int32(*range(7)), everywhere, 8, NO_EOS)
    assert (accepted.tolist(), next_token, ended) == expected


@pytest.mark.parametrize(
    "max_accepted, expected", [(0, ([], 10)), (1, ([1], 30)), (2, ([1, 3], 50)), (3, ([1, 3, 5], 60))]
)
def test_verify_clips_the_walk_and_still_returns_the_token_drawn_at_its_end(tree, max_accepted, expected):
    accepted, next_token, ended = verify(tree, int32(*range(7)), int32(10, 30, 0, 50, 0, 60, 0), max_accepted, NO_EOS)
    assert (accepted.tolist(), next_token) == expected and not ended


@pytest.mark.parametrize(
    "eos, expected",
    [((30,), ([1, 3], True)), ((50, 10), ([1], True)), ((60,), ([1, 3, 5], False)), ((40,), ([1, 3, 5], False))],
    ids=["inside", "one-of-two", "next-token", "off-the-walk"],
)
def test_verify_ends_at_an_accepted_eos(tree, eos, expected):
    """The eos node is the last accepted one; an eos as next token, or in a branch not taken, ends nothing here."""
    accepted, _, ended = verify(tree, int32(*range(7)), int32(10, 30, 0, 50, 0, 60, 0), 8, eos)
    assert (accepted.tolist(), ended) == expected


def test_verify_follows_only_nodes_of_the_pass(tree):
    """Node 3 carries the drawn token but was not in the oracle's pass: no draw is known there, the walk stops."""
    accepted, next_token, _ = verify(tree, int32(0, 1, 2, 6), int32(10, 30, 0, 0), 8, NO_EOS)
    assert (accepted.tolist(), next_token) == ([1], 30)


# --- reroot


def test_reroot_keeps_the_subtree_of_the_new_root(tree):
    """Root becomes node 1 (token 10): nodes 3, 4, 5 move up as 1, 2, 3; node 6, of equal token, goes."""
    insert(tree, 1, {3: {50: -0.5}})
    assert reroot(tree, 0, 10).tolist() == [1, 3, 4, 5]
    assert live(tree.tokens, tree) == [10, 30, 40, 50]
    assert live(tree.parents, tree) == [-1, 0, 0, 1]
    assert live(tree.depths, tree) == [0, 1, 1, 2]
    assert live(tree.edge_scores, tree) == [0, -0.25, -2.0, -0.5]
    assert live(tree.path_scores, tree) == [0, -0.25, -2.0, -0.75]
    assert live(tree.scored, tree) == [0, 1, -1, -1]
    assert [path_of(tree, node) for node in range(4)] == [[0], [0, 1], [0, 2], [0, 1, 3]]


def test_reroot_below_an_accepted_path(tree):
    """Walk 0 -> 1, next token 30: node 3 becomes the root, two levels at once."""
    assert reroot(tree, 1, 30).tolist() == [3, 5]
    assert live(tree.tokens, tree) == [30, 50] and live(tree.depths, tree) == [0, 1]
    assert live(tree.path_scores, tree) == [0, -1.0] and path_of(tree, 1) == [0, 1]


@pytest.mark.parametrize("last_accepted, next_token", [(0, 99), (1, 20), (5, 10)])
def test_reroot_on_a_token_nobody_proposed_starts_afresh(tree, last_accepted, next_token):
    """99 is nowhere; 20 and 10 exist, but below other nodes."""
    assert reroot(tree, last_accepted, next_token).tolist() == [-1]
    assert live(tree.tokens, tree) == [next_token] and live(tree.parents, tree) == [-1]
    assert live(tree.scored, tree) == [-1] and live(tree.depths, tree) == live(tree.path_scores, tree) == [0]
    assert path_of(tree, 0) == [0]
    insert(tree, 1, {0: {1: -1.0}})
    assert path_of(tree, 1) == [0, 1] and tree.sources[1] == 1 and tree.scored[1] == -1, "the old node 1 shows through"


def test_reroot_drops_rejected_branches_inside_the_subtree(tree):
    insert(tree, 1, {1: {40: -0.5}})
    assert reroot(tree, 0, 10).tolist() == [1, 4]


def test_reroot_onto_a_rejected_node_keeps_what_was_built_below_it(tree):
    """The oracle drew the token that stage 1 had rejected: the verdict on its edge says nothing of what follows it.

    Without its children the root would count as scored and no stage could ever extend it.
    """
    insert(tree, 1, {0: {20: -0.25}, 1: {30: -0.5, 40: -1.0}})
    assert tree.path_scores[1] == NEVER
    assert reroot(tree, 0, 10).tolist() == [1, 3, 4, 5]
    assert live(tree.path_scores, tree) == [0, -0.5, -1.0, -1.5]
    assert select_nodes(tree, 1, 8, 8).tolist() == [1, 2, 3]


def test_reroot_keeps_sources(tree):
    insert(tree, 1, {1: {30: -0.5, 80: -1.0}})
    reroot(tree, 0, 10)
    assert live(tree.tokens, tree) == [10, 30, 50, 80] and live(tree.sources, tree) == [0, 0, 0, 1]
