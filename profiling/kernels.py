"""Every operation of a GPT-2 pass, checked, then timed beside what torch offers; then whole passes in one CUDA graph.

    python -m profiling.kernels [--shapes gpt2 gpt2-large ...] [--dtype bfloat16] [--rows 1 16 64 128] [--out DIR]
    python -m profiling.kernels --operations tree_attention --shapes gpt2-large --rows 1 64    # what is worked on
    python -m profiling.kernels --rehearse --out DIR     # the whole flow on a CPU with the torch twins, at a toy size

An operation is right when its error against the torch twin in float64 (attention: float32 sums) is within the dtype's
tolerance and a row's bits are the same alone and among 64 rows; no speed is given for one that is not. Launches run in
CUDA graphs over copies of the inputs that exceed three times the L2 cache; where the GPU has early launches
(``kernels.gpu.early``), passes are also timed without. Percent of copy: the least bytes that the work moves, per
second, against a large device copy (read plus written) of the same run. Writes JSON after every row, and CSV, Markdown
and a roofline picture at the end. What fails is a row that says why; exit code 1 where there is one, 2 where nothing
can be timed.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kernels import reference
from profiling import passes, roofline
from profiling.calls import TOLERANCES, Call, bind, check, make_calls, relative_error, run
from profiling.comparators import FLEX, Comparator, as_rows, comparators
from profiling.flags import count, positive
from profiling.kernel_tables import OURS, WAITING, kernel_tables
from profiling.rows import Rows, about, timed
from profiling.shapes import SHAPES, Operation, Shape
from profiling.timing import ceilings, copies_for, first_line, is_cold, measure

CHECK_ROWS = 64
SPENT = "skipped: budget spent"
TINY = Shape("tiny", 2, 128, 2, vocab=500, positions=256)


class Setting(NamedTuple):
    """What a run measures with."""

    device: torch.device
    dtype: torch.dtype
    ops: ModuleType
    text_length: int
    samples: int
    deadline: float  # of time.monotonic
    rows: Rows
    chosen: tuple[str, ...] = ()  # operations; () = all of them, and passes

    def takes(self, operation: str) -> bool:
        return not self.chosen or operation in self.chosen


def guarded(setting: Setting, step: Callable[..., None], described: dict[str, Any], *args: Any) -> None:
    """Run one step of a benchmark: what it raises becomes a row, and past the deadline it is not begun."""
    name = " ".join(str(value) for value in described.values())
    if time.monotonic() > setting.deadline:
        print(f"{name}: skipped, the budget is spent", flush=True)
        setting.rows.add(**described, failure=SPENT)
        return
    try:
        step(setting, described, *args)
    except Exception as error:
        print(f"{name}: FAILED, {first_line(error)}", flush=True)
        setting.rows.add(**described, failure=first_line(error))


def count_failures(rows: list[dict[str, Any]]) -> int:
    """Rows of what went wrong; what there was no time for did not."""
    return sum(row.get("failure", SPENT) != SPENT or row.get("check") == "red" for row in rows)


def report(row: dict[str, Any]) -> None:
    """One line of progress."""
    print(
        f"{row['shape']:12} {row['operation']:16} {row['rows']:4} rows  {row['implementation']:28} "
        f"{row['microseconds']:9.2f} us  {row['gb_per_s']:7.0f} GB/s  {row['percent_of_copy']:5.1f} % of copy",
        flush=True,
    )


def precompile(setting: Setting, described: dict[str, Any], shapes: list[Shape], jobs: int) -> None:
    """Fill Triton's cache with every binary of the run, ``jobs`` at a time; no binary depends on the number of rows."""
    from kernels.gpu.launch import architecture, early_launches
    from profiling.machine_code import launches, source_of, try_compile

    start, arch = time.monotonic(), architecture(setting.device)
    sources = {}
    for shape, early in itertools.product(shapes, (False, True)):
        with early_launches(early):
            found = [source_of(each, arch) for _, each in launches(shape, CHECK_ROWS, setting.dtype, arch)]
        sources |= {source.key: source for source in found}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        reports = list(pool.map(partial(try_compile, arch=arch, fresh=False), sources.values()))
    refused = [report for report in reports if isinstance(report, str)]
    print(
        f"{len(sources)} binaries in {time.monotonic() - start:.0f} s, {len(refused)} refused {refused[:1]}", flush=True
    )


def measure_ceilings(setting: Setting, described: dict[str, Any]) -> None:
    """Copy, read and matrix rates; the run's first ones are what percentages refer to."""
    measured = ceilings(setting.device, setting.dtype)
    rates = {"copy_gb_per_s": measured.copy * 1e-9, "read_gb_per_s": measured.read * 1e-9}
    rates["matrix_tflops"] = measured.matrix * 1e-12
    setting.rows.ceilings = setting.rows.ceilings or measured._asdict()
    setting.rows.add(**described, **rates)
    print(f"copy {measured.copy / 1e9:.0f} GB/s, read {measured.read / 1e9:.0f} GB/s, ", end="")
    print(f"{measured.matrix_dtype} product {measured.matrix / 1e12:.1f} TFLOP/s", flush=True)


def check_shape(setting: Setting, described: dict[str, Any], shape: Shape, num_rows: int, right: set[str]) -> None:
    """Check every operation of ``shape``; the names of those that are right go into ``right``."""
    _, calls = make_calls(shape, num_rows, setting.dtype, setting.device, setting.text_length)
    single = (
        sorted({0, num_rows // 48 * 16, num_rows - 1}) if setting.device.type == "cuda" else [0, num_rows // 16 * 16]
    )

    def step(setting: Setting, described: dict[str, Any], call: Call) -> None:
        result = check(call, setting.ops, setting.dtype, [row for row in single if row < num_rows])
        verdict = "ok" if result["ok"] else f"RED, rows that differ alone: {result['different_rows']}"
        print(f"{shape.name:12} {described['operation']:16} error {result['error']:.1e}, {verdict}", flush=True)
        setting.rows.add(**described, check="ok" if result["ok"] else "red", error=result["error"])
        if result["ok"]:
            right.add(described["operation"])

    for name, call in calls.items():
        if setting.takes(name):
            guarded(setting, step, {**described, "operation": name}, call)


def time_shape(setting: Setting, described: dict[str, Any], shape: Shape, num_rows: int, right: set[str]) -> None:
    """Time the operations of ``shape`` that are right, each followed by what torch offers for it."""
    made = [make_calls(shape, num_rows, setting.dtype, setting.device, setting.text_length)]
    operations = made[0][0]
    streaming = [operation.bytes for operation in operations.values() if operation.flops]
    for _ in range(1, _affordable(setting.device, min(streaming))):
        made.append(make_calls(shape, num_rows, setting.dtype, setting.device, setting.text_length))
    for name, operation in operations.items():
        if not setting.takes(name):
            continue
        described = {**described, "operation": name}
        calls = [calls[name] for _, calls in made[: copies_for(operation.bytes, setting.device)]]
        if name not in right:
            setting.rows.add(**described, implementation=OURS, failure="no speed: the check is red")
            continue
        guarded(setting, _time_ours, {**described, "implementation": OURS}, operation, calls)
        for other in comparators(calls[0]):
            guarded(setting, _time_other, {**described, "implementation": other.name}, operation, calls, other)


def _affordable(device: torch.device, num_bytes: int) -> int:
    """Copies of all inputs of a shape: enough for its smallest operation to be cold, in half of the free memory."""
    copies = copies_for(num_bytes, device)
    if device.type != "cuda":
        return copies
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    one_set = max(1, torch.cuda.memory_allocated(device))  # the first set is all that is there
    return max(2, min(copies, (free // 2) // one_set))


def _time_ours(setting: Setting, described: dict[str, Any], operation: Operation, calls: list[Call]) -> None:
    _time(setting, described, operation, [bind(call, setting.ops) for call in calls])


def _time_other(
    setting: Setting, described: dict[str, Any], operation: Operation, calls: list[Call], other: Comparator
) -> None:
    timed_calls = other.make([call.arguments for call in calls])
    if other.same_result:
        theirs, ours = as_rows(timed_calls[0]()), run(calls[0], setting.ops).flatten(1)
        error = relative_error(theirs, ours[:, : theirs.shape[1]])  # without the maxima of the output head
        if not error <= 2 * TOLERANCES[setting.dtype]:
            raise ValueError(f"another result than ours: relative error {error:.1e}")
    _time(setting, described, operation, timed_calls)


def _time(setting: Setting, described: dict[str, Any], operation: Operation, timed_calls: list[Callable]) -> None:
    timing = measure(timed_calls, setting.device, setting.samples)
    columns = timed(timing, operation.bytes, operation.flops, setting.rows.ceilings["copy"])
    cold = is_cold(operation.bytes, len(timed_calls), setting.device)
    report(setting.rows.add(**described, **columns, cold=cold, copies=len(timed_calls)))


def time_passes(setting: Setting, described: dict[str, Any], shape: Shape, all_rows: list[int]) -> None:
    """Whole passes of ``shape`` with every number of rows, on the same weights, with and without early launches."""
    largest = max(all_rows)
    model = passes.random_model(shape, setting.dtype, setting.device, setting.ops)
    whole = passes.pass_of(model, shape.name, largest, setting.text_length)
    if not passes.same_root(whole):
        raise ValueError(f"the root's logits differ between passes of 1 and {largest} rows: no speed is given")
    for num_rows in sorted(all_rows):
        described = {"kind": "pass", "shape": shape.name, "operation": "pass", "rows": num_rows}
        few = passes.first_rows(whole, num_rows)
        guarded(setting, _time_pass, {**described, "implementation": OURS}, few)
        if setting.ops is not reference:
            guarded(setting, _time_waiting_pass, {**described, "implementation": WAITING}, few)


def _time_waiting_pass(setting: Setting, described: dict[str, Any], whole: passes.Pass) -> None:
    from kernels.gpu.launch import architecture, can_start_early, early_launches

    if not can_start_early(architecture(setting.device)):
        return
    forward = passes.forward(whole)
    plain = forward()
    with early_launches(False):
        if not torch.equal(forward(), plain):
            raise ValueError("other bits than with early launches: no speed is given")
        _time_pass(setting, described, whole)


def _time_pass(setting: Setting, described: dict[str, Any], whole: passes.Pass) -> None:
    timing = measure([passes.forward(whole)], setting.device, setting.samples, launches=1)
    shape, num_rows = whole.shape, len(whole.query.tokens)
    operations = {operation.name: operation for operation in passes.least(whole)}
    weights, flops = (
        sum(getattr(op, of) * op.repeats for op in operations.values()) for of in ("weight_bytes", "flops")
    )
    columns = timed(timing, weights, flops, setting.rows.ceilings["copy"])
    parts = {
        row["operation"]: row["microseconds"] * operations[row["operation"]].repeats
        for row in setting.rows.rows
        if row["kind"] == "operation" and row["implementation"] == OURS and "microseconds" in row
        if row["shape"] == shape.name and row["rows"] == num_rows
    }
    if len(parts) == len(operations):
        columns |= {"operations_microseconds": sum(parts.values())}
    same = {"kind": "pass", "shape": shape.name, "rows": 1, "implementation": described["implementation"]}
    one = [row for row in setting.rows.rows if row.items() >= same.items()]
    if num_rows > 1 and one and "microseconds" in one[0]:
        columns |= {"ratio_to_one_row": columns["microseconds"] / one[0]["microseconds"]}
    cold = is_cold(weights, 1, setting.device)
    launches = None if setting.ops is reference else passes.num_launches(whole)
    report(setting.rows.add(**described, **columns, cold=cold, launches=launches))


def time_flex(setting: Setting, described: dict[str, Any], shape: Shape, num_rows: int) -> None:
    """FlexAttention on the inputs of our tree attention."""
    operations, calls = make_calls(shape, num_rows, setting.dtype, setting.device, setting.text_length)
    operation, first = operations["tree_attention"], calls["tree_attention"]
    made = [first]
    for _ in range(1, copies_for(operation.bytes, setting.device)):
        k, v = (torch.randn_like(first.arguments[name]) for name in ("k_cache", "v_cache"))
        made.append(Call(first.function, {**first.arguments, "k_cache": k, "v_cache": v}))
    _time_other(setting, described, operation, made, FLEX)


def benchmark(setting: Setting, shapes: list[Shape], all_rows: list[int], flex: bool, jobs: int) -> None:
    """Everything, most wanted first; the artefacts are written at the end and after each shape."""
    if jobs > 1 and not setting.chosen:
        described = {"kind": "binaries", "shape": "", "operation": "all", "rows": 0}
        guarded(setting, precompile, described, shapes, jobs)
    ceiling = {"kind": "ceilings", "shape": "", "operation": "", "rows": 0}
    guarded(setting, measure_ceilings, {**ceiling, "implementation": "before"})
    if not setting.rows.ceilings:
        print("the copy rate could not be measured, so nothing can be compared with it", file=sys.stderr)
        raise SystemExit(2)
    for shape in shapes:
        right: set[str] = set()
        described = {"kind": "check", "shape": shape.name, "operation": "all", "rows": CHECK_ROWS}
        guarded(setting, check_shape, described, shape, CHECK_ROWS, right)
        for num_rows in all_rows:
            described = {"kind": "operation", "shape": shape.name, "operation": "all", "rows": num_rows}
            guarded(setting, time_shape, described, shape, num_rows, right)
        described = {"kind": "pass", "shape": shape.name, "operation": "pass", "rows": max(all_rows)}
        if not setting.chosen:
            guarded(setting, time_passes, {**described, "implementation": OURS}, shape, all_rows)
        write_artefacts(setting.rows)
    for num_rows in all_rows if flex and setting.takes("tree_attention") else []:
        described = {"kind": "operation", "shape": shapes[0].name, "operation": "tree_attention", "rows": num_rows}
        guarded(setting, time_flex, {**described, "implementation": FLEX.name}, shapes[0], num_rows)
    guarded(setting, measure_ceilings, {**ceiling, "implementation": "after"})
    write_artefacts(setting.rows)


def write_artefacts(rows: Rows) -> None:
    """CSV, Markdown and the picture; one that fails is no reason to lose the others."""
    text = kernel_tables(rows.document())
    for write in (
        rows.write_csv,
        lambda: rows.path("md").write_text(text, encoding="utf-8"),
        lambda: roofline.draw(rows.document(), rows.stem),
    ):
        try:
            write()
        except Exception as error:
            print(f"an artefact was not written: {first_line(error)}", flush=True)


def main() -> int:
    names = {shape.name: shape for shape in SHAPES.values()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=names, default=["gpt2-large", "gpt2", "gpt2-medium", "gpt2-xl"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=count, nargs="+", default=[1, 16, 64, 128])
    known = list(make_calls(TINY, 1, torch.float32, torch.device("cpu"), 9)[0])
    parser.add_argument(
        "--operations", nargs="+", choices=known, default=(), help="these alone; default: all, and passes"
    )
    parser.add_argument("--text-length", type=count, default=512, help="committed tokens before the tree")
    parser.add_argument("--samples", type=count, default=40)
    parser.add_argument("--budget-seconds", type=positive, default=480)
    parser.add_argument("--jobs", type=count, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--rehearse", action="store_true", help="the whole flow on the CPU with the torch twins")
    parser.add_argument("--out", type=Path, default=Path("profiling/results"))
    flags = parser.parse_args()
    gpu_here, dtype, chosen = torch.cuda.is_available(), getattr(torch, flags.dtype), tuple(flags.operations)
    deadline = time.monotonic() + flags.budget_seconds
    if flags.rehearse:
        if flags.out == parser.get_default("out"):
            parser.error("--rehearse needs --out DIR: its rows are no results")
        device, ops, shapes, flags.text_length, flags.samples = torch.device("cpu"), reference, [TINY], 100, 3
    else:
        from kernels import gpu as ops

        if not gpu_here:
            print("timing needs a GPU: `python -m profiling.aot --model` has modelled figures, --rehearse the flow")
            return 2
        device, shapes = torch.device("cuda"), [names[name] for name in flags.shapes]
    keyed = about(device, flags.rehearse)
    rows = Rows(flags.out, "kernels", {**keyed, "dtype": flags.dtype, "text_length": flags.text_length})
    setting = Setting(device, dtype, ops, flags.text_length, flags.samples, deadline, rows, chosen)
    with torch.no_grad():
        benchmark(setting, shapes, sorted(flags.rows), not flags.no_flex, 1 if flags.rehearse else flags.jobs)
    failures = count_failures(rows.rows)
    print(f"{len(rows.rows)} rows, {failures} of them failures, in {rows.path('json').name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
