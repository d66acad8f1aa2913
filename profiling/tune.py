"""Fill the table of tiles: for every weight of GPT-2's shapes, try candidates and keep the best for 1 and 16 rows.

    python -m profiling.tune [--shapes gpt2-large ...] [--dtypes bfloat16] [--budget-seconds S] [--out DIR]   on a GPU
    python -m profiling.tune --model --arch sm_90 [--shapes ...]              without one: ranked by the cost model
    python -m profiling.tune --rehearse --out DIR                             the flow on a CPU with the torch twins

All candidates are timed briefly; the fastest FINALISTS, and the configuration in use, go on. One configuration serves
every number of rows, so it must give a row the same bits among 1, 2, 16, 17, 64 and 128 rows and in any place; then its
score is the mean, over 1 and 16 rows, of its time relative to the configuration in use (below 1 is faster). The winner
of a weight is written to the table (``kernels/gpu/tuned.json``, or ``--table``) as soon as that weight is done, with
what it was measured on. Modelled rows never replace measured ones. Changing a row changes bits of logits, though never
whether decoding is lossless: all of it uses one table.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels import reference
from kernels.gpu import config
from kernels.gpu.config import LinearTiles, linear_tiles
from profiling.bench import TIMED_ROWS, Bench
from profiling.calls import Call, bind, make_calls
from profiling.flags import count, positive
from profiling.rows import Rows, about
from profiling.shapes import GROWN, SHAPES, Operation, Shape
from profiling.tiles import candidates
from profiling.timing import first_line, memory_rates

WEIGHTS = ("layer_norm_qkv", "attn_proj", "mlp_fc_gelu", "mlp_proj", "lm_head")
TEXT_LENGTH = 64
FINALISTS = 6
MIN_GAIN = 0.01  # less than that is noise, and bits would change for it
REHEARSED = Shape("rehearsed", 1, 768, 12, vocab=5000, positions=256)


class Task(NamedTuple):
    """One weight: its operation in one shape and dtype, and the row of the table that it owns."""

    shape: Shape
    name: str
    dtype: torch.dtype
    arch: str

    def calls(self, num_rows: int, device: torch.device | str) -> tuple[Operation, Call]:
        """The operation on fresh inputs."""
        operations, calls = make_calls(self.shape, num_rows, self.dtype, device, TEXT_LENGTH)
        return operations[self.name], calls[self.name]

    def weight(self) -> tuple[int, int]:
        """Outputs and depth."""
        _, call = self.calls(1, "meta")
        return tuple(call.arguments["weight"].shape)

    @property
    def key(self) -> str:
        return config.key(*self.weight(), self.dtype)

    def current(self) -> LinearTiles:
        return linear_tiles(self.arch, *self.weight(), self.dtype)

    def candidates(self, limit: int) -> list[LinearTiles]:
        """The configuration in use first, then others, likely ones first."""
        outputs, depth = self.weight()
        found = candidates(self.arch, outputs, depth, self.dtype, self.name, limit)
        current = self.current()
        return [current, *(tiles for tiles in found if tiles != current)]


@contextmanager
def using(task: Task, tiles: LinearTiles):
    """Inside, the operation runs with ``tiles``: the table in memory has them, the file does not."""
    rows = config._table().setdefault(task.arch, {})
    before = rows.get(task.key)
    rows[task.key] = config.row(tiles)
    try:
        yield
    finally:
        rows.pop(task.key)
        if before is not None:
            rows[task.key] = before


def save(task: Task, tiles: LinearTiles, **provenance: Any) -> bool:
    """Write one row of the table at once. A modelled row does not replace a measured one: returns False."""
    table = json.loads(config.TABLE.read_text(encoding="utf-8")) if config.TABLE.exists() else {}
    old = table.get(task.arch, {}).get(task.key, {})
    if provenance["source"] == "model" and old.get("source") == "measured":
        return False
    table.setdefault(task.arch, {})[task.key] = config.row(tiles, **provenance)
    config.write_table(table)
    return True


def launch_of(task: Task, tiles: LinearTiles, num_rows: int) -> Any:
    """The launch that multiplies by the weight, recorded on tensors without storage."""
    from kernels import gpu
    from kernels.gpu.launch import record

    with using(task, tiles), record(task.arch) as launches:
        _, call = task.calls(num_rows, "meta")
        run_it = bind(call, gpu)
        launches.clear()  # of the route
        run_it()
    assert len(launches) == 1, f"{task.name} takes {len(launches)} launches"
    return launches[0]


def compile_all(task: Task, tiles: list[LinearTiles], pool: Executor | None) -> dict[LinearTiles, Any]:
    """What the compiler makes of each candidate: a ``Report`` or, where it refuses, why.

    On a GPU this also fills Triton's cache on disk, so that timing finds its binaries there.
    """
    from profiling.machine_code import source_of, try_compile

    sources = [source_of(launch_of(task, each, 64), task.arch) for each in tiles]
    reports = (pool.map if pool else map)(partial(try_compile, arch=task.arch, fresh=False), sources)
    return dict(zip(tiles, reports, strict=True))


def model(limit: int, pool: Executor | None, rows: Rows, task: Task) -> None:
    """Rank the candidates of one weight by the cost model and write the winner."""
    from profiling.cost import modelled_seconds

    reports, base, scored = compile_all(task, task.candidates(limit), pool), None, []
    for tiles, report in reports.items():
        described = {"kind": "modelled", "shape": task.shape.name, "operation": task.name, "tiles": str(tiles)}
        try:
            if isinstance(report, str) or report.spills:
                raise ValueError(report if isinstance(report, str) else f"{report.spills} spills")
            seconds = [modelled_seconds(launch_of(task, tiles, n), report, task.arch).seconds for n in TIMED_ROWS]
        except ValueError as error:
            rows.add(**described, failure=first_line(error))
            continue
        base = base or seconds
        score = sum(time / first for time, first in zip(seconds, base, strict=True)) / len(seconds)
        columns = {f"microseconds_{n}": time * 1e6 for n, time in zip(TIMED_ROWS, seconds, strict=True)}
        rows.add(**described, **columns, score=score, registers=report.registers, shared=report.shared)
        scored.append((score, tiles, columns))
    score, tiles, columns = winner(scored)
    saved = save(task, tiles, source="model", triton=rows.about["triton"], score=score, **columns)
    print(
        f"{task.shape.name:12} {task.name:15} {task.key:22} {len(scored)} of {len(reports)} fit; in use "
        f"{next(iter(reports))}, best {tiles}: score {score:.3f}{'' if saved else ' (a measured row stays)'}",
        flush=True,
    )


def winner(scored: list[tuple[float, LinearTiles, dict]]) -> tuple[float, LinearTiles, dict]:
    """The best score; the first, which is the configuration in use, unless another gains at least MIN_GAIN."""
    best = min(scored, key=lambda entry: entry[0])
    return best if best[0] <= 1 - MIN_GAIN else scored[0]


def race(task: Task, bench: Bench, tiles_in_order: list[LinearTiles], deadline: float, rows: Rows) -> list[LinearTiles]:
    """The configuration in use, which is the first, and the others that a brief look reached, fastest first."""
    current, *others = tiles_in_order
    seconds = {}
    for tiles in others:
        if time.monotonic() > deadline:
            print(f"{task.shape.name} {task.name}: budget spent after {len(seconds)} candidates", flush=True)
            break
        described = {"kind": "brief", "shape": task.shape.name, "operation": task.name, "tiles": str(tiles)}
        try:
            with using(task, tiles):
                seconds[tiles] = bench.brief()
        except Exception as error:
            rows.add(**described, failure=first_line(error))
            continue
        rows.add(**described, microseconds=seconds[tiles] * 1e6)
    return [current, *sorted(seconds, key=seconds.get)]


def tune(task: Task, bench: Bench, tiles_in_order: list[LinearTiles], deadline: float, rows: Rows) -> None:
    """Check and time the best candidates of one weight, the configuration in use first, and write the winner."""
    scored, base = [], None
    for tiles in race(task, bench, tiles_in_order, deadline, rows):
        if len(scored) > FINALISTS:  # with the configuration in use; wrong ones make room
            break
        described = {"kind": "tuned", "shape": task.shape.name, "operation": task.name, "tiles": str(tiles)}
        try:
            with using(task, tiles):
                wrong, same_bits = bench.bits()
                if wrong:
                    raise ValueError(wrong)
                columns = bench.times()
        except Exception as error:
            rows.add(**described, failure=first_line(error))
            if not scored:
                raise ValueError(f"the configuration in use, {tiles}, fails: {first_line(error)}") from error
            continue
        base = base or columns
        score = sum(columns[f"microseconds_{n}"] / base[f"microseconds_{n}"] for n in TIMED_ROWS) / len(TIMED_ROWS)
        rows.add(**described, **columns, score=score, same_bits=same_bits)
        scored.append((score, tiles, columns))
    score, tiles, columns = winner(scored)
    keys = {key: rows.about[key] for key in ("device", "triton", "torch", "commit", "date")}
    source = "rehearsal" if rows.about["rehearsal"] else "measured"
    save(task, tiles, source=source, score=score, candidates=len(scored), **columns, **keys)
    print(
        f"{task.shape.name:12} {task.name:15} {task.key:22} best of {len(scored)}: {tiles}, score {score:.3f}, "
        + ", ".join(f"{n}: {columns[f'microseconds_{n}']:.2f} us" for n in TIMED_ROWS)
        + f" ({columns['percent_of_copy_1']:.0f} % of copy)",
        flush=True,
    )


def tasks_of(shapes: list[Shape], dtypes: list[torch.dtype], weights: list[str], arch: str) -> list[Task]:
    """One task for every weight, dtype by dtype and shape by shape, what a pass reads most of first."""
    order = sorted(weights, key=lambda name: name in ("attn_proj", "lm_head"))
    return [Task(shape, name, dtype, arch) for dtype in dtypes for shape in shapes for name in order]


def main() -> int:
    names = {shape.name: shape for shape in (*SHAPES.values(), *GROWN)}
    shapes = ["gpt2-large", *(shape.name for shape in GROWN), "gpt2", "gpt2-xl", "gpt2-medium"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=names, default=shapes)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--arch", default="sm_90", help="with --model; otherwise that of the GPU")
    parser.add_argument("--model", action="store_true", help="rank by the cost model, without a GPU")
    parser.add_argument("--limit", type=count, default=40, help="candidates per weight")
    parser.add_argument("--jobs", type=count, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--samples", type=count, default=20)
    parser.add_argument("--budget-seconds", type=positive, default=480)
    parser.add_argument("--table", type=Path, help="table to read and write instead of the package's own")
    parser.add_argument("--rehearse", action="store_true", help="the whole flow on the CPU with the torch twins")
    parser.add_argument("--out", type=Path, help="folder for a row per candidate and a copy of the table")
    flags = parser.parse_args()
    deadline, gpu_here = time.monotonic() + flags.budget_seconds, torch.cuda.is_available()
    if flags.rehearse and (flags.out is None or flags.model):
        parser.error("--rehearse needs --out DIR and goes without --model")
    if not (flags.model or flags.rehearse or gpu_here):
        print("timing needs a GPU: --model ranks by the cost model, --rehearse runs the flow on a CPU")
        return 2
    if flags.rehearse:
        flags.table, flags.limit, flags.samples = flags.out / "tuned.json", 3, 2
    config.TABLE = flags.table or config.TABLE
    config._table.cache_clear()
    device = torch.device("cuda" if gpu_here and not (flags.model or flags.rehearse) else "cpu")
    keyed = about(device, flags.rehearse)
    if flags.model:
        keyed |= {"device": flags.arch, "processor": keyed["device"]}
    rows = Rows(flags.out, "tune-model" if flags.model else "tune", keyed)
    shapes, dtypes = [names[name] for name in flags.shapes], [getattr(torch, name) for name in flags.dtypes]
    failures = 0
    with ProcessPoolExecutor(flags.jobs, get_context("spawn")) if flags.jobs > 1 else nullcontext() as pool:
        if flags.model:
            step, arch = partial(model, flags.limit, pool, rows), flags.arch
        else:
            from kernels import gpu
            from kernels.gpu.launch import architecture

            ops, arch = (reference, "sm_90") if flags.rehearse else (gpu, architecture(device))
            shapes = [REHEARSED] if flags.rehearse else shapes
            copy_rate, _ = memory_rates(device)
            step = partial(measure_one, flags, pool, rows, device, ops, copy_rate, deadline)
        for task in tasks_of(shapes, dtypes, flags.weights, arch):
            described = {"kind": "failure", "shape": task.shape.name, "operation": task.name}
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError("skipped, the budget is spent")
                with torch.no_grad():
                    step(task)
            except Exception as error:
                failures += 1
                print(f"{task.shape.name} {task.name}: FAILED, {first_line(error)}", flush=True)
                rows.add(**described, failure=first_line(error))
            if flags.out is not None and config.TABLE.exists() and config.TABLE.parent != flags.out:
                shutil.copy(config.TABLE, flags.out / "tuned.json")
    return 1 if failures else 0


def measure_one(
    flags: Any,
    pool: Executor | None,
    rows: Rows,
    device: torch.device,
    ops: Any,
    copy_rate: float,
    deadline: float,
    task: Task,
) -> None:
    """Compile the candidates of one weight side by side, leave out those that spill, then tune."""
    order = task.candidates(flags.limit)
    if pool is not None and ops is not reference:
        try:
            reports = compile_all(task, order, pool)
            order = [tiles for tiles in order if tiles == order[0] or not getattr(reports[tiles], "spills", 0)]
        except Exception as error:  # then each is compiled when it is first launched
            print(f"{task.shape.name} {task.name}: not compiled beforehand, {first_line(error)}", flush=True)
    tune(task, Bench(task, device, ops, copy_rate, flags.samples), order, deadline, rows)


if __name__ == "__main__":
    sys.exit(main())
