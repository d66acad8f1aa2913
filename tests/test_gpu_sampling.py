"""``draw`` on the Triton backend gives what its torch twin gives on the same logits: the same tokens and children,
edges and log-probabilities within rounding. Its noise is Philox, its law is the softmax, and nothing about a launch
moves a bit of a row: not its neighbours, not the order of rows or programs, not what scratch memory held.

Scratch is poisoned throughout. Vocabularies of 8192 and more come with their tile maxima, which cost the interpreter
a millisecond a tile; ``test_tile_maxima`` has both sources.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import gpu, reference
from kernels.gpu.noise import gumbel, philox_word, seed_words
from kernels.layout import VOCAB_TILE, Sampling
from kernels.reference import gumbel_noise
from tests.gpu_helpers import EPS, REAL_SHAPE, poison_scratch, random_rows, same_bits
from tests.laws import GREEDY, P_VALUE, chi_square, sampled
from tests.test_sampling import EDGE_SEEDS, integer_philox

from tests.interpreter import DEVICE, INTERPRETING, reversed_programs  # isort: skip

TOLERANCE = 3e-5  # of edges and log-probabilities, nats
TAU = 0.85
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # half precision is only loaded: right in the interpreter too
# 3 and 33: below one tile; 65: one past it; 111: fewer tiles than any top-k but 1 and 2; 8192: a real vocabulary.
VOCAB_SIZES = [3, 33, 65, 111, 8192]
RULES = {
    "greedy": GREEDY,
    "plain": sampled(seed=5),
    "top_k=1": sampled(seed=2**32, top_k=1),
    "top_k=2": sampled(seed=2**63 + 11, top_k=2, temperature=0.7),
    "top_k=20": sampled(seed=3, top_k=20, top_p=0.9),
    "top_k=50": sampled(seed=2**64 - 1, top_k=50, temperature=1.3),
    "top_k=64": sampled(seed=1, top_k=64, min_p=0.02),  # the last of the narrow kernel
    "top_k=65": sampled(seed=7, top_k=65),
    "top_k=300": sampled(seed=8, top_k=300, top_p=0.8, temperature=1.3),
    "top_k=1000": sampled(seed=9, top_k=1000),
    "top_k=V-and-more": sampled(seed=10, top_k=10_000, temperature=0.7),
    "top_p": sampled(seed=2**31, top_p=0.9),
    "top_p-tiny": sampled(seed=12, top_p=1e-3),
    "min_p": sampled(seed=13, min_p=0.1),
    "min_p=1": sampled(seed=14, min_p=1.0),
    "all": sampled(seed=15, temperature=0.8, top_k=20, top_p=0.8, min_p=0.05),
    "all-wide": sampled(seed=16, temperature=0.8, top_k=100, top_p=0.95, min_p=0.01),
}
PATHS = ["greedy", "plain", "top_k=2", "top_k=20", "all", "top_k=300"]  # one of each way through the kernels
each_path = pytest.mark.parametrize("rule", PATHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def hostile_scratch(monkeypatch):
    poison_scratch(monkeypatch)


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """About as spread as a model's, and all of them negative, as GPT-2's are."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator) - 40).to(DEVICE, dtype)


def positions_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits), dtype=torch.int32, device=logits.device) + 17


def maxima_of(logits: torch.Tensor) -> torch.Tensor:
    padded = F.pad(logits.float(), (0, -logits.shape[1] % VOCAB_TILE), value=-math.inf)
    return padded.unflatten(1, (-1, VOCAB_TILE)).amax(-1)


def results(
    ops, logits: torch.Tensor, sampling: Sampling, num_children: int = 4, tau: float = TAU, positions=None, maxima=None
) -> tuple[torch.Tensor, ...]:
    """Tokens, children, edges, log-probabilities of the tokens and of the children."""
    positions = positions_of(logits) if positions is None else positions
    log_probs = logits.new_full((len(logits),), 7.0, dtype=torch.float32)
    of_children = log_probs.new_full((len(logits), min(num_children, logits.shape[1])), 7.0)
    drawn = ops.draw(logits, positions, sampling, num_children, tau, maxima, log_probs, of_children)
    return *drawn, log_probs, of_children


def assert_values(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Within the tolerance where ``expected`` is finite, the same infinity or NaN where it is not."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN at other places"
    assert torch.equal(actual == -math.inf, expected == -math.inf), f"{name}: -inf at other places"
    finite = expected.isfinite()
    error = (actual[finite] - expected[finite]).abs().max().item() if finite.any() else 0.0
    assert error <= TOLERANCE, f"{name}: off by {error:.3g}"


def check(
    logits: torch.Tensor, sampling: Sampling, num_children: int = 4, maxima: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Assert that the kernel agrees with the twin; what the kernel gave, on the host."""
    if maxima is None and logits.shape[1] >= 8192:
        maxima = maxima_of(logits)
    actual = [column.cpu() for column in results(gpu, logits, sampling, num_children, maxima=maxima)]
    expected = results(reference, logits.cpu(), sampling, num_children)
    tokens, children, edges, log_probs, of_children = expected
    assert torch.equal(actual[0], tokens), f"tokens {actual[0].tolist()}, expected {tokens.tolist()}"
    assert_values(actual[2], edges, "edges")
    live = edges > -math.inf
    assert torch.equal(actual[1][live], children[live])
    assert_values(actual[3], log_probs, "log_probs")
    assert_values(actual[4], of_children, "child_log_probs")
    return tuple(actual)


# --- agreement with the twin


@each_dtype
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES, ids=lambda v: f"V={v}")
def test_same_as_the_twin(vocab_size, rule, dtype):
    check(random_logits(3 if vocab_size < 1000 else 2, vocab_size, dtype, seed=vocab_size), RULES[rule])


@pytest.mark.parametrize("vocab_size", [50257, 50304], ids=lambda v: f"V={v}")
@pytest.mark.parametrize("rule", ["greedy", "top_k=50", "all", "plain", "all-wide"])
def test_vocabulary_of_gpt2(rule, vocab_size):
    """One row in the interpreter; ``test_real_shape`` has more."""
    check(random_logits(1, vocab_size, torch.bfloat16), RULES[rule])


@pytest.mark.parametrize("num_children", [0, 1, 4, 16, 64])
@pytest.mark.parametrize(("rule", "vocab_size"), [("greedy", 111), ("greedy", 33), ("top_k=64", 111), ("plain", 111)])
def test_number_of_children(rule, vocab_size, num_children):
    logits = random_logits(2, vocab_size, torch.bfloat16)
    _, children, edges, _, _ = check(logits, RULES[rule], num_children)
    assert children.shape == edges.shape == (2, min(num_children, vocab_size))


def rounded(logits: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16, which leaves two decimal digits, and kept in the dtype they had."""
    return logits.bfloat16().to(logits.dtype)


@each_dtype
@pytest.mark.parametrize("rule", ["top_k=50", "all", "top_k=300", "plain"])
def test_ties_at_the_kth_value(rule, dtype):
    """Logits with bfloat16's few values: ranks 50 and 51 tie in most rows, and all that tie with the k-th survive."""
    logits = rounded(random_logits(4, 3000, seed=1)).to(dtype)
    ordered = logits.float().sort(dim=1, descending=True).values
    assert (ordered[:, 49] == ordered[:, 50]).sum() > 2
    check(logits, RULES[rule])


@pytest.mark.parametrize("rule", ["greedy", "top_k=2", "top_k=20", "top_k=65"])
def test_a_tie_in_every_tile(rule):
    """More tiles reach the bound than the narrow kernel has room for, one logit each; the best stands in the last."""
    logits = random_logits(2, 6400, torch.bfloat16)
    logits[:, torch.arange(100) * 64 + torch.arange(100) % 64] = -10.0
    logits[1, -1] = -8.0
    check(logits, RULES[rule], maxima=maxima_of(logits))


@pytest.mark.parametrize("rule", ["top_p", "all-wide", "top_k=300"])
def test_nucleus_ends_among_ties(rule):
    """Of equal tokens the lowest ids make up the nucleus, counted through all blocks of a large vocabulary."""
    logits = rounded(random_logits(3, 8192, seed=1))
    logits[1] = -40.0
    logits[2, ::3] = logits[2].max() + 4
    check(logits, RULES[rule], num_children=64)


@each_dtype
@pytest.mark.parametrize("num_children", [1, 2, 4, 16])
def test_greedy_children_among_ties(num_children, dtype):
    """Of equal logits the lowest ids are the children, however many equal ones there are and in however many tiles."""
    logits = rounded(random_logits(3, 8192, seed=1)).to(dtype)
    logits[0, 100:5000] = logits[0].max() - 1  # thousands of ties below the best few
    logits[1, 4000] = logits[1, 9] = logits[1, 700] = logits[1].max() + 1
    ids = [9, 700, 4000]
    _, children, _, _, _ = check(logits, GREEDY, num_children)
    assert children[1, :3].tolist() == ids[: min(3, num_children)]


@each_path
@pytest.mark.parametrize("value", [-10.0, 0.0])
def test_ties_at_the_first_rank(value, rule):
    """Without noise equal logits give the lowest id, the two zeros are equal; with it, the one of the larger noise."""
    logits = random_logits(4, 111)
    logits[:, [90, 20, 70]] = torch.tensor([value, -abs(value), value], device=DEVICE)
    tokens, *_ = check(logits, RULES[rule])
    assert rule != "greedy" or tokens.tolist() == [20] * 4
    assert set(tokens.tolist()) <= {20, 70, 90}
    check(logits, RULES[rule], 1)


@each_path
@pytest.mark.parametrize("value", [0.0, -40.0])
def test_equal_logits(rule, value):
    """Every token ties with every other: the narrow kernel hands such rows to the wide one, and only those."""
    logits = random_logits(4, 300, torch.bfloat16)
    logits[1] = value
    logits[3, 150:] = value
    check(logits, RULES[rule])


@each_path
def test_few_possible_tokens(rule):
    """Rows of -inf but one, but three, and -inf alone: the lowest id, its law undefined."""
    logits = torch.full((4, 300), -math.inf, device=DEVICE)
    logits[0, 277], logits[1, [5, 130, 299]], logits[3] = -3.0, -3.0, random_logits(1, 300)[0]
    tokens, children, edges, log_probs, of_children = check(logits, RULES[rule])
    assert tokens[0] == 277 and tokens[2] == 0
    assert edges[0].tolist() == of_children[0].tolist() == [0.0] + [-math.inf] * 3 and log_probs[0] == 0
    assert set(children[1][edges[1] > -math.inf].tolist()) <= {5, 130, 299} and edges[1, 3] == -math.inf


@each_dtype
@each_path
def test_nan(rule, dtype):
    """A row with a NaN draws -1 and all its edges are NaN, so that the tree it would grow fails; no other row moves."""
    logits = random_logits(7, 300, dtype)
    clean = results(gpu, logits, RULES[rule])
    bad = [0, 2, 5, 6]
    logits[0, 299], logits[2], logits[5, :150], logits[6, 3], logits[6, 4] = (
        math.nan,
        math.nan,
        math.nan,
        math.nan,
        math.inf,
    )
    tokens, _, edges, log_probs, of_children = beside = results(gpu, logits, RULES[rule])
    assert tokens[bad].tolist() == [-1] * 4
    for values in (edges, log_probs, of_children):
        assert values[bad].isnan().all()
    good = [1, 3, 4]
    assert all(same_bits(one[good], other[good]) for one, other in zip(beside, clean, strict=True))
    for row in bad:
        tree = gpu.new_tree(16, DEVICE, root=1)
        node, reach = (torch.tensor([value], dtype=torch.int32, device=DEVICE) for value in (0, 8))
        gpu.insert_children(tree, 1, node, beside[1][row : row + 1], edges[row : row + 1], reach)
        assert tree.failed.item() == 2


@each_dtype
@pytest.mark.parametrize("rule", [*PATHS, "top_k=1", "min_p", "top_p"])
def test_infinite_logit(rule, dtype):
    """+inf, which a sum beyond float16 becomes, wins wherever it stands; its row has no law: the first edge is NaN."""
    logits = random_logits(4, 300, dtype)
    logits[1, 290], logits[2, [40, 250]] = math.inf, math.inf
    tokens, children, edges, *_ = results(gpu, logits, RULES[rule])
    expected = reference.draw(logits.cpu(), positions_of(logits).cpu(), RULES[rule], 4, TAU)
    assert torch.equal(tokens.cpu(), expected[0]) and tokens[1:3].tolist() == [290, 40]
    assert edges[1:3, 0].isnan().all() and children[1:3, 0].tolist() == [290, 40]


def test_ties_that_the_temperature_makes():
    """Neighbouring floats that are equal once divided by 1.3 tie at the k-th value, as in Hugging Face."""
    logits = torch.zeros(20, 300, device=DEVICE)
    logits[:, 200] = 1.5 + torch.arange(20) * 2.0**-23
    logits[:, 4] = logits[:, 200] + 2.0**-23
    for top_k in (1, 100):
        logits[:, 205 : 204 + top_k] = 3.0
        check(logits, sampled(temperature=1.3, top_k=top_k), 2)


# --- the row is its own


@each_path
@pytest.mark.skipif(not INTERPRETING, reason="only the interpreter can reverse the order of programs")
def test_order_of_programs(rule):
    logits = random_logits(5, 300, torch.bfloat16)
    logits[2] = -40.0
    forward = results(gpu, logits, RULES[rule])
    with reversed_programs():
        backward = results(gpu, logits, RULES[rule])
    assert all(map(same_bits, forward, backward))


@pytest.mark.parametrize("rule", ["greedy", "top_k=2", "plain"])
def test_row_among_128(rule):
    """A row has the same bits alone, in another order and among fewer; some overflow the narrow kernel, one is NaN."""
    logits, positions = random_logits(128, 111, torch.bfloat16), torch.arange(128, dtype=torch.int32, device=DEVICE)
    logits[5::16], logits[77, 3] = -40.0, math.nan
    whole = results(gpu, logits, RULES[rule], 2, positions=positions)
    order = random_rows(128)[0]
    for rows in (order[:40], order[40:41], torch.tensor([5, 77, 9])):
        some = results(gpu, logits[rows], RULES[rule], 2, positions=positions[rows].contiguous())
        assert all(same_bits(part, result[rows]) for part, result in zip(some, whole, strict=True))


@each_path
def test_rows_apart(rule):
    """Logits that are a view of longer rows, NaN between them, give the bits of contiguous ones."""
    logits = random_logits(3, 111, torch.bfloat16)
    view = torch.cat([logits, torch.full_like(logits[:, :17], math.nan)], 1)[:, :111]
    assert view.stride(0) == 128
    contiguous, apart = results(gpu, logits, RULES[rule]), results(gpu, view, RULES[rule])
    assert all(map(same_bits, contiguous, apart))


@each_dtype
@each_path
def test_tile_maxima(rule, dtype):
    """From the output head, computed from the logits, or not at all: the same bits."""
    if dtype == torch.bfloat16 and INTERPRETING:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    x, wte = (torch.randn(size, 64).to(DEVICE, dtype) for size in (3, 300))
    ones, maxima = torch.ones(64, device=DEVICE, dtype=dtype), torch.empty(3, 5, device=DEVICE)
    logits = gpu.lm_head(x, ones, torch.zeros_like(ones), EPS, wte, maxima)
    given = results(gpu, logits, RULES[rule], maxima=maxima)
    assert all(map(same_bits, given, results(gpu, logits, RULES[rule])))
    assert all(map(same_bits, given, results(gpu, logits, RULES[rule], maxima=maxima_of(logits))))


@pytest.mark.parametrize("rule", ["greedy", "top_k=50"])
def test_only_tiles_that_can_hold_a_survivor_are_read(rule):
    """Maxima that hide a tile hide its logits: 8192 logits are not searched where 3 tiles suffice."""
    logits = random_logits(2, 8192)
    maxima = maxima_of(logits)
    tokens, *_ = results(gpu, logits, RULES[rule], maxima=maxima)
    logits[:, 64:128], hidden = -1.0, maxima.clone()
    hidden[:, 1] = -math.inf
    assert 64 <= results(gpu, logits, RULES[rule], maxima=maxima_of(logits))[0].min() < 128
    assert not ((results(gpu, logits, RULES[rule], maxima=hidden)[0] // 64) == 1).any() and len(tokens) == 2


# --- the noise


@triton.jit
def _gumbel_kernel(words_ptr, noise_ptr, SIZE: tl.constexpr):
    """Grid (any,): the noise of SIZE words, which come as int32 bits."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(noise_ptr + at, gumbel(tl.load(words_ptr + at).to(tl.uint32, bitcast=True)))


@triton.jit
def _philox_kernel(tokens_ptr, positions_ptr, words_ptr, seed_low, seed_high, SIZE: tl.constexpr):
    """Grid (any,): the word of each token at its position, as int32 bits."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = philox_word(seed_low, seed_high, tl.load(tokens_ptr + at), tl.load(positions_ptr + at))
    tl.store(words_ptr + at, word.to(tl.int32, bitcast=True))


def _in_blocks(kernel, columns: list[torch.Tensor], dtype: torch.dtype, *seed: int) -> torch.Tensor:
    """What ``kernel`` gives for int32 ``columns``; padded to whole blocks, which are large where programs are slow."""
    count, size = len(columns[0]), 2**16 if INTERPRETING else 1024
    columns = [F.pad(column.to(DEVICE), (0, -count % size)) for column in columns]
    out = torch.empty(len(columns[0]), dtype=dtype, device=DEVICE)
    kernel[(len(out) // size,)](*columns, out, *seed, SIZE=size)
    return out[:count].cpu()


def noise_of(words: torch.Tensor) -> torch.Tensor:
    """The kernel's noise of int64 ``words``."""
    return _in_blocks(_gumbel_kernel, [as_int32(words)], torch.float32)


def words_of(seed: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The kernel's Philox words, int64."""
    columns = [tokens.int(), positions.int()]
    return _in_blocks(_philox_kernel, columns, torch.int32, *seed_words(seed).values()).long() & 0xFFFFFFFF


def as_int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("seed", [*EDGE_SEEDS, 0x243F6A8885A308D3], ids=lambda seed: f"{seed:#x}")
def test_philox(seed):
    """The words of Python's integers and of the twin: whole vocabulary, every position, all 64 bits of the seed."""
    rng = random.Random(seed)
    tokens = torch.tensor([0, 50256, *(rng.randrange(50257) for _ in range(9998))])
    positions = torch.tensor([0, 2**20, *(rng.randrange(1025) for _ in range(9998))])
    words = words_of(seed, tokens, positions)
    zero = torch.zeros_like(tokens)
    assert torch.equal(words, reference.philox(seed, (tokens, positions, zero, zero))[0])
    for i in range(20):
        assert words[i] == integer_philox(seed, [int(tokens[i]), int(positions[i]), 0, 0])[0]


def test_noise():
    """Of 100,000 words, the ends, and both sides of where the series begins: -log(-log(1 - u)), computed in float64."""
    words = torch.cat(
        [
            torch.tensor([0, 1, 2, 2**32 - 1, 2**32 - 2, *range(2**29 - 40, 2**29 + 40)]),
            torch.randint(2**32, (80_000,)),
            2 ** (32 * torch.rand(20_000, dtype=torch.float64)).long(),
        ]
    ).clamp(max=2**32 - 1)
    uniform = (words.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-uniform))
    error = (noise_of(words).double() - exact).abs()
    assert (error <= 1e-6 + 1e-7 * exact.abs()).all(), f"off by {error.max():.3g} at word {words[error.argmax()]}"


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_noise_is_the_twins(seed):
    """Philox and logarithms together, over tokens and positions."""
    tokens, positions = torch.arange(300).repeat(40), torch.arange(40).repeat_interleave(300)
    mine, twins = noise_of(words_of(seed, tokens, positions)), gumbel_noise(seed, positions, tokens)
    assert ((mine - twins).abs() <= 1e-6 + 1e-7 * twins.abs()).all()


@pytest.mark.parametrize("probability", [1e-3, 1e-6, 1e-8])
def test_rare_token_is_drawn_at_its_rate(probability):
    """A token of probability p beats one of probability 1 - p in p of all pairs of words, within 5 %.

    Counted, not sampled, as for the twin: for words of the sure token evenly spaced over all 2^32, the words with which
    the rare one wins are the smallest ones, for the noise falls as the word grows.
    """
    sure = noise_of((torch.arange(2**16) << 16) + 2**15) + math.log1p(-probability)
    coarse = torch.arange(2**16, 2**32, 2**12)  # every word up to 2^16, then every 2^12th
    rare = noise_of(torch.cat([torch.arange(2**16), coarse])) + math.log(probability)
    rising = rare.diff().clamp(min=0)
    assert rising.max() < 1e-6, "only the border of the series may break the order, by a rounding"
    rare = rare.cummin(0).values
    first_loser = torch.searchsorted(-rare, -sure)
    num_winners = torch.where(first_loser < 2**16, first_loser, (first_loser - 2**16) * 2**12 + 2**16)
    assert num_winners.double().mean().item() / 2**32 == pytest.approx(probability, rel=0.05)


@pytest.mark.parametrize("ops", [gpu, reference], ids=["triton", "torch"])
@pytest.mark.parametrize("top_k", [0, 5, 4], ids=lambda k: f"top_k={k}")
@pytest.mark.parametrize("seed", [1, 2**64 - 7])
def test_noise_decides(seed, top_k, ops):
    """Logits that cancel the noise, worked out on Python's own numbers, leave the scores that are written here."""
    scores, temperature, position = [1.0, 3.0, 0.0, 2.0, 2.5], 0.7, 41
    logits = []
    for token, score in enumerate(scores):
        uniform = (integer_philox(seed, [token, position, 0, 0])[0] + 0.5) / 2**32
        logits.append((score + math.log(-math.log1p(-uniform))) * temperature)
    if top_k == 4:
        scores[min(range(5), key=logits.__getitem__)] = -math.inf
    ranked = sorted(range(5), key=lambda token: -scores[token])
    device = DEVICE if ops is gpu else "cpu"
    row, positions = (torch.tensor([column], device=device) for column in (logits, position))
    tokens, children, edges = ops.draw(row, positions.int(), sampled(seed, temperature, top_k), 5, TAU)
    num_live = sum(score > -math.inf for score in scores)
    assert tokens.tolist() == ranked[:1] and children[0, :num_live].tolist() == ranked[:num_live]
    law = (torch.tensor(scores, dtype=torch.float64)[ranked] / TAU).log_softmax(0)
    assert_values(edges[0].cpu().double(), law, "edges")


# --- the law

LAW = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.03, 0.0099, 1e-4], dtype=torch.float64)
NUM_DRAWS = 2**20


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_law_of_the_noise(along):
    """A million argmaxes of log-probabilities and the kernel's noise follow the law (chi-square), along positions and
    over a thousand seeds."""
    tokens = torch.arange(len(LAW))
    if along == "positions":
        positions = torch.arange(NUM_DRAWS)
        words = words_of(11, tokens.repeat(NUM_DRAWS), positions.repeat_interleave(len(LAW)))
    else:
        positions = torch.arange(1024)
        grid = (tokens.repeat(1024), positions.repeat_interleave(len(LAW)))
        words = torch.cat([words_of(seed * 2**40 + seed, *grid) for seed in range(64)])
    drawn = (noise_of(words).view(-1, len(LAW)) + LAW.log().float()).argmax(1)
    assert chi_square(torch.bincount(drawn, minlength=len(LAW)).numpy(), LAW.numpy()) > P_VALUE


def counts(ops, device: str, sampling: Sampling, num_draws: int) -> torch.Tensor:
    """How often each token is drawn, at ``num_draws`` positions."""
    logits = (LAW.log() * sampling.temperature).float().to(device)
    total = torch.zeros(len(LAW), dtype=torch.long)
    for positions in torch.arange(num_draws, dtype=torch.int32, device=device).split(2**18):
        drawn, _, _ = ops.draw(logits.expand(len(positions), -1).contiguous(), positions, sampling)
        total += torch.bincount(drawn.cpu(), minlength=len(LAW))
    return total


@pytest.mark.parametrize("top_k", [0, 3], ids=lambda k: f"top_k={k}")
@pytest.mark.parametrize(
    ("ops", "num_draws"),
    [
        pytest.param(reference, NUM_DRAWS, id="torch"),
        pytest.param(gpu, 200, id="triton"),
        pytest.param(gpu, NUM_DRAWS, id="triton-million", marks=REAL_SHAPE),
    ],
)
def test_law_of_draws(ops, num_draws, top_k):
    """Frequencies of ``draw`` itself are the law, and nothing outside top-k appears."""
    law = torch.where(torch.arange(len(LAW)) < (top_k or len(LAW)), LAW, 0.0)  # LAW falls
    drawn = counts(ops, DEVICE if ops is gpu else "cpu", sampled(17, 0.7, top_k), num_draws)
    assert drawn.sum() == num_draws
    assert chi_square(drawn.numpy(), law.numpy()) > P_VALUE


# --- bad arguments


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("logits must be floats in rows of stride 1, got torch.float64", {"logits": torch.zeros(2, 111).double()}),
        ("logits must be floats in rows of stride 1, got torch.float32, strides", {"logits": torch.zeros(111, 2).t()}),
        (r"positions must have shape \[2\], got \[3\]", {"positions": torch.zeros(3, dtype=torch.int32)}),
        ("positions must be of torch.int32, got torch.int64", {"positions": torch.zeros(2, dtype=torch.int64)}),
        ("num_children must be at most 64, got 65", {"num_children": 65}),
        (r"log_probs must have shape \[2\], got \[1\]", {"log_probs": torch.zeros(1)}),
        (r"child_log_probs must have shape \[2, 4\], got \[2, 3\]", {"child_log_probs": torch.zeros(2, 3)}),
        (r"tile_maxima must have shape \[2, 2\], got \[2, 1\]", {"tile_maxima": torch.zeros(2, 1)}),
        ("tile_maxima must be of torch.float32, got torch.float16", {"tile_maxima": torch.zeros(2, 2).half()}),
    ],
)
def test_bad_argument(message, changed):
    logits = random_logits(2, 111)
    arguments = {"logits": logits, "positions": positions_of(logits), "sampling": GREEDY, "num_children": 4}
    changed = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in changed.items()}
    with pytest.raises(ValueError, match=message):
        gpu.draw(**arguments | changed)


def test_more_children_than_tokens_is_not_too_many():
    assert gpu.draw(random_logits(1, 33), positions_of(random_logits(1, 33)), GREEDY, 65)[1].shape == (1, 33)


# --- real shapes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_children", [0, 4, 64])
@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETING, reason="a real shape needs a CUDA device")
def test_real_shape(rule, num_children):
    """GPT-2's vocabulary, 64 rows of bfloat16 with its ties: the twin's result, and the same bits a hundred times."""
    logits = random_logits(64, 50257, torch.bfloat16)
    logits[9], logits[20, 50256], logits[33, 60:] = -40.0, math.nan, -math.inf
    check(logits, RULES[rule], num_children)
    check(logits, RULES[rule], num_children, maxima_of(logits))
    first = results(gpu, logits, RULES[rule], num_children)
    for _ in range(99):
        assert all(map(same_bits, first, results(gpu, logits, RULES[rule], num_children)))
