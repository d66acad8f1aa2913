"""Loops over the few nodes of a tree, compiled by numba where it is installed, else run as the Python they are.

numba keeps the machine code, in ``__pycache__`` beside the source where it can, and makes it anew when that file
changes, but not when another one does whose loops or structures it uses. So what is older than any of them goes first.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_log = logging.getLogger(__name__)

try:
    from numba import njit
except ImportError as error:
    _log.warning("the torch backend runs its loops as Python, for numba cannot be imported: %s", error)
    njit = None

COMPILES = njit is not None


def _forget_what_is_stale() -> None:
    folder = Path(__file__).parent
    changed = max(source.stat().st_mtime for source in [*folder.glob("*.py"), folder.parent / "layout.py"])
    for kept in (folder / "__pycache__").glob("*.nb[ci]"):
        try:
            if kept.stat().st_mtime < changed:
                kept.unlink()
        except OSError:  # another process was faster, or it may not be written
            pass


if COMPILES:
    _forget_what_is_stale()


def compiled(loop: Callable) -> Callable:
    """``loop``, over numpy arrays and structures of them, as machine code. It checks no index."""
    if njit is None:
        return loop
    try:
        return njit(loop, cache=True)
    except RuntimeError:  # no folder to keep it in
        return njit(loop)


@lru_cache(maxsize=16)  # it keeps what it has seen last alive
def in_numpy(columns: NamedTuple) -> Any:
    """The same structure over numpy views of its tensors, which must lie on the host; other members stay.

    Looked up by the tensors themselves, which are not resized."""
    return type(columns)(*(column.numpy() if isinstance(column, torch.Tensor) else column for column in columns))
