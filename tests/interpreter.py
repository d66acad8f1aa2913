"""Triton's interpreter, made fit for tests of bit-exactness: products whose rows do not depend on their place, programs
in reversed order, and device functions that do not patch the language again at every call.

Import this before any kernel on a machine without a GPU; ``tests/conftest.py`` does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETING = DEVICE == "cpu"
if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


def install() -> None:
    """Change Triton's interpreter for this process; once, before the first launch."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # BLAS rounds row 6 of a block of 16 unlike row 0; einsum adds the products of one element in order, as an MMA
        product = np.einsum("mk,kn->mn", a.data.astype(np.float32), b.data.astype(np.float32))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def with_bool_mask(access, place):
        # a scalar condition combined with a block of them comes out as numbers, which Triton 3.9 refuses as a mask
        def checked(self, *args):
            args[place].data = args[place].data.astype(bool)
            return access(self, *args)

        return checked

    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = with_bool_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_bool_mask(builder.create_masked_store, 2)
    builder.create_dot = create_dot
    patched: set[int] = set()
    patch_lang, call = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    def launch(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


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
