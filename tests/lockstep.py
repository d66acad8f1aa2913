"""A generation on both backends at once: after every operation of random iterations trees, progress, caches and tables
are equal.

The twins leave dead rows out, the kernels return -1 for them; what else stands in dead rows is poison here.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from decoding.katz import KatzTrigram
from decoding.stages import State
from kernels import gpu, reference
from kernels.layout import EOS, LENGTH, RUNNING, Record, Sampling
from tests.interpreter import DEVICE, INTERPRETING

VOCAB = 7  # few tokens: guesses merge, are rejected and are drawn often
TAU = 0.85
# Each number of rows is a binary of its own: nothing in the interpreter, a second of compiling for a GPU.
ROOM, CHILDREN = ((-2, -1, 0, 1, 2), (1, 2, 3, 4, 5)) if INTERPRETING else ((-2, 2), (1, 4))


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
        self.recent = reference.new_recent(16, 3), gpu.new_recent(16, 3, DEVICE)
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
        known = [score for score in self.host.tree.path_scores[: self.num_nodes].tolist() if score < 0]
        some = stage < self.oracle and known and self.rng.random() < 0.3
        least = float(self.rng.choice(known)) if some else -math.inf
        nodes, given = (
            ops.select_nodes(state.tree, stage, width, state.progress.reach[stage], least)
            for ops, state in ((reference, self.host), (gpu, self.device))
        )
        assert given.tolist() == nodes.tolist() + [-1] * (width - len(nodes))
        scores = self.host.tree.path_scores[nodes]
        self.note(
            ties=len(scores.unique()) < len(scores),
            left_out=least > -math.inf and len(nodes) < width,
            tied_out=len(nodes) == width
            and bool(
                (self.host.tree.path_scores[: self.num_nodes] == scores.min()).sum() > (scores == scores.min()).sum()
            ),
            nothing_to_score=not len(nodes),
            out_of_reach=bool(self.host.progress.reach[stage, 0] < 0 and self.running),
        )
        return nodes

    def rows(self, stage: int, nodes: torch.Tensor, width: int, num_rows: int) -> torch.Tensor:
        """Those of at most ``width`` nodes that found room."""
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
                (gpu, self.device, padded(nodes, width + 2, -1)),
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
        assert not given.sequences.any() and len(given.sequences) == len(live)
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
        (children, scores, levels), (given, given_scores, given_levels) = (
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
        assert given_levels.tolist() == levels.tolist() + [0] * (width - count)
        self.note(in_place_of_a_draft=bool((levels > 0).any()))
        self.insert(0, nodes, children, scores, width, levels)

    def score(self, stage: int, width: int, num_children: int) -> None:
        """A draft's pass with dice for logits: ties, filtered children and, in dead rows, NaN."""
        nodes = self.rows(stage, self.select(stage, width), width, max(1, width + int(self.rng.choice(ROOM))))
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
        level = int(self.rng.integers(self.oracle))
        reference.learn(self.recent[0], self.host.tree, nodes, self.host.progress, children, log_probs, level)
        on_device = padded(nodes, width, -1), padded(children, width, 0), padded(log_probs, width, -0.5)
        given_nodes, given_children, given_log_probs = on_device
        tree, progress, _ = self.device
        gpu.learn(self.recent[1], tree, given_nodes, progress, given_children, given_log_probs, level)
        host, device = self.recent
        assert_equal(device._replace(log_rest=host.log_rest), host)
        assert _near(device.log_rest.exp().cpu(), host.log_rest.exp())
        device.log_rest.copy_(host.log_rest)  # of a small rest only the first digits agree

    def insert(self, stage: int, nodes, children, scores, width: int, levels: torch.Tensor | None = None) -> None:
        reach = [state.progress.reach[self.oracle] for state in (self.host, self.device)]
        reference.insert_children(self.host.tree, stage, nodes, children, scores, reach[0], levels)
        on_device = padded(nodes, width, -1), padded(children, width, 0), padded(scores, width, math.nan)
        given_levels = None if levels is None else padded(levels, width, 0)
        gpu.insert_children(self.device.tree, stage, *on_device, reach[1], given_levels)
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
        nodes = self.rows(self.oracle, self.select(self.oracle, width), width, width)
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
            widths = range(1, self.shape.width + 1) if INTERPRETING else (1, self.shape.width // 2, self.shape.width)
            width, num_children = int(self.rng.choice(widths)), int(self.rng.choice(CHILDREN))
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
            kept = self.rows(stage, nodes, 4, 4)
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
