"""How every kernel is launched: arguments checked first, compile options pinned, and launches recordable.

Recording replaces running: inside ``record(arch)`` the public operations, called on tensors of the device "meta", leave
a list of the launches they would make. Ahead-of-time compilation and the cost model read that list, so what they see
is what runs.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton

from kernels.layout import ALIGNMENT

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NUM_ARRIVALS = 65536  # counters that one launch may need
MAX_REGISTERS = 255  # that a thread of an NVIDIA GPU can name


class Launch(NamedTuple):
    """One kernel launch: ``arguments`` (tensors, numbers, None) by parameter name, ``constants`` compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int | bool]


class Recording(NamedTuple):
    arch: str
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
_early: ContextVar[bool] = ContextVar("early", default=True)


@contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, with the tiles of ``arch`` ("sm_90", "gfx942", ...)."""
    token = _recording.set(Recording(arch, []))
    try:
        yield _recording.get().launches
    finally:
        _recording.reset(token)


def architecture(device: torch.device) -> str:
    """Which row of the tile tables a device reads: "sm_90", "gfx942", "interpreter" on a CPU, or what is recorded."""
    if (recording := _recording.get()) is not None:
        return recording.arch
    return _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextmanager
def early_launches(wanted: bool) -> Iterator[None]:
    """Whether launches may start before the one ahead has finished (``kernels.gpu.early``), as they do by default.

    A CUDA graph keeps what held when it was captured.
    """
    token = _early.set(wanted)
    try:
        yield
    finally:
        _early.reset(token)


def can_start_early(arch: str) -> bool:
    """Whether a GPU has programmatic dependent launch: NVIDIA's from sm_90 on."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return triton.knobs.runtime.interpret


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict,
    constants: dict,
    num_warps: int = 4,
    num_stages: int = 1,
    all_registers: bool = False,  # else NVIDIA's assembler may spill a few to fit one more program
) -> None:
    """Run ``kernel`` on ``grid``, or record that it would run."""
    # Fused multiply-adds are pinned on: Triton announces another default, and a flip would move bits.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if all_registers and not is_amd():
        options["maxnreg"] = MAX_REGISTERS
    device = _device(arguments)
    if _early.get() and can_start_early(architecture(device)):
        options["launch_pdl"] = True
    if (recording := _recording.get()) is not None:
        recording.launches.append(Launch(kernel, grid, arguments, constants, options))
    else:
        with on_device(device):
            kernel[grid](**arguments, **constants, **options)


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, wherever the tensors lie: make theirs the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _device(arguments: dict[str, Any]) -> torch.device:
    return next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))


def is_amd() -> bool:
    """Whether the launch goes, or would go, to an AMD GPU."""
    recording = _recording.get()
    return recording.arch.startswith("gfx") if recording else torch.version.hip is not None


def require(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless ``tensor`` is contiguous, aligned, and of this shape (None = any), dtype and device."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be of {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    sizes = tensor.shape
    if len(sizes) != len(shape) or any(map(_differs, shape, sizes)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(sizes)}")
    if 0 in sizes and any(want is None and got == 0 for want, got in zip(shape, sizes)):  # noqa: B905
        raise ValueError(f"{name} must not be empty, got shape {list(sizes)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}")
    if tensor.device.type != "meta" and tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must be aligned to {ALIGNMENT} bytes, got address {tensor.data_ptr():#x}")


def _differs(want: int | None, size: int) -> bool:
    return want is not None and want != size


def cdiv(count: int, size: int) -> int:
    """How many parts of ``size`` hold ``count``; Triton's own is a function of its language, and slow on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not below ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()


def arrivals(count: int, device: torch.device) -> torch.Tensor:
    """Counters int32 [NUM_ARRIVALS] by which programs of one launch learn who is last; zero before and after it.

    One set per device: launches that count must not overlap across streams. Raises ValueError for more than there are.
    """
    if count > NUM_ARRIVALS:
        raise ValueError(f"the launch needs {count} arrival counters, there are {NUM_ARRIVALS}: pass fewer rows")
    return _arrivals(device)


@functools.cache
def _arrivals(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device)
