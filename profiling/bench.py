"""One weight on one device: whether a configuration of tiles is right there, and how long it takes."""

from typing import TYPE_CHECKING, Any

import torch

from profiling.calls import TOLERANCES, bind, check, relative_error, run, take_rows
from profiling.timing import copies_for, measure

if TYPE_CHECKING:
    from profiling.tune import Task

TIMED_ROWS = (1, 16)
BIT_ROWS = (1, 2, 16, 17, 64, 128)


class Bench:
    """Inputs of one weight on one device, and what a candidate does on them."""

    def __init__(self, task: "Task", device: torch.device, ops: Any, copy_rate: float, samples: int):
        self.device, self.ops, self.dtype, self.copy_rate, self.samples = device, ops, task.dtype, copy_rate, samples
        self.operation, self.call = task.calls(max(BIT_ROWS), device)
        copies = range(copies_for(self.operation.weight_bytes, device))
        timed = [task.calls(max(TIMED_ROWS), device)[1] for _ in copies]
        self.timed = {n: [take_rows(call, slice(0, n)) for call in timed] for n in TIMED_ROWS}
        self.expected: torch.Tensor | None = None  # of the configuration in use

    def bits(self) -> tuple[str, bool]:
        """Why the candidate is wrong ("" if it is not), and whether its bits are those of the configuration in use."""
        whole = run(self.call, self.ops)
        if self.expected is None:
            result = check(self.call, self.ops, self.dtype, [0, max(BIT_ROWS) - 1])
            if not result["ok"]:
                return f"error {result['error']:.1e}, rows that differ alone {result['different_rows']}", True
            self.expected = whole
        error = relative_error(whole, self.expected)
        if not error <= 2 * TOLERANCES[self.dtype]:
            return f"relative error {error:.1e} against the configuration in use", False
        for n in BIT_ROWS:
            if not torch.equal(run(take_rows(self.call, slice(0, n)), self.ops), whole[:n]):
                return f"bits of a row differ between {n} and {len(whole)} rows", False
        backwards = torch.arange(len(whole) - 1, -1, -1, device=self.device)
        if not torch.equal(run(take_rows(self.call, backwards), self.ops)[backwards], whole):
            return "bits of a row differ by its place", False
        return "", torch.equal(whole, self.expected)

    def brief(self) -> float:
        """Seconds with 1 and with 16 rows together, from few samples."""
        runs = ([bind(call, self.ops) for call in calls] for calls in self.timed.values())
        return sum(measure(calls, self.device, samples=3, launches=48).median for calls in runs)

    def times(self) -> dict[str, float]:
        """Medians in microseconds, and percent of the copy rate by the bytes of the weight."""
        columns = {}
        for n, calls in self.timed.items():
            timing = measure([bind(call, self.ops) for call in calls], self.device, self.samples)
            columns[f"microseconds_{n}"] = timing.median * 1e6
            columns[f"percent_of_copy_{n}"] = 100 * self.operation.weight_bytes / timing.median / self.copy_rate
        return columns
