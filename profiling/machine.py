"""What a row of results must carry: processor or GPU, versions, commit, command; the most memory that work has held."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from decoding.command_line import printable

COMMIT = "STAGED_COMMIT"  # environment variable that names the code where the tree has no .git


def describe(device: torch.device) -> dict[str, str | int]:
    """The machine and the code that a result was measured with, on ``device``."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": printable(f"python -m profiling.{Path(sys.argv[0]).stem}", sys.argv[1:]),
    }


def signature(about: dict, also: str = "") -> str:
    """What a report says of the code that it was measured with; ``also`` names one more package of ``about``."""
    other = f"{also} {about[also.lower()]}, " if also else ""
    return f"torch {about['torch']}, {other}commit {about['commit']}, {about['date']}; `{about['command']}`"


def reset_memory(device: torch.device) -> None:
    """Count from what is held now. Where the kernel forbids it, ``peak_memory`` stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5): the peak resident set size


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes since ``reset_memory``: ``max_allocated`` and ``max_reserved`` on a GPU, else ``peak_rss``.

    Everything that the process has loaded is part of it, other models included: for one method's own need, run it
    alone. On a GPU only torch's allocator is counted, so a peer with an allocator of its own (CTranslate2) is missing.
    """
    if device.type == "cuda":
        return {
            "max_allocated": torch.cuda.max_memory_allocated(device),
            "max_reserved": torch.cuda.max_memory_reserved(device),
        }
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_rss": int(fields["VmHWM"].split()[0]) * 1024}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]  # none on ARM
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT, "unknown")
    return head.strip() + (" + changes" if dirty.stdout.strip() else "")
