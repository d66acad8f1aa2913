"""Triton's interpreter, made fit for these kernels: products whose rows do not depend on their place, conditions that
are masks, and device functions that do not patch the language again at every call."""

import functools

import numpy as np
from triton.runtime import interpreter


@functools.cache
def install() -> None:
    """Change Triton's interpreter for this process, before the first launch; a second call does nothing."""

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
