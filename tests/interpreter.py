"""Triton's interpreter where there is no GPU, and programs in reversed order.

Import this before any kernel on a machine without a GPU; ``tests/conftest.py`` does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETING = DEVICE == "cpu"
if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Run the programs of every launch last to first: whatever leans on their order shows."""
    from triton.runtime.interpreter import InterpreterBuilder

    forward = InterpreterBuilder.set_grid_idx

    def backward(self, x, y, z):
        forward(self, *(size - 1 - index for size, index in zip(self.grid_dim, (x, y, z), strict=True)))

    InterpreterBuilder.set_grid_idx = backward
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = forward
