"""Look-ups of draft2, worked by hand and run on both backends: the context of a node, probing, and what is remembered
of the stage above."""

import math

import numpy as np
import pytest
import torch

from decoding.config import SamplingConfig
from decoding.katz import KatzTrigram
from decoding.stages import KatzStage, Scored, State
from kernels import gpu, reference
from kernels.layout import MAX_PROBES, MAX_ROWS, SuccessorTable
from kernels.reference import hash_context
from tests.laws import GREEDY
from tests.worked_iteration import (
    TABLE,
    home,
    insert,
    int32,
    key_of,
    moved,
)

pytestmark = pytest.mark.usefixtures("hostile_scratch")


SIZE = 4  # tokens; rows 0..3 of the table are the contexts of one token, row 4 is that of 1, 2


@pytest.fixture
def table(ops) -> SuccessorTable:
    """Row r says token r with probability 1/2, then the next one with 1/4; row 4 says 0 and 3. An empty bucket's row is
    4: whoever takes an empty bucket for a hit shows."""
    keys, rows = torch.full((16,), -1, dtype=torch.int64), torch.full((16,), 4, dtype=torch.int32)
    keys[hash_context(torch.tensor(1 * SIZE + 2), 16)] = 1 * SIZE + 2
    tokens = [[token, (token + 1) % SIZE] for token in range(SIZE)] + [[0, 3]]
    log_probs = torch.tensor([[0.5, 0.25]] * 5).log()
    table = SuccessorTable(keys, rows, int32(*tokens), log_probs, torch.full((5,), 0.25).log(), SIZE)
    return moved(table, ops)


@pytest.mark.parametrize(
    ("text", "node", "row"),
    [
        ([1, 2], 0, 4),  # the token before the root comes from the text
        ([0, 2], 0, 2),  # a context of two that the table does not hold
        ([2], 0, 2),  # no token before the root
        ([3], 0, 3),  # nor here, where its key would be that of an empty bucket
        ([1, 2, 1], 2, 4),  # 2 below the root 1
        ([0, 2], 2, 2),  # 2 below 2
        ([0, 2], 4, 4),  # 2 below 1 below the root
        ([0, 2], 1, 1),
    ],
)
def test_contexts(text, node, row, table, ops):
    tree = reference.new_tree(16, root=text[-1])
    insert(tree, 0, 0, {1: -1.0, 2: -2.0, 3: -3.0})
    insert(tree, 0, 1, {2: -1.0})
    tree, progress = moved(tree, ops), moved(reference.new_progress(text, 30, 8, [99, 99], ()), ops)
    padding = [-1] if ops is gpu else []
    children, scores, _ = ops.lookup_nodes(table, tree, int32(node, *padding, ops=ops), progress, GREEDY, 2, 1.0)
    assert children[0].tolist() == table.tokens[row].tolist()
    torch.testing.assert_close(scores[0].cpu(), torch.tensor([0.5, 0.25]).log(), atol=1e-6, rtol=0)
    assert all(score == -math.inf for score in scores[1:].flatten().tolist())


@pytest.mark.parametrize("distance", [1, MAX_PROBES - 1])
def test_probes(distance, table, ops):
    """A key that stands ``distance`` buckets after its first one, around the end of the table, is found."""
    start = int(hash_context(torch.tensor(1 * SIZE + 2), 16))
    for step in range(distance):
        table.keys[(start + step) % 16] = 10**6 + step
    table.keys[(start + distance) % 16] = 1 * SIZE + 2
    tree, progress = (
        moved(part, ops) for part in (reference.new_tree(16, root=2), reference.new_progress([1, 2], 30, 8, [9], ()))
    )
    children, *_ = ops.lookup_nodes(table, tree, int32(0, ops=ops), progress, GREEDY, 2, 1.0)
    assert children[0].tolist() == [0, 3]


def root_of(text: list[int], ops, max_depth: int = 8) -> tuple:
    """The tree and the progress of a text whose last token has the children 1, 2 and 3."""
    tree = reference.new_tree(16, root=text[-1])
    insert(tree, TABLE, 0, {1: -1.0, 2: -2.0, 3: -3.0})
    return moved(tree, ops), moved(reference.new_progress(text, 30, max_depth, [99, 99], ()), ops)


def remember(recent, text: list[int], nodes: list[int], children: list, probabilities: list, ops, level=0) -> None:
    tree, progress = root_of(text, ops)
    if ops is gpu:  # a dead row
        nodes, children, probabilities = nodes + [-1], children + [[2, 2, 2]], probabilities + [[0.9, 0.05, 0.05]]
    log_probs = torch.tensor(probabilities, device=home(ops)).log()
    ops.learn(recent, tree, int32(*nodes, ops=ops), progress, int32(*children, ops=ops), log_probs, level)


def recall(recent, table, text: list[int], ops) -> tuple[list[int], list[float]]:
    tree, progress = root_of(text, ops)
    children, scores, _ = ops.lookup_nodes(table, tree, int32(0, ops=ops), progress, GREEDY, 2, 1.0, recent)
    return children[0].tolist(), scores[0].exp().tolist()


def test_what_is_remembered_comes_before_the_table(table, ops):
    """The two best children of a context; what is left of the mass competes with them. A newer row replaces it."""
    recent = ops.new_recent(2**10, 2, home(ops))
    assert recall(recent, table, [1, 2], ops) == ([0, 3], [0.5, 0.25])
    remember(recent, [1, 2], [0, 1], [[3, 1, 0], [0, 1, 2]], [[0.6, 0.3, 0.1], [0.2, 0.2, 0.2]], ops)
    assert recall(recent, table, [1, 2], ops) == ([3, 1], pytest.approx([0.6, 0.3]))
    assert recall(recent, table, [2, 1], ops) == ([0, 1], pytest.approx([0.2, 0.2])), "node 1 is token 1 after 2"
    assert recall(recent, table, [0, 2], ops) == ([2, 3], [0.5, 0.25]), "another context still has the table's row"
    remember(recent, [1, 2], [0], [[1, 2, 0]], [[0.7, 0.0, 0.0]], ops)
    children, probabilities = recall(recent, table, [1, 2], ops)
    assert children[0] == 1 and probabilities == [pytest.approx(0.7), 0.0]


def test_what_is_not_remembered(table, ops):
    """A context of one token, a node without a possible child, and one with NaN."""
    recent = ops.new_recent(16, 2, home(ops))
    for text in ([2], [3]):
        remember(recent, text, [0], [[1, 2, 0]], [[0.6, 0.3, 0.1]], ops)
    remember(recent, [1, 2], [0, 3], [[1, 2, 0]] * 2, [[0.0] * 3, [math.nan] * 3], ops)
    assert (recent.keys == -1).all() and (recent.log_probs == -math.inf).all()
    assert recall(recent, table, [3], ops) == ([3, 0], [0.5, 0.25]), "its key would be that of an empty bucket"


def test_the_later_of_two_nodes_in_a_bucket_is_remembered(table, ops):
    recent = ops.new_recent(1, 2, home(ops))
    remember(recent, [1, 2], [0, 1, 2], [[1, 2, 0], [3, 1, 0], [0, 3, 1]], [[0.6, 0.3, 0.1]] * 3, ops)
    assert recent.keys.tolist() == [key_of(2, 2)] and recent.tokens.tolist() == [[0, 3]]
    assert recall(recent, table, [2, 2], ops) == ([0, 3], pytest.approx([0.6, 0.3]))
    assert recall(recent, table, [1, 2], ops) == ([0, 3], [0.5, 0.25])


def test_a_row_of_a_higher_level_stays_for_its_context(table, ops):
    """What the oracle drew outlives what a draft draws there; the level comes with the answer, and a draft need not
    score the node."""
    recent = ops.new_recent(1, 2, home(ops))
    remember(recent, [1, 2], [0], [[3, 1, 0]], [[0.6, 0.3, 0.1]], ops, level=1)
    remember(recent, [1, 2], [0], [[0, 2, 1]], [[0.9, 0.1, 0.0]], ops, level=0)
    assert recall(recent, table, [1, 2], ops) == ([3, 1], pytest.approx([0.6, 0.3]))
    remember(recent, [1, 2], [0], [[2, 3, 1]], [[0.8, 0.1, 0.1]], ops, level=1)
    assert recall(recent, table, [1, 2], ops) == ([2, 3], pytest.approx([0.8, 0.1]))
    (tree, progress), nodes = root_of([1, 2], ops), int32(0, 2, ops=ops)
    children, scores, levels = ops.lookup_nodes(table, tree, nodes, progress, GREEDY, 2, 1.0, recent)
    assert levels.tolist() == [1, 0], "node 2 is token 2 after another 2"
    reach = progress.reach[0]
    ops.insert_children(tree, TABLE, nodes, children, scores, reach, levels)
    assert tree.scored[:4].tolist() == [1, -1, 0, -1]
    assert 0 not in ops.select_nodes(tree, 1, 8, reach).tolist() and 0 in ops.select_nodes(tree, 2, 8, reach).tolist()
    remember(recent, [2, 1], [0], [[0, 1, 2]], [[0.7, 0.2, 0.1]], ops, level=0)
    assert recall(recent, table, [2, 1], ops)[0] == [0, 1], "another context in the same bucket"


@pytest.mark.parametrize(("shared", "apart"), [(2, 2), (4, 4), (3, 1), (7, 1), (5, 3)])
def test_the_longest_context_that_was_seen_answers(shared, apart, table, ops):
    """Two texts with the same ``shared`` last tokens and others before: each has its own answer, a third text has the
    newer of theirs, for it knows both by a shorter context alone."""
    recent, end = ops.new_recent(2**10, 2, home(ops)), [1, 2, 3, 3, 0, 1, 2][-shared:]
    first, second, third = ([token] * apart + end for token in (0, 1, 2))
    remember(recent, first, [0], [[3, 1, 0]], [[0.6, 0.3, 0.1]], ops, level=1)
    remember(recent, second, [0], [[0, 2, 1]], [[0.5, 0.3, 0.2]], ops, level=1)
    assert recall(recent, table, first, ops) == ([3, 1], pytest.approx([0.6, 0.3]))
    assert recall(recent, table, second, ops) == ([0, 2], pytest.approx([0.5, 0.3]))
    assert recall(recent, table, third, ops) == ([0, 2], pytest.approx([0.5, 0.3]))


@pytest.mark.parametrize("committed", [3, 14, 18])
def test_a_context_is_the_same_in_the_tree_and_in_the_text(committed, ops):
    """However the tokens are shared out: ``learn`` makes the keys of 2, 4 and 8 tokens, as many as there are, and a row
    under one of them answers at its node and at no other."""
    size, text = 32, list(range(20))
    tree, nodes = reference.new_tree(32, root=text[committed - 1]), range(21 - committed)
    for depth, token in enumerate(text[committed:]):
        insert(tree, TABLE, depth, {token: -1.0})
    tree = moved(tree, ops)
    progress = moved(reference.new_progress(text[:committed], 40, 24, [99, 99], ()), ops)
    table = KatzTrigram(np.zeros(8, np.int64), size).bake(0, 1)
    table = moved(table._replace(tokens=torch.full_like(table.tokens, 30)), ops)
    for node in {0, nodes[-1] // 2, nodes[-1]}:
        count, recent = committed + node, ops.new_recent(2**8, 1, home(ops))
        drawn = int32([7], ops=ops), torch.full((1, 1), -0.1, device=home(ops))
        ops.learn(recent, tree, int32(node, ops=ops), progress, *drawn, 1)
        keys = [key_of(*text[count - length : count]) for length in (2, 4, 8) if length <= count]
        assert sorted(recent.keys[recent.keys >= 0].tolist()) == sorted(keys)
        for key in keys:
            recent = ops.new_recent(2**8, 1, home(ops))
            bucket = int(hash_context(torch.tensor(key), 2**8))
            recent.keys[bucket], recent.tokens[bucket], recent.log_probs[bucket] = key, 31, -0.1
            every = torch.tensor(nodes, dtype=torch.int32, device=home(ops))
            children, *_ = ops.lookup_nodes(table, tree, every, progress, GREEDY, 1, 1.0, recent)
            assert children.flatten().tolist() == [31 if other == node else 30 for other in nodes]


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingConfig(True, 0.7, 0).with_seed(2**40 + 3)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize(("rounds", "width", "depth"), [(1, 1, 8), (3, 2, 8), (4, 6, 8), (4, 8, 2)])
def test_rounds_of_a_table_are_its_steps(sampling, rounds, width, depth, table, ops):
    """Select, look up, insert, so many times: the same tree, within the depth that stage and oracle may reach."""
    recent = ops.new_recent(2**10, 2, home(ops))
    remember(recent, [1, 2], [0, 1], [[3, 1, 0], [0, 1, 2]], [[0.6, 0.3, 0.1], [0.2, 0.2, 0.2]], ops, level=1)
    (together, progress), (apart, _) = root_of([1, 2], ops, depth), root_of([1, 2], ops, depth)
    sampling = sampling.to(home(ops))
    before, count = int(together.num_nodes), 0
    for _ in range(rounds):
        nodes = ops.select_nodes(apart, TABLE, width, progress.reach[0])
        count += len(nodes)
        found = ops.lookup_nodes(table, apart, nodes, progress, sampling, 2, 0.9, recent)
        ops.insert_children(apart, TABLE, nodes, *found[:2], progress.reach[-1], found[2])
    assert ops.extend_tree(table, together, progress, sampling, rounds, width, 2, 0.9, recent) == count
    grown = int(together.num_nodes)
    assert grown > before and (depth == 8 or int(together.depths.max()) == depth)
    for name, mine, wanted in zip(together._fields, together, apart, strict=True):
        torch.testing.assert_close(mine[:grown], wanted[:grown], rtol=1e-6, atol=1e-6, msg=name)  # integers are equal


@pytest.mark.parametrize("seed", range(12))
def test_rounds_grow_the_twins_tree(seed):
    """Any table, memory, capacity and depth, a reach that is negative where nothing may change: integers are equal."""
    rng, size = np.random.default_rng(seed), 13
    width, reach = (1, 3, 8)[seed % 3], (12, 3, -1, 0)[seed % 4]
    capacity, num_nodes, num_children = (int(rng.choice(values)) for values in ((5, 16, 64), (1, 3, 6, 11), (1, 2, 4)))
    table = KatzTrigram(rng.integers(0, size, 600), size).bake(int(rng.choice([0, 100])), width)
    recent = reference.new_recent(512, 2)
    for context in rng.integers(0, size, (100, 2)):
        key = key_of(*context)
        bucket = int(hash_context(torch.tensor(key), 512))
        recent.keys[bucket], recent.levels[bucket] = key, int(rng.integers(2))
        recent.tokens[bucket] = torch.from_numpy(rng.permutation(size)[:2])
        recent.log_probs[bucket], recent.log_rest[bucket] = torch.tensor([-0.7, -1.2]), -1.6
    sampling = SamplingConfig(True, 0.7, 0).with_seed(seed) if seed % 2 else GREEDY
    text = rng.integers(0, size, 1 + seed % 3).tolist()
    progress = reference.new_progress(text, 30, 12, [99, 99], ())
    progress.reach[0, 0] = reach
    tree = reference.new_tree(capacity, root=text[-1])
    ours = [moved(part, gpu) for part in (table, tree, progress, recent)]
    more = 3, num_nodes, num_children, 0.85
    gpu.extend_tree(*ours[:3], sampling.to(home(gpu)), *more, ours[3])
    reference.extend_tree(table, tree, progress, sampling, *more, recent)
    grown = int(tree.num_nodes)
    assert int(ours[1].num_nodes) == grown and (grown == 1) == (reach < 0)
    for name, mine, wanted in zip(tree._fields, ours[1], tree, strict=True):
        torch.testing.assert_close(mine[:grown].cpu(), wanted[:grown], rtol=1e-5, atol=1e-5, msg=name)


def test_a_probe_goes_on_at_the_first_bucket(ops):
    """Eight buckets, fewer than a look-up may visit: a context whose first bucket is the last one lies before it."""
    buckets, size = 8, 97
    key = next(key for key in range(size * size) if int(hash_context(torch.tensor(key), buckets)) == 7)
    keys, rows = torch.full((buckets,), -1, dtype=torch.int64), torch.zeros(buckets, dtype=torch.int32)
    keys[7], keys[2], rows[2] = size * size - 1, key, size
    tokens = torch.arange(size + 1, dtype=torch.int32)[:, None].expand(-1, 2) % 7 + torch.tensor([0, 7])
    log_probs = torch.tensor([-0.5, -1.5]).expand(size + 1, 2).contiguous()
    table = SuccessorTable(keys, rows, tokens.int().contiguous(), log_probs, torch.full((size + 1,), -3.0), size)
    progress = reference.new_progress([key // size, key % size], 9, 4, [9], ())
    tree = reference.new_tree(16, root=key % size)
    table, tree, progress = (moved(part, ops) for part in (table, tree, progress))
    nodes = torch.zeros(1, dtype=torch.int32, device=home(ops))
    children, *_ = ops.lookup_nodes(table, tree, nodes, progress, GREEDY, 2, 1.0)
    assert children.tolist() == [[size % 7, size % 7 + 7]]


def test_buckets_that_are_no_power_of_two_are_refused():
    device = home(gpu)
    table, tree = gpu.new_recent(12, 2, device), gpu.new_tree(16, device, root=1)
    progress = gpu.new_progress([1, 2], 9, 4, [9], (), device)
    nodes, children = (torch.zeros(*size, dtype=torch.int32, device=device) for size in ((1,), (1, 2)))
    with pytest.raises(ValueError, match="keys must have a power of two of buckets, got 12"):
        gpu.learn(table, tree, nodes, progress, children, torch.zeros(1, 2, device=device))


def on_host(table: SuccessorTable) -> SuccessorTable:
    return SuccessorTable(*(column.cpu() for column in table[:-1]), table.vocab_size)


def test_what_follows_in_the_prompt_comes_before_the_table(table, ops):
    """1 2 is followed by 3, 0, 3: three quarters of the mass, the last one is the baked row's. 2 3 is followed by 1
    once, at the end by nothing. What a stage draws replaces it."""
    recent = ops.new_recent(2**10, 2, home(ops))
    ops.learn_text(recent, on_host(table), [1, 2, 3, 1, 2, 0, 1, 2, 3])
    assert recall(recent, table, [1, 2], ops) == ([3, 0], pytest.approx([2 / 4 + 1 / 16, 1 / 4 + 1 / 8]))
    assert recall(recent, table, [2, 3], ops) == ([1, 3], pytest.approx([1 / 2, 1 / 4]))
    assert recall(recent, table, [0, 2], ops) == ([2, 3], [0.5, 0.25]), "not in the prompt"
    remember(recent, [1, 2], [0], [[1, 2, 0]], [[0.7, 0.2, 0.1]], ops)
    assert recall(recent, table, [1, 2], ops) == ([1, 2], pytest.approx([0.7, 0.2]))


@pytest.mark.parametrize("text", [[], [1], [1, 2]])
def test_a_prompt_of_two_tokens_teaches_nothing(text, table, ops):
    recent = ops.new_recent(16, 2, home(ops))
    ops.learn_text(recent, on_host(table), text)
    assert (recent.keys == -1).all()


@pytest.mark.parametrize("num_buckets", [8, 64, 1024])
def test_rows_of_a_prompt_by_counting(num_buckets):
    """Every row against one counted with dictionaries; few buckets hold the context that came last, few columns the
    best successors, and log_rest what is left."""
    rng, size, width = np.random.default_rng(num_buckets), 9, 3
    text = rng.integers(size, size=150).tolist()
    tokens = np.stack([rng.permutation(size)[:4] for _ in range(size)]).astype(np.int32)
    masses = torch.rand(size, 5).softmax(-1)
    keys = torch.full((8,), -1, dtype=torch.int64)
    table = SuccessorTable(keys, keys.int(), torch.from_numpy(tokens), masses[:, :4].log(), masses[:, 4].log(), size)
    recent = reference.new_recent(num_buckets, width)
    reference.learn_text(recent, table, text)
    counts, owner = {}, {}
    for previous, last, following in zip(text, text[1:], text[2:], strict=False):
        counts.setdefault((previous, last), []).append(following)
        owner[int(hash_context(torch.tensor(key_of(previous, last)), num_buckets))] = previous, last
    assert (recent.keys >= 0).nonzero().flatten().tolist() == sorted(owner)
    for bucket, context in owner.items():
        seen = counts[context]
        law = dict.fromkeys(range(size), 0.0)
        for token, mass in zip(tokens[context[1]].tolist(), masses[context[1]].tolist(), strict=False):
            law[token] += mass / (len(seen) + 1)
        for token in seen:
            law[token] += 1 / (len(seen) + 1)
        best = sorted(law.values(), reverse=True)[:width]
        found = recent.log_probs[bucket].exp().tolist()
        assert recent.keys[bucket] == key_of(*context) and recent.levels[bucket] == 0
        assert found == pytest.approx(best, rel=1e-5)
        assert [law[token] for token in recent.tokens[bucket].tolist()] == pytest.approx(best, rel=1e-5)
        assert len(set(recent.tokens[bucket].tolist())) == width
        assert math.exp(recent.log_rest[bucket]) == pytest.approx(1 - sum(best), abs=2e-6)


def test_a_wide_verdict_is_learnt_in_launches_of_a_pass(table, ops, monkeypatch):
    """Each of at most MAX_ROWS nodes, in order: a launch compares all of its nodes with one another."""
    stage, launched = KatzStage("draft2", table, ops), []
    monkeypatch.setattr(ops, "learn", lambda recent, tree, nodes, progress, *drawn: launched.append((nodes, *drawn)))
    nodes = torch.arange(2 * MAX_ROWS + 3, dtype=torch.int32)
    children, log_probs = torch.stack([nodes, nodes], 1), torch.rand(len(nodes), 2)
    stage.learn(State(None, None, None), Scored(nodes, nodes, children, log_probs, log_probs), 2)
    *columns, levels = zip(*launched, strict=True)
    assert [len(part) for part in columns[0]] == [MAX_ROWS, MAX_ROWS, 3] and levels == (2, 2, 2)
    assert all(map(torch.equal, map(torch.cat, columns), (nodes, children, log_probs)))
