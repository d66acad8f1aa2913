"""Products of the torch backend: which of them were found to agree is found out rightly, and 16 bits lose nothing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import gpu, reference
from kernels.layout import ROW_BLOCK, ROW_MULTIPLE
from kernels.reference import attention, linear, matrices
from kernels.reference.epilogue import NO_RESIDUAL, finish
from kernels.reference.matrices import Packed
from model.quantization import quantize_matrix
from profiling.demo import free_rows
from tests.helpers import assert_same_rows

ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def halves() -> torch.Tensor:
    """A matrix [192, 128] of 16-bit floats in float32, too small for them without a power of two."""
    return (torch.randn(192, 128).half() * 2.0**-20).float() + 0.0


def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return Packed(weight).product(x, None, None)


def test_one_thread_or_all_give_the_same_bits(threads, halves):
    """Two calls of FBGEMM, chosen by the number of threads when the matrix is packed."""
    x, found = torch.randn(ROW_BLOCK, 128), []
    for count in (1, 2):
        threads(count)
        found.append(product(halves, x))
    assert_same_rows(found[0], found[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_engine_torch_quantizes_with(engine, halves, threads):
    """Where it is not FBGEMM, which alone keeps 16 bits here, the product is taken otherwise."""
    x = torch.randn(ROW_BLOCK, 128)
    threads(2)
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        found = product(halves, x)
    finally:
        torch.backends.quantized.engine = before
    expected = F.linear(x.double(), halves.double())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_16_bits_would_round_is_kept_whole():
    """One element that no power of two makes a 16-bit float: the matrix is not packed so, and no bit of it is lost."""
    weight = torch.zeros(64, 64)
    weight[3, 5], weight[7, 9] = 1.0 + 2.0**-20, 1.0
    assert product(weight, torch.eye(64))[5, 3] == 1.0 + 2.0**-20


@pytest.mark.parametrize(
    ("found", "lengths"),
    [
        ((16, 32), (16, 16, 16, 16, 32, 32, 48)),
        ((4, 8, 12, 16, 32), (4, 4, 8, 16, 32, 32, 48)),
        ((*range(1, 17), 32), (1, 3, 5, 16, 32, 32, 48)),
    ],
)
@pytest.mark.parametrize("which", range(7))
def test_rows_are_padded_once_a_pass(which, found, lengths, halves, monkeypatch):
    """With zeros, to what every product wants; a GPU's tiles are padded on the chip."""
    monkeypatch.setattr(matrices, "agreeing_rows", lambda *how: found)
    rows = (1, 3, 5, 16, 17, 32, 33)[which]
    x, weight = torch.randn(rows, 128), Packed(halves)
    padded = reference.pad_rows(x, weight)
    assert len(padded) == lengths[which]
    assert torch.equal(padded[:rows], x) and not padded[rows:].any()
    assert gpu.pad_rows(x, halves) is x


@pytest.mark.parametrize(
    ("spoilt", "step", "most"),
    [
        (None, 1, 128),
        (range(1, 4), 4, 128),
        (range(5, 16), 16, 128),
        (range(33, 129), 1, 32),
        (range(64, 65), 1, 48),
    ],
)
@pytest.mark.parametrize("library", ["fbgemm", "onednn"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_how_many_rows_agree_is_found_out(library, has_residual, spoilt, step, most, monkeypatch):
    """A product that rounds otherwise for some numbers of rows, with a residual or without one; one by a library
    without a promise is not tried, and one that is compiled for each number of rows is not tried on each."""

    class Spoilt(Packed):
        def product(self, x, bias, activation, residual=None):
            y = F.linear(x.double(), self.weight).float() + (0 if residual is None else residual)
            is_spoilt = spoilt is not None and len(x) in spoilt and has_residual == (residual is not None)
            return y * (1 + 1e-6) if is_spoilt else y

        def __init__(self, weight):
            super().__init__(weight)
            self.weight = weight.double()

    monkeypatch.setattr(matrices, "Packed", Spoilt)
    weight = torch.randn(8, 64).half().float() if library == "fbgemm" else torch.randn(8, 64)
    if (here := Packed(weight).library) != library:
        pytest.skip(f"needs products by {library}, this processor's are by {here}")
    least = 1 if library == "fbgemm" else ROW_MULTIPLE

    def agreeing(library: str, has_residual: bool) -> tuple[int, ...]:
        return matrices.agreeing_rows.__wrapped__(
            library, torch.Size([48, 64]), torch.float32, False, None, has_residual, 1
        )

    def counts(step: int, most: int) -> tuple[int, ...]:
        return *range(step, ROW_BLOCK, step), *range(ROW_BLOCK, most + 1, ROW_BLOCK)

    assert agreeing(library, has_residual) == counts(max(step, least), most)
    assert agreeing(library, not has_residual) == counts(least, 128)
    assert agreeing("torch", has_residual) == (ROW_BLOCK,)


def test_rows_are_free_where_bits_may_depend_on_them(monkeypatch):
    """Inside, products take five rows as they are; outside, what was found to agree holds again."""
    asked, x = [], torch.randn(5, 128)
    monkeypatch.setattr(Packed, "product", lambda self, block, *how: asked.append(len(block)) or block[:, :64])
    monkeypatch.setattr(matrices, "agreeing_rows", lambda *how: (4, 8, 12, 16))

    def rows_asked_for() -> list[int]:
        asked.clear()
        weight = Packed(torch.randn(64, 128))
        linear.linear(reference.pad_rows(x, weight), weight, None)
        return asked

    with free_rows():
        assert rows_asked_for() == [5] and attention.agreeing(3, 16, 1) == (1, True)
    assert rows_asked_for() == [8]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 48, 49, 100])
def test_products_take_no_more_rows_than_agree(num_rows, has_residual, halves, monkeypatch):
    """Blocks of at most as many as agree, the last one a multiple of ROW_BLOCK; the sums are those of one product,
    and each row's residual goes with it."""
    weight, x, asked = Packed(halves), torch.randn(num_rows, 128), []
    product = weight.product
    monkeypatch.setattr(matrices, "agreeing_rows", lambda *how: (4, 8, 12, 16, 32, 48))
    monkeypatch.setattr(weight, "product", lambda block, *how: asked.append(len(block)) or product(block, *how))
    residual = torch.randn(num_rows, len(halves)) * 2.0**-20 if has_residual else None
    y = linear.linear(x, weight, None, residual=residual)
    wanted = F.linear(x, halves) + (residual if has_residual else 0)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-9)
    assert sum(asked) - num_rows < (ROW_MULTIPLE if num_rows <= ROW_BLOCK else ROW_BLOCK)
    assert all(rows <= 48 and not rows % (ROW_MULTIPLE if num_rows <= ROW_BLOCK else ROW_BLOCK) for rows in asked)


@pytest.mark.parametrize(
    ("library", "dtype"),
    [
        ("fbgemm", torch.float32),
        ("int8", torch.float32),
        ("onednn", torch.float32),
        ("onednn", torch.bfloat16),
        ("torch", torch.float64),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 7, 37])
def test_a_residual_is_added(num_rows, library, dtype):
    """By every library, and the last row has the bits that it has alone."""
    weight = torch.randint(-127, 128, (96, 64)).float()
    weight[:, 0] = 127.0  # integers of 8 bits as they are
    if library in ("onednn", "torch"):
        weight = weight / 3.0  # of more than 16 bits
    weight = weight.to(dtype)
    matrix = reference.packed(quantize_matrix(weight) if library == "int8" else weight)
    if isinstance(matrix, Packed) and matrix.library != library:
        pytest.skip(f"needs products by {library}, this processor's are by {matrix.library}")
    x, residual, bias = torch.randn(num_rows, 64), 500 * torch.randn(num_rows, 96), 500 * torch.randn(96)
    x, residual, bias = x.to(dtype), residual.to(dtype), bias.to(dtype)
    y = reference.linear_residual(x, matrix, bias, residual)
    wanted = residual.double() + x.double() @ weight.double().T + bias.double()
    assert (y.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()
    assert torch.equal(reference.linear_residual(x[-1:], matrix, bias, residual[-1:])[0], y[-1])


def test_rows_of_a_product_in_8_bits(monkeypatch):
    """As many as agree where nothing is added to the sums, for bias and activation come after them."""
    monkeypatch.setattr(
        matrices, "agreeing_rows", lambda library, shape, dtype, has_bias, *how: (16,) if has_bias else (4, 8, 16)
    )
    matrix = reference.packed(quantize_matrix(torch.randn(64, 128)))
    assert len(reference.pad_rows(torch.randn(5, 128), matrix)) == 8
    assert len(reference.pad_rows(torch.randn(5, 128), Packed(torch.randn(64, 128)))) == 16


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu"])
@pytest.mark.parametrize("library", ["fbgemm", "onednn"])
def test_an_activation_follows(library, activation):
    """The one that was asked for, by every library: the two forms of gelu differ by up to 4e-4."""
    weight = torch.randint(-127, 128, (96, 64)) / (128.0 if library == "fbgemm" else 127.0)
    matrix = Packed(weight)
    if matrix.library != library:
        pytest.skip(f"needs products by {library}, this processor's are by {matrix.library}")
    x, bias = torch.randn(7, 64) / 4, torch.randn(96)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    if activation is not None:
        wanted = F.gelu(wanted, approximate="tanh" if activation == "gelu_tanh" else "none")
    torch.testing.assert_close(linear.linear(x, matrix, bias, activation).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 31, 64, 100, 1536])
@pytest.mark.parametrize("then", ["nothing", "gelu", "residual"])
def test_what_follows_a_product(then, width):
    """Scale, bias, and gelu or a residual: right to float32, far below zero too, and every element by itself."""
    generator = torch.Generator().manual_seed(width)
    sums = 64 * torch.randn(5, width, generator=generator)
    bias, residual = torch.randn(width, generator=generator), torch.randn(5, width, generator=generator)

    def finished(some: torch.Tensor, columns: slice) -> torch.Tensor:
        some, added = some.clone(), residual[:, columns] if then == "residual" else None
        added = NO_RESIDUAL if added is None else added.contiguous().numpy()
        finish(some.numpy(), np.float32(2.0**-4), bias[columns].numpy(), then == "gelu", added)
        return some

    y, x = finished(sums, slice(None)), 2.0**-4 * sums.double() + bias.double()
    wanted = x if then == "nothing" else residual.double() + x
    if then == "gelu":
        wanted = x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
        assert x.min() < -4 or width == 1
        torch.testing.assert_close(y.double(), wanted, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-6, atol=2e-6)
    for start in range(0, width, 13):
        for size in (1, 17):
            columns = slice(start, start + size)
            assert torch.equal(finished(sums[:, columns].contiguous(), columns), y[:, columns])


def test_gelu_of_extremes():
    """NaN stays NaN; the largest numbers, infinity and zero are themselves, the smallest vanish."""
    x = torch.tensor([[math.nan, math.inf, 3e38, 0.0, -100.0, -3e38]])
    finish(x.numpy(), np.float32(1), np.zeros(6, np.float32), True, NO_RESIDUAL)
    assert x[0, 0].isnan() and x[0, 1:].tolist() == [math.inf, torch.tensor(3e38).item(), 0.0, 0.0, 0.0]
