"""Our forward pass computes GPT-2: logits agree with Hugging Face's eager float32 model for every supported config,
and however a prompt is cut into prefill passes, the bits are the same."""

import functools

import pytest
import torch

from kernels.layout import MAX_ROWS
from tests.helpers import LOGIT_TOLERANCES, assert_close, assert_same_rows, hf_model, random_tokens, tiny_gpt2

CONTEXT = 1024
# one row; around a block of 16 rows; the last length below one window of 128; the last two of the context
LENGTHS = [1, 2, 15, 16, 17, 127, 1023, 1024]
CHUNKS = [16, 50, MAX_ROWS]
SHAPES = {
    "1 layer, 1 head": {"n_layer": 1, "n_head": 1, "vocab_size": 97},
    "4 layers, 1 head": {"n_layer": 4, "n_head": 1, "vocab_size": 101},
    "2 layers, 3 heads": {"n_layer": 2, "n_head": 3, "vocab_size": 211},
    "3 layers, 3 heads": {"n_layer": 3, "n_head": 3, "vocab_size": 128},
    "1 layer, 25 heads": {"n_layer": 1, "n_head": 25, "vocab_size": 97},  # the width of GPT-2 XL
}
VARIANTS = {
    "exact gelu": {"activation_function": "gelu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled attention": {"scale_attn_weights": False},
    "narrow mlp": {"n_inner": 96},
    "large epsilon": {"layer_norm_epsilon": 1e-3},
    "untied head": {"tie_word_embeddings": False},
}


def named(cases: dict) -> dict:
    """Arguments of parametrize for a table of cases by name."""
    return {"argvalues": list(cases.values()), "ids": [name.replace(" ", "-") for name in cases]}


@functools.cache
def hf_logits(**fields) -> torch.Tensor:
    """HF's logits of the whole context [CONTEXT, V]; row i is also the last row of the prompt cut after token i."""
    tokens = random_tokens(CONTEXT, vocab_size=fields["vocab_size"])
    with torch.inference_mode():
        return hf_model(**fields)(torch.tensor([tokens])).logits[0]


def assert_near(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert_close(logits, expected, dtype, LOGIT_TOLERANCES)


def our_logits(length: int, chunk: int, dtype: torch.dtype = torch.float32, **fields) -> torch.Tensor:
    """Our logits [length, V] of the same tokens, prefilled in passes of at most ``chunk`` rows."""
    model = tiny_gpt2(dtype, **fields)
    tokens = random_tokens(CONTEXT, vocab_size=fields["vocab_size"])[:length]
    return model.logits(model.prefill(tokens, model.new_cache(length), chunk=chunk))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", **named(SHAPES))
def test_logits_are_those_of_hf(shape, length):
    """Every position's logits agree with HF, at every length, prefilled in one pass."""
    assert_near(our_logits(length, length, **shape), hf_logits(**shape)[:length])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", **named({name: SHAPES[name] for name in ("1 layer, 1 head", "2 layers, 3 heads")}))
def test_chunks_do_not_change_a_bit(shape, length):
    """Prefill in chunks, also of an odd size, equals prefill in one pass."""
    whole = our_logits(length, length, **shape)
    for chunk in CHUNKS:
        assert_same_rows(our_logits(length, chunk, **shape), whole)


@pytest.mark.parametrize(("length", "chunk"), [(17, 16), (127, 50), (CONTEXT, MAX_ROWS)])
def test_chunks_at_25_heads(length, chunk):
    """The same where libraries change their products' order with the number of rows: K of 1600 and 6400."""
    shape = SHAPES["1 layer, 25 heads"]
    assert_same_rows(our_logits(length, chunk, **shape), our_logits(length, length, **shape))


@pytest.mark.parametrize("variant", **named(VARIANTS))
def test_config_variants(variant):
    """Each field of the config that changes the computation is followed; 200 rows reach the shared windows."""
    fields = SHAPES["2 layers, 3 heads"] | variant
    logits = our_logits(200, MAX_ROWS, **fields)
    assert_near(logits, hf_logits(**fields)[:200])
    plain = hf_logits(**SHAPES["2 layers, 3 heads"])[:200]
    assert (logits - plain).abs().max() > 1e-3, "the variant makes no difference, so this test would prove nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_near(dtype):
    """In half precision the logits stay near float32's: no step loses more than rounding."""
    fields = SHAPES["2 layers, 3 heads"]
    assert_near(our_logits(200, MAX_ROWS, dtype, **fields), hf_logits(**fields)[:200], dtype)


def test_short_context():
    """n_positions is read from the config: a context of 40 works to its end, and one more position is refused."""
    fields = {"n_layer": 1, "n_head": 1, "vocab_size": 97, "n_positions": 40}
    model, tokens = tiny_gpt2(**fields), random_tokens(40)
    cache = model.new_cache(64)
    with torch.inference_mode():
        expected = hf_model(**fields)(torch.tensor([tokens])).logits[0]
    assert_near(model.logits(model.prefill(tokens, cache)), expected)
    with pytest.raises(ValueError, match=r"40 \+ 1 positions exceed the context of 40"):
        model.append([0], cache)
