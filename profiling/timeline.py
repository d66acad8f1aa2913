"""Where an iteration's time goes: draft², draft, oracle, sample + verify, tree, and what lies between them.

    python -m profiling.timeline [--prompts DIR] [--count 8] [--tokens 64] [--out profiling/results/cpu]
    python -m profiling.timeline --oracle DIR --draft DIR --draft2 DIR --out DIR   # other models; on a GPU where one is
    nsys profile python -m profiling.timeline --ranges nvtx                        # or --ranges proton: for other tools

Prints a bar chart of one iteration and a table of all; with --out, both as JSON and Markdown, and traces for
https://ui.perfetto.dev. Prefill is not counted. On a CPU the time of each operation is taken around its call, and
"Python between operations" is the rest; since operations are partly Python themselves, two stricter figures stand
below: the time that no torch operator ran (under torch.profiler, whose bookkeeping counts as Python), and whose code
the processor was in (sampled by the Linux kernel). On a GPU kernels are timed by CUPTI, after torch.profiler; the rest
is idle time, inside iterations and between them. Bytes are arithmetic.
"""

import argparse
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

from decoding import StagedDecoder
from decoding.cli import add_model_flags, load_decoder
from decoding.compare import DEMO_PROMPTS, available_methods
from profiling import chart, machine, prompts, timeline_tables, trace
from profiling.flags import count, in_one_line
from profiling.instruction_samples import INTERPRETER, owners, sampling
from profiling.markdown import publish
from profiling.prompts import SETTINGS
from profiling.spans import PREFILL, Run, bytes_moved, generate, instrumented

SHORT = 24  # tokens of a generation that only warms up or shows the order of kernels


def measure_cpu(decoder: StagedDecoder, prompt_ids: list[list[int]], num_tokens: int, **how) -> tuple[list[Run], dict]:
    """Spans of all prompts, and the strict shares: whose code ran, and no torch operator."""
    decoder.generate(prompt_ids[0], min(SHORT, num_tokens), seed=0, **how)
    plain, runs, facts = [], [], {}
    with sampling() as samples, frozen():
        for found, operations in ((plain, False), (runs, True)):  # stand-ins are Python themselves
            with instrumented(decoder, operations=operations) as recorder:
                sampled = []
                for ids in prompt_ids:
                    found.append(generate(decoder, recorder, ids, num_tokens, **how))
                    if samples is not None:
                        sampled.append(owners(samples.take()))
            if samples is not None:
                facts |= lane_shares(runs, sampled, facts) if operations else code_shares(plain, sampled)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profiled([ProfilerActivity.CPU], path), instrumented(decoder, _only_prefill) as recorder:
            generate(decoder, recorder, prompt_ids[0], num_tokens, **how)
        facts["outside torch operators"] = trace.outside_operators(trace.read(path))
    return runs, facts


def code_shares(runs: list[Run], sampled: list[list[tuple[float, str]]]) -> dict[str, float]:
    """Whose code ran, as shares of all samples of the iterations."""
    found = Counter(owner for _, _, owner in _inside(runs, sampled))
    return {f"in: {name}": count / found.total() for name, count in found.items()}


def lane_shares(runs: list[Run], sampled: list[list[tuple[float, str]]], shares: dict[str, float]) -> dict[str, float]:
    """The interpreter's share among ``shares``, split as the samples of these runs lie in lanes."""
    lanes = (run.lane_at(seconds) for run, seconds, owner in _inside(runs, sampled) if owner == INTERPRETER)
    found, whole = Counter(lane or "between operations" for lane in lanes), f"in: {INTERPRETER}"
    return {f"{whole}, {lane}": shares.get(whole, 0.0) * count / found.total() for lane, count in found.items()}


def _inside(runs: list[Run], sampled: list[list[tuple[float, str]]]) -> Iterator[tuple[Run, float, str]]:
    """The samples of the iterations, each with its run."""
    for run, samples in zip(runs, sampled, strict=True):
        for seconds, owner in samples:
            if run.started <= seconds <= run.finished:
                yield run, seconds, owner


@contextmanager
def frozen() -> Iterator[None]:
    """Garbage collections leave alone what exists by now: else one looks at all that torch has made, once in some
    hundred iterations."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _only_prefill(text: str) -> AbstractContextManager:
    """A range around the prefill; those around every operation would only take time."""
    return record_function(text) if text == PREFILL else nullcontext()


def measure_cuda(
    decoder: StagedDecoder, prompt_ids: list[list[int]], num_tokens: int, path: Path, **how
) -> tuple[list[Run], dict]:
    """Kernels of the first prompt's iterations, traced into ``path``, and what the trace says of host and device.

    The first generation runs under ranges, which label the kernels of an iteration that the host launches one by one;
    the second one runs as it always does, perhaps in a CUDA graph.
    """
    ids, both = prompt_ids[0], [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as folder:
        eager = Path(folder) / "eager.json"
        with profiled(both, eager), instrumented(decoder, record_function) as recorder:
            generate(decoder, recorder, ids, SHORT, **how)
        pattern = trace.eager_iteration(trace.kernels(trace.read(eager)))
    settings = {"seed": 0, "ignore_eos": True} | how
    decoder.generate(ids, num_tokens, **settings)
    untraced = decoder.generate(ids, num_tokens, **settings).stats
    with profiled(both, path):
        out = decoder.generate(ids, num_tokens, **settings)
    events = trace.read(path)
    found = trace.matched(trace.kernels(events), pattern)
    run = trace.device_run(found, out.stats, bytes_moved(decoder))
    calls = trace.blocking_calls(events, run.started, run.finished)
    decoding = untraced["seconds"]["total"] - untraced["prefill_seconds"]
    facts = {
        f"blocking driver calls per iteration: {name}": count / run.num_iterations for name, count in calls.items()
    }
    facts["blocking driver calls per iteration"] = calls.total() / run.num_iterations
    facts["kernels per iteration"] = len(run.spans) / run.num_iterations
    facts["milliseconds without a profiler"] = 1e3 * decoding / untraced["stages"]["oracle"]["passes"]
    return [run], facts


@contextmanager
def profiled(activities: list[ProfilerActivity], path: Path):
    """A trace by torch.profiler of what runs inside, in ``path``."""
    with profile(activities=activities) as profiler:
        yield
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def part_rows(runs: list[Run], device: str) -> list[dict]:
    """Milliseconds of an iteration by part, over all ``runs``, and their share; they add up to "total"."""
    parts, iterations = sum((run.by_part() for run in runs), Counter()), sum(run.num_iterations for run in runs)
    total = sum(run.seconds for run in runs)
    if device == "cuda":
        inside, between = (sum(times) for times in zip(*map(trace.idle, runs), strict=True))
        parts |= {"idle inside iterations": inside, "idle between iterations": between}
    else:
        parts["Python between operations"] = total - parts.total()
    parts["total"] = total
    return [
        {"part": part, "milliseconds": 1e3 * seconds / iterations, "share": seconds / total}
        for part, seconds in parts.items()
    ]


def traffic_rows(runs: list[Run]) -> list[dict]:
    """What each stage's own operations read and write in an iteration, by arithmetic, beside how long they take."""
    iterations, rows = sum(run.num_iterations for run in runs), []
    for stage in runs[0].bytes_moved:
        moved = sum(run.bytes_moved[stage] * _counted(run) for run in runs)
        seconds = sum(span.end - span.start for run in runs for span in run.spans if span.lane == stage)
        if moved and seconds:
            passes = sum(run.stats["stages"].get(stage, {}).get("passes", 0) * _counted(run) for run in runs)
            rows.append(
                {
                    "stage": stage,
                    "passes": passes / iterations,
                    "megabytes": 1e-6 * moved / iterations,
                    "milliseconds": 1e3 * seconds / iterations,
                    "gb_per_s": 1e-9 * moved / seconds,
                }
            )
    return rows


def _counted(run: Run) -> float:
    """The share of a generation's iterations that the run shows: a device's has no beginning of the first."""
    return run.num_iterations / run.stats["stages"]["oracle"]["passes"]


def measure(decoder: StagedDecoder, prompt_ids: list[list[int]], num_tokens: int, folder: Path) -> tuple[dict, dict]:
    """Rows of every setting and method, and by the same names the first prompt's run; GPU traces go to ``folder``."""
    device = decoder.oracle.model.device.type
    document: dict[str, list[dict]] = {"rows": [], "traffic": [], "facts": []}
    shown: dict[str, Run] = {}
    for setting, sampled in SETTINGS.items():
        for method in available_methods(decoder):
            how = sampled | {"method": method}
            if device == "cuda":
                path = folder / f"trace-{setting.partition(' ')[0]}-{method}.json.gz"
                runs, facts = measure_cuda(decoder, prompt_ids, num_tokens, path, **how)
            else:
                runs, facts = measure_cpu(decoder, prompt_ids, num_tokens, **how)
            keys = {"setting": setting, "method": method}
            document["rows"] += [keys | row for row in part_rows(runs, device)]
            document["traffic"] += [keys | row for row in traffic_rows(runs)]
            document["facts"].append(keys | facts)
            shown[f"{setting}, {method}"] = runs[0]
    return document, shown


def under_ranges(decoder: StagedDecoder, prompt_ids: list[list[int]], num_tokens: int, ranges: str, out: Path) -> None:
    """Only run, for a tool outside: every method on the first prompt, under NVTX ranges or in Proton's scopes."""
    opener: Callable = torch.cuda.nvtx.range
    if ranges == "proton":
        import triton.profiler as proton

        proton.start(str(out / "proton"), hook="triton")
        opener = proton.scope
    with instrumented(decoder, opener) as recorder:
        for sampled in SETTINGS.values():
            for method in available_methods(decoder):
                generate(decoder, recorder, prompt_ids[0], num_tokens, method=method, **sampled)
    if ranges == "proton":
        proton.finalize()


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--prompts",
        type=prompts.folder_with(prompts.HUMANEVAL),
        help="folder with humaneval/HumanEval.jsonl.gz; default: three prompts",
    )
    flags.add_argument("--count", type=count, default=8, help="prompts; on a GPU the first one is traced")
    flags.add_argument("--tokens", type=count, default=64)
    flags.add_argument("--iterations", type=count, default=8, help="in the trace of a CPU")
    flags.add_argument("--ranges", choices=["nvtx", "proton"], help="a GPU: only run, under ranges for another tool")
    flags.add_argument("--out", type=Path, help="folder for rows, table and traces")
    add_model_flags(flags)
    return flags


def main() -> int:
    flags = parser().parse_args()
    if flags.ranges and not torch.cuda.is_available():
        print("--ranges needs a GPU")
        return 2
    with in_one_line("timeline", flags.out):
        decoder = load_decoder(flags)
        texts = prompts.humaneval(flags.prompts)[: flags.count] if flags.prompts else list(DEMO_PROMPTS)[: flags.count]
        prompt_ids = [decoder.encode(text) for text in texts]
        prompts.check_length(max(map(len, prompt_ids)), flags.tokens, decoder.oracle.model.config.n_positions)
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.out or Path(scratch)
        if flags.ranges:
            under_ranges(decoder, prompt_ids, flags.tokens, flags.ranges, folder)
            return 0
        document, shown = measure(decoder, prompt_ids, flags.tokens, folder)
    report(decoder, document, shown, flags, len(texts))
    return 0


def report(
    decoder: StagedDecoder, document: dict, shown: dict[str, Run], flags: argparse.Namespace, num_prompts: int
) -> None:
    """Charts and tables on the terminal; the same in ``flags.out``, named after the device."""
    about, device = machine.describe(decoder.oracle.model.device), decoder.oracle.model.device.type
    conditions = (
        f"{1 if device == 'cuda' else num_prompts} prompts x {flags.tokens} tokens, {decoder.runtime}, "
        f"{torch.get_num_threads()} threads; {about['device']}, {machine.signature(about)}"
    )
    console = Console(highlight=False, soft_wrap=True)
    charts = {title: chart.draw(run, device) for title, run in shown.items()}
    for title, drawn in charts.items():
        console.print(title, style="bold")
        console.print(drawn)
    fullest = {setting: title for title in charts for setting in SETTINGS if title.startswith(setting)}.values()
    text = timeline_tables.markdown(document, conditions, {title: charts[title].plain for title in fullest})
    publish(text, {"about": about, **document}, flags.out, device)
    if flags.out and device == "cpu":
        trace.write(flags.out / "trace.json.gz", shown, flags.iterations)


if __name__ == "__main__":
    sys.exit(main())
