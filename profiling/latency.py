"""End-to-end latency of one sequence, with the flags and the JSON of ``vllm bench latency``, every method in one run.

    python -m profiling.latency [--input-len 32,128 --output-len 128] [--num-iters 30 --num-iters-warmup 10]
        [--method baseline staged] [--peers [hf-generate ...]] [--do-sample --top-k 50 --temperature 1 --seed 0]
        [--prompts DIR | --random] [--oracle ID --draft ID --draft2 DIR] [--output-json latency.json]

An iteration runs every method on the same prompt, one after the other, by the same timer and through a streamer; eos is
ignored, so all give ``output-len`` tokens. The first ``num-iters-warmup`` iterations are not counted. Greedy unless
``--do-sample`` (vLLM's command samples), then iteration i has seed + i.

vLLM's prompt is random token ids, ``--random`` here. They would be unfair to speculation, which lives on text that can
be predicted; so prompts are code: the demo's, or HumanEval's with ``--prompts``. Each starts at the beginning of one,
is cut at ``input-len`` tokens, and goes on with those after it where it is too short.

- latency: from the call to its return; ``avg_latency``, ``std_latency``, ``latencies``, ``percentiles`` as in vLLM.
- time to first token: until the first tokens arrive, prefill included.
- burst: the tokens that one oracle pass gives, which arrive together. Inter-burst latency is the gap between two.
- inter-token latency: the gap before a burst divided by its tokens, counted once for each of them.
- tokens/s: ``output-len`` by the median latency. Against baseline: the median of the iterations' ratios of latencies.
- memory: see ``profiling.machine.peak_memory``.

Lists of lengths make a sweep. The JSON has a row per lengths and method under "rows"; at its top level are vLLM's keys,
for the first lengths and the fullest of our methods that ran. Markdown is written beside it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from decoding import StagedDecoder
from decoding.cli import add_model_flags, load_decoder
from decoding.compare import DEMO_PROMPTS, HFGenerate, available_methods
from decoding.config import METHODS, SamplingConfig, check_seed
from decoding.decoder import BUNDLED
from model import weights
from profiling import machine, peers, prompts
from profiling.flags import at_least, count, counts, in_one_line
from profiling.latency_table import markdown

PERCENTAGES = (10, 25, 50, 75, 90, 99)
VLLM_KEYS = ("avg_latency", "std_latency", "latencies", "percentiles")


class Burst(NamedTuple):
    """Tokens that arrived together, ``seconds`` after the generation had been called."""

    seconds: float
    tokens: int


class Measurement(NamedTuple):
    """One timed generation."""

    token_ids: list[int]
    seconds: float  # from the call to its return
    bursts: list[Burst]

    @property
    def time_to_first_token(self) -> float:
        return self.bursts[0].seconds if self.bursts else self.seconds

    @property
    def gaps(self) -> list[Burst]:
        """Every burst but the first, its seconds counted from the one before."""
        pairs = zip(self.bursts, self.bursts[1:], strict=False)
        return [Burst(this.seconds - before.seconds, this.tokens) for before, this in pairs]


class Clock:
    """A streamer that keeps when how many tokens arrived."""

    def __init__(self):
        self.bursts: list[Burst] = []
        self.prompt_is_next = True
        self.start = time.perf_counter()

    def put(self, token_ids: torch.Tensor) -> None:
        now = time.perf_counter()
        if self.prompt_is_next:
            self.prompt_is_next = False
        else:
            self.bursts.append(Burst(now - self.start, token_ids.numel()))

    def end(self) -> None:
        pass


def timed(
    system: peers.System, prompt_ids: list[int], max_new_tokens: int, sampling: dict[str, Any], device: torch.device
) -> Measurement:
    """Time ``system`` on one prompt; eos is ignored."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = Clock()
    token_ids = system.generate(prompt_ids, max_new_tokens, sampling, peers.NEVER, clock)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was launched beyond the end is part of the cost
    seconds = time.perf_counter() - clock.start
    return Measurement(token_ids, seconds, clock.bursts)


class Runs(NamedTuple):
    """All measurements of one system at one pair of lengths, an entry per iteration."""

    measured: list[Measurement]
    memory: dict[str, int]  # the largest of all iterations


def run(
    systems: list, prompt_ids: list[list[int]], output_len: int, sampling: dict, iters: int, warmup: int, device
) -> dict[str, Runs]:
    """Every system on every iteration's prompt, in turn; ``warmup`` iterations before the ``iters`` that are kept."""
    found = {system.name: Runs([], {}) for system in systems}
    for system in systems:
        system.warm_up(prompt_ids[0], output_len, sampling)
    steps = range(-warmup, iters)
    for i in track(steps, f"{len(prompt_ids[0])} + {output_len} tokens", disable=not sys.stderr.isatty()):
        prompt, drawn = prompt_ids[i % len(prompt_ids)], sampling | {"seed": sampling["seed"] + max(i, 0)}
        for system in systems:
            machine.reset_memory(device)
            one = timed(system, prompt, output_len, drawn, device)
            if i >= 0:
                runs = found[system.name]
                runs.measured.append(one)
                peak = machine.peak_memory(device)
                runs.memory.update({name: max(held, runs.memory.get(name, 0)) for name, held in peak.items()})
    return found


def latency_keys(seconds: list[float]) -> dict:
    """vLLM's keys, computed as it does."""
    points = np.percentile(seconds, PERCENTAGES).tolist()
    return {
        "avg_latency": float(np.mean(seconds)),
        "std_latency": float(np.std(seconds)),
        "latencies": list(seconds),
        "percentiles": {str(percentage): point for percentage, point in zip(PERCENTAGES, points, strict=True)},
    }


def spread(seconds: list[float]) -> dict[str, float] | None:
    """Mean, median, and the quantiles 0.9 and 0.99; None of nothing."""
    if not seconds:
        return None
    return {"mean": float(np.mean(seconds))} | {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 90, 99)}


def summary(runs: Runs, baseline: Runs | None) -> dict:
    """One row of results; ``speedup`` is None without a baseline."""
    measured = runs.measured
    seconds, gaps = [one.seconds for one in measured], [gap for one in measured for gap in one.gaps]
    num_tokens = sum(len(one.token_ids) for one in measured)
    ratios = (
        [] if baseline is None else [b.seconds / m.seconds for b, m in zip(baseline.measured, measured, strict=True)]
    )
    return {
        **latency_keys(seconds),
        "time_to_first_token": spread([one.time_to_first_token for one in measured]),
        "inter_token_latency": spread([gap.seconds / gap.tokens for gap in gaps for _ in range(gap.tokens)]),
        "inter_burst_latency": spread([gap.seconds for gap in gaps]),
        "tokens_per_second": num_tokens / len(measured) / float(np.median(seconds)),
        "tokens_per_oracle_pass": num_tokens / sum(len(one.bursts) for one in measured),
        "speedup": float(np.median(ratios)) if ratios else None,
        "memory": runs.memory,
    }


def rows_of(found: dict[str, Runs], systems: list, prompt_ids: list[list[int]], do_sample: bool, load_hf) -> list[dict]:
    """A row per system. Tokens are compared with those of our first method; a sampled peer's cannot be.

    ``load_hf()`` gives the oracle that says how close its two best logits were where a peer's text parts from ours.
    """
    rows, ours, hf = [], found[systems[0].name].measured, None
    for system in systems:
        runs, row = found[system.name], {"method": system.name}
        row |= summary(runs, found.get("baseline")) | {"identical": None, "differences": []}
        if not (system.greedy_only and do_sample):
            for i, (one, mine) in enumerate(zip(runs.measured, ours, strict=True)):
                if one.token_ids != mine.token_ids:
                    hf, prompt = hf or load_hf(), prompt_ids[i % len(prompt_ids)]
                    place = peers.first_difference(one.token_ids, mine.token_ids, hf, prompt)
                    row["differences"].append({"iteration": i} | place)
            row["identical"] = len(runs.measured) - len(row["differences"])
        rows.append(row)
    return rows


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input-len", type=counts, default=[32], help="tokens of the prompt; 32,128,512 for a sweep")
    flags.add_argument("--output-len", type=counts, default=[128], help="new tokens; a list for a sweep")
    flags.add_argument("--batch-size", type=int, default=1, choices=[1], help="one sequence at a time is all there is")
    flags.add_argument("--num-iters", type=count, default=30)
    flags.add_argument("--num-iters-warmup", type=at_least(0), default=10)
    flags.add_argument("--output-json", type=Path, help="also writes the table beside it, as .md")
    flags.add_argument("--method", nargs="+", choices=METHODS, help="default: all that the stages allow")
    flags.add_argument("--peers", nargs="*", choices=peers.NAMES, help="run these, too; without a name the usual ones")
    source = flags.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        type=prompts.folder_with(prompts.HUMANEVAL),
        help="folder with humaneval/HumanEval.jsonl.gz; default: the demo's",
    )
    source.add_argument("--random", action="store_true", help="random token ids, as vLLM does")
    flags.add_argument("--do-sample", action="store_true", help="draw tokens; greedy without it")
    flags.add_argument("--top-k", type=int, help="default: 50")
    flags.add_argument("--temperature", type=float, help="default: 1")
    flags.add_argument("--seed", type=int, default=0)
    add_model_flags(flags)
    return flags


def sampling_of(flags: argparse.Namespace) -> dict[str, Any]:
    """The sampling arguments of ``generate``. Raises ValueError for those that greedy decoding has no use for."""
    given = {name: getattr(flags, name) for name in ("top_k", "temperature") if getattr(flags, name) is not None}
    if given and not flags.do_sample:
        raise ValueError("--top-k and --temperature need --do-sample: without it decoding is greedy")
    return {"do_sample": flags.do_sample, "seed": flags.seed} | given


def prompts_of(flags: argparse.Namespace, decoder: StagedDecoder) -> tuple[Callable[[int], list[list[int]]], str]:
    """What gives the prompts of a length, and what they are, in words."""
    if flags.random:
        generator = torch.Generator().manual_seed(flags.seed)
        return lambda length: [
            torch.randint(decoder.oracle.vocab_size, (length,), generator=generator).tolist()
        ], "one prompt of random token ids"
    joinable = [f"{text}\n" for text in DEMO_PROMPTS]
    texts = prompts.humaneval(flags.prompts) if flags.prompts else joinable
    encoded = [decoder.encode(text) for text in texts]
    name = "HumanEval" if flags.prompts else "demo"
    return lambda length: prompts.of_length(encoded, length), f"{len(texts)} {name} prompts in turn, cut or joined"


def load_systems(flags: argparse.Namespace, skipped: dict[str, str]) -> tuple[StagedDecoder, list, Callable]:
    """The decoder, what is to be timed, and what loads the oracle in transformers. Raises ValueError."""
    decoder = load_decoder(flags)
    systems = [peers.Own(decoder, method) for method in flags.method or available_methods(decoder)]
    dtype, device = decoder.oracle.model.dtype, decoder.oracle.model.device
    oracle_dir = BUNDLED / "oracle" if flags.oracle == "bundled" else weights.locate(flags.oracle)
    if flags.peers is not None:
        draft = {"auto": BUNDLED / "draft", "none": None}.get(flags.draft, flags.draft)
        names = flags.peers or peers.defaults(device)
        systems += peers.load(names, oracle_dir, draft and weights.locate(draft), dtype, device, skipped.__setitem__)
    return decoder, systems, lambda: HFGenerate(str(oracle_dir), dtype, device)


class Setup(NamedTuple):
    """What a run needs, loaded and checked."""

    sampling: dict[str, Any]
    systems: list
    load_hf: Callable[[], HFGenerate]
    make_prompts: Callable[[int], list[list[int]]]
    device: torch.device
    about: dict[str, Any]


def prepare(flags: argparse.Namespace) -> Setup:
    """Raises ValueError or OSError for what the user can mend."""
    sampling, skipped = sampling_of(flags), {}
    SamplingConfig(**{name: value for name, value in sampling.items() if name != "seed"})
    check_seed(flags.seed)
    decoder, systems, load_hf = load_systems(flags, skipped)
    make_prompts, described = prompts_of(flags, decoder)
    prompts.check_length(max(flags.input_len), max(flags.output_len), decoder.oracle.model.config.n_positions)
    about = machine.describe(decoder.oracle.model.device) | {
        "runtime": str(decoder.runtime),
        "sampling": sampling,
        "prompts": described,
        "iterations": flags.num_iters,
        "warm_up": flags.num_iters_warmup,
        "skipped_peers": skipped,
    }
    return Setup(sampling, systems, load_hf, make_prompts, decoder.oracle.model.device, about)


def benchmark(flags: argparse.Namespace, setup: Setup) -> dict:
    """All rows and what they were measured with; written after every pair of lengths where a file was named."""
    document: dict[str, Any] = {"about": setup.about, "rows": []}
    for input_len in flags.input_len:
        prompt_ids = setup.make_prompts(input_len)
        for output_len in flags.output_len:
            counts = (flags.num_iters, flags.num_iters_warmup)
            found = run(setup.systems, prompt_ids, output_len, setup.sampling, *counts, setup.device)
            rows = rows_of(found, setup.systems, prompt_ids, flags.do_sample, setup.load_hf)
            document["rows"] += [{"input_len": input_len, "output_len": output_len} | row for row in rows]
            if flags.output_json:
                write(document, flags.output_json)
    return document


def write(document: dict, path: Path) -> None:
    """The JSON, vLLM's keys first, and the table beside it."""
    first = document["rows"][0]
    cell = [row for row in document["rows"] if all(row[k] == first[k] for k in ("input_len", "output_len"))]
    fullest = max((row for row in cell if row["method"] in METHODS), key=lambda row: METHODS.index(row["method"]))
    head = {key: fullest[key] for key in VLLM_KEYS} | {"method": fullest["method"]}
    path.write_text(json.dumps(head | document, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(document))


def main(arguments: list[str] | None = None) -> None:
    flags = parser().parse_args(arguments)
    with in_one_line("latency", flags.output_json and flags.output_json.parent):
        setup = prepare(flags)
    document = benchmark(flags, setup)
    print(markdown(document))
    if any(row["method"] in METHODS and row["differences"] for row in document["rows"]):
        raise SystemExit("methods differ: this is a bug")


if __name__ == "__main__":
    main()
