"""The loop and its stages beyond the text they give, which speculation cannot change: how much of a good draft is
taken, what is forgotten between generations and remembered within one, and what is counted.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from decoding import SpeculationConfig, StagedDecoder
from decoding.config import Limits, SamplingConfig, chain
from decoding.katz import KatzTrigram, save
from decoding.loop import Generation
from decoding.stages import KatzStage
from profiling.equality import noisy_copy
from tests.helpers import random_tokens
from tests.test_lossless import VOCAB, tiny_model
from tests.worked_iteration import key_of

SAMPLINGS = {"greedy": SamplingConfig(), "sampled": SamplingConfig(do_sample=True, top_k=20)}
BELOW_DRAFT = SpeculationConfig(("draft2", "draft"), (2, 2), (3, 5), (3, 3), budget=12, max_depth=6)
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A draft2 table that knows nothing of the models."""
    directory = tmp_path_factory.mktemp("table")
    save(KatzTrigram(np.array(random_tokens(2000)), VOCAB).bake(200), directory)
    return directory


@pytest.fixture(scope="module")
def decoder(table):
    """``decoder(noise)``: a table, a draft that is the oracle plus noise, the oracle."""
    oracle = tiny_model(0, 1)

    def load(noise: float) -> StagedDecoder:
        return StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, noise), table, device="cpu", dtype="float32")

    return load


def generation(decoder: StagedDecoder, config: SpeculationConfig, sampling: str, new_tokens: int = 24) -> Generation:
    lower = [decoder._stage(name) for name in config.stages]
    rule, limits = SAMPLINGS[sampling].with_seed(3), Limits(new_tokens)
    return Generation(lower, decoder.oracle, [5, 17, 40], rule, limits, config)


@each_sampling
@pytest.mark.parametrize("depth", [1, 4])
def test_a_perfect_draft_is_taken_whole(depth, sampling, decoder):
    """The oracle as its own draft: every iteration emits as many tokens as the chain is deep, and the oracle's own."""
    running = generation(decoder(0.0), chain(depth), sampling)
    emitted = [len(tokens) for tokens in running.run()]
    assert emitted[:-1] == [depth + 1] * (len(emitted) - 1) and len(emitted) > 1
    assert set(running.stats.token_stages) == {"draft", "oracle"}


def test_shared_noise_is_worth_something():
    """Without shared noise a draft guesses less of what the oracle draws, and the text is the same."""
    oracle = tiny_model(0, 1)
    decoder = StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, 0.2), None, device="cpu", dtype="float32")
    tree = SpeculationConfig(("draft",), (3,), (5,), (4,), budget=12, max_depth=6)
    shared, own = (
        decoder.generate([5, 17], 60, do_sample=True, seed=1, speculation=config)
        for config in (tree, replace(tree, shared_noise=False))
    )
    assert shared.new_token_ids == own.new_token_ids
    assert shared.stats["acceptance_rate"] > 1.2 * own.stats["acceptance_rate"]


@each_sampling
def test_a_generation_forgets_the_one_before(sampling, decoder):
    """The same stages, the same prompt: the same trees again, though another generation had taught draft2 meanwhile,
    and though nobody closed it."""
    stages = decoder(0.2)

    def trees() -> list:
        running = generation(stages, BELOW_DRAFT, sampling)
        list(running.run())
        return running.stats.iterations

    first = trees()
    assert any(0 in iteration.sources for iteration in first), "draft2 should have proposed something"
    assert trees() == first
    for stage in stages.lower[1:]:
        stage.end()
        stage.cache.check()


def test_draft2_remembers_what_the_draft_drew(decoder, monkeypatch):
    """Before the first iteration draft2 holds the contexts of the prompt that something follows; after every iteration
    but the last, which has nothing to propose, that of its root, although the oracle keeps its draws to itself here."""
    running = generation(decoder(0.2), BELOW_DRAFT, "greedy")
    recent, learn = running.lower[0].recent, running.lower[0].learn
    monkeypatch.setattr(running.lower[0], "learn", lambda *a, level: learn(*a, level=level) if level == 0 else None)
    pairs = zip(running.text[:-2], running.text[1:-1], strict=True)
    assert set(recent.keys.tolist()) == {-1, *(key_of(*pair) for pair in pairs)}
    for _ in range(4):
        known = {key_of(*running.text[-length:]) for length in (2, 4, 8) if length <= len(running.text)}
        running.step()
        assert known <= set(recent.keys.tolist())


@each_sampling
def test_draft2_remembers_what_the_oracle_drew(sampling, table):
    """Without a draft, with a table that knows nothing: what repeats is guessed."""
    decoder = StagedDecoder.from_pretrained(tiny_model(0, 1), None, table, device="cpu", dtype="float32")
    alone = SpeculationConfig(("draft2",), (6,), (4,), (3,), budget=8, max_depth=8)
    running = generation(decoder, alone, sampling, new_tokens=60)
    emitted, recent = list(running.run()), running.lower[0].recent
    assert (recent.keys >= 0).sum() > 20 and (recent.log_probs[recent.keys >= 0][:, 0] > -np.inf).all()
    running = generation(decoder, alone, sampling, new_tokens=60)
    running.lower[0].remembers = 0
    forgetful = list(running.run())
    assert sum(emitted, []) == sum(forgetful, []) and len(emitted) <= len(forgetful)
    if sampling == "greedy":  # the tiny oracle repeats itself
        assert len(emitted) < 0.6 * len(forgetful)


def test_a_draft_is_not_asked_what_the_oracle_has_answered(decoder, monkeypatch):
    """A draft that is always wrong: nodes whose context the oracle has seen keep the oracle's answer."""
    drowned, lengths = decoder(100.0), []
    learn = KatzStage.learn
    for level in (1, 0):  # as it is, and as if the draft were to be asked
        monkeypatch.setattr(KatzStage, "learn", lambda *a, level, most=level: learn(*a, level=min(level, most)))
        running = generation(drowned, BELOW_DRAFT, "greedy", new_tokens=60)
        lengths.append(len(list(running.run())))
    assert lengths[0] < 0.8 * lengths[1]


def test_draft2_has_the_last_word(decoder):
    """It looks up before each of the draft's passes, and once more below what the draft has ranked."""
    running = generation(decoder(0.2), BELOW_DRAFT, "greedy")
    before = running.lower[0].passes
    running.step()
    rounds, draft_rounds = BELOW_DRAFT.rounds
    assert running.lower[0].passes - before == rounds * (draft_rounds + 1)
    alone = generation(decoder(0.2), replace(chain(1, "draft2"), rounds=(3,)), "greedy")
    alone.step()
    assert alone.lower[0].passes == 3, "nobody asks after it"


@each_sampling
def test_an_improbable_node_is_not_drafted(sampling, decoder):
    """A draft with nothing to score is not run, and catches up with the text when it is; the text is the same."""
    plain = sum(generation(decoder(0.2), SpeculationConfig(), sampling, 60).run(), [])
    config = replace(BELOW_DRAFT, rounds=(2, 1), max_depth=2, min_prob=0.3)
    running = generation(decoder(0.2), config, sampling, 60)
    draft, cached, lags, emitted = running.lower[1], running.state.chain.cached_len, [], []
    while running.finish_reason is None:
        emitted += running.step()
        lags.append(len(running.text) - int(cached[0]))
    assert emitted == plain and draft.passes > 0
    if sampling == "greedy":  # the oracle repeats itself, and draft2 answers from what it drew
        assert draft.passes < 0.8 * running.oracle.passes
        assert any(lag > config.max_depth + 1 and after < lag for lag, after in pairwise(lags)), "it was run again"


def test_bytes_of_a_baseline(decoder):
    """Each pass reads the weights, the K/V of the text and writes a row of its own; prefill does not count."""
    running = generation(decoder(0.2), SpeculationConfig(), "greedy", new_tokens=5)
    list(running.run())
    row = 2 * 1 * 64 * 4  # keys and values, one layer, 64 wide, float32
    weights = running.oracle.model.weights.bytes_per_pass
    assert running.oracle.passes == 5
    assert running.oracle.bytes_moved == 5 * weights + (3 + 4 + 5 + 6 + 7) * row + 5 * row


def test_bytes_of_a_chain(decoder):
    """One draft node and the root are verified: two rows of the oracle; the draft has the tokens accepted before it at
    the head of its pass. draft2 reads a row of its table in every iteration but the last, with one token to come, and
    a key of it and of three contexts."""
    running = generation(decoder(0.0), chain(1), "greedy", new_tokens=4)
    list(running.run())
    (draft,), oracle, row = running.lower, running.oracle, 2 * 64 * 4
    weights = oracle.model.weights.bytes_per_pass
    assert oracle.passes == draft.passes == 2, "two tokens an iteration, below 3 and 5 committed ones"
    assert oracle.bytes_moved == 2 * weights + (3 + 5) * row + (2 + 2) * row
    assert draft.bytes_moved == 2 * weights + (3 + 5) * row + (1 + 2) * row

    running = generation(decoder(0.2), chain(1, "draft2"), "greedy", new_tokens=4)
    list(running.run())
    (katz,) = running.lower
    assert katz.bytes_moved == (katz.passes - 1) * (16 + 3 * 8 + 8 * katz.table.tokens.shape[1])


@each_sampling
@pytest.mark.parametrize("length", [40, 48, 49, 60])
def test_draft_of_a_shorter_context(length, sampling):
    """A prompt that the draft cannot hold, or a text that outgrows it: the oracle goes on alone, with the same text."""
    oracle = tiny_model(0, 1)
    short = tiny_model(1, 1)
    short.config.n_positions = 48
    short.transformer.wpe.weight.data = short.transformer.wpe.weight.data[:48]
    decoder = StagedDecoder.from_pretrained(oracle, short, None, device="cpu", dtype="float32")
    arguments = {"do_sample": sampling == "sampled", "seed": 2}
    prompt = random_tokens(length)
    speculated = decoder.generate(prompt, 16, method="tree", **arguments)
    assert speculated.new_token_ids == decoder.generate(prompt, 16, method="baseline", **arguments).new_token_ids
    assert (speculated.stats["stages"]["draft"]["passes"] > 0) == (length <= 48)


def test_what_a_stage_is_asked_for(decoder, monkeypatch):
    """Widths, children and tau are those of the configuration, and no tree is deeper than it allows."""
    running = generation(decoder(0.2), replace(BELOW_DRAFT, max_depth=3, tau=0.5), "greedy")
    table, draft, oracle = running.stages
    asked = {stage.name: [] for stage in running.stages}

    def noted(stage):
        score = stage.score

        def score_and_note(state, index, nodes, sampling, num_children, tau):
            n = int(state.tree.num_nodes)
            assert state.tree.depths[:n].max() <= 3
            asked[stage.name].append((len(nodes), num_children, tau))
            return score(state, index, nodes, sampling, num_children, tau)

        return score_and_note

    def extend(*arguments):
        asked["draft2"].append(arguments[4:8])
        return extend_tree(*arguments)

    extend_tree = table.ops.extend_tree
    monkeypatch.setattr(table.ops, "extend_tree", extend)
    for stage in (draft, oracle):
        monkeypatch.setattr(stage, "score", noted(stage))
    list(running.run())
    rounds, widths, children = BELOW_DRAFT.rounds, BELOW_DRAFT.widths, BELOW_DRAFT.children
    assert set(asked["draft2"]) == {(rounds[0], widths[0], children[0], 0.5)}
    assert {tuple(rest) for _, *rest in asked["draft"]} == {(children[1], 0.5)}
    assert max(num_nodes for num_nodes, *_ in asked["draft"]) == widths[1]
    assert max(num_nodes for num_nodes, *_ in asked["oracle"]) == 1 + BELOW_DRAFT.budget


def test_more_nodes_than_a_pass_has_rows(decoder):
    """Two passes then, parents first: the same text, and both are counted."""
    wide = SpeculationConfig(("draft",), (5,), (200,), (4,), budget=150, max_depth=6)
    running = generation(decoder(0.2), wide, "sampled")
    plain = [token for tokens in generation(decoder(0.2), SpeculationConfig(), "sampled").run() for token in tokens]
    first = running.step()
    assert running.lower[0].passes == 6 and running.oracle.passes == 2, "200 nodes in the last round, then 151"
    assert first + [token for tokens in running.run() for token in tokens] == plain


def test_speed_is_tokens_by_seconds(decoder):
    stats = decoder(0.2).generate([5, 17], 8, method="tree").stats
    assert stats["seconds"]["total"] > 0
    assert stats["tokens_per_second"] == pytest.approx(8 / stats["seconds"]["total"])


def test_the_seconds_hold_the_prefill(decoder):
    """With a long prompt and one token, most of the time is prefill: it is in the total, and no part is negative."""
    out = decoder(0.2).generate(random_tokens(60, vocab_size=VOCAB), 1, method="baseline")
    seconds = out.stats["seconds"]
    assert seconds["total"] > out.stats["prefill_seconds"] > 0 and seconds["host"] >= 0
