"""The Markdown report of a run of ``profiling.paper``: bars, tables, pictures, peers, ablations, method."""

from typing import Any

from profiling.ablations import KINDS
from profiling.machine import signature
from profiling.markdown import number, table
from profiling.paper_runs import BASELINE, FIXED, STOPPED
from profiling.paper_tables import PAPER, Bar, find
from profiling.prompts import SETTINGS

SOURCE = "Spector & Ré, 2023, arXiv 2308.04623: GPT-2 Large, 40M draft, Katz trigram, 164 HumanEval prompts, RTX 4090"


def report(document: dict[str, Any], bars: list[Bar]) -> str:
    """``document`` is what ``paper.json`` holds; the pictures lie beside the report."""
    summary = document["summary"]
    parts = [
        "# Rehearsal in miniature, no result"
        if document["run"]["rehearsal"]
        else "# The paper's tables and figures, here",
        conditions(document),
        "## What was to be reached",
        bar_table(bars),
        "## Table 1: memory traffic per token, relative to the baseline",
        traffic_table(summary, document["dram"]),
        *(
            part
            for extent in (FIXED, STOPPED)
            if any(row["extent"] == extent for row in summary)
            for part in (f"## Speed, {extent}", speed_table(summary, extent))
        ),
        *pictures(),
        "## Peers",
        peer_lines(summary, document["skipped_peers"]),
        *ablation_sections(summary, document["run"]["ablation_tokens"]),
        "## How it was measured",
        method_notes(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(document: dict[str, Any]) -> str:
    about, run = document["about"], document["run"]
    devices = about["processes"]
    shards = f", prompts shared by {len(devices)} processes on {', '.join(sorted(set(devices)))}" * (len(devices) > 1)
    return (
        f"{run['num_prompts']} prompts ({run['prompts']}), at most {run['tokens']} new tokens, batch 1, "
        f"{run['runtime']}; oracle {run['oracle']}, draft {run['draft']}, draft² {run['draft2']}; {about['device']}, "
        f"{about['threads']} threads{shards}, {signature(about, 'transformers')}. Every figure is computed from the "
        "rows in `paper.csv` and `paper.json`."
    )


def bar_table(bars: list[Bar]) -> str:
    lines = []
    for bar in bars:
        verdict = "not measured" if bar.measured is None else "met" if bar.is_met else "**missed**"
        lines.append([bar.claim, bar.wanted, number(bar.measured), verdict])
    missed = [f"- {bar.claim}: {bar.reason}." for bar in bars if bar.measured is not None and bar.reason]
    reasons = "\n\nWhere a bar is missed, why:\n\n" + "\n".join(missed) if missed else ""
    return table(["", "bar", "here", ""], lines) + reasons


def traffic_table(summary: list[dict], dram: dict[str, Any]) -> str:
    header = ["decoding, method", "paper", "counted here", "oracle", "draft", "draft²", "DRAM counters"]
    lines = []
    for row in summary:
        if (row["suite"], row["extent"]) != ("paper", FIXED) or "relative_bytes" not in row:
            continue
        key, parts = (row["setting"], row["method"]), row["relative_bytes_by_stage"]
        moved = dram["relative"].get(row["setting"], {}).get(row["method"])
        cells = [number(PAPER[key][1] if key in PAPER else None), number(row["relative_bytes"])]
        cells += [number(parts.get(stage)) for stage in ("oracle", "draft", "draft2")] + [number(moved)]
        lines.append([", ".join(key), *cells])
    note = f" DRAM counters: {dram['reason']}." if dram["reason"] else ""
    return (
        table(header, lines) + "\n\nCounted: bytes of weights, K/V and table rows that the passes of all stages must "
        f"move, by arithmetic, prefill not included; fixed length.{note} The paper's: {SOURCE}."
    )


def speed_table(summary: list[dict], extent: str) -> str:
    header = ["decoding, method", "tokens/s", "vs baseline", "median (p10 - p90) of prompts", "paper"]
    header += ["tokens per oracle pass", "acceptance", "repeated 8-grams", "bytes", "same tokens"]
    lines = []
    for row in summary:
        if (row["suite"], row["extent"]) != ("paper", extent):
            continue
        key = (row["setting"], row["method"])
        paper = PAPER[key][0] if key in PAPER and extent == FIXED else None
        ratio = f"{paper / PAPER[key[0], BASELINE][0]:.2f}x ({paper})" if paper else ""
        median, low, high = (number(row[f"speedup_{name}"]) for name in ("median", "p10", "p90"))
        spread = f"{median} ({low} - {high})" if median else ""
        equal = f"{row['equal']} of {row['compared']}" if row["compared"] else ""
        cells = [number(row["tokens_per_second"], ".1f"), number(row["speedup"], ".2f", "x"), spread, ratio]
        cells += [number(row.get(name)) for name in ("tokens_per_oracle_pass", "acceptance", "repeated_8_grams")]
        lines.append([", ".join(key), *cells, number(row.get("relative_bytes")), equal])
    return (
        table(header, lines) + "\n\nTokens per second are totals over all prompts and seeds, prefill included. The "
        "paper's ratios and, in brackets, its tokens per second. Text that loops flatters speculation: the share of "
        "8-grams that have occurred before in the completion."
    )


def pictures() -> list[str]:
    captions = (
        "Figure 1: passes of 1 to 64 rows below the ceilings measured on this device",
        "Figure 2: relative performance of every problem, sorted; A greedy, B top-k",
        "Figure 3: a completion (top-k 50, T = 1), each token coloured by the stage that proposed it",
    )
    found = [f"## {text}\n\n![{text}](figure{number}.png)" for number, text in enumerate(captions, 1)]
    return [*found, "Also as [HTML](figure3.html) and for a terminal (`cat figure3.txt`)."]


def peer_lines(summary: list[dict], skipped: dict[str, str]) -> str:
    """Where greedy tokens of a peer are not the baseline's, and which peers could not be run."""
    lines = []
    for row in summary:
        if row["kind"] != "peer" or not row["compared"]:
            continue
        where = f"{row['method']}, {row['extent']}: {row['equal']} of {row['compared']} greedy texts are the baseline's"
        places = [
            f"prompt {place['prompt']} from token {place['first_difference']} (gap {place['gap']:.1e})"
            for place in row["differences"]
        ]
        lines.append(f"- {where}" + (f"; first differences: {', '.join(places)}" if places else "") + ".")
    lines += [f"- {name}: left out, {reason}." for name, reason in skipped.items()]
    note = (
        "The gap is between the two best logits of the oracle at the first difference. Peers sample with generators "
        "of their own, so their sampled texts are others."
    )
    return "\n".join(lines) + f"\n\n{note}" if lines else "No peer was asked for."


def ablation_sections(summary: list[dict], num_tokens: int) -> list[str]:
    """One table per thing that is varied, greedy and sampled side by side."""
    rows = [row for row in summary if row["suite"] == "ablations"]
    if not rows:
        return []
    extent = f"{rows[0]['prompts']} of the prompts, {num_tokens} new tokens; bytes and speed relative to the baseline."
    sections = [f"## Ablations\n\n{extent}", best_chain(rows)]
    settings = [setting for setting in SETTINGS if any(row["setting"] == setting for row in rows)]
    names = ["tokens per pass", "acceptance", "repeated 8-grams", "bytes", "speed"]
    header = ["", *(f"{setting.split()[0]}: {name}" for setting in settings for name in names)]
    for kind, title in KINDS.items():
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows if row["kind"] == kind):
            cells = [cell for setting in settings for cell in _ablation(find(rows, setting, method, "ablations"))]
            lines.append([method, *cells])
        if lines:
            sections.append(f"### {title}\n\n" + table(header, lines))
    return sections


def _ablation(row: dict | None) -> list[str]:
    if row is None:
        return [""] * 5
    names = ("tokens_per_oracle_pass", "acceptance", "repeated_8_grams", "relative_bytes")
    return [*(number(row[name]) for name in names), number(row["speedup"], ".2f", "x")]


def best_chain(rows: list[dict]) -> str:
    """Tree against the best chain, and what draft² adds, in words."""
    lines = []
    for setting in SETTINGS:
        best = {}
        for kind in ("chain", "tree", "staged", "draft2"):
            own = [row for row in rows if (row["setting"], row["kind"]) == (setting, kind)]
            if own:
                best[kind] = max(own, key=lambda row: row["tokens_per_second"])
        if best:
            found = "; ".join(f"{row['method']} {row['speedup']:.2f}x" for row in best.values())
            lines.append(f"- {setting}, fastest of each kind, relative to the baseline: {found}.")
    return "\n".join(lines)


def method_notes(document: dict[str, Any]) -> str:
    run = document["run"]
    seeds = f"{run['seeds']} seeds" if run["seeds"] > 1 else "one seed"
    return (
        f"Every method continues a prompt before the next prompt begins, each prompt with another one first; {seeds} "
        f"when sampling, {run['peer_seeds']} for peers. Before a time is kept, the tokens of all our methods are "
        "compared with the baseline's, and a difference ends the run. One clock around a call that returns token "
        'ids; prefill is inside. Each method has generated once before, outside the clock. "Up to the stop" ends at '
        "HumanEval's stop strings, which do not count as tokens though their passes do, or at the end of the text. "
        "Acceptance: accepted / tried nodes on the walks. The roofline's bytes are the least that a pass must move; on "
        "a CPU a small model stays in the cache from one pass to the next."
    )
