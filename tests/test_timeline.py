"""``profiling.timeline``: its parts add up, whose code runs is told right, and a trace of a GPU is read right."""

import json
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

from decoding import StagedDecoder
from decoding.config import METHODS
from profiling import chart, timeline, timeline_tables, trace
from profiling.instruction_samples import owners, sampling
from profiling.spans import PREFILL, VERIFY, Run, Span, Timed, generate, instrumented, label

PROMPTS = [[1, 2, 3, 4], [5, 6, 7]]


@pytest.fixture(scope="module")
def bundled() -> StagedDecoder:
    return StagedDecoder.from_pretrained(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def measured(bundled, tmp_path_factory) -> tuple[dict, dict]:
    return timeline.measure(bundled, PROMPTS, 6, tmp_path_factory.mktemp("traces"))


def test_the_parts_of_an_iteration_add_up(measured):
    """Shares of all parts sum to one; a part that a method has no use for is absent."""
    document, _ = measured
    for setting in timeline.SETTINGS:
        for method in METHODS:
            parts = {
                r["part"]: r["share"] for r in document["rows"] if (r["setting"], r["method"]) == (setting, method)
            }
            assert parts.pop("total") == 1.0 and sum(parts.values()) == pytest.approx(1.0)
            assert 0 < parts["Python between operations"] < 0.6
            assert ("draft2" in parts) == (method == "staged")
            assert ("draft: linear" in parts) == (method != "baseline")
    table = timeline_tables.markdown(document, "conditions", {})
    assert table.count("| total |") == 2 and "| draft2 |  |  |  |" in table


def test_bytes_stand_beside_the_time_they_took(bundled, measured):
    """An oracle pass moves at least its weights, once an iteration; the rate is bytes by time."""
    weights = 1e-6 * bundled.oracle.model.weights.bytes_per_pass
    rows = measured[0]["traffic"]
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["megabytes"] / row["milliseconds"])
        if row["stage"] == "oracle":
            assert row["passes"] == 1.0 and weights < row["megabytes"] < 1.1 * weights
    assert {(row["method"], row["stage"]) for row in rows} >= {("staged", "draft2"), ("tree", "draft")}


def test_the_stricter_figures_are_shares(measured):
    for facts in measured[0]["facts"]:
        assert 0 < facts["outside torch operators"] < 1
        shares = {name[4:]: value for name, value in facts.items() if name.startswith("in: ")}
        parts = [shares.pop(name) for name in list(shares) if name.startswith("interpreter, ")]
        assert not shares or sum(shares.values()) == pytest.approx(1.0)
        assert sum(parts) == pytest.approx(shares.get("interpreter", 0.0))


def test_the_stand_in_is_gone_afterwards(bundled):
    """Outside ``instrumented`` the decoder is what it was: its operations are the backend's module."""
    before, draft2 = bundled.oracle.model.ops, bundled.lower[0].ops
    opened = []
    with instrumented(bundled, lambda text: opened.append(text) or record_function(text)) as recorder:
        run = generate(bundled, recorder, PROMPTS[0], 6, method="staged")
        assert bundled.oracle.model.ops is not before
    assert bundled.oracle.model.ops is before and bundled.lower[0].ops is draft2
    assert not {"begin", "score", "extend"} & (vars(bundled.oracle).keys() | vars(bundled.lower[0]).keys())
    assert run.num_iterations == len(run.iterations()) and opened.count(PREFILL) == 1
    assert label("draw", "sample + verify") in opened and label("score", "draft: other") in opened
    assert bundled.generate(PROMPTS[0], 6, ignore_eos=True).stats["stages"]["oracle"]["passes"] == run.num_iterations


def test_every_call_is_noted_once():
    """The stand-in notes a call's span under its part, and hands constants and results through."""
    spans = []

    class Operations:
        LIMIT = 3

        @staticmethod
        def draw(x):
            return x + 1

        @staticmethod
        def lm_head(x):
            return 2 * x

    timed = Timed(Operations, "oracle", spans)
    assert (timed.LIMIT, timed.draw(1), timed.lm_head(4), timed.lm_head(x=5)) == (3, 2, 8, 10)
    assert [(span.name, span.part, span.lane) for span in spans] == [
        ("draw", "sample + verify", "sample + verify"),
        ("lm_head", "oracle: linear", "oracle"),
        ("lm_head", "oracle: linear", "oracle"),
    ]
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))


def busy(work) -> tuple[float, float]:
    start = end = time.perf_counter()
    while end - start < 0.15:
        work()
        end = time.perf_counter()
    return start, end


def test_whose_code_runs():
    """A Python loop is the interpreter's, a product is torch's, a sort is numpy's."""
    square, numbers = torch.ones(400, 400), np.random.default_rng(0).random(200_000)
    with sampling() as samples:
        if samples is None:
            pytest.skip(
                "needs perf_event_open(2), which this system does not permit: kernel.perf_event_paranoid, a sandbox"
            )
        times = {
            "interpreter": busy(lambda: [i * i for i in range(1000)]),
            "torch": busy(lambda: square @ square),
            "numpy": busy(lambda: np.sort(numbers)),
        }
        taken = owners(samples.take())
    for owner, (start, end) in times.items():
        found = Counter(whose for seconds, whose in taken if start <= seconds <= end)
        assert found.total() > 20 and found[owner] > 0.8 * found.total(), (owner, found)


def test_the_interpreter_is_found_in_its_lane():
    """Samples outside the iterations do not count; those between operations are told apart."""
    run = two_iterations()
    samples = [(0.5, "torch"), (1.0, "interpreter"), (6.5, "interpreter"), (7.5, "numpy"), (99.0, "interpreter")]
    assert timeline.code_shares([run], [samples]) == {"in: torch": 0.25, "in: interpreter": 0.5, "in: numpy": 0.25}
    assert timeline.lane_shares([run], [samples], {"in: interpreter": 0.4}) == {
        "in: interpreter, oracle": 0.2,
        "in: interpreter, between operations": 0.2,
    }


def test_time_outside_torch_operators(tmp_path):
    """Sleeping is outside, a product inside; what came before the end of the prefill does not count."""
    for name, seconds_asleep, size in (("asleep", 0.6, 10), ("busy", 0.0, 700)):
        square = torch.ones(size, size)
        with timeline.profiled([ProfilerActivity.CPU], tmp_path / name):
            with record_function(PREFILL):
                time.sleep(0.1)
            for _ in range(6):
                time.sleep(seconds_asleep / 6)
                square @ square
        assert (trace.outside_operators(trace.read(tmp_path / name)) > 0.5) == (name == "asleep")


def events(iterations: list[list[tuple]], ranges: bool, gap: float) -> list[dict]:
    """A trace as CUPTI's: per iteration (kernel, operation, part, microseconds), launched 100 us ahead."""
    found, now = [], 1000.0
    for iteration in iterations:
        for number, (kernel, name, part, duration) in enumerate(iteration):
            now += gap if number == 0 else 1.0
            correlation = {"correlation": len(found)}
            launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": now - 100, "dur": 0.2}
            found.append(launch | {"args": correlation})
            found.append({"ph": "X", "cat": "kernel", "name": kernel, "ts": now, "dur": duration, "args": correlation})
            if ranges and name:
                around = {"ph": "X", "cat": "user_annotation", "name": label(name, part)}
                found.append(around | {"ts": now - 100.1, "dur": 0.5})
            now += duration
    return sorted(found, key=lambda event: event["ts"])


ITERATION = [
    ("_lookup_kernel", "lookup_nodes", "draft2", 3.0),
    ("_linear_kernel", "linear_residual", "draft: linear", 20.0),
    ("gather", "", "", 2.0),  # launched outside any range
    ("_linear_kernel", "linear_residual", "oracle: linear", 60.0),
    ("_draw_narrow_kernel", "draw", "sample + verify", 8.0),
    ("_verify_kernel", VERIFY, "sample + verify", 5.0),
]


def test_kernels_belong_to_the_range_around_their_launch():
    found = trace.kernels(events([ITERATION] * 3, ranges=True, gap=10.0))
    pattern = trace.eager_iteration(found)
    assert [(kernel.kernel, kernel.part) for kernel in pattern] == [
        (kernel, part or trace.UNKNOWN) for kernel, _, part, _ in ITERATION
    ]


def test_replayed_kernels_are_matched_by_name_and_order():
    """Without ranges the two products go to draft and oracle; what only the graph does joins what precedes it."""
    pattern = trace.eager_iteration(trace.kernels(events([ITERATION] * 3, ranges=True, gap=10.0)))
    extra = [*ITERATION[:2], ("memset", "", "", 1.0), *ITERATION[2:]]
    found = trace.matched(trace.kernels(events([extra, ITERATION, extra], ranges=False, gap=4.0)), pattern)
    run = trace.device_run(found, {"stages": {"oracle": {"passes": 3}}}, {})
    assert run.num_iterations == 2
    parts = {part: round(1e6 * seconds, 3) for part, seconds in run.by_part().items()}
    assert parts == {
        "draft2": 6,
        "draft: linear": 41,
        trace.UNKNOWN: 4,
        "oracle: linear": 120,
        "sample + verify": 26,
    }
    inside, between = trace.idle(run)
    assert (1e6 * inside, 1e6 * between) == (pytest.approx(11.0), pytest.approx(8.0))
    assert sum(run.by_part().values()) + inside + between == pytest.approx(run.seconds)


def test_copies_for_the_host_lie_between_iterations():
    """A record is copied behind its verification: the waits before and after it are between iterations."""
    verify = trace.Kernel("_verify_kernel", VERIFY, "sample + verify", 0.0, 1.0)
    copy = trace.Kernel("Memcpy DtoH (Device -> Pinned)", trace.UNKNOWN, trace.UNKNOWN, 2.0, 3.0)
    draw = trace.Kernel("_draw_narrow_kernel", "draw", "sample + verify", 7.0, 8.0)
    run = trace.device_run([verify, copy, draw, verify._replace(start=10.0, end=11.0)], {}, {})
    assert trace.idle(run) == (2.0, 5.0)


def test_overlapping_kernels_are_counted_once():
    """A kernel that starts before the last one has ended adds only what it lasts longer."""
    kernels = [
        trace.Kernel("_verify_kernel", VERIFY, "sample + verify", 0.0, 1.0),
        trace.Kernel("a", "draw", "sample + verify", 2.0, 5.0),
        trace.Kernel("b", "draw", "sample + verify", 4.0, 6.0),
        trace.Kernel("c", "draw", "sample + verify", 4.0, 5.5),
        trace.Kernel("_verify_kernel", VERIFY, "sample + verify", 6.0, 7.0),
    ]
    run = trace.device_run(kernels, {}, {})
    assert (run.seconds, sum(run.by_part().values()), trace.idle(run)) == (6.0, 5.0, (0.0, 1.0))


def test_blocking_calls_are_counted():
    waits = [("cudaStreamSynchronize", 5.0), ("cudaLaunchKernel", 6.0), ("cudaEventSynchronize", 7.0)]
    waits += [("cudaStreamSynchronize", 50.0)]
    found = [{"cat": "cuda_runtime", "name": name, "ts": at * 1e6, "args": {}} for name, at in waits]
    assert trace.blocking_calls(found, 1.0, 10.0) == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 1}


def test_an_eager_iteration_is_required():
    with pytest.raises(ValueError, match="no whole iteration with ranges"):
        trace.eager_iteration(trace.kernels(events([ITERATION] * 3, ranges=False, gap=1.0)))


def test_a_gpu_is_measured_from_two_traces(bundled, monkeypatch, tmp_path):
    """The first trace, under ranges, labels the kernels of the second; parts, idle time and waits are the second's.

    There is no GPU here: what CUPTI would have written stands in for it.
    """
    waits = {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 1200.0, "dur": 1.0, "args": {}}

    @contextmanager
    def profiled(activities, path):
        yield
        ranges = "eager" in path.name
        found = events([ITERATION] * (2 if ranges else 4), ranges, gap=10.0) + ([] if ranges else [waits])
        path.write_text(json.dumps({"traceEvents": found}))

    monkeypatch.setattr(timeline, "profiled", profiled)
    runs, facts = timeline.measure_cuda(bundled, PROMPTS, 6, tmp_path / "trace.json", method="staged")
    assert facts["blocking driver calls per iteration"] == pytest.approx(1 / 3) and facts["kernels per iteration"] == 6
    parts = {row["part"]: 1e3 * row["milliseconds"] for row in timeline.part_rows(runs, "cuda")}
    assert parts["oracle: linear"] == pytest.approx(60) and parts["idle between iterations"] == pytest.approx(10)
    assert parts["idle inside iterations"] == pytest.approx(5) and parts["total"] == pytest.approx(113)
    weights = bundled.oracle.model.weights.bytes_per_pass
    oracle = next(row for row in timeline.traffic_rows(runs) if row["stage"] == "oracle")
    assert oracle["gb_per_s"] == pytest.approx(1e-9 * weights / 60e-6, rel=0.1)


def two_iterations() -> Run:
    spans = [Span("draw", "oracle: linear", 0.0, 6.0), Span(VERIFY, "sample + verify", 7.0, 8.0)]
    spans += [Span("draw", "oracle: linear", 8.0, 14.0), Span(VERIFY, "sample + verify", 15.0, 16.0)]
    return Run(spans, 0.0, 16.0, 2, {}, {})


def test_the_chart_shows_one_iteration():
    """Eight columns of a second each: six of the oracle, one of nothing, one of verification."""
    lines = chart.draw(two_iterations(), "cpu", columns=8).plain.splitlines()
    assert lines[0].startswith("          oracle ██████ ") and lines[0].endswith("6000.00 ms  75%")
    assert lines[1].startswith(" sample + verify        █") and "12%" in lines[1]
    assert lines[2].startswith("  Python between       █ ") and lines[3].endswith("8000.00 ms")


def test_the_trace_of_a_cpu_opens_in_perfetto(tmp_path):
    """Complete events with process and track names, microseconds from the start, no more iterations than asked for."""
    path = tmp_path / "trace.json.gz"
    trace.write(path, {"greedy, staged": two_iterations()}, num_iterations=1)
    found = trace.read(path)
    assert [(event["name"], event["ts"], event["dur"]) for event in found] == [
        ("iteration 0", 0.0, 8e6),
        ("draw", 0.0, 6e6),
        (VERIFY, 7e6, 1e6),
    ]
    assert len({event["tid"] for event in found}) == 3
