"""The one way to instrument a generation: a stand-in before every operation of its stages that notes start and end.

Every operation goes through the backend's module, so the stand-ins account for all of an iteration; what they leave is
Python between the operations. Outside ``instrumented`` nothing of this exists, so it costs nothing. Ranges (of
torch.profiler, NVTX or Proton) may be opened around the same calls: on a GPU they say whose kernels are whose.
"""

import bisect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

from decoding import StagedDecoder

VERIFY, PREFILL = "verify_and_commit", "prefill"  # the operation that ends an iteration; the range before all of them
PARTS = {
    "draw": "sample + verify",
    VERIFY: "sample + verify",
    "extend_tree": "draft2",
    "lookup_nodes": "draft2",
    "learn": "draft2",
    "select_nodes": "tree",
    "insert_children": "tree",
    "stage_rows": "tree",
    "new_tree": "tree",
    "new_progress": "tree",
    "new_chain": "tree",
}
LINEAR = ("layer_norm_linear", "layer_norm_qkv", "linear_residual", "lm_head")
Opener = Callable[[str], AbstractContextManager]  # opens a range of that name


class Span(NamedTuple):
    """One call of an operation, or on a GPU one kernel."""

    name: str  # of the operation
    part: str
    start: float  # seconds
    end: float

    @property
    def lane(self) -> str:
        """What a chart shows in one line: a stage's operations together."""
        return self.part.partition(":")[0]


class Run(NamedTuple):
    """What one generation did after its prefill."""

    spans: list[Span]  # in time order, none overlaps another
    started: float
    finished: float
    num_iterations: int
    stats: dict  # of its output
    bytes_moved: dict[str, int]  # per stage of the chain, by arithmetic

    @property
    def seconds(self) -> float:
        return self.finished - self.started

    def by_part(self) -> Counter:
        """Seconds of every part; what is missing to ``seconds`` was spent outside operations."""
        found: Counter = Counter()
        for span in self.spans:
            found[span.part] += span.end - span.start
        return found

    def lane_at(self, seconds: float) -> str | None:
        """The lane of the span that covers a moment, None between operations."""
        index = bisect.bisect_right(self.spans, seconds, key=lambda span: span.start) - 1
        return self.spans[index].lane if index >= 0 and seconds <= self.spans[index].end else None

    def iterations(self) -> list[tuple[float, float]]:
        """Start and end of each: from the end of one verification to the end of the next."""
        ends = [self.started, *(self.spans[i].end for i in verified(self.spans))]
        return list(zip(ends, ends[1:], strict=False))


def verified(found: Sequence) -> list[int]:
    """Where iterations end: the index of the last span, or kernel, of each verification."""
    names = [each.name for each in found]
    return [i for i, pair in enumerate(zip(names, [*names[1:], None], strict=True)) if pair[0] == VERIFY != pair[1]]


def part_of(name: str, stage: str) -> str:
    """The part of an iteration that operation ``name`` of ``stage`` belongs to."""
    kind = "linear" if name in LINEAR else "attention" if name == "tree_attention" else "other"
    return PARTS.get(name, f"{stage}: {kind}")


def label(name: str, part: str) -> str:
    """Name of the range around an operation; ``unlabel`` takes it apart again."""
    return f"{part}|{name}"


def unlabel(text: str) -> tuple[str, str]:
    """Operation and part of a range."""
    part, _, name = text.partition("|")
    return name, part


class Timed:
    """A backend's operations; each call's span is appended to ``spans``, inside a range where there is an opener."""

    def __init__(self, ops: ModuleType, stage: str, spans: list[Span], opener: Opener | None = None):
        self._ops, self._stage, self._spans, self._opener = ops, stage, spans, opener

    def __getattr__(self, name: str):
        attribute = getattr(self._ops, name)
        if not callable(attribute):
            return attribute
        part, spans, opener, clock = part_of(name, self._stage), self._spans, self._opener, time.perf_counter

        def timed(*arguments, **named):
            start = clock()
            result = attribute(*arguments, **named)
            spans.append(Span(name, part, start, clock()))
            return result

        self.__dict__[name] = timed if opener is None else _ranged(timed, opener, label(name, part))
        return self.__dict__[name]


class Recorder:
    """Spans of the latest generation since its prefill."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.started = 0.0

    def clear(self) -> None:
        self.spans.clear()
        self.started = time.perf_counter()


@contextmanager
def instrumented(decoder: StagedDecoder, opener: Opener | None = None, operations: bool = True) -> Iterator[Recorder]:
    """Stand-ins before every operation of ``decoder``, gone again afterwards; without ``operations`` only the end of
    the prefill is noted."""
    recorder = Recorder()
    stages = [*decoder.lower, decoder.oracle]
    holders = [stage.model if hasattr(stage, "model") else stage for stage in stages]
    originals = [holder.ops for holder in holders]
    begin = decoder.oracle.begin

    def begin_then_clear(*arguments):  # the oracle begins last, so what was noted before is prefill
        with nullcontext() if opener is None else opener(PREFILL):
            lease = begin(*arguments)
        recorder.clear()
        return lease

    for stage, holder in zip(stages, holders, strict=True) if operations else ():
        holder.ops = Timed(holder.ops, stage.name, recorder.spans, opener)
        if opener is not None:  # for what a stage does between its operations
            for asked in ("score", "extend") if stage.is_table else ("score",):
                setattr(stage, asked, _ranged(getattr(stage, asked), opener, label(asked, part_of(asked, stage.name))))
    decoder.oracle.begin = begin_then_clear
    try:
        yield recorder
    finally:
        del decoder.oracle.begin
        for stage, holder, ops in zip(stages, holders, originals, strict=True):
            holder.ops = ops
            for asked in ("score", "extend"):
                vars(stage).pop(asked, None)


def _ranged(function: Callable, opener: Opener, text: str) -> Callable:
    def ranged(*arguments, **named):
        with opener(text):
            return function(*arguments, **named)

    return ranged


def bytes_moved(decoder: StagedDecoder) -> dict[str, int]:
    """Bytes of the passes of the latest generation, per stage, prefill not counted."""
    return {stage.name: stage.bytes_moved for stage in [*decoder.lower, decoder.oracle]}


def generate(decoder: StagedDecoder, recorder: Recorder, prompt_ids: list[int], num_tokens: int, **how) -> Run:
    """One generation of ``num_tokens`` tokens under the stand-ins of ``recorder``."""
    out = decoder.generate(prompt_ids, num_tokens, seed=0, ignore_eos=True, **how)
    finished = time.perf_counter()
    passes = out.stats["stages"]["oracle"]["passes"]
    return Run(list(recorder.spans), recorder.started, finished, passes, out.stats, bytes_moved(decoder))
