"""The models of a chain behind one contract: score nodes of the shared token tree.

What a pass needs (which committed tokens a stage has not seen, where K/V lies) is state of the generation, in tensors
that stay where the operations run; nothing here reads one.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch

from decoding.config import SpeculationConfig
from decoding.stats import Work
from kernels.layout import MAX_ROWS, NUM_CONTEXTS, Chain, Progress, Sampling, SuccessorTable, Tree
from model.gpt2 import GPT2, Query
from model.kv_cache import PagedKVCache


class State(NamedTuple):
    """What all stages of a generation share."""

    tree: Tree
    progress: Progress
    chain: Chain


class Scored(NamedTuple):
    """A stage's verdict on nodes."""

    nodes: torch.Tensor  # int32 [W], -1 = none
    tokens: torch.Tensor  # int32 [W], the token drawn at each
    children: torch.Tensor  # int32 [W, m], best first
    scores: torch.Tensor  # float32 [W, m], their edge scores, -inf = no child
    log_probs: torch.Tensor | None  # float32 [W, m], the same without noise and tau, for the stages below; None = none
    levels: torch.Tensor | None = None  # int32 [W], stages whose scoring this replaces, too, or 0


class Lease(NamedTuple):
    """The cache slots that one generation may use."""

    page_table: torch.Tensor  # int32 [positions], slot of each position of the context
    node_slots: torch.Tensor  # int32 [M]
    cached_len: int  # positions that hold the prompt already


Prefill = Callable[[GPT2, list[int], PagedKVCache], None]  # commits tokens to a cache


class Stage(ABC):
    """One model of the chain: what it does, its counters, and how many bytes its passes move."""

    name: str
    vocab_size: int
    context: int  # positions it can be fed
    device: torch.device  # where its passes run
    passes: int  # of this generation, prefill not counted
    seconds: float  # time the host spent in them, prefill included
    bytes_moved: int  # weights, K/V and table rows of these passes, by arithmetic
    memory: tuple  # what passes read and write beside the shared state; all of it outlives a generation
    in_use: threading.Lock  # held by the one generation that may use the stage
    remembers: int  # children of a node that it takes note of when a stage above draws
    is_table: bool  # as the lowest stage it is asked for all rounds at once, by ``extend``

    _pass_bytes = _kv_bytes = _row_bytes = 0  # of each pass, of each pass and token of the text, of each row

    @abstractmethod
    def begin(self, prompt: list[int], tree_capacity: int, prefill: Prefill) -> Lease | None:
        """Forget the last generation and read the prompt; None from a stage without a cache."""

    def begin_iteration(self, num_head: int) -> None:
        """The next pass must catch up with ``num_head`` more committed tokens at most, later ones with none."""
        return  # a table has no cache

    @abstractmethod
    def score(
        self, state: State, index: int, nodes: torch.Tensor, sampling: Sampling, num_children: int, tau: float
    ) -> Scored:
        """One pass as stage ``index`` of the chain; nodes that found no room are left out of the result."""

    def extend(self, state: State, config: SpeculationConfig, sampling: Sampling) -> None:
        """All rounds of a table that is the lowest stage: look up the best nodes and insert what it says."""
        raise TypeError(f"stage {self.name!r} is no table: it scores nodes")

    def learn(self, state: State, verdict: Scored, level: int) -> None:
        """Take note of what the stage above stage ``level`` has just drawn."""
        return  # a GPT-2 does not learn

    def end(self) -> None:
        """Give everything back that the generation holds; the counters stay."""
        return  # a table holds nothing

    def take_work(self) -> Work:
        """What was asked of this stage since the last call; it is not counted yet."""
        work, self._work = self._work, Work()
        return work

    def account(self, work: Work, length: int) -> None:
        """Count the work of one iteration, which was done below a text of ``length`` tokens."""
        self.passes += work.passes
        self.seconds += work.seconds
        per_pass = self._pass_bytes + length * self._kv_bytes
        self.bytes_moved += work.passes * per_pass + work.rows * self._row_bytes

    def _reset_counters(self) -> None:
        self.passes, self.seconds, self.bytes_moved = 0, 0.0, 0
        self._work = Work()

    def _add_work(self, passes: int, rows: int, start: float) -> None:
        """Passes that took the host the time since ``start``."""
        work = self._work
        seconds = work.seconds + time.perf_counter() - start
        self._work = Work(work.passes + passes, work.rows + rows, seconds)


class KatzStage(Stage):
    """draft²: a look-up per node, in what a stage above drew after the same last 8, 4 or 2 tokens, or else in what
    follows two of them in the prompt, or else in a baked table.

    What the oracle drew it takes for as good as what the stage below the oracle would say, which is not asked then.
    """

    context = 2**30
    num_recent, remembers, is_table = 2**16, 8, True  # 5.5 MB

    def __init__(self, name: str, table: SuccessorTable, ops: ModuleType):
        self.name, self.table, self.ops = name, table, ops
        self.vocab_size, self.device = table.vocab_size, table.tokens.device
        self._on_host = SuccessorTable(*(column.cpu() for column in table[:-1]), table.vocab_size)
        self.recent = ops.new_recent(self.num_recent, self.remembers, table.tokens.device)
        self.in_use = threading.Lock()
        self._row_bytes = table.tokens.shape[1] * 8 + 16 + 8 * NUM_CONTEXTS  # a row and its number, all keys
        self._forget()

    @property
    def memory(self) -> tuple:
        return self.table, self.recent

    def begin(self, prompt: list[int], tree_capacity: int, prefill: Prefill) -> None:
        self._forget()
        start = time.perf_counter()
        self.ops.learn_text(self.recent, self._on_host, prompt)
        self.seconds = time.perf_counter() - start

    def _forget(self) -> None:
        self._reset_counters()
        self.recent.keys.fill_(-1)

    def score(self, state, index, nodes, sampling, num_children, tau):
        start = time.perf_counter()
        children, scores, levels = self.ops.lookup_nodes(
            self.table, state.tree, nodes, state.progress, sampling, num_children, tau, self.recent
        )
        self._add_work(1, len(nodes), start)
        return Scored(nodes, children[:, 0], children, scores, None, levels)

    def extend(self, state, config, sampling):
        start = time.perf_counter()
        shape = config.rounds[0], config.widths[0], config.children[0]
        rows = self.ops.extend_tree(self.table, state.tree, state.progress, sampling, *shape, config.tau, self.recent)
        self._add_work(config.rounds[0], rows, start)

    def learn(self, state, verdict, level):
        if verdict.log_probs is not None:
            start = time.perf_counter()
            tree, progress, _ = state
            for nodes, *drawn in _parts(verdict.nodes, verdict.children, verdict.log_probs):  # in their order
                self.ops.learn(self.recent, tree, nodes, progress, *drawn, level)
            self._add_work(0, 0, start)


class GPT2Stage(Stage):
    """A GPT-2 with its own cache; draft or oracle, the code is the same.

    The cache is a prefix of the committed text. Committed tokens it has not seen go at the head of the next pass. A
    node's K/V stays until the node is dropped, so a subtree that survives an iteration is not computed again.
    """

    remembers, is_table = 0, False

    def __init__(self, name: str, model: GPT2):
        self.name, self.model = name, model
        self.vocab_size, self.context = model.config.vocab_size, model.config.n_positions
        self.cache, self.device = None, model.device
        self.in_use = threading.Lock()
        weights = model.weights
        self._kv_bytes = self._row_bytes = 2 * model.config.n_layer * model.config.n_embd * weights.wte.element_size()
        self._pass_bytes = weights.bytes_per_pass
        self._cache_index = self._num_head = 0
        self._reset_counters()

    @property
    def memory(self) -> tuple:
        return self.model, self.cache

    def begin(self, prompt: list[int], tree_capacity: int, prefill: Prefill) -> Lease:
        self._reset_counters()
        self._num_head = 0
        pages = self.context + tree_capacity
        if self.cache is None or self.cache.num_pages < pages:
            self.cache = self.model.new_cache(pages)
        else:
            self.cache.reset()
        start = time.perf_counter()
        if 1 < len(prompt) <= self.context:
            prefill(self.model, prompt[:-1], self.cache)
        self.seconds = self.prefill_seconds = time.perf_counter() - start
        cached_len = self.cache.cached_len[0]
        self.cache.append(self.context - cached_len)
        return Lease(self.cache.slots(0, self.context), self.cache.reserve(tree_capacity), cached_len)

    def attach(self, cache_index: int, room: Callable[[int, int], int]) -> None:
        """This stage's row of the chain, and how many rows a pass has for nodes: ``SpeculationConfig.room``."""
        self._cache_index, self._room = cache_index, room

    def begin_iteration(self, num_head: int) -> None:
        self._num_head += num_head

    def score(self, state, index, nodes, sampling, num_children, tau):
        start = time.perf_counter()
        tree, progress, chain = state
        model, ops = self.model, self.model.ops
        if len(nodes) == 0:  # as the host may know; on a GPU there are as many as were asked for
            empty = tree.edge_scores.new_empty(0, 0)
            return Scored(nodes, nodes, empty.int(), empty, None)
        reach = progress.reach[index]
        room = self._room(len(nodes), self._num_head)
        rows = ops.stage_rows(tree, nodes, progress, chain, self._cache_index, reach, self._num_head, room)
        self._num_head = 0
        hidden, moments, num_passes = self._forward(rows, chain, progress)
        row_of, positions = _on(model.device, rows.row_of, rows.draw_positions)
        tile_maxima = ops.new_tile_maxima(len(row_of), self.vocab_size, model.device)
        logits = model.logits(hidden, tile_maxima, row_of, moments)
        width, log_probs = min(num_children, self.vocab_size), None
        if width and index > 0:  # there are stages below, and they learn from it
            log_probs = logits.new_empty(len(row_of), width, dtype=torch.float32)
        sampling = sampling.to(ops.state_device(model.device))
        drawn = ops.draw(logits, positions, sampling, num_children, tau, tile_maxima, child_log_probs=log_probs)
        self._add_work(num_passes, rows.tokens.shape[0], start)
        return Scored(rows.nodes, *_on(tree.tokens.device, *drawn, log_probs))

    def _forward(self, rows, chain: Chain, progress: Progress) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Last hidden states of all rows, [R, C], their moments, and the number of passes; many rows go in several,
        parents first."""
        index, device = self._cache_index, self.model.device
        shared = (chain.node_slots[index], chain.page_tables[index : index + 1], progress.length)
        node_slots, *where = _on(device, *shared)
        moments = self.model.ops.new_moments(len(rows.tokens), self.model.config.n_embd, device)
        passes = list(_parts(*_on(device, *rows[:5])))
        left = [None] * len(passes) if moments is None else moments.split(MAX_ROWS)
        parts = [
            self.model.forward(Query(*part, node_slots), self.cache, *where, moments=of)
            for part, of in zip(passes, left, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts), moments, len(parts)

    def end(self) -> None:
        self.cache.reset()


def _on(device: torch.device, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """``tensors``, which lie in one place, on ``device``: what the stages share need not be where a model runs."""
    if tensors[0].device == device:
        return tensors
    return tuple(tensor if tensor is None else tensor.to(device) for tensor in tensors)


def _parts(*columns: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """``columns`` cut to at most MAX_ROWS rows."""
    if columns[0].shape[0] <= MAX_ROWS:
        return [columns]
    return zip(*(column.split(MAX_ROWS) for column in columns), strict=True)


def begin_all(
    stages: list[Stage], prompt: list[int], config: SpeculationConfig, ops: ModuleType, prefill: Prefill
) -> Chain:
    """Begin a generation on every stage, the oracle last: the chain of their caches."""
    leases = []
    for index, stage in enumerate(stages):
        lease = stage.begin(prompt, config.capacity, prefill)
        if lease is not None:
            stage.attach(len(leases), partial(config.room, index))
            leases.append(lease)
    device = ops.state_device(stages[-1].model.device)
    tables, slots, lengths = zip(*leases, strict=True)
    return ops.new_chain(list(tables), list(slots), list(lengths), device)
