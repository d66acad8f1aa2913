"""A stand-in for a CUDA graph, and what two generations are compared by."""

from collections.abc import Callable

import torch

from decoding.decoder import GenerateOutput
from decoding.loop import Generation
from decoding.stages import GPT2Stage
from model.capture import NUM_WARM_UPS


class RecordedGraph:
    """Replays by calling what it captured: on the same buffers, and nothing is known of later generations."""

    def capture(self, run: Callable[[], None]) -> None:
        for _ in range(NUM_WARM_UPS + 1):
            run()
        self._run = run

    def replay(self) -> None:
        self._run()


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
