"""``draw`` on the Triton backend gives what its torch twin gives on the same logits: the same tokens and children,
edges and log-probabilities within rounding, whatever ties, NaN and infinities there are; bad arguments are refused.

Scratch is poisoned throughout. Vocabularies of 8192 and more come with their tile maxima, which cost the interpreter
a millisecond a tile; ``test_tile_maxima`` in ``test_gpu_sampling_rows.py`` has both sources.
"""

import math

import pytest
import torch

from kernels import gpu, reference
from tests.draws import PATHS, RULES, TAU, check, each_dtype, each_path, maxima_of, positions_of, random_logits, results
from tests.gpu_helpers import REAL_SHAPE, same_bits
from tests.interpreter import DEVICE
from tests.laws import GREEDY, sampled

pytestmark = pytest.mark.usefixtures("hostile_scratch")
# 3 and 33: below one tile; 65: one past it; 111: fewer tiles than any top-k but 1 and 2; 8192: a real vocabulary.
VOCAB_SIZES = [3, 33, 65, 111, 8192]


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


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("logits must be floats in rows of stride 1, got torch.float64", {"logits": torch.zeros(2, 111).double()}),
        ("logits must be floats in rows of stride 1, got torch.float32, strides", {"logits": torch.zeros(111, 2).t()}),
        (r"positions must have shape \[2\], got \[3\]", {"positions": torch.zeros(3, dtype=torch.int32)}),
        ("positions must be of torch.int32, got torch.int64", {"positions": torch.zeros(2, dtype=torch.int64)}),
        (r"seed must have shape \[2\], got \[1\]", {"sampling": GREEDY._replace(seed=GREEDY.seed[:1])}),
        ("seed must be of torch.int32, got torch.int64", {"sampling": GREEDY._replace(seed=GREEDY.seed.long())}),
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_children", [0, 4, 64])
@REAL_SHAPE
def test_real_shape(rule, num_children):
    """GPT-2's vocabulary, 64 rows of bfloat16 with its ties: the twin's result, and the same bits a hundred times.

    Three of the 64 rows have a nucleus that ends within 5e-7 of the mass of a token, so that sums in another order may
    leave that token out: 4e-5 of the mass, in edges as many times as much as its noise makes of it.
    """
    logits = random_logits(64, 50257, torch.bfloat16)
    logits[9], logits[20, 50256], logits[33, 60:] = -40.0, math.nan, -math.inf
    check(logits, RULES[rule], num_children, maxima_of(logits), tolerance=1e-3)
    first = results(gpu, logits, RULES[rule], num_children)
    for _ in range(99):
        assert all(map(same_bits, first, results(gpu, logits, RULES[rule], num_children)))


@pytest.mark.parametrize("top_k", [0, 8])
def test_a_nucleus_without_mass_is_one_token(top_k):
    """A ``top_p`` that float32 cannot tell from zero keeps the best token, as any other does, and no noise moves it."""
    logits = random_logits(4, 200)
    tokens, *_ = check(logits, sampled(seed=3, top_k=top_k, top_p=1e-46))
    assert torch.equal(tokens.long(), logits.argmax(-1).cpu())
