"""What a row of results must carry: processor or GPU, versions, commit, command."""

import os
import platform
import subprocess
import sys
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
