"""Rows of measured results: one file per run, written again after every row, so that a killed run keeps what it had."""

import csv
import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from profiling import machine
from profiling.timing import Timing, l2_bytes

KEYS = ("device", "commit", "torch", "triton", "rehearsal")  # of the run, repeated in every line of the CSV


def about(device: torch.device, rehearsal: bool) -> dict[str, Any]:
    """What the rows of a run are keyed by."""
    described = {**machine.describe(device), "triton": version("triton"), "rehearsal": rehearsal}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"multiprocessors": properties.multi_processor_count, "l2_bytes": l2_bytes(device)}
        described["driver_and_clocks"] = _nvidia_smi("driver_version,clocks.sm,clocks.mem,power.limit")
    elif rehearsal:
        described |= {"device": "cpu", "processor": described["device"]}
    return described


def version(package: str) -> str:
    """Installed version of ``package``, "none" without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _nvidia_smi(fields: str) -> str:
    try:
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_whole(path: Path, text: str) -> None:
    """Write a file of which another process, or a reader after a kill, never sees half."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Rows:
    """The rows of one run in ``out/<command>-<device>-<commit>.json`` and, when finished, ``.csv``."""

    def __init__(self, out: Path | None, command: str, about: dict[str, Any]):
        """``out`` None: nothing is written."""
        device = "rehearsal" if about["rehearsal"] else about["device"]
        name = "-".join([command, str(device), str(about["commit"])])
        self.stem = out and out / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        self.about, self.ceilings, self.rows = about, {}, []
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> dict[str, Any]:
        """Keep one row and write all of them."""
        self.rows.append(row)
        if self.stem is not None:
            self.write()
        return row

    def write(self) -> None:
        """Write the JSON file."""
        write_whole(self.path("json"), json.dumps(self.document(), indent=1, default=str) + "\n")

    def document(self) -> dict[str, Any]:
        return {"about": self.about, "ceilings": self.ceilings, "rows": self.rows}

    def write_csv(self) -> None:
        """The same rows as a flat table, each with the keys of the run."""
        keys = {key: self.about.get(key) for key in KEYS}
        flat = [{**keys, **row} for row in self.rows]
        write_csv(self.path("csv"), flat)

    def path(self, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{ending}")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A flat table of ``rows``: a column for every key that one of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def timed(timing: Timing, num_bytes: int, flops: int, copy_rate: float) -> dict[str, Any]:
    """Columns of a row that was timed; ``num_bytes`` are the least that the work moves, ``copy_rate`` is in bytes/s."""
    return {
        **timing.columns,
        "bytes": num_bytes,
        "flops": flops,
        "gb_per_s": num_bytes / timing.median * 1e-9,
        "percent_of_copy": 100 * num_bytes / timing.median / copy_rate,
        "tflops": flops / timing.median * 1e-12,
    }
