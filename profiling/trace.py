"""Chrome traces, which Perfetto and chrome://tracing show: written from spans, read from torch.profiler.

What a trace of a GPU says of an iteration is worked out here from its events alone, so it is tested without a GPU:
whose each kernel is, how long the device idles inside and between iterations, how often the host blocks. In an eager
iteration a kernel belongs to the range that its launch lies in. In a replayed CUDA graph there are no ranges: its
kernels are matched, in order and by name, with those of one eager iteration.
"""

import bisect
import gzip
import json
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from profiling.spans import PREFILL, VERIFY, Run, Span, unlabel, verified

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
BLOCKING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
)
UNKNOWN = "unlabelled"


class Kernel(NamedTuple):
    """One piece of work of the device; seconds on the trace's clock."""

    kernel: str  # its name
    name: str  # of the operation, UNKNOWN without a range
    part: str
    start: float
    end: float


def write(path: Path, runs: dict[str, Run], num_iterations: int) -> None:
    """The first ``num_iterations`` iterations of each run, as a process with a track per lane."""
    events = []
    for process, (title, run) in enumerate(runs.items()):
        iterations = run.iterations()[:num_iterations]
        lanes = ["iteration", *dict.fromkeys(span.lane for span in run.spans)]
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        for track, lane in enumerate(lanes):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": lane}})
        shown = [(f"iteration {i}", "iteration", *window) for i, window in enumerate(iterations)]
        shown += [(s.name, s.lane, s.start, s.end) for s in run.spans if iterations and s.end <= iterations[-1][1]]
        for name, lane, start, end in shown:
            place = {"pid": process, "tid": lanes.index(lane)}
            times = {"ts": 1e6 * (start - run.started), "dur": 1e6 * (end - start)}
            events.append({"ph": "X", "name": name, "cat": lane} | place | times)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def read(path: Path) -> list[dict]:
    """Complete events of a trace, in time order."""
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])


def kernels(events: list[dict]) -> list[Kernel]:
    """All work of the device, each piece labelled by the range around its launch."""
    launches = {event["args"]["correlation"]: event for event in events if _is(event, HOST_CALLS) and _args(event)}
    ranges = [event for event in events if event.get("cat") == "user_annotation" and "|" in event["name"]]
    found = []
    for event in events:
        if _is(event, DEVICE_WORK):
            launch = launches.get(event["args"].get("correlation"))
            name, part = _range_at(launch, ranges) if launch else (UNKNOWN, UNKNOWN)
            start = event["ts"] * 1e-6
            found.append(Kernel(event["name"], name, part, start, start + event["dur"] * 1e-6))
    return found


def _is(event: dict, categories: tuple[str, ...]) -> bool:
    return event.get("cat") in categories


def _args(event: dict) -> bool:
    return "correlation" in event.get("args", {})


def _range_at(launch: dict, ranges: list[dict]) -> tuple[str, str]:
    """Of the ranges that are open at the launch, the one that began last."""
    begun = bisect.bisect_right(ranges, launch["ts"], key=lambda event: event["ts"])
    for around in reversed(ranges[:begun]):
        if around["ts"] + around["dur"] >= launch["ts"]:
            return unlabel(around["name"])
    return UNKNOWN, UNKNOWN


def eager_iteration(found: list[Kernel]) -> list[Kernel]:
    """The last whole iteration that ranges label, from behind one verification to the end of the next.

    Raises ValueError where there is none.
    """
    ends = verified(found)
    for first, last in reversed(list(zip(ends, ends[1:], strict=False))):
        iteration = found[first + 1 : last + 1]
        if any(kernel.part != UNKNOWN and kernel.name != VERIFY for kernel in iteration):
            return iteration
    raise ValueError("the trace has no whole iteration with ranges around its launches")


def matched(found: list[Kernel], pattern: list[Kernel]) -> list[Kernel]:
    """``found``, every piece labelled as its counterpart in ``pattern``, a labelled eager iteration.

    An iteration ends with the kernels of the verification. Work without a counterpart (a copy that only a graph makes)
    gets the part of what precedes it.
    """
    last = [kernel.kernel for kernel in pattern if kernel.name == VERIFY][-1]
    names = [kernel.kernel for kernel in pattern]
    result, begin = [], 0
    for index, kernel in enumerate(found):
        if kernel.kernel != last and index + 1 < len(found):
            continue
        iteration = found[begin : index + 1]
        labels: list[tuple[str, str] | None] = [None] * len(iteration)
        matcher = SequenceMatcher(None, [kernel.kernel for kernel in iteration], names, autojunk=False)
        for mine, theirs, size in matcher.get_matching_blocks():
            for i in range(size):
                labels[mine + i] = (pattern[theirs + i].name, pattern[theirs + i].part)
        previous = (UNKNOWN, UNKNOWN)
        for kernel_found, known in zip(iteration, labels, strict=True):
            previous = known or (UNKNOWN, previous[1])
            result.append(kernel_found._replace(name=previous[0], part=previous[1]))
        begin = index + 1
    return result


def device_run(found: list[Kernel], stats: dict, bytes_moved: dict[str, int]) -> Run:
    """The whole iterations of labelled kernels; where one begins before another has ended, only the rest counts."""
    ends = verified(found)
    assert len(ends) > 1, f"a run of {len(ends)} iterations has no whole one between two verifications"
    spans, latest = [], found[ends[0]].end
    for kernel in found[ends[0] + 1 : ends[-1] + 1]:
        if kernel.end > latest:
            spans.append(Span(kernel.name, kernel.part, max(kernel.start, latest), kernel.end))
            latest = kernel.end
    return Run(spans, found[ends[0]].end, latest, len(ends) - 1, stats, bytes_moved)


def idle(run: Run) -> tuple[float, float]:
    """Seconds without work inside iterations, and between the last operation of one and the first of the next."""
    inside = between = 0.0
    previous, is_between = run.started, True
    for span in run.spans:
        gap, previous = span.start - previous, span.end
        if is_between:
            between += gap
        else:
            inside += gap
        is_between = span.name == VERIFY or (is_between and span.part == UNKNOWN)  # copies for the host are between
    return inside, between


def blocking_calls(events: list[dict], start: float, end: float) -> Counter:
    """Calls between ``start`` and ``end`` in which the host waits for the device, by name."""
    inside = [event for event in events if start <= event["ts"] * 1e-6 <= end]
    return Counter(event["name"] for event in inside if _is(event, HOST_CALLS) and event["name"] in BLOCKING)


def outside_operators(events: list[dict]) -> float:
    """Share of the time after the prefill that no torch operator ran, on the thread that ran the prefill."""
    begin = [event for event in events if event["name"] == PREFILL and event.get("cat") == "user_annotation"][-1]
    start, thread = begin["ts"] + begin["dur"], begin["tid"]
    mine = [event for event in events if event["tid"] == thread]
    covered, latest = 0.0, start
    for event in mine:
        end = event["ts"] + event["dur"]
        if event.get("cat") == "cpu_op" and end > latest:
            covered, latest = covered + end - max(event["ts"], latest), end
    finished = max(event["ts"] + event["dur"] for event in mine)
    return 1 - covered / (finished - start)
