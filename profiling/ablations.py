"""What the paper left out: tree against the best chain, with and without draft², budgets, drafts, tables.

Every variant is one more shape of speculation for ``profiling.paper_runs``, so tokens are compared and times taken just
as those of the methods.
"""

import dataclasses
from pathlib import Path

from decoding import SpeculationConfig, StagedDecoder
from decoding.compare import available_methods
from decoding.config import chain, default_speculation
from profiling.paper_runs import BASELINE
from profiling.peers import Own

CHAINS = tuple(range(1, 9))
BUDGETS = (3, 7, 15, 31, 63)
KINDS = {
    "chain": "The draft alone, a chain: how many tokens it drafts",
    "tree": "The draft alone, a tree: budget",
    "staged": "draft² and draft: budget",
    "draft2": "draft² alone: budget",
    "stages": "Other drafts and other tables, default shapes",
}


def scaled(config: SpeculationConfig, budget: int) -> SpeculationConfig:
    """``config`` with another budget, and passes of the lower stages wider or narrower in proportion."""
    widths = tuple(max(1, round(width * budget / config.budget)) for width in config.widths)
    return dataclasses.replace(config, widths=widths, budget=budget)


def _whole_block(decoder: StagedDecoder, method: str) -> SpeculationConfig:
    """The default shape where a pass of 16 rows is cheap, whatever it is on this machine: what budgets scale."""
    return default_speculation(method, [stage.name for stage in decoder.lower])


def without_draft(config: SpeculationConfig) -> SpeculationConfig:
    """draft² of ``config`` alone, with the rounds that it has in the chain of all stages."""
    one = {name: getattr(config, name)[:1] for name in ("stages", "rounds", "widths", "children")}
    rounds = (config.rounds[0] * 2,)  # nobody scores between its rounds, so it can go on
    return dataclasses.replace(config, **one | {"rounds": rounds})


def variants(decoders: dict[str, StagedDecoder]) -> list[Own]:
    """The baseline and every variant; ``decoders`` by name, the first one being the trio of the paper's figures."""
    decoder = next(iter(decoders.values()))
    found = [Own(decoder, BASELINE)]
    available = available_methods(decoder)
    if "tree" in available:
        found += [Own(decoder, f"chain of {n}", chain(n), "chain") for n in CHAINS]
        found += [Own(decoder, f"tree, {n} nodes", scaled(_whole_block(decoder, "tree"), n), "tree") for n in BUDGETS]
    if "staged" in available:
        plan = _whole_block(decoder, "staged")
        found += [Own(decoder, f"staged, {n} nodes", scaled(plan, n), "staged") for n in BUDGETS]
        alone = without_draft(plan)
        found += [Own(decoder, f"draft2 alone, {n} nodes", scaled(alone, n), "draft2") for n in BUDGETS]
    for name, other in decoders.items() if len(decoders) > 1 else ():
        methods = [method for method in available_methods(other) if method != BASELINE]
        found += [Own(other, f"{method}, {name}", other.plan(method), "stages") for method in methods]
    return found


def load(oracle: str, drafts: list[str | None], tables: list[str | None], **runtime: str) -> dict[str, StagedDecoder]:
    """A decoder per draft with the first table, and per table with the first draft; they share the oracle."""
    pairs = [(draft, tables[0]) for draft in drafts] + [(drafts[0], table) for table in tables[1:]]
    first = StagedDecoder.from_pretrained(oracle, *pairs[0], **runtime)
    decoders = {_name(*pairs[0]): first}
    for pair in pairs[1:]:
        lower = StagedDecoder.from_pretrained(oracle, *pair, **runtime).lower
        decoders[_name(*pair)] = StagedDecoder(lower, first.oracle, first.tokenizer, first.runtime)
    return decoders


def _name(draft: str | None, table: str | None) -> str:
    """The last two parts of both paths: the last alone is often the same."""
    sources = (("draft", draft), ("table", table))
    return ", ".join(f"{role} {'/'.join(Path(source).parts[-2:])}" for role, source in sources if source)
