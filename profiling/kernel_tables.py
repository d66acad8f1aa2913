"""Markdown tables of a run of ``profiling.kernels``: one row of results, one line; failures at the end."""

from typing import Any

from profiling.machine import signature
from profiling.markdown import number, table

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
        f"{about['device']}, {about.get('dtype')}, text of {about.get('text_length')} tokens, "
        f"{signature(about, 'Triton')}"
    )
    if about["rehearsal"]:
        return f"{title}\n\n{conditions}."
    return (
        f"{title}\n\n{conditions}.\nMedians (quantiles 0.2 - 0.8) of launches in a CUDA graph, the gap to the next one "
        "included, inputs not in the L2 cache where not marked *; GB/s and percent of the copy rate by the least bytes "
        "that the work moves."
    )


def _ceilings(rows: list[dict]) -> str:
    names = ("copy_gb_per_s", "read_gb_per_s", "matrix_tflops")
    lines = [
        [f"{row['implementation']} the run", *(number(row[name], ".0f") for name in names)]
        for row in rows
        if row["kind"] == "ceilings" and "copy_gb_per_s" in row
    ]
    return table(["ceilings", "copy GB/s", "read GB/s", "product TFLOP/s"], lines)


def _passes(rows: list[dict]) -> str:
    measured = [row for row in rows if row["kind"] == "pass" and "microseconds" in row]
    if not measured:
        return ""
    header = ["pass of", "µs", "weights, GB/s", "% of copy", "vs 1 row", "launches", "sum of operations, µs"]
    lines = []
    for row in measured:
        ratio, total = number(row.get("ratio_to_one_row"), unit="x"), number(row.get("operations_microseconds"), ".1f")
        name = f"{row['rows']} rows{row['implementation'].removeprefix(OURS)}"
        lines.append([name, *_time_and_rates(row), ratio, row["launches"] or "", total])
    return table(header, lines, "r" * len(header))


def _operations(rows: list[dict]) -> str:
    measured = [row for row in rows if row["kind"] == "operation" and "microseconds" in row]
    if not measured:
        return ""
    header = ["operation", "rows", "implementation", "µs", "GB/s", "% of copy", "vs ours"]
    own, lines = {(row["operation"], row["rows"]): row for row in measured if row["implementation"] == OURS}, []
    for row in measured:
        ours = own.get((row["operation"], row["rows"]))
        ratio = "" if ours is None or ours is row else f"{row['microseconds'] / ours['microseconds']:.2f}x"
        lines.append([row["operation"], row["rows"], row["implementation"], *_time_and_rates(row), ratio])
    return table(header, lines, "lrlrrrr")


def _time_and_rates(row: dict) -> list[str]:
    warm = "" if row["cold"] else "*"
    spread = f"({row['microseconds_q20']:.2f} - {row['microseconds_q80']:.2f})"
    rates = number(row["gb_per_s"], ".0f"), number(row["percent_of_copy"], ".1f")
    return [f"{row['microseconds']:.2f}{warm} {spread}", *rates]


def _failure(row: dict) -> str:
    name = " ".join(str(row[key]) for key in ("kind", "shape", "operation", "rows", "implementation") if row.get(key))
    return f"- {name}: {row.get('failure') or 'check is red, error ' + format(row['error'], '.1e')}"
