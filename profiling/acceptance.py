"""Tokens per oracle pass: what trees of 8 and 36 nodes are worth, greedy and sampled, beside the paper's rule.

    python -m profiling.acceptance --prompts DIR [--count 24] [--tokens 64] [--out DIR]

Draft trees with and without draft² over MBPP prompts, with the bundled trio. "Shared noise" is this project's rule:
every stage draws with the oracle's noise and scores paths by perturbed margins. "Paper's rule": stages rank by their
own probabilities, the oracle draws independently. Loops flatter speculation, so the share of 8-grams that repeat stands
beside every figure. With --out, ``acceptance.json`` and ``acceptance.md``.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.progress import track

from decoding import SpeculationConfig, StagedDecoder
from profiling import machine, prompts
from profiling.flags import count, in_one_line
from profiling.markdown import number, publish, table
from profiling.prompts import GREEDY, SETTINGS, TOP_K

RULES = {
    GREEDY: ({}, {}),
    "top-k 50, shared noise": (SETTINGS[TOP_K], {}),
    "top-k 50, paper's rule": (SETTINGS[TOP_K], {"shared_noise": False, "tau": 1.0}),
}


def shapes(budget: int) -> dict[str, SpeculationConfig]:
    """Generous trees, so that the budget decides: without and with draft²."""
    return {
        "draft": SpeculationConfig(("draft",), (10,), (12,), (8,), budget, 12),
        "draft2 + draft": SpeculationConfig(("draft2", "draft"), (4, 5), (8, 16), (6, 8), budget, 12),
    }


def repeated_share(token_ids: list[int], n: int = 8) -> float:
    """Share of the n-grams of a text that have occurred in it before."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure(decoder: StagedDecoder, prompt_ids: list[list[int]], num_tokens: int, seeds: int) -> list[dict]:
    """One row per rule, shape and budget; totals over prompts and seeds."""
    rows = []
    for budget in (8, 36):
        for shape, config in shapes(budget).items():
            for rule, (sampling, changes) in track(RULES.items(), f"{budget} nodes", disable=not sys.stderr.isatty()):
                chosen = dataclasses.replace(config, **changes)
                outs = [
                    decoder.generate(ids, num_tokens, seed=seed, ignore_eos=True, speculation=chosen, **sampling)
                    for ids in prompt_ids
                    for seed in range(seeds if sampling else 1)
                ]
                rows.append({"nodes": budget, "stages": shape, "rule": rule, **_totals(outs)})
    return rows


def _totals(outs: list) -> dict:
    tokens = sum(len(out.new_token_ids) for out in outs)
    passes = sum(out.stats["stages"]["oracle"]["passes"] for out in outs)
    first = [rate for out in outs for rate in out.stats["acceptance_rate_per_position"][:1]]
    return {
        "tokens": tokens,
        "oracle_passes": passes,
        "tokens_per_oracle_pass": tokens / passes,
        "draft_passes_per_oracle_pass": sum(out.stats["stages"]["draft"]["passes"] for out in outs) / passes,
        "depth_1_acceptance": sum(first) / len(first),
        "repeated_8_grams": sum(repeated_share(out.new_token_ids) for out in outs) / len(outs),
    }


def markdown(rows: list[dict], about: dict, conditions: str) -> str:
    measured = (
        f"{conditions}; {about['device']}, {machine.signature(about)}. Draft passes are per oracle pass; depth 1 is "
        "the share of roots whose drawn token was in the tree."
    )
    header = ["nodes", "stages", "rule", "tokens per oracle pass", "vs greedy", "draft passes"]
    header += ["depth 1", "repeated 8-grams"]
    greedy = {(row["nodes"], row["stages"]): row for row in rows if row["rule"] == GREEDY}
    lines = []
    for row in rows:
        shape, tokens = (row["nodes"], row["stages"]), row["tokens_per_oracle_pass"]
        cells = [number(tokens), number(tokens / greedy[shape]["tokens_per_oracle_pass"])]
        cells += [number(row["draft_passes_per_oracle_pass"], ".1f"), number(row["depth_1_acceptance"])]
        lines.append([*shape, row["rule"], *cells, number(row["repeated_8_grams"])])
    return f"# Tokens per oracle pass\n\n{measured}\n\n{table(header, lines, 'rllrrrrr')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=prompts.folder_with(prompts.MBPP), required=True)
    parser.add_argument("--count", type=count, default=24)
    parser.add_argument("--tokens", type=count, default=64)
    parser.add_argument("--seeds", type=count, default=2)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the rows there")
    flags = parser.parse_args()
    with in_one_line("acceptance", flags.out):
        decoder = StagedDecoder.from_pretrained()
    prompt_ids = [decoder.encode(text) for text in prompts.mbpp(flags.prompts, flags.count)]
    rows = measure(decoder, prompt_ids, flags.tokens, flags.seeds)
    about = machine.describe(decoder.oracle.model.device)
    conditions = f"{len(prompt_ids)} MBPP prompts x {flags.tokens} tokens, {flags.seeds} seeds, {decoder.runtime}"
    publish(markdown(rows, about, conditions), {"about": about, "rows": rows}, flags.out, "acceptance")


if __name__ == "__main__":
    main()
