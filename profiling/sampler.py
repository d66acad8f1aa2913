"""What an iteration does beside its passes, checked, then timed: sampling, verification, draft², growth of the tree.

    python -m profiling.sampler [--rows 1 16 64] [--out DIR]      # a GPU
    python -m profiling.sampler --rehearse --out DIR              # the whole flow on a CPU with the torch twins

The logits are random rows of GPT-2's vocabulary in the dtype of the model, with the output head's tile maxima. No speed
is given for a draw that disagrees with its twin. Launches run in CUDA graphs, on the state that
``profiling.iteration`` makes; what changes it is timed together with the copy that restores it, and that copy alone.
Comparators: torch.topk, softmax and multinomial; FlashInfer's sampler where it is installed. Exit code 1 where
something is wrong, 2 where nothing can be timed.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from kernels import reference
from kernels.layout import VOCAB_TILE, Sampling
from profiling.flags import count
from profiling.iteration import NODES, WIDTH, iteration
from profiling.machine import signature
from profiling.markdown import table
from profiling.rows import Rows, about
from profiling.timing import first_line, measure

VOCAB = 50257
PADDED = -(-VOCAB // VOCAB_TILE) * VOCAB_TILE
CHILDREN = 4
_SEED = reference.new_seed(7)
SAMPLINGS = {
    "greedy": (Sampling(False, _SEED, 1.0, 0, 1.0, 0.0), 0),
    "greedy, 4 children": (Sampling(False, _SEED, 1.0, 0, 1.0, 0.0), CHILDREN),
    "top-k 50": (Sampling(True, _SEED, 1.0, 50, 1.0, 0.0), 0),
    "top-k 50, 4 children": (Sampling(True, _SEED, 1.0, 50, 1.0, 0.0), CHILDREN),
    "top-k 50, top-p 0.9": (Sampling(True, _SEED, 1.0, 50, 0.9, 0.0), 0),
    "top-p 0.9": (Sampling(True, _SEED, 1.0, 0, 0.9, 0.0), 0),
    "all tokens": (Sampling(True, _SEED, 1.0, 0, 1.0, 0.0), 0),
}


def random_logits(num_rows: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] in padded rows, and the maxima of their tiles."""
    rows = torch.randn(num_rows, PADDED, device=device).mul_(3).to(dtype)
    rows[:, VOCAB:] = -math.inf
    return rows[:, :VOCAB], rows.view(num_rows, -1, VOCAB_TILE).amax(-1).float()


def draw_call(
    ops: ModuleType, num_rows: int, dtype: torch.dtype, device: torch.device, sampling: Sampling, children: int
) -> Callable[[], tuple]:
    """One draw on rows of its own."""
    logits, maxima = random_logits(num_rows, dtype, device)
    positions = torch.arange(num_rows, dtype=torch.int32, device=device)
    rule = sampling.to(device)
    return lambda: ops.draw(logits, positions, rule, children, 0.85, maxima)


def disagreement(ops: ModuleType, dtype: torch.dtype, device: torch.device, num_rows: int) -> dict[str, str]:
    """Why each way to draw is wrong, "" where it agrees with the twin and with itself row by row."""
    logits, maxima = random_logits(num_rows, dtype, device)
    positions = torch.arange(num_rows, dtype=torch.int32, device=device)
    found = {}
    for name, (sampling, children) in SAMPLINGS.items():
        rule = sampling.to(device)
        tokens, ids, _ = ops.draw(logits, positions, rule, children, 0.85, maxima)
        expected, expected_ids, scores = reference.draw(logits.cpu(), positions.cpu(), sampling, children, 0.85)
        alone = [
            ops.draw(logits[i : i + 1], positions[i : i + 1].clone(), rule, children, 0.85, maxima[i : i + 1].clone())
            for i in (0, num_rows - 1)
        ]
        live = scores > -math.inf
        differing = int((tokens.cpu() != expected).sum()) + int((ids.cpu() != expected_ids)[live].sum())
        rows_differ = [i for i, one in zip((0, num_rows - 1), alone, strict=True) if int(one[0]) != int(tokens[i])]
        found[name] = (f"{differing} tokens differ from the twin's; " if differing else "") + (
            f"rows {rows_differ} differ alone" if rows_differ else ""
        )
    return found


def torch_sampler(num_rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """top-k 50 as people write it: topk, softmax, multinomial."""
    logits, _ = random_logits(num_rows, dtype, device)

    def run() -> torch.Tensor:
        values, ids = logits.float().topk(50, dim=-1)
        return ids.gather(1, torch.multinomial(values.softmax(-1), 1))

    return run


def flashinfer_sampler(num_rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """FlashInfer's top-k sampling from logits."""
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    logits, _ = random_logits(num_rows, dtype, device)
    contiguous = logits.float().contiguous()
    return lambda: top_k_top_p_sampling_from_logits(contiguous, 50, 1.0)


def attempt(
    rows: Rows, device, samples: int, operation: str, num_rows: int, implementation: str, make: Callable
) -> None:
    """Time what ``make`` builds; what it raises becomes a row."""
    described = {"operation": operation, "rows": num_rows, "implementation": implementation}
    try:
        timing = measure([make() for _ in range(4)], device, samples)
        rows.add(**described, **timing.columns)
        print(f"{operation:28} {num_rows:4} rows  {implementation:24} {timing.median * 1e6:9.2f} us", flush=True)
    except Exception as error:
        rows.add(**described, failure=first_line(error))
        print(f"{operation} {num_rows} rows {implementation}: FAILED, {first_line(error)}", flush=True)


def benchmark(rows: Rows, ops: ModuleType, all_rows: list[int], dtype, device: torch.device, samples: int) -> None:
    """Every way to draw that is right, its comparators, then the operations of the tree."""
    wrong, timed = disagreement(ops, dtype, device, 8), partial(attempt, rows, device, samples)
    for name, reason in wrong.items():
        rows.add(operation=f"draw, {name}", check="red" if reason else "ok", reason=reason)
        print(f"draw, {name}: {reason or 'ok'}", flush=True)
    for num_rows in all_rows:
        inputs = num_rows, dtype, device
        for name, (sampling, children) in SAMPLINGS.items():
            if not wrong[name]:
                timed(f"draw, {name}", num_rows, "ours", partial(draw_call, ops, *inputs, sampling, children))
        timed("draw, top-k 50", num_rows, "topk, softmax, multinomial", partial(torch_sampler, *inputs))
        if importlib.util.find_spec("flashinfer"):
            timed("draw, top-k 50", num_rows, "FlashInfer", partial(flashinfer_sampler, *inputs))
    made = partial(iteration, VOCAB, device, ops)
    work = made()
    timed("restore", NODES, "copy", lambda: made().restore)
    for name in work.calls:
        named = f"restore + {name}" if name in work.restored else name
        timed(named, WIDTH, "ours", lambda name=name: made().calls[name])
    rows.write_csv()
    rows.path("md").write_text(markdown(rows.document()), encoding="utf-8")


def markdown(document: dict) -> str:
    """The table of one run."""
    described = document["about"]
    title = "# Rehearsal: torch twins on a CPU, no result" if described["rehearsal"] else "# Between the passes"
    lines = []
    for row in document["rows"]:
        if "microseconds" in row:
            spread = f"{row['microseconds']:.1f} ({row['microseconds_q20']:.1f} - {row['microseconds_q80']:.1f})"
            lines.append([row["operation"], row["rows"], row["implementation"], spread])
    bad = [row for row in document["rows"] if "failure" in row or row.get("check") == "red"]
    parts = [
        title,
        f"{described['device']}, {described.get('dtype')}, vocabulary of {VOCAB}, {signature(described, 'Triton')}.\n"
        "Microseconds, median (quantiles 0.2 - 0.8), in a CUDA graph, the gap to the next launch included.",
        table(["operation", "rows", "implementation", "µs"], lines, "lrlr"),
        *(f"Not timed: {row['operation']}: {row.get('failure') or row.get('reason')}" for row in bad),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=count, nargs="+", default=[1, 16, 64])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--samples", type=count, default=40)
    parser.add_argument("--rehearse", action="store_true", help="the whole flow on the CPU with the torch twins")
    parser.add_argument("--out", type=Path, default=Path("profiling/results"))
    flags = parser.parse_args()
    dtype, gpu_here = getattr(torch, flags.dtype), torch.cuda.is_available()
    if flags.rehearse:
        if flags.out == parser.get_default("out"):
            parser.error("--rehearse needs --out DIR: its rows are no results")
        device, ops = torch.device("cpu"), reference
    else:
        from kernels import gpu as ops

        if not gpu_here:
            print("timing needs a GPU: `python -m profiling.aot` has the machine code, --rehearse the flow")
            return 2
        device = torch.device("cuda")
    keyed = about(device, flags.rehearse)
    rows = Rows(flags.out, "sampler", {**keyed, "dtype": flags.dtype})
    with torch.no_grad():
        benchmark(rows, ops, sorted(flags.rows), dtype, device, 2 if flags.rehearse else flags.samples)
    failures = sum("failure" in row or row.get("check") == "red" for row in rows.rows)
    print(f"{len(rows.rows)} rows, {failures} of them failures, in {rows.path('json').name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
