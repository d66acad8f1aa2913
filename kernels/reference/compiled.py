"""Loops over the few nodes of a tree, compiled by numba where it is installed, else run as the Python they are.

numba keeps the machine code, in ``__pycache__`` beside the source where it can, and makes it anew when that file
changes, but not when another one does whose loops or structures it uses. So all of it goes when any source has changed.
(A process that began before the change and still writes there is not noticed: ``make clean``.)
"""

import hashlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

_log = logging.getLogger(__name__)

try:
    from numba import njit
except ImportError as error:
    _log.warning("the torch backend runs its loops as Python, for numba cannot be imported: %s", error)
    njit = None

COMPILES = njit is not None
_folders: set[Path] = set()  # of machine code
_MOST_VIEWS = 16
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def compiled(loop: Callable) -> Callable:
    """``loop``, over numpy arrays and structures of them, as machine code. It checks no index."""
    if njit is None:
        return loop
    try:
        function = njit(loop, cache=True, error_model="numpy")
    except RuntimeError:  # no folder to keep it in
        return njit(loop, error_model="numpy")
    folder = Path(function.stats.cache_path)
    _forget_what_is_stale(folder)
    _folders.add(folder)
    return function


def is_cold() -> bool:
    """Whether no machine code lies ready: then what comes first compiles, for a minute or so."""
    return COMPILES and not any(list(folder.glob("*.nbi")) for folder in _folders)


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


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """A numpy view of a float tensor on the host, as integers of its width: numpy has no bfloat16."""
    return tensor.view(_INTEGERS[tensor.element_size()]).numpy()


_bits: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}  # by identity of the tensors


def kept_bits(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    """``as_bits`` of tensors that are not resized, remembered until the first of them is gone."""
    names = tuple(map(id, tensors))
    kept = _bits.get(names)
    if kept is None:
        kept = _bits[names] = tuple(map(as_bits, tensors))
        for tensor in tensors:
            weakref.finalize(tensor, _bits.pop, names, None).atexit = False
    return kept


_views: OrderedDict[int, tuple[NamedTuple, Any]] = OrderedDict()  # by identity of the structure, which it keeps alive


def in_numpy(columns: NamedTuple) -> Any:
    """The same structure over numpy views of its tensors, which must lie on the host and are not resized; other members
    stay. The views of the last few structures are kept."""
    kept = _views.get(id(columns))
    if kept is None:
        views = type(columns)(*(part.numpy() if isinstance(part, torch.Tensor) else part for part in columns))
        kept = _views[id(columns)] = columns, views
        while len(_views) > _MOST_VIEWS:
            _views.popitem(last=False)
    return kept[1]
