"""Whatever the tiles: near float64, and no row moves a bit of another. All that ship are tried, also where the
interpreter's rule would take others; those of the table at the sizes that it is for, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from kernels import gpu
from kernels.gpu import attention, config, linear
from kernels.gpu.config import AttentionTiles, LinearTiles
from tests.gpu_helpers import (
    ARGUMENTS,
    DTYPES,
    EPS,
    REAL_SHAPE,
    Inputs,
    another_order,
    assert_near,
    expected,
    inputs,
    normal,
    random_rows,
    same_bits,
)
from tests.interpreter import DEVICE

pytestmark = pytest.mark.usefixtures("counters_at_zero")


# A depth of 192 is 12 steps of 16: 5, 7 and 8 splits are uneven, 13 and 16 leave some of them nothing to do.
@DTYPES
@pytest.mark.parametrize(
    "tiles",
    [
        *(LinearTiles(16, 64, 16, splits) for splits in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16)),
        LinearTiles(16, 32, 32, 2),
        LinearTiles(32, 128, 64, 3),
        LinearTiles(64, 64, 128, 2, num_stages=2),
        LinearTiles(64, 16, 256, 1, num_stages=2),
        LinearTiles(16, 64, 32, 2, swapped=True),
        LinearTiles(32, 128, 64, 3, swapped=True),
        LinearTiles(16, 64, 128, 2, swapped=True),
    ],
    ids=lambda tiles: str(tiles).replace(" ", "-"),
)
def test_linear_tiles(tiles, dtype):
    """Whatever the tiles and the number of splits: near float64, and a row's bits are its own.

    Rows of NaN between the others change none of them.
    """
    n = 20 if tiles.rows == 16 else 70  # of 64 rows, every quarter is used and one is left empty
    x, weight, residual = normal(n, 192, dtype=dtype), normal(50, 192, dtype=dtype), normal(n, 50, dtype=dtype)
    bias, gain, shift = normal(50, dtype=dtype), normal(192, dtype=dtype), normal(192, dtype=dtype)
    norm = (gain, shift, EPS) if tiles.depth > 16 else None  # many small steps are slow in the interpreter

    def layer(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), 50)
        return linear.linear(x, weight, out, bias=bias, norm=norm, residual=residual, tiles=tiles)

    whole = layer(x, residual)
    y = F.layer_norm(x.double(), (192,), gain.double(), shift.double(), EPS) if norm else x.double()
    assert_near(whole, residual.double() + y @ weight.double().T + bias.double(), dtype)
    with another_order():
        assert same_bits(layer(x, residual), whole)
    for rows in random_rows(n):
        assert same_bits(layer(x[rows], residual[rows]), whole[rows])
    x[::3] = float("nan")
    beside_nan = layer(x, residual)
    assert beside_nan[::3].isnan().all()
    assert same_bits(beside_nan[1::3], whole[1::3])


@REAL_SHAPE
@pytest.mark.parametrize("weight", config._table().get("sm_90", {}))
def test_tiles_of_the_table(weight):
    """At the sizes that the table is for: near float64, and a row's bits are its own."""
    sizes, name = weight.split()
    (m, k), dtype = map(int, sizes.split("x")), getattr(torch, name)
    x, matrix, residual = (
        (scale * torch.randn(*size, device=DEVICE)).to(dtype)
        for scale, size in ((1, (64, k)), (k**-0.5, (m, k)), (1, (64, m)))
    )
    bias, gain, shift = (torch.randn(size, device=DEVICE).to(dtype) for size in (m, k, k))
    tiles = config.linear_tiles("sm_90", m, k, dtype)

    def layer(rows: slice) -> torch.Tensor:
        mine, out = x[rows].clone(), x.new_empty(len(x[rows]), m)
        around = {"bias": bias, "norm": (gain, shift, EPS), "residual": residual[rows].clone()}
        return linear.linear(mine, matrix, out, **around, tiles=tiles)

    whole = layer(slice(None))
    y = F.layer_norm(x.double(), (k,), gain.double(), shift.double(), EPS) @ matrix.double().T
    assert_near(whole, residual.double() + y + bias.double(), dtype)
    for rows in (slice(0, 1), slice(16, 33), slice(63, 64)):
        assert same_bits(layer(rows), whole[rows])


@DTYPES
@pytest.mark.parametrize(
    "tiles",
    [
        AttentionTiles(rows=32, window=16, parts=1, tail_rows=8, tail_step=16),
        AttentionTiles(rows=16, window=32, parts=3, tail_rows=16, tail_step=8),
        AttentionTiles(rows=32, window=64, parts=2, tail_rows=4, tail_step=16),
        AttentionTiles(rows=16, window=128, parts=4, tail_rows=4, tail_step=16),
        AttentionTiles(rows=64, window=128, parts=5, tail_rows=16, tail_step=16),
        AttentionTiles(rows=16, window=64, parts=4, tail_rows=1, tail_step=64),
        AttentionTiles(rows=32, window=64, parts=2, tail_rows=4, tail_step=32),
    ],
    ids=lambda tiles: f"{tiles.rows}x{tiles.window} by {tiles.parts}, {tiles.tail_rows}x{tiles.tail_step}",
)
def test_attention_tiles(tiles, dtype):
    """Whatever the tiles and the number of parts, also with parts that never get a window: near the twin, and a row's
    bits are its own."""
    given = inputs("3 heads", dtype)

    def attend(given: Inputs) -> torch.Tensor:
        arguments = ARGUMENTS["tree_attention"](gpu, given)
        out = given.q.new_empty(len(given.q), given.q[0].numel())
        return attention.tree_attention(**arguments, out=out, tiles=tiles)

    whole = attend(given)
    assert_near(whole, expected("tree_attention", "3 heads", dtype)[0], dtype)
    with another_order():
        assert same_bits(attend(given), whole)
    for rows in random_rows(len(given.q)):
        assert same_bits(attend(given.rows(rows)), whole[rows])
    q = given.q.clone()
    q[::3] = float("nan")
    beside_nan = attend(given._replace(q=q))
    assert beside_nan[::3].isnan().all()
    assert same_bits(beside_nan[1::3], whole[1::3])
