"""The sampler's twin: filters, draws and children, each against something written elsewhere."""

import math

import pytest
import torch

from kernels.reference import draw, gumbel_noise, new_seed
from kernels.reference import sampling as specification
from tests.laws import GREEDY, clear_rows, hugging_face_scores, sampled

# 3 and 33: no whole vector; 65: one past a power of two; 111: odd, wider than the candidates of top_k=50;
# 8192: a real vocabulary.
VOCAB_SIZES = [3, 33, 65, 111, 8192]
FILTERS = {
    "temperature": sampled(temperature=0.7),
    "top_k=1": sampled(top_k=1),
    "top_k=2": sampled(top_k=2),
    "top_k=50": sampled(top_k=50, temperature=1.3),
    "top_k=V-and-more": sampled(top_k=10_000),
    "top_p": sampled(top_p=0.9),
    "top_p-tiny": sampled(top_p=1e-3),
    "min_p": sampled(min_p=0.1),
    "min_p=1": sampled(min_p=1.0),
    "all": sampled(temperature=0.8, top_k=20, top_p=0.8, min_p=0.05),
}
each_filter_but_top_p = pytest.mark.parametrize("name", ["top_k=1", "top_k=2", "top_k=50", "min_p", "min_p=1"])
each_vocab_size = pytest.mark.parametrize("vocab_size", VOCAB_SIZES, ids=lambda v: f"V={v}")
each_rule = pytest.mark.parametrize("sampling", [GREEDY, *FILTERS.values()], ids=["greedy", *FILTERS])
each_filter = pytest.mark.parametrize("sampling", FILTERS.values(), ids=FILTERS.keys())


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def tied_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Few distinct values, so that nearly every row has ties at the k-th one."""
    return random_logits(num_rows, vocab_size).round().clamp(-4, 4)


def positions_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits), dtype=torch.int32) + 17


def survivors(logits: torch.Tensor, sampling, at_most: int) -> torch.Tensor:
    """Which tokens ``draw`` lets through, bool [N, V], read off its children; one more than ``at_most`` would show.

    Asking for no more children than that keeps the search among few candidates where the sampler has one.
    """
    _, children, scores = draw(logits, positions_of(logits), sampling, num_children=at_most + 1)
    return torch.zeros(logits.shape, dtype=torch.bool).scatter(1, children.long(), scores > -math.inf)


def check_survivors(logits: torch.Tensor, sampling) -> None:
    """The filters let through exactly the tokens that Hugging Face's warpers let through."""
    clear = clear_rows(logits, sampling)
    assert clear.float().mean() > 0.9
    expected = hugging_face_scores(logits, sampling).isfinite()
    kept = survivors(logits, sampling, at_most=int(expected.sum(1).max()))
    assert torch.equal(kept[clear], expected[clear])


@each_filter
@each_vocab_size
def test_survivors_are_hugging_faces(vocab_size, sampling):
    check_survivors(random_logits(40, vocab_size), sampling)


@each_filter_but_top_p
@each_vocab_size
def test_ties_survive_as_in_hugging_face(vocab_size, name):
    """All tokens equal to the k-th best survive, few ties or thousands."""
    check_survivors(tied_logits(40, vocab_size), FILTERS[name])


def test_ties_that_the_temperature_makes_survive():
    """Some neighbouring floats are equal once divided by 1.3: top_k=1 then keeps both, as in Hugging Face."""
    logits, sampling = torch.zeros(50, 33), sampled(temperature=1.3, top_k=1)
    logits[:, 9] = 1.5 + torch.arange(50) * 2.0**-23
    logits[:, 4] = logits[:, 9] + 2.0**-23
    assert 50 < hugging_face_scores(logits, sampling).isfinite().sum() < 100
    check_survivors(logits, sampling)


@each_vocab_size
def test_top_p_orders_ties_by_id(vocab_size):
    """As many of each value survive as in Hugging Face, whose order of ties is not defined; of ours, the lowest ids."""
    sampling, logits = sampled(top_p=0.7), tied_logits(40, vocab_size)
    clear = clear_rows(logits, sampling)
    kept, expected = survivors(logits, sampling, vocab_size), hugging_face_scores(logits, sampling).isfinite()
    for row, mine, theirs in zip(logits[clear], kept[clear], expected[clear], strict=True):
        for value in row.unique():
            ids = (row == value).nonzero().squeeze(1)
            assert mine[ids].sum() == theirs[ids].sum()
            assert (mine[ids].int().diff() <= 0).all(), "a higher id survived and a lower one did not"


@pytest.mark.parametrize("sampling", [sampled(), sampled(top_k=50), sampled(top_k=50, min_p=1e-12)])
def test_a_filter_that_is_off_lets_the_least_token_through(sampling):
    """Masses so far below the best that a sum in float32 is the same without them."""
    logits = torch.full((40, 1000), -math.inf)
    logits[:, 100:150] = -torch.rand(40, 50) - 20.0 * (torch.arange(50) > 2)
    assert survivors(logits, sampling, at_most=50).sum(1).tolist() == [50] * 40


def test_top_p_orders_ties_by_id_among_the_candidates_of_top_k():
    """Thirty equal tokens all survive top_k=20; half of their mass is the fifteen lowest ids."""
    logits = torch.zeros(1, 300)
    logits[0, torch.randperm(300, generator=torch.Generator().manual_seed(0))[:30]] = 9.0
    kept = survivors(logits, sampled(top_k=20, top_p=0.499), at_most=15)[0]
    assert kept.nonzero().squeeze(1).tolist() == logits[0].nonzero().squeeze(1)[:15].tolist()


@each_rule
@each_vocab_size
def test_draw_is_the_argmax_of_filtered_scores_and_noise(vocab_size, sampling):
    """Over the whole vocabulary, with Hugging Face's processed scores and the noise of every token (greedy: none)."""
    logits = random_logits(200 if vocab_size < 1000 else 40, vocab_size, seed=1)
    clear, positions = clear_rows(logits, sampling), positions_of(logits)
    sampling = sampling._replace(seed=new_seed(77))
    noise = gumbel_noise(77, positions[:, None], torch.arange(vocab_size)) * sampling.noise
    expected = (hugging_face_scores(logits, sampling) + noise).argmax(1)
    assert torch.equal(draw(logits, positions, sampling)[0][clear], expected[clear].int())


@each_filter_but_top_p
@each_vocab_size
def test_draw_among_ties_is_the_argmax(vocab_size, name):
    """The same where the ties of one row are more than the candidates, and those of its neighbours are not."""
    logits = torch.cat([random_logits(20, vocab_size), tied_logits(60, vocab_size), torch.zeros(20, vocab_size)])
    noise = gumbel_noise(0, positions_of(logits)[:, None], torch.arange(vocab_size))
    expected = (hugging_face_scores(logits, FILTERS[name]) + noise).argmax(1)
    assert torch.equal(draw(logits, positions_of(logits), FILTERS[name])[0], expected.int())


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (GREEDY, [0]),
        (sampled(top_k=1), range(100)),  # every token ties with the best one
        (sampled(top_p=0.035), [0, 1, 2, 3]),  # the mass before the fifth is 0.04
        (sampled(min_p=1.0), range(100)),
        (sampled(top_k=3, top_p=0.015), [0, 1]),  # a hundred ties at the k-th value, then the nucleus
    ],
    ids=["greedy", "top_k", "top_p", "min_p", "top_k-top_p"],
)
def test_all_equal_row_keeps_the_lowest_ids(sampling, expected):
    logits = torch.zeros(300, 100)
    tokens, _, _ = draw(logits, positions_of(logits), sampling)
    assert set(tokens.tolist()) <= set(expected)
    if sampling.noise:
        assert survivors(logits, sampling, at_most=100)[0].nonzero().squeeze(1).tolist() == list(expected)


@pytest.mark.parametrize("top_k", range(2, 8))
def test_number_of_children_does_not_move_the_nucleus(top_k):
    """Plain decoding asks for no child, an oracle that is listened to for 8. top_p is a sum of masses of the row, so
    that the last bit of their total decides."""
    generator, mismatches = torch.Generator().manual_seed(top_k), 0
    for seed in range(150):
        logits = torch.full((1, 64), -60.0)
        logits[0, :top_k] = torch.randn(top_k, generator=generator)
        masses = logits[0, :top_k].softmax(0).sort(descending=True).values
        rule = sampled(seed=seed, top_k=top_k, top_p=float(masses[: 1 + seed % (top_k - 1)].sum()))
        rows, positions = logits.expand(20, 64), torch.arange(20, dtype=torch.int32)
        alone = draw(rows, positions, rule)[0]
        mismatches += sum(not torch.equal(draw(rows, positions, rule, width)[0], alone) for width in (1, 8))
    assert mismatches == 0


def test_ties_under_noise_go_to_the_lowest_id():
    """Logits so large that adding noise leaves equal ones equal: children by the loops and by the specification."""
    generator = torch.Generator().manual_seed(0)
    logits = (2**24 + 2 * torch.randint(0, 3, (4000, 40), generator=generator)).float()
    rule, positions = sampled(top_k=5), torch.arange(4000, dtype=torch.int32)
    _, children, edges = draw(logits, positions, rule, 8)
    _, wanted, _, _ = specification.by_torch(logits, positions, rule, 8, 1.0)
    live = edges > -math.inf
    assert torch.equal(children[live], wanted[live])


@pytest.mark.parametrize("sampling", [GREEDY, sampled(), sampled(top_k=2), sampled(top_k=2, top_p=0.99)])
def test_ties_go_to_the_lowest_id(monkeypatch, sampling):
    """With the noise switched off: equal scores at ids 20, 70 and 90."""
    monkeypatch.setattr(specification, "gumbel_noise", lambda seed, positions, ids: torch.zeros(1))
    logits = torch.zeros(2, 111)
    logits[:, [90, 20, 70]] = 3.0
    assert specification.by_torch(logits, positions_of(logits), sampling, 1, 1.0)[0].tolist() == [20, 20]
    if not sampling.noise:
        assert draw(logits, positions_of(logits), sampling)[0].tolist() == [20, 20]


@each_rule
@pytest.mark.parametrize("num_children", [0, 1, 2, 8])
@pytest.mark.parametrize("vocab_size", [3, 111, 1000], ids=lambda v: f"V={v}")
def test_nan_row_draws_minus_one_and_leaves_the_others_alone(vocab_size, num_children, sampling):
    """Whether children are asked for or not, the token is the same."""
    logits = random_logits(6, vocab_size)
    expected, _, _ = draw(logits, positions_of(logits), sampling)
    assert torch.equal(draw(logits, positions_of(logits), sampling, num_children)[0], expected)
    for row, column in ((2, 1), (4, slice(None))):  # one NaN alone, then a whole row beside it
        logits[row, column], expected[row] = math.nan, -1
        assert torch.equal(draw(logits, positions_of(logits), sampling, num_children)[0], expected)


@each_rule
def test_impossible_tokens_are_never_drawn(sampling):
    """-inf logits stay impossible and are no children; a row with one finite logit draws it; none: the lowest id."""
    logits = random_logits(50, 33)
    logits[:, ::2] = -math.inf
    logits[7], logits[7, 12], logits[8] = -math.inf, 0.0, -math.inf
    tokens, children, scores = draw(logits, positions_of(logits), sampling, num_children=33)
    assert tokens[7] == 12 and tokens[8] == 0
    ordinary = [row for row in range(50) if row not in (7, 8)]
    assert (tokens[ordinary] % 2 == 1).all()
    assert (children[ordinary][scores[ordinary] > -math.inf] % 2 == 1).all()
    assert children[7, 0] == 12 and scores[7, 0] == 0 and (scores[7, 1:] == -math.inf).all()


@pytest.mark.parametrize("sampling", [sampled(top_k=2), sampled(top_k=2, top_p=0.9), sampled(top_k=20, top_p=0.6)])
def test_row_does_not_depend_on_its_neighbours(sampling):
    """Rows drawn alone equal rows drawn beside one with hundreds of ties at the k-th value and one with a NaN.

    The neighbours push the call from the narrow to the full search; the token, the children that survive and their
    order must not change.
    """
    logits, num_children = random_logits(400, 300), 4
    positions = positions_of(logits)
    alone = draw(logits, positions, sampling, num_children, tau=0.85)
    for neighbour in (torch.zeros(1, 300), torch.full((1, 300), math.nan)):
        rows = torch.cat([logits, neighbour])
        beside = draw(rows, positions_of(rows), sampling, num_children, tau=0.85)
        assert torch.equal(beside[0][:-1], alone[0])
        live = alone[2] > -math.inf
        assert torch.equal(beside[1][:-1][live], alone[1][live])
        torch.testing.assert_close(beside[2][:-1], alone[2], atol=4e-6, rtol=0)  # of few candidates, of many


@each_rule
@each_vocab_size
def test_children_are_ranked_by_the_noise_conditioned_softmax(vocab_size, sampling):
    """The first child is the drawn token; edges are log softmax((scores + noise) / tau), checked in float64."""
    logits, tau, sampling = random_logits(20, vocab_size, seed=2), 0.85, sampling._replace(seed=new_seed(3))
    positions = positions_of(logits)
    tokens, children, edges = draw(logits, positions, sampling, num_children=5, tau=tau)
    assert children.shape == edges.shape == (20, min(5, vocab_size))
    assert torch.equal(children[:, 0], tokens)
    scores = logits.double()
    if sampling.noise:
        noise = gumbel_noise(3, positions[:, None], torch.arange(vocab_size))
        scores = torch.where(survivors(logits, sampling, vocab_size), scores / sampling.temperature + noise, -math.inf)
    expected = (scores / tau).log_softmax(1)
    torch.testing.assert_close(edges.double(), expected.gather(1, children.long()), atol=2e-5, rtol=0)
    best, _ = expected.topk(edges.shape[1], dim=1)
    torch.testing.assert_close(edges.double(), best, atol=2e-5, rtol=0)
    assert (edges.diff(dim=1).nan_to_num(0.0) <= 0).all() and (edges <= 0).all()


def test_first_child_is_the_drawn_token_on_ties():
    """And none is named twice, though the search for the best orders equal scores at will."""
    logits = tied_logits(200, 111)
    tokens, children, edges = draw(logits, positions_of(logits), GREEDY, num_children=4)
    assert torch.equal(children[:, 0], tokens)
    assert (children.sort(1).values.diff() > 0).all() and (edges.diff() <= 0).all()


@pytest.mark.parametrize("num_children", [0, 2, 3, 10], ids=lambda n: f"children={n}")
@pytest.mark.parametrize("sampling", [GREEDY, sampled(), sampled(top_p=0.5)], ids=["greedy", "plain", "top_p"])
def test_number_of_children_is_clamped_to_the_vocabulary(sampling, num_children):
    _, children, edges = draw(random_logits(4, 3), torch.arange(4), sampling, num_children)
    assert children.shape == edges.shape == (4, min(3, num_children))
    assert children.dtype == torch.int32 and edges.dtype == torch.float32
    assert (children.sort(1).values.diff() > 0).all()


def test_number_of_children_does_not_depend_on_ties():
    for logits in (random_logits(4, 200), torch.zeros(4, 200)):
        assert draw(logits, positions_of(logits), sampled(top_k=2), num_children=40)[1].shape == (4, 40)
