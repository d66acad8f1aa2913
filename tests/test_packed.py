"""Products of the torch backend: which of them were found to agree is found out rightly, and 16 bits lose nothing."""

import pytest
import torch
import torch.nn.functional as F

from kernels import gpu, reference
from kernels.layout import ROW_BLOCK, ROW_MULTIPLE
from kernels.reference import attention
from kernels.reference.linear import Packed
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


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 17])
def test_rows_are_padded_once_a_pass(rows):
    """With zeros, to what every product wants; a GPU's tiles are padded on the chip."""
    x = torch.randn(rows, 8)
    padded = reference.pad_rows(x)
    assert len(padded) % ROW_MULTIPLE == 0 and rows <= len(padded) < rows + ROW_MULTIPLE
    assert torch.equal(padded[:rows], x) and not padded[rows:].any()
    assert gpu.pad_rows(x) is x


@pytest.mark.parametrize(
    ("spoilt", "found"),
    [("nothing", (ROW_MULTIPLE, True)), ("columns", (ROW_MULTIPLE, False)), ("rows", (ROW_BLOCK, True))],
)
def test_what_agrees_is_found_out(spoilt, found, monkeypatch):
    """Against a product that agrees by construction, one that depends on the column, and one on how many rows."""

    def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sums = (a[:, :, None].double() * b.transpose(1, 2)[:, None].double()).sum(-1).float()
        if spoilt == "columns":
            sums = sums * (1 + 1e-6 * torch.arange(sums.shape[2]))
        return sums * (1 + 1e-6 * sums.shape[1]) if spoilt == "rows" else sums

    monkeypatch.setattr(attention.torch, "bmm", bmm)
    assert attention.agreeing.__wrapped__(2, 64, 1) == found
