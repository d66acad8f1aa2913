"""GPT-2's shape, and the one key to the dimension letters used in shape comments everywhere.

N  query rows of one pass            T  cached tokens of a sequence      B  sequences
L  layers                            H  heads                            D  head dimension
C  model width, H * D                V  vocabulary                       S  page size in tokens
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Hugging Face's names of activation functions, by the epilogue that computes them.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a GPT-2 checkpoint's ``config.json`` that shape the forward pass, under the same names."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: str  # "gelu_tanh" or "gelu"
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def attention_scale(self, layer: int) -> float:
        """Factor of the query-key products in ``layer``."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "GPT2Config":
        """From the contents of a ``config.json``. Raises ValueError for anything the forward pass does not compute."""
        model_type = fields.get("model_type")
        if model_type != "gpt2":
            raise ValueError(f"model_type must be 'gpt2', got {model_type!r}")
        activation = fields.get("activation_function", "gelu_new")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation_function must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if fields.get("add_cross_attention"):
            raise ValueError("add_cross_attention must be false: cross attention is not computed")
        width, heads = _positive(fields, "n_embd", 768), _positive(fields, "n_head", 12)
        if width % heads:
            raise ValueError(f"n_embd must be a multiple of n_head, got {width} and {heads}")
        epsilon = fields.get("layer_norm_epsilon", 1e-5)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
            raise ValueError(f"layer_norm_epsilon must be a finite number above 0, got {epsilon!r}")
        vocab_size = _positive(fields, "vocab_size", 50257)
        return cls(
            vocab_size=vocab_size,
            n_positions=_positive(fields, "n_positions", 1024),
            n_embd=width,
            n_layer=_positive(fields, "n_layer", 12),
            n_head=heads,
            n_inner=4 * width if fields.get("n_inner") is None else _positive(fields, "n_inner", 0),
            activation=ACTIVATIONS[activation],
            layer_norm_epsilon=float(epsilon),
            scale_attn_weights=bool(fields.get("scale_attn_weights", True)),
            scale_attn_by_inverse_layer_idx=bool(fields.get("scale_attn_by_inverse_layer_idx", False)),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", True)),
            eos_token_ids=eos_token_ids(fields.get("eos_token_id"), vocab_size),
        )


def eos_token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that an ``eos_token_id`` field names: none, one or a list. An id beyond the vocabulary can never be drawn
    and is left out, as in Hugging Face (small test models keep GPT-2's 50256). Raises ValueError for anything else."""
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(token for token in ids if token < vocab_size)


def _positive(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value
