"""What the tests of bit-exactness on the Triton backend share: small models, caches that hold a text, and a tree with
its logits from plain decoding."""

import copy
import functools

import pytest
import torch

from kernels import gpu
from model.gpt2 import GPT2, Query
from model.kv_cache import PagedKVCache
from tests.gpu_helpers import REAL_SHAPE
from tests.helpers import (
    LENGTHS,
    Branch,
    decode_paths,
    poisoned_cache,
    prepared,
    random_tokens,
    random_tree,
    tiny_gpt2,
)
from tests.interpreter import DEVICE

SHAPES = {
    "small": {"n_layer": 1, "n_head": 1},
    "two layers": {"n_layer": 2, "n_head": 1},
    "large": {"n_layer": 2, "n_head": 20, "vocab_size": 50257},  # GPT-2 Large's width and output head
}
NUM_SLOTS = 400


def shapes(small: str):
    """The test runs on the small shape named, and on GPT-2 Large's width where there is a GPU."""
    return pytest.mark.parametrize("shape", [small, pytest.param("large", marks=REAL_SHAPE)])


def model_of(shape: str, dtype: torch.dtype) -> GPT2:
    return tiny_gpt2(dtype, gpu, DEVICE, **SHAPES[shape])


@functools.cache
def _holding(shape: str, dtype: torch.dtype, length: int) -> PagedKVCache:
    model, below = model_of(shape, dtype), max((n for n in LENGTHS if n < length), default=0)
    cache = holding(shape, dtype, below) if length else poisoned_cache(model, NUM_SLOTS, shuffle=0)
    model.prefill(random_tokens(length)[below:], cache)
    return cache


def holding(shape: str, dtype: torch.dtype, length: int) -> PagedKVCache:
    """A cache that holds ``random_tokens(length)``, every other slot NaN. A copy: computed once, in many passes."""
    return copy.deepcopy(_holding(shape, dtype, length))


@functools.cache
def example(shape: str, dtype: torch.dtype) -> tuple[GPT2, Branch, torch.Tensor]:
    """A model, a tree of 17 nodes below 150 tokens, and its logits from plain decoding, computed once.

    The tree is more than 10 deep, so that its rows lie on both sides of position 160, where a window of 128 fills.
    """
    model, branch = model_of(shape, dtype), Branch(random_tokens(150), random_tree(17, seed=14))
    assert branch.tree.depths.max() > 10
    return model, branch, decode_paths(model, *branch[:2], cache=holding(shape, dtype, 150))


def prepared_example(shape: str, dtype: torch.dtype) -> tuple[Query, PagedKVCache]:
    model, branch, _ = example(shape, dtype)
    return prepared(model, branch, cache=holding(shape, dtype, 150))
