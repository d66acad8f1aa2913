"""Where this device's ceilings are and where passes of the models lie below them: the points of a roofline.

A point is a whole pass of N rows on random weights of a model's shape, timed as in ``profiling.kernels``. Its bytes are
the least that such a pass moves (weights once, K/V of the text), its operations those of the N rows. On a CPU small
models stay in the cache from one pass to the next, so a point may lie above the line of the memory's copy rate.
"""

from types import ModuleType
from typing import Any

import torch

from model.config import GPT2Config
from profiling import passes
from profiling.calls import make_calls
from profiling.shapes import Shape
from profiling.timing import ceilings, measure

ROWS = (1, 2, 4, 8, 16, 32, 64)


def shape_of(name: str, config: GPT2Config) -> Shape:
    """The shape of a model that was loaded."""
    return Shape(name, config.n_layer, config.n_embd, config.n_head, config.vocab_size, config.n_positions)


@torch.no_grad()
def points(
    shape: Shape,
    ops: ModuleType,
    dtype: torch.dtype,
    device: torch.device,
    all_rows: tuple[int, ...] = ROWS,
    text_length: int = 256,
    samples: int = 20,
) -> list[dict[str, Any]]:
    """One row per number of rows: seconds, least bytes, operations. The same root in every pass is checked first."""
    text_length = min(text_length, shape.positions // 2)
    whole = passes.random_pass(shape, max(all_rows), dtype, device, text_length)
    if not passes.same_root(whole, ops):
        raise ValueError(f"{shape.name}: the root's logits differ between passes of 1 and {max(all_rows)} rows")
    found = []
    for num_rows in all_rows:
        run = passes.forward(passes.first_rows(whole, num_rows), ops)
        timing = measure([run], device, samples, launches=1)
        operations, _ = make_calls(shape, num_rows, dtype, "meta", text_length)
        found.append(
            {
                "model": shape.name,
                "rows": num_rows,
                "seconds": timing.median,
                "bytes": sum(op.bytes * op.repeats for op in operations.values()),
                "flops": sum(op.flops * op.repeats for op in operations.values()),
            }
        )
    return found


def measured_ceilings(device: torch.device, dtype: torch.dtype, samples: int = 10) -> dict[str, Any]:
    """Copy, read and matrix rates of this device, as ``profiling.timing.Ceilings`` names them."""
    return ceilings(device, dtype, samples)._asdict()
