"""An iteration on the Triton backend, in lockstep with the torch twins: whole random generations, large trees, borders
of depth and NaN leave equal trees, progress, caches and tables.

Cases worked by hand, on both backends, are in ``test_rows_of_a_pass.py``, ``test_verify_and_commit.py`` and
``test_lookup_nodes.py``.
"""

import math
import random

import pytest
import torch

from decoding.stages import State
from kernels import gpu, reference
from kernels.layout import DEPTH_LIMIT, Tree
from tests.gpu_helpers import REAL_SHAPE
from tests.helpers import random_tree
from tests.interpreter import DEVICE
from tests.laws import GREEDY, sampled
from tests.lockstep import SHAPES, VOCAB, Lockstep, Shape, assert_equal, int32, moved, padded

pytestmark = pytest.mark.usefixtures("hostile_scratch")


EVENTS = {
    "full": {"full", "dropped", "rejected", "length", "nothing_accepted", "ties", "tied_out"},
    "contexts": {"out_of_reach", "length", "kept_subtree", "caught_up", "merged", "in_place_of_a_draft", "left_out"},
    "eos": {"eos", "accepted", "spare_ancestor", "merged"},
    "two-eos": {"eos"},
    "four-caches": {"spare_ancestor", "dropped", "kept_cached", "accepted", "ties", "rejected", "out_of_reach"},
    "one-token": {"length", "nothing_accepted", "nothing_to_score"},
}
SEEDS = {"eos": 6, "two-eos": 3}


@pytest.mark.parametrize("name", SHAPES)
def test_lockstep(name):
    """Whole generations, to an eos, the end or the context; what each shape is for has come up."""
    samplings = [GREEDY, sampled(seed=2**64 - 9, temperature=0.8, top_k=50)]
    seen = set().union(*(Lockstep(SHAPES[name], samplings[seed % 2], seed).run() for seed in range(SEEDS.get(name, 2))))
    assert seen >= EVENTS[name], f"never came up: {EVENTS[name] - seen}"


@pytest.mark.parametrize("seed", range(20))
@REAL_SHAPE
def test_lockstep_on_real_shapes(seed):
    """Trees of up to 512 nodes, passes of up to 64 rows, GPT-2's context."""
    shape = Shape(512, 3, 1000, (1024,) * 3, width=40, budget=63, max_depth=32, vocab_size=300, num_prompt=900)
    seen = Lockstep(shape, sampled(seed, top_k=50), seed).run()
    assert seen >= {"accepted", "kept_subtree", "spare_ancestor", "tied_out", "length"}


@pytest.mark.parametrize("num_nodes", [16, 100, 208, pytest.param(1024, marks=REAL_SHAPE)])
@pytest.mark.parametrize("seed", range(3))
def test_large_subtree(num_nodes, seed):
    """A commit that moves many nodes at once, beyond the chunks in which paths are renumbered: parents come first but
    in no other order, some edges are rejected, and the walk ends above the largest subtree."""
    rng = random.Random(seed)
    tree = random_tree(num_nodes, seed, vocab_size=10**6)
    tree.edge_scores[1:] = -torch.rand(num_nodes - 1)
    tree.edge_scores[rng.sample(range(1, num_nodes), num_nodes // 50)] = -math.inf
    tree.scored[:] = torch.randint(-1, 3, (num_nodes,))
    tree.sources[1:] = torch.randint(2, (num_nodes - 1,))
    sizes = [int((tree.paths == node).sum()) for node in range(num_nodes)]
    root = max((node for node in range(1, num_nodes) if tree.depths[node] == 1 + seed), key=sizes.__getitem__)
    path = tree.paths[root, : 1 + seed].tolist()
    progress = reference.new_progress([5, 6], 90, 32, [2**30, 99, 99], ())
    positions, nodes = torch.arange(99, dtype=torch.int32), torch.arange(num_nodes, dtype=torch.int32)
    chain = reference.new_chain([positions, 300 + positions], [100 + nodes, 400 + nodes], [2, 2])
    chain.cached[:] = torch.rand(2, num_nodes) < 0.8
    host = State(tree, progress, chain)
    device = State(*(moved(part, DEVICE) for part in host))
    rows = torch.tensor(path, dtype=torch.int32)
    drawn = tree.tokens[[*path[1:], root]]
    reference.verify_and_commit(tree, rows, drawn, progress, chain)
    gpu.verify_and_commit(device.tree, rows.to(DEVICE), drawn.to(DEVICE), device.progress, device.chain)
    assert int(tree.num_nodes) > 64 or num_nodes < 200 or seed
    assert_equal(device.tree, tree, int(tree.num_nodes))
    assert_equal(device.progress, progress)
    assert_equal(device.chain, chain)


@pytest.mark.parametrize("num_nodes", [100, 208, pytest.param(1024, marks=REAL_SHAPE)])
def test_guesses_in_a_large_tree(num_nodes):
    """Guesses are found, kept or rejected wherever they stand, beyond the chunks in which the tree is searched."""
    host = random_tree(num_nodes, seed=1, vocab_size=10**6)
    host.edge_scores[1:] = -torch.rand(num_nodes - 1)
    device = moved(host, DEVICE)
    parents = host.parents[-num_nodes // 2 :].unique()[-16:]
    children, scores = torch.zeros(16, 3, dtype=torch.int32), -torch.rand(16, 3)
    for row, parent in enumerate(parents.tolist()):
        guesses = host.tokens[host.parents == parent].tolist()
        children[row] = torch.tensor([2 * 10**6, guesses[-1], 3 * 10**6])
    reference.insert_children(host, 1, parents, children, scores, 32)
    depth = int32(32, device=DEVICE)
    gpu.insert_children(
        device, 1, padded(parents, 17, -1), padded(children, 17, 0), padded(scores, 17, math.nan), depth
    )
    assert_equal(device, host, num_nodes)
    assert (host.edge_scores[64:] == -math.inf).any() and parents.max() > 64


@pytest.mark.parametrize("max_depth", [-1, 0, 1, 2])
def test_no_child_below_max_depth(max_depth):
    """Nodes at ``max_depth`` and below get no children, new or guessed, and count as scored all the same."""
    host = random_tree(14, seed=3, vocab_size=VOCAB)
    host = Tree(*(torch.cat([column, column[:2]]) if len(column) > 1 else column for column in host))  # room for two
    device = moved(host, DEVICE)
    nodes = int32(0, 1, 2, 5)
    assert host.depths[nodes].tolist()[:3] == [0, 1, 2]
    children, scores = int32([1, 2], [3, 4], [1, 5], [0, 6]), -torch.rand(4, 2)
    reference.insert_children(host, 1, nodes, children, scores, max_depth)
    depth = int32(max_depth, device=DEVICE)
    gpu.insert_children(device, 1, padded(nodes, 5, -1), padded(children, 5, 0), padded(scores, 5, math.nan), depth)
    assert_equal(device, host, int(host.num_nodes))
    assert (host.scored[nodes] == 1).all() and not host.failed


def test_no_child_below_the_deepest_a_path_can_hold():
    """Whatever the depth that is asked for."""
    host = reference.new_tree(DEPTH_LIMIT + 16, root=7)
    for node in range(DEPTH_LIMIT):
        reference.insert_children(host, 0, int32(node), int32([5]), torch.tensor([[-1.0]]), 99)
    device = moved(host, DEVICE)
    child = int32(DEPTH_LIMIT), int32([5]), torch.tensor([[-1.0]])
    reference.insert_children(host, 1, *child, 99)
    gpu.insert_children(device, 1, *(part.to(DEVICE) for part in child), int32(99, device=DEVICE))
    assert_equal(device, host, DEPTH_LIMIT + 1)
    assert int(device.num_nodes) == int(host.num_nodes) == DEPTH_LIMIT + 1


@pytest.mark.parametrize("edges", [[-1.0, math.nan], [math.nan, math.nan], [math.nan, -math.inf]])
def test_nan_edge(edges):
    """A NaN edge marks the tree on both sides alike, and the next commit ends the generation by naming the stage."""
    step = Lockstep(SHAPES["full"], GREEDY, 0)
    step.look_up(2, 3)
    step.insert(1, int32(0), int32([1, 2]), torch.tensor([edges]), 3)
    assert step.device.tree.failed.item() == 2
    step.verify()
    assert step.device.progress.state.item() == -2
    step.after_the_end()


def test_nan_draw():
    """The oracle's -1 at a row of the pass ends the generation, wherever the walk goes; in a dead row it is nothing."""
    step = Lockstep(SHAPES["full"], GREEDY, 0)
    step.look_up(2, 3)
    nodes = step.rows(2, step.select(2, 4), 4, 4)
    drawn = int32(*[6] * (len(nodes) - 1), -1)
    for ops, state in ((reference, step.host), (gpu, step.device)):
        rows, draws = (nodes, drawn) if ops is reference else (padded(nodes, 6, -1), padded(drawn, 6, -1))
        ops.verify_and_commit(state.tree, rows, draws, state.progress, state.chain)
    step.check()
    assert step.device.progress.state.item() == -3
