"""An iteration on the Triton backend, in lockstep with the torch twins: after every operation of many random iterations
trees, progress, caches and tables are equal, and the loop made of them reads nothing back from the device.

The twins leave dead rows out, the kernels return -1 for them; what else stands in dead rows is poison here. Cases
worked by hand, on both backends, are in ``test_iteration.py``.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import decoding
import kernels
import model
from decoding import StagedDecoder
from decoding.config import Limits, SamplingConfig, SpeculationConfig
from decoding.katz import KatzTrigram
from decoding.loop import Generation
from decoding.stages import KatzStage, State
from kernels import gpu, reference
from kernels.gpu.launch import architecture, record
from kernels.layout import EOS, LENGTH, MAX_STAGES, RUNNING, Record, Sampling, Tree
from profiling.equality import noisy_copy
from tests.gpu_helpers import REAL_SHAPE, poison_scratch
from tests.helpers import hf_model, random_tokens, random_tree
from tests.laws import GREEDY, sampled

from tests.interpreter import DEVICE  # isort: skip

VOCAB = 7  # few tokens: guesses merge, are rejected and are drawn often
TAU = 0.85


@pytest.fixture(autouse=True)
def hostile_scratch(monkeypatch):
    poison_scratch(monkeypatch)


def int32(*values, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def moved(part, device: str):
    """A copy of a structure on ``device``."""
    return type(part)(*(value.to(device, copy=True) if torch.is_tensor(value) else value for value in part))


def padded(values: torch.Tensor, count: int, filler: float) -> torch.Tensor:
    """``values`` on the device, with rows of ``filler`` up to ``count``."""
    rest = values.new_full((count - len(values), *values.shape[1:]), filler)
    return torch.cat([values, rest]).to(DEVICE)


def assert_equal(device, host, live: int | None = None) -> None:
    """Every column of a structure is the same on both sides; of a tree, that of its ``live`` nodes."""
    for name, expected, actual in zip(host._fields, host, device, strict=True):
        if torch.is_tensor(expected):
            size = live if live is not None and len(expected) > 1 else len(expected)
            assert torch.equal(actual[:size].cpu(), expected[:size]), (
                f"{name}: {actual[:size]}, expected {expected[:size]}"
            )


class Shape(NamedTuple):
    """Of a generation in lockstep: capacity of the tree, number of caches and what ends the text."""

    capacity: int
    num_caches: int
    end: int
    contexts: tuple[int, ...]  # of the caches' stages, the oracle last
    eos: tuple[int, ...] = ()
    width: int = 8  # most nodes of one lower pass
    budget: int = 11
    max_depth: int = 8
    vocab_size: int = VOCAB
    num_prompt: int = 3


class Lockstep:
    """One generation on both backends: a table, ``num_caches`` - 1 drafts and an oracle, all of them dice.

    ``seen`` collects what has come up, so that a test can ask for it.
    """

    def __init__(self, shape: Shape, sampling: Sampling, seed: int):
        self.shape, self.sampling, self.rng = shape, sampling, np.random.default_rng(seed)
        prompt = [int(token) for token in self.rng.integers(shape.vocab_size, size=shape.num_prompt)]
        contexts = [2**30, *shape.contexts]
        self.oracle = shape.num_caches
        tables, slots = [], []
        for context in shape.contexts:
            order = torch.from_numpy(self.rng.permutation(context + shape.capacity)).int() + 1
            tables.append(order[:context])
            slots.append(order[context:])
        chain = (tables, slots, [max(0, len(prompt) - 1 - i) for i in range(shape.num_caches)][::-1])
        progress = (prompt, shape.end, shape.max_depth, contexts, shape.eos)
        self.host = State(
            reference.new_tree(shape.capacity, root=prompt[-1]),
            reference.new_progress(*progress),
            reference.new_chain(*chain),
        )
        self.device = State(
            gpu.new_tree(shape.capacity, DEVICE, prompt[-1]),
            gpu.new_progress(*progress, DEVICE),
            gpu.new_chain(*chain, DEVICE),
        )
        self.recent = reference.new_recent(16, 3, shape.vocab_size), gpu.new_recent(16, 3, shape.vocab_size, DEVICE)
        ids = self.rng.integers(shape.vocab_size, size=60 * shape.vocab_size)
        table = KatzTrigram(ids, shape.vocab_size).bake(num_contexts=9, m=5)
        self.table = table, moved(table, DEVICE)
        self.ran: set[int] = set()
        self.seen: set[str] = set()
        self.check()

    @property
    def running(self) -> bool:
        return int(self.host.progress.state) == RUNNING

    @property
    def num_nodes(self) -> int:
        return int(self.host.tree.num_nodes)

    def check(self) -> None:
        """Both sides are in the same state; the tree of a text that has ended in an eos is nobody's."""
        if int(self.host.progress.state) != EOS:
            assert_equal(self.device.tree, self.host.tree, self.num_nodes)
        assert_equal(self.device.progress, self.host.progress)
        assert_equal(self.device.chain, self.host.chain)

    def note(self, **events: bool) -> None:
        self.seen |= {name for name, happened in events.items() if happened}

    def select(self, stage: int, width: int) -> torch.Tensor:
        """The nodes to score, those of the host, once both sides agree."""
        nodes, given = (
            ops.select_nodes(state.tree, stage, width, state.progress.reach[stage])
            for ops, state in ((reference, self.host), (gpu, self.device))
        )
        assert given.tolist() == nodes.tolist() + [-1] * (width - len(nodes))
        scores = self.host.tree.path_scores[nodes]
        self.note(
            ties=len(scores.unique()) < len(scores),
            tied_out=len(nodes) == width
            and bool(
                (self.host.tree.path_scores[: self.num_nodes] == scores.min()).sum() > (scores == scores.min()).sum()
            ),
            nothing_to_score=not len(nodes),
            out_of_reach=bool(self.host.progress.reach[stage, 0] < 0 and self.running),
        )
        return nodes

    def rows(self, stage: int, nodes: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The nodes that found room."""
        num_head = 0 if stage in self.ran else self.shape.end
        self.ran.add(stage)
        rows, given = (
            ops.stage_rows(
                state.tree,
                part,
                state.progress,
                state.chain,
                stage - 1,
                state.progress.reach[stage],
                num_head,
                num_rows,
            )
            for ops, state, part in (
                (reference, self.host, nodes),
                (gpu, self.device, padded(nodes, len(nodes) + 2, -1)),
            )
        )
        given = type(given)(*(column.cpu() for column in given))
        assert len(given.tokens) == num_head + num_rows
        live, kept = given.slot_mapping >= 0, given.nodes >= 0
        for name in ("tokens", "positions", "slot_mapping", "paths"):
            assert torch.equal(getattr(given, name)[live], getattr(rows, name)), name
        assert torch.equal(given.nodes[kept], rows.nodes) and (given.nodes[~kept] == -1).all()
        assert torch.equal((live.cumsum(0) - 1)[given.row_of[kept].long()].int(), rows.row_of.int())
        assert torch.equal(given.draw_positions[kept], rows.draw_positions)
        assert not given.tokens[~live].any() and not given.positions[~live].any(), "what a dead row reads must exist"
        assert (given.row_of >= 0).all() and (given.row_of < len(live)).all()
        num_own = int((rows.nodes > 0).sum())
        num_below = int((rows.positions >= int(self.host.progress.length)).sum())
        self.note(
            dropped=len(rows.nodes) < len(nodes),
            spare_ancestor=num_below > num_own and len(rows.nodes) == len(nodes),
            caught_up=len(rows.tokens) - num_below > 1,
        )
        return rows.nodes

    def look_up(self, width: int, num_children: int) -> None:
        nodes = self.select(0, width)
        (children, scores), (given, given_scores) = (
            ops.lookup_nodes(table, state.tree, part, state.progress, self.sampling, num_children, TAU, recent)
            for ops, table, state, part, recent in (
                (reference, self.table[0], self.host, nodes, self.recent[0]),
                (gpu, self.table[1], self.device, padded(nodes, width, -1), self.recent[1]),
            )
        )
        given, given_scores, count = given.cpu(), given_scores.cpu(), len(nodes)
        assert (given_scores[count:] == -math.inf).all()
        finite = scores > -math.inf
        assert torch.equal(given_scores[:count] > -math.inf, finite)
        assert torch.equal(given[:count][finite], children[finite])
        assert _near(given_scores[:count], scores)
        self.insert(0, nodes, children, scores, width)

    def score(self, stage: int, width: int, num_children: int) -> None:
        """A draft's pass with dice for logits: ties, filtered children and, in dead rows, NaN."""
        nodes = self.rows(stage, self.select(stage, width), max(1, width + int(self.rng.integers(-2, 3))))
        shape = len(nodes), num_children
        tokens = [self.rng.permutation(self.shape.vocab_size)[:num_children] for _ in range(shape[0])]
        children = torch.from_numpy(np.array(tokens, dtype=np.int32).reshape(shape))
        scores = torch.from_numpy(-self.rng.exponential(size=shape)).float()
        if self.rng.random() < 0.4:
            scores = (2 * scores).round() / 2
        scores[torch.from_numpy(self.rng.random(shape) < 0.15)] = -math.inf
        self.learn(nodes, children, scores, width)
        self.insert(stage, nodes, children, scores, width)

    def learn(self, nodes: torch.Tensor, children: torch.Tensor, log_probs: torch.Tensor, width: int) -> None:
        reference.learn(self.recent[0], self.host.tree, nodes, self.host.progress, children, log_probs)
        on_device = padded(nodes, width, -1), padded(children, width, 0), padded(log_probs, width, -0.5)
        given_nodes, given_children, given_log_probs = on_device
        tree, progress, _ = self.device
        gpu.learn(self.recent[1], tree, given_nodes, progress, given_children, given_log_probs)
        host, device = self.recent
        assert_equal(device._replace(log_rest=host.log_rest), host)
        assert _near(device.log_rest.exp().cpu(), host.log_rest.exp())
        device.log_rest.copy_(host.log_rest)  # of a small rest only the first digits agree

    def insert(self, stage: int, nodes: torch.Tensor, children: torch.Tensor, scores: torch.Tensor, width: int) -> None:
        reach = [state.progress.reach[self.oracle] for state in (self.host, self.device)]
        reference.insert_children(self.host.tree, stage, nodes, children, scores, reach[0])
        on_device = padded(nodes, width, -1), padded(children, width, 0), padded(scores, width, math.nan)
        gpu.insert_children(self.device.tree, stage, *on_device, reach[1])
        self.check()
        tree = self.host.tree
        self.note(
            full=self.num_nodes == len(tree.tokens),
            rejected=bool((tree.edge_scores[: self.num_nodes] == -math.inf).any()),
            merged=stage > 0 and bool((tree.sources[: self.num_nodes] < stage).sum() > 1),
        )

    def verify(self) -> None:
        """The oracle's pass; it draws the token of a child more often than not."""
        width = self.shape.budget + 1
        nodes = self.rows(self.oracle, self.select(self.oracle, width), width)
        tree, n = self.host.tree, self.num_nodes
        drawn = torch.from_numpy(self.rng.integers(self.shape.vocab_size, size=len(nodes))).int()
        for i, node in enumerate(nodes.tolist()):
            children = tree.tokens[:n][tree.parents[:n] == node].tolist()
            if children and self.rng.random() < 0.8:
                drawn[i] = int(self.rng.choice(children))
        reference.verify_and_commit(tree, nodes, drawn, self.host.progress, self.host.chain)
        on_device = padded(nodes, width, -1), padded(drawn, width, -1)
        gpu.verify_and_commit(self.device.tree, *on_device, self.device.progress, self.device.chain)
        self.check()
        self.ran.clear()
        emitted = int(self.host.progress.record[Record.EMITTED])
        self.note(
            nothing_accepted=emitted == 1,
            accepted=emitted > 2,
            kept_subtree=self.num_nodes > 1,
            kept_cached=bool(self.host.chain.cached.any()),
            eos=int(self.host.progress.state) == EOS,
            length=int(self.host.progress.state) == LENGTH,
        )

    def iterate(self) -> None:
        """Lower stages in random order, each at least once, then the oracle."""
        stages = [*range(self.oracle), *self.rng.integers(self.oracle, size=self.rng.integers(3))]
        for stage in self.rng.permutation(stages).tolist():
            width, num_children = int(self.rng.integers(1, self.shape.width + 1)), int(self.rng.integers(1, 6))
            if stage == 0:
                self.look_up(width, num_children)
            else:
                self.score(stage, width, num_children)
        self.verify()

    def run(self) -> set[str]:
        while self.running:
            self.iterate()
        self.after_the_end()
        return self.seen

    def after_the_end(self) -> None:
        """Iterations launched too late find nothing to do, emit nothing and change nothing."""
        before = State(*(moved(part, "cpu") for part in self.device))
        for stage in range(1, self.oracle + 1):
            nodes = self.select(stage, 4)
            assert len(nodes) == 0
            kept = self.rows(stage, nodes, 4)
            if stage < self.oracle:
                nothing = torch.empty(0, 2)
                self.insert(stage, kept, nothing.int(), nothing, 4)
        dead, garbage = int32(-1, -1, device=DEVICE), int32(3, -1, device=DEVICE)
        gpu.verify_and_commit(self.device.tree, dead, garbage, self.device.progress, self.device.chain)
        record = torch.zeros_like(before.progress.record)
        record[Record.STATE] = before.progress.state[0]
        for part, old in zip(self.device, before, strict=True):
            assert_equal(part, old._replace(record=record) if part is self.device.progress else old)


def _near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    finite = expected > -math.inf
    return bool(((actual - expected)[finite].abs() <= 1e-5).all())


# 48 and 208 are no powers of two; the first draft's context ends before the text of "contexts" does.
SHAPES = {
    "full": Shape(16, 2, 40, (60, 60)),
    "contexts": Shape(48, 2, 41, (30, 40)),
    "eos": Shape(64, 3, 60, (60, 60, 60), eos=(6,)),
    "two-eos": Shape(48, 2, 60, (60, 60), eos=(2, 40, 5)),
    "four-caches": Shape(208, 4, 40, (60, 35, 60, 60), width=14, budget=25),
    "one-token": Shape(16, 2, 4, (60, 60)),
}
EVENTS = {
    "full": {"full", "dropped", "rejected", "length", "nothing_accepted", "ties", "tied_out"},
    "contexts": {"out_of_reach", "length", "kept_subtree", "caught_up", "merged"},
    "eos": {"eos", "accepted", "spare_ancestor", "merged"},
    "two-eos": {"eos"},
    "four-caches": {"spare_ancestor", "dropped", "kept_cached", "accepted", "ties", "rejected", "out_of_reach"},
    "one-token": {"length", "nothing_accepted", "nothing_to_score"},
}
SEEDS = {"eos": 4, "two-eos": 3}


@pytest.mark.parametrize("name", SHAPES)
def test_lockstep(name):
    """Whole generations, to an eos, the end or the context; what each shape is for has come up."""
    samplings = [GREEDY, sampled(seed=2**64 - 9, temperature=0.8, top_k=50)]
    seen = set().union(*(Lockstep(SHAPES[name], samplings[seed % 2], seed).run() for seed in range(SEEDS.get(name, 2))))
    assert seen >= EVENTS[name], f"never came up: {EVENTS[name] - seen}"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a real shape needs a CUDA device")
def test_lockstep_on_real_shapes(seed):
    """Trees of up to 512 nodes, passes of up to 64 rows, GPT-2's context."""
    shape = Shape(512, 3, 1000, (1024,) * 3, width=40, budget=63, max_depth=32, vocab_size=300, num_prompt=900)
    seen = Lockstep(shape, sampled(seed, top_k=50), seed).run()
    assert seen >= {"accepted", "kept_subtree", "spare_ancestor", "dropped", "tied_out", "length"}


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
    nodes = step.rows(2, step.select(2, 4), 4)
    drawn = int32(*[6] * (len(nodes) - 1), -1)
    for ops, state in ((reference, step.host), (gpu, step.device)):
        rows, draws = (nodes, drawn) if ops is reference else (padded(nodes, 6, -1), padded(drawn, 6, -1))
        ops.verify_and_commit(state.tree, rows, draws, state.progress, state.chain)
    step.check()
    assert step.device.progress.state.item() == -3


# --- no host read

_READS = ["item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__float__", "__array__"]
_OURS = tuple(str(Path(package.__file__).parent) for package in (decoding, model, kernels))


@pytest.fixture
def no_host_reads(monkeypatch) -> Callable[[], None]:
    """Called, it makes every way to read a tensor raise where our own code is the caller; Triton's interpreter and
    torch itself may."""

    def guarded(name: str):
        read = getattr(torch.Tensor, name)

        def refuse(self, *args, **kwargs):
            caller = sys._getframe(1).f_code
            assert not caller.co_filename.startswith(_OURS), f"Tensor.{name} in {caller.co_qualname}"
            return read(self, *args, **kwargs)

        return refuse

    def install() -> None:
        for name in _READS:
            monkeypatch.setattr(torch.Tensor, name, guarded(name))

    return install


def generation(backend: str) -> Generation:
    """Table, draft and oracle at work on a prompt; three tokens are to come."""
    oracle = hf_model(n_positions=64)
    device = DEVICE if backend == "triton" else "cpu"
    decoder = StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, 0.2), None, device, "float32", backend)
    table = moved(KatzTrigram(np.array(random_tokens(500)), 97).bake(50, 4), device)
    lower = [KatzStage("draft2", table, decoder.oracle.model.ops), *decoder.lower]
    config = SpeculationConfig(("draft2", "draft"), (1, 2), (3, 4), (3, 3), budget=9, max_depth=5)
    sampling = SamplingConfig(do_sample=True, top_k=20).with_seed(3)
    return Generation(lower, decoder.oracle, random_tokens(20), sampling, Limits(3, (96,)), config)


def test_iteration_reads_nothing_back(no_host_reads):
    """Four iterations, at least one of them after the end, run without a look at any tensor; the text is the twins'."""
    wanted = [token for emitted in generation("torch").run() for token in emitted]
    ours, records = generation("triton"), []
    no_host_reads()
    for _ in range(4):
        ours.iterate()
        records.append(ours.state.progress.record.clone())
    records = [record.tolist() for record in records]
    tokens = [token for record in records for token in record[Record.TOKENS : Record.TOKENS + record[Record.EMITTED]]]
    assert tokens == wanted
    assert records[-1][Record.EMITTED] == 0 and records[-1][Record.STATE] == LENGTH


def test_reads_are_noticed(no_host_reads):
    """The guard of the test above is one: the twins, which work on the host, do not get past it."""
    ours = generation("torch")
    no_host_reads()
    with pytest.raises(AssertionError, match=r"Tensor\.\w+ in \w+"):
        ours.iterate()


# --- bad arguments


def arguments(op: str) -> dict:
    """Of each operation, on the state of a lockstep."""
    tree, progress, chain = Lockstep(SHAPES["full"], GREEDY, 0).device
    nodes, table = int32(0, -1, device=DEVICE), Lockstep(SHAPES["full"], GREEDY, 0).table[1]
    given = {"tree": tree, "nodes": nodes, "progress": progress, "chain": chain, "table": table, "stage": 1, "width": 4}
    given |= {"cache": 0, "reach": progress.reach[1], "max_depth": progress.reach[2], "num_head": 3, "num_rows": 2}
    given |= {"sampling": GREEDY, "num_children": 2, "tau": 1.0, "rows": nodes, "drawn": nodes.clone()}
    given |= {
        "children": torch.zeros(2, 3, dtype=torch.int32, device=DEVICE),
        "scores": torch.zeros(2, 3, device=DEVICE),
    }
    given |= {"recent": gpu.new_recent(16, 3, VOCAB, DEVICE), "log_probs": given["scores"]}
    names = {
        "select_nodes": "tree stage width max_depth",
        "insert_children": "tree stage nodes children scores max_depth",
        "stage_rows": "tree nodes progress chain cache reach num_head num_rows",
        "verify_and_commit": "tree rows drawn progress chain",
        "lookup_nodes": "table tree nodes progress sampling num_children tau recent",
        "learn": "recent tree nodes progress children log_probs",
    }
    return {name: given[name] for name in names[op].split()}


def replaced(value, column: str, change: Callable[[torch.Tensor], torch.Tensor]):
    return value._replace(**{column: change(getattr(value, column))}) if column else change(value)


@pytest.mark.parametrize(
    ("op", "argument", "message"),
    [
        *(
            (op, "tree.tokens", "tokens")
            for op in ("select_nodes", "insert_children", "stage_rows", "verify_and_commit")
        ),
        *(("insert_children", f"tree.{column}", column) for column in Tree._fields),
        ("lookup_nodes", "tree.paths", "paths"),
        ("learn", "tree.depths", "depths"),
        ("select_nodes", "max_depth", "max_depth"),
        *(("insert_children", name, name) for name in ("nodes", "children", "scores", "max_depth")),
        *(("stage_rows", name, name) for name in ("nodes", "reach")),
        ("stage_rows", "chain.page_tables", "page_tables"),
        ("stage_rows", "chain.node_slots", "node_slots"),
        *(("verify_and_commit", name, name) for name in ("rows", "drawn")),
        *(("verify_and_commit", f"progress.{name}", name) for name in ("reach", "record")),
        *(("verify_and_commit", f"chain.{name}", name) for name in ("node_slots", "cached")),
        ("lookup_nodes", "nodes", "nodes"),
        *(("lookup_nodes", f"table.{name}", name) for name in ("keys", "rows", "tokens", "log_probs", "log_rest")),
        *(("lookup_nodes", f"recent.{name}", "recent") for name in ("keys", "tokens", "log_probs", "log_rest")),
        *(("learn", name, name) for name in ("nodes", "children", "log_probs")),
        *(("learn", f"recent.{name}", "recent") for name in ("keys", "tokens", "log_probs", "log_rest")),
    ],
)
@pytest.mark.parametrize("fault", ["dtype", "strided", "aligned"])
def test_bad_tensor(op, argument, message, fault):
    """Each in turn of another dtype, strided or misaligned: ValueError naming it, and nothing is launched."""
    change = {
        "dtype": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.short(),
        "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
        "aligned": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
    }[fault]
    given = arguments(op)
    name, _, column = argument.partition(".")
    given[name] = replaced(given[name], column, change)
    if fault == "strided" and (given[name] if not column else getattr(given[name], column)).is_contiguous():
        pytest.skip("one number is contiguous however it lies")
    with record(architecture(torch.device(DEVICE))) as launches:
        with pytest.raises(ValueError, match=rf"^{message}"):
            getattr(gpu, op)(**given)
        assert not launches


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("insert_children", {"scores": (2, 2)}, r"scores must have shape \[2, 3\], got \[2, 2\]"),
        ("insert_children", {"children": (3, 3)}, r"children must have shape \[2, any\], got \[3, 3\]"),
        ("verify_and_commit", {"drawn": (3,)}, r"drawn must have shape \[2\], got \[3\]"),
        ("learn", {"log_probs": (2, 4)}, r"log_probs must have shape \[2, 3\], got \[2, 4\]"),
        ("stage_rows", {"nodes": (2, 1)}, r"nodes must have shape \[any\], got \[2, 1\]"),
    ],
)
def test_bad_shape(op, changed, message):
    given = arguments(op)
    for name, shape in changed.items():
        given[name] = torch.zeros(shape, dtype=given[name].dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        getattr(gpu, op)(**given)


def test_too_many_stages():
    given = arguments("verify_and_commit")
    contexts = [99] * (MAX_STAGES + 1)
    given["progress"] = gpu.new_progress([1, 2], 9, 4, contexts, (), DEVICE)
    with pytest.raises(ValueError, match=f"a chain has at most {MAX_STAGES} stages, got {MAX_STAGES + 1}"):
        gpu.verify_and_commit(**given)
