"""A pass of the Triton backend has the same bits in another order of programs, again and again, and in another
process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bit_exact_models import example, holding, model_of, prepared_example, shapes
from tests.gpu_helpers import DTYPES
from tests.helpers import (
    assert_same_rows,
    random_tokens,
    random_tree,
    run_tree,
)
from tests.interpreter import INTERPRETING, reversed_programs

pytestmark = pytest.mark.usefixtures("hostile_scratch")


@DTYPES
@pytest.mark.skipif(not INTERPRETING, reason="only the interpreter can reverse the order of programs")
def test_reversed_programs(dtype):
    """Programs run last to first, so another one arrives last everywhere, and no bit moves.

    Below 289 tokens every part of the attention has windows: with fewer, two sums are merged, in either order the same.
    """
    model, text, tree = model_of("small", dtype), random_tokens(289), random_tree(5, seed=1)
    forward = run_tree(model, text, tree, holding("small", dtype, 289))
    with reversed_programs():
        backward = run_tree(model, text, tree, holding("small", dtype, 289))
    assert_same_rows(backward, forward)


@DTYPES
@shapes("small")
def test_repeated_passes(shape, dtype):
    """The same pass again and again, on the same cache: a hundred times where launches race."""
    model, _, expected = example(shape, dtype)
    query, cache = prepared_example(shape, dtype)
    for _ in range(2 if INTERPRETING else 100):
        assert_same_rows(model.logits(model.forward(query, cache)), expected)


@shapes("small")
def test_another_process(shape, tmp_path):
    """A fresh process computes the same bits: nothing was tuned, timed or left over in this one."""
    program = f"""
import torch
from tests import bit_exact_models
torch.save(bit_exact_models.example({shape!r}, torch.float16)[2].cpu(), {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, check=True)
    logits = torch.load(tmp_path / "logits", weights_only=True)
    assert_same_rows(logits, example(shape, torch.float16)[2].cpu())
