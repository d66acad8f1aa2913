"""Nothing about a launch of ``draw`` moves a bit of a row: not its neighbours, not the order of rows or programs, not
where the maxima of its tiles come from."""

import math

import pytest
import torch

from kernels import gpu
from tests.draws import RULES, each_path, maxima_of, random_logits, results
from tests.gpu_helpers import DTYPES, EPS, random_rows, same_bits
from tests.interpreter import DEVICE, INTERPRETING, reversed_programs

pytestmark = pytest.mark.usefixtures("hostile_scratch")


@each_path
@pytest.mark.skipif(not INTERPRETING, reason="only the interpreter can reverse the order of programs")
def test_order_of_programs(rule):
    logits = random_logits(5, 300, torch.bfloat16)
    logits[2] = -40.0
    forward = results(gpu, logits, RULES[rule])
    with reversed_programs():
        backward = results(gpu, logits, RULES[rule])
    assert all(map(same_bits, forward, backward))


@pytest.mark.parametrize("rule", ["greedy", "top_k=2", "plain"])
def test_row_among_128(rule):
    """A row has the same bits alone, in another order and among fewer; some overflow the narrow kernel, one is NaN."""
    logits, positions = random_logits(128, 111, torch.bfloat16), torch.arange(128, dtype=torch.int32, device=DEVICE)
    logits[5::16], logits[77, 3] = -40.0, math.nan
    whole = results(gpu, logits, RULES[rule], 2, positions=positions)
    order = random_rows(128)[0]
    for rows in (order[:40], order[40:41], torch.tensor([5, 77, 9])):
        some = results(gpu, logits[rows], RULES[rule], 2, positions=positions[rows].contiguous())
        assert all(same_bits(part, result[rows]) for part, result in zip(some, whole, strict=True))


@each_path
def test_rows_apart(rule):
    """Logits that are a view of longer rows, NaN between them, give the bits of contiguous ones."""
    logits = random_logits(3, 111, torch.bfloat16)
    view = torch.cat([logits, torch.full_like(logits[:, :17], math.nan)], 1)[:, :111]
    assert view.stride(0) == 128
    contiguous, apart = results(gpu, logits, RULES[rule]), results(gpu, view, RULES[rule])
    assert all(map(same_bits, contiguous, apart))


@DTYPES
@each_path
def test_tile_maxima(rule, dtype):
    """From the output head, computed from the logits, or not at all: the same bits."""
    x, wte = (torch.randn(size, 64).to(DEVICE, dtype) for size in (3, 300))
    ones, maxima = torch.ones(64, device=DEVICE, dtype=dtype), torch.empty(3, 5, device=DEVICE)
    logits = gpu.lm_head(x, ones, torch.zeros_like(ones), EPS, wte, maxima)
    given = results(gpu, logits, RULES[rule], maxima=maxima)
    assert all(map(same_bits, given, results(gpu, logits, RULES[rule])))
    assert all(map(same_bits, given, results(gpu, logits, RULES[rule], maxima=maxima_of(logits))))


@pytest.mark.parametrize("rule", ["greedy", "top_k=50"])
def test_only_tiles_that_can_hold_a_survivor_are_read(rule):
    """Maxima that hide a tile hide its logits: 8192 logits are not searched where 3 tiles suffice."""
    logits = random_logits(2, 8192)
    maxima = maxima_of(logits)
    tokens, *_ = results(gpu, logits, RULES[rule], maxima=maxima)
    logits[:, 64:128], hidden = -1.0, maxima.clone()
    hidden[:, 1] = -math.inf
    assert 64 <= results(gpu, logits, RULES[rule], maxima=maxima_of(logits))[0].min() < 128
    assert not ((results(gpu, logits, RULES[rule], maxima=hidden)[0] // 64) == 1).any() and len(tokens) == 2
