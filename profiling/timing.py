"""One timer for every figure, and the ceilings that figures are compared with.

On a GPU a call is timed in a CUDA graph, launch after launch without the host, its weights cold: the graph walks
through copies of the inputs that together exceed COLD times the L2 cache, so that each launch reads what the others
have evicted. The seconds of a launch include the gap to the next one, as in a pass. On a CPU, ``perf_counter`` around
the same walk.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

COLD = 3  # times the L2 cache that one walk over the copies must exceed
MAX_COPIES = 256
LAUNCHES = 128  # of one graph at least, so that the start of a graph is a small part of its time
SAMPLES = 40
GIB = 1 << 30


class Timing(NamedTuple):
    """Seconds of one call: quantiles 0.5, 0.2 and 0.8 over the samples."""

    median: float
    low: float
    high: float
    method: str  # "graph", "events" (graph capture failed) or "perf_counter"

    @property
    def columns(self) -> dict[str, float | str]:
        """As columns of a row."""
        microseconds = {"microseconds": self.median, "microseconds_q20": self.low, "microseconds_q80": self.high}
        return {name: seconds * 1e6 for name, seconds in microseconds.items()} | {"method": self.method}


class Ceilings(NamedTuple):
    """What this device reaches on the simplest work of each kind."""

    copy: float  # bytes read plus bytes written, per second
    read: float  # bytes read per second
    matrix: float  # floating-point operations per second of a large product on random data
    matrix_dtype: str


def quantiles(samples: Sequence[float], method: str) -> Timing:
    """Median and the quantiles 0.2 and 0.8 of ``samples``, linear between neighbours."""
    values = torch.tensor(samples, dtype=torch.float64)
    median, low, high = values.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, low, high, method)


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; on a CPU 0, where nothing is claimed about caches."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)


def copies_for(num_bytes: int, device: torch.device) -> int:
    """Copies of inputs of ``num_bytes`` that one walk needs to be cold; at least 2, at most MAX_COPIES."""
    return max(2, min(MAX_COPIES, -(-COLD * l2_bytes(device) // max(1, num_bytes))))


def is_cold(num_bytes: int, copies: int, device: torch.device) -> bool:
    """Whether a walk over ``copies`` inputs of ``num_bytes`` each finds nothing of them in the cache."""
    return device.type == "cuda" and num_bytes * copies >= COLD * l2_bytes(device)


def measure(
    calls: Sequence[Callable[[], object]], device: torch.device, samples: int = SAMPLES, launches: int = LAUNCHES
) -> Timing:
    """Seconds of one of ``calls``, which do the same work on copies of the inputs; they run in order, over and over."""
    if device.type != "cuda":
        return _on_cpu(calls, samples)
    loops = max(1, -(-launches // len(calls)))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles, and allocates what outlives a call, before anything is captured
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            for _ in range(loops):
                for call in calls:
                    call()
    except Exception as error:  # a comparator that synchronises: its launches are timed one by one
        torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        with suppress(RuntimeError):
            graph.reset()
        torch.cuda.synchronize(device)
        print(f"  not captured, timed by events: {first_line(error)}", flush=True)
        return _by_events(calls, device, samples)
    for _ in range(3):
        graph.replay()
    seconds = [_between_events(graph.replay) / (loops * len(calls)) for _ in range(samples)]
    graph.reset()
    return quantiles(seconds, "graph")


def _between_events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _by_events(calls: Sequence[Callable[[], object]], device: torch.device, samples: int) -> Timing:
    """Each launch alone, after the cache was overwritten; the host prepares it while that runs."""
    flush = torch.empty(max(256 << 20, 2 * l2_bytes(device)), dtype=torch.int8, device=device)
    seconds = []
    for i in range(samples):
        flush.fill_(i % 2)
        seconds.append(_between_events(calls[i % len(calls)]))
    return quantiles(seconds, "events")


def _on_cpu(calls: Sequence[Callable[[], object]], samples: int) -> Timing:
    seconds = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        seconds.append((time.perf_counter() - start) / len(calls))
    return quantiles(seconds[1:], "perf_counter")  # the first one warms up


def ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, samples: int = 10) -> Ceilings:
    """Copy, read and matrix rates, each the median of ``samples``, on random data."""
    return Ceilings(*memory_rates(device, samples), matrix_rate(device, dtype, samples), str(dtype)[6:])


def memory_rates(device: torch.device, samples: int = 10) -> tuple[float, float]:
    """Bytes per second of a device copy (read plus written) and of reading alone, from buffers far above the cache."""
    size = 64 << 20
    if device.type == "cuda":
        size = min(4 * GIB, torch.cuda.mem_get_info(device)[0] // 8 >> 20 << 20)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    # two ways each: whichever is faster is nearer to what the memory can do; a graph's copy node may be the slow one
    copy = min(
        measure([lambda: target.copy_(source)], device, samples, launches=2).median,
        measure([lambda: torch.neg(source, out=target)], device, samples, launches=2).median,
    )
    matrix = source[: len(source) >> 14 << 14].view(-1, 1 << 14)
    vector = torch.randn(1 << 14, device=device)
    read = min(
        measure([lambda: source.sum()], device, samples, launches=2).median,
        measure([lambda: torch.mv(matrix, vector)], device, samples, launches=2).median,
    )
    return 2 * size / copy, size / read


def matrix_rate(device: torch.device, dtype: torch.dtype, samples: int = 10) -> float:
    """Operations per second of a square matrix product on random data, through torch."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    return 2 * n**3 / measure([lambda: a @ b], device, samples, launches=4).median


def first_line(error: Exception) -> str:
    """What failed, in one line for a row of results."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
