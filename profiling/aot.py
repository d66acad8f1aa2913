"""Compile every kernel for GPUs that this machine does not have; hold the machine code to gates and to a snapshot.

    python -m profiling.aot --check        # every shape, dtype and architecture; differences from the snapshot
    python -m profiling.aot --reduced      # what the tests compile
    python -m profiling.aot --model        # where the time of a pass should go, by arithmetic

What is compiled is what runs: launches are recorded from the public operations, bound to arguments by Triton's own
binder, and compiled once per binary. Exit status 1 when a gate fails or the snapshot of this Triton version differs.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.progress import track

from kernels.gpu import config
from kernels.gpu.forward import HEAD_DIMS
from kernels.gpu.launch import interpreting, record
from kernels.gpu.linear import linear
from profiling.aot_snapshot import differences, label, load_snapshot, write_snapshot
from profiling.cost import MACHINES, model_table, occupancy
from profiling.flags import count
from profiling.iteration import iteration
from profiling.machine import describe
from profiling.machine_code import TARGETS, Report, Source, launches, source_of, try_compile
from profiling.shapes import BUNDLED, GROWN, SHAPES

ALL_SHAPES = {**SHAPES, **BUNDLED}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROWS = (1, 2, 16, 17, 64, 128)  # of decoding passes: around the row tiles, and the ends
REGISTERS = {"sm": 255, "gfx": 512}  # that one thread can name
PRODUCTS = {"_linear_kernel", "_tree_attention_kernel", "_prefill_attention_kernel"}


class Job(NamedTuple):
    """One binary to compile, under the first operation that needs it; ``error`` is why nothing was launched."""

    arch: str
    dtype: str
    shape: str
    head_dim: int
    op: str
    source: Source | None
    error: str = ""


class Row(NamedTuple):
    """One binary, compiled; ``report`` is None where it does not compile or was never launched."""

    job: Job
    report: Report | None
    error: str = ""

    @property
    def programs(self) -> int:
        """Programs that one multiprocessor holds at a time."""
        return occupancy(self.report, self.job.source.options["num_warps"], self.job.arch)

    def as_json(self) -> dict[str, Any]:
        job, source = self.job, self.job.source
        named = {name: getattr(job, name) for name in ("arch", "dtype", "shape", "head_dim", "op")}
        if self.report is None:
            return {**named, "error": self.error}
        code = self.report._asdict() | {"seconds": round(self.report.seconds, 2)}
        return {**named, "tiles": tiles_text(source), "key": source.key, "programs": self.programs, **code}


def collect(
    archs: list[str],
    shapes: list[str],
    dtypes: list[str],
    head_dims: list[int],
    draws: bool = False,
    quantized: bool = False,
) -> tuple[list[Job], list[str]]:
    """One job per binary of these combinations, and a line for each operation whose binary depends on N.

    ``quantized``: of the linear layers alone, with weights in 8 bits.
    """
    jobs: dict[tuple, Job] = {}
    problems = []
    combinations = [(a, d, s, h) for a in archs for d in dtypes for s in shapes for h in head_dims]
    for arch, dtype, name, head_dim in combinations:
        if ALL_SHAPES[name].width % head_dim:
            continue
        shape = ALL_SHAPES[name].with_head_dim(head_dim)
        keys = defaultdict(set)
        for num_rows in (*ROWS, shape.positions):
            prefix = "prefill " if num_rows > max(ROWS) else ""
            try:
                recorded = launches(shape, num_rows, DTYPES[dtype], arch, draws and not prefix, quantized)
            except ValueError as error:
                job = Job(arch, dtype, name, head_dim, f"{prefix}pass of {num_rows} rows", None, str(error))
                jobs[job] = job
                continue
            if quantized:
                recorded = [(operation, launch) for operation, launch in recorded if "scales_ptr" in launch.arguments]
            for operation, launch in recorded:
                op = prefix + operation.name.removeprefix("prefill_") + ", int8" * quantized
                source = source_of(launch, arch)
                keys[op, source.kernel].add(source.key)
                jobs.setdefault((arch, source.key), Job(arch, dtype, name, head_dim, op, source))
        where = f"{arch} {dtype} {name} head_dim {head_dim}"
        problems += [
            f"{where} {op}: {len(found)} binaries of {kernel} for N in {ROWS}"
            for (op, kernel), found in keys.items()
            if len(found) > 1
        ]
    return list(jobs.values()), problems


def iteration_jobs(archs: list[str]) -> list[Job]:
    """Jobs for the operations of an iteration that belong to no model."""
    jobs = []
    for arch, (op, call) in itertools.product(archs, iteration(SHAPES["large"].vocab, "meta").calls.items()):
        with record(arch) as recorded:
            call()
        jobs += [Job(arch, "any", "iteration", 0, op, source_of(launch, arch)) for launch in recorded]
    return jobs


def tuned_jobs(archs: list[str], known: list[Job]) -> list[Job]:
    """Jobs for the rows of the tile table that no shape of ours uses, as plain linear layers of 64 rows."""
    table = json.loads(config.TABLE.read_text(encoding="utf-8")) if config.TABLE.exists() else {}
    linears = [job for job in known if job.source is not None and job.source.kernel == "_linear_kernel"]
    used = {(job.arch, f"{job.source.constant('M')}x{job.source.constant('K')} {job.dtype}") for job in linears}
    jobs = []
    for arch, key in sorted({(name, key) for name in archs for key in table.get(name, {})} - used):
        sizes, dtype = key.split(" ")
        num_outputs, depth = map(int, sizes.split("x"))
        x, weight, out = (
            torch.empty(*size, dtype=DTYPES[dtype], device="meta")
            for size in ((64, depth), (num_outputs, depth), (64, num_outputs))
        )
        with record(arch) as recorded:
            linear(x, weight, out)
        jobs += [Job(arch, dtype, "tuned", 0, f"linear {sizes}", source_of(launch, arch)) for launch in recorded]
    return jobs


def compile_all(jobs: list[Job], processes: int) -> list[Row]:
    """Rows of all jobs, in order; compiled side by side in fresh processes with a cache of their own."""
    compiled = [(job.source, job.arch) for job in jobs if job.source is not None]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(try_compile, *zip(*compiled, strict=True))
        console = Console(stderr=True)
        results = iter(list(track(done, "compiling", len(compiled), console=console, disable=not console.is_terminal)))
    rows = []
    for job in jobs:
        result = job.error if job.source is None else next(results)
        rows.append(Row(job, None, result) if isinstance(result, str) else Row(job, result))
    return rows


def expected_family(job: Job) -> str | None:
    """Matrix instruction that a binary's products must use, None for none; a function of arch, dtype and tiles."""
    if job.source.kernel not in PRODUCTS:
        return None
    if job.arch.startswith("gfx"):
        return "v_mfma"
    if job.dtype == "float32":  # IEEE products on the vector units
        return None
    left = "BLOCK_OUT" if job.source.constant("SWAPPED") else "BLOCK_ROWS"
    warpgroup = job.source.constant(left) >= 64 and job.source.options["num_warps"] >= 4
    return {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(job.arch, "HMMA") if warpgroup else "HMMA"


def gate_failures(row: Row) -> list[str]:
    """What is wrong with one binary, one line each; empty when it passes."""
    job, report = row.job, row.report
    if report is None:
        return [f"does not {'launch' if job.source is None else 'compile'}: {row.error}"]
    found = []
    limit = REGISTERS["gfx" if job.arch.startswith("gfx") else "sm"]
    if report.spills:
        found.append(f"{report.spills} spills, stack of {report.stack} bytes a thread")
    if report.registers > limit:
        found.append(f"{report.registers} registers, at most {limit}")
    if report.shared > (most := MACHINES[job.arch].program_shared):
        found.append(f"{report.shared} bytes of shared memory, at most {most}")
    if row.programs < 1:
        found.append("no program fits a multiprocessor")
    family = expected_family(job)
    if set(report.matrix) != ({family} if family else set()):
        found.append(f"matrix instructions {report.matrix or 'none'}, expected {family or 'none'}")
    if job.source.kernel in PRODUCTS and not report.matrix and not report.fused:
        found.append("neither matrix instructions nor fused multiply-adds")
    if job.source.kernel == "_linear_kernel" and (report.streamed_narrow or not report.streamed_wide):
        found.append(f"{report.streamed_wide} weight loads of 16 bytes, {report.streamed_narrow} narrower ones")
    return found


def tiles_text(source: Source) -> str:
    """Tiles and options as ``LinearTiles`` prints them, or the constants that other kernels have for theirs."""
    options = f"w{source.options['num_warps']} s{source.options['num_stages']}"
    sizes = [source.constant(name) for name in ("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_K", "WINDOW", "BLOCK")]
    text = "x".join(str(size) for size in sizes if size is not None)
    options += " swapped" if source.constant("SWAPPED") else ""
    splits = source.constant("SPLITS") or source.constant("PARTS")
    return f"{text} /{splits} {options}" if splits else f"{text} {options}"


def model_tables(archs: list[str]) -> list[str]:
    """What passes of GPT-2 Large should cost, and of the draft of ``profiling.grown``, in bfloat16 and int8."""
    large, draft = SHAPES["large"], GROWN[1]
    passes = [(large, 1, False), (large, 16, False), (large, 64, False), (draft, 16, False), (draft, 16, True)]
    return [model_table(arch, num_rows, shape, quantized) for arch in archs for shape, num_rows, quantized in passes]


def model_document(tables: list[str]) -> str:
    about = describe(torch.device("cpu"))
    body = "\n\n".join(f"```\n{table}\n```" for table in tables)
    return f"""# Where the time of GPT-2 Large and of a draft should go

Modelled, not measured, and fitted to no measurement: `profiling/cost.py` and its constants.
Triton {triton.__version__}, commit {about["commit"]}, {about["date"]}, `{about["command"]}`.

{body}
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiling.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all, float16 for GPT-2 Large alone")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, help="default: 64, 128 for Large alone")
    parser.add_argument("--reduced", action="store_true", help="what the tests compile, of GPT-2 Large")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, one a line")
    parser.add_argument("--check", action="store_true", help="compare with the snapshot of this Triton version")
    parser.add_argument("--update", action="store_true", help="rewrite that snapshot; takes every default")
    parser.add_argument("--model", action="store_true", help="print the cost model's tables and stop")
    parser.add_argument("--out", type=Path, help="with --model: also write them here, as Markdown")
    parser.add_argument("--processes", type=count, default=os.cpu_count())
    args = parser.parse_args(argv)
    chosen = (args.arch, args.shapes, args.dtypes, args.head_dims)
    args.complete = not args.reduced and not any(chosen)
    if args.reduced and any(chosen[1:]):
        parser.error("--reduced chooses shapes, dtypes and heads itself: leave --shapes, --dtypes, --head-dims out")
    if args.update and not args.complete:
        parser.error(
            "--update rewrites the whole snapshot: leave --arch, --shapes, --dtypes, --head-dims, --reduced out"
        )
    return args


def jobs_for(args: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """What the arguments ask for. Heads of 128 change attention alone, float16 has the tiles of bfloat16: by default
    GPT-2 Large stands for all shapes there."""
    archs, shapes = args.arch or list(TARGETS), args.shapes or list(ALL_SHAPES)
    large, drafts = ([name for name in shapes if name in chosen] for chosen in (["large"], ["small", "draft"]))
    hopper = [arch for arch in archs if arch == "sm_90"]
    if args.reduced:
        if not args.arch:
            archs.remove("sm_89")  # but for its shared memory it is sm_80
        parts = [(archs, large, ["bfloat16"], [64]), (hopper, large, ["float32"], [64])]
        parts.append((hopper, large, ["float16"], [128], True))
        parts.append((hopper, drafts[-1:], ["bfloat16"], [64], False, True))
    elif args.dtypes or args.head_dims:
        parts = [(archs, shapes, args.dtypes or list(DTYPES), args.head_dims or list(HEAD_DIMS), True)]
    else:
        parts = [(archs, shapes, ["bfloat16", "float32"], [64], True)]
        parts.append((archs, large, list(DTYPES), list(HEAD_DIMS), True))
        parts.append((archs, drafts, ["bfloat16"], [64], False, True))
        parts.append((hopper, drafts, ["float32"], [64], False, True))
    jobs, problems = {}, []
    collected = [collect(*part) for part in parts]
    if args.reduced or args.complete:
        collected.append((iteration_jobs(hopper if args.reduced else archs), []))
    for found, lines in collected:
        for job in found:
            jobs.setdefault((job.arch, job.source.key if job.source else job), job)
        problems += lines
    known = list(jobs.values())
    return known + (tuned_jobs(archs, known) if args.complete else []), list(dict.fromkeys(problems))


def main(argv: list[str] | None = None) -> int:
    if interpreting():
        print("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it", file=sys.stderr)
        return 2
    args = parse(argv)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.model:
        tables = model_tables(args.arch or list(TARGETS))
        print("\n\n".join(tables))
        if args.out:
            args.out.write_text(model_document(tables), encoding="utf-8")
        return 0
    jobs, problems = jobs_for(args)
    rows = compile_all(jobs, args.processes)
    printed = [row.as_json() for row in rows]
    for row, data in zip(rows, printed, strict=True):
        wrong = gate_failures(row)
        problems += [f"{label(data)}: {line}" for line in wrong]
        if args.json:
            print(json.dumps(data))
        else:
            print(
                f"{'FAIL' if wrong else 'ok'} {label(data)} " + " ".join(f"{k}={v}" for k, v in list(data.items())[7:])
            )
    if args.update:
        write_snapshot(printed, problems)
    elif args.check and (snapshot := load_snapshot()) is None:
        print(f"no snapshot for Triton {triton.__version__}: gates only", file=sys.stderr)
    elif args.check:
        problems += [f"snapshot: {line}" for line in differences(printed, snapshot["rows"], args.complete)]
    seconds = sum(data.get("seconds", 0) for data in printed)
    for line in problems:
        print(line, file=sys.stderr)
    print(
        f"Triton {triton.__version__}: {len(rows)} binaries, {seconds:.0f} s of compiling, {len(problems)} problems",
        file=sys.stderr,
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
