"""Snapshots of machine code, one per Triton version: what the compiler made of every binary, to notice when it changes.

A row is a binary as ``profiling.aot`` prints it. Register counts may move a little between compilers; spills,
shared memory and the family of matrix instructions may not. Instruction counts are kept, and not compared.
"""

import json
from pathlib import Path
from typing import Any

import torch
import triton

from profiling.machine import describe

RESULTS = Path(__file__).parent / "results" / "aot"
REGISTER_TOLERANCE = 8


def differences(rows: list[dict[str, Any]], snapshot: list[dict[str, Any]], complete: bool) -> list[str]:
    """Lines on how ``rows`` differ from the snapshot; ``complete`` asks that nothing of the snapshot be missing."""
    before = {_identity(row): row for row in snapshot}
    lines = []
    for row in rows:
        old = before.pop(_identity(row), None)
        if old is None:
            lines.append(f"{label(row)}: not in the snapshot")
            continue
        if "error" in row or "error" in old:
            if row.get("error") != old.get("error"):
                lines.append(f"{label(row)}: {old.get('error', 'compiled')} -> {row.get('error', 'compiles')}")
            continue
        changed = [name for name in ("spills", "shared") if row[name] != old[name]]
        changed += ["registers"] if abs(row["registers"] - old["registers"]) > REGISTER_TOLERANCE else []
        changed += ["matrix"] if set(row["matrix"]) != set(old["matrix"]) else []
        lines += [f"{label(row)}: {name} {old[name]} -> {row[name]}" for name in changed]
    if complete:
        lines += [f"{label(row)}: in the snapshot, no longer launched" for row in before.values()]
    return lines


def _identity(row: dict[str, Any]) -> tuple[str, str]:
    return row["arch"], row.get("key") or label(row)


def label(row: dict[str, Any]) -> str:
    where = f"{row['arch']} {row['dtype']} {row['shape']} head_dim {row['head_dim']} {row['op']}"
    return f"{where} {row['tiles']}" if "tiles" in row else where


def load_snapshot() -> dict[str, Any] | None:
    """The snapshot of the installed Triton: ``about`` and ``rows``. None if there is none."""
    return json.loads(_path().read_text(encoding="utf-8")) if _path().exists() else None


def write_snapshot(rows: list[dict[str, Any]], problems: list[str]) -> None:
    """Replace the snapshot of the installed Triton, one row a line, and the table for readers."""
    about = {**describe(torch.device("cpu")), "triton": triton.__version__, "problems": problems}
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (label(row), row.get("key", "")))
    kept = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in kept)
    _path().write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    (RESULTS / "aot.md").write_text(markdown(load_snapshot()), encoding="utf-8")


def _shown(row: dict[str, Any]) -> bool:
    """Of GPT-2 Large in bfloat16; draws of one vocabulary have one binary for all sizes, listed under the first."""
    if "error" in row or row["dtype"] not in ("bfloat16", "any"):
        return False
    return row["shape"] in ("large", "iteration") or (row["shape"] == "small" and row["op"].startswith("draw"))


def markdown(snapshot: dict[str, Any]) -> str:
    """The binaries of GPT-2 Large in bfloat16, one line each, and what fails."""
    about, rows = snapshot["about"], snapshot["rows"]
    chosen = [row for row in rows if _shown(row)]
    body = "\n".join(
        f"| {row['arch']} | {row['op']}{', D = 128' * (row['head_dim'] == 128)} | {row['tiles']} | "
        f"{row['registers']} | {row['shared'] / 1024:.1f} | "
        f"{row['programs']} | {', '.join(f'{n} {name}' for name, n in row['matrix'].items())} | "
        f"{row['streamed_wide']} / {row['streamed_narrow']} | {row['instructions']} |"
        for row in chosen
    )
    notes = [f"- fails: {line}" for line in about["problems"]]
    return f"""# Machine code of GPT-2 Large, bfloat16

Compiled ahead of time with Triton {about["triton"]} from the launches of a pass, without a GPU: {len(rows)} binaries of
all shapes, {len(about["problems"]) or "no"} problems. Commit {about["commit"]}, {about["date"]}, `{about["command"]}`.

Tiles are rows x outputs x depth / splits of linear layers, rows x window / parts of attention, then warps and stages.
"Programs" is how many one multiprocessor holds. Loads are of weights, keys and values: 16 bytes a thread / narrower.

| arch | operation | tiles | registers | shared KiB | programs | matrix instructions | loads | instructions |
| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: |
{body}

{chr(10).join(notes)}
"""


def _path() -> Path:
    return RESULTS / f"triton-{triton.__version__}.json"
