"""CUDA graphs: work of fixed shapes and addresses is captured once, then replayed by a single launch.

What runs is the same kernels with the same arguments, so the bits are the same; what is saved is the Python and the
driver calls between them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

NUM_WARM_UPS = 2  # the first compiles kernels and allocates what outlives a call, both of which a capture forbids
_capturing = threading.Lock()  # torch synchronises the device before a capture, which another's capture forbids


class Graph(Protocol):
    """Work that can be captured and replayed."""

    def capture(self, run: Callable[[], None]) -> None:
        """Learn what ``run`` does, calling it several times; whether the last call takes effect is left open."""

    def replay(self) -> None:
        """Do it once more, with what now stands at the addresses that ``run`` used. Does not wait for it."""


class CudaGraph:
    """A graph of the work that Python launches on one CUDA device.

    ``run`` must not read a tensor on the host, nor allocate what outlives it after its first call. The caller keeps
    alive whatever ``run`` reads or writes and has not allocated itself.
    """

    def __init__(self, device: torch.device):
        self._device, self._graph = device, torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], None]) -> None:
        """Warm up on the current stream, where launches of other threads wait their turn, then capture on another."""
        with _capturing, torch.cuda.device(self._device):
            for _ in range(NUM_WARM_UPS):
                run()
            with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                run()

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """Work goes to the default stream of a CUDA device, after what the caller's own stream holds, which waits for it.

    Launches count arrivals in one set of counters (``kernels.gpu.launch.arrivals``), and what a generation launched
    ahead may still run when the next one begins, so all of them must be in one line, whatever streams threads use.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        yield
        return
    own, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(own)
    try:
        with torch.cuda.stream(default):
            yield
    finally:
        own.wait_stream(default)
