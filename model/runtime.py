"""Where and how a model runs: device, dtype and backend, each resolved from "auto" or refused by name."""

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from kernels import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A resolved choice. ``ops`` is the module of operations that the forward pass and the loop call."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    ops: ModuleType

    def __str__(self) -> str:
        return f"{self.backend} backend on {self.device}, {str(self.dtype).removeprefix('torch.')}"


def resolve(device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", backend: str = "auto") -> Runtime:
    """Raises ValueError for a device that is not there and for a dtype or backend that is not supported."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no GPU")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    ops = _operations(backend, device)
    if backend == "triton" and device.type == "cpu":
        if str(dtype).removeprefix("torch.") == "bfloat16":
            raise ValueError("Triton's interpreter computes bfloat16 wrongly: dtype must be float32 or float16 there")
        dtype = torch.float32 if dtype == "auto" else dtype
    return Runtime(device, _dtype(dtype, device), backend, ops)


def _operations(backend: str, device: torch.device) -> ModuleType:
    if backend == "torch":
        return reference
    try:
        gpu = importlib.import_module("kernels.gpu")
    except ImportError as error:
        raise ValueError(f"backend 'triton' was asked for, but Triton cannot be imported: {error}") from error
    if device.type == "cpu" and not gpu.interpreting():
        raise ValueError("backend 'triton' needs a GPU (on a CPU it runs in Triton's interpreter: TRITON_INTERPRET=1)")
    return gpu


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    named = DTYPES.get(str(dtype).removeprefix("torch."))
    if named is None:
        raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}, got {dtype!r}")
    return named


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device has matrix or dot-product instructions for bfloat16."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
