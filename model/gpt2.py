"""GPT-2's forward pass over flat query rows and a paged KV cache: straight-line code over the fused operations."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from kernels.layout import MAX_ROWS
from model.config import GPT2Config
from model.kv_cache import PagedKVCache
from model.weights import GPT2Weights, Layer


class Query(NamedTuple):
    """The rows of one pass: int32, flat, on the model's device."""

    tokens: torch.Tensor  # [N]
    positions: torch.Tensor  # [N], absolute
    sequences: torch.Tensor  # [N], which page table row resolves the committed positions
    slot_mapping: torch.Tensor  # [N], where this row's K/V goes, -1 = nowhere
    paths: torch.Tensor  # [N, DEPTH_LIMIT + 1], node ids, root first; unused for committed positions
    node_slots: torch.Tensor  # [nodes], where each tree node's K/V lies


class GPT2:
    """A GPT-2 whose every operation comes from ``ops`` (``kernels.reference`` or its Triton counterpart)."""

    def __init__(self, config: GPT2Config, weights: GPT2Weights, ops: ModuleType):
        self.config, self.weights, self.ops = config, weights.map_matrices(ops.packed), ops
        self.dtype, self.device = weights.wte.dtype, weights.wte.device
        self._layers = [self._arguments(layer, i) for i, layer in enumerate(self.weights.layers)]

    def _arguments(self, layer: Layer, index: int) -> tuple:
        """What the operations of a layer take of it, one tuple for each linear one, and the scale of attention."""
        config = self.config
        eps = config.layer_norm_epsilon
        return (
            (layer.ln_1_weight, layer.ln_1_bias, eps, layer.c_attn_weight, layer.c_attn_bias),
            (layer.attn_c_proj_weight, layer.attn_c_proj_bias),
            (layer.ln_2_weight, layer.ln_2_bias, eps, layer.c_fc_weight, layer.c_fc_bias, config.activation),
            (layer.mlp_c_proj_weight, layer.mlp_c_proj_bias),
            config.attention_scale(index),
        )

    def new_cache(self, num_pages: int, page_size: int = 1, num_sequences: int = 1) -> PagedKVCache:
        """An empty cache for this model with ``num_pages`` usable pages of ``page_size`` tokens."""
        config = self.config
        return PagedKVCache(
            config.n_layer,
            config.n_head,
            config.head_dim,
            config.n_positions,
            num_pages,
            page_size,
            num_sequences,
            self.dtype,
            self.device,
        )

    def forward(
        self,
        query: Query,
        cache: PagedKVCache,
        page_table: torch.Tensor | None = None,  # int32 [B, pages], None = the cache's own
        committed: torch.Tensor | None = None,  # int32 [B], None = the cache's own lengths
        moments: torch.Tensor | None = None,  # of ``ops.new_moments``, left with those of the result
    ) -> torch.Tensor:
        """Write the rows' K/V into their slots and return the last hidden states [N, C], before the final norm.

        A row attends to the committed positions below its own (the rows of this pass that are committed included) and
        to the nodes of its path. Row r's result depends on its own path alone, bit for bit.
        """
        ops, config, weights = self.ops, self.config, self.weights
        if committed is None:
            committed = torch.tensor(cache.cached_len, dtype=torch.int32, device=self.device)
        route = ops.route(
            cache.page_table if page_table is None else page_table,
            cache.page_size,
            committed,
            query.sequences,
            query.positions,
            query.paths,
            query.node_slots,
            query.slot_mapping,
        )
        num_rows = query.tokens.shape[0]
        if moments is None:
            moments = ops.new_moments(num_rows, config.n_embd, self.device)  # of x, for layer norms
        x = ops.embed(query.tokens, query.positions, weights.wte, weights.wpe, moments)
        x = ops.pad_rows(x, weights.layers[0].c_attn_weight)  # [N or a few more, C]
        for (c_attn, attn_proj, c_fc, mlp_proj, scale), (k, v) in zip(self._layers, cache.layers, strict=True):
            q = ops.layer_norm_qkv(x, *c_attn, k, v, route, moments)
            mixed = ops.tree_attention(q, k, v, route, scale)
            x = ops.linear_residual(mixed, *attn_proj, x, moments)
            h = ops.layer_norm_linear(x, *c_fc, moments)
            x = ops.linear_residual(h, *mlp_proj, x, moments)
        return x[:num_rows]

    def logits(
        self,
        hidden: torch.Tensor,  # [R, C]
        tile_maxima: torch.Tensor | None = None,  # as in ``lm_head``
        rows: torch.Tensor | None = None,  # int32 [N], None = all of ``hidden``
        moments: torch.Tensor | None = None,  # of ``hidden``, as ``forward`` left them
    ) -> torch.Tensor:
        """Next-token logits [N, V] of hidden states, in the model's dtype."""
        weights = self.weights
        norm = weights.ln_f_weight, weights.ln_f_bias, self.config.layer_norm_epsilon
        return self.ops.lm_head(hidden, *norm, weights.lm_head, tile_maxima, rows, moments)

    def append(self, tokens: list[int], cache: PagedKVCache, sequence: int = 0) -> torch.Tensor:
        """Commit ``tokens`` to ``cache`` in one pass: hidden states [n, C]."""
        start = cache.cached_len[sequence]
        slots = cache.append(len(tokens), sequence)
        positions = torch.arange(start, start + len(tokens), dtype=torch.int32)
        return self.forward(self.committed_rows(tokens, positions, slots, sequence), cache)

    def committed_rows(
        self, tokens: list[int], positions: torch.Tensor, slots: torch.Tensor, sequence: int = 0
    ) -> Query:
        """A query of rows at committed positions, which need no paths."""
        n = len(tokens)
        put = {"dtype": torch.int32, "device": self.device}
        return Query(
            tokens=torch.tensor(tokens, **put),
            positions=positions.to(self.device),
            sequences=torch.full((n,), sequence, **put),
            slot_mapping=slots.to(self.device),
            paths=torch.zeros(n, 1, **put),
            node_slots=torch.zeros(1, **put),
        )

    def prefill(
        self, tokens: list[int], cache: PagedKVCache, sequence: int = 0, chunk: int | None = None
    ) -> torch.Tensor:
        """Commit any number of ``tokens`` in passes of at most ``chunk`` rows; hidden states [n, C] of all of them.

        Passes of more than MAX_ROWS rows are multiples of it: on the GPU they have tiles of their own, so which
        tiles a position gets depends on its distance to the end alone, and prompts may share K/V up to such a border.
        """
        hidden = self.weights.wte.new_empty(len(tokens), self.config.n_embd)
        with torch.inference_mode():
            for part in self.parts(len(tokens), chunk):
                hidden[part] = self.append(tokens[part], cache, sequence)
        return hidden

    def parts(self, num_tokens: int, chunk: int | None = None) -> Iterator[slice]:
        """The passes of a prefill, as ``prefill`` cuts it."""
        start = 0
        while start < num_tokens:
            n = min(chunk or self.ops.PREFILL_ROWS, num_tokens - start)
            n -= n % MAX_ROWS if n > MAX_ROWS else 0
            yield slice(start, start + n)
            start += n
