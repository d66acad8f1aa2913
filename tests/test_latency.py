"""The latency command: what is timed and how it is summed up, by hand; whole runs on tiny random models."""

import json
import mmap
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decoding import StagedDecoder
from decoding.compare import HFGenerate, compare
from profiling import latency, machine, peers, prompts
from profiling.latency import Burst, Measurement, Runs
from tests.helpers import hf_model, random_tokens

CPU = torch.device("cpu")
BY_HAND = Measurement([5] * 7, 1.0, [Burst(0.25, 2), Burst(0.5, 1), Burst(1.0, 4)])


@pytest.fixture
def fake_time(monkeypatch):
    """A clock that stands still until ``pass_`` moves it."""
    now = SimpleNamespace(seconds=100.0)

    def pass_(seconds: float) -> None:
        now.seconds += seconds

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return pass_


class FakeSystem:
    """Emits bursts of given sizes, a second apart, after a prefill of ten seconds."""

    greedy_only = True

    def __init__(self, name: str, pass_, sizes: list[int], token: int = 1, log: list | None = None):
        self.name, self.pass_, self.sizes, self.token, self.log = name, pass_, sizes, token, log

    def generate(self, prompt_ids, max_new_tokens, sampling, stop, streamer):
        if self.log is not None:
            self.log.append((self.name, prompt_ids, max_new_tokens, sampling))
        streamer.put(torch.tensor([prompt_ids]))
        self.pass_(10.0)
        for size in self.sizes:
            streamer.put(torch.full((size,), self.token))
            self.pass_(1.0)
        streamer.end()
        return [self.token] * min(max_new_tokens, sum(self.sizes))

    def warm_up(self, prompt_ids, max_new_tokens, sampling):
        if self.log is not None:
            self.log.append((f"warm {self.name}", prompt_ids, max_new_tokens, sampling))


def test_one_generation_is_timed_from_call_to_return(fake_time):
    system = FakeSystem("x", fake_time, [3, 1, 2])
    one = latency.timed(system, [1, 2], 6, {}, CPU)
    assert one.bursts == [(10.0, 3), (11.0, 1), (12.0, 2)] and one.seconds == 13.0
    assert one.time_to_first_token == 10.0 and one.gaps == [(1.0, 1), (1.0, 2)]


def test_a_row_by_hand():
    """Gaps 0.25 (one token) and 0.5 (four): per token 0.25, 4 x 0.125; per burst 0.25, 0.5."""
    row = latency.summary(Runs([BY_HAND, BY_HAND], {"peak_rss": 7}), Runs([BY_HAND._replace(seconds=3.0)] * 2, {}))
    assert row["inter_token_latency"]["mean"] == pytest.approx(0.75 / 5)
    assert row["inter_token_latency"]["p50"] == pytest.approx(0.125)
    assert row["inter_token_latency"]["p99"] == pytest.approx(0.25)
    assert row["inter_burst_latency"] == pytest.approx({"mean": 0.375, "p50": 0.375, "p90": 0.5, "p99": 0.5})
    assert row["time_to_first_token"]["p50"] == 0.25
    assert row["tokens_per_second"] == pytest.approx(7.0) and row["speedup"] == pytest.approx(3.0)
    assert row["tokens_per_oracle_pass"] == pytest.approx(7 / 3) and row["memory"] == {"peak_rss": 7}
    alone = latency.summary(Runs([Measurement([5], 0.5, [Burst(0.25, 1)])], {}), None)
    assert alone["inter_token_latency"] is alone["inter_burst_latency"] is alone["speedup"] is None


def test_the_speed_up_is_the_median_of_the_iterations_own_ratios():
    """Prompts differ between iterations, so an iteration is compared with itself: ratios 1, 2 and 8, not 5 / 5."""
    base, ours = ([BY_HAND._replace(seconds=s) for s in seconds] for seconds in ((5.0, 2.0, 80.0), (5.0, 1.0, 10.0)))
    assert latency.summary(Runs(ours, {}), Runs(base, {}))["speedup"] == 2.0


def test_keys_are_those_of_vllm():
    seconds = [0.3, 0.1, 0.2, 0.7]
    keys = latency.latency_keys(seconds)
    assert list(keys) == list(latency.VLLM_KEYS)
    assert keys["avg_latency"] == pytest.approx(0.325) and keys["latencies"] == seconds
    assert keys["std_latency"] == pytest.approx(np.std(seconds))
    assert list(keys["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert keys["percentiles"]["50"] == pytest.approx(0.25)


def test_flags_and_defaults_are_those_of_vllm():
    flags = latency.parser().parse_args([])
    assert (flags.input_len, flags.output_len, flags.num_iters, flags.num_iters_warmup) == ([32], [128], 30, 10)
    assert flags.batch_size == 1 and flags.output_json is None and flags.peers is None
    with pytest.raises(SystemExit):
        latency.parser().parse_args(["--batch-size", "8"])
    with pytest.raises(SystemExit):
        latency.parser().parse_args(["--input-len", "8,0"])


def test_systems_take_turns_and_warm_up_is_not_counted(fake_time):
    """Each iteration runs all on one prompt and seed; the next takes the next prompt and seed."""
    log: list = []
    systems = [FakeSystem(name, fake_time, [2], log=log) for name in "ab"]
    found = latency.run(systems, [[7], [8]], 2, {"seed": 3}, iters=3, warmup=1, device=CPU)
    assert [name for name, *_ in log] == ["warm a", "warm b", *"abababab"]
    counted = [(prompt, sampling["seed"]) for _, prompt, _, sampling in log[4::2]]
    assert counted == [([7], 3), ([8], 4), ([7], 5)] == [(p, s["seed"]) for _, p, _, s in log[5::2]]
    assert [len(runs.measured) for runs in found.values()] == [3, 3]


def test_a_peer_that_differs_is_reported_and_kept(fake_time):
    """Index of the first difference and the oracle's gap there, per iteration; sampled peers are not compared."""
    ours, peer = FakeSystem("baseline", fake_time, [2, 2]), FakeSystem("other", fake_time, [4], token=2)
    ours.greedy_only = False
    found = latency.run([ours, peer], [[7], [8]], 4, {"seed": 0}, iters=2, warmup=0, device=CPU)
    hf = SimpleNamespace(top_two_gap=lambda text: 0.5 * len(text))
    rows = latency.rows_of(found, [ours, peer], [[7], [8]], False, lambda: hf)
    assert [row["identical"] for row in rows] == [2, 0] and rows[0]["differences"] == []
    assert rows[1]["differences"] == [{"iteration": i, "token": 0, "gap": 0.5} for i in (0, 1)]
    rows = latency.rows_of(found, [ours, peer], [[7], [8]], True, None)
    assert [row["identical"] for row in rows] == [2, None] and rows[1]["differences"] == []


def test_prompts_are_cut_or_joined_to_a_length():
    assert prompts.of_length([[1, 2, 3], [4], [5, 6]], 5) == [[1, 2, 3, 4, 5], [4, 5, 6, 1, 2], [5, 6, 1, 2, 3]]
    assert prompts.of_length([[1, 2, 3], [4]], 2) == [[1, 2], [4, 1]]
    assert prompts.of_length([[9]], 3) == [[9, 9, 9]]


def test_peak_memory_sees_what_was_freed_again():
    """80 MB that are written and freed count until the next reset, where the kernel allows one."""
    machine.reset_memory(CPU)
    before = machine.peak_memory(CPU)["peak_rss"]
    with mmap.mmap(-1, 80_000_000) as fresh:  # never a part of what the process has freed and kept
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
    held = machine.peak_memory(CPU)["peak_rss"]
    assert before + 60e6 < held < before + 120e6
    machine.reset_memory(CPU)
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert machine.peak_memory(CPU)["peak_rss"] == pytest.approx(before, abs=30e6)


@pytest.fixture(scope="module")
def stages(checkpoint) -> list[str]:
    """Flags for a tiny oracle and draft, float32 on the CPU."""
    oracle, draft = checkpoint(n_layer=2, n_positions=96), checkpoint(n_positions=96)
    models = ["--oracle", str(oracle), "--draft", str(draft), "--draft2", "none"]
    return [*models, "--device", "cpu", "--dtype", "float32", "--num-iters", "2", "--num-iters-warmup", "1"]


def test_a_whole_run(stages, tmp_path, capsys):
    """A sweep with peers: a row per lengths and method, vLLM's keys on top, the table beside it, tokens identical."""
    path = tmp_path / "out" / "run.json"
    sweep = ["--random", "--input-len", "5,20", "--output-len", "8", "--peers", "--output-json", str(path)]
    latency.main([*stages, *sweep])
    document = json.loads(path.read_text())
    methods = ["baseline", "speculative", "tree"]
    names = [n for n in peers.defaults(CPU) if n not in document["about"]["skipped_peers"]]
    assert [row["method"] for row in document["rows"]] == 2 * (methods + names)
    assert [row["input_len"] for row in document["rows"]] == [5] * len(methods + names) + [20] * len(methods + names)
    for row in document["rows"]:
        assert row["identical"] == len(row["latencies"]) == 2, row["method"]
        assert 0 < row["time_to_first_token"]["p50"] <= row["percentiles"]["50"]
        assert row["tokens_per_oracle_pass"] >= 1 and row["memory"]["peak_rss"] > 1e8
    tree = document["rows"][2]
    assert document["method"] == "tree" and all(document[key] == tree[key] for key in latency.VLLM_KEYS)
    table = path.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out[:-1]
    assert table.count("| 5 + 8 |") == len(methods + names) and "one prompt of random token ids, greedy" in table


def test_a_sampled_run_with_a_peer_that_is_not_installed(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    path = tmp_path / "run.json"
    flags = ["--random", "--input-len", "6", "--output-len", "8", "--do-sample", "--top-k", "9", "--method", "tree"]
    latency.main([*stages, *flags, "--peers", "hf-assisted", "ctranslate2", "--output-json", str(path)])
    document = json.loads(path.read_text())
    assert [(row["method"], row["identical"]) for row in document["rows"]] == [("tree", 2), ("hf-assisted", None)]
    assert document["rows"][1]["speedup"] is None
    table = capsys.readouterr().out
    assert "- ctranslate2 was left out: not installed" in table
    assert "sampled (top-k 9, T = 1, seed 0 + iteration; a peer draws by its own generator" in table


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top-k", "5"], "need --do-sample"),
        (["--random", "--input-len", "90", "--output-len", "8"], "90 tokens and 8 new ones exceed the context, 96"),
        (["--random", "--method", "staged"], "method 'staged' needs draft2"),
        (["--input-len", "5"], "without a tokenizer"),
        (["--random", "--do-sample", "--temperature", "-1"], "temperature must be a number"),
        (["--random", "--seed", "-1"], "seed must be in"),
        (["--random", "--num-iters", "0"], "--num-iters: must be at least 1, got 0"),
        (["--prompts", "nowhere"], "no humaneval/HumanEval.jsonl.gz in nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_line(stages, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        latency.main([*stages, *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert re.search(message, error), error


def test_our_methods_that_differ_are_a_bug(stages, monkeypatch):
    generate = peers.Own.generate

    def wrong(self, *arguments, **named):
        new = generate(self, *arguments, **named)
        return new[:-1] + [(new[-1] + 1) % 97] if self.name == "tree" else new

    monkeypatch.setattr(peers.Own, "generate", wrong)
    with pytest.raises(SystemExit, match="methods differ"):
        latency.main([*stages, "--random", "--input-len", "5", "--output-len", "4"])


def test_a_comparison_near_the_end_of_the_context(tmp_path):
    """Warming up takes no more positions than the prompt has left, of ours and of transformers."""
    hf_model(n_positions=20).save_pretrained(tmp_path)
    decoder = StagedDecoder.from_pretrained(str(tmp_path), draft=None, draft2=None, dtype="float32", device="cpu")
    hf = HFGenerate(str(tmp_path), torch.float32, torch.device("cpu"))
    rows, _ = compare(decoder, [random_tokens(17)], 8, {}, hf)
    assert [(row["method"], row["identical"]) for row in rows] == [("HF generate", "1 of 1"), ("baseline", "1 of 1")]


def test_methods_take_turns_prompt_by_prompt(monkeypatch):
    model, order = hf_model(n_positions=64), []
    decoder = StagedDecoder.from_pretrained(model, model, draft2=None, dtype="float32", device="cpu")
    generate = decoder.generate

    def noted(ids, max_new_tokens, method, **options):
        order.append((len(ids), method))
        return generate(ids, max_new_tokens=max_new_tokens, method=method, **options)

    monkeypatch.setattr(decoder, "generate", noted)
    rows, outputs = compare(decoder, [random_tokens(5), random_tokens(9)], 4, {})
    methods = [row["method"] for row in rows]
    warm_up = [(5, method) for method in methods]
    assert len(methods) > 1 and order == warm_up + [(length, method) for length in (5, 9) for method in methods]
    assert [len(out.new_token_ids) for out in outputs] == [4, 4]
