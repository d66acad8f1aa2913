"""Where an iteration's time goes on a CPU: draft², draft, oracle, sampling, tree, and the Python between operations.

    python -m profiling.cpu [--prompts DIR] [--count 8] [--tokens 64] [--out profiling/results/cpu]

Every operation of a generation goes through the backend's module, so a stand-in that keeps the time of each call
accounts for all of it; what is left of an iteration is Python between the operations. Prefill is not counted.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import torch

from decoding import StagedDecoder
from decoding.compare import DEMO_PROMPTS
from decoding.config import METHODS
from profiling import machine, prompts

SETTINGS = {"greedy": {}, "top-k 50, T = 1": {"do_sample": True, "top_k": 50, "temperature": 1.0}}
PARTS = {
    "draw": "sampling",
    "lookup_nodes": "draft2",
    "learn": "draft2",
    "select_nodes": "tree",
    "insert_children": "tree",
    "stage_rows": "tree",
    "verify_and_commit": "tree",
}
LINEAR = ("layer_norm_linear", "layer_norm_qkv", "linear_residual", "lm_head")


class Timed:
    """A backend's operations, each call's seconds added to ``seconds`` under its part."""

    def __init__(self, ops: ModuleType, stage: str, seconds: Counter):
        self._ops, self._stage, self._seconds = ops, stage, seconds

    def __getattr__(self, name: str):
        attribute = getattr(self._ops, name)
        if not callable(attribute):
            return attribute
        kind = "linear" if name in LINEAR else "attention" if name == "tree_attention" else "other"
        part, seconds = PARTS.get(name, f"{self._stage}: {kind}"), self._seconds

        def timed(*arguments, **named):
            start = time.perf_counter()
            result = attribute(*arguments, **named)
            seconds[part] += time.perf_counter() - start
            return result

        self.__dict__[name] = timed
        return timed


def instrument(decoder: StagedDecoder) -> Counter:
    """Put a stand-in before every operation of ``decoder``; returns the seconds by part, which grow as it works.

    "started" is when the prefill of the latest generation had ended.
    """
    seconds: Counter = Counter()
    for stage in [*decoder.lower, decoder.oracle]:
        holder = stage.model if hasattr(stage, "model") else stage
        holder.ops = Timed(holder.ops, stage.name, seconds)
    begin = decoder.oracle.begin

    def begin_then_clear(*arguments):  # the oracle begins last, so what was counted before is prefill
        lease = begin(*arguments)
        seconds.clear()
        seconds["started"] = time.perf_counter()
        return lease

    decoder.oracle.begin = begin_then_clear
    return seconds


def measure(decoder: StagedDecoder, prompt_ids: list[list[int]], num_tokens: int) -> list[dict]:
    """A row per setting, method and part: milliseconds of an iteration, over all prompts, and their share."""
    seconds = instrument(decoder)
    rows = []
    for setting, sampling in SETTINGS.items():
        for method in METHODS:
            decoder.generate(prompt_ids[0], 8, seed=0, method=method, **sampling)
            parts, passes = Counter(), 0
            for ids in prompt_ids:
                out = decoder.generate(ids, num_tokens, seed=0, ignore_eos=True, method=method, **sampling)
                parts["total"] += time.perf_counter() - seconds.pop("started")
                parts.update(seconds)
                passes += out.stats["stages"]["oracle"]["passes"]
            parts["Python between operations"] = 2 * parts["total"] - sum(parts.values())
            for part, value in parts.items():
                row = {"setting": setting, "method": method, "part": part, "milliseconds": 1e3 * value / passes}
                rows.append(row | {"share": value / parts["total"]})
    return rows


def markdown(rows: list[dict], conditions: str) -> str:
    lines = ["# Where an iteration's time goes", "", f"{conditions}. Milliseconds of one iteration and their share."]
    for setting in SETTINGS:
        chosen = [row for row in rows if row["setting"] == setting]
        methods = [method for method in METHODS if any(row["method"] == method for row in chosen)]
        parts = sorted({row["part"] for row in chosen} - {"total"}) + ["total"]
        lines += ["", f"## {setting}", "", f"| part | {' | '.join(methods)} |", f"| --- |{' ---: |' * len(methods)}"]
        for part in parts:
            cells = []
            for method in methods:
                found = [row for row in chosen if (row["method"], row["part"]) == (method, part)]
                cells.append(f"{found[0]['milliseconds']:.2f} ({found[0]['share']:.0%})" if found else "")
            lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="folder with humaneval/HumanEval.jsonl.gz; default: three prompts")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="folder for cpu.json and cpu.md")
    flags = parser.parse_args()
    decoder = StagedDecoder.from_pretrained(device="cpu", dtype=flags.dtype, backend="torch")
    texts = prompts.humaneval(flags.prompts)[: flags.count] if flags.prompts else list(DEMO_PROMPTS)
    rows = measure(decoder, [decoder.encode(text) for text in texts], flags.tokens)
    about = machine.describe()
    conditions = (
        f"{len(texts)} prompts x {flags.tokens} tokens, {decoder.runtime}, {torch.get_num_threads()} threads; "
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date']}; `{about['command']}`"
    )
    table = markdown(rows, conditions)
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / "cpu.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (flags.out / "cpu.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
