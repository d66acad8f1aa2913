"""Markdown tables of a run of ``profiling.kernels``: one row of results, one line; failures at the end."""

from typing import Any

OURS, WAITING = "ours", "ours, no early launches"  # implementations


def kernel_tables(document: dict[str, Any]) -> str:
    """Conditions, then operations and passes by shape."""
    about, rows = document["about"], document["rows"]
    parts = [_heading(about), _ceilings(rows)]
    for shape in dict.fromkeys(row["shape"] for row in rows if row["shape"]):
        mine = [row for row in rows if row["shape"] == shape]
        parts += [f"## {shape}", _passes(mine), _operations(mine)]
    failures = [row for row in rows if "failure" in row or row.get("check") == "red"]
    if failures:
        parts += ["## Not measured", "\n".join(_failure(row) for row in failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(about: dict[str, Any]) -> str:
    title = "# Rehearsal: torch twins on a CPU at a toy size, no result" if about["rehearsal"] else "# Kernels"
    conditions = (
        f"{about['device']}, {about.get('dtype')}, text of {about.get('text_length')} tokens, torch {about['torch']}, "
        f"Triton {about['triton']}, commit {about['commit']}, {about['date']}; `{about['command']}`"
    )
    if about["rehearsal"]:
        return f"{title}\n\n{conditions}."
    return (
        f"{title}\n\n{conditions}.\nMedians (quantiles 0.2 - 0.8) of launches in a CUDA graph, the gap to the next one "
        "included, inputs not in the L2 cache where not marked *; GB/s and percent of the copy rate by the least bytes "
        "that the work moves."
    )


def _ceilings(rows: list[dict]) -> str:
    lines = ["| ceilings | copy GB/s | read GB/s | product TFLOP/s |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        if row["kind"] == "ceilings" and "copy_gb_per_s" in row:
            rates = (row["copy_gb_per_s"], row["read_gb_per_s"], row["matrix_tflops"])
            lines.append(f"| {row['implementation']} the run | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |")
    return "\n".join(lines)


def _passes(rows: list[dict]) -> str:
    measured = [row for row in rows if row["kind"] == "pass" and "microseconds" in row]
    if not measured:
        return ""
    lines = [
        "| pass of | µs | weights, GB/s | % of copy | vs 1 row | launches | sum of operations, µs |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured:
        ratio, total = row.get("ratio_to_one_row"), row.get("operations_microseconds")
        lines.append(
            f"| {row['rows']} rows{row['implementation'].removeprefix(OURS)} | {_time(row)} | "
            f"{row['gb_per_s']:.0f} | {row['percent_of_copy']:.1f} | "
            f"{'' if ratio is None else f'{ratio:.2f}x'} | {row['launches'] or ''} | "
            f"{'' if total is None else f'{total:.1f}'} |"
        )
    return "\n".join(lines)


def _operations(rows: list[dict]) -> str:
    measured = [row for row in rows if row["kind"] == "operation" and "microseconds" in row]
    if not measured:
        return ""
    lines = [
        "| operation | rows | implementation | µs | GB/s | % of copy | vs ours |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    own = {(row["operation"], row["rows"]): row for row in measured if row["implementation"] == OURS}
    for row in measured:
        ours = own.get((row["operation"], row["rows"]))
        ratio = "" if ours is None or ours is row else f"{row['microseconds'] / ours['microseconds']:.2f}x"
        lines.append(
            f"| {row['operation']} | {row['rows']} | {row['implementation']} | {_time(row)} | {row['gb_per_s']:.0f} | "
            f"{row['percent_of_copy']:.1f} | {ratio} |"
        )
    return "\n".join(lines)


def _time(row: dict) -> str:
    warm = "" if row["cold"] else "*"
    return f"{row['microseconds']:.2f}{warm} ({row['microseconds_q20']:.2f} - {row['microseconds_q80']:.2f})"


def _failure(row: dict) -> str:
    name = " ".join(str(row[key]) for key in ("kind", "shape", "operation", "rows", "implementation") if row.get(key))
    return f"- {name}: {row.get('failure') or 'check is red, error ' + format(row['error'], '.1e')}"
