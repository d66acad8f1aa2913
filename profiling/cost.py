"""A static model of what a launch should cost on a GPU, for ranking tiles and finding what a pass waits for.

    seconds = launch + rounds * serial + max(DRAM bytes / DRAM rate, L2 bytes / L2 rate, flops / rate)

``rounds``: how often the grid fills the GPU at the occupancy that registers and shared memory allow. ``serial``: what
one program waits for before and after its main loop, one thing after another: moments of a layer norm, the first
weights, the meeting of splits. The DRAM rate is the copy rate, or less where too few bytes are in flight to hide its
latency (Little's law). The model knows nothing of clocks under load, cache misses of activations, or the compiler's
schedule; it was never fitted to a measurement.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.gpu.launch import Launch
from kernels.layout import DEPTH_LIMIT, TAIL_ALIGNMENT, TAIL_LANES
from profiling.machine_code import Report, launches, source_of, try_compile
from profiling.shapes import SHAPES, Shape

LAUNCH = 1.3e-6  # s between kernels of a CUDA graph; reported for an H100 (Hazy Research, "Look Ma, No Bubbles", 2025)
LANES = 512  # 32-bit registers per lane of one scheduler, on all of these
SCHEDULERS = 4  # per multiprocessor, on all of these


class Machine(NamedTuple):
    """One GPU. Rates per second; sources: datasheet, reported (by others), measured (by us), estimate."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    copy: float  # bytes/s that a copy reaches, reads and writes together
    l2: float  # bytes/s from the L2 cache
    matrix: float  # flop/s, 16-bit, dense
    vector: float  # flop/s, float32
    dram_latency: float  # s, under load
    l2_latency: float  # s
    shared: int  # bytes of shared memory per multiprocessor
    reserved: int  # bytes of it that the driver takes from each program
    warps: int  # per scheduler
    programs: int  # per multiprocessor

    @property
    def program_shared(self) -> int:
        """Bytes of shared memory that one program may have."""
        return self.shared - self.reserved


# Multiprocessors, clocks, flop/s, shared memory and warps: datasheets and the CUDA programming guide. The latencies
# are estimates of the right size (microbenchmarks report 200-300 cycles to L2 and 500-800 to DRAM).
MACHINES = {
    # copy: reported, gpt-fast's practical peak of an A100 (datasheet 2.04e12); l2: datasheet, 5120 bytes a clock
    "sm_80": Machine(
        "A100 80GB", 108, 1.41e9, 1.7e12, 7.2e12, 312e12, 19.5e12, 0.7e-6, 0.2e-6, 164 << 10, 1024, 16, 32
    ),
    # copy: estimate, 91 % of the datasheet's 1.008e12; l2: estimate
    "sm_89": Machine(
        "RTX 4090", 128, 2.52e9, 0.92e12, 5.0e12, 165e12, 82.6e12, 0.6e-6, 0.15e-6, 100 << 10, 1024, 12, 24
    ),
    # copy: measured, the project's figure for an H200 (datasheet 4.8e12); l2: estimate
    "sm_90": Machine("H200", 132, 1.83e9, 4.3e12, 5.5e12, 989e12, 67e12, 0.7e-6, 0.2e-6, 228 << 10, 1024, 16, 32),
    # copy: estimate, 88 % of the datasheet's 8.0e12; l2: estimate
    "sm_100": Machine("B200", 148, 1.85e9, 7.0e12, 10e12, 2250e12, 75e12, 0.8e-6, 0.2e-6, 228 << 10, 1024, 16, 32),
    # copy: estimate, 77 % of the datasheet's 5.3e12; l2: estimate
    "gfx942": Machine("MI300X", 304, 2.1e9, 4.1e12, 10e12, 1307e12, 163e12, 0.9e-6, 0.25e-6, 64 << 10, 0, 8, 32),
}
TENSOR_MEMORY = 512  # columns per multiprocessor, sm_100


class Traffic(NamedTuple):
    """What a launch moves, computes and waits for, whatever the machine; ``text_length`` committed tokens."""

    dram_bytes: int  # each tensor once
    l2_bytes: int  # as often as programs ask for them
    flops: int  # dead rows of tiles included
    in_flight: int  # bytes that one program has requested in its main loop
    l2_trips: int  # to the L2 cache, one after another
    dram_trips: int


class Cost(NamedTuple):
    """MODELLED, not measured."""

    programs: int
    resident: int  # programs of one multiprocessor
    rounds: int
    traffic: Traffic
    in_flight: float  # bytes, whole GPU
    needed: float  # bytes in flight that the copy rate takes
    dram: float  # seconds, each of the following
    l2: float
    compute: float
    serial: float

    @property
    def seconds(self) -> float:
        return LAUNCH + self.serial + max(self.dram, self.l2, self.compute)

    @property
    def bound(self) -> str:
        """The largest part of it."""
        parts = {"dram": self.dram, "l2": self.l2, "compute": self.compute, "serial": self.serial, "launch": LAUNCH}
        return max(parts, key=parts.get)


def occupancy(report: Report, num_warps: int, arch: str) -> int:
    """Programs that one multiprocessor holds, by registers, warps, shared and tensor memory."""
    machine = MACHINES[arch]
    registers = max(8, math.ceil(report.registers / 8) * 8)
    warps = SCHEDULERS * min(machine.warps, LANES // registers)
    shared = report.shared + machine.reserved
    limits = [machine.programs, warps // num_warps, machine.shared // shared if shared else machine.programs]
    if report.tensor_memory:
        limits.append(TENSOR_MEMORY // report.tensor_memory)
    return min(limits)


def modelled_seconds(launch: Launch, report: Report, arch: str, text_length: int = 512) -> Cost:
    """Cost of a recorded launch whose binary is ``report``. Raises ValueError where no program fits, or for a kernel
    that the model does not know."""
    machine, num_warps = MACHINES[arch], launch.options["num_warps"]
    name = launch.kernel.__name__
    if name not in _TRAFFIC:
        raise ValueError(f"the model knows {sorted(_TRAFFIC)}, not {name}")
    traffic = _TRAFFIC[name](launch, text_length)
    resident = occupancy(report, num_warps, arch)
    if resident < 1:
        raise ValueError(f"no program of {name} fits a multiprocessor of {machine.name}")
    programs = math.prod(launch.grid)
    rounds = math.ceil(programs / (resident * machine.multiprocessors))
    running = programs / rounds
    in_flight, needed = running * traffic.in_flight, machine.copy * machine.dram_latency
    busy = min(1.0, running / machine.multiprocessors)
    halves = report.matrix and any(v.dtype.itemsize == 2 for v in launch.arguments.values() if torch.is_tensor(v))
    rate = (machine.matrix if halves else machine.vector) * busy
    waits = traffic.l2_trips * machine.l2_latency + traffic.dram_trips * machine.dram_latency
    return Cost(
        programs,
        resident,
        rounds,
        traffic,
        in_flight,
        needed,
        dram=traffic.dram_bytes / (machine.copy * min(1.0, in_flight / needed)),
        l2=traffic.l2_bytes / machine.l2,
        compute=traffic.flops / rate,
        serial=rounds * waits,
    )


def _linear(launch: Launch, text_length: int) -> Traffic:
    given, constants = launch.arguments, launch.constants
    m, k, splits = constants["M"], constants["K"], constants["SPLITS"]
    tile_rows, outputs, depth = constants["BLOCK_ROWS"], constants["BLOCK_OUT"], constants["BLOCK_K"]
    row_tiles, tiles, _ = launch.grid
    n, size = given["x_ptr"].shape[0], given["x_ptr"].element_size()
    normed, residual = given["norm_weight_ptr"] is not None, given["residual_ptr"] is not None
    weight_size = given["weight_ptr"].element_size()
    weights, x, out = m * k * weight_size, n * k * size, n * m * size * (2 if residual else 1)
    weights += given["scales_ptr"].nbytes if "scales_ptr" in given else 0
    steps = math.ceil(math.ceil(k / depth) / splits)
    partial = 2 * 4 * splits * n * m if splits > 1 else 0
    moments = given["moments_ptr"].nbytes * tiles * splits if normed else 0  # each program reads those of its rows
    moments += given["out_moments_ptr"].nbytes if given["out_moments_ptr"] is not None else 0
    return Traffic(
        dram_bytes=weights + x + out,
        l2_bytes=row_tiles * weights + tiles * x + partial + moments + out,
        flops=2 * row_tiles * tile_rows * m * k,
        in_flight=min(steps, max(1, launch.options["num_stages"] - 1)) * outputs * depth * weight_size,
        l2_trips=int(normed) + (3 if splits > 1 else 0) + 1,
        dram_trips=1,
    )


def _tree_attention(launch: Launch, text_length: int) -> Traffic:
    constants, (heads, blocks, _) = launch.constants, launch.grid
    q = launch.arguments["q_ptr"]
    n, size, width = q.shape[0], q.element_size(), heads * constants["D"]
    parts, window = constants["PARTS"], constants["WINDOW"]
    shared = max(0, text_length - 1 - DEPTH_LIMIT) // TAIL_ALIGNMENT * TAIL_ALIGNMENT
    tail = min(text_length, TAIL_LANES)
    steps = math.ceil(math.ceil(shared / window) / parts)
    state = 4 * (parts + 1) * n * (width + 2 * heads)
    return Traffic(
        dram_bytes=2 * size * width * (text_length - 1 + 2 * n),
        l2_bytes=2 * size * width * (blocks * shared + n * tail + n) + 2 * state,
        flops=4 * blocks * constants["BLOCK_ROWS"] * width * (steps * parts * window),
        in_flight=2 * min(window, max(shared, TAIL_LANES)) * constants["D"] * size,
        l2_trips=2 * max(steps, math.ceil(TAIL_LANES / constants["STEP"])) + 4,
        dram_trips=1,
    )


def _prefill_attention(launch: Launch, text_length: int) -> Traffic:
    constants, (blocks, heads) = launch.constants, launch.grid
    q = launch.arguments["q_ptr"]
    n, size, width, window = q.shape[0], q.element_size(), heads * constants["D"], constants["WINDOW"]
    visible = sum(math.ceil((block + 1) * constants["BLOCK_ROWS"] / window) * window for block in range(blocks))
    return Traffic(
        dram_bytes=2 * size * width * 2 * n,
        l2_bytes=2 * size * width * (visible + n),
        flops=4 * constants["BLOCK_ROWS"] * width * visible,
        in_flight=2 * window * constants["D"] * size,
        l2_trips=2,
        dram_trips=1,
    )


def _elementwise(launch: Launch, text_length: int) -> Traffic:
    """Embedding, routing: a gather of rows through an index, or something like it."""
    names = ("out_ptr", "tail_slots_ptr", "x_ptr")
    moved = sum(launch.arguments[name].nbytes for name in names if name in launch.arguments)
    return Traffic(3 * moved, 3 * moved, 0, 3 * moved // math.prod(launch.grid), 1, 2)


_TRAFFIC: dict[str, Callable[[Launch, int], Traffic]] = {
    "_linear_kernel": _linear,
    "_tree_attention_kernel": _tree_attention,
    "_prefill_attention_kernel": _prefill_attention,
    "_embed_kernel": _elementwise,
    "_route_kernel": _elementwise,
}


def model_table(arch: str, num_rows: int, shape: Shape = SHAPES["large"], quantized: bool = False) -> str:
    """Text: what each operation of a bfloat16 pass of ``num_rows`` rows should cost, and the pass; with weights in 8
    bits if ``quantized``."""
    machine, dtypes = MACHINES[arch], "bfloat16, int8 weights" if quantized else "bfloat16"
    lines = [
        f"MODELLED, not measured: {shape.name}, {dtypes}, N = {num_rows}, {machine.name} ({arch}), 512 tokens",
        f"{'operation':<18}{'x':>3}{'us':>8}{'serial':>8}{'DRAM MB':>9}{'L2 MB':>8}{'fit':>5}{'grid':>6}"
        f"{'rounds':>8}{'of copy':>9}  bound",
    ]
    seconds = moved = 0.0
    for operation, launch in launches(shape, num_rows, torch.bfloat16, arch, quantized=quantized):
        if not operation.repeats:
            continue
        report = try_compile(source_of(launch, arch), arch)
        cost = modelled_seconds(launch, report, arch)
        seconds += operation.repeats * cost.seconds
        moved += operation.repeats * cost.traffic.dram_bytes
        lines.append(
            f"{operation.name:<18}{operation.repeats:>3}{cost.seconds * 1e6:>8.2f}{cost.serial * 1e6:>8.2f}"
            f"{cost.traffic.dram_bytes / 1e6:>9.2f}{cost.traffic.l2_bytes / 1e6:>8.2f}{cost.resident:>5}"
            f"{cost.programs:>6}{cost.rounds:>8}"
            f"{_share(cost.traffic.dram_bytes, cost.seconds, machine):>9}  {cost.bound}"
        )
    total = f"{'pass':<18}{'':>3}{seconds * 1e6:>8.1f}{'':>8}{moved / 1e6:>9.1f}{'':>27}"
    return "\n".join([*lines, f"{total}{_share(moved, seconds, machine):>9}"])


def _share(moved: float, seconds: float, machine: Machine) -> str:
    return f"{moved / seconds / machine.copy:.0%}"
