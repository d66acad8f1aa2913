"""A stand-in for a CUDA graph, and what two generations are compared by."""

import weakref
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch

from decoding.decoder import GenerateOutput
from decoding.loop import Generation
from decoding.stages import GPT2Stage
from model.capture import NUM_WARM_UPS


class RecordedGraph:
    """Replays by calling what it captured: on the same buffers, and nothing is known of later generations.

    As a CUDA graph it keeps no tensor alive that ``run`` closes over, by itself or in tuples: whoever captured it must.
    Objects that ``run`` closes over are kept, as they are called again.
    """

    def capture(self, run: Callable[[], None]) -> None:
        for _ in range(NUM_WARM_UPS + 1):
            run()
        self._function = run.__code__, run.__globals__
        self._held = [_forgetful(cell.cell_contents) for cell in run.__closure__ or ()]

    def replay(self) -> None:
        FunctionType(*self._function, closure=tuple(CellType(recall()) for recall in self._held))()


def _forgetful(value: Any) -> Callable[[], Any]:
    """What gives ``value`` back as long as its tensors live."""
    if isinstance(value, torch.Tensor):
        found = weakref.ref(value)

        def recall() -> torch.Tensor:
            assert (tensor := found()) is not None, "a graph reads a tensor that nobody has kept"
            return tensor

        return recall
    if isinstance(value, tuple):
        parts = [_forgetful(part) for part in value]
        make = getattr(type(value), "_make", tuple)
        return lambda: make(part() for part in parts)
    return lambda: value


def said(out: GenerateOutput) -> tuple:
    """All that a generation gives but what depends on time or names the way it ran."""
    timed = ("tokens_per_second", "seconds", "prefill_seconds", "iteration")
    stats = {name: value for name, value in out.stats.items() if name not in timed}
    return out.sequences.tolist(), out.new_token_ids, out.text, out.token_stages, out.finish_reason, out.seed, stats


def everything(generation: Generation) -> list[torch.Tensor]:
    """Copies of all that iterations can change, without the record of the latest."""
    parts = [column for part in generation.state for column in part if column is not generation.state.progress.record]
    for stage in generation.stages:
        parts += [stage.cache.k, stage.cache.v] if isinstance(stage, GPT2Stage) else stage.recent[:-1]
    return [part.clone() for part in [*parts, generation.sampling.seed]]
