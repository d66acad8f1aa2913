"""Every Triton operation computes what its torch twin computes, and nothing about a launch moves a bit of the result:
not the number of rows, their order and neighbours, not the order in which programs run, not what scratch memory held.

Scratch and unused pages hold NaN throughout. Rounding is measured against the twin in float64; where the contract is
equality, bits are compared.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

from kernels import gpu, reference
from kernels.gpu.moments import row_moments
from kernels.layout import VOCAB_TILE
from tests.gpu_helpers import (
    ARGUMENTS,
    DTYPES,
    EPS,
    LARGE,
    PASSES,
    REAL_SHAPE,
    SMALL,
    another_order,
    assert_near,
    expected,
    in_float64,
    inputs,
    normal,
    prefill_pass,
    random_rows,
    run,
    same_bits,
    tree_pass,
)
from tests.helpers import LOGIT_TOLERANCES, assert_close, random_tokens, tiny_gpt2
from tests.interpreter import DEVICE


def cases(*passes: str, but: str = "") -> list:
    """Every operation except ``but`` in every one of ``passes``; a prefill pass has no tails to route."""
    return [
        pytest.param(op, of, id=f"{op}-{of}".replace(" ", "-"), marks=REAL_SHAPE if "large" in of else [])
        for of in passes
        for op in ARGUMENTS
        if op != but and not (op == "route" and "prefill" in of)
    ]


pytestmark = pytest.mark.usefixtures("counters_at_zero")
SMALL_PASSES = [name for name in PASSES if "large" not in name]
LARGE_PASSES = [name for name in PASSES if "large" in name]


@pytest.mark.parametrize("op", ARGUMENTS)
def test_signature(op):
    """Names, order and defaults of the parameters are those of the twin, so the backends can be exchanged."""
    parameters = inspect.signature(getattr(gpu, op)).parameters.values()
    twin = inspect.signature(getattr(reference, op)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in parameters] == [(p.name, p.kind, p.default) for p in twin]


@DTYPES
@pytest.mark.parametrize(("op", "of"), cases(*PASSES))
def test_operation_is_its_twin(op, of, dtype):
    """Also: K/V reach their slots and no others, a row of slot -1 writes nowhere, NaN in unused pages is not read."""
    for actual, wanted in zip(run(gpu, op, inputs(of, dtype)), expected(op, of, dtype), strict=True):
        assert_near(actual, wanted, dtype)


@pytest.mark.parametrize(("op", "of"), cases(*SMALL_PASSES))
def test_order_of_programs(op, of):
    """Programs run last to first leave the same bits: nothing leans on who arrives last."""
    given = inputs(of, torch.float32)
    forward = run(gpu, op, given)
    with another_order():
        backward = run(gpu, op, given)
    assert all(map(same_bits, forward, backward))


@DTYPES
@pytest.mark.parametrize(("op", "of"), cases(*LARGE_PASSES))
def test_repeated_launches(op, of, dtype):
    """A hundred launches give the same bits: no race."""
    first = run(gpu, op, inputs(of, dtype))
    for _ in range(99):
        assert all(map(same_bits, first, run(gpu, op, inputs(of, dtype))))


@DTYPES
@pytest.mark.parametrize(("op", "of"), cases("3 heads", "large", but="layer_norm_qkv"))
def test_rows_of_a_pass(op, of, dtype):
    """A row has the same bits in another order of the rows, alone, and among fewer."""
    given = inputs(of, dtype)
    whole = run(gpu, op, given)
    longest = given.query.positions.argmax().cpu()[None]  # the row that reads every window
    for rows in [*random_rows(len(given.x)), longest]:
        assert all(map(same_bits, run(gpu, op, given.rows(rows)), (result[rows] for result in whole)))


@DTYPES
@pytest.mark.parametrize("shape", [SMALL, pytest.param(LARGE, marks=REAL_SHAPE)], ids=["small", "large"])
def test_rows_of_a_prefill(shape, dtype):
    """In passes of more than 128 rows, the first rows have the same bits however many follow."""
    given = prefill_pass(shape, dtype, 20, 256, page_size=1)
    fewer = given.rows(torch.arange(129))
    for op in ("layer_norm_linear", "tree_attention", "linear_residual"):
        for whole, part in zip(run(gpu, op, given), run(gpu, op, fewer), strict=True):
            assert same_bits(part, whole[:129]), op


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize(
    "positions", [range(7, 8), range(128), range(190, 191), range(200, 201)], ids=["shared", "window", "tail", "root"]
)
def test_nan_reaches_its_readers(positions, cache):
    """NaN in a key or value, or in all of a window, shows in every row that attends to it.

    A key shows in no other row. A value may: a window's values are multiplied for all rows of a block, by zero in rows
    that do not see them, so a block is right only where all its values are finite.
    """
    given = tree_pass(SMALL, torch.float32, [200, 200], 9, page_size=1, num_nowhere=0)
    poisoned = getattr(given, cache).clone()
    poisoned[given.page_table[1, positions.start : positions.stop]] = float("nan")
    (out,) = run(gpu, "tree_attention", given, **{cache: poisoned})
    readers = given.query.sequences == 1
    assert out[readers].isnan().all()
    assert cache == "v_cache" or not out[~readers].isnan().any()


@pytest.mark.parametrize("score", [-80.0, -100.0, 100.0])
@pytest.mark.parametrize("rows", ["tree", "prefill"])
def test_far_scores(rows, score):
    """Beyond what exp holds in float32: every key of a row scores alike, so the values are averaged."""
    if rows == "tree":
        given = tree_pass(SMALL, torch.float32, [200], 5, page_size=1, num_nowhere=0)
    else:
        given = prefill_pass(SMALL, torch.float32, 30, 140, page_size=1)
    keys = torch.where(given.k_cache.isnan(), given.k_cache, 1.0)
    given = given._replace(k_cache=keys, q=torch.full_like(given.q, score / SMALL.dim**0.5))  # times dim, times scale
    for backend in (gpu, reference):
        (mixed,) = run(backend, "tree_attention", given)
        assert_near(mixed, run(reference, "tree_attention", in_float64(given))[0], torch.float32)


@DTYPES
def test_wide_embedding(dtype):
    """A row of GPT-2 XL, 1600 wide, no power of two; sums of two values round once, so the bits are the twin's."""
    tokens, positions = (torch.tensor(ids, dtype=torch.int32, device=DEVICE) for ids in ([96, 0, 5], [0, 40, 7]))
    wte, wpe = normal(97, 1600, dtype=dtype), normal(41, 1600, dtype=dtype)
    x = gpu.embed(tokens, positions, wte, wpe)
    assert torch.equal(x.cpu(), reference.embed(tokens.cpu(), positions.cpu(), wte.cpu(), wpe.cpu()))


@DTYPES
@pytest.mark.parametrize("width", [64, 192, 1600])
def test_moments_left_behind_are_those_taken(width, dtype):
    """A layer norm with moments that the layer before left gives what it gives with those it takes itself, and reads
    them: with moments of other rows it gives something else."""
    x = (3 + normal(5, width, dtype=dtype)).contiguous()
    ones, eye = x.new_ones(width), torch.eye(width, dtype=dtype, device=DEVICE)
    arguments = (x, ones, torch.zeros_like(ones), EPS, eye, None, None)
    taken = gpu.layer_norm_linear(*arguments)
    left = gpu.new_moments(5, width, x.device).fill_(float("nan"))
    zero = x.new_zeros(width, width)
    assert torch.equal(gpu.linear_residual(x, zero, x.new_zeros(width), x, left), x)
    assert_near(gpu.layer_norm_linear(*arguments, left), taken, dtype)
    other = gpu.layer_norm_linear(*arguments, left.roll(1, 0).contiguous())
    assert (other - taken).abs().max() > 1e-2
    assert_near(taken, F.layer_norm(x.double(), (width,), eps=EPS), dtype)
    assert reference.new_moments(5, width, x.device) is None, "the twin takes its own"


@DTYPES
@pytest.mark.parametrize("of", ["1 head", pytest.param("large", marks=REAL_SHAPE)])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu"])
def test_activation(activation, of, dtype):
    """Each activation, from where it is exactly zero to where it is the identity."""
    given = inputs(of, dtype)
    for spread in (1, 30):
        stretched = given._replace(norm_weight=spread * given.norm_weight)
        (actual,) = run(gpu, "layer_norm_linear", stretched, activation=activation)
        (wanted,) = run(reference, "layer_norm_linear", in_float64(stretched), activation=activation)
        assert_near(actual, wanted, dtype)


@pytest.mark.parametrize("width", [64, 192, 1600])
def test_layer_norm_far_from_zero(width):
    """Rows whose mean is a thousand standard deviations lose no more than the subtraction must; a constant row is 0."""
    x = 1000 + normal(6, width, dtype=torch.float32)
    x[3] = 7.0
    ones, eye = torch.ones(width, device=DEVICE), torch.eye(width, device=DEVICE)
    y = gpu.layer_norm_linear(x, ones, torch.zeros_like(ones), EPS, eye, None)
    assert y[3].abs().max() < 5e-4  # where the mean is off by a unit in the last place: divided by sqrt(EPS)
    wanted = F.layer_norm(x.double(), (width,), eps=EPS)
    assert (y - wanted).abs().max() < 5e-4  # a unit in the last place of 1000 is 6e-5


@DTYPES
@pytest.mark.parametrize("of", ["1 head", "3 heads", pytest.param("large", marks=REAL_SHAPE)])
def test_tile_maxima(of, dtype):
    """The maximum of each tile of the vocabulary is that of the logits as stored; asking for it changes no logit."""
    given = inputs(of, dtype)
    logits, maxima = run(gpu, "lm_head", given)
    padded = F.pad(logits.float(), (0, -logits.shape[1] % VOCAB_TILE), value=float("-inf"))
    assert torch.equal(maxima, padded.unflatten(1, (-1, VOCAB_TILE)).amax(-1))
    plain, _ = run(gpu, "lm_head", given, tile_maxima=None)
    assert same_bits(plain, logits)


@DTYPES
@pytest.mark.parametrize("of", ["1 head", "3 heads", pytest.param("large", marks=REAL_SHAPE)])
def test_picked_rows(of, dtype):
    """Rows that the head picks, in any order and again, have the bits that they have alone; of moments it takes theirs,
    and of a row that is not picked it reads nothing."""
    given = inputs(of, dtype)
    rows = torch.randperm(len(given.x), dtype=torch.int32)[: max(1, len(given.x) // 2)]
    rows = torch.cat([rows, rows[:1]])
    x, taken = given.x.clone(), rows.unique().long()
    others = [row for row in range(len(x)) if row not in taken]
    x[others] = float("nan")
    moments = row_moments(x)
    asked = {"x": x, "rows": rows.to(DEVICE), "moments": moments}
    maxima = gpu.new_tile_maxima(len(rows), len(given.wte), x.device)
    logits, maxima = run(gpu, "lm_head", given, **asked, tile_maxima=maxima)
    for place, row in enumerate(rows.tolist()):
        alone, of_tiles = run(gpu, "lm_head", given.rows(torch.tensor([row])))
        assert same_bits(logits[place : place + 1], alone) and same_bits(maxima[place : place + 1], of_tiles)
    (wanted, _) = run(reference, "lm_head", in_float64(given), rows=rows, tile_maxima=None)
    assert_near(logits, wanted, dtype)


def test_who_wants_tile_maxima():
    """The sampler on the device; its twin would ignore them, so the torch backend does not compute any."""
    maxima = gpu.new_tile_maxima(3, 130, torch.device(DEVICE))
    assert maxima.shape == (3, 3) and maxima.dtype == torch.float32 and maxima.device.type == DEVICE
    assert reference.new_tile_maxima(3, 130, torch.device("cpu")) is None


@pytest.mark.parametrize("heads", [1, 2])
def test_prefill_of_a_model(heads):
    """300 tokens, 256 of them in one pass of large tiles, give the hidden states of the torch backend."""
    fields, tokens = {"n_layer": 1, "n_head": heads}, random_tokens(300)
    model, twin = tiny_gpt2(torch.float32, gpu, DEVICE, **fields), tiny_gpt2(**fields)
    hidden = model.prefill(tokens, model.new_cache(300))
    assert_close(hidden.cpu(), twin.prefill(tokens, twin.new_cache(300)), torch.float32, LOGIT_TOLERANCES)
