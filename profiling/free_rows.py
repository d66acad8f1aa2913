"""What it costs on a CPU that a row's bits do not depend on the number of rows: plain decoding without that rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from kernels import reference
from kernels.layout import MAX_ROWS
from kernels.reference import attention, matrices


@contextmanager
def free_rows() -> Iterator[None]:
    """Products of the torch backend take as many rows as there are, padded to no number that was found to agree.

    For decoders that are loaded inside. Text of theirs may differ where two logits are a rounding step apart.
    """
    every = tuple(range(1, MAX_ROWS + 1))
    with (
        patch.object(matrices, "agreeing_rows", lambda *how: every),
        patch.object(attention, "agreeing", lambda *how: (1, True)),
        patch.object(reference, "pad_rows", lambda x, weight: x),
    ):
        yield
