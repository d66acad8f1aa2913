"""Loops over the few nodes of a tree, compiled by numba where it is installed, else run as the Python they are.

The machine code is kept beside the source and made anew when that file changes. What a loop takes from another file
comes as an argument, therefore, not as a global: a constant changed there would go unnoticed. ``best`` below is the
exception: after a change to it, ``make clean``.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

try:
    from numba import njit
except ImportError:
    njit = None


def compiled(loop: Callable) -> Callable:
    """``loop``, over numpy arrays and structures of them, as machine code. It checks no index."""
    if njit is None:
        return loop
    try:
        return njit(loop, cache=True)
    except RuntimeError:  # no folder to keep it in
        return njit(loop)


@lru_cache(maxsize=64)
def in_numpy(columns: NamedTuple) -> Any:
    """The same structure over numpy views of its tensors, which must lie on the host; other members stay.

    Looked up by the tensors themselves, which are not resized."""
    return type(columns)(*(column.numpy() if isinstance(column, torch.Tensor) else column for column in columns))


@compiled
def best(values, count):
    """The ``count`` largest of as many or more ``values`` float32, rising, NaN the largest."""
    top = np.full(count, -np.inf, np.float32)
    for value in values:
        is_nan = value != value
        if is_nan or value > top[0]:
            place = 0
            while place + 1 < count and (is_nan or top[place + 1] < value):
                top[place] = top[place + 1]
                place += 1
            top[place] = value
    return top
