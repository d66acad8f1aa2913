"""The most memory that a piece of work has held: resident memory of the process, or torch's on a GPU.

    reset(device); work(); peak(device)

Everything that the process has loaded is part of it, other models included: for one method's own need, run it alone.
"""

from contextlib import suppress
from pathlib import Path

import torch


def reset(device: torch.device) -> None:
    """Start over from what is held now. Where the kernel forbids it, ``peak`` stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5): the peak resident set size


def peak(device: torch.device) -> dict[str, int]:
    """Bytes since ``reset``: ``max_allocated`` and ``max_reserved`` on a GPU, else ``peak_rss``.

    On a GPU only torch's allocator is counted, so a peer with an allocator of its own (CTranslate2) is missing.
    """
    if device.type == "cuda":
        return {
            "max_allocated": torch.cuda.max_memory_allocated(device),
            "max_reserved": torch.cuda.max_memory_reserved(device),
        }
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_rss": int(fields["VmHWM"].split()[0]) * 1024}
