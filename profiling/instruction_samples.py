"""Whose code a CPU thread runs: its instruction pointer, sampled by the Linux kernel.

Time inside an operation of the CPU backend is partly Python and numpy, so a stand-in around the operation cannot tell
how much of an iteration the interpreter takes. The kernel can: perf_event_open(2) notes the instruction pointer of the
calling thread some thousand times a second of its processor time, which slows nothing down, and the pointer lies in
the interpreter, in torch, in numpy or in the C library (allocation, copies, mathematics: for any of them). Where the
kernel does not permit it (kernel.perf_event_paranoid above 2, a sandbox, another system) there are no samples.
"""

import bisect
import ctypes
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERPRETER = "interpreter"
_SYSCALLS = {"x86_64": 298, "aarch64": 241}
_ATTRIBUTE_BYTES, _SOFTWARE, _CPU_CLOCK = 112, 1, 0
_SAMPLE_IP, _SAMPLE_TIME, _SAMPLE = 1, 4, 9
_EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR, _FREQUENCY, _USE_CLOCK = 1 << 5, 1 << 6, 1 << 10, 1 << 25
_MONOTONIC = 1  # the clock of time.perf_counter on Linux
_DATA_PAGES = 64  # 10,900 samples
_HEAD, _TAIL = 1024, 1032  # offsets in the page before the data


class InstructionSamples:
    """The ring of samples of this thread, since the last ``take``."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        page = mmap.PAGESIZE
        self._ring = mmap.mmap(descriptor, (1 + _DATA_PAGES) * page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def take(self) -> list[tuple[float, int]]:
        """Time (``time.perf_counter``) and instruction pointer of each sample; a full ring has dropped later ones."""
        head, tail = (struct.unpack_from("<Q", self._ring, at)[0] for at in (_HEAD, _TAIL))
        page, size, samples = mmap.PAGESIZE, _DATA_PAGES * mmap.PAGESIZE, []
        data = self._ring[page : page + size]
        while tail < head:
            record = bytes(data[(tail + i) % size] for i in range(24))
            kind, _, length, pointer, nanoseconds = struct.unpack("<IHHQQ", record)
            if kind == _SAMPLE:
                samples.append((nanoseconds * 1e-9, pointer))
            tail += length
        struct.pack_into("<Q", self._ring, _TAIL, head)
        return samples

    def close(self) -> None:
        self._ring.close()
        os.close(self._descriptor)


@contextmanager
def sampling(rate: int = 2000) -> Iterator[InstructionSamples | None]:
    """Samples of the calling thread, ``rate`` a second of its processor time; None where that is not permitted."""
    descriptor, samples = _open(rate), None
    if descriptor is not None:
        try:
            samples = InstructionSamples(descriptor)
        except OSError:  # no room for the ring
            os.close(descriptor)
    try:
        yield samples
    finally:
        if samples is not None:
            samples.close()


def _open(rate: int) -> int | None:
    number = _SYSCALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return None
    attribute = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
    flags = _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR | _FREQUENCY | _USE_CLOCK
    head = (_SOFTWARE, _ATTRIBUTE_BYTES, _CPU_CLOCK, rate, _SAMPLE_IP | _SAMPLE_TIME, 0, flags)
    struct.pack_into("<IIQQQQQ", attribute, 0, *head)
    struct.pack_into("<i", attribute, 92, _MONOTONIC)
    this_thread, any_processor, no_group, no_flags = 0, -1, -1, 0
    descriptor = ctypes.CDLL(None).syscall(number, attribute, this_thread, any_processor, no_group, no_flags)
    return descriptor if descriptor >= 0 else None


def owners(samples: list[tuple[float, int]]) -> list[tuple[float, str]]:
    """Time of each sample and whose code it lies in: INTERPRETER, "numpy", "torch", "C library" or "other"."""
    regions = _executable_regions(Path("/proc/self/maps").read_text())
    starts = [region[0] for region in regions]
    found = []
    for seconds, pointer in samples:
        index = bisect.bisect_right(starts, pointer) - 1
        inside = index >= 0 and pointer < regions[index][1]
        found.append((seconds, _owner(regions[index][2]) if inside else "other"))
    return found


def _executable_regions(maps: str) -> list[tuple[int, int, str]]:
    """Start, end and file of what can be executed, in order of addresses."""
    regions = []
    for line in maps.splitlines():
        addresses, permissions, *rest = line.split(maxsplit=5)
        if "x" in permissions:
            start, end = (int(part, 16) for part in addresses.split("-"))
            regions.append((start, end, rest[3] if len(rest) > 3 else ""))
    return regions


def _owner(path: str) -> str:
    name = Path(path).name
    if name.startswith(("python", "libpython")):
        return INTERPRETER
    if "/numpy" in path:
        return "numpy"
    if not path or "/torch" in path or name.startswith("libgomp"):  # no file: code that oneDNN generates
        return "torch"
    return "C library" if name.startswith(("libc.", "libc-", "libm.", "libstdc++", "ld-", "libpthread")) else "other"
