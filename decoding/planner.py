"""Trees sized for this machine: which shape of speculation emits the most tokens per second here.

What a pass of so many rows costs is a staircase that differs from device to device, and what a node is worth differs
from text to text. Both are in one number that is easy to measure, so the search measures that: from the default shape
of a method it changes one number at a time, times the shape beside the best so far on the same prompts, by turns, and
keeps what is faster. No shape changes the text, so a plan made under noise costs speed and nothing else. Plain decoding
is measured beside all of them, and is the answer where speculation would lose.

Command: ``staged plan``. A plan is a readable JSON file; ``from_pretrained(plan=...)`` and ``--plan`` use it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from decoding.compare import available_methods
from decoding.config import SpeculationConfig
from decoding.decoder import StagedDecoder
from decoding.plan import Plan

VALUES = (1, 2, 3, 4, 6, 8, 11, 15, 23, 31, 47, 63, 95)  # that rounds, widths, children and budgets may take
PROBABILITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)  # that ``min_prob`` may take
LEAST_GAIN = 1.02  # what is less is noise


def neighbours(shape: SpeculationConfig) -> Iterator[SpeculationConfig]:
    """Every shape that differs in one number, by one step of VALUES or PROBABILITIES; a chain stays a chain."""
    if shape.widths == shape.children == (1,):
        for length in _beside(shape.budget):
            yield dataclasses.replace(shape, rounds=(length,), budget=length, max_depth=length)
        return
    names = ("budget", "max_depth", "rounds", "widths", "children")
    for name in (*names, "min_prob") if len(shape.stages) > 1 else names:
        value, values = getattr(shape, name), PROBABILITIES if name == "min_prob" else VALUES
        for index, number in enumerate(value if isinstance(value, tuple) else (value,)):
            for other in _beside(number, values):
                changed = (*value[:index], other, *value[index + 1 :]) if isinstance(value, tuple) else other
                try:
                    yield dataclasses.replace(shape, **{name: changed})
                except ValueError:  # beyond what a tree may be
                    continue


def _beside(number: float, values: tuple = VALUES) -> list:
    """The ``values`` next to ``number``, the smaller one first."""
    return [*[v for v in values if v < number][-1:], *[v for v in values if v > number][:1]]


def improve(
    shape: SpeculationConfig,
    seconds: Callable[[SpeculationConfig], float],  # of one turn over all prompts
    turns: int,
    deadline: float,  # of time.monotonic
) -> SpeculationConfig:
    """Hill climbing from ``shape`` to one that no neighbour beats by LEAST_GAIN, or until the deadline."""
    tried = {shape}
    climbing = True
    while climbing:
        climbing = False
        for other in neighbours(shape):
            if other in tried:
                continue
            if time.monotonic() > deadline:
                return shape
            tried.add(other)
            if ratio(shape, other, seconds, turns) > LEAST_GAIN:
                shape, climbing = other, True
    return shape


def ratio(
    one: SpeculationConfig, other: SpeculationConfig, seconds: Callable[[SpeculationConfig], float], turns: int
) -> float:
    """How many times as fast ``other`` is as ``one``: the median over turns, in which they take turns to begin."""
    found = []
    for turn in range(turns):
        if turn % 2:
            after, before = seconds(other), seconds(one)
        else:
            before, after = seconds(one), seconds(other)
        found.append(before / after)
    return statistics.median(found)


def search(
    decoder: StagedDecoder,
    prompt_ids: list[list[int]],
    sampling: dict[str, Any],  # arguments of ``generate``
    num_tokens: int = 64,
    turns: int = 3,
    minutes: float = 2.0,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Measure and choose a shape for each method that the decoder's stages allow.

    Times are of whole generations, prefill included. The methods share the budget of ``minutes``.
    """
    methods = available_methods(decoder)

    def seconds(shape: SpeculationConfig) -> float:
        arguments = {"ignore_eos": True, "speculation": shape, **sampling}
        decoder.generate(prompt_ids[0], min(8, num_tokens), **arguments)  # compiles, captures and allocates
        start = time.perf_counter()
        for ids in prompt_ids:
            decoder.generate(ids, num_tokens, **arguments)
        return time.perf_counter() - start

    baseline = SpeculationConfig()
    shapes, speedups = {"baseline": baseline}, {"baseline": 1.0}
    for method in methods[1:]:
        deadline = time.monotonic() + 60 * minutes / (len(methods) - 1)
        shapes[method] = improve(decoder.plan(method), seconds, turns, deadline)
        speedups[method] = round(ratio(baseline, shapes[method], seconds, turns), 3)
        report(f"{method}: {speedups[method]:.2f}x plain decoding with {shapes[method]}")
    fastest = max(speedups, key=speedups.get)
    conditions = {"runtime": decoder.runtime, "prompts": len(prompt_ids), "tokens": num_tokens, "sampling": sampling}
    return Plan(shapes, fastest, conditions, speedups)
