"""Iterations launched ahead, and captured ones, on the CPU: whatever way they are launched, a generation says, counts
and leaves behind the same as with one iteration at a time; what was launched in vain is as if it had never run.

The stand-in for a CUDA graph replays by calling what it captured, on the buffers that it captured it for. The same on
the Triton backend, and with real graphs on a GPU: ``test_gpu_capture.py``.
"""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from decoding import SpeculationConfig, StagedDecoder
from decoding.config import METHODS, Limits, SamplingConfig
from decoding.decoder import GenerateOutput
from decoding.execution import MAX_PLANS, Captured, Eager, choose
from decoding.katz import KatzTrigram, save
from decoding.loop import Generation
from decoding.pipeline import Pipeline
from decoding.prompt import PromptPasses
from decoding.stats import Work
from kernels import gpu
from kernels.layout import RECORD, RUNNING
from profiling.equality import noisy_copy
from tests.gpu_helpers import same_bits
from tests.helpers import random_tokens, tiny_gpt2
from tests.recorded_graph import RecordedGraph, everything, said
from tests.test_lossless import VOCAB, tiny_model

SAMPLINGS = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.3}}
EXECUTIONS = {
    "ahead": lambda: Eager(ahead=1),
    "far ahead": lambda: Eager(ahead=3),
    "captured": lambda: Captured(RecordedGraph),
}
each_execution = pytest.mark.parametrize("execution", EXECUTIONS)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> StagedDecoder:
    """Table, a draft that is the oracle plus noise, the oracle; every token is a word of its own."""
    directory, oracle = tmp_path_factory.mktemp("table"), tiny_model(0, 1)
    save(KatzTrigram(np.array(random_tokens(2000)), VOCAB).bake(200), directory)
    decoder = StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, 0.2), directory, device="cpu", dtype="float32")
    decoder.tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    return decoder


def run(decoder: StagedDecoder, execution, *arguments, **named) -> GenerateOutput:
    """``decoder.generate`` with another execution; its caches are empty afterwards."""
    before, decoder.execution = decoder.execution, execution
    try:
        return decoder.generate(*arguments, **named)
    finally:
        decoder.execution = before
        for stage in (*decoder.lower[1:], decoder.oracle):
            assert stage.cache is None or stage.cache.num_free_pages == stage.cache.num_pages


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_ends(method, sampling, decoder):
    """One token or two, an eos at the start, within and at the end, the context's end: each way to launch says and
    counts the same."""
    executions, named = [make() for make in EXECUTIONS.values()], {"method": method} | SAMPLINGS[sampling]
    text = decoder.generate([5, 17, 40], 8, seed=3, **named).new_token_ids
    cases = [([5, 17, 40], n, None) for n in (1, 2)] + [([5, 17, 40], 8, [text[i], 0]) for i in (0, 3, 7)]
    cases += [(random_tokens(n), 60, None) for n in (125, 128)]
    reasons = set()
    for prompt, length, eos in cases:
        plain, *others = (
            run(decoder, execution, prompt, length, seed=3, eos_token_id=eos, **named)
            for execution in (Eager(), *executions)
        )
        assert all(said(other) == said(plain) for other in others), (len(prompt), length, eos)
        reasons.add(plain.finish_reason)
    assert reasons == {"eos", "length"}


class Listening:
    """A streamer that keeps what it is given, and interrupts the generation once it has ``enough`` tokens."""

    def __init__(self, enough: int = 10**9):
        self.heard, self.enough = [], enough

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())
        if value.dim() == 1 and sum(map(len, self.heard[1:])) >= self.enough:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("method", ["baseline", "staged"])
def test_stop_strings(method, decoder):
    """A stop string that ends in the first, a middle or the last token: text, tokens, statistics and what is streamed
    are those of one iteration at a time, though the device went on."""
    executions, prompt = [make() for make in EXECUTIONS.values()], [5, 17, 40]
    named = {"seed": 1, "method": method} | SAMPLINGS["sampled"]
    whole = decoder.generate(prompt, 8, **named).text.split()
    for i in (0, 1, 4, 7):
        stop = ["none", " ".join(whole[max(0, i - 1) : i + 1])]
        listeners = [Listening() for _ in range(1 + len(executions))]
        plain, *others = (
            run(decoder, execution, prompt, 8, stop_strings=stop, streamer=listener, **named)
            for execution, listener in zip((Eager(), *executions), listeners, strict=True)
        )
        assert plain.finish_reason == "stop" and all(said(other) == said(plain) for other in others), stop
        assert listeners[0].heard[-1] == "end" and all(other.heard == listeners[0].heard for other in listeners)


@each_execution
def test_interruption(execution, decoder):
    """Interrupted after any number of tokens, with iterations on their way: the next generation is as the first."""
    execution, sampled = EXECUTIONS[execution](), SAMPLINGS["sampled"]
    want = said(run(decoder, Eager(), [5, 6], 6, seed=2, **sampled))
    for enough in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(decoder, execution, [7, 8, 9], 20, seed=5, streamer=Listening(enough), **sampled)
        assert said(run(decoder, execution, [5, 6], 6, seed=2, **sampled)) == want


@each_execution
def test_closed_generator(execution, decoder):
    """A generation that nobody reads to its end, and never closes, leaves nothing to the next one of its shape."""
    execution = EXECUTIONS[execution]()
    want = list(generation(decoder, Eager(), seed=2).run())
    running = generation(decoder, execution, seed=9, prompt=(1, 2, 3, 4)).run()
    next(running), next(running)
    running.close()
    assert list(generation(decoder, execution, seed=2).run()) == want


def generation(decoder, execution, seed: int = 1, prompt=(5, 17, 40), limits=None, sampled: bool = True) -> Generation:
    sampling = SamplingConfig(do_sample=sampled, top_k=20).with_seed(seed)
    limits, config = limits or Limits(8), decoder.plan("staged")
    return Generation(decoder.lower, decoder.oracle, list(prompt), sampling, limits, config, execution)


# --- what is launched in vain


@pytest.mark.parametrize("end", ["length", "eos", "NaN"])
def test_surplus_iteration_changes_nothing(end, decoder):
    """After the end an iteration emits nothing and leaves text, tree, caches, K/V and draft2's memory as they are."""
    text = [token for tokens in generation(decoder, Eager()).run() for token in tokens]
    running = generation(decoder, Eager(), limits=Limits(8, (text[5],)) if end == "eos" else Limits(6))
    if end == "NaN":
        running.step()
        running.state.tree.failed[0] = 1
        with pytest.raises(FloatingPointError, match="'draft2'"):
            list(running.run())
    else:
        list(running.run())
        assert running.finish_reason == end
    before = everything(running)
    for _ in range(2):
        running.iterate()
    record = running.state.progress.record.tolist()
    assert record[1] != RUNNING and not any(record[:1] + record[2:])
    assert all(torch.equal(new, old) for new, old in zip(everything(running), before, strict=True))


def test_capturing_leaves_no_trace(decoder):
    """Warm-up and capture run iterations, and afterwards state, caches, K/V and draft2's memory are as before."""
    before = everything(generation(decoder, Eager()))
    runs = []

    class Counting(RecordedGraph):
        def capture(self, run):
            super().capture(lambda: (runs.append(1), run()))

    captured = generation(decoder, Captured(Counting))
    assert all(torch.equal(new, old) for new, old in zip(everything(captured), before, strict=True))
    assert len(runs) >= 2 and captured.oracle.passes == 0


def test_reads_late_and_counts_then():
    """The oldest record is read once its successors are launched; work comes with the record it belongs to."""
    record, launched = torch.zeros(RECORD, dtype=torch.int32), []

    def launch() -> list[Work]:
        launched.append(1)
        record.fill_(len(launched))
        return [Work(passes=len(launched))]

    pipeline = Pipeline(launch, record, ahead=2)
    assert not launched
    for i in range(1, 6):
        values, work = pipeline.next()
        assert values == [i] * RECORD and work == [Work(passes=i)] and len(launched) == i + 2


# --- captured iterations and what they are kept for


class Made:
    """Makes graphs and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self) -> RecordedGraph:
        self.count += 1
        return RecordedGraph()


def test_one_capture_serves_every_seed_prompt_and_length(decoder):
    made = Made()
    captured = Captured(made)
    for seed, (prompt, length, eos) in enumerate([([5], 3, None), (random_tokens(90), 9, [1, 2, 3]), ([7, 8], 20, 40)]):
        arguments = {"seed": 2**40 + seed, "eos_token_id": eos, "method": "staged"} | SAMPLINGS["sampled"]
        got, plain = (run(decoder, execution, prompt, length, **arguments) for execution in (captured, Eager()))
        assert said(got) == said(plain)
        assert (got.stats["iteration"], plain.stats["iteration"]) == ("captured", "eager")
        assert got.stats["seconds"].keys() == {"total"}, "of the stages nothing is known"
    prompts = 2 * 2  # passes of 128 and 16 rows, of two models
    assert made.count == 1 + prompts
    run(decoder, captured, [5], 3, method="staged", top_k=21, do_sample=True)
    run(decoder, captured, [5], 3, method="tree", **SAMPLINGS["sampled"])
    assert made.count == 3 + prompts, "another sampling, another plan"


def test_only_the_latest_plans_are_kept(decoder):
    made, few = Made(), [replace(decoder.plan("tree"), tau=0.5 + i / 100) for i in range(MAX_PLANS + 1)]
    captured = Captured(made)
    for config in [*few, few[-1], few[1]]:
        run(decoder, captured, [5], 2, speculation=config)
    assert made.count == len(few)
    run(decoder, captured, [5], 2, speculation=few[0])
    assert made.count == len(few) + 1, "the one that had not been used for longest is gone"


def test_a_replaced_cache_drops_the_plans_that_know_it(decoder):
    """A larger tree needs a larger cache: what was captured with the old one is not replayed again."""
    oracle = tiny_model(0, 1)
    own = StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, 0.2), None, device="cpu", dtype="float32")
    made = Made()
    own.execution = Captured(made)
    arguments = {"prompt": [5, 17], "max_new_tokens": 9, "seed": 1} | SAMPLINGS["sampled"]
    small, large = SpeculationConfig(("draft",), (1,), (2,), (2,), 3, 4), own.plan("tree")
    first = own.generate(**arguments, speculation=small)
    for config, count in ((large, 6), (small, 7), (large, 7), (small, 7)):  # with a pass of each model's for each cache
        assert own.generate(**arguments, speculation=config).new_token_ids == first.new_token_ids
        assert made.count == count


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 60, 128, 129, 300])
def test_a_captured_prompt_leaves_the_bits_of_an_eager_one(num_tokens):
    """Padded or not, in one pass or several, at the beginning and behind other tokens; the null page stays zero."""
    model, tokens = tiny_gpt2(n_positions=400), random_tokens(num_tokens + 40)
    captured, plain = model.new_cache(400), model.new_cache(400)
    passes = PromptPasses(RecordedGraph)
    for part in (tokens[:num_tokens], tokens[num_tokens:]):
        passes.prefill(model, part, captured)
        model.prefill(part, plain)
        assert captured.cached_len == plain.cached_len
        assert same_bits(captured.k, plain.k) and same_bits(captured.v, plain.v)
    captured.check()


class Forgetful:
    """A graph as CUDA's: it knows addresses, and holds nothing of what it has captured."""

    def capture(self, run):
        run()

    def replay(self):
        pass


def test_passes_over_prompts_live_as_long_as_their_cache():
    """Stages that share a model keep passes of their own; those of a replaced cache are gone."""
    model, made = tiny_gpt2(n_positions=200), []
    passes = PromptPasses(lambda: made.append(1) or Forgetful())
    first, second = model.new_cache(200), model.new_cache(200)
    for cache in (first, second, first, second):
        passes.prefill(model, [5, 17], cache)
    assert len(made) == len(passes._passes) == 2
    del first, cache
    passes.prefill(model, [5, 17], second)
    assert len(made) == 2 and len(passes._passes) == 1


def test_only_the_latest_passes_over_prompts_are_kept(monkeypatch):
    monkeypatch.setattr("decoding.prompt.MAX_PASSES", 2)
    model, made = tiny_gpt2(n_positions=200), Made()
    passes, cache = PromptPasses(made), model.new_cache(200)
    for length, captured in ((5, 1), (20, 2), (5, 2), (40, 3), (5, 3), (20, 4)):  # of 16, 32, 16, 64, 16, 32 rows
        cache.reset()
        passes.prefill(model, random_tokens(length), cache)
        assert made.count == captured


# --- which of them is used


def test_on_a_cpu_iterations_are_eager(decoder, caplog):
    with caplog.at_level(logging.INFO, "decoding"):
        execution = choose(decoder.lower, decoder.oracle, "auto")
    assert isinstance(execution, Eager) and "iterations on cpu are eager" in caplog.text
    assert decoder.generate([5], 2).stats["iteration"] == "eager"


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        (
            True,
            r"graphs=True needs the triton backend with all stages on one CUDA device, got kernels\.reference on cpu",
        ),
        ("yes", "graphs must be 'auto', True or False, got 'yes'"),
        (1, "graphs must be 'auto', True or False, got 1"),
    ],
)
def test_bad_choice(graphs, message):
    with pytest.raises(ValueError, match=message):
        StagedDecoder.from_pretrained(tiny_model(0, 1), None, None, device="cpu", graphs=graphs)


def test_on_a_gpu_iterations_are_captured():
    """By default and when asked for; stages on several devices are launched one operation after another."""

    def stage(device: str):
        return SimpleNamespace(device=torch.device(device), model=SimpleNamespace(ops=gpu))

    first, other = stage("cuda:0"), stage("cuda:1")
    assert isinstance(choose([first], first, "auto"), Captured) and isinstance(choose([], first, True), Captured)
    assert isinstance(choose([first], first, False), Eager) and isinstance(choose([other], first, "auto"), Eager)
    for graphs in ("auto", True):
        assert isinstance(choose([first], first, graphs).prefill.__self__, PromptPasses)
    with pytest.raises(ValueError, match="got kernels.gpu on cuda:0, cuda:1"):
        choose([other], first, True)
