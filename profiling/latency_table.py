"""Markdown of a run of ``profiling.latency``: conditions, one table, where peers' tokens part, what was left out."""

from profiling.machine import signature
from profiling.markdown import number, table

HEADINGS = (
    "prompt + new",
    "method",
    "latency, ms (p10 - p90)",
    "vs baseline",
    "tokens/s",
    "first token, ms",
    "per token, ms: mean",
    "p50",
    "p99",
    "per burst, ms: p50",
    "p99",
    "tokens per oracle pass",
    "memory, MB",
    "identical",
)


def markdown(document: dict) -> str:
    """The whole report of ``document``, whose "about" and "rows" are those of the JSON."""
    about, rows = document["about"], document["rows"]
    parts = [
        "# Latency of one sequence",
        _conditions(about),
        table(HEADINGS, map(_cells, rows), "ll" + "r" * (len(HEADINGS) - 2)),
        "Medians where nothing is said, over iterations; per token and per burst over all tokens and bursts after an "
        "iteration's first burst. A burst is what one oracle pass gives; a token's time is its burst's gap by the "
        "burst's tokens. Memory is the peak of the process (on a GPU: of torch's allocator) with all that is loaded.",
    ]
    notes = [f"- {name} was left out: {reason}" for name, reason in about["skipped_peers"].items()]
    notes += [_difference(row, place) for row in rows for place in row["differences"]]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts) + "\n"


def _conditions(about: dict) -> str:
    sampling = about["sampling"]
    drawn = "greedy"
    if sampling["do_sample"]:
        rule = f"top-k {sampling.get('top_k', 50)}, T = {sampling.get('temperature', 1):g}"
        seeds = f"seed {sampling['seed']} + iteration"
        drawn = f"sampled ({rule}, {seeds}; a peer draws by its own generator, so its tokens are not compared)"
    return (
        f"{about['iterations']} iterations after {about['warm_up']} to warm up, {about['prompts']}, {drawn}, batch 1, "
        f"eos ignored, {about['runtime']}, {about['threads']} threads; {about['device']}, "
        f"{signature(about, 'transformers')}."
    )


def _cells(row: dict) -> list[str]:
    points, per_token, per_burst = row["percentiles"], row["inter_token_latency"], row["inter_burst_latency"]
    identical = row["identical"]
    return [
        f"{row['input_len']} + {row['output_len']}",
        row["method"],
        f"{1e3 * points['50']:.1f} ({1e3 * points['10']:.1f} - {1e3 * points['90']:.1f})",
        number(row["speedup"], unit="x"),
        number(row["tokens_per_second"], ".0f"),
        f"{1e3 * row['time_to_first_token']['p50']:.1f}",
        *(_milliseconds(per_token, key) for key in ("mean", "p50", "p99")),
        *(_milliseconds(per_burst, key) for key in ("p50", "p99")),
        number(row["tokens_per_oracle_pass"]),
        " / ".join(f"{value / 1e6:.0f}" for value in row["memory"].values()),
        "" if identical is None else f"{identical} of {len(row['latencies'])}",
    ]


def _milliseconds(spread: dict | None, key: str) -> str:
    return "" if spread is None else f"{1e3 * spread[key]:.2f}"


def _difference(row: dict, place: dict) -> str:
    return (
        f"- {row['method']}, {row['input_len']} + {row['output_len']}, iteration {place['iteration']}: parts at token "
        f"{place['token']}, where the oracle's best logit leads by {place['gap']:.1e}"
    )
