"""Plain decoding on a CPU without the padding that keeps a row's bits the same for every number of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from kernels import reference
from kernels.layout import MAX_ROWS
from kernels.reference import attention, matrices


@contextmanager
def free_rows() -> Iterator[None]:
    """Products of the torch backend take as many rows as there are, whether these were found to agree or not.

    All else stays: the layouts of matrices, windows at fixed positions. For decoders that are loaded and run inside;
    their text may differ where two logits are a rounding step apart.
    """
    every = tuple(range(1, MAX_ROWS + 1))
    with (
        patch.object(matrices, "agreeing_rows", lambda *how: every),
        patch.object(attention, "agreeing", lambda *how: (1, True)),
        patch.object(reference, "pad_rows", lambda x, weight: x),
    ):
        yield
