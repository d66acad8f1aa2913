"""The law of the output: what speculation emits is distributed as the oracle says, in toys and in whole generations.

Counts are compared with an exactly known law by chi-square tests. Seeds are fixed, so that a test passes always or
never; P_VALUE bounds how likely a right implementation was to meet an unlucky seed.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from decoding import StagedDecoder, katz
from decoding.config import METHODS
from kernels.reference import draw, insert_children, new_tree, reroot, verify
from tests.laws import P_VALUE, chi_square, hugging_face_scores, sampled

V = 5  # vocabulary of every toy here
LEVELS = 3  # tokens of a toy generation
NUM_REPLICATES = 200_000
TAU = 0.85


# --- toy language: draws at the nodes of real trees, 200,000 of them


def toy_language(seed: int) -> list[torch.Tensor]:
    """Logits of every context of up to two tokens: [V^level, V] per level; context (a, b) is row a * V + b."""
    generator = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn(V**level, V, generator=generator) for level in range(LEVELS)]


def exact_law(language: list[torch.Tensor], sampling) -> np.ndarray:
    """P(a, b, c) under Hugging Face's filters: float64 [V, V, V]."""
    first, second, third = (hugging_face_scores(logits.double(), sampling).softmax(1).numpy() for logits in language)
    return first.reshape(V, 1, 1) * second.reshape(V, V, 1) * third.reshape(V, V, V)


def draw_level(language, sampling, replicates, level, contexts, num_children=0):
    """``draw`` for the token of ``level`` after ``contexts`` int64 [R], one row per replicate.

    Replicate i draws its tokens at positions 3 i, 3 i + 1, 3 i + 2. The noise is Philox of (seed, position, token), and
    positions no other replicate uses are as good as a seed of its own: so the code that decodes one text at a time
    makes 200,000 short texts in a few calls.
    """
    return draw(language[level][contexts], replicates * LEVELS + level, sampling, num_children, TAU)


def propose(draft, sampling, replicates) -> torch.Tensor:
    """The draft's noise-conditioned binary trees: tokens int64 [R, 7], node n's children are 2 n + 1 and 2 n + 2."""
    origin = torch.zeros_like(replicates)
    first = draw_level(draft, sampling, replicates, 0, origin, 2)[1].long()  # [R, 2]
    second = [draw_level(draft, sampling, replicates, 1, first[:, i], 2)[1].long() for i in range(2)]
    return torch.cat([origin[:, None] - 1, first, *second], 1)


def draw_at_nodes(oracle, sampling, replicates, tokens) -> torch.Tensor:
    """The oracle's token at every node of the trees: int64 [R, 7]."""
    contexts = [torch.zeros_like(replicates), tokens[:, 1], tokens[:, 2]]
    contexts += [tokens[:, (node - 1) // 2] * V + tokens[:, node] for node in range(3, 7)]
    levels = [0, 1, 1, 2, 2, 2, 2]
    drawn = map(lambda level, context: draw_level(oracle, sampling, replicates, level, context)[0], levels, contexts)
    return torch.stack(list(drawn), 1).long()


def walk(tokens: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``verify`` for all trees at once: emitted tokens [R, 3], garbage from index ``length`` [R] on."""
    node, walking, emitted = torch.zeros(len(tokens), dtype=torch.int64), torch.ones(len(tokens), dtype=torch.bool), []
    length = torch.zeros_like(node)
    for level in range(LEVELS):
        length += walking
        emitted.append(drawn.gather(1, node[:, None]).squeeze(1))
        if level + 1 < LEVELS:
            children = 2 * node[:, None] + torch.tensor([1, 2])
            match = tokens.gather(1, children) == emitted[-1][:, None]
            walking = walking & match.any(1)
            node = torch.where(walking, children.gather(1, match.int().argmax(1, keepdim=True)).squeeze(1), node)
    return torch.stack(emitted, 1), length


def complete(oracle, sampling, replicates, emitted, length) -> torch.Tensor:
    """Draw what is missing after a walk that ended early, as the next pass does at its root."""
    for level in range(1, LEVELS):
        context = emitted[:, 0] if level == 1 else emitted[:, 0] * V + emitted[:, 1]
        drawn = draw_level(oracle, sampling, replicates, level, context)[0]
        emitted[:, level] = torch.where(length <= level, drawn, emitted[:, level])
    return emitted


SAMPLINGS = {"plain": sampled(seed=1), "filtered": sampled(seed=2**40 + 3, temperature=0.8, top_k=3, min_p=0.05)}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())


@each_sampling
def test_joint_law_of_three_tokens_through_trees_and_walks(sampling):
    """Trees that a draft chose by looking at the oracle's own noise, walked by equality: the oracle's law, exactly.

    The draft is unrelated, so that walks of every length occur, and its law is told apart from the oracle's.
    """
    oracle, draft = toy_language(0), toy_language(1)
    counts, lengths = np.zeros((V, V, V), dtype=np.int64), torch.zeros(LEVELS + 1, dtype=torch.int64)
    for replicates in torch.arange(NUM_REPLICATES).split(50_000):
        tokens = propose(draft, sampling, replicates)
        emitted, length = walk(tokens, draw_at_nodes(oracle, sampling, replicates, tokens))
        emitted = complete(oracle, sampling, replicates, emitted, length)
        np.add.at(counts, tuple(emitted.t().numpy()), 1)
        lengths += length.bincount(minlength=LEVELS + 1)
    assert chi_square(counts, exact_law(oracle, sampling)) > P_VALUE
    assert chi_square(counts, exact_law(draft, sampling)) < P_VALUE
    assert (lengths[1:] > 0.02 * NUM_REPLICATES).all(), f"walks of lengths 1, 2, 3: {lengths[1:].tolist()}"


@each_sampling
def test_walk_of_this_file_is_the_real_verify(sampling):
    """The vectorised walk above against ``insert_children`` and ``verify`` on 300 trees, token by token."""
    oracle = toy_language(0)
    replicates = torch.arange(300)
    tokens = propose(toy_language(1), sampling, replicates)
    drawn = draw_at_nodes(oracle, sampling, replicates, tokens)
    emitted, length = walk(tokens, drawn)
    for i in range(len(replicates)):
        tree, nodes = new_tree(7), tokens[i].int()
        reroot(tree, -1, 0)
        insert_children(tree, 0, torch.tensor([0]), nodes[None, 1:3], torch.full((1, 2), -1.0), 2)
        insert_children(tree, 0, torch.tensor([1, 2]), nodes[3:].view(2, 2), torch.full((2, 2), -1.0), 2)
        accepted, next_token, _ = verify(tree, torch.arange(7), drawn[i], 2, ())
        assert [*tree.tokens[accepted].tolist(), next_token] == emitted[i, : length[i]].tolist()


def draw_fixed(positions: torch.Tensor, seed: int = 5) -> np.ndarray:
    """Tokens drawn at ``positions`` from one and the same law."""
    logits = torch.tensor([[0.0, 0.5, -0.5, 1.0, -1.5]]).expand(len(positions), V)
    return draw(logits, positions, sampled(seed=seed))[0].numpy()


def test_tokens_of_one_generation_are_independent():
    """Given the context nothing ties three successive tokens, neither pairwise nor all together."""
    levels = [draw_fixed(torch.arange(NUM_REPLICATES) * LEVELS + level) for level in range(LEVELS)]
    table = np.zeros((V, V, V), dtype=np.int64)
    np.add.at(table, tuple(levels), 1)
    assert stats.chi2_contingency(table).pvalue > P_VALUE


@pytest.mark.parametrize("step", [1, 2**32], ids=["next-seed", "next-high-word"])
def test_generations_of_neighbouring_seeds_are_independent(step):
    """The j-th returned sequence uses seed + j: equal positions of two such sequences are unrelated."""
    positions, table = torch.arange(NUM_REPLICATES), np.zeros((V, V), dtype=np.int64)
    np.add.at(table, (draw_fixed(positions, seed=5), draw_fixed(positions, seed=5 + step)), 1)
    assert stats.chi2_contingency(table).pvalue > P_VALUE


# --- whole generations of tiny models, every seed a generation of its own

PROMPT = [1, 2]
NUM_SEEDS = 5000


def tiny_model(seed: int) -> GPT2LMHeadModel:
    """A random GPT-2 over V tokens, one head of 64, sharp enough that its laws are far from uniform; no eos token."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V,
        n_positions=16,
        n_embd=64,
        n_head=1,
        n_layer=1,
        n_inner=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def disturbed(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A draft that is right more often than chance: ``model`` with noise on every weight."""
    draft = tiny_model(seed=1)
    for weight, other in zip(draft.parameters(), model.parameters(), strict=True):
        weight.mul_(0.3).add_(other)
    return draft


@pytest.fixture(scope="module")
def oracle():
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def decoder(oracle, tmp_path_factory):
    """Oracle, another draft, and a table estimated from random text, all through their files."""
    folder = tmp_path_factory.mktemp("stages")
    oracle.save_pretrained(folder / "oracle")
    disturbed(oracle).save_pretrained(folder / "draft")
    text = np.random.default_rng(0).integers(V, size=500)
    katz.save(katz.KatzTrigram(text, V).bake(num_contexts=20, m=4), folder / "draft2")
    sources = {name: str(folder / name) for name in ("oracle", "draft", "draft2")}
    return StagedDecoder.from_pretrained(**sources, device="cpu", dtype="float32")


@torch.no_grad()
def logits_after(oracle: GPT2LMHeadModel, sequences: torch.Tensor) -> torch.Tensor:
    """Hugging Face's float32 logits at every position of ``sequences`` int64 [n, length]: [n, length, V]."""
    return oracle(sequences).logits


@torch.inference_mode()  # spares a tenth of the time
def generate(decoder, method: str, num_seeds: int, max_new_tokens: int, **arguments) -> list[tuple[int, ...]]:
    """The new tokens of one sampled generation per seed 0, 1, 2, ..."""
    arguments |= {"do_sample": True, "max_new_tokens": max_new_tokens, "method": method}
    return [tuple(decoder.generate(PROMPT, seed=seed, **arguments).new_token_ids) for seed in range(num_seeds)]


@pytest.fixture(scope="module")
def baseline(decoder):
    return generate(decoder, "baseline", NUM_SEEDS, max_new_tokens=2, top_k=0)


@pytest.mark.parametrize("method", METHODS)
def test_whole_generations_follow_the_oracles_law(decoder, oracle, baseline, method):
    """5,000 baseline generations of two tokens against P(a) P(b | a) from Hugging Face's logits, and 2,000 of every
    other method; four methods share P_VALUE.

    Each method must also emit the baseline's tokens seed by seed, which is the stronger statement.
    """
    pairs = baseline if method == "baseline" else generate(decoder, method, 2000, max_new_tokens=2, top_k=0)
    first = logits_after(oracle, torch.tensor([PROMPT]))[0, -1].double().softmax(0)
    second = logits_after(oracle, torch.tensor([[*PROMPT, a] for a in range(V)]))[:, -1].double().softmax(1)
    counts = np.zeros((V, V), dtype=np.int64)
    np.add.at(counts, tuple(np.array(pairs).T), 1)
    assert chi_square(counts, (first[:, None] * second).numpy()) > P_VALUE / len(METHODS)
    assert pairs == baseline[: len(pairs)]


FILTERS = {
    "top_k=2": {"top_k": 2},
    "top_p=0.5": {"top_k": 0, "top_p": 0.5},
    "min_p=0.3": {"top_k": 0, "min_p": 0.3},
    "temperature-and-all": {"temperature": 1.5, "top_k": 3, "top_p": 0.8, "min_p": 0.1},
}


@pytest.mark.parametrize("method", ["baseline", "staged"])
@pytest.mark.parametrize("arguments", FILTERS.values(), ids=FILTERS.keys())
def test_no_token_outside_the_filter_appears(decoder, oracle, arguments, method):
    """Every token of 30 generations survives Hugging Face's filters after its own prefix.

    The borders are widened by 1e-4: our float32 logits differ from Hugging Face's in the last bits. That the test can
    fail: the filters remove something everywhere, and leave a choice somewhere.
    """
    emitted = torch.tensor(generate(decoder, method, num_seeds=30, max_new_tokens=6, **arguments))
    sequences = torch.cat([torch.tensor([PROMPT]).expand(30, -1), emitted], 1)
    looser = sampled(**arguments)
    looser = looser._replace(top_p=min(1.0, looser.top_p + 1e-4), min_p=looser.min_p * (1 - 1e-4))
    logits = logits_after(oracle, sequences)[:, len(PROMPT) - 1 : -1].flatten(0, 1)
    allowed = hugging_face_scores(logits, looser).isfinite()
    assert allowed.gather(1, emitted.view(-1, 1)).all()
    assert allowed.sum(1).double().mean() < V - 1
    assert len(emitted.unique(dim=0)) > 1
