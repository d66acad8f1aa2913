"""Loops over the few nodes of a tree, compiled by numba where it is installed, else run as the Python they are.

numba keeps the machine code, in ``__pycache__`` beside the source where it can, and makes it anew when that file
changes, but not when another one does whose loops or structures it uses. So all of it goes when any source has changed.
(A process that began before the change and still writes there is not noticed: ``make clean``.)
"""

import hashlib
import logging
from collections.abc import Callable
from functools import cache, lru_cache
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


def compiled(loop: Callable) -> Callable:
    """``loop``, over numpy arrays and structures of them, as machine code. It checks no index."""
    if njit is None:
        return loop
    try:
        function = njit(loop, cache=True)
    except RuntimeError:  # no folder to keep it in
        return njit(loop)
    _forget_what_is_stale(Path(function.stats.cache_path))
    return function


@cache
def _forget_what_is_stale(folder: Path) -> None:
    """Remove the machine code in ``folder`` unless it was made from the sources as they are now."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "layout.py"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    note = folder / "sources.sha256"
    try:
        if note.exists() and note.read_text() == digest:
            return
        for kept in folder.glob("*.nb[ci]"):
            kept.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(digest)
    except OSError:  # a folder that may only be read
        pass


@lru_cache(maxsize=16)  # it keeps what it has seen last alive
def in_numpy(columns: NamedTuple) -> Any:
    """The same structure over numpy views of its tensors, which must lie on the host; other members stay.

    Looked up by the tensors themselves, which are not resized."""
    return type(columns)(*(column.numpy() if isinstance(column, torch.Tensor) else column for column in columns))
