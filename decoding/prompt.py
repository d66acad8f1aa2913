"""Passes over a prompt, captured: a graph for each cache and number of rows, shorter rests padded with dead rows.

A pass of GPT-2 Large is some 190 launches, which take Python ten times as long as the GPU. A row's bits do not depend
on the rows beside it, so a padded pass leaves the K/V that an exact one does. Passes of more than MAX_ROWS rows are
multiples of it already (``GPT2.parts``) and are never padded.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch

from kernels.layout import MAX_ROWS
from model.capture import Graph
from model.gpt2 import GPT2, Query
from model.kv_cache import PagedKVCache

LEAST_ROWS = 16
MAX_PASSES = 48  # that are kept, the latest used ones


class PromptPass:
    """One captured pass over committed rows, in buffers of its own."""

    def __init__(self, model: GPT2, cache: PagedKVCache, num_rows: int, graph: Graph):
        put = {"dtype": torch.int32, "device": model.device}
        self._cache, self._graph, self._num_rows = weakref.ref(cache), graph, num_rows
        self._columns = torch.tensor([[0], [0], [-1], [0]], **put).repeat(1, num_rows)
        tokens, positions, slots, committed = self._columns
        zeros = torch.zeros(num_rows, 1, **put)  # no tree, one sequence
        query = Query(tokens, positions, zeros[:, 0], slots, zeros, zeros[0])
        self._read_by_graph = query, committed  # which knows only where they lie
        graph.capture(lambda: model.forward(query, cache, cache.page_table, committed[:1]))

    @property
    def cache(self) -> PagedKVCache | None:
        """What it commits to, which its stage owns; None once that has been replaced."""
        return self._cache()

    def run(self, tokens: list[int]) -> None:
        """Commit ``tokens``, at most as many as there are rows."""
        start, n = self.cache.cached_len[0], len(tokens)
        columns = torch.tensor([[0], [0], [-1], [start + n]], dtype=torch.int32).repeat(1, self._num_rows)
        columns[0, :n] = torch.tensor(tokens, dtype=torch.int32)
        columns[1, :n] = torch.arange(start, start + n, dtype=torch.int32)
        columns[2, :n] = self.cache.append(n)
        self._columns.copy_(columns)
        self._graph.replay()


class PromptPasses:
    """Captured passes by cache and number of rows."""

    def __init__(self, new_graph: Callable[[], Graph]):
        self._new_graph = new_graph
        self._passes: OrderedDict[tuple[int, int], PromptPass] = OrderedDict()  # least recently used first

    @torch.inference_mode()
    def prefill(self, model: GPT2, tokens: list[int], cache: PagedKVCache) -> None:
        """Commit ``tokens`` to sequence 0 of ``cache``, with the K/V that ``model.prefill`` leaves."""
        for part in model.parts(len(tokens)):
            self._pass(model, part.stop - part.start, cache).run(tokens[part])

    def _pass(self, model: GPT2, num_tokens: int, cache: PagedKVCache) -> PromptPass:
        num_rows = num_tokens
        if num_tokens <= MAX_ROWS:
            num_rows = max(LEAST_ROWS, 1 << (num_tokens - 1).bit_length())
        for key in [key for key, one in self._passes.items() if one.cache is None]:
            del self._passes[key]  # before another cache takes its place in memory, and its id
        key = id(cache), num_rows
        if key not in self._passes:
            self._passes[key] = PromptPass(model, cache, num_rows, self._new_graph())
        self._passes.move_to_end(key)
        if len(self._passes) > MAX_PASSES:
            self._passes.popitem(last=False)
        return self._passes[key]
