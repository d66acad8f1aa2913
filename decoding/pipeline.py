"""Iterations on their way: the host launches the next ones before it reads what the oldest did.

A record is copied to the host behind its iteration, into one of a few places, and an event tells when it is there. The
host looks at the event and never waits inside the driver. An iteration counts when its record is read. Those launched
beyond the end of the text find nothing to do, as the device itself knows the end; those launched beyond a stop string,
which only the host sees, are never read: nothing they emitted, proposed or moved counts, and the next generation
starts from state of its own.
"""

import time
from collections import deque
from collections.abc import Callable

import torch

from decoding.stats import Work


class Pipeline:
    """Launches iterations of one generation, ``ahead`` of the one that is read."""

    def __init__(self, launch: Callable[[], list[Work]], record: torch.Tensor, ahead: int):
        """``launch`` starts an iteration, which overwrites ``record``, and returns the work it asks of each stage."""
        self._launch, self._record, self._ahead = launch, record, ahead
        on_gpu = record.is_cuda
        self._free = [
            (torch.empty(record.shape, dtype=record.dtype, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None)
            for _ in range(ahead + 1)
        ]
        self._on_the_way: deque = deque()  # place, event and work of each iteration that is not read, oldest first

    @torch.inference_mode()
    def next(self) -> tuple[list[int], list[Work]]:
        """The record of the oldest iteration that has not been read, and the work of each stage in it."""
        while len(self._on_the_way) <= self._ahead:
            place, event = self._free.pop()
            work = self._launch()
            place.copy_(self._record, non_blocking=True)
            if event is not None:
                event.record(torch.cuda.current_stream(self._record.device))
            self._on_the_way.append((place, event, work))
        place, event, work = self._on_the_way.popleft()
        while event is not None and not event.query():
            time.sleep(0)  # lets other threads of this process run
        self._free.append((place, event))
        return place.tolist(), work
