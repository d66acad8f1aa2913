"""Rows of ``profiling.paper`` made into the figures that it reports: totals, ratios, spreads, and the bars to reach.

Nothing is measured here. A ratio is of totals over all prompts and seeds, beside the median and the tenth and ninetieth
percentile of the ratios of single prompts.
"""

from typing import Any, NamedTuple

import numpy as np

from profiling.paper_runs import BASELINE, FIXED
from profiling.prompts import GREEDY, TOP_K

STAGES = ("oracle", "draft", "draft2")
# Spector & Ré 2023 (arXiv 2308.04623), on an RTX 4090: tokens per second and memory traffic relative to the baseline
PAPER = {
    (GREEDY, "baseline"): (150, 1.00),
    (GREEDY, "speculative"): (350, 0.31),
    (GREEDY, "staged"): (475, 0.23),
    (TOP_K, "baseline"): (150, 1.00),
    (TOP_K, "speculative"): (219, 0.48),
    (TOP_K, "staged"): (298, 0.35),
}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per suite, setting, extent and method, in the order in which they first occur."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = (row["suite"], row["setting"], row["extent"])
        groups.setdefault(key, {}).setdefault(row["method"], []).append(row)
    return [
        {"suite": suite, "setting": setting, "extent": extent, "method": method, **_summary(own, methods[BASELINE])}
        for (suite, setting, extent), methods in groups.items()
        for method, own in methods.items()
    ]


def _summary(rows: list[dict], baseline: list[dict]) -> dict[str, Any]:
    tokens, seconds = total(rows, "tokens"), total(rows, "seconds")
    speed, base_speed = tokens / seconds, total(baseline, "tokens") / total(baseline, "seconds")
    ratios = list(prompt_ratios(rows, baseline).values())
    low, median, high = np.percentile(ratios, [10, 50, 90]).tolist() if ratios else (None, None, None)
    compared = [row for row in rows if "equal" in row]
    return {
        "kind": rows[0]["kind"],
        "prompts": len({row["prompt"] for row in rows}),
        "runs": len(rows),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": speed,
        "speedup": speed / base_speed,
        "speedup_p10": low,
        "speedup_median": median,
        "speedup_p90": high,
        "repeated_8_grams": total(rows, "repeated_8_grams") / len(rows),
        "equal": sum(row["equal"] for row in compared),
        "compared": len(compared),
        "differences": [
            {key: row[key] for key in ("prompt", "seed", "first_difference", "gap")}
            for row in compared
            if not row["equal"]
        ],
        **_passes(rows, baseline, tokens),
    }


def _passes(rows: list[dict], baseline: list[dict], tokens: int) -> dict[str, Any]:
    """What only methods of this project count: passes, acceptance, bytes relative to the baseline's by stage."""
    if "oracle_passes" not in rows[0] or not tokens:
        return {}
    base = total(baseline, "oracle_bytes") / total(baseline, "tokens")
    passes, tried = total(rows, "oracle_passes"), total(rows, "tried")
    by_stage = {name: total(rows, f"{name}_bytes") / tokens / base for name in STAGES if f"{name}_bytes" in rows[0]}
    return {
        "tokens_per_oracle_pass": tokens / passes,
        "draft_passes_per_oracle_pass": total(rows, "draft_passes") / passes,
        "acceptance": total(rows, "accepted") / tried if tried else None,
        "bytes_per_token": sum(by_stage.values()) * base,
        "relative_bytes": sum(by_stage.values()),
        "relative_bytes_by_stage": by_stage,
    }


def total(rows: list[dict], column: str) -> float:
    """The sum of a column; a row without it counts nothing."""
    return sum(row.get(column, 0) for row in rows)


def prompt_ratios(rows: list[dict], baseline: list[dict]) -> dict[int, float]:
    """Tokens per second relative to the baseline's, by prompt, over all seeds; prompts without tokens are left out."""
    found = {}
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        own, base = ([row for row in some if row["prompt"] == prompt] for some in (rows, baseline))
        tokens, base_tokens = total(own, "tokens"), total(base, "tokens")
        if tokens and base_tokens:
            found[prompt] = tokens / total(own, "seconds") / (base_tokens / total(base, "seconds"))
    return found


class Bar(NamedTuple):
    """Something to reach, and what was reached; ``measured`` None = not part of this run."""

    claim: str
    wanted: str
    measured: float | None
    is_met: bool
    reason: str  # in figures of the run, where the bar is missed


def find(summary: list[dict], setting: str, method: str, suite: str = "paper", extent: str = FIXED) -> dict | None:
    """The row of a summary, None where it was not measured."""
    wanted = {"suite": suite, "setting": setting, "extent": extent, "method": method}
    return next((row for row in summary if wanted.items() <= row.items()), None)


def bars(summary: list[dict], device_type: str) -> list[Bar]:
    """Every bar of this kind of device, met or not, fixed length."""
    found = [_identical(summary)]
    for (setting, method), (_, traffic) in PAPER.items():
        if method != BASELINE:
            found.append(_traffic(find(summary, setting, method), setting, method, traffic))
    if device_type == "cpu":
        for claim, peers, times in (
            ("HF generate", ("hf-generate",), 3.0),
            ("the better of HF assisted and prompt lookup", ("hf-assisted", "hf-prompt-lookup"), 1.5),
            ("CTranslate2", ("ctranslate2",), 1.0),
        ):
            found.append(_faster(summary, claim, peers, times))
        return found
    for (setting, method), (speed, _) in PAPER.items():
        if method != BASELINE:
            found.append(_speedup(find(summary, setting, method), setting, method, speed / PAPER[setting, BASELINE][0]))
    return found


def _identical(summary: list[dict]) -> Bar:
    ours = [row for row in summary if row["kind"] != "peer"]
    equal, compared = total(ours, "equal"), total(ours, "compared")
    claim = f"tokens of all methods identical to the baseline's, {equal:.0f} of {compared:.0f} generations"
    return Bar(claim, "all", equal / max(1, compared), equal == compared > 0, "")


def _traffic(row: dict | None, setting: str, method: str, wanted: float) -> Bar:
    claim, bar = f"{method}, {setting}: memory traffic relative to the baseline", f"at most {wanted:.2f}"
    if row is None or "relative_bytes" not in row:
        return Bar(claim, bar, None, False, "not measured")
    if (measured := row["relative_bytes"]) <= wanted:
        return Bar(claim, bar, measured, True, "")
    parts = row["relative_bytes_by_stage"]
    below = ", ".join(f"{name} adds {value:.2f}" for name, value in parts.items() if name != "oracle")
    drafts = row["draft_passes_per_oracle_pass"]
    weight = parts["draft"] / parts["oracle"] / drafts if drafts else 0.0
    reason = (
        f"{row['tokens_per_oracle_pass']:.2f} tokens an oracle pass leave {parts['oracle']:.2f} to the oracle; {below} "
        f"({drafts:.1f} draft passes an iteration, each {weight:.2f} of an oracle pass; the paper's draft is 0.05)"
    )
    return Bar(claim, bar, measured, False, reason)


def _faster(summary: list[dict], claim: str, peers: tuple[str, ...], times: float) -> Bar:
    claim, bar = f"staged, {GREEDY}: tokens per second against {claim}", f"at least {times:.1f}x"
    ours = find(summary, GREEDY, "staged")
    theirs = [row for name in peers if (row := find(summary, GREEDY, name))]
    if ours is None or not theirs:
        return Bar(claim, bar, None, False, "not measured")
    best = max(theirs, key=lambda row: row["tokens_per_second"])
    measured = ours["tokens_per_second"] / best["tokens_per_second"]
    if measured >= times:
        return Bar(claim, bar, measured, True, "")
    iteration, token = 1e3 * ours["tokens_per_oracle_pass"] / ours["tokens_per_second"], 1e3 / best["tokens_per_second"]
    reason = (
        f"an iteration gives {ours['tokens_per_oracle_pass']:.2f} tokens but takes {iteration:.1f} ms, as long as "
        f"{iteration / token:.1f} tokens of {best['method']} ({token:.1f} ms each)"
    )
    return Bar(claim, bar, measured, False, reason)


def _speedup(row: dict | None, setting: str, method: str, wanted: float) -> Bar:
    claim, bar = f"{method}, {setting}: tokens per second against our baseline", f"at least {wanted:.2f}x"
    if row is None:
        return Bar(claim, bar, None, False, "not measured")
    if (measured := row["speedup"]) >= wanted:
        return Bar(claim, bar, measured, True, "")
    cost = row["tokens_per_oracle_pass"] / measured
    reason = (
        f"{row['tokens_per_oracle_pass']:.2f} tokens an iteration, which takes as long as {cost:.1f} baseline tokens"
    )
    return Bar(claim, bar, measured, False, reason)
