"""The models of a chain behind one contract: score nodes of the shared token tree, commit what the oracle accepted."""

import time
from types import ModuleType
from typing import Protocol

import torch

from kernels.layout import DEPTH_LIMIT, MAX_ROWS, Sampling, SuccessorTable, Tree
from model.gpt2 import GPT2, Query


class Stage(Protocol):
    """One model of the chain. ``text`` is the committed text; its last token is the tree's root."""

    name: str
    vocab_size: int
    passes: int  # passes of this generation, prefill not counted
    seconds: float  # time spent in them, prefill included
    bytes_moved: int  # weights, K/V and table rows of these passes, by arithmetic

    def begin(self, tree_capacity: int) -> None:
        """Forget the last generation; trees will hold at most ``tree_capacity`` nodes."""

    def max_depth(self, text_len: int) -> int:
        """Deepest node that can be scored below a text of ``text_len`` tokens; negative if the root itself cannot."""

    def score(
        self, tree: Tree, nodes: torch.Tensor, text: list[int], sampling: Sampling, num_children: int, tau: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Children int32 [n, m] of ``nodes`` int32 [n], their edge scores float32 [n, m], drawn tokens int32 [n]."""

    def end(self) -> None:
        """Give everything back that the generation holds; the counters stay."""

    def commit(self, accepted: list[int], kept: torch.Tensor) -> None:
        """Follow the tree to its new root: ``accepted`` nodes become text, ``kept`` names the nodes that stay."""


class KatzStage:
    """draft²: a table look-up per node. No cache, no state."""

    def __init__(self, name: str, table: SuccessorTable, ops: ModuleType):
        self.name, self.table, self.ops = name, table, ops
        self.vocab_size = table.vocab_size
        self._row_bytes = table.tokens.shape[1] * 8 + 16
        self.begin(0)

    def begin(self, tree_capacity: int) -> None:
        self.passes, self.seconds, self.bytes_moved = 0, 0.0, 0

    def max_depth(self, text_len: int) -> int:
        return DEPTH_LIMIT

    def score(self, tree, nodes, text, sampling, num_children, tau):
        start = time.perf_counter()
        parents = tree.parents[nodes]
        previous = torch.where(parents >= 0, tree.tokens[parents], text[-2] if len(text) > 1 else -1)
        positions = tree.depths[nodes] + len(text)
        children, scores = self.ops.lookup(
            self.table, previous, tree.tokens[nodes], positions, sampling, num_children, tau
        )
        self.passes += 1
        self.bytes_moved += len(nodes) * self._row_bytes
        self.seconds += time.perf_counter() - start
        return children, scores, children[:, 0]

    def commit(self, accepted, kept):
        pass

    def end(self):
        pass


class GPT2Stage:
    """A GPT-2 with its own paged cache; draft or oracle, the code is the same.

    The cache is a prefix of the committed text. Committed tokens it has not seen go at the head of the next pass, or
    through prefill when there are many. A node's K/V stays until the node is dropped, so a subtree that survives an
    iteration is not computed again.
    """

    def __init__(self, name: str, model: GPT2, page_size: int = 1):
        self.name, self.model, self.page_size = name, model, page_size
        self.vocab_size = model.config.vocab_size
        self.cache = None
        weights = model.weights
        self._kv_bytes = 2 * model.config.n_layer * model.config.n_embd * weights.wte.element_size()
        self._weight_bytes = weights.bytes_per_pass
        self.begin(0)

    def begin(self, tree_capacity: int) -> None:
        size = self.page_size
        pages = -(-self.model.config.n_positions // size) + tree_capacity
        if self.cache is None or self.cache.num_pages < pages:
            self.cache = self.model.new_cache(pages, size)
        else:
            self.cache.reset()
        self.node_slots = torch.full((max(1, tree_capacity),), -1, dtype=torch.int32)
        self.passes, self.seconds, self.bytes_moved, self.prefill_seconds = 0, 0.0, 0, 0.0

    def max_depth(self, text_len: int) -> int:
        return self.model.config.n_positions - text_len

    def score(self, tree, nodes, text, sampling, num_children, tau):
        start = time.perf_counter()
        hidden = self._run(tree, nodes, text)
        logits = self.model.logits(hidden)
        positions = (tree.depths[nodes] + len(text)).to(logits.device)
        tokens, children, scores = self.model.ops.draw(logits, positions, sampling, num_children, tau)
        tokens, children, scores = tokens.cpu(), children.cpu(), scores.cpu()
        self.seconds += time.perf_counter() - start
        if int(tokens.min()) < 0:
            raise FloatingPointError(f"stage {self.name!r} produced NaN logits at text length {len(text)}")
        return children, scores, tokens

    def _run(self, tree: Tree, nodes: torch.Tensor, text: list[int]) -> torch.Tensor:
        """One pass over the committed tokens not yet cached and ``nodes``: last hidden states of ``nodes``, [n, C]."""
        cache = self.cache
        self._prefill(text)
        head = text[cache.cached_len[0] :]  # ends with the root, or is empty where the root is cached
        needed = tree.paths[nodes].flatten().unique()  # ancestors that only a higher stage has scored come along
        needed = needed[needed > 0]
        below = needed[self.node_slots[needed] < 0]
        head_slots = cache.append(len(head))
        below_slots = cache.reserve(len(below))
        self.node_slots[below] = below_slots
        root_position = len(text) - 1
        columns = (
            torch.cat([torch.tensor(head, dtype=torch.int32), tree.tokens[below]]),
            torch.cat(
                [
                    torch.arange(root_position + 1 - len(head), root_position + 1, dtype=torch.int32),
                    root_position + tree.depths[below],
                ]
            ),
            torch.cat([head_slots, below_slots]),
            torch.cat([tree.paths.new_zeros(len(head), tree.paths.shape[1]), tree.paths[below]]),
        )
        passes = zip(*(column.split(MAX_ROWS) for column in columns), strict=True)  # parents are in earlier rows
        hidden = torch.cat([self.model.forward(self._query(*rows), cache) for rows in passes])
        num_rows = len(head) + len(below)
        num_passes = -(-num_rows // MAX_ROWS)
        self.passes += num_passes
        self.bytes_moved += num_passes * (self._weight_bytes + (len(text) + num_rows) * self._kv_bytes)
        row_of = torch.searchsorted(below, nodes) + len(head)
        return hidden[torch.where(nodes == 0, len(head) - 1, row_of).to(hidden.device)]

    def _query(self, tokens, positions, slots, paths) -> Query:
        rows = (tokens, positions, torch.zeros_like(tokens), slots, paths, self.node_slots)
        return Query(*(row.to(self.model.device) for row in rows))

    def _prefill(self, text: list[int]) -> None:
        start = time.perf_counter()
        missing = len(text) - 1 - self.cache.cached_len[0]
        if missing > DEPTH_LIMIT:
            self.model.prefill(text[self.cache.cached_len[0] : -1], self.cache)
            self.prefill_seconds += time.perf_counter() - start

    def commit(self, accepted, kept):
        slots = self.node_slots
        path = [*accepted, int(kept[0])]  # the new root, where it was a node of the tree
        linked = []
        for node in path:
            if node < 0 or slots[node] < 0:
                break
            linked.append(node)
        self.cache.commit(slots[linked].tolist())
        stays = torch.zeros(len(slots), dtype=torch.bool)
        stays[kept[kept > 0].long()] = True
        stays[linked] = True
        dropped = slots[(slots >= 0) & ~stays]
        self.cache.release(dropped.tolist())
        renamed = torch.full_like(slots, -1)
        renamed[1 : len(kept)] = slots[kept[1:]]
        self.node_slots = renamed

    def end(self):
        self.cache.reset()
