"""What a generation did, counted on committed tokens only: drafts beyond an eos or a stop string do not count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kernels.layout import Record


class Work(NamedTuple):
    """What one iteration asks of one stage."""

    passes: int = 0
    rows: int = 0  # tokens of these passes
    seconds: float = 0.0  # time the host spent launching them, or computing them where that is the same


@dataclass
class Iteration:
    """One oracle pass. ``sources[i]`` is the stage of the i-th emitted token, the oracle's index for its own token; bit
    j of ``tried[i]``: stage j had proposed a continuation where that token was drawn."""

    proposed: list[int]  # nodes of the oracle's pass per lower stage
    tried: list[int]
    sources: list[int]


class Statistics:
    """Counters of one generation; ``summary`` turns them into the figures that users see."""

    def __init__(self, names: list[str], execution: str = "eager"):
        self.names, self.execution = names, execution
        self.iterations: list[Iteration] = []
        self.seconds = 0.0

    def record(self, record: list[int]) -> list[int]:
        """Count one iteration from its record (``kernels.layout.Record``); returns the tokens it emitted."""
        count, oracle = record[Record.EMITTED], len(self.names) - 1
        self.iterations.append(
            Iteration(
                proposed=record[Record.PROPOSED : Record.PROPOSED + oracle],
                tried=record[Record.TRIED : Record.TRIED + count],
                sources=record[Record.SOURCES : Record.SOURCES + count],
            )
        )
        return record[Record.TOKENS : Record.TOKENS + count]

    def truncate(self, num_dropped: int) -> None:
        """Forget the last ``num_dropped`` tokens, a stop string cut them off; their passes stay counted."""
        for iteration in reversed(self.iterations):
            keep = max(0, len(iteration.sources) - num_dropped)
            num_dropped -= len(iteration.sources) - keep
            iteration.tried, iteration.sources = iteration.tried[:keep], iteration.sources[:keep]

    @property
    def token_stages(self) -> list[str]:
        """Per new token, the name of the cheapest stage that had proposed it."""
        return [self.names[source] for iteration in self.iterations for source in iteration.sources]

    def summary(self, stages: list) -> dict:
        """The public figures; ``stages`` are the stage objects in the order of ``names``.

        Per stage: ``passes``; ``proposed`` and ``accepted`` nodes of the oracle's trees; ``tried``, the nodes on the
        walks that had a child of this stage; ``acceptance_rate`` = accepted / tried, and
        ``acceptance_rate_per_position[i]`` the same at the i-th token of an iteration. The same five figures at the top
        are those of all lower stages together. ``mean_acceptance_length`` = tokens per oracle pass, the oracle's own
        included. ``bytes_per_token`` is arithmetic: weights, K/V and table rows of all stages' passes. Prefill is in
        the seconds, not in passes and bytes. ``iteration`` is "eager" or "captured". ``seconds`` are "total" and, of
        eager iterations, those that the host spent in each stage and outside of them all ("host"); within a captured
        iteration the host sees no stage. Those and ``prefill_seconds`` are the host's clock: on a GPU the time it took
        to launch the work, not to do it.
        """
        num_tokens = len(self.token_stages)
        per_stage = {}
        for index, stage in enumerate(stages):
            per_stage[stage.name] = {"passes": stage.passes}
            if index < len(stages) - 1:
                per_stage[stage.name] |= self._acceptance([index])
        seconds = {"total": self.seconds}
        if self.execution == "eager":
            seconds |= {stage.name: stage.seconds for stage in stages}
            seconds["host"] = self.seconds - sum(stage.seconds for stage in stages)
        return {
            "stages": per_stage,
            "mean_acceptance_length": num_tokens / max(1, stages[-1].passes),
            **self._acceptance(range(len(stages) - 1)),
            "tokens_per_second": num_tokens / self.seconds if self.seconds else 0.0,
            "iteration": self.execution,
            "seconds": seconds,
            "prefill_seconds": sum(getattr(stage, "prefill_seconds", 0.0) for stage in stages),
            "bytes_per_token": sum(stage.bytes_moved for stage in stages) / max(1, num_tokens),
        }

    def _acceptance(self, indices: Sequence[int]) -> dict:
        """What the oracle's trees got from the stages ``indices``, in total and per position of an iteration."""
        depth = max((len(iteration.sources) for iteration in self.iterations), default=0)
        tried, accepted = [0] * depth, [0] * depth
        for iteration in self.iterations:
            for i, (mask, source) in enumerate(zip(iteration.tried, iteration.sources, strict=True)):
                tried[i] += any(mask >> index & 1 for index in indices)
                accepted[i] += source in indices
        return {
            "proposed": sum(iteration.proposed[index] for iteration in self.iterations for index in indices),
            "tried": sum(tried),
            "accepted": sum(accepted),
            "acceptance_rate": sum(accepted) / max(1, sum(tried)),
            "acceptance_rate_per_position": [a / t for a, t in zip(accepted, tried, strict=True) if t],
        }
