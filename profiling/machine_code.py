"""Compile one recorded launch for a GPU that this machine need not have, and read what the machine code says.

Triton's own argument binder decides types and alignment, as it does at run time; the machine code comes from the
disassembler in Triton's wheel (NVIDIA) or is the compiler's assembly text (AMD). Loads are told apart by the source
line that the compiler notes beside each instruction.
"""

import ast
import collections
import functools
import hashlib
import importlib
import json
import re
import subprocess
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels import gpu
from kernels.gpu.launch import Launch, record
from kernels.layout import VOCAB_TILE, Sampling
from profiling.shapes import Operation, Shape, operations

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_SEED = gpu.new_seed(7, "meta")
DRAWS = {  # sampling, children
    "draw greedy": (Sampling(False, _SEED, 1.0, 0, 1.0, 0.0), 0),
    "draw greedy, children": (Sampling(False, _SEED, 1.0, 0, 1.0, 0.0), 8),
    "draw top-k": (Sampling(True, _SEED, 1.0, 50, 1.0, 0.0), 8),
    "draw top-p, min-p": (Sampling(True, _SEED, 1.0, 0, 0.9, 0.05), 8),
}
STREAMED = {"weight_ptr", "k_head_ptr", "v_head_ptr"}  # what a pass reads once and from far away

_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_SASS_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_AMD = re.compile(r"^\s+((?:[sv]|ds|buffer|global|flat)_\w+)")
_AMD_LINE = re.compile(r"^\s+\.loc\s+(\d+)\s+(\d+)")
_AMD_FILE = re.compile(r'^\s+\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]+)"', re.M)
_AMD_LOAD = re.compile(r"(?:buffer|global)_load_(dwordx?(\d)?|[us]short|short|[us]byte|ubyte)")


class Source(NamedTuple):
    """What selects one binary: everything Triton's cache would look at, as plain data."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int | bool]
    unset: frozenset[str] = frozenset()  # parameters at their default

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits of a hash of all of it, the same for every version of Triton.

        Parameters at their default are left out, so that a new one changes no key.
        """
        signature = {name: kind for name, kind in self.signature.items() if name not in self.unset}
        unset = {place for place, name in enumerate(self.signature) if name in self.unset}
        constants = {place: value for place, value in self.constants.items() if place[0] not in unset}
        given = {place: attribute for place, attribute in self.attributes.items() if attribute}
        fields = (self.module, self.kernel, signature, constants, given, self.options)
        return hashlib.sha256(json.dumps([str(field) for field in fields]).encode()).hexdigest()[:12]

    def constant(self, name: str) -> Any:
        """Value compiled in for a parameter, None if there is no such parameter."""
        names = list(self.signature)
        return self.constants.get((names.index(name),)) if name in names else None


class Report(NamedTuple):
    """What one binary needs of a multiprocessor and what its code is made of."""

    registers: int  # per thread
    spills: int  # instructions that touch local memory (NVIDIA), spilled registers (AMD)
    stack: int  # bytes per thread
    shared: int  # bytes per program
    tensor_memory: int  # columns per program, sm_100
    matrix: dict[str, int]  # matrix instructions by family
    wide: int  # global loads of 16 bytes a thread, anywhere
    narrow: int  # the other global loads
    streamed_wide: int  # of weights, keys and values alone
    streamed_narrow: int
    fused: int  # multiply-adds of the vector units in float32
    instructions: int
    seconds: float  # of the compiler


def launches(
    shape: Shape, num_rows: int, dtype: torch.dtype, arch: str, draws: bool = False, quantized: bool = False
) -> list[tuple[Operation, Launch]]:
    """Every launch of a pass under its operation, the output head with and without maxima; errors of the ops pass.

    ``draws`` adds sampling from its logits, under each of DRAWS; ``quantized`` keeps matrices in 8 bits.
    """
    with record(arch):
        found = operations(shape, num_rows, dtype, "meta", gpu, quantized=quantized)
        maxima = operations(shape, num_rows, dtype, "meta", gpu, tile_maxima=True, quantized=quantized)[-1]
    found.append(maxima._replace(name="lm_head, maxima", repeats=0))
    if draws:
        padded = triton.cdiv(shape.vocab, VOCAB_TILE) * VOCAB_TILE
        logits = torch.empty(num_rows, padded, dtype=dtype, device="meta")[:, : shape.vocab]
        positions = torch.empty(num_rows, dtype=torch.int32, device="meta")
        for name, (sampling, num_children) in DRAWS.items():
            call = functools.partial(gpu.draw, logits, positions, sampling, num_children)
            found.append(Operation(name, call, 0, 0, 0, 0))
    launched = []
    for operation in found:
        with record(arch) as recorded:
            operation.call()
        launched += [(operation, launch) for launch in recorded]
    return launched


def source_of(launch: Launch, arch: str) -> Source:
    """Bind the arguments of a recorded launch as ``kernel[grid](...)`` would on a device of ``arch``."""
    kernel, backend = launch.kernel, make_backend(TARGETS[arch])
    given = {**launch.arguments, **launch.constants, **launch.options}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(**given)
    _, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, options)
    unset = frozenset(param.name for param in kernel.params if param.has_default and param.name not in given)
    return Source(kernel.__module__, kernel.__name__, signature, constants, attributes, launch.options, unset)


def binary_of(source: Source, arch: str) -> Any:
    """Triton's compiled kernel; its ``asm`` holds every level of code. Whatever the compiler raises passes through."""
    kernel = getattr(importlib.import_module(source.module), source.kernel)
    ast_source = ASTSource(kernel, source.signature, source.constants, source.attributes)
    return triton.compile(ast_source, target=TARGETS[arch], options=source.options)


def compile_source(source: Source, arch: str) -> Report:
    """Compile and read. Whatever the compiler raises passes through."""
    start = time.perf_counter()
    binary = binary_of(source, arch)
    seconds = time.perf_counter() - start
    read = _read_sass(binary.asm["cubin"]) if arch.startswith("sm_") else _read_amd(binary.asm["amdgcn"])
    metadata = binary.metadata
    return Report(
        **read, shared=metadata.shared, tensor_memory=getattr(metadata, "tmem_size", None) or 0, seconds=seconds
    )


def try_compile(source: Source, arch: str, fresh: bool = True) -> Report | str:
    """``compile_source``; a str says why it failed. ``fresh``: in a throw-away cache, so that the seconds are the
    compiler's."""
    with tempfile.TemporaryDirectory() if fresh else nullcontext() as folder:
        if fresh:
            triton.knobs.cache.dir = folder
        try:
            return compile_source(source, arch)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def _ask(cubin: bytes, tool: str, *flags: str) -> str:
    """What one of the tools in Triton's wheel says of ``cubin``."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *flags, file.name], capture_output=True, text=True, check=True).stdout


def instructions_of(cubin: bytes) -> list[str]:
    """NVIDIA machine code: names of its instructions with their modifiers, in order."""
    lines = _ask(cubin, "nvdisasm", "-c").splitlines()
    return [found[1] for line in lines if (found := _SASS.match(line))]


def _read_sass(cubin: bytes) -> dict[str, Any]:
    usage, text = _ask(cubin, "cuobjdump", "--dump-resource-usage"), _ask(cubin, "nvdisasm", "-c", "-g")
    used = dict(re.findall(r"(REG|STACK):(\d+)", next(line for line in usage.splitlines() if "REG:" in line)))
    counts, loads, where = collections.Counter(), collections.Counter(), ("", 0)
    for line in text.splitlines():
        if found := _SASS_LINE.match(line):
            where = (found[1], int(found[2]))
        elif found := _SASS.match(line):
            name, *modifiers = found[1].split(".")
            counts[name] += 1
            if name in ("LDG", "LDGSTS", "UTMALDG"):
                loads[name == "UTMALDG" or "128" in modifiers, where in _streamed_lines()] += 1
    return {
        "registers": int(used["REG"]),
        "spills": counts["LDL"] + counts["STL"],
        "stack": int(used["STACK"]),
        "matrix": {name: count for name, count in sorted(counts.items()) if name.endswith(("MMA", "MMA2"))},
        "fused": counts["FFMA"] + counts["FFMA2"],
        **_loads(loads),
        "instructions": counts.total(),
    }


def _read_amd(text: str) -> dict[str, Any]:
    files = {number: str(Path(folder) / name) for number, folder, name in _AMD_FILE.findall(text)}
    counts, loads, where = collections.Counter(), collections.Counter(), ("", 0)
    for line in text.splitlines():
        if found := _AMD_LINE.match(line):
            where = (files.get(found[1], ""), int(found[2]))
        elif found := _AMD.match(line):
            counts[found[1]] += 1
            if load := _AMD_LOAD.match(found[1]):
                loads[load[2] == "4", where in _streamed_lines()] += 1
    matrix = collections.Counter()
    for name, count in counts.items():
        if name.startswith("v_mfma"):
            matrix["v_mfma_xf32" if "xf32" in name else "v_mfma"] += count

    def metadata(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("vgpr_spill_count"),
        "stack": metadata("private_segment_fixed_size"),
        "matrix": dict(matrix),
        "fused": sum(count for name, count in counts.items() if re.match(r"v_(pk_)?fmac?_f32", name)),
        **_loads(loads),
        "instructions": counts.total(),
    }


def _loads(loads: collections.Counter) -> dict[str, int]:
    """``loads`` counts by (16 bytes wide, of a streamed pointer)."""
    return {
        "wide": loads[True, True] + loads[True, False],
        "narrow": loads[False, True] + loads[False, False],
        "streamed_wide": loads[True, True],
        "streamed_narrow": loads[False, True],
    }


@functools.cache
def _streamed_lines() -> frozenset[tuple[str, int]]:
    """(file, line) of every ``tl.load`` in ``kernels/gpu`` whose address starts from a pointer in STREAMED.

    All lines of the call: where a loop of one step is folded, the compiler names the line of the address's arithmetic,
    or of what dead lanes hold.
    """
    found = set()
    for path in Path(gpu.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                names = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
                if names & STREAMED:
                    found |= {(str(path), line) for line in range(node.lineno, node.end_lineno + 1)}
    return frozenset(found)
