"""Loops over the few nodes of a tree, compiled by numba where it is installed and otherwise run as the Python they are.

The machine code is kept beside the source and made anew when that file changes. What a loop takes from elsewhere comes
as an argument, therefore, not as a global: a constant changed in another file would go unnoticed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

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
        return njit(loop, cache=True, nogil=True)
    except RuntimeError:  # no folder to keep it in
        return njit(loop, nogil=True)


@lru_cache(maxsize=64)
def in_numpy(columns: NamedTuple) -> Any:
    """The same structure over numpy views of its tensors, which must lie on the host; other members stay.

    Looked up by the tensors themselves, which are not resized."""
    return type(columns)(*(column.numpy() if isinstance(column, torch.Tensor) else column for column in columns))
